//! The schedules that can be asked for by name. Each recipe says, for one rank, in which order it computes.

use super::{Action, Kind, Schedule};
use crate::error::{Error, Result};

/// The names that [`generate`] knows.
pub const NAMES: &[&str] = &["gpipe", "1f1b"];

/// The most cells (stages × microbatches) a schedule may have: four times 64 stages of 4096 microbatches. It keeps a
/// slip of the finger from taking all of the machine's memory.
const MAX_CELLS: usize = 1 << 20;

/// Makes the schedule called `name` for `stages` stages, one on each rank, and `microbatches` microbatches a step. It
/// holds computation only; [`Schedule::lowered`] adds the transfers.
///
/// - `gpipe`: every forward, then every backward (Huang et al. 2019, arXiv 1811.06965). A stage keeps all microbatches.
/// - `1f1b`: PipeDream-Flush (Narayanan et al. 2020, arXiv 2006.09503): as many forwards as it takes to reach the last
///   stage, then one forward and one backward in turn. The bubble of gpipe, but stage `s` of `p` keeps at most `p - s`
///   microbatches.
///
/// # Errors
///
/// [`Error::Config`] for a name that is not in [`NAMES`], and for no stages, no microbatches, or absurdly many.
pub fn generate(name: &str, stages: usize, microbatches: usize) -> Result<Schedule> {
    let recipe = match name {
        "gpipe" => gpipe,
        "1f1b" => one_f_one_b,
        _ => return Err(unknown(name)),
    };
    check_size(stages, microbatches)?;
    let ranks = (0..stages).map(|stage| recipe(stage, stages, microbatches)).collect();
    Ok(Schedule { name: name.to_string(), stages, microbatches, ranks })
}

fn gpipe(stage: usize, _stages: usize, microbatches: usize) -> Vec<Action> {
    let all = |kind| (0..microbatches).map(move |i| Action::new(stage, kind, i));
    all(Kind::F).chain(all(Kind::B)).collect()
}

fn one_f_one_b(stage: usize, stages: usize, microbatches: usize) -> Vec<Action> {
    let warm_up = (stages - stage - 1).min(microbatches);
    let mut actions = Vec::with_capacity(2 * microbatches);
    actions.extend((0..warm_up).map(|i| Action::new(stage, Kind::F, i)));
    for i in 0..microbatches {
        if warm_up + i < microbatches {
            actions.push(Action::new(stage, Kind::F, warm_up + i));
        }
        actions.push(Action::new(stage, Kind::B, i));
    }
    actions
}

fn unknown(name: &str) -> Error {
    let likeness = |known: &&&str| strsim::jaro_winkler(name, known);
    let nearest =
        NAMES.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b))).copied().unwrap_or_default();
    let message =
        format!("there is no schedule `{name}`; did you mean `{nearest}`? Known are: {}", NAMES.join(", "));
    Error::config("schedule", message)
}

/// Refuses sizes of which no schedule can be made.
pub(super) fn check_size(stages: usize, microbatches: usize) -> Result<()> {
    for (what, count) in [("stages", stages), ("microbatches", microbatches)] {
        if count == 0 {
            return Err(Error::config(what, "a schedule needs at least 1"));
        }
    }
    if stages.checked_mul(microbatches).is_none_or(|cells| cells > MAX_CELLS) {
        let message =
            format!("{stages} stages x {microbatches} microbatches are more than {MAX_CELLS}; use fewer");
        return Err(Error::config("microbatches", message));
    }
    Ok(())
}
