//! How far the measurement of this machine is.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use super::clock;
use super::progress::{Display, View};
use crate::plan::text::counted;
use crate::profile::{Progress, Remaining};

/// Shows what a profiler says until it is dropped.
pub(super) struct Measuring {
    state: Arc<Mutex<State>>,
    display: Display,
    /// Where results are kept.
    kept: Option<PathBuf>,
}

#[derive(Default)]
struct State {
    what: String,
    number: usize,
    count: usize,
    remaining: Option<Remaining>,
    /// When this measurement began, and when the first did.
    since: Option<Instant>,
    begun: Option<Instant>,
    /// The part of the cores that others take while it waits for quiet.
    others: Option<f64>,
}

impl Measuring {
    pub(super) fn new(kept: Option<PathBuf>) -> Measuring {
        let state = Arc::new(Mutex::new(State::default()));
        let seen = state.clone();
        let display = Display::new(move || {
            let state = lock(&seen);
            let [this, all] = [state.since, state.begun].map(seconds_since);
            state.view(this, all)
        });
        Measuring { state, display, kept }
    }

    /// Hears how it goes.
    pub(super) fn hear(&mut self, progress: Progress) {
        match progress {
            Progress::Planned(count) => self.display.note(planned(count, self.kept.as_ref())),
            Progress::Measuring { what, number, count, remaining } => {
                let mut state = lock(&self.state);
                if state.number != number {
                    state.since = Some(Instant::now());
                }
                let (what, since) = (what.to_string(), state.since);
                let begun = state.begun.or(since);
                *state = State { what, number, count, remaining, since, begun, others: None };
            }
            Progress::Waiting(others) => lock(&self.state).others = Some(others),
            Progress::Step => return,
        }
        self.display.draw();
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn seconds_since(moment: Option<Instant>) -> f64 {
    moment.map_or(0.0, |moment| moment.elapsed().as_secs_f64())
}

/// What is said before the first measurement.
fn planned(count: usize, kept: Option<&PathBuf>) -> String {
    let kept = kept.map_or("not kept".into(), |folder| format!("kept in {}", folder.display()));
    format!(
        "measuring this machine for the planner: {} of about a second each, longer where steps are, fewer where \
         one shows what another would; {kept}",
        counted(count, "measurement")
    )
}

impl State {
    /// What to show so many seconds after the measurement began, and after the first of all did.
    fn view(&self, elapsed: f64, since_first: f64) -> View {
        let left = self.remaining.map(|Remaining { this, later }| (this - elapsed).max(0.0) + later);
        // Of this measurement: nothing until something is known.
        let own = self.remaining.map_or(0.0, |Remaining { this, .. }| (elapsed / this.max(1e-3)).min(0.95));
        let part = (self.number as f64 - 1.0 + own) / self.count.max(1) as f64;
        let place =
            if self.number > 0 { format!(", {} of {}", self.number, self.count) } else { String::new() };
        let line = match (self.others, self.number) {
            (Some(others), _) => {
                let taken = format!("other programs take {:.0} % of the cores", 100.0 * others);
                return View { part: part.max(0.0), line: format!("waiting for quiet: {taken}{place}") };
            }
            (None, 0) => String::new(),
            (None, _) => {
                let left = left.map_or(String::new(), about);
                format!("measuring {}{place}, {} elapsed{left}", self.what, clock(since_first))
            }
        };
        View { part: part.max(0.0), line }
    }
}

fn about(seconds: f64) -> String {
    match seconds {
        ..1.0 => String::new(),
        1.0..100.0 => format!(", about {seconds:.0} s left"),
        _ => format!(", about {:.0} min left", seconds / 60.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_what_which_of_how_many_and_how_long_as_soon_as_that_is_known() {
        let state =
            State { what: "llvmpipe: 1 x 128 tokens".into(), number: 3, count: 12, ..State::default() };
        assert_eq!(state.view(9.0, 20.0).line, "measuring llvmpipe: 1 x 128 tokens, 3 of 12, 0:20 elapsed");
        let known = State { remaining: Some(Remaining { this: 10.0, later: 36.0 }), ..state };
        let view = known.view(6.0, 61.0);
        assert_eq!(view.line, "measuring llvmpipe: 1 x 128 tokens, 3 of 12, 1:01 elapsed, about 40 s left");
        assert!((view.part - 2.6 / 12.0).abs() < 1e-9, "{}", view.part);
        assert!(known.view(99.0, 99.0).line.ends_with("about 36 s left"));
        let waiting = State { others: Some(0.4), ..known };
        let line = "waiting for quiet: other programs take 40 % of the cores, 3 of 12";
        assert_eq!(waiting.view(1.0, 1.0).line, line);
        assert_eq!(State::default().view(1.0, 1.0), View::default());
        assert_eq!(about(150.0), ", about 2 min left");
    }
}
