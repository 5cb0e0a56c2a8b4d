//! From a workload, a machine and what was fixed by hand to the fastest plan, and to what stood in its way.

use std::ops::Range;

use super::improve::improve;
use super::judge::{Judge, Point, Timed, assignment};
use super::machine::Machine;
use super::search::{Board, search};
use super::space::Space;
use super::workload::Workload;
use super::{Candidate, LeftOut, Options, Planned};
use crate::error::{Error, Result};
use crate::schedule::Costs;

/// How many other plans are shown.
const ALTERNATIVES: usize = 5;

/// Plans training of `workload` on `machine`: which devices, in which order, which layers on each, in how many
/// microbatches, in which schedule, and where to repeat F instead of keeping its results, so that a step is as short as
/// it can be in the simulation and no device holds more than its budget.
///
/// # Errors
///
/// [`Error::Config`] for options that contradict the workload, the machine or one another, and if no plan fits: by how
/// many bytes on which device, and what would make it fit. Those of [`Schedule::validate`](crate::schedule::Schedule)
/// for a schedule made by hand.
pub fn plan(workload: &Workload, machine: &Machine, options: &Options) -> Result<Planned> {
    let machine = with_budgets(machine, &options.budgets);
    let space = Space::new(workload, &machine, options)?;
    let mut judge = Judge::new(&space)?;
    let mut board = Board::default();
    let complete = search(&mut judge, &mut board)?;
    let Some(best) = board.best.take() else {
        return Err(Error::config("plan", "no plan fits"));
    };
    let mut all: Vec<Timed> = board.kinds.into_values().collect();
    all.sort_by(Timed::order);
    let others = alternatives(&judge, &best, &all);
    let left_out = left_out(&judge, &best, &all);
    let unlimited = unlimited(workload, &machine, options, &best, &judge)?;
    Ok(Planned {
        alternatives: others.iter().map(|timed| candidate(&judge, timed)).collect::<Result<_>>()?,
        best: candidate(&judge, &best)?,
        left_out,
        unlimited,
        considered: judge.considered,
        evaluated: judge.simulated,
        complete,
    })
}

fn with_budgets(machine: &Machine, budgets: &[Option<u64>]) -> Machine {
    let mut machine = machine.clone();
    for (device, budget) in machine.devices.iter_mut().zip(budgets) {
        device.memory = budget.or(device.memory);
    }
    machine
}

fn candidate(judge: &Judge, timed: &Timed) -> Result<Candidate> {
    let Timed { point, recompute, .. } = timed;
    let (form, prices) = (judge.form(point), judge.prices(point));
    let mut costs = Costs::default();
    prices.fill(&assignment(&form.layout, &point.devices, &point.stages, recompute), &mut costs);
    let simulation = judge.simulator(point.form).simulate(&costs)?;
    Ok(Candidate {
        devices: point.devices.clone(),
        stages: point.stages.clone(),
        stage_ranks: form.layout.stage_ranks.clone(),
        schedule: form.schedule.clone(),
        batching: judge.space.batchings[form.batching],
        microbatches: form.schedule.microbatches,
        batch: prices.batching.sequences,
        recompute: recompute.clone(),
        tokens_per_second: prices.workload.tokens as f64 / simulation.step,
        costs,
        simulation,
    })
}

/// In what a plan differs from another: devices, their order, microbatches, schedule.
fn difference(judge: &Judge, one: &Timed, other: &Timed) -> [bool; 4] {
    let set = |timed: &Timed| {
        let mut devices = timed.point.devices.clone();
        devices.sort_unstable();
        devices
    };
    let (a, b) = (judge.form(&one.point), judge.form(&other.point));
    let kind = |timed: &Timed| {
        let schedule = &judge.form(&timed.point).schedule;
        (schedule.name.clone(), schedule.stages / schedule.ranks.len())
    };
    [
        set(one) != set(other),
        one.point.devices != other.point.devices,
        a.batching != b.batching,
        kind(one) != kind(other),
    ]
}

/// The best plans that differ from the best in kind: first the best of each single difference, then the rest.
fn alternatives<'t>(judge: &Judge, best: &Timed, all: &'t [Timed]) -> Vec<&'t Timed> {
    let mut seen: Vec<[bool; 4]> = vec![[false; 4]];
    let mut chosen: Vec<&Timed> = Vec::new();
    for timed in all {
        let how = difference(judge, timed, best);
        if chosen.len() < ALTERNATIVES && !seen.contains(&how) {
            seen.push(how);
            chosen.push(timed);
        }
    }
    let rest = all.iter().filter(|timed| difference(judge, timed, best) != [false; 4]);
    for timed in rest {
        if chosen.len() < ALTERNATIVES && !chosen.contains(&timed) {
            chosen.push(timed);
        }
    }
    chosen.sort_by(|a, b| a.step.total_cmp(&b.step));
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
            (None, None) => "no plan that uses it fits".to_string(),
        };
        LeftOut { device, reason }
    })
    .collect()
}

/// The stages that the same devices in the same schedule would have if memory were no limit, if they are others.
fn unlimited(
    workload: &Workload,
    machine: &Machine,
    options: &Options,
    best: &Timed,
    judge: &Judge,
) -> Result<Option<Vec<Range<usize>>>> {
    let form = judge.form(&best.point);
    if best.point.devices.iter().all(|&device| machine.devices[device].memory.is_none()) {
        return Ok(None);
    }
    let mut machine = machine.clone();
    machine.devices.iter_mut().for_each(|device| device.memory = None);
    let options = Options {
        devices: Some(best.point.devices.clone()),
        schedule: super::ScheduleChoice::Given(form.schedule.clone()),
        budgets: Vec::new(),
        ..options.clone()
    };
    let space = Space::new(workload, &machine, &options)?;
    let mut judge = Judge::new(&space)?;
    let wanted = judge.space.batchings.iter().position(|_| true);
    let Some(at) = wanted else { return Ok(None) };
    let point = Point { form: at, ..best.point.clone() };
    let found = improve(&mut judge, point, f64::INFINITY, 1_000_000)?;
    Ok(found.map(|timed| timed.point.stages).filter(|stages| *stages != best.point.stages))
}
