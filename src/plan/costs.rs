//! Where profiles become seconds: one table of prices for a batching, from which the costs of every plan are read.

use std::ops::Range;

use super::machine::{DeviceProfile, Machine, Rates, ShapeProfile};
use super::traffic::{Part, hop, part};
use super::workload::{Batching, Footprint, LayerMemory, StageForm, StageNeed, Work, Workload};
use crate::layers::Layers;
use crate::schedule::{Costs, Hop, Hops, Placement, RankCost, StageCost};

pub(super) const MICRO: f64 = 1e-6;
pub(super) const GIGA: f64 = 1e9;

/// Who computes what: as much of a plan as its costs depend on.
#[derive(Debug, Clone, Copy)]
pub struct Assignment<'a> {
    /// The machine's device of each rank.
    pub devices: &'a [usize],
    /// Layers of each stage.
    pub stages: &'a [Range<usize>],
    /// Which rank does which stage of which microbatch.
    pub placement: &'a Placement,
    /// For each stage, whether it repeats F before its backward pass.
    pub recompute: &'a [bool],
    /// For each stage, whether the schedule has its I and W apart.
    pub split: &'a [bool],
    /// For each replica of a stage, how many microbatches it holds at the worst moment: the size of the links' rings.
    pub in_flight: &'a [usize],
}

/// Weights that a host updates a second whose speed nobody measured, with their gradients and moments: its memory is read and
/// written seven times as much.
const HOST_UPDATE_GB_S: f64 = 1.5;

/// Seconds and bytes of one training step of `workload`, divided as `batching` says, on these devices of `machine`. The
/// only place where profiles become seconds: a layer's measured times where the device's profile has the shape and
/// kind, else the longer of operations ÷ rate and bytes ÷ bandwidth, plus its launches.
///
/// # Panics
///
/// On stages, ranks and devices that do not exist.
pub fn costs(workload: &Workload, batching: &Batching, machine: &Machine, assignment: &Assignment) -> Costs {
    let mut costs = Costs::default();
    Prices::new(workload, batching, machine).fill(assignment, &mut costs);
    costs
}

/// Seconds of the first layers on one device: entry `i` is the sum of layers `0..i`.
#[derive(Debug, Clone)]
struct Times {
    forward: Vec<f64>,
    input: Vec<f64>,
    weight: Vec<f64>,
    backward: Vec<f64>,
    submit: f64,
    /// How many of the first layers have a tensor too large for one binding.
    too_large: Vec<usize>,
}

/// Bytes of the first layers in one form, and the scratch of each kind.
#[derive(Debug, Clone)]
struct Bytes {
    sums: Vec<StageNeed>,
    scratch: Vec<u64>,
}

/// Times and bytes of every contiguous range of layers on every device, for one batching.
#[derive(Debug, Clone)]
pub(super) struct Prices<'a> {
    pub(super) workload: &'a Workload,
    pub(super) batching: &'a Batching,
    pub(super) machine: &'a Machine,
    times: Vec<Times>,
    /// For each footprint and form.
    bytes: Vec<[Bytes; StageForm::ALL.len()]>,
    /// `counts[kind][i]`: layers of that kind among the first `i`.
    counts: Vec<Vec<usize>>,
    pub(super) weights: Vec<u64>,
    pub(super) sent: Vec<u64>,
    read: Vec<u64>,
    state: Vec<u64>,
    moments: Vec<u64>,
    /// The way of an activation from device `from` to device `to`, at `from` × devices + `to`.
    hops: Vec<Hop>,
}

/// Entry `i` is the sum over the first `i` items.
fn running<T: Copy + Default + std::ops::Add<Output = T>>(items: impl Iterator<Item = T>) -> Vec<T> {
    let mut sums = vec![T::default()];
    let mut sum = T::default();
    for item in items {
        sum = sum + item;
        sums.push(sum);
    }
    sums
}

