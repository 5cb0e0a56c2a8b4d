//! Text from a trained model: plain sampling over the same stages as training, without a key-value cache.

use std::path::Path;

use crate::error::{Error, Result};
use crate::gpu::Device;
use crate::model::init::philox;
use crate::model::{Model, ModelConfig};
use crate::ops::parameters::Part;
use crate::pipeline::{Executor, Plan, Setup, Use, Watch};
use crate::schedule;
use crate::train::checkpoint::Tensor;
use crate::train::trainer::find;

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

    /// The token for these logits; `position` numbers the draws, so that a sample depends on seed and position alone.
    pub fn pick(&self, logits: &[f32], position: u64) -> u32 {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        if self.temperature == 0.0 || order.len() < 2 {
            return order.first().map_or(0, |&t| t as u32);
        }
        if self.top_k > 0 {
            order.truncate(self.top_k);
        }
        let top = logits[order[0]] as f64;
        let weights: Vec<f64> =
            order.iter().map(|&t| ((logits[t] as f64 - top) / self.temperature).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut kept = 0.0;
        let mut count = 0;
        while count < weights.len() && kept < self.top_p * total {
            kept += weights[count];
            count += 1;
        }
        let words = philox(
            [position as u32, (position >> 32) as u32, 0x7361_6d70, 0],
            [self.seed as u32, (self.seed >> 32) as u32],
        );
        let mut left = (words[0] as f64 + 0.5) / 4_294_967_296.0 * kept;
        for (weight, &token) in weights[..count].iter().zip(&order) {
            left -= weight;
            if left <= 0.0 {
                return token as u32;
            }
        }
        order[count - 1] as u32
    }
}

/// A model ready to continue texts.
pub struct Generator {
    executor: Executor,
    sequence: usize,
}

impl Generator {
    /// Loads a model over these devices, one stage each, for texts whose last `sequence` tokens count. `path` is what
    /// errors name.
    pub async fn load(
        config: &ModelConfig,
        tensors: &[Tensor],
        path: &Path,
        sequence: usize,
        devices: &[Device],
    ) -> Result<Generator> {
        let setup = Setup {
            model: config.clone(),
            batch: 1,
            sequence,
            schedule: schedule::generate("gpipe", devices.len(), 1)?,
            cuts: None,
            recompute: Vec::new(),
            purpose: Use::Logits,
            budgets: devices.iter().map(|d| d.info().memory).collect(),
        };
        let model = Model::new(config)?;
        let mut executor = Executor::launch(Plan::for_devices(setup, devices)?, devices)?;
        for p in model.parameters().iter().filter(|p| p.tied_to.is_none()) {
            executor.write(&p.name, Part::Weight, find(tensors, &p.name, &p.shape, path)?).await?;
        }
        Ok(Generator { executor, sequence })
    }

    /// For blocking on this generator's futures.
    pub fn watch(&self) -> Watch {
        self.executor.watch()
    }

    /// Logits (V) of the token that follows `tokens`, of which the last `sequence` are seen.
    pub async fn logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        let seen = &tokens[tokens.len().saturating_sub(self.sequence)..];
        if seen.is_empty() {
            return Err(Error::config("--prompt", "is empty; give at least one character"));
        }
        // Attention is causal: what stands after the last token cannot change its logits.
        let mut padded = seen.to_vec();
        padded.resize(self.sequence, 0);
        let logits = self.executor.infer(padded, vec![seen.len() - 1]).await?;
        if logits.iter().any(|l| !l.is_finite()) {
            return Err(Error::config("model", "its logits are not finite: the weights are damaged"));
        }
        Ok(logits)
    }
}

#[cfg(test)]
mod tests {
    use super::Sampling;

    const ALL: Sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, seed: 3 };

    #[test]
    fn temperature_zero_takes_the_most_likely_and_ties_the_first() {
        let greedy = Sampling { temperature: 0.0, ..ALL };
        assert_eq!(greedy.pick(&[0.0, 3.0, 3.0, -1.0], 0), 1);
    }

    #[test]
    fn frequencies_follow_the_probabilities() {
        let logits = [0.0f32, 1.0, 2.0];
        let mut counts = [0.0f64; 3];
        for position in 0..20_000 {
            counts[ALL.pick(&logits, position) as usize] += 1.0 / 20_000.0;
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
            assert!(Sampling { top_k: 2, ..ALL }.pick(&logits, position) >= 2);
            assert_eq!(Sampling { top_p: 0.9, ..ALL }.pick(&logits, position), 3);
        }
    }
}
