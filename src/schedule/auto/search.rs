//! Improves orders by small changes where they are critical.

use super::evaluator::{Evaluator, Score};
use super::problem::{Held, Letter, Orders, letter, parts};
use crate::schedule::Kind;
use crate::schedule::clock::NONE;
use crate::schedule::random::Random;

/// Neighbouring actions of one rank on the critical path: places from `first` to `last`.
#[derive(Clone, Copy)]
struct Block {
    rank: usize,
    first: usize,
    last: usize,
}

/// The ends of the ranks count for so much of the step, so that among equal steps the one with more slack wins.
const ENDS: f64 = 1e-3;

fn value(score: Score, ranks: usize) -> f64 {
    score.step + ENDS * score.ends / ranks as f64
}

/// One of so many moves is to the other form of a stage's backward pass.
const CONVERT: usize = 32;

/// What takes a move back.
enum Undo {
    Shift(usize, usize),
    Orders(Orders),
}

/// Simulated annealing over moves of one action within its rank. Most moves are those that can shorten the critical
/// path: before the first or behind the last action of a run of actions without a gap. Returns the best orders met.
pub(super) fn anneal(
    evaluator: &mut Evaluator,
    start: &Orders,
    evaluations: usize,
    random: &mut Random,
) -> Option<Orders> {
    let problem = evaluator.problem;
    let ranks = problem.stages_of.len();
    let mut orders = start.clone();
    let mut score = evaluator.evaluate(&orders)?;
    let mut blocks = critical(evaluator, &orders);
    let mut best = (score, orders.clone());
    let mut counts: Vec<Held> = Vec::new();
    let (hot, cold) = (0.01 * score.step, 0.0002 * score.step);
    for at in 0..evaluations {
        if best.0.step <= problem.bound * (1.0 + 1e-9) {
            break;
        }
        let temperature = hot * (cold / hot).powf(at as f64 / evaluations as f64);
        let (rank, undo) = if random.below(CONVERT) == 0 {
            let stage = random.below(problem.stages());
            let rank = problem.owner[stage];
            let other = converted(&orders, rank, stage);
            (rank, Undo::Orders(std::mem::replace(&mut orders, other)))
        } else {
            let Some((rank, from, to)) = propose(&orders, &blocks, random) else { continue };
            shift(&mut orders.words[rank], from, to);
            (rank, Undo::Shift(from, to))
        };
        let fits = problem.fits(rank, &orders.words[rank], &mut counts);
        let moved = if fits { evaluator.evaluate(&orders) } else { None };
        let accepted = moved.filter(|moved| {
            let worse = value(*moved, ranks) - value(score, ranks);
            worse <= 0.0 || random.unit() < (-worse / temperature).exp()
        });
        match (accepted, undo) {
            (Some(moved), _) => {
                score = moved;
                blocks = critical(evaluator, &orders);
                if value(score, ranks) < value(best.0, ranks) {
                    best = (score, orders.clone());
                }
            }
            (None, Undo::Shift(from, to)) => shift(&mut orders.words[rank], to, from),
            (None, Undo::Orders(before)) => orders = before,
        }
    }
    Some(best.1)
}

/// Moves the letter at `from` so that it stands at `to`.
fn shift(word: &mut [Letter], from: usize, to: usize) {
    if from < to {
        word[from..=to].rotate_left(1);
    } else {
        word[to..=from].rotate_right(1);
    }
}

/// A move: rank, place, new place.
fn propose(orders: &Orders, blocks: &[Block], random: &mut Random) -> Option<(usize, usize, usize)> {
    let (rank, from, to) = if blocks.is_empty() || random.below(4) == 0 {
        let rank = random.below(orders.words.len());
        let length = orders.words[rank].len();
        let from = random.below(length);
        let by = 1 + random.below(6);
        (rank, from, if random.below(2) == 0 { from.saturating_sub(by) } else { (from + by).min(length - 1) })
    } else {
        let Block { rank, first, last } = blocks[random.below(blocks.len())];
        let inside = first + random.below(last - first + 1);
        let near = |random: &mut Random| 1 + random.below(4).min(random.below(4)) * random.below(4);
        match random.below(5) {
            // What the next rank waits for comes earlier.
            0 => (rank, last, last.saturating_sub(near(random)).max(first)),
            1 => (rank, last, inside),
            // Something else comes after it.
            2 => (rank, inside, last),
            // Something fills the gap before.
            3 => (rank, inside, first),
            _ => (rank, inside, (inside + 1).min(last)),
        }
    };
    (orders.words[rank][from] != orders.words[rank][to]).then_some((rank, from, to))
}

/// The blocks of the critical path of the orders evaluated last, from the end of the last rank back to the start.
fn critical(evaluator: &Evaluator, orders: &Orders) -> Vec<Block> {
    let problem = evaluator.problem;
    // Place of each task in its rank's word.
    let mut ids: Vec<Vec<u32>> = Vec::with_capacity(orders.words.len());
    let mut next = vec![0; evaluator.next.len()];
    for word in &orders.words {
        let id = |&letter: &Letter| {
            let id = evaluator.id(letter, next[letter as usize]);
            next[letter as usize] += 1;
            id
        };
        ids.push(word.iter().map(id).collect());
    }
    let end = |rank: usize| {
        let last = ids[rank][ids[rank].len() - 1];
        evaluator.spans[last as usize].end + problem.costs.ranks[rank].end
    };
    let mut blocks = Vec::new();
    let Some(mut rank) = (0..ids.len()).max_by(|&a, &b| end(a).total_cmp(&end(b))) else { return blocks };
    let mut at = ids[rank].len() - 1;
    let mut last = at;
    loop {
        let task = &evaluator.tasks[ids[rank][at] as usize];
        let start = evaluator.spans[ids[rank][at] as usize].start;
        let waits = task.need != NONE && evaluator.spans[task.need as usize].ready >= start;
        if waits || at == 0 {
            blocks.push(Block { rank, first: at, last });
            if !waits {
                return blocks;
            }
            rank = evaluator.tasks[task.need as usize].rank as usize;
            let need = task.need;
            let Some(place) = ids[rank].iter().position(|&id| id == need) else { return blocks };
            (at, last) = (place, place);
        } else {
            at -= 1;
        }
    }
}

/// The same orders with one stage's backward pass in the other form: B where I was, or I and W where B was.
pub(super) fn converted(orders: &Orders, rank: usize, stage: usize) -> Orders {
    let mut converted = orders.clone();
    let joined = !orders.joined[stage];
    converted.joined[stage] = joined;
    converted.words[rank] = orders.words[rank]
        .iter()
        .flat_map(|&at| {
            let pair = match parts(at) {
                (of, Kind::I) if of == stage && joined => [Some(letter(stage, Kind::B)), None],
                (of, Kind::W) if of == stage && joined => [None, None],
                (of, Kind::B) if of == stage && !joined => {
                    [Some(letter(stage, Kind::I)), Some(letter(stage, Kind::W))]
                }
                _ => [Some(at), None],
            };
            pair.into_iter().flatten()
        })
        .collect();
    converted
}
