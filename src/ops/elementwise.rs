//! Elementwise ops and column sums.

use super::{Launch, Lowered, Lowering, Operand};

/// Header "multiples of 4" of kernels that are written for an `Element`.
pub(super) const VECTORS: &str = include_str!("../../shaders/headers/vec4.wgsl");

/// A kernel with an invocation an `Element`, which is four neighbours where `extent` allows it.
pub(super) fn vectorised(
    l: &Lowering,
    kernel: &'static str,
    constants: Vec<(&'static str, u32)>,
    operands: Vec<Operand>,
    parameters: Vec<u32>,
    elements: usize,
    extent: usize,
) -> Launch {
    let vectors = extent.is_multiple_of(4);
    let groups = l.each(if vectors { elements / 4 } else { elements });
    let mut launch = l.launch(kernel, constants, operands, parameters, groups);
    launch.key.specialisation.header = vectors.then_some(VECTORS);
    launch
}

pub(super) fn swiglu(l: &Lowering) -> Lowered {
    let count = l.elements(0);
    let operands = vec![l.input(0), l.input(1), l.output(0)];
    Lowered::one(vectorised(l, "swiglu", vec![], operands, vec![count as u32, 0], count, count))
}

pub(super) fn swiglu_backward(l: &Lowering) -> Lowered {
    let count = l.elements(0);
    let operands = vec![l.input(0), l.input(1), l.input(2), l.output(0), l.output(1)];
    Lowered::one(vectorised(l, "swiglu_backward", vec![], operands, vec![count as u32, 0], count, count))
}

/// FUNCTION numbers are those of `shaders/elementwise.wgsl`.
pub(super) fn elementwise(l: &Lowering, function: u32, two: bool) -> Lowered {
    let count = l.elements(0);
    let y = if two { l.input(1) } else { Operand::Unread };
    let period = if two { l.elements(1) } else { count };
    let operands = vec![l.input(0), y, l.output(0)];
    let parameters = vec![count as u32, period as u32, 0];
    Lowered::one(l.launch("elementwise", vec![("FUNCTION", function)], operands, parameters, l.each(count)))
}

pub(super) fn scale(l: &Lowering, factor: f32) -> Lowered {
    let mut lowered = elementwise(l, 4, false);
    lowered.launches[0].parameters[2] = factor.to_bits();
    lowered
}

/// Rows that one invocation sums in the first stage: enough blocks to fill a GPU, few enough for the second stage.
const BLOCK: usize = 32;

/// How many blocks of rows the first stage makes, and how many rows each has.
pub(super) fn blocks(rows: usize) -> (usize, usize) {
    let block = BLOCK.max(rows.div_ceil(1024));
    (rows.div_ceil(block), block)
}

/// The second stage: one block of `rows` partial sums, added to `to` when that is a parameter's gradient.
pub(super) fn sum_blocks(l: &Lowering, from: Operand, rows: usize, columns: usize, to: Operand) -> Launch {
    let mut launch = l.launch(
        "column_sum",
        vec![("ACCUMULATE", l.accumulate as u32)],
        vec![from, to],
        vec![rows as u32, columns as u32, rows as u32, 0],
        [columns.div_ceil(64) as u32, 1, 1],
    );
    launch.flops = (rows * columns) as f64;
    launch
}

pub(super) fn column_sum(l: &Lowering) -> Lowered {
    let (rows, columns) = (l.rows(0), l.columns(0));
    let (count, block) = blocks(rows);
    if count == 1 {
        return Lowered::one(sum_blocks(l, l.input(0), rows, columns, l.output(0)));
    }
    let first = l.launch(
        "column_sum",
        vec![("ACCUMULATE", 0)],
        vec![l.input(0), Operand::Scratch(0)],
        vec![rows as u32, columns as u32, block as u32, 0],
        [columns.div_ceil(64) as u32, count as u32, 1],
    );
    let second = sum_blocks(l, Operand::Scratch(0), count, columns, l.output(0));
    Lowered { launches: vec![first, second], scratch: vec![4 * (count * columns) as u64] }
}
