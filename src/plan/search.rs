//! The search for the fastest plan.
//!
//! First, for every schedule, the cut with the least work for the busiest rank is made by dynamic programming and
//! improved by small changes. Then all cuts on all orders of devices are gone through, depth first, except those that a
//! lower bound shows to be no faster than the best plan so far. Where that is too much, the best plan so far stays.

use std::collections::HashMap;
use std::ops::Range;

use super::bound;
use super::cuts::{Cutter, orders, search_chunked};
use super::form::Form;
use super::improve::{SAME, improve, shaken};
use super::judge::{Judge, Point, Timed, Verdict};
use super::space::Space;
use super::start::{Start, smallest_worst};
use super::table::{Table, WORK_OF_NODE};
use crate::error::Result;
use crate::schedule::random::Random;

/// More orders of devices than this are not gone through one by one.
const MOST_ORDERS: usize = 2000;
/// More cuts of one schedule with several stages a rank are not gone through one by one.
const MOST_CHUNKED_CUTS: usize = 50_000;
/// Relative gain that is worth looking for.
pub(super) const GAIN: f64 = 1e-9;
/// Seeds slower than the best one by this factor are not improved.
const HOPELESS: f64 = 1.5;
/// How many plans are shaken when there are too many to go through.
const GOOD: usize = 12;

/// The fastest plan of each kind so far.
#[derive(Debug, Default)]
pub(super) struct Board {
    pub best: Option<Timed>,
    /// By form, devices in order, and whether the schedule was made for the plan.
    pub kinds: HashMap<(usize, Vec<usize>, bool), Timed>,
}

impl Board {
    /// Seconds that a plan must not reach to count as faster than the best.
    pub fn to_beat(&self) -> f64 {
        self.best.as_ref().map_or(f64::INFINITY, |best| best.step * (1.0 - GAIN))
    }

    /// The best of each kind that the options allow, the fastest first.
    pub fn ranked(&self, space: &Space) -> Vec<Timed> {
        let allowed = |timed: &&Timed| space.named || timed.made.is_some();
        let mut all: Vec<Timed> = self.kinds.values().filter(allowed).cloned().collect();
        all.sort_by(Timed::order);
        all
    }

    /// Judges a plan, and keeps it if it is the best of all or of its kind.
    pub fn consider(&mut self, judge: &mut Judge, point: &Point, cutoff: f64) -> Result<()> {
        if let Verdict::Fits(timed) = judge.judge(point, cutoff)? {
            self.offer(judge, timed);
        }
        Ok(())
    }

    pub fn offer(&mut self, judge: &Judge, timed: Timed) {
        let faster = |other: Option<&Timed>| match other {
            None => true,
            Some(other) if timed.step < other.step * (1.0 - SAME) => true,
            Some(other) if timed.step > other.step * (1.0 + SAME) => false,
            Some(other) => simplicity(judge, &timed) < simplicity(judge, other),
        };
        let kind = (timed.point.form, timed.point.devices.clone(), timed.made.is_some());
        if faster(self.kinds.get(&kind)) {
            self.kinds.insert(kind, timed.clone());
        }
        if faster(self.best.as_ref()) {
            self.best = Some(timed);
        }
    }
}

/// Of equally fast plans the one with the fewest devices is preferred, then one with a published schedule, then the one
/// that keeps the fewest microbatches.
fn simplicity(judge: &Judge, timed: &Timed) -> (usize, bool, usize, usize) {
    let form = judge.form_of(timed);
    (form.ranks(), timed.made.is_some(), form.layout.stash.iter().sum(), timed.point.form)
}

/// Units of work (about 10 ns) that planning may take in all: about a second for 32 layers on 4 devices.
pub(super) fn allowance(space: &Space) -> u64 {
    120_000_000 * (1 + (space.layers() * space.pool.len() / 128).min(8) as u64)
}

/// Fills the board, with so much work. True if no plan can be faster than the best of it.
pub(super) fn search(judge: &mut Judge, board: &mut Board, limit: u64) -> Result<bool> {
    let space = judge.space;
    let layers = space.layers();
    let most = space.pool.len().min(layers);
    let fastest: Vec<Vec<Option<Start>>> =
        (0..space.prices.len()).map(|batching| space.fastest(batching, most)).collect();
    let (plain, chunked): (Vec<usize>, Vec<usize>) =
        (0..space.forms.len()).partition(|&form| space.forms[form].is_plain());

    let mut seeds = Vec::new();
    for &form in &plain {
        seeds.extend(plain_seed(judge, form, &fastest)?);
    }
    grow(judge, board, seeds, limit / 4)?;
    let mut seeds = Vec::new();
    for &form in &chunked {
        seeds.extend(chunked_seed(judge, board, form, &fastest));
    }
    let until = judge.work.max(limit / 4) + limit / 4;
    grow(judge, board, seeds, until)?;

    let mut bounds: Vec<(f64, usize)> =
        (0..space.forms.len()).map(|form| (form_bound(space, form, &fastest), form)).collect();
    bounds.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut complete = space.is_fine();
    for (bound, form) in bounds {
        if bound >= board.to_beat() {
            break;
        }
        let all = if space.forms[form].is_plain() {
            exhaust(judge, board, form, limit)?
        } else {
            exhaust_chunked(judge, board, form, limit)?
        };
        complete &= all;
    }
    if !complete {
        wander(judge, board, judge.work + limit / 4)?;
    }
    Ok(complete)
}

