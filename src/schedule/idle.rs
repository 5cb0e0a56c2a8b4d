//! Why a rank has nothing to do.

use super::check::{Proven, prove};
use super::edges::{Edge, Edges, Moves};
use super::index::Place;
use super::{Action, Cell, Schedule};
use crate::error::{Error, Result};

/// Why a rank has nothing to do: the parts of [`Idle`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cause {
    /// Before its first action: the first microbatch is on its way through the stages before.
    WarmUp,
    /// After its last action, while others still work.
    Drain,
    /// Between actions: another rank has not yet computed what comes next.
    Imbalance,
    /// Between actions: what comes next has been computed and is on its way.
    Link,
    /// Between actions, although everything is there: the host has not handed over work. Never in a simulation.
    Host,
}

impl Cause {
    /// Every cause, in the order of tables.
    pub const ALL: [Cause; 5] = [Cause::WarmUp, Cause::Drain, Cause::Imbalance, Cause::Link, Cause::Host];

    /// Its name in tables and legends.
    pub fn name(self) -> &'static str {
        match self {
            Cause::WarmUp => "warm-up",
            Cause::Drain => "drain",
            Cause::Imbalance => "imbalance",
            Cause::Link => "link",
            Cause::Host => "host",
        }
    }

    /// Its seconds in `idle`.
    pub fn seconds(self, idle: &Idle) -> f64 {
        match self {
            Cause::WarmUp => idle.warm_up,
            Cause::Drain => idle.drain,
            Cause::Imbalance => idle.imbalance,
            Cause::Link => idle.link,
            Cause::Host => idle.host,
        }
    }
}

/// A time in which a rank has nothing to do, for one cause.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gap {
    /// The rank.
    pub rank: usize,
    /// Why.
    pub cause: Cause,
    /// The rank that computes, or has sent, what this one waits for.
    pub peer: Option<usize>,
    /// Seconds from the start of the step.
    pub start: f64,
    /// Seconds from the start of the step.
    pub end: f64,
}

/// Seconds in which a rank has nothing to do, by cause.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Idle {
    /// [`Cause::WarmUp`].
    pub warm_up: f64,
    /// [`Cause::Drain`].
    pub drain: f64,
    /// [`Cause::Imbalance`].
    pub imbalance: f64,
    /// [`Cause::Link`].
    pub link: f64,
    /// [`Cause::Host`].
    pub host: f64,
}

impl Idle {
    /// The sums of so many ranks' gaps.
    pub fn of(gaps: &[Gap], ranks: usize) -> Vec<Idle> {
        let mut idle = vec![Idle::default(); ranks];
        for gap in gaps {
            let of_rank = &mut idle[gap.rank];
            let sum = match gap.cause {
                Cause::WarmUp => &mut of_rank.warm_up,
                Cause::Drain => &mut of_rank.drain,
                Cause::Imbalance => &mut of_rank.imbalance,
                Cause::Link => &mut of_rank.link,
                Cause::Host => &mut of_rank.host,
            };
            *sum += gap.end - gap.start;
        }
        idle
    }

    /// All of it.
    pub fn total(&self) -> f64 {
        self.warm_up + self.drain + self.imbalance + self.link + self.host
    }
}

/// The times in which each rank has nothing to do, by rank and time, for simulated cells as well as for measured ones.
///
/// `cells` holds every computation of the schedule, in any order; other actions among them are not looked at. `ready[r]` is
/// when rank `r` could have started its first action, so that what it did before does not count as idle; time ends with
/// the last cell of all, or the latest `ready`. `arrival(rank, place)` is when the input arrived that the action at that
/// place of the rank's list receives from another rank; where it is not known, all the time since the input was computed
/// counts as the link's. In a lowered schedule it is asked for receives, otherwise for the computations. The sum for a
/// rank is its time from `ready` less what its cells cover.
///
/// # Errors
///
/// [`Error::Config`] for a computation without a cell, or a `ready` of another number of ranks; those of
/// [`Schedule::validate`].
pub fn attribute(
    schedule: &Schedule,
    cells: &[Cell],
    ready: &[f64],
    arrival: impl Fn(usize, usize) -> Option<f64>,
) -> Result<Vec<Gap>> {
    attribute_proven(&prove(schedule)?, cells, ready, arrival)
}

