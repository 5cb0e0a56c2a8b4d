//! Which device computes which layers, when, and how well that will go: plans for machines of unequal devices.
//!
//! A [`Machine`] is data about devices and links, measured or imagined. A [`Workload`] is data about a model and a
//! batch. [`costs`](costs()) prices an assignment of layers to devices, and nothing else turns profiles into seconds.
//! [`plan`](plan()) searches jointly over the devices to use and their order, the cuts, the schedule, the number of
//! microbatches and where to recompute, under each device's budget of bytes; every plan is judged by the simulator of
//! [`schedule`](crate::schedule). [`Planned::explain`] says what came of it and why.
//!
//! Nothing here knows a GPU or a tensor, so a plan can be made for a machine that is not there. The search counts its
//! work instead of looking at a clock: equal arguments give equal plans.

mod auto;
mod bound;
mod costs;
mod cuts;
mod explain;
mod fit;
mod form;
mod gangs;
mod improve;
mod judge;
mod keys;
mod machine;
mod planner;
mod print;
mod read;
mod search;
mod sharding;
mod space;
mod start;
mod table;
mod teams;
pub(crate) mod text;
mod traffic;
mod uneven;
mod without;
mod workload;

pub use costs::{Assignment, costs};
pub use explain::{
    Alternative, DeviceShare, Explanation, LinkShare, OnePipeline, SharedBy, StageShare, Unused, Waiting,
};
pub use fit::fits;
pub use gangs::Divided;
pub use keys::MACHINE_KEYS;
pub use machine::{
    DeviceProfile, Evidence, GangProfile, LayerProfile, Link, LinkProfile, Machine, Rates, ShapeProfile,
};
pub use planner::{check, plan};
pub use sharding::{Optimizer, Sharding, Sum};
pub(crate) use traffic::EXCHANGE_SLOTS;
pub use without::{Without, without};
pub use workload::{
    Batching, EndMemory, Footprint, FormMemory, KindWork, Layer, LayerMemory, StageForm, StageNeed, Sums,
    TiedLayers, Work, Workload,
};

use std::ops::Range;

use crate::error::{Error, Result};
use crate::layers::Layers;
use crate::schedule::{Costs, Placement, Schedule, Simulation};

/// What may be decided by hand; what is left open the planner chooses.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Options {
    /// The devices in the order of the pipeline, all of them used.
    pub devices: Option<Vec<usize>>,
    /// The schedule.
    pub schedule: ScheduleChoice,
    /// Where the stages after the first begin.
    pub cuts: Option<Vec<Layers>>,
    /// Microbatches of a step.
    pub microbatches: Option<usize>,
    /// Which stages repeat F.
    pub recompute: RecomputeChoice,
    /// How many pipelines train beside each other. A schedule that is given says it itself.
    pub data: DataChoice,
    /// Bytes that each device of the machine may use, instead of its profile's `memory`; none keeps that.
    pub budgets: Vec<Option<u64>>,
    /// Bytes that may be used of the host's memory; none for as many as there are.
    pub host: Option<u64>,
}

/// Which schedules are tried.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum ScheduleChoice {
    /// All that have a name, and one synthesised for the machine.
    #[default]
    Any,
    /// This one; `auto` is the synthesised one.
    Named(String),
    /// This very list of actions.
    Given(Schedule),
}

/// Which stages keep only their input and repeat F before the backward pass.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum RecomputeChoice {
    /// Those that would not fit otherwise.
    #[default]
    AsNeeded,
    /// None.
    Never,
    /// All.
    Always,
    /// These, by stage; those beyond the end of the list do not.
    Stages(Vec<bool>),
}

/// How many replicas every stage has: pipelines beside each other, each for a share of the microbatches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DataChoice {
    /// As many as are fastest.
    Any,
    /// So many; the planner shares out the microbatches. One is what a caller has who asks for nothing: the order in which
    /// gradients are added depends on it.
    Count(usize),
    /// One for each of these shares, which together are the microbatches of a step.
    Shares(Vec<usize>),
}

impl Default for DataChoice {
    fn default() -> Self {
        DataChoice::Count(1)
    }
}

