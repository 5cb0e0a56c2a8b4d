//! `polystage schedule`.

use std::path::Path;

use serde_json::json;

use super::print;
use crate::error::{Error, Result};
use crate::folder::files::read_text;
use crate::schedule::{self, AUTO, Costs, Effort, Schedule};

/// Prints a schedule as a grid: a row a device, a column a unit of time (F, I and W take 1, B takes 2).
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  polystage schedule 1f1b --stages 4 --microbatches 8\n  polystage schedule zb-v --text > mine.txt\n  polystage schedule mine.txt\n\nThe text form, with an example: docs/schedules.md."
)]
pub(super) struct Arguments {
    /// gpipe, 1f1b, eager-1f1b, interleaved-1f1b, zb-h1, zb-h2, zb-v, auto (made for equal times here), or a file in
    /// text form, which is proved to run.
    #[arg(value_name = "NAME|FILE")]
    name: String,
    /// Devices in the pipeline [default: 4].
    #[arg(long)]
    stages: Option<usize>,
    /// Microbatches of a step [default: 8].
    #[arg(long)]
    microbatches: Option<usize>,
    /// Stages of each device [default: 2 for interleaved-1f1b and zb-v, else 1].
    #[arg(long)]
    chunks: Option<usize>,
    /// Print the text form, transfers included: a line a device.
    #[arg(long, conflicts_with = "json")]
    text: bool,
    /// Print the lists of actions and the simulation as JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &Arguments) -> Result<u8> {
    let schedule = find(arguments)?;
    if arguments.text {
        print(schedule.lowered()?.to_string().trim_end())?;
    } else if arguments.json {
        print(serde_json::to_string_pretty(&as_json(&schedule)?).unwrap_or_default())?;
    } else {
        schedule.validate()?;
        print(schedule::grid(&schedule).trim_end())?;
    }
    Ok(0)
}

/// The schedule with that name, or in that file.
fn find(arguments: &Arguments) -> Result<Schedule> {
    let Arguments { name, stages, microbatches, chunks, .. } = arguments;
    let path = Path::new(name);
    if !schedule::ALL_NAMES.contains(&name.as_str()) && path.exists() {
        for (flag, value) in [("--stages", stages), ("--microbatches", microbatches), ("--chunks", chunks)] {
            if value.is_some() {
                let message = format!("{name} is a file, which says that itself; leave {flag} out");
                return Err(Error::config(flag, message));
            }
        }
        return read_text(path).map_err(|e| e.config(path))?.parse();
    }
    if name.contains(['/', '\\', '.']) {
        return Err(Error::config("schedule", format!("there is no file {name}")));
    }
    let (ranks, microbatches) = (stages.unwrap_or(4), microbatches.unwrap_or(8));
    if name == AUTO {
        let like = schedule::generate_chunked("1f1b", ranks, chunks.unwrap_or(1), microbatches)?;
        let costs = Costs::uniform(&like, 1.0, 1.0, 1.0, 0.0);
        let placement: Vec<usize> = (0..ranks).collect();
        return schedule::synthesise(&costs, &placement, microbatches, Effort::Quick);
    }
    let chunks = chunks.map_or_else(|| schedule::default_chunks(name), Ok)?;
    schedule::generate_chunked(name, ranks, chunks, microbatches)
}

/// The schedule, and what it takes if F, I and W take 1 each and hops nothing.
fn as_json(schedule: &Schedule) -> Result<serde_json::Value> {
    schedule.validate()?;
    let simulation = schedule::simulate(schedule, &Costs::uniform(schedule, 1.0, 1.0, 1.0, 0.0))?;
    let list = |actions: &Vec<schedule::Action>| actions.iter().map(ToString::to_string).collect::<Vec<_>>();
    Ok(json!({
        "name": schedule.name,
        "stages": schedule.stages,
        "microbatches": schedule.microbatches,
        "ranks": schedule.ranks.iter().map(list).collect::<Vec<_>>(),
        "makespan": simulation.makespan,
        "bubble": simulation.bubble,
        "peak_in_flight": simulation.peak_in_flight,
    }))
}
