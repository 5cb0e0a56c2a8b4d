//! What a run will be, said before it begins.

use std::ops::Range;

use super::job::Job;
use super::progress::evaluation_in_steps;
use crate::cli::records::{Evaluated, left_out};
use crate::cli::{say, show_bytes, show_count};
use crate::error::Result;
use crate::layers::Layers;
use crate::model::Model;
use crate::plan::text::{counted, divided, microbatches, ranges};
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
    if let Some(changed) = &job.changed {
        say(format!("plan     changed: {changed}"))?;
    }
    say(format!(
        "schedule {}, {} of {}",
        plan.schedule.name,
        counted(plan.schedule.microbatches, "microbatch"),
        counted(plan.setup.batch, "sequence")
    ))?;
    if let Some(shares) = plan.placement.shares().filter(|shares| shares.len() > 1) {
        say(format!("replicas {} beside each other, of {}", shares.len(), microbatches(&shares)))?;
    }
    let axis = job.planned.as_ref().and_then(|(planning, _)| planning.axis());
    if let Some(axis) = axis.or_else(|| divided(&plan.setup.tensor)) {
        say(format!("layers   {axis}"))?;
    }
    describe_state(job)?;
    let works = works(job);
    for (rank, device) in plan.ranks.iter().zip(&job.names) {
        let layers = pieces(&rank.layers, &plan.model);
        let budget =
            plan.setup.budgets[rank.rank].map_or(String::new(), |b| format!(" of {}", show_bytes(b)));
        say(format!(
            "{device}: {layers}; {:.1} % of the work, {}{budget}",
            100.0 * works[rank.rank],
            show_bytes(rank.bytes)
        ))?;
    }
    describe_needless(job)?;
    describe_time(job)?;
    Ok(entropy)
}

/// Who has what of the state, where it is not on the devices that compute.
fn describe_state(job: &Job) -> Result<()> {
    let planned = job.planned.as_ref().and_then(|(planning, planned)| planning.state(planned));
    let unplanned = || {
        let words = job.plan.setup.sharding.words()?;
        Some(format!("{words} ({} of host memory)", show_bytes(job.plan.host)))
    };
    match planned.or_else(unplanned) {
        Some(state) => say(format!("state    {state}")),
        None => Ok(()),
    }
}

/// The layers of some stages: how many, and which.
fn pieces(stages: &[Range<usize>], model: &Model) -> String {
    let starts = model.layer_starts();
    let has = |layer: usize| stages.iter().any(|stage| stage.contains(&layer));
    let (embedding, head) = (0, model.layers() - 1);
    let within = |stage: &Range<usize>| {
        let (start, end) = (stage.start.max(embedding + 1), stage.end.min(head));
        // Blocks are counted from the embedding on.
        (start < end).then(|| starts[start] - Layers::ONE..starts[end] - Layers::ONE)
    };
    let blocks = ranges(&stages.iter().filter_map(within).collect::<Vec<_>>());
    let mut parts = Vec::new();
    parts.extend(has(embedding).then(|| "embedding".to_string()));
    if !blocks.is_empty() {
        let many = if blocks.contains(['-', ',']) { "s" } else { "" };
        parts.push(format!("block{many} {blocks}"));
    }
    parts.extend(has(head).then(|| "head".to_string()));
    let count: Layers = stages.iter().cloned().flatten().map(|layer| model.layer_size(layer)).sum();
    format!("{} ({})", count.counted(), parts.join(", "))
}

/// A device with a smaller part of the work may as well be left out.
const LITTLE: f64 = 0.05;

/// Names the devices that have next to nothing to do if a step is as fast without them. To know that takes another search,
/// which nobody waits for where every device has its part.
fn describe_needless(job: &Job) -> Result<()> {
    // Whoever is without one of a gang is without the gang.
    let Some((planning, planned)) = job.planned.as_ref().filter(|(planning, _)| !planning.has_gangs()) else {
        return Ok(());
    };
    let works = works(job);
    let has_little = |rank: usize| works[rank] < LITTLE;
    let ranks = 0..job.plan.ranks.len();
    if !ranks.clone().any(has_little) {
        return Ok(());
    }
    let without = planning.without(planned);
    for rank in ranks.filter(|&rank| has_little(rank)) {
        let device = planned.best.devices[rank];
        if !without.iter().any(|without| without.device == device && without.is_needless()) {
            continue;
        }
        let others = job.names.iter().enumerate().filter(|(other, _)| *other != rank);
        let others: Vec<String> = others.map(|(_, of)| of.adapter.unwrap_or(of.number).to_string()).collect();
        say(format!(
            "         a step is as fast without device {device}: --devices {} leaves it out",
            others.join(",")
        ))?;
    }
    Ok(())
}

