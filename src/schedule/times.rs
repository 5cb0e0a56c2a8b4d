//! How long the tasks of a step take, and which ways their results go, on given devices.

use super::clock::{Clock, Link, Span, Task, Way};
use super::costs::{Costs, Hops};
use super::tail::Tail;
use super::{Action, Kind};

/// Kinds of computation that have a duration: F, B, I, W, the first of [`Kind`].
pub(super) const COMPUTED: usize = 4;

/// Which of [`Times::works`] an action takes.
pub(super) fn action_work(stages: usize, action: Action) -> u32 {
    let work = if action.kind.is_transfer() {
        COMPUTED * stages
    } else {
        COMPUTED * action.stage + action.kind as usize
    };
    work as u32
}

/// Which of [`Times::works`] a rank takes before its first action.
pub(super) fn begin_work(stages: usize, rank: usize) -> u32 {
    (COMPUTED * stages + 1 + rank) as u32
}

/// Which of [`Times::ways`] the activations of a stage take to the next.
pub(super) fn forward_way(stage: usize) -> u32 {
    2 * stage as u32
}

/// Which of [`Times::ways`] the gradients of a stage take to the one before.
pub(super) fn backward_way(stage: usize) -> u32 {
    2 * stage as u32 - 1
}

/// Durations and ways, by the indices that tasks hold.
pub(super) struct Times {
    pub works: Vec<f64>,
    pub ways: Vec<Way>,
    /// What follows the last action.
    pub tail: Tail,
    /// Whether busy ranks slow each other down.
    pub is_shared: bool,
}

impl Times {
    /// For stages on the ranks `owner`, and so many tasks before those of the tail.
    pub fn new(costs: &Costs, owner: &[usize], tasks: usize) -> Times {
        let mut works = works(costs, owner);
        let mut ways = ways(costs, owner);
        let tail = Tail::new(tasks, costs, &mut works, &mut ways);
        Times { works, ways, tail, is_shared: is_shared(costs) }
    }

    /// A clock at 0.
    pub fn clock<'a>(&'a self, costs: &'a Costs) -> Clock<'a> {
        let ranks = costs.ranks.len();
        let links = vec![Link::default(); ranks * ranks];
        Clock { costs, works: &self.works, ways: &self.ways, links, course: None, free: vec![0.0; ranks] }
    }

    /// Does the tail after all actions have been done, and returns the seconds of the step.
    pub fn finish(&self, clock: &mut Clock, spans: &mut [Span]) -> f64 {
        for (at, task) in self.tail.tasks.iter().enumerate() {
            if at == self.tail.updates {
                meet(clock);
            }
            clock.advance(task, spans, self.tail.first + at);
        }
        latest(clock)
    }

    /// Does all tasks, of which `lists` holds those before the tail for each rank, while ranks slow each other down, and
    /// returns the seconds of the step. `tasks` ends with those of the tail; `lists` is used up.
    pub fn share(
        &self,
        clock: &mut Clock,
        tasks: &[Task],
        lists: &mut [Vec<u32>],
        spans: &mut [Span],
    ) -> f64 {
        self.tail.append(0..self.tail.updates, lists);
        clock.share(tasks, lists, spans);
        meet(clock);
        lists.iter_mut().for_each(Vec::clear);
        self.tail.append(self.tail.updates..self.tail.tasks.len(), lists);
        clock.share(tasks, lists, spans);
        latest(clock)
    }
}

/// All ranks wait for the last.
fn meet(clock: &mut Clock) {
    let together = latest(clock);
    clock.free.fill(together);
}

fn latest(clock: &Clock) -> f64 {
    clock.free.iter().copied().fold(0.0, f64::max)
}

/// Seconds of each stage's computations on its rank's queue, 0 for transfers, and the begin of each rank.
fn works(costs: &Costs, owner: &[usize]) -> Vec<f64> {
    let stages = costs.stages.len();
    let mut works = Vec::with_capacity(COMPUTED * stages + 1 + 3 * costs.ranks.len());
    for (stage, cost) in costs.stages.iter().enumerate() {
        let engine = costs.ranks[owner[stage]].copy_engine;
        let on_queue =
            |hop: usize, seconds| if engine && owner[hop] != owner[hop + 1] { 0.0 } else { seconds };
        let (mut forward, mut backward) = (0.0, 0.0);
        if stage > 0 {
            let Hops { forward: activation, backward: gradient } = costs.hops[stage - 1];
            forward += on_queue(stage - 1, activation.into);
            backward += on_queue(stage - 1, gradient.out);
        }
        if stage + 1 < stages {
            let Hops { forward: activation, backward: gradient } = costs.hops[stage];
            forward += on_queue(stage, activation.out);
            backward += on_queue(stage, gradient.into);
        }
        for &kind in &Kind::ALL[..COMPUTED] {
            let ends = match kind {
                Kind::F => forward,
                Kind::B | Kind::I => backward,
                _ => 0.0,
            };
            works.push(cost.seconds(kind) + ends);
        }
    }
    works.push(0.0);
    works.extend(costs.ranks.iter().map(|rank| rank.begin));
    works
}

/// The ways between stages, two for each hop; those within a rank are never taken.
fn ways(costs: &Costs, owner: &[usize]) -> Vec<Way> {
    let mut ways = Vec::with_capacity(2 * costs.hops.len() + 2 * costs.ties.len());
    for (stage, hops) in costs.hops.iter().enumerate() {
        let (before, after) = (owner[stage], owner[stage + 1]);
        ways.push(Way::new(&hops.forward, costs, before, after));
        ways.push(Way::new(&hops.backward, costs, after, before));
    }
    ways
}

/// Whether ranks can slow each other down.
fn is_shared(costs: &Costs) -> bool {
    let wanted: f64 = costs.ranks.iter().map(|rank| rank.cores).sum();
    let slower =
        |(i, row): (usize, &Vec<f64>)| row.iter().enumerate().any(|(j, &factor)| i != j && factor != 1.0);
    (costs.cores > 0.0 && wanted > costs.cores) || costs.slowdown.iter().enumerate().any(slower)
}
