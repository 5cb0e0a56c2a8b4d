//! What is trained of a model that exists, and on how much text at a time: what `finetune` does and `plan` plans.

use toml::{Table, Value};

use crate::error::{Error, Result};
use crate::train::config::Described;

/// Tokens of a sequence unless another length is asked for and the model's context allows it.
const SEQUENCE: usize = 512;
/// Sequences of a step.
const BATCH: usize = 8;

/// How a model is trained further. What is not given has the default that `--help` says, here and nowhere else.
#[derive(clap::Args)]
pub(super) struct Recipe {
    /// Train every weight.
    #[arg(long, conflicts_with_all = ["rank", "alpha", "targets"])]
    pub(super) full: bool,
    /// Rank of the adapter (default: 8).
    #[arg(long)]
    pub(super) rank: Option<usize>,
    /// The adapter's update is scaled by alpha / rank (default: 16).
    #[arg(long)]
    pub(super) alpha: Option<f64>,
    /// Ends of the names of the layers that are adapted, such as q_proj,v_proj, or all-linear (default: as PEFT).
    #[arg(long, value_name = "NAMES")]
    pub(super) targets: Option<String>,
    /// Sequences of a step (default: 8).
    #[arg(long)]
    pub(super) batch: Option<usize>,
    /// Tokens of a sequence (default: the model's context, at most 512).
    #[arg(long, value_name = "T")]
    pub(super) sequence: Option<usize>,
    /// How matrices are stored: f32; bf16, two in a word, with f32 masters of those that are trained; or bf16-only
    /// (default: f32 with --full, else bf16 where the model's files store that).
    #[arg(long, value_parser = ["f32", "bf16", "bf16-only"])]
    pub(super) weights: Option<String>,
}

impl Recipe {
    /// The flags that were given.
    pub(super) fn given(&self) -> Vec<&'static str> {
        let flags = [
            ("--full", self.full),
            ("--rank", self.rank.is_some()),
            ("--alpha", self.alpha.is_some()),
            ("--targets", self.targets.is_some()),
            ("--batch", self.batch.is_some()),
            ("--sequence", self.sequence.is_some()),
            ("--weights", self.weights.is_some()),
        ];
        flags.into_iter().filter(|(_, given)| *given).map(|(flag, _)| flag).collect()
    }

    /// The keys of a config that the flags give.
    pub(super) fn keys(&self) -> Vec<(&'static str, &'static str, Value)> {
        let whole = |n: usize| Value::from(i64::try_from(n).unwrap_or(i64::MAX));
        let targets = self.targets.as_ref().map(|targets| match targets.as_str() {
            "all-linear" => Value::from("all-linear"),
            names => Value::from(names.split(',').map(|name| name.trim().to_string()).collect::<Vec<_>>()),
        });
        let all = [
            ("adapter", "rank", self.rank.map(whole)),
            ("adapter", "alpha", self.alpha.map(Value::from)),
            ("adapter", "targets", targets),
            ("train", "batch", self.batch.map(whole)),
            ("train", "sequence", self.sequence.map(whole)),
            ("train", "weights", self.weights.as_deref().map(Value::from)),
        ];
        all.into_iter().filter_map(|(section, key, value)| Some((section, key, value?))).collect()
    }

    /// The config that the flags stand for, for the model at `path`: [model], [adapter], and of [train] what decides the
    /// work of a step.
    ///
    /// # Errors
    /// [`Error::Config`] for `--full` on an adapter.
    pub(super) fn table(&self, path: &str, described: &Described) -> Result<Table> {
        if self.full && described.adapter.is_some() {
            let message = format!("{path} is an adapter; leave --full out, or merge it first");
            return Err(Error::config("--full", message));
        }
        let sequence = SEQUENCE.min(described.model.longest_sequence());
        let mut table = Table::new();
        insert(&mut table, "model", "path", path);
        insert(&mut table, "train", "batch", BATCH as i64);
        insert(&mut table, "train", "sequence", sequence as i64);
        // An adapter that exists says itself what it is.
        let begins = !self.full && described.adapter.is_none();
        if begins {
            table.insert("adapter".into(), Table::new().into());
        }
        for (section, key, value) in self.keys() {
            if begins || section != "adapter" {
                insert(&mut table, section, key, value);
            }
        }
        Ok(table)
    }
}

/// Sets a key of a config.
pub(super) fn insert(config: &mut Table, section: &str, key: &str, value: impl Into<Value>) {
    let inner = config.entry(section).or_insert_with(|| Table::new().into());
    if let Some(inner) = inner.as_table_mut() {
        inner.insert(key.into(), value.into());
    }
}
