//! How far a run is, and how long it still takes.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use crate::cli::progress::{Display, View};
use crate::cli::records::Evaluated;
use crate::cli::{clock, show_count};
use crate::pipeline::Watch;
use crate::train::config::Config;
use crate::train::trainer::Row;

/// Seconds between two lines where there is no terminal: at the end of a step, and within a long one.
const PAUSE: f64 = 10.0;
const LONG_PAUSE: f64 = 30.0;
/// Seconds from which on it is shown how far a step is.
const LONG_STEP: f64 = 2.0;

/// How far a run is: on a terminal a bar that stays where it is, elsewhere a line now and then.
pub(super) struct Progress {
    state: Arc<Mutex<State>>,
    display: Display,
}

/// What a run does at the moment.
pub(super) enum Doing {
    /// A step, and how many steps' worth of work the devices had done before it.
    Step(Watch, f64),
    /// An evaluation: sequences done.
    Evaluation(usize, Evaluated),
    /// A checkpoint.
    Save,
}

struct State {
    agenda: Agenda,
    microbatches: usize,
    done: u64,
    /// Loss and tokens a second of the last step.
    last: Option<(f64, f64)>,
    doing: Option<(Doing, Instant)>,
    pace: Pace,
    started: Instant,
}

impl Progress {
    /// For a run that has done so many steps, with the text for its evaluations.
    pub(super) fn new(
        config: &Config,
        done: u64,
        microbatches: usize,
        evaluated: Option<Evaluated>,
    ) -> Progress {
        let agenda = Agenda {
            steps: config.train.steps,
            evaluate_every: evaluated.map(|_| config.train.evaluate_every),
            save_every: config.output.checkpoint_every,
        };
        let evaluation_in_steps = evaluated.map_or(0.0, |text| evaluation_in_steps(config, text));
        let (pace, started) = (Pace { evaluation_in_steps, ..Pace::default() }, Instant::now());
        let state = State { agenda, microbatches, done, last: None, doing: None, pace, started };
        let state = Arc::new(Mutex::new(state));
        let seen = state.clone();
        Progress { state, display: Display::with_pause(LONG_PAUSE, move || lock(&seen).view()) }
    }

    /// A step begins, which this watches.
    pub(super) fn step_begins(&self, watch: Watch) {
        let before = watch.steps();
        self.begin(Doing::Step(watch, before));
    }

    /// Something begins.
    pub(super) fn begin(&self, doing: Doing) {
        lock(&self.state).doing = Some((doing, Instant::now()));
    }

    /// So many sequences of the evaluation are done.
    pub(super) fn evaluating(&self, rows: usize) {
        if let Some((Doing::Evaluation(done, _), _)) = &mut lock(&self.state).doing {
            *done = rows;
        }
    }

    /// An evaluation or a checkpoint has ended.
    pub(super) fn end(&self) {
        let mut state = lock(&self.state);
        let Some((doing, since)) = state.doing.take() else { return };
        let seconds = since.elapsed().as_secs_f64();
        match doing {
            Doing::Step(..) => {}
            Doing::Evaluation(..) => state.pace.evaluation.hear(seconds),
            Doing::Save => state.pace.save.hear(seconds),
        }
    }

    /// A step has ended.
    pub(super) fn step(&self, row: &Row) {
        let mut state = lock(&self.state);
        state.doing = None;
        // The first step of a run takes longer than any other.
        if state.last.replace((row.loss, row.tokens_per_second)).is_some() {
            state.pace.step.hear(row.step_seconds);
        }
        state.done = row.step;
        let is_last = row.step == state.agenda.steps;
        drop(state);
        self.display.line(if is_last { 0.0 } else { PAUSE });
        self.display.draw();
    }

    /// Says something above the line.
    pub(super) fn note(&self, text: impl std::fmt::Display) {
        self.display.note(text);
    }

    /// Leaves the line where it is, as the last word about a run that has failed.
    pub(super) fn abandon(&self) {
        self.display.abandon();
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl State {
    fn view(&self) -> View {
        let (mut part, mut evaluation) = (0.0, 0.0);
        let speed = |tokens: f64| format!("{} tokens/s", show_count(tokens as u64));
        let loss = self.last.map_or(String::new(), |(loss, _)| format!("  loss {loss:.4}"));
        let mut words = loss.clone() + &self.last.map_or(String::new(), |(_, t)| format!("  {}", speed(t)));
        match &self.doing {
            Some((Doing::Step(watch, before), since)) => {
                part = (watch.steps() - before).clamp(0.0, 1.0);
                if since.elapsed().as_secs_f64() >= LONG_STEP {
                    let now = (1 + (part * self.microbatches as f64) as usize).min(self.microbatches);
                    words = format!("{loss}  microbatch {now}/{}", self.microbatches);
                }
            }
            Some((Doing::Evaluation(done, text), _)) => {
                evaluation = 1.0 - *done as f64 / text.rows.max(1) as f64;
                words = format!("  evaluating, {}", text.words(*done));
            }
            Some((Doing::Save, _)) => words += "  saving",
            None => {}
        }
        let steps = self.agenda.steps;
        let mut left = self.agenda.after(self.done);
        left.steps -= part;
        left.evaluations += evaluation;
        let left = self.pace.left(&left).map_or(String::new(), |left| format!(", {} left", clock(left)));
        let elapsed = clock(self.started.elapsed().as_secs_f64());
        View {
            part: (self.done as f64 + part) / steps.max(1) as f64,
            line: format!("step {}/{steps}{words}  {elapsed} elapsed{left}", self.done),
        }
    }
}

/// What a run does in all.
struct Agenda {
    steps: u64,
    /// Steps from one evaluation to the next; none without a text for it.
    evaluate_every: Option<u64>,
    /// Steps from one checkpoint to the next; 0 for one at the end alone.
    save_every: u64,
}

/// What a run has still to do.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Left {
    steps: f64,
    evaluations: f64,
    saves: f64,
}

impl Agenda {
    /// What is left after so many steps and all that belongs to them.
    fn after(&self, done: u64) -> Left {
        let times = |every: u64| {
            let by = |steps: u64| steps.checked_div(every).unwrap_or(0);
            // The end is one of them in any case.
            let last = u64::from(done < self.steps && (every == 0 || !self.steps.is_multiple_of(every)));
            (by(self.steps).saturating_sub(by(done)) + last) as f64
        };
        Left {
            steps: self.steps.saturating_sub(done) as f64,
            evaluations: self.evaluate_every.map_or(0.0, times),
            saves: times(self.save_every),
        }
    }
}

/// Times of each kind from which the mean is taken: the newest.
const RECENT: usize = 10;

/// Seconds that something took, the newest times.
#[derive(Default)]
struct Recent(VecDeque<f64>);

impl Recent {
    fn hear(&mut self, seconds: f64) {
        self.0.push_back(seconds);
        self.0.drain(..self.0.len().saturating_sub(RECENT));
    }

