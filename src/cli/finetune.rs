//! `polystage finetune`.

use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::Environment;
use super::planning::MachineArguments;
use super::recipe::{Recipe, insert};
use super::records::RecordArguments;
use super::train::{Launch, Request, start};
use crate::error::{Error, Result};
use crate::train::config::Config;
use crate::train::data::BadLines;
use crate::train::resume::last_config;
use crate::train::run::CONFIG;
use crate::train::source::{describe, named};

/// Steps of a run unless it says otherwise.
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
    #[command(flatten)]
    recipe: Recipe,
    /// Steps in all, or at most where --epochs says less (default: 100, unless --epochs is given).
    #[arg(long, visible_alias = "max-steps")]
    steps: Option<u64>,
    /// How often each sequence is seen, such as 3 or 0.5.
    #[arg(long)]
    epochs: Option<f64>,
    /// Highest learning rate (default: 2e-4, and 2e-5 with --full).
    #[arg(long, value_name = "RATE")]
    learning_rate: Option<f64>,
    /// Steps between evaluations (default: a fifth of --steps, at most 100).
    #[arg(long, value_name = "STEPS")]
    evaluate_every: Option<u64>,
    /// Steps between checkpoints (default: 100).
    #[arg(long, value_name = "STEPS")]
    save_every: Option<u64>,
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
    let (machine, launch) = (&arguments.machine, &arguments.launch);
    // The run's config keeps everything else.
    let again = vec!["finetune".to_string()];
    start(Request { config, name: &name, machine, launch, bases: &here(), again }, environment)
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
        let path = named(model)?;
        let name = model.file_name().map_or("model".into(), |name| name.to_string_lossy().into_owned());
        Ok(Named { path, name })
    }
}

/// The config of a run that begins.
fn begun(arguments: &Arguments, model: &Named) -> Result<Config> {
    let described = describe(&model.path, &here())?;
    let mut table = arguments.recipe.table(&model.path, &described)?;
    for (section, key, value) in usual(arguments).into_iter().chain(given(arguments)?) {
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
    let mut table = last_config(&run)?;
    let place = run.join(CONFIG).to_string_lossy().into_owned();
    let adapted = table.contains_key("adapter");
    let recipe = &arguments.recipe;
    if recipe.full && adapted {
        let message = format!("{} trains an adapter; leave --full out, or begin another run", run.display());
        return Err(Error::config("--full", message));
    }
    if !adapted && (recipe.rank.is_some() || recipe.alpha.is_some() || recipe.targets.is_some()) {
        let message = format!("{} trains every weight; leave it out, or begin another run", run.display());
        return Err(Error::config("--rank, --alpha, --targets", message));
    }
    if let Some(model) = model {
        insert(&mut table, "model", "path", model.path.as_str());
    }
    for (section, key, value) in recipe.keys().into_iter().chain(given(arguments)?) {
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

fn remove(table: &mut Table, section: &str, key: &str) {
    table.get_mut(section).and_then(Value::as_table_mut).map(|inner| inner.remove(key));
}

/// What a run that begins is unless it is given, beside the recipe's own.
fn usual(a: &Arguments) -> Vec<Setting> {
    let steps = a.steps.or(a.epochs.is_none().then_some(STEPS));
    let every = steps.map(|steps| steps.div_ceil(EVALUATIONS).clamp(1, EVALUATE_EVERY));
    let rate = if a.recipe.full { 2e-5 } else { 2e-4 };
    let all = [
        ("train", "steps", steps.map(whole)),
        ("train", "evaluate_every", every.map(whole)),
        ("train", "learning_rate", Some(Value::from(rate))),
        ("train", "weight_decay", Some(Value::from(0.0))),
    ];
    all.into_iter().filter_map(|(section, key, value)| Some((section, key, value?))).collect()
}

fn whole(n: u64) -> Value {
    Value::from(i64::try_from(n).unwrap_or(i64::MAX))
}

/// A key of a config's table, and its value.
type Setting = (&'static str, &'static str, Value);

/// The keys of a config that arguments beside the recipe give.
fn given(a: &Arguments) -> Result<Vec<Setting>> {
    let strings = |list: &[String]| Value::from(list.to_vec());
    let list = |list: &[String]| (!list.is_empty()).then(|| strings(list));
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
        ("train", "steps", a.steps.map(whole)),
        ("train", "epochs", a.epochs.map(Value::from)),
        ("train", "learning_rate", a.learning_rate.map(Value::from)),
        ("train", "evaluate_every", a.evaluate_every.map(whole)),
        ("output", "checkpoint_every", a.save_every.map(whole)),
    ];
    Ok(all.into_iter().filter_map(|(section, key, value)| Some((section, key, value?))).collect())
}
