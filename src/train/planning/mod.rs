//! From a config and a machine to a plan, and back when the machine turns out to be another.

mod again;
mod choice;
mod gangs;

use std::collections::BTreeMap;

use gangs::Gangs;

use super::config::{Config, Devices, Recompute};
use crate::error::{Error, Result};
#[cfg(not(target_arch = "wasm32"))]
use crate::folder::files::read_text;
use crate::gpu::{AdapterInfo, Capabilities, Device, imagined};
use crate::model::tensor::{Member, members};
use crate::model::{Lora, Model};
use crate::pipeline::workload::{kinds_of_kernels, sharded};
use crate::pipeline::{Plan, Setup, Use};
use crate::plan::text::{bytes, divided};
use crate::plan::{
    Candidate, Divided, Explanation, Machine, Options, Planned, RecomputeChoice, ScheduleChoice, Without,
    Workload, without,
};
use crate::schedule::Schedule;
use crate::timeline::DeviceName;

/// What is to be planned, and for what.
#[derive(Clone)]
pub struct Planning {
    /// The experiment.
    pub config: Config,
    /// The model and its batch, as the planner sees them.
    pub workload: Workload,
    /// The devices.
    pub machine: Machine,
    /// What is fixed.
    pub options: Options,
    /// The model's adapter.
    lora: Option<Lora>,
    /// The adapters behind the machine's devices, or what is assumed of them.
    adapters: Vec<(AdapterInfo, Capabilities)>,
    /// The machine's devices, for people.
    names: Vec<DeviceName>,
    /// Why the state is not on the devices as usual, where the config leaves that open.
    because: Option<String>,
    /// The devices that the machine's are gangs of, where several divide every layer.
    gangs: Option<Gangs>,
    /// How layers are divided and what else there was, in words, where the config leaves that open.
    axis: Option<String>,
}

/// A device that works for less than this part of a step does not show how fast it is.
pub(super) const TELLING: f64 = 0.05;

/// Of plans that differ by less than this part of a step the one that changes least is taken.
const ALIKE: f64 = 0.01;

/// A schedule written by hand, from the first of `bases` that has the file; none if the config names another kind.
///
/// # Errors
///
/// [`Error::Config`] for a file that cannot be read or is for another number of microbatches than the config asks for,
/// [`Error::Schedule`] for one that holds no schedule that can run.
#[cfg(not(target_arch = "wasm32"))]
pub fn given_schedule(config: &Config, bases: &[std::path::PathBuf]) -> Result<Option<Schedule>> {
    let Some(name) = config.pipeline.schedule_file() else { return Ok(None) };
    let place = "pipeline.schedule";
    let Some(path) = bases.iter().map(|base| base.join(name)).find(|path| path.exists()) else {
        return Err(Error::config(place, format!("there is no file {name}, and no schedule of that name")));
    };
    let schedule: Schedule = read_text(&path).map_err(|e| e.config(&path))?.parse()?;
    schedule.validate()?;
    let (count, batch) = (schedule.microbatches, config.train.batch);
    let shares = schedule.placement()?.shares();
    if !config.mesh.choice().allows(shares.as_deref()) {
        let message =
            format!("{name} says itself which replicas there are, and other than mesh.data; leave that out");
        return Err(Error::config(place, message));
    }
    if let Some(wanted) = config.pipeline.microbatches.filter(|&wanted| wanted != count) {
        let message = format!(
            "{name} is for {count} microbatches, but pipeline.microbatches = {wanted}; leave that out, or make the schedule for {wanted}"
        );
        return Err(Error::config(place, message));
    }
    if !batch.is_multiple_of(count) {
        let message = format!(
            "{name} is for {count} microbatches, which do not divide train.batch = {batch}; change one of them"
        );
        return Err(Error::config(place, message));
    }
    Ok(Some(schedule))
}

/// The machine's devices that a config means, in the order of the pipeline; none if they are left to the planner. A list
/// names adapters ([`Machine::of_adapters`]). If the machine is another one, a list of as many devices as it has stands
/// for all of them.
///
/// # Errors
///
/// [`Error::Config`] for devices that the machine does not have.
pub fn chosen(devices: &Devices, machine: &Machine) -> Result<Option<Vec<usize>>> {
    let count = machine.devices.len();
    match devices {
        Devices::List(list) if !list.is_empty() => match machine.of_adapters(list) {
            Err(_) if list.len() == count => Ok(Some((0..count).collect())),
            found => found.map(Some),
        },
        Devices::Count(wanted) if *wanted > count => {
            let message = format!("{wanted} are asked for, and {} has {count}", machine.name);
            Err(Error::config("devices", message))
        }
        devices => {
            let all = devices.resolve(&vec![false; count])?;
            Ok((*devices != Devices::default() || count == 1).then_some(all))
        }
    }
}