impl DataChoice {
    /// How many there must be, if that is fixed.
    pub fn count(&self) -> Option<usize> {
        match self {
            DataChoice::Any => None,
            DataChoice::Count(count) => Some(*count),
            DataChoice::Shares(shares) => Some(shares.len()),
        }
    }

    /// Whether replicas with these shares may be; none are those of stages that are not all on as many ranks.
    pub fn allows(&self, shares: Option<&[usize]>) -> bool {
        match self {
            DataChoice::Any => true,
            DataChoice::Count(count) => shares.is_some_and(|shares| shares.len() == *count),
            DataChoice::Shares(wanted) => shares == Some(wanted),
        }
    }

    /// Refuses more replicas than there are devices.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] that says how many there are of each.
    pub fn check(&self, devices: usize) -> Result<()> {
        match self.count().filter(|&count| count > devices) {
            None => Ok(()),
            Some(count) => {
                let message = format!("{count} replicas need as many devices, and there are {devices}");
                Err(Error::config("mesh.data", message))
            }
        }
    }
}

/// A plan: who computes what and when, and what that costs.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// The machine's device of each rank.
    pub devices: Vec<usize>,
    /// Layers of each stage, by their numbers in the workload.
    pub stages: Vec<Range<usize>>,
    /// The same as people count them.
    pub places: Vec<Range<Layers>>,
    /// Which rank does which stage of which microbatch.
    pub placement: Placement,
    /// Computation only; [`Schedule::lowered`] adds the transfers.
    pub schedule: Schedule,
    /// Position in [`Workload::batchings`].
    pub batching: usize,
    /// Microbatches of a step.
    pub microbatches: usize,
    /// Sequences of a microbatch.
    pub batch: usize,
    /// For each stage, whether it repeats F before its backward pass.
    pub recompute: Vec<bool>,
    /// What everything costs.
    pub costs: Costs,
    /// When everything happens, and the bytes that will be allocated on each rank ([`Simulation::slot_bytes`]).
    pub simulation: Simulation,
    /// Tokens of a step ÷ its seconds.
    pub tokens_per_second: f64,
}

impl Candidate {
    /// Where the stages after the first begin.
    pub fn cuts(&self) -> Vec<Layers> {
        self.places[1..].iter().map(|range| range.start).collect()
    }

    /// The microbatches of each pipeline where there are several; one share where there is one, or where stages are not all
    /// on as many ranks.
    pub fn shares(&self) -> Vec<usize> {
        self.placement.shares().unwrap_or_else(|| vec![self.microbatches])
    }

    /// The stages of a rank.
    pub fn stages_of(&self, rank: usize) -> impl Iterator<Item = usize> + '_ {
        (0..self.stages.len()).filter(move |&stage| self.placement.holds(rank, stage))
    }

    /// How many layers a rank has.
    pub fn layers_of(&self, rank: usize) -> Layers {
        self.stages_of(rank).map(|stage| self.places[stage].end - self.places[stage].start).sum()
    }

    /// The stages that repeat F.
    pub fn repeated(&self) -> Vec<usize> {
        (0..self.recompute.len()).filter(|&stage| self.recompute[stage]).collect()
    }
}

/// A plan, and what it was chosen from.
#[derive(Debug, Clone, PartialEq)]
pub struct Planned {
    /// The fastest plan that fits.
    pub best: Candidate,
    /// The best plans that differ in kind: other devices, another order, other microbatches, another schedule. Those
    /// after the best are the fastest that the search came by; it does not prove that none is faster.
    pub alternatives: Vec<Candidate>,
    /// The devices that `best` does without.
    pub left_out: Vec<LeftOut>,
    /// What each device of `best` is worth, if that was asked for: see [`without`](without()).
    pub without: Vec<Without>,
    /// The stages that the devices of `best` would have in its schedule if memory were no limit, if that were faster.
    pub unlimited: Option<Vec<Range<Layers>>>,
    /// Plans looked at.
    pub considered: u64,
    /// Of these, plans simulated; a bound excluded the others.
    pub evaluated: u64,
    /// Whether no plan with a named schedule can be faster; else the search was too large to be finished.
    pub complete: bool,
}

/// A device that is not used.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct LeftOut {
    /// The machine's device.
    pub device: usize,
    /// Why.
    pub reason: String,
}
