//! Files that are read in place and written whole: maps that notice a change and whose pages are let go of, hashes, and
//! atomic replacement. What is deleted or replaced is never followed where it is a link.

use std::cmp::Ordering;
use std::fmt::Display;
use std::fs::{self, File, Metadata};
use std::io::{BufWriter, Read, Write};
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

// --- reading ----------------------------------------------------------------------------------------------------------

/// Most bytes of a file that is read as a whole by [`read_text`]: texts that people write, and what this program writes.
/// As data a list of nothing in JSON takes up to forty times as much memory.
pub(crate) const TEXT: u64 = 16 << 20;
/// Most bytes of a text in TOML, which takes above sixty times as much while it is parsed.
const TOML: u64 = 2 << 20;
/// Most bytes of a file that is read as a whole by [`read_whole`]: the tokenizers of the largest vocabularies have a
/// quarter of it.
#[cfg(not(target_arch = "wasm32"))]
pub(crate) const WHOLE: u64 = 256 << 20;

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
    #[cfg(not(target_arch = "wasm32"))]
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
            #[cfg(not(target_arch = "wasm32"))]
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

    /// An [`Error::Checkpoint`] about a file that belongs to a folder.
    pub(crate) fn broken(self, path: &Path) -> Error {
        match self {
            Unreadable::Missing => broken(path, "is missing, so the folder is not complete"),
            other => broken(path, other),
        }
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
#[cfg(not(target_arch = "wasm32"))]
pub(crate) fn read_text(path: &Path) -> std::result::Result<String, Unreadable> {
    String::from_utf8(read_bytes(path, TEXT)?).map_err(|error| {
        let before = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        Unreadable::Binary { line: 1 + before.iter().filter(|&&byte| byte == b'\n').count() }
    })
}

/// Files and folders that are still being written.
pub(crate) const UNFINISHED: &str = ".tmp-";

/// Bytes of a map that are used at a time before their pages are let go of.
pub(crate) const PIECE: usize = 4 << 20;

/// A file's bytes, read where they lie. Deleting the file, or replacing it by rename, leaves them as they are; who
/// truncates or rewrites it changes them under the reader. [`Mapped::look`] and [`Mapped::pieces`] notice that, and who
/// reads otherwise asks [`Mapped::unchanged`].
///
/// Nothing is kept open, since a text may have more files than a process may open: the file is found by its name again.
pub(crate) struct Mapped {
    path: PathBuf,
    /// What the system said of the file when it was mapped.
    opened: Metadata,
    #[cfg(not(target_arch = "wasm32"))]
    bytes: memmap2::Mmap,
    #[cfg(target_arch = "wasm32")]
    bytes: Vec<u8>,
}

impl Mapped {
    /// Maps a regular file.
    pub(crate) fn open(path: &Path) -> Result<Mapped> {
        let attempt = || {
            let file = open_regular(path)?;
            let opened = file.metadata()?;
            Ok(Mapped { path: path.to_path_buf(), opened, bytes: Mapped::map(file)? })
        };
        attempt().map_err(|e: Unreadable| e.broken(path))
    }

    #[cfg(not(target_arch = "wasm32"))]
    fn map(file: File) -> std::io::Result<memmap2::Mmap> {
        // SAFETY: the map is read-only and bytes have no invalid values. What can go wrong is another program that
        // truncates the file: readers ask before they read, and who loses the race ends with a signal, not with memory
        // that is not its own.
        let bytes = unsafe { memmap2::Mmap::map(&file) }?;
        // A hint: tensors are read from end to end.
        #[cfg(unix)]
        let _ = bytes.advise(memmap2::Advice::Sequential);
        Ok(bytes)
    }

    #[cfg(target_arch = "wasm32")]
    fn map(mut file: File) -> std::io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// Whether the bytes are still those that were mapped, as far as the file's length and time tell.
    ///
    /// # Errors
    /// [`Error::Changed`] that says what has happened to the file.
    pub(crate) fn unchanged(&self) -> Result<()> {
        // No file of this name, or another one, is no change of this one.
        let Some(now) = fs::metadata(&self.path).ok().filter(|now| is_same(now, &self.opened)) else {
            return Ok(());
        };
        let (before, after) = (self.opened.len(), now.len());
        let what = match after.cmp(&before) {
            Ordering::Less => format!("was truncated from {before} to {after} bytes"),
            Ordering::Greater => format!("has grown from {before} to {after} bytes"),
            Ordering::Equal if now.modified().ok() == self.opened.modified().ok() => return Ok(()),
            Ordering::Equal => "was rewritten".into(),
        };
        let message = format!("{what} while it was in use; go on when nothing writes to it, or use a copy");
        Err(Error::changed(&self.path, message))
    }

    /// What `look` makes of some of the bytes.
    ///
    /// # Errors
    /// [`Error::Changed`] if the file is, or meanwhile becomes, another than was mapped.
    pub(crate) fn look<T>(&self, range: Range<usize>, look: impl FnOnce(&[u8]) -> T) -> Result<T> {
        self.unchanged()?;
        let seen = look(&self.bytes[range]);
        self.unchanged()?;
        Ok(seen)
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
    ///
    /// # Errors
    /// As [`Mapped::look`].
    pub(crate) fn pieces(&self, range: Range<usize>, mut use_piece: impl FnMut(&[u8])) -> Result<()> {
        for start in range.clone().step_by(PIECE) {
            let piece = start..range.end.min(start + PIECE);
            self.look(piece.clone(), &mut use_piece)?;
            self.release(piece);
        }
        Ok(())
    }

    /// The SHA-256 of the whole file in hexadecimal digits.
    ///
    /// # Errors
    /// As [`Mapped::look`].
    pub(crate) fn sha256(&self) -> Result<String> {
        let mut sha256 = Sha256::new();
        self.pieces(0..self.len(), |piece| sha256.update(piece))?;
        Ok(hex(&sha256.finalize()))
    }
}

/// Whether both describe one file. Where the system has no number for that, it does not let go of a mapped file's name.
fn is_same(a: &Metadata, b: &Metadata) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        (a.dev(), a.ino()) == (b.dev(), b.ino())
    }
    #[cfg(not(unix))]
    {
        let _ = (a, b);
        true
    }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

/// The bytes of a file of a folder that is used as a whole, such as a tokenizer.
#[cfg(not(target_arch = "wasm32"))]
pub(crate) fn read_whole(path: &Path) -> Result<Vec<u8>> {
    read_bytes(path, WHOLE).map_err(|e| e.broken(path))
}

/// Refuses a text that is too long to be parsed as TOML; `place` is what the error names.
pub(crate) fn check_toml(text: &str, place: &str) -> Result<()> {
    match text.len() as u64 > TOML {
        true => Err(Unreadable::Large { most: TOML }.config(Path::new(place))),
        false => Ok(()),
    }
}

/// Reads a JSON file of a folder, of at most [`TEXT`] bytes.
pub(crate) fn read_json<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<T> {
    let bytes = read_bytes(path, TEXT).map_err(|e| e.broken(path))?;
    serde_json::from_slice(&bytes).map_err(|e| broken(path, format!("invalid JSON: {e}")))
}

/// An [`Error::Checkpoint`].
pub(crate) fn broken(path: impl AsRef<Path>, message: impl ToString) -> Error {
    Error::checkpoint(path, message.to_string())
}

// --- writing ----------------------------------------------------------------------------------------------------------

/// What a file should hold, or data should be: equal ones are the same data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// How many bytes.
    pub bytes: u64,
    /// Their SHA-256, or that of [`sample`]s of them, in hexadecimal digits.
    pub sha256: String,
}

