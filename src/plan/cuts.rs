//! Every cut, one stage a rank, for given devices in a given order: depth first, leaving out what a bound excludes.

use std::ops::Range;

use super::RecomputeChoice;
use super::costs::Prices;
use super::form::Form;
use super::judge::{Judge, Point, Timed, Verdict, choices_of_stage};
use super::space::Space;
use crate::error::Result;

/// Units of work of a step of this search, and of pricing one range of layers.
const WORK_OF_NODE: u64 = 3;

/// Devices in order, and what each range of layers costs on each of them in one form.
pub(super) struct Cutter<'s> {
    space: &'s Space<'s>,
    form: usize,
    devices: Vec<usize>,
    ranks: Vec<Rank>,
    layers: usize,
    microbatches: f64,
}

/// One rank of a [`Cutter`].
struct Rank {
    /// `load[start * (layers + 1) + end]`: seconds of a microbatch; infinite if the layers do not fit.
    load: Vec<f64>,
    /// Seconds of the links on the rank's queue, in F and in I or B.
    queue: (f64, f64),
    /// Seconds from the rank before, and back to it.
    delay: (f64, f64),
    /// `rest[start]`: of the best cut of the layers from `start` on over the ranks from this one on, the worst load.
    rest: Vec<f64>,
    begin: f64,
}
