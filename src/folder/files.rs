//! Files that are read in place and written whole: maps whose pages are let go of, hashes, and atomic replacement.

use std::fmt::Display;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// Files and folders that are still being written.
pub(crate) const UNFINISHED: &str = ".tmp-";

/// Bytes of a map that are used at a time before their pages are let go of.
pub(crate) const PIECE: usize = 4 << 20;

/// A file's bytes, read where they lie. The file must not be truncated while this lives; what is replaced by rename
/// stays as it was.
pub(crate) struct Mapped {
    #[cfg(not(target_arch = "wasm32"))]
    bytes: memmap2::Mmap,
    #[cfg(target_arch = "wasm32")]
    bytes: Vec<u8>,
}

impl Mapped {
    /// Maps a regular file (opening a pipe would wait for a writer).
    pub(crate) fn open(path: &Path) -> Result<Mapped> {
        let unreadable = |e: std::io::Error| match e.kind() {
            std::io::ErrorKind::NotFound => broken(path, "is missing, so the folder is not complete"),
            _ => broken(path, format!("cannot be read: {e}")),
        };
        if !fs::metadata(path).map_err(unreadable)?.is_file() {
            return Err(broken(path, "is not a regular file"));
        }
        Mapped::map(path).map_err(unreadable)
    }

    #[cfg(not(target_arch = "wasm32"))]
    fn map(path: &Path) -> std::io::Result<Mapped> {
        let file = File::open(path)?;
        // SAFETY: the map is read-only and bytes have no invalid values. What can go wrong is another program that
        // truncates the file, which is why the contract above excludes it.
        let bytes = unsafe { memmap2::Mmap::map(&file) }?;
        // A hint: tensors are read from end to end.
        #[cfg(unix)]
        let _ = bytes.advise(memmap2::Advice::Sequential);
        Ok(Mapped { bytes })
    }

    #[cfg(target_arch = "wasm32")]
    fn map(path: &Path) -> std::io::Result<Mapped> {
        Ok(Mapped { bytes: fs::read(path)? })
    }

    /// Has the system read these bytes while others are in use. A hint.
    pub(crate) fn expect(&self, range: Range<usize>) {
        #[cfg(unix)]
        if range.end <= self.bytes.len() {
            let _ = self.bytes.advise_range(memmap2::Advice::WillNeed, range.start, range.len());
        }
        #[cfg(not(unix))]
        let _ = range;
    }

    /// Takes these bytes out of the process's memory; reading them again brings them back from the file.
    pub(crate) fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        if range.end <= self.bytes.len() && !range.is_empty() {
            // SAFETY: the pages of a read-only map of a file are never dirty, so dropping them loses nothing. A hint:
            // where it fails the pages stay.
            let _ = unsafe {
                self.bytes.unchecked_advise_range(
                    memmap2::UncheckedAdvice::DontNeed,
                    range.start,
                    range.len(),
                )
            };
        }
        #[cfg(not(unix))]
        let _ = range;
    }

    /// The bytes of a range, piece by piece; each piece's pages are let go of after use.
    pub(crate) fn pieces(&self, range: Range<usize>, mut use_piece: impl FnMut(&[u8])) {
        for start in range.clone().step_by(PIECE) {
            let piece = start..range.end.min(start + PIECE);
            use_piece(&self.bytes[piece.clone()]);
            self.release(piece);
        }
    }

    /// The SHA-256 of the whole file in hexadecimal digits.
    pub(crate) fn sha256(&self) -> String {
        let mut sha256 = Sha256::new();
        self.pieces(0..self.len(), |piece| sha256.update(piece));
        hex(&sha256.finalize())
    }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

/// Reads a JSON file.
pub(crate) fn read_json<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<T> {
    serde_json::from_slice(&Mapped::open(path)?).map_err(|e| broken(path, format!("invalid JSON: {e}")))
}

