//! The edges between actions: for each, what must have ended before it can start, and what that moves to its rank. Built
//! once for a schedule, and read by whoever asks what waits for what.

use super::index::{Index, Place};
use super::whole;
use super::{Action, Kind};
use crate::error::Result;

/// What an edge moves from one rank to another. Within a rank nothing moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Moves {
    /// Nothing: one waits for the end of the other and no more.
    Nothing,
    /// The output of a stage, to the next one: over this one of [`Placement::hops`](super::Placement::hops).
    Activation(usize),
    /// The gradient of a stage's input, to the one before: back over this hop.
    Gradient(usize),
    /// A rank's gradients of weights that another owns: number of [`Shared::exchanges`](super::whole::Shared).
    Shared(usize),
    /// The new weights, back.
    Updated(usize),
}

/// What an action waits for, by name.
#[derive(Debug, Clone, Copy)]
pub(super) struct Need {
    pub rank: usize,
    pub action: Action,
    pub moves: Moves,
}

/// What an action waits for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Edge {
    /// The number of the action that must have ended.
    pub from: usize,
    pub moves: Moves,
}

/// All edges of a schedule. Actions are numbered rank by rank, in the order of the lists.
pub(super) struct Edges {
    /// The number of each rank's first action, and that of all.
    first: Vec<usize>,
    /// For each action, where its edges begin; the last entry ends them.
    start: Vec<u32>,
    edges: Vec<Edge>,
}

impl Edges {
    /// Of a schedule that computes everything once.
    ///
    /// # Errors
    ///
    /// [`Error::Schedule`](crate::error::Error::Schedule) for the first action that waits for what stands nowhere, or later
    /// on the same rank. `check` is asked about each action before.
    pub fn new(index: &Index, check: impl Fn(Place, Action) -> Result<()>) -> Result<Edges> {
        let ranks = &index.schedule.ranks;
        let mut first = vec![0];
        for actions in ranks {
            first.push(first[first.len() - 1] + actions.len());
        }
        let shared = index.shared();
        let mut edges = Edges { start: Vec::with_capacity(first[ranks.len()] + 1), first, edges: Vec::new() };
        let mut needs = Vec::new();
        for (rank, actions) in ranks.iter().enumerate() {
            for (at, &action) in actions.iter().enumerate() {
                check((rank, at), action)?;
                edges.start.push(edges.edges.len() as u32);
                needs.clear();
                if action.kind.is_whole() {
                    let last = last_of_weights(index, rank, action);
                    needs.extend(last.map(|action| Need { rank, action, moves: Moves::Nothing }));
                    whole::needs(&shared, ranks.len(), rank, action, &mut needs);
                } else {
                    of_microbatch(index, rank, action, &mut needs);
                }
                for need in &needs {
                    let Some(found) = index.find_on(need.rank, need.action) else {
                        let message =
                            format!("{action} needs {}, which is missing on rank {}", need.action, need.rank);
                        return Err(index.reject((rank, at), message));
                    };
                    if found.0 == rank && found.1 > at {
                        let message =
                            format!("{action} needs {}, which comes later on rank {rank}", need.action);
                        return Err(index.reject((rank, at), message));
                    }
                    let from = edges.number(found);
                    edges.edges.push(Edge { from, moves: need.moves });
                }
            }
        }
        edges.start.push(edges.edges.len() as u32);
        Ok(edges)
    }

    /// The number of the action at a place.
    pub fn number(&self, (rank, at): Place) -> usize {
        self.first[rank] + at
    }

    /// The place of an action.
    pub fn place(&self, number: usize) -> Place {
        let rank = self.first.partition_point(|&first| first <= number) - 1;
        (rank, number - self.first[rank])
    }

    /// How many actions there are.
    pub fn count(&self) -> usize {
        self.start.len() - 1
    }

    /// What the action at a place waits for.
    pub fn of(&self, place: Place) -> &[Edge] {
        let number = self.number(place);
        &self.edges[self.start[number] as usize..self.start[number + 1] as usize]
    }
}

/// The last action of a rank that adds to the gradients that an action of the whole step reads: of R those of its stage, if
/// the rank has it, else as of A and N all.
fn last_of_weights(index: &Index, rank: usize, action: Action) -> Option<Action> {
    let of_stage = match action.kind {
        Kind::R => index.placement.holds(rank, action.stage),
        Kind::A | Kind::N => false,
        _ => return None,
    };
    let adds = |other: &&Action| {
        matches!(other.kind, Kind::B | Kind::W) && (!of_stage || other.stage == action.stage)
    };
    index.schedule.ranks[rank].iter().rev().find(adds).copied()
}

/// What an action of a microbatch waits for: its own stage's, and what a neighbouring stage makes for it. The neighbours of
/// a transfer must exist.
fn of_microbatch(index: &Index, rank: usize, action: Action, needs: &mut Vec<Need>) {
    let Action { stage, kind, microbatch } = action;
    let own = |kind| Need { rank, action: Action::new(stage, kind, microbatch), moves: Moves::Nothing };
    let placement = &index.placement;
    let of = |action: Action, moves| Need { rank: placement.rank(action.stage, microbatch), action, moves };
    let hop = |boundary| placement.hop(boundary, microbatch);
    // What the neighbour makes: as it is on the same rank, else over a link, which has actions of its own if lowered.
    let crosses = |boundary| placement.crosses(boundary, microbatch);
    let made = |boundary: usize, receive, action, moves| match (crosses(boundary), index.lowered) {
        (false, _) => of(action, Moves::Nothing),
        (true, false) => of(action, moves),
        (true, true) => own(receive),
    };
    match kind {
        Kind::F if stage > 0 => {
            let input = Action::new(stage - 1, Kind::F, microbatch);
            needs.push(made(stage - 1, Kind::RecvF, input, Moves::Activation(hop(stage - 1))));
        }
        Kind::B | Kind::I => {
            needs.push(own(Kind::F));
            if stage + 1 < index.schedule.stages {
                let gradient = index.backward(stage + 1, microbatch);
                needs.push(made(stage, Kind::RecvB, gradient, Moves::Gradient(hop(stage))));
            }
        }
        Kind::W => needs.push(own(Kind::I)),
        Kind::SendF => needs.push(own(Kind::F)),
        Kind::RecvF => {
            let sent = Action::new(stage - 1, Kind::SendF, microbatch);
            needs.push(of(sent, Moves::Activation(hop(stage - 1))));
        }
        Kind::SendB => needs.push(of(index.backward(stage, microbatch), Moves::Nothing)),
        Kind::RecvB => {
            let sent = Action::new(stage + 1, Kind::SendB, microbatch);
            needs.push(of(sent, Moves::Gradient(hop(stage))));
        }
        _ => {}
    }
    if index.complete && matches!(kind, Kind::B | Kind::W) {
        needs.push(Need { rank, action: Action::of_rank(Kind::C), moves: Moves::Nothing });
    }
}
