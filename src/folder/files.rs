//! Files that are read in place and written whole: maps whose pages are let go of, hashes, and atomic replacement.

use std::fmt::Display;
use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

// --- reading ----------------------------------------------------------------------------------------------------------

/// Most bytes of a file that is read as a whole by [`read_text`]: texts that people write, and what this program writes.
pub(crate) const TEXT: u64 = 64 << 20;

/// Most bytes of a TOML file: parsed, it takes some sixty times as many.
const TOML: u64 = 4 << 20;

/// Why a file cannot be read, as the end of a sentence that begins with its name.
#[derive(Debug)]
pub(crate) enum Unreadable {
    /// There is none.
    Missing,
    /// A folder.
    Folder,
    /// A pipe, a socket or a device, which may wait for ever or have no end.
    Irregular,
    /// It has more bytes than anyone means.
    Large {
        /// How many may be read.
        most: u64,
    },
    /// It is not UTF-8 from this byte on.
    Binary {
        /// The line, from 1.
        line: usize,
    },
    /// Whatever the system says.
    System(std::io::Error),
}

impl std::fmt::Display for Unreadable {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Unreadable::Missing => f.write_str("does not exist"),
            Unreadable::Folder => f.write_str("is a folder, not a file"),
            Unreadable::Irregular => f.write_str("is not a regular file"),
            Unreadable::Large { most } => write!(f, "has more than {most} bytes, which is not meant here"),
            Unreadable::Binary { line } => write!(f, "is not text: line {line} is not valid UTF-8"),
            Unreadable::System(error) => write!(f, "cannot be read: {error}"),
        }
    }
}

impl From<std::io::Error> for Unreadable {
    fn from(error: std::io::Error) -> Unreadable {
        match error.kind() {
            std::io::ErrorKind::NotFound => Unreadable::Missing,
            _ => Unreadable::System(error),
        }
    }
}

impl Unreadable {
    /// An [`Error::Config`] about the file.
    pub(crate) fn config(self, path: &Path) -> Error {
        Error::config(path.to_string_lossy(), self.to_string())
    }
}

/// Opens a regular file for reading. The only way in which this program opens files that it reads: whoever opens a pipe
/// waits for a writer, and a device may have no end.
pub(crate) fn open_regular(path: &Path) -> std::result::Result<File, Unreadable> {
    let mut options = fs::OpenOptions::new();
    options.read(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NONBLOCK);
    let file = options.open(path).map_err(|error| match fs::metadata(path) {
        // Where a folder or a socket cannot even be opened.
        Ok(found) if found.is_dir() => Unreadable::Folder,
        Ok(found) if !found.is_file() => Unreadable::Irregular,
        _ => error.into(),
    })?;
    let found = file.metadata()?;
    match () {
        () if found.is_file() => Ok(file),
        () if found.is_dir() => Err(Unreadable::Folder),
        () => Err(Unreadable::Irregular),
    }
}

/// The bytes of a regular file of at most `most` bytes.
pub(crate) fn read_bytes(path: &Path, most: u64) -> std::result::Result<Vec<u8>, Unreadable> {
    let mut bytes = Vec::new();
    // What the system says of its size is not what can be read, in /proc for one.
    open_regular(path)?.take(most + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > most { Err(Unreadable::Large { most }) } else { Ok(bytes) }
}

/// The text of a regular file of at most [`TEXT`] bytes.
pub(crate) fn read_text(path: &Path) -> std::result::Result<String, Unreadable> {
    utf8(read_bytes(path, TEXT)?)
}

/// The text of a regular file that is to be parsed as TOML.
pub(crate) fn read_toml(path: &Path) -> std::result::Result<String, Unreadable> {
    utf8(read_bytes(path, TOML)?)
}

fn utf8(bytes: Vec<u8>) -> std::result::Result<String, Unreadable> {
    String::from_utf8(bytes).map_err(|error| {
        let before = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        Unreadable::Binary { line: 1 + before.iter().filter(|&&byte| byte == b'\n').count() }
    })
}

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
    /// Maps a regular file.
    pub(crate) fn open(path: &Path) -> Result<Mapped> {
        let unreadable = |e: Unreadable| match e {
            Unreadable::Missing => broken(path, "is missing, so the folder is not complete"),
            other => broken(path, other),
        };
        let file = open_regular(path).map_err(unreadable)?;
        Mapped::map(file).map_err(|e| unreadable(e.into()))
    }

    #[cfg(not(target_arch = "wasm32"))]
    fn map(file: File) -> std::io::Result<Mapped> {
        // SAFETY: the map is read-only and bytes have no invalid values. What can go wrong is another program that
        // truncates the file, which is why the contract above excludes it.
        let bytes = unsafe { memmap2::Mmap::map(&file) }?;
        // A hint: tensors are read from end to end.
        #[cfg(unix)]
        let _ = bytes.advise(memmap2::Advice::Sequential);
        Ok(Mapped { bytes })
    }

    #[cfg(target_arch = "wasm32")]
    fn map(mut file: File) -> std::io::Result<Mapped> {
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(Mapped { bytes })
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

/// An [`Error::Checkpoint`].
pub(crate) fn broken(path: impl AsRef<Path>, message: impl ToString) -> Error {
    Error::checkpoint(path, message.to_string())
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
