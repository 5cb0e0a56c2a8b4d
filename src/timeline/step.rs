//! One training step, predicted or measured: what each device computed, and why it did not when it did not.

use std::collections::HashMap;

use super::prediction::{Prediction, first_line};
use super::{Event, Timeline, Track, What};
use crate::error::{Error, Result};
use crate::schedule::{Action, Cause, Cell, Gap, Idle, Kind, Schedule, attribute};

/// One step on a clock that starts with the step. [`Step::parts`] accounts for all of each device's time.
#[derive(Clone, Debug)]
pub struct Step {
    /// What every device did.
    pub timeline: Timeline,
    /// In which order, computation only.
    pub schedule: Schedule,
    /// When each computation ran.
    pub cells: Vec<Cell>,
    /// For each device, why it had nothing to do up to the last computation of all.
    pub idle: Vec<Idle>,
    /// The same, piece by piece.
    pub gaps: Vec<Gap>,
    /// Seconds from the start to the end of the last update.
    pub seconds: f64,
    /// What such steps take on average where devices' speeds wander, as
    /// [`Simulation::expected`](crate::schedule::Simulation::expected); of a measured step, what it took.
    pub expected: f64,
}

impl Step {
    /// What a prediction says.
    ///
    /// # Errors
    ///
    /// Those of [`Prediction::simulate`].
    pub fn predicted(prediction: &Prediction) -> Result<Step> {
        let simulation = prediction.simulate()?;
        let timeline = prediction.timeline()?;
        let cells = simulation.cells.iter().filter(|cell| cell.action.kind.computes());
        Ok(Step {
            timeline,
            schedule: prediction.schedule()?.computation(),
            cells: cells.copied().collect(),
            idle: simulation.idle,
            gaps: simulation.gaps,
            seconds: simulation.step,
            expected: simulation.expected,
        })
    }

    /// The step that a measured timeline holds, [from its start](Timeline::from_its_start).
    ///
    /// # Errors
    ///
    /// [`Error::Config`] in one line if the events are not one whole step of a training run.
    pub fn measured(timeline: &Timeline) -> Result<Step> {
        let refuse = |what: &str| {
            let message = format!("the timeline does not hold one whole training step ({what})");
            Error::config("timeline", message)
        };
        if (0..timeline.ranks()).any(|rank| clears(timeline, rank).count() > 1) {
            return Err(refuse("it holds several"));
        }
        let timeline = timeline.from_its_start();
        let mut spans: HashMap<Action, Cell> = HashMap::new();
        for event in timeline.usable().filter(|event| event.track == Track::Compute) {
            let What::Action(action) = event.what else { continue };
            if !action.kind.computes() {
                continue;
            }
            let Event { rank, start, end, .. } = *event;
            // The parts of an action that was handed over in several are one computation.
            let cell = spans.entry(action).or_insert(Cell { rank, action, start, end });
            (cell.start, cell.end) = (cell.start.min(start), cell.end.max(end));
        }
        let mut cells: Vec<Cell> = spans.into_values().collect();
        cells.sort_by(|a, b| {
            a.rank.cmp(&b.rank).then(a.start.total_cmp(&b.start)).then(a.end.total_cmp(&b.end))
        });
        let count = |of: fn(&Action) -> usize| {
            cells.iter().map(|c| of(&c.action).saturating_add(1)).max().unwrap_or(0)
        };
        let of_rank = |rank| cells.iter().filter(move |c| c.rank == rank).map(|c| c.action).collect();
        let schedule = Schedule {
            name: "measured".into(),
            stages: count(|action| action.stage),
            microbatches: count(|action| action.microbatch),
            ranks: (0..timeline.ranks()).map(of_rank).collect(),
        };
        let ready: Vec<f64> = (0..timeline.ranks())
            .map(|rank| clears(&timeline, rank).map(|event| event.end).fold(0.0, f64::max))
            .collect();
        let arrived = arrivals(&timeline);
        let arrival = |rank: usize, at: usize| arrived.get(&schedule.ranks[rank][at]).copied();
        let gaps = schedule.validate().and_then(|()| attribute(&schedule, &cells, &ready, arrival));
        let gaps = gaps.map_err(|error| refuse(&first_line(&error)))?;
        let idle = Idle::of(&gaps, ready.len());
        let seconds = timeline.usable().map(|event| event.end).fold(0.0, f64::max);
        Ok(Step { timeline, schedule, cells, idle, gaps, seconds, expected: seconds })
    }

