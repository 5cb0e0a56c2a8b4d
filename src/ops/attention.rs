//! Causal attention with grouped heads: forward, backward, and forward over a cache.

use super::elementwise::vectorised;
use super::{Launch, Lowered, Lowering, Operand};

/// A kernel's header "multiples of 4", and the kernel that does its work in a subgroup.
struct Variants {
    header: &'static str,
    subgroup: &'static str,
}
const FORWARD: Variants = Variants {
    header: include_str!("../../shaders/headers/attention_vec4.wgsl"),
    subgroup: "attention_subgroup",
};
const BACKWARD: &str = include_str!("../../shaders/headers/attention_backward_vec4.wgsl");
const QUERY: Variants = Variants { header: BACKWARD, subgroup: "attention_backward_query_subgroup" };
const KEY: Variants = Variants { header: BACKWARD, subgroup: "attention_backward_key_subgroup" };

struct Extents {
    batch: usize,
    tokens: usize,
    heads: usize,
    kv_heads: usize,
    size: usize,
    parameters: Vec<u32>,
}

/// Extents of the packed (B,T,(H+2K)D) argument.
fn extents(l: &Lowering, packed: usize, [heads, kv_heads]: [usize; 2]) -> Extents {
    let shape = l.shape(packed);
    let (batch, tokens, stride) = (shape[0], shape[1], shape[2]);
    let size = stride / (heads + 2 * kv_heads);
    let scale = 1.0 / (size as f32).sqrt();
    let words = [batch, tokens, heads * size, heads, size].map(|x| x as u32);
    let parameters = [&words[..], &[scale.to_bits(), kv_heads as u32, stride as u32]].concat();
    Extents { batch, tokens, heads, kv_heads, size, parameters }
}

/// A kernel whose workgroups own 8 of the `rows` of one of `heads` heads and up to 8 columns a lane, and which does
/// `share` of the op's work.
fn tiled(
    l: &Lowering,
    e: &Extents,
    mut launch: Launch,
    variants: Variants,
    [rows, heads]: [usize; 2],
    share: f64,
) -> Launch {
    let aligned = e.size.is_multiple_of(4);
    // On a CPU a load is a gather, and a barrier a context switch, so there lanes share what they load, within a subgroup.
    let lanes = match (l.capabilities.software, l.capabilities.subgroup) {
        (true, Some(size)) if aligned => {
            launch.key.name = variants.subgroup;
            size
        }
        (software, _) => {
            launch.key.specialisation.header = aligned.then_some(variants.header);
            if software { 8 } else { 32 }
        }
    };
    launch.key.specialisation.constants.push(("LANES", lanes));
    launch.flops *= share;
    launch.groups =
        [rows.div_ceil(8) as u32, (e.batch * heads) as u32, e.size.div_ceil(8 * lanes as usize) as u32];
    launch
}

/// Whether queries see no key before the first of their own text.
fn restricted(starts: bool) -> Vec<(&'static str, u32)> {
    if starts { vec![("STARTS", 1)] } else { Vec::new() }
}

pub(super) fn forward(l: &Lowering, heads: [usize; 2], starts: bool) -> Lowered {
    let e = extents(l, 0, heads);
    let bounds = if starts { l.input(1) } else { Operand::Unread };
    let operands = vec![l.input(0), Operand::Unread, bounds, l.output(0), l.output(1)];
    let parameters = [&e.parameters[..], &[0]].concat();
    let launch = l.launch("attention", restricted(starts), operands, parameters, [1; 3]);
    Lowered::one(tiled(l, &e, launch, FORWARD, [e.tokens, e.heads], 1.0))
}

/// Writes the new keys and values into the cache, then attends to it.
pub(super) fn cached(l: &Lowering, heads: [usize; 2]) -> Lowered {
    let e = extents(l, 0, heads);
    let (capacity, rows) = (l.shape(2)[1], e.batch * e.tokens);
    let (width, kv_width) = (e.heads * e.size, e.kv_heads * e.size);
    let words = [rows, e.tokens, width, kv_width, capacity, 0].map(|x| x as u32).to_vec();
    // Result 1 lies where argument 2 does, so binding it once is enough.
    let operands = vec![l.input(0), l.input(1), l.output(1)];
    let mut write = vectorised(l, "cache_write", vec![], operands, words, rows * 2 * kv_width, e.size);
    write.flops = (rows * kv_width) as f64;
    let operands = vec![l.input(0), l.output(1), l.input(1), l.output(0), Operand::Unwritten];
    let parameters = [&e.parameters[..], &[capacity as u32]].concat();
    let launch = l.launch("attention", vec![("CACHED", 1)], operands, parameters, [1; 3]);
    let rows = e.tokens * e.heads / e.kv_heads;
    let launches = vec![write, tiled(l, &e, launch, FORWARD, [rows, e.kv_heads], 1.0)];
    Lowered { launches, scratch: Vec::new() }
}

pub(super) fn backward(l: &Lowering, heads: [usize; 2], starts: bool) -> Lowered {
    let e = extents(l, 1, heads);
    let (d_o, qkv, o, lse, dqkv, delta) =
        (l.input(0), l.input(1), l.input(2), l.input(3), l.output(0), l.output(1));
    let rows = e.batch * e.tokens * e.heads;
    let mut sums =
        l.launch("attention_delta", vec![], vec![d_o, o, delta], e.parameters.clone(), l.each(rows));
    sums.flops = 2.0 * (rows * e.size) as f64;
    let first = if starts { l.input(4) } else { Operand::Unread };
    let operands = vec![qkv, d_o, lse, delta, first, dqkv];
    let each = |name| l.launch(name, restricted(starts), operands.clone(), e.parameters.clone(), [1; 3]);
    let (query, key) = (each("attention_backward_query"), each("attention_backward_key"));
    let query = tiled(l, &e, query, QUERY, [e.tokens, e.heads], 0.4);
    let key = tiled(l, &e, key, KEY, [e.tokens, e.kv_heads], 0.6);
    Lowered { launches: vec![sums, query, key], scratch: Vec::new() }
}
