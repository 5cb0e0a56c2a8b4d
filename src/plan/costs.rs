//! Where profiles become seconds: one table of prices for a batching, from which the costs of every plan are read.

use std::ops::Range;

use super::machine::{DeviceProfile, Machine, Rates, ShapeProfile};
use super::workload::{Batching, Footprint, LayerMemory, StageForm, StageNeed, Work, Workload};
use crate::layers::Layers;
use crate::schedule::{Costs, Exchange, Hop, Hops, Placement, RankCost, StageCost};

const MICRO: f64 = 1e-6;
const GIGA: f64 = 1e9;

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

/// Buckets that are on their way at once between devices that have the same layers.
pub(crate) const EXCHANGE_SLOTS: usize = 4;

/// One of the ranks that have a stage, counted from 0, how many there are, and what part of the stage's weights it owns.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part {
    pub number: usize,
    pub of: usize,
    pub owned: f64,
}

impl Part {
    /// The only rank.
    pub const WHOLE: Part = Part { number: 0, of: 1, owned: 1.0 };

    /// What it owns of so many bytes.
    pub fn of_bytes(&self, bytes: u64) -> u64 {
        (bytes as f64 * self.owned) as u64
    }

    /// How often gradients of others arrive at it: the sum of those before it at once, those after it one by one.
    fn arrivals(&self) -> usize {
        usize::from(self.number > 0) + self.of - 1 - self.number
    }
}

/// Bytes that pass between a rank and the host's memory at the end of a step, where anything passes through that.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Passing {
    /// Gradients that go there whole.
    pub gradients: u64,
    /// Sums of gradients that come back to who owns the weights.
    pub sums: u64,
    /// New weights that go there.
    pub sent: u64,
    /// New weights that come from there and stay.
    pub kept: u64,
}

/// How often what a rank sends arrives: the host adds up what several send before it goes on.
#[derive(Debug, Clone, Copy)]
struct Arrivals {
    /// Arrivals for each sender.
    part: f64,
    /// Whether it is the first to which the same weights go: they leave once.
    is_first: bool,
}

