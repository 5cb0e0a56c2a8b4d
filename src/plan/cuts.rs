//! Every cut, one stage a rank, on devices in every order: depth first, leaving out what a bound excludes.

use super::costs::Prices;
use super::form::Form;
use super::judge::{Judge, Point};
use super::search::Board;
use super::space::{Pool, Space};
use super::table::{Table, WORK_OF_NODE};
use crate::error::Result;

/// The orders of so many devices, those of one class being alike; none if there are more than `most`.
pub(super) fn orders(pool: &Pool, ranks: usize, most: usize) -> Option<Vec<Vec<usize>>> {
    if let Some(order) = &pool.order {
        return Some(vec![order.clone()]);
    }
    let mut orders = vec![Vec::new()];
    for _ in 0..ranks {
        let mut longer = Vec::new();
        for order in &orders {
            for class in &pool.classes {
                let next = class.iter().find(|device| !order.contains(*device));
                longer.extend(next.map(|&device| [&order[..], &[device]].concat()));
            }
        }
        if longer.len() > most {
            return None;
        }
        orders = longer;
    }
    Some(orders)
}

/// Looks for cuts faster than the best plan of the board.
pub(super) struct Cutter<'a, 's> {
    form: &'a Form,
    prices: &'a Prices<'s>,
    table: &'a Table,
    space: &'s Space<'s>,
    ranks: Vec<Rank>,
    point: Point,
}

/// One rank of a [`Cutter`].
struct Rank {
    device: usize,
    class: usize,
    /// Seconds of the links on the rank's queue, in F and in I or B.
    queue: (f64, f64),
    /// Seconds on the way to the next rank, and back from it.
    delay: (f64, f64),
    /// Of the best cut of the layers from each mark on over the ranks from this one on, the worst load.
    rest: Vec<f64>,
}

