//! What a comparison says in words. Every number is measured, or predicted and called so. What would be better is not for
//! a comparison to say: that is the planner's business.

use super::axis::duration;
use super::comparison::{ActionTime, Comparison, difference, percent};
use super::step::Step;
use crate::schedule::{Action, Cause, Gap, Kind};

/// Shares of a step below this are not worth a sentence.
const WORTH: f64 = 0.02;
/// Shares of a step from which something should be done.
const MUCH: f64 = 0.05;
/// Sentences about single waits.
const WAITS: usize = 3;
/// A device that computes for less than this part of a step hardly works.
const IDLE: f64 = 0.05;

impl Comparison {
    /// The step's time, predicted and measured, in one line.
    pub fn summary(&self) -> String {
        let measured = duration(self.measured.seconds);
        match (&self.predicted, self.error()) {
            (Some(predicted), Some(error)) => {
                let predicted = duration(predicted.expected);
                format!("predicted {predicted}, measured {measured} a step: {}", longer(error))
            }
            _ => format!("measured {measured} a step; there is no prediction"),
        }
    }

    /// Where the time goes and what dominates, most important first.
    pub fn findings(&self) -> Vec<String> {
        let step = &self.measured;
        let mut findings = vec![self.shares_in_words()];
        let loads = loads(step);
        if let (Some(&(most, load)), Some(&(_, next))) = (loads.last(), loads.iter().nth_back(1))
            && load - next > WORTH * step.seconds
        {
            let share = percent(load / step.seconds);
            let most = self.number(most);
            findings.push(format!(
                "device {most} computes {share} of the step, more than any other: it sets the pace"
            ));
        }
        let mut waits = waits(step);
        waits.retain(|wait| wait.end > WORTH * step.seconds);
        findings.extend(waits.iter().take(WAITS).map(|wait| {
            let (rank, share) = (self.number(wait.rank), percent(wait.end / step.seconds));
            let peer = wait.peer.map_or("another device".into(), |peer| format!("device {}", self.number(peer)));
            let time = duration(wait.end);
            match wait.cause {
                Cause::WarmUp => format!("device {rank} waits {share} of the step ({time}) for its first microbatch: warm-up"),
                Cause::Drain => format!("device {rank} has nothing left to do for the last {time} ({share} of the step): drain"),
                Cause::Imbalance => format!("device {rank} waits {share} of the step ({time}) for {peer} to compute: imbalance"),
                Cause::Link => format!("device {rank} waits {share} of the step ({time}) for tensors on their way from {peer}: link"),
                Cause::Host => format!("device {rank} stands still for {share} of the step ({time}) although its work is there: host"),
            }
        }));
        findings.extend((0..self.ranks()).filter_map(|rank| self.no_gradients(rank)));
        findings.extend(self.wrong_stages().into_iter().take(2));
        findings
    }

    /// Why a device is idle at another time than was predicted: where nothing is trained, no gradient comes back.
    fn no_gradients(&self, rank: usize) -> Option<String> {
        let (predicted, measured) = (self.predicted.as_ref()?, &self.measured);
        let much = |step: &Step, cause: Cause| cause.seconds(&step.idle[rank]) > MUCH * step.seconds;
        if !much(predicted, Cause::Imbalance) || !much(measured, Cause::Drain) {
            return None;
        }
        // What stands at the end of its list is done before that from which a gradient would come.
        let last = measured.of(rank).last().filter(|cell| matches!(cell.action.kind, Kind::B | Kind::I))?;
        let next = measured.cells.iter().find(|cell| {
            let Action { stage, kind, microbatch } = cell.action;
            (stage, microbatch) == (last.action.stage + 1, last.action.microbatch)
                && matches!(kind, Kind::B | Kind::I)
        })?;
        (last.start < next.end).then(|| {
            format!(
                "device {} trains nothing, so no gradient comes back to it: it is done after its forward passes \
                 (drain), while the prediction has it wait until the end (imbalance)",
                self.number(rank)
            )
        })
    }

    /// What a larger part of the devices' time goes to, and what that part depends on, each a sentence; none promises
    /// anything. `sequences` is how many a microbatch has, if that is known.
    pub fn hints(&self, sequences: Option<usize>) -> Vec<String> {
        let step = &self.measured;
        // No other number of microbatches gives work to a device that has none.
        let (working, _) = self.working();
        let share = |causes: &[Cause]| {
            let all = working.iter().flat_map(|&rank| causes.iter().map(move |cause| (rank, cause)));
            let all: f64 = all.map(|(rank, cause)| cause.seconds(&step.idle[rank])).sum();
            all / (step.seconds * working.len() as f64).max(f64::MIN_POSITIVE)
        };
        let microbatches = step.schedule.microbatches;
        let mut hints = Vec::new();
        let link = share(&[Cause::Link]);
        if link > MUCH {
            hints.push(format!(
                "devices wait for tensors on their way for {} of the time, which is the most that faster links could \
                 save",
                percent(link)
            ));
        }
        let ends = share(&[Cause::WarmUp, Cause::Drain]);
        if ends > 2.0 * MUCH && sequences.is_some_and(|sequences| sequences > 1) {
            hints.push(format!(
                "warm-up and drain take {} of the devices' time; that share falls with more microbatches in a step \
                 (pipeline.microbatches, now {microbatches}), though smaller ones may compute less efficiently",
                percent(ends)
            ));
        }
        let host = share(&[Cause::Host]);
        if host > MUCH && microbatches > 1 {
            hints.push(format!(
                "devices stand still for {} of the time although their work is there; such gaps come with every \
                 action, and fewer, larger microbatches (pipeline.microbatches, now {microbatches}) have fewer of them, \
                 but a longer warm-up",
                percent(host)
            ));
        }
        hints
    }

