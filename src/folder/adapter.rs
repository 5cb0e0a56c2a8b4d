//! LoRA adapters (Hu et al. 2021) in PEFT's layout: `adapter_config.json`, and `adapter_model.safetensors` with two
//! matrices for each adapted module, A (r, inputs) and B (outputs, r). The module then computes
//! `W x + scale * B (A x)`.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::files::{broken, read_json};
pub use super::targets::Targets;
use super::{Dtype, FolderWriter, Kind, Layout, Tensors, inside};
use crate::error::{Error, Result};
use crate::model::lora::{A, B};
use crate::model::{Kind as ModelKind, Lora, Model};

/// What PEFT puts before the name of a module of the base model.
const PREFIX: &str = "base_model.model.";

/// What `adapter_config.json` says.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterConfig {
    /// Rank: rows of A and columns of B.
    pub r: usize,
    /// The update is scaled by `alpha / r`.
    pub alpha: f64,
    /// Divide by the root of `r` instead (rank-stabilised LoRA, Kalajdzievski 2023).
    pub use_rslora: bool,
    /// Which modules are adapted.
    pub targets: Targets,
    /// Part of the inputs of A that PEFT drops in training.
    pub dropout: f64,
    /// Whether the base model stores its matrices as (inputs, outputs), as GPT-2 does.
    pub fan_in_fan_out: bool,
    /// Name or path of the base model.
    pub base_model: Option<String>,
    /// PEFT's kind of model, such as `CAUSAL_LM`.
    pub task_type: Option<String>,
}

impl AdapterConfig {
    /// The factor of the update.
    pub fn scale(&self) -> f64 {
        let r = self.r as f64;
        self.alpha / if self.use_rslora { r.sqrt() } else { r }
    }

    /// Refuses what training here does not do.
    ///
    /// # Errors
    /// [`Error::Config`] for a dropout above 0.
    pub fn check_trainable(&self) -> Result<()> {
        if self.dropout == 0.0 {
            return Ok(());
        }
        let message = format!("lora_dropout = {} is not supported in training; set it to 0", self.dropout);
        Err(Error::config(Kind::Adapter.config_name(), message))
    }

    /// The adapter that training adds to a model, which has none yet.
    ///
    /// # Errors
    /// [`Error::Config`] for what [`AdapterConfig::check_trainable`] refuses, and for targets that are no linear layers of
    /// the model.
    pub fn adapt(&self, model: &Model) -> Result<Lora> {
        self.check_trainable()?;
        let modules = self.targets.select(&model.linear_layers())?;
        Ok(Lora { rank: self.r, scale: self.scale(), modules })
    }

    /// Says what PEFT needs to know of the base model: whether its blocks store matrices as (inputs, outputs).
    pub fn for_model(mut self, model: &Model) -> AdapterConfig {
        self.fan_in_fan_out = model.config().kind == ModelKind::Gpt2;
        self
    }

    /// Reads PEFT's JSON.
    ///
    /// # Errors
    /// [`Error::Config`] naming the setting that is missing, malformed, or would change the result in a way that is not
    /// computed here.
    pub fn from_json(json: &Value) -> Result<AdapterConfig> {
        let refuse = |message: String| Err(Error::config(Kind::Adapter.config_name(), message));
        let Some(map) = json.as_object() else { return refuse("is not a JSON object".into()) };
        match &json["peft_type"] {
            Value::String(kind) if kind == "LORA" => {}
            other => return refuse(format!("peft_type = {other} is not supported; known: \"LORA\"")),
        }
        for (key, value) in map {
            if let Some(only) = unsupported(key, value) {
                let value = one_value(value);
                return refuse(format!("{key} = {value} is not supported; {only}"));
            }
        }
        let r = match json["r"].as_u64() {
            Some(r @ 1..=65_536) => r as usize,
            _ => {
                return refuse(format!("r = {} must be a whole number of at least 1", one_value(&json["r"])));
            }
        };
        let number = |key: &str, default: f64| match &json[key] {
            Value::Null => Ok(default),
            value => value.as_f64().filter(|x| x.is_finite()).ok_or_else(|| {
                let message = format!("{key} = {} is not a number", one_value(value));
                Error::config(Kind::Adapter.config_name(), message)
            }),
        };
        let flag = |key: &str| match &json[key] {
            Value::Null => Ok(false),
            value => value.as_bool().ok_or_else(|| {
                let message = format!("{key} = {} is neither true nor false", one_value(value));
                Error::config(Kind::Adapter.config_name(), message)
            }),
        };
        let targets = match &json["target_modules"] {
            Value::String(pattern) => Targets::Pattern(pattern.clone()),
            Value::Array(names) if !names.is_empty() && names.iter().all(Value::is_string) => {
                // PEFT writes a set, whose order is another every time.
                let mut names: Vec<String> =
                    names.iter().filter_map(|n| n.as_str().map(String::from)).collect();
                names.sort();
                names.dedup();
                Targets::Names(names)
            }
            other => {
                let message = format!("target_modules = {} is neither names nor a pattern", one_value(other));
                return refuse(message);
            }
        };
        Ok(AdapterConfig {
            r,
            alpha: number("lora_alpha", 8.0)?,
            use_rslora: flag("use_rslora")?,
            targets,
            dropout: number("lora_dropout", 0.0)?,
            fan_in_fan_out: flag("fan_in_fan_out")?,
            base_model: json["base_model_name_or_path"].as_str().map(String::from),
            task_type: json["task_type"].as_str().map(String::from),
        })
    }

