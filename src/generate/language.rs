//! A model's folder with what turns text into its tokens and back.

use super::{Extent, Generator};
use crate::error::{Error, Result};
use crate::folder::ModelFolder;
use crate::gpu::Device;
use crate::model::{Kind, Model, ModelConfig};
use crate::text::Tokenizer;

/// A model's folder that belongs to a tokenizer, neither of them on a device yet.
#[derive(Debug)]
pub struct Language {
    folder: ModelFolder,
    config: ModelConfig,
    tokenizer: Tokenizer,
}

impl Language {
    /// Reads `config.json` and the tokenizer: `tokenizer.json`, or bytes for a run that was trained on bytes and for a
    /// vocabulary of 256.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a tokenizer that is missing, damaged, or has more tokens than the model's embedding;
    /// those of [`Model::from_hugging_face`].
    pub fn new(mut folder: ModelFolder) -> Result<Language> {
        let config = Model::from_hugging_face(folder.config())?.config().clone();
        let path = folder.path().to_path_buf();
        // What a run writes beside its checkpoints says how its text became tokens.
        let state = std::fs::read_to_string(path.join("state.json")).unwrap_or_default();
        let state: serde_json::Value = serde_json::from_str(&state).unwrap_or_default();
        let own = path.join("tokenizer.json").is_file();
        let bytes = state["tokenizer"] == "bytes" || !own && config.vocabulary == 256;
        let tokenizer = if bytes { Tokenizer::bytes() } else { Tokenizer::open(&path)? };
        tokenizer.check_embedding(config.vocabulary, &path)?;
        // Published GPT-2 files leave the prefix out.
        if config.kind == Kind::Gpt2 {
            folder.tensors_mut().rename(|name| {
                match ["wte.", "wpe.", "h.", "ln_f."].iter().any(|s| name.starts_with(s)) {
                    true => format!("transformer.{name}"),
                    false => name.to_string(),
                }
            })?;
        }
        Ok(Language { folder, config, tokenizer })
    }

    /// The model's extents.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Tokens that may be drawn: rows of the embedding past the tokenizer's are padding.
    pub fn vocabulary(&self) -> usize {
        self.tokenizer.vocabulary()
    }

    /// Puts the model on these devices, one stage each, within `budgets`, and blocks until its weights are there.
    ///
    /// # Errors
    /// Those of [`Generator::launch`] and [`Generator::load`].
    pub fn launch(&self, extent: Extent, devices: &[Device], budgets: Vec<Option<u64>>) -> Result<Generator> {
        let mut generator = Generator::launch(&self.config, extent, devices, budgets)?;
        let watch = generator.watch();
        watch.block_on(generator.load(self.folder.tensors()))?;
        Ok(generator)
    }

    /// An error about this folder.
    pub fn error(&self, message: impl Into<String>) -> Error {
        Error::checkpoint(self.folder.path(), message)
    }
}