/// Which of the ranks that have a stage a rank is, of a machine's devices in their order: weights are owned in proportion to the
/// memory of their devices, or in equal parts where one is not known.
pub(super) fn part(
    placement: &Placement,
    rank: usize,
    stage: usize,
    machine: &Machine,
    devices: &[usize],
) -> Part {
    let holders = placement.holders(stage);
    let of = holders.len();
    if of == 1 {
        return Part::WHOLE;
    }
    let memory = |holder: usize| machine.devices[devices[holder]].memory.filter(|&bytes| bytes > 0);
    let all: Option<u64> = placement.holders(stage).map(memory).sum();
    let owned = match (memory(rank), all) {
        (Some(own), Some(all)) => own as f64 / all as f64,
        _ => 1.0 / of as f64,
    };
    Part { number: { holders }.position(|holder| holder == rank).unwrap_or_default(), of, owned }
}

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
    weights: Vec<u64>,
    sent: Vec<u64>,
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
        let weights = self.out_of_host(device, bytes(&self.read, sharding.streams_weights()));
        let gradients = self.to_host(device, bytes(&self.weights, sharding.streams_gradients()));
        StageCost {
            forward: times.submit + forward + weights,
            input: times.submit + of(&times.input) + again + weights,
            weight: times.submit + of(&times.weight) + gradients,
            backward: times.submit + of(&times.backward) + again + weights + gradients,
            ..StageCost::default()
        }
    }

    /// Seconds in which a device sends bytes to the host's memory, where they are added.
    fn to_host(&self, device: usize, bytes: u64) -> f64 {
        let (way, _) = self.host_way(device, bytes);
        way.out + way.copy
    }

    /// Seconds in which a device gets bytes from the host's memory.
    fn out_of_host(&self, device: usize, bytes: u64) -> f64 {
        let (_, way) = self.host_way(device, bytes);
        way.copy + way.into
    }

    /// The ways of bytes from a device to another and back, as far as the host's memory is half of them. Alone in its
    /// machine it has none that was measured: then its own copying bounds it.
    fn host_way(&self, device: usize, bytes: u64) -> (Hop, Hop) {
        if bytes == 0 {
            return Default::default();
        }
        match (0..self.machine.devices.len()).find(|&other| other != device) {
            Some(other) => (hop(self.machine, device, other, bytes), hop(self.machine, other, device, bytes)),
            None => {
                let copy = 2.0 * bytes as f64 / (self.machine.devices[device].rates.memory_gb_s * GIGA);
                let way = Hop { copy, bytes, ..Hop::default() };
                (way, way)
            }
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

    /// Bytes of the links over which the ranks that have a stage exchange its gradients and weights, on one of them.
    fn shared(&self, range: &Range<usize>, part: Part) -> u64 {
        let others = part.of as u64 - 1;
        let (gradients, weights) = self.pieces(range, part);
        if others == 0 || gradients == 0 || self.workload.sharding.through_host() {
            return 0;
        }
        let buckets = gradients.div_ceil(self.workload.bucket.max(1));
        let [gradient, weight] = [gradients, weights].map(|bytes| bytes / buckets);
        let slots = buckets.min(EXCHANGE_SLOTS as u64);
        let owner = part.arrivals() as u64 * slots * gradient + slots * weight + gradient;
        owner + others * slots * (gradient + weight)
    }

    /// Bytes of the gradients of what one of the ranks that have a stage owns of it, and of the weights as they travel.
    fn pieces(&self, range: &Range<usize>, part: Part) -> (u64, u64) {
        let of = |sums: &[u64]| part.of_bytes(sums[range.end] - sums[range.start]);
        (of(&self.weights), of(&self.sent))
    }

    /// Writes the costs of a plan over what `costs` holds.
    pub(super) fn fill(&self, plan: &Assignment, costs: &mut Costs) {
        let Assignment { devices, stages, placement, .. } = *plan;
        costs.stages.clear();
        costs.hops.clear();
        costs.ranks.clear();
        costs.exchanges.clear();
        costs.cores = self.machine.cores.unwrap_or(0.0);
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

    /// What travels at the end of a step.
    fn fill_exchanges(&self, plan: &Assignment, costs: &mut Costs) {
        let Assignment { devices, stages, placement, .. } = *plan;
        // What goes by way of the host is a part of what its ends do.
        let free = self.workload.sharding.through_host();
        let mut add =
            |user: usize, owner: usize, from: usize, to: usize, bytes: (u64, u64), arrivals: Arrivals| {
                let mut gradient = hop(self.machine, devices[from], devices[to], bytes.0);
                let mut weight = hop(self.machine, devices[to], devices[from], bytes.1);
                // What arrives is added: two tensors are read and one is written.
                let memory = self.machine.devices[devices[to]].rates.memory_gb_s;
                gradient.into = arrivals.part * (gradient.into + 3.0 * bytes.0 as f64 / GIGA / memory);
                weight.out *= f64::from(arrivals.is_first);
                if free {
                    (gradient, weight) = Default::default();
                }
                costs.exchanges.push(Exchange { user, owner, from, to, gradient, weight });
            };
        if !placement.is_single() {
            for (stage, range) in stages.iter().enumerate() {
                let of = placement.holders(stage).len();
                for to in placement.holders(stage) {
                    let part = part(placement, to, stage, self.machine, devices);
                    let pieces = self.pieces(range, part);
                    let others = placement.holders(stage).filter(|&from| from != to && pieces.0 > 0);
                    for (at, from) in others.enumerate() {
                        let arrivals = part.arrivals() as f64 / (of - 1) as f64;
                        add(stage, stage, from, to, pieces, Arrivals { part: arrivals, is_first: at == 0 });
                    }
                }
            }
        }
        let Some(tie) = self.workload.tie.filter(|tie| tie.bytes > 0) else { return };
        let stage_of =
            |layer: usize| stages.iter().position(|range| range.contains(&layer)).unwrap_or_default();
        let (user, owner) = (stage_of(tie.user), stage_of(tie.owner));
        let users = placement.holders(user).filter(|&rank| !placement.holds(rank, owner));
        for (at, from) in users.enumerate() {
            for to in placement.holders(owner) {
                let bytes = part(placement, to, owner, self.machine, devices).of_bytes(tie.bytes);
                let arrivals = Arrivals { part: 1.0, is_first: at == 0 };
                add(user, owner, from, to, (bytes, bytes), arrivals);
            }
        }
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
            let passing = self.passing(plan.placement, plan.devices, plan.stages, rank);
            let summed = passing.sums as f64 / GIGA;
            end = rates.barrier_us * MICRO
                + self.to_host(at, passing.gradients)
                + self.out_of_host(at, passing.sums)
                + summed / rates.norm_gb_s.unwrap_or(memory);
            update = submit
                + summed / rates.optimizer_gb_s.unwrap_or(memory / 7.0)
                + self.to_host(at, passing.sent)
                + self.out_of_host(at, passing.kept);
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

    /// What passes between a rank and the host's memory at the end of a step.
    pub(super) fn passing(
        &self,
        placement: &Placement,
        devices: &[usize],
        stages: &[Range<usize>],
        rank: usize,
    ) -> Passing {
        let sharding = &self.workload.sharding;
        let mut passing = Passing::default();
        for (stage, range) in stages.iter().enumerate().filter(|(stage, _)| placement.holds(rank, *stage)) {
            let of = |sums: &[u64]| sums[range.end] - sums[range.start];
            let part = part(placement, rank, stage, self.machine, devices);
            let owned = |bytes: u64| if sharding.by_host() { 0 } else { part.of_bytes(bytes) };
            let (gradients, sent) = (of(&self.weights), of(&self.sent));
            passing.gradients += if sharding.streams_gradients() { 0 } else { gradients };
            passing.sums += owned(gradients);
            passing.sent += owned(sent);
            passing.kept += if sharding.streams_weights() { 0 } else { sent - owned(sent) };
        }
        passing
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

/// The way of a tensor between two devices.
fn hop(machine: &Machine, from: usize, to: usize, bytes: u64) -> Hop {
    if from == to {
        return Hop::default();
    }
    let link = machine.link(from, to);
    let seconds = |gb_s: f64| bytes as f64 / (gb_s * GIGA);
    Hop {
        out: link.out_gb_s.map_or(0.0, seconds),
        latency: link.latency_us * MICRO,
        copy: seconds(link.gb_s),
        into: link.into_gb_s.map_or(0.0, seconds),
        bytes,
    }
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
    let estimated = |kind: usize| {
        let work = &batching.footprints[device.kernels].work[kind];
        let [forward, input, weight] =
            [work.forward, work.input, work.weight].map(|w| roofline(&w, &device.rates));
        [forward, input, weight, input + weight]
    };
    let is_half = |kind: usize| workload.layers.iter().any(|of| of.kind == kind && of.size == Layers::HALF);
    let Some(block) = shape.and_then(|shape| shape.layers.get(BLOCK)).filter(|_| is_half(kind)) else {
        return estimated(kind);
    };
    // Measured as a whole: each half has the part that it would have by rates.
    let halves = (0..workload.kinds.len()).filter(|&kind| is_half(kind)).map(estimated);
    let whole = halves.fold([0.0; 4], |sum, half| std::array::from_fn(|at| sum[at] + half[at]));
    let backward = block.backward.unwrap_or(block.input + block.weight);
    let (block, half) = ([block.forward, block.input, block.weight, backward], estimated(kind));
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
