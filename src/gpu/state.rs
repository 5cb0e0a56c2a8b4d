//! What is known of a device while it works: its unfinished submissions, the ledger of its memory, and how it has failed.
//!
//! wgpu says that something has failed in many places: to a callback where the device is lost, to another where there is
//! no memory left or a call was invalid, to whoever maps a buffer, and by a panic to whoever waits. All of them end here.
//! The first failure is kept, because what follows is its consequence; and it wakes whoever waits for the device, because
//! what a failed device was to do may never come to an end.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};

use crate::error::Error;

/// How a device has failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// It is gone, and how that was said.
    Lost(String),
    /// It has no memory left.
    OutOfMemory,
    /// A call was invalid, or the driver has a mistake.
    Other(String),
    /// It has not done what it was told. If it does not say why after all, it is gone.
    Silent(&'static str),
}

impl Failure {
    /// What wgpu reports outside of calls.
    pub(super) fn reported(error: &wgpu::Error) -> Failure {
        match error {
            wgpu::Error::OutOfMemory { .. } => Failure::OutOfMemory,
            other => Failure::Other(other.to_string()),
        }
    }

    /// What wgpu tells apart in words alone: a device is also given up because there is no memory for it.
    pub(super) fn worded(words: String, otherwise: fn(String) -> Failure) -> Failure {
        match words.to_lowercase() {
            lower if lower.contains("memory") => Failure::OutOfMemory,
            lower if lower.contains("lost") => Failure::Lost(words),
            _ => otherwise(words),
        }
    }

    /// The failure of the device `title` while it was `doing` something.
    pub(super) fn error(&self, title: &str, doing: &str) -> Error {
        match self {
            Failure::Lost(words) => Error::lost(title, doing, joined(words)),
            Failure::OutOfMemory => Error::out_of_memory(title, doing),
            Failure::Other(words) => Error::gpu(title, doing, joined(words)),
            Failure::Silent(words) => Error::lost(title, doing, *words),
        }
    }
}

/// Messages of drivers run over many lines; the last says what is wrong.
fn joined(message: &str) -> String {
    let lines = message.lines().map(str::trim).filter(|l| !l.is_empty() && *l != "Caused by:");
    lines.collect::<Vec<_>>().join(": ")
}

/// Shared by the handles of a device, its buffers, and the driver's callbacks.
#[derive(Debug)]
pub(super) struct State {
    /// The device, as messages name it.
    title: String,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Submissions not yet finished, oldest first.
    pending: VecDeque<wgpu::SubmissionIndex>,
    allocated: u64,
    wakers: Vec<Waker>,
    failure: Option<Failure>,
}

impl State {
    pub(super) fn new(title: String) -> Arc<State> {
        Arc::new(State { title, inner: Mutex::default() })
    }

    /// A panic of another thread while it held the lock leaves plain data, which stays usable.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Changes something, and wakes whoever may have waited for it.
    fn change(&self, change: impl FnOnce(&mut Inner)) {
        let wakers = {
            let mut inner = self.lock();
            change(&mut inner);
            std::mem::take(&mut inner.wakers)
        };
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Notes a failure, unless there has been one that said what it was.
    pub(super) fn fail(&self, failure: Failure) {
        self.change(|inner| match inner.failure {
            None | Some(Failure::Silent(_)) => inner.failure = Some(failure),
            Some(_) => {}
        });
    }

    pub(super) fn failure(&self) -> Option<Failure> {
        self.lock().failure.clone()
    }

    /// The failure as an error of what the device was doing.
    pub(super) fn error(&self, doing: &str) -> Option<Error> {
        self.failure().map(|failure| failure.error(&self.title, doing))
    }

    /// The same, or of this failure if there has been none.
    pub(super) fn error_or(&self, doing: &str, otherwise: Failure) -> Error {
        self.failure().unwrap_or(otherwise).error(&self.title, doing)
    }

    /// Ready with the error of the failure once there is one.
    pub(super) fn failed(&self, context: &Context, doing: impl Fn() -> String) -> Poll<Error> {
        let failure = self.wait(context, |inner| inner.failure.clone());
        failure.map(|failure| failure.error(&self.title, &doing()))
    }

    pub(super) fn submitted(&self, index: wgpu::SubmissionIndex) {
        self.lock().pending.push_back(index);
    }

    /// The oldest submission has finished.
    pub(super) fn finished(&self) {
        self.change(|inner| {
            inner.pending.pop_front();
        });
    }

    #[cfg(not(target_arch = "wasm32"))]
    pub(super) fn oldest(&self) -> Option<wgpu::SubmissionIndex> {
        self.lock().pending.front().cloned()
    }

    pub(super) fn in_flight(&self) -> usize {
        self.lock().pending.len()
    }

    pub(super) fn allocated(&self) -> u64 {
        self.lock().allocated
    }

    /// Ready when fewer than `limit` submissions are unfinished, or the device has failed.
    pub(super) fn below(&self, limit: usize, context: &Context) -> Poll<()> {
        self.wait(context, |inner| (inner.failure.is_some() || inner.pending.len() < limit).then_some(()))
    }

    /// Ready with what `look` finds; until then the context is woken whenever there is something new.
    fn wait<T>(&self, context: &Context, look: impl Fn(&Inner) -> Option<T>) -> Poll<T> {
        let mut inner = self.lock();
        if let Some(found) = look(&inner) {
            return Poll::Ready(found);
        }
        if !inner.wakers.iter().any(|waker| waker.will_wake(context.waker())) {
            inner.wakers.push(context.waker().clone());
        }
        Poll::Pending
    }

    /// Enters a buffer in the ledger, until the lease is dropped.
    pub(super) fn lease(self: &Arc<State>, bytes: u64) -> Lease {
        self.lock().allocated += bytes;
        Lease { bytes, state: self.clone() }
    }
}

/// A buffer's entry in the ledger of its device.
#[derive(Debug)]
pub(super) struct Lease {
    bytes: u64,
    pub(super) state: Arc<State>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.state.lock().allocated -= self.bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{Device, OpenOptions};

