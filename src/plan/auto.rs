//! Schedules made for the devices at hand, on the plans that have room for one.

use std::collections::HashSet;
use std::ops::Range;
use std::rc::Rc;

use super::RecomputeChoice;
use super::bound::lower_bound;
use super::form::{Form, Layout};
use super::improve::neighbours;
use super::judge::{Judge, Point, Timed, assignment, choices, lacking};
use super::search::{Board, GAIN};
use super::start::smallest_worst;
use super::table::Table;
use crate::error::Result;
use crate::schedule::{Costs, Effort, Simulator, StageCost, synthesise};

/// Schedules made at most for plans that were found, and again for plans close to the best of them.
const MOST_MADE: usize = 12;
/// Units of work (about 10 ns) of making one: so many for each microbatch and pair of stages.
const WORK_OF_MAKING: u64 = 3000;
/// Times that a schedule is made again with a smaller budget, because its links need more than was thought.
const ATTEMPTS: usize = 3;

/// Who computes what, before there is a schedule for it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Base {
    point: Point,
    recompute: Vec<bool>,
}

/// Makes schedules for the plans of the board where a bound leaves room for a faster one, and for plans close to the
/// best of these.
pub(super) fn make_schedules(judge: &mut Judge, board: &mut Board, allowance: u64) -> Result<()> {
    let until = judge.work + allowance;
    let mut bases = bases(judge, board);
    if board.best.is_none() {
        bases.extend(lean_bases(judge)?);
    }
    if !judge.space.named {
        // A made schedule is then no slower than the best that has a name.
        let first = bases.first().cloned();
        try_some(judge, board, first.into_iter().collect(), 1, until)?;
    }
    try_some(judge, board, bases, MOST_MADE, until)?;
    let mut left = MOST_MADE;
    while let Some(best) = best_made(judge, board).filter(|_| left > 0) {
        let mut near = Vec::new();
        for point in neighbours(judge, &best.point) {
            let form = judge.form(&point);
            let prices = judge.prices(&point);
            let wish = &judge.space.recompute;
            let Ok(all) = choices(prices, &form.layout, &point.devices, &point.stages, wish) else {
                continue;
            };
            let base = Base { recompute: all[0].clone(), point };
            near.push((bound(judge, &base), base));
        }
        let made = try_some(judge, board, near, left, until)?;
        left -= made;
        if made == 0 || best_made(judge, board).as_ref() == Some(&best) {
            break;
        }
    }
    Ok(())
}

/// The best plan, if its schedule was made for it or only such plans are wanted.
fn best_made(judge: &Judge, board: &Board) -> Option<Timed> {
    if judge.space.named {
        return board.best.clone().filter(|best| best.made.is_some());
    }
    let made = board.kinds.values().filter(|timed| timed.made.is_some());
    made.min_by(|a, b| a.order(b)).cloned()
}

/// Seconds in which a step must end for a schedule to be worth making.
fn to_beat(judge: &Judge, board: &Board) -> f64 {
    if judge.space.named {
        return board.to_beat();
    }
    best_made(judge, board).map_or(f64::INFINITY, |best| best.step * (1.0 - GAIN))
}

/// The plans of the board without their schedules, each once; those that repeat F also without repeating.
fn bases(judge: &Judge, board: &Board) -> Vec<(f64, Base)> {
    let space = judge.space;
    // The first form of the same batching and placement stands for all of them.
    let first = |form: usize| {
        let same = |other: &Form| {
            let of = &space.forms[form];
            other.batching == of.batching && other.layout.placement == of.layout.placement
        };
        space.forms.iter().position(same).unwrap_or(form)
    };
    let mut found: Vec<(f64, Base)> = Vec::new();
    let mut seen = HashSet::new();
    let mut plans: Vec<&Timed> = board.kinds.values().collect();
    plans.sort_by(|a, b| a.order(b));
    for plan in plans {
        let point = Point { form: first(plan.point.form), ..plan.point.clone() };
        let mut ways = vec![plan.recompute.clone()];
        if space.recompute == RecomputeChoice::AsNeeded && plan.recompute.contains(&true) {
            ways.push(vec![false; plan.recompute.len()]);
        }
        for recompute in ways {
            let base = Base { point: point.clone(), recompute };
            if seen.insert(base.clone()) {
                found.push((bound(judge, &base), base));
            }
        }
    }
    found
}

