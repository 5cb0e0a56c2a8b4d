//! Where each action of a schedule stands.

use std::borrow::Cow;

use super::generate::check_size;
use super::placement::{NOWHERE, Placement};
use super::whole::Shared;
use super::{Action, Kind, Schedule, Scope, draw};
use crate::error::{Error, Result};

/// A position in a schedule: rank, and place in that rank's list.
pub(super) type Place = (usize, usize);

/// Kinds of actions that a stage does for each microbatch: the first of [`Kind`].
const FOR_EACH_MICROBATCH: usize = 8;

/// A schedule of which every microbatch of a stage is on one rank and no action stands twice, with a table to find each in
/// O(1).
pub(super) struct Index<'a> {
    pub schedule: Cow<'a, Schedule>,
    pub placement: Placement,
    pub lowered: bool,
    pub complete: bool,
    /// For each stage, microbatch and kind, 1 + the place in its rank's list, or 0 where there is none.
    places: Vec<u32>,
    /// For each rank, the places of what it does once a step, in order.
    whole: Vec<Vec<usize>>,
}

impl<'a> Index<'a> {
    pub fn new(schedule: Cow<'a, Schedule>) -> Result<Self> {
        let Schedule { stages, microbatches, .. } = *schedule;
        check_size(stages, microbatches)?;
        let mut rank_of = vec![NOWHERE; stages * microbatches];
        let mut places = vec![0; stages * microbatches * FOR_EACH_MICROBATCH];
        let mut whole: Vec<Vec<usize>> = vec![Vec::new(); schedule.ranks.len()];
        for (rank, actions) in schedule.ranks.iter().enumerate() {
            if actions.is_empty() {
                return Err(reject(&schedule, (rank, 0), format!("rank {rank} has no actions")));
            }
            for (at, &action) in actions.iter().enumerate() {
                let wrong = |message: String| Err(reject(&schedule, (rank, at), message));
                let twice = || wrong(format!("{action} stands twice on rank {rank}"));
                if action.stage >= stages {
                    return wrong(format!("{action} is beyond the last stage, {}", stages - 1));
                }
                if action.microbatch >= microbatches {
                    return wrong(format!("{action} is beyond the last microbatch, {}", microbatches - 1));
                }
                if action.kind.scope() != Scope::Microbatch {
                    if whole[rank].iter().any(|&before| actions[before] == action) {
                        return twice();
                    }
                    whole[rank].push(at);
                    continue;
                }
                let of = &mut rank_of[action.stage * microbatches + action.microbatch];
                if *of == NOWHERE {
                    *of = rank as u32;
                }
                if *of != rank as u32 {
                    return wrong(format!(
                        "{action} is on rank {rank}, but microbatch {} of stage {} is already on rank {of}",
                        action.microbatch, action.stage
                    ));
                }
                let place = &mut places[cell(&schedule, action)];
                if *place != 0 {
                    return twice();
                }
                *place = at as u32 + 1;
            }
            if whole[rank].len() == actions.len() {
                return Err(reject(&schedule, (rank, 0), format!("rank {rank} computes nothing")));
            }
        }
        // The end of the last list is as good a place as any for what stands nowhere.
        let end = (schedule.ranks.len().saturating_sub(1), schedule.ranks.last().map_or(0, Vec::len));
        let placement = Placement::new(stages, microbatches, &rank_of);
        if let Some(stage) = (0..stages).find(|&stage| placement.of_stage(stage).is_empty()) {
            return Err(reject(&schedule, end, format!("stage {stage} is on no rank")));
        }
        let (lowered, complete) = (schedule.is_lowered(), schedule.is_complete());
        Ok(Index { schedule, placement, lowered, complete, places, whole })
    }

    /// Where an action of a microbatch stands, if it does.
    pub fn find(&self, action: Action) -> Option<Place> {
        let place = self.places[cell(&self.schedule, action)].checked_sub(1)?;
        Some((self.placement.rank(action.stage, action.microbatch), place as usize))
    }

    /// Where an action stands on a rank, if it does.
    pub fn find_on(&self, rank: usize, action: Action) -> Option<Place> {
        if !action.kind.is_whole() {
            return self.find(action).filter(|place| place.0 == rank);
        }
        let actions = &self.schedule.ranks[rank];
        self.whole[rank].iter().find(|&&at| actions[at] == action).map(|&at| (rank, at))
    }

    /// Who adds up whose gradients, as the actions of the whole step say.
    pub fn shared(&self) -> Shared {
        let of_rank = |(rank, places): (usize, &Vec<usize>)| {
            let actions = places.iter().map(|&at| self.schedule.ranks[rank][at]).collect::<Vec<_>>();
            actions.into_iter().filter(|action| action.kind == Kind::R).map(move |r| (rank, r.stage))
        };
        Shared::new(&self.placement, self.whole.iter().enumerate().flat_map(of_rank).collect())
    }

    /// The action that yields the gradient of the stage's input: I where the backward pass is split, else B.
    pub fn backward(&self, stage: usize, microbatch: usize) -> Action {
        let split = Action::new(stage, Kind::I, microbatch);
        if self.find(split).is_some() { split } else { Action::new(stage, Kind::B, microbatch) }
    }

    /// An error about the action at `place`.
    pub fn reject(&self, place: Place, message: String) -> Error {
        reject(&self.schedule, place, message)
    }
}

fn cell(schedule: &Schedule, action: Action) -> usize {
    (action.stage * schedule.microbatches + action.microbatch) * FOR_EACH_MICROBATCH + action.kind as usize
}

fn reject(schedule: &Schedule, place: Place, message: String) -> Error {
    Error::schedule(message, draw::marked(schedule, &[place]))
}
