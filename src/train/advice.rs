//! What would make a run's steps shorter: the planner, asked again with what was measured.
//!
//! Nothing is advised but what the planner's own simulation says of a whole plan, in which each layer takes as long as it
//! takes on the device that would have it. Devices are corrected by what the steps took of them, as
//! [`replan`](super::replan) does in mid-run. How far the plan in force is still off after that is how far another may be
//! off, so a plan is only advised that is faster by more.

use std::path::Path;

use super::config::{Config, PipelineConfig};
use super::metrics::Entry;
use super::planning::Planning;
use super::replan::{STEPS, WARM_UP};
use super::run::{CONFIG, MACHINE};
use super::trainer::Row;
use crate::error::Result;
use crate::folder::files::read_text;
use crate::layers::Layers;
use crate::plan::{Candidate, Machine};
use crate::schedule::ALL_NAMES;
use crate::timeline::{Event, Prediction, Timeline, duration};

/// A smaller gain than this part of a step is not worth a change, however sure it is.
const LEAST: f64 = 0.05;
/// What a device may be off that has not worked yet.
const UNTRIED: f64 = 0.1;

/// How long a step took, and how busy it kept the devices.
#[derive(Clone, Debug, PartialEq)]
pub struct StepTimes {
    /// Which.
    pub step: u64,
    /// Its seconds.
    pub seconds: f64,
    /// The part of them in which each device worked, in pipeline order.
    pub busy: Vec<f64>,
}

impl From<&Row> for StepTimes {
    fn from(row: &Row) -> StepTimes {
        let busy = row.devices.iter().map(|device| device.busy_fraction).collect();
        StepTimes { step: row.step, seconds: row.step_seconds, busy }
    }
}

impl StepTimes {
    /// The steps of the plan that made the step `traced`, or else the last one, by which alone its prediction can be judged.
    pub fn of_plan(rows: &[Entry], traced: Option<u64>) -> Vec<StepTimes> {
        let row = traced.and_then(|traced| rows.iter().find(|row| row.step == traced)).or(rows.last());
        let plan = row.and_then(|row| row.plan_since_step);
        rows.iter().filter(|row| row.plan_since_step == plan).filter_map(StepTimes::of).collect()
    }

    /// Of a row that says how long its step took.
    pub fn of(entry: &Entry) -> Option<StepTimes> {
        let busy = entry.devices.iter().filter_map(|device| device.busy_fraction).collect();
        Some(StepTimes { step: entry.step, seconds: entry.step_seconds?, busy })
    }
}

/// A plan that is surely faster than the one in force.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// It.
    pub plan: Candidate,
    /// The keys of a config that fix it, each as `key=value`.
    pub settings: Vec<String>,
    /// What is done otherwise, in words.
    pub what: String,
    /// The part of a step that it is said to save.
    pub gain: f64,
}

/// What came of asking the planner again.
#[derive(Clone, Debug, PartialEq)]
pub enum Advice {
    /// Another plan is faster.
    Change(Box<Change>),
    /// None is by enough to be sure of.
    Keep {
        /// What the best other plan does otherwise, in words; empty if there is none that is faster.
        what: String,
        /// The part of a step that it is said to save.
        gain: f64,
        /// How far predictions may be off, as a part of a step: what a plan must save.
        unsure: f64,
        /// Why they may be off, in words.
        why: String,
    },
    /// The planner cannot be asked, for this reason.
    None(String),
}

/// Asks the planner for the run in a folder. `steps` are those of the plan in force in order, and `timeline` is one of
/// them. Whatever is missing or damaged is the reason why there is no advice.
pub fn advise(run: &Path, prediction: &Prediction, steps: &[StepTimes], timeline: &Timeline) -> Advice {
    let advice = trained_with(run, &[]).and_then(|config| {
        if config.mesh.division().divides() {
            // What gangs were measured to take is not kept with the machine.
            return Ok(Advice::None("the devices divide every layer".into()));
        }
        let planning = freed(&config, planned_with(run)?)?;
        let present = planning.predicted(prediction)?;
        improve(planning, &present, prediction, &config, steps, timeline)
    });
    advice.unwrap_or_else(|error| Advice::None(error.to_string().lines().next().unwrap_or_default().into()))
}

/// The config that the run in a folder was last trained with, with overrides.
///
/// # Errors
///
/// [`Error::Config`](crate::error::Error::Config) where it is missing or damaged.
pub fn trained_with(run: &Path, overrides: &[String]) -> Result<Config> {
    let path = run.join(CONFIG);
    let text = read_text(&path).map_err(|error| error.config(&path))?;
    Config::parse_written(&text, overrides, &path.display().to_string())
}

