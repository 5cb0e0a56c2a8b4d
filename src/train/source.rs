//! What a config names outside itself: the folder of the model, the tokenizer, the text.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use jiff::ZonedDateTime;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::checkpoint::{open_adapter, open_model, resolve, without_weights};
use super::config::{AdapterConfig, Config, Described};
use super::data::{Corpus, Reader, RecordFormat};
use crate::error::{Error, Result};
use crate::folder::adapter::{Adapter, AdapterConfig as PeftConfig, Targets};
use crate::folder::files::read_text;
use crate::folder::{Dtype, Fingerprint, Kind, ModelFolder, Tensors, absent, companions};
use crate::model::{Model, Parameter, Weights};
use crate::pipeline::Executor;
use crate::text::chat::ChatTemplate;
use crate::text::{self, Isolation, Tokenizer};

/// The word for a tokenizer whose tokens are bytes.
pub const BYTES: &str = "bytes";

/// The tokenizer's file.
const TOKENIZER: &str = "tokenizer.json";

/// An open model: a folder of its own, or a base model and its adapter.
#[derive(Debug)]
pub struct Pretrained {
    /// The model, with the adapter if there is one; packed where its folder stores all matrices as bf16.
    pub model: Model,
    /// Its weights without the adapter, under the names of [`Model::parameters`].
    pub folder: ModelFolder,
    /// The adapter and its folder.
    pub adapter: Option<(Adapter, PathBuf)>,
}

impl Pretrained {
    /// Opens a model or an adapter: a folder, a run or a checkpoint.
    ///
    /// # Errors
    /// Those of [`resolve`], [`open_model`], [`open_adapter`] and [`Model::from_hugging_face`]; [`Error::Config`] where
    /// the base model of an adapter is not found or is another.
    pub fn open(path: &Path) -> Result<Pretrained> {
        Pretrained::on_base(path, None)
    }

    /// As [`Pretrained::open`]; `base` takes the place of the folder that an adapter names.
    pub fn on_base(path: &Path, base: Option<&Path>) -> Result<Pretrained> {
        let path = resolve(path)?;
        if !path.join(Kind::Adapter.config_name()).is_file() {
            let (folder, model) = open_whole(&path)?;
            return Ok(Pretrained { model, folder, adapter: None });
        }
        let adapter = open_adapter(&path)?;
        let base = match base {
            Some(base) => base.to_path_buf(),
            None => named_base(&adapter, &path)?,
        };
        let base = resolve(&base)?;
        if base.join(Kind::Adapter.config_name()).is_file() {
            let message = "is an adapter, not a model; merge it with its own base model first";
            return Err(Error::checkpoint(&base, message));
        }
        let (folder, model) = open_whole(&base)?;
        let model = Model::with_adapter(model.config(), Some(&adapter.lora()))?.with_weights(model.weights());
        Ok(Pretrained { model, folder, adapter: Some((adapter, path)) })
    }

    /// Sets the weights, and the adapter if there is one.
    pub async fn load(&self, executor: &mut Executor) -> Result<()> {
        executor.load(self.folder.tensors()).await?;
        match &self.adapter {
            Some((adapter, _)) => executor.load_adapter(&adapter.tensors).await,
            None => Ok(()),
        }
    }

    /// The folder that has the tokenizer: the adapter's if it has one.
    pub fn text_folder(&self) -> &Path {
        let own = self.adapter.as_ref().map(|(_, path)| path).filter(|p| p.join(TOKENIZER).exists());
        own.map_or(self.folder.path(), |path| path)
    }

    /// The files beside the weights that another folder of the same model needs, the adapter's before the base model's.
    pub fn companions(&self) -> Vec<PathBuf> {
        let mut files = self.adapter.as_ref().map(|(_, path)| companions(path)).unwrap_or_default();
        let own: Vec<_> = files.iter().map(|file| file.file_name().map(OsString::from)).collect();
        let others = self.folder.companions().into_iter();
        files.extend(others.filter(|file| !own.contains(&file.file_name().map(OsString::from))));
        files
    }
}

/// A model folder, its tensors under the names of the model's parameters. Published files of some base models leave out
/// the name of the part before the head.
fn open_whole(path: &Path) -> Result<(ModelFolder, Model)> {
    let mut folder = open_model(path)?;
    let model = Model::from_hugging_face(folder.config())?;
    let prefix = if model.config().kind.is_llama() { "model." } else { "transformer." };
    if !folder.tensors().iter().any(|info| info.name.starts_with(prefix)) {
        folder.tensors_mut().rename(|name| match name.starts_with("lm_head.") {
            true => name.to_string(),
            false => format!("{prefix}{name}"),
        })?;
    }
    let weights = stored(folder.tensors(), &model);
    Ok((folder, model.with_weights(weights)))
}

