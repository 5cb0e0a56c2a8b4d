//! What a comparison says in words. Every number is measured, or simulated with the measured times and called so.

use super::axis::duration;
use super::comparison::{ActionTime, Comparison, difference, percent};
use super::step::Step;
use crate::schedule::{self, Cause, Costs, Gap, Hops, Kind, RankCost, Schedule, StageCost};

/// Shares of a step below this are not worth a sentence.
const WORTH: f64 = 0.02;
/// Shares of a step from which something should be done.
const MUCH: f64 = 0.05;
/// Sentences about single waits.
const WAITS: usize = 3;

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
            findings.push(format!(
                "device {most} computes {share} of the step, more than any other: it sets the pace"
            ));
        }
        let mut waits = waits(step);
        waits.retain(|wait| wait.end > WORTH * step.seconds);
        findings.extend(waits.iter().take(WAITS).map(|wait| {
            let (rank, share) = (wait.rank, percent(wait.end / step.seconds));
            let (time, peer) = (duration(wait.end), wait.peer.map_or("another device".into(), |p| format!("device {p}")));
            match wait.cause {
                Cause::WarmUp => format!("device {rank} waits {share} of the step ({time}) for its first microbatch: warm-up"),
                Cause::Drain => format!("device {rank} has nothing left to do for the last {time} ({share} of the step): drain"),
                Cause::Imbalance => format!("device {rank} waits {share} of the step ({time}) for {peer} to compute: imbalance"),
                Cause::Link => format!("device {rank} waits {share} of the step ({time}) for tensors on their way from {peer}: link"),
                Cause::Host => format!("device {rank} stands still for {share} of the step ({time}) although its work is there: host"),
            }
        }));
        findings.extend(self.wrong_stages().into_iter().take(2));
        findings
    }

    /// What could be tried, with what it would bring where that can be simulated. May be empty.
    pub fn advice(&self) -> Vec<String> {
        let step = &self.measured;
        let costs = self.fitted_costs();
        let now = simulate(&step.schedule, &costs);
        let gain = |schedule: &Schedule, costs: &Costs| {
            let (now, then) = (now?, simulate(schedule, costs)?);
            (now > 0.0).then(|| 1.0 - then / now).filter(|&gain| gain > WORTH)
        };
        let mut advice = Vec::new();
        let loads = loads(step);
        if let (Some(&(least, low)), Some(&(most, high))) = (loads.first(), loads.last())
            && high - low > MUCH * step.seconds
            && let Some(gain) = gain(&step.schedule, &balanced(&costs, step))
        {
            let mean = loads.iter().map(|(_, load)| load).sum::<f64>() / loads.len() as f64;
            advice.push(format!(
                "device {most} computes {} longer than device {least}: layers worth up to {} a step belong on other \
                 devices, first of all device {least} (pipeline.cuts); with equal loads the step would take {} less \
                 (simulated with the measured times)",
                duration(high - low),
                duration(high - mean),
                percent(gain)
            ));
        }
        let better = self.other_schedules(&costs).filter_map(|s| Some((gain(&s, &costs)?, s)));
        if let Some((gain, schedule)) = better.max_by(|a, b| a.0.total_cmp(&b.0)) {
            let (name, gain) = (&schedule.name, percent(gain));
            advice.push(format!(
                "pipeline.schedule = \"{name}\" would take {gain} less (simulated with the measured times)"
            ));
        }
        let of_all = |causes: &[Cause]| {
            let all = step.idle.iter().flat_map(|idle| causes.iter().map(|cause| cause.seconds(idle)));
            all.sum::<f64>() / (step.seconds * step.idle.len() as f64)
        };
        if self.prediction.is_some() && of_all(&[Cause::Link]) > WORTH {
            let free = Costs { hops: vec![Hops::default(); costs.hops.len()], ..costs.clone() };
            if let Some(gain) = gain(&step.schedule, &free) {
                advice.push(format!(
                    "links that took no time would save {} of the step (simulated with the measured times): the most \
                     that a faster link can bring",
                    percent(gain)
                ));
            }
        }
        let microbatches = step.schedule.microbatches;
        if of_all(&[Cause::WarmUp, Cause::Drain]) > 2.0 * MUCH {
            advice.push(format!(
                "warm-up and drain take {} of the devices' time: their share falls with more microbatches in a step (now \
                 {microbatches})",
                percent(of_all(&[Cause::WarmUp, Cause::Drain]))
            ));
        }
        if of_all(&[Cause::Host]) > MUCH && microbatches > 1 {
            advice.push(format!(
                "the host's gaps come with every action: fewer, larger microbatches (now {microbatches}) make them rarer, \
                 for a longer warm-up"
            ));
        }
        advice
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
                actions[0].rank,
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

    /// Costs with which a simulation takes the measured times: those of the prediction, scaled stage by stage. Without
    /// a prediction links are free.
    fn fitted_costs(&self) -> Costs {
        let step = &self.measured;
        let mut costs = self.prediction.as_ref().map_or_else(|| bare(step), |p| p.costs.clone());
        for (at, stage) in costs.stages.iter_mut().enumerate() {
            let of = |kind: Kind| self.actions.iter().find(move |a| a.stage == at && a.kind == kind);
            let backward = || [Kind::B, Kind::I, Kind::W].into_iter().filter_map(of);
            let measured: f64 = backward().map(|a| a.measured).sum();
            let predicted: Option<f64> = backward().map(|a| a.predicted).sum();
            // What did not run in this schedule may in another: a whole backward pass, or its halves.
            let scale = predicted.filter(|&seconds| seconds > 0.0).map_or(0.0, |seconds| measured / seconds);
            for (kind, seconds) in [
                (Kind::F, &mut stage.forward),
                (Kind::I, &mut stage.input),
                (Kind::W, &mut stage.weight),
                (Kind::B, &mut stage.backward),
            ] {
                *seconds = match of(kind) {
                    Some(&ActionTime { measured, predicted: Some(predicted), .. }) if predicted > 0.0 => {
                        *seconds * measured / predicted
                    }
                    Some(action) => action.measured,
                    None => *seconds * scale,
                };
            }
        }
        costs
    }

    /// Schedules by name that need nothing but what is measured: the same stages on the same devices, within the
    /// devices' memory.
    fn other_schedules<'a>(&'a self, costs: &'a Costs) -> impl Iterator<Item = Schedule> + 'a {
        let now = &self.measured.schedule;
        let (ranks, chunks) = (now.ranks.len(), now.stages / now.ranks.len());
        let named = schedule::NAMES.iter();
        let made = named
            .filter_map(move |name| schedule::generate_chunked(name, ranks, chunks, now.microbatches).ok());
        made.filter(move |s| {
            let same_places =
                s.stages == now.stages && (0..s.stages).all(|at| s.rank_of(at) == now.rank_of(at));
            let kinds = s.ranks.iter().flatten();
            let known = kinds.clone().all(|a| costs.stages[a.stage].seconds(a.kind) > 0.0);
            let fits = || {
                let Ok(simulation) = schedule::simulate(s, costs) else { return false };
                let budgets = costs.ranks.iter().map(|rank| rank.budget);
                simulation
                    .slot_bytes
                    .iter()
                    .zip(budgets)
                    .all(|(&need, budget)| budget.is_none_or(|b| need <= b))
            };
            s.ranks != now.ranks && same_places && known && fits()
        })
    }
}

