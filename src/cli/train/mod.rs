//! `polystage train`.

mod again;
mod describe;
mod job;
mod progress;
mod report;
mod sample;
mod steps;

use std::path::PathBuf;

use describe::describe;
use job::{out_folder, prepare};
use steps::train;

use super::planning::{Experiment, MachineArguments};
use super::{Environment, note, print, say};
use crate::error::Result;
use crate::train::config::Config;

/// Trains a model whose layers are split over the machine's adapters.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  polystage train configs/tiny.toml\n  polystage train configs/tiny.toml --devices 0,1 --set train.steps=500 --out runs/mine\n  polystage train configs/tiny.toml --out runs/mine --resume\n\nThe keys of a config: `polystage config`, docs/config.md. What lies in a run's folder: docs/run.md."
)]
pub(super) struct Arguments {
    #[command(flatten)]
    experiment: Experiment,
    #[command(flatten)]
    launch: Launch,
}

/// How a run begins.
#[derive(clap::Args)]
pub(super) struct Launch {
    /// Neither measure nor plan: balance by floating-point operations, in 1f1b unless the config says otherwise.
    #[arg(long, conflicts_with_all = ["machine", "measure"])]
    no_plan: bool,
    /// The run's folder (default: runs/<config's name>-<number>).
    #[arg(long)]
    out: Option<PathBuf>,
    /// Continue from the folder's last checkpoint. The same config gives the uninterrupted run bit for bit; another
    /// train.steps also changes the rest of the learning rate's cosine.
    #[arg(long)]
    resume: bool,
    /// With --resume: this checkpoint instead of the last.
    #[arg(long, value_name = "CHECKPOINT", requires = "resume")]
    from: Option<PathBuf>,
    /// Print the resolved config and the plan, and stop.
    #[arg(long)]
    dry_run: bool,
}

impl Launch {
    /// Whether a run goes on.
    pub(super) fn resume(&self) -> bool {
        self.resume
    }

    /// The folder of the run that goes on; none if it is neither given nor found by a name.
    pub(super) fn resumed(&self, name: Option<&str>) -> Result<Option<PathBuf>> {
        match (&self.out, name) {
            (None, None) => Ok(None),
            (_, name) => out_folder(self, name.unwrap_or_default()).map(Some),
        }
    }
}

pub(super) fn run(arguments: &Arguments, environment: &Environment) -> Result<u8> {
    let experiment = &arguments.experiment;
    let name = experiment.config.file_stem().map_or("run".into(), |s| s.to_string_lossy().into_owned());
    let (config, bases) = (experiment.read()?, experiment.bases());
    let (machine, launch) = (&experiment.machine, &arguments.launch);
    let again = ["train".to_string()].into_iter().chain(experiment.again()).collect();
    start(Request { config, name: &name, machine, launch, bases: &bases, again }, environment)
}

/// A run that is asked for.
pub(super) struct Request<'a> {
    pub(super) config: Config,
    /// What it is called unless its folder is given.
    pub(super) name: &'a str,
    pub(super) machine: &'a MachineArguments,
    pub(super) launch: &'a Launch,
    /// The folders from which the config's paths count.
    pub(super) bases: &'a [PathBuf],
    /// The verb, and what must be given to it again when the run goes on.
    pub(super) again: Vec<String>,
}

/// Trains as is asked for.
pub(super) fn start(request: Request, environment: &Environment) -> Result<u8> {
    let dry_run = request.launch.dry_run;
    let job = prepare(request, environment)?;
    job.resume.warnings.iter().for_each(|warning| note(format!("warning: {warning}")));
    if dry_run {
        print(job.config.to_toml())?;
        describe(&job)?;
        if let Some((path, checkpoint)) = &job.resume.checkpoint {
            say(format!("resumes  from {} at step {}", path.display(), checkpoint.step))?;
        }
        return Ok(0);
    }
    train(job)
}