impl<'a, 's> Cutter<'a, 's> {
    pub fn new(space: &'s Space<'s>, form: usize, table: &'a Table, devices: &[usize]) -> Cutter<'a, 's>
    where
        's: 'a,
    {
        let point = Point { form, devices: devices.to_vec(), stages: vec![0..0; devices.len()] };
        let form = &space.forms[form];
        let prices = &space.prices[form.batching];
        let rank = |rank: usize| {
            let device = devices[rank];
            let engine = prices.machine.devices[device].copy_engine;
            let mut queue = (0.0, 0.0);
            let mut delay = (0.0, 0.0);
            if let Some(&next) = devices.get(rank + 1) {
                let (onwards, back) = (prices.hop(device, next), prices.hop(next, device));
                delay = (onwards.delay(), back.delay());
                let (out, into) =
                    if engine { (&mut delay.0, &mut delay.1) } else { (&mut queue.0, &mut queue.1) };
                *out += onwards.out;
                *into += back.into;
                if prices.machine.devices[next].copy_engine {
                    delay.0 += onwards.into;
                    delay.1 += back.out;
                }
            }
            if rank > 0 && !engine {
                queue.0 += prices.hop(devices[rank - 1], device).into;
                queue.1 += prices.hop(device, devices[rank - 1]).out;
            }
            Rank { device, class: space.pool.class_of(device), queue, delay, rest: Vec::new() }
        };
        let ranks = (0..devices.len()).map(rank).collect();
        let mut cutter = Cutter { form, prices, table, space, ranks, point };
        cutter.fill_rest();
        cutter
    }

    /// The worst load of the best cut: what a rank has to do at least, whatever else happens.
    pub fn worst(&self) -> f64 {
        self.ranks[0].rest[0]
    }

    fn load(&self, rank: usize, start: usize, end: usize) -> f64 {
        let own = &self.ranks[rank];
        self.table.load(rank, own.class, start, end) + own.queue.0 + own.queue.1
    }

    /// The marks at which the stage of a rank may end that starts at a mark.
    fn ends(&self, rank: usize, start: usize) -> std::ops::RangeInclusive<usize> {
        let (last, after) = (self.table.marks - 1, self.ranks.len() - rank - 1);
        match after {
            0 => last..=last,
            _ if self.space.is_cut => start + 1..=start + 1,
            _ => start + 1..=last - after,
        }
    }

    fn fill_rest(&mut self) {
        let marks = self.table.marks;
        for rank in (0..self.ranks.len()).rev() {
            let mut rest = vec![f64::INFINITY; marks];
            for (start, best) in rest.iter_mut().enumerate().take(marks - 1) {
                for end in self.ends(rank, start).filter(|&end| end > start) {
                    let load = self.load(rank, start, end);
                    let after = self.ranks.get(rank + 1).map_or(0.0, |next| next.rest[end]);
                    *best = best.min(load.max(after));
                }
            }
            self.ranks[rank].rest = rest;
        }
    }

    /// Offers the board every plan that may be faster than its best. False if the judge had more to do than `until`.
    pub fn search(&mut self, judge: &mut Judge, board: &mut Board, until: u64) -> Result<bool> {
        self.descend(judge, board, until, 0, 0, 0.0, 0.0)
    }

    /// Places the ranks from `rank` on, whose layers begin at the mark `start`; their first input can be there at `fill`, and
    /// `tail` is from the last gradient of `rank` to the end of the step.
    #[allow(clippy::too_many_arguments, reason = "the state of a recursion")]
    fn descend(
        &mut self,
        judge: &mut Judge,
        board: &mut Board,
        until: u64,
        rank: usize,
        start: usize,
        fill: f64,
        tail: f64,
    ) -> Result<bool> {
        if rank == self.ranks.len() {
            let cutoff = board.to_beat();
            board.consider(judge, &self.point, cutoff)?;
            return Ok(judge.work < until);
        }
        let m = self.form.schedule.microbatches as f64;
        let split = self.form.layout.split[rank];
        for end in self.ends(rank, start).filter(|&end| end > start) {
            judge.work += WORK_OF_NODE;
            let load = self.load(rank, start, end);
            // With more layers it only gets worse, except where a tie or the end of the model saves memory.
            if !load.is_finite() {
                continue;
            }
            if fill + m * load >= board.to_beat() {
                break;
            }
            let own = &self.ranks[rank];
            let recompute = self.table.recompute(rank, own.class, start, end);
            let cost = self.prices.stage(own.device, &self.space.range(start..end), recompute);
            let forward = cost.forward + own.queue.0;
            let (back, rest) = if split { (cost.input, cost.weight) } else { (cost.backward, 0.0) };
            let back = back + own.queue.1;
            let longest = m * (forward + back) + tail.max(m * rest);
            let after = fill + forward + own.delay.0;
            let others = self.ranks.get(rank + 1).map_or(0.0, |next| after + m * next.rest[end]);
            if (fill + longest).max(others) >= board.to_beat() {
                continue;
            }
            self.point.stages[rank] = self.space.range(start..end);
            let tail = tail.max(rest) + back + own.delay.1;
            if !self.descend(judge, board, until, rank + 1, end, after, tail)? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Offers the board every plan of a form with several stages a rank on these devices. False if the judge had more to do
/// than `until`.
pub(super) fn search_chunked(
    judge: &mut Judge,
    board: &mut Board,
    form: usize,
    devices: &[usize],
    until: u64,
) -> Result<bool> {
    let space = judge.space;
    let stages = space.forms[form].stages();
    let last = space.marks.len() - 1;
    let mut ends: Vec<usize> = (1..stages).chain([last]).collect();
    loop {
        let starts = std::iter::once(0).chain(ends.iter().copied());
        let ranges = starts.zip(&ends).map(|(start, &end)| space.range(start..end));
        let point = Point { form, devices: devices.to_vec(), stages: ranges.collect() };
        let cutoff = board.to_beat();
        board.consider(judge, &point, cutoff)?;
        if judge.work >= until {
            return Ok(false);
        }
        // The next cut in lexicographic order: the last boundary that can move does, and those after it follow.
        let room = |at: &usize| ends[*at] < last - (stages - 1 - at);
        let Some(at) = (0..stages - 1).rev().find(room) else {
            return Ok(true);
        };
        let first = ends[at] + 1;
        (at..stages - 1).for_each(|i| ends[i] = first + i - at);
    }
}
