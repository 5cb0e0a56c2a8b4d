//! Runs a schedule without doing anything: when each action starts and ends on given devices, and what that leaves idle
//! and holds in memory.

use std::borrow::Cow;

use super::check::{Proven, prove_cow};
use super::clock::{Clock, Course, Join, NONE, Span, Task};
use super::costs::{Costs, Exchange};
use super::edges::Moves;
use super::idle::{self, Gap, Idle};
use super::index::Place;
use super::memory::{self, Memory};
use super::times::{Times, action_work, backward_way, forward_way, whole_way, whole_work};
use super::whole::{Exchanged, Shared};
use super::{Action, Kind, Schedule};
use crate::error::{Error, Result};

/// Courses of random events over which a step's expected seconds are averaged.
const COURSES: u64 = 200;

/// When one action runs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cell {
    /// The rank that does it.
    pub rank: usize,
    /// What it does.
    pub action: Action,
    /// When it starts, in seconds; the step starts at 0. For a transfer, when the tensor leaves.
    pub start: f64,
    /// When it ends. For a transfer, when the tensor has arrived.
    pub end: f64,
}

/// What [`simulate`] predicts for one training step.
#[derive(Debug, Clone, PartialEq)]
pub struct Simulation {
    /// Every action of the whole step, rank by rank, in the order of the rank's list ([`Schedule::completed`]).
    pub cells: Vec<Cell>,
    /// When the last action ends, in seconds from the start of the step, [`RankCost::begin`](super::RankCost) included.
    pub makespan: f64,
    /// Seconds of the whole step: up to the last action, the exchange of tied gradients, the end of the step, and the
    /// update, for which all ranks wait for one another since it needs the norm of all gradients.
    pub step: f64,
    /// The seconds to expect of a step whose ranks' speeds wander ([`Jitter`](super::Jitter)): the mean of many such
    /// steps. It is `step` where none wanders.
    pub expected: f64,
    /// The part of all ranks' time up to `makespan` in which they have nothing to do: 0 to 1.
    pub bubble: f64,
    /// For each stage, on each rank that has it ([`Placement::replicas`](super::Placement::replicas)), the most microbatches
    /// that are at any time between the start of F and the end of W (or B).
    pub peak_in_flight: Vec<usize>,
    /// For each rank, [`RankCost::fixed`](super::RankCost) and the most bytes of stash and gradients held at once.
    pub peak_bytes: Vec<u64>,
    /// For each rank, what it needs if each stage has its own buffers ([`Schedule::slots`],
    /// [`Schedule::gradient_slots`]), as a running pipeline has: at least `peak_bytes`.
    pub slot_bytes: Vec<u64>,
    /// For each rank, the bytes it holds from a time on, in order of time; the first entry is at time 0.
    pub memory: Vec<Vec<(f64, u64)>>,
    /// For each rank, why it has nothing to do. The sum is `makespan` less the rank's busy seconds.
    pub idle: Vec<Idle>,
    /// The same, piece by piece.
    pub gaps: Vec<Gap>,
}

/// Predicts one training step: [`Simulator::simulate`] for a schedule that is timed once, with the exchanges of the costs.
///
/// # Errors
///
/// Those of [`Simulator::new`] and [`Simulator::simulate`].
pub fn simulate(schedule: &Schedule, costs: &Costs) -> Result<Simulation> {
    costs.check(&schedule.placement()?, schedule.ranks.len())?;
    Simulator::new(schedule, &costs.tied())?.simulate(costs)
}

/// A valid schedule, laid out to be timed many times with different costs.
///
/// Each rank does its list in order; an action starts when the rank is free and the action's input is there. On its way
/// between ranks a tensor spends [`Hop::out`](super::Hop::out) on the sender's queue as part of the action that makes it,
/// [`latency`](super::Hop::latency), then [`copy`](super::Hop::copy) on the link, which carries one tensor at a time in each direction in the order
/// of sending, and [`into`](super::Hop::into) on the receiver's queue as part of the action that needs it. With a copy engine, `out`
/// and `into` are spent on the way instead, again one tensor at a time. Between two stages of one rank only `out` and
/// `into` count, both on the queue. Sends and receives take no time of a rank, so a schedule and its lowered form give
/// the same prediction; a receive written earlier than its consumer makes the rank wait there. Busy ranks slow each
/// other down as [`Costs::cores`] and [`Costs::slowdown`] say. What begins and ends a step is timed as the actions that it
/// is, of a schedule that does not hold them too.
pub struct Simulator<'a> {
    proven: Proven<'a>,
    /// Who adds up whose gradients.
    shared: Shared,
    /// All actions, by their numbers.
    tasks: Vec<Task>,
    joins: Vec<Vec<Join>>,
    /// Tasks in an order in which each comes after what it waits for.
    order: Vec<u32>,
}

