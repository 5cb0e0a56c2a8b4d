//! What one training step costs on given devices: the simulator's and the synthesiser's whole input, plain data.
//!
//! Seconds and bytes throughout. A stage's times are those of its device when nothing else runs in the machine;
//! [`Costs::cores`], [`RankCost::cores`] and [`Costs::slowdown`] say how much slower it gets when others do.

use serde::{Deserialize, Serialize};

use super::random::Random;
use super::{Kind, Placement, Schedule};
use crate::error::{Error, Result};

/// Costs of one step. `stages`, `hops` and `ranks` must be as many as the schedule's replicas, hops
/// ([`Placement`](super::Placement)) and ranks.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Costs {
    /// One per stage; of a stage on several ranks one for each, rank by rank.
    pub stages: Vec<StageCost>,
    /// `hops[s]` lies between stages `s` and `s + 1`; where these are on several ranks, there is one for each pair between
    /// which microbatches pass.
    pub hops: Vec<Hops>,
    /// One per rank.
    pub ranks: Vec<RankCost>,
    /// Gradients and weights that go from rank to rank at the end of a step; what stages on one rank share costs nothing here.
    #[serde(default)]
    pub exchanges: Vec<Exchange>,
    /// Host cores that all devices share; 0 if that limits nothing.
    #[serde(default)]
    pub cores: f64,
    /// `slowdown[i][j]`: how many times longer rank `i` takes while rank `j` is busy too, beyond what sharing `cores`
    /// explains (memory bandwidth, caches, the bus). Empty for 1 throughout.
    #[serde(default)]
    pub slowdown: Vec<Vec<f64>>,
    /// 10⁹ bytes a second that the host's memory gives to all copies between ranks together; 0 if that limits nothing.
    #[serde(default)]
    pub host_gb_s: f64,
}

/// What a stage costs per microbatch on its device.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct StageCost {
    /// Seconds of F.
    pub forward: f64,
    /// Seconds of I, recomputation included.
    pub input: f64,
    /// Seconds of W.
    pub weight: f64,
    /// Seconds of B; less than I + W where the two share something.
    pub backward: f64,
    /// Bytes held from F until W (or B) has ended.
    pub stash: u64,
    /// Bytes held from I until W has ended; during B too.
    pub gradient: u64,
}

/// The way between two neighbouring stages, both directions.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Hops {
    /// Of activations, to the next stage.
    pub forward: Hop,
    /// Of gradients, to the stage before.
    pub backward: Hop,
}

/// The way of one tensor from one stage to another.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Hop {
    /// Seconds on the sender's queue, part of the sending action (beside it, with a copy engine).
    pub out: f64,
    /// Seconds in which nothing works on it.
    pub latency: f64,
    /// Seconds of the host's copy; a link carries one tensor at a time.
    pub copy: f64,
    /// Seconds on the receiver's queue, part of the receiving action (before it, with a copy engine).
    pub into: f64,
    /// Bytes of the tensor.
    pub bytes: u64,
}

/// What a rank costs beside its stages.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct RankCost {
    /// Seconds of C: clearing gradients.
    pub begin: f64,
    /// Seconds of N: folding gradients, sums of squares, read-back.
    pub end: f64,
    /// Seconds of U: the optimizer step, after the gradient norm of all ranks is known. What is sent comes on top.
    pub update: f64,
    /// Host cores that the device keeps busy while it works: the number of its threads for a software adapter, near 0
    /// for a GPU.
    pub cores: f64,
    /// How its speed wanders about the mean that all times are for.
    #[serde(default)]
    pub jitter: Jitter,
    /// Whether copies run beside computation instead of in its queue.
    pub copy_engine: bool,
    /// Bytes that do not depend on the schedule: weights, optimizer state, scratch, link buffers.
    pub fixed: u64,
    /// Bytes it may use; none if unknown.
    pub budget: Option<u64>,
}

