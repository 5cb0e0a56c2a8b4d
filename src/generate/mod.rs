//! Text from a trained model, over the same stages as training. Every stage keeps the keys and values of its blocks.
//!
//! Texts are continued in groups, one for each device, so that all stages have work: while a group's new tokens are in
//! one stage, another group's are in the next. Within a group the texts share every read of a weight. A prompt passes in
//! chunks of many tokens, and all chunks of all groups follow one another without a pause.
//!
//! Every stage keeps what it has seen of a text, and a prompt that begins like the text before it in the same place
//! passes only what is new: that is how a conversation goes on.

#[cfg(not(target_arch = "wasm32"))]
mod language;
mod sampling;

use std::collections::VecDeque;

#[cfg(not(target_arch = "wasm32"))]
pub use language::{Language, Loading};
pub use sampling::Sampling;

use crate::error::{Error, Result};
use crate::gpu::Device;
use crate::mesh::{Division, Wire};
use crate::model::{Model, ModelConfig};
use crate::pipeline::{Executor, Grow, Plan, Setup, Use, Watch};
use crate::plan::Sharding;
use crate::schedule;

/// Most tokens of a prompt that pass at a time.
const CHUNK: usize = 64;

/// How many texts, and how long.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// Texts that are continued together.
    pub texts: usize,
    /// Tokens of the longest prompt.
    pub prompt: usize,
    /// Tokens of the longest text, prompt included.
    pub tokens: usize,
}

impl Extent {
    /// Checks that a model sees prompts of this length.
    ///
    /// # Errors
    /// [`Error::Config`] for none, or one longer than the model's context.
    pub fn check(&self, config: &ModelConfig) -> Result<()> {
        if self.texts == 0 || self.prompt == 0 {
            return Err(Error::config("--prompt", "is empty; give at least one token"));
        }
        let longest = config.longest_sequence();
        if self.prompt > longest {
            let message =
                format!("has {} tokens, but the model sees at most {longest}; shorten it", self.prompt);
            return Err(Error::config("--prompt", message));
        }
        Ok(())
    }
}

/// A model ready to continue texts.
pub struct Generator {
    executor: Executor,
    groups: usize,
    /// Texts of a group.
    batch: usize,
    chunk: usize,
    capacity: usize,
    vocabulary: usize,
    /// For each place the tokens whose keys and values are in the caches.
    kept: Vec<Vec<u32>>,
}

/// A text on its way.
struct Text {
    tokens: Vec<u32>,
    prompt: usize,
    /// The first token that passes: those before it are in the caches.
    from: usize,
    done: bool,
    /// Of its last token, once known.
    logits: Vec<f32>,
}

impl Text {
    /// Chunks of the prompt that pass.
    fn chunks(&self, chunk: usize) -> usize {
        (self.prompt - self.from).div_ceil(chunk)
    }
}

/// What a call of [`Executor::grow`] was for.
enum Call {
    /// This chunk of the group's prompts.
    Chunk(usize),
    /// One token a text.
    Token,
}

impl Generator {
    /// Compiles a model for texts of this extent over these devices, one stage each,
    /// within `budgets`. Weights are zero until they are set through [`Generator::executor`].
    ///
    /// # Errors
    ///
    /// Those of [`Extent::check`] and of [`Plan::new`](crate::pipeline::Plan::new).
    pub fn launch(
        model: &Model,
        extent: Extent,
        devices: &[Device],
        budgets: Vec<Option<u64>>,
    ) -> Result<Generator> {
        Generator::launch_divided(model, extent, devices, budgets, &Division::none())
    }

