//! When a device had nothing to do, why, and for whom it waited.

use std::collections::HashMap;

use super::colour::Colour;
use super::step::Step;
use crate::schedule::{Action, Idle, Kind};

/// Why a device has nothing to do: the parts of [`Idle`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cause {
    /// Before its first action.
    WarmUp,
    /// After its last action, while others still compute.
    Drain,
    /// Another device has not yet computed what comes next.
    Imbalance,
    /// What comes next has been computed and is on its way.
    Link,
    /// Everything is there, and the host has not handed over work.
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

    /// The colour of a gap in a picture: pale, since cells are what a reader looks for, and warm where something can be
    /// gained; and that of a dot in a terminal, to be seen on black and on white.
    pub(super) fn colours(self) -> (Colour, Colour) {
        let (pale, strong) = match self {
            Cause::WarmUp => (0xdbe2ec, 0x8494a8),
            Cause::Drain => (0xc9d3e0, 0x6c7f98),
            Cause::Imbalance => (0xf7cfc8, 0xe0796a),
            Cause::Link => (0xfbdfb5, 0xd9922e),
            Cause::Host => (0xf4eda3, 0xb5a41c),
        };
        (Colour(pale), Colour(strong))
    }
}

/// A time in which a device had nothing to do, for one cause.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gap {
    /// The device.
    pub rank: usize,
    /// Why.
    pub cause: Cause,
    /// The device that computes, or has sent, what this one waits for.
    pub peer: Option<usize>,
    /// Seconds from the start of the step.
    pub start: f64,
    /// Seconds from the start of the step.
    pub end: f64,
}

/// The gaps between the cells of a step, by rank and time. For each rank and cause they add up to what
/// [`attribute`](crate::schedule::attribute) says with the same `ready` and `arrivals`.
pub(super) fn gaps(step: &Step, ready: &[f64], arrivals: &HashMap<Action, f64>) -> Vec<Gap> {
    let at: HashMap<Action, (usize, f64)> =
        step.cells.iter().map(|cell| (cell.action, (cell.rank, cell.end))).collect();
    let end_of_all = step.cells.iter().map(|cell| cell.end).chain(ready.iter().copied()).fold(0.0, f64::max);
    let mut gaps = Vec::new();
    for (rank, &ready) in ready.iter().enumerate() {
        let mut until = ready;
        let mut gap = |until: &mut f64, to: f64, cause, peer| {
            if to > *until {
                gaps.push(Gap { rank, cause, peer, start: *until, end: to });
                *until = to;
            }
        };
        for (place, cell) in step.of(rank).enumerate() {
            let made = producer(cell.action, &at).filter(|&(peer, _)| peer != rank);
            let peer = made.map(|(peer, _)| peer);
            if place == 0 {
                gap(&mut until, cell.start, Cause::WarmUp, peer);
            } else if let Some((_, made)) = made {
                let arrived = arrivals.get(&cell.action).copied().unwrap_or(cell.start);
                gap(&mut until, made.min(cell.start), Cause::Imbalance, peer);
                gap(&mut until, arrived.min(cell.start), Cause::Link, peer);
            }
            gap(&mut until, cell.start, Cause::Host, None);
            until = until.max(cell.end);
        }
        gap(&mut until, end_of_all, Cause::Drain, None);
    }
    gaps
}

/// Where and when the input of an action was made.
fn producer(action: Action, at: &HashMap<Action, (usize, f64)>) -> Option<(usize, f64)> {
    let Action { stage, kind, microbatch } = action;
    let find = |stage, kind| at.get(&Action::new(stage, kind, microbatch)).copied();
    match kind {
        Kind::F => find(stage.checked_sub(1)?, Kind::F),
        Kind::I | Kind::B => find(stage + 1, Kind::I).or_else(|| find(stage + 1, Kind::B)),
        _ => None,
    }
}
