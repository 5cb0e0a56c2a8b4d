//! What to say when no plan fits: how far the closest one is from fitting, and what would help.

use std::ops::Range;

use super::form::{Form, Layout};
use super::improve::climb;
use super::judge::{Judge, NEVER, Point, lacking, one_stage};
use super::machine::{DeviceProfile, Machine};
use super::search::{Board, chunked_seed};
use super::space::Space;
use super::start::smallest_worst;
use super::text::bytes;
use super::workload::Workload;
use super::{Options, RecomputeChoice, ScheduleChoice};
use crate::error::{Error, Result};

/// Work spent on making a plan with several stages a rank fit.
const ALLOWANCE: u64 = 2_000_000;
/// With more sets of devices than this only the largest are looked at.
const MANY_SETS: usize = 64;

/// A plan that does not fit, and the bytes that each rank lacks.
struct Closest {
    point: Point,
    lacks: Vec<u64>,
}

impl Closest {
    fn worst(&self) -> u64 {
        self.lacks.iter().copied().max().unwrap_or_default()
    }
}

/// The error for options that leave no plan that fits.
pub(super) fn nothing_fits(workload: &Workload, machine: &Machine, options: &Options) -> Result<Error> {
    let limited = machine.within(&options.budgets);
    let Some(closest) = closest(workload, &limited, options)? else {
        return Ok(Error::no_plan("none comes close", Vec::new()));
    };
    let worst = closest.worst();
    let rank = closest.lacks.iter().position(|&lacks| lacks == worst).unwrap_or_default();
    let device = closest.point.devices[rank];
    let DeviceProfile { name, max_binding, memory, .. } = &limited.devices[device];
    let lacks = if worst >= NEVER {
        format!(
            "device {device} ({name}) binds at most {} at once, and {} has a larger tensor",
            bytes(max_binding.unwrap_or_default()),
            too_large(workload, &limited, device, &closest.point.stages)
        )
    } else {
        let budget = memory.unwrap_or_default();
        format!(
            "in the one that comes closest device {device} ({name}) lacks {worst} bytes: it needs {} and may use {}",
            bytes(budget + worst),
            bytes(budget)
        )
    };
    Ok(Error::no_plan(lacks, suggestions(workload, machine, options, &closest)?))
}

/// A layer of the stages whose tensors the device cannot bind.
fn too_large(workload: &Workload, machine: &Machine, device: usize, stages: &[Range<usize>]) -> String {
    let limit = machine.devices[device].max_binding.unwrap_or(u64::MAX);
    let mut layers = stages.iter().cloned().flatten();
    let smallest =
        |kind: usize| workload.batchings.iter().map(|b| b.largest_tensor[kind]).min().unwrap_or_default();
    let layer = layers.find(|&layer| smallest(workload.layers[layer].kind) > limit);
    layer.map_or("a layer".into(), |layer| format!("layer `{}`", workload.layers[layer].name))
}

/// The plan in which the worst rank lacks the least. With many sets of devices only plans that use nearly all of them
/// are looked at, and plans with several stages a rank only if there are no others.
fn closest(workload: &Workload, machine: &Machine, options: &Options) -> Result<Option<Closest>> {
    let space = Space::new(workload, machine, options)?;
    let mut judge = Judge::new(&space)?;
    let is_plain = space.forms.iter().any(Form::is_plain);
    let most = space.forms.iter().map(Form::ranks).max().unwrap_or_default();
    let least = if space.pool.sets() > MANY_SETS { most - 1 } else { 1 };
    let mut best: Option<Closest> = None;
    let mut seen: Vec<(usize, Layout)> = Vec::new();
    // Small microbatches on many devices are the most likely to fit.
    for (at, form) in space.forms.iter().enumerate().rev() {
        let layout = if space.auto && is_plain { form.layout.lean() } else { form.layout.clone() };
        let key = (form.batching, layout);
        if form.is_plain() != is_plain || form.ranks() < least || seen.contains(&key) {
            continue;
        }
        let found = closest_of_form(&mut judge, at, &key.1)?;
        seen.push(key);
        let worst = best.as_ref().map_or(u64::MAX, Closest::worst);
        best = found.filter(|found| found.worst() < worst).or(best);
        if best.as_ref().is_some_and(|best| best.worst() == 0) {
            break;
        }
    }
    Ok(best)
}

fn closest_of_form(judge: &mut Judge, at: usize, layout: &Layout) -> Result<Option<Closest>> {
    let space = judge.space;
    let form = &space.forms[at];
    let prices = &space.prices[form.batching];
    let point = if form.is_plain() {
        let marks = space.marks.len();
        // By rank and class, then by the marks where the layers start and end.
        let mut lacks: Vec<Vec<f64>> = Vec::new();
        for rank in 0..form.ranks() {
            for class in &space.pool.classes {
                let lacking = |marks: Range<usize>| {
                    let range = space.range(marks);
                    let choice = one_stage(prices, layout, rank, class[0], &range, &space.recompute);
                    choice.err().unwrap_or_default() as f64
                };
                let starts = (0..marks).flat_map(|start| (0..marks).map(move |end| start..end));
                lacks.push(starts.map(|marks| if marks.is_empty() { 0.0 } else { lacking(marks) }).collect());
            }
        }
        let price = |rank: usize, class: usize, range: Range<usize>| {
            lacks[rank * space.pool.classes.len() + class][range.start * marks + range.end]
        };
        let start = smallest_worst(space, form.ranks(), price).pop().flatten();
        start.map(|start| Point { form: at, devices: start.devices, stages: start.stages })
    } else {
        let fastest: Vec<_> =
            (0..space.prices.len()).map(|batching| space.fastest(batching, form.ranks())).collect();
        match chunked_seed(judge, &Board::default(), at, &fastest) {
            Some((_, seed)) => Some(climb(judge, seed, f64::INFINITY, ALLOWANCE)?.0),
            None => None,
        }
    };
    let Some(point) = point else { return Ok(None) };
    let lacks = |recompute: bool| {
        let all: Vec<bool> =
            (0..point.stages.len()).map(|stage| space.recompute.is_on(stage) || recompute).collect();
        lacking(prices, layout, &point.devices, &point.stages, &all)
    };
    let mut least = lacks(false);
    if space.recompute == RecomputeChoice::AsNeeded {
        least.iter_mut().zip(lacks(true)).for_each(|(least, other)| *least = (*least).min(other));
    }
    for (rank, own) in layout.own.iter().enumerate() {
        if own.iter().any(|&of| !prices.binds(point.devices[rank], &point.stages[layout.stage(of)])) {
            least[rank] = NEVER;
        }
    }
    Ok(Some(Closest { point, lacks: least }))
}

