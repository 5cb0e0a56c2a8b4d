//! The loss on text that is not trained on.

use serde::Serialize;

use super::data::Corpus;
use crate::error::{Error, Result};
use crate::pipeline::{Batch, Executor};

/// How well a model predicts a text.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Evaluation {
    /// Mean over the tokens that count, in nats.
    pub loss: f64,
    /// exp(loss).
    pub perplexity: f64,
    /// Tokens that count.
    pub tokens: usize,
    /// Records that were evaluated, each by itself; none for a text without records.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub records: Option<usize>,
    /// Records that were cut because they are longer than a row.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cut: Option<usize>,
}

/// Mean loss over the rows of `sequence` tokens that a text is evaluated in ([`Corpus::windows`]), `sequences` of them at
/// a time: as many as a step of the executor's plan has. `each` hears how many rows are done.
///
/// # Errors
///
/// [`Error::Data`] where no token counts; [`Error::Failed`] where the loss is no finite number; those of [`Corpus::read`] and [`Executor::evaluate`].
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
        let mut batch = Batch::default();
        for window in windows.by_ref().take(sequences) {
            batch.extend(window?);
            done += 1;
        }
        batch.fill(sequences * sequence);
        if batch.counted() > 0 {
            let (losses, counted) = executor.evaluate(batch).await?;
            (total, tokens) = (total + losses, tokens + counted);
        }
        each(done);
    }
    if tokens == 0 {
        let what = match corpus.has_records() {
            true => "no record has an answer or another token that counts; give others".to_string(),
            false => format!(
                "no token can be predicted in {} tokens in windows of {sequence}; use more text or longer windows",
                corpus.len()
            ),
        };
        return Err(Error::data(what));
    }
    let loss = total / tokens as f64;
    if !loss.is_finite() {
        let what = format!("the loss is {loss}: the weights are damaged, or have grown beyond all numbers");
        return Err(Error::failed("evaluation", format!("{what}; go on from an earlier checkpoint")));
    }
    let tally = corpus.tally(sequence);
    Ok(Evaluation {
        loss,
        perplexity: loss.exp(),
        tokens,
        records: tally.map(|tally| tally.records - tally.without),
        cut: tally.map(|tally| tally.cut),
    })
}
