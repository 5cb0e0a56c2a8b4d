//! Long texts, tokenised a piece at a time: at work a tokenizer takes some 100 to 200 bytes of memory for each byte of a
//! text, and it wants all of the text at once.
//!
//! A text is cut only where its tokens stay the same: between lines if it has any, else before a space, else between
//! any two characters. Each candidate is tried with what lies around it. A piece is encoded together with the character
//! before it, whose tokens are then dropped, because some tokenizers treat the beginning of a text specially.

use std::ops::Range;

use super::{Located, Tokenizer};
use crate::error::{Error, Result};

/// Bytes of text that are tokenised as one.
const PIECE: usize = 32 << 10;
/// Bytes that are tokenised at a time, on all cores.
const TOGETHER: usize = 16 * PIECE;
/// Bytes on both sides of a cut that must give the same tokens with and without it.
const AROUND: usize = 256;
/// Candidates of each sort that are tried in a piece's worth of text before the piece grows.
const TRIES: usize = 24;
/// The longest piece.
const LONGEST: usize = 1 << 20;

/// Whether a text is to be cut.
pub(super) fn is_long(text: &str) -> bool {
    text.len() > 2 * PIECE
}

/// A piece of a text.
struct Piece {
    range: Range<usize>,
    /// Where the character before it begins; the beginning of the text has none.
    from: usize,
    /// The tokens of that character.
    before: Vec<u32>,
}

impl Tokenizer {
    /// The tokens of a text of any length; `each` gets a range of bytes after the other, with its tokens.
    ///
    /// # Errors
    /// [`Error::Data`] for bytes that are not UTF-8, for what the tokenizer refuses, and for a text of which a piece can
    /// neither be cut nor tokenised as it is; those of `each`.
    pub(crate) fn encode_pieces(
        &self,
        text: &[u8],
        mut each: impl FnMut(Range<usize>, &[u32]) -> Result<()>,
    ) -> Result<()> {
        self.pieces(text, |pieces| {
            let texts = pieces.iter().map(|piece| utf8(text, piece.from..piece.range.end));
            let texts = texts.collect::<Result<Vec<_>>>()?;
            for (piece, tokens) in pieces.iter().zip(self.encode_whole(&texts)?) {
                each(piece.range.clone(), &tokens[piece.own(&tokens)?..])?;
            }
            Ok(())
        })
    }

    /// [`Tokenizer::locate`] of a text of any length.
    pub(super) fn locate_pieces(&self, text: &str) -> Result<Located> {
        let (mut all, mut all_ends) = (Vec::new(), Vec::new());
        self.pieces(text.as_bytes(), |pieces| {
            for piece in pieces {
                let (tokens, ends) = self.locate_whole(&text[piece.from..piece.range.end])?;
                let own = piece.own(&tokens)?;
                all.extend(&tokens[own..]);
                all_ends.extend(ends[own..].iter().map(|end| piece.from + end));
            }
            Ok(())
        })?;
        Ok((all, all_ends))
    }

    /// Cuts a text; `work` gets pieces that are to be tokenised together.
    fn pieces(&self, text: &[u8], mut work: impl FnMut(&[Piece]) -> Result<()>) -> Result<()> {
        let mut next = Piece { range: 0..0, from: 0, before: Vec::new() };
        while next.range.start < text.len() {
            let (mut pieces, mut bytes) = (Vec::new(), 0);
            while next.range.start < text.len() && bytes < TOGETHER {
                let (end, before) = self.cut(text, next.range.start)?;
                next.range.end = end;
                bytes += next.range.len();
                let following = Piece { range: end..end, from: character(text, end), before };
                pieces.push(std::mem::replace(&mut next, following));
            }
            work(&pieces)?;
        }
        Ok(())
    }

    /// Where the piece that begins at `start` ends, and the tokens of the character before that.
    fn cut(&self, text: &[u8], start: usize) -> Result<(usize, Vec<u32>)> {
        let mut from = start + PIECE / 2;
        while from < text.len() {
            let until = text.len().min(from + PIECE);
            let pairs = || (from..until).map(|at| (at, text[at - 1], text[at]));
            let lines = pairs().filter(|(_, a, b)| *a == b'\n' && !b.is_ascii_whitespace());
            let words = pairs().filter(|(_, a, b)| !a.is_ascii_whitespace() && *b == b' ');
            // Not all next to one another: what is amiss with one place is amiss with its neighbours.
            let characters = pairs().filter(|(_, _, b)| b & 0xc0 != 0x80).step_by(97);
            let candidates = lines.take(TRIES).chain(words.take(TRIES)).chain(characters.take(TRIES));
            for (at, ..) in candidates {
                if let Some(before) = self.clean(text, start, at)? {
                    return Ok((at, before));
                }
            }
            from = until;
            if from - start > LONGEST {
                let message = format!(
                    "{LONGEST} bytes from byte {start} on cannot be cut into pieces to be tokenised; break them into lines"
                );
                return Err(Error::data(message));
            }
        }
        Ok((text.len(), Vec::new()))
    }

    /// The tokens of the character before byte `at` if cutting there leaves the tokens around it as they are.
    fn clean(&self, text: &[u8], start: usize, at: usize) -> Result<Option<Vec<u32>>> {
        let (low, high) = (boundary(text, at.saturating_sub(AROUND).max(start)), at + AROUND);
        let high = boundary(text, high.min(text.len()));
        let from = character(text, at);
        let parts = [low..high, low..at, from..high, from..at].map(|range| utf8(text, range));
        let parts = parts.into_iter().collect::<Result<Vec<_>>>()?;
        let mut tokens = self.encode_whole(&parts)?;
        let before = tokens.pop().unwrap_or_default();
        let [whole, left, right] = &tokens[..] else { return Ok(None) };
        let clean =
            right.strip_prefix(&before[..]).is_some_and(|right| whole.strip_prefix(&left[..]) == Some(right));
        Ok(clean.then_some(before))
    }
}

impl Piece {
    /// How many of the tokens, made with the character before, are not the piece's own.
    fn own(&self, tokens: &[u32]) -> Result<usize> {
        if tokens.starts_with(&self.before) {
            return Ok(self.before.len());
        }
        let message = format!("the text from byte {} on cannot be tokenised by itself", self.range.start);
        Err(Error::data(message))
    }
}

/// Where the character before byte `at` begins.
fn character(text: &[u8], at: usize) -> usize {
    boundary(text, at.saturating_sub(1))
}

/// The beginning of the character in which a byte lies.
fn boundary(text: &[u8], at: usize) -> usize {
    // A character has at most four bytes.
    let inside = |&at: &usize| text.get(at).is_some_and(|byte| byte & 0xc0 == 0x80);
    (at.saturating_sub(3)..=at).rev().find(|at| !inside(at)).unwrap_or(at)
}

/// A part of a text.
fn utf8(text: &[u8], range: Range<usize>) -> Result<&str> {
    std::str::from_utf8(&text[range.clone()])
        .map_err(|e| Error::data(format!("is not valid UTF-8 at byte {}", range.start + e.valid_up_to())))
}
