//! What a schedule keeps in memory, and when.

use super::costs::Costs;
use super::index::Index;
use super::{Cell, Kind};

pub(super) struct Memory {
    /// For each replica, the most microbatches between the start of F and the end of W or B.
    pub peak_in_flight: Vec<usize>,
    /// For each rank, the most bytes held at once.
    pub peak_bytes: Vec<u64>,
    /// For each rank, the bytes of buffers that each of its stages has for itself.
    pub slot_bytes: Vec<u64>,
    /// For each rank, the bytes held from a time on.
    pub timeline: Vec<Vec<(f64, u64)>>,
}

/// Counts the memory of a valid schedule whose actions run when `cells`, rank by rank in order, say.
pub(super) fn measure(index: &Index, costs: &Costs, cells: &[Cell]) -> Memory {
    let schedule = &index.schedule;
    let placement = &index.placement;
    let mut stash = vec![Peak::default(); placement.replicas().len()];
    let mut gradient = stash.clone();
    let fixed = |rank: usize| costs.ranks[rank].fixed;
    let mut timeline: Vec<Vec<(f64, u64)>> =
        (0..schedule.ranks.len()).map(|rank| vec![(0.0, fixed(rank))]).collect();
    let mut peak_bytes: Vec<u64> = (0..schedule.ranks.len()).map(fixed).collect();
    for &Cell { rank, action, start, end } in cells.iter().filter(|cell| cell.action.kind.computes()) {
        let replica = placement.replica(action.stage, action.microbatch);
        let cost = &costs.stages[replica];
        let (stash, gradient) = (&mut stash[replica], &mut gradient[replica]);
        let held = &mut timeline[rank];
        let now = held[held.len() - 1].1;
        let taken = match action.kind {
            Kind::F => {
                stash.add();
                cost.stash
            }
            Kind::I | Kind::B => {
                gradient.add();
                cost.gradient
            }
            _ => 0,
        };
        if taken > 0 {
            held.push((start, now + taken));
        }
        let now = now + taken;
        peak_bytes[rank] = peak_bytes[rank].max(now);
        if matches!(action.kind, Kind::W | Kind::B) {
            stash.now -= 1;
            gradient.now -= 1;
            held.push((end, now - cost.stash - cost.gradient));
        }
    }
    let mut slot_bytes: Vec<u64> = (0..schedule.ranks.len()).map(fixed).collect();
    for (replica, cost) in costs.stages.iter().enumerate() {
        slot_bytes[placement.replicas()[replica].rank] +=
            stash[replica].most as u64 * cost.stash + gradient[replica].most as u64 * cost.gradient;
    }
    let peak_in_flight = stash.iter().map(|stash| stash.most).collect();
    Memory { peak_in_flight, peak_bytes, slot_bytes, timeline }
}

/// A count and the most it ever was.
#[derive(Clone, Copy, Default)]
struct Peak {
    now: usize,
    most: usize,
}

impl Peak {
    fn add(&mut self) {
        self.now += 1;
        self.most = self.most.max(self.now);
    }
}