/// Shakes good plans and improves what comes of it, until so much work is done.
fn wander(judge: &mut Judge, board: &mut Board, until: u64) -> Result<()> {
    let mut random = Random(0);
    let mut good: Vec<Timed> = board.kinds.values().cloned().collect();
    good.sort_by(Timed::order);
    good.truncate(GOOD);
    while judge.work < until && !good.is_empty() {
        // The better, the more often.
        let at = random.below(good.len()).min(random.below(good.len()));
        let point = shaken(judge, &good[at].point, &mut random);
        let left = until.saturating_sub(judge.work);
        let cutoff = good[at].step * HOPELESS;
        // Even a plan that is left at once has cost something.
        judge.work += WORK_OF_NODE;
        let Some(timed) = improve(judge, point, cutoff, left)? else { continue };
        board.offer(judge, timed.clone());
        if timed.step < good[at].step * (1.0 - SAME) {
            good[at] = timed;
            good.sort_by(Timed::order);
        }
    }
    Ok(())
}

/// Seconds that no plan of a form can beat.
fn form_bound(space: &Space, form: usize, fastest: &[Vec<Option<Start>>]) -> f64 {
    let form = &space.forms[form];
    let prices = &space.prices[form.batching];
    let load = if form.is_plain() {
        fastest[form.batching][form.ranks()].as_ref().map_or(f64::INFINITY, |start| start.worst)
    } else {
        bound::even_load(prices, &space.pool, form.ranks())
    };
    form.schedule.microbatches as f64 * load
}

/// The best balanced cut of a form with one stage a rank, with memory as a limit if need be.
fn plain_seed(
    judge: &mut Judge,
    form: usize,
    fastest: &[Vec<Option<Start>>],
) -> Result<Option<(f64, Point)>> {
    let space = judge.space;
    let of = &space.forms[form];
    let Some(start) = &fastest[of.batching][of.ranks()] else { return Ok(None) };
    let point = Point { form, devices: start.devices.clone(), stages: start.stages.clone() };
    match judge.judge(&point, f64::INFINITY)? {
        Verdict::Fits(timed) => return Ok(Some((timed.step, point))),
        Verdict::Slow => return Ok(None),
        Verdict::Unfit(_) => {}
    }
    let table = Table::new(space, of, &mut judge.work);
    judge.work +=
        WORK_OF_NODE * (space.pool.sets() * space.pool.classes.len()) as u64 * table.work_of_order();
    let price = |rank, class, marks: Range<usize>| table.load(rank, class, marks.start, marks.end);
    let mut starts = smallest_worst(space, of.ranks(), price);
    let Some(start) = starts.pop().flatten() else { return Ok(None) };
    let point = Point { form, devices: start.devices, stages: start.stages };
    Ok(match judge.judge(&point, f64::INFINITY)? {
        Verdict::Fits(timed) => Some((timed.step, point)),
        _ => None,
    })
}

