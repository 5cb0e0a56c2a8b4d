//! A text as tokens, laid end to end.

use std::fmt;
use std::ops::Range;
#[cfg(not(target_arch = "wasm32"))]
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::packing::{Rows, documents};
use crate::error::{Error, Result};
use crate::folder::Fingerprint;
use crate::folder::files::{Mapped, hex, sample};
use crate::pipeline::{Batch, IGNORE};

/// Tokens of one or more files, laid end to end.
#[derive(Clone)]
pub struct Corpus {
    /// Position of the first token of each part, ascending.
    starts: Vec<usize>,
    /// None empty.
    parts: Vec<Part>,
    len: usize,
    largest: u32,
    /// The tokens that count as targets, ascending and apart; None if all do.
    trained: Option<Vec<Range<usize>>>,
    /// Positions where a document begins, ascending; none in a text without records.
    pub(super) documents: Vec<usize>,
    /// What fills up sequences.
    pub(super) padding: u32,
    pub(super) skipped: Skipped,
}

/// A text of more tokens than all these pieces is judged by them, spread evenly.
const PIECE: usize = 1 << 20;
const PIECES: usize = 64;

/// Lines that were no records.
#[derive(Clone, Debug, Default)]
pub(super) struct Skipped {
    pub(super) count: usize,
    /// What was wrong with the first of them.
    pub(super) first: Vec<String>,
}

/// Records and what becomes of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// All of them.
    pub records: usize,
    /// Those that are longer than a sequence and cut into several.
    pub cut: usize,
    /// Those in which no token counts.
    pub without: usize,
    /// Tokens of the longest.
    pub longest: usize,
}

/// Where tokens lie.
pub(super) enum Bytes {
    /// In memory: nobody else can change them.
    Memory(Vec<u8>),
    /// In a file.
    File(Mapped),
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Bytes {
        Bytes::Memory(bytes)
    }
}

impl From<Mapped> for Bytes {
    fn from(file: Mapped) -> Bytes {
        Bytes::File(file)
    }
}

impl Bytes {
    fn len(&self) -> usize {
        match self {
            Bytes::Memory(bytes) => bytes.len(),
            Bytes::File(file) => file.len(),
        }
    }

    fn look<T>(&self, range: Range<usize>, look: impl FnOnce(&[u8]) -> T) -> Result<T> {
        match self {
            Bytes::Memory(bytes) => Ok(look(&bytes[range])),
            Bytes::File(file) => file.look(range, look),
        }
    }
}

/// Some of the tokens: little-endian numbers of 1, 2 or 4 bytes.
#[derive(Clone)]
pub(super) struct Part {
    bytes: Arc<Bytes>,
    /// Where in `bytes` the first token is.
    offset: usize,
    width: usize,
    /// Tokens.
    len: usize,
}

impl Part {
    /// The tokens of `bytes` from `offset` on, `width` bytes each.
    pub(super) fn new(bytes: impl Into<Bytes>, offset: usize, width: usize) -> Part {
        let bytes = bytes.into();
        let len = bytes.len().saturating_sub(offset) / width;
        Part { bytes: Arc::new(bytes), offset, width, len }
    }

    fn read(&self, start: usize, out: &mut [u32]) -> Result<()> {
        let start = self.offset + start * self.width;
        self.bytes.look(start..start + out.len() * self.width, |bytes| match self.width {
            1 => out.iter_mut().zip(bytes).for_each(|(token, &byte)| *token = byte.into()),
            2 => {
                let tokens = bytes.as_chunks().0.iter().map(|&bytes| u16::from_le_bytes(bytes));
                out.iter_mut().zip(tokens).for_each(|(out, token)| *out = token.into());
            }
            _ => {
                let tokens = bytes.as_chunks().0.iter().map(|&bytes| u32::from_le_bytes(bytes));
                out.iter_mut().zip(tokens).for_each(|(out, token)| *out = token);
            }
        })
    }
}

