//! Reading, checking and writing the file.

use serde::Deserialize;

use super::keys;
use super::{AdapterConfig, Axis, Config, Described, Level};
use crate::error::{Error, Result, nearest};
use crate::folder::files::check_toml;
use crate::model::{Lora, Model, tensor};
use crate::schedule;
use crate::train::data::FIELDS;

/// The most microbatches of a step: the bubble is long gone, and every one costs a device submissions.
const MOST_MICROBATCHES: usize = 4096;
/// The most tokens of a step, far above any that is known: with the extents that a model may have, sizes in bytes then
/// do not overflow.
const MOST_TOKENS: usize = 1 << 26;

impl Config {
    /// Reads TOML with `key.sub=value` overrides applied, and checks every value that can be checked without a
    /// machine. `place` is what errors name: the file. For configs without `model.path`.
    pub fn parse(text: &str, overrides: &[String], place: &str) -> Result<Config> {
        Config::parse_with(text, overrides, place, |path| {
            Err(Error::config("model.path", format!("{path} cannot be read here; give the model's extents")))
        })
    }

    /// As [`Config::parse`]; `describe` gives the extents of the model in a folder.
    pub fn parse_with(
        text: &str,
        overrides: &[String],
        place: &str,
        describe: impl FnOnce(&str) -> Result<Described>,
    ) -> Result<Config> {
        let error = |e: toml::de::Error| {
            let line = e.span().map_or(String::new(), |s| {
                format!("line {}: ", text[..s.start.min(text.len())].matches('\n').count() + 1)
            });
            Error::config(place, format!("{line}{}", e.message().replace('\n', ", ")))
        };
        check_toml(text, place)?;
        let mut table: toml::Table = text.parse().map_err(error)?;
        for item in overrides {
            set(&mut table, item)?;
        }
        keys::check(&table, place)?;
        let path = take_path(&mut table, place, describe)?;
        Config::from_table(table, path, place)
    }

    /// Reads what [`Config::to_toml`] wrote, with overrides applied. It says everything about the model: the folder that it
    /// names is left alone, and may be gone. `place` is what errors name: the file.
    ///
    /// # Errors
    /// [`Error::Config`] in one line for what is damaged, or lacks something.
    pub fn parse_written(text: &str, overrides: &[String], place: &str) -> Result<Config> {
        check_toml(text, place)?;
        let damaged = |e: toml::de::Error| Error::config(place, e.message().replace('\n', ", "));
        let mut table: toml::Table = text.parse().map_err(damaged)?;
        for item in overrides {
            set(&mut table, item)?;
        }
        keys::check(&table, place)?;
        let path = table.get_mut("model").and_then(toml::Value::as_table_mut).and_then(|m| m.remove("path"));
        Config::from_table(table, path.and_then(|path| path.as_str().map(String::from)), place)
    }

    fn from_table(table: toml::Table, path: Option<String>, place: &str) -> Result<Config> {
        let mut config: Config = table
            .try_into()
            .map_err(|e: toml::de::Error| Error::config(place, e.to_string().trim().replace('\n', ", ")))?;
        config.path = path;
        config.check(place)?;
        Ok(config)
    }

    /// The adapter that is trained, if one is.
    ///
    /// # Errors
    /// [`Error::Config`] for targets that the model does not have.
    pub fn lora(&self) -> Result<Option<Lora>> {
        let Some(adapter) = &self.adapter else { return Ok(None) };
        let model = Model::new(&self.model)?;
        adapter.peft(&model).adapt(&model).map(Some)
    }

    /// Settles what depends on the texts: the number of steps, for so many sequences, and whether some hold several records.
    pub fn settle(&mut self, sequences: usize, shared: bool) {
        self.shared = shared;
        let t = &mut self.train;
        if let Some(epochs) = t.epochs.take() {
            let steps = (epochs * sequences as f64 / t.batch as f64).ceil().max(1.0) as u64;
            t.steps = if t.steps == 0 { steps } else { t.steps.min(steps) };
        }
    }

