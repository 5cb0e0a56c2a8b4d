//! Why a rank has nothing to do.

use super::index::Index;
use super::{Action, Cell, Kind, Schedule};
use crate::error::{Error, Result};

/// Seconds in which a rank has nothing to do, by cause.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Idle {
    /// Before its first action: the first microbatch is on its way through the stages before.
    pub warm_up: f64,
    /// After its last action, while others still work.
    pub drain: f64,
    /// Between actions: another rank has not yet computed what comes next.
    pub imbalance: f64,
    /// Between actions: what comes next has been computed and is on its way.
    pub link: f64,
    /// Between actions, although everything is there: the host has not handed over work. None in a simulation.
    pub host: f64,
}

impl Idle {
    /// All of it.
    pub fn total(&self) -> f64 {
        self.warm_up + self.drain + self.imbalance + self.link + self.host
    }
}

/// Attributes the idle time of each rank to its causes, for simulated cells as well as for measured ones.
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
) -> Result<Vec<Idle>> {
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
    let mut idle = vec![Idle::default(); ready.len()];
    for (rank, actions) in schedule.ranks.iter().enumerate() {
        let idle = &mut idle[rank];
        // Up to when the rank's time is accounted for.
        let mut until = ready[rank];
        let mut has_started = false;
        // Producer's end and arrival of what the rank has to wait for before its next computation.
        let mut waits: Vec<(f64, Option<f64>)> = Vec::new();
        for (at, &action) in actions.iter().enumerate() {
            if let Some(producer) = producer(&index, action) {
                waits.push((span(producer)?.1, arrival(rank, at)));
            }
            if action.kind.is_transfer() {
                continue;
            }
            let (start, end) = span(action)?;
            if !has_started {
                idle.warm_up += (start - until).max(0.0);
                until = until.max(start);
            }
            for (made, arrived) in waits.drain(..) {
                idle.imbalance += advance(&mut until, made.min(start));
                idle.link += advance(&mut until, arrived.unwrap_or(start).min(start));
            }
            idle.host += advance(&mut until, start);
            until = until.max(end);
            has_started = true;
        }
        idle.drain = (end_of_all - until).max(0.0);
    }
    Ok(idle)
}

/// Moves `until` forward to `time`, if that is later, and returns by how much.
fn advance(until: &mut f64, time: f64) -> f64 {
    let by = (time - *until).max(0.0);
    *until = until.max(time);
    by
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
