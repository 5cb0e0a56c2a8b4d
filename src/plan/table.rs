//! What every range of layers costs on every device at every rank of one form, worked out once.

use super::form::Form;
use super::judge::one_stage;
use super::space::Space;

/// Units of work (about 10 ns) of pricing one range of layers.
pub(super) const WORK_OF_NODE: u64 = 3;

/// What ranges of layers cost on each device at each rank of a form with one stage a rank.
pub(super) struct Table {
    /// How many marks there are.
    pub marks: usize,
    classes: usize,
    /// Seconds of a microbatch by rank, class of device and the marks where the layers start and end; infinite where it does not fit.
    load: Vec<f64>,
    /// Whether F must be repeated for that.
    recompute: Vec<bool>,
}

impl Table {
    pub fn new(space: &Space, form: &Form, work: &mut u64) -> Table {
        let prices = &space.prices[form.batching];
        let (marks, classes) = (space.marks.len(), space.pool.classes.len());
        let size = form.ranks() * classes * marks * marks;
        let mut table =
            Table { marks, classes, load: vec![f64::INFINITY; size], recompute: vec![false; size] };
        for rank in 0..form.ranks() {
            for (class, devices) in space.pool.classes.iter().enumerate() {
                for start in 0..marks - 1 {
                    for end in start + 1..marks {
                        *work += WORK_OF_NODE;
                        let range = space.range(start..end);
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

    /// Units of work of finding the best cut for one order of devices.
    pub fn work_of_order(&self) -> u64 {
        (self.load.len() / self.classes / 4) as u64
    }

    /// Seconds of a microbatch; infinite if the layers do not fit.
    pub fn load(&self, rank: usize, class: usize, start: usize, end: usize) -> f64 {
        self.load[self.at(rank, class, start, end)]
    }

    /// Whether they fit only because F is repeated.
    pub fn recompute(&self, rank: usize, class: usize, start: usize, end: usize) -> bool {
        self.recompute[self.at(rank, class, start, end)]
    }

    fn at(&self, rank: usize, class: usize, start: usize, end: usize) -> usize {
        ((rank * self.classes + class) * self.marks + start) * self.marks + end
    }
}