/// What is looked at of `len` elements to tell them from others: all of them, `piece` at a time, or where that would be
/// more than `most` pieces, so many spread evenly from the first element to the last.
pub(crate) fn sample(len: usize, piece: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let all = len.div_ceil(piece);
    let spread = move |i: usize| ((len - piece) as u128 * i as u128 / (most - 1) as u128) as usize;
    (0..all.min(most)).map(move |i| {
        let start = if all <= most { i * piece } else { spread(i) };
        start..len.min(start + piece)
    })
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
    let source = open_regular(from).map_err(|e| e.broken(from))?;
    let to = folder.join(&name);
    let attempt = || {
        let mut file = Hashed::create(&to)?;
        std::io::copy(&mut &source, &mut file)?;
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
    replace(path, |file| file.write_all(bytes))
}

/// As [`write_atomic`], for what is not in memory as a whole.
pub(crate) fn replace(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> std::io::Result<()>,
) -> Result<()> {
    let unfinished = Hidden::prepare(path).map_err(Error::io(path))?;
    let attempt = || {
        // A new file, so that it is no link that another user has put there.
        let mut file = BufWriter::new(File::create_new(&unfinished)?);
        write(&mut file)?;
        file.flush()?;
        file.get_ref().sync_all()?;
        fs::rename(&unfinished, path)
    };
    if let Err(error) = attempt() {
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
    /// Creates the hidden folder for `name` in `parent`.
    pub(crate) fn create(parent: &Path, name: impl Display) -> Result<Unfinished> {
        let path = parent.join(name.to_string());
        let path = Hidden::prepare(&path).map_err(Error::io(&path))?;
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

/// Something in a folder that [`hidden`] has named.
pub(crate) struct Hidden {
    /// What it is or was to become.
    pub(crate) what: String,
    /// Who named it.
    process: u32,
    pub(crate) path: PathBuf,
}

impl Hidden {
    /// Everything in a folder with this prefix; nothing where it cannot be listed.
    pub(crate) fn find(folder: &Path, prefix: &str) -> Vec<Hidden> {
        let entries = fs::read_dir(here(folder)).into_iter().flatten().flatten();
        let read = |entry: fs::DirEntry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            let (what, process) = name.strip_prefix(prefix)?.rsplit_once('-')?;
            let digits = process.bytes().all(|b| b.is_ascii_digit());
            let process = process.parse().ok().filter(|_| digits)?;
            Some(Hidden { what: what.into(), process, path: entry.path() })
        };
        entries.filter_map(read).collect()
    }

    /// The path under which `target` is to be written, with nothing there. What processes that were killed have left of
    /// the same target goes, because it may be just the space that is missing now.
    fn prepare(target: &Path) -> std::io::Result<PathBuf> {
        let (name, path) = (file_name(target), target.with_file_name(hidden(UNFINISHED, file_name(target))));
        let left = Hidden::find(target.parent().unwrap_or(target), UNFINISHED).into_iter();
        left.filter(|left| left.what == name && left.is_abandoned()).for_each(|left| left.remove());
        remove(&path)?;
        Ok(path)
    }

    /// Whether the process that named it is gone.
    #[cfg(unix)]
    fn is_abandoned(&self) -> bool {
        // SAFETY: signal 0 is not sent; the system only says whether it could be.
        let is_gone = |process| unsafe { libc::kill(process, 0) } != 0;
        let error = std::io::Error::last_os_error;
        i32::try_from(self.process).is_ok_and(|id| is_gone(id) && error().raw_os_error() == Some(libc::ESRCH))
    }

    /// Whether the process that named it must be gone: here the system is not asked, but nothing takes a day to write.
    #[cfg(not(unix))]
    fn is_abandoned(&self) -> bool {
        let age = fs::symlink_metadata(&self.path).and_then(|found| found.modified()).map(|at| at.elapsed());
        self.process != 0 && age.is_ok_and(|age| age.is_ok_and(|age| age.as_secs() > 24 * 3600))
    }

    /// Removes it. That it cannot be removed is not worth a failure: it stays hidden and named as unfinished.
    pub(crate) fn remove(&self) {
        let _ = remove(&self.path);
    }
}

/// Removes a file, a folder with everything in it, or a link, whose target stays. There may be none.
pub(crate) fn remove(path: &Path) -> std::io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() || found.is_symlink() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Whether anything has this name, be it a link that leads nowhere.
pub(crate) fn is_taken(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
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

#[cfg(test)]
mod tests {
    use super::sample;

    #[test]
    fn a_sample_is_everything_or_begins_and_ends_where_the_whole_does() {
        let of = |len| sample(len, 10, 4).collect::<Vec<_>>();
        assert!(of(0).is_empty());
        assert_eq!((of(7).len(), of(7)[0].clone()), (1, 0..7));
        assert_eq!(of(40), [0..10, 10..20, 20..30, 30..40]);
        assert_eq!(of(41), [0..10, 10..20, 20..30, 31..41]);
        assert_eq!(of(1000), [0..10, 330..340, 660..670, 990..1000]);
    }
}