impl<'a> Simulator<'a> {
    /// Proves that the schedule can be run, completed for ties if it is not complete: [`Schedule::completed`].
    ///
    /// # Errors
    ///
    /// Those of [`Schedule::validate`] and [`Schedule::completed`].
    pub fn new(schedule: &'a Schedule, ties: &[(usize, usize)]) -> Result<Self> {
        let is_complete = schedule.is_complete();
        let schedule =
            if is_complete { Cow::Borrowed(schedule) } else { Cow::Owned(schedule.completed(ties)?) };
        let proven = prove_cow(schedule)?;
        let Proven { index, edges, order } = &proven;
        let placement = &index.placement;
        let (replicas, ranks) = (placement.replicas().len(), index.schedule.ranks.len());
        let shared = index.shared();
        let (mut tasks, mut joins) = (Vec::with_capacity(edges.count()), Vec::new());
        for (rank, actions) in index.schedule.ranks.iter().enumerate() {
            for &action in actions {
                let work = match action.kind.is_whole() {
                    true => whole_work(replicas, ranks, &shared, rank, action),
                    false => {
                        let replica = placement.replica(action.stage, action.microbatch);
                        action_work(replicas, replica, action.kind)
                    }
                };
                tasks.push(Task { rank: rank as u32, work, need: NONE, way: NONE, joins: NONE });
            }
        }
        for id in 0..tasks.len() {
            let place = edges.place(id);
            // What comes earlier on the same rank has ended, and needs no waiting for.
            let others = edges.of(place).iter().filter(|edge| edges.place(edge.from).0 != place.0);
            if index.schedule.ranks[place.0][place.1].kind.is_whole() {
                let hops = placement.hops().len();
                let join =
                    others.map(|edge| Join { need: edge.from as u32, way: whole_way(hops, edge.moves) });
                let join: Vec<Join> = join.collect();
                if !join.is_empty() {
                    tasks[id].joins = joins.len() as u32;
                    joins.push(join);
                }
                continue;
            }
            for edge in others {
                tasks[id].need = edge.from as u32;
                tasks[edge.from].way = match edge.moves {
                    Moves::Activation(hop) => forward_way(hop),
                    Moves::Gradient(hop) => backward_way(hop),
                    Moves::Nothing | Moves::Shared(_) | Moves::Updated(_) => NONE,
                };
            }
        }
        let order = order.iter().map(|&place| edges.number(place) as u32).collect();
        Ok(Simulator { proven, shared, tasks, joins, order })
    }

    /// The whole schedule.
    pub fn schedule(&self) -> &Schedule {
        &self.proven.index.schedule
    }

    /// Seconds of the whole step: [`Simulation::step`] and nothing else, for a search that asks often. Fastest where ranks
    /// do not slow each other down.
    ///
    /// # Errors
    ///
    /// Those of [`Simulator::simulate`].
    pub fn step(&self, costs: &Costs) -> Result<f64> {
        self.check(costs)?;
        Ok(self.time(costs, &self.times(costs), None).1)
    }

