//! Llama (Touvron et al. 2023, arXiv 2302.13971) and its kin under Hugging Face's parameter names; linear weights are
//! stored (out, in). Qwen2 adds biases to the projections of queries, keys and values; Qwen3 normalises each head of
//! queries and keys.

use super::tensor::{Extent, Split};
use super::{Init, Kind, ModelConfig, Parameter, Run, attend, empty_stage, lora, rope};
use crate::error::Result;
use crate::graph::{Epilogue, Graph, Layout, Op, ValueId};

/// The name of the token table, which the head may share.
pub(super) const TABLE: &str = "model.embed_tokens.weight";

fn matrix(c: &ModelConfig, name: impl Into<String>, outputs: usize, inputs: usize) -> Parameter {
    Parameter::new(name, &[outputs, inputs], Init::Normal(c.initializer_range()))
}

pub(super) fn embedding_parameters(c: &ModelConfig) -> Vec<Parameter> {
    vec![matrix(c, TABLE, c.vocabulary, c.width).along(0, Extent::Vocabulary)]
}

pub(super) fn attention_parameters(c: &ModelConfig, i: usize) -> Vec<Parameter> {
    let (w, d) = (c.width, c.head_dim());
    let name = |rest: &str| weight(i, rest);
    let norm = |rest: &str, n: usize| Parameter::new(name(rest), &[n], Init::Ones);
    let mut list = vec![norm("input_layernorm", w).split(Split::ByToken)];
    let (queries, keys) = ((c.heads, Extent::Heads), (c.kv_heads(), Extent::KvHeads));
    for (part, (heads, extent)) in [("q", queries), ("k", keys), ("v", keys)] {
        list.push(matrix(c, name(&format!("self_attn.{part}_proj")), heads * d, w).along(0, extent));
        if c.kind == Kind::Qwen2 {
            let bias = format!("model.layers.{i}.self_attn.{part}_proj.bias");
            list.push(Parameter::new(bias, &[heads * d], Init::Zeros).along(0, extent));
        }
        if c.kind == Kind::Qwen3 && part != "v" {
            list.push(norm(&format!("self_attn.{part}_norm"), d).split(Split::Summed));
        }
    }
    list.push(matrix(c, name("self_attn.o_proj"), w, c.heads * d).along(1, Extent::Heads));
    list
}

pub(super) fn mlp_parameters(c: &ModelConfig, i: usize) -> Vec<Parameter> {
    let (w, inner) = (c.width, c.intermediate());
    vec![
        Parameter::new(weight(i, "post_attention_layernorm"), &[w], Init::Ones).split(Split::ByToken),
        matrix(c, weight(i, "mlp.gate_proj"), inner, w).along(0, Extent::Inner),
        matrix(c, weight(i, "mlp.up_proj"), inner, w).along(0, Extent::Inner),
        matrix(c, weight(i, "mlp.down_proj"), w, inner).along(1, Extent::Inner),
    ]
}

/// The name of a weight of block `i`.
fn weight(i: usize, rest: &str) -> String {
    format!("model.layers.{i}.{rest}.weight")
}

pub(super) fn head_parameters(c: &ModelConfig) -> Vec<Parameter> {
    let mut head = matrix(c, "lm_head.weight", c.vocabulary, c.width);
    head.tied_to = c.tied_head().then(|| TABLE.into());
    let norm = Parameter::new("model.norm.weight", &[c.width], Init::Ones).split(Split::ByToken);
    vec![norm, head.along(0, Extent::Vocabulary)]
}

fn linear(g: &mut Graph, x: ValueId, weight: ValueId, run: &Run) -> Result<ValueId> {
    let y = g.forward(Op::Matmul { layout: Layout::NT, epilogue: Epilogue::None }, &[x, weight])?;
    lora::adapt(g, run.lora, x, weight, y)
}

fn norm(g: &mut Graph, c: &ModelConfig, x: ValueId, gain: ValueId) -> Result<ValueId> {
    g.forward(Op::RmsNorm { epsilon: c.norm_epsilon() as f32 }, &[x, gain])
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
    let (mut w, sections) = (w.iter().copied(), run.sections(c));
    let mut take = |count: usize| -> Vec<ValueId> { w.by_ref().take(count).collect() };
    let y = norm(g, c, x, take(1)[0])?;
    let y = run.spread(g, y)?;
    // Queries, keys and values of each section.
    let mut parts: Vec<Vec<ValueId>> = vec![Vec::with_capacity(5); sections.len()];
    for part in ["q", "k", "v"] {
        let weights = take(sections.len());
        let biases = if c.kind == Kind::Qwen2 { take(sections.len()) } else { Vec::new() };
        let gain = if c.kind == Kind::Qwen3 && part != "v" { take(1) } else { Vec::new() };
        for (section, &weight) in weights.iter().enumerate() {
            let mut p = linear(g, y, weight, run)?;
            if let Some(&bias) = biases.get(section) {
                p = g.forward(Op::AddBias, &[p, bias])?;
            }
            if let Some(&gain) = gain.first() {
                p = norm(g, c, p, gain)?;
            }
            parts[section].push(p);
        }
    }
    let rows = run.capacity.unwrap_or(run.sequence);
    let angles = g.constant("rope", &[rows, c.head_dim()], || {
        rope::table(rows, &rope::frequencies(c.rope_theta(), c.head_dim(), c.rope_scaling))
    });
    let positions = run.positions.is_some();
    let mut sum: Option<ValueId> = None;
    for (section, (mut parts, (heads, weight))) in
        parts.into_iter().zip(sections.iter().zip(take(sections.len()))).enumerate()
    {
        parts.push(angles);
        parts.extend(run.positions);
        let qkv = g.forward(Op::Rope { heads: heads[0], kv_heads: heads[1], positions }, &parts)?;
        let o = attend(g, c, (i, section, *heads), qkv, run)?;
        let term = linear(g, o, weight, run)?;
        sum = Some(match sum {
            Some(sum) => g.forward(Op::Add, &[sum, term])?,
            None => term,
        });
    }
    let y = sum.ok_or_else(empty_stage)?;
    let y = run.sum(g, y)?;
    g.forward(Op::Add, &[x, y])
}

/// x + down(silu(gate(norm(x))) · up(norm(x))); `w` in the order of [`mlp_parameters`].
pub(super) fn mlp(g: &mut Graph, c: &ModelConfig, x: ValueId, w: &[ValueId], run: &Run) -> Result<ValueId> {
    let y = norm(g, c, x, w[0])?;
    let y = run.spread(g, y)?;
    let gate = linear(g, y, w[1], run)?;
    let up = linear(g, y, w[2], run)?;
    let a = g.forward(Op::SwiGlu, &[gate, up])?;
    let y = linear(g, a, w[3], run)?;
    let y = run.sum(g, y)?;
    g.forward(Op::Add, &[x, y])
}

/// Logits (B,T,V).
pub(super) fn head(g: &mut Graph, c: &ModelConfig, x: ValueId, w: &[ValueId], run: &Run) -> Result<ValueId> {
    let y = norm(g, c, x, w[0])?;
    let y = run.spread(g, y)?;
    linear(g, y, w[1], run)
}
