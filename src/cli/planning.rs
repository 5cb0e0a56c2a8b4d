//! What `plan` and `train` share: devices, their profile, and the search.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::measuring::Measuring;
use super::{Budgets, Environment, Features, adapters, budgets, note, open, parse_devices};
use crate::error::{Error, Result};
use crate::folder::files::read_text;
use crate::gpu::{AdapterInfo, Capabilities, Device};
use crate::model::Model;
use crate::ops::tune::{SIDES, tune};
use crate::pipeline::Plan;
use crate::plan::{Candidate, Machine};
use crate::profile::{Cache, Profiler, unmeasured};
use crate::train::compute::without_wrong_matrices;
use crate::train::config::{Axis, Config, Described, Devices};
use crate::train::lessons::loudest;
use crate::train::planning::{Planning, chosen, given_schedule};
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
    /// Adapters, one rank each, such as 0,1,1 (one may be named several times), or auto. A device's number, wherever one
    /// is shown, is its position in this list. With --machine: devices of the file, which keep their numbers there.
    #[arg(long)]
    pub(super) devices: Option<String>,
    /// Bytes a device may use: 6GiB for each, or 0=6GiB,1=2GiB by the devices' numbers; host=8GiB for what of a model's state
    /// is in the host's memory.
    #[arg(long)]
    pub(super) memory: Option<String>,
    /// Plan with the profiles in this file instead of measuring; its fields: docs/machine.md. `plan` and --dry-run then
    /// need no adapter.
    #[arg(long, value_name = "FILE")]
    pub(super) machine: Option<PathBuf>,
    #[command(flatten)]
    pub(super) features: Features,
    /// Measure again what earlier runs have measured.
    #[arg(long)]
    pub(super) measure: bool,
}

impl Experiment {
    /// Reads the file with its overrides.
    pub(super) fn read(&self) -> Result<Config> {
        let mut config = read_config(&self.config, &self.set, describe)?;
        self.machine.choose(&mut config)?;
        Ok(config)
    }

    /// The folders from which the file's paths count.
    pub(super) fn bases(&self) -> Vec<PathBuf> {
        bases(&self.config)
    }

    /// What of it must be given again when a run goes on.
    pub(super) fn again(&self) -> Vec<String> {
        let set = self.set.iter().flat_map(|set| ["--set".to_string(), set.clone()]);
        let devices = self.machine.devices.iter().flat_map(|list| ["--devices".to_string(), list.clone()]);
        [self.config.display().to_string()].into_iter().chain(set).chain(devices).collect()
    }
}

/// Reads a config with overrides; `describe` finds the model that it names.
pub(super) fn read_config(
    path: &Path,
    set: &[String],
    describe: fn(&str, &[PathBuf]) -> Result<Described>,
) -> Result<Config> {
    let text = read_text(path).map_err(|error| error.config(path))?;
    Config::parse_with(&text, set, &path.display().to_string(), |model| describe(model, &bases(path)))
}

/// The folders from which the paths in a config count.
pub(super) fn bases(config: &Path) -> Vec<PathBuf> {
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

    /// What of them a run's config does not keep, to be given again when it goes on.
    pub(super) fn again(&self) -> Vec<String> {
        let machine = self.machine.as_ref().map(|file| file.display().to_string());
        let all = [("--memory", self.memory.clone()), ("--machine", machine)];
        let given = all.into_iter().filter_map(|(flag, value)| Some([flag.to_string(), value?])).flatten();
        given.chain(self.features.again()).collect()
    }

    /// Reads a machine file. Of a list on the command line it has every device; one in a config may be meant for the
    /// machine at hand.
    fn read(&self, file: &Path) -> Result<Machine> {
        let text = read_text(file).map_err(|e| e.config(file))?;
        let machine = Machine::parse(&text, &file.to_string_lossy())?;
        if let Some(Devices::List(list)) = self.devices.as_deref().map(parse_devices).transpose()? {
            machine.of_adapters(&list)?;
        }
        Ok(machine)
    }

    fn limit(&self, mut planning: Planning) -> Result<Planning> {
        let Budgets { devices, host } = budgets(self.memory.as_deref(), &planning.candidates())?;
        planning.limit(devices);
        planning.limit_host(host);
        Ok(planning)
    }
}

