//! What one plan is worth: whether it fits, which stages must repeat F for that, and how long its step takes.

use std::ops::Range;
use std::rc::Rc;

use super::RecomputeChoice;
use super::bound::lower_bound;
use super::costs::{Assignment, Prices};
use super::form::{Form, Layout, MOST_CHUNKS};
use super::space::Space;
use super::traffic::{Part, part};
use super::workload::StageForm;
use crate::error::Result;
use crate::schedule::{Costs, Simulator};

/// A plan before it is judged.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Point {
    /// Position in [`Space::forms`].
    pub form: usize,
    /// The machine's device of each rank.
    pub devices: Vec<usize>,
    /// Layers of each stage.
    pub stages: Vec<Range<usize>>,
}

/// A plan that fits, and its time.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Timed {
    pub point: Point,
    pub recompute: Vec<bool>,
    /// Seconds of a step.
    pub step: f64,
    /// The schedule that was made for it; none for that of its form.
    pub made: Option<Rc<Form>>,
    /// Sum of the squares of what each rank has to do: of two equally fast plans the more even one is better to go on
    /// from.
    pub unevenness: f64,
}

impl Timed {
    /// By time; of equally fast plans always the same first.
    pub fn order(&self, other: &Timed) -> std::cmp::Ordering {
        let place = |timed: &Timed| (timed.point.form, timed.made.is_some(), timed.point.devices.clone());
        self.step.total_cmp(&other.step).then_with(|| place(self).cmp(&place(other)))
    }
}

/// What a plan is worth.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Verdict {
    /// It fits, and is at least as fast as asked for.
    Fits(Timed),
    /// It fits, but is slower.
    Slow,
    /// It lacks so many bytes, added up over the devices.
    Unfit(u64),
}

/// Units of work (about 10 ns) of a plan that is not simulated.
const WORK_OF_BOUND: u64 = 50;
/// Times longer that a simulation takes if devices slow each other down.
const WORK_OF_SHARING: u64 = 10;
/// The most ways to choose what is repeated that are tried for one plan.
const MOST_CHOICES: usize = 64;
/// Bytes that a tensor too large for a binding counts as lacking.
pub(super) const NEVER: u64 = 1 << 50;

pub(super) struct Judge<'a> {
    pub space: &'a Space<'a>,
    simulators: Vec<Simulator<'a>>,
    costs: Costs,
    /// Plans looked at.
    pub considered: u64,
    /// Plans simulated.
    pub simulated: u64,
    /// Work done, in units of about 10 ns.
    pub work: u64,
}

impl<'a> Judge<'a> {
    pub fn new(space: &'a Space<'a>) -> Result<Judge<'a>> {
        let simulators = space.forms.iter().map(|form| Simulator::new(&form.schedule, &[]));
        Ok(Judge {
            space,
            simulators: simulators.collect::<Result<_>>()?,
            costs: Costs::default(),
            considered: 0,
            simulated: 0,
            work: 0,
        })
    }

    pub fn form(&self, point: &Point) -> &'a Form {
        &self.space.forms[point.form]
    }

    pub fn prices(&self, point: &Point) -> &'a Prices<'a> {
        &self.space.prices[self.form(point).batching]
    }

    /// Judges a plan. One that takes longer than `cutoff` seconds is slow.
    pub fn judge(&mut self, point: &Point, cutoff: f64) -> Result<Verdict> {
        self.considered += 1;
        self.work += WORK_OF_BOUND;
        let form = self.form(point);
        let prices = self.prices(point);
        let choices =
            match choices(prices, &form.layout, &point.devices, &point.stages, &self.space.recompute) {
                Ok(choices) => choices,
                Err(lacking) => return Ok(Verdict::Unfit(lacking)),
            };
        let mut best: Option<Timed> = None;
        for recompute in choices {
            let plan = assignment(&form.layout, &point.devices, &point.stages, &recompute);
            prices.fill(&plan, &mut self.costs);
            let most = best.as_ref().map_or(cutoff, |best| best.step);
            if lower_bound(&form.layout, form.schedule.microbatches, &self.costs) > most {
                continue;
            }
            let is_shared = self.costs.cores > 0.0 || !self.costs.slowdown.is_empty();
            self.work += form.actions() as u64 * if is_shared { WORK_OF_SHARING } else { 1 };
            self.simulated += 1;
            // Which stages share a parameter depends on the cuts, though hardly ever.
            if !self.simulators[point.form].knows(&self.costs) {
                self.simulators[point.form] = Simulator::new(&form.schedule, &self.costs.tied())?;
            }
            let step = self.simulators[point.form].step(&self.costs)?;
            if step <= cutoff && best.as_ref().is_none_or(|best| step < best.step) {
                let unevenness = unevenness(&form.layout, &self.costs);
                best = Some(Timed { point: point.clone(), recompute, step, made: None, unevenness });
            }
        }
        Ok(best.map_or(Verdict::Slow, Verdict::Fits))
    }

    /// The schedule of a plan.
    pub fn form_of<'t>(&self, timed: &'t Timed) -> &'t Form
    where
        'a: 't,
    {
        timed.made.as_deref().unwrap_or(self.form(&timed.point))
    }
}

