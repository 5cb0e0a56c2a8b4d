//! How the state of a model is divided among the ranks that have a stage, and what of it is in the host's memory.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::schedule::{Schedule, replicate, replicate_in_turn};

/// Who has what of weights, gradients and optimizer state. Levels are those of ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Sharding {
    /// What is divided by owners: 1 the optimizer state, 2 gradients too, 3 weights too.
    pub zero: u8,
    /// In which order gradients are added.
    pub sum: Sum,
    /// Where weights are updated.
    pub optimizer: Optimizer,
}

/// In which order the gradients of a step are added.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sum {
    /// Each replica adds its own, and then those of the replicas are added in order.
    #[default]
    Share,
    /// Microbatch by microbatch, whoever computes it: the order of one device, and so its bits.
    Microbatch,
}

/// Where AdamW's state is and weights are updated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Optimizer {
    /// On the devices that have the weights.
    #[default]
    Device,
    /// In the host's memory.
    Host,
}

impl Default for Sharding {
    fn default() -> Self {
        Sharding { zero: 1, sum: Sum::Share, optimizer: Optimizer::Device }
    }
}

impl Sharding {
    /// As it is meant: from level 2 on gradients are added by microbatch.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for a level that does not exist.
    pub fn new(zero: u8, sum: Sum, optimizer: Optimizer) -> Result<Sharding> {
        if !(1..=3).contains(&zero) {
            let message = format!(
                "{zero} is no level; write 1 (optimizer state), 2 (gradients too) or 3 (weights too)"
            );
            return Err(Error::config("mesh.zero", message));
        }
        let sum = if zero > 1 { Sum::Microbatch } else { sum };
        Ok(Sharding { zero, sum, optimizer })
    }

    /// Whether a gradient leaves its device with the microbatch that makes it.
    pub fn streams_gradients(&self) -> bool {
        self.sum == Sum::Microbatch
    }

    /// Whether a weight is on a device only while it is used.
    pub fn streams_weights(&self) -> bool {
        self.zero == 3
    }

    /// Whether the host updates weights.
    pub fn by_host(&self) -> bool {
        self.optimizer == Optimizer::Host
    }

    /// Several pipelines as one, their microbatches numbered so that sums wait for little: in turn where they are added in that
    /// order.
    ///
    /// # Errors
    ///
    /// Those of [`replicate`].
    pub fn replicate(&self, replicas: &[Schedule]) -> Result<Schedule> {
        if self.streams_gradients() { replicate_in_turn(replicas) } else { replicate(replicas) }
    }

    /// What is unusual of it, in words.
    pub fn words(&self) -> Option<String> {
        let what = match (self.zero, self.sum) {
            (1, Sum::Share) => None,
            (1, Sum::Microbatch) => Some("gradients are added microbatch by microbatch".to_string()),
            (2, _) => Some("ZeRO 2: gradients leave with each microbatch".to_string()),
            _ => {
                Some("ZeRO 3: weights come for each action, gradients leave with each microbatch".to_string())
            }
        };
        let place = self.by_host().then(|| "AdamW's state and the update in host memory".to_string());
        let all: Vec<String> = what.into_iter().chain(place).collect();
        (!all.is_empty()).then(|| all.join("; "))
    }

    /// Whether gradients and weights go by way of the host's memory; else from rank to rank.
    pub fn through_host(&self) -> bool {
        *self != Sharding::default()
    }
}
