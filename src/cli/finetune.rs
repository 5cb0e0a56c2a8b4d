//! `polystage finetune`.

use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::Environment;
use super::planning::MachineArguments;
use super::records::RecordArguments;
use super::train::{Launch, start};
use crate::error::{Error, Result};
use crate::folder::files::check_toml;
use crate::train::config::{Config, Described};
use crate::train::data::BadLines;
use crate::train::resume::last_config;
use crate::train::run::CONFIG;
use crate::train::source::{describe, nameable};

/// Tokens of a sequence unless another length is asked for and the model's context allows it.
const SEQUENCE: usize = 512;
/// Sequences of a step, and steps.
const BATCH: u64 = 8;
const STEPS: u64 = 100;
/// Evaluations of a run, if that does not mean more steps between two than this.
const EVALUATIONS: u64 = 5;
const EVALUATE_EVERY: u64 = 100;

/// Trains a model that exists on a text: an adapter (LoRA) by default, which leaves the model as it is, or all of it.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  polystage finetune SmolLM2-135M --data chat.jsonl --valid held-out.jsonl\n  polystage finetune SmolLM2-135M --data book.txt --full --steps 200 --sequence 256\n  polystage finetune --resume --out runs/SmolLM2-135M-finetune-1 --steps 300\n\nThe keys for --set: `polystage config`, docs/config.md. What lies in a run's folder: docs/run.md. Step by step: docs/first-lora.md."
)]
pub(super) struct Arguments {
    /// A Hugging Face folder, a run's folder, or one of its checkpoints; an adapter's folder goes on with the adapter.
    /// With --resume it may be left out.
    #[arg(required_unless_present = "resume")]
    model: Option<PathBuf>,
    /// Text, records (.jsonl) or tokens (.bin): a path or a glob; may be given several times. With --resume it may be left
    /// out.
    #[arg(long, value_name = "FILE", required_unless_present = "resume")]
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
    /// Rank of the adapter (default: 8).
    #[arg(long)]
    rank: Option<usize>,
    /// The adapter's update is scaled by alpha / rank (default: 16).
    #[arg(long)]
    alpha: Option<f64>,
    /// Ends of the names of the layers that are adapted, such as q_proj,v_proj, or all-linear (default: as PEFT).
    #[arg(long, value_name = "NAMES")]
    targets: Option<String>,
    /// Steps in all, or at most where --epochs says less (default: 100, unless --epochs is given).
    #[arg(long, visible_alias = "max-steps")]
    steps: Option<u64>,
    /// How often each sequence is seen, such as 3 or 0.5.
    #[arg(long)]
    epochs: Option<f64>,
    /// Sequences of a step (default: 8).
    #[arg(long)]
    batch: Option<usize>,
    /// Tokens of a sequence (default: the model's context, at most 512).
    #[arg(long, value_name = "T")]
    sequence: Option<usize>,
    /// Highest learning rate (default: 2e-4, and 2e-5 with --full).
    #[arg(long, value_name = "RATE")]
    learning_rate: Option<f64>,
    /// Steps between evaluations (default: a fifth of --steps, at most 100).
    #[arg(long, value_name = "STEPS")]
    evaluate_every: Option<u64>,
    /// Steps between checkpoints (default: 100).
    #[arg(long, value_name = "STEPS")]
    save_every: Option<u64>,
    /// How matrices are stored: f32; bf16, two in a word, with f32 masters of those that are trained; or bf16-only
    /// (default: f32 with --full, else bf16 where the model's files store that).
    #[arg(long, value_parser = ["f32", "bf16", "bf16-only"])]
    weights: Option<String>,
    #[command(flatten)]
    records: RecordArguments,
    /// Set any other key of a config file; may be given several times, and of the same key the last counts.
    #[arg(long, value_name = "a.b=c")]
    set: Vec<String>,
    #[command(flatten)]
    machine: MachineArguments,
    #[command(flatten)]
    launch: Launch,
}

