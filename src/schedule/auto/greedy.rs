//! List scheduling: in order of time, whichever rank is free takes the most urgent of what is there.

use super::evaluator::Evaluator;
use super::problem::{Held, Letter, Orders, Problem, letter, parts};
use crate::schedule::Kind;
use crate::schedule::clock::NONE;

/// What a free rank prefers of what is there.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) enum Prefer {
    /// The backward pass.
    Backward,
    /// The forward pass.
    Forward,
    /// What it did not do last.
    Turns,
}

/// One point of the grid of rules.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Rule {
    /// Which stages do B.
    pub joined: Vec<bool>,
    /// For each stage, the most microbatches between F and I (or B).
    pub limits: Vec<usize>,
    pub prefer: Prefer,
    /// W is done while the next input is on its way if it takes at most the time until then divided by this; 0 for always.
    pub fill: f64,
}

/// The limits of a grid: a stage needs as many microbatches in flight as its rank could do in the time in which one
/// goes from there to the end and back (Little's law). With less the pipeline starves; more helps where times are
/// uneven, as far as there is memory.
pub(super) fn limits(problem: &Problem, factor: f64, more: usize) -> Vec<usize> {
    let backward = |&stage: &usize| problem.seconds(stage, Kind::I) + problem.seconds(stage, Kind::W);
    let cycle = |stages: &Vec<usize>| {
        stages.iter().map(|stage| problem.seconds(*stage, Kind::F) + backward(stage)).sum::<f64>()
    };
    let cycle = problem.stages_of.iter().map(cycle).fold(0.0, f64::max);
    let mut limits = vec![1; problem.stages()];
    let mut way = 0.0;
    for stage in (0..problem.stages()).rev() {
        if stage + 1 < problem.stages() {
            way += problem.seconds(stage + 1, Kind::F) + problem.seconds(stage + 1, Kind::I);
            if problem.owner[stage] != problem.owner[stage + 1] {
                let hops = &problem.costs.hops[stage];
                way += hops.forward.delay() + hops.backward.delay();
            }
        }
        let needed = if cycle > 0.0 { (factor * way / cycle - 1e-9).ceil().max(0.0) as usize } else { 0 };
        limits[stage] = (1 + needed + more).min(problem.microbatches);
    }
    limits
}

/// What a rank would do next, and when.
#[derive(Clone, Copy)]
struct Choice {
    time: f64,
    letter: Letter,
}

/// Applies a rule.
pub(super) fn schedule(evaluator: &mut Evaluator, rule: &Rule) -> Orders {
    evaluator.set_forms(&rule.joined);
    evaluator.reset();
    let problem = evaluator.problem;
    let ranks = problem.stages_of.len();
    let one = Held { most_stashes: 1, most_gradients: 1, ..Held::default() };
    let mut held = vec![one; problem.stages()];
    let mut words: Vec<Vec<Letter>> = vec![Vec::with_capacity(3 * problem.microbatches); ranks];
    // What each rank would do next. It changes when the rank does something or an input reaches it.
    let mut choices: Vec<Option<Choice>> = Vec::with_capacity(ranks);
    choices.extend((0..ranks).map(|rank| choose(evaluator, rule, &held, rank, None)));
    loop {
        let known =
            choices.iter().enumerate().filter_map(|(rank, choice)| choice.map(|choice| (rank, choice)));
        let Some((rank, Choice { letter, .. })) = known.min_by(|a, b| a.1.time.total_cmp(&b.1.time)) else {
            break;
        };
        evaluator.advance(letter);
        let (stage, kind) = parts(letter);
        held[stage].count(kind);
        words[rank].push(letter);
        let neighbour = match kind {
            Kind::F => Some(stage + 1).filter(|&next| next < problem.stages()),
            Kind::W => None,
            _ => stage.checked_sub(1),
        };
        let other = neighbour.map(|stage| problem.owner[stage]).filter(|&other| other != rank);
        for rank in [Some(rank), other].into_iter().flatten() {
            choices[rank] = choose(evaluator, rule, &held, rank, words[rank].last().copied());
        }
    }
    Orders { joined: rule.joined.clone(), words }
}

fn choose(
    evaluator: &Evaluator,
    rule: &Rule,
    held: &[Held],
    rank: usize,
    last: Option<Letter>,
) -> Option<Choice> {
    let problem = evaluator.problem;
    let total = problem.microbatches as u32;
    let free = evaluator.clock.free[rank];
    let fits = |stage: usize, kind: Kind| {
        let Some(room) = problem.room[rank] else { return true };
        let bytes = |&other: &usize| {
            let mut held = held[other];
            if other == stage {
                held.count(kind);
            }
            held.bytes(problem.costs, other)
        };
        problem.stages_of[rank].iter().map(bytes).sum::<u64>() <= room
    };
    let start = |letter: Letter, microbatch: u32| {
        let need = evaluator.tasks[evaluator.id(letter, microbatch) as usize].need;
        let ready = if need == NONE { 0.0 } else { evaluator.spans[need as usize].ready };
        free.max(ready)
    };
    let was_forward = last.is_some_and(|last| parts(last).1 == Kind::F);
    let forward_first = match rule.prefer {
        Prefer::Backward => false,
        Prefer::Forward => true,
        Prefer::Turns => !was_forward,
    };
    // Start, whether it is the less preferred direction, how far the stage is from where the tensor goes: less is better.
    let mut best: Option<((f64, bool, usize), Letter)> = None;
    let mut weight: Option<Letter> = None;
    for &stage in &problem.stages_of[rank] {
        let backward = if rule.joined[stage] { Kind::B } else { Kind::I };
        let [f, b] = [Kind::F, backward].map(|kind| letter(stage, kind));
        let [done_f, done_b] = [f, b].map(|letter| evaluator.next[letter as usize]);
        let mut consider = |key: (f64, bool, usize), letter| {
            if key.0.is_finite() && best.is_none_or(|(known, _)| key < known) {
                best = Some((key, letter));
            }
        };
        if done_f < total && ((done_f - done_b) as usize) < rule.limits[stage] && fits(stage, Kind::F) {
            consider((start(f, done_f), !forward_first, problem.stages() - stage), f);
        }
        if done_b < done_f && fits(stage, backward) {
            consider((start(b, done_b), forward_first, stage), b);
        }
        let w = letter(stage, Kind::W);
        if !rule.joined[stage] && evaluator.next[w as usize] < done_b {
            weight = weight.or(Some(w));
        }
    }
    match (best, weight) {
        (Some(((time, ..), _)), Some(w))
            if time > free && time - free >= rule.fill * problem.seconds_of(w) =>
        {
            Some(Choice { time: free, letter: w })
        }
        (Some(((time, ..), letter)), _) => Some(Choice { time, letter }),
        (None, Some(w)) => Some(Choice { time: free, letter: w }),
        (None, None) => None,
    }
}