/// What the planner knew of the machine.
fn planned_with(run: &Path) -> Result<Machine> {
    let path = run.join(MACHINE);
    let text = read_text(&path).map_err(|error| error.config(&path))?;
    Machine::parse(&text, &path.display().to_string())
}

/// Everything open but the microbatches, on which rounding depends.
pub fn freed(config: &Config, machine: Machine) -> Result<Planning> {
    let pipeline = PipelineConfig { microbatches: config.pipeline.microbatches, ..PipelineConfig::default() };
    Planning::for_machine(&Config { pipeline, ..config.clone() }, machine, None)
}

/// Asks `planning` for a better plan than `present`, which is what `prediction` predicts.
///
/// # Errors
///
/// Those of the planner.
pub fn improve(
    mut planning: Planning,
    present: &Candidate,
    prediction: &Prediction,
    config: &Config,
    steps: &[StepTimes],
    timeline: &Timeline,
) -> Result<Advice> {
    let Some(steady) = steady(steps) else {
        let (done, enough) = (steps.len(), WARM_UP + STEPS);
        return Ok(Advice::None(format!("{done} steps of this plan say too little; {enough} are enough")));
    };
    let ratios = planning.learn(present, &usual(steady, timeline));
    let corrected = planning.again(present)?;
    let plan = planning.search_again(&corrected)?;
    let Gain { part: gain, unsure, why } = Gain::of(&plan, &corrected, steady, &ratios);
    let what = changes(&corrected, &plan);
    if gain <= unsure {
        let what = if gain > 0.0 { what } else { String::new() };
        return Ok(Advice::Keep { what, gain: gain.max(0.0), unsure, why });
    }
    let Some(settings) = settings(&plan, present, prediction, config) else {
        return Ok(Advice::None(format!("{} does not say which adapters its devices are", MACHINE)));
    };
    Ok(Advice::Change(Box::new(Change { plan, settings, what, gain })))
}

/// Steps without the first, if they are enough to say something.
pub(super) fn steady(steps: &[StepTimes]) -> Option<&[StepTimes]> {
    steps.get(WARM_UP..).filter(|steady| steady.len() >= STEPS)
}

/// What a plan saves of the steps of the one in force, both as parts of a step.
pub(super) struct Gain {
    /// What it is said to save.
    pub part: f64,
    /// More than this is surely saved.
    pub unsure: f64,
    /// Why less is not sure, in words.
    pub why: String,
}

impl Gain {
    /// Of a plan, against the one in force with the present times, its steps if there are any, and how far devices were off
    /// what was known of them.
    pub fn of(plan: &Candidate, present: &Candidate, steady: &[StepTimes], ratios: &[f64]) -> Gain {
        let promised = present.simulation.expected;
        let seconds: Vec<f64> = steady.iter().map(|step| step.seconds).collect();
        let [low, median, high] = match seconds[..] {
            [] => [promised; 3],
            _ => [0.25, 0.5, 0.75].map(|part| quantile(&seconds, part)),
        };
        let moves = (&plan.devices, &plan.stages) != (&present.devices, &present.stages);
        let untried = plan.devices.iter().any(|device| !present.devices.contains(device));
        let doubts = [
            (LEAST, "so little may be chance".to_string()),
            (
                (median / promised - 1.0).abs(),
                format!(
                    "even with the speeds that these steps show, the planner takes {} for a step of the present plan, which \
                     takes {}",
                    duration(promised),
                    duration(median)
                ),
            ),
            ((high - low) / 2.0 / median, "steps of one and the same plan differ by as much".into()),
            (if moves { disagreement(ratios) } else { 0.0 }, differ(ratios)),
            (if untried { UNTRIED } else { 0.0 }, "it uses a device that has not worked in this run".into()),
        ];
        let (unsure, why) =
            doubts.into_iter().fold((0.0, String::new()), |a, b| if b.0 > a.0 { b } else { a });
        Gain { part: 1.0 - plan.simulation.expected / promised.min(median), unsure, why }
    }
}

/// The events of a step that took as long of each device as its steps usually do.
fn usual(steps: &[StepTimes], timeline: &Timeline) -> Vec<Event> {
    let worked = |step: &StepTimes, rank: usize| step.busy.get(rank).map(|busy| busy * step.seconds);
    let traced = steps.iter().find(|step| Some(step.step) == timeline.step);
    let times = |rank: usize| {
        let usual: Vec<f64> = steps.iter().filter_map(|step| worked(step, rank)).collect();
        let own = traced.and_then(|traced| worked(traced, rank)).filter(|&own| own > 0.0);
        own.map_or(1.0, |own| quantile(&usual, 0.5) / own)
    };
    let times: Vec<f64> = (0..timeline.devices.len()).map(times).collect();
    let mut events = timeline.events.clone();
    for event in &mut events {
        event.end = event.start + times.get(event.rank).unwrap_or(&1.0) * (event.end - event.start);
    }
    events
}