pub(super) fn run(arguments: &Arguments, environment: &Environment) -> Result<u8> {
    let model = arguments.model.as_ref().map(|model| Named::new(model)).transpose()?;
    let name = model.as_ref().map(|model| format!("{}-finetune", model.name));
    let config = if arguments.launch.resume() {
        resumed(arguments, model.as_ref(), name.as_deref())?
    } else {
        let Some(model) = &model else {
            return Err(Error::config("MODEL", "is missing; give a model's folder"));
        };
        begun(arguments, model)?
    };
    let name = name.unwrap_or_default();
    start(config, &name, &arguments.machine, &arguments.launch, &here(), environment)
}

/// The folders from which paths count.
fn here() -> [PathBuf; 1] {
    [PathBuf::from(".")]
}

/// A model that was named.
struct Named {
    /// Its folder as a config holds it, so that the config can be used from anywhere.
    path: String,
    /// What its runs are called after.
    name: String,
}

impl Named {
    fn new(model: &Path) -> Result<Named> {
        let refuse = |what: &str| Error::config("MODEL", format!("{} {what}", model.display()));
        if !model.exists() {
            return Err(refuse("does not exist; give a model's folder"));
        }
        let unnamed =
            || refuse("has a name that is not UTF-8, which a config cannot hold; rename the folder");
        let path = nameable(model).ok_or_else(unnamed)?;
        let name = model.file_name().map_or("model".into(), |name| name.to_string_lossy().into_owned());
        Ok(Named { path, name })
    }
}

/// The config of a run that begins.
fn begun(arguments: &Arguments, model: &Named) -> Result<Config> {
    let described = describe(&model.path, &here())?;
    if arguments.full && described.adapter.is_some() {
        let message = format!("{} is an adapter; leave --full out, or merge it first", model.path);
        return Err(Error::config("--full", message));
    }
    let mut table = defaults(arguments, &described);
    insert(&mut table, "model", "path", model.path.as_str());
    for (section, key, value) in given(arguments)? {
        insert(&mut table, section, key, value);
    }
    let text = toml::to_string(&table).unwrap_or_default();
    // Opening a model may mean reading all of it; another is named only by --set.
    let known = |path: &str| if path == model.path { Ok(described) } else { describe(path, &here()) };
    let mut config = Config::parse_with(&text, &arguments.set, "finetune", known)?;
    arguments.machine.choose(&mut config)?;
    Ok(config)
}

/// The config of a run that goes on: its own, but for what is given again.
fn resumed(arguments: &Arguments, model: Option<&Named>, name: Option<&str>) -> Result<Config> {
    let Some(run) = arguments.launch.resumed(name)? else {
        return Err(Error::config("--resume", "needs the run's folder: give --out RUN"));
    };
    let text = last_config(&run)?;
    let place = run.join(CONFIG).to_string_lossy().into_owned();
    check_toml(&text, &place)?;
    let mut table: Table = text.parse().map_err(|_| {
        let message = "is damaged; put the config there that the run was trained with";
        Error::config(place.as_str(), message)
    })?;
    let adapted = table.contains_key("adapter");
    if arguments.full && adapted {
        let message = format!("{} trains an adapter; leave --full out, or begin another run", run.display());
        return Err(Error::config("--full", message));
    }
    if !adapted && (arguments.rank.is_some() || arguments.alpha.is_some() || arguments.targets.is_some()) {
        let message = format!("{} trains every weight; leave it out, or begin another run", run.display());
        return Err(Error::config("--rank, --alpha, --targets", message));
    }
    if let Some(model) = model {
        insert(&mut table, "model", "path", model.path.as_str());
    }
    for (section, key, value) in given(arguments)? {
        // The one takes the place of the other.
        if (section, key) == ("data", "valid") {
            remove(&mut table, "data", "split");
        }
        if (section, key) == ("data", "split") {
            remove(&mut table, "data", "valid");
        }
        if (section, key) == ("train", "epochs") && arguments.steps.is_none() {
            remove(&mut table, "train", "steps");
        }
        insert(&mut table, section, key, value);
    }
    let text = toml::to_string(&table).unwrap_or_default();
    let mut config = Config::parse_with(&text, &arguments.set, &place, |path| describe(path, &here()))?;
    arguments.machine.choose(&mut config)?;
    Ok(config)
}

