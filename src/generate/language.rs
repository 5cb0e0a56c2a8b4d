//! A model with what turns text into its tokens and back.

use super::{Extent, Generator};
use crate::error::{Error, Result};
use crate::gpu::{Device, now};
use crate::mesh::Division;
use crate::model::{ModelConfig, Weights};
use crate::text::{Isolation, Tokenizer};
use crate::train::source::{Pretrained, Text};

/// A model, with its adapter if it has one, that belongs to a tokenizer; neither of them on a device yet.
pub struct Language {
    pretrained: Pretrained,
    text: Text,
}

/// Seconds until a model was ready.
#[derive(Clone, Copy, Debug)]
pub struct Loading {
    /// To plan, allocate and compile.
    pub kernels: f64,
    /// To read the weights and bring them to the devices.
    pub weights: f64,
}

impl Language {
    /// The tokenizer is `tokenizer.json`, or bytes for a run that was trained on bytes and for a vocabulary of 256.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a tokenizer that is missing, damaged, or has more tokens than the model's embedding.
    pub fn new(pretrained: Pretrained, isolation: &Isolation) -> Result<Language> {
        let vocabulary = pretrained.model.config().vocabulary;
        let text = Text::of_model(pretrained.text_folder(), vocabulary, isolation)?;
        text.check(vocabulary)?;
        text.needed()?;
        Ok(Language { pretrained, text })
    }

    /// The same with the model's matrices stored so; by default as its files can be held without a loss.
    pub fn with_weights(mut self, weights: Weights) -> Language {
        self.pretrained.model = self.pretrained.model.with_weights(weights);
        self
    }

    /// The model's extents.
    pub fn config(&self) -> &ModelConfig {
        self.pretrained.model.config()
    }

    /// The number of the model's layers, embedding and head included.
    pub fn layers(&self) -> usize {
        self.pretrained.model.layers()
    }

    /// The model's tokenizer and its template for conversations.
    pub fn text(&self) -> &Text {
        &self.text
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.text.tokenizer
    }

    /// Tokens that may be drawn: rows of the embedding past the tokenizer's are padding.
    pub fn vocabulary(&self) -> usize {
        self.text.tokenizer.vocabulary()
    }

    /// Puts the model on these devices, one stage each or each gang of these shares, within `budgets`, and blocks until its
    /// weights are there; also says how long that took.
    ///
    /// # Errors
    /// Those of [`Generator::launch_divided`] and [`Pretrained::load`].
    pub fn launch(
        &self,
        extent: Extent,
        devices: &[Device],
        budgets: Vec<Option<u64>>,
        tensor: &Division,
    ) -> Result<(Generator, Loading)> {
        let (started, model) = (now(), &self.pretrained.model);
        let mut generator = Generator::launch_divided(model, extent, devices, budgets, tensor)?;
        let kernels = now() - started;
        let watch = generator.watch();
        watch.block_on(self.pretrained.load(generator.executor()))?;
        Ok((generator, Loading { kernels, weights: now() - started - kernels }))
    }

    /// An error about this model's folder.
    pub fn error(&self, message: impl Into<String>) -> Error {
        Error::checkpoint(self.pretrained.folder.path(), message)
    }
}
