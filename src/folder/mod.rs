//! Folders in Hugging Face's layout, read lazily and written as a stream.
//!
//! ```text
//! config.json                       the model's configuration
//! model.safetensors                 its parameters, F32, F16 or BF16; or, in several files,
//! model.safetensors.index.json      which file each parameter is in
//! tokenizer.json, ...               what belongs to it and is copied along
//! ```
//!
//! A folder comes from anywhere, so nothing in it is believed: headers must describe their files exactly, and neither
//! the index nor a link may lead out of the folder. The host never holds a whole model: [`Tensors::read`] converts the
//! elements that are asked for, and [`FolderWriter`] takes them piece by piece.

pub mod adapter;
pub(crate) mod files;
mod hub;
mod targets;
mod tensors;
mod write;

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use crate::error::{Error, Result};
#[cfg(not(target_arch = "wasm32"))]
pub(crate) use files::hex;
pub use files::{Fingerprint, write_atomic};
use files::{broken, file_name, here, read_json};
pub use hub::absent;
pub use tensors::{Dtype, TensorInfo, Tensors};
pub(crate) use write::TensorWriter;
pub use write::{FolderWriter, Layout};

/// What a folder holds; it decides the names of its files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A whole model, as transformers reads it.
    Model,
    /// A LoRA adapter, as PEFT reads it.
    Adapter,
}

impl Kind {
    /// The configuration's file.
    pub fn config_name(self) -> &'static str {
        match self {
            Kind::Model => "config.json",
            Kind::Adapter => "adapter_config.json",
        }
    }

    /// The weights' file, where there is one.
    pub fn weights_name(self) -> &'static str {
        match self {
            Kind::Model => "model.safetensors",
            Kind::Adapter => "adapter_model.safetensors",
        }
    }

    /// The file that names the files of the weights, where there are several.
    pub fn index_name(self) -> String {
        format!("{}.index.json", self.weights_name())
    }
}

/// What goes with a model and is neither configuration nor weights.
const COMPANIONS: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
];

/// An open model folder.
#[derive(Debug)]
pub struct ModelFolder {
    path: PathBuf,
    config: Value,
    tensors: Tensors,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl ModelFolder {
    /// Reads the configuration and the headers of all weights.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] with the file that is missing or damaged, that the index or a link leads out of the folder
    /// to, or with the tensors that the index and the files do not agree on.
    pub fn open(path: &Path) -> Result<ModelFolder> {
        let config = model_config(path)?;
        let index = path.join(Kind::Model.index_name());
        let single = path.join(Kind::Model.weights_name());
        let tensors = if single.symlink_metadata().is_ok() || index.symlink_metadata().is_err() {
            Tensors::open(&inside(path, Kind::Model.weights_name())?)?
        } else {
            open_shards(path)?
        };
        Ok(ModelFolder { path: path.to_path_buf(), config, tensors })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What config.json says.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// The parameters.
    pub fn tensors(&self) -> &Tensors {
        &self.tensors
    }

    /// The parameters, for [`Tensors::rename`].
    pub fn tensors_mut(&mut self) -> &mut Tensors {
        &mut self.tensors
    }

    /// The files of the tokenizer and of generation that are there.
    pub fn companions(&self) -> Vec<PathBuf> {
        companions(&self.path)
    }
}

/// What `config.json` of a model folder says, whether or not there are weights.
///
/// # Errors
/// [`Error::Checkpoint`] for a file that is missing or damaged.
pub fn model_config(folder: &Path) -> Result<Value> {
    let path = inside(folder, Kind::Model.config_name())?;
    let config: Value = read_json(&path)?;
    if config.is_object() { Ok(config) } else { Err(broken(path, "is not a JSON object")) }
}

/// The files of a folder's tokenizer and of generation that are there: what another folder of the same model needs.
pub fn companions(folder: &Path) -> Vec<PathBuf> {
    COMPANIONS.iter().filter_map(|name| inside(folder, name).ok()).filter(|path| path.is_file()).collect()
}

fn open_shards(folder: &Path) -> Result<Tensors> {
    let path = inside(folder, &Kind::Model.index_name())?;
    let index: Index = read_json(&path)?;
    let mut wanted: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (tensor, file) in &index.weight_map {
        wanted.entry(file).or_default().push(tensor);
    }
    if wanted.is_empty() {
        return Err(broken(path, "names no tensor"));
    }
    let mut tensors = Tensors::empty(folder);
    for (file, names) in wanted {
        let shard = inside(folder, file).map_err(|error| match error {
            Error::Checkpoint { message, .. } => broken(&path, format!("names {file:?}, which {message}")),
            other => other,
        })?;
        let found: std::collections::HashSet<String> = tensors.add(&shard)?.into_iter().collect();
        let lacking: Vec<&str> =
            names.into_iter().filter(|name| !found.contains(*name) && !tensors::is_harmless(name)).collect();
        if !lacking.is_empty() {
            let message = format!("lacks tensors that the index places in it: {}", lacking.join(", "));
            return Err(broken(shard, message));
        }
    }
    Ok(tensors)
}

/// The path of a file that lies in the folder, links followed. The cache of the Hugging Face hub is the one exception:
/// there `snapshots/<revision>/` holds links to `blobs/` beside `snapshots`.
fn inside(folder: &Path, name: &str) -> Result<PathBuf> {
    let path = folder.join(name);
    let relative = Path::new(name);
    // A backslash or a colon may mean another folder or drive on another system.
    let plain = relative.components().all(|part| matches!(part, Component::Normal(_)));
    if name.is_empty() || !plain || name.contains(['\\', ':', '\0']) {
        return Err(broken(path, "is not a path below the folder"));
    }
    let Ok(real) = path.canonicalize() else {
        // A dangling link, or a file that is not there.
        let message = "is missing, so the folder is not complete";
        return Err(broken(path, message));
    };
    let root = here(folder).canonicalize().map_err(Error::io(folder))?;
    let cache = root.parent().filter(|parent| file_name(parent) == "snapshots").and_then(Path::parent);
    if !real.starts_with(&root) && !cache.is_some_and(|cache| real.starts_with(cache.join("blobs"))) {
        let message =
            format!("is a link that leaves the folder (to {}); put the file itself there", real.display());
        return Err(broken(path, message));
    }
    Ok(path)
}
