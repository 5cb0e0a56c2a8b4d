//! What a device is worth: how much longer a step takes without it.

use serde::Serialize;

use super::machine::Machine;
use super::space::interchangeable;
use super::workload::Workload;
use super::{Candidate, Options, ScheduleChoice, plan};

/// What a plan loses with one of its devices.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Without {
    /// The machine's device.
    pub device: usize,
    /// Its name.
    pub name: String,
    /// Seconds of a step of the best plan without it; none if nothing fits then.
    pub step_seconds: Option<f64>,
    /// By what part a step then takes longer.
    pub slower: Option<f64>,
}

/// A smaller part of a step is not worth a device.
const WORTH_SAYING: f64 = 0.005;

impl Without {
    /// Whether a step is as fast without the device.
    pub fn is_needless(&self) -> bool {
        self.slower.is_some_and(|slower| slower < WORTH_SAYING)
    }
}

/// Plans again without each device of `best`, a plan for these arguments. Empty where there is nothing to plan: with one
/// device, or where cuts or a schedule made by hand need them all.
pub fn without(workload: &Workload, machine: &Machine, options: &Options, best: &Candidate) -> Vec<Without> {
    let count = options.devices.as_ref().map_or(machine.devices.len(), Vec::len);
    let needs_all = options.cuts.is_some() || matches!(options.schedule, ScheduleChoice::Given(_));
    if count < 2 || needs_all {
        return Vec::new();
    }
    let machine = &machine.within(&options.budgets);
    let mut found: Vec<Without> = Vec::new();
    for &device in &best.devices {
        // Devices in a fixed order are not alike: their places differ.
        let is_like =
            |other: &&Without| options.devices.is_none() && interchangeable(machine, other.device, device);
        let step_seconds = match found.iter().find(is_like) {
            Some(same) => same.step_seconds,
            None => plan(workload, &machine.without(device), &fewer(options, device))
                .ok()
                .map(|planned| planned.best.simulation.expected),
        };
        // A plan without it is a plan with it too: what is faster is what the search has missed.
        let step_seconds = step_seconds.map(|seconds| seconds.max(best.simulation.expected));
        found.push(Without {
            device,
            name: machine.devices[device].name.clone(),
            step_seconds,
            slower: step_seconds.map(|seconds| seconds / best.simulation.expected - 1.0),
        });
    }
    found.sort_by_key(|without| without.device);
    found
}

/// The options for the machine without a device.
fn fewer(options: &Options, device: usize) -> Options {
    let others = |order: &Vec<usize>| {
        let left = order.iter().filter(|&&other| other != device);
        left.map(|&other| other - usize::from(other > device)).collect()
    };
    Options { devices: options.devices.as_ref().map(others), budgets: Vec::new(), ..options.clone() }
}
