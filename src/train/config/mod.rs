//! The experiment as a file: TOML, every key checked, every default stated here.

mod keys;
mod listing;
mod parse;

pub use keys::{Absent, Key, TABLES, Table, defaults, smallest};
pub use listing::literal;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::compute::Compute;
use super::data::{BadLines, Order};
use crate::error::{Error, Result};
use crate::folder::adapter::{AdapterConfig as PeftConfig, Targets};
use crate::graph::LOGIT_BYTES;
use crate::layers::Layers;
use crate::mesh::{Division, Wire};
use crate::model::{Model, ModelConfig, Weights};
use crate::plan::{DataChoice, Optimizer, Sharding, Sum};
use crate::schedule::ALL_NAMES;

/// In a run's folder: the config with which it was last trained.
pub const CONFIG: &str = "config.toml";

/// A whole config file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What is trained. In the file this table may name a model folder instead, as `path`.
    pub model: ModelConfig,
    /// `model.path`: the folder, run or checkpoint whose weights the run begins with; from the seed if none.
    #[serde(skip)]
    pub path: Option<String>,
    /// Whether sequences hold several records, which the text says once it is read ([`Config::settle`]).
    #[serde(skip)]
    pub shared: bool,
    /// Train an adapter of this kind and leave the model as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<AdapterConfig>,
    /// On which text.
    pub data: DataConfig,
    /// How.
    pub train: TrainConfig,
    /// On which devices, in which schedule.
    #[serde(default)]
    pub pipeline: PipelineConfig,
    /// Along which other axes the work is divided.
    #[serde(default)]
    pub mesh: MeshConfig,
    /// What is written.
    #[serde(default)]
    pub output: OutputConfig,
}

/// The text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// Paths and globs, from the config's folder or the working directory. By their names files are records (`.jsonl`),
    /// tokens (`.bin`) or text.
    pub train: Vec<String>,
    /// As `train`, for evaluation.
    #[serde(default)]
    pub valid: Vec<String>,
    /// The last part of the text, this fraction of it, is for evaluation; 0 for none.
    #[serde(default)]
    pub split: f64,
    /// `bytes`: a token is a byte; else a `tokenizer.json` or the folder it is in. By default the one of the model's
    /// folder, and bytes without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<String>,
    /// Whether a line that is no record ends the run (`refuse`) or is counted and left out (`skip`).
    #[serde(default)]
    pub bad_lines: BadLines,
    /// Fields of records that have other names in these files ([`FIELDS`](super::data::FIELDS)).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub keys: BTreeMap<String, String>,
    /// Sequences in file order, or in a seeded permutation an epoch.
    #[serde(default = "shuffled")]
    pub order: Order,
}

/// Optimisation. One step sees `batch` sequences of `sequence` tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Steps in all. Where `epochs` says less, as many as that makes.
    #[serde(default)]
    pub steps: u64,
    /// How often each sequence is seen; part of one may be. The number of steps follows once the text is read, so a run
    /// keeps only that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epochs: Option<f64>,
    /// Sequences of a step.
    pub batch: usize,
    /// Tokens of a sequence.
    pub sequence: usize,
    /// Highest learning rate.
    #[serde(default = "learning_rate")]
    pub learning_rate: f64,
    /// Where the cosine ends; a tenth of `learning_rate` by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub minimum_learning_rate: Option<f64>,
    /// Steps over which the learning rate rises; by default [`WARMUP`], or a tenth of `steps` where that is less.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warmup: Option<u64>,
    /// Decay of matrices.
    #[serde(default = "weight_decay")]
    pub weight_decay: f64,
    /// Largest norm of the gradient; 0 does not clip.
    #[serde(default = "clip_norm")]
    pub clip_norm: f64,
    /// AdamW's decay of the first moment.
    #[serde(default = "beta1")]
    pub beta1: f64,
    /// AdamW's decay of the second moment.
    #[serde(default = "beta2")]
    pub beta2: f64,
    /// AdamW's epsilon.
    #[serde(default = "epsilon")]
    pub epsilon: f64,
    /// Seed of initial weights and of the order of the data.
    #[serde(default = "seed")]
    pub seed: u64,
    /// How matrices are stored: `f32`, `bf16` (packed; those that are trained have an f32 master beside them) or
    /// `bf16-only`. By default `f32`; where an adapter is trained, `bf16` if the model's files store that.
    #[serde(default)]
    pub weights: Weights,
    /// In what numbers devices multiply matrices: `"f32"`, `"f16"` (operands in f16, sums and everything else in f32), or a list with
    /// one of them for each device.
    #[serde(default)]
    pub compute: Compute,
    /// Most MiB of logits that exist at once: more are computed a part of the vocabulary at a time, once in the forward and once in
    /// the backward pass.
    #[serde(default = "logits")]
    pub logits: u64,
    /// Steps between evaluations, where there is text for them; the last step always has one.
    #[serde(default = "evaluate_every")]
    pub evaluate_every: u64,
    /// Stop after this many evaluations in a row that were no better than the best; 0 goes on to the last step.
    #[serde(default)]
    pub patience: u64,
}

