//! Every cut, one stage a rank, on devices in every order: depth first, leaving out what a bound excludes.

use super::costs::Prices;
use super::form::Form;
use super::judge::{Judge, Point, one_stage};
use super::search::Board;
use super::space::{Pool, Space};
use crate::error::Result;

/// Units of work of one step down, and of pricing one range of layers.
const WORK_OF_NODE: u64 = 3;

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

/// What ranges of layers cost on each device at each rank of a form with one stage a rank.
pub(super) struct Table {
    layers: usize,
    classes: usize,
    /// Seconds of a microbatch by rank, class of device, first layer and end; infinite where it does not fit.
    load: Vec<f64>,
    /// Whether F must be repeated for that.
    recompute: Vec<bool>,
}

impl Table {
    pub fn new(space: &Space, form: &Form, work: &mut u64) -> Table {
        let prices = &space.prices[form.batching];
        let (layers, classes) = (prices.workload.layers.len(), space.pool.classes.len());
        let size = form.ranks() * classes * (layers + 1) * (layers + 1);
        let mut table =
            Table { layers, classes, load: vec![f64::INFINITY; size], recompute: vec![false; size] };
        for rank in 0..form.ranks() {
            for (class, devices) in space.pool.classes.iter().enumerate() {
                for start in 0..layers {
                    for end in start + 1..=layers {
                        *work += WORK_OF_NODE;
                        let range = start..end;
                        let choice =
                            one_stage(prices, &form.layout, rank, devices[0], &range, &space.recompute);
                        let Ok(recompute) = choice else { continue };
                        let at = table.at(rank, class, start, end);
                        let cost = prices.stage(devices[0], &range, recompute);
                        let back =
                            if form.layout.split[rank] { cost.input + cost.weight } else { cost.backward };
                        table.load[at] = cost.forward + back;
                        table.recompute[at] = recompute;
                    }
                }
            }
        }
        table
    }

    /// Units of work of making a [`Cutter`].
    pub fn work_of_order(&self) -> u64 {
        (self.load.len() / self.classes / 4) as u64
    }

    fn at(&self, rank: usize, class: usize, start: usize, end: usize) -> usize {
        ((rank * self.classes + class) * (self.layers + 1) + start) * (self.layers + 1) + end
    }
}

/// Looks for cuts faster than the best plan of the board.
pub(super) struct Cutter<'a, 's> {
    form: &'a Form,
    prices: &'a Prices<'s>,
    table: &'a Table,
    cuts: Option<&'a [usize]>,
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
    /// Of the best cut of the layers from each on over the ranks from this one on, the worst load.
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
        let mut cutter = Cutter { form, prices, table, cuts: space.cuts.as_deref(), ranks, point };
        cutter.fill_rest();
        cutter
    }

    /// The worst load of the best cut: what a rank has to do at least, whatever else happens.
    pub fn worst(&self) -> f64 {
        self.ranks[0].rest[0]
    }

    fn load(&self, rank: usize, start: usize, end: usize) -> f64 {
        let own = &self.ranks[rank];
        self.table.load[self.table.at(rank, own.class, start, end)] + own.queue.0 + own.queue.1
    }

    /// Where the stage of a rank may end that starts at `start`.
    fn ends(&self, rank: usize, start: usize) -> std::ops::RangeInclusive<usize> {
        let after = self.ranks.len() - rank - 1;
        match self.cuts {
            _ if after == 0 => self.table.layers..=self.table.layers,
            None => start + 1..=self.table.layers - after,
            Some(cuts) => cuts[rank]..=cuts[rank],
        }
    }

    fn fill_rest(&mut self) {
        let layers = self.table.layers;
        for rank in (0..self.ranks.len()).rev() {
            let mut rest = vec![f64::INFINITY; layers + 1];
            for (start, best) in rest.iter_mut().enumerate().take(layers) {
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

    /// Places the ranks from `rank` on, whose layers begin at `start`; their first input can be there at `fill`, and
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
            let recompute = self.table.recompute[self.table.at(rank, own.class, start, end)];
            let cost = self.prices.stage(own.device, &(start..end), recompute);
            let forward = cost.forward + own.queue.0;
            let (back, rest) = if split { (cost.input, cost.weight) } else { (cost.backward, 0.0) };
            let back = back + own.queue.1;
            let longest = m * (forward + back) + tail.max(m * rest);
            let after = fill + forward + own.delay.0;
            let others = self.ranks.get(rank + 1).map_or(0.0, |next| after + m * next.rest[end]);
            if (fill + longest).max(others) >= board.to_beat() {
                continue;
            }
            self.point.stages[rank] = start..end;
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
    let layers = space.prices[0].workload.layers.len();
    let stages = space.forms[form].stages();
    let mut ends: Vec<usize> = match &space.cuts {
        Some(cuts) => cuts.iter().copied().chain([layers]).collect(),
        None => (1..stages).chain([layers]).collect(),
    };
    loop {
        let starts = std::iter::once(0).chain(ends.iter().copied());
        let point = Point {
            form,
            devices: devices.to_vec(),
            stages: starts.zip(&ends).map(|(start, &end)| start..end).collect(),
        };
        let cutoff = board.to_beat();
        board.consider(judge, &point, cutoff)?;
        if judge.work >= until {
            return Ok(false);
        }
        // The next cut in lexicographic order: the last boundary that can move does, and those after it follow.
        let room = |at: &usize| ends[*at] < layers - (stages - 1 - at);
        let Some(at) = (0..stages - 1).rev().find(room).filter(|_| space.cuts.is_none()) else {
            return Ok(true);
        };
        let first = ends[at] + 1;
        (at..stages - 1).for_each(|i| ends[i] = first + i - at);
    }
}
