//! Checkpoints: a folder that is complete or absent, never half-written.
//!
//! ```text
//! <run>/checkpoints/000100/config.json            the model's configuration, as Hugging Face writes it
//!                          model.safetensors      parameters by Hugging Face's names, F32
//!                          optimizer.safetensors  exp_avg.<name>, exp_avg_sq.<name>, F32
//!                          state.json             whatever else the trainer needs to go on
//!                          manifest.json          step, and bytes and SHA-256 of the four files
//! <run>/checkpoints/latest                        the name of the newest folder
//! ```
//!
//! A folder is written under a hidden name, synced and renamed, and only then does `latest` name it, so a process killed
//! at any moment leaves a complete checkpoint behind. Nothing in it is executable, every byte is covered by a hash, and
//! config.json with model.safetensors is a model folder that any other tool opens.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

pub use super::tensors::Tensor;
use super::tensors::{broken, header, read_file, read_tensors, write_tensors};
use crate::error::{Error, Result};

const CONFIG: &str = "config.json";
const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";
const MANIFEST: &str = "manifest.json";
const LATEST: &str = "latest";
/// What the manifest covers.
const FILES: [&str; 4] = [CONFIG, MODEL, OPTIMIZER, STATE];

/// Folders and files that are still being written.
const UNFINISHED: &str = ".tmp-";
/// A complete folder on its way out, moved aside to make room for another of the same step.
const REPLACED: &str = ".old-";

/// All that a checkpoint holds. Tensors are stored, and come back, sorted by name.
#[derive(Clone, Debug, PartialEq)]
pub struct Contents {
    /// Optimizer steps done.
    pub step: u64,
    /// The model's configuration in Hugging Face's terms.
    pub config: Value,
    /// Parameters.
    pub model: Vec<Tensor>,
    /// Optimizer state.
    pub optimizer: Vec<Tensor>,
    /// Whatever else the trainer needs to go on.
    pub state: Value,
}

#[derive(Serialize, Deserialize)]
struct Manifest {
    step: u64,
    files: BTreeMap<String, Fingerprint>,
}

#[derive(Serialize, Deserialize)]
struct Fingerprint {
    bytes: u64,
    sha256: String,
}

// --- writing ----------------------------------------------------------------------------------------------------------

/// Writes a checkpoint under `run`, points `latest` to it, deletes all but the newest `keep` (at least this one stays),
/// and returns its folder. A checkpoint of the same step is replaced.
///
/// # Errors
/// [`Error::Io`] with the file that could not be written; the checkpoints that were there before are then untouched.
/// [`Error::Checkpoint`] for a tensor whose name is taken or whose shape and data disagree.
pub fn save(run: &Path, contents: &Contents, keep: usize) -> Result<PathBuf> {
    let root = run.join("checkpoints");
    fs::create_dir_all(&root).map_err(Error::io(&root))?;
    sync_folder(run)?;
    // Before writing, because what a killed process left may be just the space that is missing now.
    remove_hidden(&root, UNFINISHED)?;

    let name = format!("{:06}", contents.step);
    let unfinished = root.join(hidden(UNFINISHED, contents.step));
    if let Err(error) = write_folder(&unfinished, contents) {
        // The first error is the one to report; what cannot be removed now, the next save removes.
        let _ = fs::remove_dir_all(&unfinished);
        return Err(error);
    }

    let folder = root.join(&name);
    if folder.exists() {
        // Between these two renames `latest` names nothing, and readers fall back to the folder moved aside.
        remove_hidden(&root, REPLACED)?;
        fs::rename(&folder, root.join(hidden(REPLACED, contents.step))).map_err(Error::io(&folder))?;
    }
    fs::rename(&unfinished, &folder).map_err(Error::io(&folder))?;
    sync_folder(&root)?;
    write_atomic(&root.join(LATEST), format!("{name}\n").as_bytes())?;

    // After a resume from an older step there are folders of later steps; the one just written is no candidate.
    let others = numbered(&root)?.into_iter().filter(|(step, _)| *step != contents.step);
    for (_, old) in others.skip(keep.saturating_sub(1)) {
        remove_folder(&old)?;
    }
    remove_hidden(&root, REPLACED)?;
    Ok(folder)
}

/// Replaces a file so that readers, and a crash at any moment, see the old bytes or the new ones: written beside it,
/// synced, renamed, and the folder synced. Not for two threads that write the same file.
///
/// # Errors
/// [`Error::Io`] with the path.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let unfinished = path.with_file_name(hidden(UNFINISHED, file_name(path)));
    let write = || {
        let mut file = File::create(&unfinished)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&unfinished, path)
    };
    if let Err(error) = write() {
        let _ = fs::remove_file(&unfinished);
        return Err(Error::io(path)(error));
    }
    sync_folder(path.parent().unwrap_or(path))
}

