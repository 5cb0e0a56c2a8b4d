//! Runs a schedule without doing anything: when each action starts and ends on given devices, and what that leaves idle
//! and holds in memory.

use super::check::check;
use super::clock::{Clock, Course, NONE, Span, Task};
use super::costs::Costs;
use super::idle::{self, Gap, Idle};
use super::index::{Index, Place};
use super::memory::{self, Memory};
use super::order::order;
use super::times::{Times, action_work, backward_way, begin_work, forward_way};
use super::{Action, Kind, Schedule};
use crate::error::Result;

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
    /// Every action, rank by rank, in the order of the rank's list.
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
    /// For each stage, the most microbatches that are at any time between the start of F and the end of W (or B).
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

/// Predicts one training step: [`Simulator::simulate`] for a schedule that is timed once.
///
/// # Errors
///
/// Those of [`Simulator::new`] and [`Simulator::simulate`].
pub fn simulate(schedule: &Schedule, costs: &Costs) -> Result<Simulation> {
    Simulator::new(schedule)?.simulate(costs)
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
/// other down as [`Costs::cores`] and [`Costs::slowdown`] say.
pub struct Simulator<'a> {
    index: Index<'a>,
    /// The begin of every rank, then all actions, rank by rank.
    tasks: Vec<Task>,
    /// Tasks in an order in which each comes after what it waits for.
    order: Vec<u32>,
    /// `first[r]` is the task of the first action of rank `r`; the last entry ends the last rank.
    first: Vec<u32>,
}

impl<'a> Simulator<'a> {
    /// Proves that the schedule can be run.
    ///
    /// # Errors
    ///
    /// Those of [`Schedule::validate`].
    pub fn new(schedule: &'a Schedule) -> Result<Self> {
        let index = Index::new(schedule)?;
        check(&index)?;
        let places = order(&index)?;
        let ranks = schedule.ranks.len();
        let mut first = vec![ranks as u32];
        for actions in &schedule.ranks {
            first.push(first[first.len() - 1] + actions.len() as u32);
        }
        let id = |(rank, at): Place| first[rank] + at as u32;
        let begin =
            |rank| Task { rank: rank as u32, work: begin_work(schedule.stages, rank), need: NONE, way: NONE };
        let mut tasks: Vec<Task> = (0..ranks).map(begin).collect();
        for (rank, actions) in schedule.ranks.iter().enumerate() {
            tasks.extend(actions.iter().map(|&action| {
                // What comes earlier on the same rank has ended, and needs no waiting for.
                let need = index.needs(action).into_iter().flatten().filter_map(|need| index.find(need));
                Task {
                    rank: rank as u32,
                    work: action_work(schedule.stages, action),
                    need: need.filter(|need| need.0 != rank).map(id).next().unwrap_or(NONE),
                    way: way_of(&index, action),
                }
            }));
        }
        let order = (0..ranks as u32).chain(places.into_iter().map(id)).collect();
        Ok(Simulator { index, tasks, order, first })
    }

    /// The schedule.
    pub fn schedule(&self) -> &'a Schedule {
        self.index.schedule
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
    /// [`Error::Config`](crate::error::Error::Config) for costs that do not fit the schedule, and for a time that is
    /// negative or not finite.
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
        let ready: Vec<f64> = costs.ranks.iter().map(|rank| rank.begin).collect();
        let computed = || cells.iter().filter(|cell| !cell.action.kind.is_transfer());
        let makespan = computed().map(|cell| cell.end).chain(ready.iter().copied()).fold(0.0, f64::max);
        let gaps = idle::attribute(schedule, &cells, &ready, |rank, at| {
            let need = self.tasks[self.first[rank] as usize + at].need;
            spans.get(need as usize).map(|span| span.ready)
        })?;
        let idle = Idle::of(&gaps, ready.len());
        let available = makespan * schedule.ranks.len() as f64;
        let unused: f64 = idle.iter().map(Idle::total).sum();
        let bubble = if available > 0.0 { unused / available } else { 0.0 };
        let Memory { peak_in_flight, peak_bytes, slot_bytes, timeline } =
            memory::measure(&self.index, costs, &cells);
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
        let task = self.first[place.0] as usize + place.1;
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
        Times::new(costs, &self.index.owner, self.tasks.len())
    }

    /// When each task runs, and the seconds of the step, in a course of random events or at mean speeds.
    fn time(&self, costs: &Costs, times: &Times, course: Option<u64>) -> (Vec<Span>, f64) {
        let mut spans = vec![Span::UNKNOWN; self.tasks.len() + times.tail.tasks.len()];
        let course = course.map(|number| Course { number, worked: vec![0.0; costs.ranks.len()] });
        let mut clock = Clock { course, ..times.clock(costs) };
        let step = if times.is_shared {
            let tasks = [&self.tasks[..], &times.tail.tasks].concat();
            let list = |rank: usize| {
                std::iter::once(rank as u32).chain(self.first[rank]..self.first[rank + 1]).collect()
            };
            let mut lists: Vec<Vec<u32>> = (0..costs.ranks.len()).map(list).collect();
            times.share(&mut clock, &tasks, &mut lists, &mut spans)
        } else {
            for &id in &self.order {
                clock.advance(&self.tasks[id as usize], &mut spans, id as usize);
            }
            times.finish(&mut clock, &mut spans)
        };
        (spans, step)
    }

    fn check(&self, costs: &Costs) -> Result<()> {
        let schedule = self.schedule();
        costs.check(schedule.stages, schedule.ranks.len())
    }
}

/// The way of an action's result between ranks, if it takes one: that of the send in a lowered schedule.
fn way_of(index: &Index, action: Action) -> u32 {
    let Action { stage, kind, .. } = action;
    let last = index.schedule.stages - 1;
    let (onwards, back) = if index.lowered {
        (kind == Kind::SendF, kind == Kind::SendB)
    } else {
        let onwards = kind == Kind::F && stage < last && index.crosses(stage);
        (onwards, matches!(kind, Kind::I | Kind::B) && stage > 0 && index.crosses(stage - 1))
    };
    match (onwards, back) {
        (true, _) => forward_way(stage),
        (_, true) => backward_way(stage),
        _ => NONE,
    }
}
