//! Which files a list of paths and globs names.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The regular files that `patterns` name, in their order. A pattern is a path or a glob; a relative one is tried against
/// each folder of `bases` in turn and the first where a file matches wins. The matches of one pattern are sorted by path,
/// a file that matched before is left out, and folders are skipped.
///
/// # Errors
/// [`Error::Data`] naming the pattern: nothing matches, a match cannot be read or is no regular file, the glob is
/// malformed.
pub(super) fn find(patterns: &[String], bases: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let (mut seen, mut files) = (HashSet::new(), Vec::new());
    for pattern in patterns {
        for path in matches(pattern, bases)? {
            let real = path
                .canonicalize()
                .map_err(|e| Error::data(format!("{pattern:?}: cannot read {}: {e}", path.display())))?;
            if seen.insert(real) {
                files.push(path);
            }
        }
    }
    Ok(files)
}

/// The regular files that one pattern names, sorted by path; at least one.
fn matches(pattern: &str, bases: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let (absolute, nowhere) = (Path::new(pattern).is_absolute(), [PathBuf::new()]);
    let bases = if absolute { &nowhere } else { bases };
    let mut folder = None;
    for base in bases {
        let mut files = Vec::new();
        for path in expand(pattern, base)? {
            let unreadable = |e| Error::data(format!("{pattern:?}: cannot read {}: {e}", path.display()));
            let kind = std::fs::metadata(&path).map_err(unreadable)?;
            if kind.is_dir() {
                folder = Some(path);
            } else if kind.is_file() {
                files.push(path);
            } else {
                // Opening a pipe would wait for a writer, and a device has no end.
                return Err(Error::data(format!(
                    "{pattern:?}: {} is not a regular file; copy what it yields to one",
                    path.display()
                )));
            }
        }
        if !files.is_empty() {
            files.sort();
            return Ok(files);
        }
    }
    Err(Error::data(match folder {
        Some(path) => format!(
            "{pattern:?} matches no file, only the folder {0}; write {1:?} for the files in it",
            path.display(),
            Path::new(pattern).join("*")
        ),
        None if absolute => format!("{pattern:?} matches no file; check the path"),
        None => {
            // The parent of a bare file name is "", and means the working directory.
            let name =
                |b: &PathBuf| if b.as_os_str().is_empty() { ".".into() } else { b.display().to_string() };
            let mut tried: Vec<String> = bases.iter().map(name).collect();
            tried.dedup();
            format!("{pattern:?} matches no file in {}; check the path", tried.join(" or "))
        }
    }))
}

/// Everything that the pattern matches below `base`, or nothing.
fn expand(pattern: &str, base: &Path) -> Result<Vec<PathBuf>> {
    // A file whose name merely looks like a glob ("notes[1].txt") is meant literally.
    let literal = base.join(pattern);
    if literal.symlink_metadata().is_ok() {
        return Ok(vec![literal]);
    }
    let folder = base.to_str().ok_or_else(|| {
        Error::data(format!("{pattern:?}: the folder {} is not valid UTF-8; rename it", base.display()))
    })?;
    let whole = Path::new(&glob::Pattern::escape(folder)).join(pattern);
    // As in a shell, `*` leaves out hidden files: nobody means to train on .DS_Store.
    let options = glob::MatchOptions { require_literal_leading_dot: true, ..glob::MatchOptions::new() };
    glob::glob_with(&whole.to_string_lossy(), options)
        .map_err(|e| Error::data(format!("{pattern:?} is not a valid glob: {}", e.msg)))?
        .map(|path| path.map_err(|e| Error::data(format!("{pattern:?}: {e}"))))
        .collect()
}
