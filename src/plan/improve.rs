//! Local search: one plan is changed in small ways for as long as that helps.

use std::ops::Range;

use super::costs::Prices;
use super::form::Layout;
use super::judge::{Judge, Point, Timed, Verdict};
use super::start::seconds;
use crate::error::Result;
use crate::schedule::random::Random;

/// Relative difference of times below which two plans count as equally fast.
pub(super) const SAME: f64 = 1e-12;
/// With more stages than this only some moves are tried.
const FEW_STAGES: usize = 8;

/// A small change of a plan.
#[derive(Debug, Clone, Copy)]
enum Move {
    /// Moves the boundaries between two stages so that the first loses a layer and the second gains one.
    Layer { from: usize, to: usize },
    /// Exchanges the devices of two ranks, and the numbers of layers too if `layers`.
    Swap { a: usize, b: usize, layers: bool },
    /// Gives a rank a device that has none.
    Replace { rank: usize, device: usize },
}

/// Changes `start` until no small change makes it faster, or until `allowance` is spent; from a plan that does not fit
/// the search first goes to one that does. None if there is no such way, or if the plan is slower than `cutoff`.
pub(super) fn improve(judge: &mut Judge, start: Point, cutoff: f64, allowance: u64) -> Result<Option<Timed>> {
    Ok(climb(judge, start, cutoff, allowance)?.1.ok())
}

/// As [`improve`]; if no plan fits, the one that lacks the least, and the bytes it lacks, which are 0 if it is slower
/// than `cutoff`.
pub(super) fn climb(
    judge: &mut Judge,
    start: Point,
    cutoff: f64,
    allowance: u64,
) -> Result<(Point, std::result::Result<Timed, u64>)> {
    let until = judge.work + allowance;
    let mut point = start;
    let mut best = match judge.judge(&point, cutoff)? {
        Verdict::Slow => return Ok((point, Err(0))),
        Verdict::Fits(timed) => Ok(timed),
        Verdict::Unfit(lacking) => Err(lacking),
    };
    let mut list = moves(judge, &point);
    let (mut at, mut without_gain) = (0, 0);
    while without_gain < list.len() && judge.work < until {
        let change = list[at % list.len()];
        without_gain += 1;
        at += 1;
        let Some(next) = apply(judge, &point, change) else { continue };
        let limit = best.as_ref().map_or(cutoff, |best| best.step * (1.0 + SAME));
        let found = match (judge.judge(&next, limit)?, &best) {
            (Verdict::Fits(timed), Ok(best)) if is_better(&timed, best) => Ok(timed),
            (Verdict::Fits(timed), Err(_)) => Ok(timed),
            (Verdict::Unfit(lacking), Err(least)) if lacking < *least => Err(lacking),
            _ => continue,
        };
        best = found;
        point = next;
        list = moves(judge, &point);
        // What helped once may help again.
        at -= 1;
        without_gain = 0;
    }
    Ok((point, best))
}

/// The plans one small change away.
pub(super) fn neighbours(judge: &Judge, point: &Point) -> Vec<Point> {
    moves(judge, point).into_iter().filter_map(|change| apply(judge, point, change)).collect()
}

/// A plan some random changes away from another.
pub(super) fn shaken(judge: &Judge, point: &Point, random: &mut Random) -> Point {
    let mut point = point.clone();
    for _ in 0..2 + random.below(3) {
        let moves = moves(judge, &point);
        let Some(&change) = moves.get(random.below(moves.len().max(1))) else { break };
        point = apply(judge, &point, change).unwrap_or(point);
    }
    point
}

/// Faster, or as fast and more even.
fn is_better(one: &Timed, other: &Timed) -> bool {
    if one.step < other.step * (1.0 - SAME) {
        return true;
    }
    one.step <= other.step * (1.0 + SAME) && one.unevenness < other.unevenness * (1.0 - 1e-9)
}

fn moves(judge: &Judge, point: &Point) -> Vec<Move> {
    let form = judge.form(point);
    let stages = point.stages.len();
    let mut moves = Vec::new();
    if !judge.space.is_cut {
        let heaviest = heaviest_rank(judge, point);
        for from in 0..stages {
            let is_heavy = form.layout.placement.holds(heaviest, from);
            for to in 0..stages {
                let is_tried = stages <= FEW_STAGES || is_heavy || from.abs_diff(to) == 1;
                if from != to && point.stages[from].len() > 1 && is_tried {
                    moves.push(Move::Layer { from, to });
                }
            }
        }
    }
    let pool = &judge.space.pool;
    if pool.order.is_some() {
        return moves;
    }
    let class = |device: &usize| pool.class_of(*device);
    for (a, first) in point.devices.iter().enumerate() {
        for (b, second) in point.devices.iter().enumerate().skip(a + 1) {
            if class(first) != class(second) {
                moves.push(Move::Swap { a, b, layers: false });
                if !judge.space.is_cut {
                    moves.push(Move::Swap { a, b, layers: true });
                }
            }
        }
    }
    for devices in &pool.classes {
        let Some(&device) = devices.iter().find(|device| !point.devices.contains(device)) else { continue };
        for (rank, other) in point.devices.iter().enumerate() {
            if class(other) != class(&device) {
                moves.push(Move::Replace { rank, device });
            }
        }
    }
    moves
}

/// The rank that has the most to do.
fn heaviest_rank(judge: &Judge, point: &Point) -> usize {
    let loads = loads(judge.prices(point), &judge.form(point).layout, &point.devices, &point.stages);
    (0..loads.len()).max_by(|&a, &b| loads[a].total_cmp(&loads[b])).unwrap_or_default()
}

/// The least seconds that each rank has to work in a step.
fn loads(prices: &Prices, layout: &Layout, devices: &[usize], stages: &[Range<usize>]) -> Vec<f64> {
    let load = |(rank, own): (usize, &Vec<usize>)| -> f64 {
        let of = |&replica: &usize| {
            layout.shares[replica] as f64 * seconds(prices, devices[rank], &stages[layout.stage(replica)])
        };
        own.iter().map(of).sum()
    };
    layout.own.iter().enumerate().map(load).collect()
}

/// The changed plan, if there is one.
fn apply(judge: &Judge, point: &Point, change: Move) -> Option<Point> {
    let mut next = point.clone();
    match change {
        Move::Layer { from, to } => {
            if next.stages[from].len() < 2 {
                return None;
            }
            if from < to {
                for stage in from..to {
                    next.stages[stage].end -= 1;
                    next.stages[stage + 1].start -= 1;
                }
            } else {
                for stage in to..from {
                    next.stages[stage].end += 1;
                    next.stages[stage + 1].start += 1;
                }
            }
        }
        Move::Swap { a, b, layers } => {
            next.devices.swap(a, b);
            if layers {
                let layout = &judge.form(point).layout;
                let mut sizes: Vec<usize> = next.stages.iter().map(ExactSizeIterator::len).collect();
                let pairs = layout.own[a].iter().zip(&layout.own[b]);
                pairs.for_each(|(&one, &other)| sizes.swap(layout.stage(one), layout.stage(other)));
                let mut start = 0;
                for (stage, size) in next.stages.iter_mut().zip(sizes) {
                    *stage = start..start + size;
                    start += size;
                }
            }
        }
        Move::Replace { rank, device } => next.devices[rank] = device,
    }
    Some(next)
}
