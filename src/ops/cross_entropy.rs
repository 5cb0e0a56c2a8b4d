//! Cross-entropy with its gradient in place of the logits, of a whole vocabulary or of one in parts.

use super::{Lowered, Lowering, Operand};

/// A part of a vocabulary: its first token, the tokens of the whole, its number and that of all parts.
struct Part {
    first: usize,
    vocabulary: usize,
    number: usize,
    count: usize,
}

fn launch(
    l: &Lowering,
    constants: Vec<(&'static str, u32)>,
    scale: f32,
    part: Part,
    given: Operand,
) -> Lowered {
    let (rows, columns) = (l.rows(0), l.columns(0));
    // Where the gradient lies, there the logits do, so binding them once is enough.
    let operands = vec![l.input(1), l.input(0), given, l.output(0)];
    let Part { first, vocabulary, number, count } = part;
    let [rows_, columns, first, vocabulary, number, count] =
        [rows, columns, first, vocabulary, number, count].map(|x| x as u32);
    let parameters = vec![rows_, columns, scale.to_bits(), first, vocabulary, number, count];
    let constants = [vec![("LANES", l.lanes())], constants].concat();
    Lowered::one(l.launch("cross_entropy", constants, operands, parameters, l.spread(rows)))
}

pub(super) fn forward(l: &Lowering, scale: f32) -> Lowered {
    let whole = Part { first: 0, vocabulary: l.columns(0), number: 0, count: 1 };
    launch(l, Vec::new(), scale, whole, Operand::Unread)
}

/// What the other parts need to know of one.
pub(super) fn statistics(l: &Lowering, [number, count, first]: [usize; 3]) -> Lowered {
    let part = Part { first, vocabulary: first + l.columns(0), number, count };
    launch(l, vec![("STATISTICS", 1)], 0.0, part, Operand::Unread)
}

/// Loss and gradient of a part, from what is known of all.
pub(super) fn part(l: &Lowering, scale: f32, first: usize, vocabulary: usize) -> Lowered {
    let part = Part { first, vocabulary, number: 0, count: l.shape(2)[0] };
    launch(l, vec![("GIVEN", 1)], scale, part, l.input(2))
}
