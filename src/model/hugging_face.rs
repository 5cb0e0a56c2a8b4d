//! Hugging Face's `config.json`, in and out. A setting that changes the result must be one that is computed here: every
//! other is refused by its key.

use serde_json::{Value, json};

use super::{Kind, ModelConfig, RopeScaling};
use crate::error::{Error, Result};

const KNOWN: &str = "gpt2, llama, mistral, qwen2, qwen3";

fn refuse<T>(message: String) -> Result<T> {
    Err(Error::config("config.json", message))
}

/// A whole number; none if the key is absent or null.
fn whole(json: &Value, key: &str) -> Result<Option<usize>> {
    match &json[key] {
        Value::Null => Ok(None),
        value => match value.as_u64() {
            Some(number) => Ok(Some(number as usize)),
            None => refuse(format!("{key} = {value} is not a whole number")),
        },
    }
}

/// A whole number that must be there.
fn extent(json: &Value, key: &str) -> Result<usize> {
    match whole(json, key)? {
        Some(number) => Ok(number),
        None => refuse(format!("{key} is missing or not a whole number")),
    }
}

/// A number; none if the key is absent or null.
fn number(json: &Value, key: &str) -> Result<Option<f64>> {
    match &json[key] {
        Value::Null => Ok(None),
        value => match value.as_f64() {
            Some(number) => Ok(Some(number)),
            None => refuse(format!("{key} = {value} is not a number")),
        },
    }
}

/// A yes or no; none if the key is absent or null.
fn flag(json: &Value, key: &str) -> Result<Option<bool>> {
    match &json[key] {
        Value::Null => Ok(None),
        Value::Bool(value) => Ok(Some(*value)),
        value => refuse(format!("{key} = {value} is neither true nor false")),
    }
}

/// Refuses a key with another value than one of these; absent and null mean the first.
fn only(json: &Value, key: &str, wanted: &[Value]) -> Result<()> {
    let given = &json[key];
    let same = |w: &Value| given == w || given.as_f64().is_some_and(|x| w.as_f64() == Some(x));
    if given.is_null() || wanted.iter().any(same) {
        return Ok(());
    }
    let known: Vec<String> = wanted.iter().map(Value::to_string).collect();
    refuse(format!("{key} = {given} is not supported; known: {}", known.join(", ")))
}

pub(super) fn read(json: &Value) -> Result<ModelConfig> {
    let kind = match json["model_type"].as_str() {
        Some("gpt2") => Kind::Gpt2,
        Some("polystage-mlp") => Kind::Mlp,
        Some("llama") => Kind::Llama,
        Some("mistral") => Kind::Mistral,
        Some("qwen2") => Kind::Qwen2,
        Some("qwen3") => Kind::Qwen3,
        Some(other) => return refuse(format!("model_type {other:?} is not supported; known: {KNOWN}")),
        None => return refuse(format!("model_type is missing; known: {KNOWN}")),
    };
    if !json["quantization_config"].is_null() {
        return refuse("quantization_config is not supported; use the model before quantization".into());
    }
    let config = if kind.is_llama() { read_llama(json, kind)? } else { read_gpt2(json, kind)? };
    Ok(config.canonical())
}

fn read_gpt2(json: &Value, kind: Kind) -> Result<ModelConfig> {
    for (key, wanted) in [
        ("activation_function", &[json!("gelu_new"), json!("gelu_pytorch_tanh")][..]),
        ("scale_attn_weights", &[json!(true)]),
        ("scale_attn_by_inverse_layer_idx", &[json!(false)]),
        ("add_cross_attention", &[json!(false)]),
    ] {
        only(json, key, wanted)?;
    }
    Ok(ModelConfig {
        kind,
        layers: extent(json, "n_layer")?,
        width: extent(json, "n_embd")?,
        heads: extent(json, "n_head")?,
        context: extent(json, "n_positions")?,
        vocabulary: extent(json, "vocab_size")?,
        intermediate: whole(json, "n_inner")?,
        norm_epsilon: number(json, "layer_norm_epsilon")?,
        tied_head: flag(json, "tie_word_embeddings")?,
        initializer_range: number(json, "initializer_range")?,
        ..ModelConfig::default()
    })
}

