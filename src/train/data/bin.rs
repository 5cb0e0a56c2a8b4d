//! Files of tokens in llm.c's layout: 256 little-endian i32, of which the first three are a magic number, a version and
//! the number of tokens, then the tokens (`dev/data/data_common.py` there).

use std::path::Path;

use super::Corpus;
use super::corpus::{Part, map};
use crate::error::{Error, Result};
use crate::folder::files::Mapped;

const HEADER: usize = 256 * 4;
/// Magic number, version and bytes of a token: GPT-2's tokens and Llama 3's.
const KINDS: [(u32, u32, usize); 2] = [(20_240_520, 1, 2), (20_240_801, 7, 4)];

/// Appends the tokens of a file, mapped and read in place.
///
/// # Errors
/// [`Error::Data`] for a file of another kind or length.
pub(super) fn append(corpus: &mut Corpus, path: &Path) -> Result<()> {
    let file = map(path)?;
    let refuse = |message: String| Err(Error::data(format!("{}: {message}", path.display())));
    if file.len() < HEADER {
        return refuse(format!(
            "has {} bytes; a file of tokens begins with a header of {HEADER}",
            file.len()
        ));
    }
    let word = |header: &[u8], i: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| header[4 * i + byte]));
    let [magic, version, count] = file.look(0..HEADER, |header| [0, 1, 2].map(|i| word(header, i)))?;
    let Some(&(_, _, width)) = KINDS.iter().find(|kind| (kind.0, kind.1) == (magic, version)) else {
        return refuse(format!(
            "is no file of tokens of llm.c: magic number {magic} and version {version}; known: 20240520 with 1, 20240801 with 7"
        ));
    };
    let wanted = HEADER as u64 + u64::from(count) * width as u64;
    if file.len() as u64 != wanted {
        return refuse(format!("has {} bytes; {count} tokens need {wanted}; it is damaged", file.len()));
    }
    let largest = largest(&file, width)?;
    corpus.push(Part::new(file, HEADER, width), largest);
    Ok(())
}

/// A token that no model has a row for would be found too late.
fn largest(file: &Mapped, width: usize) -> Result<u32> {
    let mut largest = 0;
    file.pieces(HEADER..file.len(), |piece| {
        let of_piece = match width {
            2 => piece.as_chunks().0.iter().map(|&bytes| u16::from_le_bytes(bytes).into()).max(),
            _ => piece.as_chunks().0.iter().map(|&bytes| u32::from_le_bytes(bytes)).max(),
        };
        largest = largest.max(of_piece.unwrap_or(0));
    })?;
    Ok(largest)
}