    /// As [`Generator::launch`] over gangs, which divide every layer like this: neighbours among the devices.
    ///
    /// # Errors
    ///
    /// Besides, [`Error::Config`] for a number of devices that does not make whole gangs.
    pub fn launch_divided(
        model: &Model,
        extent: Extent,
        devices: &[Device],
        budgets: Vec<Option<u64>>,
        tensor: &Division,
    ) -> Result<Generator> {
        let stages = tensor.gangs(devices.len(), "--tensor")?;
        let config = model.config();
        extent.check(config)?;
        let longest = config.longest_sequence();
        let tokens = extent.tokens.clamp(extent.prompt, longest);
        let fits = |chunk: &usize| extent.prompt.next_multiple_of(*chunk) <= longest;
        let chunk = (1..=CHUNK.min(extent.prompt)).rev().find(fits).unwrap_or(1);
        let capacity = tokens.max(extent.prompt.next_multiple_of(chunk));
        let groups = stages.min(extent.texts);
        let batch = extent.texts.div_ceil(groups);
        let setup = Setup {
            model: config.clone(),
            adapter: model.adapter().cloned(),
            weights: model.weights(),
            logits: model.logits(),
            batch,
            sequence: chunk,
            schedule: schedule::generate("gpipe", stages, groups)?,
            cuts: None,
            shared: false,
            recompute: Vec::new(),
            sharding: Sharding::default(),
            tensor: tensor.clone(),
            wire: Wire::F32,
            host: None,
            purpose: Use::Decoding { capacity },
            budgets,
        };
        let executor = Executor::launch(Plan::within(setup, devices)?, devices)?;
        let (vocabulary, kept) = (config.vocabulary, vec![Vec::new(); groups * batch]);
        Ok(Generator { executor, groups, batch, chunk, capacity, vocabulary, kept })
    }

    /// The executor, for setting weights.
    pub fn executor(&mut self) -> &mut Executor {
        &mut self.executor
    }

    /// Forgets the texts before: what is kept of them belongs to other weights, where these have changed.
    pub fn forget(&mut self) {
        self.kept.iter_mut().for_each(Vec::clear);
    }

    /// For blocking on this generator's futures.
    pub fn watch(&self) -> Watch {
        self.executor.watch()
    }

    /// Continues every prompt by up to `count` tokens, or to the end of the caches. `each` hears every new token as
    /// (text, token) and says whether the text goes on; a token depends on the text before it, the sampling and the
    /// numbers of text and token alone. Logits past `vocabulary` are never drawn. What a prompt has in common with the
    /// text that was last in its place does not pass again.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for prompts beyond the extent and for tokens beyond the vocabulary; [`Error::Failed`] for logits
    /// that are not finite; those of a device.
    pub async fn run(
        &mut self,
        prompts: &[Vec<u32>],
        count: usize,
        sampling: Sampling,
        vocabulary: usize,
        mut each: impl FnMut(usize, u32) -> bool,
    ) -> Result<Vec<Vec<u32>>> {
        self.check(prompts)?;
        // What an error leaves in the caches is unknown.
        let mut kept = std::mem::take(&mut self.kept);
        self.kept.resize(kept.len(), Vec::new());
        let mut texts: Vec<Text> = (0..self.groups * self.batch)
            .map(|text| {
                // A group may have fewer texts than the others; an empty place repeats one token and is not heard.
                let tokens = prompts.get(text).cloned().unwrap_or_else(|| vec![0]);
                let done = text >= prompts.len() || count == 0;
                let from = self.common(&kept[text], &tokens);
                Text { prompt: tokens.len(), tokens, from, done, logits: Vec::new() }
            })
            .collect();
        let mut calls: VecDeque<(usize, Call)> = VecDeque::new();
        let mut number = 0;
        for group in 0..self.groups {
            let own = &texts[group * self.batch..][..self.batch];
            let chunks = own.iter().map(|text| text.chunks(self.chunk)).max().unwrap_or(1);
            for chunk in 0..chunks {
                self.executor.grow(self.prompt_chunk(group, chunk, number, own))?;
                calls.push_back((group, Call::Chunk(chunk)));
                number += 1;
            }
        }
        while let Some((group, call)) = calls.pop_front() {
            let (from, logits) = self.executor.logits().await?;
            debug_assert_eq!(from, group);
            let first = group * self.batch;
            for (row, logits) in logits.chunks(self.vocabulary).enumerate() {
                let text = &mut texts[first + row];
                let ends_here = match call {
                    Call::Chunk(chunk) => text.chunks(self.chunk) == chunk + 1,
                    Call::Token => true,
                };
                if ends_here && !text.done {
                    text.logits = logits[..vocabulary.min(logits.len())].to_vec();
                }
            }
            if calls.iter().any(|(other, _)| *other == group) {
                continue;
            }
            let waiting = texts[first..][..self.batch].iter_mut().enumerate().filter(|(_, text)| !text.done);
            for (row, text) in waiting {
                let at = first + row;
                if text.logits.iter().any(|logit| !logit.is_finite()) {
                    let what =
                        "its logits are not finite: its weights are damaged, or a device is wrong about them";
                    return Err(Error::failed(
                        "model",
                        format!("{what}; see whether `polystage verify` passes"),
                    ));
                }
                let token = sampling.pick(&text.logits, at as u64, text.tokens.len() as u64);
                text.tokens.push(token);
                let made = text.tokens.len() - text.prompt;
                text.done = !each(at, token) || made == count || text.tokens.len() > self.capacity;
            }
            let own = &texts[first..][..self.batch];
            if own.iter().any(|text| !text.done) {
                self.executor.grow(self.next_tokens(group, number, own))?;
                calls.push_back((group, Call::Token));
                number += 1;
            }
        }
        for (kept, text) in kept.iter_mut().zip(&texts) {
            // The last token was drawn and has passed no stage.
            let passed = text.tokens.len() - usize::from(text.tokens.len() > text.prompt);
            kept.clear();
            kept.extend_from_slice(&text.tokens[..passed]);
        }
        self.kept = kept;
        texts.truncate(prompts.len());
        Ok(texts.into_iter().map(|text| text.tokens).collect())
    }