fn read_llama(json: &Value, kind: Kind) -> Result<ModelConfig> {
    for (key, wanted) in [
        ("hidden_act", json!("silu")),
        ("attention_bias", json!(false)),
        ("mlp_bias", json!(false)),
        ("pretraining_tp", json!(1)),
        ("rope_interleaved", json!(false)),
        ("partial_rotary_factor", json!(1)),
    ] {
        only(json, key, &[wanted])?;
    }
    if let Some(names) = json["architectures"].as_array() {
        let generates = |name: &Value| name.as_str().is_some_and(|name| name.ends_with("ForCausalLM"));
        if !names.is_empty() && !names.iter().any(generates) {
            return refuse(format!("architectures = {} is no language model", json["architectures"]));
        }
    }
    let (theta, scaling) = read_rope(json)?;
    let (layers, width, heads) = (
        extent(json, "num_hidden_layers")?,
        extent(json, "hidden_size")?,
        extent(json, "num_attention_heads")?,
    );
    // What transformers takes where a file says nothing.
    let (kv_heads, head_dim) = match kind {
        Kind::Mistral => (Some(8), None),
        Kind::Qwen2 => (Some(32), None),
        Kind::Qwen3 => (Some(32), Some(128)),
        _ => (None, None),
    };
    let given = |key: &str| json.get(key).is_some();
    Ok(ModelConfig {
        kind,
        layers,
        width,
        heads,
        context: extent(json, "max_position_embeddings")?,
        vocabulary: extent(json, "vocab_size")?,
        kv_heads: if given("num_key_value_heads") { whole(json, "num_key_value_heads")? } else { kv_heads },
        head_dim: if given("head_dim") { whole(json, "head_dim")? } else { head_dim },
        intermediate: Some(extent(json, "intermediate_size")?),
        norm_epsilon: number(json, "rms_norm_eps")?,
        tied_head: flag(json, "tie_word_embeddings")?,
        initializer_range: number(json, "initializer_range")?,
        sliding_window: read_window(json, kind, layers)?,
        rope_theta: theta,
        rope_scaling: scaling,
    })
}

/// The sliding window, if some layer has one.
fn read_window(json: &Value, kind: Kind, layers: usize) -> Result<Option<usize>> {
    let window = whole(json, "sliding_window")?;
    if let Some(types) = json["layer_types"].as_array() {
        let known = |t: &&Value| !matches!(t.as_str(), Some("full_attention" | "sliding_attention"));
        if let Some(other) = types.iter().find(known) {
            return refuse(format!("layer_types has {other}, which is not supported; known: full_attention"));
        }
        let slides = types.contains(&json!("sliding_attention"));
        return Ok(window.filter(|_| slides));
    }
    let slides = match kind {
        Kind::Mistral => true,
        Kind::Qwen2 | Kind::Qwen3 => {
            let first = whole(json, "max_window_layers")?.unwrap_or(28);
            flag(json, "use_sliding_window")?.unwrap_or(false) && first < layers
        }
        _ => false,
    };
    Ok(window.filter(|_| slides))
}

