//! An order in which all actions of a schedule can be done one after another, or who waits for whom for ever.

use super::draw;
use super::edges::Edges;
use super::index::{Index, Place};
use crate::error::{Error, Result};

/// Every place of the schedule, each after all that it waits for and after those before it in its rank's list. Runs
/// every rank as far as it gets, again and again as others make progress; an action that is done wakes the ranks of the
/// two neighbouring stages, the only ones that can wait for it, so the work is linear in the number of actions. What
/// stands for the whole step wakes all.
///
/// # Errors
///
/// [`Error::Schedule`] that names the ranks that wait for one another.
pub(super) fn order(index: &Index, edges: &Edges) -> Result<Vec<Place>> {
    let ranks = &index.schedule.ranks;
    let mut done = vec![0; ranks.len()];
    let mut order = Vec::with_capacity(ranks.iter().map(Vec::len).sum());
    let mut awake: Vec<usize> = (0..ranks.len()).collect();
    let mut is_awake = vec![true; ranks.len()];
    while let Some(rank) = awake.pop() {
        is_awake[rank] = false;
        while let Some(&action) = ranks[rank].get(done[rank]) {
            if missing(edges, &done, (rank, done[rank])).is_some() {
                break;
            }
            order.push((rank, done[rank]));
            done[rank] += 1;
            let mut wake = |other: usize| {
                if other != rank && !std::mem::replace(&mut is_awake[other], true) {
                    awake.push(other);
                }
            };
            if action.kind.is_whole() {
                (0..ranks.len()).for_each(wake);
            } else {
                let neighbours =
                    action.stage.saturating_sub(1)..(action.stage + 2).min(index.schedule.stages);
                neighbours.for_each(|stage| wake(index.placement.rank(stage, action.microbatch)));
            }
        }
    }
    match (0..ranks.len()).find(|&rank| done[rank] < ranks[rank].len()) {
        None => Ok(order),
        Some(stuck) => Err(deadlock(index, edges, &done, stuck)),
    }
}

/// What the action at a place still waits for when each rank has done that many of its actions.
fn missing(edges: &Edges, done: &[usize], place: Place) -> Option<Place> {
    let needs = edges.of(place).iter().map(|edge| edges.place(edge.from));
    needs.into_iter().find(|&(rank, at)| at >= done[rank])
}

/// Names the ranks that wait for one another in a circle. There always is one: what a rank waits for stands in the list
/// of a rank that has not come so far, and so waits itself.
fn deadlock(index: &Index, edges: &Edges, done: &[usize], stuck: usize) -> Error {
    let action = |(rank, at): Place| index.schedule.ranks[rank][at];
    let mut rank = stuck;
    let mut chain: Vec<(usize, String)> = Vec::new();
    let circle = loop {
        if let Some(first) = chain.iter().position(|&(seen, _)| seen == rank) {
            break &chain[first..];
        }
        let here = (rank, done[rank]);
        let Some(need) = missing(edges, done, here) else { break &chain[..] };
        let (here, needed, peer) = (action(here), action(need), need.0);
        chain.push((rank, format!("rank {rank} waits at {here} for {needed} of rank {peer}")));
        rank = peer;
    };
    let sentences: Vec<&str> = circle.iter().map(|(_, sentence)| sentence.as_str()).collect();
    let marks: Vec<_> = circle.iter().map(|&(rank, _)| (rank, done[rank])).collect();
    let message = format!("deadlock: {}", sentences.join("; "));
    Error::schedule(message, draw::marked(&index.schedule, &marks))
}
