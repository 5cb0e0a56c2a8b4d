//! Is the advice of `polystage trace` to be trusted? Ten plans that are not the best, on this machine's adapters: how long
//! a step takes, what is advised, and how long it takes when that is followed, in turns with the plan as it was.
//!
//! It takes about 30 minutes, in which the machine should do nothing else; as for `prediction`, with `LP_NUM_THREADS=1`.
//! `POLYSTAGE_PLANS=word` runs the plans with that word in their names.

use std::collections::BTreeMap;

use polystage::gpu::{AdapterInfo, Device, OpenOptions, list};
use polystage::model::Model;
use polystage::profile::Profiler;
use polystage::timeline::Prediction;
use polystage::train::advice::{Advice, Change, StepTimes, freed, improve};
use polystage::train::config::Config;
use polystage::train::planning::Planning;
use polystage::train::trainer::Trainer;

use crate::prediction::{DEEP, WIDE, launch};

/// Steps after which `trace` is asked.
const STEPS: u64 = 7;
/// Turns of both plans, and steps of each turn; the first steps of a plan do not count.
const TURNS: usize = 3;
const STEPS_OF_TURN: usize = 3;
const WARM_UP: usize = 2;
/// Seconds for which a probe's steps are repeated at most.
const PATIENCE: f64 = 3.0;

struct Case {
    name: &'static str,
    model: &'static str,
    /// 0: the first kind of adapter; 1: the second.
    adapters: &'static [usize],
    choices: &'static [&'static str],
}

#[rustfmt::skip]
const CASES: &[Case] = &[
    Case { name: "deep 2 equal, cut early", model: DEEP, adapters: &[0, 0], choices: &["schedule=1f1b", "microbatches=8", "cuts=[2]"] },
    Case { name: "deep 2 equal, cut late", model: DEEP, adapters: &[0, 0], choices: &["schedule=1f1b", "microbatches=8", "cuts=[6]"] },
    Case { name: "deep 2 equal, gpipe", model: DEEP, adapters: &[0, 0], choices: &["schedule=gpipe", "microbatches=4", "cuts=[4]"] },
    Case { name: "deep 2 equal, interleaved", model: DEEP, adapters: &[0, 0], choices: &["schedule=interleaved-1f1b", "microbatches=8"] },
    Case { name: "wide 2 equal, even cut", model: WIDE, adapters: &[0, 0], choices: &["schedule=1f1b", "microbatches=8", "cuts=[3]"] },
    Case { name: "wide 2 equal, cut early", model: WIDE, adapters: &[0, 0], choices: &["train.batch=8", "schedule=zb-h1", "microbatches=8", "cuts=[1]"] },
    Case { name: "deep 2 unequal, even cut", model: DEEP, adapters: &[0, 1], choices: &["train.batch=4", "schedule=1f1b", "microbatches=4", "cuts=[4]"] },
    Case { name: "deep 2 unequal, reversed", model: DEEP, adapters: &[1, 0], choices: &["train.batch=4", "schedule=1f1b", "microbatches=4", "cuts=[4]"] },
    Case { name: "wide 2 unequal, gpipe", model: WIDE, adapters: &[1, 0], choices: &["train.batch=8", "schedule=gpipe", "microbatches=4", "cuts=[3]"] },
    Case { name: "wide 3 unequal, even cuts", model: WIDE, adapters: &[0, 0, 1], choices: &["train.batch=8", "schedule=1f1b", "microbatches=8", "cuts=[2,4]"] },
];

pub fn table() {
    let mut adapters = pollster::block_on(list(false));
    // The faster of the software adapters first.
    adapters.sort_by_key(|a| !a.name.contains("llvmpipe"));
    let word = std::env::var("POLYSTAGE_PLANS").unwrap_or_default();
    println!("{:<28} {:>10} {:>10} {:>10} {:>8}", "plan", "measured", "predicted", "followed", "change");
    let (mut followed, mut worst) = (0, f64::NEG_INFINITY);
    for case in CASES.iter().filter(|case| case.name.contains(&word)) {
        if case.adapters.iter().any(|&a| a >= adapters.len()) {
            println!("{:<28} needs another adapter", case.name);
            continue;
        }
        if let Some(change) = run(case, &adapters) {
            (followed, worst) = (followed + 1, worst.max(change));
        }
    }
    println!(
        "{followed} plans with advice; the worst change of a step by following it: {:+.1} %",
        100.0 * worst
    );
}

