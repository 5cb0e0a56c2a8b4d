//! What a rank is doing, for the timeline and for whoever watches it.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};

use super::timeline::{Event, EventKind, Track};
use crate::gpu::now;
use crate::schedule::Action;

/// Where a rank stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Between commands.
    Idle,
    /// Waiting for another rank.
    Waiting,
    /// Recording, submitting or waiting for its device.
    Working,
}

struct Running {
    label: String,
    kind: EventKind,
    microbatch: Option<usize>,
    submitted: f64,
    flops: f64,
}

struct Inner {
    state: State,
    beat: f64,
    doing: String,
    running: VecDeque<Running>,
    events: Vec<Event>,
    last_end: f64,
    busy: f64,
    flops: f64,
}

/// Shared between a rank, its device's callbacks and the watcher.
pub(super) struct Log {
    rank: usize,
    inner: Mutex<Inner>,
}

impl Log {
    pub(super) fn new(rank: usize) -> Log {
        let inner = Inner {
            state: State::Idle,
            beat: now(),
            doing: String::new(),
            running: VecDeque::new(),
            events: Vec::new(),
            last_end: 0.0,
            busy: 0.0,
            flops: 0.0,
        };
        Log { rank, inner: Mutex::new(inner) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Notes a change of state, with words for what is being done.
    pub(super) fn state(&self, state: State, doing: impl Into<String>) {
        let mut inner = self.lock();
        (inner.state, inner.doing, inner.beat) = (state, doing.into(), now());
    }

    /// A submission of `flops` operations is about to be handed over.
    pub(super) fn submitted(&self, label: &str, kind: EventKind, microbatch: Option<usize>, flops: f64) {
        let submitted = now();
        self.lock().running.push_back(Running { label: label.into(), kind, microbatch, submitted, flops });
    }

    /// The oldest submission has finished.
    pub(super) fn finished(&self) {
        let mut inner = self.lock();
        let end = now();
        inner.beat = end;
        let Some(running) = inner.running.pop_front() else { return };
        let start = running.submitted.max(inner.last_end);
        inner.last_end = end;
        inner.busy += end - start;
        inner.flops += running.flops;
        // The parts of one action that was split into several submissions are one event.
        if let Some(last) = inner.events.iter_mut().rev().find(|e| e.track == Track::Compute)
            && last.label == running.label
            && start - last.end < 1e-3
        {
            last.end = end;
            return;
        }
        inner.events.push(Event {
            rank: self.rank,
            track: Track::Compute,
            label: running.label,
            kind: running.kind,
            microbatch: running.microbatch,
            start,
            end,
            bytes: 0,
        });
    }

    /// Notes something that the host did.
    pub(super) fn host(&self, label: &str, kind: EventKind, start: f64, end: f64, bytes: u64) {
        let rank = self.rank;
        let track = if kind == EventKind::Copy { Track::Copy } else { Track::Host };
        let event = Event { rank, track, label: label.into(), kind, microbatch: None, start, end, bytes };
        self.lock().events.push(event);
    }

    /// Operations of all submissions that have finished.
    pub(super) fn flops(&self) -> f64 {
        self.lock().flops
    }

    /// Takes the events so far.
    pub(super) fn take_events(&self) -> Vec<Event> {
        std::mem::take(&mut self.lock().events)
    }

    /// Measured operations a second, once there is enough to go by.
    pub(super) fn rate(&self) -> Option<f64> {
        let inner = self.lock();
        (inner.busy > 0.05).then(|| inner.flops / inner.busy)
    }

    /// What the device is doing, for people.
    pub(super) fn doing(&self) -> String {
        described(&self.standing().2)
    }

    /// What the rank's thread is doing, for people.
    pub(super) fn recording(&self) -> String {
        described(&self.lock().doing)
    }

    /// (state, time of the last sign of progress, words for what is being done).
    pub(super) fn standing(&self) -> (State, f64, String) {
        let inner = self.lock();
        let doing = inner.running.front().map_or_else(|| inner.doing.clone(), |r| r.label.clone());
        let state = if inner.running.is_empty() { inner.state } else { State::Working };
        (state, inner.beat, doing)
    }
}

fn described(doing: &str) -> String {
    match doing.parse::<Action>() {
        _ if doing.is_empty() => "nothing".into(),
        Ok(a) => format!("action {doing} (stage {}, microbatch {})", a.stage, a.microbatch),
        Err(_) => format!("action {doing:?}"),
    }
}