/// A plan as [`Prices`] wants it.
pub(super) fn assignment<'p>(
    layout: &'p Layout,
    devices: &'p [usize],
    stages: &'p [Range<usize>],
    recompute: &'p [bool],
) -> Assignment<'p> {
    Assignment {
        devices,
        stages,
        placement: &layout.placement,
        recompute,
        split: &layout.split,
        in_flight: &layout.stash,
    }
}

fn unevenness(layout: &Layout, costs: &Costs) -> f64 {
    let load = |own: &Vec<usize>| own.iter().map(|&replica| layout.seconds(costs, replica)).sum::<f64>();
    layout.own.iter().map(|own| load(own).powi(2)).sum()
}

/// Bytes of one stage of a rank with its slots, weights and links aside.
fn stage_bytes(
    prices: &Prices,
    layout: &Layout,
    replica: usize,
    device: usize,
    range: &Range<usize>,
    recompute: bool,
) -> u64 {
    let split = layout.split[layout.stage(replica)];
    let need = prices.need(device, range, StageForm { split, recompute });
    need.fixed + layout.stash[replica] as u64 * need.stash + layout.gradient[replica] as u64 * need.gradient
}

/// The sets of stages to repeat F in, with which every rank fits: of each rank every set from which no stage can be
/// taken away, and their combinations. If there are very many, the combination that adds the least work alone.
///
/// # Errors
///
/// The bytes that are lacking at least, added up over the ranks.
pub(super) fn choices(
    prices: &Prices,
    layout: &Layout,
    devices: &[usize],
    stages: &[Range<usize>],
    wish: &RecomputeChoice,
) -> std::result::Result<Vec<Vec<bool>>, u64> {
    if !layout.placement.is_single() {
        return replicated(prices, layout, devices, stages, wish).map(|choice| vec![choice]);
    }
    let mut first = vec![false; stages.len()];
    let mut others: Vec<(usize, Vec<Vec<bool>>)> = Vec::new();
    let mut lacking = 0;
    for (rank, own) in layout.own.iter().enumerate() {
        let device = devices[rank];
        let found = match own[..] {
            [stage] => {
                one_stage(prices, layout, stage, device, &stages[stage], wish).map(|on| first[stage] = on)
            }
            _ => several_stages(prices, layout, rank, devices, stages, wish).map(|sets| {
                write(&mut first, own, &sets[0]);
                others.push((rank, sets));
            }),
        };
        lacking += found.err().unwrap_or_default();
    }
    if lacking > 0 {
        return Err(lacking);
    }
    let mut all = vec![first];
    if others.iter().map(|(_, sets)| sets.len()).product::<usize>() <= MOST_CHOICES {
        for (rank, sets) in others {
            for at in 0..all.len() {
                for set in &sets[1..] {
                    let mut choice = all[at].clone();
                    write(&mut choice, &layout.own[rank], set);
                    all.push(choice);
                }
            }
        }
    }
    Ok(all)
}