/// Base and scaling: at the top of the file with a table `rope_scaling`, or, since transformers 5, in one table
/// `rope_parameters`.
fn read_rope(json: &Value) -> Result<(Option<f64>, Option<RopeScaling>)> {
    let (place, table) = match &json["rope_parameters"] {
        Value::Null => ("rope_scaling", &json["rope_scaling"]),
        table => ("rope_parameters", table),
    };
    if !table.is_null() && !table.is_object() {
        return refuse(format!("{place} = {table} is not a table"));
    }
    let theta = match number(table, "rope_theta")? {
        None => number(json, "rope_theta")?,
        theta => theta,
    };
    only(table, "partial_rotary_factor", &[json!(1)])?;
    let kind = if table["rope_type"].is_null() { &table["type"] } else { &table["rope_type"] };
    let needed = |key: &str| match number(table, key)? {
        Some(number) => Ok(number),
        None => refuse(format!("{place}.{key} is missing")),
    };
    let scaling = match kind.as_str() {
        None if table.is_null() || (place == "rope_parameters" && kind.is_null()) => None,
        Some("default") => None,
        Some("linear") => Some(RopeScaling::Linear { factor: needed("factor")? }),
        Some("llama3") => Some(RopeScaling::Llama3 {
            factor: needed("factor")?,
            low_freq_factor: needed("low_freq_factor")?,
            high_freq_factor: needed("high_freq_factor")?,
            original_max_position_embeddings: match whole(table, "original_max_position_embeddings")? {
                Some(original) => original,
                None => extent(json, "max_position_embeddings")?,
            },
        }),
        _ => {
            let known = "default, linear, llama3";
            return refuse(format!("{place}.rope_type = {kind} is not supported; known: {known}"));
        }
    };
    Ok((theta, scaling))
}

pub(super) fn write(c: &ModelConfig) -> Value {
    if c.kind.is_llama() { write_llama(c) } else { write_gpt2(c) }
}

fn write_gpt2(c: &ModelConfig) -> Value {
    let (architecture, model_type) = match c.kind {
        Kind::Mlp => ("PolystageMlp", "polystage-mlp"),
        _ => ("GPT2LMHeadModel", "gpt2"),
    };
    json!({
        "architectures": [architecture],
        "model_type": model_type,
        "activation_function": "gelu_new",
        "vocab_size": c.vocabulary,
        "n_positions": c.context,
        "n_embd": c.width,
        "n_layer": c.layers,
        "n_head": c.heads,
        "n_inner": c.intermediate,
        "layer_norm_epsilon": c.norm_epsilon(),
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "initializer_range": c.initializer_range(),
        "scale_attn_weights": true,
        "scale_attn_by_inverse_layer_idx": false,
        "tie_word_embeddings": c.tied_head(),
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "float32",
    })
}

fn write_llama(c: &ModelConfig) -> Value {
    let (architecture, model_type) = match c.kind {
        Kind::Mistral => ("MistralForCausalLM", "mistral"),
        Kind::Qwen2 => ("Qwen2ForCausalLM", "qwen2"),
        Kind::Qwen3 => ("Qwen3ForCausalLM", "qwen3"),
        _ => ("LlamaForCausalLM", "llama"),
    };
    let mut json = json!({
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_act": "silu",
        "vocab_size": c.vocabulary,
        "max_position_embeddings": c.context,
        "hidden_size": c.width,
        "intermediate_size": c.intermediate(),
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads(),
        "rms_norm_eps": c.norm_epsilon(),
        "rope_theta": c.rope_theta(),
        "rope_scaling": c.rope_scaling,
        "attention_dropout": 0.0,
        "initializer_range": c.initializer_range(),
        "tie_word_embeddings": c.tied_head(),
        "torch_dtype": "float32",
    });
    let mut set = |key: &str, value: Value| json[key] = value;
    match c.kind {
        Kind::Mistral => set("sliding_window", json!(c.sliding_window)),
        Kind::Qwen2 | Kind::Qwen3 => {
            set("sliding_window", json!(c.sliding_window));
            set("use_sliding_window", json!(c.sliding_window.is_some()));
            set("max_window_layers", json!(if c.sliding_window.is_some() { 0 } else { c.layers }));
        }
        _ => {}
    }
    // Files of Qwen2 leave it out where it follows from the others.
    if c.kind != Kind::Qwen2 || c.canonical().head_dim.is_some() {
        set("head_dim", json!(c.head_dim()));
    }
    if matches!(c.kind, Kind::Llama | Kind::Qwen3) {
        set("attention_bias", json!(false));
    }
    if c.kind == Kind::Llama {
        set("mlp_bias", json!(false));
    }
    json
}
