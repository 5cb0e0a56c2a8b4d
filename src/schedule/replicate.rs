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
    let refuse = |message: String| Error::config("replicas", message);
    let first = replicas.first().ok_or_else(|| refuse("there is none".into()))?;
    if let Some(other) = replicas.iter().find(|other| other.stages != first.stages) {
        return Err(refuse(format!("{} and {} stages are not the same model", first.stages, other.stages)));
    }
    let mut whole = Schedule { microbatches: 0, ranks: Vec::new(), ..first.clone() };
    for replica in replicas {
        let before = whole.microbatches;
        let later = |action: &Action| match action.kind.is_whole() {
            true => *action,
            false => Action { microbatch: action.microbatch + before, ..*action },
        };
        whole.ranks.extend(replica.ranks.iter().map(|actions| actions.iter().map(later).collect()));
        whole.microbatches += replica.microbatches;
    }
    Ok(whole)
}