/// For a machine file alone: no device is opened.
pub(super) fn for_file(
    config: &Config,
    file: &Path,
    arguments: &MachineArguments,
    bases: &[PathBuf],
) -> Result<Planning> {
    let machine = arguments.read(file)?;
    arguments.limit(Planning::for_machine(config, machine, given_schedule(config, bases)?)?)
}

/// For the devices of this machine, opened, and measured unless a file says what they are; by their numbers in the plan.
pub(super) fn for_devices(
    config: &Config,
    arguments: &MachineArguments,
    environment: &Environment,
    bases: &[PathBuf],
) -> Result<(Planning, BTreeMap<usize, Device>)> {
    let given = given_schedule(config, bases)?;
    let (machine, devices) = match &arguments.machine {
        Some(file) => described(config, arguments, file, environment)?,
        None => {
            let devices = open(&config.pipeline.devices, &adapters()?, &arguments.features)?;
            config.mesh.choice().check(devices.len())?;
            config.train.compute.check(devices.len())?;
            let devices = computing(config, devices.into_iter().enumerate(), environment)?;
            // What no measurement would change is refused before one is made.
            let unmeasured = unmeasured(&devices, &memories(&devices));
            let opened = devices.iter().cloned().enumerate().collect();
            let planning = Planning::for_devices(config, unmeasured, &opened, given.clone())?;
            arguments.limit(planning)?.check()?;
            (measure(config, &devices, arguments.measure, environment)?, opened)
        }
    };
    let planning = arguments.limit(Planning::for_devices(config, machine, &devices, given)?)?;
    Ok((planning, devices))
}

/// Opens the devices of a machine file that a run may use. What a file says of their memory counts up to what they have.
fn described(
    config: &Config,
    arguments: &MachineArguments,
    file: &Path,
    environment: &Environment,
) -> Result<(Machine, BTreeMap<usize, Device>)> {
    let mut machine = arguments.read(file)?;
    let wanted = chosen(&config.pipeline.devices, &machine)?;
    let wanted = wanted.unwrap_or_else(|| (0..machine.devices.len()).collect());
    let list = match &config.pipeline.devices {
        Devices::List(list) => list.clone(),
        _ => wanted.iter().map(|&device| machine.adapter(device)).collect(),
    };
    let devices = open(&Devices::List(list), &adapters()?, &arguments.features).map_err(|error| match error {
        Error::AdapterIndex { index, count } => Error::config(
            machine.name.as_str(),
            format!(
                "it has a device for adapter {index}, and this machine has {count} (see `polystage devices`); choose \
                 others with --devices, or plan without any with --dry-run"
            ),
        ),
        other => other,
    })?;
    let devices = computing(config, wanted.iter().copied().zip(devices), environment)?;
    for ((&number, device), memory) in wanted.iter().zip(&devices).zip(memories(&devices)) {
        let profile = &mut machine.devices[number];
        profile.adapter = Some(device.info().index);
        profile.memory = [profile.memory, memory].into_iter().flatten().min();
    }
    Ok((machine, wanted.into_iter().zip(devices).collect()))
}

/// The devices with the kernels that were compiled before, and GPUs with the tiles that are fastest on them: those of the cache, or
/// measured now and kept there.
pub(super) fn tuned(mut devices: Vec<Device>, cache: Option<&Cache>) -> Result<Vec<Device>> {
    let Some(cache) = cache else { return Ok(devices) };
    // Of an adapter that is there several times one is enough, and two would write one file at once.
    super::once_each(&devices).into_iter().for_each(|device| cache.keep_kernels(device));
    for device in devices.iter_mut() {
        if device.capabilities().software {
            continue;
        }
        let tiles = match cache.read_tiles(device) {
            Some(tiles) => tiles,
            None => {
                note(format!("choosing tiles for {}, once and for some seconds", device.info().name));
                let tiles = device.block_on(tune(device, SIDES, TUNING))?;
                cache.write_tiles(device, tiles);
                tiles
            }
        };
        *device = device.with(Capabilities { tiles, ..*device.capabilities() });
    }
    Ok(devices)
}

/// Seconds for which tiles are measured.
const TUNING: f64 = 4.0;

