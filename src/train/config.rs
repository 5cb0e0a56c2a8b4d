//! The experiment as a file: TOML, every key checked, every default stated here.

use serde::{Deserialize, Serialize};

use super::data::Order;
use crate::error::{Error, Result};
use crate::model::ModelConfig;
use crate::schedule;

/// A whole config file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What is trained.
    pub model: ModelConfig,
    /// On which text.
    pub data: DataConfig,
    /// How.
    pub train: TrainConfig,
    /// On which devices, in which schedule.
    #[serde(default)]
    pub pipeline: PipelineConfig,
    /// What is written.
    #[serde(default)]
    pub output: OutputConfig,
}

/// The text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// Paths and globs, from the config's folder or the working directory.
    pub train: Vec<String>,
    /// `bytes`: a token is a byte.
    #[serde(default = "bytes")]
    pub tokenizer: String,
    /// Sequences in file order, or in a seeded permutation an epoch.
    #[serde(default = "shuffled")]
    pub order: Order,
}

/// Optimisation. One step sees `batch` sequences of `sequence` tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Steps in all.
    pub steps: u64,
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
    /// Steps over which the learning rate rises.
    #[serde(default = "warmup")]
    pub warmup: u64,
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
    /// Microbatches of a step; they divide `train.batch`. The planner chooses by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub microbatches: Option<usize>,
    /// First layers of the stages after the first. The planner chooses by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cuts: Option<Vec<usize>>,
    /// Which stages compute activations again in the backward pass: all, none, or these. The planner chooses by default
    /// those that would not fit otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recompute: Option<Recompute>,
    /// Whether to cut again, between two steps, when steps keep taking more than a tenth longer or shorter than
    /// predicted.
    #[serde(default)]
    pub replan: bool,
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

fn bytes() -> String {
    "bytes".into()
}
fn shuffled() -> Order {
    Order::Shuffled
}
fn learning_rate() -> f64 {
    1e-3
}
fn warmup() -> u64 {
    10
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
fn seed() -> u64 {
    1
}
fn checkpoint_every() -> u64 {
    100
}
fn keep() -> usize {
    3
}

/// Every key, for naming the nearest one.
const KEYS: &[(&str, &[&str])] = &[
    (
        "model",
        &[
            "kind",
            "layers",
            "width",
            "heads",
            "context",
            "vocabulary",
            "kv_heads",
            "head_dim",
            "intermediate",
            "norm_epsilon",
            "tied_head",
            "initializer_range",
            "sliding_window",
            "rope_theta",
            "rope_scaling",
        ],
    ),
    ("data", &["train", "tokenizer", "order"]),
    (
        "train",
        &[
            "steps",
            "batch",
            "sequence",
            "learning_rate",
            "minimum_learning_rate",
            "warmup",
            "weight_decay",
            "clip_norm",
            "beta1",
            "beta2",
            "epsilon",
            "seed",
        ],
    ),
    ("pipeline", &["devices", "schedule", "microbatches", "cuts", "recompute", "replan"]),
    ("output", &["checkpoint_every", "checkpoint_at_start", "keep"]),
];

fn nearest<'a>(given: &str, known: impl Iterator<Item = &'a str>) -> String {
    let best = known.map(|k| (strsim::jaro_winkler(given, k), k)).max_by(|a, b| a.0.total_cmp(&b.0));
    best.map_or(String::new(), |(_, key)| key.to_string())
}

/// The key as a user would write it in `--set`; unknown ones name the nearest known one.
fn check_keys(table: &toml::Table, place: &str) -> Result<()> {
    for (section, value) in table {
        let Some((_, keys)) = KEYS.iter().find(|(name, _)| name == section) else {
            let near = nearest(section, KEYS.iter().map(|k| k.0));
            return Err(Error::config(place, format!("unknown table [{section}]; did you mean [{near}]?")));
        };
        let Some(inner) = value.as_table() else {
            return Err(Error::config(place, format!("{section} must be a table: write [{section}]")));
        };
        if let Some(key) = inner.keys().find(|key| !keys.contains(&key.as_str())) {
            let near = nearest(key, keys.iter().copied());
            let message = format!("unknown key {section}.{key}; did you mean {section}.{near}?");
            return Err(Error::config(place, message));
        }
    }
    Ok(())
}

impl Config {
    /// Reads TOML with `key.sub=value` overrides applied, and checks every value that can be checked without a
    /// machine. `place` is what errors name: the file.
    pub fn parse(text: &str, overrides: &[String], place: &str) -> Result<Config> {
        let error = |e: toml::de::Error| {
            let line = e.span().map_or(String::new(), |s| {
                format!("line {}: ", text[..s.start.min(text.len())].matches('\n').count() + 1)
            });
            Error::config(place, format!("{line}{}", e.message().replace('\n', ", ")))
        };
        let mut table: toml::Table = text.parse().map_err(error)?;
        for item in overrides {
            set(&mut table, item)?;
        }
        check_keys(&table, place)?;
        let config: Config = table
            .try_into()
            .map_err(|e: toml::de::Error| Error::config(place, e.to_string().trim().replace('\n', ", ")))?;
        config.check(place)?;
        Ok(config)
    }