/// [`attribute`] for a schedule that has been proved.
pub(super) fn attribute_proven(
    Proven { index, edges, .. }: &Proven,
    cells: &[Cell],
    ready: &[f64],
    arrival: impl Fn(usize, usize) -> Option<f64>,
) -> Result<Vec<Gap>> {
    let schedule = &index.schedule;
    if ready.len() != schedule.ranks.len() {
        let message = format!("{} entries for {} ranks", ready.len(), schedule.ranks.len());
        return Err(Error::config("ready", message));
    }
    let mut spans: Vec<Option<(f64, f64)>> = vec![None; edges.count()];
    for cell in cells.iter().filter(|cell| cell.action.kind.computes()) {
        let inside = cell.action.stage < schedule.stages && cell.action.microbatch < schedule.microbatches;
        if let Some(place) = inside.then(|| index.find(cell.action)).flatten() {
            spans[edges.number(place)] = Some((cell.start, cell.end));
        }
    }
    let span = |(rank, at): Place| {
        let action = schedule.ranks[rank][at];
        let missing = || Error::config("cells", format!("there is no cell of {action}"));
        spans[edges.number((rank, at))].ok_or_else(missing)
    };
    let computed = |action: &Action| action.kind.computes();
    let mut end_of_all = ready.iter().copied().fold(0.0, f64::max);
    for (rank, actions) in schedule.ranks.iter().enumerate() {
        for at in (0..actions.len()).filter(|&at| computed(&actions[at])) {
            end_of_all = span((rank, at))?.1.max(end_of_all);
        }
    }
    let mut gaps = Vec::new();
    for (rank, actions) in schedule.ranks.iter().enumerate() {
        // Up to when the rank's time is accounted for.
        let mut until = ready[rank];
        let mut gap = |until: &mut f64, to: f64, cause, peer| {
            if to > *until {
                gaps.push(Gap { rank, cause, peer, start: *until, end: to });
                *until = to;
            }
        };
        let mut has_started = false;
        // What the rank has to wait for before its next computation: the producer's rank and end, and the arrival.
        let mut waits: Vec<(usize, f64, Option<f64>)> = Vec::new();
        for (at, action) in actions.iter().enumerate() {
            if let Some(producer) = producer(schedule, edges, (rank, at)) {
                waits.push((producer.0, span(producer)?.1, arrival(rank, at)));
            }
            if !computed(action) {
                continue;
            }
            let (start, end) = span((rank, at))?;
            if !has_started {
                gap(&mut until, start, Cause::WarmUp, waits.first().map(|wait| wait.0));
            }
            for (peer, made, arrived) in waits.drain(..) {
                gap(&mut until, made.min(start), Cause::Imbalance, Some(peer));
                gap(&mut until, arrived.unwrap_or(start).min(start), Cause::Link, Some(peer));
            }
            gap(&mut until, start, Cause::Host, None);
            until = until.max(end);
            has_started = true;
        }
        gap(&mut until, end_of_all, Cause::Drain, None);
    }
    Ok(gaps)
}

/// The computation of another rank whose result the action at a place receives.
fn producer(schedule: &Schedule, edges: &Edges, place: Place) -> Option<Place> {
    let from = |edge: &Edge| edges.place(edge.from);
    let moved = |moves| matches!(moves, Moves::Activation(_) | Moves::Gradient(_));
    let made = edges.of(place).iter().find(|edge| moved(edge.moves)).map(from)?;
    match schedule.ranks[made.0][made.1].kind.is_transfer() {
        true => edges.of(made).first().map(from),
        false => Some(made),
    }
}
