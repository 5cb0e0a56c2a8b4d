//! `polystage plan`.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use super::planning::{MachineArguments, bases, caution, for_devices, for_file, read_config};
use super::recipe::{Recipe, insert};
use super::{Environment, note, print, save, say};
use crate::error::{Error, Result};
use crate::folder::absent;
use crate::plan::Explanation;
use crate::timeline::{Prediction, Step, duration};
use crate::train::advice::trained_with;
use crate::train::checkpoint;
use crate::train::config::{Axis, Config};
use crate::train::run::CONFIG;
use crate::train::source::{named, sketch};

/// Plans a training run without starting it: which device gets which layers, when, how long a step will take, and what
/// else was considered.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  polystage plan configs/gpt2.toml\n  polystage plan SmolLM2-135M --rank 16 --machine configs/machines/two-cards.toml\n  polystage plan configs/gpt2.toml --machine configs/machines/three-vendors.toml --svg plan.svg\n  polystage plan configs/gpt2.toml --write-machine here.toml\n\nThe keys of a config: `polystage config`, docs/config.md; of a machine file: docs/machine.md; the form of a schedule's\nfile: docs/schedules.md."
)]
pub(super) struct Arguments {
    /// A config file; a run's folder, planned as its config.toml says over devices that are chosen anew; or a model's folder
    /// to fine-tune as `finetune` does, of which config.json is enough.
    #[arg(value_name = "CONFIG|RUN|MODEL")]
    what: PathBuf,
    /// Set a key of the config; may be given several times, and of the same key the last counts.
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
    #[command(flatten, next_help_heading = "Of a model's folder")]
    recipe: Recipe,
}

pub(super) fn run(arguments: &Arguments, environment: &Environment) -> Result<u8> {
    let (mut config, bases) = read(arguments)?;
    let machine = &arguments.machine;
    machine.choose(&mut config)?;
    let (planning, devices) = match &machine.machine {
        Some(file) => (for_file(&config, file, machine, &bases)?, None),
        None => {
            let (planning, devices) = for_devices(&config, machine, environment, &bases)?;
            (planning, Some(devices))
        }
    };
    let (planning, mut planned) = planning.choose()?;
    planned.without = planning.without(&planned);
    let written = planning.profiles().to_toml();
    let best = &planned.best;
    if let Some(text) = devices.and_then(|devices| caution(&planning, best, &devices)) {
        note(format!("warning: {text}"));
    }
    let explanation = planning.explain(&planned);
    let prediction = Prediction::of_plan(best, planning.names());
    for (path, text) in [
        (&arguments.write_machine, written),
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
        value["cuts"] = serde_json::to_value(best.cuts()).unwrap_or_default();
        print(serde_json::to_string_pretty(&value).unwrap_or_default())?;
        return Ok(0);
    }
    say(&explanation)?;
    let width = usize::from(console::Term::stdout().size().1).clamp(60, 160);
    let colour = !environment.plain && std::io::stdout().is_terminal();
    print(Step::predicted(&prediction)?.to_terminal(width, colour).trim_end())?;
    Ok(0)
}

/// The config, and the folders from which its paths count.
fn read(arguments: &Arguments) -> Result<(Config, Vec<PathBuf>)> {
    let (what, set) = (&arguments.what, &arguments.set);
    if !what.exists() {
        return Err(Error::checkpoint(what, absent(what)));
    }
    let of_run = what.join(CONFIG);
    let file = if what.is_dir() { &of_run } else { what };
    if file.exists() {
        if let Some(flag) = arguments.recipe.given().first() {
            let message =
                format!("is for a model's folder; what {} says is changed with --set", file.display());
            return Err(Error::config(*flag, message));
        }
        return Ok((
            if what.is_dir() { of_a_run(what, set)? } else { read_config(what, set, sketch)? },
            bases(file),
        ));
    }
    if let Some(run) = checkpoint::run_of(what) {
        note(format!(
            "note: {} is a checkpoint, planned as `finetune` would begin with it; to plan the run: polystage plan {}",
            what.display(),
            run.display()
        ));
    }
    let bases = vec![PathBuf::from(".")];
    let model = named(what)?;
    let described = sketch(&model, &bases)?;
    let mut table = arguments.recipe.table(&model, &described)?;
    // A plan is for one step and reads no text.
    insert(&mut table, "data", "train", vec!["none"]);
    insert(&mut table, "train", "steps", 1);
    let text = toml::to_string(&table).unwrap_or_default();
    let known = |path: &str| if path == model { Ok(described) } else { sketch(path, &bases) };
    Ok((Config::parse_with(&text, set, "plan", known)?, bases))
}

/// The config of a run, over devices that are chosen anew.
fn of_a_run(run: &Path, set: &[String]) -> Result<Config> {
    // What it was trained with says everything about a model that may be gone.
    if set.iter().any(|setting| setting.trim_start().starts_with("model.")) {
        let message = format!(
            "a run keeps its model; give a model's folder, or a config, instead of {}",
            run.display()
        );
        return Err(Error::config("--set model", message));
    }
    let open = ["pipeline.devices=auto", "mesh.data=auto"].map(String::from);
    let mut config = trained_with(run, &[&open, set].concat())?;
    if config.mesh.division().divides() && !set.iter().any(|of| of.trim_start().starts_with("mesh.tensor")) {
        config.mesh.tensor = Some(Axis::default());
    }
    note(format!(
        "note: {} is a run: planned as its config.toml says, over devices that are chosen anew{}",
        run.display(),
        match config.pipeline.microbatches {
            Some(count) => format!("; pipeline.microbatches stays {count}, as with --resume"),
            None => String::new(),
        }
    ));
    Ok(config)
}

fn title(plan: &Explanation) -> String {
    format!(
        "{} over {} devices: a step of {}, predicted",
        plan.schedule,
        plan.devices.len(),
        duration(plan.step_seconds)
    )
}
