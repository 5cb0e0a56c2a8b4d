//! What comes after the last action of a step: tied gradients, the end of the step, the update, tied weights.

use std::ops::Range;

use super::clock::{NONE, Task, Way};
use super::costs::{Costs, Hop};

/// The tasks, in an order in which each comes after what it waits for.
pub(super) struct Tail {
    pub tasks: Vec<Task>,
    /// The id of the first.
    pub first: usize,
    /// Those from here on start when all ranks have done those before.
    pub updates: usize,
}

impl Tail {
    /// Adds the durations of the tasks to `works` and the ways of tied tensors to `ways`. Ids start at `first`.
    pub fn new(first: usize, costs: &Costs, works: &mut Vec<f64>, ways: &mut Vec<Way>) -> Tail {
        let mut tail = Tail { tasks: Vec::with_capacity(2 * costs.ranks.len()), first, updates: 0 };
        let gradients = costs.ties.iter().map(|tie| (tie.user, tie.owner, &tie.gradient));
        tail.exchange(gradients, costs, works, ways);
        for (rank, cost) in costs.ranks.iter().enumerate() {
            tail.push(rank, cost.end, works);
        }
        tail.updates = tail.tasks.len();
        for (rank, cost) in costs.ranks.iter().enumerate() {
            tail.push(rank, cost.update, works);
        }
        let weights = costs.ties.iter().map(|tie| (tie.owner, tie.user, &tie.weight));
        tail.exchange(weights, costs, works, ways);
        tail
    }

    /// Tensors from one rank to another; first all are sent, then all received, so that no rank waits for ever.
    fn exchange<'a>(
        &mut self,
        tensors: impl Iterator<Item = (usize, usize, &'a Hop)> + Clone,
        costs: &Costs,
        works: &mut Vec<f64>,
        ways: &mut Vec<Way>,
    ) {
        let on_queue = |rank: usize, seconds| if costs.ranks[rank].copy_engine { 0.0 } else { seconds };
        let sent = self.first + self.tasks.len();
        for (from, to, hop) in tensors.clone() {
            self.push(from, on_queue(from, hop.out), works).way = ways.len() as u32;
            ways.push(Way::new(hop, costs, from, to));
        }
        for (at, (_, to, hop)) in tensors.enumerate() {
            self.push(to, on_queue(to, hop.into), works).need = (sent + at) as u32;
        }
    }

    fn push(&mut self, rank: usize, seconds: f64, works: &mut Vec<f64>) -> &mut Task {
        self.tasks.push(Task { rank: rank as u32, work: works.len() as u32, need: NONE, way: NONE });
        works.push(seconds);
        let last = self.tasks.len() - 1;
        &mut self.tasks[last]
    }

    /// Adds the ids of some of the tasks to the lists of their ranks.
    pub fn append(&self, which: Range<usize>, lists: &mut [Vec<u32>]) {
        for at in which {
            lists[self.tasks[at].rank as usize].push((self.first + at) as u32);
        }
    }
}
