//! How a step begins and ends: what a rank does once a step, as actions like all others.
//!
//! Every rank clears its gradients (C) before the first is added to, and at last sums the squares of those of the weights
//! that it owns (N). The update (U) needs the norm of the whole gradient, so every rank's N. A stage that several ranks
//! have has one gradient, the sum of theirs, and each of them owns a part of its weights; a parameter that two stages share
//! is owned where the stage is that it belongs to. So a rank sends its gradients of what others own (R), an owner adds those
//! of others to its own (A), and after the update a rank receives the weights that others own (G).

use super::check::prove;
use super::edges::{Moves, Need};
use super::placement::Placement;
use super::{Action, Kind, Schedule};
use crate::error::{Error, Result};

/// Who adds up whose gradients.
#[derive(Default)]
pub(super) struct Shared {
    /// The ranks that send gradients of a stage, and receive its new weights: (rank, stage), rank by rank.
    pub senders: Vec<(usize, usize)>,
    /// From each of them to each other rank that has the stage.
    pub exchanges: Vec<Exchanged>,
    /// The ranks that receive gradients of a stage: (rank, stage), rank by rank.
    pub owners: Vec<(usize, usize)>,
}

/// The way between a rank that computes gradients of a stage's weights and one that owns some of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Exchanged {
    pub stage: usize,
    /// The rank that sends gradients.
    pub from: usize,
    /// The rank that sends weights.
    pub to: usize,
}

impl Shared {
    pub fn new(placement: &Placement, senders: Vec<(usize, usize)>) -> Shared {
        let of = |&(from, stage): &(usize, usize)| {
            let others = placement.holders(stage).filter(move |&to| to != from);
            others.map(move |to| Exchanged { stage, from, to }).collect::<Vec<_>>()
        };
        let exchanges: Vec<Exchanged> = senders.iter().flat_map(of).collect();
        let mut owners: Vec<_> = exchanges.iter().map(|way| (way.to, way.stage)).collect();
        owners.sort_unstable();
        owners.dedup();
        Shared { senders, exchanges, owners }
    }

    /// Of stages that share parameters: pairs (which uses it, which owns it).
    pub fn of_ties(placement: &Placement, ties: &[(usize, usize)]) -> Shared {
        let mut senders: Vec<(usize, usize)> = Vec::new();
        for stage in 0..placement.stages() {
            let replicated = placement.of_stage(stage).len() > 1;
            senders.extend(placement.holders(stage).filter(|_| replicated).map(|rank| (rank, stage)));
        }
        for &(user, owner) in ties {
            let apart = placement.holders(user).filter(|&rank| !placement.holds(rank, owner));
            senders.extend(apart.map(|rank| (rank, owner)));
        }
        senders.sort_unstable();
        senders.dedup();
        Shared::new(placement, senders)
    }
}