    /// Seconds in which a device computed.
    pub fn computing(&self, rank: usize) -> f64 {
        self.of(rank).map(|cell| cell.end - cell.start).sum()
    }

    /// How busy a device is in the step: [`Timeline::busy_fraction`].
    pub fn busy(&self, rank: usize) -> f64 {
        self.timeline.busy_fraction(rank)
    }

    /// Where a device's time goes, with the names of tables; the sum is [`Step::seconds`]. The last part, `update`, is
    /// what is neither computing nor idle: clearing gradients before the first action, and after the last of all the
    /// gradient's norm, for which devices wait for one another, and the update.
    pub fn parts(&self, rank: usize) -> [(&'static str, f64); 7] {
        let mut parts = [("compute", self.computing(rank)); 7];
        for (part, cause) in parts[1..].iter_mut().zip(Cause::ALL) {
            *part = (cause.name(), cause.seconds(&self.idle[rank]));
        }
        let others: f64 = parts[..6].iter().map(|part| part.1).sum();
        parts[6] = ("update", (self.seconds - others).max(0.0));
        parts
    }

    /// A device's computations, in order.
    pub(super) fn of(&self, rank: usize) -> impl Iterator<Item = &Cell> {
        self.cells.iter().filter(move |cell| cell.rank == rank)
    }

    /// Mean seconds and number of the computations of a kind in a stage, if there are any.
    pub(super) fn mean(&self, stage: usize, kind: Kind) -> Option<(f64, usize)> {
        let these = self.cells.iter().filter(|c| c.action.stage == stage && c.action.kind == kind);
        let (sum, count) = these.fold((0.0, 0), |(sum, count), c| (sum + c.end - c.start, count + 1));
        (count > 0).then(|| (sum / count as f64, count))
    }
}

/// When the input of each action that receives one had arrived, as far as the timeline knows.
fn arrivals(timeline: &Timeline) -> HashMap<Action, f64> {
    let copies = timeline.usable().filter(|event| event.track == Track::Copy);
    let arrivals = copies.filter_map(|event| {
        let What::Action(receive) = event.what else { return None };
        let kinds: &[Kind] = match receive.kind {
            Kind::RecvF => &[Kind::F],
            Kind::RecvB => &[Kind::B, Kind::I],
            _ => &[],
        };
        Some(kinds.iter().map(move |&kind| (Action { kind, ..receive }, event.end)))
    });
    arrivals.flatten().collect()
}

/// The first work of a rank in a step.
fn clears(timeline: &Timeline, rank: usize) -> impl Iterator<Item = &Event> {
    timeline.track(rank, Track::Compute).filter(|event| event.what == What::CLEAR)
}

impl Timeline {
    /// The usable events of a measured step on a clock that starts with the step: when the first device clears its
    /// gradients. What lies before is the update of the step before, measured on the way: it is moved to the end, where
    /// this step's own comes.
    pub fn from_its_start(&self) -> Timeline {
        let clear: Vec<Option<f64>> =
            (0..self.ranks()).map(|rank| clears(self, rank).map(|e| e.start).next()).collect();
        let origin = clear.iter().flatten().copied().reduce(f64::min).unwrap_or(self.span().0);
        let is_before = |event: &&Event| {
            event.what != What::CLEAR && clear[event.rank].is_some_and(|clear| event.start < clear)
        };
        let (before, own): (Vec<&Event>, Vec<&Event>) = self.usable().partition(is_before);
        let end = own.iter().map(|event| event.end).fold(origin, f64::max);
        let start = before.iter().map(|event| event.start).fold(f64::INFINITY, f64::min);
        let shift = |event: &Event, by: f64| Event { start: event.start + by, end: event.end + by, ..*event };
        let own = own.iter().map(|event| shift(event, -origin));
        let before = before.iter().map(|event| shift(event, end - start - origin));
        // The host may record before the device clears: that is no part of what the device did.
        let events = own.chain(before).filter(|event| event.end >= 0.0);
        let events = events.map(|event| Event { start: event.start.max(0.0), ..event });
        Timeline { devices: self.devices.clone(), events: events.collect(), step: self.step }
    }
}
