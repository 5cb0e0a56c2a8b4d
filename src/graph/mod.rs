//! What is computed: a small SSA graph of coarse ops, its shapes, gradients, fusions and cost.
//!
//! A layer is a function that appends nodes. [`autodiff`] appends the backward nodes of a stage to the same graph and
//! marks each node with its [`Phase`]: F (forward), I (what the gradient of the stage's input needs) or W (what only
//! the gradients of parameters need). [`fuse`] rewrites chains into epilogues. Nothing here knows a GPU.
//!
//! Shapes in comments: B sequences, T tokens, C width, H heads, V vocabulary, M = B·T rows. A matmul flattens all but
//! the last axis into rows. The gradient of `x` is `dx`.

pub mod autodiff;
mod collective;
mod fed;
pub mod fuse;
mod logits;
mod op;
mod recompute;

pub use autodiff::{StageGraph, differentiate};
pub use fed::Fed;
pub use logits::{FEW_LOGIT_BYTES, LOGIT_BYTES};
pub use op::{Activation, Epilogue, Layout, Op};

use std::sync::Arc;

use crate::error::{Error, Result};

/// Element type of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DType {
    /// 32-bit float.
    F32,
    /// The upper half of a 32-bit float, two elements in a word: element 2i in the low half. For weights alone.
    BF16,
    /// 32-bit unsigned integer: token ids and index tables.
    U32,
}

impl DType {
    /// Bytes of so many elements: whole words.
    pub fn bytes(self, elements: usize) -> u64 {
        match self {
            DType::F32 | DType::U32 => 4 * elements as u64,
            DType::BF16 => 4 * elements.div_ceil(2) as u64,
        }
    }
}

/// Index of a value in [`Graph::values`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ValueId(pub usize);

/// Where a value comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Fed from outside for each microbatch.
    Fed(Fed),
    /// Persistent: a weight that is trained.
    Parameter,
    /// Persistent: a weight that has no gradient.
    Frozen,
    /// Known when the graph is built, and never trained: [`Value::constant`].
    Constant,
    /// Output number `output` of node `node`.
    Node {
        /// Index in [`Graph::nodes`].
        node: usize,
        /// Which of its outputs.
        output: usize,
    },
    /// Swallowed by a fusion: nothing makes or uses it.
    Removed,
}

/// A tensor in the graph: metadata only, row-major.
#[derive(Clone, Debug)]
pub struct Value {
    /// Name for people: a parameter's Hugging Face name, or the op that made it.
    pub name: String,
    /// Extents; never zero.
    pub shape: Vec<usize>,
    /// Element type.
    pub dtype: DType,
    /// Producer.
    pub source: Source,
    /// The elements of a [`Source::Constant`].
    pub constant: Option<Arc<[f32]>>,
}

impl Value {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Never: extents are positive.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.dtype.bytes(self.len())
    }

    /// All extents but the last, multiplied.
    pub fn rows(&self) -> usize {
        self.len() / self.columns()
    }

    /// The last extent.
    pub fn columns(&self) -> usize {
        *self.shape.last().expect("shapes have at least one axis")
    }
}

/// Which program of a stage a node belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    /// Forward.
    Forward,
    /// Backward, input half (I); the whole of it (B) where the two are joined.
    Input,
    /// Backward, weight half (W); empty where the two are joined.
    Weight,
}

/// One application of an op.
#[derive(Clone, Debug)]
pub struct Node {
    /// What is applied.
    pub op: Op,
    /// Arguments, in the op's order.
    pub inputs: Vec<ValueId>,
    /// Results, in the op's order.
    pub outputs: Vec<ValueId>,
    /// The program it belongs to.
    pub phase: Phase,
}

/// Values and nodes in execution order.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    /// All values.
    pub values: Vec<Value>,
    /// All nodes; a node uses only values of earlier ones.
    pub nodes: Vec<Node>,
}

impl Graph {
    /// The value behind an id.
    pub fn value(&self, id: ValueId) -> &Value {
        &self.values[id.0]
    }

    /// The shape behind an id.
    pub fn shape(&self, id: ValueId) -> &[usize] {
        &self.values[id.0].shape
    }

    fn add_value(&mut self, name: &str, shape: Vec<usize>, dtype: DType, source: Source) -> ValueId {
        self.values.push(Value { name: name.to_string(), shape, dtype, source, constant: None });
        ValueId(self.values.len() - 1)
    }

    /// A value fed from outside.
    pub fn input(&mut self, fed: Fed, shape: &[usize]) -> ValueId {
        self.add_value(&fed.to_string(), shape.to_vec(), fed.dtype(), Source::Fed(fed))
    }

