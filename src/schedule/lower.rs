//! Lowering: from what is computed to what is computed, sent and received.

use super::check::{Proven, prove};
use super::edges::Moves;
use super::{Action, Kind, Schedule};
use crate::error::Result;

impl Schedule {
    /// The same schedule with a send right after each action whose result another rank needs, and a receive right
    /// before each action that needs one from another rank. Stages on the same rank hand over without either. A
    /// schedule that has transfers already comes back as it is.
    ///
    /// # Errors
    ///
    /// Those of [`Schedule::validate`]: a schedule that cannot run cannot be lowered.
    pub fn lowered(&self) -> Result<Schedule> {
        let proven = prove(self)?;
        if proven.index.lowered {
            return Ok(self.clone());
        }
        Ok(Schedule { ranks: lower(&proven), ..self.clone() })
    }
}

fn lower(Proven { index, edges, .. }: &Proven) -> Vec<Vec<Action>> {
    let lists = || index.schedule.ranks.iter().enumerate();
    let places = || lists().flat_map(|(rank, list)| (0..list.len()).map(move |at| (rank, at)));
    let mut receives = vec![None; edges.count()];
    let mut sends = receives.clone();
    for place in places() {
        for edge in edges.of(place) {
            let (send, receive) = match edge.moves {
                Moves::Activation(_) => (Kind::SendF, Kind::RecvF),
                Moves::Gradient(_) => (Kind::SendB, Kind::RecvB),
                Moves::Nothing | Moves::Shared(_) | Moves::Updated(_) => continue,
            };
            (receives[edges.number(place)], sends[edge.from]) = (Some(receive), Some(send));
        }
    }
    let list = |(rank, actions): (usize, &Vec<Action>)| {
        let mut lowered = Vec::with_capacity(3 * actions.len());
        for (at, &action) in actions.iter().enumerate() {
            let number = edges.number((rank, at));
            let transfer = |kind| Action { kind, ..action };
            lowered.extend(receives[number].map(transfer));
            lowered.push(action);
            lowered.extend(sends[number].map(transfer));
        }
        lowered
    };
    lists().map(list).collect()
}
