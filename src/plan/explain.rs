//! A plan in words: what each device gets and why, what it waits for, what else there was.

use std::cmp::Reverse;
use std::ops::Range;

use serde::Serialize;

use super::costs::Prices;
use super::machine::Machine;
use super::text::percent;
use super::workload::{Layer, Workload};
use super::{Candidate, Planned, Without};
use crate::layers::Layers;
use crate::schedule::Idle;

/// Devices that differ less in speed count as equally fast.
const AS_FAST: f64 = 0.05;
/// A device that is this much faster than another is so many times as fast; below, faster by a percentage.
const TIMES: f64 = 1.5;
/// Waiting for less than this part of a step is not worth a word.
const NOTABLE: f64 = 0.05;

/// What [`Planned::explain`] says. Prints as text for people; serialises for programs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Explanation {
    /// The machine's name, or those of the devices that may be used where they are not all.
    pub machine: String,
    /// Predicted seconds of a step.
    pub step_seconds: f64,
    /// Tokens of a step ÷ its seconds.
    pub tokens_per_second: f64,
    /// The part of all devices' time, up to the last action, in which they have nothing to do: 0 to 1.
    pub bubble: f64,
    /// Seconds of a step after its last action: gradient norm, optimizer, tied weights.
    pub update_seconds: f64,
    /// What `step_seconds` has beyond that because the devices' speeds wander.
    pub jitter_seconds: f64,
    /// The schedule's name.
    pub schedule: String,
    /// Stages of each device.
    pub chunks: usize,
    /// Microbatches of a step.
    pub microbatches: usize,
    /// Sequences of a microbatch.
    pub sequences: usize,
    /// The microbatches of each of several pipelines beside each other; one share where there is one.
    pub shares: Vec<usize>,
    /// By what part of a step the best single pipeline takes longer, and its bubble, where there are several and one would do.
    pub one_pipeline: Option<OnePipeline>,
    /// How devices divide every layer, and what else there was, where they do or might.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub axis: Option<String>,
    /// Who has what of the state, and why, where it is not on the devices that compute.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
    /// The devices in the order of the pipeline; of several one after another.
    pub devices: Vec<DeviceShare>,
    /// What the devices send each other.
    pub links: Vec<LinkShare>,
    /// What devices that have the same layers send each other; `links` counts it too.
    pub shared: Vec<SharedBy>,
    /// What goes to the host's memory and comes from it, where gradients and weights go that way.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub host: Vec<HostShare>,
    /// Devices that are not used.
    pub left_out: Vec<Unused>,
    /// What a step takes without each of those that are, if that was asked for.
    pub without: Vec<Without>,
    /// The best other plans, the fastest first.
    pub alternatives: Vec<Alternative>,
    /// Plans looked at.
    pub considered: u64,
    /// Of these, plans simulated.
    pub evaluated: u64,
    /// Whether no plan with a named schedule can be faster.
    pub complete: bool,
}

/// What one device gets.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DeviceShare {
    /// Position in the pipeline.
    pub rank: usize,
    /// The machine's device.
    pub device: usize,
    /// The adapter behind it, if it is there.
    pub adapter: Option<usize>,
    /// Its name.
    pub name: String,
    /// How many layers it gets.
    pub layers: Layers,
    /// Its stages.
    pub stages: Vec<StageShare>,
    /// Its part of the work of all layers, as seconds on one and the same device: 0 to 1.
    pub work: f64,
    /// How many times as fast as the slowest device of the plan it is, at the layers of which there are most.
    pub speed: f64,
    /// Why it gets what it gets.
    pub why: Vec<String>,
    /// Seconds of a step in which it computes.
    pub busy_seconds: f64,
    /// Seconds up to the last action in which it does not, by cause.
    pub idle_seconds: Waiting,
    /// Bytes that will be allocated on it.
    pub peak_bytes: u64,
    /// Bytes it may use.
    pub budget: Option<u64>,
}

