//! Causal attention, forward and backward.

use super::{Launch, Lowered, Lowering};

/// Headers "multiples of 4", and "multiples of 4, subgroups".
type Headers = [&'static str; 2];
const FORWARD: Headers = [
    include_str!("../../shaders/headers/attention_vec4.wgsl"),
    include_str!("../../shaders/headers/attention_subgroup.wgsl"),
];
const BACKWARD: Headers = [
    include_str!("../../shaders/headers/attention_backward_vec4.wgsl"),
    include_str!("../../shaders/headers/attention_backward_subgroup.wgsl"),
];

struct Extents {
    batch: usize,
    tokens: usize,
    heads: usize,
    size: usize,
    parameters: Vec<u32>,
}

/// Extents of the packed (B,T,3C) argument.
fn extents(l: &Lowering, packed: usize, heads: usize) -> Extents {
    let shape = l.shape(packed);
    let (batch, tokens, width) = (shape[0], shape[1], shape[2] / 3);
    let size = width / heads;
    let scale = 1.0 / (size as f32).sqrt();
    let words = [batch, tokens, width, heads, size].map(|x| x as u32);
    Extents { batch, tokens, heads, size, parameters: [&words[..], &[scale.to_bits()]].concat() }
}

/// A kernel whose workgroups own 8 rows of one head and up to 8 columns a lane, and which does `share` of the op's work.
fn tiled(l: &Lowering, e: &Extents, mut launch: Launch, headers: Headers, share: f64) -> Launch {
    // On a CPU a load is a gather, so lanes share what they load; a GPU's caches do that.
    let (lanes, header) = match (l.capabilities.software, l.capabilities.subgroup) {
        (true, Some(size)) if size <= 32 => (size.max(8), headers[1]),
        (true, _) => (8, headers[0]),
        (false, _) => (32, headers[0]),
    };
    launch.key.specialisation.constants.push(("LANES", lanes));
    launch.key.specialisation.header = e.size.is_multiple_of(4).then_some(header);
    launch.flops *= share;
    launch.groups =
        [e.tokens.div_ceil(8) as u32, (e.batch * e.heads) as u32, e.size.div_ceil(8 * lanes as usize) as u32];
    launch
}

pub(super) fn forward(l: &Lowering, heads: usize) -> Lowered {
    let e = extents(l, 0, heads);
    let operands = vec![l.input(0), l.output(0), l.output(1)];
    let launch = l.launch("attention", vec![], operands, e.parameters.clone(), [1; 3]);
    Lowered::one(tiled(l, &e, launch, FORWARD, 1.0))
}

pub(super) fn backward(l: &Lowering, heads: usize) -> Lowered {
    let e = extents(l, 1, heads);
    let (d_o, qkv, o, lse, dqkv, delta) =
        (l.input(0), l.input(1), l.input(2), l.input(3), l.output(0), l.output(1));
    let rows = e.batch * e.tokens * e.heads;
    let mut first =
        l.launch("attention_delta", vec![], vec![d_o, o, delta], e.parameters.clone(), l.each(rows));
    first.flops = 2.0 * (rows * e.size) as f64;
    let operands = vec![qkv, d_o, lse, delta, dqkv];
    let query = l.launch("attention_backward_query", vec![], operands.clone(), e.parameters.clone(), [1; 3]);
    let key = l.launch("attention_backward_key", vec![], operands, e.parameters.clone(), [1; 3]);
    let launches = vec![first, tiled(l, &e, query, BACKWARD, 0.4), tiled(l, &e, key, BACKWARD, 0.6)];
    Lowered { launches, scratch: Vec::new() }
}
