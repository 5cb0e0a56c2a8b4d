//! Where the tensors live that an action leaves for a later one of the same stage.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::generate::check_size;
use super::{Kind, Schedule};

/// Which of a stage's equal buffers each microbatch uses on a rank. Two microbatches share one only if their lifetimes do not
/// overlap, and there are no more buffers than lifetimes that overlap at the worst moment.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SlotPlan {
    /// How many buffers the stage needs.
    pub count: usize,
    /// `slot[i]` is the buffer of microbatch `i`, below `count`; 0 of one that another rank does.
    pub slot: Vec<usize>,
}

impl Schedule {
    /// The slots of a stage's stash on a rank: taken by F, given back after W (or B). Each microbatch gets the lowest slot
    /// that is free when its turn comes. The schedule must be valid; where a stage is not, it needs no slots.
    pub fn slots(&self, stage: usize, rank: usize) -> SlotPlan {
        self.assign(stage, rank, |kind| kind == Kind::F)
    }

    /// The slots for what I leaves to W: taken by I, given back after W. A B needs a slot only while it runs.
    /// Otherwise as [`Schedule::slots`].
    pub fn gradient_slots(&self, stage: usize, rank: usize) -> SlotPlan {
        self.assign(stage, rank, |kind| matches!(kind, Kind::I | Kind::B))
    }

    fn assign(&self, stage: usize, rank: usize, takes: impl Fn(Kind) -> bool) -> SlotPlan {
        let mut plan = SlotPlan::default();
        let actions = self.ranks.get(rank).map_or(&[][..], Vec::as_slice);
        let has = actions.iter().any(|action| action.stage == stage && action.kind.computes());
        // A schedule that is not valid may have any number.
        if !has || check_size(1, self.microbatches).is_err() {
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