/// Steps over which the learning rate rises in a run of many, unless it says otherwise.
pub const WARMUP: u64 = 10;

impl TrainConfig {
    /// Bytes of logits that exist at once, at most.
    pub fn logit_bytes(&self) -> u64 {
        self.logits.saturating_mul(1 << 20)
    }

    /// Steps over which the learning rate rises.
    pub fn warmup(&self) -> u64 {
        self.warmup.unwrap_or(WARMUP.min(self.steps.div_ceil(10)))
    }
}

/// Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685), in PEFT's terms.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdapterConfig {
    /// Columns of B and rows of A.
    #[serde(default = "rank")]
    pub rank: usize,
    /// The product of B and A is scaled by `alpha / rank`.
    #[serde(default = "alpha")]
    pub alpha: f64,
    /// Scale by `alpha` over the root of `rank` instead (Kalajdzievski 2023, arXiv 2312.03732).
    #[serde(default)]
    pub rank_stabilised: bool,
    /// Which linear layers: the ends of their names, `"all-linear"`, or a regular expression. By default those that PEFT
    /// takes for the kind of model: the projections of queries and values.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub targets: Option<Targets>,
}

impl Default for AdapterConfig {
    fn default() -> Self {
        AdapterConfig { rank: rank(), alpha: alpha(), rank_stabilised: false, targets: None }
    }
}

impl AdapterConfig {
    /// As PEFT's configuration, for a model.
    pub fn peft(&self, model: &Model) -> PeftConfig {
        let usual: &[&str] = if model.config().kind.is_llama() { &["q_proj", "v_proj"] } else { &["c_attn"] };
        let usual = || Targets::Names(usual.iter().map(|name| name.to_string()).collect());
        PeftConfig {
            r: self.rank,
            alpha: self.alpha,
            use_rslora: self.rank_stabilised,
            targets: self.targets.clone().unwrap_or_else(usual),
            dropout: 0.0,
            fan_in_fan_out: false,
            base_model: None,
            task_type: Some("CAUSAL_LM".into()),
        }
        .for_model(model)
    }
}

/// What a folder says of the model in it.
#[derive(Clone, Debug)]
pub struct Described {
    /// Its extents.
    pub model: ModelConfig,
    /// The adapter on it, if the folder is an adapter's.
    pub adapter: Option<AdapterConfig>,
    /// How its files store matrices.
    pub weights: Weights,
}

/// Devices and schedule.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PipelineConfig {
    /// `"auto"`, a number of devices, or a list of adapters.
    #[serde(default)]
    pub devices: Devices,
    /// A schedule's name, `"auto"` for one synthesised for these devices, or a file with one written by hand, from the
    /// config's folder or the working directory. The planner chooses by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schedule: Option<String>,
    /// Microbatches of a step; they divide `train.batch`, and are at most 4096. The planner chooses by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub microbatches: Option<usize>,
    /// Where the stages after the first begin: how many layers are before, 3.5 for the middle of block 2. The planner
    /// chooses by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cuts: Option<Vec<Layers>>,
    /// Which stages compute activations again in the backward pass: all, none, or these. The planner chooses by default
    /// those that would not fit otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recompute: Option<Recompute>,
    /// Whether to cut again, between two steps, when steps keep taking more than a tenth longer or shorter than
    /// predicted.
    #[serde(default)]
    pub replan: bool,
}

impl PipelineConfig {
    /// The file that `schedule` names; none if it is a schedule's own name.
    pub fn schedule_file(&self) -> Option<&str> {
        self.schedule.as_deref().filter(|name| !ALL_NAMES.contains(name))
    }
}

/// Most devices that are tried for a gang.
const MOST_MEMBERS: usize = 8;