    /// The numbers of microbatches that are left to choose from, rising: the one that is named, or the divisors of the
    /// batch up to [`MOST_MICROBATCHES`]. Where no planner chooses, it is the last.
    pub fn microbatches(&self) -> Vec<usize> {
        let batch = self.train.batch;
        match (self.pipeline.microbatches, &self.mesh.data) {
            (Some(count), _) => vec![count],
            (None, Axis::Shares(shares)) => vec![shares.iter().sum()],
            (None, axis) => {
                let least = if let Axis::Count(count) = axis { *count } else { 1 };
                (least..=batch.min(MOST_MICROBATCHES)).filter(|m| batch.is_multiple_of(*m)).collect()
            }
        }
    }

    /// Refuses replicas that do not go with the batch.
    fn check_mesh(&self, place: &str) -> Result<()> {
        let refuse = |message: String| Err(Error::config(place, message));
        let (batch, fixed) = (self.train.batch, self.pipeline.microbatches);
        let most = fixed.unwrap_or(batch.min(MOST_MICROBATCHES));
        if let Some(Level::Named(name)) = &self.mesh.zero
            && name != "auto"
        {
            return refuse(format!("mesh.zero = {name:?} is not known; write 1, 2, 3 or \"auto\""));
        }
        if let Err(Error::Config { message, .. }) = self.mesh.sharding() {
            return refuse(format!("mesh.zero = {message}"));
        }
        let heads = self.model.heads;
        match &self.mesh.tensor {
            Some(Axis::Named(name)) if name != "auto" => {
                return refuse(format!(
                    "mesh.tensor = {name:?} is not known; write \"auto\", how many devices divide every layer, or a list of their shares"
                ));
            }
            Some(Axis::Count(count)) if *count > heads.min(tensor::MOST) => {
                return refuse(format!(
                    "mesh.tensor = {count}: so many devices cannot divide the {heads} heads of the model; at most {} can",
                    heads.min(tensor::MOST)
                ));
            }
            _ => {}
        }
        let division = self.mesh.division();
        if division.members() != 1
            && let Err(Error::Config { message, .. }) = tensor::members(&self.model, &division)
        {
            return refuse(format!("mesh.tensor {message}"));
        }
        if self.mesh.sequence_parallel && self.mesh.tensor.is_none() {
            return refuse(
                "mesh.sequence_parallel = true is for devices that divide layers, and mesh.tensor is not set; set both or neither"
                    .into(),
            );
        }
        match &self.mesh.data {
            Axis::Named(name) if name == "auto" => Ok(()),
            Axis::Named(name) => refuse(format!(
                "mesh.data = {name:?} is not known; write \"auto\", a number of replicas, or a list of their microbatches"
            )),
            Axis::Count(count) if *count == 0 || *count > most => refuse(format!(
                "mesh.data = {count} is out of range: every replica needs a microbatch, and a step has at most {most}; give 1 to {most}"
            )),
            Axis::Count(_) => Ok(()),
            Axis::Shares(shares) => {
                let sum = shares.iter().try_fold(0usize, |sum, &share| sum.checked_add(share));
                let sum = sum.filter(|&sum| sum > 0 && shares.iter().all(|&share| share > 0));
                let Some(sum) = sum else {
                    let message = "every replica needs at least one microbatch, and there must be one";
                    return refuse(format!("mesh.data = {shares:?}: {message}"));
                };
                if let Some(count) = fixed.filter(|&count| count != sum) {
                    return refuse(format!(
                        "mesh.data = {shares:?} are {sum} microbatches, but pipeline.microbatches = {count}; change one of them, or leave the latter out"
                    ));
                }
                if sum > MOST_MICROBATCHES || !batch.is_multiple_of(sum) {
                    return refuse(format!(
                        "mesh.data = {shares:?} are {sum} microbatches, which do not divide train.batch = {batch}; give shares whose sum does"
                    ));
                }
                Ok(())
            }
        }
    }