    fn check(&self, prompts: &[Vec<u32>]) -> Result<()> {
        let refuse = |message: String| Err(Error::config("--prompt", message));
        if prompts.len() > self.groups * self.batch {
            return refuse(format!("{} prompts, {} at most", prompts.len(), self.groups * self.batch));
        }
        for prompt in prompts {
            if prompt.is_empty() || prompt.len().next_multiple_of(self.chunk) > self.capacity {
                return refuse(format!("a prompt of {} tokens does not fit {}", prompt.len(), self.capacity));
            }
            if let Some(token) = prompt.iter().find(|&&token| token as usize >= self.vocabulary) {
                return refuse(format!("token {token} is not in a vocabulary of {}", self.vocabulary));
            }
        }
        Ok(())
    }

    /// How many of a prompt's tokens need not pass: as many as are kept, but its last, whose logits are wanted, and but
    /// those that the last chunk must begin with to end within the caches.
    fn common(&self, kept: &[u32], tokens: &[u32]) -> usize {
        let common = kept.iter().zip(&tokens[..tokens.len() - 1]).take_while(|(a, b)| a == b).count();
        let chunks = (tokens.len() - common).div_ceil(self.chunk);
        common.min(self.capacity - chunks * self.chunk)
    }

    fn prompt_chunk(&self, group: usize, chunk: usize, number: usize, texts: &[Text]) -> Grow {
        let mut grow = Grow { group, number, tokens: Vec::new(), positions: Vec::new(), last: Vec::new() };
        for (row, text) in texts.iter().enumerate() {
            // A text with fewer chunks than another of its group repeats its last.
            let start = text.from + chunk.min(text.chunks(self.chunk) - 1) * self.chunk;
            for at in start..start + self.chunk {
                // What stands after a prompt's end is overwritten before anything looks at it.
                grow.tokens.push(text.tokens.get(at).copied().unwrap_or(0));
                grow.positions.push(at as u32);
            }
            let last = (text.prompt - 1).min(start + self.chunk - 1) - start;
            grow.last.push((row * self.chunk + last) as u32);
        }
        grow
    }

    fn next_tokens(&self, group: usize, number: usize, texts: &[Text]) -> Grow {
        // A text that has ended repeats its last token until its group has.
        let place = |text: &Text| (text.tokens.len() - 1).min(self.capacity - 1);
        Grow {
            group,
            number,
            tokens: texts.iter().map(|text| text.tokens[place(text)]).collect(),
            positions: texts.iter().map(|text| place(text) as u32).collect(),
            last: (0..texts.len() as u32).collect(),
        }
    }
}
