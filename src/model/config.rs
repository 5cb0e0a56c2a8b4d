//! The extents of a model, and what each family takes where one is not given.

use serde::{Deserialize, Serialize};

use super::rope::RopeScaling;
use crate::error::{Error, Result};

/// Architecture families.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// GPT-2: learned positions, LayerNorm before each half, GELU, causal attention, head tied to the embedding.
    #[default]
    Gpt2,
    /// The same without attention: each position sees only its own token. A baseline and a small test model.
    Mlp,
    /// Llama 2 and 3, SmolLM2 and others: rotary positions, RMSNorm, SwiGLU, grouped-query attention, no biases.
    Llama,
    /// Llama with a bias on queries, keys and values (Qwen2, Qwen2.5).
    Qwen2,
    /// Llama with RMSNorm on each head of queries and keys (Qwen3).
    Qwen3,
    /// Llama by another name, for sequences inside the sliding window (Mistral).
    Mistral,
}

impl Kind {
    /// Whether it is built like Llama.
    pub fn is_llama(self) -> bool {
        matches!(self, Kind::Llama | Kind::Qwen2 | Kind::Qwen3 | Kind::Mistral)
    }
}

/// Most elements of a matrix, and about as many of all blocks: several times those of models that are known. The host
/// keeps lists of their pieces.
const MOST_OF_A_MATRIX: u64 = 1 << 32;
const MOST_OF_ALL: u64 = 1 << 38;

/// Extents of a model: the `[model]` table of a config file. What is none has the family's value, given by the method
/// of the same name.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Family.
    pub kind: Kind,
    /// Transformer blocks.
    pub layers: usize,
    /// C.
    pub width: usize,
    /// H.
    pub heads: usize,
    /// Longest sequence, P.
    pub context: usize,
    /// V.
    pub vocabulary: usize,
    /// Key-value heads, K; divides H.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_heads: Option<usize>,
    /// Elements of a head, D.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<usize>,
    /// Width inside the feed-forward half.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub intermediate: Option<usize>,
    /// What is added to the variance in norms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub norm_epsilon: Option<f64>,
    /// Whether the head's weight is the embedding's table.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tied_head: Option<bool>,
    /// Standard deviation of initial weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initializer_range: Option<f64>,
    /// Tokens that a query sees. It is not computed, so a sequence may not be longer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sliding_window: Option<usize>,
    /// Base of the rotary frequencies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_theta: Option<f64>,
    /// How the rotary frequencies were changed for longer contexts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeScaling>,
}

