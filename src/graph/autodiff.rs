//! Reverse-mode differentiation of a stage, split into I and W.
//!
//! The backward nodes are appended to the stage's own graph. A node that directly makes a parameter's gradient is W;
//! every other backward node lies on the way to the gradient of the stage's input and is I. The first stage, whose
//! input is token ids, keeps the same split, so its I is the chain down to the embedding. Nothing is appended for a value
//! on which neither a trained parameter nor an input whose gradient is wanted has any influence.

use std::collections::{HashMap, HashSet};

use super::{Fed, Graph, Layout, Op, Phase, Source, ValueId};
use crate::error::{Error, Result};
use crate::graph::Epilogue;

/// A stage's graph with its ends named.
#[derive(Clone, Debug)]
pub struct StageGraph {
    /// F, I and W nodes in one graph.
    pub graph: Graph,
    /// Activation from the previous stage, (B,T,C); none for the first.
    pub input: Option<ValueId>,
    /// Activation for the next stage; none for the last.
    pub output: Option<ValueId>,
    /// Gradient of `output`, fed from the next stage; none where nothing needs it.
    pub d_output: Option<ValueId>,
    /// Gradient of `input`, for the previous stage; none where nothing there needs it.
    pub d_input: Option<ValueId>,
    /// Loss of each row, unscaled (M); on the last stage.
    pub loss: Option<ValueId>,
    /// Each trained parameter with its gradient for one microbatch, in order of first appearance; one that is used several times with
    /// a term of it for each, all of which are added to the same place.
    pub gradients: Vec<(ValueId, ValueId)>,
    /// The activation that each layer hands to the next, layer by layer; the last is `output` or the logits.
    pub boundaries: Vec<ValueId>,
}

impl StageGraph {
    /// Values that something outside the graph reads.
    pub fn results(&self) -> Vec<ValueId> {
        let ends = [self.output, self.d_input, self.loss];
        ends.into_iter().flatten().chain(self.gradients.iter().map(|g| g.1)).collect()
    }
}

/// Gradient contributions of each value, in the order in which they are found.
struct Gradients(HashMap<ValueId, Vec<ValueId>>);

impl Gradients {
    fn add(&mut self, of: ValueId, gradient: ValueId) {
        self.0.entry(of).or_default().push(gradient);
    }

    /// The sum of all contributions to `of`, appended as `Add` nodes; none if nothing depends on it.
    fn total(&mut self, graph: &mut Graph, of: ValueId) -> Result<Option<ValueId>> {
        let Some(parts) = self.0.remove(&of) else { return Ok(None) };
        let mut sum = parts[0];
        for &part in &parts[1..] {
            sum = graph.push(Op::Add, &[sum, part], Phase::Input)?[0];
        }
        Ok(Some(sum))
    }
}

/// Appends the backward pass. `input` is the activation from the previous stage, if its gradient is wanted; `output`
/// that for the next stage, or none when the graph ends in a [`Op::CrossEntropy`], which seeds the gradients.
pub fn differentiate(
    mut graph: Graph,
    input: Option<ValueId>,
    output: Option<ValueId>,
) -> Result<StageGraph> {
    let forward = graph.nodes.len();
    let wanted = wanted(&graph, input);
    let mut gradients = Gradients(HashMap::new());
    let d_output = output.filter(|output| wanted.contains(output)).map(|output| {
        let shape = graph.shape(output).to_vec();
        let seed = graph.input(Fed::OutputGradient, &shape);
        gradients.add(output, seed);
        seed
    });
    let mut loss = None;
    let mut parameter_gradients = Vec::new();
    for index in (0..forward).rev() {
        let node = graph.nodes[index].clone();
        if let Op::CrossEntropy { .. } | Op::CrossEntropyPart { .. } = node.op {
            loss = Some(node.outputs[0]);
            if wanted.contains(&node.inputs[0]) {
                gradients.add(node.inputs[0], node.outputs[1]);
            }
            continue;
        }
        let Some(dy) = gradients.total(&mut graph, node.outputs[0])? else { continue };
        for (of, gradient) in backward(&mut graph, &node.op, &node.inputs, &node.outputs, dy, &wanted)? {
            if !wanted.contains(&of) {
                continue;
            }
            if graph.value(of).source == Source::Parameter {
                parameter_gradients.push((of, gradient));
            } else {
                gradients.add(of, gradient);
            }
        }
    }
    let d_input = match input {
        Some(input) => gradients.total(&mut graph, input)?,
        None => None,
    };
    parameter_gradients.sort_by_key(|(parameter, _)| *parameter);
    let gradients = parameter_gradients;
    Ok(StageGraph { graph, input, output, d_output, d_input, loss, gradients, boundaries: Vec::new() })
}

