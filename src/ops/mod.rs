//! How an op runs: one file an op (or a family), from a node to launches of kernels, and [`plan`] / [`program`], which
//! turn a stage's graph into memory and lists of dispatches on one device.
//!
//! A [`Launch`] is data; only [`program`] and [`parameters`] touch a device.

mod arguments;
mod attention;
pub mod bench;
mod cases;
mod cross_entropy;
mod elementwise;
mod embedding;
mod layernorm;
mod matmul;
pub mod packed;
pub mod parameters;
pub mod plan;
pub mod program;
mod rmsnorm;
pub mod roofline;
mod roofline_svg;
mod rope;
pub mod tune;
pub mod verify;

pub use embedding::sort_rows;

use crate::gpu::{Capabilities, KernelKey, Specialisation};
use crate::graph::{Activation, DType, Graph, Node, Op, ValueId};

/// What a launch binds after its parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operand {
    /// A value of the graph.
    Value(ValueId),
    /// A buffer that lives during this node only: index in [`Lowered::scratch`].
    Scratch(usize),
    /// Nothing that is read.
    Unread,
    /// Nothing that is written.
    Unwritten,
}

/// One dispatch, as data.
#[derive(Clone, Debug, PartialEq)]
pub struct Launch {
    /// Kernel and variant.
    pub key: KernelKey,
    /// Bindings 1, 2, 3 ….
    pub operands: Vec<Operand>,
    /// Content of binding 0: 32-bit words.
    pub parameters: Vec<u32>,
    /// Its last two parameters are the loss scale and what takes it back, both 1 until [`StageProgram::scale`] sets them.
    ///
    /// [`StageProgram::scale`]: program::StageProgram::scale
    pub scaled: bool,
    /// Workgroups.
    pub groups: [u32; 3],
    /// Floating-point operations, for splitting submissions.
    pub flops: f64,
}

/// A node as launches.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Lowered {
    /// In order.
    pub launches: Vec<Launch>,
    /// Bytes of each scratch buffer.
    pub scratch: Vec<u64>,
}

impl Lowered {
    fn one(launch: Launch) -> Self {
        Lowered { launches: vec![launch], scratch: Vec::new() }
    }
}

/// A node with what its lowering needs to see.
pub(crate) struct Lowering<'a> {
    graph: &'a Graph,
    node: &'a Node,
    capabilities: &'a Capabilities,
    /// Add to what the outputs hold: they are gradients of parameters.
    accumulate: bool,
    /// Which values are gradients.
    gradients: &'a [bool],
}

impl Lowering<'_> {
    fn shape(&self, input: usize) -> &[usize] {
        self.graph.shape(self.node.inputs[input])
    }

    fn input(&self, i: usize) -> Operand {
        Operand::Value(self.node.inputs[i])
    }

    /// Whether an argument is packed as bf16.
    fn packed(&self, input: usize) -> bool {
        self.graph.value(self.node.inputs[input]).dtype == DType::BF16
    }

    /// Whether an argument is a gradient.
    fn is_gradient(&self, input: usize) -> bool {
        self.gradients[self.node.inputs[input].0]
    }

    fn output(&self, i: usize) -> Operand {
        Operand::Value(self.node.outputs[i])
    }

    fn elements(&self, input: usize) -> usize {
        self.graph.value(self.node.inputs[input]).len()
    }

    fn rows(&self, input: usize) -> usize {
        self.graph.value(self.node.inputs[input]).rows()
    }

    fn columns(&self, input: usize) -> usize {
        self.graph.value(self.node.inputs[input]).columns()
    }

    /// Invocations that share a reduction: few where a barrier is a context switch.
    fn lanes(&self) -> u32 {
        if self.capabilities.software { 8 } else { 64 }
    }

    fn launch(
        &self,
        name: &'static str,
        constants: Vec<(&'static str, u32)>,
        operands: Vec<Operand>,
        parameters: Vec<u32>,
        groups: [u32; 3],
    ) -> Launch {
        Launch {
            key: KernelKey { name, specialisation: Specialisation { header: None, constants } },
            operands,
            parameters,
            scaled: false,
            groups,
            flops: self.graph.flops(self.node),
        }
    }

    /// `n` workgroups over x and y, since an axis is limited.
    fn spread(&self, n: usize) -> [u32; 3] {
        spread(n, self.capabilities)
    }

    /// One invocation an element in workgroups of 64.
    fn each(&self, elements: usize) -> [u32; 3] {
        self.spread(elements.div_ceil(64))
    }
}

