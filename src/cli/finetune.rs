//! `polystage finetune`.

use std::path::PathBuf;

use toml::{Table, Value};

use super::Environment;
use super::planning::MachineArguments;
use super::recipe::Recipe;
use super::train::{Launch, start};
use crate::error::Result;
use crate::train::config::{Config, Described};
use crate::train::source::{describe, named};

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
    #[command(flatten)]
    recipe: Recipe,
    /// Steps in all.
    #[arg(long, default_value_t = 100)]
    steps: u64,
    /// Highest learning rate (default: 2e-4, and 2e-5 with --full).
    #[arg(long, value_name = "RATE")]
    learning_rate: Option<f64>,
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
    // The run's own config can then be used from anywhere.
    let model = named(&arguments.model)?;
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
    let rate = a.learning_rate.unwrap_or(if a.recipe.full { 2e-5 } else { 2e-4 });
    let strings = |list: &[String]| Value::from(list.to_vec());
    let mut data = Table::from_iter([("train".to_string(), strings(&a.data))]);
    if !a.valid.is_empty() {
        data.insert("valid".into(), strings(&a.valid));
    }
    if let Some(split) = a.split {
        data.insert("split".into(), split.into());
    }
    let mut table = a.recipe.table(model, described)?;
    table.insert("data".into(), data.into());
    if let Some(train) = table.get_mut("train").and_then(Value::as_table_mut) {
        train.insert("steps".into(), i64::try_from(a.steps).unwrap_or(i64::MAX).into());
        train.insert("learning_rate".into(), rate.into());
        train.insert("weight_decay".into(), 0.0.into());
    }
    Ok(table)
}
