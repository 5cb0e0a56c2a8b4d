//! Layer normalisation.

use super::elementwise::{blocks, by_row, sum_columns};
use super::{Lowered, Lowering, Operand};

pub(super) fn forward(l: &Lowering, epsilon: f32) -> Lowered {
    let (rows, columns) = (l.rows(0), l.columns(0));
    let operands = vec![l.input(0), l.input(1), l.input(2), l.output(0), l.output(1)];
    let parameters = vec![rows as u32, epsilon.to_bits()];
    by_row(l, l.launch("layernorm", vec![], operands, parameters, [1; 3]), rows, columns)
}

pub(super) fn backward(l: &Lowering, residual: bool) -> Lowered {
    let (rows, columns) = (l.rows(1), l.columns(1));
    let extra = if residual { l.input(4) } else { Operand::Unread };
    let operands = vec![l.input(0), l.input(1), l.input(2), l.input(3), extra, l.output(0)];
    let constants = vec![("RESIDUAL", residual as u32)];
    let parameters = vec![rows as u32, 0];
    by_row(l, l.launch("layernorm_backward", constants, operands, parameters, [1; 3]), rows, columns)
}

pub(super) fn weight_backward(l: &Lowering) -> Lowered {
    let (rows, columns) = (l.rows(1), l.columns(1));
    let (count, block) = blocks(rows);
    let operands = vec![l.input(0), l.input(1), l.input(2), Operand::Scratch(0), Operand::Scratch(1)];
    let first = l.launch(
        "layernorm_weight_backward",
        vec![],
        operands,
        vec![rows as u32, columns as u32, block as u32, 0],
        [columns.div_ceil(64) as u32, count as u32, 1],
    );
    let mut scratch = vec![4 * (count * columns) as u64; 2];
    let mut launches = vec![first];
    for i in 0..2 {
        launches.extend(sum_columns(l, Operand::Scratch(i), [count, columns], l.output(i), &mut scratch));
    }
    Lowered { launches, scratch }
}
