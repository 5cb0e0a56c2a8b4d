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

/// Rows that one invocation sums: so few that enough of them fill a GPU.
const BLOCK: usize = 32;

/// How many blocks of rows a stage makes, and how many rows each has.
pub(super) fn blocks(rows: usize) -> (usize, usize) {
    let block = BLOCK.max(rows.div_ceil(1024));
    (rows.div_ceil(block), block)
}

/// Sums of columns in stages, of blocks of rows and then of blocks of their sums, so that no invocation adds many one after
/// another; the last are added to `to` when that is a parameter's gradient. What stages leave goes to `scratch`.
pub(super) fn sum_columns(
    l: &Lowering,
    from: Operand,
    [rows, columns]: [usize; 2],
    to: Operand,
    scratch: &mut Vec<u64>,
) -> Vec<Launch> {
    let (mut from, mut rows, mut launches) = (from, rows, Vec::new());
    loop {
        let (count, block) = blocks(rows);
        let to = if count == 1 {
            to
        } else {
            scratch.push(4 * (count * columns) as u64);
            Operand::Scratch(scratch.len() - 1)
        };
        let accumulate = count == 1 && l.accumulate;
        let mut launch = l.launch(
            "column_sum",
            vec![("ACCUMULATE", accumulate as u32)],
            vec![from, to],
            vec![rows as u32, columns as u32, block as u32, 0],
            [columns.div_ceil(64) as u32, count as u32, 1],
        );
        launch.flops = (rows * columns) as f64;
        launches.push(launch);
        if count == 1 {
            return launches;
        }
        (from, rows) = (to, count);
    }
}

pub(super) fn column_sum(l: &Lowering) -> Lowered {
    let mut scratch = Vec::new();
    let launches = sum_columns(l, l.input(0), [l.rows(0), l.columns(0)], l.output(0), &mut scratch);
    Lowered { launches, scratch }
}

/// Elements of a row that an invocation keeps, where 256 are enough for the row; and that it can: the arrays of the kernels.
const KEPT: [usize; 2] = [4, 8];

/// One workgroup a row of `columns`; short rows, such as heads, take no more lanes than they have loads for. Cards keep the
/// row in registers, with more lanes for rows that else would not fit; on a CPU memory is as near.
pub(super) fn by_row(l: &Lowering, mut launch: Launch, rows: usize, columns: usize) -> Lowered {
    let vectors = columns.is_multiple_of(4);
    let loads = if vectors { columns / 4 } else { columns };
    let software = l.capabilities.software;
    let most =
        if software { l.lanes() as usize } else { loads.div_ceil(KEPT[0]).clamp(l.lanes() as usize, 256) };
    let lanes = loads.next_power_of_two().clamp(8, most.next_power_of_two());
    let kept = if software { 0 } else { loads.div_ceil(lanes).min(KEPT[1]) };
    launch.key.specialisation.constants.extend([
        ("COLUMNS", columns as u32),
        ("LANES", lanes as u32),
        ("KEPT", kept as u32),
    ]);
    launch.key.specialisation.header = vectors.then_some(VECTORS);
    launch.groups = l.spread(rows);
    Lowered::one(launch)
}