    fn check(&self, place: &str) -> Result<()> {
        let refuse = |message: String| Err(Error::config(place, message));
        let t = &self.train;
        match t.epochs {
            None if t.steps == 0 => {
                return refuse("give train.steps or train.epochs, at least 1 step".into());
            }
            Some(epochs) if !(epochs > 0.0 && epochs <= 1e6) => {
                return refuse(format!("train.epochs = {epochs} must be above 0 and at most 1000000"));
            }
            _ => {}
        }
        for (key, value, most) in
            [("batch", t.batch as u64, 1 << 20), ("sequence", t.sequence as u64, 1 << 22)]
        {
            if !(1..=most).contains(&value) {
                return refuse(format!(
                    "train.{key} = {value} is out of range; it must be at least 1 and at most {most}"
                ));
            }
        }
        for (key, value, low, high) in [
            ("learning_rate", t.learning_rate, 0.0, 1e3),
            ("minimum_learning_rate", t.minimum_learning_rate.unwrap_or(0.0), 0.0, 1e3),
            ("weight_decay", t.weight_decay, 0.0, 1e3),
            ("clip_norm", t.clip_norm, 0.0, 1e9),
            ("beta1", t.beta1, 0.0, 0.999_999),
            ("beta2", t.beta2, 0.0, 0.999_999_9),
            ("epsilon", t.epsilon, 1e-30, 1.0),
        ] {
            if !(low..=high).contains(&value) {
                return refuse(format!("train.{key} = {value} must be between {low} and {high}"));
            }
        }
        if t.batch * t.sequence > MOST_TOKENS {
            return refuse(format!(
                "train.batch = {} sequences of {} tokens are more than the {MOST_TOKENS} tokens that a step may have; lower one",
                t.batch, t.sequence
            ));
        }
        if let Some(m) = self.pipeline.microbatches
            && m > MOST_MICROBATCHES
        {
            return refuse(format!(
                "pipeline.microbatches = {m} is out of range; it must be at most {MOST_MICROBATCHES}"
            ));
        }
        if let Some(m) = self.pipeline.microbatches
            && (m == 0 || !t.batch.is_multiple_of(m))
        {
            let divides = |d: &usize| t.batch.is_multiple_of(*d);
            let below = (1..m.clamp(2, t.batch.max(2))).rev().find(divides).unwrap_or(1);
            let above = (m.max(1)..=t.batch).find(divides).unwrap_or(t.batch);
            let others =
                if below == above { format!("{below} does") } else { format!("{below} and {above} do") };
            return refuse(format!(
                "pipeline.microbatches = {m} does not divide train.batch = {}; {others}",
                t.batch
            ));
        }
        self.check_mesh(place)?;
        if t.sequence > self.model.context {
            // The context of a model that exists is what it is.
            let help = if self.path.is_some() { "lower it" } else { "lower the one or raise the other" };
            return refuse(format!(
                "train.sequence = {} is longer than model.context = {}; {help}",
                t.sequence, self.model.context
            ));
        }
        if let Some(name) = &self.pipeline.schedule
            && !schedule::ALL_NAMES.contains(&name.as_str())
            && !name.contains(['.', '/'])
        {
            let near = nearest(name, schedule::ALL_NAMES.iter().copied());
            return refuse(format!(
                "pipeline.schedule = {name:?} is not known; did you mean {near:?}? Known: {}, or a file",
                schedule::ALL_NAMES.join(", ")
            ));
        }
        if let Some(adapter) = &self.adapter {
            if !(1..=65_536).contains(&adapter.rank) {
                return refuse(format!(
                    "adapter.rank = {} is out of range; it must be at least 1 and at most 65536",
                    adapter.rank
                ));
            }
            if !(0.0..=1e6).contains(&adapter.alpha) {
                return refuse(format!("adapter.alpha = {} must be between 0 and 1e6", adapter.alpha));
            }
        }
        if !(0.0..1.0).contains(&self.data.split) {
            return refuse(format!("data.split = {} must be at least 0 and below 1", self.data.split));
        }
        if self.data.split > 0.0 && !self.data.valid.is_empty() {
            return refuse("data.valid and data.split both say what to evaluate on; leave one out".into());
        }
        if let Some(mistake) = t.compute.mistake() {
            return refuse(mistake);
        }
        if t.logits == 0 {
            return refuse("train.logits must be at least 1".into());
        }
        if t.evaluate_every == 0 {
            return refuse("train.evaluate_every must be at least 1".into());
        }
        if let Some(stranger) = self.data.keys.keys().find(|key| !FIELDS.contains(&key.as_str())) {
            let near = nearest(stranger, FIELDS);
            return refuse(format!("data.keys.{stranger} is no field of a record; did you mean {near}?"));
        }
        if self.data.train.is_empty() {
            return refuse("data.train is empty; name at least one file".into());
        }
        if self.output.keep == 0 {
            return refuse("output.keep must be at least 1".into());
        }
        self.lora()
            .map(drop)
            .and(Model::new(&self.model).map(drop))
            .map_err(|e| Error::config(place, e.to_string()))
    }

