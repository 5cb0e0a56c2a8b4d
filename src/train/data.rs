//! Training text as tokens, and the order in which it is read. A token is a byte (vocabulary 256), so there is nothing
//! to prepare: files are memory-mapped and read in place.
//!
//! Which tokens step `s` sees is a pure function of the seed and `s`. A resumed run therefore needs no loader state, and
//! every schedule and every cut of the model sees the same batches.

use std::fmt;
#[cfg(not(target_arch = "wasm32"))]
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

// --- the text ---------------------------------------------------------------------------------------------------------

/// A text of one or more files laid end to end. One token a byte; the token id is the byte's value.
pub struct Corpus {
    /// Position of the first token of each part, ascending.
    starts: Vec<usize>,
    /// The files' bytes, in order, none empty.
    parts: Vec<Box<dyn AsRef<[u8]> + Send + Sync>>,
    len: usize,
}

impl Corpus {
    /// Opens the files that `patterns` name, in their order. A pattern is a path or a glob; a relative one is tried
    /// against each folder of `bases` in turn and the first where a file matches wins. The matches of one pattern are
    /// sorted by path, a file that matched before is left out, and folders are skipped.
    ///
    /// The files are mapped, not copied: they must not be truncated while the run lasts.
    ///
    /// # Errors
    /// [`Error::Data`] naming the pattern: nothing matches, a match cannot be read or is no regular file, the glob is
    /// malformed; or all the files together are empty.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn open(patterns: &[String], bases: &[PathBuf]) -> Result<Corpus> {
        let mut corpus = Corpus { starts: Vec::new(), parts: Vec::new(), len: 0 };
        let mut seen = std::collections::HashSet::new();
        for pattern in patterns {
            for path in matches(pattern, bases)? {
                let unreadable = |e: std::io::Error| {
                    Error::data(format!("{pattern:?}: cannot read {}: {e}", path.display()))
                };
                if seen.insert(path.canonicalize().map_err(unreadable)?) {
                    let file = std::fs::File::open(&path).map_err(unreadable)?;
                    // SAFETY: the map is read-only, and bytes have no invalid values. The one thing that can go wrong
                    // is another program that truncates the file, which is why the contract above excludes it.
                    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(unreadable)?;
                    corpus.push(map);
                }
            }
        }
        if corpus.is_empty() {
            return Err(Error::data(format!(
                "no text in {patterns:?}: name at least one file that is not empty"
            )));
        }
        Ok(corpus)
    }

    /// A text that is already in memory.
    pub fn from_bytes(bytes: Vec<u8>) -> Corpus {
        let mut corpus = Corpus { starts: Vec::new(), parts: Vec::new(), len: 0 };
        corpus.push(bytes);
        corpus
    }

    fn push(&mut self, part: impl AsRef<[u8]> + Send + Sync + 'static) {
        let len = part.as_ref().len();
        if len > 0 {
            self.starts.push(self.len);
            self.parts.push(Box::new(part));
            self.len += len;
        }
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no token at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies the tokens `start..start + out.len()` to `out`, across the borders of files.
    ///
    /// # Panics
    /// If that range reaches past [`Corpus::len`].
    pub fn read(&self, start: usize, mut out: &mut [u32]) {
        assert!(
            start <= self.len && out.len() <= self.len - start,
            "tokens {start}+{} of {}",
            out.len(),
            self.len
        );
        let first = self.starts.partition_point(|&s| s <= start).saturating_sub(1);
        let mut skip = start - self.starts.get(first).copied().unwrap_or(0);
        for part in &self.parts[first..] {
            let bytes = &part.as_ref().as_ref()[skip..];
            let (now, later) = out.split_at_mut(bytes.len().min(out.len()));
            for (token, &byte) in now.iter_mut().zip(bytes) {
                *token = byte.into();
            }
            if later.is_empty() {
                return;
            }
            (out, skip) = (later, 0);
        }
    }

    /// Entropy of the token frequencies, in nats a token: the loss of a model that has learnt how common each byte is
    /// and nothing else. Of a text above 64 MiB, 64 pieces
    /// of 1 MiB spread evenly stand for the whole.
    pub fn unigram_entropy(&self) -> f64 {
        const PIECE: usize = 1 << 20;
        const PIECES: usize = 64;
        let mut counts = [0u64; 256];
        let mut count = |start: usize, len: usize| {
            let mut tokens = vec![0; len];
            self.read(start, &mut tokens);
            tokens.iter().for_each(|&t| counts[t as usize] += 1);
            len as f64
        };
        let seen: f64 = if self.len <= PIECE * PIECES {
            (0..self.len).step_by(PIECE).map(|s| count(s, PIECE.min(self.len - s))).sum()
        } else {
            (0..PIECES).map(|i| count((self.len - PIECE) / (PIECES - 1) * i, PIECE)).sum()
        };
        let share = |count: u64| count as f64 / seen;
        counts.iter().filter(|&&c| c > 0).map(|&c| -share(c) * share(c).ln()).sum()
    }
}

