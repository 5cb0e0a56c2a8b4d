//! The schedules that can be asked for by name. Each recipe says, for one rank, in which order it computes.

use super::{Action, Kind, Schedule, zero_bubble};
use crate::error::{Error, Result, nearest};

/// The names that [`generate`] knows.
pub const NAMES: &[&str] = &["gpipe", "1f1b", "eager-1f1b", "interleaved-1f1b", "zb-h1", "zb-h2", "zb-v"];

/// The name of the schedule that [`synthesise`](super::synthesise) makes for given devices.
pub const AUTO: &str = "auto";

/// All names of schedules: [`NAMES`] and [`AUTO`].
pub const ALL_NAMES: &[&str] =
    &["gpipe", "1f1b", "eager-1f1b", "interleaved-1f1b", "zb-h1", "zb-h2", "zb-v", AUTO];

/// The most cells (stages × microbatches) a schedule may have: four times 64 stages of 4096 microbatches. It keeps a
/// slip of the finger from taking all of the machine's memory.
pub(super) const MAX_CELLS: usize = 1 << 20;
/// The most stages: simulations keep a link for every pair of ranks.
pub(super) const MAX_STAGES: usize = 1 << 10;

/// Makes the schedule called `name` for `ranks` ranks and `microbatches` microbatches a step, with as many chunks a rank
/// as [`default_chunks`] says: [`generate_chunked`].
///
/// # Errors
///
/// Those of [`generate_chunked`].
pub fn generate(name: &str, ranks: usize, microbatches: usize) -> Result<Schedule> {
    generate_chunked(name, ranks, default_chunks(name)?, microbatches)
}

/// Makes the schedule called `name` for `ranks` ranks of `chunks` stages each, which [`stage_ranks`] places, and
/// `microbatches` microbatches a step. It holds computation only; [`Schedule::lowered`] adds the transfers.
///
/// With one stage a rank, `p` of them:
///
/// - `gpipe`: every forward, then every backward (Huang et al. 2019, arXiv 1811.06965). A stage keeps all microbatches.
/// - `1f1b`: PipeDream-Flush (Narayanan et al. 2020, arXiv 2006.09503): as many forwards as it takes to reach the last
///   stage, then one forward and one backward in turn. The bubble of gpipe, but stage `s` keeps at most `p - s`
///   microbatches.
/// - `eager-1f1b`: the same with twice as many forwards at first (JaxPP's Eager1F1B), so that a hop that takes time
///   delays nobody; stage `s` keeps at most `2(p - s) - 1`.
/// - `zb-h1`, `zb-h2`: zero-bubble schedules with the backward pass split into I and W (Qi et al. 2024, arXiv
///   2401.10241). At the memory of 1f1b, `p` microbatches on every stage, zb-h1 has a third of its bubble; zb-h2 keeps
///   up to `2p - 1`, and no rank has any from its first to its last action; as they end one after
///   another, though, a step in which all wait for the norm of all gradients is no shorter than with zb-h1 where
///   times are equal and hops free.
///
/// With several:
///
/// - `interleaved-1f1b`: 1f1b over `chunks` rounds of the ranks (Narayanan et al. 2021, arXiv 2104.04473, in
///   Megatron-LM's order). The bubble of 1f1b divided by `chunks`, for as many times its transfers.
/// - `zb-v`: two stages a rank in the form of a V (Qi et al. 2024, §6): the first and the last stage are on one rank.
///   No bubble where F, I and W take equally long, at the memory of 1f1b on every rank.
///
/// In the zero-bubble schedules stage 0 runs B: it sends no gradient, so nobody waits for its I, its W follows at once,
/// and the two may share work. All other stages run I and W throughout, even where they are neighbours, since the rank
/// before waits for I alone, and a stage is compiled for one form or the other.
///
/// # Errors
///
/// [`Error::Config`] for a name that is not in [`NAMES`], for a number of chunks or microbatches that the schedule
/// cannot have, and for no ranks, no microbatches, or absurdly many.
pub fn generate_chunked(name: &str, ranks: usize, chunks: usize, microbatches: usize) -> Result<Schedule> {
    let stages = stage_ranks(name, ranks, chunks)?.len();
    check_size(stages, microbatches)?;
    let list = |rank| match name {
        "gpipe" => gpipe(rank, microbatches),
        "1f1b" => one_f_one_b(rank, ranks - rank - 1, microbatches),
        "eager-1f1b" => one_f_one_b(rank, 2 * (ranks - rank - 1), microbatches),
        "interleaved-1f1b" => interleaved(rank, ranks, chunks, microbatches),
        "zb-h1" => zero_bubble::horizontal(rank, ranks, 0, microbatches),
        // More than there are microbatches to spare would only put off the W at the end.
        "zb-h2" => zero_bubble::horizontal(rank, ranks, microbatches.saturating_sub(ranks), microbatches),
        _ => zero_bubble::v(rank, ranks, microbatches),
    };
    if name == "interleaved-1f1b" && !microbatches.is_multiple_of(ranks) {
        let below = microbatches / ranks * ranks;
        let near = if below > 0 { format!("{below} or {}", below + ranks) } else { ranks.to_string() };
        let message =
            format!("{name} needs a multiple of its {ranks} ranks, and {microbatches} is none: use {near}");
        return Err(Error::config("microbatches", message));
    }
    Ok(Schedule { name: name.to_string(), stages, microbatches, ranks: (0..ranks).map(list).collect() })
}

