//! What a config names outside itself: the folder of the model, the tokenizer, the text.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde_json::Value;

use super::checkpoint::{open_model, resolve};
use super::config::Config;
use super::data::{BadLines, Corpus, Reader};
use crate::error::{Error, Result};
use crate::folder::{ModelFolder, companions};
use crate::model::{Kind, Model, ModelConfig};
use crate::text::Tokenizer;
use crate::text::chat::ChatTemplate;

/// The word for a tokenizer whose tokens are bytes.
pub const BYTES: &str = "bytes";

/// An open folder with the model that it describes.
pub struct Pretrained {
    /// The model.
    pub model: Model,
    /// Its weights, under the names of [`Model::parameters`].
    pub folder: ModelFolder,
}

impl Pretrained {
    /// Opens a model folder, a run or a checkpoint.
    ///
    /// # Errors
    /// Those of [`resolve`], [`open_model`] and [`Model::from_hugging_face`].
    pub fn open(path: &Path) -> Result<Pretrained> {
        let mut folder = open_model(&resolve(path)?)?;
        let model = Model::from_hugging_face(folder.config())?;
        // Published GPT-2 files leave the prefix out.
        if model.config().kind == Kind::Gpt2 {
            folder.tensors_mut().rename(|name| {
                match ["wte.", "wpe.", "h.", "ln_f."].iter().any(|part| name.starts_with(part)) {
                    true => format!("transformer.{name}"),
                    false => name.to_string(),
                }
            })?;
        }
        Ok(Pretrained { model, folder })
    }
}

/// Where `model.path` leads, from the first of `bases` where there is something.
pub fn find(path: &str, bases: &[PathBuf]) -> Result<PathBuf> {
    let found = bases.iter().map(|base| base.join(path)).find(|path| path.exists());
    found.ok_or_else(|| Error::config("model.path", format!("{path} does not exist")))
}

/// The extents of the model at `model.path`, for [`Config::parse_with`].
pub fn describe(path: &str, bases: &[PathBuf]) -> Result<ModelConfig> {
    Ok(Pretrained::open(&find(path, bases)?)?.model.config().clone())
}

/// How text becomes tokens.
pub struct Text {
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// For records of messages.
    pub template: Option<ChatTemplate>,
    /// Where the tokenizer is, for messages; none for bytes.
    path: Option<PathBuf>,
}

impl Text {
    /// The tokenizer in a folder or a file of its own.
    pub fn open(path: &Path) -> Result<Text> {
        let tokenizer = Tokenizer::open(path)?;
        let folder = if path.is_dir() { path } else { path.parent().unwrap_or(path) };
        let template = ChatTemplate::open(folder, SystemTime::now())?;
        Ok(Text { tokenizer, template, path: Some(path.to_path_buf()) })
    }

    /// Bytes.
    pub fn bytes() -> Text {
        Text { tokenizer: Tokenizer::bytes(), template: None, path: None }
    }

    /// The tokenizer of a model folder, and bytes where it has none.
    pub fn of_model(folder: &Path) -> Result<Text> {
        if folder.join("tokenizer.json").exists() { Text::open(folder) } else { Ok(Text::bytes()) }
    }

    /// Whether a model of this vocabulary has a row for every token.
    pub fn check(&self, vocabulary: usize) -> Result<()> {
        match &self.path {
            Some(path) => self.tokenizer.check_embedding(vocabulary, path),
            None if vocabulary < 256 => Err(Error::config(
                "model.vocabulary",
                format!("{vocabulary} is too small for bytes; it must be at least 256"),
            )),
            None => Ok(()),
        }
    }

    /// Reads files for a model of this vocabulary.
    ///
    /// # Errors
    /// Those of [`Reader::open`]; [`Error::Data`] for a token that the model has no row for.
    pub fn read(
        &self,
        patterns: &[String],
        bases: &[PathBuf],
        vocabulary: usize,
        bad_lines: BadLines,
        ends: bool,
    ) -> Result<Corpus> {
        let reader = Reader { tokenizer: &self.tokenizer, template: self.template.as_ref(), bad_lines, ends };
        let corpus = reader.open(patterns, bases)?;
        if corpus.largest() as usize >= vocabulary {
            self.check(vocabulary)?;
            let message = format!(
                "{patterns:?} has tokens up to {}, and the model's vocabulary is {vocabulary}; they do not belong together",
                corpus.largest()
            );
            return Err(Error::data(message));
        }
        Ok(corpus)
    }
}

/// What a checkpoint takes over from where the run began.
#[derive(Clone, Debug)]
pub struct Origin {
    /// `config.json`.
    pub config: Value,
    /// Files of the tokenizer and of generation.
    pub companions: Vec<PathBuf>,
    /// `bytes`, or the name of the tokenizer's file.
    pub tokenizer: String,
}

/// What a config names outside itself.
pub struct Source {
    /// The folder whose weights the run begins with; from the seed if none.
    pub folder: Option<PathBuf>,
    /// What its checkpoints take over.
    pub origin: Origin,
    /// How text becomes tokens.
    pub text: Text,
    /// What is trained on.
    pub train: Corpus,
    /// What is evaluated on.
    pub valid: Option<Corpus>,
}

impl Source {
    /// Finds and reads everything, relative paths from the first of `bases` that has them.
    ///
    /// # Errors
    /// Those of a folder, a tokenizer or a file that is missing, damaged, or does not belong to the model.
    pub fn open(config: &Config, bases: &[PathBuf]) -> Result<Source> {
        let folder = config.path.as_deref().map(|path| find(path, bases).and_then(|path| resolve(&path)));
        let folder = folder.transpose()?;
        let (text, place) = match (config.data.tokenizer.as_deref(), &folder) {
            (Some(BYTES), _) | (None, None) => (Text::bytes(), None),
            (None, Some(folder)) => (Text::of_model(folder)?, Some(folder.clone())),
            (Some(path), _) => {
                let found = bases.iter().map(|base| base.join(path)).find(|path| path.exists());
                let found = found.ok_or_else(|| {
                    let message =
                        format!("{path} does not exist; name a tokenizer.json, its folder, or {BYTES:?}");
                    Error::config("data.tokenizer", message)
                })?;
                let place = if found.is_dir() { found.clone() } else { here(&found) };
                (Text::open(&found)?, Some(place))
            }
        };
        let vocabulary = config.model.vocabulary;
        text.check(vocabulary)?;
        let read = |patterns: &[String]| text.read(patterns, bases, vocabulary, config.data.bad_lines, true);
        let all = read(&config.data.train)?;
        let (train, valid) = match config.data.split {
            split if split > 0.0 => all.split(split).map(|(train, valid)| (train, Some(valid)))?,
            _ if config.data.valid.is_empty() => (all, None),
            _ => (all, Some(read(&config.data.valid)?)),
        };
        let origin = Origin {
            config: match &folder {
                Some(folder) => open_model(folder)?.config().clone(),
                None => Model::new(&config.model)?.hugging_face_config(),
            },
            companions: place.as_deref().map(companions).unwrap_or_default(),
            tokenizer: if text.tokenizer.is_bytes() { BYTES.into() } else { "tokenizer.json".into() },
        };
        Ok(Source { folder, origin, text, train, valid })
    }
}

fn here(file: &Path) -> PathBuf {
    match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    }
}
