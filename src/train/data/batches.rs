//! Which tokens which step sees.

use serde::{Deserialize, Serialize};

use super::Corpus;
use super::packing::Rows;
use crate::error::{Error, Result};
use crate::pipeline::Batch;

/// The order in which the sequences of a text are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    /// Every sequence once an epoch, each epoch in another random order.
    Shuffled,
    /// From the first to the last, then again.
    Sequential,
}

/// Cuts a text into sequences and deals them out in batches. Sequence `i` of a text that counts everywhere is the tokens
/// `i*T ..= i*T + T`: T inputs, and the same shifted by one as targets. Records of which only parts count are packed:
/// as many whole ones as fit in T + 1 tokens, in their order, and what is left of a sequence has no targets. Records
/// that share a sequence do not see one another.
#[derive(Debug)]
pub struct Batches {
    corpus: Corpus,
    rows: Rows,
    batch: usize,
    sequence: usize,
    order: Order,
    seed: u64,
}

impl Batches {
    /// Batches of `batch` sequences of `sequence` + 1 tokens. A batch may be larger than the text: it wraps around.
    ///
    /// # Errors
    /// [`Error::Data`] when the text is shorter than one sequence, when nothing in it counts, or when `batch` or
    /// `sequence` is 0.
    pub fn new(corpus: Corpus, batch: usize, sequence: usize, order: Order, seed: u64) -> Result<Batches> {
        if batch == 0 || sequence == 0 {
            return Err(Error::data(format!("batch ({batch}) and sequence ({sequence}) must be at least 1")));
        }
        let rows = Rows::new(&corpus, sequence)?;
        Ok(Batches { corpus, rows, batch, sequence, order, seed })
    }

    /// Number of sequences in the text: the length of an epoch.
    pub fn sequences(&self) -> usize {
        self.rows.len()
    }

    /// The text.
    pub fn corpus(&self) -> &Corpus {
        &self.corpus
    }

    /// The tokens of step `step` (the first is 0): \[batch, sequence + 1\], row-major. Which of them count,
    /// [`Batches::examples`] says.
    ///
    /// # Errors
    /// As [`Corpus::read`].
    pub fn batch(&self, step: u64) -> Result<Vec<u32>> {
        let mut tokens = vec![0; self.batch * (self.sequence + 1)];
        for (row, out) in tokens.chunks_exact_mut(self.sequence + 1).enumerate() {
            self.rows.read(&self.corpus, self.at(step, row), out)?;
        }
        Ok(tokens)
    }

    /// The same tokens as inputs and targets, with [`IGNORE`](super::IGNORE) for those that do not count,
    /// and where the records begin that share sequences.
    ///
    /// # Errors
    /// As [`Corpus::read`].
    pub fn examples(&self, step: u64) -> Result<Batch> {
        let mut batch = Batch::default();
        for row in 0..self.batch {
            batch.extend(self.rows.example(&self.corpus, self.at(step, row), self.sequence)?);
        }
        Ok(batch)
    }

    /// The sequence that is row `row` of step `step`.
    fn at(&self, step: u64, row: usize) -> usize {
        let n = self.sequences() as u128;
        // In 128 bits, because a step near u64::MAX is absurd but not worth a panic.
        let index = step as u128 * self.batch as u128 + row as u128;
        let position = (index % n) as u64;
        let sequence = match self.order {
            Order::Sequential => position,
            Order::Shuffled => Permutation::new(n as u64, self.seed, (index / n) as u64).at(position),
        };
        sequence as usize
    }
}

/// A pseudo-random bijection of `0..n`, computed point by point, so that shuffling a text of any size takes no memory:
/// a four-round Feistel network over the next power of four, walked until it lands inside `0..n`.
struct Permutation {
    n: u64,
    half_bits: u32,
    keys: [u64; 4],
}

impl Permutation {
    fn new(n: u64, seed: u64, epoch: u64) -> Permutation {
        let bits = u64::BITS - (n - 1).leading_zeros();
        let key = mix(mix(seed).wrapping_add(epoch));
        let keys = [1, 2, 3, 4].map(|round| mix(key.wrapping_add(round)));
        Permutation { n, half_bits: bits.div_ceil(2).max(1), keys }
    }

    fn at(&self, mut index: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        // The network permutes a domain of fewer than 4n points (or 4): the walk along the cycle of a point below n
        // comes back below n, after fewer than four steps on average.
        loop {
            let (mut left, mut right) = (index >> self.half_bits, index & mask);
            for key in self.keys {
                (left, right) = (right, left ^ (mix(right ^ key) & mask));
            }
            index = left << self.half_bits | right;
            if index < self.n {
                return index;
            }
        }
    }
}

/// The finaliser of SplitMix64: a bijection in which every input bit changes about half of the output bits.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
