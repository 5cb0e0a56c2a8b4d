//! Where each action of a schedule stands, and what it needs before it can start.

use super::generate::check_size;
use super::{Action, Kind, Schedule, draw};
use crate::error::{Error, Result};

/// A position in a schedule: rank, and place in that rank's list.
pub(super) type Place = (usize, usize);

/// A schedule of which every stage is on one rank and no action stands twice, with a table to find each in O(1).
pub(super) struct Index<'a> {
    pub schedule: &'a Schedule,
    /// The rank of each stage.
    pub owner: Vec<usize>,
    pub lowered: bool,
    /// For each stage, microbatch and kind, 1 + the place in the owner's list, or 0 where there is none.
    places: Vec<u32>,
}

impl<'a> Index<'a> {
    pub fn new(schedule: &'a Schedule) -> Result<Self> {
        let Schedule { stages, microbatches, .. } = *schedule;
        check_size(stages, microbatches)?;
        let mut owner = vec![None; stages];
        let mut places = vec![0; stages * microbatches * Kind::ALL.len()];
        for (rank, actions) in schedule.ranks.iter().enumerate() {
            if actions.is_empty() {
                return Err(reject(schedule, (rank, 0), format!("rank {rank} has no actions")));
            }
            for (at, &action) in actions.iter().enumerate() {
                let wrong = |message: String| Err(reject(schedule, (rank, at), message));
                if action.stage >= stages {
                    return wrong(format!("{action} is beyond the last stage, {}", stages - 1));
                }
                if action.microbatch >= microbatches {
                    return wrong(format!("{action} is beyond the last microbatch, {}", microbatches - 1));
                }
                let owner = *owner[action.stage].get_or_insert(rank);
                if owner != rank {
                    return wrong(format!(
                        "{action} is on rank {rank}, but stage {} is already on rank {owner}",
                        action.stage
                    ));
                }
                let place = &mut places[cell(schedule, action)];
                if *place != 0 {
                    return wrong(format!("{action} stands twice on rank {rank}"));
                }
                *place = at as u32 + 1;
            }
        }
        // The end of the last list is as good a place as any for what stands nowhere.
        let end = (schedule.ranks.len().saturating_sub(1), schedule.ranks.last().map_or(0, Vec::len));
        let owner = owner
            .into_iter()
            .enumerate()
            .map(|(stage, rank)| {
                rank.ok_or_else(|| reject(schedule, end, format!("stage {stage} is on no rank")))
            })
            .collect::<Result<_>>()?;
        Ok(Index { schedule, owner, lowered: schedule.is_lowered(), places })
    }

    /// Where `action` stands, if it does.
    pub fn find(&self, action: Action) -> Option<Place> {
        let place = self.places[cell(self.schedule, action)].checked_sub(1)?;
        Some((self.owner[action.stage], place as usize))
    }

    /// Whether the two neighbours `stage` and `stage + 1` are on different ranks.
    pub fn crosses(&self, stage: usize) -> bool {
        self.owner[stage] != self.owner[stage + 1]
    }

    /// The action that yields the gradient of the stage's input: I where the backward pass is split, else B.
    pub fn backward(&self, stage: usize, microbatch: usize) -> Action {
        let split = Action::new(stage, Kind::I, microbatch);
        if self.find(split).is_some() { split } else { Action::new(stage, Kind::B, microbatch) }
    }

    /// The actions that must have ended before `action` can start. The neighbours of a transfer must exist.
    pub fn needs(&self, action: Action) -> [Option<Action>; 2] {
        let Action { stage, kind, microbatch } = action;
        let own = |kind| Action::new(stage, kind, microbatch);
        match kind {
            Kind::F => {
                let input = (stage > 0).then(|| {
                    if self.lowered && self.crosses(stage - 1) {
                        own(Kind::RecvF)
                    } else {
                        Action::new(stage - 1, Kind::F, microbatch)
                    }
                });
                [input, None]
            }
            Kind::B | Kind::I => {
                let gradient = (stage + 1 < self.schedule.stages).then(|| {
                    if self.lowered && self.crosses(stage) {
                        own(Kind::RecvB)
                    } else {
                        self.backward(stage + 1, microbatch)
                    }
                });
                [Some(own(Kind::F)), gradient]
            }
            Kind::W => [Some(own(Kind::I)), None],
            Kind::SendF => [Some(own(Kind::F)), None],
            Kind::RecvF => [Some(Action::new(stage - 1, Kind::SendF, microbatch)), None],
            Kind::SendB => [Some(self.backward(stage, microbatch)), None],
            Kind::RecvB => [Some(Action::new(stage + 1, Kind::SendB, microbatch)), None],
        }
    }

    /// An error about the action at `place`.
    pub fn reject(&self, place: Place, message: String) -> Error {
        reject(self.schedule, place, message)
    }
}

fn cell(schedule: &Schedule, action: Action) -> usize {
    (action.stage * schedule.microbatches + action.microbatch) * Kind::ALL.len() + action.kind as usize
}

fn reject(schedule: &Schedule, place: Place, message: String) -> Error {
    Error::schedule(message, draw::marked(schedule, &[place]))
}
