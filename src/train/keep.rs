//! Whether a run that goes on keeps its plan.
//!
//! It does while it can: the same devices in the same order, with the same cuts, schedule and recomputation. Another plan
//! takes its place where a device is gone, where it no longer fits or what is fixed now is against it, and where another is
//! surely faster, by the bar over which [`advice`](super::advice) would advise it. Then it is said.

use std::path::Path;

use super::advice::{Gain, StepTimes, steady};
use super::metrics::Metrics;
use super::planning::Planning;
use super::run::PREDICTION;
use crate::error::Result;
use crate::folder::files::read_text;
use crate::layers::Layers;
use crate::plan::text::microbatches;
use crate::plan::{Candidate, Options, Planned, RecomputeChoice, ScheduleChoice};
use crate::timeline::{DeviceName, Prediction, duration};

/// The plan that a run had, and the steps that it took with it.
pub struct Before {
    /// The plan.
    pub prediction: Prediction,
    /// Its steps in order.
    pub steps: Vec<StepTimes>,
}

impl Before {
    /// Of the run in a folder. None for one that was not planned or whose files are damaged: there is nothing to keep.
    pub fn read(run: &Path) -> Option<Before> {
        let path = run.join(PREDICTION);
        let text = read_text(&path).ok()?;
        let prediction = Prediction::from_json(&text, &path.display().to_string()).ok()?;
        let rows = Metrics::open(run).map(|metrics| metrics.entries).unwrap_or_default();
        Some(Before { prediction, steps: StepTimes::of_plan(&rows, None) })
    }
}

/// The plan with which a run goes on: its own unless it cannot or the best is surely faster. If it changes, how.
///
/// # Errors
///
/// Those of the planner.
pub fn keep(planning: &Planning, best: Planned, before: &Before) -> Result<(Planned, Option<String>)> {
    let old = &before.prediction;
    let change = |best: Planned, why: String| {
        let (from, to) = (words(old), words(&Prediction::of_plan(&best.best, planning.names())));
        // Schedules that are made for a machine have one name.
        let to = if to == from { "another of that kind".into() } else { to };
        let text = format!("from {from} to {to}, {why}");
        Ok((best, Some(text)))
    };
    let promised = |plan: &Planned| format!("predicted {} a step", duration(plan.best.simulation.expected));
    let Some(devices) = here(planning, &old.devices) else {
        let why = format!("{}, because a device of the old plan is not here", promised(&best));
        return change(best, why);
    };
    let present = planning.predicted_on(old, devices);
    let Some(present) = present.ok().filter(|present| planning.plan(present).is_ok()) else {
        let why = format!("{}, because the old plan does not fit any more", promised(&best));
        return change(best, why);
    };
    if is_same(&best.best, &present) {
        return Ok((best, None));
    }
    let instead =
        |plan: &Planned| format!("{} instead of {}", promised(plan), duration(present.simulation.expected));
    if !allows(&planning.options, &present) {
        let why = instead(&best);
        return change(best, why);
    }
    let gain = Gain::of(&best.best, &present, steady(&before.steps).unwrap_or_default(), &[]);
    if gain.part <= gain.unsure {
        return Ok((beside(planning, &present, best)?, None));
    }
    // With the same microbatches for each replica, on which rounding depends.
    let better = planning.search_again(&present)?;
    if is_same(&better, &present) {
        return Ok((beside(planning, &present, best)?, None));
    }
    let planned = beside(planning, &better, best)?;
    let why = instead(&planned);
    change(planned, why)
}

/// The numbers of the devices that have these names, if all of them are here.
fn here(planning: &Planning, devices: &[DeviceName]) -> Option<Vec<usize>> {
    let mut found: Vec<usize> = Vec::new();
    for wanted in devices {
        let is_it = |name: &&DeviceName| (name.adapter, &name.name) == (wanted.adapter, &wanted.name);
        // One adapter may be opened several times.
        let free = planning.names().iter().filter(|name| !found.contains(&name.number));
        found.push(free.filter(is_it).map(|name| name.number).next()?);
    }
    Some(found)
}

/// Whether a plan is one of those that are left to choose from.
fn allows(options: &Options, plan: &Candidate) -> bool {
    let schedule = match &options.schedule {
        ScheduleChoice::Any => true,
        ScheduleChoice::Named(name) => *name == plan.schedule.name,
        ScheduleChoice::Given(schedule) => *schedule == plan.schedule,
    };
    let recompute = match &options.recompute {
        RecomputeChoice::AsNeeded => true,
        RecomputeChoice::Never => plan.recompute.iter().all(|repeats| !repeats),
        RecomputeChoice::Always => plan.recompute.iter().all(|repeats| *repeats),
        RecomputeChoice::Stages(stages) => {
            let wanted = |stage: usize| stages.get(stage).copied().unwrap_or(false);
            plan.recompute.iter().enumerate().all(|(stage, repeats)| *repeats == wanted(stage))
        }
    };
    schedule
        && recompute
        && options.data.allows(Some(&plan.shares()))
        && options.devices.as_ref().is_none_or(|devices| *devices == plan.devices)
        && options.cuts.as_ref().is_none_or(|cuts| *cuts == plan.cuts())
        && options.microbatches.is_none_or(|count| count == plan.microbatches)
}

fn is_same(a: &Candidate, b: &Candidate) -> bool {
    (&a.devices, &a.stages, &a.schedule, &a.recompute) == (&b.devices, &b.stages, &b.schedule, &b.recompute)
}

/// A plan as the one that is taken, with what was found before as its alternatives.
fn beside(planning: &Planning, plan: &Candidate, found: Planned) -> Result<Planned> {
    let mut planned = planning.alone(plan)?;
    planning.count(&mut planned.best)?;
    let others = [found.best].into_iter().chain(found.alternatives);
    planned.alternatives = others.filter(|other| !is_same(other, plan)).collect();
    Ok(planned)
}

/// A plan in words that hold in any run: adapters and not the numbers of devices.
fn words(plan: &Prediction) -> String {
    let name = |device: &DeviceName| match device.adapter {
        Some(adapter) => format!("adapter {adapter}"),
        None => device.name.clone(),
    };
    let devices: Vec<String> = plan.devices.iter().map(name).collect();
    let schedule = plan.schedule();
    let (name, shares) = schedule.map_or((String::new(), vec![0]), |schedule| {
        let shares = schedule.placement().ok().and_then(|placement| placement.shares());
        (schedule.name, shares.unwrap_or_else(|| vec![schedule.microbatches]))
    });
    let microbatches = microbatches(&shares);
    let list = |numbers: &[usize]| numbers.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    let cuts = if plan.cuts.is_empty() {
        String::new()
    } else {
        format!(" cut at {}", plan.cuts.iter().map(Layers::to_string).collect::<Vec<_>>().join(", "))
    };
    let repeats = match plan.recompute.is_empty() {
        true => String::new(),
        false => format!(" recomputing in stages {}", list(&plan.recompute)),
    };
    format!("{name} of {microbatches} on {}{cuts}{repeats}", devices.join(" + "))
}
