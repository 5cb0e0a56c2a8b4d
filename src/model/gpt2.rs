//! GPT-2 (Radford et al. 2019) under Hugging Face's parameter names; its linear weights are stored (in, out).

use serde_json::{Value, json};

use super::{Init, Kind, ModelConfig, Parameter};
use crate::error::{Error, Result};
use crate::graph::{Activation, Epilogue, Graph, Layout, Op, ValueId};

const EPSILON: f32 = 1e-5;
const STD: f64 = 0.02;

/// The name of the token table, which the head shares.
pub(super) const TABLE: &str = "transformer.wte.weight";

pub(super) fn embedding_parameters(c: &ModelConfig) -> Vec<Parameter> {
    vec![
        Parameter::new(TABLE, &[c.vocabulary, c.width], Init::Normal(STD)),
        Parameter::new("transformer.wpe.weight", &[c.context, c.width], Init::Normal(STD)),
    ]
}

pub(super) fn block_parameters(c: &ModelConfig, i: usize) -> Vec<Parameter> {
    let w = c.width;
    let mut parameters = norm_parameters(&format!("transformer.h.{i}.ln_1"), w);
    parameters.extend(linear_parameters(
        &format!("transformer.h.{i}.attn.c_attn"),
        w,
        3 * w,
        Init::Normal(STD),
    ));
    let residual = residual_init(c.layers);
    parameters.extend(linear_parameters(&format!("transformer.h.{i}.attn.c_proj"), w, w, residual));
    parameters.extend(feed_forward_parameters(c, i));
    parameters
}

/// Projections that add to the residual stream start smaller, by 1/√(2 layers), so that its variance stays bounded.
fn residual_init(layers: usize) -> Init {
    Init::Normal(STD / (2.0 * layers as f64).sqrt())
}

pub(super) fn feed_forward_parameters(c: &ModelConfig, i: usize) -> Vec<Parameter> {
    let w = c.width;
    let mut parameters = norm_parameters(&format!("transformer.h.{i}.ln_2"), w);
    parameters.extend(linear_parameters(&format!("transformer.h.{i}.mlp.c_fc"), w, 4 * w, Init::Normal(STD)));
    let residual = residual_init(c.layers);
    parameters.extend(linear_parameters(&format!("transformer.h.{i}.mlp.c_proj"), 4 * w, w, residual));
    parameters
}

pub(super) fn head_parameters(c: &ModelConfig) -> Vec<Parameter> {
    let mut parameters = norm_parameters("transformer.ln_f", c.width);
    let mut head = Parameter::new("lm_head.weight", &[c.vocabulary, c.width], Init::Normal(STD));
    head.tied_to = Some(TABLE.into());
    parameters.push(head);
    parameters
}

fn norm_parameters(prefix: &str, width: usize) -> Vec<Parameter> {
    vec![
        Parameter::new(format!("{prefix}.weight"), &[width], Init::Ones),
        Parameter::new(format!("{prefix}.bias"), &[width], Init::Zeros),
    ]
}

fn linear_parameters(prefix: &str, inputs: usize, outputs: usize, init: Init) -> Vec<Parameter> {
    vec![
        Parameter::new(format!("{prefix}.weight"), &[inputs, outputs], init),
        Parameter::new(format!("{prefix}.bias"), &[outputs], Init::Zeros),
    ]
}

fn norm(g: &mut Graph, x: ValueId, w: &[ValueId]) -> Result<ValueId> {
    g.forward(Op::LayerNorm { epsilon: EPSILON }, &[x, w[0], w[1]])
}

fn linear(g: &mut Graph, x: ValueId, w: &[ValueId]) -> Result<ValueId> {
    let y = g.forward(Op::Matmul { layout: Layout::NN, epilogue: Epilogue::None }, &[x, w[0]])?;
    g.forward(Op::AddBias, &[y, w[1]])
}

/// x + attention(norm(x)), then x + feed-forward(norm(x)); `w` in the order of [`block_parameters`].
pub(super) fn block(g: &mut Graph, x: ValueId, w: &[ValueId], heads: usize) -> Result<ValueId> {
    let y = norm(g, x, &w[0..2])?;
    let qkv = linear(g, y, &w[2..4])?;
    let o = g.forward(Op::Attention { heads, kv_heads: heads }, &[qkv])?;
    let y = linear(g, o, &w[4..6])?;
    let x = g.forward(Op::Add, &[x, y])?;
    feed_forward(g, x, &w[6..12])
}

/// x + feed-forward(norm(x)); `w` in the order of [`feed_forward_parameters`].
pub(super) fn feed_forward(g: &mut Graph, x: ValueId, w: &[ValueId]) -> Result<ValueId> {
    let y = norm(g, x, &w[0..2])?;
    let u = linear(g, y, &w[2..4])?;
    let a = g.forward(Op::Activate(Activation::GeluTanh), &[u])?;
    let y = linear(g, a, &w[4..6])?;
    g.forward(Op::Add, &[x, y])
}

/// Logits (B,T,V); the table is stored (V,C), so it is read transposed.
pub(super) fn head(g: &mut Graph, x: ValueId, w: &[ValueId]) -> Result<ValueId> {
    let y = norm(g, x, &w[0..2])?;
    g.forward(Op::Matmul { layout: Layout::NT, epilogue: Epilogue::None }, &[y, w[2]])
}

pub(super) fn to_hugging_face(c: &ModelConfig) -> Value {
    let (architecture, model_type) = match c.kind {
        Kind::Gpt2 => ("GPT2LMHeadModel", "gpt2"),
        Kind::Mlp => ("PolystageMlp", "polystage-mlp"),
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
        "n_inner": null,
        "layer_norm_epsilon": EPSILON as f64,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "initializer_range": STD,
        "scale_attn_weights": true,
        "scale_attn_by_inverse_layer_idx": false,
        "tie_word_embeddings": true,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "float32",
    })
}

pub(super) fn from_hugging_face(json: &Value) -> Result<ModelConfig> {
    let refuse = |message: String| Err(Error::config("config.json", message));
    let kind = match json["model_type"].as_str() {
        Some("gpt2") => Kind::Gpt2,
        Some("polystage-mlp") => Kind::Mlp,
        Some(other) => return refuse(format!("model_type {other:?} is not supported; known: gpt2")),
        None => return refuse("model_type is missing".into()),
    };
    // A setting that changes the result must be the one that is computed here.
    let width = json["n_embd"].as_u64().unwrap_or(0);
    for (key, wanted) in [
        ("activation_function", vec![json!("gelu_new"), json!("gelu_pytorch_tanh")]),
        ("layer_norm_epsilon", vec![json!(1e-5), json!(EPSILON as f64)]),
        ("scale_attn_weights", vec![json!(true)]),
        ("scale_attn_by_inverse_layer_idx", vec![json!(false)]),
        ("tie_word_embeddings", vec![json!(true)]),
        ("add_cross_attention", vec![json!(false)]),
        ("n_inner", vec![json!(4 * width)]),
    ] {
        let given = &json[key];
        if !given.is_null() && !wanted.contains(given) {
            return refuse(format!("{key} = {given} is not supported; known: {}", wanted[0]));
        }
    }
    let extent = |key: &str| match json[key].as_u64() {
        Some(value) => Ok(value as usize),
        None => Err(Error::config("config.json", format!("{key} is missing or not a whole number"))),
    };
    Ok(ModelConfig {
        kind,
        layers: extent("n_layer")?,
        width: extent("n_embd")?,
        heads: extent("n_head")?,
        context: extent("n_positions")?,
        vocabulary: extent("vocab_size")?,
    })
}
