//! The proof, before anything runs, that a schedule computes everything once, in an order that changes no result, and
//! that no rank waits for ever.

use super::index::{Index, Place};
use super::order::order;
use super::{Action, Kind, Schedule};
use crate::error::Result;

impl Schedule {
    /// Proves that the schedule can be run, whatever the durations: every stage is on one rank and does every
    /// microbatch once (F, then B or I and W); each stage adds up its weight gradients in microbatch order; each
    /// transfer has its other end; and no rank waits for ever. A schedule with any transfer must have all that it
    /// needs. Takes time in proportion to the number of actions.
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

/// The index of a schedule that [`Schedule::validate`] accepts.
pub(super) fn prove(schedule: &Schedule) -> Result<Index<'_>> {
    let index = Index::new(schedule)?;
    check(&index)?;
    order(&index)?;
    Ok(index)
}

/// Everything that can be said without running: what is missing, superfluous, or out of order within one rank.
pub(super) fn check(index: &Index) -> Result<()> {
    check_complete(index)?;
    for (rank, actions) in index.schedule.ranks.iter().enumerate() {
        for (at, &action) in actions.iter().enumerate() {
            if action.kind.is_transfer() {
                check_transfer(index, (rank, at), action)?;
            }
            for need in index.needs(action).into_iter().flatten() {
                let Some(found) = index.find(need) else {
                    let holder = index.owner[need.stage];
                    let message = format!("{action} needs {need}, which is missing on rank {holder}");
                    return Err(index.reject((rank, at), message));
                };
                if found.0 == rank && found.1 > at {
                    let message = format!("{action} needs {need}, which comes later on rank {rank}");
                    return Err(index.reject((rank, at), message));
                }
            }
        }
    }
    check_accumulation(index)
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
            let rank = index.owner[stage];
            let end = (rank, index.schedule.ranks[rank].len());
            let offending = i.or(w).or(b).or(f).unwrap_or(end);
            return Err(index.reject(offending, format!("stage {stage} {fault} for microbatch {microbatch}")));
        }
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
    if !index.crosses(stage.min(peer)) {
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
        let message =
            format!("{action} is never received: {receive} is missing on rank {}", index.owner[peer]);
        return Err(index.reject(place, message));
    }
    Ok(())
}

/// Floating-point sums depend on their order, so all schedules must use the same one.
fn check_accumulation(index: &Index) -> Result<()> {
    let mut last: Vec<Option<Action>> = vec![None; index.schedule.stages];
    for (rank, actions) in index.schedule.ranks.iter().enumerate() {
        for (at, &action) in actions.iter().enumerate() {
            if !matches!(action.kind, Kind::B | Kind::W) {
                continue;
            }
            let before = last[action.stage].replace(action);
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
