//! Training text as tokens, and the order in which it is read. Text of bytes (vocabulary 256) and token files are
//! memory-mapped and read in place; what has to be tokenised is, once, at one to four bytes a token.
//!
//! Which tokens step `s` sees is a pure function of the seed and `s`. A resumed run therefore needs no loader state, and
//! every schedule and every cut of the model sees the same batches.

mod batches;
#[cfg(not(target_arch = "wasm32"))]
mod bin;
mod corpus;
#[cfg(not(target_arch = "wasm32"))]
mod documents;
mod format;
mod packing;
#[cfg(not(target_arch = "wasm32"))]
mod paths;
#[cfg(not(target_arch = "wasm32"))]
mod records;

pub use crate::pipeline::{Batch, IGNORE};
pub use batches::{Batches, Order};
pub use corpus::{Corpus, Tally};
#[cfg(not(target_arch = "wasm32"))]
pub use documents::Reader;
pub use format::{BadLines, FIELDS, RecordFormat};