impl<'a> Prices<'a> {
    pub(super) fn new(workload: &'a Workload, batching: &'a Batching, machine: &'a Machine) -> Prices<'a> {
        let layers = || workload.layers.iter();
        let count = |kind| running(layers().map(move |layer| usize::from(layer.kind == kind)));
        let devices = 0..machine.devices.len();
        let pairs = devices.clone().flat_map(|from| devices.clone().map(move |to| (from, to)));
        Prices {
            workload,
            batching,
            machine,
            times: machine.devices.iter().map(|device| times(workload, batching, device)).collect(),
            bytes: batching.footprints.iter().map(|of| of_forms(workload, of)).collect(),
            counts: (0..workload.kinds.len()).map(count).collect(),
            weights: running(layers().map(|layer| layer.weights)),
            sent: running(layers().map(|layer| layer.sent)),
            read: running(layers().map(|layer| layer.read)),
            state: running(layers().map(|layer| layer.state)),
            moments: running(layers().map(|layer| layer.moments)),
            hops: pairs.map(|(from, to)| hop(machine, from, to, batching.activation)).collect(),
        }
    }

    /// Seconds of a stage's actions. Its bytes are left at 0.
    pub(super) fn stage(&self, device: usize, range: &Range<usize>, recompute: bool) -> StageCost {
        let times = &self.times[device];
        let of = |sums: &[f64]| sums[range.end] - sums[range.start];
        let forward = of(&times.forward);
        let again = if recompute { forward } else { 0.0 };
        let sharding = &self.workload.sharding;
        let bytes = |sums: &[u64], passes: bool| if passes { sums[range.end] - sums[range.start] } else { 0 };
        let weights = self.out_of_host(device, bytes(&self.read, sharding.streams_weights()), 1);
        let gradients = self.to_host(device, bytes(&self.weights, sharding.streams_gradients()), 1);
        StageCost {
            forward: times.submit + forward + weights,
            input: times.submit + of(&times.input) + again + weights,
            weight: times.submit + of(&times.weight) + gradients,
            backward: times.submit + of(&times.backward) + again + weights + gradients,
            ..StageCost::default()
        }
    }

    /// The way of one activation between two devices.
    pub(super) fn hop(&self, from: usize, to: usize) -> &Hop {
        &self.hops[from * self.machine.devices.len() + to]
    }

    /// Whether every tensor of these layers fits one binding of the device.
    pub(super) fn binds(&self, device: usize, range: &Range<usize>) -> bool {
        let too_large = &self.times[device].too_large;
        too_large[range.start] == too_large[range.end]
    }

    /// What layers compute and hold on a device.
    fn footprint(&self, device: usize) -> &Footprint {
        &self.batching.footprints[self.machine.devices[device].kernels]
    }

    /// Bytes of a stage on a device, weights and links aside: sums over its layers, the largest scratch, and what its
    /// place adds. In constant time.
    pub(super) fn need(&self, device: usize, range: &Range<usize>, form: StageForm) -> StageNeed {
        let bytes = &self.bytes[self.machine.devices[device].kernels][form.index()];
        let (from, to) = (&bytes.sums[range.start], &bytes.sums[range.end]);
        let mut need = StageNeed {
            fixed: to.fixed - from.fixed,
            stash: to.stash - from.stash,
            gradient: to.gradient - from.gradient,
        };
        let mut scratch = 0;
        for (count, &of_kind) in self.counts.iter().zip(&bytes.scratch) {
            if count[range.start] < count[range.end] {
                scratch = scratch.max(of_kind);
            }
        }
        for end in self.footprint(device).ends(range, self.workload.layers.len()) {
            need.add(&end[form]);
            scratch = scratch.max(end[form].scratch);
        }
        need.fixed += scratch;
        need
    }

    /// Bytes of the weights, gradients and moments of the stages that one rank has, and of what it shares with others that
    /// have them.
    pub(super) fn state<'r>(&self, stages: impl Iterator<Item = (&'r Range<usize>, Part)>) -> u64 {
        let (mut bytes, mut uses, mut owns) = (0, false, None);
        for (range, part) in stages {
            let of = |sums: &[u64]| sums[range.end] - sums[range.start];
            let moments = of(&self.moments);
            bytes += of(&self.state) - moments + part.of_bytes(moments);
            bytes += self.shared(range, part);
            uses |= self.workload.tie.is_some_and(|tie| range.contains(&tie.user));
            owns = owns.or(self.workload.tie.filter(|tie| range.contains(&tie.owner)).map(|_| part));
        }
        let tied = self.workload.tie.map_or(0, |tie| match (uses, owns) {
            (true, Some(_)) => tie.together,
            (true, None) => tie.user_apart,
            (false, Some(part)) => part.of_bytes(tie.owner_apart),
            (false, None) => 0,
        });
        bytes + tied + self.workload.host_rings
    }

    /// Writes the costs of a plan over what `costs` holds.
    pub(super) fn fill(&self, plan: &Assignment, costs: &mut Costs) {
        let Assignment { devices, stages, placement, .. } = *plan;
        costs.stages.clear();
        costs.hops.clear();
        costs.ranks.clear();
        costs.exchanges.clear();
        costs.cores = self.machine.cores.unwrap_or(0.0);
        costs.host_gb_s = self.machine.host_memory_gb_s.unwrap_or(0.0);
        self.slowdown(devices, &mut costs.slowdown);
        costs.ranks.extend((0..devices.len()).map(|rank| self.rank(plan, rank)));
        for of in placement.replicas() {
            let (device, range) = (devices[of.rank], &stages[of.stage]);
            let recompute = plan.recompute[of.stage];
            let need = self.need(device, range, StageForm { split: plan.split[of.stage], recompute });
            costs.ranks[of.rank].fixed += need.fixed;
            let times = self.stage(device, range, recompute);
            costs.stages.push(StageCost { stash: need.stash, gradient: need.gradient, ..times });
        }
        for (hop, &(from, to)) in placement.hops().iter().enumerate() {
            let [before, after] = [from, to].map(|replica| placement.replicas()[replica].rank);
            costs.hops.push(Hops {
                forward: *self.hop(devices[before], devices[after]),
                backward: *self.hop(devices[after], devices[before]),
            });
            if placement.is_link(hop) {
                let rings = self.batching.link_buffer * ring_buffers(plan.in_flight[from]);
                costs.ranks[before].fixed += rings;
                costs.ranks[after].fixed += rings;
            }
        }
        self.fill_exchanges(plan, costs);
    }

    /// A rank's costs; of its bytes only weights and what belongs to them.
    fn rank(&self, plan: &Assignment, rank: usize) -> RankCost {
        let device = &self.machine.devices[plan.devices[rank]];
        let rates = &device.rates;
        let own = || plan.stages.iter().enumerate().filter(|(stage, _)| plan.placement.holds(rank, *stage));
        let has = |layer: usize| own().any(|(_, range)| range.contains(&layer));
        let bytes =
            |range: &Range<usize>| (self.weights[range.end] - self.weights[range.start]) as f64 / GIGA;
        let weights: f64 = own().map(|(_, range)| bytes(range)).sum();
        let part = |stage: usize| part(plan.placement, rank, stage, self.machine, plan.devices);
        let owned: f64 = own().map(|(stage, range)| bytes(range) * part(stage).owned).sum();
        let tie = self.workload.tie.filter(|tie| has(tie.user));
        let used = tie.map_or(0.0, |tie| tie.bytes as f64 / GIGA);
        // Adding the user's gradient to the owner's reads two tensors and writes one.
        let folded = if tie.is_some_and(|tie| has(tie.owner)) { 3.0 * used } else { 0.0 };
        let memory = rates.memory_gb_s;
        let submit = rates.submit_us * MICRO;
        let mut begin = submit + (weights + used) / rates.clear_gb_s.unwrap_or(memory);
        let mut end = rates.barrier_us * MICRO + folded / memory + owned / rates.norm_gb_s.unwrap_or(memory);
        let mut update = submit + owned / rates.optimizer_gb_s.unwrap_or(memory / 7.0);
        let sharding = &self.workload.sharding;
        let at = plan.devices[rank];
        if sharding.streams_gradients() {
            begin = submit;
        }
        if sharding.through_host() {
            let all = plan.devices.len();
            let passing = self.passing(plan.placement, plan.devices, plan.stages, rank);
            let summed = passing.sums as f64 / GIGA;
            end = rates.barrier_us * MICRO
                + self.to_host(at, passing.gradients, all)
                + self.out_of_host(at, passing.sums, all)
                + summed / rates.norm_gb_s.unwrap_or(memory);
            update = submit
                + summed / rates.optimizer_gb_s.unwrap_or(memory / 7.0)
                + self.to_host(at, passing.sent, all)
                + self.out_of_host(at, passing.kept, all);
            if sharding.by_host() {
                let layers = self.workload.layers.len();
                let rate = self.machine.host_update_gb_s.unwrap_or(HOST_UPDATE_GB_S);
                update += self.weights[layers] as f64 / GIGA / rate;
            }
        }
        RankCost {
            begin,
            end,
            update,
            cores: device.cores,
            jitter: device.jitter.unwrap_or_default(),
            copy_engine: device.copy_engine,
            fixed: self.state(own().map(|(stage, range)| (range, part(stage)))),
            budget: device.memory,
        }
    }

    fn slowdown(&self, devices: &[usize], matrix: &mut Vec<Vec<f64>>) {
        matrix.clear();
        if !self.machine.slowdown.is_empty() {
            let row = |&i: &usize| devices.iter().map(|&j| self.machine.slowdown(i, j)).collect();
            matrix.extend(devices.iter().map(row));
        }
    }
}

