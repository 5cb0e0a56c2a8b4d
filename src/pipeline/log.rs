//! What a rank is doing, for the timeline and for whoever watches it.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};

use super::link::HostCopy;
use super::pace::{Pace, Work};
use crate::gpu::now;
use crate::timeline::{Event, Track, What};

/// Where a rank stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Between commands.
    Idle,
    /// At work on a command that has no action yet, or none at all.
    Starting,
    /// Waiting for another rank.
    Waiting(What),
    /// Recording, submitting or waiting for its device.
    Working(What),
}

impl State {
    /// What is being done, for people.
    pub(super) fn words(self) -> String {
        match self {
            State::Idle => "nothing".into(),
            State::Starting => "what it was told".into(),
            State::Waiting(What::Action(a)) | State::Working(What::Action(a)) if !a.kind.is_whole() => {
                format!("action {a} (stage {}, microbatch {})", a.stage, a.microbatch)
            }
            State::Waiting(what) | State::Working(what) => format!("action {what}"),
        }
    }
}

struct Running {
    what: What,
    submitted: f64,
    work: Work,
}

struct Inner {
    state: State,
    beat: f64,
    running: VecDeque<Running>,
    events: Vec<Event>,
    last_end: f64,
    flops: f64,
    pace: Pace,
}

/// Shared between a rank, its device's callbacks and the watcher.
pub(super) struct Log {
    rank: usize,
    inner: Mutex<Inner>,
}

impl Log {
    pub(super) fn new(rank: usize, software: bool) -> Log {
        let inner = Inner {
            state: State::Idle,
            beat: now(),
            running: VecDeque::new(),
            events: Vec::new(),
            last_end: 0.0,
            flops: 0.0,
            pace: Pace::new(software),
        };
        Log { rank, inner: Mutex::new(inner) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Notes a change of state.
    pub(super) fn state(&self, state: State) {
        let mut inner = self.lock();
        (inner.state, inner.beat) = (state, now());
    }

    /// A submission of so much work is about to be handed over.
    pub(super) fn submitted(&self, what: What, work: Work) {
        let submitted = now();
        self.lock().running.push_back(Running { what, submitted, work });
    }

    /// The oldest submission has finished.
    pub(super) fn finished(&self) {
        let mut inner = self.lock();
        let end = now();
        inner.beat = end;
        let Some(running) = inner.running.pop_front() else { return };
        let start = running.submitted.max(inner.last_end);
        inner.last_end = end;
        inner.flops += running.work.flops();
        inner.pace.learn(&running.work, end - start);
        // The parts of one action that was split into several submissions are one event.
        if let Some(last) = inner.events.iter_mut().rev().find(|e| e.track == Track::Compute)
            && last.what == running.what
            && start - last.end < 1e-3
        {
            last.end = end;
            return;
        }
        inner.events.push(Event {
            rank: self.rank,
            track: Track::Compute,
            what: running.what,
            start,
            end,
            bytes: 0,
        });
    }

    /// Notes that what has finished is taken for unfinished until now.
    pub(super) fn lingered(&self, what: What) {
        let mut inner = self.lock();
        (inner.beat, inner.last_end) = (now(), now());
        let end = inner.last_end;
        let last = inner.events.iter_mut().rev().find(|event| event.track == Track::Compute);
        if let Some(event) = last.filter(|event| event.what == what) {
            event.end = end;
        }
    }

    /// Notes what the host did for something from `start` until now.
    pub(super) fn host(&self, what: What, start: f64) {
        let (rank, track, end) = (self.rank, Track::Host, now());
        self.lock().events.push(Event { rank, track, what, start, end, bytes: 0 });
    }

    /// Notes a copy on its way over a link, if the host made one.
    pub(super) fn copied(&self, what: What, copy: Option<HostCopy>) {
        let (rank, track) = (self.rank, Track::Copy);
        let event = |HostCopy { start, end, bytes }| Event { rank, track, what, start, end, bytes };
        self.lock().events.extend(copy.map(event));
    }

    /// Operations of all submissions that have finished.
    pub(super) fn flops(&self) -> f64 {
        self.lock().flops
    }

    /// Takes the events so far.
    pub(super) fn take_events(&self) -> Vec<Event> {
        std::mem::take(&mut self.lock().events)
    }

    /// How long launches are expected to take, as what is known by now.
    pub(super) fn expect(&self, launches: &[(&'static str, f64)]) -> Vec<f64> {
        let inner = self.lock();
        launches.iter().map(|&(kernel, flops)| inner.pace.seconds(kernel, flops)).collect()
    }

    /// What the device is doing, for people.
    pub(super) fn doing(&self) -> String {
        self.standing().0.words()
    }

    /// What the rank's thread is doing, for people.
    pub(super) fn recording(&self) -> String {
        self.lock().state.words()
    }

    /// (state, time of the last sign of progress).
    pub(super) fn standing(&self) -> (State, f64) {
        let inner = self.lock();
        let state = inner.running.front().map_or(inner.state, |running| State::Working(running.what));
        (state, inner.beat)
    }
}
