//! Where a model runs that is not trained, and how it is stored there.

use super::planning::device_budgets;
use super::{Features, adapters, open, parse_devices};
use crate::error::{Error, Result};
use crate::gpu::Device;
use crate::mesh::Division;
use crate::model::tensor::MOST;
use crate::model::{Model, Weights};
use crate::train::config::Devices;

/// Devices, their memory, and how they store weights.
#[derive(clap::Args)]
pub(super) struct Placement {
    /// Adapters, one stage each, such as 0,1,1 (one may be named several times); default: every GPU, without one every
    /// software adapter, but no more than the model has layers. A device's number is its position in this list.
    #[arg(long)]
    devices: Option<String>,
    /// Bytes a device may use: 6GiB for each, or 0=6GiB,1=2GiB by the devices' numbers.
    #[arg(long)]
    memory: Option<String>,
    #[command(flatten)]
    features: Features,
    /// Devices that divide every layer among them, neighbours in the list: how many, or the share of each, such as 5,3.
    #[arg(long, value_name = "N")]
    tensor: Option<String>,
    /// How matrices are stored: f32, or bf16, two in a word (default: bf16 where the model's files store that).
    #[arg(long, value_parser = ["f32", "bf16"])]
    weights: Option<String>,
}

impl Placement {
    /// The model, stored as was asked.
    pub(super) fn store(&self, model: Model) -> Model {
        match self.weights.as_deref().and_then(Weights::named) {
            Some(weights) => model.with_weights(weights),
            None => model,
        }
    }

    /// How devices divide every layer.
    pub(super) fn tensor(&self) -> Result<Division> {
        let Some(text) = &self.tensor else { return Ok(Division::none()) };
        let numbers: std::result::Result<Vec<usize>, _> =
            text.split(',').map(|part| part.trim().parse()).collect();
        match numbers.as_deref() {
            Ok([count @ 1..=MOST]) => Ok(Division::of(&vec![1; *count])),
            Ok(shares @ [_, _, ..]) => Ok(Division::of(shares)),
            _ => {
                let message = format!(
                    "{text:?} is neither a number of devices, 1 to {MOST}, nor a list of shares such as 5,3"
                );
                Err(Error::config("--tensor", message))
            }
        }
    }

    /// Opens the devices for a model of so many layers, and says what each may use.
    pub(super) fn devices(&self, layers: usize) -> Result<(Vec<Device>, Vec<Option<u64>>)> {
        let adapters = adapters()?;
        let mut wanted = self.devices.as_deref().map(parse_devices).transpose()?.unwrap_or_default();
        if wanted == Devices::default() {
            let software: Vec<bool> = adapters.iter().map(|a| a.software).collect();
            let mut list = wanted.resolve(&software)?;
            list.truncate(layers);
            wanted = Devices::List(list);
        }
        let devices = open(&wanted, &adapters, &self.features)?;
        let budgets = device_budgets(self.memory.as_deref(), &devices)?.devices;
        Ok((devices, budgets))
    }
}
