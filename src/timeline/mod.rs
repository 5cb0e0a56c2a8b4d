//! What every device did, and when: pure data in, text out.
//!
//! A [`Timeline`] is measured by the executor or made from a simulation ([`Timeline::from_simulation`]); it is drawn as
//! a picture ([`Timeline::to_svg`]) and written as a trace for Perfetto or chrome://tracing, from which it can be read
//! back. A [`Comparison`] sets a prediction beside a measurement and says where the time went.

mod axis;
mod causes;
mod chrome;
mod colour;
mod comparison;
mod comparison_svg;
mod comparison_terminal;
mod findings;
mod prediction;
mod step;
mod svg;
mod terminal;

pub use axis::duration;
pub use comparison::{ActionTime, Comparison};
pub use prediction::Prediction;
pub use step::Step;

use std::borrow::Borrow;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::schedule::{Action, Kind, Simulation};

/// A device as people are told of it. Prints as `device 0 (adapter 1: NAME)`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceName {
    /// The device's number, the same wherever it is named: its position in the list of the machine's devices, which is that
    /// of a machine file, or else the list of adapters that were opened.
    pub number: usize,
    /// The adapter that it was opened on; none for one of a machine file.
    pub adapter: Option<usize>,
    /// What the adapter or the machine's file calls it.
    pub name: String,
}

impl DeviceName {
    /// Devices that were not opened, with their positions as numbers.
    pub fn list(names: impl IntoIterator<Item = impl Into<String>>) -> Vec<DeviceName> {
        let names = names.into_iter().enumerate();
        names.map(|(number, name)| DeviceName { number, adapter: None, name: name.into() }).collect()
    }

    /// What stands beside the numbers of several that are one gang.
    pub fn titles(gang: impl IntoIterator<Item = impl Borrow<DeviceName>>) -> String {
        gang.into_iter().map(|device| device.borrow().title()).collect::<Vec<_>>().join(" + ")
    }

    /// What stands beside the number.
    pub fn title(&self) -> String {
        self.adapter.map_or(self.name.clone(), |adapter| format!("adapter {adapter}: {}", self.name))
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "device {} ({})", self.number, self.title())
    }
}

/// Where an event of a device is drawn: its queue works on both, and a copy may run beside compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Track {
    /// Kernels.
    Compute,
    /// What the host does for them.
    Host,
    /// Activations and gradients on their way over a link.
    Copy,
}

/// What a device was doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// F.
    Forward,
    /// B: I then W.
    Backward,
    /// I: the gradient of the input.
    BackwardInput,
    /// W: the gradients of the weights.
    BackwardWeight,
    /// The update of the weights.
    Optimizer,
    /// A transfer over a link.
    Copy,
    /// Work of the host for which the device waits. The device is not busy.
    Host,
}

use EventKind::*;

impl EventKind {
    /// Every kind, in the order of the legend.
    pub(super) const ALL: [EventKind; 7] =
        [Forward, Backward, BackwardInput, BackwardWeight, Optimizer, Copy, Host];

    /// What an action of a schedule is on a timeline.
    fn of(kind: Kind) -> EventKind {
        match kind {
            Kind::F => Forward,
            Kind::B => Backward,
            Kind::I => BackwardInput,
            Kind::W => BackwardWeight,
            Kind::SendF | Kind::RecvF | Kind::SendB | Kind::RecvB => Copy,
            Kind::C | Kind::R | Kind::A | Kind::N | Kind::U | Kind::G => Optimizer,
        }
    }
}

/// What was done. Prints as the label that people and traces see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// An action.
    Action(Action),
    /// Losses on their way to the host, where nothing else ends the step: in evaluation.
    Losses,
}

impl What {
    /// Clearing gradients.
    pub const CLEAR: What = What::Action(Action::of_rank(Kind::C));
    /// The norm of the gradient.
    pub const NORM: What = What::Action(Action::of_rank(Kind::N));
    /// The update of the weights.
    pub const UPDATE: What = What::Action(Action::of_rank(Kind::U));
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            What::Action(action) => write!(f, "{action}"),
            What::Losses => f.write_str("losses"),
        }
    }
}

/// One thing that one device did, or its host for it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Event {
    /// Position of the device in the pipeline.
    pub rank: usize,
    /// Compute, the host, or copy.
    pub track: Track,
    /// What was done.
    pub what: What,
    /// Seconds on the host's clock since the start of the run.
    pub start: f64,
    /// Seconds on the host's clock since the start of the run.
    pub end: f64,
    /// Bytes moved; 0 for compute.
    pub bytes: u64,
}

