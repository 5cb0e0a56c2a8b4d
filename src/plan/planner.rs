//! From a workload, a machine and what was fixed by hand to the fastest plan, and to what stood in its way.

use std::ops::Range;

use super::auto::make_schedules;
use super::fit::nothing_fits;
use super::improve::{SAME, improve};
use super::judge::{Judge, Point, Timed, assignment};
use super::machine::Machine;
use super::search::{Board, allowance, search};
use super::space::Space;
use super::teams::teams;
use super::text::bytes;
use super::uneven::uneven;
use super::workload::Workload;
use super::{Candidate, DataChoice, LeftOut, Options, Planned, ScheduleChoice};
use crate::error::{Error, Result};
use crate::layers::Layers;
use crate::schedule::{Costs, simulate};

/// How many other plans are shown.
const ALTERNATIVES: usize = 5;
/// Units of work (about 10 ns) for finding out what memory costs.
const WORK_OF_UNLIMITED: u64 = 1_000_000;
/// Several pipelines must be faster than one by this part of a step: they add up gradients in another order.
const WORTH_SEVERAL: f64 = 0.01;
/// A smaller part of the step's time is not worth blaming on memory.
const WORTH_SAYING: f64 = 1e-3;

/// Plans training of `workload` on `machine`: which devices, in which order, which layers on each, in how many
/// microbatches, in which schedule, and where to repeat F instead of keeping its results, so that a step is as short as
/// it can be in the simulation and no device holds more than its budget.
///
/// # Errors
///
/// [`Error::Config`](crate::error::Error::Config) for options that contradict the workload, the machine or one another.
/// [`Error::NoPlan`](crate::error::Error::NoPlan) if no plan fits: by how many bytes on which device, and what would make
/// it fit. Those of [`Schedule::validate`](crate::schedule::Schedule)
/// for a schedule made by hand.
pub fn plan(workload: &Workload, machine: &Machine, options: &Options) -> Result<Planned> {
    if matches!(options.schedule, ScheduleChoice::Given(_)) || options.data == DataChoice::Count(1) {
        return pipeline(workload, machine, options);
    }
    let one = match allows_one(options).then(|| pipeline(workload, machine, options)) {
        // Of options that are wrong the search for one pipeline says what is.
        Some(Err(error)) if !matches!(error, Error::NoPlan { .. }) => return Err(error),
        one => one,
    };
    let limited = machine.within(&options.budgets);
    let mut several = teams(workload, &limited, options)?;
    several.extend(uneven(workload, &limited, options)?);
    several.sort_by(|a, b| a.simulation.expected.total_cmp(&b.simulation.expected));
    match one {
        Some(Ok(one)) => Ok(beside(one, several, &limited)),
        Some(Err(error)) if several.is_empty() => Err(error),
        _ => among(several, &limited, options),
    }
}

/// Refuses options that [`plan`] would refuse for any times and any memory of the devices.
///
/// # Errors
///
/// [`Error::Config`](crate::error::Error::Config) for options that contradict the workload, the machine or one another.
/// Those of [`Schedule::validate`](crate::schedule::Schedule) for a schedule made by hand.
pub fn check(workload: &Workload, machine: &Machine, options: &Options) -> Result<()> {
    match options.schedule {
        ScheduleChoice::Given(_) => {}
        _ if allows_one(options) => {}
        _ => return Ok(()),
    }
    Space::new(workload, machine, options).map(drop)
}

/// Whether the options allow a single pipeline.
fn allows_one(options: &Options) -> bool {
    options.data.count().is_none_or(|count| count == 1)
}

/// The faster of one pipeline and several: these only where it is worth the traffic.
fn beside(mut one: Planned, several: Vec<Candidate>, machine: &Machine) -> Planned {
    let seconds = |plan: &Candidate| plan.simulation.expected;
    let is_better =
        several.first().is_some_and(|best| seconds(best) < seconds(&one.best) * (1.0 - WORTH_SEVERAL));
    let mut several = several.into_iter();
    if is_better && let Some(best) = several.next() {
        one.alternatives.insert(0, std::mem::replace(&mut one.best, best));
        (one.unlimited, one.complete) = (None, false);
        one.left_out = unused(&one, machine);
    }
    // One of each number of pipelines, and one of which the stages have unequal numbers of replicas.
    for other in several {
        let kind = |plan: &Candidate| (plan.shares().len(), plan.placement.is_single());
        let is_new = |known: &Candidate| kind(known) != kind(&other);
        if is_new(&one.best) && one.alternatives.iter().all(is_new) {
            one.alternatives.push(other);
        }
    }
    one.alternatives.sort_by(|a, b| seconds(a).total_cmp(&seconds(b)));
    one.alternatives.truncate(ALTERNATIVES);
    one
}

