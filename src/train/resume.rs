//! What a run goes on from, and what is no longer as it was. A checkpoint belongs to one config, one text and, under an
//! adapter, one base model, none of which it holds. Nothing is written here: what is refused stays untouched.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::{Table, Value};

use super::checkpoint::{CHECKPOINTS, Checkpoint, folder_name, latest, named_latest, open, resolve};
use super::config::{Axis, Config, Level, OptimizerPlace, defaults};
use super::metrics::{METRICS, Metrics};
use super::run::CONFIG;
use super::source::{Fingerprints, Origin};
use super::state::check;
use crate::error::{Error, Result, one_line};
use crate::folder::Fingerprint;
use crate::folder::files::{Unreadable, broken, check_toml, read_text};

/// Tables of the config whose keys are compared. Which devices are used, and which microbatches each replica has, a run that
/// is resumed settles again.
const COMPARED: [&str; 7] = ["model", "adapter", "data", "train", "pipeline", "mesh", "output"];
const SETTLED: [(&str, &str); 3] = [("pipeline", "devices"), ("pipeline", "microbatches"), ("mesh", "data")];

/// Most characters of a value in a warning.
const SHOWN: usize = 120;

/// How a run goes on; by default from the start.
#[derive(Debug, Default)]
pub struct Resume {
    /// The checkpoint and its folder. None for a run that ended before its first one.
    pub checkpoint: Option<(PathBuf, Checkpoint)>,
    /// What a user may not expect, each a sentence.
    pub warnings: Vec<String>,
}

impl Resume {
    /// Finds what a run goes on from, or opens the checkpoint `from`. A choice that `config` leaves to the planner, and
    /// on which rounding depends, is made as before.
    ///
    /// # Errors
    /// [`Error::Config`] where there is no run, or its config or metrics cannot be read; [`Error::Checkpoint`] where it
    /// has had checkpoints and none is complete, the chosen one is damaged or does not hold what the config trains, or its
    /// adapter belongs to other weights.
    pub fn open(run: &Path, from: Option<&Path>, config: &mut Config, origin: &Origin) -> Result<Resume> {
        let old = last_config(run)?;
        let metrics = Metrics::open(run).map_err(|error| error.config(&run.join(METRICS)))?;
        keep_microbatches(&old, config);
        keep_state(&old, config);
        let new: Table = config.to_toml().parse().unwrap_or_default();
        let mut warnings = changed_keys(&old, &new);
        let folder = match from {
            Some(from) => Some(resolve(from)?),
            None => latest(run)?,
        };
        let Some(folder) = folder else {
            check_never_saved(run, &old, &metrics)?;
            warnings.push(format!("{} holds no checkpoint yet; starting at step 0", run.display()));
            return Ok(Resume { checkpoint: None, warnings });
        };
        let is_named = |step: u64| folder.ends_with(folder_name(step));
        match named_latest(run) {
            Some(step) if from.is_none() && !is_named(step) => warnings.push(format!(
                "checkpoint {:?} is incomplete; continuing from {}",
                folder_name(step),
                folder.display()
            )),
            _ => {}
        }
        let checkpoint = open(&folder)?;
        check(config, &checkpoint, &folder)?;
        // Checkpoints of earlier versions do not say.
        if let Ok(before) = Fingerprints::deserialize(&checkpoint.state["origin"]) {
            if config.adapter.is_some() {
                check_base(&before, origin, &folder)?;
            }
            warnings.extend(changed_texts(&before, &origin.fingerprints));
        }
        Ok(Resume { checkpoint: Some((folder, checkpoint)), warnings })
    }
}

/// The config that a run was last trained with.
///
/// # Errors
/// [`Error::Config`] where there is no run, or its config cannot be read.
pub fn last_config(run: &Path) -> Result<Table> {
    let path = run.join(CONFIG);
    let damaged = |what: String| {
        let message = format!("{what}; put the config there that the run was trained with");
        Error::config(path.to_string_lossy(), message)
    };
    let text = read_text(&path).map_err(|error| match error {
        Unreadable::Missing => {
            let message =
                format!("{} does not exist or holds no run; there is nothing to resume", run.display());
            Error::config("--resume", message)
        }
        other => damaged(other.to_string()),
    })?;
    check_toml(&text, &path.to_string_lossy())?;
    let table: Table = text.parse().map_err(|error: toml::de::Error| {
        damaged(format!("is damaged: {}", error.message().replace('\n', ", ")))
    })?;
    match ["model", "data", "train"].iter().find(|name| !table.get(**name).is_some_and(Value::is_table)) {
        Some(name) => Err(damaged(format!("is damaged: it lacks [{name}]"))),
        None => Ok(table),
    }
}

fn keep_microbatches(old: &Table, config: &mut Config) {
    let before = old.get("pipeline").and_then(|p| p.get("microbatches")).and_then(Value::as_integer);
    let before = before.and_then(|count| usize::try_from(count).ok()).filter(|&count| count > 0);
    // Shares say it themselves.
    let is_open = !matches!(config.mesh.data, Axis::Shares(_));
    if let Some(count) = before.filter(|&count| is_open && config.train.batch.is_multiple_of(count)) {
        config.pipeline.microbatches.get_or_insert(count);
    }
}

