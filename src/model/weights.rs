//! How the elements of matrices are stored.

use serde::{Deserialize, Serialize};

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
}