/// How far apart the devices are from what was known of them: half of it is taken for what belongs to the layers, and
/// not to the devices.
fn disagreement(ratios: &[f64]) -> f64 {
    let least = ratios.iter().copied().fold(f64::INFINITY, f64::min);
    let most = ratios.iter().copied().fold(0.0, f64::max);
    if ratios.is_empty() { 0.0 } else { (most / least - 1.0) / 2.0 }
}

fn differ(ratios: &[f64]) -> String {
    let least = ratios.iter().copied().fold(f64::INFINITY, f64::min);
    let most = ratios.iter().copied().fold(0.0, f64::max);
    format!(
        "the devices are not off alike, one takes {most:.2} times as long as predicted and another {least:.2} times, and part \
         of that may belong to the layers that they have"
    )
}

/// Of numbers in any order, at least one.
fn quantile(numbers: &[f64], part: f64) -> f64 {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = part * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[at as usize], sorted[at.ceil() as usize]);
    below + at.fract() * (above - below)
}

/// What fixes a plan for the run's devices. None where it is not known which adapters they are.
fn settings(
    plan: &Candidate,
    present: &Candidate,
    prediction: &Prediction,
    config: &Config,
) -> Option<Vec<String>> {
    let devices = || prediction.devices.iter().chain(&prediction.left_out);
    let adapter = |&number: &usize| devices().find(|device| device.number == number)?.adapter;
    let adapters: Vec<usize> = plan.devices.iter().map(adapter).collect::<Option<_>>()?;
    let name = Some(plan.schedule.name.as_str()).filter(|name| ALL_NAMES.contains(name));
    // One that was written by hand is in the file that the config names.
    let as_before = config.pipeline.schedule.as_deref().filter(|_| plan.schedule == present.schedule);
    let schedule = as_before.or(name);
    let list = |numbers: &[usize]| {
        let numbers: Vec<String> = numbers.iter().map(usize::to_string).collect();
        format!("[{}]", numbers.join(","))
    };
    let repeated = plan.repeated();
    let mut settings = vec![format!("pipeline.devices={}", list(&adapters))];
    settings.extend(schedule.map(|schedule| format!("pipeline.schedule={schedule}")));
    settings.push(format!("pipeline.microbatches={}", plan.microbatches));
    // Stages with unequal numbers of replicas are said in a schedule alone.
    let shares = plan.placement.shares().or_else(|| as_before.map(|_| Vec::new()))?;
    settings.extend((shares.len() > 1).then(|| format!("mesh.data={}", list(&shares))));
    settings.extend(
        (plan.stages.len() > 1)
            .then(|| format!("pipeline.cuts={}", Layers::list(&plan.cuts()).replace(' ', ""))),
    );
    settings.push(match repeated.is_empty() {
        true => "pipeline.recompute=false".into(),
        false => format!("pipeline.recompute={}", list(&repeated)),
    });
    Some(settings)
}

/// How a plan differs from another.
fn changes(from: &Candidate, to: &Candidate) -> String {
    let layers = |plan: &Candidate, device: usize| -> Layers {
        let rank = plan.devices.iter().position(|&used| used == device);
        rank.map_or(Layers::default(), |rank| plan.layers_of(rank))
    };
    let mut changes = Vec::new();
    if from.devices != to.devices {
        let numbers = to.devices.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
        changes.push(format!(
            "the pipeline over device{} {numbers}",
            if to.devices.len() == 1 { "" } else { "s" }
        ));
    }
    if from.stages != to.stages {
        let moved = to.devices.iter().filter_map(|&device| {
            let [new, old] = [to, from].map(|plan| layers(plan, device));
            (new != old).then(|| format!("{} instead of {old} on device {device}", new.counted()))
        });
        let moved: Vec<String> = moved.collect();
        // Stages may change and each device have as many layers as before.
        changes.push(if moved.is_empty() { "other layers on the devices".into() } else { moved.join(", ") });
    }
    if from.schedule.name != to.schedule.name {
        changes.push(format!("schedule {} instead of {}", to.schedule.name, from.schedule.name));
    }
    if from.repeated() != to.repeated() {
        changes.push("recomputing in other stages".into());
    }
    changes.join("; ")
}
