//! Whole checkpoints in memory, for tests of small ones.

use std::path::{Path, PathBuf};

use polystage::Result;
use polystage::folder::{Dtype, Kind, Layout, TensorInfo, Tensors};
use polystage::train::checkpoint::{Checkpoint, Writer, open};
use serde_json::Value;

/// A named array.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub data: Vec<f32>,
}

/// A model's checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Contents {
    pub step: u64,
    pub config: Value,
    pub model: Vec<Tensor>,
    pub optimizer: Vec<Tensor>,
    pub state: Value,
}

/// Writes it, the tensors in their order.
pub fn save(run: &Path, contents: &Contents, keep: usize) -> Result<PathBuf> {
    let announce = |tensors: &[Tensor]| -> Vec<_> {
        tensors.iter().map(|tensor| (tensor.name.clone(), tensor.shape.clone())).collect()
    };
    let tensors = announce(&contents.model);
    let layout = Layout {
        kind: Kind::Model,
        config: &contents.config,
        tensors: &tensors,
        dtype: Dtype::F32,
        shard_bytes: u64::MAX,
        copy: &[],
    };
    let mut writer = Writer::create(run, contents.step, &layout, &announce(&contents.optimizer))?;
    for tensor in &contents.model {
        writer.weights(&tensor.name, &tensor.data)?;
    }
    for tensor in &contents.optimizer {
        writer.optimizer(&tensor.name, &tensor.data)?;
    }
    writer.finish(&contents.state, keep)
}

/// Reads it, the tensors sorted by name.
pub fn load(folder: &Path) -> Result<Contents> {
    let Checkpoint { step, config, weights, optimizer, state, .. } = open(folder)?;
    Ok(Contents { step, config, model: read(&weights)?, optimizer: read(&optimizer)?, state })
}

/// All tensors, sorted by name.
pub fn read(tensors: &Tensors) -> Result<Vec<Tensor>> {
    let read = |info: &TensorInfo| {
        let (name, shape) = (info.name.clone(), info.shape.clone());
        Ok(Tensor { data: tensors.read_all(&name)?, name, shape })
    };
    tensors.iter().map(read).collect()
}