impl fmt::Debug for Corpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Corpus").field("files", &self.parts.len()).field("len", &self.len).finish()
    }
}

/// The regular files that one pattern names, sorted by path; at least one.
#[cfg(not(target_arch = "wasm32"))]
fn matches(pattern: &str, bases: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let (absolute, nowhere) = (Path::new(pattern).is_absolute(), [PathBuf::new()]);
    let bases = if absolute { &nowhere } else { bases };
    let mut folder = None;
    for base in bases {
        let mut files = Vec::new();
        for path in expand(pattern, base)? {
            let unreadable = |e| Error::data(format!("{pattern:?}: cannot read {}: {e}", path.display()));
            let kind = std::fs::metadata(&path).map_err(unreadable)?;
            if kind.is_dir() {
                folder = Some(path);
            } else if kind.is_file() {
                files.push(path);
            } else {
                // Opening a pipe would wait for a writer, and a device has no end.
                return Err(Error::data(format!(
                    "{pattern:?}: {} is not a regular file; copy what it yields to one",
                    path.display()
                )));
            }
        }
        if !files.is_empty() {
            files.sort();
            return Ok(files);
        }
    }
    Err(Error::data(match folder {
        Some(path) => format!(
            "{pattern:?} matches no file, only the folder {0}; write {1:?} for the files in it",
            path.display(),
            Path::new(pattern).join("*")
        ),
        None if absolute => format!("{pattern:?} matches no file; check the path"),
        None => {
            // The parent of a bare file name is "", and means the working directory.
            let name =
                |b: &PathBuf| if b.as_os_str().is_empty() { ".".into() } else { b.display().to_string() };
            let mut tried: Vec<String> = bases.iter().map(name).collect();
            tried.dedup();
            format!("{pattern:?} matches no file in {}; check the path", tried.join(" or "))
        }
    }))
}

/// Everything that the pattern matches below `base`, or nothing.
#[cfg(not(target_arch = "wasm32"))]
fn expand(pattern: &str, base: &Path) -> Result<Vec<PathBuf>> {
    // A file whose name merely looks like a glob ("notes[1].txt") is meant literally.
    let literal = base.join(pattern);
    if literal.symlink_metadata().is_ok() {
        return Ok(vec![literal]);
    }
    let folder = base.to_str().ok_or_else(|| {
        Error::data(format!("{pattern:?}: the folder {} is not valid UTF-8; rename it", base.display()))
    })?;
    let whole = Path::new(&glob::Pattern::escape(folder)).join(pattern);
    // As in a shell, `*` leaves out hidden files: nobody means to train on .DS_Store.
    let options = glob::MatchOptions { require_literal_leading_dot: true, ..glob::MatchOptions::new() };
    glob::glob_with(&whole.to_string_lossy(), options)
        .map_err(|e| Error::data(format!("{pattern:?} is not a valid glob: {}", e.msg)))?
        .map(|path| path.map_err(|e| Error::data(format!("{pattern:?}: {e}"))))
        .collect()
}

