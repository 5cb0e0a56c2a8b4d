//! `tokenizer.json`, read and run in this process by the crate `tokenizers`.
//!
//! What such a file says is a program, and the crate panics on some of them. A panic is caught here and becomes an
//! error; what takes all the memory or never ends is contained by the [helper process](super::helper) alone.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Located, Special, token_text};
use crate::error::{Error, Result};
use crate::folder::files::{broken, read_json, read_whole};

/// An open `tokenizer.json`.
#[derive(Clone, Debug)]
pub(super) struct HuggingFace(Box<tokenizers::Tokenizer>);

/// The file that is meant by a path to it or to its folder, and the folder.
pub(super) fn places(path: &Path) -> (&Path, PathBuf) {
    if path.is_dir() {
        (path, path.join("tokenizer.json"))
    } else {
        (path.parent().unwrap_or(path), path.to_path_buf())
    }
}

impl HuggingFace {
    /// The tokenizer, its special tokens, and one more than its largest id.
    pub(super) fn open(path: &Path) -> Result<(HuggingFace, Special, usize)> {
        let (folder, file) = places(path);
        if !file.exists() {
            let message = if folder.join("tokenizer.model").exists() {
                "is missing; make it out of tokenizer.model with transformers (AutoTokenizer, save_pretrained)"
            } else {
                "is missing; give a folder with the tokenizer of the model, or use \"bytes\""
            };
            return Err(broken(file, message));
        }
        let invalid = |e: String| broken(&file, format!("is no tokenizer: {e}"));
        let bytes = read_whole(&file)?;
        serde_json::from_slice::<serde::de::IgnoredAny>(&bytes).map_err(|e| invalid(e.to_string()))?;
        let parsed = guarded(|| {
            let mut tokenizer = tokenizers::Tokenizer::from_bytes(&*bytes)?;
            // Some files carry the settings of the last batch that somebody made.
            tokenizer.with_truncation(None)?.with_padding(None);
            Ok(tokenizer)
        });
        let tokenizer = parsed.map_err(invalid)?;
        let largest = tokenizer.get_vocab(true).into_values().max();
        let Some(largest) = largest else { return Err(broken(file, "has no tokens")) };
        let read = |name: &str| match folder.join(name) {
            path if path.exists() => read_json::<Value>(&path),
            _ => Ok(Value::Null),
        };
        let (settings, generation, model) =
            (read("tokenizer_config.json")?, read("generation_config.json")?, read("config.json")?);
        let named = |key: &str| token_text(&settings[key]).and_then(|text| tokenizer.token_to_id(text));
        let listed = |json: &Value, key: &str| -> Vec<u32> {
            let one = |value: &Value| value.as_u64().filter(|&id| id <= largest.into());
            match &json[key] {
                Value::Array(ids) => ids.iter().filter_map(one).map(|id| id as u32).collect(),
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
        let start = guarded(|| tokenizer.encode_fast("", true)).map_err(invalid)?;
        let start = start.get_ids().iter().copied().filter(|&id| Some(id) == bos).take(1).collect();
        let special = Special { bos, eos, start };
        Ok((HuggingFace(Box::new(tokenizer)), special, largest as usize + 1))
    }

    /// The tokens of many texts, on all cores.
    pub(super) fn encode(&self, texts: &[&str]) -> Result<Vec<Vec<u32>>> {
        // One text is not worth waking the other cores for.
        let encodings = guarded(|| match texts {
            [text] => Ok(vec![self.0.encode_fast(*text, false)?]),
            _ => self.0.encode_batch_fast(texts.to_vec(), false),
        });
        let encodings = encodings.map_err(refused)?;
        Ok(encodings.into_iter().map(|encoding| encoding.get_ids().to_vec()).collect())
    }

    /// The tokens of a text and where each ends in it.
    pub(super) fn locate(&self, text: &str) -> Result<Located> {
        let encoding = guarded(|| self.0.encode(text, false)).map_err(refused)?;
        let ends = encoding.get_offsets().iter().scan(0, |end, &(_, stop)| {
            *end = stop.max(*end);
            Some(*end)
        });
        Ok((encoding.get_ids().to_vec(), ends.collect()))
    }

    /// The text of tokens, special ones left out.
    pub(super) fn decode(&self, tokens: &[u32]) -> Result<String> {
        let decoded = guarded(|| self.0.decode(tokens, true));
        decoded.map_err(|e| Error::data(format!("tokens cannot be decoded: {e}")))
    }
}

/// What the crate makes of a tokenizer that it does not expect: an error, also where it panics.
fn guarded<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> std::result::Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(_) => Err("it has a part that contradicts itself or is of an unknown kind".into()),
    }
}

fn refused(error: String) -> Error {
    Error::data(format!("the tokenizer refuses a text: {error}"))
}
