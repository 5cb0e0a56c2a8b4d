//! Notices a device that no longer gets on.

use std::sync::Arc;

use super::log::{Log, State};
use crate::error::Error;
#[cfg(not(target_arch = "wasm32"))]
use crate::error::Result;
use crate::gpu::now;

/// Seconds without progress after which a device counts as stalled.
const STALL_SECONDS: f64 = 25.0;
/// Seconds between two looks, or less.
const INTERVAL: f64 = 0.2;
/// Most seconds between two looks that count: where there were more, the process was stopped or the machine slept, and
/// so did its devices.
const AWAKE: f64 = 5.0 * INTERVAL;

/// Sees what every rank is doing.
#[derive(Clone)]
pub struct Watch {
    logs: Vec<Arc<Log>>,
    names: Vec<String>,
    /// Floating-point operations of a step.
    step: f64,
    patience: Patience,
}

impl Watch {
    pub(super) fn new(logs: &[Arc<Log>], names: &[String], step: f64) -> Watch {
        Watch { logs: logs.to_vec(), names: names.to_vec(), step, patience: Patience::new(now()) }
    }

    /// What all devices have done so far, in steps: half a step more while half of its operations are done. May be asked
    /// from any thread while a step runs, and makes none slower.
    pub fn steps(&self) -> f64 {
        self.logs.iter().map(|log| log.flops()).sum::<f64>() / self.step.max(1.0)
    }

    /// The rank that has made no progress for too long, if any: one whose device works rather than one that waits
    /// for it. To be asked several times a second, because only time between two looks counts.
    pub fn stall(&mut self) -> Option<Error> {
        let standings: Vec<_> = self.logs.iter().map(|log| log.standing()).collect();
        let idle = self.patience.look(now(), standings.iter().map(|s| s.1));
        let stuck = |in_state: fn(State) -> bool| {
            (0..idle.len()).find(|&r| in_state(standings[r].0) && idle[r] > STALL_SECONDS)
        };
        let works = |state: State| matches!(state, State::Starting | State::Working(_));
        let all_wait = !standings.iter().any(|s| works(s.0));
        let waits = |state: State| matches!(state, State::Waiting(_));
        let rank = stuck(works).or_else(|| all_wait.then(|| stuck(waits)).flatten())?;
        let state = standings[rank].0;
        let doing = if waits(state) { "has waited for" } else { "has not finished" };
        let message = format!(
            "rank {rank} ({}) {doing} {} for {:.0} s; its driver does not return",
            self.names[rank],
            state.words(),
            idle[rank]
        );
        Some(Error::Stall { message })
    }

    /// Runs a future on this thread, looking for stalls: the explicit blocking wrapper for native programs.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn block_on<T>(&self, future: impl Future<Output = Result<T>>) -> Result<T> {
        self.block_on_and(future, || ())
    }

    /// The same; `each` is called several times a second meanwhile.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn block_on_and<T>(
        &self,
        future: impl Future<Output = Result<T>>,
        mut each: impl FnMut(),
    ) -> Result<T> {
        struct Unpark(std::thread::Thread);
        impl std::task::Wake for Unpark {
            fn wake(self: Arc<Self>) {
                self.0.unpark();
            }
        }
        let waker = std::task::Waker::from(Arc::new(Unpark(std::thread::current())));
        let mut context = std::task::Context::from_waker(&waker);
        let mut future = std::pin::pin!(future);
        let mut watch = Watch::new(&self.logs, &self.names, self.step);
        loop {
            if let std::task::Poll::Ready(output) = future.as_mut().poll(&mut context) {
                return output;
            }
            if let Some(stall) = watch.stall() {
                return Err(stall);
            }
            each();
            std::thread::park_timeout(std::time::Duration::from_secs_f64(INTERVAL));
        }
    }
}

/// How long each rank has made no progress while somebody was awake to see it.
#[derive(Clone)]
struct Patience {
    /// When the last look was.
    looked: f64,
    /// Seconds awake up to then.
    awake: f64,
    /// For each rank its last sign of progress, and `awake` when that was seen.
    seen: Vec<(f64, f64)>,
}

impl Patience {
    fn new(now: f64) -> Patience {
        Patience { looked: now, awake: 0.0, seen: Vec::new() }
    }

    /// Takes the time of each rank's last sign of progress, and gives the seconds awake since it was seen.
    fn look(&mut self, now: f64, beats: impl Iterator<Item = f64>) -> Vec<f64> {
        self.awake += (now - self.looked).min(AWAKE);
        self.looked = now;
        let mut idle = Vec::new();
        for (rank, beat) in beats.enumerate() {
            match self.seen.get_mut(rank) {
                Some(seen) if seen.0 == beat => {}
                Some(seen) => *seen = (beat, self.awake),
                None => self.seen.push((beat, self.awake)),
            }
            idle.push(self.awake - self.seen[rank].1);
        }
        idle
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks at two ranks every `INTERVAL` for some seconds, of which the first makes progress.
    fn watch(patience: &mut Patience, start: f64, seconds: f64) -> Vec<f64> {
        let looks = (seconds / INTERVAL).round() as usize;
        (0..=looks).fold(Vec::new(), |_, look| {
            let now = start + look as f64 * INTERVAL;
            patience.look(now, [now, 0.0].into_iter())
        })
    }

    #[test]
    fn a_rank_without_progress_is_idle_for_as_long_as_it_was_watched() {
        let idle = watch(&mut Patience::new(100.0), 100.0, 26.0);
        assert!(idle[0] == 0.0 && (idle[1] - 26.0).abs() < 1e-6, "{idle:?}");
    }

    #[test]
    fn time_in_which_the_watcher_itself_was_stopped_does_not_count() {
        let mut patience = Patience::new(0.0);
        watch(&mut patience, 0.0, 10.0);
        let idle = watch(&mut patience, 8.0 * 3600.0, 10.0);
        assert!((idle[1] - 20.0 - AWAKE).abs() < 1e-6, "{idle:?}");
        let idle = watch(&mut patience, 9.0 * 3600.0, 10.0);
        assert!(idle[1] > STALL_SECONDS, "stops do not hide a stall for ever: {idle:?}");
    }
}
