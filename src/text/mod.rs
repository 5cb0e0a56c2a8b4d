//! Text to tokens and back: bytes, or a Hugging Face `tokenizer.json`; and messages to text by a model's chat template.

#[cfg(not(target_arch = "wasm32"))]
pub mod chat;
#[cfg(not(target_arch = "wasm32"))]
mod clock;
mod stream;

use std::path::Path;

use crate::error::{Error, Result};
pub use stream::Stream;

/// How text becomes tokens.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    kind: Kind,
    special: Special,
}

#[derive(Clone, Debug)]
enum Kind {
    /// A token is a byte.
    Bytes,
    #[cfg(not(target_arch = "wasm32"))]
    HuggingFace {
        tokenizer: Box<tokenizers::Tokenizer>,
        /// One more than the largest id.
        vocabulary: usize,
    },
}

#[derive(Clone, Debug, Default)]
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
        Tokenizer { kind: Kind::Bytes, special: Special { bos: None, eos: vec![0], start: Vec::new() } }
    }

    /// Reads `tokenizer.json`: the file itself, or that of a folder. Beside it, `tokenizer_config.json`,
    /// `generation_config.json` and `config.json` may say which tokens begin and end a text.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a file that is missing or damaged.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn open(path: &Path) -> Result<Tokenizer> {
        use crate::folder::files::{Mapped, broken, read_json};
        let (folder, file) = if path.is_dir() {
            (path, path.join("tokenizer.json"))
        } else {
            (path.parent().unwrap_or(path), path.to_path_buf())
        };
        if !file.exists() {
            let message = if folder.join("tokenizer.model").exists() {
                "is missing; make it out of tokenizer.model with transformers (AutoTokenizer, save_pretrained)"
            } else {
                "is missing; give a folder with the tokenizer of the model, or use \"bytes\""
            };
            return Err(broken(file, message));
        }
        let invalid = |e: tokenizers::Error| broken(&file, format!("is no tokenizer: {e}"));
        let bytes = Mapped::open(&file)?;
        serde_json::from_slice::<serde::de::IgnoredAny>(&bytes).map_err(|e| invalid(e.into()))?;
        // The crate panics on some JSON that is not the one it expects.
        let parsed = std::panic::catch_unwind(|| tokenizers::Tokenizer::from_bytes(&*bytes));
        let parsed = parsed.unwrap_or_else(|_| Err("it has a part of an unknown kind".into()));
        let mut tokenizer = parsed.map_err(invalid)?;
        // Some files carry the settings of the last batch that somebody made.
        tokenizer.with_truncation(None).map_err(invalid)?.with_padding(None);
        let largest = tokenizer.get_vocab(true).into_values().max();
        let Some(largest) = largest else { return Err(broken(file, "has no tokens")) };
        let read = |name: &str| match folder.join(name) {
            path if path.is_file() => read_json::<serde_json::Value>(&path),
            _ => Ok(serde_json::Value::Null),
        };
        let (settings, generation, model) =
            (read("tokenizer_config.json")?, read("generation_config.json")?, read("config.json")?);
        let named = |key: &str| token_text(&settings[key]).and_then(|text| tokenizer.token_to_id(text));
        let listed = |json: &serde_json::Value, key: &str| -> Vec<u32> {
            let one = |value: &serde_json::Value| value.as_u64().filter(|&id| id <= largest.into());
            match &json[key] {
                serde_json::Value::Array(ids) => ids.iter().filter_map(one).map(|id| id as u32).collect(),
                value => one(value).into_iter().map(|id| id as u32).collect(),
            }
        };
        let mut eos: Vec<u32> = named("eos_token").into_iter().collect();
        for id in [listed(&generation, "eos_token_id"), listed(&model, "eos_token_id")].concat() {
            if !eos.contains(&id) {
                eos.push(id);
            }
        }
        let known = [listed(&generation, "bos_token_id"), listed(&model, "bos_token_id")].concat();
        let bos = named("bos_token").or(known.first().copied());
        let start = tokenizer.encode_fast("", true).map_err(invalid)?;
        let start = start.get_ids().iter().copied().filter(|&id| Some(id) == bos).take(1).collect();
        let kind = Kind::HuggingFace { tokenizer: Box::new(tokenizer), vocabulary: largest as usize + 1 };
        Ok(Tokenizer { kind, special: Special { bos, eos, start } })
    }

    /// Whether a token is a byte.
    pub fn is_bytes(&self) -> bool {
        matches!(self.kind, Kind::Bytes)
    }

    /// One more than the largest token.
    pub fn vocabulary(&self) -> usize {
        match &self.kind {
            Kind::Bytes => 256,
            #[cfg(not(target_arch = "wasm32"))]
            Kind::HuggingFace { vocabulary, .. } => *vocabulary,
        }
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
            Kind::HuggingFace { tokenizer, .. } => {
                let encoding = tokenizer.encode_fast(text, false).map_err(|e| refused(&e))?;
                tokens.extend(encoding.get_ids());
            }
        }
        Ok(tokens)
    }

    /// The tokens of many texts, on all cores.
    #[cfg(not(target_arch = "wasm32"))]
    pub(crate) fn encode_all(&self, texts: &[&str]) -> Result<Vec<Vec<u32>>> {
        match &self.kind {
            Kind::Bytes => texts.iter().map(|text| self.encode(text, false)).collect(),
            Kind::HuggingFace { tokenizer, .. } => {
                let encodings =
                    tokenizer.encode_batch_fast(texts.to_vec(), false).map_err(|e| refused(&e))?;
                Ok(encodings.into_iter().map(|encoding| encoding.get_ids().to_vec()).collect())
            }
        }
    }

    /// The tokens of a text and where each ends in it. Several tokens of one character end together.
    #[cfg(not(target_arch = "wasm32"))]
    pub(crate) fn locate(&self, text: &str) -> Result<Located> {
        match &self.kind {
            Kind::Bytes => Ok((self.encode(text, false)?, (1..=text.len()).collect())),
            Kind::HuggingFace { tokenizer, .. } => {
                let encoding = tokenizer.encode(text, false).map_err(|e| refused(&e))?;
                let ends = encoding.get_offsets().iter().scan(0, |end, &(_, stop)| {
                    *end = stop.max(*end);
                    Some(*end)
                });
                let ends = ends.collect();
                Ok((encoding.get_ids().to_vec(), ends))
            }
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
            Kind::HuggingFace { tokenizer, .. } => tokenizer
                .decode(tokens, true)
                .map_err(|e| Error::data(format!("tokens cannot be decoded: {e}"))),
        }
    }

    /// Decodes tokens one by one.
    pub fn stream(&self) -> Stream<'_> {
        Stream::new(self)
    }
}

#[cfg(not(target_arch = "wasm32"))]
fn refused(error: &tokenizers::Error) -> Error {
    Error::data(format!("the tokenizer refuses a text: {}", crate::error::one_line(&error.to_string(), 200)))
}

/// The text of a token in tokenizer_config.json: a string, or an object that has it as `content`.
#[cfg(not(target_arch = "wasm32"))]
fn token_text(value: &serde_json::Value) -> Option<&str> {
    value.as_str().or_else(|| value["content"].as_str())
}
