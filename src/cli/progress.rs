//! How far something is, for people: on a terminal a bar that stays where it is, elsewhere a line now and then.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{clock, note};

/// Seconds between two drawings, so that clocks go on while nothing else does.
const TICK: Duration = Duration::from_millis(500);
/// Into how many parts a bar is divided.
const PARTS: u64 = 10_000;
/// Seconds between two lines where there is no terminal.
const PAUSE: f64 = 10.0;

/// What is shown of some work.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct View {
    /// How much of it is done, 0 to 1.
    pub(super) part: f64,
    /// The same in words; nothing is shown while it is empty.
    pub(super) line: String,
}

/// Shows some work until it is dropped. It looks by itself, several times a second.
pub(super) struct Display(Arc<Mutex<Shown>>);

struct Shown {
    bar: ProgressBar,
    look: Box<dyn Fn() -> View + Send>,
    /// When a line was last printed where there is no terminal, and after how many seconds the next is.
    printed: Instant,
    pause: f64,
    /// That line: what has not changed is not said twice.
    last: String,
}

impl Display {
    /// Shows what `look` says.
    pub(super) fn new(look: impl Fn() -> View + Send + 'static) -> Display {
        Display::with_pause(PAUSE, look)
    }

    /// The same with another pause between two lines where there is no terminal.
    pub(super) fn with_pause(pause: f64, look: impl Fn() -> View + Send + 'static) -> Display {
        let bar = ProgressBar::with_draw_target(Some(PARTS), ProgressDrawTarget::stderr());
        let style = ProgressStyle::with_template("{wide_bar:.cyan/dim} {msg}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        let shown = Shown { bar, look: Box::new(look), printed: Instant::now(), pause, last: String::new() };
        let shown = Arc::new(Mutex::new(shown));
        let seen = Arc::downgrade(&shown);
        std::thread::spawn(move || {
            while let Some(shown) = seen.upgrade() {
                lock(&shown).tick();
                drop(shown);
                std::thread::sleep(TICK);
            }
        });
        Display(shown)
    }

    /// Draws at once.
    pub(super) fn draw(&self) {
        lock(&self.0).draw();
    }

    /// Prints a line where there is no terminal, if the last is so many seconds ago.
    pub(super) fn line(&self, seconds: f64) {
        let mut shown = lock(&self.0);
        if shown.printed.elapsed().as_secs_f64() >= seconds {
            shown.print();
        }
    }

    /// Says something above the bar.
    pub(super) fn note(&self, text: impl std::fmt::Display) {
        lock(&self.0).bar.suspend(|| note(text));
    }

    /// Leaves the bar where it is, as the last word about work that has failed.
    pub(super) fn abandon(&self) {
        lock(&self.0).bar.abandon();
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        let shown = lock(&self.0);
        if !shown.bar.is_finished() {
            shown.bar.finish_and_clear();
        }
    }
}

impl Shown {
    fn tick(&mut self) {
        self.draw();
        if self.printed.elapsed().as_secs_f64() >= self.pause {
            self.print();
        }
    }

    fn draw(&self) {
        if self.bar.is_hidden() || self.bar.is_finished() {
            return;
        }
        let View { part, line } = (self.look)();
        if !line.is_empty() {
            self.bar.set_message(line);
            self.bar.set_position((part.clamp(0.0, 1.0) * PARTS as f64) as u64);
            self.bar.tick();
        }
    }

    fn print(&mut self) {
        let line = if self.bar.is_hidden() { (self.look)().line } else { String::new() };
        if !line.is_empty() && line != self.last {
            self.printed = Instant::now();
            note(&line);
            self.last = line;
        }
    }
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Work of equal parts, of which so many are done.
pub(super) struct Counter {
    state: Arc<Mutex<Count>>,
    /// Shows it while this is there.
    _display: Display,
}

struct Count {
    done: u64,
    all: u64,
    pace: Pace,
}

impl Counter {
    /// `words` says how far it is: done, of all.
    pub(super) fn new(all: u64, words: impl Fn(u64, u64) -> String + Send + 'static) -> Counter {
        let state = Arc::new(Mutex::new(Count { done: 0, all, pace: Pace::default() }));
        let (seen, started) = (state.clone(), Instant::now());
        let display = Display::new(move || {
            let count = lock(&seen);
            let left = count.pace.left(count.all, seconds());
            let left = left.map_or(String::new(), |left| format!(", {} left", clock(left)));
            let elapsed = clock(started.elapsed().as_secs_f64());
            let line = format!("{}  {elapsed} elapsed{left}", words(count.done, count.all));
            View { part: count.done as f64 / count.all.max(1) as f64, line }
        });
        Counter { state, _display: display }
    }

    /// So many are done.
    pub(super) fn done(&self, done: u64) {
        let mut count = lock(&self.state);
        count.done = done;
        count.pace.hear(done, seconds());
    }

    /// So many of so many are done.
    pub(super) fn done_of(&self, done: u64, all: u64) {
        lock(&self.state).all = all;
        self.done(done);
    }

    /// One more is done.
    pub(super) fn one_more(&self) {
        let done = lock(&self.state).done + 1;
        self.done(done);
    }
}

/// Seconds by the program's clock.
fn seconds() -> f64 {
    crate::gpu::now()
}

/// How fast equal parts get done, by when they were reported. What comes before the first report is not theirs.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Pace {
    /// Parts done at a moment.
    first: Option<(u64, f64)>,
    last: Option<(u64, f64)>,
}

impl Pace {
    fn hear(&mut self, done: u64, now: f64) {
        self.first.get_or_insert((done, now));
        self.last = Some((done, now));
    }

    /// Seconds until all are done; none before there is something to go by.
    fn left(&self, all: u64, now: f64) -> Option<f64> {
        let ((from, start), (to, end)) = (self.first?, self.last?);
        let each = (to > from).then(|| (end - start) / (to - from) as f64)?;
        Some((each * all.saturating_sub(to) as f64 - (now - end)).max(0.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_said_of_the_time_left_before_there_is_a_pace_to_go_by() {
        let mut pace = Pace::default();
        assert_eq!(pace.left(10, 5.0), None);
        // The first part also compiles: 60 seconds of which no other part knows.
        pace.hear(1, 60.0);
        assert_eq!(pace.left(10, 61.0), None);
        pace.hear(3, 64.0);
        assert_eq!(pace.left(10, 64.0), Some(14.0));
        // The clock goes on between two reports, but not below nothing.
        assert_eq!(pace.left(10, 68.0), Some(10.0));
        assert_eq!(pace.left(10, 99.0), Some(0.0));
        assert_eq!(pace.left(3, 64.0), Some(0.0));
    }
}