/// Axes beside that of the pipeline.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MeshConfig {
    /// Pipelines beside each other, each for a share of a step's microbatches: `"auto"`, a number, or the shares.
    /// [`PipelineConfig::devices`] then lists the devices of one after those of another.
    #[serde(default)]
    pub data: Axis,
    /// Devices that divide every layer among them: how many, the share of each in proportion, or `"auto"`. By default a device has whole
    /// layers. [`PipelineConfig::devices`] then lists the members of one gang after those of another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tensor: Option<Axis>,
    /// Whether the members of a gang divide also what lies between the divided halves of blocks, norms and sums, each with its
    /// share of the tokens (Megatron's sequence parallelism): less memory, and what passes between them comes in more pieces.
    #[serde(default)]
    pub sequence_parallel: bool,
    /// As what tensors travel between devices: as they are, or rounded to bf16, half of the bytes.
    #[serde(default)]
    pub wire: Wire,
    /// ZeRO's level, 1 to 3: whether those that have a stage divide the optimizer state, gradients too, or weights too;
    /// `"auto"` for the least that fits. By default 1, and what fits where that is asked for of the optimizer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zero: Option<Level>,
    /// In which order gradients are added: by replica (`share`) or by microbatch, which has the bits of one device. From
    /// level 2 on it is always `microbatch`.
    #[serde(default)]
    pub sum: Sum,
    /// Where AdamW's state is and weights are updated: on the devices that have the weights, in the host's memory, or there if
    /// it does not fit otherwise.
    #[serde(default)]
    pub optimizer: OptimizerPlace,
}

/// A level of ZeRO.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Level {
    /// `"auto"`: the least that fits.
    Named(String),
    /// This one.
    Fixed(u8),
}

/// Where weights are updated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerPlace {
    /// On the devices if that fits.
    Auto,
    /// On the devices.
    #[default]
    Device,
    /// In the host's memory.
    Host,
}

/// How many parts an axis has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Axis {
    /// `"auto"`: the planner decides.
    Named(String),
    /// So many, of sizes that the planner chooses.
    Count(usize),
    /// One of each of these sizes.
    Shares(Vec<usize>),
}

impl Default for Axis {
    fn default() -> Self {
        Axis::Named("auto".into())
    }
}

impl MeshConfig {
    /// What the planner has to choose from.
    pub fn choice(&self) -> DataChoice {
        match &self.data {
            Axis::Named(_) => DataChoice::Any,
            Axis::Count(count) => DataChoice::Count(*count),
            Axis::Shares(shares) => DataChoice::Shares(shares.clone()),
        }
    }

    /// Who has what of the state, in the order in which that is tried: one way where nothing is left open.
    ///
    /// # Errors
    ///
    /// Those of [`Sharding::new`].
    pub fn shardings(&self) -> Result<Vec<Sharding>> {
        let places: &[Optimizer] = match self.optimizer {
            OptimizerPlace::Auto => &[Optimizer::Device, Optimizer::Host],
            OptimizerPlace::Device => &[Optimizer::Device],
            OptimizerPlace::Host => &[Optimizer::Host],
        };
        let all = |level: u8| places.iter().map(move |&place| Sharding::new(level, self.sum, place));
        match &self.zero {
            Some(Level::Fixed(level)) => all(*level).collect(),
            None if self.optimizer != OptimizerPlace::Auto => all(1).collect(),
            // What passes a device with every microbatch costs more than what the host keeps.
            None | Some(Level::Named(_)) => {
                let higher = places[places.len() - 1];
                let higher = [2, 3].map(|level| Sharding::new(level, self.sum, higher));
                all(1).chain(higher).collect()
            }
        }
    }

    /// The first of them.
    ///
    /// # Errors
    ///
    /// Those of [`Sharding::new`].
    pub fn sharding(&self) -> Result<Sharding> {
        self.shardings().map(|all| all[0])
    }

    /// Fixes who has what.
    pub fn settle(&mut self, sharding: Sharding) {
        let level = Level::Fixed(sharding.zero);
        // What is so without being said is not said.
        if self.zero.as_ref() != Some(&level) {
            self.zero = (sharding.zero != 1).then_some(level);
        }
        self.optimizer = if sharding.by_host() { OptimizerPlace::Host } else { OptimizerPlace::Device };
    }