fn write_folder(folder: &Path, contents: &Contents) -> Result<()> {
    fs::create_dir(folder).map_err(Error::io(folder))?;
    let mut files = BTreeMap::new();
    for (name, value) in [(CONFIG, &contents.config), (STATE, &contents.state)] {
        files.insert(name.into(), write_file(&folder.join(name), |file| write_json(file, value))?);
    }
    for (name, tensors) in [(MODEL, &contents.model), (OPTIMIZER, &contents.optimizer)] {
        let path = folder.join(name);
        let mut tensors: Vec<&Tensor> = tensors.iter().collect();
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        let header = header(&path, &tensors)?;
        files.insert(name.into(), write_file(&path, |file| write_tensors(file, &header, &tensors))?);
    }
    let manifest = Manifest { step: contents.step, files };
    write_file(&folder.join(MANIFEST), |file| write_json(file, &manifest))?;
    sync_folder(folder)
}

/// Writes and syncs one file, and fingerprints what was meant to be written, not what the disk made of it.
fn write_file(path: &Path, write: impl FnOnce(&mut Hashed) -> std::io::Result<()>) -> Result<Fingerprint> {
    let attempt = || {
        let mut hashed =
            Hashed { file: BufWriter::new(File::create(path)?), sha256: Sha256::new(), bytes: 0 };
        write(&mut hashed)?;
        hashed.flush()?;
        hashed.file.get_ref().sync_all()?;
        Ok(Fingerprint { bytes: hashed.bytes, sha256: hex(hashed.sha256) })
    };
    attempt().map_err(Error::io(path))
}

struct Hashed {
    file: BufWriter<File>,
    sha256: Sha256,
    bytes: u64,
}