    fn mean(&self) -> Option<f64> {
        (!self.0.is_empty()).then(|| self.0.iter().sum::<f64>() / self.0.len() as f64)
    }
}

/// What steps, evaluations and checkpoints took so far.
#[derive(Default)]
struct Pace {
    step: Recent,
    evaluation: Recent,
    save: Recent,
    /// What an evaluation is taken for before the first, in steps.
    evaluation_in_steps: f64,
}

impl Pace {
    /// Seconds until the end; none before there is something to go by.
    fn left(&self, left: &Left) -> Option<f64> {
        if left.steps == 0.0 && left.evaluations == 0.0 {
            return None;
        }
        let step = self.step.mean();
        let evaluation = self.evaluation.mean().or(step.map(|step| step * self.evaluation_in_steps));
        let all = |each: Option<f64>, count: f64| if count > 0.0 { Some(each? * count) } else { Some(0.0) };
        // A checkpoint takes moments in most runs; where it does not, the first one shows it.
        let saves = self.save.mean().unwrap_or(0.0) * left.saves;
        Some(all(step, left.steps)? + all(evaluation, left.evaluations)? + saves)
    }
}

/// What evaluating a text takes in steps. It goes forward alone, and so many sequences at a time as a step; going backward
/// takes twice as long or, where an adapter leaves the other weights as they are, as long.
pub(super) fn evaluation_in_steps(config: &Config, text: Evaluated) -> f64 {
    let forward = if config.adapter.is_some() { 1.0 / 2.0 } else { 1.0 / 3.0 };
    forward * text.rows.div_ceil(config.train.batch) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_are_steps_evaluations_and_checkpoints_the_last_of_each_at_the_end() {
        let agenda = Agenda { steps: 100, evaluate_every: Some(30), save_every: 50 };
        let left = |done| agenda.after(done);
        assert_eq!(left(0), Left { steps: 100.0, evaluations: 4.0, saves: 2.0 });
        assert_eq!(left(30), Left { steps: 70.0, evaluations: 3.0, saves: 2.0 });
        assert_eq!(left(99), Left { steps: 1.0, evaluations: 1.0, saves: 1.0 });
        assert_eq!(left(100), Left { steps: 0.0, evaluations: 0.0, saves: 0.0 });
        let agenda = Agenda { steps: 5, evaluate_every: None, save_every: 0 };
        assert_eq!(agenda.after(2), Left { steps: 3.0, evaluations: 0.0, saves: 1.0 });
    }

    #[test]
    fn an_evaluation_counts_as_often_as_it_comes_and_not_once_a_step() {
        let mut pace = Pace { evaluation_in_steps: 5.0, ..Pace::default() };
        let left = Left { steps: 60.0, evaluations: 2.0, saves: 1.0 };
        assert_eq!(pace.left(&left), None);
        [1.0, 3.0].into_iter().for_each(|seconds| pace.step.hear(seconds));
        // Before the first evaluation, by what it has to compute.
        assert_eq!(pace.left(&left), Some(140.0));
        pace.evaluation.hear(50.0);
        assert_eq!(pace.left(&left), Some(220.0));
        pace.save.hear(7.0);
        assert_eq!(pace.left(&left), Some(227.0));
        // In the middle of the last evaluation.
        let end = Left { steps: 0.0, evaluations: 0.5, saves: 1.0 };
        assert_eq!(pace.left(&end), Some(32.0));
        assert_eq!(pace.left(&Left { steps: 0.0, evaluations: 0.0, saves: 0.0 }), None);
    }

    #[test]
    fn the_newest_steps_tell_how_long_the_next_take() {
        let mut pace = Pace::default();
        (0..50).for_each(|_| pace.step.hear(9.0));
        (0..RECENT).for_each(|_| pace.step.hear(1.0));
        let left = Left { steps: 4.0, evaluations: 0.0, saves: 0.0 };
        assert_eq!(pace.left(&left), Some(4.0));
    }
}
