//! How long the tasks of a step take, and which ways their results go, on given devices.

use super::clock::{Clock, Join, Link, NONE, Way};
use super::costs::{Costs, Hop};
use super::edges::Moves;
use super::whole::{Exchanged, Shared};
use super::{Action, Kind, Placement};

/// Kinds of computation that have a duration for each stage: F, B, I, W, the first of [`Kind`].
pub(super) const COMPUTED: usize = 4;

/// Which of [`Times::works`] an action of a microbatch takes, of which a replica does the stage.
pub(super) fn action_work(replicas: usize, replica: usize, kind: Kind) -> u32 {
    let work = if kind.computes() { COMPUTED * replica + kind as usize } else { COMPUTED * replicas };
    work as u32
}

/// Which of [`Times::works`] an action takes that stands for the whole step.
pub(super) fn whole_work(replicas: usize, ranks: usize, shared: &Shared, rank: usize, action: Action) -> u32 {
    let number =
        |list: &[(usize, usize)]| list.iter().position(|of| *of == (rank, action.stage)).unwrap_or_default();
    let at = match action.kind {
        Kind::C => 3 * rank,
        Kind::N => 3 * rank + 1,
        Kind::R => 3 * ranks + 2 * number(&shared.senders),
        Kind::G => 3 * ranks + 2 * number(&shared.senders) + 1,
        Kind::A => 3 * ranks + 2 * shared.senders.len() + number(&shared.owners),
        _ => 3 * rank + 2,
    };
    (COMPUTED * replicas + 1 + at) as u32
}

/// Which of [`Times::ways`] activations take over a hop.
pub(super) fn forward_way(hop: usize) -> u32 {
    2 * hop as u32
}

/// Which of [`Times::ways`] gradients take back over a hop.
pub(super) fn backward_way(hop: usize) -> u32 {
    2 * hop as u32 + 1
}

/// Which of [`Times::ways`] takes what moves to an action that stands for the whole step; [`NONE`] if nothing does.
pub(super) fn whole_way(hops: usize, moves: Moves) -> u32 {
    match moves {
        Moves::Shared(number) => (2 * (hops + number)) as u32,
        Moves::Updated(number) => (2 * (hops + number) + 1) as u32,
        Moves::Nothing | Moves::Activation(_) | Moves::Gradient(_) => NONE,
    }
}

/// Durations and ways, by the indices that tasks hold.
pub(super) struct Times {
    pub works: Vec<f64>,
    pub ways: Vec<Way>,
    /// Whether busy ranks slow each other down, or the copies between them.
    pub is_shared: bool,
}

impl Times {
    /// For stages on these ranks, which share gradients and weights so.
    pub fn new(costs: &Costs, placement: &Placement, shared: &Shared) -> Times {
        let moved: Vec<(Hop, Hop)> = shared.exchanges.iter().map(|of| moved(costs, of)).collect();
        let mut works = works(costs, placement);
        let mut ways = ways(costs, placement);
        let on_queue = |rank: usize, seconds| if costs.ranks[rank].copy_engine { 0.0 } else { seconds };
        let sum = |of: &dyn Fn(&Exchanged) -> bool, seconds: &dyn Fn(&(Hop, Hop)) -> f64| -> f64 {
            shared
                .exchanges
                .iter()
                .zip(&moved)
                .filter(|(way, _)| of(way))
                .map(|(_, hops)| seconds(hops))
                .sum()
        };
        for (rank, cost) in costs.ranks.iter().enumerate() {
            let sent = sum(&|way| way.to == rank, &|hops| on_queue(rank, hops.1.out));
            works.extend([cost.begin, cost.end, cost.update + sent]);
        }
        for &(rank, stage) in &shared.senders {
            let own = |way: &Exchanged| (way.from, way.stage) == (rank, stage);
            works.push(sum(&own, &|hops| on_queue(rank, hops.0.out)));
            works.push(sum(&own, &|hops| on_queue(rank, hops.1.into)));
        }
        for &(rank, stage) in &shared.owners {
            let own = |way: &Exchanged| (way.to, way.stage) == (rank, stage);
            works.push(sum(&own, &|hops| on_queue(rank, hops.0.into)));
        }
        for (of, (gradient, weight)) in shared.exchanges.iter().zip(&moved) {
            ways.push(Way::new(gradient, costs, of.from, of.to));
            ways.push(Way::new(weight, costs, of.to, of.from));
        }
        let is_shared = is_shared(costs) || ways.iter().map(Way::demand).sum::<f64>() > 1.0;
        Times { works, ways, is_shared }
    }

    /// A clock at 0.
    pub fn clock<'a>(&'a self, costs: &'a Costs, joins: &'a [Vec<Join>]) -> Clock<'a> {
        let ranks = costs.ranks.len();
        let links = vec![Link::default(); ranks * ranks];
        let free = vec![0.0; ranks];
        Clock { costs, works: &self.works, ways: &self.ways, joins, links, memory: 0.0, course: None, free }
    }
}

/// The ways of gradients and of weights: one after another where there are several.
fn moved(costs: &Costs, of: &Exchanged) -> (Hop, Hop) {
    let all =
        costs.exchanges.iter().filter(|way| (way.owner, way.from, way.to) == (of.stage, of.from, of.to));
    all.fold((Hop::default(), Hop::default()), |(gradient, weight), way| {
        (gradient.and(&way.gradient), weight.and(&way.weight))
    })
}

/// Seconds of each replica's computations on its rank's queue, and 0 for transfers.
fn works(costs: &Costs, placement: &Placement) -> Vec<f64> {
    let replicas = placement.replicas();
    // Of a replica that several hops lead to or from, the one that takes longest.
    let mut ends = vec![[0.0f64; 4]; replicas.len()];
    for (number, (&(before, after), hops)) in placement.hops().iter().zip(&costs.hops).enumerate() {
        let mut add = |replica: usize, side: usize, seconds: f64| {
            let engine = costs.ranks[replicas[replica].rank].copy_engine;
            let on_queue = if engine && placement.is_link(number) { 0.0 } else { seconds };
            ends[replica][side] = ends[replica][side].max(on_queue);
        };
        add(after, 0, hops.forward.into);
        add(before, 1, hops.forward.out);
        add(after, 2, hops.backward.out);
        add(before, 3, hops.backward.into);
    }
    let mut works = Vec::with_capacity(COMPUTED * replicas.len() + 1 + 3 * costs.ranks.len());
    for (cost, [input, output, d_input, d_output]) in costs.stages.iter().zip(ends) {
        for &kind in &Kind::ALL[..COMPUTED] {
            let ends = match kind {
                Kind::F => input + output,
                Kind::B | Kind::I => d_input + d_output,
                _ => 0.0,
            };
            works.push(cost.seconds(kind) + ends);
        }
    }
    works.push(0.0);
    works
}

/// The ways between stages, two for each hop; those within a rank are never taken.
fn ways(costs: &Costs, placement: &Placement) -> Vec<Way> {
    let mut ways = Vec::with_capacity(2 * costs.hops.len() + 2 * costs.exchanges.len());
    for (&(before, after), hops) in placement.hops().iter().zip(&costs.hops) {
        let [before, after] = [before, after].map(|replica| placement.replicas()[replica].rank);
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