/// Of stages that several ranks have, which repeat F on all of these: those that must on one.
///
/// # Errors
///
/// As [`choices`].
fn replicated(
    prices: &Prices,
    layout: &Layout,
    devices: &[usize],
    stages: &[Range<usize>],
    wish: &RecomputeChoice,
) -> std::result::Result<Vec<bool>, u64> {
    let mut choice = vec![false; stages.len()];
    let mut short = 0;
    for (rank, own) in layout.own.iter().enumerate() {
        match several_stages(prices, layout, rank, devices, stages, wish) {
            Ok(sets) => own.iter().zip(&sets[0]).for_each(|(&of, &on)| choice[layout.stage(of)] |= on),
            Err(lacks) => short += lacks,
        }
    }
    match short {
        0 => match lacking(prices, layout, devices, stages, &choice).iter().sum() {
            0 => Ok(choice),
            lacks => Err(lacks),
        },
        lacks => Err(lacks),
    }
}

/// For each rank the bytes that are lacking if these stages repeat F.
pub(super) fn lacking(
    prices: &Prices,
    layout: &Layout,
    devices: &[usize],
    stages: &[Range<usize>],
    recompute: &[bool],
) -> Vec<u64> {
    let rank = |(rank, own): (usize, &Vec<usize>)| {
        let Some(limit) = Limit::new(prices, layout, rank, devices, stages) else { return 0 };
        let bytes = own.iter().map(|&of| {
            let stage = layout.stage(of);
            stage_bytes(prices, layout, of, devices[rank], &stages[stage], recompute[stage])
        });
        limit.lacks(bytes.sum())
    };
    layout.own.iter().enumerate().map(rank).collect()
}

/// Whether the only stage of a rank, which no other has, must repeat F to fit.
///
/// # Errors
///
/// The bytes that are lacking at least.
pub(super) fn one_stage(
    prices: &Prices,
    layout: &Layout,
    stage: usize,
    device: usize,
    range: &Range<usize>,
    wish: &RecomputeChoice,
) -> std::result::Result<bool, u64> {
    if !prices.binds(device, range) {
        return Err(NEVER);
    }
    let wished = wish.is_on(stage);
    let rank = layout.placement.replicas()[stage].rank;
    let Some(limit) = Limit::of(prices, layout, rank, device, [(range, Part::WHOLE)]) else {
        return Ok(wished);
    };
    let lacks = |recompute| limit.lacks(stage_bytes(prices, layout, stage, device, range, recompute));
    match lacks(wished) {
        0 => Ok(wished),
        bytes if *wish == RecomputeChoice::AsNeeded => match lacks(true) {
            0 => Ok(true),
            repeated => Err(bytes.min(repeated)),
        },
        bytes => Err(bytes),
    }
}

/// The sets of a rank's own stages, as flags, with which it fits.
///
/// # Errors
///
/// The bytes that are lacking at least.
fn several_stages(
    prices: &Prices,
    layout: &Layout,
    rank: usize,
    devices: &[usize],
    stages: &[Range<usize>],
    wish: &RecomputeChoice,
) -> std::result::Result<Vec<Vec<bool>>, u64> {
    let (own, device) = (&layout.own[rank], devices[rank]);
    let range = |replica: usize| &stages[layout.stage(replica)];
    if own.iter().any(|&of| !prices.binds(device, range(of))) {
        return Err(NEVER);
    }
    let wished: Vec<bool> = own.iter().map(|&of| wish.is_on(layout.stage(of))).collect();
    let Some(limit) = Limit::new(prices, layout, rank, devices, stages) else { return Ok(vec![wished]) };
    let lacks = |set: &[bool]| {
        let bytes = |(&of, &on)| stage_bytes(prices, layout, of, device, range(of), on);
        limit.lacks(own.iter().zip(set).map(bytes).sum())
    };
    if *wish == RecomputeChoice::AsNeeded {
        return subsets(own, |of| prices.stage(device, range(of), false).forward, lacks);
    }
    match lacks(&wished) {
        0 => Ok(vec![wished]),
        bytes => Err(bytes),
    }
}

