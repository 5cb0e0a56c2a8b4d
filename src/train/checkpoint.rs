//! Checkpoints: a folder that is complete or absent, never half-written.
//!
//! ```text
//! <run>/checkpoints/000100/config.json            the model's configuration, as Hugging Face writes it
//!                          model.safetensors      parameters by Hugging Face's names
//!                          tokenizer.json, ...    what else a model folder has, if the run has it
//!                          optimizer.safetensors  exp_avg.<name>, exp_avg_sq.<name>, F32
//!                          state.json             whatever else the trainer needs to go on
//!                          manifest.json          step, and bytes and SHA-256 of the other files
//! <run>/checkpoints/latest                        the name of the newest folder
//!                   best                          the name of the folder of the best evaluation, if there was one
//! ```
//!
//! The checkpoint of an adapter has PEFT's adapter_config.json and adapter_model.safetensors in place of the first two.
//!
//! A folder under `checkpoints` may be a link to one elsewhere: it is read like any other, and where it is no longer wanted
//! the link goes and what it leads to stays.
//!
//! A folder is written under a hidden name, synced and renamed, and only then does `latest` name it, so a process killed
//! at any moment leaves a complete checkpoint behind. Nothing in it is executable, every byte is covered by a hash, and
//! without its last three files it is a folder that any other tool opens.
//!
//! [`Writer`] takes tensors piece by piece and [`open`] reads them so: the host never holds them all.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::config::CONFIG;
use crate::error::{Error, Result};
use crate::folder::adapter::{self, Adapter};
use crate::folder::files::{
    Fingerprint, Hidden, Mapped, UNFINISHED, Unfinished, broken, copy_into, file_name, here, hidden,
    is_taken, read_bytes, read_json, remove, sync_folder, write_json,
};
pub use crate::folder::write_atomic;
use crate::folder::{Dtype, Kind, Layout, ModelFolder, TensorWriter, Tensors, absent, model_config};

/// Where a run's checkpoints are.
pub(super) const CHECKPOINTS: &str = "checkpoints";
/// The pointers beside them.
pub(super) const POINTERS: [&str; 2] = [LATEST, BEST];

const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";
const MANIFEST: &str = "manifest.json";
const LATEST: &str = "latest";
const BEST: &str = "best";

/// A complete folder on its way out, moved aside to make room for another of the same step.
const REPLACED: &str = ".old-";

#[derive(Serialize, Deserialize)]
struct Manifest {
    step: u64,
    files: BTreeMap<String, Fingerprint>,
}

impl Manifest {
    /// Of a model or of an adapter.
    fn kind(&self) -> Kind {
        if self.files.contains_key(Kind::Adapter.config_name()) { Kind::Adapter } else { Kind::Model }
    }

    /// What every checkpoint has.
    fn required(&self) -> [&'static str; 4] {
        let kind = self.kind();
        [kind.config_name(), kind.weights_name(), OPTIMIZER, STATE]
    }
}

// --- writing ----------------------------------------------------------------------------------------------------------

/// A checkpoint that is being written, tensor by tensor. Dropped before [`Writer::finish`], it leaves nothing behind.
pub struct Writer {
    run: PathBuf,
    step: u64,
    unfinished: Unfinished,
    kind: Kind,
    weights: TensorWriter,
    optimizer: TensorWriter,
    files: BTreeMap<String, Fingerprint>,
}

