//! What a run will be.

use std::path::{Path, PathBuf};

use super::Launch;
use crate::cli::planning::{MachineArguments, cache, caution, device_budgets, for_devices, settle};
use crate::cli::{Environment, adapters, open};
use crate::error::{Error, Result};
use crate::gpu::Device;
use crate::pipeline::Plan;
use crate::plan::Planned;
use crate::train::checkpoint;
use crate::train::config::Config;
use crate::train::data::Batches;
use crate::train::lessons::Lessons;
use crate::train::planning::Planning;
use crate::train::run::Run;
use crate::train::source::Source;
use crate::train::trainer::Trainer;

/// Everything that is settled before a device is used.
pub(super) struct Job {
    pub(super) config: Config,
    /// Every device that was opened.
    pub(super) all: Vec<Device>,
    /// Those of the plan, in pipeline order.
    pub(super) devices: Vec<Device>,
    pub(super) plan: Plan,
    pub(super) planned: Option<(Planning, Planned)>,
    /// For the profiles that it was planned with, if they come from the cache.
    pub(super) lessons: Option<Lessons>,
    pub(super) source: Source,
    pub(super) batches: Batches,
    pub(super) out: PathBuf,
    pub(super) resume: Option<PathBuf>,
    /// What a user who resumes may not expect, said once the checkpoint is found to be good.
    pub(super) warnings: Vec<String>,
}

pub(super) fn prepare(
    mut config: Config,
    out: PathBuf,
    machine: &MachineArguments,
    launch: &Launch,
    bases: &[PathBuf],
    environment: &Environment,
) -> Result<Job> {
    let source = Source::open(&config, bases)?;
    let (t, order) = (&config.train, config.data.order);
    let batches = Batches::new(source.train.clone(), t.batch, t.sequence, order, t.seed)?;
    let mut warnings = Vec::new();
    let resume = match launch.resume {
        true => resume_from(&out, launch.from.as_deref(), &mut config, &mut warnings)?,
        false => None,
    };
    if !launch.resume {
        Run::check_new(&out)?;
    }
    let (all, devices, plan, planned) = if launch.no_plan {
        let devices = open(&config.pipeline.devices, &adapters()?)?;
        let budgets = device_budgets(machine.memory.as_deref(), &devices)?;
        let plan = Plan::within(Trainer::setup(&config, budgets)?, &devices)?;
        (devices.clone(), devices, plan, None)
    } else {
        let (planning, all) = for_devices(&config, machine, environment, bases)?;
        let planned = planning.search()?;
        let plan = planning.plan(&planned.best)?;
        (all.clone(), pick(&all, &planned.best.devices), plan, Some((planning, planned)))
    };
    let measured = planned.as_ref().filter(|_| machine.machine.is_none());
    warnings.extend(measured.and_then(|(planning, planned)| caution(planning, &planned.best, &all)));
    let lessons = measured.zip(cache(environment)).map(|((planning, planned), cache)| {
        Lessons::new(cache, planning.clone(), all.clone(), planned.best.clone())
    });
    settle(&mut config, &devices, plan.schedule.microbatches);
    Ok(Job { config, all, devices, plan, planned, lessons, source, batches, out, resume, warnings })
}

pub(super) fn pick(all: &[Device], which: &[usize]) -> Vec<Device> {
    which.iter().map(|&device| all[device].clone()).collect()
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

/// The checkpoint to continue from; warns about what a user may not expect.
fn resume_from(
    out: &Path,
    from: Option<&Path>,
    config: &mut Config,
    warnings: &mut Vec<String>,
) -> Result<Option<PathBuf>> {
    let Ok(old) = std::fs::read_to_string(out.join("config.toml")) else {
        let message = format!("{} does not exist or holds no run; there is nothing to resume", out.display());
        return Err(Error::config("--resume", message));
    };
    let table = |text: &str| text.parse::<toml::Table>().unwrap_or_default();
    let (old, new) = (table(&old), table(&config.to_toml()));
    // Rounding depends on the microbatches, so a choice that was left to the planner stays as it was.
    let before = old.get("pipeline").and_then(|p| p.get("microbatches")).and_then(toml::Value::as_integer);
    if config.pipeline.microbatches.is_none()
        && config.train.batch.is_multiple_of(before.unwrap_or(1) as usize)
    {
        config.pipeline.microbatches = before.map(|count| count as usize);
    }
    for section in ["data", "train"] {
        let (Some(old), Some(new)) = (old.get(section), new.get(section)) else { continue };
        for (key, value) in new.as_table().into_iter().flatten() {
            if let Some(before) = old.get(key)
                && before != value
            {
                warnings
                    .push(format!("warning: resuming with {section}.{key} = {value}, which was {before}"));
            }
        }
    }
    if let Some(from) = from {
        return checkpoint::resolve(from).map(Some);
    }
    let found = checkpoint::latest(out)?;
    let pointer = std::fs::read_to_string(out.join("checkpoints/latest")).unwrap_or_default();
    match &found {
        None => {
            warnings.push(format!("warning: {} holds no checkpoint yet; starting at step 0", out.display()))
        }
        Some(path) if !path.ends_with(pointer.trim()) => {
            let name = pointer.trim();
            warnings.push(format!(
                "warning: checkpoint {name:?} is incomplete; continuing from {}",
                path.display()
            ));
        }
        Some(_) => {}
    }
    Ok(found)
}
