//! Cuts within the memory of each device, where no planner looks for them.

use super::advice::with_help;
use super::partition::balanced_where;
use super::{Plan, Setup, Use};
use crate::error::{Error, Result};
use crate::gpu::{AdapterInfo, Capabilities, Device};
use crate::graph::DType;
use crate::model::{Model, Parameter};

/// How often cuts are sought anew, with the room for layers that the last plan showed to be there.
const TRIES: usize = 16;

impl Plan {
    /// Balances the stages, one a device, by their work, and where a device has too little memory for its share by work
    /// and memory.
    ///
    /// # Errors
    /// Those of [`Plan::new`] for the cuts that are balanced by work alone, with what would make it fit.
    pub fn within(setup: Setup, devices: &[Device]) -> Result<Plan> {
        let adapters: Vec<_> = devices.iter().map(|d| (d.info().clone(), *d.capabilities())).collect();
        Plan::cut(&setup, &adapters).map_err(|error| with_help(error, &setup, &adapters))
    }

    /// As [`Plan::within`], without looking for what would help.
    pub(super) fn cut(setup: &Setup, adapters: &[(AdapterInfo, Capabilities)]) -> Result<Plan> {
        let mut setup = setup.clone();
        let first = match Plan::new(setup.clone(), adapters) {
            Err(error @ Error::Memory { .. }) => error,
            other => return other,
        };
        if setup.cuts.is_some() || setup.schedule.stages != adapters.len() {
            return Err(first);
        }
        let model = setup.model()?;
        let work = model.layer_flops(setup.batch, setup.sequence)?;
        let bytes: Vec<u64> = (0..model.layers()).map(|layer| layer_bytes(&model, layer, &setup)).collect();
        let sum = |layers: std::ops::Range<usize>| bytes[layers].iter().sum::<u64>();
        let starts = model.layer_starts();
        let mut room = setup.budgets.clone();
        for _ in 0..TRIES {
            let fits = |stage: usize, layers| room[stage].is_none_or(|room| sum(layers) <= room);
            let Some(stages) = balanced_where(&work, adapters.len(), fits) else { break };
            setup.cuts = Some(stages[1..].iter().map(|layers| starts[layers.start]).collect());
            match Plan::new(setup.clone(), adapters) {
                Err(Error::Memory { device, need, budget, .. }) => {
                    let beside_layers = need.saturating_sub(sum(stages[device].clone()));
                    room[device] = Some(budget.saturating_sub(beside_layers));
                }
                other => return other,
            }
        }
        Err(first)
    }
}

/// Weights, gradients, moments and caches of a layer: all that grows with the number of layers, but for activations.
fn layer_bytes(model: &Model, layer: usize, setup: &Setup) -> u64 {
    let training = setup.purpose.trains();
    let state = |p: &Parameter| match (training && !p.frozen, &p.tied_to) {
        (true, None) => 3,
        (true, Some(_)) => 1,
        (false, _) => 0,
    };
    let stored = |p: &Parameter| p.stored(training).iter().map(|dtype| dtype.bytes(p.len())).sum::<u64>();
    let bytes = |p: &Parameter| stored(p) + state(p) * DType::F32.bytes(p.len());
    let weights: u64 = model.layer_parameters(layer).iter().map(bytes).sum();
    let cached = match setup.purpose {
        Use::Decoding { capacity } if model.attends(layer) => {
            2 * setup.schedule.microbatches
                * setup.batch
                * capacity
                * setup.model.kv_heads()
                * setup.model.head_dim()
        }
        _ => 0,
    };
    weights + 4 * cached as u64
}
