//! Cross-entropy with its gradient in place of the logits.

use super::{Lowered, Lowering};

pub(super) fn forward(l: &Lowering, scale: f32) -> Lowered {
    let (rows, vocabulary) = (l.rows(0), l.columns(0));
    // Result 1 lies where argument 0 does, so binding it once is enough.
    let operands = vec![l.input(1), l.input(0), l.output(0)];
    let parameters = vec![rows as u32, vocabulary as u32, scale.to_bits(), 0];
    Lowered::one(l.launch("cross_entropy", vec![("LANES", l.lanes())], operands, parameters, l.spread(rows)))
}
