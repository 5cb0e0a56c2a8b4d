//! Where the tensors live that an action leaves for a later one of the same stage.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::{Kind, Schedule};

/// Which of a stage's equal buffers each microbatch uses. Two microbatches share one only if their lifetimes do not
/// overlap, and there are no more buffers than lifetimes that overlap at the worst moment.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SlotPlan {
    /// How many buffers the stage needs.
    pub count: usize,
    /// `slot[i]` is the buffer of microbatch `i`, below `count`.
    pub slot: Vec<usize>,
}

impl Schedule {
    /// The slots of the stage's stash: taken by F, given back after W (or B). Each microbatch gets the lowest slot
    /// that is free when its turn comes. The schedule must be valid; a stage that does not exist needs no slots.
    pub fn slots(&self, stage: usize) -> SlotPlan {
        self.assign(stage, |kind| kind == Kind::F)
    }

    /// The slots for what I leaves to W: taken by I, given back after W. A B needs a slot only while it runs.
    /// Otherwise as [`Schedule::slots`].
    pub fn gradient_slots(&self, stage: usize) -> SlotPlan {
        self.assign(stage, |kind| matches!(kind, Kind::I | Kind::B))
    }

    fn assign(&self, stage: usize, takes: impl Fn(Kind) -> bool) -> SlotPlan {
        let actions = self.rank_of(stage).map_or(&[][..], |rank| &self.ranks[rank]);
        let mut plan = SlotPlan::default();
        if self.microbatches > actions.len() {
            // Not valid, and the number may be too large for a list of that length.
            return plan;
        }
        plan.slot = vec![0; self.microbatches];
        let mut free = BinaryHeap::new();
        for action in actions.iter().filter(|action| action.stage == stage) {
            let Some(slot) = plan.slot.get_mut(action.microbatch) else { continue };
            if takes(action.kind) {
                *slot = free.pop().map_or(plan.count, |Reverse(lowest)| lowest);
                plan.count = plan.count.max(*slot + 1);
            }
            if matches!(action.kind, Kind::B | Kind::W) {
                free.push(Reverse(*slot));
            }
        }
        plan
    }
}
