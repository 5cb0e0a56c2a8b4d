//! A run's folder: resolved config, metrics, checkpoints, pictures.

use std::io::Write;
use std::path::{Path, PathBuf};

use super::checkpoint::{self, mark_best, open, write_atomic};
use super::curve::{self, Curve, Point};
use super::source::Origin;
use super::trainer::{Row, Trainer};
use crate::error::{Error, Result};
use crate::gpu::Device;
use crate::pipeline::{Plan, Prediction};

/// An open run folder.
pub struct Run {
    path: PathBuf,
    metrics: std::fs::File,
    /// What checkpoints take over.
    origin: Origin,
    /// Checkpoints that are kept.
    keep: usize,
    /// The losses of all its rows.
    curve: Curve,
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

    /// Opens a folder, creating it, for a run that has done `step` steps: later rows of its metrics are dropped. Of its
    /// checkpoints the newest `keep` will stay.
    pub fn open(path: &Path, config: &str, origin: Origin, keep: usize, step: u64) -> Result<Run> {
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
        let mut curve = Curve::default();
        kept.lines().filter_map(|line| serde_json::from_str(line).ok()).for_each(|point| curve.push(point));
        Ok(Run { path: path.to_path_buf(), metrics, origin, keep, curve, _lock: lock })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends a row to `metrics.jsonl`.
    pub fn log(&mut self, row: &Row) -> Result<()> {
        self.curve.push(Point::from(row));
        let line = serde_json::to_string(row).unwrap_or_default();
        writeln!(self.metrics, "{line}").map_err(Error::io(self.path.join("metrics.jsonl")))
    }

    /// Writes what steps are said to take: `prediction.json`.
    pub fn predict(&self, prediction: &Prediction) -> Result<()> {
        write_atomic(&self.path.join("prediction.json"), prediction.to_json().as_bytes())
    }

    /// The step and the loss of the best evaluation, the earliest of several.
    pub fn best(&self) -> Option<(u64, f64)> {
        self.curve.best().map(|best| (best.step, best.loss))
    }

    /// How many evaluations in a row were no better than the best.
    pub fn stale(&self) -> u64 {
        let best = self.best().map_or(0, |(step, _)| step);
        self.curve.evaluations().iter().filter(|evaluation| evaluation.step > best).count() as u64
    }

    /// What to say after an evaluation of a model that begins to learn its text by heart. `patience` is the config's.
    pub fn overfitting(&self, patience: u64) -> Option<String> {
        let rise = curve::overfitting(self.curve.evaluations())?;
        let (best, _) = self.best()?;
        Some(curve::warn(rise, &checkpoint::folder(&self.path, best), patience > 0))
    }

    /// Writes a checkpoint of the trainer. The one of the best evaluation stays whatever comes after it.
    pub fn save(&self, trainer: &mut Trainer) -> Result<PathBuf> {
        if let Some((step, _)) = self.best().filter(|(step, _)| *step == trainer.step_number()) {
            mark_best(&self.path, step)?;
        }
        let watch = trainer.watch();
        watch.block_on(trainer.save(&self.path, &self.origin, self.keep))
    }

    /// Goes on with another plan: everything that training depends on moves through a checkpoint, and the next step is
    /// the one that would have been next.
    pub fn move_to(&self, trainer: &mut Trainer, plan: Plan, devices: &[Device]) -> Result<()> {
        let folder = self.save(trainer)?;
        let watch = trainer.watch();
        watch.block_on(trainer.relaunch(plan, devices))?;
        let watch = trainer.watch();
        watch.block_on(async {
            trainer.begin(&self.origin).await?;
            trainer.restore(&open(&folder)?, &folder).await
        })
    }

    /// Writes `loss.svg` of all steps, and `timeline.svg` and `trace.json` of the last one.
    pub fn draw(&self, trainer: &Trainer) -> Result<()> {
        let title = format!("Losses up to step {}", trainer.step_number());
        let picture = self.curve.to_svg(&title, &checkpoint::steps(&self.path)?);
        write_atomic(&self.path.join("loss.svg"), picture.as_bytes())?;
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
