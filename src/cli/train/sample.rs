//! What the model that was trained makes of a text.

use super::job::Job;
use crate::cli::{note, print, speaking};
use crate::error::Result;
use crate::generate::{Language, Sampling};
use crate::gpu::Device;
use crate::text::{Isolation, Tokenizer};
use crate::train::checkpoint;
use crate::train::config::Config;
use crate::train::run::Run;
use crate::train::source::Pretrained;

/// Tokens of a text that the sample continues.
const PROMPT: usize = 32;
/// Tokens by which it does so at most.
const SAMPLE: usize = 32;
/// The same for an answer, which is worth reading to its end.
const ANSWER: usize = 128;
/// Both if a token is a byte.
const SAMPLE_BYTES: usize = 200;

/// What the model is asked to go on from.
pub(super) struct Beginning {
    tokens: Vec<u32>,
    /// What follows in the data, where it is a question.
    answer: Option<Vec<u32>>,
    /// Whether it was kept from training.
    held_out: bool,
    /// Tokens by which a sample continues it at most.
    more: usize,
}

impl Beginning {
    /// Of records a question with its answer, if there are any from those that are not trained on; else the beginning of
    /// the text. Half of what the model sees is left for what it adds.
    pub(super) fn new(job: &Job) -> Result<Beginning> {
        let room = (job.config.model.longest_sequence() / 2).max(1);
        let is_bytes = job.source.text.tokenizer.is_bytes();
        let corpus = job.batches.corpus();
        for (corpus, held_out) in [(job.source.valid.as_ref(), true), (Some(corpus), false)] {
            let found = corpus.map(|corpus| corpus.question(room)).transpose()?.flatten();
            if let Some((tokens, answer)) = found {
                let more = if is_bytes { SAMPLE_BYTES } else { ANSWER };
                return Ok(Beginning { tokens, answer: Some(answer), held_out, more: more.min(room) });
            }
        }
        let mut tokens = vec![0; corpus.len().min(PROMPT).min(room)];
        corpus.read(0, &mut tokens)?;
        let more = if is_bytes { SAMPLE_BYTES } else { SAMPLE };
        Ok(Beginning { tokens, answer: None, held_out: false, more })
    }

    /// What the model has made of it, in lines.
    fn show(&self, tokenizer: &Tokenizer, made: &str) -> Result<String> {
        let lines =
            |head: &str, text: &str| format!("{head:<9}{}", text.trim_end().replace('\n', "\n         "));
        let asked = tokenizer.decode(&self.tokens)?;
        let Some(answer) = &self.answer else { return Ok(lines("sample", &(asked + made))) };
        let of = if self.held_out { "a held-out record" } else { "a record that was trained on" };
        let said = [
            lines("question", &format!("of {of}:\n{}", asked.trim())),
            lines("expected", tokenizer.decode(answer)?.trim()),
            lines("answer", made.trim()),
        ];
        Ok(said.join("\n"))
    }
}

/// Lets the model speak that was trained. The run is done and kept, so there may be no sample.
pub(super) fn sample(
    run: &Run,
    isolation: &Isolation,
    config: &Config,
    beginning: &Beginning,
    devices: &[Device],
    budgets: Vec<Option<u64>>,
) -> Result<()> {
    let made = checkpoint::latest(run.path()).and_then(|path| {
        let Some(path) = path else { return Ok(None) };
        // What is compared with an expected answer should not depend on luck.
        let temperature = if beginning.answer.is_some() { 0.0 } else { 0.8 };
        let sampling = Sampling { temperature, top_k: 40, top_p: 1.0, seed: 1 };
        let language = Language::new(Pretrained::open(&path)?, isolation)?;
        let language = language.with_weights(config.train.weights);
        let (prompt, count) = (&beginning.tokens, beginning.more);
        let made = speaking::sample(&language, prompt, count, sampling, devices, budgets)?;
        beginning.show(language.tokenizer(), &made).map(Some)
    });
    match made {
        Ok(Some(text)) => print(text),
        Ok(None) => Ok(()),
        Err(error) => {
            note(format!("note: there is no sample: {error}"));
            Ok(())
        }
    }
}