impl Writer {
    /// Begins the checkpoint of a step under `run`. `layout` describes the weights, which are always one file
    /// ([`Layout::shard_bytes`] is not used); `optimizer` names the tensors of the optimizer and their shapes.
    ///
    /// # Errors
    /// [`Error::Io`] with the file that could not be written, [`Error::Checkpoint`] for two tensors of the same name.
    pub fn create(
        run: &Path,
        step: u64,
        layout: &Layout,
        optimizer: &[(String, Vec<usize>)],
    ) -> Result<Writer> {
        let root = run.join(CHECKPOINTS);
        fs::create_dir_all(&root).map_err(Error::io(&root))?;
        sync_folder(run)?;
        remove_unfinished(run);
        let unfinished = Unfinished::create(&root, step)?;
        let folder = unfinished.path();
        let config_name = layout.kind.config_name();
        let mut files = BTreeMap::new();
        files.insert(config_name.into(), write_json(&folder.join(config_name), layout.config)?);
        for path in layout.copy {
            let (name, fingerprint) = copy_into(folder, path)?;
            files.insert(name, fingerprint);
        }
        let weights = folder.join(layout.kind.weights_name());
        let weights = TensorWriter::create(&weights, layout.tensors, layout.dtype)?;
        let optimizer = TensorWriter::create(&folder.join(OPTIMIZER), optimizer, Dtype::F32)?;
        Ok(Writer { run: run.to_path_buf(), step, kind: layout.kind, weights, optimizer, files, unfinished })
    }

    /// Appends values to a tensor of the weights. They come in the order in which they were announced, each in one piece
    /// or several, and independently of those of the optimizer.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a tensor that is not due or too many values, [`Error::Io`].
    pub fn weights(&mut self, name: &str, values: &[f32]) -> Result<()> {
        self.weights.write(name, values)
    }

    /// Appends values to a tensor of the optimizer.
    ///
    /// # Errors
    /// As [`Writer::weights`].
    pub fn optimizer(&mut self, name: &str, values: &[f32]) -> Result<()> {
        self.optimizer.write(name, values)
    }

    /// Completes the checkpoint, points `latest` to it, deletes all but the newest `keep` (at least this one stays), and
    /// returns its folder. A checkpoint of the same step is replaced.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if a tensor lacks values; [`Error::Io`]. The checkpoints that were there before are then
    /// untouched.
    pub fn finish(self, state: &Value, keep: usize) -> Result<PathBuf> {
        let Writer { run, step, unfinished, kind, weights, optimizer, mut files } = self;
        let root = run.join(CHECKPOINTS);
        files.insert(kind.weights_name().into(), weights.finish()?);
        files.insert(OPTIMIZER.into(), optimizer.finish()?);
        files.insert(STATE.into(), write_json(&unfinished.path().join(STATE), state)?);
        write_json(&unfinished.path().join(MANIFEST), &Manifest { step, files })?;

        let name = folder_name(step);
        let folder = root.join(&name);
        if is_taken(&folder) {
            // Between these two renames `latest` names nothing, and readers fall back to the folder moved aside. What
            // others have moved aside stays until then: it may be all that is complete.
            let aside = root.join(hidden(REPLACED, step));
            remove(&aside).map_err(Error::io(&aside))?;
            sync_folder(unfinished.path())?;
            fs::rename(&folder, &aside).map_err(Error::io(&folder))?;
        }
        unfinished.rename(&folder)?;
        write_atomic(&root.join(LATEST), format!("{name}\n").as_bytes())?;

        // After a resume from an older step there are folders of later steps; the one just written is no candidate.
        let best = named(&root, BEST);
        let is_other = |other: u64| other != step && Some(other) != best;
        let others = numbered(&root)?.into_iter().filter(|(other, path)| is_other(*other) && path.is_dir());
        for (_, old) in others.skip(keep.saturating_sub(1)) {
            remove_folder(&old)?;
        }
        replaced(&root).iter().for_each(|(_, left)| left.remove());
        Ok(folder)
    }
}

/// Says that the checkpoint of this step, which may be about to be written, is that of the best evaluation: it stays.
///
/// # Errors
/// [`Error::Io`].
pub fn mark_best(run: &Path, step: u64) -> Result<()> {
    let root = run.join(CHECKPOINTS);
    fs::create_dir_all(&root).map_err(Error::io(&root))?;
    write_atomic(&root.join(BEST), format!("{}\n", folder_name(step)).as_bytes())
}

/// Removes what killed processes left of checkpoints that they were writing. For the process that holds the run's lock:
/// that proves that nobody is writing any more.
pub(super) fn remove_unfinished(run: &Path) {
    let is_ours = |what: &str| step_of(what).is_some() || POINTERS.contains(&what);
    let left = Hidden::find(&run.join(CHECKPOINTS), UNFINISHED).into_iter();
    left.filter(|left| is_ours(&left.what)).for_each(|left| left.remove());
}

