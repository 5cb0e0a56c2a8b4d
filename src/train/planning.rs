//! From a config and a machine to a plan, and back when the machine turns out to be another.

use std::collections::BTreeMap;
use std::iter::successors;
use std::ops::RangeInclusive;

use super::config::{AdapterConfig, Axis, Config, Devices, Recompute, TrainConfig};
use super::gangs::Gangs;
use crate::error::{Error, Result};
#[cfg(not(target_arch = "wasm32"))]
use crate::folder::files::read_text;
use crate::gpu::{AdapterInfo, Capabilities, Device, imagined};
use crate::layers::Layers;
use crate::mesh::Division;
use crate::model::tensor::{Member, members};
use crate::model::{Lora, Model, Weights};
use crate::pipeline::workload::{kinds_of_kernels, sharded};
use crate::pipeline::{Plan, Setup, Use};
use crate::plan::text::{bytes, divided};
use crate::plan::{
    Candidate, DataChoice, Divided, Explanation, Machine, Optimizer, Options, Planned, RecomputeChoice,
    ScheduleChoice, Sharding, Without, Workload, check, fits, plan, without,
};
use crate::schedule::Schedule;
use crate::timeline::{DeviceName, Event, Prediction, Track, duration, of_gangs};

/// Times that the planner's own count of bytes is corrected by the exact one.
const CORRECTIONS: usize = 6;

/// Tokens below which a shorter sequence is no help.
const SHORTEST: usize = 16;

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

