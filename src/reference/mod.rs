//! The meaning of every op, in f64 and naive loops: the oracle of every test and of `polystage verify`.
//!
//! Tensors are `Vec<f64>`, row-major; token ids and index tables are whole numbers in the same type.

mod attention;
mod cross_entropy;
mod elementwise;
mod embedding;
mod layernorm;
mod matmul;
mod rmsnorm;
mod rope;

use crate::graph::Op;

/// Results of one op for the given arguments, in the op's order. Shapes must have passed [`Op::infer`].
pub fn apply(op: &Op, shapes: &[&[usize]], inputs: &[&[f64]]) -> Vec<Vec<f64>> {
    match *op {
        Op::Embedding { .. } => embedding::forward(shapes, inputs),
        Op::EmbeddingBackward { vocabulary } => embedding::table_backward(shapes, inputs, vocabulary),
        Op::Gather => embedding::gather(shapes, inputs),
        Op::PositionBackward { context } => embedding::position_backward(shapes, inputs, context),
        Op::LayerNorm { epsilon } => layernorm::forward(shapes, inputs, epsilon as f64),
        Op::LayerNormBackward { .. } => layernorm::backward(shapes, inputs),
        Op::LayerNormWeightBackward => layernorm::weight_backward(shapes, inputs),
        Op::RmsNorm { epsilon } => rmsnorm::forward(inputs, epsilon as f64),
        Op::RmsNormBackward { .. } => rmsnorm::backward(inputs),
        Op::RmsNormWeightBackward => rmsnorm::weight_backward(inputs),
        Op::Matmul { layout, epilogue } => matmul::matmul(layout, epilogue, shapes, inputs),
        Op::AddBias => elementwise::add_bias(inputs),
        Op::Add => elementwise::add(inputs),
        Op::Scale { factor } => elementwise::scale(inputs, factor as f64),
        Op::Activate(_) => elementwise::activate(inputs),
        Op::ActivateBackward(_) => elementwise::activate_backward(inputs),
        Op::SwiGlu => elementwise::swiglu(inputs),
        Op::SwiGluBackward => elementwise::swiglu_backward(inputs),
        Op::ColumnSum => elementwise::column_sum(shapes, inputs),
        Op::Rope { heads, kv_heads, .. } => rope::forward([heads, kv_heads], shapes, inputs),
        Op::RopeBackward { heads, kv_heads, .. } => rope::backward([heads, kv_heads], shapes, inputs),
        Op::Attention { heads, kv_heads, .. } => attention::forward([heads, kv_heads], shapes, inputs),
        Op::AttentionBackward { heads, kv_heads, .. } => {
            attention::backward([heads, kv_heads], shapes, inputs)
        }
        Op::AttentionCached { heads, kv_heads } => attention::cached([heads, kv_heads], shapes, inputs),
        Op::CrossEntropy { scale } => cross_entropy::forward(shapes, inputs, scale as f64),
        Op::LogitStatistics { member, members, first } => {
            cross_entropy::statistics(shapes, inputs, [member, members, first])
        }
        Op::CrossEntropyPart { scale, first, vocabulary } => {
            cross_entropy::part(shapes, inputs, scale as f64, [first, vocabulary])
        }
        Op::Slice { first, count } => {
            let row = inputs[0].len() / shapes[0][0];
            vec![inputs[0][first * row..][..count * row].to_vec()]
        }
        Op::Stack { .. } => vec![inputs.concat()],
        // Of a gang of one.
        Op::Sum { .. } | Op::Spread | Op::ReduceScatter { .. } | Op::AllGather { .. } => {
            vec![inputs[0].to_vec()]
        }
    }
}