/// How a device's speed wanders: for some seconds all that it does takes longer or shorter than on average, and then
/// something else, independently of other devices. A pipeline waits for whichever device is slow at the moment, so its
/// steps take longer than with the same mean speeds held steady.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Jitter {
    /// Standard deviation of times as a part of their mean: 0 to 1.
    pub part: f64,
    /// Seconds of work for which one speed lasts.
    pub seconds: f64,
}

/// What goes between a rank that computes gradients of a stage's weights and one that owns some of these: the gradients, at
/// the end of a step, and back the new weights, after the update.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Exchange {
    /// The stage that uses the weights.
    pub user: usize,
    /// The stage that they belong to: another, or the same where several ranks have it.
    pub owner: usize,
    /// The rank that sends gradients.
    pub from: usize,
    /// The rank that sends weights.
    pub to: usize,
    /// Of the gradients.
    pub gradient: Hop,
    /// Of the weights.
    pub weight: Hop,
}

impl Jitter {
    /// Whether the speed never changes.
    pub fn is_none(&self) -> bool {
        self.part == 0.0 || self.seconds == 0.0
    }

    /// How many times the mean the work takes that a rank begins after so many seconds of work, in one of many random
    /// courses of events. What delays a device comes on top of the time that it needs undisturbed: exponentially
    /// distributed. Speeds last for so much work, not time, or slow ones would be met less often than fast ones.
    pub(super) fn factor(&self, course: u64, rank: u32, worked: f64) -> f64 {
        if self.is_none() {
            return 1.0;
        }
        let seed = course << 32 | u64::from(rank) << 24;
        let begun = Random(seed).unit();
        let period = (worked / self.seconds + begun) as u64;
        let unit = Random(seed.wrapping_add(1 + period).wrapping_mul(0xd134_2543_de82_ef95)).unit();
        1.0 - self.part - self.part * (1.0 - unit).ln()
    }
}

impl Costs {
    /// The stages that share parameters: pairs (which uses it, which owns it).
    pub fn tied(&self) -> Vec<(usize, usize)> {
        let pairs = self.exchanges.iter().map(|exchange| (exchange.user, exchange.owner));
        let mut pairs: Vec<_> = pairs.filter(|pair| pair.0 != pair.1).collect();
        pairs.sort_unstable();
        pairs.dedup();
        pairs
    }
}

impl Hop {
    /// Seconds from the end of the action that makes a tensor to the earliest start of the one that needs it, if no
    /// other tensor is on the way.
    pub fn delay(&self) -> f64 {
        self.latency + self.copy
    }

    /// This way, and then another tensor on the same one.
    pub(super) fn and(&self, other: &Hop) -> Hop {
        Hop {
            out: self.out + other.out,
            latency: self.latency.max(other.latency),
            copy: self.copy + other.copy,
            into: self.into + other.into,
            bytes: self.bytes + other.bytes,
        }
    }

    fn check(&self, place: impl Fn() -> String) -> Result<()> {
        check_times(&[self.out, self.latency, self.copy, self.into], place)
    }
}

impl StageCost {
    /// Seconds of a computation of this stage; 0 for any other action.
    pub fn seconds(&self, kind: Kind) -> f64 {
        match kind {
            Kind::F => self.forward,
            Kind::I => self.input,
            Kind::W => self.weight,
            Kind::B => self.backward,
            _ => 0.0,
        }
    }
}

impl Costs {
    /// Equal stages with these times for F, I and W (B takes I + W), free ends of a step, no memory, and `latency`
    /// between any two ranks: the world of the published formulas. The schedule must be valid.
    pub fn uniform(schedule: &Schedule, forward: f64, input: f64, weight: f64, latency: f64) -> Costs {
        let stage = StageCost { forward, input, weight, backward: input + weight, ..StageCost::default() };
        let hop = Hop { latency, ..Hop::default() };
        let (mut stages, mut hops) = (Vec::new(), Vec::new());
        if let Ok(placement) = schedule.placement() {
            stages = vec![stage; placement.replicas().len()];
            let between = |number| match placement.is_link(number) {
                true => Hops { forward: hop, backward: hop },
                false => Hops::default(),
            };
            hops = (0..placement.hops().len()).map(between).collect();
        }
        Costs { stages, hops, ranks: vec![RankCost::default(); schedule.ranks.len()], ..Costs::default() }
    }