fn insert(table: &mut Table, section: &str, key: &str, value: impl Into<Value>) {
    let inner = table.entry(section).or_insert_with(|| Table::new().into());
    if let Some(inner) = inner.as_table_mut() {
        inner.insert(key.into(), value.into());
    }
}

fn remove(table: &mut Table, section: &str, key: &str) {
    table.get_mut(section).and_then(Value::as_table_mut).map(|inner| inner.remove(key));
}

/// What a run is unless it is given.
fn defaults(a: &Arguments, described: &Described) -> Table {
    let mut table = Table::new();
    let longest = described.model.longest_sequence();
    if a.steps.is_none() && a.epochs.is_none() {
        insert(&mut table, "train", "steps", whole(STEPS));
    }
    let evaluations = a.steps.or(a.epochs.is_none().then_some(STEPS));
    if let Some(steps) = evaluations {
        insert(
            &mut table,
            "train",
            "evaluate_every",
            whole(steps.div_ceil(EVALUATIONS).clamp(1, EVALUATE_EVERY)),
        );
    }
    insert(&mut table, "train", "batch", whole(BATCH));
    insert(&mut table, "train", "sequence", whole(SEQUENCE.min(longest) as u64));
    insert(&mut table, "train", "learning_rate", if a.full { 2e-5 } else { 2e-4 });
    insert(&mut table, "train", "weight_decay", 0.0);
    // An adapter that exists says itself what it is.
    if !a.full && described.adapter.is_none() {
        insert(&mut table, "adapter", "rank", 8);
        insert(&mut table, "adapter", "alpha", 16.0);
    }
    table
}

fn whole(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// The keys of a config that arguments give.
fn given(a: &Arguments) -> Result<Vec<(&'static str, &'static str, Value)>> {
    let strings = |list: &[String]| Value::from(list.to_vec());
    let list = |list: &[String]| (!list.is_empty()).then(|| strings(list));
    let number = |n: Option<u64>| n.map(|n| Value::from(whole(n)));
    let targets = a.targets.as_ref().map(|targets| {
        let names: Vec<String> = targets.split(',').map(|name| name.trim().to_string()).collect();
        if targets == "all-linear" { targets.as_str().into() } else { strings(&names) }
    });
    let format = a.records.format()?;
    let keys = format.keys.into_iter().map(|(field, name)| (field, Value::from(name)));
    let keys: Table = keys.collect();
    let skip = (format.bad_lines == BadLines::Skip).then(|| Value::from("skip"));
    let all = [
        ("data", "train", list(&a.data)),
        ("data", "valid", list(&a.valid)),
        ("data", "split", a.split.map(Value::from)),
        ("data", "keys", (!keys.is_empty()).then_some(Value::Table(keys))),
        ("data", "bad_lines", skip),
        ("adapter", "rank", number(a.rank.map(|n| n as u64))),
        ("adapter", "alpha", a.alpha.map(Value::from)),
        ("adapter", "targets", targets),
        ("train", "steps", number(a.steps)),
        ("train", "epochs", a.epochs.map(Value::from)),
        ("train", "batch", number(a.batch.map(|n| n as u64))),
        ("train", "sequence", number(a.sequence.map(|n| n as u64))),
        ("train", "learning_rate", a.learning_rate.map(Value::from)),
        ("train", "evaluate_every", number(a.evaluate_every)),
        ("train", "weights", a.weights.as_deref().map(Value::from)),
        ("output", "checkpoint_every", number(a.save_every)),
    ];
    Ok(all.into_iter().filter_map(|(section, key, value)| Some((section, key, value?))).collect())
}