// --- the order --------------------------------------------------------------------------------------------------------

/// The order in which the sequences of a text are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    /// Every sequence once an epoch, each epoch in another random order.
    Shuffled,
    /// From the first to the last, then again.
    Sequential,
}

/// Cuts a text into sequences and deals them out in batches. Sequence `i` is the tokens `i*T ..= i*T + T`: T inputs,
/// and the same shifted by one as targets.
#[derive(Debug)]
pub struct Batches {
    corpus: Corpus,
    batch: usize,
    sequence: usize,
    order: Order,
    seed: u64,
}

impl Batches {
    /// Batches of `batch` sequences of `sequence` + 1 tokens. A batch may be larger than the text: it wraps around.
    ///
    /// # Errors
    /// [`Error::Data`] when the text is shorter than one sequence, or when `batch` or `sequence` is 0.
    pub fn new(corpus: Corpus, batch: usize, sequence: usize, order: Order, seed: u64) -> Result<Batches> {
        if batch == 0 || sequence == 0 {
            return Err(Error::data(format!("batch ({batch}) and sequence ({sequence}) must be at least 1")));
        }
        if corpus.len() <= sequence {
            return Err(Error::data(format!(
                "the text has {} tokens and one sequence of {sequence} needs {}; use more text or a shorter sequence",
                corpus.len(),
                sequence as u128 + 1
            )));
        }
        Ok(Batches { corpus, batch, sequence, order, seed })
    }

    /// Number of sequences in the text: the length of an epoch.
    pub fn sequences(&self) -> usize {
        (self.corpus.len() - 1) / self.sequence
    }

    /// The text.
    pub fn corpus(&self) -> &Corpus {
        &self.corpus
    }

    /// The tokens of step `step` (the first is 0): \[batch, sequence + 1\], row-major.
    pub fn batch(&self, step: u64) -> Vec<u32> {
        let n = self.sequences() as u128;
        let mut tokens = vec![0; self.batch * (self.sequence + 1)];
        for (row, out) in tokens.chunks_exact_mut(self.sequence + 1).enumerate() {
            // In 128 bits, because a step near u64::MAX is absurd but not worth a panic.
            let index = step as u128 * self.batch as u128 + row as u128;
            let position = (index % n) as u64;
            let sequence = match self.order {
                Order::Sequential => position,
                Order::Shuffled => Permutation::new(n as u64, self.seed, (index / n) as u64).at(position),
            };
            self.corpus.read(sequence as usize * self.sequence, out);
        }
        tokens
    }
}

/// A pseudo-random bijection of `0..n`, computed point by point, so that shuffling a text of any size takes no memory:
/// a four-round Feistel network over the next power of four, walked until it lands inside `0..n`.
struct Permutation {
    n: u64,
    half_bits: u32,
    keys: [u64; 4],
}

impl Permutation {
    fn new(n: u64, seed: u64, epoch: u64) -> Permutation {
        let bits = u64::BITS - (n - 1).leading_zeros();
        let key = mix(mix(seed).wrapping_add(epoch));
        let keys = [1, 2, 3, 4].map(|round| mix(key.wrapping_add(round)));
        Permutation { n, half_bits: bits.div_ceil(2).max(1), keys }
    }

    fn at(&self, mut index: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        // The network permutes a domain of fewer than 4n points (or 4): the walk along the cycle of a point below n
        // comes back below n, after fewer than four steps on average.
        loop {
            let (mut left, mut right) = (index >> self.half_bits, index & mask);
            for key in self.keys {
                (left, right) = (right, left ^ (mix(right ^ key) & mask));
            }
            index = left << self.half_bits | right;
            if index < self.n {
                return index;
            }
        }
    }
}

/// The finaliser of SplitMix64: a bijection in which every input bit changes about half of the output bits.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
