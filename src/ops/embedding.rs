//! Token and position embeddings.

use super::{Lowered, Lowering, Operand};

pub(super) fn forward(l: &Lowering, places: bool) -> Lowered {
    let (rows, columns) = (l.elements(0), l.columns(1));
    let place = if places { l.input(3) } else { Operand::Unread };
    let operands = vec![l.input(0), l.input(1), l.input(2), place, l.output(0)];
    let extents = [rows, columns, l.shape(0)[1], l.shape(1)[0], l.shape(2)[0]];
    let parameters = extents.map(|x| x as u32).to_vec();
    let constants = [("PLACES", places), ("PACKED", l.packed(1)), ("PACKED_POSITIONS", l.packed(2))];
    let constants = constants.map(|(name, value)| (name, value as u32)).to_vec();
    Lowered::one(l.launch("embedding", constants, operands, parameters, l.each(rows * columns)))
}

pub(super) fn gather(l: &Lowering) -> Lowered {
    let (rows, columns) = (l.elements(0), l.columns(1));
    let operands = vec![l.input(0), l.input(1), Operand::Unread, Operand::Unread, l.output(0)];
    let parameters = vec![rows as u32, columns as u32, 1, l.rows(1) as u32, 1];
    let constants = vec![("POSITIONS", 0), ("PACKED", l.packed(1) as u32)];
    Lowered::one(l.launch("embedding", constants, operands, parameters, l.each(rows * columns)))
}

/// Adds to the gradient, which is zero at the start of a step.
pub(super) fn table_backward(l: &Lowering) -> Lowered {
    let (segments, columns) = (l.rows(1), l.columns(0));
    let operands = vec![l.input(0), l.input(1), l.input(2), l.output(0)];
    let parameters = vec![segments as u32, columns as u32];
    let [x, y, _] = l.spread(segments);
    let groups = [x, y, columns.div_ceil(64) as u32];
    Lowered::one(l.launch("embedding_backward", vec![], operands, parameters, groups))
}

/// Adds to the gradient, which is zero at the start of a step.
pub(super) fn position_backward(l: &Lowering) -> Lowered {
    let shape = l.shape(0);
    let count = shape[1] * shape[2];
    let parameters = vec![shape[0] as u32, count as u32];
    Lowered::one(l.launch("accumulate", vec![], vec![l.input(0), l.output(0)], parameters, l.each(count)))
}

/// Rows sorted by token for `embedding_backward`: segments (id, start, end), padded with empty ones to
/// `min(rows, vocabulary)`, and the order of rows. Tokens beyond the vocabulary have no segment.
pub fn sort_rows(tokens: &[u32], vocabulary: usize) -> (Vec<u32>, Vec<u32>) {
    let mut order: Vec<u32> = (0..tokens.len() as u32).collect();
    // Stable: rows of one token stay in order, which fixes the order of summation.
    order.sort_by_key(|&row| tokens[row as usize]);
    let mut segments = Vec::with_capacity(3 * tokens.len().min(vocabulary));
    let mut start = 0;
    while start < order.len() {
        let id = tokens[order[start] as usize];
        if id as usize >= vocabulary {
            break;
        }
        let length = order[start..].iter().take_while(|&&row| tokens[row as usize] == id).count();
        segments.extend([id, start as u32, (start + length) as u32]);
        start += length;
    }
    segments.resize(3 * tokens.len().min(vocabulary), 0);
    (segments, order)
}