    /// Predicts one training step with these costs.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for costs that do not fit the schedule, and for a time that is negative or not finite.
    pub fn simulate(&self, costs: &Costs) -> Result<Simulation> {
        self.check(costs)?;
        let schedule = self.schedule();
        let times = self.times(costs);
        let (spans, step) = self.time(costs, &times, None);
        let expected = self.expected(costs, &times, step);
        let mut cells = Vec::with_capacity(self.tasks.len());
        for (rank, actions) in schedule.ranks.iter().enumerate() {
            for (at, &action) in actions.iter().enumerate() {
                let (start, end) = self.cell(&spans, (rank, at), action);
                cells.push(Cell { rank, action, start, end });
            }
        }
        // A rank that clears its gradients first could not have started before.
        let ready = |(rank, actions): (usize, &Vec<Action>)| match actions.first() {
            Some(first) if first.kind == Kind::C => spans[self.proven.edges.number((rank, 0))].end,
            _ => 0.0,
        };
        let ready: Vec<f64> = schedule.ranks.iter().enumerate().map(ready).collect();
        let computed = || cells.iter().filter(|cell| cell.action.kind.computes());
        let makespan = computed().map(|cell| cell.end).chain(ready.iter().copied()).fold(0.0, f64::max);
        let gaps = idle::attribute_proven(&self.proven, &cells, &ready, |rank, at| {
            let need = self.tasks[self.proven.edges.number((rank, at))].need;
            spans.get(need as usize).map(|span| span.ready)
        })?;
        let idle = Idle::of(&gaps, ready.len());
        let available = makespan * schedule.ranks.len() as f64;
        let unused: f64 = idle.iter().map(Idle::total).sum();
        let bubble = if available > 0.0 { unused / available } else { 0.0 };
        let Memory { peak_in_flight, peak_bytes, slot_bytes, timeline } =
            memory::measure(&self.proven.index, costs, &cells);
        Ok(Simulation {
            cells,
            makespan,
            step,
            expected,
            bubble,
            peak_in_flight,
            peak_bytes,
            slot_bytes,
            memory: timeline,
            idle,
            gaps,
        })
    }

    /// Start and end as a [`Cell`] has them.
    fn cell(&self, spans: &[Span], place: Place, action: Action) -> (f64, f64) {
        let task = self.proven.edges.number(place);
        let Span { start, end, ready } = spans[task];
        match action.kind {
            Kind::SendF | Kind::SendB => (start, ready),
            Kind::RecvF | Kind::RecvB => {
                let sent = spans[self.tasks[task].need as usize];
                (sent.start, sent.ready)
            }
            _ => (start, end),
        }
    }

    /// The mean step over [`COURSES`] of what may happen, if any rank's speed wanders; else `step`.
    fn expected(&self, costs: &Costs, times: &Times, step: f64) -> f64 {
        if costs.ranks.iter().all(|rank| rank.jitter.is_none()) {
            return step;
        }
        let steps = (0..COURSES).map(|course| self.time(costs, times, Some(course)).1);
        // The end of a step is a convex function of its durations, so its mean is never before the end at their means.
        step.max(steps.sum::<f64>() / COURSES as f64)
    }

    fn times(&self, costs: &Costs) -> Times {
        Times::new(costs, &self.proven.index.placement, &self.shared)
    }

    /// When each task runs, and the seconds of the step, in a course of random events or at mean speeds.
    fn time(&self, costs: &Costs, times: &Times, course: Option<u64>) -> (Vec<Span>, f64) {
        let mut spans = vec![Span::UNKNOWN; self.tasks.len()];
        let course = course.map(|number| Course { number, worked: vec![0.0; costs.ranks.len()] });
        let mut clock = Clock { course, ..times.clock(costs, &self.joins) };
        if times.is_shared {
            let mut first = 0;
            let list = |actions: &Vec<Action>| {
                let own = first..first + actions.len() as u32;
                first = own.end;
                own.collect()
            };
            let lists: Vec<Vec<u32>> = self.schedule().ranks.iter().map(list).collect();
            clock.share(&self.tasks, &lists, &mut spans);
        } else {
            for &id in &self.order {
                clock.advance(&self.tasks[id as usize], &mut spans, id as usize);
            }
        }
        let step = clock.latest();
        (spans, step)
    }

    /// Whether the schedule was completed for the exchanges of these costs, which must fit it.
    pub(crate) fn knows(&self, costs: &Costs) -> bool {
        costs.exchanges.iter().all(|way| self.has(way))
    }

    /// Whether it sends what the exchange does.
    fn has(&self, way: &Exchange) -> bool {
        let wanted = Exchanged { stage: way.owner, from: way.from, to: way.to };
        self.shared.exchanges.contains(&wanted)
    }

    fn check(&self, costs: &Costs) -> Result<()> {
        costs.check(&self.proven.index.placement, self.schedule().ranks.len())?;
        match costs.exchanges.iter().position(|way| !self.has(way)) {
            None => Ok(()),
            Some(at) => {
                let Exchange { owner, from, to, .. } = costs.exchanges[at];
                let message = format!("the schedule has no {owner}R from rank {from} to rank {to}");
                Err(Error::config(format!("costs.exchanges[{at}]"), message))
            }
        }
    }
}
