//! Synthesis: the best order that can be found for given devices.
//!
//! The published schedules assume that all stages take equally long and that links cost nothing. Here the real times of
//! every stage and link and the memory of every rank are known, so the order can be made for them: a grid of rules for
//! list scheduling (as Qi et al. 2024, arXiv 2401.10241, but in order of time over all ranks, with link delays and
//! budgets), every published schedule that has the same stages on the same ranks, and simulated annealing from the best
//! of both over moves on the critical path. The search is seeded and counts its work instead of looking at a clock, so
//! equal costs give equal schedules.

mod evaluator;
mod greedy;
mod problem;
mod search;

use std::cmp::Ordering;

use evaluator::{Evaluator, Score};
use greedy::{Prefer, Rule};
use problem::{Held, Orders, Problem};

use super::random::Random;
use super::{AUTO, Costs, NAMES, Schedule, generate_chunked, stage_ranks};
use crate::error::{Error, Result};

/// The most stages, and stages × microbatches, for which [`synthesise`] searches: every order that it looks at takes time
/// in proportion.
const MOST_STAGES: usize = 64;
const MOST_CELLS: usize = 1 << 13;

/// How long [`synthesise`] may search.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Effort {
    /// The published schedules and the grid of rules alone.
    Least,
    /// Some improvement of the best of them.
    #[default]
    Quick,
    /// Thorough improvement of several.
    Thorough,
}

/// Makes a schedule for these costs, with stage `s` on rank `stage_ranks[s]`, that fits every rank's budget
/// ([`RankCost::budget`](super::RankCost) against [`Simulation::slot_bytes`](super::Simulation)). By simulation its step
/// is never longer than that of the best schedule of [`NAMES`] that has the same placement and fits; among equally long
/// ones it takes the one that needs the least memory. Equal arguments give equal schedules.
///
/// # Errors
///
/// [`Error::Config`](crate::error::Error::Config) for costs or a placement that do not fit each other, for more stages
/// and microbatches than can be searched, and for ranks whose budget holds no microbatch: it says how many bytes each
/// lacks.
pub fn synthesise(
    costs: &Costs,
    stage_ranks: &[usize],
    microbatches: usize,
    effort: Effort,
) -> Result<Schedule> {
    let stages = stage_ranks.len();
    if stages > MOST_STAGES || stages.saturating_mul(microbatches) > MOST_CELLS {
        let message = format!(
            "{stages} stages and {microbatches} microbatches are more than `{AUTO}` can be made for; use fewer, or a schedule with another name"
        );
        return Err(Error::config("microbatches", message));
    }
    let problem = Problem::new(costs, stage_ranks, microbatches)?;
    let mut evaluator = Evaluator::new(&problem);
    let mut found = Found::default();
    for orders in published(&problem) {
        found.offer(&mut evaluator, orders);
    }
    grid(&mut evaluator, &mut found);
    forms(&mut evaluator, &mut found);
    let (starts, work, most) = match effort {
        Effort::Least => (0, 0, 0),
        Effort::Quick => (2, 1_500_000, 3_000),
        Effort::Thorough => (6, 40_000_000, 60_000),
    };
    // Sharing makes an evaluation several times as long.
    let action = if problem.times.is_shared { 6 } else { 1 } * 3 * problem.stages() * microbatches;
    let evaluations = (work / action / starts.max(1)).min(most);
    let best: Vec<Orders> = found.best.iter().take(starts).map(|(_, orders)| orders.clone()).collect();
    for (seed, start) in best.iter().enumerate() {
        let mut random = Random(seed as u64);
        if let Some(orders) = search::anneal(&mut evaluator, start, evaluations, &mut random) {
            found.offer(&mut evaluator, orders);
        }
    }
    let best = found.best.first();
    let (_, orders) = best.ok_or_else(|| Error::config("memory", "found no order that fits the budgets"))?;
    Ok(problem.schedule(orders, AUTO))
}

/// The best orders so far, best first.
#[derive(Default)]
struct Found {
    best: Vec<(Merit, Orders)>,
    counts: Vec<Held>,
}

/// How many orders are kept.
const KEPT: usize = 8;
/// How many rules are tried with other forms of the backward pass.
const RULES: usize = 6;
/// Steps that differ by less than this part are equally long: sums of the same numbers in another order.
const EQUAL: f64 = 1e-12;

