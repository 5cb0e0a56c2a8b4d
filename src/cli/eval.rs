//! `polystage eval`.

use std::path::PathBuf;

use super::placement::Placement;
use super::progress::Counter;
use super::records::{Evaluated, RecordArguments, left_out};
use super::{Environment, note, print, say, show_count};
use crate::error::{Error, Result};
use crate::gpu::Device;
use crate::mesh::{Division, Wire};
use crate::model::Model;
use crate::pipeline::{Executor, Plan, Setup, Use};
use crate::plan::Sharding;
use crate::schedule;
use crate::train::data::Corpus;
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
/// A text is cut into consecutive windows that share no token; each token but the first of a window is predicted from
/// those before it in the window. Of records each is taken by itself, whole if it is no longer than --sequence, and what
/// training would count is predicted: answers and completions.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  polystage eval SmolLM2-135M --data book.txt --sequence 256 --json")]
pub(super) struct Arguments {
    /// A Hugging Face folder, a run's folder, or one of its checkpoints.
    model: PathBuf,
    /// Text, records (.jsonl) or tokens (.bin): a path or a glob; may be given several times.
    #[arg(long, value_name = "FILE", required = true)]
    data: Vec<String>,
    /// Tokens of a window, or of the longest record that is not cut (default: the longest record, or for text the model's
    /// context; at most 1024).
    #[arg(long, value_name = "T")]
    sequence: Option<usize>,
    #[command(flatten)]
    placement: Placement,
    #[command(flatten)]
    records: RecordArguments,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &Arguments, environment: &Environment) -> Result<u8> {
    let mut pretrained = Pretrained::open(&arguments.model)?;
    pretrained.model = arguments.placement.store(pretrained.model);
    let config = pretrained.model.config();
    let context = config.longest_sequence();
    if let Some(sequence) = arguments.sequence.filter(|sequence| !(2..=context).contains(sequence)) {
        let message = format!("{sequence} must be at least 2 and at most the model's context of {context}");
        return Err(Error::config("--sequence", message));
    }
    let text = Text::of_model(pretrained.text_folder(), config.vocabulary, &environment.isolation)?;
    text.check(config.vocabulary)?;
    let format = arguments.records.format()?;
    let corpus = text.read(&arguments.data, &[PathBuf::from(".")], config.vocabulary, &format, false)?;
    // A record's last token is only a target.
    let longest = corpus.tally(context).map_or(context, |tally| tally.longest.saturating_sub(1).max(2));
    let usual = if corpus.has_records() { longest.max(TOKENS) } else { SEQUENCE };
    let sequence = arguments.sequence.unwrap_or(usual.min(context).min(SEQUENCE));
    left_out(&corpus, sequence, true).iter().for_each(|what| note(format!("note: {what}")));
    let tensor = arguments.placement.tensor()?;
    let (devices, budgets) = arguments.placement.devices(tensor.members() * pretrained.model.layers())?;
    let plan = Plan::within(setup(&pretrained.model, sequence, &corpus, budgets, tensor)?, &devices)?;
    let found = score(plan, &devices, &pretrained, &corpus)?;
    if arguments.json {
        print(serde_json::to_string(&found).unwrap_or_default())?;
        return Ok(0);
    }
    let of = match found.records {
        Some(records) => format!("of {} records, each by itself", show_count(records as u64)),
        None => format!("in windows of {sequence}"),
    };
    say(format!(
        "loss {:.4} nats a token, perplexity {:.3}, over {} tokens {of}",
        found.loss,
        found.perplexity,
        show_count(found.tokens as u64)
    ))?;
    Ok(0)
}

/// One stage a device or gang, and twice as many microbatches, so that all have work.
fn setup(
    model: &Model,
    sequence: usize,
    corpus: &Corpus,
    budgets: Vec<Option<u64>>,
    tensor: Division,
) -> Result<Setup> {
    let stages = (budgets.len() / tensor.members()).max(1);
    let windows = corpus.windows(sequence).len().max(1);
    let most = (LOGITS / (4 * sequence * model.config().vocabulary)).clamp(1, TOKENS.div_ceil(sequence));
    let batch = most.min(windows.div_ceil(stages));
    let microbatches = windows.div_ceil(batch).min(2 * stages);
    Ok(Setup {
        model: model.config().clone(),
        batch,
        sequence,
        schedule: schedule::generate("gpipe", stages, microbatches)?,
        cuts: None,
        shared: corpus.has_records(),
        recompute: Vec::new(),
        sharding: Sharding::default(),
        tensor,
        wire: Wire::F32,
        host: None,
        purpose: Use::Evaluation,
        adapter: model.adapter().cloned(),
        weights: model.weights(),
        logits: model.logits(),
        budgets,
    })
}

fn score(plan: Plan, devices: &[Device], pretrained: &Pretrained, corpus: &Corpus) -> Result<Evaluation> {
    let (sequences, sequence) = (plan.setup.batch * plan.schedule.microbatches, plan.setup.sequence);
    let evaluated = Evaluated::new(corpus, sequence);
    let bar = Counter::new(evaluated.rows as u64, move |done, _| evaluated.words(done as usize));
    let mut executor = Executor::launch(plan, devices)?;
    let watch = executor.watch();
    watch.block_on(pretrained.load(&mut executor))?;
    let scored = evaluate(&mut executor, corpus, sequences, sequence, |done| bar.done(done as u64));
    watch.block_on(scored)
}