    fn device() -> Device {
        pollster::block_on(Device::open(0, OpenOptions::default())).unwrap()
    }

    /// What comes of reading a buffer of a device to which `harm` was done.
    fn harmed(harm: impl FnOnce(&Device)) -> Error {
        let device = device();
        let buffer = device.buffer("harmed", 1024).unwrap();
        harm(&device);
        let error = device.block_on(device.read(&buffer.whole())).unwrap_err();
        let said = error.to_string();
        assert!(said.starts_with("adapter 0 (") && said.lines().count() == 1, "{said}");
        assert!(!error.is_input(), "{said}");
        error
    }

    #[test]
    fn a_device_that_is_gone_ends_the_waiting_for_it_as_lost() {
        let error = harmed(Device::lose);
        assert!(matches!(error, Error::Lost { .. }), "{error:?}");
        assert!(error.to_string().contains("--resume"), "{error}");
        // So is one that goes while it is waited for by somebody who waits for others too.
        let device = device();
        let waiting = device.unless_failed(|| "testing".into(), std::future::pending::<crate::Result<()>>());
        let error = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| device.block_on(waiting));
            device.lose();
            waiting.join().unwrap().unwrap_err()
        });
        assert!(
            matches!(error, Error::Lost { .. }) && error.to_string().contains("while testing"),
            "{error:?}"
        );
        device.block_on(device.below(0));
    }

    #[test]
    fn a_call_that_is_invalid_is_told_from_a_lost_device_and_is_named() {
        let error = harmed(|device| {
            let small = device.buffer("small", 16).unwrap();
            device.upload(&small, 0, &[0; 64]);
        });
        assert!(matches!(error, Error::Gpu { .. }), "{error:?}");
        assert!(
            error.to_string().contains("write_buffer") && error.to_string().contains("verify"),
            "{error}"
        );
    }

    #[test]
    fn memory_that_a_driver_does_not_have_is_told_from_what_a_plan_refuses() {
        let device = device();
        // Nothing of it is touched, so the machine does not notice.
        let most = device.capabilities().max_buffer / 16 * 16;
        let mut taken = Vec::new();
        let error = loop {
            match device.buffer("all there is", most) {
                Ok(buffer) => taken.push(buffer),
                Err(error) => break error,
            }
        };
        assert!(matches!(error, Error::OutOfMemory { .. }), "{error:?}");
        let said = error.to_string();
        assert!(said.contains("bytes for all there is") && said.contains("--memory"), "{said}");
        assert!(!error.is_input() && said.lines().count() == 1, "{said}");
    }

    #[test]
    fn the_first_failure_is_told_but_one_that_says_what_it_was_before_one_that_does_not() {
        let state = State::new("adapter 7".into());
        assert!(state.error("testing").is_none());
        state.fail(Failure::Silent("nothing came"));
        assert!(state.error("testing").unwrap().to_string().contains("(nothing came)"));
        state.fail(Failure::worded("Not enough memory left.".into(), Failure::Lost));
        state.fail(Failure::worded("Parent device is lost".into(), Failure::Other));
        assert!(matches!(state.error("testing"), Some(Error::OutOfMemory { .. })));
        let many = "Validation Error\n\nCaused by:\n  In a call\n    it is wrong\n";
        let error = Failure::worded(many.into(), Failure::Other).error("adapter 7", "testing").to_string();
        assert!(
            error.contains("adapter 7 failed while testing: Validation Error: In a call: it is wrong;"),
            "{error}"
        );
    }
}