    /// All that is fed from outside, in order of first appearance.
    pub fn fed(&self) -> impl Iterator<Item = (Fed, ValueId)> + '_ {
        self.values.iter().enumerate().filter_map(|(index, value)| match value.source {
            Source::Fed(fed) => Some((fed, ValueId(index))),
            _ => None,
        })
    }

    /// A weight, named as in the checkpoint.
    pub fn parameter(&mut self, name: &str, shape: &[usize]) -> ValueId {
        self.add_value(name, shape.to_vec(), DType::F32, Source::Parameter)
    }

    /// A weight that is not trained.
    pub fn frozen(&mut self, name: &str, shape: &[usize]) -> ValueId {
        self.add_value(name, shape.to_vec(), DType::F32, Source::Frozen)
    }

    /// Makes a weight one that is packed; before anything uses it.
    pub fn pack(&mut self, weight: ValueId) {
        self.values[weight.0].dtype = DType::BF16;
    }

    /// A table of numbers that is part of the graph, row-major; one of that name that is there already is used again.
    pub fn constant(&mut self, name: &str, shape: &[usize], elements: impl FnOnce() -> Vec<f32>) -> ValueId {
        let same = |v: &Value| v.source == Source::Constant && v.name == name && v.shape == shape;
        if let Some(index) = self.values.iter().position(same) {
            return ValueId(index);
        }
        let id = self.add_value(name, shape.to_vec(), DType::F32, Source::Constant);
        self.values[id.0].constant = Some(elements().into());
        id
    }

    /// Appends a node after checking its shapes; returns its outputs.
    pub fn push(&mut self, op: Op, inputs: &[ValueId], phase: Phase) -> Result<Vec<ValueId>> {
        let shapes: Vec<&[usize]> = inputs.iter().map(|&i| self.shape(i)).collect();
        let outputs = op.infer(&shapes)?;
        self.check_packed(&op, inputs)?;
        let node = self.nodes.len();
        let outputs = outputs
            .into_iter()
            .enumerate()
            .map(|(output, shape)| {
                // A view is what it is a view of.
                let dtype = if let Op::Slice { .. } = op { self.value(inputs[0]).dtype } else { DType::F32 };
                self.add_value(op.name(), shape, dtype, Source::Node { node, output })
            })
            .collect::<Vec<_>>();
        self.nodes.push(Node { op, inputs: inputs.to_vec(), outputs: outputs.clone(), phase });
        Ok(outputs)
    }

    /// Refuses packed arguments where the op has no kernel for them.
    fn check_packed(&self, op: &Op, inputs: &[ValueId]) -> Result<()> {
        let mut packed = inputs.iter().enumerate().filter(|(_, id)| self.value(**id).dtype == DType::BF16);
        match packed.find(|(argument, _)| !op.reads_packed(*argument)) {
            None => Ok(()),
            Some((_, &id)) => Err(Error::Shape {
                op: op.name(),
                message: format!("does not read {}, which is packed as bf16", self.value(id).name),
            }),
        }
    }

    /// Appends a forward node with one result of interest: its first output.
    pub fn forward(&mut self, op: Op, inputs: &[ValueId]) -> Result<ValueId> {
        Ok(self.push(op, inputs, Phase::Forward)?[0])
    }

    /// Parameters, frozen ones too, in order of first appearance.
    pub fn parameters(&self) -> impl Iterator<Item = ValueId> + '_ {
        let is_weight = |v: &ValueId| matches!(self.value(*v).source, Source::Parameter | Source::Frozen);
        (0..self.values.len()).map(ValueId).filter(is_weight)
    }

    /// Floating-point operations of one node (a multiply-add counts two).
    pub fn flops(&self, node: &Node) -> f64 {
        let shapes: Vec<&[usize]> = node.inputs.iter().map(|&i| self.shape(i)).collect();
        node.op.flops(&shapes)
    }

    /// Floating-point operations of one phase.
    pub fn phase_flops(&self, phase: Phase) -> f64 {
        self.nodes.iter().filter(|n| n.phase == phase).map(|n| self.flops(n)).sum()
    }

    /// Which values are gradients: what comes as one from the stage behind, what the loss makes of the logits, and whatever is made
    /// of those.
    pub fn gradients(&self) -> Vec<bool> {
        let from_outside = |v: &Value| v.source == Source::Fed(Fed::OutputGradient);
        let mut gradients: Vec<bool> = self.values.iter().map(from_outside).collect();
        for node in &self.nodes {
            let of_the_loss = matches!(node.op, Op::CrossEntropy { .. } | Op::CrossEntropyPart { .. });
            let of_gradients = node.inputs.iter().any(|input| gradients[input.0]);
            for (result, output) in node.outputs.iter().enumerate() {
                gradients[output.0] = of_gradients || of_the_loss && result == 1;
            }
        }
        gradients
    }

    /// Checks that every node uses only earlier values and that shapes still agree: for graphs after a rewrite.
    pub fn verify(&self) -> Result<()> {
        let mut ready: Vec<bool> =
            self.values.iter().map(|v| !matches!(v.source, Source::Node { .. } | Source::Removed)).collect();
        for node in &self.nodes {
            if let Some(&early) = node.inputs.iter().find(|i| !ready[i.0]) {
                return Err(Error::Shape {
                    op: node.op.name(),
                    message: format!("uses {} before it is computed", self.value(early).name),
                });
            }
            let shapes: Vec<&[usize]> = node.inputs.iter().map(|&i| self.shape(i)).collect();
            let inferred = node.op.infer(&shapes)?;
            self.check_packed(&node.op, &node.inputs)?;
            for (&output, shape) in node.outputs.iter().zip(&inferred) {
                if self.shape(output) != shape {
                    return Err(Error::Shape {
                        op: node.op.name(),
                        message: format!("gives {shape:?}, the graph says {:?}", self.shape(output)),
                    });
                }
                ready[output.0] = true;
            }
        }
        Ok(())
    }
}
