//! What travels between devices that have the same layers, and between them and the host's memory: whose part is what, how
//! many bytes it is, and how long it takes.

use std::ops::Range;

use super::costs::{Assignment, GIGA, MICRO, Prices};
use super::machine::Machine;
use crate::schedule::{Costs, Exchange, Hop, Placement};

/// Buckets that are on their way at once between devices that have the same layers. A backward pass lets as many leave between two
/// of its parts; with 4 a GPT of 20 million parameters had sent half of its gradients when the pass ended.
pub(crate) const EXCHANGE_SLOTS: usize = 8;

/// How often what goes to the host's memory or comes from it is read or written there: by the device, and twice by the host.
const HOST_PASSES: f64 = 3.0;

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

impl Prices<'_> {
    /// Seconds in which a device sends bytes to the host's memory, where they are added, while so many do.
    pub(super) fn to_host(&self, device: usize, bytes: u64, together: usize) -> f64 {
        let (way, _) = self.host_way(device, bytes);
        (way.out + way.copy).max(self.in_memory(bytes, together))
    }

    /// Seconds in which a device gets bytes from the host's memory, while so many do.
    pub(super) fn out_of_host(&self, device: usize, bytes: u64, together: usize) -> f64 {
        let (_, way) = self.host_way(device, bytes);
        (way.copy + way.into).max(self.in_memory(bytes, together))
    }

    /// Seconds that the host's memory takes for what so many devices send to it or get from it at once.
    fn in_memory(&self, bytes: u64, together: usize) -> f64 {
        let rate = self.machine.host_memory_gb_s.filter(|_| together > 1);
        rate.map_or(0.0, |rate| HOST_PASSES * (together as f64 * bytes as f64) / GIGA / rate)
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

    /// Bytes of the links over which the ranks that have a stage exchange its gradients and weights, on one of them.
    pub(super) fn shared(&self, range: &Range<usize>, part: Part) -> u64 {
        let others = part.of as u64 - 1;
        let (gradients, weights) = self.pieces(range, part);
        if others == 0 || gradients == 0 || self.workload.sharding.through_host() {
            return 0;
        }
        let buckets = gradients.div_ceil(self.workload.bucket.max(1));
        let [gradient, weight] = [gradients, weights].map(|bytes| bytes / buckets);
        let slots = buckets.min(EXCHANGE_SLOTS as u64);
        let wire = self.workload.wire;
        let end = slots * wire.travelling(gradient) + wire.buffers(gradient);
        let owner = part.arrivals() as u64 * end + slots * weight + gradient;
        owner + others * (end + slots * weight)
    }

    /// Bytes of the gradients of what one of the ranks that have a stage owns of it, and of the weights as they travel.
    fn pieces(&self, range: &Range<usize>, part: Part) -> (u64, u64) {
        let of = |sums: &[u64]| part.of_bytes(sums[range.end] - sums[range.start]);
        (of(&self.weights), of(&self.sent))
    }

    /// What travels at the end of a step.
    pub(super) fn fill_exchanges(&self, plan: &Assignment, costs: &mut Costs) {
        let Assignment { devices, stages, placement, .. } = *plan;
        // What goes by way of the host is a part of what its ends do.
        let free = self.workload.sharding.through_host();
        let mut add =
            |user: usize, owner: usize, from: usize, to: usize, bytes: (u64, u64), arrivals: Arrivals| {
                let travelling = self.workload.wire.travelling(bytes.0);
                let mut gradient = hop(self.machine, devices[from], devices[to], travelling);
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
}

/// The way of a tensor between two devices.
pub(super) fn hop(machine: &Machine, from: usize, to: usize, bytes: u64) -> Hop {
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