/// By what part a step became longer, if there was advice.
fn run(case: &Case, adapters: &[AdapterInfo]) -> Option<f64> {
    let own: Vec<usize> = case.adapters.iter().map(|&adapter| adapters[adapter].index).collect();
    let mut choices = vec![format!("pipeline.devices={own:?}")];
    let key =
        |choice: &&str| if choice.contains('.') { choice.to_string() } else { format!("pipeline.{choice}") };
    choices.extend(case.choices.iter().map(key));
    let config = Config::parse(case.model, &choices, case.name).expect("parses");
    let model = Model::new(&config.model).expect("is a model");
    let profiler = Profiler {
        model: &model,
        sequence: config.train.sequence,
        devices: &open(&own),
        budgets: &vec![None; own.len()],
        cache: None,
        fresh: true,
        patience: PATIENCE,
    };
    let sizes: Vec<usize> = config.microbatches().iter().map(|count| config.train.batch / count).collect();
    let machine = profiler.machine(&sizes, &mut |_| ()).expect("measures");
    let plan = |config: &Config, devices: &[Device]| {
        let planning =
            Planning::for_devices(config, machine.clone(), &numbered(devices), None).expect("plans");
        let best = planning.search().expect("fits").best;
        let trainer = launch(config, planning.plan(&best).expect("fits"), devices);
        (Prediction::of_plan(&best, planning.names()), trainer)
    };
    let (prediction, mut before) = plan(&config, &open(&own));
    let rows: Vec<StepTimes> = (0..STEPS).map(|_| step(&mut before)).collect();
    let planning = freed(&config, machine.clone()).expect("plans");
    let present = planning.predicted(&prediction).expect("is the plan");
    let advice = improve(planning, &present, &prediction, &config, &rows, &before.timeline());
    let change = match advice.expect("searches") {
        Advice::Change(change) => change,
        Advice::Keep { gain, unsure, .. } => {
            let (gain, unsure) = (100.0 * gain, 100.0 * unsure);
            println!("{:<28} no advice: {gain:.1} % less is not sure, at {unsure:.1} %", case.name);
            return None;
        }
        Advice::None(why) => {
            println!("{:<28} no advice: {why}", case.name);
            return None;
        }
    };
    let Change { plan: advised, settings, what, .. } = *change;
    let kept = choices.iter().filter(|choice| !choice.starts_with("pipeline."));
    let settings: Vec<String> = kept.cloned().chain(settings).collect();
    let better = Config::parse(case.model, &settings, case.name).expect("parses");
    let used: Vec<usize> = advised.devices.iter().map(|&device| own[device]).collect();
    let devices = open(&used);
    let fixed = Planning::for_devices(&better, machine.selected(&advised.devices), &numbered(&devices), None);
    let fixed = fixed.expect("plans");
    let best = fixed.search().expect("fits").best;
    let mut after = launch(&better, fixed.plan(&best).expect("fits"), &devices);
    let [was, is] = in_turns([&mut before, &mut after]);
    println!(
        "{:<28} {:>7.1} ms {:>7.1} ms {:>7.1} ms {:>+7.1}%   {what}",
        case.name,
        1e3 * was,
        1e3 * advised.simulation.expected,
        1e3 * is,
        100.0 * (is / was - 1.0)
    );
    Some(is / was - 1.0)
}

fn open(adapters: &[usize]) -> Vec<Device> {
    let open = |&index: &usize| {
        pollster::block_on(Device::open(index, OpenOptions::default())).expect("an adapter opens")
    };
    adapters.iter().map(open).collect()
}

fn step(trainer: &mut Trainer) -> StepTimes {
    let watch = trainer.watch();
    let row = watch.block_on(trainer.step()).expect("steps");
    // The update too, before others use the cores.
    watch.block_on(trainer.executor().settle()).expect("settles");
    StepTimes::from(&row)
}

/// Median seconds of a step of each, in turns, because the machine's speed changes.
fn in_turns(mut trainers: [&mut Trainer; 2]) -> [f64; 2] {
    let mut seconds = [Vec::new(), Vec::new()];
    (0..WARM_UP).for_each(|_| drop(step(trainers[1])));
    for _ in 0..TURNS {
        for (trainer, seconds) in trainers.iter_mut().zip(&mut seconds) {
            seconds.extend((0..STEPS_OF_TURN).map(|_| step(trainer).seconds));
        }
    }
    seconds.map(|mut seconds| {
        seconds.sort_by(f64::total_cmp);
        seconds[seconds.len() / 2]
    })
}

/// Devices by their numbers.
fn numbered(devices: &[Device]) -> BTreeMap<usize, Device> {
    devices.iter().cloned().enumerate().collect()
}
