//! A run's folder: resolved config, metrics, checkpoints, pictures.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

use super::checkpoint::{self, CHECKPOINTS, POINTERS, mark_best, open, remove_unfinished, write_atomic};
pub use super::config::CONFIG;
use super::curve::{self, Curve, Point};
use super::metrics::{METRICS, Metrics};
use super::source::Origin;
use super::trainer::{Row, Trainer};
use crate::error::{Error, Result};
use crate::folder::files::{Hidden, UNFINISHED, is_taken};
use crate::gpu::Device;
use crate::pipeline::Plan;
use crate::plan::Machine;
use crate::timeline::Prediction;

/// What steps are said to take.
pub const PREDICTION: &str = "prediction.json";
/// What the planner knew of the devices.
pub const MACHINE: &str = "machine.toml";
/// The course of the losses, as a picture.
pub const LOSSES: &str = "loss.svg";
/// What every device did in a step, as a picture.
pub const TIMELINE: &str = "timeline.svg";
/// The same for ui.perfetto.dev.
pub const TRACE: &str = "trace.json";

/// The files that a run writes beside its checkpoints.
const FILES: [&str; 7] = [CONFIG, METRICS, PREDICTION, MACHINE, LOSSES, TIMELINE, TRACE];

/// An open run folder.
pub struct Run {
    path: PathBuf,
    metrics: File,
    /// What checkpoints take over.
    origin: Origin,
    /// Checkpoints that are kept.
    keep: usize,
    /// The losses of all its rows.
    curve: Curve,
    /// What steps are said to take, and by what machine; none without a planner.
    promise: Option<(Prediction, Machine)>,
    /// What was damaged.
    warning: Option<String>,
    /// Held while the run lives, so that two processes do not write into one folder; the system lets go of it even
    /// after `kill -9`.
    _lock: File,
}

impl Run {
    /// Refuses a folder that already holds a run; creates nothing.
    pub fn check_new(path: &Path) -> Result<()> {
        if is_taken(path) && !path.is_dir() {
            return Err(Error::config("--out", format!("{} is not a folder", path.display())));
        }
        if [CONFIG, CHECKPOINTS, METRICS].iter().any(|name| is_taken(&path.join(name))) {
            let message =
                format!("{} already holds a run; add --resume or give another folder", path.display());
            return Err(Error::config("--out", message));
        }
        Ok(())
    }

    /// Opens a folder, creating it, for a run that has done `step` steps: later rows of its metrics are dropped, and what
    /// killed processes left half-written is removed. Of its checkpoints the newest `keep` will stay.
    ///
    /// # Errors
    /// [`Error::Config`] where the folder cannot be used or another process trains in it; nothing is touched then.
    pub fn open(path: &Path, config: &str, origin: Origin, keep: usize, step: u64) -> Result<Run> {
        std::fs::create_dir_all(path).map_err(|error| unusable(path, error))?;
        let pointers = POINTERS.iter().map(|name| path.join(CHECKPOINTS).join(name));
        for file in FILES.iter().map(|name| path.join(name)).chain(pointers) {
            // Anything else is replaced.
            if file.symlink_metadata().is_ok_and(|found| found.is_dir()) {
                let message =
                    format!("{} is a folder where the run writes a file; move it away", file.display());
                return Err(Error::config("--out", message));
            }
        }
        let lock = lock(path)?;
        // The lock proves that whoever wrote them is gone.
        let left = Hidden::find(path, UNFINISHED).into_iter();
        left.filter(|left| FILES.contains(&left.what.as_str())).for_each(|left| left.remove());
        remove_unfinished(path);
        let (metrics, aside) = Metrics::cut(path, step)?;
        let file = path.join(METRICS);
        let warning = metrics.damage().zip(aside).map(|(damage, aside)| {
            let file = file.display();
            format!("{file}: {damage} and left out; the file as it was is {}", aside.display())
        });
        let mut curve = Curve::default();
        metrics.entries.iter().for_each(|entry| curve.push(Point::from(entry)));
        let metrics = OpenOptions::new().append(true).open(&file).map_err(Error::io(&file))?;
        write_atomic(&path.join(CONFIG), config.as_bytes())?;
        let (path, promise) = (path.to_path_buf(), None);
        Ok(Run { path, metrics, origin, keep, curve, promise, warning, _lock: lock })
    }

    /// What was found damaged when the folder was opened, and what became of it.
    pub fn warning(&self) -> Option<&str> {
        self.warning.as_deref()
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends a row to `metrics.jsonl`.
    pub fn log(&mut self, row: &Row) -> Result<()> {
        self.curve.push(Point::from(row));
        let line = serde_json::to_string(row).unwrap_or_default();
        writeln!(self.metrics, "{line}").map_err(Error::io(self.path.join(METRICS)))
    }

    /// Sets what the steps from here on are said to take, and what the planner knew of the machine then.
    pub fn predict(&mut self, prediction: Prediction, machine: Machine) {
        self.promise = Some((prediction, machine));
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

    /// Goes on with another plan, on these devices: everything that training depends on moves through a checkpoint, and the
    /// next step is the one that would have been next.
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

    /// Writes `loss.svg` of all steps, and of the last one `timeline.svg`, `trace.json`, and what its plan promised: what
    /// is compared lies side by side, whenever the run ends.
    pub fn draw(&self, trainer: &Trainer) -> Result<()> {
        let title = format!("Losses up to step {}", trainer.step_number());
        let picture = self.curve.to_svg(&title, &checkpoint::steps(&self.path)?);
        write_atomic(&self.path.join(LOSSES), picture.as_bytes())?;
        let timeline = trainer.timeline();
        if timeline.events.is_empty() {
            return Ok(());
        }
        let title = format!("Step {}: what every device did, measured", trainer.step_number());
        write_atomic(&self.path.join(TIMELINE), timeline.from_its_start().to_svg(&title).as_bytes())?;
        write_atomic(&self.path.join(TRACE), timeline.to_chrome_trace().as_bytes())?;
        let promise = self.promise.as_ref();
        let promised = promise.map(|(prediction, machine)| (prediction.to_json(), machine.to_toml()));
        let (prediction, machine) = promised.unzip();
        for (name, text) in [(PREDICTION, prediction), (MACHINE, machine)] {
            let path = self.path.join(name);
            match text {
                Some(text) => write_atomic(&path, text.as_bytes())?,
                // That of a plan that is no longer in force.
                None if is_taken(&path) => std::fs::remove_file(&path).map_err(Error::io(&path))?,
                None => {}
            }
        }
        Ok(())
    }
}

/// Locks a run for this process. What lies where the lock is to be is neither followed nor changed.
fn lock(run: &Path) -> Result<File> {
    let path = run.join(".lock");
    let irregular = || {
        let message =
            format!("{} is not a regular file; remove it if nobody is training there", path.display());
        Error::config("--out", message)
    };
    if path.symlink_metadata().is_ok_and(|found| !found.is_file()) {
        return Err(irregular());
    }
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false);
    // In case it has become a link or a pipe since.
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let file = options.open(&path).map_err(|error| unusable(run, error))?;
    if !file.metadata().is_ok_and(|found| found.is_file()) {
        return Err(irregular());
    }
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::Error(error)) => Err(unusable(&path, error)),
        Err(TryLockError::WouldBlock) => {
            let message = format!(
                "another process is training in {}; wait for it or give another folder",
                run.display()
            );
            Err(Error::config("--out", message))
        }
    }
}

fn unusable(path: &Path, error: std::io::Error) -> Error {
    Error::config("--out", format!("{} cannot be written: {error}", path.display()))
}