impl Corpus {
    /// The bytes of the files that `patterns` name, in their order, a token a byte. A pattern is a path or a glob; a
    /// relative one is tried against each folder of `bases` in turn and the first where a file matches wins. The matches
    /// of one pattern are sorted by path, a file that matched before is left out, and folders are skipped.
    ///
    /// The files are mapped, not copied: whoever reads tokens of one that has changed since gets an error.
    ///
    /// # Errors
    /// [`Error::Data`] naming the pattern: nothing matches, a match cannot be read or is no regular file, the glob is
    /// malformed; or all the files together are empty.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn open(patterns: &[String], bases: &[PathBuf]) -> Result<Corpus> {
        let mut corpus = Corpus::empty();
        for path in super::paths::find(patterns, bases)? {
            corpus.push(Part::new(map(&path)?, 0, 1), 255);
        }
        corpus.or_no_text(patterns)
    }

    /// A text that is already in memory, a token a byte.
    pub fn from_bytes(bytes: Vec<u8>) -> Corpus {
        let mut corpus = Corpus::empty();
        corpus.push(Part::new(bytes, 0, 1), 255);
        corpus
    }

    /// Records in memory: of each a question, and an answer, which alone counts; a token a byte.
    pub fn from_answers(records: impl IntoIterator<Item = (Vec<u8>, Vec<u8>)>) -> Corpus {
        let (mut bytes, mut documents, mut trained) = (Vec::new(), Vec::new(), Vec::new());
        for (question, answer) in records {
            documents.push(bytes.len());
            bytes.extend(question);
            let start = bytes.len();
            bytes.extend(answer);
            trained.push(start..bytes.len());
        }
        let mut corpus = Corpus::from_bytes(bytes);
        (corpus.documents, corpus.trained) = (documents, Some(trained));
        corpus
    }

    pub(super) fn empty() -> Corpus {
        Corpus {
            starts: Vec::new(),
            parts: Vec::new(),
            len: 0,
            largest: 0,
            trained: None,
            documents: Vec::new(),
            padding: 0,
            skipped: Skipped::default(),
        }
    }

    /// Appends tokens, of which `largest` is the largest or a bound of it.
    pub(super) fn push(&mut self, part: Part, largest: u32) {
        if part.len > 0 {
            self.starts.push(self.len);
            self.len += part.len;
            self.largest = self.largest.max(largest);
            self.parts.push(part);
        }
    }

    /// Says that only these tokens count.
    #[cfg(not(target_arch = "wasm32"))]
    pub(super) fn train_only(&mut self, trained: Vec<Range<usize>>) {
        self.trained = Some(trained);
    }

    #[cfg(not(target_arch = "wasm32"))]
    pub(super) fn or_no_text(self, patterns: &[String]) -> Result<Corpus> {
        if self.is_empty() {
            let message = format!("no text in {patterns:?}: name at least one file that is not empty");
            return Err(Error::data(message));
        }
        Ok(self)
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no token at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A model needs more rows in its embedding than this: the largest token, or for bytes the largest there can be.
    pub fn largest(&self) -> u32 {
        self.largest
    }

    /// Whether it has records, be it one.
    pub fn has_records(&self) -> bool {
        !self.documents.is_empty()
    }

    /// Whether some tokens do not count as targets.
    pub fn is_masked(&self) -> bool {
        self.trained.is_some()
    }

    /// Lines that were skipped because they are no records, and what was wrong with the first few.
    pub fn skipped(&self) -> (usize, &[String]) {
        (self.skipped.count, &self.skipped.first)
    }

    /// Copies the tokens `start..start + out.len()` to `out`, across the borders of files.
    ///
    /// # Errors
    /// [`Error::Changed`] with the file among those touched that is no longer as it was opened.
    ///
    /// # Panics
    /// If that range reaches past [`Corpus::len`].
    pub fn read(&self, start: usize, mut out: &mut [u32]) -> Result<()> {
        assert!(
            start <= self.len && out.len() <= self.len - start,
            "tokens {start}+{} of {}",
            out.len(),
            self.len
        );
        let first = self.starts.partition_point(|&s| s <= start).saturating_sub(1);
        let mut skip = start - self.starts.get(first).copied().unwrap_or(0);
        for part in &self.parts[first..] {
            let (now, later) = out.split_at_mut((part.len - skip).min(out.len()));
            part.read(skip, now)?;
            if later.is_empty() {
                break;
            }
            (out, skip) = (later, 0);
        }
        Ok(())
    }

    /// Whether any token of a range counts.
    pub(super) fn trains(&self, range: Range<usize>) -> bool {
        !range.is_empty() && (self.trained.is_none() || self.trained_in(range).is_some())
    }

    /// The first tokens of a range that count although others of the text do not.
    pub(super) fn trained_in(&self, range: Range<usize>) -> Option<Range<usize>> {
        let trained = self.trained.as_ref()?;
        let next = trained.get(trained.partition_point(|r| r.end <= range.start))?;
        (next.start < range.end).then(|| next.start.max(range.start)..next.end.min(range.end))
    }

    /// Overwrites those of the tokens `start..start + tokens.len()` that do not count with [`IGNORE`].
    pub(super) fn mask(&self, start: usize, tokens: &mut [u32]) {
        let Some(trained) = &self.trained else { return };
        let end = start + tokens.len();
        let mut at = start;
        let first = trained.partition_point(|range| range.end <= start);
        for range in trained[first..].iter().take_while(|range| range.start < end) {
            tokens[at - start..range.start.max(at) - start].fill(IGNORE);
            at = range.end.min(end);
        }
        tokens[at - start..].fill(IGNORE);
    }

    /// Cuts off the last part of the text, `fraction` of it, for validation; where it has records, at the beginning of
    /// one. The two share the files' maps; lines that were skipped are the first one's.
    ///
    /// # Errors
    /// [`Error::Data`] if the fraction is not between 0 and 1, or leaves nothing on one side.
    pub fn split(&self, fraction: f64) -> Result<(Corpus, Corpus)> {
        if !(fraction > 0.0 && fraction < 1.0) {
            return Err(Error::data(format!(
                "the part for validation is {fraction}; it must be above 0 and below 1"
            )));
        }
        let at = (self.len as f64 * (1.0 - fraction)) as usize;
        let document = self.documents.partition_point(|&start| start < at);
        let at = match self.documents.get(document) {
            Some(&start) => start,
            // Half a record has no question or no answer.
            None if self.is_masked() => self.len,
            None => at,
        };
        if at == 0 || at >= self.len {
            let message = format!(
                "{fraction} of {} tokens in {} documents leaves nothing to train or to validate; use more text or another part",
                self.len,
                self.documents.len().max(1)
            );
            return Err(Error::data(message));
        }
        let rest = Corpus { skipped: self.skipped.clone(), ..self.slice(0..at) };
        Ok((rest, self.slice(at..self.len)))
    }

    fn slice(&self, range: Range<usize>) -> Corpus {
        let mut corpus = Corpus { padding: self.padding, ..Corpus::empty() };
        let inside = |r: Range<usize>| {
            let (start, end) = (r.start.max(range.start), r.end.min(range.end));
            (start < end).then(|| start - range.start..end - range.start)
        };
        for (&start, part) in self.starts.iter().zip(&self.parts) {
            if let Some(kept) = inside(start..start + part.len) {
                let skip = kept.start + range.start - start;
                let offset = part.offset + skip * part.width;
                let part = Part { bytes: part.bytes.clone(), offset, width: part.width, len: kept.len() };
                corpus.push(part, self.largest);
            }
        }
        corpus.trained = self.trained.as_ref().map(|all| all.iter().cloned().filter_map(inside).collect());
        let documents = self.documents.iter().filter(|start| range.contains(start));
        corpus.documents = documents.map(|start| start - range.start).collect();
        if !self.documents.is_empty() && corpus.documents.first() != Some(&0) {
            corpus.documents.insert(0, 0);
        }
        corpus
    }

    /// What a model is evaluated on, in batches of one row of `length` tokens, filled up with padding.
    ///
    /// A text without records comes in consecutive windows that share no token; one token alone at the end is left out.
    /// The first token of a window has nothing before it and is no target.
    ///
    /// Records are packed as for training ([`Batches`](super::Batches)), so that each is judged by itself, whole unless it
    /// is longer than a row.
    ///
    /// Each row may fail as [`Corpus::read`].
    pub fn windows(&self, length: usize) -> Box<dyn ExactSizeIterator<Item = Result<Batch>> + '_> {
        let length = length.max(1);
        if self.has_records() {
            // Where nothing counts there are no rows.
            let Ok(rows) = Rows::pack(self, length) else { return Box::new(std::iter::empty()) };
            return Box::new((0..rows.len()).map(move |row| rows.example(self, row, length)));
        }
        let starts = (0..self.len.saturating_sub(1)).step_by(length);
        Box::new(starts.map(move |start| {
            let mut tokens = vec![0; length.min(self.len - start)];
            self.read(start, &mut tokens)?;
            let mut inputs = tokens.clone();
            inputs.resize(length, self.padding);
            self.mask(start, &mut tokens);
            let mut targets = tokens.split_off(1);
            targets.resize(length, IGNORE);
            Ok(Batch { inputs, targets, ..Batch::default() })
        }))
    }

    /// What becomes of records in sequences of so many tokens; none for a text without records.
    pub fn tally(&self, sequence: usize) -> Option<Tally> {
        let mut tally = Tally { records: self.documents.len(), ..Tally::default() };
        for document in documents(self) {
            tally.longest = tally.longest.max(document.len());
            let counts = document.len() > 1 && self.trains(document.start + 1..document.end);
            tally.without += usize::from(!counts);
            tally.cut += usize::from(counts && document.len() > sequence.saturating_add(1));
        }
        self.has_records().then_some(tally)
    }

    /// Entropy of the token frequencies, in nats a token: the loss of a model that has learnt how common each token is
    /// and nothing else. Of a text above 64 Mi tokens, 64 pieces of 1 Mi tokens spread evenly stand for the whole.
    ///
    /// # Errors
    /// As [`Corpus::read`].
    pub fn unigram_entropy(&self) -> Result<f64> {
        let (mut counts, mut tokens, mut seen) = (vec![0u64; self.largest as usize + 1], Vec::new(), 0.0);
        for piece in sample(self.len, PIECE, PIECES) {
            tokens.resize(piece.len(), 0);
            self.read(piece.start, &mut tokens)?;
            tokens.iter().for_each(|&token| counts[token as usize] += 1);
            seen += tokens.len() as f64;
        }
        let share = |count: u64| count as f64 / seen;
        Ok(counts.iter().filter(|&&c| c > 0).map(|&c| -share(c) * share(c).ln()).sum())
    }
}