    /// As TOML, with every default written out.
    pub fn to_toml(&self) -> String {
        toml::to_string(&self.to_table()).unwrap_or_default()
    }

    /// The same as data.
    pub(super) fn to_table(&self) -> toml::Table {
        let mut table = toml::Table::try_from(self).unwrap_or_default();
        if let (Some(path), Some(toml::Value::Table(model))) = (&self.path, table.get_mut("model")) {
            model.insert("path".into(), path.as_str().into());
        }
        table
    }
}

/// Takes `path` out of the model's table and puts the extents of the model that is there in its place, and the adapter
/// beside it. What the file gives as well must agree.
fn take_path(
    table: &mut toml::Table,
    place: &str,
    describe: impl FnOnce(&str) -> Result<Described>,
) -> Result<Option<String>> {
    let Some(model) = table.get_mut("model").and_then(toml::Value::as_table_mut) else { return Ok(None) };
    let path = match model.remove("path") {
        None => return Ok(None),
        Some(toml::Value::String(path)) => path,
        Some(other) => return Err(Error::config(place, format!("model.path = {other} is not a string"))),
    };
    let described = describe(&path)?;
    let mut found = toml::Table::try_from(described.model).unwrap_or_default();
    for (key, value) in std::mem::take(model) {
        match found.get(&key) {
            Some(there) if *there == value => {}
            Some(there) => {
                let message =
                    format!("model.{key} = {value}, but it is {there} in {path}; leave it out of the file");
                return Err(Error::config(place, message));
            }
            None => drop(found.insert(key, value)),
        }
    }
    *model = found;
    if let Some(adapter) = described.adapter {
        let says = |given: &toml::Value| AdapterConfig::deserialize(given.clone()).ok();
        let is_another = table.get("adapter").is_some_and(|given| says(given).as_ref() != Some(&adapter));
        let adapter = toml::Table::try_from(adapter).unwrap_or_default();
        if is_another {
            let message =
                format!("{path} is an adapter ({adapter}), and [adapter] says otherwise; leave it out")
                    .replace('\n', " ");
            return Err(Error::config(place, message));
        }
        table.insert("adapter".into(), adapter.into());
    }
    // What stays as it is loses nothing.
    if table.contains_key("adapter")
        && let Some(train) = table.get_mut("train").and_then(toml::Value::as_table_mut)
    {
        train.entry("weights").or_insert(described.weights.name().into());
    }
    Ok(Some(path))
}

/// Applies one `a.b=c`; c is one TOML value, or else a name without quotes.
fn set(table: &mut toml::Table, item: &str) -> Result<()> {
    let refuse = |message: String| Err(Error::config("--set", message));
    let Some((path, value)) = item.split_once('=') else {
        return refuse(format!("{item:?} is not key.sub=value"));
    };
    let path = path.trim();
    let is_key =
        |key: &str| !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
    let Some((section, key)) = path.split_once('.').filter(|(table, key)| is_key(table) && is_key(key))
    else {
        return refuse(format!("{path:?} is not table.key, such as train.steps"));
    };
    let value = value.trim();
    let parsed = value.parse::<toml::Value>().ok();
    // 1f1b is a name, 1.2.3 a slip.
    let number = value.starts_with(|c: char| "-+.0123456789".contains(c))
        && value.chars().all(|c| c.is_ascii_digit() || "+-._eE".contains(c));
    let is_name = !value.is_empty() && !number && !value.starts_with(['[', '{', '"', '\'']);
    if parsed.is_none() && (!is_name || value.contains(char::is_control)) {
        return refuse(format!("{value:?} is not a TOML value (in {item:?})"));
    }
    let value = parsed.unwrap_or_else(|| toml::Value::String(value.into()));
    let entry = table.entry(section).or_insert_with(|| toml::Value::Table(toml::Table::new()));
    match entry.as_table_mut() {
        Some(inner) => {
            inner.insert(key.into(), value);
            Ok(())
        }
        None => refuse(format!("{section} is not a table")),
    }
}
