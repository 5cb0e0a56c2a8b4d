//! `polystage schedule`.

use super::say;
use crate::error::Result;
use crate::schedule;

/// Prints a schedule as a grid: a row a device, a column a unit of time (F takes 1, B takes 2).
#[derive(clap::Args)]
#[command(after_help = "Example:\n  polystage schedule 1f1b --stages 4 --microbatches 8")]
pub(super) struct Arguments {
    /// gpipe or 1f1b.
    name: String,
    /// Devices in the pipeline.
    #[arg(long, default_value_t = 4)]
    stages: usize,
    /// Microbatches of a step.
    #[arg(long, default_value_t = 8)]
    microbatches: usize,
    /// Print the text form, transfers included: a line a device.
    #[arg(long)]
    text: bool,
}

pub(super) fn run(arguments: &Arguments) -> Result<u8> {
    let schedule = schedule::generate(&arguments.name, arguments.stages, arguments.microbatches)?;
    schedule.validate()?;
    if arguments.text {
        say(schedule.lowered()?.to_string().trim_end());
    } else {
        say(schedule::grid(&schedule).trim_end());
    }
    Ok(0)
}
