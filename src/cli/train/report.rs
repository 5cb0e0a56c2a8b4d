//! What a run says of itself.

use super::job::Job;
use crate::cli::{note, print, say, show_bytes, show_count, speaking};
use crate::error::Result;
use crate::generate::{Language, Sampling};
use crate::gpu::Device;
use crate::pipeline::profile::Outcome;
use crate::text::Isolation;
use crate::train::checkpoint;
use crate::train::config::Config;
use crate::train::lessons::Lesson;
use crate::train::run::{LOSSES, Run, TIMELINE};
use crate::train::source::Pretrained;
use crate::train::trainer::{Row, Trainer};

/// Says what a run will be, and returns the entropy of its text.
pub(super) fn describe(job: &Job) -> Result<f64> {
    let entropy = job.batches.corpus().unigram_entropy()?;
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
    say(format!(
        "data     {} {}, {} sequences of {}; unigram entropy {entropy:.3} nats",
        show_count(job.batches.corpus().len() as u64),
        if job.source.text.tokenizer.is_bytes() { "bytes" } else { "tokens" },
        show_count(job.batches.sequences() as u64),
        config.train.sequence
    ))?;
    if let Some(valid) = &job.source.valid {
        say(format!(
            "valid    {} tokens, every {} steps",
            show_count(valid.len() as u64),
            config.train.evaluate_every
        ))?;
    }
    say(format!(
        "schedule {}, {} microbatches of {} sequences",
        plan.schedule.name, plan.schedule.microbatches, plan.setup.batch
    ))?;
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
        ))?;
    }
    Ok(entropy)
}

pub(super) fn finish(run: &Run, trainer: &Trainer, last: Option<&Row>, entropy: f64) -> Result<()> {
    let Some(row) = last else {
        return say(format!("nothing to do: step {} of the config is already done", trainer.step_number()));
    };
    say(format!(
        "step {}: loss {:.4} nats a token ({:.3} bits); the text's unigram entropy is {entropy:.4}",
        row.step,
        row.loss,
        row.loss / std::f64::consts::LN_2
    ))?;
    for (rank, device) in row.devices.iter().enumerate() {
        say(format!(
            "device {rank} ({}): busy {:.0} %, host {:.1} % of the last step, {} sent",
            device.adapter,
            100.0 * device.busy_fraction,
            100.0 * device.host_fraction,
            show_bytes(device.bytes_moved)
        ))?;
    }
    say(format!("losses   {}", run.path().join(LOSSES).display()))?;
    say(format!("timeline {}", run.path().join(TIMELINE).display()))?;
    match checkpoint::latest(run.path()) {
        Ok(Some(folder)) => say(format!("folder   {}", folder.display())),
        _ => Ok(()),
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

/// Tokens of the text that the sample continues, and by how many at most.
const PROMPT: usize = 32;
const SAMPLE: usize = 32;
/// The same if a token is a byte.
const SAMPLE_BYTES: usize = 200;

/// What the model that was trained makes of the beginning of its text. The run is done and kept, so there may be none.
pub(super) fn sample(
    run: &Run,
    isolation: &Isolation,
    config: &Config,
    beginning: &Beginning,
    devices: &[Device],
    budgets: Vec<Option<u64>>,
) -> Result<()> {
    let made = checkpoint::latest(run.path()).and_then(|path| {
        let Some(path) = path else { return Ok(None) };
        let sampling = Sampling { temperature: 0.8, top_k: 40, top_p: 1.0, seed: 1 };
        let language = Language::new(Pretrained::open(&path)?, isolation)?;
        let language = language.with_weights(config.train.weights);
        let (prompt, count) = (&beginning.tokens, beginning.more);
        speaking::sample(&language, prompt, count, sampling, devices, budgets).map(Some)
    });
    match made {
        Ok(Some(text)) => print(format!("sample   {}", text.replace('\n', "\n         "))),
        Ok(None) => Ok(()),
        Err(error) => {
            note(format!("note: there is no sample: {error}"));
            Ok(())
        }
    }
}

/// The beginning of the text that a model is trained on.
pub(super) struct Beginning {
    tokens: Vec<u32>,
    /// Tokens by which a sample continues it at most.
    more: usize,
}

impl Beginning {
    /// Half of what the model sees is left for what it adds.
    pub(super) fn new(job: &Job) -> Result<Beginning> {
        let room = (job.config.model.longest_sequence() / 2).max(1);
        let corpus = job.batches.corpus();
        let mut tokens = vec![0; corpus.len().min(PROMPT).min(room)];
        corpus.read(0, &mut tokens)?;
        let more = if job.source.text.tokenizer.is_bytes() { SAMPLE_BYTES } else { SAMPLE };
        Ok(Beginning { tokens, more })
    }
}
