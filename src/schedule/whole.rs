//! How a step begins and ends: what a rank does once a step, as actions like all others.
//!
//! Every rank clears its gradients (C) before the first is added to, and after its last computation sums the squares of
//! those of the weights that it owns (N). The update (U) needs the norm of the whole gradient, so every rank's N. A rank
//! whose stage shares a parameter with a stage elsewhere sends its gradients there (R), where N adds them, and receives
//! the new weights after the update (G).

use super::check::prove;
use super::edges::{Moves, Need};
use super::{Action, Kind, Schedule};
use crate::error::{Error, Result};

impl Schedule {
    /// The same schedule with what begins and ends a step on every rank. `ties` are pairs of stages that share a parameter:
    /// (which uses it, which owns it); those on one rank need nothing. A schedule that is complete comes back as it is.
    ///
    /// # Errors
    ///
    /// Those of [`Schedule::validate`], [`Error::Config`] for ties of stages that do not exist, and [`Error::Schedule`] for
    /// a complete schedule that sends other gradients than those of the ties.
    pub fn completed(&self, ties: &[(usize, usize)]) -> Result<Schedule> {
        let index = prove(self)?.index;
        if let Some((user, owner)) = ties.iter().find(|tie| tie.0.max(tie.1) >= self.stages) {
            let message = format!("stages {user} and {owner} are not two of {}", self.stages);
            return Err(Error::config("ties", message));
        }
        let uses = uses(&index.owner, ties);
        if index.complete {
            let written = index.uses();
            let end = |rank: usize| (rank, self.ranks[rank].len());
            if let Some(&(rank, stage)) = uses.iter().find(|of| !written.contains(of)) {
                let message = format!(
                    "rank {rank} shares a parameter with stage {stage}, so it needs {stage}R and {stage}G; without C, N and U they are added"
                );
                return Err(index.reject(end(rank), message));
            }
            if let Some(&(rank, stage)) = written.iter().find(|of| !uses.contains(of)) {
                let message =
                    format!("rank {rank} shares no parameter with stage {stage}: {stage}R sends nothing");
                return Err(index.reject(end(rank), message));
            }
            return Ok(self.clone());
        }
        let ranks = self.ranks.iter().enumerate().map(|(rank, actions)| {
            let shared = |kind| {
                let own = uses.iter().filter(move |of| of.0 == rank);
                own.map(move |&(_, stage)| Action::of_stage(stage, kind))
            };
            let mut list = vec![Action::of_rank(Kind::C)];
            list.extend(actions);
            list.extend(shared(Kind::R));
            list.extend([Kind::N, Kind::U].map(Action::of_rank));
            list.extend(shared(Kind::G));
            list
        });
        Ok(Schedule { ranks: ranks.collect(), ..self.clone() })
    }
}

/// The ranks that use weights of a stage elsewhere, each with that stage, rank by rank. `owner` is the rank of each stage.
pub(super) fn uses(owner: &[usize], ties: &[(usize, usize)]) -> Vec<(usize, usize)> {
    let apart = ties.iter().filter(|(user, of)| owner[*user] != owner[*of]);
    let mut uses: Vec<(usize, usize)> = apart.map(|&(user, of)| (owner[user], of)).collect();
    uses.sort_unstable();
    uses.dedup();
    uses
}

/// What an action that stands for the whole step waits for, beside computations of its own rank.
pub(super) fn needs(
    owner: &[usize],
    uses: &[(usize, usize)],
    rank: usize,
    action: Action,
    needs: &mut Vec<Need>,
) {
    let of = |rank, kind| Need { rank, action: Action::of_rank(kind), moves: Moves::Nothing };
    let number = |rank, stage| uses.iter().position(|&of| of == (rank, stage));
    match action.kind {
        Kind::N => needs.extend(uses.iter().enumerate().filter(|(_, of)| owner[of.1] == rank).map(
            |(number, &(user, stage))| Need {
                rank: user,
                action: Action::of_stage(stage, Kind::R),
                moves: Moves::Shared(number),
            },
        )),
        Kind::U => {
            let ranks = owner.iter().copied().max().map_or(0, |last| last + 1);
            needs.extend((0..ranks).map(|rank| of(rank, Kind::N)));
        }
        Kind::G => {
            needs.push(of(rank, Kind::U));
            let moves = number(rank, action.stage).map_or(Moves::Nothing, Moves::Updated);
            needs.push(Need { moves, ..of(owner[action.stage], Kind::U) });
        }
        _ => {}
    }
}
