//! What `plan` and `train` share: devices, their profile, and the search.

use std::path::{Path, PathBuf};

use super::measuring::Measuring;
use super::{Environment, adapters, budgets, open, parse_devices};
use crate::error::Result;
use crate::folder::files::read_text;
use crate::gpu::Device;
use crate::model::Model;
use crate::pipeline::profile::{Cache, Profiler};
use crate::plan::{Candidate, Machine};
use crate::train::config::{Config, Devices};
use crate::train::lessons::loudest;
use crate::train::planning::{Planning, given_schedule};
use crate::train::source::describe;

/// An experiment.
#[derive(clap::Args)]
pub(super) struct Experiment {
    /// The experiment: a TOML file. `polystage config` lists its keys.
    pub(super) config: PathBuf,
    /// Override a key of the file; may be given several times, and of the same key the last counts.
    #[arg(long, value_name = "a.b=c")]
    set: Vec<String>,
    #[command(flatten)]
    pub(super) machine: MachineArguments,
}

/// The machine that a run is for.
#[derive(clap::Args)]
pub(super) struct MachineArguments {
    /// Adapters, one rank each, such as 0,1,1 (one may be named several times), or auto.
    #[arg(long)]
    pub(super) devices: Option<String>,
    /// Bytes a device may use: 6GiB for each, or 0=6GiB,1=2GiB by position in the list of devices.
    #[arg(long)]
    pub(super) memory: Option<String>,
    /// Plan with the profiles in this file instead of measuring; its fields: docs/machine.md.
    #[arg(long, value_name = "FILE")]
    pub(super) machine: Option<PathBuf>,
    /// Measure again what earlier runs have measured.
    #[arg(long)]
    pub(super) measure: bool,
}

impl Experiment {
    /// Reads the file with its overrides.
    pub(super) fn read(&self) -> Result<Config> {
        let mut config = read_config(&self.config, &self.set)?;
        self.machine.choose(&mut config)?;
        Ok(config)
    }

    /// The folders from which the file's paths count.
    pub(super) fn bases(&self) -> Vec<PathBuf> {
        bases(&self.config)
    }
}

/// Reads a config with overrides.
pub(super) fn read_config(path: &Path, set: &[String]) -> Result<Config> {
    let text = read_text(path).map_err(|error| error.config(path))?;
    Config::parse_with(&text, set, &path.display().to_string(), |model| describe(model, &bases(path)))
}

/// The folders from which the paths in a config count.
fn bases(config: &Path) -> Vec<PathBuf> {
    vec![config.parent().map(Path::to_path_buf).unwrap_or_default(), PathBuf::from(".")]
}

impl MachineArguments {
    /// Puts the devices into the config.
    pub(super) fn choose(&self, config: &mut Config) -> Result<()> {
        if let Some(devices) = &self.devices {
            config.pipeline.devices = parse_devices(devices)?;
        }
        Ok(())
    }
}

fn read_machine(path: &Path) -> Result<Machine> {
    let text = read_text(path).map_err(|e| e.config(path))?;
    Machine::parse(&text, &path.to_string_lossy())
}

/// For a machine file alone: no device is opened.
pub(super) fn for_file(config: &Config, file: &Path, experiment: &Experiment) -> Result<Planning> {
    let mut machine = read_machine(file)?;
    let defaults: Vec<Option<u64>> = machine.devices.iter().map(|d| d.memory).collect();
    for (device, budget) in
        machine.devices.iter_mut().zip(budgets(experiment.machine.memory.as_deref(), defaults)?)
    {
        device.memory = budget;
    }
    Planning::for_machine(config, machine, given_schedule(config, &experiment.bases())?)
}

/// For the devices of this machine, opened and measured.
pub(super) fn for_devices(
    config: &Config,
    arguments: &MachineArguments,
    environment: &Environment,
    bases: &[PathBuf],
) -> Result<(Planning, Vec<Device>)> {
    let devices = open(&config.pipeline.devices, &adapters()?)?;
    let given = given_schedule(config, bases)?;
    let budgets = device_budgets(arguments.memory.as_deref(), &devices)?;
    let machine = match &arguments.machine {
        Some(file) => {
            let mut machine = read_machine(file)?;
            machine.devices.iter_mut().zip(&budgets).for_each(|(device, &budget)| device.memory = budget);
            machine
        }
        None => measure(config, &devices, &budgets, arguments.measure, environment)?,
    };
    Ok((Planning::for_devices(config, machine, &devices, given)?, devices))
}

/// Where measurements are kept.
pub(super) fn cache(environment: &Environment) -> Option<Cache> {
    let folder = environment.cache.clone()?;
    Some(Cache { folder, environment: environment.drivers.clone() })
}

/// What to say of a plan whose profiles were measured beside other programs.
pub(super) fn caution(planning: &Planning, plan: &Candidate, devices: &[Device]) -> Option<String> {
    let others = loudest(plan, planning, devices)?;
    Some(format!(
        "the devices were measured while other programs took up to {:.0} % of the cores; a run on a quieter \
         machine measures them again",
        100.0 * others
    ))
}

/// Seconds for which a measurement is repeated while the machine's speed wanders.
const PATIENCE: f64 = 3.0;

fn measure(
    config: &Config,
    devices: &[Device],
    budgets: &[Option<u64>],
    fresh: bool,
    environment: &Environment,
) -> Result<Machine> {
    let model =
        Model::with_adapter(&config.model, config.lora()?.as_ref())?.with_weights(config.train.weights);
    let profiler = Profiler {
        model: &model,
        sequence: config.train.sequence,
        devices,
        budgets,
        cache: cache(environment),
        fresh,
        patience: PATIENCE,
    };
    let sizes: Vec<usize> = config.microbatches().iter().map(|m| config.train.batch / m).collect();
    let mut display = Measuring::new(profiler.cache.as_ref().map(|cache| cache.folder.clone()));
    profiler.machine(&sizes, &mut |progress| display.hear(progress))
}

/// The budget of each device: `--memory`, or the adapter's own memory, shared by the devices opened on it.
pub(super) fn device_budgets(memory: Option<&str>, devices: &[Device]) -> Result<Vec<Option<u64>>> {
    let same = |index: usize| devices.iter().filter(|d| d.info().index == index).count() as u64;
    let defaults = devices.iter().map(|d| d.info().memory.map(|m| m / same(d.info().index)));
    budgets(memory, defaults.collect())
}

/// Fixes in the config what the planner has chosen and a resumed run must keep: the devices that are used, and the
/// microbatches, on which rounding depends.
pub(super) fn settle(config: &mut Config, devices: &[Device], microbatches: usize) {
    config.pipeline.devices = Devices::List(devices.iter().map(|d| d.info().index).collect());
    config.pipeline.microbatches = Some(microbatches);
}
