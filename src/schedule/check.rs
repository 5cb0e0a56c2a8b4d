//! The proof, before anything runs, that a schedule computes everything once, in an order that changes no result, and
//! that no rank waits for ever.

use std::borrow::Cow;

use super::edges::Edges;
use super::index::{Index, Place};
use super::order::order;
use super::{Action, Kind, Schedule};
use crate::error::Result;

impl Schedule {
    /// Proves that the schedule can be run, whatever the durations: every stage does every microbatch once, on one
    /// rank (F, then B or I and W); each rank adds up a stage's weight gradients in microbatch order; each
    /// transfer has its other end; and no rank waits for ever. A schedule with any transfer must have all that it
    /// needs; one with any action that stands for the whole step must say of every rank how its step begins and ends.
    /// Takes time in proportion to the number of actions.
    ///
    /// # Errors
    ///
    /// [`Error::Schedule`](crate::error::Error::Schedule) that names the first fault found and shows the lists with
    /// `<-- ` behind the offending action; [`Error::Config`](crate::error::Error::Config) for a schedule without stages
    /// or microbatches, or with absurdly many.
    pub fn validate(&self) -> Result<()> {
        prove(self).map(drop)
    }
}

/// A schedule that can be run.
pub(super) struct Proven<'a> {
    pub index: Index<'a>,
    pub edges: Edges,
    /// Every action, each after all that it waits for.
    pub order: Vec<Place>,
}

/// Proves what [`Schedule::validate`] says.
pub(super) fn prove(schedule: &Schedule) -> Result<Proven<'_>> {
    prove_cow(Cow::Borrowed(schedule))
}

