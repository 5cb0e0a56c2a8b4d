//! What a run says of itself.

use std::time::{Duration, Instant};

use indicatif::ProgressBar;

use super::job::Job;
use crate::cli::{note, progress_bar, say, show_bytes, show_count, speaking};
use crate::error::Result;
use crate::generate::Sampling;
use crate::gpu::Device;
use crate::model::Weights;
use crate::pipeline::profile::Outcome;
use crate::train::checkpoint;
use crate::train::lessons::Lesson;
use crate::train::run::Run;
use crate::train::trainer::{Row, Trainer};

pub(super) fn describe(job: &Job) {
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
    ));
    say(format!(
        "data     {} {}, {} sequences of {}; unigram entropy {:.3} nats",
        show_count(job.batches.corpus().len() as u64),
        if job.source.text.tokenizer.is_bytes() { "bytes" } else { "tokens" },
        show_count(job.batches.sequences() as u64),
        config.train.sequence,
        job.batches.corpus().unigram_entropy()
    ));
    if let Some(valid) = &job.source.valid {
        say(format!(
            "valid    {} tokens, every {} steps",
            show_count(valid.len() as u64),
            config.train.evaluate_every
        ));
    }
    say(format!(
        "schedule {}, {} microbatches of {} sequences",
        plan.schedule.name, plan.schedule.microbatches, plan.setup.batch
    ));
    let total: f64 = plan.ranks.iter().map(|r| r.flops).sum();
    for (rank, device) in plan.ranks.iter().zip(&job.devices) {
        let layers: Vec<String> =
            rank.layers.iter().flat_map(Clone::clone).map(|l| plan.model.layer_name(l)).collect();
        let shown = match layers.as_slice() {
            [first, .., last] => format!("{first} to {last}"),
            [only] => only.clone(),
            [] => String::new(),
        };
        let budget =
            plan.setup.budgets[rank.rank].map_or(String::new(), |b| format!(" of {}", show_bytes(b)));
        say(format!(
            "device {} adapter {} ({}): {shown}; {:.1} % of the work, {}{budget}",
            rank.rank,
            device.info().index,
            device.info().name,
            100.0 * rank.flops / total,
            show_bytes(rank.bytes)
        ));
    }
}

pub(super) fn progress(steps: u64, done: u64) -> ProgressBar {
    let bar = progress_bar(steps, "{bar:30.cyan/dim} {pos}/{len}  {msg}  {elapsed} elapsed, {eta} left");
    bar.set_position(done);
    bar.reset_eta();
    bar
}

/// On a terminal the bar moves; elsewhere a line now and then.
pub(super) fn show(bar: &ProgressBar, row: &Row, steps: u64, shown: &mut Instant) {
    let text = format!("loss {:.4}  {} tokens/s", row.loss, show_count(row.tokens_per_second as u64));
    bar.set_message(text.clone());
    bar.set_position(row.step);
    let due = shown.elapsed() > Duration::from_secs(10) || row.step == 1 || row.step == steps;
    if bar.is_hidden() && due {
        *shown = Instant::now();
        note(format!("step {}/{steps}  {text}", row.step));
    }
}

pub(super) fn finish(run: &Run, trainer: &Trainer, last: Option<&Row>, entropy: f64) {
    let Some(row) = last else {
        say(format!("nothing to do: step {} of the config is already done", trainer.step_number()));
        return;
    };
    say(format!(
        "step {}: loss {:.4} nats a token ({:.3} bits); the text's unigram entropy is {entropy:.4}",
        row.step,
        row.loss,
        row.loss / std::f64::consts::LN_2
    ));
    for (rank, device) in row.devices.iter().enumerate() {
        say(format!(
            "device {rank} ({}): busy {:.0} %, host {:.1} % of the last step, {} sent",
            device.adapter,
            100.0 * device.busy_fraction,
            100.0 * device.host_fraction,
            show_bytes(device.bytes_moved)
        ));
    }
    say(format!("timeline {}", run.path().join("timeline.svg").display()));
    if let Ok(Some(folder)) = checkpoint::latest(run.path()) {
        say(format!("folder   {}", folder.display()));
    }
}

/// How much longer or shorter than assumed a device's work must take to be worth a word.
const WORTH_SAYING: f64 = 0.1;

/// A device that is not what the plan took it for, and what follows.
pub(super) fn compared(lesson: &Lesson) -> Option<String> {
    let off = lesson.ratio - 1.0;
    if off.abs() <= WORTH_SAYING {
        return None;
    }
    let beside = |others: f64| format!("while other programs took {:.0} % of the cores", 100.0 * others);
    let loud = lesson.others.unwrap_or_default();
    let follows = match lesson.outcome {
        Outcome::Learnt(_) => "the next run plans with that".to_string(),
        Outcome::MeasuredAgain(then) => {
            format!("it was measured {}, so the next run measures it again", beside(then))
        }
        Outcome::Louder => {
            format!("it worked {}, so the next run plans with what was measured before", beside(loud))
        }
        Outcome::Unwritten => "the next run plans with what was measured before".to_string(),
    };
    Some(format!(
        "{} takes {:.0} % {} for its work than the plan assumed; {follows}",
        lesson.name,
        100.0 * off.abs(),
        if off > 0.0 { "longer" } else { "less time" }
    ))
}

pub(super) fn sample(
    run: &Run,
    weights: Weights,
    prompt: &[u32],
    count: usize,
    devices: &[Device],
    budgets: Vec<Option<u64>>,
) -> Result<()> {
    let Some(path) = checkpoint::latest(run.path())? else { return Ok(()) };
    let sampling = Sampling { temperature: 0.8, top_k: 40, top_p: 1.0, seed: 1 };
    let text = speaking::sample(&path, weights, prompt, count, sampling, devices, budgets)?;
    say(format!("sample   {}", text.replace('\n', "\n         ")));
    Ok(())
}