impl RecomputeChoice {
    /// Whether a stage repeats F if nothing forces it to.
    pub(super) fn is_on(&self, stage: usize) -> bool {
        match self {
            RecomputeChoice::AsNeeded | RecomputeChoice::Never => false,
            RecomputeChoice::Always => true,
            RecomputeChoice::Stages(stages) => stages.get(stage) == Some(&true),
        }
    }
}

/// What a rank may hold.
struct Limit {
    budget: u64,
    /// Bytes that do not depend on what is repeated.
    fixed: u64,
}

impl Limit {
    /// None if the device has no budget.
    fn new(
        prices: &Prices,
        layout: &Layout,
        rank: usize,
        devices: &[usize],
        stages: &[Range<usize>],
    ) -> Option<Limit> {
        let own = layout.own[rank].iter().map(|&of| layout.stage(of));
        let part = |stage: usize| part(&layout.placement, rank, stage, prices.machine, devices);
        let of = own.map(|stage| (&stages[stage], part(stage)));
        Limit::of(prices, layout, rank, devices[rank], of)
    }

    /// Of a rank that has these layers.
    fn of<'r>(
        prices: &Prices,
        layout: &Layout,
        rank: usize,
        device: usize,
        stages: impl IntoIterator<Item = (&'r Range<usize>, Part)>,
    ) -> Option<Limit> {
        let budget = prices.machine.devices[device].memory?;
        let rings = layout.rings[rank] * prices.batching.link_buffer;
        Some(Limit { budget, fixed: rings + prices.state(stages.into_iter()) })
    }

    fn lacks(&self, bytes: u64) -> u64 {
        (self.fixed + bytes).saturating_sub(self.budget)
    }
}

/// `set[i]` is for the `i`-th of a rank's own stages.
fn write(choice: &mut [bool], own: &[usize], set: &[bool]) {
    own.iter().zip(set).for_each(|(&stage, &on)| choice[stage] = on);
}

/// The sets of stages of one rank with which nothing is lacking and from which none can be taken away; first the one
/// with the least work. Of very many stages only the first so many.
///
/// # Errors
///
/// The least that is lacking.
fn subsets(
    own: &[usize],
    work: impl Fn(usize) -> f64,
    lacks: impl Fn(&[bool]) -> u64,
) -> std::result::Result<Vec<Vec<bool>>, u64> {
    let count = own.len();
    let mut sets: Vec<Vec<bool>> = if count <= MOST_CHUNKS {
        (0..1usize << count).map(|mask| (0..count).map(|bit| mask >> bit & 1 == 1).collect()).collect()
    } else {
        (0..=count).map(|many| (0..count).map(|at| at < many).collect()).collect()
    };
    let total = |set: &Vec<bool>| -> f64 {
        own.iter().zip(set).filter(|(_, on)| **on).map(|(&stage, _)| work(stage)).sum()
    };
    sets.sort_by(|a, b| total(a).total_cmp(&total(b)));
    let mut fitting: Vec<Vec<bool>> = Vec::new();
    let mut least = u64::MAX;
    for set in sets {
        let contains = |smaller: &Vec<bool>| smaller.iter().zip(&set).all(|(&on, &also)| !on || also);
        if !fitting.iter().any(contains) {
            match lacks(&set) {
                0 => fitting.push(set),
                bytes => least = least.min(bytes),
            }
        }
    }
    if fitting.is_empty() { Err(least) } else { Ok(fitting) }
}