    /// PEFT's JSON.
    pub fn to_json(&self) -> Value {
        let targets = match &self.targets {
            Targets::Names(names) => json!(names),
            Targets::Pattern(pattern) => json!(pattern),
        };
        // PEFT's own default for a whole number is one.
        let alpha = if self.alpha.fract() == 0.0 { json!(self.alpha as i64) } else { json!(self.alpha) };
        json!({
            "peft_type": "LORA",
            "task_type": self.task_type,
            "base_model_name_or_path": self.base_model,
            "inference_mode": true,
            "r": self.r,
            "lora_alpha": alpha,
            "lora_dropout": self.dropout,
            "target_modules": targets,
            "bias": "none",
            "fan_in_fan_out": self.fan_in_fan_out,
            "use_rslora": self.use_rslora,
            "use_dora": false,
            "init_lora_weights": true,
            "modules_to_save": null,
            "rank_pattern": Map::new(),
            "alpha_pattern": Map::new(),
        })
    }
}

/// A JSON value as a message quotes it.
fn one_value(value: &Value) -> String {
    crate::error::one_line(&value.to_string(), 60)
}

/// What is supported instead, for a setting that changes the result and is not computed here.
fn unsupported(key: &str, value: &Value) -> Option<&'static str> {
    let empty = match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    };
    match key {
        "bias" => (value != "none" && !empty).then_some("known: \"none\""),
        // Some ways to begin change the weights of the base model too.
        "init_lora_weights" => {
            (!empty && *value != true && value != "gaussian").then_some("known: true, false and \"gaussian\"")
        }
        "use_dora"
        | "lora_bias"
        | "use_qalora"
        | "use_bdlora"
        | "modules_to_save"
        | "rank_pattern"
        | "alpha_pattern"
        | "layers_to_transform"
        | "layers_pattern"
        | "exclude_modules"
        | "layer_replication"
        | "target_parameters"
        | "trainable_token_indices"
        | "alora_invocation_tokens"
        | "megatron_config"
        | "arrow_config"
        | "velora_config"
        | "monteclora_config"
        | "kasa_config" => (!empty).then_some("leave it out"),
        // What only says how training began or where it ran.
        "inference_mode" | "use_rslora" | "fan_in_fan_out" | "ensure_weight_tying" => None,
        // A switch of a later PEFT.
        _ => (*value == true).then_some("it is not known here; leave it out"),
    }
}

/// A module that is adapted.
#[derive(Clone, Debug, PartialEq)]
pub struct Module {
    /// The base model's name for it, without `.weight`: `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// Columns of A.
    pub inputs: usize,
    /// Rows of B.
    pub outputs: usize,
}

impl Module {
    /// The name of A among the tensors of an open adapter.
    pub fn a(&self) -> String {
        format!("{}{A}", self.name)
    }

    /// The name of B among the tensors of an open adapter.
    pub fn b(&self) -> String {
        format!("{}{B}", self.name)
    }
}