/// Each rank's part of the work: as `plan` says it, or by floating-point operations where nothing was planned, and of the members
/// of a gang.
fn works(job: &Job) -> Vec<f64> {
    if let Some((planning, planned)) = job.planned.as_ref().filter(|(planning, _)| !planning.has_gangs()) {
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
    let every = match config.train.evaluate_every {
        every if every >= config.train.steps => "at the end".to_string(),
        1 => "every step".to_string(),
        every => format!("every {every} steps"),
    };
    say(format!("valid    {}{alone}, {every}", of(valid)))?;
    for what in left_out(valid, config.train.sequence, true) {
        say(format!("         {what}"))?;
    }
    Ok(entropy)
}

/// Other plans that are shown.
const ALTERNATIVES: usize = 2;

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
    // Steps are whole: of few sequences one epoch may well be 1.3.
    let epochs = format!(
        "{epochs} in all ({} of {}; there are {})",
        counted(t.steps as usize, "step"),
        counted(t.batch, "sequence"),
        show_count(job.batches.sequences() as u64)
    );
    let count = counted(steps as usize, "step");
    let after = if done > 0 { format!(" after {done}") } else { String::new() };
    let Some((planning, planned)) = &job.planned else {
        return say(format!("time     {count}{after}; {epochs}; how long is not predicted without a plan"));
    };
    let step = planned.best.simulation.expected;
    let evaluated = job.source.valid.as_ref().map(|valid| Evaluated::new(valid, t.sequence));
    let due = t.steps.div_ceil(t.evaluate_every) - done / t.evaluate_every;
    let evaluations = evaluated.map_or(0, |_| due);
    let each = evaluated.map_or(0.0, |text| step * evaluation_in_steps(&job.config, text));
    let evaluating = evaluations as f64 * each;
    let with = match evaluations {
        0 => String::new(),
        1 => " with an evaluation".into(),
        many => format!(" with {many} evaluations"),
    };
    say(format!(
        "time     {count}{after} of {}, about {}{with}; {epochs}",
        duration(step),
        about(steps as f64 * step + evaluating)
    ))?;
    for other in planned.alternatives.iter().take(ALTERNATIVES) {
        let layers = (0..other.devices.len())
            .map(|rank| format!("{}: {}", planning.numbered(other, rank), other.layers_of(rank).counted()));
        say(format!(
            "         next: {} ({}), {}, {}, {}",
            duration(other.simulation.expected),
            longer(other.simulation.expected / step - 1.0),
            other.schedule.name,
            counted(other.microbatches, "microbatch"),
            layers.collect::<Vec<_>>().join(", ")
        ))?;
    }
    Ok(())
}

/// By what part a step is longer, or shorter.
fn longer(part: f64) -> String {
    // No minus before what is rounded to nothing.
    format!("{:+.1} %", (1e3 * part).round() / 10.0 + 0.0)
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
    fn the_layers_of_a_device_are_counted_and_named_piece_by_piece() {
        let config = "kind = 'gpt2'\nlayers = 8\nwidth = 8\nheads = 1\ncontext = 8\nvocabulary = 16";
        let model = Model::new(&toml::from_str(config).unwrap()).unwrap();
        let said = |stages: &[(usize, usize)]| {
            let stages: Vec<Range<usize>> = stages.iter().map(|&(first, end)| first..end).collect();
            pieces(&stages, &model)
        };
        assert_eq!(said(&[(0, 18)]), "10 layers (embedding, blocks 0-7, head)");
        assert_eq!(said(&[(0, 1)]), "1 layer (embedding)");
        assert_eq!(said(&[(5, 7)]), "1 layer (block 2)");
        assert_eq!(said(&[(0, 3), (7, 9), (9, 13), (17, 18)]), "6 layers (embedding, blocks 0, 3-5, head)");
        assert_eq!(said(&[(5, 6)]), "0.5 layers (block 2a)");
        assert_eq!(said(&[(0, 6), (6, 8)]), "4.5 layers (embedding, blocks 0-3a)");
    }

    #[test]
    fn what_is_rounded_to_nothing_is_neither_longer_nor_shorter() {
        assert_eq!([0.0321, -1e-9, -0.02].map(longer), ["+3.2 %", "+0.0 %", "-2.0 %"]);
    }

    #[test]
    fn times_are_said_as_people_speak_of_them() {
        let said = [0.2, 89.0, 480.0, 5340.0, 12_000.0, 200_000.0].map(about);
        assert_eq!(said, ["1 s", "89 s", "8 min", "89 min", "3 h 20 min", "2 days"]);
    }
}
