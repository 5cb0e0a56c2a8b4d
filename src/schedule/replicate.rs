//! Several pipelines as one: the data axis of a schedule.

use super::{Action, Schedule};
use crate::error::{Error, Result};

/// One schedule of several that have the same stages and do them at the same time, each for its own microbatches: ranks and
/// microbatches are numbered one schedule after another. The name is the first one's.
///
/// # Errors
///
/// [`Error::Config`] for none, and for schedules of other numbers of stages.
pub fn replicate(replicas: &[Schedule]) -> Result<Schedule> {
    join(replicas, |replica, microbatch| {
        replicas[..replica].iter().map(|before| before.microbatches).sum::<usize>() + microbatch
    })
}

/// As [`replicate`], with the microbatches dealt out in turn, in proportion to how many each schedule has: schedules that go
/// on evenly then come to them in their order, and sums that are taken in that order wait for little.
///
/// # Errors
///
/// As [`replicate`].
pub fn replicate_in_turn(replicas: &[Schedule]) -> Result<Schedule> {
    // The k-th of n is due in the middle of the k-th of n equal parts of a step.
    let due = |replica: usize, microbatch: usize| {
        (2 * microbatch + 1) as f64 / replicas[replica].microbatches as f64
    };
    let all =
        |replica: usize| (0..replicas[replica].microbatches).map(move |microbatch| (replica, microbatch));
    let mut order: Vec<(usize, usize)> = (0..replicas.len()).flat_map(all).collect();
    order.sort_by(|a, b| due(a.0, a.1).total_cmp(&due(b.0, b.1)).then(a.cmp(b)));
    let number: std::collections::HashMap<_, _> =
        order.into_iter().enumerate().map(|(at, of)| (of, at)).collect();
    join(replicas, |replica, microbatch| number.get(&(replica, microbatch)).copied().unwrap_or(microbatch))
}

/// One schedule of several, `number` being the number of a schedule's microbatch among those of all.
fn join(replicas: &[Schedule], number: impl Fn(usize, usize) -> usize) -> Result<Schedule> {
    let refuse = |message: String| Error::config("replicas", message);
    let first = replicas.first().ok_or_else(|| refuse("there is none".into()))?;
    if let Some(other) = replicas.iter().find(|other| other.stages != first.stages) {
        return Err(refuse(format!("{} and {} stages are not the same model", first.stages, other.stages)));
    }
    let mut whole = Schedule { microbatches: 0, ranks: Vec::new(), ..first.clone() };
    for (at, replica) in replicas.iter().enumerate() {
        let later = |action: &Action| match action.kind.is_whole() {
            true => *action,
            false => Action { microbatch: number(at, action.microbatch), ..*action },
        };
        whole.ranks.extend(replica.ranks.iter().map(|actions| actions.iter().map(later).collect()));
        whole.microbatches += replica.microbatches;
    }
    Ok(whole)
}