/// The fastest of plans with several pipelines, where one is not wanted or does not fit.
fn among(several: Vec<Candidate>, machine: &Machine, options: &Options) -> Result<Planned> {
    let mut several = several.into_iter();
    let Some(best) = several.next() else {
        let asked = match &options.data {
            DataChoice::Shares(shares) => format!("with shares {shares:?}"),
            DataChoice::Count(count) => format!("with {count} replicas"),
            DataChoice::Any => "with several replicas".into(),
        };
        let help = vec!["one pipeline, or another number of replicas (mesh.data)".to_string()];
        return Err(Error::no_plan(format!("none {asked} is possible and fits every device"), help));
    };
    let mut planned = Planned {
        alternatives: several.take(ALTERNATIVES).collect(),
        left_out: Vec::new(),
        without: Vec::new(),
        unlimited: None,
        considered: 0,
        evaluated: 0,
        complete: false,
        best,
    };
    planned.left_out = unused(&planned, machine);
    Ok(planned)
}

/// The devices that the best plan does without, and what the others take that use them.
fn unused(planned: &Planned, machine: &Machine) -> Vec<LeftOut> {
    let best = &planned.best;
    let idle = (0..machine.devices.len()).filter(|device| !best.devices.contains(device));
    let reason = |device: usize| {
        let with = planned.alternatives.iter().find(|other| other.devices.contains(&device));
        match with {
            Some(with) => format!(
                "the fastest plan found that uses it takes {:.1} % longer",
                100.0 * (with.simulation.expected / best.simulation.expected - 1.0)
            ),
            None => "no faster plan was found that uses it".to_string(),
        }
    };
    idle.map(|device| LeftOut { device, reason: reason(device) }).collect()
}

/// The best plan with one replica of each stage, or with those of a schedule that is given.
fn pipeline(workload: &Workload, machine: &Machine, options: &Options) -> Result<Planned> {
    let whole = machine;
    let machine = machine.within(&options.budgets);
    let space = Space::new(workload, &machine, options)?;
    let mut judge = Judge::new(&space)?;
    let mut board = Board::default();
    let complete = search(&mut judge, &mut board, allowance(&space) / 2)?;
    if space.auto {
        make_schedules(&mut judge, &mut board, allowance(&space) / 2)?;
    }
    let all = board.ranked(&space);
    let mut best = match board.best.filter(|best| space.named || best.made.is_some()) {
        Some(best) => best,
        None => match all.first() {
            Some(first) => first.clone(),
            None => return Err(nothing_fits(workload, whole, options)?),
        },
    };
    let mut chosen = candidate(&judge, &best)?;
    // The search takes speeds for steady; where they wander, a plan with more slack may be the better one.
    let others = loop {
        let mut others = Vec::new();
        for timed in alternatives(&judge, &best, &all) {
            others.push((candidate(&judge, timed)?, timed));
        }
        others.sort_by(|(a, _), (b, _)| a.simulation.expected.total_cmp(&b.simulation.expected));
        match others.first() {
            Some((other, timed)) if other.simulation.expected < chosen.simulation.expected * (1.0 - SAME) => {
                (chosen, best) = (other.clone(), (*timed).clone());
            }
            _ => break others,
        }
    };
    let left_out = left_out(&judge, &best, &all);
    let unlimited = unlimited(workload, &machine, options, &best, &judge)?;
    Ok(Planned {
        alternatives: others.into_iter().map(|(other, _)| other).collect(),
        best: chosen,
        left_out,
        without: Vec::new(),
        unlimited,
        considered: judge.considered,
        evaluated: judge.simulated,
        complete,
    })
}

/// Stages as people count their layers.
fn places(stages: &[Range<usize>], workload: &Workload) -> Vec<Range<Layers>> {
    let starts = workload.starts();
    stages.iter().map(|stage| starts[stage.start]..starts[stage.end]).collect()
}

pub(super) fn candidate(judge: &Judge, timed: &Timed) -> Result<Candidate> {
    let Timed { point, recompute, .. } = timed;
    let (form, prices) = (judge.form_of(timed), judge.prices(point));
    let mut costs = Costs::default();
    prices.fill(&assignment(&form.layout, &point.devices, &point.stages, recompute), &mut costs);
    let simulation = simulate(&form.schedule, &costs)?;
    Ok(Candidate {
        devices: point.devices.clone(),
        places: places(&point.stages, prices.workload),
        stages: point.stages.clone(),
        placement: form.layout.placement.clone(),
        schedule: form.schedule.clone(),
        batching: judge.space.batchings[form.batching],
        microbatches: form.schedule.microbatches,
        batch: prices.batching.sequences,
        recompute: recompute.clone(),
        tokens_per_second: prices.workload.tokens as f64 / simulation.expected,
        costs,
        simulation,
    })
}

