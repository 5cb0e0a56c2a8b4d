//! `polystage plan`.

use std::path::PathBuf;

use super::planning::{MachineArguments, bases, for_devices, for_file, read_config};
use super::{Environment, say};
use crate::error::Result;

/// Plans a training run without starting it: which device gets which layers, when, how long a step will take, and what
/// else was considered.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  polystage plan configs/gpt2.toml\n  polystage plan configs/gpt2.toml --machine configs/machines/three-vendors.toml --svg plan.svg\n  polystage plan configs/gpt2.toml --write-machine here.toml"
)]
pub(super) struct Arguments {
    /// The experiment: a TOML file.
    config: PathBuf,
    /// Override a key of the file; may be given several times.
    #[arg(long, value_name = "a.b=c")]
    set: Vec<String>,
    #[command(flatten)]
    machine: MachineArguments,
    /// Write the profiles that the plan was made with to this file.
    #[arg(long, value_name = "FILE")]
    write_machine: Option<PathBuf>,
    /// Write the predicted timeline to this file.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Write the schedule to this file, which pipeline.schedule can name.
    #[arg(long, value_name = "FILE")]
    write_schedule: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &Arguments, environment: &Environment) -> Result<u8> {
    let config = read_config(&arguments.config, &arguments.set, arguments.machine.devices.as_deref())?;
    let bases = bases(&arguments.config);
    let planning = match &arguments.machine.machine {
        Some(file) => for_file(&config, file, arguments.machine.memory.as_deref(), &bases)?,
        None => for_devices(&config, &arguments.machine, environment, &bases)?.0,
    };
    let planned = planning.search()?;
    say(format!("{} evaluated", planned.best.simulation.step));
    Ok(0)
}
