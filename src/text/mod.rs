//! Text to tokens and back: bytes, or a Hugging Face `tokenizer.json`; and messages to text by a model's chat template.
//!
//! A tokenizer and a template come with a model from anywhere and are programs: [`open`] runs them where [`Isolation`]
//! says.

#[cfg(not(target_arch = "wasm32"))]
pub mod chat;
#[cfg(not(target_arch = "wasm32"))]
pub mod helper;
#[cfg(not(target_arch = "wasm32"))]
mod hugging_face;
#[cfg(not(target_arch = "wasm32"))]
mod pieces;
mod stream;
#[cfg(not(target_arch = "wasm32"))]
mod template;

use std::path::Path;
#[cfg(not(target_arch = "wasm32"))]
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
#[cfg(not(target_arch = "wasm32"))]
pub use helper::{Isolation, open};
pub use stream::Stream;

/// How text becomes tokens.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    kind: Kind,
    special: Special,
    /// One more than the largest id.
    vocabulary: usize,
}

#[derive(Clone, Debug)]
enum Kind {
    /// A token is a byte.
    Bytes,
    #[cfg(not(target_arch = "wasm32"))]
    Here(hugging_face::HuggingFace),
    #[cfg(not(target_arch = "wasm32"))]
    There(Arc<helper::Client>),
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Special {
    bos: Option<u32>,
    /// The one that separates documents comes first; any of them ends a text.
    eos: Vec<u32>,
    /// What the template puts before every text.
    start: Vec<u32>,
}

/// Tokens, and for each the byte of the text at which it ends, never falling.
#[cfg(not(target_arch = "wasm32"))]
pub(crate) type Located = (Vec<u32>, Vec<usize>);

impl Tokenizer {
    /// A token is a byte; byte 0 separates texts.
    pub fn bytes() -> Tokenizer {
        let special = Special { bos: None, eos: vec![0], start: Vec::new() };
        Tokenizer { kind: Kind::Bytes, special, vocabulary: 256 }
    }

    /// Reads `tokenizer.json`: the file itself, or that of a folder, to be run in this process. Beside it,
    /// `tokenizer_config.json`, `generation_config.json` and `config.json` may say which tokens begin and end a text.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a file that is missing or damaged.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn open(path: &Path) -> Result<Tokenizer> {
        let (tokenizer, special, vocabulary) = hugging_face::HuggingFace::open(path)?;
        Ok(Tokenizer { kind: Kind::Here(tokenizer), special, vocabulary })
    }

    /// Whether a token is a byte.
    pub fn is_bytes(&self) -> bool {
        matches!(self.kind, Kind::Bytes)
    }

    /// One more than the largest token.
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// Checks that a model has a row for every token. Rows beyond the tokenizer's are padding and common.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] with both numbers; `path` is what it names.
    pub fn check_embedding(&self, rows: usize, path: &Path) -> Result<()> {
        if self.vocabulary() <= rows {
            return Ok(());
        }
        let message = format!(
            "the tokenizer has tokens up to {} and the model's embedding only {rows} rows; they do not belong together",
            self.vocabulary() - 1
        );
        Err(Error::checkpoint(path, message))
    }

    /// The token that begins a text, if the model has one.
    pub fn bos(&self) -> Option<u32> {
        self.special.bos
    }

    /// The token that separates documents, if the model has one.
    pub fn eos(&self) -> Option<u32> {
        self.special.eos.first().copied()
    }

    /// Whether a model that says this token has finished.
    pub fn ends(&self, token: u32) -> bool {
        !self.is_bytes() && self.special.eos.contains(&token)
    }

    /// What [`Tokenizer::encode`] puts before a text that begins a document: the first token of many models.
    pub fn start(&self) -> &[u32] {
        &self.special.start
    }

    /// The tokens of a text. With `start`, those of [`Tokenizer::start`] come first; a prompt wants them, a piece of a
    /// text and what a chat template rendered do not.
    ///
    /// # Errors
    /// [`Error::Data`] for a text that the tokenizer cannot encode.
    pub fn encode(&self, text: &str, start: bool) -> Result<Vec<u32>> {
        let mut tokens = if start { self.special.start.clone() } else { Vec::new() };
        match &self.kind {
            Kind::Bytes => tokens.extend(text.bytes().map(u32::from)),
            #[cfg(not(target_arch = "wasm32"))]
            _ => tokens.extend(self.encode_all(&[text])?.concat()),
        }
        Ok(tokens)
    }

    /// The tokens of many texts, on all cores; long ones a piece at a time.
    #[cfg(not(target_arch = "wasm32"))]
    pub(crate) fn encode_all(&self, texts: &[&str]) -> Result<Vec<Vec<u32>>> {
        let mut all = Vec::with_capacity(texts.len());
        for run in texts.chunk_by(|a, b| !pieces::is_long(a) && !pieces::is_long(b)) {
            match run {
                [long] if pieces::is_long(long) => {
                    let mut tokens = Vec::new();
                    self.encode_pieces(long.as_bytes(), |_, own| {
                        tokens.extend(own);
                        Ok(())
                    })?;
                    all.push(tokens);
                }
                short => all.extend(self.encode_whole(short)?),
            }
        }
        Ok(all)
    }

    /// The tokens of texts that are short enough to be tokenised as they are.
    #[cfg(not(target_arch = "wasm32"))]
    fn encode_whole(&self, texts: &[&str]) -> Result<Vec<Vec<u32>>> {
        match &self.kind {
            Kind::Bytes => Ok(texts.iter().map(|text| text.bytes().map(u32::from).collect()).collect()),
            Kind::Here(tokenizer) => tokenizer.encode(texts),
            Kind::There(client) => client.encode(texts),
        }
    }

    /// The tokens of a text and where each ends in it. Several tokens of one character end together.
    #[cfg(not(target_arch = "wasm32"))]
    pub(crate) fn locate(&self, text: &str) -> Result<Located> {
        if pieces::is_long(text) { self.locate_pieces(text) } else { self.locate_whole(text) }
    }

    #[cfg(not(target_arch = "wasm32"))]
    fn locate_whole(&self, text: &str) -> Result<Located> {
        match &self.kind {
            Kind::Bytes => Ok((self.encode(text, false)?, (1..=text.len()).collect())),
            Kind::Here(tokenizer) => tokenizer.locate(text),
            Kind::There(client) => client.locate(text),
        }
    }

    /// The text of tokens; bytes that are not UTF-8 become U+FFFD. Special tokens such as the end of a text are left out.
    ///
    /// # Errors
    /// [`Error::Data`] for tokens that the tokenizer cannot decode.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        match &self.kind {
            Kind::Bytes => {
                let bytes: Vec<u8> = tokens.iter().filter_map(|&t| u8::try_from(t).ok()).collect();
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
            #[cfg(not(target_arch = "wasm32"))]
            Kind::Here(tokenizer) => tokenizer.decode(tokens),
            #[cfg(not(target_arch = "wasm32"))]
            Kind::There(client) => client.decode(tokens),
        }
    }

    /// Decodes tokens one by one.
    pub fn stream(&self) -> Stream<'_> {
        Stream::new(self)
    }
}

/// The text of a token in tokenizer_config.json: a string, or an object that has it as `content`.
#[cfg(not(target_arch = "wasm32"))]
fn token_text(value: &serde_json::Value) -> Option<&str> {
    value.as_str().or_else(|| value["content"].as_str())
}
