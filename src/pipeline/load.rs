//! Weights from a model's or an adapter's folder to the devices that use them, a piece at a time: the whole model is never in host memory.

use std::path::{Path, PathBuf};

use super::Executor;
use crate::error::Result;
use crate::folder::{Dtype, Tensors};
use crate::folder::adapter::{self, AdapterConfig};
use crate::model::{Parameter, init};
use crate::ops::packed::Elements;
use crate::ops::parameters::Part;

/// Elements that pass through host memory at a time.
const PIECE: usize = 4 << 20;

impl Executor {
    /// Sets every weight of the model itself from the tensor of the same name.
    ///
    /// # Errors
    ///
    /// [`Error::Checkpoint`](crate::error::Error::Checkpoint) that lists every tensor that is missing, left over or of
    /// another shape, before any weight is set; those of a device.
    pub async fn load(&mut self, tensors: &Tensors) -> Result<()> {
        self.load_all(tensors, |parameter| !parameter.is_lora()).await
    }

    /// Sets every matrix of the adapter from the tensors of an open adapter.
    ///
    /// # Errors
    ///
    /// As [`Executor::load`].
    pub async fn load_adapter(&mut self, tensors: &Tensors) -> Result<()> {
        self.load_all(tensors, Parameter::is_lora).await
    }

    /// Sets the matrices of a new adapter: with B zero, the model computes what it did.
    pub async fn initialise_adapter(&mut self, seed: u64) -> Result<()> {
        let matrices: Vec<Parameter> = self.parameters().iter().filter(|p| p.is_lora()).cloned().collect();
        for parameter in matrices {
            let values = init::initial(&parameter, seed);
            self.write(&parameter.name, Part::Weight, &values).await?;
        }
        Ok(())
    }

    /// Writes the adapter as a folder that PEFT reads, with copies of the files `copy`.
    ///
    /// # Errors
    ///
    /// As [`adapter::create`]; those of a device.
    pub async fn save_adapter(
        &mut self,
        path: &Path,
        config: &AdapterConfig,
        copy: &[PathBuf],
    ) -> Result<()> {
        let modules = adapter::modules_of(self.parameters());
        let mut writer = adapter::create(path, config, &modules, copy)?;
        let names = modules.iter().flat_map(|module| [module.a(), module.b()]);
        for ((stored, _), name) in adapter::tensors(&modules, config.r).iter().zip(names) {
            writer.write(stored, &self.read(&name, Part::Weight).await?)?;
        }
        writer.finish()
    }

    /// Sets the parameters that `belongs` picks from tensors that must be exactly those.
    async fn load_all(&mut self, tensors: &Tensors, belongs: impl Fn(&Parameter) -> bool) -> Result<()> {
        let all: Vec<Parameter> = self.parameters().iter().filter(|p| belongs(p)).cloned().collect();
        let expected: Vec<(String, Vec<usize>)> =
            all.iter().map(|p| (p.name.clone(), p.shape.clone())).collect();
        let tied: Vec<String> = all.iter().filter(|p| p.tied_to.is_some()).map(|p| p.name.clone()).collect();
        tensors.check(&expected, &tied)?;
        for parameter in all.iter().filter(|p| p.tied_to.is_none()) {
            self.load_part(tensors, &parameter.name, &parameter.name, Part::Weight).await?;
        }
        Ok(())
    }

    /// Sets part of a parameter from a tensor.
    pub async fn load_part(&mut self, tensors: &Tensors, tensor: &str, name: &str, part: Part) -> Result<()> {
        let len = tensors.get(tensor).map_or(0, |info| info.len());
        let packed = self.parameters().iter().any(|p| p.name == name && p.weights.packed());
        let as_it_is = packed && tensors.get(tensor).is_some_and(|info| info.dtype == Dtype::BF16);
        for first in (0..len.max(1)).step_by(PIECE) {
            let count = PIECE.min(len - first);
            let elements = if as_it_is {
                let mut halves = vec![0; count];
                tensors.read_bf16(tensor, first..first + count, &mut halves)?;
                Elements::BF16(halves)
            } else {
                let mut values = vec![0.0; count];
                tensors.read(tensor, first..first + count, &mut values)?;
                Elements::F32(values)
            };
            self.write_from(name, part, first, elements).await?;
        }
        Ok(())
    }
}
