//! Which files a list of paths and globs names.

use std::collections::HashSet;
use std::path::{Component, Path, PathBuf};

use crate::error::{Error, Result};
use crate::folder::files::{file_name, here};

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
    let mut reached = vec![base.to_path_buf()];
    for component in Path::new(pattern).components() {
        reached = match component {
            Component::Normal(name) => {
                let found = step(reached, &name.to_string_lossy());
                found.map_err(|problem| Error::data(format!("{pattern:?}: {problem}")))?
            }
            other => reached.into_iter().map(|path| path.join(other)).collect(),
        };
    }
    if pattern.ends_with(std::path::is_separator) {
        reached.retain(|path| path.is_dir());
    }
    Ok(reached)
}

/// What one component of a pattern matches in those of `reached` that are folders, or what is wrong. The name of a file
/// may be any bytes; to a pattern those that are not UTF-8 are a character each.
fn step(reached: Vec<PathBuf>, component: &str) -> std::result::Result<Vec<PathBuf>, String> {
    if component == "**" {
        return folders_below(reached);
    }
    let pattern = glob::Pattern::new(component).map_err(|e| format!("not a valid glob: {}", e.msg))?;
    if glob::Pattern::escape(component) == component {
        let there = reached.into_iter().map(|path| path.join(component));
        return Ok(there.filter(|path| path.symlink_metadata().is_ok()).collect());
    }
    // As in a shell, `*` leaves out hidden files: nobody means to train on .DS_Store.
    let options = glob::MatchOptions { require_literal_leading_dot: true, ..glob::MatchOptions::new() };
    let mut found = Vec::new();
    for folder in reached.into_iter().filter(|path| here(path).is_dir()) {
        let matches = |path: &PathBuf| pattern.matches_with(&file_name(path), options);
        found.extend(children(&folder)?.into_iter().filter(matches));
    }
    Ok(found)
}

/// The folders among `reached` and all below them that are not hidden. One to which several links lead is entered once,
/// under the first of its paths, so links in a circle have an end.
fn folders_below(mut reached: Vec<PathBuf>) -> std::result::Result<Vec<PathBuf>, String> {
    let (mut entered, mut found) = (HashSet::new(), Vec::new());
    // The next to enter is the last.
    reached.reverse();
    while let Some(folder) = reached.pop() {
        let real = here(&folder).canonicalize();
        if real.is_ok_and(|real| real.is_dir() && entered.insert(real)) {
            let below = children(&folder)?.into_iter().rev();
            reached.extend(below.filter(|path| !file_name(path).starts_with('.')));
            found.push(folder);
        }
    }
    Ok(found)
}

/// What lies in a folder.
fn children(folder: &Path) -> std::result::Result<Vec<PathBuf>, String> {
    // Not the entries' own paths, which begin with "./" in the folder that has no name.
    let names = std::fs::read_dir(here(folder))
        .and_then(|entries| entries.map(|entry| entry.map(|e| folder.join(e.file_name()))).collect());
    let mut paths: Vec<PathBuf> =
        names.map_err(|e| format!("the folder {} cannot be read: {e}", folder.display()))?;
    paths.sort();
    Ok(paths)
}