/// How many stages each rank has in the schedule called `name` if nothing else is asked for.
///
/// # Errors
///
/// [`Error::Config`] for a name that is not in [`NAMES`].
pub fn default_chunks(name: &str) -> Result<usize> {
    match name {
        "interleaved-1f1b" | "zb-v" => Ok(2),
        _ if NAMES.contains(&name) => Ok(1),
        _ => Err(unknown(name)),
    }
}

/// The rank of each stage in the schedule called `name` for `ranks` ranks of `chunks` stages each.
///
/// # Errors
///
/// [`Error::Config`] for a name that is not in [`NAMES`], a number of chunks that the schedule cannot have, and for no
/// ranks or absurdly many.
pub fn stage_ranks(name: &str, ranks: usize, chunks: usize) -> Result<Vec<usize>> {
    let usual = default_chunks(name)?;
    let refused = |message: String| Err(Error::config("chunks", message));
    if name == "interleaved-1f1b" {
        if chunks < 2 {
            return refused(format!("{name} needs at least 2 chunks a rank, not {chunks}; with 1 use 1f1b"));
        }
    } else if chunks != usual {
        return refused(format!("{name} has {usual} for each rank, not {chunks}; leave it out"));
    }
    check_size(ranks.saturating_mul(chunks), 1)?;
    Ok((0..ranks * chunks)
        .map(|stage| match name {
            "zb-v" if stage >= ranks => 2 * ranks - 1 - stage,
            _ => stage % ranks,
        })
        .collect())
}

fn gpipe(stage: usize, microbatches: usize) -> Vec<Action> {
    let all = |kind| (0..microbatches).map(move |i| Action::new(stage, kind, i));
    all(Kind::F).chain(all(Kind::B)).collect()
}

fn one_f_one_b(stage: usize, warm_up: usize, microbatches: usize) -> Vec<Action> {
    let warm_up = warm_up.min(microbatches);
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

/// As 1f1b, but what counts as one is a microbatch of one chunk: `ranks` microbatches of the first chunk, the same of
/// the second, and so on, then the next `ranks` microbatches.
fn interleaved(rank: usize, ranks: usize, chunks: usize, microbatches: usize) -> Vec<Action> {
    let total = chunks * microbatches;
    let round = ranks * chunks;
    let action = |kind, i: usize| {
        let chunk = i % round / ranks;
        let chunk = if kind == Kind::F { chunk } else { chunks - 1 - chunk };
        Action::new(chunk * ranks + rank, kind, i / round * ranks + i % ranks)
    };
    let warm_up = (2 * (ranks - rank - 1) + (chunks - 1) * ranks).min(total);
    let mut actions = Vec::with_capacity(2 * total);
    actions.extend((0..warm_up).map(|i| action(Kind::F, i)));
    for i in 0..total {
        if warm_up + i < total {
            actions.push(action(Kind::F, warm_up + i));
        }
        actions.push(action(Kind::B, i));
    }
    actions
}

fn unknown(name: &str) -> Error {
    let message = format!(
        "there is no schedule `{name}`; did you mean `{}`? Known are: {}",
        nearest(name, NAMES.iter().copied()),
        NAMES.join(", ")
    );
    Error::config("schedule", message)
}

/// Refuses sizes of which no schedule can be made.
pub(super) fn check_size(stages: usize, microbatches: usize) -> Result<()> {
    for (what, count) in [("stages", stages), ("microbatches", microbatches)] {
        if count == 0 {
            return Err(Error::config(what, "a schedule needs at least 1"));
        }
    }
    if stages > MAX_STAGES {
        return Err(Error::config("stages", format!("{stages} are more than {MAX_STAGES}; use fewer")));
    }
    if stages.checked_mul(microbatches).is_none_or(|cells| cells > MAX_CELLS) {
        let message =
            format!("{stages} stages x {microbatches} microbatches are more than {MAX_CELLS}; use fewer");
        return Err(Error::config("microbatches", message));
    }
    Ok(())
}