/// Seconds in which a device has nothing to do; see [`Idle`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Waiting {
    /// Before its first action.
    pub warm_up: f64,
    /// After its last action.
    pub drain: f64,
    /// For other devices that have more to do.
    pub imbalance: f64,
    /// For tensors on their way.
    pub link: f64,
    /// For the host.
    pub host: f64,
}

/// The best single pipeline, beside a plan with several.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct OnePipeline {
    /// By what part of the plan's step it takes longer.
    pub slower: f64,
    /// The part of all devices' time in which they have nothing to do.
    pub bubble: f64,
}

/// Devices that have the same layers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SharedBy {
    /// The machine's devices.
    pub devices: Vec<usize>,
    /// First layers of their stages, and the layers after their last.
    pub layers: Vec<(Layers, Layers)>,
    /// Bytes of gradients that all of them together send to those of them that own the weights, each step.
    pub gradients: u64,
    /// Bytes of new weights that come back.
    pub weights: u64,
}

/// What a device and the host's memory send each other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HostShare {
    /// The machine's device.
    pub device: usize,
    /// Bytes of gradients, and of the weights that it updates itself, each step.
    pub down: u64,
    /// Bytes of sums and of weights.
    pub up: u64,
}

/// One stage of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StageShare {
    /// Which.
    pub stage: usize,
    /// Its first layer.
    pub first: Layers,
    /// The layer after its last.
    pub end: Layers,
    /// Whether it repeats F before its backward pass.
    pub recompute: bool,
}

/// What one device sends another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LinkShare {
    /// The machine's device that sends.
    pub from: usize,
    /// The machine's device that receives.
    pub to: usize,
    /// Bytes of a step.
    pub bytes: u64,
    /// Those of them that are gradients and weights of layers that both have.
    pub shared: u64,
}

/// A device that is not used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Unused {
    /// The machine's device.
    pub device: usize,
    /// The adapter behind it, if it is there.
    pub adapter: Option<usize>,
    /// Its name.
    pub name: String,
    /// Why.
    pub reason: String,
}

/// Another plan.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Alternative {
    /// The schedule's name.
    pub schedule: String,
    /// Stages of each device.
    pub chunks: usize,
    /// Microbatches of a step.
    pub microbatches: usize,
    /// The machine's devices in the order of the pipeline.
    pub devices: Vec<usize>,
    /// Layers of each of them.
    pub layers: Vec<Layers>,
    /// The microbatches of each of several pipelines; one share where there is one.
    pub shares: Vec<usize>,
    /// Stages that repeat F.
    pub recompute: Vec<usize>,
    /// Predicted seconds of a step.
    pub step_seconds: f64,
    /// By what part of the best plan's step it takes longer.
    pub slower: f64,
}

impl Planned {
    /// Says what the best plan does and why, for the workload and the machine it was planned for.
    pub fn explain(&self, workload: &Workload, machine: &Machine) -> Explanation {
        let best = &self.best;
        let name = |device: usize| machine.devices[device].name.clone();
        let unused = self.left_out.iter();
        Explanation {
            machine: machine.name.clone(),
            step_seconds: best.simulation.expected,
            tokens_per_second: best.tokens_per_second,
            bubble: best.simulation.bubble,
            update_seconds: best.simulation.step - best.simulation.makespan,
            jitter_seconds: best.simulation.expected - best.simulation.step,
            schedule: best.schedule.name.clone(),
            chunks: chunks(best),
            microbatches: best.microbatches,
            sequences: best.batch,
            shares: best.shares(),
            one_pipeline: one_pipeline(self),
            axis: None,
            state: None,
            devices: devices(self, workload, machine),
            links: links(best),
            shared: shared(best),
            host: host(best, workload, machine),
            left_out: unused
                .map(|unused| Unused {
                    device: unused.device,
                    adapter: None,
                    name: name(unused.device),
                    reason: unused.reason.clone(),
                })
                .collect(),
            without: self.without.clone(),
            alternatives: self.alternatives.iter().map(|other| alternative(other, best)).collect(),
            considered: self.considered,
            evaluated: self.evaluated,
            complete: self.complete,
        }
    }
}