fn simulate(schedule: &Schedule, costs: &Costs) -> Option<f64> {
    schedule::simulate(schedule, costs).ok().map(|simulation| simulation.step)
}

/// Costs with what a timeline alone tells about the ends of a step.
fn bare(step: &Step) -> Costs {
    let took = |rank: usize, label: &str| {
        let events = step.timeline.usable().filter(|e| e.rank == rank && e.label == label);
        events.filter(|e| e.track == super::Track::Compute).map(|e| e.end - e.start).sum()
    };
    let rank = |rank| RankCost {
        begin: took(rank, "clear"),
        end: took(rank, "norm"),
        update: took(rank, "step"),
        ..RankCost::default()
    };
    let stages = step.schedule.stages;
    Costs {
        stages: vec![StageCost::default(); stages],
        hops: vec![Hops::default(); stages - 1],
        ranks: (0..step.idle.len()).map(rank).collect(),
        ..Costs::default()
    }
}

/// The same costs with every device computing equally long.
fn balanced(costs: &Costs, step: &Step) -> Costs {
    let mut costs = costs.clone();
    let loads: Vec<f64> = (0..step.idle.len()).map(|rank| step.computing(rank)).collect();
    let mean = loads.iter().sum::<f64>() / loads.len() as f64;
    for (stage, cost) in costs.stages.iter_mut().enumerate() {
        let load = step.schedule.rank_of(stage).map_or(mean, |rank| loads[rank]);
        let factor = if load > 0.0 { mean / load } else { 1.0 };
        for seconds in [&mut cost.forward, &mut cost.input, &mut cost.weight, &mut cost.backward] {
            *seconds *= factor;
        }
    }
    costs
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