/// Folders that were moved aside, and their steps.
fn replaced(root: &Path) -> Vec<(u64, Hidden)> {
    let hidden = Hidden::find(root, REPLACED).into_iter();
    hidden.filter_map(|hidden| Some((step_of(&hidden.what)?, hidden))).collect()
}

/// Deletes a checkpoint, its manifest first: what is left if that is cut short does not look complete.
fn remove_folder(folder: &Path) -> Result<()> {
    if !folder.is_symlink() {
        let manifest = folder.join(MANIFEST);
        remove(&manifest).map_err(Error::io(&manifest))?;
    }
    remove(folder).map_err(Error::io(folder))
}

// --- finding ----------------------------------------------------------------------------------------------------------

/// The checkpoint to resume from: the one that `latest` names or, where that is missing or names nothing, the newest
/// complete one. None if the run has never had a checkpoint.
///
/// # Errors
/// [`Error::Checkpoint`] where the run has had checkpoints and none is complete, with what is wrong with each, or where
/// `checkpoints` is no folder that can be listed.
pub fn latest(run: &Path) -> Result<Option<PathBuf>> {
    let root = run.join(CHECKPOINTS);
    if !is_taken(&root) {
        return Ok(None);
    }
    let named = named_latest(run).map(|step| root.join(folder_name(step)));
    if let Some(folder) = named.as_ref().filter(|folder| folder.join(MANIFEST).is_file()) {
        return Ok(Some(folder.clone()));
    }
    let mut candidates = numbered(&root)?;
    candidates.extend(replaced(&root).into_iter().map(|(step, hidden)| (step, hidden.path)));
    // Stable, so of the same step the folder that replaced another comes first.
    candidates.sort_by_key(|(step, _)| std::cmp::Reverse(*step));
    let mut reasons = Vec::new();
    for (_, folder) in candidates {
        match check(&folder, Files::Sizes) {
            Ok(_) => return Ok(Some(folder)),
            Err(Error::Checkpoint { path, message }) => {
                reasons.push(format!("{} {message}", path.strip_prefix(&root).unwrap_or(&path).display()));
            }
            Err(error) => reasons.push(error.to_string()),
        }
    }
    if reasons.is_empty() && is_taken(&root.join(LATEST)) {
        reasons.push(match named {
            Some(folder) => format!("{LATEST} names {}, which is gone", file_name(&folder)),
            None => format!("{LATEST} is left, and no folder"),
        });
    }
    if reasons.is_empty() {
        return Ok(None);
    }
    let more = reasons.split_off(reasons.len().min(LISTED)).len();
    let more = if more > 0 { format!("; and {more} more") } else { String::new() };
    let reasons = reasons.join("; ");
    Err(broken(
        &root,
        format!(
            "holds no complete checkpoint: {reasons}{more}. Put back what is missing, or begin another run"
        ),
    ))
}

/// Incomplete checkpoints of which it is said what is wrong with them.
const LISTED: usize = 5;

/// The step of the checkpoint that `latest` names.
pub fn named_latest(run: &Path) -> Option<u64> {
    named(&run.join(CHECKPOINTS), LATEST)
}

/// The step that a pointer names. Only digits are followed, so a damaged one cannot lead out of the folder.
fn named(root: &Path, pointer: &str) -> Option<u64> {
    let bytes = read_bytes(&root.join(pointer), 64).ok()?;
    step_of(std::str::from_utf8(&bytes).ok()?.trim())
}

/// The name of the folder of a step.
pub fn folder_name(step: u64) -> String {
    format!("{step:06}")
}

/// The folder of a step's checkpoint, which need not exist.
pub fn folder(run: &Path, step: u64) -> PathBuf {
    run.join(CHECKPOINTS).join(folder_name(step))
}