impl fmt::Debug for Corpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Corpus").field("parts", &self.parts.len()).field("len", &self.len).finish()
    }
}

impl Corpus {
    /// Tells this text from others, by its tokens as little-endian numbers of four bytes each, by which of them count and,
    /// if not all do, where documents begin. Of more than 64 Mi tokens, 64 pieces of 1 Mi tokens spread evenly stand for the whole.
    ///
    /// # Errors
    /// Those of reading the text.
    pub fn fingerprint(&self) -> Result<Fingerprint> {
        let (mut sha256, mut tokens) = (Sha256::new(), Vec::new());
        for piece in sample(self.len, PIECE, PIECES) {
            tokens.resize(piece.len(), 0);
            self.read(piece.start, &mut tokens)?;
            tokens.iter_mut().for_each(|token| *token = token.to_le());
            sha256.update(bytemuck::cast_slice(&tokens));
        }
        let mut place = |at: usize| sha256.update((at as u64).to_le_bytes());
        self.trained
            .iter()
            .flatten()
            .for_each(|range| [range.start, range.end].into_iter().for_each(&mut place));
        if self.is_masked() {
            self.documents.iter().copied().for_each(&mut place);
        }
        Ok(Fingerprint { bytes: 4 * self.len as u64, sha256: hex(&sha256.finalize()) })
    }
}

/// Maps a file of data.
#[cfg(not(target_arch = "wasm32"))]
pub(super) fn map(path: &Path) -> Result<Mapped> {
    Mapped::open(path).map_err(|error| match error {
        Error::Checkpoint { path, message } => Error::data(format!("{} {message}", path.display())),
        other => other,
    })
}
