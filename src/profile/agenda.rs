//! What is still to be measured, and about how long that takes: by how long it took so far.

use std::collections::HashMap;

use super::pair::{LONG_TURNS, TURN, TURNS};
use super::probe::STEPS;
use super::{Remaining, SECONDS, is_too_long};

/// One measurement.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Task {
    /// Layers on a device, for microbatches of so many sequences; I and W apart, or together.
    Layers { device: usize, size: usize, split: bool },
    /// The ways between two devices.
    Links { pair: (usize, usize), size: usize },
    /// How much two devices slow each other down.
    Slowdown { pair: (usize, usize), size: usize },
}

/// Measurements that are to come, and what those that were took.
#[derive(Debug, Default)]
pub(super) struct Agenda {
    tasks: Vec<Task>,
    /// Those that are over: made, or left out since the first began.
    done: usize,
    has_begun: bool,
    /// Seconds of a step for a microbatch of one sequence on each device that was measured: of a probe's, and of what two
    /// devices do side by side.
    steps: HashMap<usize, (f64, f64)>,
    /// The device that was measured last.
    last: Option<usize>,
    /// Seconds of the last probe beside its steps: it compiles and sets weights.
    beside: f64,
    links: Option<f64>,
    slowdown: Option<f64>,
}

impl Agenda {
    pub(super) fn new(tasks: Vec<Task>) -> Agenda {
        Agenda { tasks, ..Agenda::default() }
    }

    /// How many there are in all, this one included. Those that are left out count too, so that it stays what it was.
    pub(super) fn count(&self) -> usize {
        self.done + self.tasks.len()
    }

    /// Makes this one the next, also if nobody expected it; and says which number it has.
    pub(super) fn begin(&mut self, task: Task) -> usize {
        self.has_begun = true;
        self.tasks.retain(|other| *other != task);
        self.tasks.insert(0, task);
        self.done + 1
    }

    /// So many seconds of the next one are over before the steps that count.
    pub(super) fn ready(&mut self, seconds: f64) {
        self.beside = seconds;
    }

    /// The next one has been done in so many seconds.
    pub(super) fn end(&mut self, seconds: f64) {
        if self.tasks.is_empty() {
            return;
        }
        match self.tasks.remove(0) {
            task @ Task::Layers { .. } => {
                self.beside = (seconds - self.measuring(task).unwrap_or(0.0)).max(0.0);
            }
            Task::Links { .. } => self.links = Some(seconds),
            Task::Slowdown { .. } => self.slowdown = Some(seconds),
        }
        self.done += 1;
    }

    /// What steps for a microbatch of one sequence take on a device: a probe's, and one of what runs side by side.
    pub(super) fn hear(&mut self, device: usize, step: f64, pair: f64) {
        self.last = Some(device);
        self.steps.insert(device, (step, pair));
    }

    /// These need not be measured after all.
    pub(super) fn leave_out(&mut self, is_left_out: impl Fn(Task) -> bool) {
        let before = self.tasks.len();
        self.tasks.retain(|&task| !is_left_out(task));
        if self.has_begun {
            self.done += before - self.tasks.len();
        }
    }

    /// Seconds that are left of the next one and of those after it; none before there is something to go by.
    pub(super) fn remaining(&self) -> Option<Remaining> {
        let (first, later) = self.tasks.split_first()?;
        let mut met: Vec<usize> = self.steps.keys().copied().collect();
        let needed = later.iter().filter(|&&task| {
            let Task::Layers { device, .. } = task else { return true };
            let is_first = !met.contains(&device);
            met.push(device);
            is_first || !self.is_too_long(task)
        });
        let later = needed.map(|&task| self.expected(task)).sum::<Option<f64>>()?;
        Some(Remaining { this: self.expected(*first)?, later })
    }

    /// Whether a measurement of a device will be left out, unless it is the device's first.
    fn is_too_long(&self, task: Task) -> bool {
        let Task::Layers { device, size, .. } = task else { return false };
        self.steps_of(device).is_some_and(|(step, _)| is_too_long(step * size as f64))
    }

    /// What is not known of a device is taken for what the last one took.
    fn steps_of(&self, device: usize) -> Option<(f64, f64)> {
        self.steps.get(&device).or_else(|| self.steps.get(&self.last?)).copied()
    }

    fn expected(&self, task: Task) -> Option<f64> {
        let measuring = self.measuring(task)?;
        Some(match task {
            Task::Layers { .. } => self.beside + measuring,
            Task::Links { .. } => self.links.unwrap_or(measuring),
            Task::Slowdown { .. } => self.slowdown.unwrap_or(measuring),
        })
    }