impl ModelConfig {
    /// K; every query head has its own unless it is given.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads.unwrap_or(self.heads)
    }

    /// D; the heads share the width unless it is given.
    pub fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(self.width / self.heads.max(1))
    }

    /// Width inside the feed-forward half: four times the width, and for Llama's three matrices two thirds of that,
    /// rounded up to a multiple of 64.
    pub fn intermediate(&self) -> usize {
        // A width that no model has is refused later, by name.
        let width = self.width.min(1 << 24);
        let usual = match self.kind.is_llama() {
            true => (8 * width).div_ceil(3).next_multiple_of(64),
            false => 4 * width,
        };
        self.intermediate.unwrap_or(usual)
    }

    /// What is added to the variance in norms: 1e-5 for GPT-2, 1e-6 for Llama.
    pub fn norm_epsilon(&self) -> f64 {
        self.norm_epsilon.unwrap_or(if self.kind.is_llama() { 1e-6 } else { 1e-5 })
    }

    /// Whether the head's weight is the embedding's table: it is GPT-2's, and not Llama's.
    pub fn tied_head(&self) -> bool {
        self.tied_head.unwrap_or(!self.kind.is_llama())
    }

    /// Standard deviation of initial weights: 0.02.
    pub fn initializer_range(&self) -> f64 {
        self.initializer_range.unwrap_or(0.02)
    }

    /// Base of the rotary frequencies: 10,000.
    pub fn rope_theta(&self) -> f64 {
        self.rope_theta.unwrap_or(10_000.0)
    }

    /// The longest sequence that is computed as the model means it.
    pub fn longest_sequence(&self) -> usize {
        self.context.min(self.sliding_window.unwrap_or(self.context))
    }

    /// The same model with every option that says what the family has anyway left out, so that equal models are equal.
    pub fn canonical(&self) -> ModelConfig {
        let mut c = self.clone();
        let usual = |option: &mut Option<usize>, value: usize| *option = option.filter(|&x| x != value);
        usual(&mut c.kv_heads, self.heads);
        if self.width.is_multiple_of(self.heads.max(1)) {
            usual(&mut c.head_dim, self.width / self.heads.max(1));
        }
        let plain = ModelConfig { kind: c.kind, width: c.width, ..Default::default() };
        usual(&mut c.intermediate, plain.intermediate());
        // Shaders compute with f32, and so did the numbers in some files.
        let near =
            |option: &mut Option<f64>, value: f64| *option = option.filter(|&x| x as f32 != value as f32);
        near(&mut c.norm_epsilon, plain.norm_epsilon());
        near(&mut c.initializer_range, plain.initializer_range());
        near(&mut c.rope_theta, plain.rope_theta());
        c.tied_head = c.tied_head.filter(|&x| x != plain.tied_head());
        c.sliding_window = c.sliding_window.filter(|&x| x < self.context);
        c
    }

    /// Refuses what no model can have, naming the key.
    pub(super) fn check(&self) -> Result<()> {
        let refuse = |key: &str, message: String| Err(Error::config(format!("model.{key}"), message));
        // Far above any model that is known, far below what overflows a size in bytes.
        for (key, value, most) in [
            ("layers", self.layers, 1024),
            ("width", self.width, 1 << 17),
            ("heads", self.heads, 1 << 17),
            ("context", self.context, 1 << 22),
            ("vocabulary", self.vocabulary, 1 << 24),
            ("kv_heads", self.kv_heads(), 1 << 17),
            ("head_dim", self.head_dim.unwrap_or(1), 1 << 12),
            ("intermediate", self.intermediate(), 1 << 19),
            ("sliding_window", self.sliding_window.unwrap_or(1), 1 << 22),
        ] {
            if value == 0 || value > most {
                return refuse(key, format!("{value} is out of range; it must be between 1 and {most}"));
            }
        }
        if self.head_dim.is_none() && !self.width.is_multiple_of(self.heads) {
            let message = format!("{} heads do not divide the width {}", self.heads, self.width);
            return refuse("heads", message);
        }
        let attention = self.heads * self.head_dim();
        for (key, rows) in [
            ("vocabulary", self.vocabulary),
            ("context", if self.kind.is_llama() { 1 } else { self.context }),
            ("heads", attention),
            ("intermediate", self.intermediate()),
        ] {
            if rows as u64 * self.width as u64 > MOST_OF_A_MATRIX {
                let message = format!(
                    "{rows} rows of model.width = {} are more than the {MOST_OF_A_MATRIX} elements that a matrix may have",
                    self.width
                );
                return refuse(key, message);
            }
        }
        let block = self.width as u64 * (4 * attention as u64 + 3 * self.intermediate() as u64);
        if self.layers as u64 * block > MOST_OF_ALL {
            let message = format!("{} of this size have more than {MOST_OF_ALL} parameters", self.layers);
            return refuse("layers", message);
        }
        for (key, value, least, most) in [
            ("norm_epsilon", self.norm_epsilon(), 1e-30, 1.0),
            ("initializer_range", self.initializer_range(), 0.0, 1e3),
            ("rope_theta", self.rope_theta(), 1.0, 1e12),
        ] {
            if !(least..=most).contains(&value) {
                return refuse(key, format!("{value:e} must be between {least:e} and {most:e}"));
            }
        }
        if !self.kind.is_llama() {
            for (key, given) in [
                ("kv_heads", self.kv_heads() != self.heads),
                ("head_dim", self.head_dim() != self.width / self.heads),
                ("sliding_window", self.sliding_window.is_some()),
                ("rope_theta", self.rope_theta.is_some()),
                ("rope_scaling", self.rope_scaling.is_some()),
            ] {
                if given {
                    return refuse(
                        key,
                        format!("does not exist in the family {:?}; leave it out", self.kind),
                    );
                }
            }
            return Ok(());
        }
        if !self.heads.is_multiple_of(self.kv_heads()) {
            let message = format!("{} does not divide the {} query heads", self.kv_heads(), self.heads);
            return refuse("kv_heads", message);
        }
        if !self.head_dim().is_multiple_of(2) {
            return refuse("head_dim", format!("{} is odd; rotary positions turn pairs", self.head_dim()));
        }
        match self.rope_scaling.and_then(|scaling| scaling.mistake()) {
            Some(mistake) => refuse("rope_scaling", mistake.into()),
            None => Ok(()),
        }
    }
}