/// How many times longer than predicted a device may take; anything else is no measurement.
const PLAUSIBLE: RangeInclusive<f64> = 1e-3..=1e3;
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
        let model = model.with_weights(config.train.weights).with_shared_sequences(config.shared);
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

    /// Refuses what is wrong on these devices whatever they measure, and limits within which nothing fits.
    ///
    /// # Errors
    ///
    /// As [`check`] and [`Planning::search`].
    pub fn check(self) -> Result<()> {
        let is_limited = self.options.host.is_some() || self.options.budgets.iter().any(Option::is_some);
        match self.config.mesh.tensor {
            _ if is_limited => self.choose().map(drop),
            // Of several ways to divide layers another may do.
            Some(Axis::Named(_)) => Ok(()),
            _ => check(&self.workload, &self.machine, &self.options),
        }
    }

    /// The best plan, its bytes counted as they will be allocated.
    ///
    /// # Errors
    ///
    /// Those of [`plan`] and [`Plan::new`]: nothing fits, or what was fixed by hand cannot be.
    pub fn search(&self) -> Result<Planned> {
        self.find().map_err(|error| self.helped(error))
    }

    /// An error of [`Planning::find`], with what else would help.
    fn helped(&self, error: Error) -> Error {
        match error {
            Error::NoPlan { lacks, mut help } => {
                help.extend(self.other_models());
                Error::NoPlan { lacks, help }
            }
            other => other,
        }
    }

    /// The best plan, where the config leaves open how many devices divide every layer: the one that is faster by more than
    /// what plans that are alike differ by, of few devices rather than of many.
    ///
    /// # Errors
    ///
    /// As [`Planning::search`].
    pub fn choose(self) -> Result<(Planning, Planned)> {
        if !matches!(self.config.mesh.tensor, Some(Axis::Named(_))) {
            return self.choose_state();
        }
        let gangs = self.config.mesh.divisions(self.candidates().len(), self.config.model.heads);
        let mut found: Vec<(usize, Result<(Planning, Planned)>)> = Vec::new();
        for members in std::iter::once(1).chain(gangs.iter().map(Division::members)) {
            let mut config = self.config.clone();
            config.mesh.tensor = (members > 1).then_some(Axis::Count(members));
            let planning = self.with(&config).and_then(|mut planning| {
                planning.limit(self.options.budgets.clone());
                planning.limit_host(self.options.host);
                planning.choose_state()
            });
            found.push((members, planning));
        }
        let seconds = |of: &Result<(Planning, Planned)>| {
            of.as_ref().map_or(f64::INFINITY, |(_, planned)| planned.best.simulation.expected)
        };
        let least = found.iter().map(|(_, of)| seconds(of)).fold(f64::INFINITY, f64::min);
        let alike = |(_, of): &(usize, Result<(Planning, Planned)>)| seconds(of) <= (1.0 + ALIKE) * least;
        let at = found.iter().position(alike).unwrap_or(0);
        let (members, chosen) = found.swap_remove(at);
        let (mut planning, planned) = chosen?;
        found.sort_by_key(|(members, _)| *members);
        let words = |(members, of): &(usize, Result<(Planning, Planned)>)| match seconds(of) {
            seconds if seconds.is_finite() => {
                format!("tensor = {members} would take {}", duration(seconds))
            }
            _ => format!("with tensor = {members} nothing fits"),
        };
        let others: Vec<String> = found.iter().map(words).collect();
        let others = if others.is_empty() { "there is no other way".into() } else { others.join(", ") };
        planning.axis = Some(match members {
            1 => format!("whole layers; {others}"),
            _ => format!("{}; {others}", planning.axis().unwrap_or_default()),
        });
        Ok((planning, planned))
    }

    /// How layers are divided, in words, and what else there was, where that was left open; none where a device has whole ones
    /// because that was asked for.
    pub fn axis(&self) -> Option<String> {
        self.axis.clone().or_else(|| divided(&self.config.mesh.division()))
    }

    /// The best plan, where the config leaves open who has what of the state: with the first way in which there is one.
    fn choose_state(self) -> Result<(Planning, Planned)> {
        let ways = self.config.mesh.shardings()?;
        let mut first: Option<(Planning, Error)> = None;
        for sharding in ways {
            let mut planning = self.sharded(sharding)?;
            match (planning.find(), &first) {
                (Ok(planned), _) => {
                    planning.because = first.and_then(|(_, error)| match error {
                        Error::NoPlan { lacks, .. } => Some(lacks),
                        _ => None,
                    });
                    return Ok((planning, planned));
                }
                (Err(error @ Error::NoPlan { .. }), None) => first = Some((planning, error)),
                (Err(Error::NoPlan { .. }), Some(_)) => {}
                (Err(error), _) => return Err(error),
            }
        }
        match first {
            Some((planning, error)) => Err(planning.helped(error)),
            None => self.search().map(|planned| (self, planned)),
        }
    }

    /// The same with the state divided like this.
    fn sharded(&self, sharding: Sharding) -> Result<Planning> {
        let mut config = self.config.clone();
        config.mesh.settle(sharding);
        let planning = self.with(&config)?;
        Ok(Planning { options: self.options.clone(), ..planning })
    }

    /// The same for another config.
    ///
    /// # Errors
    ///
    /// As [`Planning::for_machine`].
    pub fn with(&self, config: &Config) -> Result<Planning> {
        let given = match &self.options.schedule {
            ScheduleChoice::Given(schedule) => Some(schedule.clone()),
            _ => None,
        };
        let (machine, names) = match &self.gangs {
            Some(gangs) => (&gangs.devices, &gangs.names),
            None => (&self.machine, &self.names),
        };
        let mut planning =
            Planning::new(config, machine.clone(), self.adapters.clone(), names.clone(), given)?;
        if let Some((now, before)) = planning.gangs.as_mut().zip(self.gangs.as_ref()) {
            now.budgets = before.budgets.clone();
        }
        Ok(planning)
    }

    fn find(&self) -> Result<Planned> {
        let mut options = self.options.clone();
        options.budgets.resize(self.machine.devices.len(), None);
        let mut tries = 0;
        loop {
            let mut planned = plan(&self.workload, &self.machine, &options)?;
            match self.count(&mut planned.best) {
                Ok(()) => return Ok(planned),
                // The planner adds up layers, so it may be a little off; it looks again with so much less.
                Err(Error::Memory { device, need, budget, .. }) if tries < CORRECTIONS => {
                    let device = planned.best.devices[device / self.members()];
                    let short = need.saturating_sub(budget).max(budget / 256);
                    let room = options.budgets[device].or(self.machine.devices[device].memory);
                    options.budgets[device] = room.map(|bytes| bytes.saturating_sub(short));
                    tries += 1;
                }
                Err(Error::Memory { device, need, budget, .. }) => {
                    let name = &self.called(&planned.best)[device].name;
                    let device = self.devices(&planned.best)[device];
                    let lacks = need.saturating_sub(budget);
                    let message = format!(
                        "device {device} ({name}) lacks {lacks} bytes: it needs {need} and may use {budget}"
                    );
                    return Err(Error::no_plan(message, Vec::new()));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// How many devices a rank of a plan is.
    fn members(&self) -> usize {
        self.gangs.as_ref().map_or(1, |gangs| gangs.divided.division.members())
    }

    /// What a step takes without each device of a plan.
    pub fn without(&self, planned: &Planned) -> Vec<Without> {
        without(&self.workload, &self.machine, &self.options, &planned.best)
    }

    /// A way to divide the state with which a plan fits, in such words: one key to set.
    fn other_sharding(&self) -> Option<String> {
        let (now, mesh) = (self.workload.sharding, &self.config.mesh);
        let fits = |level: u8, words: &str| {
            let sharding = Sharding::new(level.max(now.zero), now.sum, Optimizer::Host).ok()?;
            let fits = sharding != now && self.sharded(sharding).is_ok_and(|other| other.find().is_ok());
            fits.then(|| words.to_string())
        };
        if now.by_host() {
            return fits(3, "--set mesh.zero=3");
        }
        let open = || mesh.zero.is_none().then(|| fits(3, "--set mesh.optimizer=auto")).flatten();
        fits(1, "--set mesh.optimizer=host").or_else(open)
    }

    /// Changes of what is trained with which a plan fits, in words that follow `it would fit with`.
    fn other_models(&self) -> Vec<String> {
        let fits = |config: &Config| {
            let fits = |other: Planning| fits(&other.workload, &self.machine, &self.options);
            self.with(config).and_then(fits).unwrap_or(false)
        };
        let mut found = Vec::new();
        let config = &self.config;
        found.extend(self.other_sharding());
        let stored = [Weights::BF16, Weights::BF16Only].map(|weights| {
            let train = TrainConfig { weights, ..config.train.clone() };
            (Config { train, ..config.clone() }, format!("--set train.weights={}", weights.name()))
        });
        found.extend(stored.into_iter().find(|(config, _)| fits(config)).map(|(_, words)| words));
        let shorter = successors(Some(config.train.sequence / 2), |sequence| Some(sequence / 2));
        let mut shorter = shorter.take_while(|&sequence| sequence >= SHORTEST).map(|sequence| {
            let train = TrainConfig { sequence, ..config.train.clone() };
            (Config { train, ..config.clone() }, format!("--set train.sequence={sequence}"))
        });
        found.extend(shorter.find(|(config, _)| fits(config)).map(|(_, words)| words));
        if config.path.is_some() && config.adapter.is_none() {
            let adapter = AdapterConfig::default();
            let words = format!("--set adapter.rank={}, which trains an adapter alone", adapter.rank);
            let config = Config { adapter: Some(adapter), ..config.clone() };
            found.extend(fits(&config).then_some(words));
        }
        found
    }

    /// Replaces the planner's bytes by those that will be allocated.
    pub(super) fn count(&self, candidate: &mut Candidate) -> Result<()> {
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

    /// Corrects the machine by what a step of `candidate` took: each device's times by the ratio of its measured to its
    /// predicted seconds of work, and those of a device that did not work by what all the others are off at least.
    /// Returns the ratios of those that worked.
    pub fn learn(&mut self, candidate: &Candidate, events: &[Event]) -> Vec<f64> {
        let events = of_gangs(events, self.members());
        let ratio = |rank: usize| {
            let cells = candidate.simulation.cells.iter();
            let predicted: f64 = cells
                .filter(|cell| cell.rank == rank && cell.action.kind.computes())
                .map(|cell| cell.end - cell.start)
                .sum();
            let actions = events.iter().filter(|e| e.rank == rank && e.track == Track::Compute);
            let measured: f64 = actions.filter(|e| e.microbatch().is_some()).map(|e| e.end - e.start).sum();
            let enough = predicted >= TELLING * candidate.simulation.step;
            Some(measured / predicted).filter(|ratio| enough && PLAUSIBLE.contains(ratio))
        };
        let ratios: Vec<Option<f64>> = (0..candidate.devices.len()).map(ratio).collect();
        let known = || ratios.iter().flatten().copied();
        let Some((least, most)) = known().reduce(f64::min).zip(known().reduce(f64::max)) else {
            return Vec::new();
        };
        let common = 1f64.clamp(least, most);
        for (number, device) in self.machine.devices.iter_mut().enumerate() {
            match candidate.devices.iter().position(|&used| used == number) {
                Some(rank) => device.scale(ratios[rank].unwrap_or(1.0)),
                None => device.scale(common),
            }
        }
        known().collect()
    }

    /// The same plan with the machine's present times.
    pub fn again(&self, candidate: &Candidate) -> Result<Candidate> {
        Ok(self.alone(candidate)?.best)
    }

    /// The same plan with the machine's present times, as if there were no other.
    pub(super) fn alone(&self, candidate: &Candidate) -> Result<Planned> {
        let (devices, schedule) = (candidate.devices.clone(), candidate.schedule.clone());
        self.given(devices, schedule, candidate.cuts(), candidate.recompute.clone())
    }

    /// The plan that made a prediction, with the machine's present times.
    pub fn predicted(&self, prediction: &Prediction) -> Result<Candidate> {
        self.predicted_on(prediction, prediction.devices.iter().map(|device| device.number).collect())
    }

    /// The same on other devices.
    pub(super) fn predicted_on(&self, prediction: &Prediction, devices: Vec<usize>) -> Result<Candidate> {
        let schedule = prediction.schedule()?;
        let recompute = (0..schedule.stages).map(|stage| prediction.recompute.contains(&stage)).collect();
        Ok(self.given(devices, schedule, prediction.cuts.clone(), recompute)?.best)
    }

    fn given(
        &self,
        devices: Vec<usize>,
        schedule: Schedule,
        cuts: Vec<Layers>,
        recompute: Vec<bool>,
    ) -> Result<Planned> {
        let options = Options {
            devices: Some(devices),
            microbatches: Some(schedule.microbatches),
            schedule: ScheduleChoice::Given(schedule),
            cuts: Some(cuts),
            recompute: RecomputeChoice::Stages(recompute),
            data: DataChoice::default(),
            budgets: self.options.budgets.clone(),
            host: self.options.host,
        };
        plan(&self.workload, &self.machine, &options)
    }

    /// The best plan with the machine's present times and the same microbatches for each replica, on which rounding
    /// depends. Of plans that are about as fast the one that changes least: another schedule, else other cuts, else both,
    /// else other devices. Everything that decides whether a running plan is to be left for another asks here.
    pub fn search_again(&self, candidate: &Candidate) -> Result<Candidate> {
        let mut open = Options {
            microbatches: Some(candidate.microbatches),
            data: DataChoice::Shares(candidate.shares()),
            ..self.options.clone()
        };
        // Where stages have unequal numbers of replicas the schedule alone says who adds up what.
        if candidate.placement.shares().is_none() {
            open.schedule = ScheduleChoice::Given(candidate.schedule.clone());
        }
        let devices = Options { devices: Some(candidate.devices.clone()), ..open.clone() };
        let schedule = ScheduleChoice::Given(candidate.schedule.clone());
        let narrow = [
            Options { cuts: Some(candidate.cuts()), ..devices.clone() },
            Options { schedule, ..devices.clone() },
            devices,
        ];
        let search = |options| Planning { options, ..self.clone() }.search().map(|planned| planned.best);
        let best = search(open)?;
        // What has no plan within these bounds has one without them.
        let plans = narrow.into_iter().filter_map(|options| search(options).ok()).chain([best]);
        let plans: Vec<Candidate> = plans.collect();
        let seconds = |plan: &Candidate| plan.simulation.expected;
        let least = plans.iter().map(seconds).fold(f64::INFINITY, f64::min);
        let alike = plans.iter().find(|plan| seconds(plan) <= (1.0 + ALIKE) * least);
        Ok(alike.unwrap_or(&plans[plans.len() - 1]).clone())
    }

    fn setup(&self, candidate: &Candidate) -> Setup {
        Setup {
            model: self.config.model.clone(),
            adapter: self.lora.clone(),
            weights: self.config.train.weights,
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