    /// How the members of a gang divide every layer.
    pub fn division(&self) -> Division {
        let shares = match &self.tensor {
            Some(Axis::Shares(shares)) => shares.clone(),
            Some(Axis::Count(count)) => vec![1; *count],
            Some(Axis::Named(_)) | None => vec![1],
        };
        Division { shares, sequence: self.sequence_parallel }
    }

    /// Every way in which so many devices may divide the layers of a model with so many heads: what is asked for, or where that
    /// is left open equal shares.
    pub fn divisions(&self, devices: usize, heads: usize) -> Vec<Division> {
        let most = devices.min(MOST_MEMBERS).min(heads);
        match &self.tensor {
            Some(Axis::Named(_)) => {
                let counts = (2..=most).filter(|&members| devices.is_multiple_of(members));
                let equal = |members| Division { shares: vec![1; members], sequence: self.sequence_parallel };
                counts.map(equal).collect()
            }
            _ => Some(self.division()).filter(Division::divides).into_iter().collect(),
        }
    }

    /// The microbatches of each replica where no planner chooses: those of a step in equal shares.
    pub fn shares(&self, microbatches: usize) -> Vec<usize> {
        match &self.data {
            Axis::Named(_) => vec![microbatches],
            Axis::Count(count) => {
                let end = |replica: usize| replica * microbatches / count;
                (0..*count).map(|replica| end(replica + 1) - end(replica)).collect()
            }
            Axis::Shares(shares) => shares.clone(),
        }
    }
}

/// Which stages compute activations again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Recompute {
    /// All of them or none.
    All(bool),
    /// These.
    Stages(Vec<usize>),
}

/// Which adapters to open.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Devices {
    /// `"auto"`: every GPU; without one, every software adapter.
    Named(String),
    /// This many devices, dealt round over the automatic choice, so that one adapter may be opened several times.
    Count(usize),
    /// These adapters; one may be named several times.
    List(Vec<usize>),
}

impl Default for Devices {
    fn default() -> Self {
        Devices::Named("auto".into())
    }
}

impl Devices {
    /// Indices of the adapters to open. `software[i]` says whether adapter i runs on the CPU.
    pub fn resolve(&self, software: &[bool]) -> Result<Vec<usize>> {
        let place = "pipeline.devices";
        let hardware: Vec<usize> = (0..software.len()).filter(|&i| !software[i]).collect();
        let auto = if hardware.is_empty() { (0..software.len()).collect() } else { hardware };
        match self {
            Devices::Named(name) if name == "auto" => Ok(auto),
            Devices::Named(name) => Err(Error::config(
                place,
                format!("{name:?} is not known; write \"auto\", a number or a list"),
            )),
            Devices::Count(0) => Err(Error::config(place, "at least one device is needed")),
            Devices::Count(count) => Ok((0..*count).map(|i| auto[i % auto.len()]).collect()),
            Devices::List(list) if list.is_empty() => {
                Err(Error::config(place, "the list is empty; name at least one adapter"))
            }
            Devices::List(list) => match list.iter().find(|&&i| i >= software.len()) {
                Some(&index) => Err(Error::AdapterIndex { index, count: software.len() }),
                None => Ok(list.clone()),
            },
        }
    }
}

/// What a run writes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OutputConfig {
    /// Steps between checkpoints; the last step always has one; 0 for no others.
    #[serde(default = "checkpoint_every")]
    pub checkpoint_every: u64,
    /// Whether to write the initial weights too.
    #[serde(default)]
    pub checkpoint_at_start: bool,
    /// Checkpoints kept.
    #[serde(default = "keep")]
    pub keep: usize,
}

impl Default for OutputConfig {
    fn default() -> Self {
        OutputConfig { checkpoint_every: checkpoint_every(), checkpoint_at_start: false, keep: keep() }
    }
}

fn shuffled() -> Order {
    Order::Shuffled
}
fn learning_rate() -> f64 {
    1e-3
}
fn weight_decay() -> f64 {
    0.1
}
fn clip_norm() -> f64 {
    1.0
}
fn beta1() -> f64 {
    0.9
}
fn beta2() -> f64 {
    0.95
}
fn epsilon() -> f64 {
    1e-8
}
fn logits() -> u64 {
    LOGIT_BYTES >> 20
}

fn seed() -> u64 {
    1
}
fn evaluate_every() -> u64 {
    100
}
fn rank() -> usize {
    8
}
fn alpha() -> f64 {
    16.0
}
fn checkpoint_every() -> u64 {
    100
}
fn keep() -> usize {
    3
}