/// The steps of the checkpoints that a run has, newest first; folders that are damaged count too.
///
/// # Errors
/// [`Error::Io`] if the folder cannot be listed.
pub fn steps(run: &Path) -> Result<Vec<u64>> {
    let root = run.join(CHECKPOINTS);
    let folders = if root.is_dir() { numbered(&root)? } else { Vec::new() };
    Ok(folders.into_iter().map(|(step, _)| step).collect())
}

/// The run whose checkpoint a folder is, if it is one.
pub fn run_of(folder: &Path) -> Option<PathBuf> {
    let folder = folder.canonicalize().ok()?;
    step_of(&file_name(&folder))?;
    let checkpoints = folder.parent().filter(|parent| parent.ends_with(CHECKPOINTS))?;
    checkpoints.parent().filter(|run| run.join(CONFIG).is_file()).map(Path::to_path_buf)
}

/// The folder that `path` means: a folder of a checkpoint, model or adapter is its own, and a run folder means its latest
/// checkpoint.
///
/// # Errors
/// [`Error::Checkpoint`] saying what was looked for.
pub fn resolve(path: &Path) -> Result<PathBuf> {
    let (config, adapter) = (Kind::Model.config_name(), Kind::Adapter.config_name());
    let weights = [Kind::Model.weights_name().into(), Kind::Model.index_name()];
    if path.join(config).is_file() && weights.iter().any(|name| path.join(name).is_file())
        || path.join(adapter).is_file()
    {
        return Ok(path.to_path_buf());
    }
    if let Some(folder) = latest(path)? {
        return Ok(folder);
    }
    if path.join(config).is_file() {
        return Ok(path.to_path_buf());
    }
    Err(broken(
        path,
        match path {
            _ if path.is_dir() => {
                "is a folder, but neither a model folder (no config.json) nor a run folder with a complete checkpoint (checkpoints/)".into()
            }
            _ if path.exists() => "is a file; give the run, checkpoint or model folder that it is in".into(),
            _ => absent(path),
        },
    ))
}

/// Whatever is named by a step, newest first.
fn numbered(root: &Path) -> Result<Vec<(u64, PathBuf)>> {
    if !here(root).is_dir() {
        return Err(broken(root, "is not a folder; move it away and put the run's checkpoints there"));
    }
    let list = |entries: fs::ReadDir| entries.map(|entry| Ok(entry?.path())).collect();
    let entries: Vec<PathBuf> = fs::read_dir(here(root))
        .and_then(list)
        .map_err(|error| broken(root, format!("cannot be listed: {error}")))?;
    let step = |path: PathBuf| Some((step_of(&file_name(&path))?, path));
    let mut found: Vec<_> = entries.into_iter().filter_map(step).collect();
    found.sort_by_key(|(step, _)| std::cmp::Reverse(*step));
    Ok(found)
}

fn step_of(name: &str) -> Option<u64> {
    // `parse` alone would also take "+5".
    name.bytes().all(|b| b.is_ascii_digit()).then(|| name.parse().ok()).flatten()
}

// --- reading ----------------------------------------------------------------------------------------------------------

/// An open checkpoint. Tensors are read when they are asked for.
#[derive(Debug)]
pub struct Checkpoint {
    /// Of a model or of an adapter.
    pub kind: Kind,
    /// Optimizer steps done.
    pub step: u64,
    /// The configuration in Hugging Face's or PEFT's terms.
    pub config: Value,
    /// The weights.
    pub weights: Tensors,
    /// The optimizer's state.
    pub optimizer: Tensors,
    /// Whatever else the trainer needs to go on.
    pub state: Value,
}

/// Opens a checkpoint folder after verifying the size and hash of every file.
///
/// # Errors
/// [`Error::Checkpoint`] with the damaged file; if an earlier checkpoint beside this one is intact, the message says so.
pub fn open(folder: &Path) -> Result<Checkpoint> {
    let read = || {
        let manifest = check(folder, Files::All)?;
        let kind = manifest.kind();
        Ok(Checkpoint {
            kind,
            step: manifest.step,
            config: read_json(&folder.join(kind.config_name()))?,
            weights: Tensors::open(&folder.join(kind.weights_name()))?,
            optimizer: Tensors::open(&folder.join(OPTIMIZER))?,
            state: read_json(&folder.join(STATE))?,
        })
    };
    read().map_err(|error: Error| match (error, previous_good(folder)) {
        (Error::Checkpoint { path, message }, Some(previous)) => Error::checkpoint(
            path,
            format!(
                "{message}; the previous good one is {0} (continue from it with --resume --from {0})",
                previous.display()
            ),
        ),
        (error, _) => error,
    })
}