/// What distinguishes plans: devices, their order, microbatches, schedule and stages a rank.
type Traits = (Vec<usize>, Vec<usize>, usize, (String, usize));

fn traits(judge: &Judge, timed: &Timed) -> Traits {
    let mut set = timed.point.devices.clone();
    set.sort_unstable();
    let form = judge.form_of(timed);
    let kind = (form.schedule.name.clone(), form.stages() / form.ranks());
    (set, timed.point.devices.clone(), form.batching, kind)
}

/// The best plan with another set of devices, another order, other microbatches, another schedule than the best, and
/// then the next best in which more than the order is new.
fn alternatives<'t>(judge: &Judge, best: &Timed, all: &'t [Timed]) -> Vec<&'t Timed> {
    let own = traits(judge, best);
    let all: Vec<(Traits, &Timed)> = all.iter().map(|timed| (traits(judge, timed), timed)).collect();
    let mut chosen: Vec<&(Traits, &Timed)> = Vec::new();
    let differs: [fn(&Traits, &Traits) -> bool; 4] =
        [|a, b| a.0 != b.0, |a, b| a.1 != b.1, |a, b| a.2 != b.2, |a, b| a.3 != b.3];
    for differs in differs {
        let first = all.iter().find(|(traits, _)| differs(traits, &own));
        chosen.extend(first.filter(|first| !chosen.contains(first)));
    }
    for plan in &all {
        let (set, _, batching, kind) = &plan.0;
        let is_like = |other: &Traits| (set, batching, kind) == (&other.0, &other.2, &other.3);
        if chosen.len() < ALTERNATIVES && !is_like(&own) && !chosen.iter().any(|(other, _)| is_like(other)) {
            chosen.push(plan);
        }
    }
    let mut chosen: Vec<&Timed> = chosen.into_iter().map(|(_, timed)| *timed).collect();
    chosen.sort_by(|a, b| a.order(b));
    chosen
}

/// The devices that the best plan does without, and what it would cost to use them too.
fn left_out(judge: &Judge, best: &Timed, all: &[Timed]) -> Vec<LeftOut> {
    let space = judge.space;
    let machine = space.prices[0].machine;
    let idle = (0..machine.devices.len()).filter(|device| !best.point.devices.contains(device));
    idle.map(|device| {
        // All devices of a class are alike, and plans name the first of them.
        let class = space.pool.classes.iter().find(|class| class.contains(&device));
        let used = |timed: &Timed| {
            timed.point.devices.iter().filter(|d| class.is_some_and(|c| c.contains(d))).count()
        };
        let with = all.iter().find(|timed| used(timed) > used(best));
        let reason = match (&space.pool.order, with) {
            (Some(_), _) => "not among the devices that were asked for".to_string(),
            _ if space.pool.ignored.contains(&device) => {
                "not looked at: too many unlike devices, and it is among the slowest".to_string()
            }
            (None, Some(with)) => format!(
                "the fastest plan found that uses it takes {:.1} % longer",
                100.0 * (with.step / best.step - 1.0)
            ),
            (None, None) => match machine.devices[device].memory {
                Some(memory) => format!("no plan was found that uses it and fits its {}", bytes(memory)),
                None => "no plan that uses it was found to fit".to_string(),
            },
        };
        LeftOut { device, reason }
    })
    .collect()
}

/// The stages that the same devices in the same schedule would have if memory were no limit, if that were faster.
fn unlimited(
    workload: &Workload,
    machine: &Machine,
    options: &Options,
    best: &Timed,
    judge: &Judge,
) -> Result<Option<Vec<Range<Layers>>>> {
    let form = judge.form_of(best);
    if best.point.devices.iter().all(|&device| machine.devices[device].memory.is_none()) {
        return Ok(None);
    }
    let mut machine = machine.clone();
    machine.devices.iter_mut().for_each(|device| device.memory = None);
    let options = Options {
        devices: Some(best.point.devices.clone()),
        schedule: ScheduleChoice::Given(form.schedule.clone()),
        budgets: Vec::new(),
        ..options.clone()
    };
    let space = Space::new(workload, &machine, &options)?;
    let mut judge = Judge::new(&space)?;
    let point = Point { form: 0, ..best.point.clone() };
    let found = improve(&mut judge, point, f64::INFINITY, WORK_OF_UNLIMITED)?;
    let found = found.filter(|found| found.step < best.step * (1.0 - WORTH_SAYING));
    Ok(found.map(|found| places(&found.point.stages, workload)))
}