impl Planning {
    /// For a machine of which these devices are opened.
    ///
    /// # Errors
    ///
    /// As [`Planning::for_machine`].
    pub fn for_devices(
        config: &Config,
        machine: Machine,
        devices: &BTreeMap<usize, Device>,
        given: Option<Schedule>,
    ) -> Result<Planning> {
        let adapters =
            machine.devices.iter().enumerate().map(|(number, profile)| match devices.get(&number) {
                Some(device) => (device.info().clone(), *device.capabilities()),
                None => {
                    let mut imagined = imagined(machine.adapter(number), &profile.name, profile.max_binding);
                    imagined.0.driver = profile.driver.clone();
                    imagined.0.memory = profile.memory;
                    imagined
                }
            });
        let adapters = adapters.collect();
        let profiles = machine.devices.iter().enumerate();
        let names = profiles.map(|(number, profile)| DeviceName {
            number,
            adapter: devices.get(&number).map(|device| device.info().index).or(profile.adapter),
            name: profile.name.clone(),
        });
        let names = names.collect();
        Planning::new(config, machine, adapters, names, given)
    }

    /// For a machine that may not be there: its devices are taken for GPUs without subgroups.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for a config that the machine or its schedule contradicts.
    pub fn for_machine(config: &Config, machine: Machine, given: Option<Schedule>) -> Result<Planning> {
        Planning::for_devices(config, machine, &BTreeMap::new(), given)
    }

    /// The machine's devices that may be used, in order.
    pub fn candidates(&self) -> Vec<usize> {
        if let Some(gangs) = &self.gangs {
            return gangs.gangs.concat();
        }
        self.options.devices.clone().unwrap_or_else(|| (0..self.machine.devices.len()).collect())
    }

    /// Limits what is in the host's memory to so many bytes.
    pub fn limit_host(&mut self, bytes: Option<u64>) {
        self.options.host = bytes;
    }

    /// Limits devices to so many bytes, by their numbers; none leaves one its memory.
    pub fn limit(&mut self, budgets: Vec<Option<u64>>) {
        self.options.budgets = match &mut self.gangs {
            Some(gangs) => gangs.limit(budgets),
            None => budgets,
        };
        self.options.budgets.resize(self.machine.devices.len(), None);
    }

    /// The devices of a plan's ranks, by their numbers: of gangs one member after another.
    pub fn devices(&self, candidate: &Candidate) -> Vec<usize> {
        match &self.gangs {
            Some(gangs) => candidate.devices.iter().flat_map(|&gang| gangs.gangs[gang].clone()).collect(),
            None => candidate.devices.clone(),
        }
    }

    /// A rank of a plan by the numbers of its devices: `device 1`, `devices 0 + 1`.
    pub fn numbered(&self, candidate: &Candidate, rank: usize) -> String {
        let members = self.members();
        let numbers = &self.devices(candidate)[rank * members..(rank + 1) * members];
        let numbers: Vec<String> = numbers.iter().map(usize::to_string).collect();
        format!("device{} {}", if members > 1 { "s" } else { "" }, numbers.join(" + "))
    }

    /// The machine's devices within their budgets.
    pub fn profiles(&self) -> Machine {
        match &self.gangs {
            Some(gangs) => gangs.devices.within(&gangs.budgets),
            None => self.machine.within(&self.options.budgets),
        }
    }

    /// Whether several devices divide every layer: then the machine's devices are gangs of them.
    pub fn has_gangs(&self) -> bool {
        self.gangs.is_some()
    }

    /// The adapters of a plan's devices.
    pub fn adapters(&self, candidate: &Candidate) -> Vec<AdapterInfo> {
        self.devices(candidate).into_iter().map(|device| self.adapters[device].0.clone()).collect()
    }

    fn new(
        config: &Config,
        machine: Machine,
        adapters: Vec<(AdapterInfo, Capabilities)>,
        names: Vec<DeviceName>,
        given: Option<Schedule>,
    ) -> Result<Planning> {
        let lora = config.lora()?;
        let model = Model::with_adapter(&config.model, lora.as_ref())?;
        let model = model.with_weights(config.train.weights).with_logits(config.train.logit_bytes());
        let model = model.with_shared_sequences(config.shared);
        let counts = match &given {
            Some(schedule) => vec![schedule.microbatches],
            None => config.microbatches(),
        };
        let t = &config.train;
        let (kernels, of_each) = kinds_of_kernels(adapters.iter().map(|(_, capabilities)| capabilities));
        let sharding = config.mesh.sharding()?;
        let work = |member: Option<&Member>| {
            sharded(&model, t.batch, t.sequence, &counts, &kernels, (sharding, config.mesh.wire), member)
        };
        let mut workload = work(None)?;
        let (mut machine, mut names) = (machine, names);
        for (device, kernels) in machine.devices.iter_mut().zip(of_each) {
            device.kernels = kernels;
        }
        let mut devices = chosen(&config.pipeline.devices, &machine)?;
        let division = config.mesh.division();
        let mut gangs = None;
        if division.divides() {
            let parts = members(&config.model, &division)?;
            let parts = parts.iter().map(|member| work(Some(member))).collect::<Result<Vec<_>>>()?;
            let divided = Divided { whole: workload, parts, division };
            let all = Gangs::new(divided, machine, names, devices.as_deref())?;
            (machine, names) = (all.machine(), all.called());
            workload = all.divided.part().clone();
            devices = devices.map(|_| (0..all.gangs.len()).collect());
            gangs = Some(all);
        }
        let options = Options {
            devices,
            schedule: match (given, &config.pipeline.schedule) {
                (Some(schedule), _) => ScheduleChoice::Given(schedule),
                (None, Some(name)) => ScheduleChoice::Named(name.clone()),
                (None, None) => ScheduleChoice::Any,
            },
            cuts: config.pipeline.cuts.clone(),
            microbatches: config.pipeline.microbatches,
            recompute: match &config.pipeline.recompute {
                None => RecomputeChoice::AsNeeded,
                Some(Recompute::All(false)) => RecomputeChoice::Never,
                Some(Recompute::All(true)) => RecomputeChoice::Always,
                Some(Recompute::Stages(stages)) => {
                    let last = stages.iter().copied().max().unwrap_or(0);
                    RecomputeChoice::Stages((0..=last).map(|s| stages.contains(&s)).collect())
                }
            },
            data: config.mesh.choice(),
            budgets: Vec::new(),
            host: None,
        };
        let (config, because) = (config.clone(), None);
        Ok(Planning { config, workload, machine, options, lora, adapters, names, because, gangs, axis: None })
    }

