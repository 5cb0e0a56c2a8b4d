//! Rotary position embedding.

use super::elementwise::vectorised;
use super::{Lowered, Lowering, Operand};

pub(super) fn forward(l: &Lowering, heads: [usize; 2], positions: bool) -> Lowered {
    let at = if positions { l.input(4) } else { Operand::Unread };
    let operands = vec![l.input(0), l.input(1), l.input(2), l.input(3), at, l.output(0)];
    rotate(l, "rope", heads, [0, 3], operands, positions)
}

pub(super) fn backward(l: &Lowering, heads: [usize; 2], positions: bool) -> Lowered {
    let at = if positions { l.input(2) } else { Operand::Unread };
    let operands = vec![l.input(0), l.input(1), at, l.output(0), l.output(1), l.output(2)];
    rotate(l, "rope_backward", heads, [0, 1], operands, positions)
}

/// `x` and `table` are the arguments that tell tokens and head size.
fn rotate(
    l: &Lowering,
    kernel: &'static str,
    [heads, kv_heads]: [usize; 2],
    [x, table]: [usize; 2],
    operands: Vec<Operand>,
    positions: bool,
) -> Lowered {
    let (context, size) = (l.shape(table)[0], l.shape(table)[1]);
    let (rows, tokens) = (l.rows(x), l.shape(x)[1]);
    let words = [rows, tokens, heads, kv_heads, size, context].map(|n| n as u32).to_vec();
    let pairs = rows * (heads + 2 * kv_heads) * size / 2;
    let constants = vec![("POSITIONS", positions as u32)];
    Lowered::one(vectorised(l, kernel, constants, operands, words, pairs, size / 2))
}