impl Explanation {
    /// For devices that are there: on which adapter each of the machine's devices was opened.
    pub fn on_adapters(mut self, adapters: &[Option<usize>]) -> Explanation {
        let adapter = |device: usize| adapters.get(device).copied().flatten();
        self.devices.iter_mut().for_each(|share| share.adapter = adapter(share.device));
        self.left_out.iter_mut().for_each(|unused| unused.adapter = adapter(unused.device));
        self
    }
}

fn chunks(candidate: &Candidate) -> usize {
    candidate.placement.replicas().len() / candidate.devices.len()
}

fn devices(planned: &Planned, workload: &Workload, machine: &Machine) -> Vec<DeviceShare> {
    let best = &planned.best;
    let prices = Prices::new(workload, &workload.batchings[best.batching], machine);
    let work = |device: usize, range: Range<usize>| {
        let cost = prices.stage(device, &range, false);
        let nothing = prices.stage(device, &(range.start..range.start), false);
        cost.forward + cost.backward - nothing.forward - nothing.backward
    };
    let usual = usual_block(workload);
    let slowest = best
        .devices
        .iter()
        .copied()
        .max_by(|&a, &b| work(a, usual.clone()).total_cmp(&work(b, usual.clone())))
        .unwrap_or_default();
    let all = work(slowest, 0..workload.layers.len());
    let share = |(rank, &device): (usize, &usize)| {
        let stages = best.stages_of(rank).map(|stage| StageShare {
            stage,
            first: best.places[stage].start,
            end: best.places[stage].end,
            recompute: best.recompute[stage],
        });
        let cells = best.simulation.cells.iter();
        let own = cells.filter(|cell| cell.rank == rank && cell.action.kind.computes());
        let Idle { warm_up, drain, imbalance, link, host } = best.simulation.idle[rank];
        let mut share = DeviceShare {
            rank,
            device,
            adapter: None,
            name: machine.devices[device].name.clone(),
            layers: best.layers_of(rank),
            stages: stages.collect(),
            work: own_work(best, rank, |range| work(slowest, range)) / all.max(f64::MIN_POSITIVE),
            speed: ratio(work(slowest, usual.clone()), work(device, usual.clone())),
            why: Vec::new(),
            busy_seconds: own.map(|cell| cell.end - cell.start).sum(),
            idle_seconds: Waiting { warm_up, drain, imbalance, link, host },
            peak_bytes: best.simulation.slot_bytes[rank],
            budget: best.costs.ranks[rank].budget,
        };
        let own: Vec<usize> = best.stages_of(rank).flat_map(|stage| best.stages[stage].clone()).collect();
        share.why.extend(why_ends(&own, workload, |layers| work(device, layers)));
        share.why.extend(why_memory(planned, &share));
        share.why.extend(why_idle(&share, best.simulation.makespan));
        share
    };
    let mut shares: Vec<DeviceShare> = best.devices.iter().enumerate().map(share).collect();
    for (share, speed) in why_speed(&shares, slowest).into_iter().enumerate() {
        shares[share].why.splice(..0, speed);
    }
    shares
}

/// What a rank does of all microbatches' work, where that of a stage for one is given.
fn own_work(best: &Candidate, rank: usize, work: impl Fn(Range<usize>) -> f64) -> f64 {
    let replicas = best.placement.replicas().iter().enumerate().filter(|(_, of)| of.rank == rank);
    let part = |number: usize| best.placement.microbatches(number).count() as f64 / best.microbatches as f64;
    replicas.map(|(number, of)| part(number) * work(best.stages[of.stage].clone())).sum()
}

fn ratio(a: f64, b: f64) -> f64 {
    if b > 0.0 { a / b } else { 1.0 }
}

/// The layers of a block: from one of the kind of which there are most to the last one before the next of that kind.
fn usual_block(workload: &Workload) -> Range<usize> {
    let layers = &workload.layers;
    let count = |kind: usize| layers.iter().filter(|layer| layer.kind == kind).count();
    let most = |&layer: &usize| Reverse(count(layers[layer].kind));
    let first = (0..layers.len()).min_by_key(most).unwrap_or_default();
    let whole =
        |end: &usize| layers[first..*end].iter().map(|layer| layer.size).sum::<Layers>() >= Layers::ONE;
    first..(first + 1..=layers.len()).find(whole).unwrap_or(layers.len())
}

