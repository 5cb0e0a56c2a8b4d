//! `metrics.jsonl` read again: a JSON object a line for every step that a run has done.
//!
//! A process that is killed while it writes leaves half a row at the end, which counts as nothing. Any other line that
//! is no row has been damaged by somebody else: it costs that row alone, its number is kept, and so is the whole file
//! when a run that goes on leaves it out.

use std::fs::File;
use std::io::{BufRead, BufReader, Error as IoError, ErrorKind, Read, Result as IoResult, Write};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::error::Result;
use crate::folder::files::{Unreadable, open_regular, replace};

/// The file's name in a run's folder.
pub const METRICS: &str = "metrics.jsonl";

/// Most bytes of a line. A row has some 200 for each device.
const LONGEST: u64 = 1 << 20;

/// Damaged lines whose numbers are kept.
const NUMBERED: usize = 5;

/// What is read of a row.
#[derive(Clone, Debug, Deserialize)]
pub struct Entry {
    /// Steps done, this one included.
    pub step: u64,
    /// Wall-clock seconds.
    pub step_seconds: Option<f64>,
    /// Loss of the step's batch. Of a number that was not finite, none is written.
    pub loss: Option<f64>,
    /// Learning rate of the step.
    pub learning_rate: Option<f64>,
    /// Loss on the text for evaluation, if it was due.
    pub valid_loss: Option<f64>,
    /// Steps that were done when the plan in force began; earlier versions did not say.
    pub plan_since_step: Option<u64>,
    /// That plan in words.
    pub plan: Option<String>,
    /// The devices in pipeline order.
    #[serde(default)]
    pub devices: Vec<DeviceEntry>,
}

/// What is read of a device's share of a step.
#[derive(Clone, Debug, Deserialize)]
pub struct DeviceEntry {
    /// Part of the step in which its queue worked.
    pub busy_fraction: Option<f64>,
}

/// What a line turns out to be.
enum Line {
    Row(Entry),
    /// The beginning of a row.
    Half,
    Damaged,
}

impl Line {
    fn parse(line: &[u8]) -> Line {
        // What serde lets pass: bytes that are no text, in a name that nobody asks for, and an array for a struct.
        let text = match std::str::from_utf8(line) {
            Ok(text) if text.starts_with('{') => text,
            Err(error) if error.error_len().is_none() && line.starts_with(b"{") => return Line::Half,
            _ => return Line::Damaged,
        };
        match serde_json::from_str(text) {
            Ok(entry) => Line::Row(entry),
            Err(error) if error.is_eof() => Line::Half,
            Err(_) => Line::Damaged,
        }
    }
}

/// The rows of a run, and the lines that are none.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    /// In the order of the file.
    pub entries: Vec<Entry>,
    /// Lines that have been damaged.
    pub damaged: usize,
    /// The numbers of the first of them, from 1.
    numbers: Vec<usize>,
}

impl Metrics {
    /// Reads rows, none of which are kept in memory as a whole.
    ///
    /// # Errors
    /// Those of the reader. Whatever it yields is rows or damaged lines.
    pub fn read(reader: impl BufRead) -> IoResult<Metrics> {
        Metrics::copy(reader, |_| true, std::io::sink())
    }

    /// Reads the file of a run; without one there are no rows.
    pub(crate) fn open(run: &Path) -> std::result::Result<Metrics, Unreadable> {
        match open_regular(&run.join(METRICS)) {
            Ok(file) => Ok(Metrics::read(BufReader::new(file))?),
            Err(Unreadable::Missing) => Ok(Metrics::default()),
            Err(error) => Err(error),
        }
    }

    /// Leaves in the file of a run only the rows up to a step. If lines were damaged, the file as it was is kept beside
    /// it under the name that is returned.
    pub(crate) fn cut(run: &Path, step: u64) -> Result<(Metrics, Option<PathBuf>)> {
        let path = run.join(METRICS);
        let old = match open_regular(&path) {
            Ok(file) => Some(file),
            Err(Unreadable::Missing) => None,
            Err(error) => return Err(error.config(&path)),
        };
        let (mut kept, mut aside) = (Metrics::default(), None);
        replace(&path, |out| {
            if let Some(old) = old {
                kept = Metrics::copy(BufReader::new(old), |entry| entry.step <= step, out)?;
            }
            if kept.damaged > 0 {
                aside = Some(keep_aside(&path)?);
            }
            Ok(())
        })?;
        Ok((kept, aside))
    }

    /// Reads rows and writes those that are wanted.
    fn copy(
        mut reader: impl BufRead,
        wanted: impl Fn(&Entry) -> bool,
        mut out: impl Write,
    ) -> IoResult<Metrics> {
        let (mut metrics, mut line) = (Metrics::default(), Vec::new());
        for number in 1.. {
            line.clear();
            if reader.by_ref().take(LONGEST).read_until(b'\n', &mut line)? == 0 {
                break;
            }
            let ended = line.ends_with(b"\n");
            let long = !ended && line.len() as u64 == LONGEST;
            if long {
                reader.skip_until(b'\n')?;
            }
            let text = line.trim_ascii();
            match Line::parse(text) {
                Line::Row(entry) if !long => {
                    if wanted(&entry) {
                        out.write_all(text)?;
                        out.write_all(b"\n")?;
                        metrics.entries.push(entry);
                    }
                }
                Line::Half if !ended && !long => {}
                _ if text.is_empty() => {}
                _ => {
                    metrics.damaged += 1;
                    metrics.numbers.extend((metrics.numbers.len() < NUMBERED).then_some(number));
                }
            }
        }
        Ok(metrics)
    }

    /// Which lines are damaged, as the beginning of a sentence; none if none are.
    pub fn damage(&self) -> Option<String> {
        let numbers: Vec<String> = self.numbers.iter().map(usize::to_string).collect();
        let others = if self.damaged > self.numbers.len() { " and others" } else { "" };
        match (self.damaged, &numbers[..]) {
            (0, _) => None,
            (1, [number]) => Some(format!("line {number} is damaged")),
            (count, numbers) => Some(format!("{count} lines are damaged ({}{others})", numbers.join(", "))),
        }
    }

    /// Steps with an evaluation, and its loss.
    pub fn evaluations(&self) -> impl Iterator<Item = (u64, f64)> {
        self.entries.iter().filter_map(|entry| Some((entry.step, entry.valid_loss?)))
    }
}

/// Copies a file beside itself, under the first name that is free.
fn keep_aside(path: &Path) -> IoResult<PathBuf> {
    let mut original = open_regular(path).map_err(|error| IoError::other(error.to_string()))?;
    let mut copy = path.with_added_extension("damaged");
    let mut number = 1;
    let mut file = loop {
        match File::create_new(&copy) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            created => break created?,
        }
        number += 1;
        copy = path.with_added_extension(format!("damaged-{number}"));
    };
    std::io::copy(&mut original, &mut file)?;
    file.sync_all()?;
    Ok(copy)
}
