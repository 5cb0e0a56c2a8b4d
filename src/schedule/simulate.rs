//! Runs a schedule without doing anything: when each action starts and ends, or who waits for whom for ever.

use super::check::check;
use super::index::Index;
use super::{Action, Kind, Schedule, draw};
use crate::error::{Error, Result};

/// When one action runs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cell {
    /// The rank that does it.
    pub rank: usize,
    /// What it does.
    pub action: Action,
    /// When it starts, in the unit of the durations given; the step starts at 0.
    pub start: f64,
    /// When it ends; for a send or receive the same as `start`.
    pub end: f64,
}

/// What [`simulate`] predicts for one training step.
#[derive(Debug, Clone, PartialEq)]
pub struct Simulation {
    /// Every action, rank by rank, in the order of the rank's list.
    pub cells: Vec<Cell>,
    /// When the last action ends, in the unit of the durations given.
    pub makespan: f64,
    /// The part of all ranks' time in which they have nothing to do: 0 to 1.
    pub bubble: f64,
    /// For each stage, the most microbatches that are at any time between the start of F and the end of W (or B).
    pub peak_in_flight: Vec<usize>,
}

/// Predicts when everything happens if a computation takes `duration(action)`, and what it yields reaches another rank
/// `hop` later. Each rank does its list in order; an action starts when the rank is free and the action's inputs are
/// there. Sends and receives take no time of a rank, and `duration` is not asked for them, so a schedule and its
/// lowered form give the same prediction; a receive written earlier than its consumer makes the rank wait there. Takes
/// time in proportion to the number of actions.
///
/// # Errors
///
/// Those of [`Schedule::validate`], and [`Error::Config`] for a duration or hop that is negative or not finite.
pub fn simulate(schedule: &Schedule, duration: impl Fn(Action) -> f64, hop: f64) -> Result<Simulation> {
    let index = Index::new(schedule)?;
    check(&index)?;
    let spans = run(&index, duration, check_time(hop, || "hop".into())?)?;
    let mut cells = Vec::with_capacity(spans.iter().map(Vec::len).sum());
    for (rank, spans) in spans.iter().enumerate() {
        for (&action, span) in schedule.ranks[rank].iter().zip(spans) {
            cells.push(Cell { rank, action, start: span.start, end: span.end });
        }
    }
    let makespan = cells.iter().map(|cell| cell.end).fold(0.0, f64::max);
    let busy: f64 = cells.iter().map(|cell| cell.end - cell.start).sum();
    let available = makespan * schedule.ranks.len() as f64;
    let bubble = if available > 0.0 { (1.0 - busy / available).max(0.0) } else { 0.0 };
    Ok(Simulation { cells, makespan, bubble, peak_in_flight: peak_in_flight(schedule) })
}

fn peak_in_flight(schedule: &Schedule) -> Vec<usize> {
    let mut now = vec![0; schedule.stages];
    let mut peak = vec![0; schedule.stages];
    for action in schedule.ranks.iter().flatten() {
        match action.kind {
            Kind::F => now[action.stage] += 1,
            Kind::B | Kind::W => now[action.stage] -= 1,
            _ => {}
        }
        peak[action.stage] = peak[action.stage].max(now[action.stage]);
    }
    peak
}

fn check_time(time: f64, what: impl FnOnce() -> String) -> Result<f64> {
    if time.is_finite() && time >= 0.0 {
        return Ok(time);
    }
    Err(Error::config(what(), format!("{time} is not a time: it must be finite and at least 0")))
}

/// When an action starts and ends.
#[derive(Clone, Copy)]
pub(super) struct Span {
    pub start: f64,
    pub end: f64,
}

/// Runs every rank as far as it gets, again and again as others make progress. Each action that ends wakes the ranks of
/// the two neighbouring stages, the only ones that can wait for it, so the work is linear in the number of actions.
/// Start times follow from needs alone; the order in which ranks are taken does not show.
pub(super) fn run(index: &Index, duration: impl Fn(Action) -> f64, hop: f64) -> Result<Vec<Vec<Span>>> {
    let ranks = &index.schedule.ranks;
    let mut spans: Vec<Vec<Span>> = ranks.iter().map(|actions| Vec::with_capacity(actions.len())).collect();
    let mut awake: Vec<usize> = (0..ranks.len()).collect();
    let mut is_awake = vec![true; ranks.len()];
    while let Some(rank) = awake.pop() {
        is_awake[rank] = false;
        while let Some(&action) = ranks[rank].get(spans[rank].len()) {
            let Ok(start) = earliest_start(index, &spans, rank, action, hop) else { break };
            let time = if action.kind.is_transfer() {
                0.0
            } else {
                check_time(duration(action), || format!("duration of {action}"))?
            };
            spans[rank].push(Span { start, end: start + time });
            for stage in action.stage.saturating_sub(1)..(action.stage + 2).min(index.schedule.stages) {
                let neighbour = index.owner[stage];
                if neighbour != rank && !std::mem::replace(&mut is_awake[neighbour], true) {
                    awake.push(neighbour);
                }
            }
        }
    }
    match (0..ranks.len()).find(|&rank| spans[rank].len() < ranks[rank].len()) {
        None => Ok(spans),
        Some(stuck) => Err(deadlock(index, &spans, stuck)),
    }
}

/// When `rank` can start `action`, its next, or the first action it still waits for.
fn earliest_start(
    index: &Index,
    spans: &[Vec<Span>],
    rank: usize,
    action: Action,
    hop: f64,
) -> std::result::Result<f64, Action> {
    let mut start = spans[rank].last().map_or(0.0, |span| span.end);
    for need in index.needs(action).into_iter().flatten() {
        let (peer, at) = index.find(need).ok_or(need)?;
        let end = spans[peer].get(at).ok_or(need)?.end;
        start = start.max(if peer == rank { end } else { end + hop });
    }
    Ok(start)
}

/// Names the ranks that wait for one another in a circle. There always is one: what a rank waits for stands in the list
/// of a rank that has not come so far, and so waits itself.
fn deadlock(index: &Index, spans: &[Vec<Span>], stuck: usize) -> Error {
    let mut rank = stuck;
    let mut chain: Vec<(usize, String)> = Vec::new();
    let circle = loop {
        if let Some(first) = chain.iter().position(|&(seen, _)| seen == rank) {
            break &chain[first..];
        }
        let action = index.schedule.ranks[rank][spans[rank].len()];
        let Err(need) = earliest_start(index, spans, rank, action, 0.0) else { break &chain[..] };
        let peer = index.owner[need.stage];
        chain.push((rank, format!("rank {rank} waits at {action} for {need} of rank {peer}")));
        rank = peer;
    };
    let sentences: Vec<&str> = circle.iter().map(|(_, sentence)| sentence.as_str()).collect();
    let marks: Vec<_> = circle.iter().map(|&(rank, _)| (rank, spans[rank].len())).collect();
    Error::Schedule {
        message: format!("deadlock: {}", sentences.join("; ")),
        grid: draw::marked(index.schedule, &marks),
    }
}