/// As [`prove`], of a schedule that may be kept.
pub(super) fn prove_cow(schedule: Cow<'_, Schedule>) -> Result<Proven<'_>> {
    let index = Index::new(schedule)?;
    check_complete(&index)?;
    if index.complete {
        check_whole(&index)?;
    }
    let edges = Edges::new(&index, |place, action| match action.kind {
        kind if kind.is_transfer() => check_transfer(&index, place, action),
        Kind::R | Kind::A | Kind::G => check_shared(&index, place, action),
        _ => Ok(()),
    })?;
    check_accumulation(&index)?;
    let order = order(&index, &edges)?;
    Ok(Proven { index, edges, order })
}

/// Every stage does every microbatch once: F, and either B, or I and W.
fn check_complete(index: &Index) -> Result<()> {
    for stage in 0..index.schedule.stages {
        let is_split = (0..index.schedule.microbatches)
            .any(|microbatch| index.find(Action::new(stage, Kind::I, microbatch)).is_some());
        for microbatch in 0..index.schedule.microbatches {
            let [f, b, i, w] = [Kind::F, Kind::B, Kind::I, Kind::W]
                .map(|kind| index.find(Action::new(stage, kind, microbatch)));
            let fault = match (f, b, i, w) {
                (Some(_), Some(_), None, None) if is_split => {
                    "runs B, and for others I and W, but a stage is compiled for one of the two: write I and W"
                }
                (Some(_), Some(_), None, None) | (Some(_), None, Some(_), Some(_)) => continue,
                (_, Some(_), Some(_), _) | (_, Some(_), _, Some(_)) => {
                    "runs both B and I or W, though B is both,"
                }
                (None, None, None, None) => "does nothing",
                (None, ..) => "has no F",
                (_, None, None, None) => "has no B (or I and W)",
                (_, None, None, Some(_)) => "has no I",
                (_, None, Some(_), None) => "has no W",
            };
            let rank = index.placement.rank(stage, microbatch);
            let end = (rank, index.schedule.ranks[rank].len());
            let offending = i.or(w).or(b).or(f).unwrap_or(end);
            return Err(index.reject(offending, format!("stage {stage} {fault} for microbatch {microbatch}")));
        }
    }
    Ok(())
}

/// Where any rank says how its step begins and ends, all do.
fn check_whole(index: &Index) -> Result<()> {
    let end = |rank: usize| (rank, index.schedule.ranks[rank].len());
    for rank in 0..index.schedule.ranks.len() {
        for kind in [Kind::C, Kind::N, Kind::U] {
            if index.find_on(rank, Action::of_rank(kind)).is_none() {
                let message = format!(
                    "rank {rank} has no {kind}: where C, R, A, N, U or G are written, every rank needs C, N and U"
                );
                return Err(index.reject(end(rank), message));
            }
        }
    }
    let shared = index.shared();
    for stage in 0..index.schedule.stages {
        let mut holders = index.placement.holders(stage);
        let alone = holders.len() == 1;
        if let Some(rank) = holders.find(|&rank| !alone && !shared.senders.contains(&(rank, stage))) {
            let message = format!(
                "rank {rank} has no {stage}R: every rank that shares stage {stage} with others needs {stage}R, {stage}A and {stage}G"
            );
            return Err(index.reject(end(rank), message));
        }
    }
    for &(rank, stage) in &shared.owners {
        let adds = Action::of_stage(stage, Kind::A);
        if index.find_on(rank, adds).is_none() {
            let message = format!("rank {rank} has no {adds}, and others send it gradients of stage {stage}");
            return Err(index.reject(end(rank), message));
        }
    }
    Ok(())
}

/// What a rank sends the gradients of others have too, and it comes back updated.
fn check_shared(index: &Index, place: Place, action: Action) -> Result<()> {
    let (rank, stage) = (place.0, action.stage);
    if action.kind == Kind::A {
        if !index.shared().owners.contains(&(rank, stage)) {
            let message =
                format!("{action} adds nothing: nobody sends rank {rank} gradients of stage {stage}");
            return Err(index.reject(place, message));
        }
        return Ok(());
    }
    if !index.placement.holders(stage).any(|holder| holder != rank) {
        let message = format!("{action} moves nothing: stage {stage} is on rank {rank} alone");
        return Err(index.reject(place, message));
    }
    let other = Action { kind: if action.kind == Kind::R { Kind::G } else { Kind::R }, ..action };
    if index.find_on(rank, other).is_none() {
        let message = format!(
            "{action} needs {other} on rank {rank}: who adds to the gradients of a weight needs the weight that comes of them, and nobody else does"
        );
        return Err(index.reject(place, message));
    }
    Ok(())
}

/// A transfer joins two ranks, and what is sent is received. (That what is received is sent, its needs say.)
fn check_transfer(index: &Index, place: Place, action: Action) -> Result<()> {
    let Action { stage, kind, microbatch } = action;
    let with_next = matches!(kind, Kind::SendF | Kind::RecvB);
    let peer =
        if with_next { Some(stage + 1).filter(|&s| s < index.schedule.stages) } else { stage.checked_sub(1) };
    let Some(peer) = peer else {
        let (which, side) = if with_next { ("last", "after") } else { ("first", "before") };
        let message =
            format!("{action} has no other end: stage {stage} is the {which}, no stage comes {side} it");
        return Err(index.reject(place, message));
    };
    if !index.placement.crosses(stage.min(peer), microbatch) {
        let message =
            format!("{action} transfers nothing: stages {stage} and {peer} are both on rank {}", place.0);
        return Err(index.reject(place, message));
    }
    let receive = match kind {
        Kind::SendF => Action::new(peer, Kind::RecvF, microbatch),
        Kind::SendB => Action::new(peer, Kind::RecvB, microbatch),
        _ => return Ok(()),
    };
    if index.find(receive).is_none() {
        let rank = index.placement.rank(peer, microbatch);
        let message = format!("{action} is never received: {receive} is missing on rank {rank}");
        return Err(index.reject(place, message));
    }
    Ok(())
}

/// Floating-point sums depend on their order, so all schedules must use the same one.
fn check_accumulation(index: &Index) -> Result<()> {
    let mut last: Vec<Option<Action>> = vec![None; index.placement.replicas().len()];
    for (rank, actions) in index.schedule.ranks.iter().enumerate() {
        for (at, &action) in actions.iter().enumerate() {
            if !matches!(action.kind, Kind::B | Kind::W) {
                continue;
            }
            let replica = index.placement.replica(action.stage, action.microbatch);
            let before = last[replica].replace(action);
            if let Some(before) = before.filter(|before| before.microbatch > action.microbatch) {
                let message = format!(
                    "{action} comes after {before}: weight gradients must be added in microbatch order, \
                     or the results would depend on the schedule"
                );
                return Err(index.reject((rank, at), message));
            }
        }
    }
    Ok(())
}
