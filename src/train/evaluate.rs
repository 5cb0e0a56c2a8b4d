//! The loss on text that is not trained on.

use serde::Serialize;

use super::data::Corpus;
use crate::error::{Error, Result};
use crate::pipeline::{Batch, Executor, IGNORE};

/// How well a model predicts a text.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Evaluation {
    /// Mean over the tokens that count, in nats.
    pub loss: f64,
    /// exp(loss).
    pub perplexity: f64,
    /// Tokens that count.
    pub tokens: usize,
}

/// Mean loss over consecutive windows of `sequence` tokens ([`Corpus::windows`]), `sequences` of them at a time: as many
/// as a step of the executor's plan has. `each` hears how many windows are done.
///
/// # Errors
///
/// [`Error::Data`] where no token counts; those of [`Corpus::read`] and [`Executor::evaluate`].
pub async fn evaluate(
    executor: &mut Executor,
    corpus: &Corpus,
    sequences: usize,
    sequence: usize,
    mut each: impl FnMut(usize),
) -> Result<Evaluation> {
    let (mut total, mut tokens, mut done) = (0.0, 0, 0);
    let mut windows = corpus.windows(sequence).peekable();
    while windows.peek().is_some() {
        let (mut inputs, mut targets) = (Vec::new(), Vec::new());
        for window in windows.by_ref().take(sequences) {
            let window = window?;
            inputs.extend(window.inputs);
            targets.extend(window.targets);
            done += 1;
        }
        inputs.resize(sequences * sequence, 0);
        targets.resize(sequences * sequence, IGNORE);
        if targets.iter().any(|&target| target != IGNORE) {
            let (losses, counted) = executor.evaluate(Batch { inputs, targets }).await?;
            (total, tokens) = (total + losses, tokens + counted);
        }
        each(done);
    }
    if tokens == 0 {
        return Err(Error::data(format!(
            "no token can be predicted in {} tokens in windows of {sequence}; use more text or longer windows",
            corpus.len()
        )));
    }
    let loss = total / tokens as f64;
    Ok(Evaluation { loss, perplexity: loss.exp(), tokens })
}
