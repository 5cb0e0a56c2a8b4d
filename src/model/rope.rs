//! Rotary position embedding: the angles of each position, with the rounding that transformers has.

use serde::{Deserialize, Serialize};

/// How a model's frequencies were changed for longer contexts; the names are those of Hugging Face's `rope_scaling`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "lowercase", deny_unknown_fields)]
pub enum RopeScaling {
    /// All frequencies divided by `factor` (Chen et al. 2023, arXiv 2306.15595).
    Linear {
        /// How many times longer the context became.
        factor: f64,
    },
    /// Low frequencies divided by `factor`, high ones kept, those between blended (Llama 3.1, arXiv 2407.21783).
    Llama3 {
        /// How many times longer the context became.
        factor: f64,
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are high frequencies.
        high_freq_factor: f64,
        /// The context of the first training.
        original_max_position_embeddings: usize,
    },
}

impl RopeScaling {
    /// What is wrong with the numbers, if anything is.
    pub(super) fn mistake(&self) -> Option<&'static str> {
        let positive = |x: f64| x > 0.0 && x.is_finite();
        match *self {
            RopeScaling::Linear { factor } => (!positive(factor)).then_some("factor must be positive"),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: original,
            } => {
                let ok = positive(factor) && positive(low) && positive(high) && low < high && original > 0;
                (!ok).then_some("its numbers must be positive, and low_freq_factor below high_freq_factor")
            }
        }
    }
}

/// The D/2 frequencies in radians a token. Every step rounds to f32 as transformers' does, since a position multiplies
/// what is lost here.
pub fn frequencies(theta: f64, size: usize, scaling: Option<RopeScaling>) -> Vec<f32> {
    let plain = (0..size / 2).map(|i| {
        let exponent = (2 * i) as f32 / size as f32;
        1.0 / (theta as f32 as f64).powf(exponent as f64) as f32
    });
    plain
        .map(|frequency| match scaling {
            None => frequency,
            Some(RopeScaling::Linear { factor }) => frequency / factor as f32,
            Some(RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            }) => {
                let original = original_max_position_embeddings as f64;
                // PyTorch divides a number by a tensor by way of the reciprocal.
                let wavelength = frequency.recip() * std::f64::consts::TAU as f32;
                if wavelength < (original / high_freq_factor) as f32 {
                    frequency
                } else if wavelength > (original / low_freq_factor) as f32 {
                    frequency / factor as f32
                } else {
                    let smooth = (wavelength.recip() * original as f32 - low_freq_factor as f32)
                        / (high_freq_factor - low_freq_factor) as f32;
                    (1.0 - smooth) * frequency / factor as f32 + smooth * frequency
                }
            }
        })
        .collect()
}

/// The table (positions, D) of [`crate::graph::Op::Rope`]: for each position D/2 cosines, then D/2 sines. Made here and
/// not on a device, where sines of large angles are not exact.
pub fn table(positions: usize, frequencies: &[f32]) -> Vec<f32> {
    let mut table = Vec::with_capacity(2 * positions * frequencies.len());
    for position in 0..positions {
        let angle = |frequency: &f32| (position as f32 * frequency) as f64;
        table.extend(frequencies.iter().map(|f| angle(f).cos() as f32));
        table.extend(frequencies.iter().map(|f| angle(f).sin() as f32));
    }
    table
}