/// An [`Error::Checkpoint`] on one line of bearable length, whatever strings of a damaged file the message quotes.
pub(crate) fn broken(path: impl AsRef<Path>, message: impl ToString) -> Error {
    Error::checkpoint(path, one_line(&message.to_string(), 400))
}

/// Control characters made spaces, and at most `most` characters.
pub(crate) fn one_line(text: &str, most: usize) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(most).collect()
}

// --- writing ----------------------------------------------------------------------------------------------------------

/// What a file should hold.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Fingerprint {
    pub(crate) bytes: u64,
    pub(crate) sha256: String,
}

/// A new file that fingerprints what was meant to be written, not what the disk made of it.
pub(crate) struct Hashed {
    file: BufWriter<File>,
    sha256: Sha256,
    bytes: u64,
}

impl Hashed {
    pub(crate) fn create(path: &Path) -> std::io::Result<Hashed> {
        Ok(Hashed { file: BufWriter::new(File::create(path)?), sha256: Sha256::new(), bytes: 0 })
    }

    /// Flushes and syncs.
    pub(crate) fn finish(mut self) -> std::io::Result<Fingerprint> {
        self.flush()?;
        self.file.get_ref().sync_all()?;
        Ok(Fingerprint { bytes: self.bytes, sha256: hex(&self.sha256.finalize()) })
    }
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

/// Writes and syncs a new JSON file.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<Fingerprint> {
    let attempt = || {
        let mut file = Hashed::create(path)?;
        serde_json::to_writer_pretty(&mut file, value)?;
        file.write_all(b"\n")?;
        file.finish()
    };
    attempt().map_err(Error::io(path))
}

/// Copies a file into a folder under its own name, and syncs the copy.
pub(crate) fn copy_into(folder: &Path, from: &Path) -> Result<(String, Fingerprint)> {
    let name = file_name(from);
    let source = Mapped::open(from)?;
    let to = folder.join(&name);
    let attempt = || {
        let mut file = Hashed::create(&to)?;
        file.write_all(&source)?;
        file.finish()
    };
    Ok((name, attempt().map_err(Error::io(&to))?))
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

/// A folder under a hidden name that disappears with everything in it unless it is renamed to its own.
pub(crate) struct Unfinished {
    path: PathBuf,
    renamed: bool,
}

impl Unfinished {
    /// Creates the hidden folder for `name` in `parent`; what a process of the same id left there is removed.
    pub(crate) fn create(parent: &Path, name: impl Display) -> Result<Unfinished> {
        let path = parent.join(hidden(UNFINISHED, name));
        if path.exists() {
            fs::remove_dir_all(&path).map_err(Error::io(&path))?;
        }
        fs::create_dir(&path).map_err(Error::io(&path))?;
        Ok(Unfinished { path, renamed: false })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Syncs the folder and gives it its name.
    pub(crate) fn rename(mut self, to: &Path) -> Result<()> {
        sync_folder(&self.path)?;
        fs::rename(&self.path, to).map_err(Error::io(to))?;
        self.renamed = true;
        sync_folder(to.parent().unwrap_or(to))
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.renamed {
            // The error that led here is the one to report; what cannot be removed is hidden and named as unfinished.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// Makes renames and new files in a folder durable. Only Unix can, and elsewhere the file system has its own journal.
pub(crate) fn sync_folder(folder: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(here(folder)).and_then(|file| file.sync_all()).map_err(Error::io(folder))?;
    }
    Ok(())
}

/// The name of something that is not complete yet or no longer wanted; other processes use other names.
pub(crate) fn hidden(prefix: &str, what: impl Display) -> String {
    // A browser's page has neither processes nor files: there the write that follows reports that.
    let process = if cfg!(target_arch = "wasm32") { 0 } else { std::process::id() };
    format!("{prefix}{what}-{process}")
}

/// The parent of a bare file name is "", which the system does not take for the working directory.
pub(crate) fn here(folder: &Path) -> &Path {
    if folder.as_os_str().is_empty() { Path::new(".") } else { folder }
}

pub(crate) fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Two digits a byte.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