/// Whether there is a plan that fits.
///
/// # Errors
///
/// Those of [`plan`](super::plan()) for options that contradict one another.
pub fn fits(workload: &Workload, machine: &Machine, options: &Options) -> Result<bool> {
    let limited = machine.within(&options.budgets);
    Ok(closest(workload, &limited, options)?.is_some_and(|closest| closest.worst() == 0))
}

/// The changes with which a plan fits, in words that follow `it would fit with`.
fn suggestions(
    workload: &Workload,
    machine: &Machine,
    options: &Options,
    closest: &Closest,
) -> Result<Vec<String>> {
    let mut found = Vec::new();
    // Options that some schedule refuses are no help.
    let helps = |options: &Options| fits(workload, machine, options).unwrap_or(false);
    if options.recompute != RecomputeChoice::AsNeeded
        && helps(&Options { recompute: RecomputeChoice::AsNeeded, ..options.clone() })
    {
        found.push("recompute where it is needed".to_string());
    }
    if let Some(fixed) = options.microbatches {
        let more = workload.batchings.iter().map(|batching| batching.microbatches);
        let mut more: Vec<usize> = more.filter(|&count| count > fixed).collect();
        more.sort_unstable();
        let enough =
            more.into_iter().find(|&count| helps(&Options { microbatches: Some(count), ..options.clone() }));
        found.extend(enough.map(|count| format!("{count} smaller microbatches instead of {fixed}")));
    }
    if options.schedule != ScheduleChoice::Any
        && helps(&Options { schedule: ScheduleChoice::Any, ..options.clone() })
    {
        found.push("another schedule".to_string());
    }
    if options.cuts.is_some() && helps(&Options { cuts: None, ..options.clone() }) {
        found.push("other cuts".to_string());
    }
    if options.devices.is_some() && helps(&Options { devices: None, ..options.clone() }) {
        found.push("the order and choice of devices left to the planner".to_string());
    }
    let free = Options { budgets: options.budgets.clone(), ..Options::default() };
    if found.is_empty() && *options != free && helps(&free) {
        found.push("all choices left to the planner".to_string());
    }
    found.extend(another_device(workload, machine, options)?);
    found.extend(more_memory(workload, machine, options, closest)?);
    Ok(found)
}

/// One more device like one of those that are there.
fn another_device(workload: &Workload, machine: &Machine, options: &Options) -> Result<Option<String>> {
    if options.cuts.is_some() || matches!(options.schedule, ScheduleChoice::Given(_)) {
        return Ok(None);
    }
    let mut kinds: Vec<usize> = (0..machine.devices.len()).collect();
    kinds.sort_by_key(|&device| machine.devices[device].memory);
    for device in kinds {
        let mut larger = machine.within(&options.budgets);
        let new = larger.devices.len();
        larger.devices.push(machine.devices[device].clone());
        // The new device lies in the machine as the one it is like.
        for other in 0..new {
            let pairs =
                [(machine.link(device, other), new, other), (machine.link(other, device), other, new)];
            for (link, from, to) in pairs.into_iter().filter(|_| other != device) {
                larger.links.push(super::LinkProfile { from, to, link });
            }
        }
        larger.slowdown.clear();
        let devices = options.devices.as_ref().map(|order| [&order[..], &[new]].concat());
        if fits(workload, &larger, &Options { devices, ..options.clone() }).unwrap_or(false) {
            return Ok(Some(format!("one more device like {device} ({})", machine.devices[device].name)));
        }
    }
    Ok(None)
}

/// The budgets with which the closest plan fits, in whole MiB, where budgets that were given are what is in the way.
fn more_memory(
    workload: &Workload,
    machine: &Machine,
    options: &Options,
    closest: &Closest,
) -> Result<Option<String>> {
    let mut budgets = options.budgets.clone();
    budgets.resize(machine.devices.len(), None);
    let mut parts = Vec::new();
    for (&device, &lacks) in closest.point.devices.iter().zip(&closest.lacks).filter(|(_, lacks)| **lacks > 0)
    {
        let memory = machine.devices[device].memory;
        let needed = (budgets[device].or(memory).unwrap_or_default().saturating_add(lacks)).div_ceil(1 << 20);
        // No option gives a device memory that it does not have.
        if budgets[device].is_none() || memory.is_some_and(|memory| memory >> 20 < needed) {
            return Ok(None);
        }
        budgets[device] = Some(needed << 20);
        parts.push((device, format!("{device}={needed}MiB")));
    }
    parts.sort();
    let parts: Vec<String> = parts.into_iter().map(|(_, part)| part).collect();
    let fits = fits(workload, machine, &Options { budgets, ..options.clone() })?;
    Ok(fits.then(|| format!("--memory {}", parts.join(","))))
}
