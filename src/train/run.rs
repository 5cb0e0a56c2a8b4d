//! A run's folder: resolved config, metrics, checkpoints, pictures.

use std::io::Write;
use std::path::{Path, PathBuf};

use super::checkpoint::{self, write_atomic};
use super::trainer::{Row, Trainer};
use crate::error::{Error, Result};
use crate::pipeline::Prediction;

/// An open run folder.
pub struct Run {
    path: PathBuf,
    metrics: std::fs::File,
    /// Held while the run lives, so that two processes do not write into one folder; the system lets go of it even
    /// after `kill -9`.
    _lock: std::fs::File,
}

impl Run {
    /// Refuses a folder that already holds a run; creates nothing.
    pub fn check_new(path: &Path) -> Result<()> {
        if path.exists() && !path.is_dir() {
            return Err(Error::config("--out", format!("{} is not a folder", path.display())));
        }
        if ["config.toml", "checkpoints", "metrics.jsonl"].iter().any(|name| path.join(name).exists()) {
            let message =
                format!("{} already holds a run; add --resume or give another folder", path.display());
            return Err(Error::config("--out", message));
        }
        Ok(())
    }

    /// Opens a folder, creating it, for a run that has done `step` steps: later rows of its metrics are dropped.
    pub fn open(path: &Path, config: &str, step: u64) -> Result<Run> {
        let refuse =
            |e: std::io::Error| Error::config("--out", format!("{} cannot be written: {e}", path.display()));
        std::fs::create_dir_all(path).map_err(refuse)?;
        let lock = std::fs::File::create(path.join(".lock")).map_err(refuse)?;
        if lock.try_lock().is_err() {
            let message = format!(
                "another process is training in {}; wait for it or give another folder",
                path.display()
            );
            return Err(Error::config("--out", message));
        }
        write_atomic(&path.join("config.toml"), config.as_bytes())?;
        let file = path.join("metrics.jsonl");
        let kept: String = match std::fs::read_to_string(&file) {
            Ok(text) if step > 0 => {
                text.lines().filter(|l| is_before(l, step)).map(|l| format!("{l}\n")).collect()
            }
            _ => String::new(),
        };
        write_atomic(&file, kept.as_bytes())?;
        let metrics = std::fs::OpenOptions::new().append(true).open(&file).map_err(Error::io(&file))?;
        Ok(Run { path: path.to_path_buf(), metrics, _lock: lock })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends a row to `metrics.jsonl`.
    pub fn log(&mut self, row: &Row) -> Result<()> {
        let line = serde_json::to_string(row).unwrap_or_default();
        writeln!(self.metrics, "{line}").map_err(Error::io(self.path.join("metrics.jsonl")))
    }

    /// Writes what steps are said to take: `prediction.json`.
    pub fn predict(&self, prediction: &Prediction) -> Result<()> {
        write_atomic(&self.path.join("prediction.json"), prediction.to_json().as_bytes())
    }

    /// Writes a checkpoint of the trainer.
    pub fn save(&self, trainer: &mut Trainer, keep: usize) -> Result<PathBuf> {
        let watch = trainer.watch();
        let contents = watch.block_on(trainer.contents())?;
        checkpoint::save(&self.path, &contents, keep)
    }

    /// Writes `timeline.svg` and `trace.json` of the last step.
    pub fn draw(&self, trainer: &Trainer) -> Result<()> {
        let timeline = trainer.timeline();
        if timeline.events.is_empty() {
            return Ok(());
        }
        let title = format!("Step {}: what every device did, measured", trainer.step_number());
        write_atomic(&self.path.join("timeline.svg"), timeline.to_svg(&title).as_bytes())?;
        write_atomic(&self.path.join("trace.json"), timeline.to_chrome_trace().as_bytes())
    }
}

fn is_before(line: &str, step: u64) -> bool {
    let row: Option<serde_json::Value> = serde_json::from_str(line).ok();
    row.and_then(|r| r["step"].as_u64()).is_some_and(|s| s <= step)
}
