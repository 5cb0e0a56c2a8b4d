//! A trainer's state in checkpoints, a piece at a time: the host never holds the whole model.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::checkpoint::{Checkpoint, Writer};
use super::config::Config;
use super::loss_scale::LossScale;
use super::source::Origin;
use super::trainer::{Shape, Trainer, names, trained};
use crate::error::{Error, Result};
use crate::folder::adapter::{self, stored_name};
use crate::folder::{Dtype, Kind, Layout};
use crate::gpu::Device;
use crate::model::{Lora, Model, ModelConfig, Parameter};
use crate::ops::parameters::Part;
use crate::pipeline::{Executor, Plan};

/// Elements that pass through host memory at a time: no more than loading takes room for.
const PIECE: usize = 1 << 20;

/// What the optimizer keeps, and what its tensors' names begin with.
const MOMENTS: [(Part, &str); 2] = [(Part::First, "exp_avg"), (Part::Second, "exp_avg_sq")];

impl Trainer {
    /// Sets the weights that a run begins with: those of its folder, or the seed's where there is none.
    pub async fn begin(&mut self, origin: &Origin) -> Result<()> {
        let Some(pretrained) = &origin.pretrained else { return self.initialise().await };
        check_model(&self.config, pretrained.model.config(), pretrained.folder.path())?;
        pretrained.load(&mut self.executor).await?;
        match &pretrained.adapter {
            Some(_) => Ok(()),
            None => self.executor.initialise_adapter(self.config.train.seed).await,
        }
    }

    /// Writes a checkpoint under `run` and keeps the newest `keep`; its folder. Where an adapter is trained it holds
    /// nothing else.
    pub async fn save(&mut self, run: &Path, origin: &Origin, keep: usize) -> Result<PathBuf> {
        let mut trained = self.trained();
        trained.sort_by(|a, b| a.name.cmp(&b.name));
        let kind = if self.config.adapter.is_some() { Kind::Adapter } else { Kind::Model };
        let stored = |p: &Parameter| match kind {
            Kind::Adapter => stored_name(&p.name),
            Kind::Model => p.name.clone(),
        };
        let mut config = origin.config.clone();
        for key in ["torch_dtype", "dtype"] {
            if config.get(key).is_some() {
                config[key] = json!("float32");
            }
        }
        let layout = Layout {
            kind,
            config: &config,
            tensors: &trained.iter().map(|p| (stored(p), p.shape.clone())).collect::<Vec<_>>(),
            dtype: Dtype::F32,
            shard_bytes: u64::MAX,
            copy: &origin.companions,
        };
        let mut writer = Writer::create(run, self.step, &layout, &moments(&trained))?;
        for (part, prefix) in [(Part::Weight, "")].into_iter().chain(MOMENTS) {
            for p in &trained {
                for first in (0..p.len()).step_by(PIECE) {
                    let count = PIECE.min(p.len() - first);
                    let values = self.executor.read_from(&p.name, part, first, count).await?;
                    match part {
                        Part::Weight => writer.weights(&stored(p), &values)?,
                        _ => writer.optimizer(&format!("{prefix}.{}", p.name), &values)?,
                    }
                }
            }
        }
        let state = json!({
            "step": self.step,
            "seed": self.config.train.seed,
            "loss_scale": self.scale,
            "tokenizer": origin.tokenizer,
            "origin": origin.fingerprints,
        });
        writer.finish(&state, keep)
    }