impl Schedule {
    /// The same schedule with what begins and ends a step on every rank. `ties` are pairs of stages that share a parameter:
    /// (which uses it, which owns it); those on one rank need nothing. A schedule that is complete comes back as it is.
    ///
    /// # Errors
    ///
    /// Those of [`Schedule::validate`], [`Error::Config`] for ties of stages that do not exist, and [`Error::Schedule`] for
    /// a complete schedule that sends other gradients than those of replicas and ties, or before they are complete.
    pub fn completed(&self, ties: &[(usize, usize)]) -> Result<Schedule> {
        let index = prove(self)?.index;
        if let Some((user, owner)) = ties.iter().find(|tie| tie.0.max(tie.1) >= self.stages) {
            let message = format!("stages {user} and {owner} are not two of {}", self.stages);
            return Err(Error::config("ties", message));
        }
        let placement = &index.placement;
        let shared = Shared::of_ties(placement, ties);
        // What adds to the gradients that a rank sends as those of a stage: the stage itself, and those that use its parameters;
        // on a rank that has it not, whatever there is.
        let read = |rank: usize, stage: usize, action: &Action| {
            let tied = ties.iter().any(|&(user, owner)| owner == stage && user == action.stage);
            let own = action.stage == stage || tied || !placement.holds(rank, stage);
            matches!(action.kind, Kind::B | Kind::W) && own
        };
        let last = |rank: usize, stage: usize| {
            self.ranks[rank].iter().rposition(|action| read(rank, stage, action)).unwrap_or_default()
        };
        if index.complete {
            let written = index.shared().senders;
            let end = |rank: usize| (rank, self.ranks[rank].len());
            if let Some(&(rank, stage)) = shared.senders.iter().find(|of| !written.contains(of)) {
                let message = format!(
                    "rank {rank} shares parameters of stage {stage}, so it needs {stage}R and {stage}G; without C, N and U they are added"
                );
                return Err(index.reject(end(rank), message));
            }
            for &(rank, stage) in &written {
                if !shared.senders.contains(&(rank, stage)) {
                    let message =
                        format!("rank {rank} shares no parameter with stage {stage}: {stage}R sends nothing");
                    return Err(index.reject(end(rank), message));
                }
                let sends = Action::of_stage(stage, Kind::R);
                let at = self.ranks[rank].iter().position(|&action| action == sends).unwrap_or_default();
                if at < last(rank, stage) {
                    let message = format!(
                        "{sends} comes before {}, which adds to a parameter of stage {stage}",
                        self.ranks[rank][last(rank, stage)]
                    );
                    return Err(index.reject((rank, at), message));
                }
            }
            return Ok(self.clone());
        }
        let ranks = self.ranks.iter().enumerate().map(|(rank, actions)| {
            let own = |list: &[(usize, usize)], kind| -> Vec<Action> {
                let own = list.iter().filter(|of| of.0 == rank);
                own.map(|&(_, stage)| Action::of_stage(stage, kind)).collect()
            };
            let sends = own(&shared.senders, Kind::R);
            // As early as gradients are complete, so that they travel while the rank goes on; others wait for what the same
            // action sends to its neighbour.
            let leaves = |stage| {
                let at = last(rank, stage);
                at + actions[at + 1..].iter().take_while(|action| is_send(action.kind)).count()
            };
            let mut list = vec![Action::of_rank(Kind::C)];
            for (at, &action) in actions.iter().enumerate() {
                list.push(action);
                list.extend(sends.iter().filter(|send| leaves(send.stage) == at));
            }
            list.extend(own(&shared.owners, Kind::A));
            list.extend([Kind::N, Kind::U].map(Action::of_rank));
            list.extend(own(&shared.senders, Kind::G));
            list
        });
        Ok(Schedule { ranks: ranks.collect(), ..self.clone() })
    }
}

fn is_send(kind: Kind) -> bool {
    matches!(kind, Kind::SendF | Kind::SendB)
}

/// What an action that stands for the whole step waits for, beside computations of its own rank.
pub(super) fn needs(shared: &Shared, ranks: usize, rank: usize, action: Action, needs: &mut Vec<Need>) {
    let whole = |rank, kind| Need { rank, action: Action::of_rank(kind), moves: Moves::Nothing };
    let ways = || shared.exchanges.iter().enumerate().filter(|(_, way)| way.stage == action.stage);
    let sent = |rank, stage, moves| Need { rank, action: Action::of_stage(stage, Kind::R), moves };
    match action.kind {
        Kind::A => {
            // Whatever it sends, it sends before it adds.
            let own = shared.senders.iter().filter(|of| of.0 == rank);
            needs.extend(own.map(|&(_, stage)| sent(rank, stage, Moves::Nothing)));
            let arriving = ways().filter(|(_, way)| way.to == rank);
            needs.extend(arriving.map(|(number, way)| sent(way.from, way.stage, Moves::Shared(number))));
        }
        Kind::N => {
            let own = shared.owners.iter().filter(|of| of.0 == rank);
            let added = own.map(|&(_, stage)| Action::of_stage(stage, Kind::A));
            needs.extend(added.map(|action| Need { rank, action, moves: Moves::Nothing }));
        }
        Kind::U => needs.extend((0..ranks).map(|rank| whole(rank, Kind::N))),
        Kind::G => {
            needs.push(whole(rank, Kind::U));
            let arriving = ways().filter(|(_, way)| way.from == rank);
            needs.extend(
                arriving
                    .map(|(number, way)| Need { moves: Moves::Updated(number), ..whole(way.to, Kind::U) }),
            );
        }
        _ => {}
    }
}