/// Values whose gradient is on the way to that of a trained parameter or of the input.
fn wanted(graph: &Graph, input: Option<ValueId>) -> HashSet<ValueId> {
    let trained = graph.parameters().filter(|&id| graph.value(id).source == Source::Parameter);
    let mut wanted: HashSet<ValueId> = trained.chain(input).collect();
    for node in &graph.nodes {
        if node.inputs.iter().any(|input| wanted.contains(input)) {
            wanted.extend(&node.outputs);
        }
    }
    wanted
}

/// Appends the nodes that turn the gradient `dy` of a node's first output into gradients of its arguments, of those that
/// are `wanted` at least.
fn backward(
    graph: &mut Graph,
    op: &Op,
    inputs: &[ValueId],
    outputs: &[ValueId],
    dy: ValueId,
    wanted: &HashSet<ValueId>,
) -> Result<Vec<(ValueId, ValueId)>> {
    let (i, w) = (Phase::Input, Phase::Weight);
    let wants = |value: ValueId| wanted.contains(&value);
    Ok(match *op {
        Op::Embedding { places } => {
            let (tokens, table, positions) = (inputs[0], inputs[1], inputs[2]);
            let rows = graph.value(tokens).len();
            let (vocabulary, context) = (graph.shape(table)[0], graph.shape(positions)[0]);
            let segments = graph.input(Fed::TokenSegments, &[rows.min(vocabulary), 3]);
            let order = graph.input(Fed::TokenOrder, &[rows]);
            let d_table = graph.push(Op::EmbeddingBackward { vocabulary }, &[dy, segments, order], w)?[0];
            let d_positions = if places {
                let segments = graph.input(Fed::PlaceSegments, &[rows.min(context), 3]);
                let order = graph.input(Fed::PlaceOrder, &[rows]);
                let op = Op::EmbeddingBackward { vocabulary: context };
                graph.push(op, &[dy, segments, order], w)?[0]
            } else {
                graph.push(Op::PositionBackward { context }, &[dy], w)?[0]
            };
            vec![(table, d_table), (positions, d_positions)]
        }
        Op::LayerNorm { .. } => {
            let (x, gain, bias) = (inputs[0], inputs[1], inputs[2]);
            let mut result = Vec::new();
            if wants(gain) || wants(bias) {
                let d = graph.push(Op::LayerNormWeightBackward, &[dy, x, outputs[1]], w)?;
                result.extend([(gain, d[0]), (bias, d[1])]);
            }
            if wants(x) {
                let op = Op::LayerNormBackward { residual: false };
                result.push((x, graph.push(op, &[dy, x, gain, outputs[1]], i)?[0]));
            }
            result
        }
        Op::Gather => {
            let (rows, table) = (inputs[0], inputs[1]);
            if graph.value(table).source != Source::Parameter {
                return no_gradient(op);
            }
            let (count, vocabulary) = (graph.value(rows).len(), graph.value(table).rows());
            let segments = graph.input(Fed::TokenSegments, &[count.min(vocabulary), 3]);
            let order = graph.input(Fed::TokenOrder, &[count]);
            let d_table = graph.push(Op::EmbeddingBackward { vocabulary }, &[dy, segments, order], w)?[0];
            vec![(table, d_table)]
        }
        Op::RmsNorm { .. } => {
            let (x, gain) = (inputs[0], inputs[1]);
            let mut result = Vec::new();
            if wants(gain) {
                result.push((gain, graph.push(Op::RmsNormWeightBackward, &[dy, x, outputs[1]], w)?[0]));
            }
            if wants(x) {
                let op = Op::RmsNormBackward { residual: false };
                result.push((x, graph.push(op, &[dy, x, gain, outputs[1]], i)?[0]));
            }
            result
        }
        Op::Matmul { layout, epilogue: Epilogue::None } => {
            let (a, b) = (inputs[0], inputs[1]);
            let is_weight = graph.value(b).source == Source::Parameter;
            let matmul = |layout| Op::Matmul { layout, epilogue: Epilogue::None };
            let (da, db) = match layout {
                Layout::NN => ((Layout::NT, [dy, b]), (Layout::TN, [a, dy])),
                Layout::NT => ((Layout::NN, [dy, b]), (Layout::TN, [dy, a])),
                Layout::TN => return no_gradient(op),
            };
            let mut result = Vec::new();
            if wants(a) {
                result.push((a, graph.push(matmul(da.0), &da.1, i)?[0]));
            }
            if wants(b) {
                let phase = if is_weight { w } else { i };
                result.push((b, graph.push(matmul(db.0), &db.1, phase)?[0]));
            }
            result
        }
        Op::AddBias => {
            let mut result = vec![(inputs[0], dy)];
            if wants(inputs[1]) {
                result.push((inputs[1], graph.push(Op::ColumnSum, &[dy], w)?[0]));
            }
            result
        }
        Op::Scale { factor } => {
            vec![(inputs[0], graph.push(Op::Scale { factor }, &[dy], i)?[0])]
        }
        Op::Add => vec![(inputs[0], dy), (inputs[1], dy)],
        Op::Sum { .. } => vec![(inputs[0], dy)],
        Op::Spread => match wants(inputs[0]) {
            true => vec![(inputs[0], graph.push(Op::Sum { exact: false }, &[dy], i)?[0])],
            false => Vec::new(),
        },
        Op::ReduceScatter { first, .. } => {
            let shape = graph.shape(inputs[0]);
            let op = Op::AllGather { first, batch: shape[0], sequence: shape[1] };
            vec![(inputs[0], graph.push(op, &[dy], i)?[0])]
        }
        Op::AllGather { first, .. } => match wants(inputs[0]) {
            true => {
                let op = Op::ReduceScatter { first, count: graph.shape(inputs[0])[0] };
                vec![(inputs[0], graph.push(op, &[dy], i)?[0])]
            }
            false => Vec::new(),
        },
        Op::Activate(f) => {
            vec![(inputs[0], graph.push(Op::ActivateBackward(f), &[dy, inputs[0]], i)?[0])]
        }
        Op::SwiGlu => {
            let (gate, up) = (inputs[0], inputs[1]);
            let d = graph.push(Op::SwiGluBackward, &[dy, gate, up], i)?;
            vec![(gate, d[0]), (up, d[1])]
        }
        Op::Rope { heads, kv_heads, positions } => {
            let op = Op::RopeBackward { heads, kv_heads, positions };
            let d = graph.push(op, &[&[dy], &inputs[3..]].concat(), i)?;
            inputs.iter().copied().zip(d).collect()
        }
        Op::Attention { heads, kv_heads, starts } => {
            let arguments = [&[dy, inputs[0], outputs[0], outputs[1]], &inputs[1..]].concat();
            let op = Op::AttentionBackward { heads, kv_heads, starts };
            vec![(inputs[0], graph.push(op, &arguments, i)?[0])]
        }
        Op::Matmul { .. }
        | Op::CrossEntropy { .. }
        | Op::LogitStatistics { .. }
        | Op::Slice { .. }
        | Op::Stack { .. }
        | Op::CrossEntropyPart { .. }
        | Op::EmbeddingBackward { .. }
        | Op::PositionBackward { .. }
        | Op::LayerNormBackward { .. }
        | Op::RmsNormBackward { .. }
        | Op::RmsNormWeightBackward
        | Op::SwiGluBackward
        | Op::RopeBackward { .. }
        | Op::AttentionCached { .. }
        | Op::LayerNormWeightBackward
        | Op::ActivateBackward(_)
        | Op::ColumnSum
        | Op::AttentionBackward { .. } => return no_gradient(op),
    })
}

/// Ops that only rewrites or a backward pass make are never differentiated.
fn no_gradient<T>(op: &Op) -> Result<T> {
    Err(Error::Shape { op: op.name(), message: "has no gradient: differentiate before fusing".into() })
}