/// The name under which PEFT stores a matrix that is called so in an open adapter.
pub fn stored_name(matrix: &str) -> String {
    format!("{PREFIX}{matrix}")
}

/// An open adapter folder.
#[derive(Debug)]
pub struct Adapter {
    /// Its configuration.
    pub config: AdapterConfig,
    /// The modules that it has matrices for, sorted by name.
    pub modules: Vec<Module>,
    /// The matrices, by [`Module::a`] and [`Module::b`].
    pub tensors: Tensors,
}

impl Adapter {
    /// What a model needs to know of it.
    pub fn lora(&self) -> Lora {
        let modules = self.modules.iter().map(|module| module.name.clone()).collect();
        Lora { rank: self.config.r, scale: self.config.scale(), modules }
    }
}

/// Opens an adapter folder that PEFT or [`create`] wrote.
///
/// # Errors
/// [`Error::Config`] for an unsupported setting, [`Error::Checkpoint`] for a missing or damaged file, a tensor that is
/// no LoRA matrix, a module that lacks one of its two, or shapes that do not fit together.
pub fn open(folder: &Path) -> Result<Adapter> {
    let config: Value = read_json(&inside(folder, Kind::Adapter.config_name())?)?;
    let config = AdapterConfig::from_json(&config)?;
    let path = inside(folder, Kind::Adapter.weights_name())?;
    let (tensors, modules) = modules(&path, config.r)?;
    Ok(Adapter { config, modules, tensors })
}

/// The matrices of a file by their modules' names.
fn modules(path: &Path, r: usize) -> Result<(Tensors, Vec<Module>)> {
    let mut tensors = Tensors::open(path)?;
    for info in tensors.iter() {
        if !info.name.starts_with(PREFIX) || !(info.name.ends_with(A) || info.name.ends_with(B)) {
            let message = format!(
                "tensor {:?} is no LoRA matrix: names begin with {PREFIX} and end with {A} or {B}",
                info.name
            );
            return Err(broken(path, message));
        }
    }
    tensors.rename(|name| name.strip_prefix(PREFIX).unwrap_or(name).to_string())?;
    let mut modules = Vec::new();
    for info in tensors.iter() {
        let Some(name) = info.name.strip_suffix(A) else {
            let name = info.name.strip_suffix(B).unwrap_or(&info.name);
            if tensors.get(&format!("{name}{A}")).is_none() {
                return Err(broken(path, format!("module {name:?} has lora_B and lacks lora_A")));
            }
            continue;
        };
        let Some(other) = tensors.get(&format!("{name}{B}")) else {
            return Err(broken(path, format!("module {name:?} has lora_A and lacks lora_B")));
        };
        match (&info.shape[..], &other.shape[..]) {
            (&[rows, inputs], &[outputs, columns]) if rows == r && columns == r => {
                modules.push(Module { name: name.into(), inputs, outputs });
            }
            (a, b) => {
                let message = format!(
                    "module {name:?} has lora_A {a:?} and lora_B {b:?}; for r = {r} they must be [{r}, inputs] and [outputs, {r}]"
                );
                return Err(broken(path, message));
            }
        }
    }
    if modules.is_empty() {
        return Err(broken(path, "holds no LoRA matrix"));
    }
    Ok((tensors, modules))
}

/// The names under which PEFT stores the matrices of these modules, and their shapes: A then B of each.
pub fn tensors(modules: &[Module], r: usize) -> Vec<(String, Vec<usize>)> {
    let both =
        |m: &Module| [(stored_name(&m.a()), vec![r, m.inputs]), (stored_name(&m.b()), vec![m.outputs, r])];
    modules.iter().flat_map(both).collect()
}

/// Begins an adapter folder that PEFT reads. The matrices are then written by the names and in the order of
/// [`tensors`]. `copy` names files to put beside them, such as those of the tokenizer.
///
/// # Errors
/// As [`FolderWriter::create`].
pub fn create(
    path: &Path,
    config: &AdapterConfig,
    modules: &[Module],
    copy: &[PathBuf],
) -> Result<FolderWriter> {
    let layout = Layout {
        kind: Kind::Adapter,
        config: &config.to_json(),
        tensors: &tensors(modules, config.r),
        dtype: Dtype::F32,
        shard_bytes: u64::MAX,
        copy,
    };
    FolderWriter::create(path, &layout)
}