/// The events of a run, or of some of its steps, in any order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Timeline {
    /// The devices, by rank.
    pub devices: Vec<DeviceName>,
    /// What they did. An event that ends before it starts, or lies more than 1e9 s from 0, is ignored.
    pub events: Vec<Event>,
    /// Which step of a run it is; none if it is no single step, or not of a run.
    pub step: Option<u64>,
}

impl Timeline {
    /// How busy a device was, wherever that is said: the share of the time between the first start and the last end of
    /// all events in which its queue worked, on actions and on what begins and ends a step (clearing gradients, their
    /// norm, the update). 0 to 1, and 0 if nothing took time. Waiting for the host and copying are not work.
    pub fn busy_fraction(&self, rank: usize) -> f64 {
        let (first, last) = self.span();
        let (mut busy, mut until) = (0.0, f64::NEG_INFINITY);
        for event in self.track(rank, Track::Compute) {
            busy += (event.end - event.start.max(until)).max(0.0);
            until = until.max(event.end);
        }
        if last > first { busy / (last - first) } else { 0.0 }
    }

    /// What a simulation says: the actions of the whole step, and for a lowered schedule the transfers on the devices that
    /// receive. Seconds from the start of the step.
    pub fn from_simulation(devices: Vec<DeviceName>, simulation: &Simulation) -> Timeline {
        let cells = simulation.cells.iter().filter(|cell| match cell.action.kind {
            // A send is the same tensor on the same way as its receive.
            Kind::SendF | Kind::SendB => false,
            // What begins or ends a step may take no time of the device.
            kind => !kind.is_whole() || cell.end > cell.start,
        });
        let events = cells.map(|cell| Event {
            rank: cell.rank,
            track: if cell.action.kind.is_transfer() { Track::Copy } else { Track::Compute },
            what: What::Action(cell.action),
            start: cell.start,
            end: cell.end,
            bytes: 0,
        });
        Timeline { devices, events: events.collect(), step: None }
    }

    /// What gangs of so many neighbours did, all of which do the same: what the first of each did stands for it.
    pub fn of_gangs(self, members: usize) -> Timeline {
        if members <= 1 {
            return self;
        }
        let gang = |members: &[DeviceName]| DeviceName {
            number: members[0].number,
            adapter: None,
            name: DeviceName::titles(members),
        };
        Timeline {
            devices: self.devices.chunks(members).map(gang).collect(),
            events: of_gangs(&self.events, members),
            step: self.step,
        }
    }

    /// Events with usable times.
    fn usable(&self) -> impl Iterator<Item = &Event> {
        self.events.iter().filter(|event| event.is_usable())
    }

    /// The usable events of one track of one device by start.
    fn track(&self, rank: usize, track: Track) -> impl Iterator<Item = &Event> {
        let mut events: Vec<&Event> = self.usable().filter(|e| e.rank == rank && e.track == track).collect();
        events.sort_by(|a, b| a.start.total_cmp(&b.start));
        events.into_iter()
    }

    /// First start and last end in seconds; equal if there is nothing.
    fn span(&self) -> (f64, f64) {
        let first = self.usable().map(|e| e.start).reduce(f64::min).unwrap_or(0.0);
        (first, self.usable().map(|e| e.end).fold(first, f64::max))
    }

    fn ranks(&self) -> usize {
        self.usable().map(|e| e.rank + 1).fold(self.devices.len(), usize::max)
    }

    /// The device of a rank.
    fn device(&self, rank: usize) -> DeviceName {
        let unnamed = || DeviceName { number: rank, adapter: None, name: "unnamed device".into() };
        self.devices.get(rank).cloned().unwrap_or_else(unnamed)
    }
}

/// Events of gangs of so many neighbours, all of which do the same: those of the first of each.
pub fn of_gangs(events: &[Event], members: usize) -> Vec<Event> {
    let firsts = events.iter().filter(|event| event.rank.is_multiple_of(members));
    firsts.map(|event| Event { rank: event.rank / members, ..*event }).collect()
}

impl Event {
    /// What it was: its colour, and its entry in the legend.
    pub fn kind(&self) -> EventKind {
        match (self.track, self.what) {
            (Track::Host, _) => Host,
            (Track::Copy, _) => Copy,
            (Track::Compute, What::Action(action)) => EventKind::of(action.kind),
            (Track::Compute, _) => Optimizer,
        }
    }

    /// The microbatch that was computed, of a computation.
    pub fn microbatch(&self) -> Option<usize> {
        match (self.track, self.what) {
            (Track::Compute, What::Action(action)) if action.kind.computes() => Some(action.microbatch),
            _ => None,
        }
    }

    fn is_usable(&self) -> bool {
        // Other times are nonsense, and in nanoseconds they would not fit an i64. NaN fails the comparisons.
        self.start >= -1e9 && self.start <= self.end && self.end <= 1e9
    }
}
