//! Why a rank has nothing to do.

use super::index::Index;
use super::{Action, Cell, Kind, Schedule};
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
/// `cells` holds every computation of the schedule, in any order; transfers among them are not looked at. `ready[r]` is
/// when rank `r` could have started its first action, so that what it did before does not count as idle; time ends with
/// the last cell of all, or the latest `ready`. `arrival(rank, place)` is when the input arrived that the action at that
/// place of the rank's list receives from another rank; where it is not known, all the time since the input was computed
/// counts as the link's. In a lowered schedule it is asked for receives, otherwise for the computations. The sum for a
/// rank is its time from `ready` less what its cells cover.
///
/// # Errors
///
/// [`Error::Config`] for a computation without a cell, or a `ready` of another number of ranks; those of
/// [`Schedule::validate`] for a schedule whose parts cannot be told apart.
pub fn attribute(
    schedule: &Schedule,
    cells: &[Cell],
    ready: &[f64],
    arrival: impl Fn(usize, usize) -> Option<f64>,
) -> Result<Vec<Gap>> {
    let index = Index::new(schedule)?;
    if ready.len() != schedule.ranks.len() {
        let message = format!("{} entries for {} ranks", ready.len(), schedule.ranks.len());
        return Err(Error::config("ready", message));
    }
    let mut spans: Vec<Vec<Option<(f64, f64)>>> =
        schedule.ranks.iter().map(|actions| vec![None; actions.len()]).collect();
    for cell in cells {
        let inside = cell.action.stage < schedule.stages && cell.action.microbatch < schedule.microbatches;
        if let Some((rank, at)) = inside.then(|| index.find(cell.action)).flatten() {
            spans[rank][at] = Some((cell.start, cell.end));
        }
    }
    let span = |action: Action| {
        let found = index.find(action).and_then(|(rank, at)| spans[rank][at]);
        found.ok_or_else(|| Error::config("cells", format!("there is no cell of {action}")))
    };
    let computed = |action: &&Action| !action.kind.is_transfer();
    let mut end_of_all = ready.iter().copied().fold(0.0, f64::max);
    for action in schedule.ranks.iter().flatten().filter(computed) {
        end_of_all = span(*action)?.1.max(end_of_all);
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
        let mut waits: Vec<(Option<usize>, f64, Option<f64>)> = Vec::new();
        for (at, &action) in actions.iter().enumerate() {
            if let Some(producer) = producer(&index, action) {
                let peer = index.find(producer).map(|(peer, _)| peer);
                waits.push((peer, span(producer)?.1, arrival(rank, at)));
            }
            if action.kind.is_transfer() {
                continue;
            }
            let (start, end) = span(action)?;
            if !has_started {
                gap(&mut until, start, Cause::WarmUp, waits.first().and_then(|wait| wait.0));
            }
            for (peer, made, arrived) in waits.drain(..) {
                gap(&mut until, made.min(start), Cause::Imbalance, peer);
                gap(&mut until, arrived.unwrap_or(start).min(start), Cause::Link, peer);
            }
            gap(&mut until, start, Cause::Host, None);
            until = until.max(end);
            has_started = true;
        }
        gap(&mut until, end_of_all, Cause::Drain, None);
    }
    Ok(gaps)
}

/// The computation of another rank whose result `action` receives.
fn producer(index: &Index, action: Action) -> Option<Action> {
    let Action { stage, kind, microbatch } = action;
    let (activation, gradient) = if index.lowered {
        (kind == Kind::RecvF, kind == Kind::RecvB)
    } else {
        (kind == Kind::F, matches!(kind, Kind::I | Kind::B))
    };
    if activation && stage > 0 && index.crosses(stage - 1) {
        return Some(Action::new(stage - 1, Kind::F, microbatch));
    }
    if gradient && stage + 1 < index.schedule.stages && index.crosses(stage) {
        return Some(index.backward(stage + 1, microbatch));
    }
    None
}
