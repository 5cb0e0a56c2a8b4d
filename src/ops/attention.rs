//! Causal attention with grouped heads: forward, backward, and forward over a cache.

use super::elementwise::vectorised;
use super::{Launch, Lowered, Lowering, Operand};

/// Headers "multiples of 4".
const FORWARD: &str = include_str!("../../shaders/headers/attention_vec4.wgsl");
const BACKWARD: &str = include_str!("../../shaders/headers/attention_backward_vec4.wgsl");

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

/// Lanes where a software adapter's kernels share what they load within a subgroup: there a load is a gather, and a barrier a
/// context switch. They want four neighbours in one load.
fn lanes(l: &Lowering, e: &Extents) -> Option<u32> {
    l.capabilities.subgroup.filter(|_| l.capabilities.software && e.size.is_multiple_of(4))
}

/// A kernel in which a subgroup owns 8 of the `rows` of one of `heads` heads and 8 columns a lane.
fn in_subgroup(e: &Extents, mut launch: Launch, lanes: u32, [rows, heads]: [usize; 2]) -> Launch {
    launch.key.specialisation.constants.push(("LANES", lanes));
    launch.groups =
        [rows.div_ceil(8) as u32, (e.batch * heads) as u32, e.size.div_ceil(8 * lanes as usize) as u32];
    launch
}

/// A kernel that shares tiles through workgroup memory. More rows and columns would need more registers than Intel's and
/// Apple's compilers have (docs/kernels.md); a head beyond 128 columns is several workgroups'.
fn tiled(e: &Extents, mut launch: Launch, header: &'static str, [rows, heads]: [usize; 2]) -> Launch {
    let aligned = e.size.is_multiple_of(4);
    let columns = e.size.div_ceil(32);
    let parts = columns.div_ceil(4);
    let chunks = columns.div_ceil(parts);
    let tile = match rows {
        ..=16 => 16,
        _ if chunks > 2 || chunks == 2 && !aligned => 32,
        _ => 64,
    };
    launch.key.specialisation.header = aligned.then_some(header);
    launch.key.specialisation.constants.extend([("ROWS", tile as u32), ("CHUNKS", chunks as u32)]);
    launch.groups = [rows.div_ceil(tile) as u32, (e.batch * heads) as u32, parts as u32];
    launch
}

fn forward_launch(l: &Lowering, e: &Extents, mut launch: Launch, rows: [usize; 2]) -> Launch {
    match lanes(l, e) {
        Some(lanes) => {
            launch.key.name = "attention_subgroup";
            in_subgroup(e, launch, lanes, rows)
        }
        None => tiled(e, launch, FORWARD, rows),
    }
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
    Lowered::one(forward_launch(l, &e, launch, [e.tokens, e.heads]))
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
    let launches = vec![write, forward_launch(l, &e, launch, [rows, e.kv_heads])];
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
    let each = |name, constants: Vec<_>, share: f64| {
        let constants = [constants, restricted(starts)].concat();
        let launch = l.launch(name, constants, operands.clone(), e.parameters.clone(), [1; 3]);
        Launch { flops: launch.flops * share, ..launch }
    };
    let (queries, keys) = ([e.tokens, e.heads], [e.tokens, e.kv_heads]);
    let launches = match lanes(l, &e) {
        Some(lanes) => vec![
            sums,
            in_subgroup(&e, each("attention_backward_query_subgroup", vec![], 0.4), lanes, queries),
            in_subgroup(&e, each("attention_backward_key_subgroup", vec![], 0.6), lanes, keys),
        ],
        None => {
            // The gradients of q, k and v need three, three and two products a query and key.
            let one = |gradient, share, rows| {
                let launch = each("attention_backward", vec![("GRADIENT", gradient)], share);
                tiled(&e, launch, BACKWARD, rows)
            };
            vec![sums, one(0, 0.375, queries), one(1, 0.375, keys), one(2, 0.25, keys)]
        }
    };
    Lowered { launches, scratch: Vec::new() }
}