/// The devices with their numbers, computing in what the config says.
pub(super) fn computing(
    config: &Config,
    devices: impl IntoIterator<Item = (usize, Device)>,
    environment: &Environment,
) -> Result<Vec<Device>> {
    let (numbers, devices): (Vec<usize>, Vec<Device>) = devices.into_iter().unzip();
    let devices = tuned(devices, cache(environment).as_ref())?;
    let devices = numbers.into_iter().zip(devices);
    let mut devices = config.train.compute.apply(devices)?;
    for device in &mut devices {
        let tried = device.block_on(without_wrong_matrices(device)).inspect_err(|_| {
            note(format!(
                "the cooperative matrices of {} cannot be used; --without coop leaves them out",
                device.info().name
            ));
        });
        if let Some(without) = tried? {
            note(format!(
                "warning: the cooperative matrices of {} give wrong results; it computes without them, no faster than in f32",
                device.info().name
            ));
            *device = without;
        }
    }
    Ok(devices)
}

/// Where measurements are kept.
pub(super) fn cache(environment: &Environment) -> Option<Cache> {
    let folder = environment.cache.clone()?;
    Some(Cache { folder, environment: environment.drivers.clone() })
}

/// What to say of a plan whose profiles were measured beside other programs.
pub(super) fn caution(
    planning: &Planning,
    plan: &Candidate,
    devices: &BTreeMap<usize, Device>,
) -> Option<String> {
    // What a gang's members do is not what was measured.
    if planning.has_gangs() {
        return None;
    }
    let devices: Vec<Device> = devices.values().cloned().collect();
    let others = loudest(plan, planning, &devices)?;
    Some(format!(
        "the devices were measured while other programs took up to {:.0} % of the cores; a run on a quieter \
         machine measures them again",
        100.0 * others
    ))
}

/// Seconds for which a measurement is repeated while the machine's speed wanders.
const PATIENCE: f64 = 3.0;

fn measure(config: &Config, devices: &[Device], fresh: bool, environment: &Environment) -> Result<Machine> {
    let model = Model::with_adapter(&config.model, config.lora()?.as_ref())?;
    let model = model.with_weights(config.train.weights).with_logits(config.train.logit_bytes());
    let memories = memories(devices);
    let profiler = Profiler {
        model: &model,
        sequence: config.train.sequence,
        devices,
        budgets: &memories,
        cache: cache(environment),
        fresh,
        patience: PATIENCE,
    };
    let sizes: Vec<usize> = config.microbatches().iter().map(|m| config.train.batch / m).collect();
    let mut display = Measuring::new(profiler.cache.as_ref().map(|cache| cache.folder.clone()));
    let mut machine = profiler.machine(&sizes, &mut |progress| display.hear(progress))?;
    for division in config.mesh.divisions(devices.len(), config.model.heads) {
        profiler.gangs(&mut machine, (&division, config.mesh.wire), &sizes, &mut |progress| {
            display.hear(progress)
        })?;
    }
    Ok(machine)
}

/// The budget of each device: `--memory`, or what it has; and of the host's memory.
pub(super) fn device_budgets(memory: Option<&str>, devices: &[Device]) -> Result<Budgets> {
    let mut given = budgets(memory, &(0..devices.len()).collect::<Vec<_>>())?;
    let known = memories(devices);
    given.devices.iter_mut().zip(known).for_each(|(budget, memory)| *budget = budget.or(memory));
    Ok(given)
}

/// What each device has: its adapter's memory, shared by the devices opened on it.
fn memories(devices: &[Device]) -> Vec<Option<u64>> {
    let same = |index: usize| devices.iter().filter(|d| d.info().index == index).count() as u64;
    devices.iter().map(|d| d.info().memory.map(|m| m / same(d.info().index))).collect()
}

/// Fixes in the config what the planner has chosen and a resumed run must keep: the devices that are used, and the
/// microbatches of each replica, on which rounding depends.
pub(super) fn settle(config: &mut Config, adapters: &[AdapterInfo], plan: &Plan) {
    config.pipeline.devices = Devices::List(adapters.iter().map(|adapter| adapter.index).collect());
    config.pipeline.microbatches = Some(plan.schedule.microbatches);
    // A schedule that is written by hand says itself who does what.
    let shares = plan.placement.shares().filter(|_| config.pipeline.schedule_file().is_none());
    config.mesh.data = match shares {
        Some(shares) if shares.len() > 1 => Axis::Shares(shares),
        Some(_) => Axis::Count(1),
        None => Axis::default(),
    };
    config.mesh.settle(plan.setup.sharding);
    let division = &plan.setup.tensor;
    config.mesh.tensor = division.divides().then(|| Axis::Shares(division.shares.clone()));
    config.mesh.sequence_parallel &= division.divides();
}
