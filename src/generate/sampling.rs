//! How the next token is chosen.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::error::{Error, Result};
use crate::model::init::philox;

/// How the next token is chosen.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f64,
    /// Only the k most likely tokens; 0 for all.
    pub top_k: usize,
    /// Only the most likely tokens that together have this probability; 1 for all.
    pub top_p: f64,
    /// Seed of the choice.
    pub seed: u64,
}

impl Sampling {
    /// Checks the ranges.
    pub fn check(&self) -> Result<()> {
        if !(0.0..=100.0).contains(&self.temperature) {
            return Err(Error::config("--temperature", "must be between 0 and 100"));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(Error::config("--top-p", "must be above 0 and at most 1"));
        }
        Ok(())
    }

    /// The token for these logits. `text` and `position` number the draws, so that a choice depends on them, the seed and
    /// the logits alone.
    pub fn pick(&self, logits: &[f32], text: u64, position: u64) -> u32 {
        let likelier = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        let mut tokens: Vec<u32> = (0..logits.len() as u32).collect();
        let top = tokens.iter().copied().min_by(likelier).unwrap_or(0);
        if self.temperature == 0.0 || tokens.len() < 2 {
            return top;
        }
        if self.top_k > 0 && self.top_k < tokens.len() {
            tokens.select_nth_unstable_by(self.top_k, likelier);
            tokens.truncate(self.top_k);
            tokens.sort_unstable();
        }
        let highest = logits[top as usize] as f64;
        let weight = |token: u32| ((logits[token as usize] as f64 - highest) / self.temperature).exp();
        let total: f64 = tokens.iter().map(|&token| weight(token)).sum();
        // A heap gives the likeliest of a large vocabulary without sorting all.
        let mut heap: BinaryHeap<(i32, Reverse<u32>)> =
            tokens.into_iter().map(|token| (ordered(logits[token as usize]), Reverse(token))).collect();
        let mut likely = std::iter::from_fn(|| heap.pop().map(|(_, Reverse(token))| (weight(token), token)));
        let words = philox(
            [position as u32, (position >> 32) as u32, 0x7361_6d70, text as u32],
            [self.seed as u32, (self.seed >> 32) as u32],
        );
        let draw = (words[0] as f64 + 0.5) / 4_294_967_296.0;
        if self.top_p == 1.0 {
            return at(likely, draw * total);
        }
        let (mut nucleus, mut kept) = (Vec::new(), 0.0);
        while kept < self.top_p * total
            && let Some((weight, token)) = likely.next()
        {
            kept += weight;
            nucleus.push((weight, token));
        }
        at(nucleus.into_iter(), draw * kept)
    }
}

/// The token at which the sum of the weights reaches `sum`; the last if rounding keeps it below.
fn at(weights: impl Iterator<Item = (f64, u32)>, mut sum: f64) -> u32 {
    let mut last = 0;
    for (weight, token) in weights {
        last = token;
        sum -= weight;
        if sum <= 0.0 {
            break;
        }
    }
    last
}

/// An integer that compares as [`f32::total_cmp`] does.
fn ordered(x: f32) -> i32 {
    let bits = x.to_bits() as i32;
    bits ^ ((bits >> 31) as u32 >> 1) as i32
}

#[cfg(test)]
mod tests {
    use super::Sampling;

    const ALL: Sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, seed: 3 };

    #[test]
    fn temperature_zero_takes_the_most_likely_and_ties_the_first() {
        let greedy = Sampling { temperature: 0.0, ..ALL };
        assert_eq!(greedy.pick(&[0.0, 3.0, 3.0, -1.0], 0, 0), 1);
    }

    #[test]
    fn frequencies_follow_the_probabilities() {
        let logits = [0.0f32, 1.0, 2.0];
        let mut counts = [0.0f64; 3];
        for position in 0..20_000 {
            counts[ALL.pick(&logits, 0, position) as usize] += 1.0 / 20_000.0;
        }
        let total: f64 = logits.iter().map(|l| (*l as f64).exp()).sum();
        for (count, logit) in counts.iter().zip(logits) {
            // Four standard deviations of 20,000 draws are below 0.015.
            assert!((count - (logit as f64).exp() / total).abs() < 0.015);
        }
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let logits = [0.0f32, 1.0, 2.0, 5.0];
        for position in 0..500 {
            assert!(Sampling { top_k: 2, ..ALL }.pick(&logits, 0, position) >= 2);
            assert_eq!(Sampling { top_p: 0.9, ..ALL }.pick(&logits, 0, position), 3);
        }
    }
}
