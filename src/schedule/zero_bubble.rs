//! The recipes that split the backward pass (Qi et al. 2024, "Zero Bubble Pipeline Parallelism", arXiv 2401.10241).

use super::{Action, Kind};

/// A rank's list in the making.
struct List {
    actions: Vec<Action>,
    microbatches: usize,
}

impl List {
    fn new(microbatches: usize) -> Self {
        List { actions: Vec::with_capacity(3 * microbatches), microbatches }
    }

    /// Appends an action, unless its microbatch does not exist. Stage 0, for whose I nobody waits, does B instead of I,
    /// and nothing instead of W, which comes right after.
    fn push(&mut self, stage: usize, kind: Kind, microbatch: usize) {
        let kind = match kind {
            Kind::I if stage == 0 => Kind::B,
            Kind::W if stage == 0 => return,
            kind => kind,
        };
        if microbatch < self.microbatches {
            self.actions.push(Action::new(stage, kind, microbatch));
        }
    }
}

/// ZB-H1, or, with up to `ranks - 1` microbatches in flight beyond its `ranks`, ZB-H2: 1F1B with more forwards at first,
/// where W comes some microbatches after I. The delay grows from stage to stage as the warm-up shrinks, so that every
/// stage keeps the same number of microbatches, and the W that are left at the end fill the time in which a stage of
/// 1F1B would wait for gradients.
pub(super) fn horizontal(stage: usize, ranks: usize, extra: usize, microbatches: usize) -> Vec<Action> {
    let after = ranks - stage - 1;
    let (warm_up, delay) = (after + after.min(extra), stage + stage.min(extra));
    let mut list = List::new(microbatches);
    let warm_up = warm_up.min(microbatches);
    (0..warm_up).for_each(|i| list.push(stage, Kind::F, i));
    for i in 0..microbatches + delay {
        if i < microbatches {
            list.push(stage, Kind::F, warm_up + i);
            list.push(stage, Kind::I, i);
        }
        if i >= delay {
            list.push(stage, Kind::W, i - delay);
        }
    }
    list.actions
}

/// ZB-V: rank `r` of `p` has the stages `r` and `2p - 1 - r`, one on the way down the V and one on the way up. Built
/// for at least `2p - 1` microbatches, with which the V is full; for fewer, those that do not exist are left out.
pub(super) fn v(rank: usize, ranks: usize, microbatches: usize) -> Vec<Action> {
    let (down, up) = (rank, 2 * ranks - 1 - rank);
    let total = microbatches.max(2 * ranks - 1);
    let mut list = List::new(microbatches);
    // Forwards and backwards done so far of each of the two stages.
    let (mut f_down, mut f_up, mut i_down, mut i_up) = (0, 0, 0, 0);
    let mut next = |stage, kind, count: &mut usize| {
        list.push(stage, kind, *count);
        *count += 1;
    };
    let (mut w_down, mut w_up) = (0, 0);
    // The V fills.
    for _ in 0..2 * (ranks - rank) - 1 {
        next(down, Kind::F, &mut f_down);
    }
    for _ in 0..rank {
        next(up, Kind::F, &mut f_up);
        next(down, Kind::F, &mut f_down);
    }
    for _ in rank..ranks {
        next(up, Kind::F, &mut f_up);
        next(up, Kind::I, &mut i_up);
        next(up, Kind::W, &mut w_up);
    }
    // F, I and W of both stages in turn.
    while f_up < total {
        if f_down < total {
            next(down, Kind::F, &mut f_down);
        }
        next(down, Kind::I, &mut i_down);
        next(down, Kind::W, &mut w_down);
        next(up, Kind::F, &mut f_up);
        next(up, Kind::I, &mut i_up);
        next(up, Kind::W, &mut w_up);
    }
    // The V empties: first the I for which others wait, then the W put off meanwhile.
    for _ in 0..rank {
        next(down, Kind::I, &mut i_down);
        next(up, Kind::I, &mut i_up);
    }
    for _ in rank..ranks {
        next(down, Kind::I, &mut i_down);
        next(down, Kind::W, &mut w_down);
    }
    while w_up < total {
        next(up, Kind::W, &mut w_up);
    }
    while w_down < total {
        next(down, Kind::W, &mut w_down);
    }
    list.actions
}