/// Who has what of the state, where that is left to the planner: gradients are added in the same order as before.
fn keep_state(old: &Table, config: &mut Config) {
    let before = |key: &str| old.get("mesh").and_then(|mesh| mesh.get(key)).cloned();
    let is_open = config.mesh.optimizer == OptimizerPlace::Auto || config.mesh.zero.is_some();
    let is_fixed = matches!(config.mesh.zero, Some(Level::Fixed(_)));
    if let Some(Value::Integer(level)) = before("zero").filter(|_| is_open && !is_fixed)
        && let Ok(level) = u8::try_from(level)
    {
        config.mesh.zero = Some(Level::Fixed(level));
    }
    if let (OptimizerPlace::Auto, Some(place)) = (config.mesh.optimizer, before("optimizer")) {
        config.mesh.optimizer = place.try_into().unwrap_or_default();
    }
}

/// What is set otherwise than before, or only now, or no longer.
fn changed_keys(old: &Table, new: &Table) -> Vec<String> {
    let show = |value: &Value| one_line(&value.to_string(), SHOWN);
    let mut warnings = Vec::new();
    let usual = defaults().unwrap_or_default();
    let is_usual = |section: &str, key: &str, value: &Value| {
        usual.get(section).and_then(|table| table.get(key)) == Some(value)
    };
    for section in COMPARED {
        let [old, new] = [old, new].map(|config| config.get(section).and_then(Value::as_table));
        let keys: BTreeSet<&String> = [old, new].into_iter().flatten().flat_map(Table::keys).collect();
        for key in keys.into_iter().filter(|key| !SETTLED.contains(&(section, key.as_str()))) {
            let [before, now] = [old, new].map(|table| table.and_then(|table| table.get(key)));
            let name = format!("{section}.{key}");
            match (before, now) {
                // A list is kept in the order of the plan, of the devices that it uses.
                (Some(Value::Array(_)), Some(_)) | (Some(_), Some(Value::Array(_)))
                    if name == "train.compute" => {}
                (Some(before), Some(now)) if before != now => {
                    warnings.push(format!("resuming with {name} = {}, which was {}", show(now), show(before)))
                }
                // What earlier versions left out of the file because it says nothing.
                (None, Some(now)) if is_usual(section, key, now) => {}
                (None, Some(Value::Boolean(false))) => {}
                (None, Some(Value::Array(list))) if list.is_empty() => {}
                (None, Some(now)) => {
                    warnings.push(format!("resuming with {name} = {}, which was not set", show(now)));
                }
                (Some(before), None) => {
                    warnings.push(format!("resuming without {name}, which was {}", show(before)));
                }
                _ => {}
            }
        }
    }
    warnings
}

/// Refuses a run without a checkpoint whose rows reach past a step that was saved: somebody has taken its checkpoints
/// away, and to start anew would erase what is left.
fn check_never_saved(run: &Path, old: &Table, metrics: &Metrics) -> Result<()> {
    let output = |key: &str| old.get("output").and_then(|output| output.get(key));
    let every = output("checkpoint_every").and_then(Value::as_integer).and_then(|n| u64::try_from(n).ok());
    let start = output("checkpoint_at_start").and_then(Value::as_bool).filter(|&start| start).map(|_| 0);
    // The first evaluation is the best so far, and the best is saved.
    let evaluated = metrics.evaluations().next().map(|(step, _)| step);
    let due = [every.filter(|&every| every > 0), start, evaluated].into_iter().flatten().min();
    let reached = metrics.entries.iter().map(|entry| entry.step).max();
    match (due, reached) {
        (Some(due), Some(reached)) if reached > due => {
            let message = format!(
                "holds no checkpoint, although {METRICS} reaches step {reached} and one was written at step {due}; put it back, or begin another run"
            );
            Err(broken(run.join(CHECKPOINTS), message))
        }
        _ => Ok(()),
    }
}

/// Refuses other weights under an adapter than those that it was trained on.
fn check_base(before: &Fingerprints, origin: &Origin, checkpoint: &Path) -> Result<()> {
    let now = &origin.fingerprints.base;
    if *now == before.base {
        return Ok(());
    }
    let size = |base: &Option<Fingerprint>| match base {
        Some(base) => format!("{} bytes of weights", base.bytes),
        None => "weights made from a seed".into(),
    };
    let base = origin.pretrained.as_ref().map_or(checkpoint, |base| base.folder.path());
    let message = format!(
        "is not what the adapter in {} was trained on ({} now, {} then); put the model back as it was, or begin another run",
        checkpoint.display(),
        size(now),
        size(&before.base)
    );
    Err(broken(base, message))
}

/// What is said of texts that are not those of the checkpoint. One that is added or left out shows in the config.
fn changed_texts(before: &Fingerprints, now: &Fingerprints) -> Vec<String> {
    let texts = [
        ("training", Some(&before.train), Some(&now.train)),
        ("evaluation", before.valid.as_ref(), now.valid.as_ref()),
    ];
    let warn = |(what, before, now): (&str, Option<&Fingerprint>, Option<&Fingerprint>)| {
        let (before, now) = before.zip(now).filter(|(before, now)| before != now)?;
        // A token is four bytes of what is fingerprinted.
        let (was, is) = (before.bytes / 4, now.bytes / 4);
        Some(match was == is {
            true => format!("resuming with another text for {what}, of {is} tokens as before"),
            false => format!("resuming with another text for {what}, of {is} tokens, which was of {was}"),
        })
    };
    texts.into_iter().filter_map(warn).collect()
}