    /// Seconds of steps alone.
    fn measuring(&self, task: Task) -> Option<f64> {
        // A warm-up, and as many as time allows.
        let for_seconds = |step: f64, seconds: f64| (STEPS as f64 * step).min(seconds).max(2.0 * step);
        let slowest = self.steps.values().map(|&(_, pair)| pair).fold(0.0, f64::max);
        Some(match task {
            Task::Layers { device, size, .. } => for_seconds(self.steps_of(device)?.0 * size as f64, SECONDS),
            Task::Links { size, .. } => {
                self.last?;
                for_seconds(2.0 * slowest * size as f64, SECONDS)
            }
            Task::Slowdown { size, .. } => {
                self.last?;
                let step = slowest * size as f64;
                // Each alone, then both, which takes twice as long where they share something.
                let turn = 2.0 * TURN.max(step) + TURN.max(2.0 * step);
                let turns = ((LONG_TURNS / turn).floor() + 1.0).clamp(2.0, TURNS as f64);
                2.0 * step + turn * turns
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layers(device: usize, size: usize) -> [Task; 2] {
        [true, false].map(|split| Task::Layers { device, size, split })
    }

    fn total(agenda: &Agenda) -> f64 {
        agenda.remaining().map_or(f64::NAN, |left| left.this + left.later)
    }

    #[test]
    fn nothing_is_said_of_the_time_left_before_a_step_was_seen() {
        let tasks: Vec<Task> = [layers(0, 1), layers(0, 8)].concat();
        let mut agenda = Agenda::new(tasks.clone());
        assert_eq!((agenda.begin(tasks[0]), agenda.count()), (1, 4));
        assert_eq!(agenda.remaining(), None);
        agenda.hear(0, 2.0, 0.5);
        agenda.end(10.0);
        assert_eq!((agenda.begin(tasks[1]), agenda.count()), (2, 4));
        // Two steps of 2 s, 6 s beside them; the others would take too long.
        let left = agenda.remaining().unwrap();
        assert!((left.this - 10.0).abs() < 1e-9 && left.later == 0.0, "{left:?}");
        // Shorter ones: 1.2 s of them; then twice two of 2 s.
        agenda.hear(0, 0.25, 0.1);
        let left = agenda.remaining().unwrap();
        assert!((left.this - 7.2).abs() < 1e-9 && (left.later - 20.0).abs() < 1e-9, "{left:?}");
    }

    #[test]
    fn of_long_steps_nothing_but_the_first_measurement_is_waited_for() {
        let tasks: Vec<Task> = [layers(0, 1), layers(0, 8)].concat();
        let mut agenda = Agenda::new(tasks.clone());
        agenda.begin(tasks[0]);
        agenda.ready(3.0);
        // In the middle of the first step.
        agenda.hear(0, 10.0, 1.0);
        assert_eq!(agenda.remaining(), Some(Remaining { this: 23.0, later: 0.0 }));
    }

    #[test]
    fn a_device_that_nobody_has_seen_is_expected_to_be_left_alone_after_its_first_long_step_too() {
        let tasks: Vec<Task> = [layers(0, 1), layers(0, 8), layers(1, 1), layers(1, 8)].concat();
        let mut agenda = Agenda::new(tasks.clone());
        agenda.begin(tasks[0]);
        agenda.ready(3.0);
        agenda.hear(0, 10.0, 1.0);
        // One measurement of each device, of 3 s and two steps of 10 s.
        assert_eq!(agenda.remaining(), Some(Remaining { this: 23.0, later: 23.0 }));
    }

    #[test]
    fn what_is_seen_corrects_what_was_expected() {
        let tasks: Vec<Task> = [layers(0, 1), layers(0, 2), layers(1, 1)].concat();
        let mut agenda = Agenda::new(tasks.clone());
        agenda.begin(tasks[0]);
        agenda.hear(0, 0.001, 0.001);
        agenda.end(1.0);
        agenda.begin(tasks[1]);
        // Short steps: what is beside them counts.
        assert!((total(&agenda) - 5.0).abs() < 0.1, "{}", total(&agenda));
        agenda.end(3.0);
        assert!(total(&agenda) > 11.0, "{}", total(&agenda));
        // The other size is priced by a law: how many there are stays what was said.
        agenda.leave_out(|task| matches!(task, Task::Layers { size: 2, .. }));
        assert_eq!(agenda.count(), 6);
        assert!((total(&agenda) - 6.0).abs() < 0.1, "{}", total(&agenda));
        // A device that is slower than the first.
        assert_eq!(agenda.begin(tasks[4]), 5);
        agenda.hear(1, 5.0, 5.0);
        agenda.end(12.0);
        assert!((total(&agenda) - 12.0).abs() < 1e-9, "{}", total(&agenda));
    }

    #[test]
    fn what_is_left_out_before_the_first_begins_was_never_one_of_them() {
        let tasks: Vec<Task> = [layers(0, 1), layers(1, 1)].concat();
        let mut agenda = Agenda::new(tasks.clone());
        agenda.leave_out(|task| matches!(task, Task::Layers { device: 0, .. }));
        assert_eq!((agenda.begin(tasks[2]), agenda.count()), (1, 2));
    }

    #[test]
    fn a_measurement_that_nobody_expected_counts_too() {
        let mut agenda = Agenda::new(Vec::new());
        let task = layers(0, 1)[0];
        assert_eq!((agenda.begin(task), agenda.count()), (1, 1));
        agenda.end(1.0);
        assert_eq!((agenda.begin(task), agenda.count()), (2, 2));
    }

    #[test]
    fn pairs_take_what_a_pair_took() {
        let pair = |pair| [Task::Links { pair, size: 1 }, Task::Slowdown { pair, size: 1 }];
        let tasks = [layers(0, 1), pair((0, 1)), pair((0, 2))].concat();
        let mut agenda = Agenda::new(tasks.clone());
        agenda.begin(tasks[0]);
        agenda.hear(0, 0.4, 0.1);
        agenda.end(2.0);
        agenda.leave_out(|task| matches!(task, Task::Layers { .. }));
        assert!(total(&agenda) > 10.0, "{}", total(&agenda));
        for (task, seconds) in pair((0, 1)).into_iter().zip([3.0, 9.0]) {
            agenda.begin(task);
            agenda.end(seconds);
        }
        assert_eq!((total(&agenda), agenda.count()), (12.0, 6));
    }
}