    /// The machine's devices, each at the position that is its number.
    pub fn names(&self) -> &[DeviceName] {
        &self.names
    }

    /// What the devices of a plan are called.
    pub fn called(&self, candidate: &Candidate) -> Vec<DeviceName> {
        let names = self.gangs.as_ref().map_or(&self.names, |gangs| &gangs.names);
        self.devices(candidate).into_iter().map(|device| names[device].clone()).collect()
    }

    /// A plan in words. Where only some of the machine's devices may be used, their names stand for the machine's.
    pub fn explain(&self, planned: &Planned) -> Explanation {
        let adapters: Vec<_> = self.names.iter().map(|device| device.adapter).collect();
        let mut explanation = planned.explain(&self.workload, &self.machine).on_adapters(&adapters);
        explanation.machine = match &self.gangs {
            Some(gangs) => gangs.devices.called(&self.candidates()),
            None => self.machine.called(&self.candidates()),
        };
        explanation.state = self.state(planned);
        explanation.axis = self.axis();
        explanation
    }

    /// Who has what of the state, and why, in words; none where it is on the devices that compute.
    pub fn state(&self, planned: &Planned) -> Option<String> {
        let words = self.workload.sharding.words()?;
        let host = self.plan(&planned.best).map_or(0, |plan| plan.host);
        let because = self.because.as_ref().map_or(String::new(), |lacks| format!("; otherwise {lacks}"));
        Some(format!("{words} ({} of host memory){because}", bytes(host)))
    }

    /// How layers are divided, in words, and what else there was, where that was left open; none where a device has whole ones
    /// because that was asked for.
    pub fn axis(&self) -> Option<String> {
        self.axis.clone().or_else(|| divided(&self.config.mesh.division()))
    }

    /// How many devices a rank of a plan is.
    fn members(&self) -> usize {
        self.gangs.as_ref().map_or(1, |gangs| gangs.divided.division.members())
    }

    /// What a step takes without each device of a plan.
    pub fn without(&self, planned: &Planned) -> Vec<Without> {
        without(&self.workload, &self.machine, &self.options, &planned.best)
    }

    /// Replaces the planner's bytes by those that will be allocated.
    pub(in crate::train) fn count(&self, candidate: &mut Candidate) -> Result<()> {
        let plan = self.plan(candidate)?;
        // Of a gang those of the member that has most.
        let ranks = plan.ranks.chunks(self.members());
        let most = ranks.map(|members| members.iter().map(|rank| rank.bytes).max().unwrap_or(0));
        candidate.simulation.slot_bytes = most.collect();
        Ok(())
    }

    /// The plan that a candidate stands for.
    pub fn plan(&self, candidate: &Candidate) -> Result<Plan> {
        let adapters: Vec<_> =
            self.devices(candidate).into_iter().map(|device| self.adapters[device].clone()).collect();
        Plan::new(self.setup(candidate), &adapters)
    }

    fn setup(&self, candidate: &Candidate) -> Setup {
        Setup {
            model: self.config.model.clone(),
            adapter: self.lora.clone(),
            weights: self.config.train.weights,
            logits: self.config.train.logit_bytes(),
            batch: candidate.batch,
            sequence: self.config.train.sequence,
            schedule: candidate.schedule.clone(),
            cuts: Some(candidate.cuts()),
            shared: self.config.shared,
            recompute: candidate.repeated(),
            sharding: self.workload.sharding,
            tensor: self.config.mesh.division(),
            wire: self.config.mesh.wire,
            purpose: Use::Training,
            budgets: self.devices(candidate).into_iter().map(|device| self.budget(device)).collect(),
            host: self.options.host,
        }
    }

    /// Bytes that a device may use.
    fn budget(&self, device: usize) -> Option<u64> {
        if let Some(gangs) = &self.gangs {
            return gangs.budget(device);
        }
        self.options.budgets.get(device).copied().flatten().or(self.machine.devices[device].memory)
    }
}
