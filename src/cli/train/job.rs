//! What a run will be.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::again::command;
use super::{Launch, Request};
use crate::cli::planning::{cache, caution, computing, device_budgets, for_devices, for_file, settle};
use crate::cli::{Environment, adapters, open};
use crate::error::{Error, Result};
use crate::gpu::{AdapterInfo, Device};
use crate::pipeline::{Plan, Setup};
use crate::plan::Planned;
use crate::text::Isolation;
use crate::timeline::DeviceName;
use crate::train::compute::Compute;
use crate::train::config::Config;
use crate::train::data::{Batches, Corpus};
use crate::train::keep::{Before, keep};
use crate::train::lessons::Lessons;
use crate::train::planning::{Planning, given_schedule};
use crate::train::resume::Resume;
use crate::train::run::Run;
use crate::train::source::Source;
use crate::train::trainer::{Trainer, names as opened};

/// Everything that is settled before a device is used.
pub(super) struct Job {
    pub(super) config: Config,
    /// Every device that was opened, by its number; none where a dry run has its machine from a file.
    pub(super) all: BTreeMap<usize, Device>,
    /// Those of the plan, in pipeline order.
    pub(super) devices: Vec<Device>,
    /// What they are called.
    pub(super) names: Vec<DeviceName>,
    pub(super) plan: Plan,
    /// What the planner found; none where it was not asked.
    pub(super) planned: Option<(Planning, Planned)>,
    /// For the profiles that it was planned with, if they come from the cache.
    pub(super) lessons: Option<Lessons>,
    pub(super) source: Source,
    /// Where the source's tokenizer runs.
    pub(super) isolation: Isolation,
    pub(super) batches: Batches,
    pub(super) out: PathBuf,
    /// The command with which the run goes on, once it has ended.
    pub(super) again: String,
    /// How its plan differs from that which it had, where it goes on with another.
    pub(super) changed: Option<String>,
    pub(super) resume: Resume,
}

pub(super) fn prepare(request: Request, environment: &Environment) -> Result<Job> {
    let Request { mut config, name, machine, launch, bases, again } = request;
    let out = out_folder(launch, name)?;
    let again = command(&again, machine, launch, &out);
    let source = Source::open(&config, bases, &environment.isolation)?;
    let (t, order) = (&config.train, config.data.order);
    let batches = Batches::new(source.train.clone(), t.batch, t.sequence, order, t.seed)?;
    let shared = source.train.is_masked() || source.valid.as_ref().is_some_and(Corpus::has_records);
    config.settle(batches.sequences(), shared);
    let mut resume = if launch.resume {
        Resume::open(&out, launch.from.as_deref(), &mut config, &source.origin)?
    } else {
        Run::check_new(&out)?;
        Resume::default()
    };
    let before = if launch.resume { Before::read(&out) } else { None };
    let mut changed = None;
    let (all, adapters, names, plan, planned) = if launch.no_plan {
        let given = given_schedule(&config, bases)?;
        let devices = open(&config.pipeline.devices, &adapters()?, &machine.features)?;
        config.train.compute.check(devices.len())?;
        let devices = computing(&config, devices.into_iter().enumerate(), environment)?;
        let budgets = device_budgets(machine.memory.as_deref(), &devices)?;
        let setup = match given {
            Some(schedule) => Trainer::setup_in(&config, schedule, budgets.devices)?,
            None => Trainer::setup(&config, budgets.devices)?,
        };
        let plan = Plan::within(Setup { host: budgets.host, ..setup }, &devices)?;
        let adapters: Vec<AdapterInfo> = devices.iter().map(|device| device.info().clone()).collect();
        let names = opened(&devices);
        (devices.into_iter().enumerate().collect(), adapters, names, plan, None)
    } else {
        let (planning, all) = match &machine.machine {
            Some(file) if launch.dry_run => (for_file(&config, file, machine, bases)?, BTreeMap::new()),
            _ => for_devices(&config, machine, environment, bases)?,
        };
        let (planning, mut planned) = planning.choose()?;
        if let Some(before) = before {
            (planned, changed) = keep(&planning, planned, &before)?;
        }
        let (best, plan) = (&planned.best, planning.plan(&planned.best)?);
        (all, planning.adapters(best), planning.called(best), plan, Some((planning, planned)))
    };
    let devices = match &planned {
        Some((planning, planned)) => pick(&all, &planning.devices(&planned.best)),
        None => all.values().cloned().collect(),
    };
    // What was measured is of devices; what was planned then is of gangs.
    let of_devices = planned.as_ref().filter(|(planning, _)| !planning.has_gangs());
    let measured = of_devices.filter(|_| machine.machine.is_none());
    resume.warnings.extend(measured.and_then(|(planning, planned)| caution(planning, &planned.best, &all)));
    // What passes the host is only estimated, so such a step says nothing about how fast a device computes.
    let telling = measured.filter(|(planning, _)| !planning.workload.sharding.through_host());
    let lessons = telling.zip(cache(environment)).map(|((planning, planned), cache)| {
        Lessons::new(cache, planning.clone(), all.values().cloned().collect(), planned.best.clone())
    });
    settle(&mut config, &adapters, &plan);
    if !devices.is_empty() {
        config.train.compute = Compute::of(&devices);
    }
    let isolation = environment.isolation.clone();
    Ok(Job {
        config,
        all,
        devices,
        names,
        plan,
        planned,
        lessons,
        source,
        isolation,
        batches,
        out,
        again,
        changed,
        resume,
    })
}

/// Those of the devices that were opened which have these numbers.
pub(super) fn pick(all: &BTreeMap<usize, Device>, numbers: &[usize]) -> Vec<Device> {
    numbers.iter().filter_map(|number| all.get(number)).cloned().collect()
}

/// `--out`, or the next free `runs/<name>-<number>` (the last used one to resume).
pub(super) fn out_folder(launch: &Launch, name: &str) -> Result<PathBuf> {
    if let Some(out) = &launch.out {
        return Ok(out.clone());
    }
    let numbered = |n: usize| PathBuf::from("runs").join(format!("{name}-{n}"));
    let free = (1..).find(|&n| !numbered(n).exists()).unwrap_or(1);
    if !launch.resume {
        return Ok(numbered(free));
    }
    match free {
        1 => Err(Error::config(
            "--resume",
            format!("there is no run in {}; name one with --out", numbered(1).display()),
        )),
        n => Ok(numbered(n - 1)),
    }
}
