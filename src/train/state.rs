//! A trainer's state in checkpoints, a piece at a time: the host never holds the whole model.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::checkpoint::{Checkpoint, Writer};
use super::source::{Origin, Pretrained};
use super::trainer::Trainer;
use crate::error::{Error, Result};
use crate::folder::{Dtype, Kind, Layout};
use crate::model::{Model, ModelConfig};
use crate::ops::parameters::Part;

/// Elements that pass through host memory at a time.
const PIECE: usize = 4 << 20;

/// What the optimizer keeps, and the names of its tensors.
const MOMENTS: [(Part, &str); 2] = [(Part::First, "exp_avg"), (Part::Second, "exp_avg_sq")];

impl Trainer {
    /// Sets the weights of a model folder, whose tensors must be exactly the model's.
    pub async fn load(&mut self, folder: &Path) -> Result<()> {
        let pretrained = Pretrained::open(folder)?;
        self.check(&pretrained.model, folder)?;
        self.executor.load(pretrained.folder.tensors()).await
    }

    /// Writes a checkpoint under `run` and keeps the newest `keep`; its folder.
    pub async fn save(&mut self, run: &Path, origin: &Origin, keep: usize) -> Result<PathBuf> {
        let mut owned = self.owned();
        owned.sort_by(|a, b| a.name.cmp(&b.name));
        let tensors: Vec<_> = owned.iter().map(|p| (p.name.clone(), p.shape.clone())).collect();
        let moments =
            |prefix| tensors.iter().map(move |(name, shape)| (format!("{prefix}.{name}"), shape.clone()));
        let optimizer: Vec<_> = MOMENTS.iter().flat_map(|(_, prefix)| moments(prefix)).collect();
        let mut config = origin.config.clone();
        for key in ["torch_dtype", "dtype"] {
            if config.get(key).is_some() {
                config[key] = json!("float32");
            }
        }
        let layout = Layout {
            kind: Kind::Model,
            config: &config,
            tensors: &tensors,
            dtype: Dtype::F32,
            shard_bytes: u64::MAX,
            copy: &origin.companions,
        };
        let mut writer = Writer::create(run, self.step, &layout, &optimizer)?;
        for p in &owned {
            let mut first = 0;
            while first < p.len() {
                let count = PIECE.min(p.len() - first);
                writer
                    .weights(&p.name, &self.executor.read_from(&p.name, Part::Weight, first, count).await?)?;
                first += count;
            }
        }
        for (part, prefix) in MOMENTS {
            for p in &owned {
                let mut first = 0;
                while first < p.len() {
                    let count = PIECE.min(p.len() - first);
                    let values = self.executor.read_from(&p.name, part, first, count).await?;
                    writer.optimizer(&format!("{prefix}.{}", p.name), &values)?;
                    first += count;
                }
            }
        }
        let state =
            json!({ "step": self.step, "seed": self.config.train.seed, "tokenizer": origin.tokenizer });
        writer.finish(&state, keep)
    }

    /// Takes up the state of a checkpoint, whatever number of devices wrote it.
    pub async fn restore(&mut self, checkpoint: &Checkpoint, path: &Path) -> Result<()> {
        self.check(&Model::from_hugging_face(&checkpoint.config)?, path)?;
        let owned = self.owned();
        let moments = owned
            .iter()
            .flat_map(|p| MOMENTS.map(|(_, prefix)| (format!("{prefix}.{}", p.name), p.shape.clone())));
        checkpoint.optimizer.check(&moments.collect::<Vec<_>>(), &[])?;
        self.executor.load(&checkpoint.weights).await?;
        for p in &owned {
            for (part, prefix) in MOMENTS {
                let tensor = format!("{prefix}.{}", p.name);
                self.executor.load_part(&checkpoint.optimizer, &tensor, &p.name, part).await?;
            }
        }
        self.step = checkpoint.step;
        Ok(())
    }

    fn check(&self, saved: &Model, path: &Path) -> Result<()> {
        if saved.config() == self.model.config() {
            return Ok(());
        }
        let words = |config: &ModelConfig| {
            let json = serde_json::to_value(config).unwrap_or_default();
            json.to_string().replace(['{', '}', '"'], "").replace(':', " ")
        };
        let (there, here) = (words(saved.config()), words(self.model.config()));
        let message = format!(
            "holds another model ({there}) than the config ({here}); use the config it was trained with"
        );
        Err(Error::checkpoint(path, message))
    }
}
