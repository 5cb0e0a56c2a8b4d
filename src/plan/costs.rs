//! Where profiles become seconds: one table of prices for a batching, from which the costs of every plan are read.

use std::ops::Range;

use super::machine::{DeviceProfile, Machine, Rates, ShapeProfile};
use super::workload::{Batching, Mode, StageNeed, Work, Workload};
use crate::schedule::{Costs, Hop, Hops, RankCost, StageCost, Tie};

const MICRO: f64 = 1e-6;
const GIGA: f64 = 1e9;

/// Who computes what: as much of a plan as its costs depend on.
#[derive(Debug, Clone, Copy)]
pub struct Assignment<'a> {
    /// The machine's device of each rank.
    pub devices: &'a [usize],
    /// Layers of each stage.
    pub stages: &'a [Range<usize>],
    /// The rank that has each stage.
    pub stage_ranks: &'a [usize],
    /// For each stage, whether it repeats F before its backward pass.
    pub recompute: &'a [bool],
    /// For each stage, whether the schedule has its I and W apart.
    pub split: &'a [bool],
    /// For each stage, how many microbatches it holds at the worst moment: the size of the links' rings.
    pub in_flight: &'a [usize],
}

/// Seconds and bytes of one training step of `workload`, divided as `batching` says, on these devices of `machine`. The
/// only place where profiles become seconds: a layer's measured times where the device's profile has the shape and
/// kind, else the longer of operations ÷ rate and bytes ÷ bandwidth, plus its launches.
///
/// Stages, ranks and devices that do not exist panic.
pub fn costs(workload: &Workload, batching: &Batching, machine: &Machine, assignment: &Assignment) -> Costs {
    Prices::new(workload, batching, machine).costs(assignment)
}

/// Seconds of the first layers on one device: entry `i` is the sum of layers `0..i`.
#[derive(Debug, Clone)]
struct Sums {
    forward: Vec<f64>,
    input: Vec<f64>,
    weight: Vec<f64>,
    backward: Vec<f64>,
    submit: f64,
}

/// Times of every contiguous range of layers on every device, for one batching.
#[derive(Debug, Clone)]
pub(super) struct Prices<'a> {
    pub(super) workload: &'a Workload,
    pub(super) batching: &'a Batching,
    pub(super) machine: &'a Machine,
    sums: Vec<Sums>,
}

