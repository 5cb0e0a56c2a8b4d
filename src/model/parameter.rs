//! Persistent tensors of a model.

use super::tensor::{Extent, Piece, Split, whole};
use super::{Weights, lora};
use crate::graph::DType;

/// How a parameter starts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Normal with this standard deviation.
    Normal(f64),
    /// Uniform between minus this and this.
    Uniform(f64),
    /// All zero.
    Zeros,
    /// All one.
    Ones,
}

/// One persistent tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    /// Hugging Face's name.
    pub name: String,
    /// Extents.
    pub shape: Vec<usize>,
    /// Start.
    pub init: Init,
    /// The parameter that owns this one's value, gradient sum and optimizer state: a second use of it elsewhere.
    pub tied_to: Option<String>,
    /// Never changes: no gradient, no optimizer state.
    pub frozen: bool,
    /// How devices store it.
    pub weights: Weights,
    /// How the members of a gang share it.
    pub split: Split,
    /// Of what it is a part, if it is one.
    pub piece: Option<Piece>,
}

impl Parameter {
    /// One that is trained, in f32, and whole wherever it is.
    pub fn new(name: impl Into<String>, shape: &[usize], init: Init) -> Self {
        Parameter {
            name: name.into(),
            shape: shape.to_vec(),
            init,
            tied_to: None,
            frozen: false,
            weights: Weights::F32,
            split: Split::Same,
            piece: None,
        }
    }

    /// The same, divided among the members of a gang along an axis.
    pub(super) fn along(self, axis: usize, extent: Extent) -> Self {
        self.split(Split::Along(axis, extent))
    }

    pub(super) fn split(self, split: Split) -> Self {
        Parameter { split, ..self }
    }

    /// What the device that it is at home on holds of its weight.
    pub fn stored(&self, training: bool) -> &'static [DType] {
        self.weights.stored(training && !self.frozen && self.tied_to.is_none())
    }

    /// Bytes of the weight that kernels read.
    pub fn weight_bytes(&self) -> u64 {
        if self.weights.packed() { DType::BF16.bytes(self.len()) } else { DType::F32.bytes(self.len()) }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Never: extents are positive.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it is one of an adapter's matrices, and not the base model's.
    pub fn is_lora(&self) -> bool {
        let name = whole(&self.name);
        name.ends_with(lora::A) || name.ends_with(lora::B)
    }

    /// Weight decay applies to tensors of two or more dimensions.
    pub fn decays(&self) -> bool {
        self.shape.len() >= 2
    }
}