/// How all the matrices can be held without a loss.
fn stored(tensors: &Tensors, model: &Model) -> Weights {
    let packed = model.clone().with_weights(Weights::BF16).parameters();
    let matrices = packed.iter().filter(|p| p.weights.packed() && p.tied_to.is_none());
    let is_bf16 = |p: &Parameter| tensors.get(&p.name).is_some_and(|info| info.dtype == Dtype::BF16);
    if matrices.into_iter().all(is_bf16) { Weights::BF16 } else { Weights::F32 }
}

/// The folder that an adapter says it was trained on: from here, or from where the adapter lies.
fn named_base(adapter: &Adapter, path: &Path) -> Result<PathBuf> {
    // Only one verb takes a base model of another name.
    let lost = |what: String| {
        let help = "a base model that lies elsewhere is given to `polystage merge` as --base";
        Error::checkpoint(path, format!("{what}; {help}"))
    };
    let Some(name) = adapter.config.base_model.as_deref().filter(|name| !name.is_empty()) else {
        return Err(lost("does not name its base model".into()));
    };
    let places = [PathBuf::from(name), path.join(name)];
    let missing = || lost(format!("names {name:?} as its base model, which {}", absent(Path::new(name))));
    places.into_iter().find(|place| place.is_dir()).ok_or_else(missing)
}

/// Where `model.path` leads, from the first of `bases` where there is something.
pub fn find(path: &str, bases: &[PathBuf]) -> Result<PathBuf> {
    let found = bases.iter().map(|base| base.join(path)).find(|path| path.exists());
    found.ok_or_else(|| Error::config("model.path", format!("{path} {}", absent(Path::new(path)))))
}

/// The model at `model.path`, for [`Config::parse_with`].
pub fn describe(path: &str, bases: &[PathBuf]) -> Result<Described> {
    let pretrained = Pretrained::open(&find(path, bases)?)?;
    let adapter = pretrained.adapter.as_ref().map(|(adapter, _)| {
        // Where the words of the configuration mean what the tensors are, they are kept.
        let (config, modules) = (&adapter.config, adapter.lora().modules);
        let meant = config.targets.select(&pretrained.model.linear_layers()).ok();
        let meant = meant.filter(|meant| meant.len() == modules.len()).map(|_| config.targets.clone());
        AdapterConfig {
            rank: config.r,
            alpha: config.alpha,
            rank_stabilised: config.use_rslora,
            targets: Some(meant.unwrap_or(Targets::Names(modules))),
        }
    });
    let weights = pretrained.model.weights();
    Ok(Described { model: pretrained.model.config().clone(), adapter, weights })
}

/// As [`describe`], for what needs no weights: a folder with `config.json` alone will do.
pub fn sketch(path: &str, bases: &[PathBuf]) -> Result<Described> {
    let Some(config) = without_weights(&find(path, bases)?)? else { return describe(path, bases) };
    let stored = ["dtype", "torch_dtype"].iter().find_map(|key| config[*key].as_str());
    let weights = if stored == Some(Dtype::BF16.torch_name()) { Weights::BF16 } else { Weights::F32 };
    let model = Model::from_hugging_face(&config)?.config().clone();
    Ok(Described { model, adapter: None, weights })
}

/// How text becomes tokens.
pub struct Text {
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// For records of messages.
    pub template: Option<ChatTemplate>,
    /// Where the tokenizer is, for messages; none for bytes.
    path: Option<PathBuf>,
    /// The folder of a model whose tokenizer is not there.
    lost: Option<PathBuf>,
}

impl Text {
    /// The tokenizer in a folder or a file of its own.
    pub fn open(path: &Path, isolation: &Isolation) -> Result<Text> {
        // Of the clock on the wall, as transformers shows it to templates.
        let (tokenizer, template) = text::open(path, ZonedDateTime::now().datetime(), isolation)?;
        Ok(Text { tokenizer, template, path: Some(path.to_path_buf()), lost: None })
    }

    /// Bytes.
    pub fn bytes() -> Text {
        Text { tokenizer: Tokenizer::bytes(), template: None, path: None, lost: None }
    }

    /// The tokenizer of a model folder. Without one it must be a byte-level model: of 256 tokens, or a checkpoint that
    /// says so; any other can only read files of tokens.
    pub fn of_model(folder: &Path, vocabulary: usize, isolation: &Isolation) -> Result<Text> {
        if folder.join(TOKENIZER).exists() {
            return Text::open(folder, isolation);
        }
        let state = read_text(&folder.join("state.json")).unwrap_or_default();
        let state: Value = serde_json::from_str(&state).unwrap_or_default();
        let bytes = vocabulary == 256 || state["tokenizer"] == BYTES;
        Ok(Text { lost: (!bytes).then(|| folder.to_path_buf()), ..Text::bytes() })
    }