/// Plans whose stages fit with a single microbatch in flight.
fn lean_bases(judge: &mut Judge) -> Result<Vec<(f64, Base)>> {
    let space = judge.space;
    let mut found: Vec<(f64, Base)> = Vec::new();
    let mut done: Vec<(usize, usize)> = Vec::new();
    for (at, form) in space.forms.iter().enumerate() {
        if !form.is_plain() || done.contains(&(form.batching, form.ranks())) {
            continue;
        }
        done.push((form.batching, form.ranks()));
        let lean = Form { layout: form.layout.lean(), ..form.clone() };
        let table = Table::new(space, &lean, &mut judge.work);
        let price = |rank, class, marks: Range<usize>| table.load(rank, class, marks.start, marks.end);
        let Some(start) = smallest_worst(space, lean.ranks(), price).pop().flatten() else { continue };
        let point = Point { form: at, devices: start.devices, stages: start.stages };
        let prices = &space.prices[form.batching];
        let all = choices(prices, &lean.layout, &point.devices, &point.stages, &space.recompute);
        for recompute in all.unwrap_or_default() {
            let base = Base { point: point.clone(), recompute };
            found.push((bound(judge, &base), base));
        }
    }
    Ok(found)
}

/// Seconds that no schedule can beat.
fn bound(judge: &Judge, base: &Base) -> f64 {
    let form = judge.form(&base.point);
    let Point { devices, stages, .. } = &base.point;
    let mut costs = Costs::default();
    judge.prices(&base.point).fill(&assignment(&form.layout, devices, stages, &base.recompute), &mut costs);
    // A stage may have I and W apart, or B if that is shorter than both.
    for StageCost { input, weight, backward, .. } in &mut costs.stages {
        *weight = (backward.min(*input + *weight) - *input).max(0.0);
    }
    let microbatches = form.schedule.microbatches;
    let free = Layout {
        split: vec![true; stages.len()],
        ahead: vec![microbatches; stages.len()],
        ..form.layout.clone()
    };
    lower_bound(&free, microbatches, &costs)
}

/// Makes schedules for bases, those with the lowest bound first; returns for how many.
fn try_some(
    judge: &mut Judge,
    board: &mut Board,
    mut bases: Vec<(f64, Base)>,
    most: usize,
    until: u64,
) -> Result<usize> {
    bases.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut made = 0;
    for (bound, base) in bases {
        // The first is always made, however long it takes.
        let is_spent = made > 0 && judge.work >= until;
        if made == most || is_spent || bound >= to_beat(judge, board) {
            break;
        }
        made += 1;
        if let Some(timed) = make(judge, &base)? {
            board.offer(judge, timed);
        }
    }
    Ok(made)
}

/// Makes a schedule that fits, if there is one.
fn make(judge: &mut Judge, base: &Base) -> Result<Option<Timed>> {
    let Base { point, recompute } = base;
    let form = judge.form(point);
    let prices = judge.prices(point);
    let mut layout = form.layout.clone();
    let mut withheld = vec![0; point.devices.len()];
    for _ in 0..ATTEMPTS {
        let mut costs = Costs::default();
        prices.fill(&assignment(&layout, &point.devices, &point.stages, recompute), &mut costs);
        for (rank, withheld) in costs.ranks.iter_mut().zip(&withheld) {
            rank.budget = rank.budget.map(|budget: u64| budget.saturating_sub(*withheld));
        }
        judge.simulated += 1;
        judge.work += WORK_OF_MAKING * (point.stages.len().pow(2) * form.schedule.microbatches) as u64;
        let microbatches = form.schedule.microbatches;
        let stage_ranks: Vec<usize> = form.layout.placement.replicas().iter().map(|of| of.rank).collect();
        let Ok(schedule) = synthesise(&costs, &stage_ranks, microbatches, Effort::Quick) else {
            return Ok(None);
        };
        let made = Form::new(form.batching, schedule)?;
        let lacks = lacking(prices, &made.layout, &point.devices, &point.stages, recompute);
        if lacks.iter().all(|&bytes| bytes == 0) {
            let plan = assignment(&made.layout, &point.devices, &point.stages, recompute);
            prices.fill(&plan, &mut costs);
            let step = Simulator::new(&made.schedule, &costs.tied())?.step(&costs)?;
            return Ok(Some(Timed {
                point: point.clone(),
                recompute: recompute.clone(),
                step,
                unevenness: 0.0,
                made: Some(Rc::new(made)),
            }));
        }
        withheld.iter_mut().zip(lacks).for_each(|(withheld, lacks)| *withheld += lacks);
        layout = made.layout;
    }
    Ok(None)
}
