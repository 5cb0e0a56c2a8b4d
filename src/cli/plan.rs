//! `polystage plan`.

use std::io::IsTerminal;
use std::path::PathBuf;

use super::planning::{Experiment, caution, for_devices, for_file};
use super::{Environment, note, print, save, say};
use crate::error::Result;
use crate::pipeline::Prediction;
use crate::pipeline::timeline::{Step, duration};
use crate::plan::Explanation;

/// Plans a training run without starting it: which device gets which layers, when, how long a step will take, and what
/// else was considered.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  polystage plan configs/gpt2.toml\n  polystage plan configs/gpt2.toml --machine configs/machines/three-vendors.toml --svg plan.svg\n  polystage plan configs/gpt2.toml --write-machine here.toml\n\nThe keys of a config: `polystage config`, docs/config.md; of a machine file: docs/machine.md; the form of a schedule's\nfile: docs/schedules.md."
)]
pub(super) struct Arguments {
    #[command(flatten)]
    experiment: Experiment,
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
    let experiment = &arguments.experiment;
    let config = experiment.read()?;
    let (mut planning, devices) = match &experiment.machine.machine {
        Some(file) => (for_file(&config, file, experiment)?, None),
        None => {
            let (planning, devices) =
                for_devices(&config, &experiment.machine, environment, &experiment.bases())?;
            (planning, Some(devices))
        }
    };
    let mut planned = planning.search()?;
    // A file's devices keep the order in which --machine reads them again.
    let machine = planning.machine.to_toml();
    if let Some(mut devices) = devices {
        planning.number(&mut planned, &mut devices);
        if let Some(text) = caution(&planning, &planned.best, &devices) {
            note(format!("warning: {text}"));
        }
    }
    let best = &planned.best;
    let adapters: Vec<_> = planning.names().iter().map(|device| device.adapter).collect();
    let explanation = planned.explain(&planning.workload, &planning.machine).on_adapters(&adapters);
    let prediction = Prediction::of_plan(best, planning.names());
    for (path, text) in [
        (&arguments.write_machine, machine),
        (&arguments.write_schedule, best.schedule.to_string()),
        (&arguments.svg, prediction.timeline()?.to_svg(&title(&explanation))),
    ] {
        if let Some(path) = path {
            save(path, &text)?;
        }
    }
    if arguments.json {
        let mut value = serde_json::to_value(&explanation).unwrap_or_default();
        value["schedule_text"] = best.schedule.to_string().into();
        value["cuts"] = best.cuts().into();
        print(serde_json::to_string_pretty(&value).unwrap_or_default())?;
        return Ok(0);
    }
    say(&explanation)?;
    let width = usize::from(console::Term::stdout().size().1).clamp(60, 160);
    let colour = !environment.plain && std::io::stdout().is_terminal();
    print(Step::predicted(&prediction)?.to_terminal(width, colour).trim_end())?;
    Ok(0)
}

fn title(plan: &Explanation) -> String {
    format!(
        "{} over {} devices: a step of {}, predicted",
        plan.schedule,
        plan.devices.len(),
        duration(plan.step_seconds)
    )
}