/// Opens a model folder, and verifies it first if it is a checkpoint's.
///
/// # Errors
/// As [`ModelFolder::open`]; [`Error::Checkpoint`] for a damaged checkpoint.
pub fn open_model(folder: &Path) -> Result<ModelFolder> {
    if folder.join(MANIFEST).exists() {
        check(folder, Files::Weights)?;
    }
    ModelFolder::open(folder)
}

/// What the `config.json` of a folder says that has it and no weights; none for any other.
///
/// # Errors
/// As [`model_config`].
pub fn without_weights(folder: &Path) -> Result<Option<Value>> {
    let weights = [Kind::Model.weights_name().into(), Kind::Model.index_name(), CHECKPOINTS.into()];
    let others = weights.iter().any(|name| is_taken(&folder.join(name)));
    let is_bare = !others && folder.join(Kind::Model.config_name()).is_file();
    (is_bare && !folder.join(Kind::Adapter.config_name()).is_file()).then(|| model_config(folder)).transpose()
}

/// Opens an adapter folder, and verifies it first if it is a checkpoint's.
///
/// # Errors
/// As [`adapter::open`]; [`Error::Checkpoint`] for a damaged checkpoint.
pub fn open_adapter(folder: &Path) -> Result<Adapter> {
    if folder.join(MANIFEST).exists() {
        check(folder, Files::Weights)?;
    }
    adapter::open(folder)
}

/// What a manifest is compared with.
#[derive(Clone, Copy, PartialEq)]
enum Files {
    /// The sizes of all files.
    Sizes,
    /// Sizes and hashes of all files.
    All,
    /// Sizes and hashes of the configuration and the weights.
    Weights,
}

/// Compares a folder with its manifest.
fn check(folder: &Path, which: Files) -> Result<Manifest> {
    let path = folder.join(MANIFEST);
    let manifest: Manifest = read_json(&path)?;
    // No hash covers the manifest itself. Its other fields are proved by the files; the step has only the folder's name.
    if step_of(&file_name(folder)).is_some_and(|step| step != manifest.step) {
        return Err(broken(path, "says another step than the folder's name; it is damaged"));
    }
    let required = manifest.required();
    if let Some(name) = required.iter().find(|name| !manifest.files.contains_key(**name)) {
        return Err(broken(path, format!("does not list {name}; it is damaged")));
    }
    for (name, expected) in &manifest.files {
        // The manifest is as little to be believed as the rest.
        if name.contains(['/', '\\', ':']) || name == ".." {
            return Err(broken(path, format!("lists {name:?}, which is not in the folder; it is damaged")));
        }
        if which == Files::Weights && !required[..2].contains(&name.as_str()) {
            continue;
        }
        let path = folder.join(name);
        let bytes = Mapped::open(&path)?;
        let (is, should) = (bytes.len() as u64, expected.bytes);
        if is != should {
            return Err(broken(path, format!("has {is} bytes instead of {should}; it is damaged")));
        }
        if which != Files::Sizes && bytes.sha256()? != expected.sha256 {
            return Err(broken(path, "does not match its SHA-256 in manifest.json; it is damaged"));
        }
    }
    Ok(manifest)
}

/// The newest intact checkpoint of an earlier step beside `folder`.
fn previous_good(folder: &Path) -> Option<PathBuf> {
    let step = step_of(&file_name(folder))?;
    let earlier = numbered(folder.parent()?).ok()?.into_iter().filter(|(other, _)| *other < step);
    earlier.map(|(_, folder)| folder).find(|folder| check(folder, Files::All).is_ok())
}