    /// Takes up the state of a checkpoint, whatever number of devices wrote it. Where an adapter is trained, the weights
    /// that a checkpoint does not hold are those of [`Trainer::begin`].
    pub async fn restore(&mut self, checkpoint: &Checkpoint, path: &Path) -> Result<()> {
        check(&self.config, checkpoint, path)?;
        let trained = self.trained();
        let adapter = (checkpoint.kind == Kind::Adapter).then(|| adapter::open(path)).transpose()?;
        match &adapter {
            Some(adapter) => self.executor.load_adapter(&adapter.tensors).await?,
            None => self.executor.load(&checkpoint.weights).await?,
        }
        for p in &trained {
            for (part, prefix) in MOMENTS {
                let tensor = format!("{prefix}.{}", p.name);
                self.executor.load_part(&checkpoint.optimizer, &tensor, &p.name, part).await?;
            }
        }
        (self.step, self.since) = (checkpoint.step, checkpoint.step);
        // Those of earlier versions do not say.
        self.scale = LossScale::read(&checkpoint.state["loss_scale"]).unwrap_or_default();
        Ok(())
    }

    /// Goes on with another plan, whose weights are to be set, on these devices.
    pub(super) async fn relaunch(&mut self, plan: Plan, devices: &[Device]) -> Result<()> {
        self.executor.stop().await;
        self.shape = Shape::of(&plan);
        self.executor = Executor::launch(plan, devices)?;
        self.devices = names(devices);
        // What the devices of the plan before did is nothing that these have done.
        self.timeline.clear();
        Ok(())
    }
}

/// Refuses a checkpoint that does not hold what a config trains.
///
/// # Errors
/// [`Error::Checkpoint`] in one line.
pub(super) fn check(config: &Config, checkpoint: &Checkpoint, path: &Path) -> Result<()> {
    let lora = config.lora()?;
    match (checkpoint.kind, &lora) {
        (Kind::Adapter, Some(wanted)) => {
            let saved = adapter::open(path)?.lora();
            if let Some(difference) = difference(&saved, wanted) {
                let message = format!(
                    "holds an adapter {difference}; use the config it was trained with, or begin another run"
                );
                return Err(Error::checkpoint(path, message));
            }
        }
        (Kind::Model, None) => {
            check_model(config, Model::from_hugging_face(&checkpoint.config)?.config(), path)?;
        }
        (kind, _) => {
            let what = if kind == Kind::Adapter { "an adapter" } else { "a whole model" };
            let message =
                format!("holds {what}, and the config trains the other; use the config it was trained with");
            return Err(Error::checkpoint(path, message));
        }
    }
    let model = Model::with_adapter(&config.model, lora.as_ref())?;
    checkpoint.optimizer.check(&moments(&trained(&model.parameters())), &[])
}

/// How the adapter that was saved differs in its shapes from the one that a config trains.
fn difference(saved: &Lora, wanted: &Lora) -> Option<String> {
    if saved.rank != wanted.rank {
        return Some(format!("of rank {}, and the config trains one of rank {}", saved.rank, wanted.rank));
    }
    let lacks = |a: &Lora, b: &Lora| a.modules.iter().find(|module| !b.modules.contains(module)).cloned();
    let more = lacks(saved, wanted).map(|layer| format!("of {layer}, and the config trains one without it"));
    more.or_else(|| lacks(wanted, saved).map(|layer| format!("without {layer}, which the config trains")))
}

fn check_model(config: &Config, saved: &ModelConfig, path: &Path) -> Result<()> {
    let model = Model::new(&config.model)?;
    if saved == model.config() {
        return Ok(());
    }
    let words = |config: &ModelConfig| {
        let json = serde_json::to_value(config).unwrap_or_default();
        json.to_string().replace(['{', '}', '"'], "").replace(':', " ")
    };
    let (there, here) = (words(saved), words(model.config()));
    let message =
        format!("holds another model ({there}) than the config ({here}); use the config it was trained with");
    Err(Error::checkpoint(path, message))
}

/// Names and shapes of what the optimizer keeps of these parameters.
fn moments(trained: &[Parameter]) -> Vec<(String, Vec<usize>)> {
    let of = |(_, prefix)| {
        trained.iter().map(move |p: &Parameter| (format!("{prefix}.{}", p.name), p.shape.clone()))
    };
    MOMENTS.into_iter().flat_map(of).collect()
}