/// Buffers that a boundary between two ranks takes on each of them: a ring in each direction, of one more than
/// microbatches are in flight.
pub(super) fn ring_buffers(in_flight: usize) -> u64 {
    2 * (in_flight as u64 + 1)
}

fn times(workload: &Workload, batching: &Batching, device: &DeviceProfile) -> Times {
    let shape = device.shape(&batching.shape);
    let seconds = |kind| kind_seconds(workload, batching, device, shape, kind);
    let kinds: Vec<[f64; 4]> = (0..workload.kinds.len()).map(seconds).collect();
    let sums = |part: usize| running(workload.layers.iter().map(|layer| kinds[layer.kind][part]));
    let limit = device.max_binding.unwrap_or(u64::MAX);
    let too_large = workload.layers.iter().map(|l| usize::from(batching.largest_tensor[l.kind] > limit));
    Times {
        forward: sums(0),
        input: sums(1),
        weight: sums(2),
        backward: sums(3),
        submit: shape.and_then(|shape| shape.submit_us).unwrap_or(device.rates.submit_us) * MICRO,
        too_large: running(too_large),
    }
}

/// F, I, W and B of one layer, by rates.
pub(super) fn estimated(batching: &Batching, device: &DeviceProfile, kind: usize) -> [f64; 4] {
    let work = &batching.footprints[device.kernels].work[kind];
    let [forward, input, weight] =
        [work.forward, work.input, work.weight].map(|w| roofline(&w, &device.rates));
    [forward, input, weight, input + weight]
}

