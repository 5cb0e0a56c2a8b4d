//! Which tokens each sequence of a text has.

use std::ops::Range;

use super::Corpus;
use crate::error::{Error, Result};
use crate::pipeline::{Batch, IGNORE};

/// The documents of a text that has records.
pub(super) fn documents(corpus: &Corpus) -> impl Iterator<Item = Range<usize>> {
    let starts = &corpus.documents;
    let ends = starts.iter().skip(1).copied().chain([corpus.len()]);
    starts.iter().zip(ends).map(|(&start, end)| start..end)
}

/// The documents in pieces of at most `sequence` + 1 tokens. One that is longer is cut into pieces that share a token,
/// so that every token but the first remains a target; pieces without a target are left out.
pub(super) fn pieces(corpus: &Corpus, sequence: usize) -> impl Iterator<Item = Range<usize>> {
    let cut = move |document: Range<usize>| {
        let starts = (document.start..document.end.saturating_sub(1)).step_by(sequence);
        starts.map(move |start| start..document.end.min(start.saturating_add(sequence).saturating_add(1)))
    };
    let pieces = documents(corpus).flat_map(cut);
    pieces.filter(|piece| corpus.trains(piece.start + 1..piece.end))
}

impl Corpus {
    /// Of the first record that has both: the tokens that lead to its first answer, at most `most` of them, and the answer.
    ///
    /// # Errors
    /// As [`Corpus::read`].
    pub fn question(&self, most: usize) -> Result<Option<(Vec<u32>, Vec<u32>)>> {
        let found = documents(self).find_map(|document| {
            let answer = self.trained_in(document.clone())?;
            let asked = document.start..answer.start;
            (1..=most).contains(&asked.len()).then_some((asked, answer))
        });
        let Some((asked, answer)) = found else { return Ok(None) };
        let read = |range: Range<usize>| {
            let mut tokens = vec![0; range.len()];
            self.read(range.start, &mut tokens).map(|()| tokens)
        };
        Ok(Some((read(asked)?, read(answer)?)))
    }
}

/// The sequences of a text, T + 1 tokens each.
#[derive(Debug)]
pub(super) enum Rows {
    /// Row i begins at token i * T.
    Even { count: usize, sequence: usize },
    /// Pieces of documents; `rows` holds the first piece of each row, and then how many there are.
    Packed { pieces: Vec<Range<usize>>, rows: Vec<usize> },
}

impl Rows {
    pub(super) fn new(corpus: &Corpus, sequence: usize) -> Result<Rows> {
        if corpus.is_masked() {
            return Rows::pack(corpus, sequence);
        }
        if corpus.len() <= sequence {
            return Err(Error::data(format!(
                "the text has {} tokens and one sequence of {sequence} needs {}; use more text or a shorter sequence",
                corpus.len(),
                sequence as u128 + 1
            )));
        }
        Ok(Rows::Even { count: (corpus.len() - 1) / sequence, sequence })
    }

    /// Next fit: a piece that has no room in the row begins another.
    pub(super) fn pack(corpus: &Corpus, sequence: usize) -> Result<Rows> {
        let (mut taken, mut rows, mut filled) = (Vec::new(), Vec::new(), usize::MAX);
        for piece in pieces(corpus, sequence) {
            if filled.saturating_add(piece.len()) > sequence.saturating_add(1) {
                rows.push(taken.len());
                filled = 0;
            }
            filled += piece.len();
            taken.push(piece);
        }
        if rows.is_empty() {
            return Err(Error::data("no record has anything to learn: completions and answers are empty"));
        }
        rows.push(taken.len());
        Ok(Rows::Packed { pieces: taken, rows })
    }

    /// Number of rows.
    pub(super) fn len(&self) -> usize {
        match self {
            Rows::Even { count, .. } => *count,
            Rows::Packed { rows, .. } => rows.len() - 1,
        }
    }

    /// What the model sees of a row, and what it should say: T inputs and targets.
    pub(super) fn example(&self, corpus: &Corpus, row: usize, sequence: usize) -> Result<Batch> {
        let mut tokens = vec![0; sequence + 1];
        self.read(corpus, row, &mut tokens)?;
        let inputs = tokens[..sequence].to_vec();
        self.mask(corpus, row, &mut tokens);
        Ok(Batch { inputs, targets: tokens.split_off(1), starts: self.starts(row, sequence) })
    }

    /// Where in its row the piece of each of its T inputs begins; empty if rows have no pieces.
    fn starts(&self, row: usize, sequence: usize) -> Vec<u32> {
        let Rows::Packed { pieces, rows } = self else { return Vec::new() };
        let mut starts = Vec::with_capacity(sequence + 1);
        for piece in &pieces[rows[row]..rows[row + 1]] {
            let start = starts.len();
            starts.resize(start + piece.len(), start as u32);
        }
        // Padding sees only itself.
        let start = starts.len();
        starts.resize(sequence.max(start), start as u32);
        starts.truncate(sequence);
        starts
    }

    /// The tokens of a row, padded.
    pub(super) fn read(&self, corpus: &Corpus, row: usize, out: &mut [u32]) -> Result<()> {
        match self {
            Rows::Even { sequence, .. } => corpus.read(row * sequence, out),
            Rows::Packed { pieces, rows } => {
                let mut at = 0;
                for piece in &pieces[rows[row]..rows[row + 1]] {
                    corpus.read(piece.start, &mut out[at..at + piece.len()])?;
                    at += piece.len();
                }
                out[at..].fill(corpus.padding);
                Ok(())
            }
        }
    }

    /// Overwrites those tokens of a row with [`IGNORE`] that do not count as targets; the first of a piece never does,
    /// since nothing before it leads to it.
    pub(super) fn mask(&self, corpus: &Corpus, row: usize, tokens: &mut [u32]) {
        if let Rows::Packed { pieces, rows } = self {
            let mut at = 0;
            for piece in &pieces[rows[row]..rows[row + 1]] {
                corpus.mask(piece.start, &mut tokens[at..at + piece.len()]);
                tokens[at] = IGNORE;
                at += piece.len();
            }
            tokens[at..].fill(IGNORE);
        }
    }
}
