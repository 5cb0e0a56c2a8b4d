//! How the elements of matrices are stored.

use serde::{Deserialize, Serialize};

use crate::graph::DType;

/// How a device stores the matrices of a model: those of linear layers and the tables. Everything is computed in f32, and
/// gains, biases and the matrices of adapters are f32 always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Weights {
    /// In f32.
    #[default]
    #[serde(rename = "f32")]
    F32,
    /// As bf16, two elements in a word. A matrix that is trained has an f32 master beside it, which the optimizer updates
    /// and rounds.
    #[serde(rename = "bf16")]
    BF16,
    /// As bf16 without masters: the optimizer rounds each update, to the nearest, and one that is less than half of the
    /// last place of a weight is lost.
    #[serde(rename = "bf16-only")]
    BF16Only,
}

impl Weights {
    /// Whether two elements share a word.
    pub fn packed(self) -> bool {
        self != Weights::F32
    }

    /// What a device holds of a matrix, which the optimizer there `updates` or not.
    pub fn stored(self, updates: bool) -> &'static [DType] {
        match self {
            Weights::F32 => &[DType::F32],
            Weights::BF16 if updates => &[DType::F32, DType::BF16],
            Weights::BF16 | Weights::BF16Only => &[DType::BF16],
        }
    }

    /// The one that is called so in configs and on the command line.
    pub fn named(name: &str) -> Option<Weights> {
        [Weights::F32, Weights::BF16, Weights::BF16Only].into_iter().find(|weights| weights.name() == name)
    }

    /// What it is called there.
    pub fn name(self) -> &'static str {
        match self {
            Weights::F32 => "f32",
            Weights::BF16 => "bf16",
            Weights::BF16Only => "bf16-only",
        }
    }
}