    /// The devices without which the plan could do, each a sentence.
    pub fn spare(&self) -> Vec<String> {
        let (working, idle) = self.working();
        let idle = idle.into_iter().filter(|_| !working.is_empty()).map(|rank| {
            format!(
                "{} computes for {} of the step: cut as it is, the model could do without it, if the others have room \
                 for its layers (--devices names those that may be used)",
                self.measured.timeline.device(rank),
                percent(self.measured.computing(rank) / self.measured.seconds.max(f64::MIN_POSITIVE))
            )
        });
        idle.collect()
    }

    /// The ranks that work, and those that hardly do.
    fn working(&self) -> (Vec<usize>, Vec<usize>) {
        let step = &self.measured;
        (0..self.ranks()).partition(|&rank| step.computing(rank) >= IDLE * step.seconds)
    }

    /// The stages of which the prediction was wrong by more than a little of the step, the most wrong first.
    fn wrong_stages(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        for stage in 0..self.measured.schedule.stages {
            let actions: Vec<&ActionTime> =
                self.actions.iter().filter(|a| a.stage == stage && a.predicted.is_some()).collect();
            let sum = |seconds: fn(&ActionTime) -> f64| -> f64 {
                actions.iter().map(|a| seconds(a) * a.count as f64).sum()
            };
            let (predicted, measured) = (sum(|a| a.predicted.unwrap_or(0.0)), sum(|a| a.measured));
            if (measured - predicted).abs() <= WORTH * self.measured.seconds || predicted <= 0.0 {
                continue;
            }
            let kinds = actions.iter().filter_map(|a| Some(format!("{} {}", a.kind, difference(a.error()?))));
            let text = format!(
                "stage {stage} on device {} computed {} in the step instead of {}, {} ({})",
                self.number(actions[0].rank),
                duration(measured),
                duration(predicted),
                longer(measured / predicted - 1.0),
                kinds.collect::<Vec<_>>().join(", ")
            );
            wrong.push(((measured - predicted).abs(), text));
        }
        wrong.sort_by(|a, b| b.0.total_cmp(&a.0));
        wrong.into_iter().map(|(_, text)| text).collect()
    }

    fn shares_in_words(&self) -> String {
        let step = &self.measured;
        let all = step.seconds * self.ranks() as f64;
        let share =
            |of: &dyn Fn(usize) -> f64| (0..self.ranks()).map(of).sum::<f64>() / all.max(f64::MIN_POSITIVE);
        let named = |at: usize| (step.parts(0)[at].0, share(&|rank| step.parts(rank)[at].1));
        let (_, computing) = named(0);
        let mut parts: Vec<(&str, f64)> = (1..7).map(named).filter(|part| part.1 >= 0.0005).collect();
        parts.sort_by(|a, b| b.1.total_cmp(&a.1));
        let parts: Vec<String> =
            parts.iter().map(|(name, share)| format!("{name} {}", percent(*share))).collect();
        let who = if self.ranks() == 1 { "the device computes" } else { "the devices compute" };
        let parts = if parts.is_empty() { "nothing".into() } else { parts.join(", ") };
        format!("{who} {} of the time; the rest is {parts}", percent(computing))
    }
}

/// The devices with the seconds they compute, least first.
fn loads(step: &Step) -> Vec<(usize, f64)> {
    let mut loads: Vec<(usize, f64)> =
        (0..step.idle.len()).map(|rank| (rank, step.computing(rank))).collect();
    loads.sort_by(|a, b| a.1.total_cmp(&b.1));
    loads
}

/// The gaps of a device added up by cause and peer, longest first: each starts at 0 and ends at its seconds.
fn waits(step: &Step) -> Vec<Gap> {
    let mut waits: Vec<Gap> = Vec::new();
    for gap in &step.gaps {
        let seconds = gap.end - gap.start;
        let same = |wait: &&mut Gap| (wait.rank, wait.cause, wait.peer) == (gap.rank, gap.cause, gap.peer);
        match waits.iter_mut().find(same) {
            Some(wait) => wait.end += seconds,
            None => waits.push(Gap { start: 0.0, end: seconds, ..*gap }),
        }
    }
    waits.sort_by(|a, b| b.end.total_cmp(&a.end));
    waits
}

fn longer(error: f64) -> String {
    if error >= 0.0 {
        format!("{} longer than predicted", percent(error))
    } else {
        format!("{} shorter than predicted", percent(-error))
    }
}