/// How fast each of several devices is beside the slowest.
fn why_speed(shares: &[DeviceShare], slowest: usize) -> Vec<Option<String>> {
    let is_slow = |share: &&DeviceShare| share.speed < 1.0 + AS_FAST;
    let slow: Vec<usize> = shares.iter().filter(is_slow).map(|share| share.device).collect();
    let why = |share: &DeviceShare| {
        let others: Vec<String> =
            slow.iter().filter(|&&other| other != share.device).map(usize::to_string).collect();
        match share.speed {
            _ if shares.len() == 1 => None,
            _ if slow.len() == shares.len() && shares.len() > 2 => Some("as fast as the others".into()),
            speed if speed < 1.0 + AS_FAST => Some(match &others[..] {
                [] => "the slowest of the devices".into(),
                [other] => format!("as fast as device {other}"),
                others => format!("as fast as devices {}", others.join(", ")),
            }),
            speed if speed < TIMES => {
                Some(format!("{:.0} % faster than device {slowest}", 100.0 * (speed - 1.0)))
            }
            speed => Some(format!("{speed:.1} times as fast as device {slowest}")),
        }
    };
    shares.iter().map(why).collect()
}

/// Layers of which there is one of a kind, and how much work they are.
fn why_ends(own: &[usize], workload: &Workload, work: impl Fn(Range<usize>) -> f64) -> Vec<String> {
    let usual = usual_block(workload);
    let is_rare = |&layer: &usize| {
        let kind = workload.layers[layer].kind;
        workload.layers.iter().filter(|other| other.kind == kind).count() == 1 && !usual.contains(&layer)
    };
    let rare = own.iter().copied().filter(is_rare);
    rare.map(|layer| {
        let name = &workload.layers[layer].name;
        match ratio(work(layer..layer + 1), work(usual.clone())) {
            much if much < 0.05 => format!("has the {name}, hardly any work"),
            much => format!("has the {name}, as much work as {much:.1} blocks"),
        }
    })
    .collect()
}

fn why_memory(planned: &Planned, share: &DeviceShare) -> Vec<String> {
    let mut why = Vec::new();
    if let Some(unlimited) = &planned.unlimited {
        let stages = planned.best.stages_of(share.rank).map(|stage| &unlimited[stage]);
        let without: Layers = stages.map(|places| places.end - places.start).sum();
        if without > share.layers {
            why.push(format!("limited by memory to {} fewer", (without - share.layers).counted()));
        }
        if without < share.layers {
            let more = (share.layers - without).counted();
            why.push(format!("{more} more because of the memory of others"));
        }
    }
    let repeated = share.stages.iter().filter(|stage| stage.recompute).count();
    if repeated > 0 {
        let what =
            if share.stages.len() == 1 { String::new() } else { format!(" in {repeated} of its stages") };
        why.push(format!("repeats the forward pass{what} to save memory"));
    }
    why
}

fn why_idle(share: &DeviceShare, makespan: f64) -> Vec<String> {
    let Waiting { imbalance, link, .. } = share.idle_seconds;
    let parts = [(imbalance, "other devices"), (link, "links")];
    let notable = parts.into_iter().filter(|(seconds, _)| *seconds > NOTABLE * makespan);
    notable
        .map(|(seconds, what)| format!("waits {} of the time for {what}", percent(seconds / makespan)))
        .collect()
}