/// How good orders are; less is better. Of equally long steps the one with the least memory is best, then the one whose
/// ranks end first.
#[derive(Clone, Copy, PartialEq, PartialOrd)]
struct Merit {
    step: f64,
    bytes: u64,
    buffers: u64,
    ends: f64,
}

impl Merit {
    fn cmp(&self, other: &Merit) -> Ordering {
        self.partial_cmp(other).unwrap_or(Ordering::Equal)
    }
}

impl Found {
    /// Keeps orders that are complete and fit, if they are among the best and none are equally good.
    fn offer(&mut self, evaluator: &mut Evaluator, orders: Orders) -> Option<Merit> {
        let problem = evaluator.problem;
        if !problem.is_complete(&orders) {
            return None;
        }
        let (mut bytes, mut buffers) = (0, 0);
        for (rank, word) in orders.words.iter().enumerate() {
            if !problem.fits(rank, word, &mut self.counts) {
                return None;
            }
            for &stage in &problem.stages_of[rank] {
                bytes += self.counts[stage].bytes(problem.costs, stage);
                buffers += self.counts[stage].buffers();
            }
        }
        let Score { step, ends } = evaluator.evaluate(&orders)?;
        let unit = problem.bound.max(f64::MIN_POSITIVE) * EQUAL;
        let merit = Merit { step: (step / unit).round(), bytes, buffers, ends };
        let place = self.best.partition_point(|(known, _)| *known <= merit);
        if place == 0 || self.best[place - 1].0 != merit {
            self.best.insert(place, (merit, orders));
            self.best.truncate(KEPT);
        }
        Some(merit)
    }
}

/// The published schedules with this placement.
fn published<'p>(problem: &'p Problem) -> impl Iterator<Item = Orders> + 'p {
    let ranks = problem.stages_of.len();
    NAMES.iter().filter_map(move |name| {
        let chunks = problem.stages() / ranks;
        let placement = stage_ranks(name, ranks, chunks).ok()?;
        if placement != problem.owner {
            return None;
        }
        let schedule = generate_chunked(name, ranks, chunks, problem.microbatches).ok()?;
        Some(problem.orders(&schedule))
    })
}

/// List scheduling with every rule of a grid, then with other forms of the backward pass by the rules that did best.
fn grid(evaluator: &mut Evaluator, found: &mut Found) {
    let problem = evaluator.problem;
    let stages = problem.stages();
    let mut limits: Vec<Vec<usize>> = Vec::new();
    for factor in [0.5, 1.0, 1.5, 2.0, 3.0] {
        for more in [0, 1] {
            limits.push(greedy::limits(problem, factor, more));
        }
    }
    limits.push(vec![problem.microbatches; stages]);
    limits.sort();
    limits.dedup();
    // Nobody waits for the I of stage 0, so splitting it can help no other rank.
    let split: Vec<bool> = (0..stages).map(|stage| stage == 0).collect();
    let mut forms = vec![split, vec![true; stages]];
    forms.dedup();
    let mut tried: Vec<(Merit, Rule)> = Vec::new();
    for joined in &forms {
        for limits in &limits {
            for prefer in [Prefer::Backward, Prefer::Forward, Prefer::Turns] {
                for fill in [0.0, 0.5, 1.0] {
                    let rule = Rule { joined: joined.clone(), limits: limits.clone(), prefer, fill };
                    let orders = greedy::schedule(evaluator, &rule);
                    tried.extend(found.offer(evaluator, orders).map(|merit| (merit, rule)));
                }
            }
        }
    }
    tried.sort_by(|a, b| a.0.cmp(&b.0));
    tried.dedup_by(|a, b| a.0 == b.0);
    for (mut merit, mut rule) in tried.into_iter().take(RULES) {
        for stage in 0..stages {
            rule.joined[stage] = !rule.joined[stage];
            let orders = greedy::schedule(evaluator, &rule);
            match found.offer(evaluator, orders) {
                Some(other) if other < merit => merit = other,
                _ => rule.joined[stage] = !rule.joined[stage],
            }
        }
    }
}

/// Tries the other form of each stage's backward pass in the best orders.
fn forms(evaluator: &mut Evaluator, found: &mut Found) {
    let problem = evaluator.problem;
    for stage in 0..problem.stages() {
        for at in 0..found.best.len().min(3) {
            let other = search::converted(&found.best[at].1, problem.owner[stage], stage);
            found.offer(evaluator, other);
        }
    }
}
