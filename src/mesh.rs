//! How devices share a model, as data that planner, pipeline and files have in common.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// How the members of a gang divide every layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Division {
    /// The share of each, in proportion; one where a device has whole layers.
    pub shares: Vec<usize>,
    /// Whether each has also its share of the tokens of a microbatch, of what lies between the divided halves of blocks: sequence
    /// parallelism (Korthikanti et al. 2022, arXiv 2205.05198).
    pub sequence: bool,
}

impl Division {
    /// Each has its share of what is wide, and all of what lies between.
    pub fn of(shares: &[usize]) -> Division {
        Division { shares: shares.to_vec(), sequence: false }
    }

    /// A device has whole layers.
    pub fn none() -> Division {
        Division::of(&[1])
    }

    /// The shares in words, such as `5 : 3`.
    pub fn proportion(&self) -> String {
        let shares: Vec<String> = self.shares.iter().map(usize::to_string).collect();
        shares.join(" : ")
    }

    /// Members of a gang.
    pub fn members(&self) -> usize {
        self.shares.len()
    }

    /// How many gangs so many devices are.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] of `key` for devices that do not make whole gangs.
    pub fn gangs(&self, devices: usize, key: &str) -> Result<usize> {
        let members = self.members();
        if devices == 0 || !devices.is_multiple_of(members) {
            let message = format!(
                "gangs of {members} cannot be made of {devices} device{}; use a multiple of {members} (pipeline.devices, --devices)",
                if devices == 1 { "" } else { "s" }
            );
            return Err(Error::config(key, message));
        }
        Ok(devices / members)
    }

    /// Whether there is a gang at all.
    pub fn divides(&self) -> bool {
        self.shares.len() > 1
    }

    /// The tokens, of so many of a microbatch, that a member has of what lies between the divided halves: all where they cannot be
    /// divided.
    pub fn rows(&self, member: usize, tokens: usize) -> Range<usize> {
        match self.sequence && tokens >= self.members() {
            true => divide(tokens, &self.shares)[member].clone(),
            false => 0..tokens,
        }
    }
}

/// As what tensors travel between devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wire {
    /// As they are.
    #[default]
    F32,
    /// Rounded to bf16: activations, their gradients, and gradients of weights. Half of the bytes; sums are rounded once more.
    BF16,
}

impl Wire {
    /// Bytes as which so many of f32 travel: whole words.
    pub fn travelling(self, bytes: u64) -> u64 {
        match self {
            Wire::F32 => bytes,
            Wire::BF16 => bytes.div_ceil(8) * 4,
        }
    }

    /// Bytes of the buffers in which an end of a link rounds tensors of up to `bytes`.
    pub fn buffers(self, bytes: u64) -> u64 {
        match self {
            Wire::F32 => 0,
            Wire::BF16 => 3 * self.travelling(bytes).max(16),
        }
    }
}

/// Consecutive ranges of `total` in these proportions, none of them empty.
pub(crate) fn divide(total: usize, shares: &[usize]) -> Vec<Range<usize>> {
    let (sum, count) = (shares.iter().map(|&share| share as u128).sum::<u128>(), shares.len());
    let (mut start, mut before) = (0, 0u128);
    let range = |(number, &share): (usize, &usize)| {
        before += share as u128;
        let due = ((2 * total as u128 * before + sum) / (2 * sum)) as usize;
        let end = due.clamp(start + 1, total - (count - 1 - number));
        let range = start..end;
        start = end;
        range
    };
    shares.iter().enumerate().map(range).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_in_proportion_and_none_is_empty() {
        assert_eq!(divide(8, &[5, 3]), [0..5, 5..8]);
        assert_eq!(divide(3, &[1000, 1, 1]), [0..1, 1..2, 2..3]);
        assert_eq!(divide(3, &[1, 1, 1000]), [0..1, 1..2, 2..3]);
        let division = Division { shares: vec![5, 3], sequence: true };
        assert_eq!([0, 1].map(|member| division.rows(member, 8)), [0..5, 5..8]);
        assert_eq!(division.rows(1, 1), 0..1);
    }
}
