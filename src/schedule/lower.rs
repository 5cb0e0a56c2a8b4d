//! Lowering: from what is computed to what is computed, sent and received.

use super::check::prove;
use super::index::Index;
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
        let index = prove(self)?;
        if index.lowered {
            return Ok(self.clone());
        }
        let ranks = self.ranks.iter().map(|actions| lower(&index, actions)).collect();
        Ok(Schedule { ranks, ..self.clone() })
    }
}

fn lower(index: &Index, actions: &[Action]) -> Vec<Action> {
    let mut lowered = Vec::with_capacity(3 * actions.len());
    for &action in actions {
        let Action { stage, kind, microbatch } = action;
        let transfer = |kind| Action::new(stage, kind, microbatch);
        let from_before = stage > 0 && index.crosses(stage - 1);
        let to_after = stage + 1 < index.schedule.stages && index.crosses(stage);
        let (receive, send) = match kind {
            Kind::F => (from_before.then_some(Kind::RecvF), to_after.then_some(Kind::SendF)),
            Kind::B | Kind::I => (to_after.then_some(Kind::RecvB), from_before.then_some(Kind::SendB)),
            _ => (None, None),
        };
        lowered.extend(receive.map(transfer));
        lowered.push(action);
        lowered.extend(send.map(transfer));
    }
    lowered
}
