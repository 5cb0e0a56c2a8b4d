//! Text from a trained model, over the same stages as training. Every stage keeps the keys and values of its blocks.
//!
//! Texts are continued in groups, one for each device, so that all stages have work: while a group's new tokens are in
//! one stage, another group's are in the next. Within a group the texts share every read of a weight. A prompt passes in
//! chunks of many tokens, and all chunks of all groups follow one another without a pause.

mod sampling;

use std::collections::VecDeque;

pub use sampling::Sampling;

use crate::error::{Error, Result};
#[cfg(not(target_arch = "wasm32"))]
use crate::folder::Tensors;
use crate::gpu::Device;
use crate::model::{Lora, ModelConfig};
use crate::pipeline::{Executor, Grow, Plan, Setup, Use, Watch};
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

/// A model ready to continue texts.
pub struct Generator {
    executor: Executor,
    groups: usize,
    /// Texts of a group.
    batch: usize,
    chunk: usize,
    capacity: usize,
    vocabulary: usize,
}

/// A text on its way.
struct Text {
    tokens: Vec<u32>,
    prompt: usize,
    done: bool,
    /// Of its last token, once known.
    logits: Vec<f32>,
}

/// What a call of [`Executor::grow`] was for.
enum Call {
    /// This chunk of the group's prompts.
    Chunk(usize),
    /// One token a text.
    Token,
}

impl Generator {
    /// Compiles a model, with an adapter if there is one, for texts of this extent over these devices, one stage each,
    /// within `budgets`. Weights are zero until [`Generator::load`], those of the adapter until
    /// [`Generator::load_adapter`].
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for texts longer than the model's context; those of [`Plan::new`].
    pub fn launch(
        config: &ModelConfig,
        adapter: Option<&Lora>,
        extent: Extent,
        devices: &[Device],
        budgets: Vec<Option<u64>>,
    ) -> Result<Generator> {
        let longest = config.longest_sequence();
        if extent.texts == 0 || extent.prompt == 0 {
            return Err(Error::config("--prompt", "is empty; give at least one token"));
        }
        if extent.prompt > longest {
            let message =
                format!("has {} tokens, but the model sees at most {longest}; shorten it", extent.prompt);
            return Err(Error::config("--prompt", message));
        }
        let tokens = extent.tokens.clamp(extent.prompt, longest);
        let fits = |chunk: &usize| extent.prompt.next_multiple_of(*chunk) <= longest;
        let chunk = (1..=CHUNK.min(extent.prompt)).rev().find(fits).unwrap_or(1);
        let capacity = tokens.max(extent.prompt.next_multiple_of(chunk));
        let groups = devices.len().min(extent.texts);
        let batch = extent.texts.div_ceil(groups);
        let setup = Setup {
            model: config.clone(),
            adapter: adapter.cloned(),
            batch,
            sequence: chunk,
            schedule: schedule::generate("gpipe", devices.len(), groups)?,
            cuts: None,
            recompute: Vec::new(),
            purpose: Use::Decoding { capacity },
            budgets,
        };
        let executor = Executor::launch(Plan::for_devices(setup, devices)?, devices)?;
        Ok(Generator { executor, groups, batch, chunk, capacity, vocabulary: config.vocabulary })
    }

    /// Sets the weights from a model folder's tensors, which must be exactly the model's.
    #[cfg(not(target_arch = "wasm32"))]
    pub async fn load(&mut self, tensors: &Tensors) -> Result<()> {
        self.executor.load(tensors).await
    }

    /// Sets the adapter's matrices from the tensors of an open adapter.
    #[cfg(not(target_arch = "wasm32"))]
    pub async fn load_adapter(&mut self, tensors: &Tensors) -> Result<()> {
        self.executor.load_adapter(tensors).await
    }

    /// For blocking on this generator's futures.
    pub fn watch(&self) -> Watch {
        self.executor.watch()
    }

    /// Continues every prompt by up to `count` tokens, or to the end of the caches. `each` hears every new token as
    /// (text, token) and says whether the text goes on; a token depends on the text before it, the sampling and the
    /// numbers of text and token alone. Logits past `vocabulary` are never drawn.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for prompts beyond the extent, for tokens beyond the vocabulary, and for logits that are not
    /// finite.
    pub async fn run(
        &mut self,
        prompts: &[Vec<u32>],
        count: usize,
        sampling: Sampling,
        vocabulary: usize,
        mut each: impl FnMut(usize, u32) -> bool,
    ) -> Result<Vec<Vec<u32>>> {
        self.check(prompts)?;
        let mut texts: Vec<Text> = (0..self.groups * self.batch)
            .map(|text| {
                // A group may have fewer texts than the others; an empty place repeats one token and is not heard.
                let tokens = prompts.get(text).cloned().unwrap_or_else(|| vec![0]);
                let done = text >= prompts.len() || count == 0;
                Text { prompt: tokens.len(), tokens, done, logits: Vec::new() }
            })
            .collect();
        let mut calls: VecDeque<(usize, Call)> = VecDeque::new();
        let mut number = 0;
        for group in 0..self.groups {
            let own = &texts[group * self.batch..][..self.batch];
            let longest = own.iter().map(|text| text.prompt).max().unwrap_or(1);
            for chunk in 0..longest.div_ceil(self.chunk) {
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
                    Call::Chunk(chunk) => (text.prompt - 1) / self.chunk == chunk,
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
                    return Err(Error::config("model", "its logits are not finite: the weights are damaged"));
                }
                let made = text.tokens.len() - text.prompt;
                let token = sampling.pick(&text.logits, at as u64, made as u64);
                text.tokens.push(token);
                text.done = !each(at, token) || made + 1 == count || text.tokens.len() > self.capacity;
            }
            let own = &texts[first..][..self.batch];
            if own.iter().any(|text| !text.done) {
                self.executor.grow(self.next_tokens(group, number, own))?;
                calls.push_back((group, Call::Token));
                number += 1;
            }
        }
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

    fn prompt_chunk(&self, group: usize, chunk: usize, number: usize, texts: &[Text]) -> Grow {
        let start = chunk * self.chunk;
        let mut grow = Grow { group, number, tokens: Vec::new(), positions: Vec::new(), last: Vec::new() };
        for (row, text) in texts.iter().enumerate() {
            for at in start..start + self.chunk {
                // What stands after a prompt's end is overwritten before anything looks at it.
                grow.tokens.push(text.tokens.get(at).copied().unwrap_or(0));
                grow.positions.push(at as u32);
            }
            let last = (text.prompt - 1).saturating_sub(start).min(self.chunk - 1);
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