pub(crate) fn spread(n: usize, capabilities: &Capabilities) -> [u32; 3] {
    let x = n.clamp(1, capabilities.max_groups as usize);
    [x as u32, n.div_ceil(x).max(1) as u32, 1]
}

/// The launches of a node on a device with these capabilities. `accumulate`: its outputs are gradients of parameters,
/// to be added to what is there. `gradients`: [`Graph::gradients`].
pub fn lower(
    graph: &Graph,
    node: &Node,
    capabilities: &Capabilities,
    accumulate: bool,
    gradients: &[bool],
) -> Lowered {
    let l = Lowering { graph, node, capabilities, accumulate, gradients };
    match node.op {
        Op::Embedding { places } => embedding::forward(&l, places),
        Op::EmbeddingBackward { .. } => embedding::table_backward(&l),
        Op::Gather => embedding::gather(&l),
        Op::PositionBackward { .. } => embedding::position_backward(&l),
        Op::LayerNorm { epsilon } => layernorm::forward(&l, epsilon),
        Op::LayerNormBackward { residual } => layernorm::backward(&l, residual),
        Op::LayerNormWeightBackward => layernorm::weight_backward(&l),
        Op::RmsNorm { epsilon } => rmsnorm::forward(&l, epsilon),
        Op::RmsNormBackward { residual } => rmsnorm::backward(&l, residual),
        Op::RmsNormWeightBackward => rmsnorm::weight_backward(&l),
        Op::Matmul { layout, epilogue } => matmul::matmul(&l, layout, epilogue),
        Op::Add => elementwise::elementwise(&l, 0, true),
        Op::Activate(Activation::GeluTanh) => elementwise::elementwise(&l, 1, false),
        Op::ActivateBackward(Activation::GeluTanh) => elementwise::elementwise(&l, 2, true),
        Op::AddBias => elementwise::elementwise(&l, 3, true),
        Op::Scale { factor } => elementwise::scale(&l, factor),
        Op::SwiGlu => elementwise::swiglu(&l),
        Op::SwiGluBackward => elementwise::swiglu_backward(&l),
        Op::ColumnSum => elementwise::column_sum(&l),
        Op::Rope { heads, kv_heads, positions } => rope::forward(&l, [heads, kv_heads], positions),
        Op::RopeBackward { heads, kv_heads, positions } => rope::backward(&l, [heads, kv_heads], positions),
        Op::Attention { heads, kv_heads, starts } => attention::forward(&l, [heads, kv_heads], starts),
        Op::AttentionBackward { heads, kv_heads, starts } => {
            attention::backward(&l, [heads, kv_heads], starts)
        }
        Op::AttentionCached { heads, kv_heads } => attention::cached(&l, [heads, kv_heads]),
        Op::CrossEntropy { scale } => cross_entropy::forward(&l, scale),
        Op::LogitStatistics { member, members, first } => {
            cross_entropy::statistics(&l, [member, members, first])
        }
        Op::CrossEntropyPart { scale, first, vocabulary } => {
            cross_entropy::part(&l, scale, first, vocabulary)
        }
        // The link adds; of what is spread nothing is left; and parts lie where the whole does.
        Op::Slice { .. } | Op::Stack { .. } => Lowered::default(),
        Op::Sum { .. } | Op::Spread | Op::ReduceScatter { .. } | Op::AllGather { .. } => Lowered::default(),
    }
}

/// A result that must lie in the same memory as an argument: (argument, result).
pub fn in_place(op: &Op) -> Option<(usize, usize)> {
    match op {
        Op::CrossEntropy { .. } | Op::CrossEntropyPart { .. } => Some((0, 1)),
        Op::Sum { .. } | Op::Spread => Some((0, 0)),
        Op::AttentionCached { .. } => Some((2, 1)),
        _ => None,
    }
}