impl Write for Hashed {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.sha256.update(&bytes[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

fn write_json(file: &mut Hashed, value: &impl Serialize) -> std::io::Result<()> {
    serde_json::to_writer_pretty(&mut *file, value)?;
    file.write_all(b"\n")
}

/// Makes renames and new files in a folder durable. Only Unix can, and elsewhere the file system has its own journal.
fn sync_folder(folder: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(here(folder)).and_then(|file| file.sync_all()).map_err(Error::io(folder))?;
    }
    Ok(())
}

/// Deletes a checkpoint, its manifest first: what is left if that is cut short does not look complete.
fn remove_folder(folder: &Path) -> Result<()> {
    let manifest = folder.join(MANIFEST);
    if manifest.exists() {
        fs::remove_file(&manifest).map_err(Error::io(&manifest))?;
    }
    fs::remove_dir_all(folder).map_err(Error::io(folder))
}

/// The name of something that is not a checkpoint yet or no longer; other processes use other names.
fn hidden(prefix: &str, what: impl Display) -> String {
    // A browser's page has neither processes nor files: there the write that follows reports that.
    let process = if cfg!(target_arch = "wasm32") { 0 } else { std::process::id() };
    format!("{prefix}{what}-{process}")
}

fn remove_hidden(root: &Path, prefix: &str) -> Result<()> {
    for path in entries(root)? {
        if file_name(&path).starts_with(prefix) {
            if path.is_dir() {
                remove_folder(&path)?
            } else {
                fs::remove_file(&path).map_err(Error::io(&path))?
            }
        }
    }
    Ok(())
}

// --- finding ----------------------------------------------------------------------------------------------------------

/// The checkpoint to resume from: the one that `latest` names or, where that is missing or names nothing, the newest
/// complete one. None if the run has no checkpoint.
///
/// # Errors
/// [`Error::Io`] if the folder cannot be listed.
pub fn latest(run: &Path) -> Result<Option<PathBuf>> {
    let root = run.join("checkpoints");
    if !root.is_dir() {
        return Ok(None);
    }
    // Only digits are followed, so a damaged pointer cannot lead out of the folder.
    let step = fs::read_to_string(root.join(LATEST)).ok().and_then(|name| step_of(name.trim()));
    let named = step.map(|step| root.join(format!("{step:06}")));
    if let Some(folder) = named.filter(|folder| folder.join(MANIFEST).is_file()) {
        return Ok(Some(folder));
    }
    let mut candidates = numbered(&root)?;
    let replaced = entries(&root)?.into_iter().filter_map(|path| {
        let step = file_name(&path).strip_prefix(REPLACED)?.split('-').next().and_then(step_of)?;
        Some((step, path))
    });
    candidates.extend(replaced);
    // Stable, so of the same step the folder that replaced another comes first.
    candidates.sort_by_key(|(step, _)| std::cmp::Reverse(*step));
    Ok(candidates.into_iter().map(|(_, folder)| folder).find(|folder| check(folder, None).is_ok()))
}

/// The folder with config.json that `path` means: a checkpoint folder or a model folder is its own, and a run folder
/// means its latest checkpoint.
///
/// # Errors
/// [`Error::Checkpoint`] saying what was looked for.
pub fn resolve(path: &Path) -> Result<PathBuf> {
    if path.join(CONFIG).is_file() && path.join(MODEL).is_file() {
        return Ok(path.to_path_buf());
    }
    if let Some(folder) = latest(path)? {
        return Ok(folder);
    }
    if path.join(CONFIG).is_file() {
        return Ok(path.to_path_buf());
    }
    Err(broken(
        path,
        match path {
            _ if path.is_dir() => {
                "is neither a model folder (no config.json) nor a run folder with a complete checkpoint (checkpoints/)"
            }
            _ if path.exists() => "is a file; give the run, checkpoint or model folder that it is in",
            _ => "does not exist; give a run, checkpoint or model folder",
        },
    ))
}

/// The folders named by a step, newest first.
fn numbered(root: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let folders = entries(root)?.into_iter().filter(|path| path.is_dir());
    let mut folders: Vec<_> = folders.filter_map(|path| Some((step_of(&file_name(&path))?, path))).collect();
    folders.sort_by_key(|(step, _)| std::cmp::Reverse(*step));
    Ok(folders)
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let list = |entries: fs::ReadDir| entries.map(|entry| Ok(entry?.path())).collect();
    fs::read_dir(here(folder)).and_then(list).map_err(Error::io(folder))
}

/// The parent of a bare file name is "", which the system does not take for the working directory.
fn here(folder: &Path) -> &Path {
    if folder.as_os_str().is_empty() { Path::new(".") } else { folder }
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn step_of(name: &str) -> Option<u64> {
    // `parse` alone would also take "+5".
    name.bytes().all(|b| b.is_ascii_digit()).then(|| name.parse().ok()).flatten()
}

// --- reading ----------------------------------------------------------------------------------------------------------

/// Reads a checkpoint folder after verifying the size and hash of every file.
///
/// # Errors
/// [`Error::Checkpoint`] with the damaged file; if an earlier checkpoint beside this one is intact, the message says so.
pub fn load(folder: &Path) -> Result<Contents> {
    let read = || {
        let manifest = check(folder, Some(&FILES))?;
        Ok(Contents {
            step: manifest.step,
            config: read_json(&folder.join(CONFIG))?,
            model: read_tensors(&folder.join(MODEL))?,
            optimizer: read_tensors(&folder.join(OPTIMIZER))?,
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

/// Reads the configuration and the parameters of a model folder in Hugging Face's layout: config.json and
/// model.safetensors with F32, F16 or BF16 tensors, sorted by name. A checkpoint is one too; where there is a manifest,
/// both files are verified.
///
/// # Errors
/// [`Error::Checkpoint`] with the file that is missing or damaged, or the tensor of another type.
pub fn load_model(folder: &Path) -> Result<(Value, Vec<Tensor>)> {
    if folder.join(MANIFEST).exists() {
        check(folder, Some(&[CONFIG, MODEL]))?;
    }
    let index = folder.join("model.safetensors.index.json");
    if index.is_file() && !folder.join(MODEL).exists() {
        return Err(broken(
            index,
            "weights in several files cannot be read; merge them into model.safetensors",
        ));
    }
    Ok((read_json(&folder.join(CONFIG))?, read_tensors(&folder.join(MODEL))?))
}

/// Compares a folder with its manifest: the sizes of all files or, where `names` are given, sizes and hashes of those.
fn check(folder: &Path, names: Option<&[&str]>) -> Result<Manifest> {
    let path = folder.join(MANIFEST);
    let manifest: Manifest = read_json(&path)?;
    // No hash covers the manifest itself. Its other fields are proved by the files; the step has only the folder's name.
    if step_of(&file_name(folder)).is_some_and(|step| step != manifest.step) {
        return Err(broken(path, "says another step than the folder's name; it is damaged"));
    }
    for &name in names.unwrap_or(&FILES) {
        let Some(expected) = manifest.files.get(name) else {
            return Err(broken(path, format!("does not list {name}; it is damaged")));
        };
        let path = folder.join(name);
        let bytes = read_file(&path)?;
        let (is, should) = (bytes.len() as u64, expected.bytes);
        if is != should {
            return Err(broken(path, format!("has {is} bytes instead of {should}; it is damaged")));
        }
        if names.is_some() && hex(Sha256::new_with_prefix(&*bytes)) != expected.sha256 {
            return Err(broken(path, "does not match its SHA-256 in manifest.json; it is damaged"));
        }
    }
    Ok(manifest)
}

/// The newest intact checkpoint of an earlier step beside `folder`.
fn previous_good(folder: &Path) -> Option<PathBuf> {
    let step = step_of(&file_name(folder))?;
    let earlier = numbered(folder.parent()?).ok()?.into_iter().filter(|(other, _)| *other < step);
    earlier.map(|(_, folder)| folder).find(|folder| check(folder, Some(&FILES)).is_ok())
}

fn read_json<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<T> {
    serde_json::from_slice(&read_file(path)?).map_err(|e| broken(path, format!("invalid JSON: {e}")))
}

fn hex(sha256: Sha256) -> String {
    sha256.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