    /// Refuses costs that do not belong to a schedule of so many ranks, times that are none, and bytes that no machine has.
    pub(super) fn check(&self, placement: &Placement, ranks: usize) -> Result<()> {
        let count = |what: &str, is: usize, should: usize| {
            if is == should {
                return Ok(());
            }
            Err(Error::config(
                format!("costs.{what}"),
                format!("{is} entries where the schedule has {should}"),
            ))
        };
        count("stages", self.stages.len(), placement.replicas().len())?;
        count("hops", self.hops.len(), placement.hops().len())?;
        count("ranks", self.ranks.len(), ranks)?;
        for (at, stage) in self.stages.iter().enumerate() {
            let StageCost { forward, input, weight, backward, stash, gradient } = *stage;
            let place = || format!("costs.stages[{at}]");
            check_times(&[forward, input, weight, backward], place)?;
            check_bytes(&[stash, gradient], place)?;
        }
        for (at, hops) in self.hops.iter().enumerate() {
            hops.forward.check(|| format!("costs.hops[{at}].forward"))?;
            hops.backward.check(|| format!("costs.hops[{at}].backward"))?;
        }
        for (at, rank) in self.ranks.iter().enumerate() {
            let RankCost { begin, end, update, cores, jitter, fixed, .. } = *rank;
            let place = || format!("costs.ranks[{at}]");
            check_bytes(&[fixed], place)?;
            check_times(&[begin, end, update, cores, jitter.part, jitter.seconds], place)?;
            if jitter.part > 1.0 {
                return Err(Error::config(place(), format!("a jitter of {} is more than 1", jitter.part)));
            }
        }
        for (at, exchange) in self.exchanges.iter().enumerate() {
            let Exchange { user, owner, from, to, gradient, weight } = exchange;
            let place = || format!("costs.exchanges[{at}]");
            let stages = placement.stages();
            if *user.max(owner) >= stages || *from.max(to) >= ranks || from == to {
                let message = format!(
                    "stages {user} and {owner} on ranks {from} and {to} are none of {stages} stages on two of {ranks} ranks"
                );
                return Err(Error::config(place(), message));
            }
            gradient.check(place)?;
            weight.check(place)?;
        }
        check_times(&[self.cores], || "costs.cores".into())?;
        check_times(&[self.host_gb_s], || "costs.host_gb_s".into())?;
        if !self.slowdown.is_empty() {
            count("slowdown", self.slowdown.len(), ranks)?;
        }
        for (at, row) in self.slowdown.iter().enumerate() {
            let place = || format!("costs.slowdown[{at}]");
            count(&format!("slowdown[{at}]"), row.len(), ranks)?;
            check_times(row, place)?;
            if row.contains(&0.0) {
                return Err(Error::config(place(), "0 would make a rank infinitely fast"));
            }
        }
        Ok(())
    }
}

/// The most bytes that a stage or a rank may have of one kind: those of as many microbatches as a schedule may have can
/// still be added up.
const MOST_BYTES: u64 = 1 << 42;

fn check_bytes(bytes: &[u64], place: impl Fn() -> String) -> Result<()> {
    match bytes.iter().find(|bytes| **bytes > MOST_BYTES) {
        None => Ok(()),
        Some(bytes) => Err(Error::config(place(), format!("{bytes} bytes are more than {MOST_BYTES}"))),
    }
}

fn check_times(times: &[f64], place: impl Fn() -> String) -> Result<()> {
    match times.iter().find(|time| !(time.is_finite() && **time >= 0.0)) {
        None => Ok(()),
        Some(time) => Err(Error::config(place(), format!("{time} must be finite and at least 0"))),
    }
}