/// For a form with several stages a rank: the layers that each rank has in the best plan with one stage a rank, shared
/// evenly among its stages.
pub(super) fn chunked_seed(
    judge: &mut Judge,
    board: &Board,
    form: usize,
    fastest: &[Vec<Option<Start>>],
) -> Option<(f64, Point)> {
    let space = judge.space;
    let of = &space.forms[form];
    let same = |timed: &&Timed| {
        let other = &space.forms[timed.point.form];
        other.is_plain() && other.batching == of.batching && other.ranks() == of.ranks()
    };
    let best = board.kinds.values().filter(same).min_by(|a, b| a.order(b));
    let start = fastest[of.batching][of.ranks()].as_ref();
    let first = || {
        let all = space.pool.classes.iter().flatten().copied();
        space.pool.order.clone().unwrap_or(all.take(of.ranks()).collect())
    };
    let (devices, stages) = match (best, start) {
        _ if space.is_cut => (first(), Vec::new()),
        // Of replicas each has the stages that as many ranks as there are stages would have.
        _ if !of.layout.placement.is_single() => {
            let start = fastest[of.batching].get(of.stages()).and_then(Option::as_ref);
            let even = || (0..of.stages()).map(|at| at * space.layers() / of.stages());
            let ends = even().skip(1).chain([space.layers()]);
            let even: Vec<_> = even().zip(ends).map(|(start, end)| start..end).collect();
            (first(), start.map_or(even, |start| start.stages.clone()))
        }
        (Some(timed), _) => (timed.point.devices.clone(), timed.point.stages.clone()),
        (None, Some(start)) => (start.devices.clone(), start.stages.clone()),
        (None, None) => return None,
    };
    let stages = if space.is_cut {
        (0..of.stages()).map(|stage| space.range(stage..stage + 1)).collect()
    } else if !of.layout.placement.is_single() {
        stages
    } else {
        shared_out(of, &stages, space.layers())
    };
    let point = Point { form, devices, stages };
    let step = match judge.judge(&point, f64::INFINITY) {
        Ok(Verdict::Fits(timed)) => timed.step,
        // A plan that does not fit is the last to be tried.
        _ => f64::INFINITY,
    };
    Some((step, point))
}

/// Gives each stage of a form an even part of the layers that its rank has in `ranks`.
fn shared_out(form: &Form, ranks: &[Range<usize>], layers: usize) -> Vec<Range<usize>> {
    let stages = form.stages();
    let (mut done, mut start) = (0.0, 0);
    let mut ranges = Vec::new();
    for (stage, of) in form.layout.placement.replicas().iter().enumerate() {
        done += ranks[of.rank].len() as f64 / form.layout.own[of.rank].len() as f64;
        // At least a layer for each stage, before and after.
        let end = (done.round() as usize).clamp(start + 1, layers - (stages - stage - 1));
        ranges.push(start..end);
        start = end;
    }
    ranges
}

/// Improves seeds, the best first, until so much work is done.
fn grow(judge: &mut Judge, board: &mut Board, mut seeds: Vec<(f64, Point)>, until: u64) -> Result<()> {
    seeds.sort_by(|a, b| a.0.total_cmp(&b.0));
    for (step, point) in seeds {
        let best = board.best.as_ref().map_or(f64::INFINITY, |best| best.step);
        let is_hopeless = step.is_finite() && step > best * HOPELESS;
        let left = until.saturating_sub(judge.work);
        let allowance = if is_hopeless || left == 0 { 0 } else { left / 4 + 1 };
        if let Some(timed) = improve(judge, point, f64::INFINITY, allowance)? {
            board.offer(judge, timed);
        }
    }
    Ok(())
}

/// Goes through all cuts and orders of a form with one stage a rank.
fn exhaust(judge: &mut Judge, board: &mut Board, form: usize, limit: u64) -> Result<bool> {
    let space = judge.space;
    let of = &space.forms[form];
    let Some(orders) = orders(&space.pool, of.ranks(), MOST_ORDERS) else { return Ok(false) };
    if judge.work >= limit {
        return Ok(false);
    }
    let table = Table::new(space, of, &mut judge.work);
    let mut cutters: Vec<Cutter> =
        orders.iter().map(|devices| Cutter::new(space, form, &table, devices)).collect();
    judge.work += cutters.len() as u64 * table.work_of_order();
    cutters.sort_by(|a, b| a.worst().total_cmp(&b.worst()));
    for cutter in &mut cutters {
        if of.schedule.microbatches as f64 * cutter.worst() >= board.to_beat() {
            return Ok(true);
        }
        if !cutter.search(judge, board, limit)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Goes through all cuts and orders of a form with several stages a rank, if they are few.
fn exhaust_chunked(judge: &mut Judge, board: &mut Board, form: usize, limit: u64) -> Result<bool> {
    let space = judge.space;
    let of = &space.forms[form];
    let Some(orders) = orders(&space.pool, of.ranks(), MOST_ORDERS) else { return Ok(false) };
    let cuts = binomial(space.marks.len() - 2, of.stages() - 1);
    if cuts.and_then(|cuts| cuts.checked_mul(orders.len())).is_none_or(|plans| plans > MOST_CHUNKED_CUTS) {
        return Ok(false);
    }
    for devices in orders {
        if judge.work >= limit || !search_chunked(judge, board, form, &devices, limit)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// How many ways there are to choose `k` of `n`; none if very many.
fn binomial(n: usize, k: usize) -> Option<usize> {
    (0..k.min(n - k)).try_fold(1usize, |ways, i| Some(ways.checked_mul(n - i)? / (i + 1)))
}
