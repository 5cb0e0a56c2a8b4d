//! `polystage finetune`.

use std::path::PathBuf;

use toml::{Table, Value};

use super::Environment;
use super::planning::MachineArguments;
use super::train::{Launch, start};
use crate::error::{Error, Result};
use crate::train::config::{Config, Described};
use crate::train::source::{describe, nameable};

/// Tokens of a sequence unless another length is asked for and the model's context allows it.
const SEQUENCE: usize = 512;

/// Trains a model that exists on a text: an adapter (LoRA) by default, which leaves the model as it is, or all of it.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  polystage finetune SmolLM2-135M --data chat.jsonl --valid held-out.jsonl\n  polystage finetune SmolLM2-135M --data book.txt --full --steps 200 --sequence 256\n\nThe keys for --set: `polystage config`, docs/config.md. What lies in a run's folder: docs/run.md."
)]
pub(super) struct Arguments {
    /// A Hugging Face folder, a run's folder, or one of its checkpoints; an adapter's folder goes on with the adapter.
    model: PathBuf,
    /// Text, records (.jsonl) or tokens (.bin): a path or a glob; may be given several times.
    #[arg(long, value_name = "FILE", required = true)]
    data: Vec<String>,
    /// The same, to evaluate on.
    #[arg(long, value_name = "FILE")]
    valid: Vec<String>,
    /// Evaluate on the last part of the data, this fraction of it.
    #[arg(long, value_name = "FRACTION", conflicts_with = "valid")]
    split: Option<f64>,
    /// Train every weight.
    #[arg(long, conflicts_with_all = ["rank", "alpha", "targets"])]
    full: bool,
    /// Rank of the adapter.
    #[arg(long, default_value_t = 8)]
    rank: usize,
    /// The adapter's update is scaled by alpha / rank.
    #[arg(long, default_value_t = 16.0)]
    alpha: f64,
    /// Ends of the names of the layers that are adapted, such as q_proj,v_proj, or all-linear (default: as PEFT).
    #[arg(long, value_name = "NAMES")]
    targets: Option<String>,
    /// Steps in all.
    #[arg(long, default_value_t = 100)]
    steps: u64,
    /// Sequences of a step.
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Tokens of a sequence (default: the model's context, at most 512).
    #[arg(long, value_name = "T")]
    sequence: Option<usize>,
    /// Highest learning rate (default: 2e-4, and 2e-5 with --full).
    #[arg(long, value_name = "RATE")]
    learning_rate: Option<f64>,
    /// How matrices are stored: f32; bf16, two in a word, with f32 masters of those that are trained; or bf16-only
    /// (default: f32 with --full, else bf16 where the model's files store that).
    #[arg(long, value_parser = ["f32", "bf16", "bf16-only"])]
    weights: Option<String>,
    /// Set any other key of a config file; may be given several times, and of the same key the last counts.
    #[arg(long, value_name = "a.b=c")]
    set: Vec<String>,
    #[command(flatten)]
    machine: MachineArguments,
    #[command(flatten)]
    launch: Launch,
}

pub(super) fn run(arguments: &Arguments, environment: &Environment) -> Result<u8> {
    let bases = [PathBuf::from(".")];
    let name = arguments.model.file_name().map_or("model".into(), |name| name.to_string_lossy().into_owned());
    let refuse = |what: &str| Error::config("MODEL", format!("{} {what}", arguments.model.display()));
    if !arguments.model.exists() {
        return Err(refuse("does not exist; give a model's folder"));
    }
    // The run's own config can then be used from anywhere.
    let unnamed = || refuse("has a name that is not UTF-8, which a config cannot hold; rename the folder");
    let model = nameable(&arguments.model).ok_or_else(unnamed)?;
    let described = describe(&model, &bases)?;
    let text = toml::to_string(&experiment(arguments, &model, &described)?).unwrap_or_default();
    // Opening a model may mean reading all of it; another is named only by --set.
    let known = |path: &str| if path == model { Ok(described) } else { describe(path, &bases) };
    let mut config = Config::parse_with(&text, &arguments.set, "finetune", known)?;
    arguments.machine.choose(&mut config)?;
    start(config, &format!("{name}-finetune"), &arguments.machine, &arguments.launch, &bases, environment)
}

/// The config file that the flags stand for.
fn experiment(a: &Arguments, model: &str, described: &Described) -> Result<Table> {
    let longest = described.model.longest_sequence();
    let rate = a.learning_rate.unwrap_or(if a.full { 2e-5 } else { 2e-4 });
    let whole = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    let strings = |list: &[String]| Value::from(list.to_vec());
    let mut data = Table::from_iter([("train".to_string(), strings(&a.data))]);
    if !a.valid.is_empty() {
        data.insert("valid".into(), strings(&a.valid));
    }
    if let Some(split) = a.split {
        data.insert("split".into(), split.into());
    }
    let sequence = a.sequence.unwrap_or(SEQUENCE.min(longest));
    let mut train = Table::from_iter([
        ("steps".to_string(), whole(a.steps).into()),
        ("batch".to_string(), whole(a.batch as u64).into()),
        ("sequence".to_string(), whole(sequence as u64).into()),
        ("learning_rate".to_string(), rate.into()),
        ("weight_decay".to_string(), 0.0.into()),
    ]);
    if let Some(weights) = &a.weights {
        train.insert("weights".into(), weights.as_str().into());
    }
    let model = Table::from_iter([("path".to_string(), model.into())]);
    let mut table = Table::from_iter([
        ("model".to_string(), Value::from(model)),
        ("data".to_string(), data.into()),
        ("train".to_string(), train.into()),
    ]);
    if a.full && described.adapter.is_some() {
        let message = format!("{} is an adapter; leave --full out, or merge it first", a.model.display());
        return Err(Error::config("--full", message));
    }
    // An adapter that exists says itself what it is.
    if !a.full && described.adapter.is_none() {
        let mut adapter = Table::from_iter([
            ("rank".to_string(), whole(a.rank as u64).into()),
            ("alpha".to_string(), a.alpha.into()),
        ]);
        if let Some(targets) = &a.targets {
            let names: Vec<String> = targets.split(',').map(|name| name.trim().to_string()).collect();
            let targets = if targets == "all-linear" { targets.as_str().into() } else { strings(&names) };
            adapter.insert("targets".into(), targets);
        }
        table.insert("adapter".into(), adapter.into());
    }
    Ok(table)
}