/// F, I, W and B of one layer.
pub(super) fn kind_seconds(
    workload: &Workload,
    batching: &Batching,
    device: &DeviceProfile,
    shape: Option<&ShapeProfile>,
    kind: usize,
) -> [f64; 4] {
    if let Some(measured) = shape.and_then(|shape| shape.layers.get(&workload.kinds[kind])) {
        return measured.times();
    }
    let estimated = |kind: usize| estimated(batching, device, kind);
    let is_half = |kind: usize| workload.layers.iter().any(|of| of.kind == kind && of.size == Layers::HALF);
    let Some(block) = shape.and_then(|shape| shape.layers.get(BLOCK)).filter(|_| is_half(kind)) else {
        return estimated(kind);
    };
    // Measured as a whole: each half has the part that it would have by rates.
    let halves = (0..workload.kinds.len()).filter(|&kind| is_half(kind)).map(estimated);
    let whole = halves.fold([0.0; 4], |sum, half| std::array::from_fn(|at| sum[at] + half[at]));
    let (block, half) = (block.times(), estimated(kind));
    std::array::from_fn(|at| if whole[at] > 0.0 { block[at] * half[at] / whole[at] } else { block[at] / 2.0 })
}

/// What machine files call a block that was measured whole.
const BLOCK: &str = "block";

fn roofline(work: &Work, rates: &Rates) -> f64 {
    let compute = work.flops / (rates.matmul_gflops * GIGA);
    let memory = work.bytes / (rates.memory_gb_s * GIGA);
    compute.max(memory) + work.launches as f64 * rates.launch_us * MICRO
}

fn of_forms(workload: &Workload, footprint: &Footprint) -> [Bytes; StageForm::ALL.len()] {
    StageForm::ALL.map(|form| {
        let of_kind = |kind: usize| footprint.memory[kind][form];
        let mut sums = vec![StageNeed::default()];
        for layer in &workload.layers {
            let mut sum = sums[sums.len() - 1];
            sum.add(&of_kind(layer.kind));
            sums.push(sum);
        }
        Bytes { sums, scratch: (0..workload.kinds.len()).map(|kind| of_kind(kind).scratch).collect() }
    })
}

impl StageNeed {
    /// Adds all of a layer's bytes but its scratch.
    pub(super) fn add(&mut self, layer: &LayerMemory) {
        self.fixed += layer.fixed;
        self.stash += layer.stash;
        self.gradient += layer.gradient;
    }
}
