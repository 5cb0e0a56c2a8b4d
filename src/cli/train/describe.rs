//! What a run will be, said before it begins.

use std::ops::Range;

use super::job::Job;
use crate::cli::records::left_out;
use crate::cli::{say, show_bytes, show_count};
use crate::error::Result;
use crate::plan::text::{counted, merged};
use crate::timeline::duration;
use crate::train::data::Corpus;

/// Says what a run will be. Returns the entropy of its text where a token is a byte: what a model reaches that has learnt
/// nothing but how common each is.
pub(super) fn describe(job: &Job) -> Result<Option<f64>> {
    let (plan, config) = (&job.plan, &job.config);
    let p = &config.model;
    say(format!(
        "model    {}, {} parameters{}: {} layers, width {}, {} heads, context {}, vocabulary {}",
        serde_json::to_value(p.kind).unwrap_or_default().as_str().unwrap_or_default(),
        show_count(plan.model.parameter_count() as u64),
        match plan.model.adapter() {
            Some(_) => format!(", {} of them trained", show_count(plan.model.trained_count() as u64)),
            None => String::new(),
        },
        p.layers,
        p.width,
        p.heads,
        p.context,
        p.vocabulary
    ))?;
    let entropy = describe_texts(job)?;
    say(format!(
        "schedule {}, {} of {}",
        plan.schedule.name,
        counted(plan.schedule.microbatches, "microbatch"),
        counted(plan.setup.batch, "sequence")
    ))?;
    let works = works(job);
    for (rank, device) in plan.ranks.iter().zip(&job.names) {
        let name = |range: &Range<usize>| match (plan.model.layer_name(range.start), range.len()) {
            (only, 1) => only,
            (first, _) => format!("{first} to {}", plan.model.layer_name(range.end - 1)),
        };
        let shown: Vec<String> = merged(&rank.layers).iter().map(name).collect();
        let shown = shown.join(" and ");
        let budget =
            plan.setup.budgets[rank.rank].map_or(String::new(), |b| format!(" of {}", show_bytes(b)));
        say(format!(
            "{device}: {shown}; {:.1} % of the work, {}{budget}",
            100.0 * works[rank.rank],
            show_bytes(rank.bytes)
        ))?;
    }
    describe_time(job)?;
    Ok(entropy)
}

/// Each rank's part of the work: as `plan` says it, or by floating-point operations where nothing was planned.
fn works(job: &Job) -> Vec<f64> {
    if let Some((planning, planned)) = &job.planned {
        return planning.explain(planned).devices.iter().map(|share| share.work).collect();
    }
    let total: f64 = job.plan.ranks.iter().map(|rank| rank.flops).sum();
    job.plan.ranks.iter().map(|rank| rank.flops / total).collect()
}

/// The texts, and what of them is not taken as it is.
fn describe_texts(job: &Job) -> Result<Option<f64>> {
    let (config, corpus) = (&job.config, job.batches.corpus());
    let is_bytes = job.source.text.tokenizer.is_bytes();
    let unit = if is_bytes { "bytes" } else { "tokens" };
    let entropy = is_bytes.then(|| corpus.unigram_entropy()).transpose()?;
    let count = |n: usize| show_count(n as u64);
    let of = |corpus: &Corpus| match corpus.tally(config.train.sequence) {
        Some(tally) => format!("{} {unit} of {} records", count(corpus.len()), count(tally.records)),
        None => format!("{} {unit}", count(corpus.len())),
    };
    let packed = if corpus.is_masked() { "packed into " } else { "" };
    say(format!(
        "data     {}, {packed}{} sequences of {}{}",
        of(corpus),
        count(job.batches.sequences()),
        config.train.sequence,
        entropy.map_or(String::new(), |entropy| format!("; unigram entropy {entropy:.3} nats"))
    ))?;
    for what in left_out(corpus, config.train.sequence, corpus.is_masked()) {
        say(format!("         {what}"))?;
    }
    let Some(valid) = &job.source.valid else { return Ok(entropy) };
    let alone = if valid.has_records() { ", each by itself" } else { "" };
    say(format!("valid    {}{alone}, every {} steps", of(valid), config.train.evaluate_every))?;
    for what in left_out(valid, config.train.sequence, true) {
        say(format!("         {what}"))?;
    }
    Ok(entropy)
}

/// Other plans that are shown.
const ALTERNATIVES: usize = 2;
/// What evaluating takes of a step's time: the forward pass alone.
const FORWARD: f64 = 1.0 / 3.0;

/// How long the run will take, if that was planned, and what else was close.
fn describe_time(job: &Job) -> Result<()> {
    let t = &job.config.train;
    let done = job.resume.checkpoint.as_ref().map_or(0, |(_, checkpoint)| checkpoint.step);
    let steps = t.steps.saturating_sub(done);
    let epochs = t.steps as f64 * t.batch as f64 / job.batches.sequences() as f64;
    let epochs = match epochs {
        few if few < 10.0 => format!("{few:.1} epochs"),
        many => format!("{many:.0} epochs"),
    };
    let count = counted(steps as usize, "step");
    let after = if done > 0 { format!(" after {done}") } else { String::new() };
    let Some((_, planned)) = &job.planned else {
        return say(format!(
            "time     {count}{after}, {epochs} in all; how long is not predicted without a plan"
        ));
    };
    let best = &planned.best;
    let step = best.simulation.expected;
    let rows = job.source.valid.as_ref().map_or(0, |valid| valid.windows(t.sequence).len());
    let evaluations =
        if rows == 0 { 0 } else { t.steps.div_ceil(t.evaluate_every) - done / t.evaluate_every };
    let evaluating = evaluations as f64 * rows.div_ceil(t.batch) as f64 * step * FORWARD;
    let with = match evaluations {
        0 => String::new(),
        1 => " with an evaluation".into(),
        many => format!(" with {many} evaluations"),
    };
    say(format!(
        "time     {count}{after} of {}, about {}{with}; {epochs} in all",
        duration(step),
        about(steps as f64 * step + evaluating)
    ))?;
    for other in planned.alternatives.iter().take(ALTERNATIVES) {
        let layers = (0..other.devices.len()).map(|rank| {
            let owned = other.stages.iter().zip(&other.stage_ranks).filter(|(_, owner)| **owner == rank);
            let layers: usize = owned.map(|(stage, _)| stage.len()).sum();
            format!("device {}: {}", other.devices[rank], counted(layers, "layer"))
        });
        say(format!(
            "         next: {} (+{:.1} %), {}, {}, {}",
            duration(other.simulation.expected),
            100.0 * (other.simulation.expected / step - 1.0).max(0.0),
            other.schedule.name,
            counted(other.microbatches, "microbatch"),
            layers.collect::<Vec<_>>().join(", ")
        ))?;
    }
    Ok(())
}

/// Seconds as people speak of them.
fn about(seconds: f64) -> String {
    let minutes = (seconds / 60.0).round() as u64;
    match seconds {
        s if s < 90.0 => format!("{:.0} s", s.max(1.0)),
        _ if minutes < 90 => format!("{minutes} min"),
        _ if minutes < 48 * 60 => format!("{} h {} min", minutes / 60, minutes % 60),
        _ => format!("{} days", (seconds / 86_400.0).round()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_said_as_people_speak_of_them() {
        let said = [0.2, 89.0, 480.0, 5340.0, 12_000.0, 200_000.0].map(about);
        assert_eq!(said, ["1 s", "89 s", "8 min", "89 min", "3 h 20 min", "2 days"]);
    }
}