impl<'a> Prices<'a> {
    pub(super) fn new(workload: &'a Workload, batching: &'a Batching, machine: &'a Machine) -> Prices<'a> {
        let sums = machine.devices.iter().map(|device| sums(workload, batching, device)).collect();
        Prices { workload, batching, machine, sums }
    }

    /// Seconds of a stage's actions. Its bytes are left at 0.
    pub(super) fn stage(&self, device: usize, range: &Range<usize>, recompute: bool) -> StageCost {
        let sums = &self.sums[device];
        let of = |sums: &[f64]| sums[range.end] - sums[range.start];
        let forward = of(&sums.forward);
        let again = if recompute { forward } else { 0.0 };
        StageCost {
            forward: sums.submit + forward,
            input: sums.submit + of(&sums.input) + again,
            weight: sums.submit + of(&sums.weight),
            backward: sums.submit + of(&sums.backward) + again,
            ..StageCost::default()
        }
    }

    /// The way of one activation between two devices.
    pub(super) fn hop(&self, from: usize, to: usize, bytes: u64) -> Hop {
        if from == to {
            return Hop::default();
        }
        let link = self.machine.link(from, to);
        let seconds = |gb_s: f64| bytes as f64 / (gb_s * GIGA);
        Hop {
            out: link.out_gb_s.map_or(0.0, seconds),
            latency: link.latency_us * MICRO,
            copy: seconds(link.gb_s),
            into: link.into_gb_s.map_or(0.0, seconds),
            bytes,
        }
    }

    /// Bytes of a stage, weights and links aside.
    pub(super) fn need(&self, range: &Range<usize>, mode: Mode) -> StageNeed {
        self.workload.need(self.batching, range, mode)
    }

    /// Bytes of the weights, gradients and moments of all layers that a rank has.
    pub(super) fn state(&self, has: impl Fn(usize) -> bool) -> u64 {
        let layers = self.workload.layers.iter().enumerate();
        let own: u64 = layers.filter(|(i, _)| has(*i)).map(|(_, layer)| layer.state).sum();
        let tied = self.workload.tie.map_or(0, |tie| match (has(tie.user), has(tie.owner)) {
            (true, true) => tie.together,
            (true, false) => tie.user_apart,
            (false, true) => tie.owner_apart,
            (false, false) => 0,
        });
        own + tied
    }

    /// The costs of a plan.
    pub(super) fn costs(&self, plan: &Assignment) -> Costs {
        let Assignment { devices, stages, stage_ranks, .. } = *plan;
        let mut ranks: Vec<RankCost> = (0..devices.len()).map(|rank| self.rank(plan, rank)).collect();
        let mut costs = Costs {
            cores: self.machine.cores.unwrap_or(0.0),
            slowdown: self.slowdown(devices),
            ..Costs::default()
        };
        for (s, range) in stages.iter().enumerate() {
            let mode = Mode { split: plan.split[s], recompute: plan.recompute[s] };
            let need = self.need(range, mode);
            let rank = stage_ranks[s];
            ranks[rank].fixed += need.fixed;
            let times = self.stage(devices[rank], range, plan.recompute[s]);
            costs.stages.push(StageCost { stash: need.stash, gradient: need.gradient, ..times });
            let Some(&next) = stage_ranks.get(s + 1) else { continue };
            let bytes = self.batching.activation;
            costs.hops.push(Hops {
                forward: self.hop(devices[rank], devices[next], bytes),
                backward: self.hop(devices[next], devices[rank], bytes),
            });
            if rank != next {
                // One ring a direction on each end, of one buffer more than microbatches are in flight.
                let rings = 2 * self.batching.link_buffer * (plan.in_flight[s] as u64 + 1);
                ranks[rank].fixed += rings;
                ranks[next].fixed += rings;
            }
        }
        if let Some(tie) = self.workload.tie {
            let rank_of = |layer| {
                let at = stages.iter().position(|range| range.contains(&layer)).unwrap_or_default();
                stage_ranks[at]
            };
            let (user, owner) = (rank_of(tie.user), rank_of(tie.owner));
            if user != owner {
                costs.ties.push(Tie {
                    user,
                    owner,
                    gradient: self.hop(devices[user], devices[owner], tie.bytes),
                    weight: self.hop(devices[owner], devices[user], tie.bytes),
                });
            }
        }
        costs.ranks = ranks;
        costs
    }

    /// A rank's costs; of its bytes only weights and what belongs to them.
    fn rank(&self, plan: &Assignment, rank: usize) -> RankCost {
        let device = &self.machine.devices[plan.devices[rank]];
        let rates = &device.rates;
        let has = |layer: usize| {
            let own = plan.stages.iter().zip(plan.stage_ranks).filter(|&(_, &owner)| owner == rank);
            own.into_iter().any(|(range, _)| range.contains(&layer))
        };
        let layers = self.workload.layers.iter().enumerate();
        let weights: u64 = layers.filter(|(i, _)| has(*i)).map(|(_, layer)| layer.weights).sum();
        let uses_tied = self.workload.tie.filter(|tie| has(tie.user));
        let gradients = (weights + uses_tied.map_or(0, |tie| tie.bytes)) as f64 / GIGA;
        // Adding the user's gradient to the owner's reads two tensors and writes one.
        let folded = uses_tied.filter(|tie| has(tie.owner)).map_or(0.0, |tie| 3.0 * tie.bytes as f64 / GIGA);
        let memory = rates.memory_gb_s;
        RankCost {
            begin: rates.submit_us * MICRO + gradients / rates.clear_gb_s.unwrap_or(memory),
            end: rates.barrier_us * MICRO
                + folded / memory
                + weights as f64 / GIGA / rates.norm_gb_s.unwrap_or(memory),
            update: rates.submit_us * MICRO
                + weights as f64 / GIGA / rates.optimizer_gb_s.unwrap_or(memory / 7.0),
            cores: device.cores,
            copy_engine: device.copy_engine,
            fixed: self.state(has),
            budget: device.memory,
        }
    }

    fn slowdown(&self, devices: &[usize]) -> Vec<Vec<f64>> {
        if self.machine.slowdown.is_empty() {
            return Vec::new();
        }
        let row = |&i: &usize| devices.iter().map(|&j| self.machine.slowdown(i, j)).collect();
        devices.iter().map(row).collect()
    }
}

fn sums(workload: &Workload, batching: &Batching, device: &DeviceProfile) -> Sums {
    let shape = device.shape(&batching.shape);
    let submit = shape.and_then(|shape| shape.submit_us).unwrap_or(device.rates.submit_us) * MICRO;
    let kinds = (0..workload.kinds.len()).map(|kind| kind_seconds(workload, batching, device, shape, kind));
    let kinds: Vec<[f64; 4]> = kinds.collect();
    let running = |part: usize| {
        let mut sum = 0.0;
        let seconds = workload.layers.iter().map(|layer| kinds[layer.kind][part]);
        let rest = seconds.map(|seconds| {
            sum += seconds;
            sum
        });
        std::iter::once(0.0).chain(rest).collect()
    };
    Sums { forward: running(0), input: running(1), weight: running(2), backward: running(3), submit }
}

/// F, I, W and B of one layer.
fn kind_seconds(
    workload: &Workload,
    batching: &Batching,
    device: &DeviceProfile,
    shape: Option<&ShapeProfile>,
    kind: usize,
) -> [f64; 4] {
    if let Some(measured) = shape.and_then(|shape| shape.layers.get(&workload.kinds[kind])) {
        let whole = measured.backward.unwrap_or(measured.input + measured.weight);
        return [measured.forward, measured.input, measured.weight, whole];
    }
    let work = &batching.work[kind];
    let [forward, input, weight] =
        [work.forward, work.input, work.weight].map(|w| roofline(&w, &device.rates));
    [forward, input, weight, input + weight]
}

fn roofline(work: &Work, rates: &Rates) -> f64 {
    let compute = work.flops / (rates.matmul_gflops * GIGA);
    let memory = work.bytes / (rates.memory_gb_s * GIGA);
    compute.max(memory) + work.launches as f64 * rates.launch_us * MICRO
}
