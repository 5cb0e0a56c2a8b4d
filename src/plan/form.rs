//! Schedules before it is known which devices follow them.

use crate::error::Result;
use crate::schedule::{Kind, NAMES, Schedule, default_chunks, generate_chunked, stage_ranks};

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

/// What a schedule fixes for each stage and rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layout {
    /// The rank of each stage.
    pub stage_ranks: Vec<usize>,
    /// The stages of each rank.
    pub own: Vec<Vec<usize>>,
    /// Stash slots of each stage: as many as microbatches are in flight at the worst moment.
    pub stash: Vec<usize>,
    /// The most microbatches whose F a stage starts before it has ended the first of them.
    pub ahead: Vec<usize>,
    /// Gradient slots of each stage.
    pub gradient: Vec<usize>,
    /// Whether a stage has I and W apart.
    pub split: Vec<bool>,
    /// Link buffers of each rank.
    pub rings: Vec<u64>,
}

impl Layout {
    /// Of a valid schedule.
    pub fn new(schedule: &Schedule) -> Layout {
        let stages = schedule.stages;
        let mut stage_ranks = vec![0; stages];
        let mut split = vec![false; stages];
        let mut own = vec![Vec::new(); schedule.ranks.len()];
        for (rank, actions) in schedule.ranks.iter().enumerate() {
            for action in actions.iter().filter(|action| !action.kind.is_whole()) {
                stage_ranks[action.stage] = rank;
                split[action.stage] |= action.kind == Kind::I;
            }
        }
        for (stage, &rank) in stage_ranks.iter().enumerate() {
            own[rank].push(stage);
        }
        let stash: Vec<usize> =
            (0..stages).map(|stage| schedule.slots(stage, stage_ranks[stage]).count).collect();
        // Where forwards are not in order of microbatches, the first of them may end late.
        let ahead = (0..stages).map(|stage| {
            let own = schedule.ranks[stage_ranks[stage]].iter().filter(|action| action.stage == stage);
            let forwards = own.filter(|action| action.kind == Kind::F).map(|action| action.microbatch);
            if forwards.is_sorted() { stash[stage] } else { schedule.microbatches }
        });
        let ahead = ahead.collect();
        let gradient =
            (0..stages).map(|stage| schedule.gradient_slots(stage, stage_ranks[stage]).count).collect();
        let mut rings = vec![0; schedule.ranks.len()];
        for (stage, pair) in stage_ranks.windows(2).enumerate() {
            if pair[0] != pair[1] {
                rings[pair[0]] += ring_buffers(stash[stage]);
                rings[pair[1]] += ring_buffers(stash[stage]);
            }
        }
        Layout { stage_ranks, own, stash, ahead, gradient, split, rings }
    }
}

impl Layout {
    /// The same stages with a single microbatch in flight.
    pub fn lean(&self) -> Layout {
        let one = vec![1; self.stage_ranks.len()];
        let mut rings = vec![0; self.own.len()];
        for pair in self.stage_ranks.windows(2).filter(|pair| pair[0] != pair[1]) {
            pair.iter().for_each(|&rank| rings[rank] += ring_buffers(1));
        }
        let split = vec![false; one.len()];
        Layout { stash: one.clone(), ahead: one.clone(), gradient: one, split, rings, ..self.clone() }
    }
}

impl Form {
    pub fn new(batching: usize, schedule: Schedule) -> Form {
        let layout = Layout::new(&schedule);
        Form { batching, schedule, layout }
    }

    pub fn ranks(&self) -> usize {
        self.schedule.ranks.len()
    }

    pub fn stages(&self) -> usize {
        self.schedule.stages
    }

    /// Whether every rank has one stage, in order.
    pub fn is_plain(&self) -> bool {
        self.layout.stage_ranks.iter().enumerate().all(|(stage, &rank)| stage == rank)
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
                Ok(schedule) => forms.push(Form::new(batching, schedule)),
                Err(error) if name.is_some() => return Err(error),
                Err(_) => {}
            }
        }
    }
    Ok(forms)
}
