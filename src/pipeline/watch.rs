//! Notices a device that no longer gets on.

use std::sync::Arc;

use super::log::{Log, State};
use crate::error::Error;
#[cfg(not(target_arch = "wasm32"))]
use crate::error::Result;
use crate::schedule::Action;

/// Seconds without progress after which a device counts as stalled.
const STALL_SECONDS: f64 = 25.0;

/// Sees what every rank is doing.
#[derive(Clone)]
pub struct Watch {
    logs: Vec<Arc<Log>>,
    names: Vec<String>,
}

impl Watch {
    pub(super) fn new(logs: &[Arc<Log>], names: &[String]) -> Watch {
        Watch { logs: logs.to_vec(), names: names.to_vec() }
    }

    /// The rank that has made no progress for too long, if any: one whose device works rather than one that waits
    /// for it.
    pub fn stall(&self) -> Option<Error> {
        let standings: Vec<_> = self.logs.iter().map(|log| log.standing()).collect();
        let stuck = |state: State| standings.iter().position(|s| s.0 == state && s.1 > STALL_SECONDS);
        let all_wait = standings.iter().all(|s| s.0 != State::Working);
        let rank = stuck(State::Working).or_else(|| all_wait.then(|| stuck(State::Waiting)).flatten())?;
        let (state, seconds, doing) = &standings[rank];
        let doing = match doing.parse::<Action>() {
            Ok(a) => format!("action {doing} (stage {}, microbatch {})", a.stage, a.microbatch),
            Err(_) => format!("action {doing:?}"),
        };
        let what = if *state == State::Waiting { "has waited for" } else { "has not finished" };
        let message = format!(
            "device {rank} ({}) {what} {doing} for {seconds:.0} s; its driver does not return",
            self.names[rank]
        );
        Some(Error::Stall { message })
    }

    /// Runs a future on this thread, looking for stalls: the explicit blocking wrapper for native programs.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn block_on<T>(&self, future: impl Future<Output = Result<T>>) -> Result<T> {
        struct Unpark(std::thread::Thread);
        impl std::task::Wake for Unpark {
            fn wake(self: Arc<Self>) {
                self.0.unpark();
            }
        }
        let waker = std::task::Waker::from(Arc::new(Unpark(std::thread::current())));
        let mut context = std::task::Context::from_waker(&waker);
        let mut future = std::pin::pin!(future);
        loop {
            if let std::task::Poll::Ready(output) = future.as_mut().poll(&mut context) {
                return output;
            }
            if let Some(stall) = self.stall() {
                return Err(stall);
            }
            std::thread::park_timeout(std::time::Duration::from_millis(200));
        }
    }
}
