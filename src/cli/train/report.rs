//! What a run says of itself.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

use super::job::Job;
use crate::cli::{clock, note, print, say, show_bytes, show_count, speaking};
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
    for (rank, adapter) in plan.ranks.iter().zip(&job.adapters) {
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
            adapter.index,
            adapter.name,
            100.0 * rank.flops / total,
            show_bytes(rank.bytes)
        ))?;
    }
    Ok(entropy)
}

/// How far a run is: on a terminal a line that stays where it is, elsewhere a line now and then.
pub(super) struct Progress {
    bar: ProgressBar,
    /// What stands behind the bar, which is drawn with it: once a step.
    line: Arc<Mutex<String>>,
    steps: u64,
    started: Instant,
    /// When the last step ended, and the seconds of those before it, with evaluations and checkpoints.
    ended: Option<Instant>,
    recent: VecDeque<f64>,
    /// When a line was last printed where there is no terminal.
    printed: Option<Instant>,
}

/// Steps from which the time that is left is estimated.
const RECENT: usize = 10;
/// Seconds between two lines where there is no terminal.
const PAUSE: f64 = 10.0;

impl Progress {
    pub(super) fn new(steps: u64, done: u64) -> Progress {
        let line = Arc::new(Mutex::new(format!("{done}/{steps}")));
        let shown = line.clone();
        let style = ProgressStyle::with_template("{wide_bar:.cyan/dim} {line}");
        let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
        let draw = move |_: &ProgressState, out: &mut dyn std::fmt::Write| {
            let _ = shown.lock().map(|line| out.write_str(&line));
        };
        let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stderr());
        bar.set_style(style.with_key("line", draw));
        bar.set_position(done);
        let (started, recent) = (Instant::now(), VecDeque::new());
        Progress { bar, line, steps, started, ended: None, recent, printed: None }
    }

    /// A step has ended.
    pub(super) fn step(&mut self, row: &Row) {
        let now = Instant::now();
        // The first step of a run takes longer than any other.
        if let Some(before) = self.ended.replace(now) {
            self.recent.push_back((now - before).as_secs_f64());
            self.recent.drain(..self.recent.len().saturating_sub(RECENT));
        }
        let elapsed = clock((now - self.started).as_secs_f64());
        let mean = self.recent.iter().sum::<f64>() / self.recent.len() as f64;
        let left = match self.recent.is_empty() || row.step >= self.steps {
            true => String::new(),
            false => format!(", {} left", clock(mean * (self.steps - row.step) as f64)),
        };
        let text = format!(
            "{}/{}  loss {:.4}  {} tokens/s  {elapsed} elapsed{left}",
            row.step,
            self.steps,
            row.loss,
            show_count(row.tokens_per_second as u64)
        );
        let due = self.printed.is_none_or(|printed| (now - printed).as_secs_f64() > PAUSE);
        if self.bar.is_hidden() && (due || row.step == self.steps) {
            self.printed = Some(now);
            note(format!("step {text}"));
        }
        self.draw(row.step, text);
    }

    /// An evaluation after so many steps has come so far.
    pub(super) fn evaluating(&self, step: u64, windows: usize) {
        self.draw(step, format!("{step}/{}  evaluating, window {windows}", self.steps));
    }

    fn draw(&self, step: u64, text: String) {
        if let Ok(mut line) = self.line.lock() {
            *line = text;
        }
        self.bar.update(|state| state.set_pos(step));
    }

    /// Says something above the line.
    pub(super) fn note(&self, text: impl std::fmt::Display) {
        self.bar.suspend(|| note(text));
    }

    /// Leaves the line where it is, as the last word about a run that has failed.
    pub(super) fn abandon(&self) {
        self.bar.abandon();
    }

    /// Takes the line away.
    pub(super) fn end(self) {
        self.bar.finish_and_clear();
    }
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