    /// Whether there is a tokenizer.
    pub fn needed(&self) -> Result<()> {
        let Some(folder) = &self.lost else { return Ok(()) };
        Err(Error::checkpoint(folder, format!("has no {TOKENIZER}; put the model's own there")))
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
        format: &RecordFormat,
        ends: bool,
    ) -> Result<Corpus> {
        if patterns.iter().any(|pattern| !pattern.ends_with(".bin")) {
            self.needed()?;
        }
        let reader = Reader { tokenizer: &self.tokenizer, template: self.template.as_ref(), format, ends };
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
#[derive(Debug)]
pub struct Origin {
    /// `config.json`, or PEFT's `adapter_config.json` where an adapter is trained.
    pub config: Value,
    /// Files of the tokenizer and of generation.
    pub companions: Vec<PathBuf>,
    /// `bytes`, or the name of the tokenizer's file.
    pub tokenizer: String,
    /// The model with whose weights the run began; from the seed if none.
    pub pretrained: Option<Pretrained>,
    /// Tell whether a run that goes on still has what it began with.
    pub fingerprints: Fingerprints,
}

/// What a run depends on and its checkpoints do not hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprints {
    /// The text that is trained on ([`Corpus::fingerprint`]).
    pub train: Fingerprint,
    /// The text that is evaluated on.
    pub valid: Option<Fingerprint>,
    /// The weights under the adapter that is trained ([`Tensors::fingerprint`]).
    pub base: Option<Fingerprint>,
}

/// What a config names outside itself.
pub struct Source {
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
    pub fn open(config: &Config, bases: &[PathBuf], isolation: &Isolation) -> Result<Source> {
        let pretrained = config.path.as_deref().map(|path| Pretrained::open(&find(path, bases)?));
        let pretrained = pretrained.transpose()?;
        let (text, companions) = match (config.data.tokenizer.as_deref(), &pretrained) {
            (Some(BYTES), _) | (None, None) => (Text::bytes(), Vec::new()),
            (None, Some(pretrained)) => {
                let text = Text::of_model(pretrained.text_folder(), config.model.vocabulary, isolation)?;
                (text, pretrained.companions())
            }
            (Some(path), _) => {
                let found = bases.iter().map(|base| base.join(path)).find(|path| path.exists());
                let found = found.ok_or_else(|| {
                    let message =
                        format!("{path} does not exist; name a tokenizer.json, its folder, or {BYTES:?}");
                    Error::config("data.tokenizer", message)
                })?;
                let folder = if found.is_dir() { &found } else { found.parent().unwrap_or(Path::new(".")) };
                (Text::open(&found, isolation)?, companions(folder))
            }
        };
        let vocabulary = config.model.vocabulary;
        text.check(vocabulary)?;
        let format = RecordFormat { keys: config.data.keys.clone(), bad_lines: config.data.bad_lines };
        let read = |patterns: &[String]| text.read(patterns, bases, vocabulary, &format, true);
        let all = read(&config.data.train)?;
        let (train, valid) = match config.data.split {
            split if split > 0.0 => all.split(split).map(|(train, valid)| (train, Some(valid)))?,
            _ if config.data.valid.is_empty() => (all, None),
            _ => (all, Some(read(&config.data.valid)?)),
        };
        let model = Model::new(&config.model)?;
        let whole = || pretrained.as_ref().map_or(model.hugging_face_config(), |p| p.folder.config().clone());
        let base = pretrained.as_ref().filter(|_| config.adapter.is_some());
        let fingerprints = Fingerprints {
            train: train.fingerprint()?,
            valid: valid.as_ref().map(Corpus::fingerprint).transpose()?,
            base: base.map(|base| base.folder.tensors().fingerprint()).transpose()?,
        };
        let origin = Origin {
            config: match &config.adapter {
                Some(adapter) => peft(adapter, &model, pretrained.as_ref()).to_json(),
                None => whole(),
            },
            companions,
            tokenizer: if text.tokenizer.is_bytes() { BYTES.into() } else { TOKENIZER.into() },
            pretrained,
            fingerprints,
        };
        Ok(Source { origin, text, train, valid })
    }
}

/// The path of a model that is here, as a config can name it.
///
/// # Errors
/// [`Error::Checkpoint`] where there is nothing, or where the name is not text.
pub fn named(path: &Path) -> Result<String> {
    if !path.exists() {
        return Err(Error::checkpoint(path, absent(path)));
    }
    let message = "has a name that is not UTF-8, which a config cannot hold; rename the folder";
    nameable(path).ok_or_else(|| Error::checkpoint(path, message))
}

/// A path as a configuration, which is text, can name it: from anywhere, or at least from here.
fn nameable(path: &Path) -> Option<String> {
    let everywhere = path.canonicalize().ok().and_then(|path| path.to_str().map(String::from));
    everywhere.or_else(|| path.to_str().map(String::from))
}

/// The `adapter_config.json` of an adapter that is trained: what a saved one said, and else what PEFT needs.
fn peft(adapter: &AdapterConfig, model: &Model, pretrained: Option<&Pretrained>) -> PeftConfig {
    let base = || pretrained.and_then(|p| nameable(p.folder.path()));
    let saved = pretrained.and_then(|p| p.adapter.as_ref()).map(|(saved, _)| saved.config.clone());
    let mut config = saved.unwrap_or_else(|| adapter.peft(model));
    config.base_model = config.base_model.or_else(base);
    config.for_model(model)
}