    /// Microbatches of a step where no planner chooses: as many as sequences.
    pub fn microbatches(&self) -> usize {
        self.pipeline.microbatches.unwrap_or(self.train.batch)
    }

    fn check(&self, place: &str) -> Result<()> {
        let refuse = |message: String| Err(Error::config(place, message));
        let t = &self.train;
        for (key, value, most) in [
            ("steps", t.steps, u64::MAX),
            ("batch", t.batch as u64, 1 << 20),
            ("sequence", t.sequence as u64, 1 << 22),
        ] {
            if !(1..=most).contains(&value) {
                return refuse(format!(
                    "train.{key} = {value} is out of range; it must be at least 1 and at most {most}"
                ));
            }
        }
        for (key, value, low, high) in [
            ("learning_rate", t.learning_rate, 0.0, 1e3),
            ("minimum_learning_rate", t.minimum_learning_rate.unwrap_or(0.0), 0.0, 1e3),
            ("weight_decay", t.weight_decay, 0.0, 1e3),
            ("clip_norm", t.clip_norm, 0.0, 1e9),
            ("beta1", t.beta1, 0.0, 0.999_999),
            ("beta2", t.beta2, 0.0, 0.999_999_9),
            ("epsilon", t.epsilon, 1e-30, 1.0),
        ] {
            if !(low..=high).contains(&value) {
                return refuse(format!("train.{key} = {value} must be between {low} and {high}"));
            }
        }
        let m = self.microbatches();
        if m == 0 || !t.batch.is_multiple_of(m) {
            let divides = |d: &usize| t.batch.is_multiple_of(*d);
            let below = (1..m.clamp(2, t.batch)).rev().find(divides).unwrap_or(1);
            let above = (m.max(1)..=t.batch).find(divides).unwrap_or(t.batch);
            return refuse(format!(
                "pipeline.microbatches = {m} does not divide train.batch = {}; {below} and {above} do",
                t.batch
            ));
        }
        if t.sequence > self.model.context {
            return refuse(format!(
                "train.sequence = {} is longer than model.context = {}; lower the one or raise the other",
                t.sequence, self.model.context
            ));
        }
        if let Some(name) = &self.pipeline.schedule
            && !schedule::ALL_NAMES.contains(&name.as_str())
            && !name.contains(['.', '/'])
        {
            let near = nearest(name, schedule::ALL_NAMES.iter().copied());
            return refuse(format!(
                "pipeline.schedule = {name:?} is not known; did you mean {near:?}? Known: {}, or a file",
                schedule::ALL_NAMES.join(", ")
            ));
        }
        if self.data.tokenizer != "bytes" {
            return refuse(format!("data.tokenizer = {:?} is not known; use \"bytes\"", self.data.tokenizer));
        }
        if self.model.vocabulary < 256 {
            return refuse(format!(
                "model.vocabulary = {} is too small for bytes; it must be at least 256",
                self.model.vocabulary
            ));
        }
        if self.data.train.is_empty() {
            return refuse("data.train is empty; name at least one file".into());
        }
        if self.output.keep == 0 {
            return refuse("output.keep must be at least 1".into());
        }
        crate::model::Model::new(&self.model).map(drop).map_err(|e| Error::config(place, e.to_string()))
    }

    /// As TOML, with every default written out.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).unwrap_or_default()
    }
}

/// Applies one `a.b=c`; c is TOML, or else a string.
fn set(table: &mut toml::Table, item: &str) -> Result<()> {
    let refuse = |message: String| Error::config("--set", message);
    let (path, value) =
        item.split_once('=').ok_or_else(|| refuse(format!("{item:?} is not key.sub=value")))?;
    let (section, key) = path
        .trim()
        .split_once('.')
        .ok_or_else(|| refuse(format!("{path:?} is not table.key, such as train.steps")))?;
    let value = value.trim();
    let parsed = format!("v = {value}").parse::<toml::Table>().ok().and_then(|mut t| t.remove("v"));
    // 1f1b is a name, 1.2.3 a slip.
    let number = value.starts_with(|c: char| "-+.0123456789".contains(c))
        && value.chars().all(|c| c.is_ascii_digit() || "+-._eE".contains(c));
    if parsed.is_none() && (number || value.starts_with(['[', '{', '"', '\''])) {
        return Err(refuse(format!("{value:?} is not a TOML value (in {item:?})")));
    }
    let value = parsed.unwrap_or_else(|| toml::Value::String(value.into()));
    let entry = table.entry(section).or_insert_with(|| toml::Value::Table(toml::Table::new()));
    match entry.as_table_mut() {
        Some(inner) => {
            inner.insert(key.into(), value);
            Ok(())
        }
        None => Err(refuse(format!("{section} is not a table"))),
    }
}
