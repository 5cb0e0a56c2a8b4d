//! How long the tasks of a step take, and which ways their results go, on given devices.

use super::clock::{Clock, Join, Link, NONE, Way};
use super::costs::{Costs, Hop, Hops};
use super::edges::Moves;
use super::{Action, Kind};

/// Kinds of computation that have a duration for each stage: F, B, I, W, the first of [`Kind`].
pub(super) const COMPUTED: usize = 4;

/// Which of [`Times::works`] an action of a microbatch takes.
pub(super) fn action_work(stages: usize, action: Action) -> u32 {
    let work = if action.kind.computes() {
        COMPUTED * action.stage + action.kind as usize
    } else {
        COMPUTED * stages
    };
    work as u32
}

/// Which of [`Times::works`] an action takes that stands for the whole step. `uses` are the ranks that use weights of a stage
/// elsewhere.
pub(super) fn whole_work(
    stages: usize,
    ranks: usize,
    uses: &[(usize, usize)],
    rank: usize,
    action: Action,
) -> u32 {
    let number = || uses.iter().position(|of| *of == (rank, action.stage)).unwrap_or_default();
    let at = match action.kind {
        Kind::C => 3 * rank,
        Kind::N => 3 * rank + 1,
        Kind::R => 3 * ranks + 2 * number(),
        Kind::G => 3 * ranks + 2 * number() + 1,
        _ => 3 * rank + 2,
    };
    (COMPUTED * stages + 1 + at) as u32
}

/// Which of [`Times::ways`] the activations of a stage take to the next.
pub(super) fn forward_way(stage: usize) -> u32 {
    2 * stage as u32
}

/// Which of [`Times::ways`] the gradients of a stage take to the one before.
pub(super) fn backward_way(stage: usize) -> u32 {
    2 * stage as u32 - 1
}

/// Which of [`Times::ways`] takes what moves to an action that stands for the whole step; [`NONE`] if nothing does.
pub(super) fn whole_way(stages: usize, moves: Moves) -> u32 {
    let first = 2 * (stages - 1);
    match moves {
        Moves::Shared(number) => (first + 2 * number) as u32,
        Moves::Updated(number) => (first + 2 * number + 1) as u32,
        Moves::Nothing | Moves::Activation(_) | Moves::Gradient(_) => NONE,
    }
}

/// Durations and ways, by the indices that tasks hold.
pub(super) struct Times {
    pub works: Vec<f64>,
    pub ways: Vec<Way>,
    /// Whether busy ranks slow each other down.
    pub is_shared: bool,
}

impl Times {
    /// For stages on the ranks `owner`, of which `uses` are used elsewhere.
    pub fn new(costs: &Costs, owner: &[usize], uses: &[(usize, usize)]) -> Times {
        let shared: Vec<(Hop, Hop)> = uses.iter().map(|&of| shared(costs, owner, of)).collect();
        let mut works = works(costs, owner);
        let mut ways = ways(costs, owner);
        let on_queue = |rank: usize, seconds| if costs.ranks[rank].copy_engine { 0.0 } else { seconds };
        for (rank, cost) in costs.ranks.iter().enumerate() {
            let here = || uses.iter().zip(&shared).filter(|((_, stage), _)| owner[*stage] == rank);
            let received: f64 = here().map(|(_, (gradient, _))| on_queue(rank, gradient.into)).sum();
            let sent: f64 = here().map(|(_, (_, weight))| on_queue(rank, weight.out)).sum();
            works.extend([cost.begin, received + cost.end, cost.update + sent]);
        }
        for (&(user, stage), (gradient, weight)) in uses.iter().zip(&shared) {
            works.extend([on_queue(user, gradient.out), on_queue(user, weight.into)]);
            ways.push(Way::new(gradient, costs, user, owner[stage]));
            ways.push(Way::new(weight, costs, owner[stage], user));
        }
        Times { works, ways, is_shared: is_shared(costs) }
    }

    /// A clock at 0.
    pub fn clock<'a>(&'a self, costs: &'a Costs, joins: &'a [Vec<Join>]) -> Clock<'a> {
        let ranks = costs.ranks.len();
        let links = vec![Link::default(); ranks * ranks];
        let free = vec![0.0; ranks];
        Clock { costs, works: &self.works, ways: &self.ways, joins, links, course: None, free }
    }
}

/// The ways of the gradients and of the weights that a rank shares with a stage elsewhere: one after another where there
/// are several.
fn shared(costs: &Costs, owner: &[usize], (user, stage): (usize, usize)) -> (Hop, Hop) {
    let all = costs.ties.iter().filter(|tie| (owner[tie.user], tie.owner) == (user, stage));
    all.fold((Hop::default(), Hop::default()), |(gradient, weight), tie| {
        (gradient.and(&tie.gradient), weight.and(&tie.weight))
    })
}

/// Seconds of each stage's computations on its rank's queue, and 0 for transfers.
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
