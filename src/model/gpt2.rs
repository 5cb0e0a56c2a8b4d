//! GPT-2 (Radford et al. 2019) under Hugging Face's parameter names; its linear weights are stored (in, out).

use super::tensor::{Extent, Split};
use super::{Init, ModelConfig, Parameter, Run, attend, lora};
use crate::error::Result;
use crate::graph::{Activation, Epilogue, Graph, Layout, Op, ValueId};

/// The name of the token table, which the head shares.
pub(super) const TABLE: &str = "transformer.wte.weight";

pub(super) fn embedding_parameters(c: &ModelConfig) -> Vec<Parameter> {
    let init = Init::Normal(c.initializer_range());
    vec![
        Parameter::new(TABLE, &[c.vocabulary, c.width], init).along(0, Extent::Vocabulary),
        Parameter::new("transformer.wpe.weight", &[c.context, c.width], init).split(Split::First),
    ]
}

pub(super) fn attention_parameters(c: &ModelConfig, i: usize) -> Vec<Parameter> {
    let w = c.width;
    let mut parameters = norm_parameters(&format!("transformer.h.{i}.ln_1"), w);
    let name = |part: &str| format!("transformer.h.{i}.attn.{part}");
    let init = Init::Normal(c.initializer_range());
    parameters.extend(first_linear(&name("c_attn"), w, 3 * w, init, Extent::Packed));
    parameters.extend(last_linear(&name("c_proj"), w, w, residual_init(c), Extent::Heads));
    parameters
}

/// Projections that add to the residual stream start smaller, by 1/√(2 layers), so that its variance stays bounded.
fn residual_init(c: &ModelConfig) -> Init {
    Init::Normal(c.initializer_range() / (2.0 * c.layers as f64).sqrt())
}

pub(super) fn mlp_parameters(c: &ModelConfig, i: usize) -> Vec<Parameter> {
    let (w, inner) = (c.width, c.intermediate());
    let init = Init::Normal(c.initializer_range());
    let mut parameters = norm_parameters(&format!("transformer.h.{i}.ln_2"), w);
    let name = |part: &str| format!("transformer.h.{i}.mlp.{part}");
    parameters.extend(first_linear(&name("c_fc"), w, inner, init, Extent::Inner));
    parameters.extend(last_linear(&name("c_proj"), inner, w, residual_init(c), Extent::Inner));
    parameters
}

pub(super) fn head_parameters(c: &ModelConfig) -> Vec<Parameter> {
    let mut parameters = norm_parameters("transformer.ln_f", c.width);
    let mut head =
        Parameter::new("lm_head.weight", &[c.vocabulary, c.width], Init::Normal(c.initializer_range()));
    head.tied_to = c.tied_head().then(|| TABLE.into());
    parameters.push(head.along(0, Extent::Vocabulary));
    parameters
}

fn norm_parameters(prefix: &str, width: usize) -> Vec<Parameter> {
    vec![
        Parameter::new(format!("{prefix}.weight"), &[width], Init::Ones).split(Split::ByToken),
        Parameter::new(format!("{prefix}.bias"), &[width], Init::Zeros).split(Split::ByToken),
    ]
}

fn linear_parameters(prefix: &str, inputs: usize, outputs: usize, init: Init) -> [Parameter; 2] {
    [
        Parameter::new(format!("{prefix}.weight"), &[inputs, outputs], init),
        Parameter::new(format!("{prefix}.bias"), &[outputs], Init::Zeros),
    ]
}

/// Of a linear layer whose outputs members of a gang divide.
fn first_linear(prefix: &str, inputs: usize, outputs: usize, init: Init, extent: Extent) -> [Parameter; 2] {
    let [weight, bias] = linear_parameters(prefix, inputs, outputs, init);
    [weight.along(1, extent), bias.along(0, extent)]
}

/// Of one whose inputs they divide.
fn last_linear(prefix: &str, inputs: usize, outputs: usize, init: Init, extent: Extent) -> [Parameter; 2] {
    let [weight, bias] = linear_parameters(prefix, inputs, outputs, init);
    [weight.along(0, extent), bias.split(Split::ByToken)]
}

fn norm(g: &mut Graph, c: &ModelConfig, x: ValueId, w: &[ValueId]) -> Result<ValueId> {
    g.forward(Op::LayerNorm { epsilon: c.norm_epsilon() as f32 }, &[x, w[0], w[1]])
}

const PRODUCT: Op = Op::Matmul { layout: Layout::NN, epilogue: Epilogue::None };

fn linear(g: &mut Graph, x: ValueId, w: &[ValueId], run: &Run) -> Result<ValueId> {
    let y = g.forward(PRODUCT, &[x, w[0]])?;
    let y = g.forward(Op::AddBias, &[y, w[1]])?;
    lora::adapt(g, run.lora, x, w[0], y)
}

/// A linear layer whose inputs members of a gang divide.
fn last(g: &mut Graph, x: ValueId, w: &[ValueId], run: &Run) -> Result<ValueId> {
    if run.member.is_none() {
        return linear(g, x, w, run);
    }
    let y = g.forward(PRODUCT, &[x, w[0]])?;
    let y = lora::adapt(g, run.lora, x, w[0], y)?;
    let y = run.sum(g, y)?;
    g.forward(Op::AddBias, &[y, w[1]])
}

/// x + attention(norm(x)); `w` in the order of [`attention_parameters`].
pub(super) fn attention(
    g: &mut Graph,
    c: &ModelConfig,
    i: usize,
    x: ValueId,
    w: &[ValueId],
    run: &Run,
) -> Result<ValueId> {
    let y = norm(g, c, x, &w[0..2])?;
    let y = run.spread(g, y)?;
    let qkv = linear(g, y, &w[2..4], run)?;
    // Each query head has a key-value head of its own, so a member's are one section.
    let o = attend(g, c, (i, 0, run.sections(c)[0]), qkv, run)?;
    let y = last(g, o, &w[4..6], run)?;
    g.forward(Op::Add, &[x, y])
}

/// x + mlp(norm(x)); `w` in the order of [`mlp_parameters`]. The blocks of a model without attention are nothing else.
pub(super) fn mlp(g: &mut Graph, c: &ModelConfig, x: ValueId, w: &[ValueId], run: &Run) -> Result<ValueId> {
    let y = norm(g, c, x, &w[0..2])?;
    let y = run.spread(g, y)?;
    let u = linear(g, y, &w[2..4], run)?;
    let a = g.forward(Op::Activate(Activation::GeluTanh), &[u])?;
    let y = last(g, a, &w[4..6], run)?;
    g.forward(Op::Add, &[x, y])
}

/// Logits (B,T,V); the table is stored (V,C), so it is read transposed.
pub(super) fn head(g: &mut Graph, c: &ModelConfig, x: ValueId, w: &[ValueId], run: &Run) -> Result<ValueId> {
    let x = norm(g, c, x, &w[0..2])?;
    let x = run.spread(g, x)?;
    let y = g.forward(Op::Matmul { layout: Layout::NT, epilogue: Epilogue::None }, &[x, w[2]])?;
    lora::adapt(g, run.lora, x, w[2], y)
}
