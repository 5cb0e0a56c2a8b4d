//! Text as its tokens come.

use super::Tokenizer;
use crate::error::Result;

/// A character is at most four bytes: after this many tokens broken characters are what the model means.
const PATIENCE: usize = 64;

/// What decoders make of bytes that are no character.
const BROKEN: char = '\u{fffd}';

/// Decodes one token after the other. Bytes that are not yet whole characters are held back.
#[derive(Clone, Debug)]
pub struct Stream<'a> {
    tokenizer: &'a Tokenizer,
    /// Tokens whose text was handed out and which the next text depends on (a space between two words, say), then
    /// those that came since.
    tokens: Vec<u32>,
    /// How many of them belong to the first kind.
    done: usize,
    /// What was handed out of the text of all of them.
    shown: String,
    /// Bytes of a character that is not whole.
    bytes: Vec<u8>,
}

impl<'a> Stream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Stream<'a> {
        Stream { tokenizer, tokens: Vec::new(), done: 0, shown: String::new(), bytes: Vec::new() }
    }

    /// Takes a token and returns the text that has become whole, often none.
    ///
    /// # Errors
    /// [`crate::Error::Data`] for a token that the tokenizer cannot decode.
    pub fn push(&mut self, token: u32) -> Result<String> {
        if self.tokenizer.is_bytes() {
            self.bytes.extend(u8::try_from(token));
            return Ok(whole(&mut self.bytes));
        }
        self.tokens.push(token);
        let text = self.pending()?;
        // What begins a character is decoded as a broken one, by some decoders together with whole ones before it.
        if text.ends_with(BROKEN) && self.tokens.len() - self.done < PATIENCE {
            return Ok(String::new());
        }
        // A special token has no text, and what follows it depends on what was before.
        if !text.is_empty() {
            self.tokens.drain(..self.done);
        }
        self.done = self.tokens.len();
        self.shown = self.tokenizer.decode(&self.tokens)?;
        Ok(text)
    }

    /// The text that was held back, its broken characters as U+FFFD.
    ///
    /// # Errors
    /// As [`Stream::push`].
    pub fn finish(mut self) -> Result<String> {
        if self.tokenizer.is_bytes() {
            return Ok(String::from_utf8_lossy(&std::mem::take(&mut self.bytes)).into_owned());
        }
        self.pending()
    }

    /// What of the tokens' text was not handed out.
    fn pending(&self) -> Result<String> {
        let all = self.tokenizer.decode(&self.tokens)?;
        let common = all.chars().zip(self.shown.chars()).take_while(|(a, b)| a == b);
        Ok(all[common.map(|(c, _)| c.len_utf8()).sum()..].to_string())
    }
}

/// Takes the whole characters from the front, broken ones as U+FFFD, and leaves the beginning of one that may follow.
fn whole(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    loop {
        let (valid, broken) = match std::str::from_utf8(bytes) {
            Ok(valid) => (valid.len(), None),
            Err(e) => (e.valid_up_to(), e.error_len()),
        };
        text.push_str(&String::from_utf8_lossy(&bytes[..valid]));
        bytes.drain(..valid);
        match broken {
            Some(len) => {
                bytes.drain(..len);
                text.push(BROKEN);
            }
            None => return text,
        }
    }
}
