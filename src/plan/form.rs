//! Schedules before it is known which devices follow them.

use crate::error::Result;
use crate::schedule::{
    Costs, Kind, NAMES, Placement, Schedule, default_chunks, generate_chunked, stage_ranks,
};

use super::costs::ring_buffers;

/// The most stages a rank has in the schedules that are tried.
pub(super) const MOST_CHUNKS: usize = 4;

/// A schedule for a number of ranks, with what memory and bounds need to know of it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Form {
    /// Position of the batching among those that are tried.
    pub batching: usize,
    pub schedule: Schedule,
    pub layout: Layout,
}

/// What a schedule fixes for each stage, replica ([`Placement::replicas`]) and rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layout {
    /// Which rank does what.
    pub placement: Placement,
    /// The replicas of each rank.
    pub own: Vec<Vec<usize>>,
    /// How many microbatches each replica does.
    pub shares: Vec<usize>,
    /// Stash slots of each replica: as many as microbatches are in flight at the worst moment.
    pub stash: Vec<usize>,
    /// The most microbatches whose F a replica starts before it has ended the first of them.
    pub ahead: Vec<usize>,
    /// Gradient slots of each replica.
    pub gradient: Vec<usize>,
    /// Whether a stage has I and W apart.
    pub split: Vec<bool>,
    /// Link buffers of each rank.
    pub rings: Vec<u64>,
}

impl Layout {
    /// Of a valid schedule.
    ///
    /// # Errors
    ///
    /// Those of [`Schedule::placement`].
    pub fn new(schedule: &Schedule) -> Result<Layout> {
        let placement = schedule.placement()?;
        let split = (0..schedule.stages).map(|stage| schedule.splits(stage)).collect();
        let replicas = placement.replicas();
        let stash: Vec<usize> = replicas.iter().map(|of| schedule.slots(of.stage, of.rank).count).collect();
        // Where forwards are not in order of microbatches, the first of them may end late.
        let ahead = replicas.iter().zip(&stash).map(|(of, &stash)| {
            let own = schedule.ranks[of.rank].iter().filter(|action| action.stage == of.stage);
            let forwards = own.filter(|action| action.kind == Kind::F).map(|action| action.microbatch);
            if forwards.is_sorted() { stash } else { schedule.microbatches }
        });
        let ahead = ahead.collect();
        let gradient = replicas.iter().map(|of| schedule.gradient_slots(of.stage, of.rank).count).collect();
        let mut own = vec![Vec::new(); schedule.ranks.len()];
        for (number, replica) in replicas.iter().enumerate() {
            own[replica.rank].push(number);
        }
        let rings = rings(&placement, schedule.ranks.len(), &stash);
        let shares = (0..replicas.len()).map(|replica| placement.microbatches(replica).count()).collect();
        Ok(Layout { placement, own, shares, stash, ahead, gradient, split, rings })
    }

    /// The same stages with a single microbatch in flight.
    pub fn lean(&self) -> Layout {
        let one = vec![1; self.stash.len()];
        let rings = rings(&self.placement, self.own.len(), &one);
        let split = vec![false; self.split.len()];
        Layout { stash: one.clone(), ahead: one.clone(), gradient: one, split, rings, ..self.clone() }
    }

    /// The stage of a replica.
    pub fn stage(&self, replica: usize) -> usize {
        self.placement.replicas()[replica].stage
    }

    /// Seconds of a replica's computations for one microbatch.
    pub fn seconds(&self, costs: &Costs, replica: usize) -> f64 {
        let cost = &costs.stages[replica];
        let split = self.split[self.stage(replica)];
        cost.forward + if split { cost.input + cost.weight } else { cost.backward }
    }
}

/// Link buffers of each rank if replicas keep so many microbatches.
fn rings(placement: &Placement, ranks: usize, stash: &[usize]) -> Vec<u64> {
    let mut rings = vec![0; ranks];
    let links = placement.hops().iter().enumerate().filter(|(hop, _)| placement.is_link(*hop));
    for (_, &(from, to)) in links {
        for replica in [from, to] {
            rings[placement.replicas()[replica].rank] += ring_buffers(stash[from]);
        }
    }
    rings
}

impl Form {
    /// Of a valid schedule.
    ///
    /// # Errors
    ///
    /// Those of [`Schedule::placement`].
    pub fn new(batching: usize, schedule: Schedule) -> Result<Form> {
        let layout = Layout::new(&schedule)?;
        Ok(Form { batching, schedule, layout })
    }

    pub fn ranks(&self) -> usize {
        self.schedule.ranks.len()
    }

    pub fn stages(&self) -> usize {
        self.schedule.stages
    }

    /// Whether every rank has one stage, in order.
    pub fn is_plain(&self) -> bool {
        let replicas = self.layout.placement.replicas();
        replicas.iter().enumerate().all(|(number, of)| number == of.stage && number == of.rank)
    }

    /// Actions of one simulation.
    pub fn actions(&self) -> usize {
        self.schedule.ranks.iter().map(Vec::len).sum()
    }
}

/// The numbers of stages a rank that are tried for the schedule called `name`.
fn chunks(name: &str) -> Result<std::ops::RangeInclusive<usize>> {
    let usual = default_chunks(name)?;
    // The first number of chunks that the name does not refuse may be followed by others.
    let most = if stage_ranks(name, 1, usual + 1).is_ok() { MOST_CHUNKS } else { usual };
    Ok(usual..=most)
}

/// The schedules called `name`, or of all names, for `ranks` ranks and at most `layers` stages. Of all names those are
/// left out that cannot have this number of microbatches; one rank alone has no use for more than one.
///
/// # Errors
///
/// Why there is no schedule of that one name.
pub(super) fn forms(
    name: Option<&str>,
    ranks: usize,
    layers: usize,
    batching: usize,
    microbatches: usize,
) -> Result<Vec<Form>> {
    let names = match name {
        Some(name) => vec![name],
        None if ranks == 1 => vec!["1f1b"],
        None => NAMES.to_vec(),
    };
    let mut forms: Vec<Form> = Vec::new();
    for each in names {
        for chunks in chunks(each)?.filter(|chunks| ranks * chunks <= layers) {
            match generate_chunked(each, ranks, chunks, microbatches) {
                // With few microbatches several names mean the same lists.
                Ok(schedule) if forms.iter().any(|other| other.schedule.ranks == schedule.ranks) => {}
                Ok(schedule) => forms.push(Form::new(batching, schedule)?),
                Err(error) if name.is_some() => return Err(error),
                Err(_) => {}
            }
        }
    }
    Ok(forms)
}