fn links(best: &Candidate) -> Vec<LinkShare> {
    let mut links: Vec<LinkShare> = Vec::new();
    let mut add = |from: usize, to: usize, bytes: u64, shared: bool| {
        let (from, to) = (best.devices[from], best.devices[to]);
        let again = if shared { bytes } else { 0 };
        match links.iter_mut().find(|link| (link.from, link.to) == (from, to)) {
            Some(link) => (link.bytes, link.shared) = (link.bytes + bytes, link.shared + again),
            None => links.push(LinkShare { from, to, bytes, shared: again }),
        }
    };
    let placement = &best.placement;
    for boundary in 0..best.stages.len() - 1 {
        for microbatch in (0..best.microbatches).filter(|&m| placement.crosses(boundary, m)) {
            let hops = &best.costs.hops[placement.hop(boundary, microbatch)];
            let [from, to] = [boundary, boundary + 1].map(|stage| placement.rank(stage, microbatch));
            add(from, to, hops.forward.bytes, false);
            add(to, from, hops.backward.bytes, false);
        }
    }
    for way in &best.costs.exchanges {
        add(way.from, way.to, way.gradient.bytes, way.user == way.owner);
        add(way.to, way.from, way.weight.bytes, way.user == way.owner);
    }
    links.sort_by_key(|link| (link.from, link.to));
    links
}

fn one_pipeline(planned: &Planned) -> Option<OnePipeline> {
    let best = &planned.best;
    let one = planned.alternatives.iter().find(|other| other.placement.is_single());
    one.filter(|_| !best.placement.is_single()).map(|one| OnePipeline {
        slower: one.simulation.expected / best.simulation.expected - 1.0,
        bubble: one.simulation.bubble,
    })
}

fn host(best: &Candidate, workload: &Workload, machine: &Machine) -> Vec<HostShare> {
    let sharding = workload.sharding;
    if !sharding.through_host() {
        return Vec::new();
    }
    let prices = Prices::new(workload, &workload.batchings[best.batching], machine);
    let of_rank = |rank: usize| {
        let passing = prices.passing(&best.placement, &best.devices, &best.stages, rank);
        let (mut down, mut up) = (passing.gradients + passing.sent, passing.sums + passing.kept);
        for (replica, of) in best.placement.replicas().iter().enumerate().filter(|(_, of)| of.rank == rank) {
            let layers = &workload.layers[best.stages[of.stage].clone()];
            let times = best.placement.microbatches(replica).count() as u64;
            let bytes = |of: fn(&Layer) -> u64, does: bool| {
                if does { times * layers.iter().map(of).sum::<u64>() } else { 0 }
            };
            down += bytes(|layer| layer.weights, sharding.streams_gradients());
            // Once for F, and once for the backward pass.
            up += 2 * bytes(|layer| layer.read, sharding.streams_weights());
        }
        HostShare { device: best.devices[rank], down, up }
    };
    (0..best.devices.len()).map(of_rank).collect()
}

fn shared(best: &Candidate) -> Vec<SharedBy> {
    let mut found: Vec<SharedBy> = Vec::new();
    for (stage, range) in best.places.iter().enumerate() {
        let devices: Vec<usize> = best.placement.holders(stage).map(|rank| best.devices[rank]).collect();
        if devices.len() < 2 {
            continue;
        }
        let ways = best.costs.exchanges.iter().filter(|way| (way.user, way.owner) == (stage, stage));
        let (gradients, weights) =
            ways.fold((0, 0), |sum, way| (sum.0 + way.gradient.bytes, sum.1 + way.weight.bytes));
        if gradients == 0 {
            continue;
        }
        let layers = vec![(range.start, range.end)];
        match found.iter_mut().find(|other| other.devices == devices) {
            Some(other) => {
                other.layers.extend(layers);
                other.gradients += gradients;
                other.weights += weights;
            }
            None => found.push(SharedBy { devices, layers, gradients, weights }),
        }
    }
    found
}

fn alternative(other: &Candidate, best: &Candidate) -> Alternative {
    Alternative {
        schedule: other.schedule.name.clone(),
        chunks: chunks(other),
        microbatches: other.microbatches,
        devices: other.devices.clone(),
        layers: (0..other.devices.len()).map(|rank| other.layers_of(rank)).collect(),
        shares: other.shares(),
        recompute: other.repeated(),
        step_seconds: other.simulation.expected,
        slower: other.simulation.expected / best.simulation.expected - 1.0,
    }
}
