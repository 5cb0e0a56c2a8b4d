//! `polystage eval`.

use std::path::PathBuf;

use super::placement::Placement;
use super::progress::Counter;
use super::{Environment, print, say, show_count};
use crate::error::{Error, Result};
use crate::gpu::Device;
use crate::model::Model;
use crate::pipeline::{Executor, Plan, Setup, Use};
use crate::schedule;
use crate::train::data::{BadLines, Corpus};
use crate::train::evaluate::{Evaluation, evaluate};
use crate::train::source::{Pretrained, Text};

/// Tokens of the longest window unless another length is asked for.
const SEQUENCE: usize = 1024;
/// Tokens that a microbatch should have: enough to keep a device busy.
const TOKENS: usize = 256;
/// Most bytes of a microbatch's logits.
const LOGITS: usize = 64 << 20;

/// Mean loss and perplexity of a model on a text.
///
/// The text is cut into consecutive windows that share no token. Each token but the first of a window is predicted from
/// those before it in the window; of records only what training would count is.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  polystage eval SmolLM2-135M --data book.txt --sequence 256 --json")]
pub(super) struct Arguments {
    /// A Hugging Face folder, a run's folder, or one of its checkpoints.
    model: PathBuf,
    /// Text, records (.jsonl) or tokens (.bin): a path or a glob; may be given several times.
    #[arg(long, value_name = "FILE", required = true)]
    data: Vec<String>,
    /// Tokens of a window (default: the model's context, at most 1024).
    #[arg(long, value_name = "T")]
    sequence: Option<usize>,
    #[command(flatten)]
    placement: Placement,
    /// Leave out lines of records that are none, instead of refusing them.
    #[arg(long)]
    skip_bad_lines: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &Arguments, environment: &Environment) -> Result<u8> {
    let mut pretrained = Pretrained::open(&arguments.model)?;
    pretrained.model = arguments.placement.store(pretrained.model);
    let config = pretrained.model.config();
    let sequence = match arguments.sequence {
        None => config.longest_sequence().min(SEQUENCE),
        Some(sequence @ 2..) if sequence <= config.longest_sequence() => sequence,
        Some(sequence) => {
            let longest = config.longest_sequence();
            let message =
                format!("{sequence} must be at least 2 and at most the model's context of {longest}");
            return Err(Error::config("--sequence", message));
        }
    };
    let text = Text::of_model(pretrained.text_folder(), config.vocabulary, &environment.isolation)?;
    text.check(config.vocabulary)?;
    let bad_lines = if arguments.skip_bad_lines { BadLines::Skip } else { BadLines::Refuse };
    let corpus = text.read(&arguments.data, &[PathBuf::from(".")], config.vocabulary, bad_lines, false)?;
    let (devices, budgets) = arguments.placement.devices(pretrained.model.layers())?;
    let plan = Plan::within(setup(&pretrained.model, sequence, &corpus, budgets)?, &devices)?;
    let found = score(plan, &devices, &pretrained, &corpus)?;
    if arguments.json {
        print(serde_json::to_string(&found).unwrap_or_default())?;
        return Ok(0);
    }
    say(format!(
        "loss {:.4} nats a token, perplexity {:.3}, over {} tokens in windows of {sequence}",
        found.loss,
        found.perplexity,
        show_count(found.tokens as u64)
    ))?;
    Ok(0)
}

/// One stage a device, and twice as many microbatches, so that all have work.
fn setup(model: &Model, sequence: usize, corpus: &Corpus, budgets: Vec<Option<u64>>) -> Result<Setup> {
    let windows = corpus.len().div_ceil(sequence);
    let most = (LOGITS / (4 * sequence * model.config().vocabulary)).clamp(1, TOKENS.div_ceil(sequence));
    let batch = most.min(windows.div_ceil(budgets.len()));
    let microbatches = windows.div_ceil(batch).min(2 * budgets.len());
    Ok(Setup {
        model: model.config().clone(),
        batch,
        sequence,
        schedule: schedule::generate("gpipe", budgets.len(), microbatches)?,
        cuts: None,
        recompute: Vec::new(),
        purpose: Use::Evaluation,
        adapter: model.adapter().cloned(),
        weights: model.weights(),
        budgets,
    })
}

fn score(plan: Plan, devices: &[Device], pretrained: &Pretrained, corpus: &Corpus) -> Result<Evaluation> {
    let (sequences, sequence) = (plan.setup.batch * plan.schedule.microbatches, plan.setup.sequence);
    let windows = corpus.len().div_ceil(sequence) as u64;
    let bar = Counter::new(windows, |done, all| format!("window {done}/{all}"));
    let mut executor = Executor::launch(plan, devices)?;
    let watch = executor.watch();
    watch.block_on(pretrained.load(&mut executor))?;
    let scored = evaluate(&mut executor, corpus, sequences, sequence, |done| bar.done(done as u64));
    watch.block_on(scored)
}
