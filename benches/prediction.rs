//! How far are predictions off? For plans of one, two and three devices, equal and unequal, in several schedules and of
//! two model shapes: the predicted step beside the measured one, on this machine's adapters.
//!
//! With `LP_NUM_THREADS=1` a lavapipe device is one core. `POLYSTAGE_PLANS=word` runs the plans with that word in
//! their names.

use std::collections::BTreeMap;
use std::ops::Range;

use polystage::gpu::{Device, OpenOptions, list};
use polystage::model::{Model, Weights};
use polystage::pipeline::profile::Profiler;
use polystage::pipeline::timeline::Track;
use polystage::pipeline::workload::workload;
use polystage::pipeline::{Plan, Setup, Use};
use polystage::plan::{Assignment, Machine, costs};
use polystage::schedule::{Action, Simulation, generate, simulate};
use polystage::train::config::Config;
use polystage::train::data::{Batches, Corpus};
use polystage::train::trainer::Trainer;

/// Steps of which the median counts, after two that compile and touch fresh memory.
const STEPS: usize = 9;

struct Case {
    name: &'static str,
    model: &'static str,
    /// 0: the first kind of adapter; 1: the second.
    adapters: &'static [usize],
    schedule: &'static str,
    microbatches: usize,
    /// First layers of the stages after the first; balanced if empty.
    cuts: &'static [usize],
}

const DEEP: &str = "
[model]
kind = 'gpt2'
layers = 6
width = 192
heads = 6
context = 128
vocabulary = 256
[data]
train = ['generated']
[train]
steps = 1
batch = 8
sequence = 128
";

const WIDE: &str = "
[model]
kind = 'gpt2'
layers = 4
width = 256
heads = 4
context = 64
vocabulary = 1000
[data]
train = ['generated']
[train]
steps = 1
batch = 16
sequence = 64
";

#[rustfmt::skip]
const CASES: &[Case] = &[
    Case { name: "deep 1 device 1f1b", model: DEEP, adapters: &[0], schedule: "1f1b", microbatches: 8, cuts: &[] },
    Case { name: "wide 1 device gpipe", model: WIDE, adapters: &[0], schedule: "gpipe", microbatches: 4, cuts: &[] },
    Case { name: "deep 2 equal 1f1b", model: DEEP, adapters: &[0, 0], schedule: "1f1b", microbatches: 8, cuts: &[] },
    Case { name: "deep 2 equal zb-h1", model: DEEP, adapters: &[0, 0], schedule: "zb-h1", microbatches: 8, cuts: &[] },
    Case { name: "deep 2 equal gpipe", model: DEEP, adapters: &[0, 0], schedule: "gpipe", microbatches: 4, cuts: &[] },
    Case { name: "deep 2 equal zb-v", model: DEEP, adapters: &[0, 0], schedule: "zb-v", microbatches: 8, cuts: &[] },
    Case { name: "deep 2 equal interleaved", model: DEEP, adapters: &[0, 0], schedule: "interleaved-1f1b", microbatches: 8, cuts: &[] },
    Case { name: "deep 2 equal uneven cut", model: DEEP, adapters: &[0, 0], schedule: "1f1b", microbatches: 8, cuts: &[6] },
    Case { name: "wide 2 equal eager-1f1b", model: WIDE, adapters: &[0, 0], schedule: "eager-1f1b", microbatches: 8, cuts: &[] },
    Case { name: "wide 2 equal zb-h2", model: WIDE, adapters: &[0, 0], schedule: "zb-h2", microbatches: 16, cuts: &[] },
    Case { name: "deep 3 equal 1f1b", model: DEEP, adapters: &[0, 0, 0], schedule: "1f1b", microbatches: 8, cuts: &[] },
    Case { name: "wide 3 equal zb-h1", model: WIDE, adapters: &[0, 0, 0], schedule: "zb-h1", microbatches: 8, cuts: &[] },
    Case { name: "deep 2 unequal 1f1b", model: DEEP, adapters: &[0, 1], schedule: "1f1b", microbatches: 8, cuts: &[5] },
    Case { name: "deep 2 unequal zb-h1", model: DEEP, adapters: &[1, 0], schedule: "zb-h1", microbatches: 8, cuts: &[3] },
    Case { name: "wide 2 unequal gpipe", model: WIDE, adapters: &[1, 0], schedule: "gpipe", microbatches: 8, cuts: &[2] },
    Case { name: "wide 3 unequal 1f1b", model: WIDE, adapters: &[0, 0, 1], schedule: "1f1b", microbatches: 8, cuts: &[2, 4] },
];

pub fn table() {
    let mut adapters = pollster::block_on(list(false));
    // The faster of the software adapters first.
    adapters.sort_by_key(|a| !a.name.contains("llvmpipe"));
    let word = std::env::var("POLYSTAGE_PLANS").unwrap_or_default();
    println!("{:<28} {:>10} {:>10} {:>8} {:>7}", "plan", "predicted", "measured", "error", "idle");
    let mut errors: Vec<f64> = Vec::new();
    for case in CASES.iter().filter(|case| case.name.contains(&word)) {
        if case.adapters.iter().any(|&a| a >= adapters.len()) {
            println!("{:<28} needs another adapter", case.name);
            continue;
        }
        let devices: Vec<Device> = case
            .adapters
            .iter()
            .map(|&a| {
                pollster::block_on(Device::open(adapters[a].index, OpenOptions::default())).expect("opens")
            })
            .collect();
        let (predicted, bubble, measured) = run(case, &devices);
        let error = predicted / measured - 1.0;
        errors.push(error.abs());
        println!(
            "{:<28} {:>7.1} ms {:>7.1} ms {:>+7.1}% {:>6.1}%",
            case.name,
            1e3 * predicted,
            1e3 * measured,
            100.0 * error,
            100.0 * bubble
        );
    }
    errors.sort_by(f64::total_cmp);
    if let (Some(median), Some(worst)) = (errors.get(errors.len() / 2), errors.last()) {
        println!(
            "{} plans: median error {:.1} %, worst {:.1} %",
            errors.len(),
            100.0 * median,
            100.0 * worst
        );
    }
}

/// Predicted seconds of a step, predicted bubble, measured seconds.
fn run(case: &Case, devices: &[Device]) -> (f64, f64, f64) {
    let config =
        Config::parse(case.model, &[format!("pipeline.microbatches={}", case.microbatches)], case.name)
            .expect("parses");
    let (t, m) = (&config.train, case.microbatches);
    let model = Model::new(&config.model).expect("is a model");
    let schedule = generate(case.schedule, devices.len(), m).expect("generates");
    let budgets = vec![None; devices.len()];
    let setup = Setup {
        model: config.model.clone(),
        adapter: None,
        weights: Weights::F32,
        batch: t.batch / m,
        sequence: t.sequence,
        schedule: schedule.clone(),
        cuts: (!case.cuts.is_empty()).then(|| case.cuts.to_vec()),
        recompute: Vec::new(),
        purpose: Use::Training,
        budgets: budgets.clone(),
    };
    let plan = Plan::for_devices(setup, devices).expect("plans");
    let stages: Vec<Range<usize>> = plan.stages.clone();
    let profiler = Profiler {
        model: &model,
        sequence: t.sequence,
        devices,
        budgets: &budgets,
        cache: None,
        environment: String::new(),
        fresh: true,
    };
    let machine = profiler.machine(&[t.batch / m], &mut |_| ()).expect("measures");
    let work = workload(&model, t.batch, t.sequence, &[m], devices[0].capabilities()).expect("is work");
    let rank_of = |s| schedule.rank_of(s).expect("has a rank");
    let assignment = Assignment {
        devices: &(0..devices.len()).collect::<Vec<_>>(),
        stage_ranks: &(0..stages.len()).map(rank_of).collect::<Vec<_>>(),
        recompute: &vec![false; stages.len()],
        split: &(0..stages.len()).map(|s| schedule.splits(s)).collect::<Vec<_>>(),
        in_flight: &(0..stages.len()).map(|s| schedule.slots(s).count).collect::<Vec<_>>(),
        stages: &stages,
    };
    let costs = costs(&work, &work.batchings[0], &machine, &assignment);
    let simulation = simulate(&schedule, &costs).expect("simulates");
    let text: Vec<u8> = (0u32..1 << 16).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let batches = Batches::new(Corpus::from_bytes(text), t.batch, t.sequence, config.data.order, t.seed);
    let mut trainer =
        Trainer::launch(&config, plan, devices, batches.expect("is long enough")).expect("launches");
    let watch = trainer.watch();
    watch.block_on(trainer.initialise()).expect("initialises");
    let mut seconds: Vec<f64> =
        (0..STEPS + 2).map(|_| watch.block_on(trainer.step()).expect("steps").step_seconds).skip(2).collect();
    if std::env::var("POLYSTAGE_VERBOSE").is_ok() {
        compare(&simulation, &trainer, &machine);
    }
    seconds.sort_by(f64::total_cmp);
    (simulation.step, simulation.bubble, seconds[seconds.len() / 2])
}

/// Mean seconds of each kind of action, predicted and measured, for whoever looks for the cause of an error.
fn compare(simulation: &Simulation, trainer: &Trainer, machine: &Machine) {
    let mut sums: BTreeMap<String, [(f64, usize); 2]> = BTreeMap::new();
    let mut add = |key: String, which: usize, seconds: f64| {
        let sum = &mut sums.entry(key).or_default()[which];
        *sum = (sum.0 + seconds, sum.1 + 1);
    };
    for cell in simulation.cells.iter().filter(|c| !c.action.kind.is_transfer()) {
        add(
            format!("rank {} {}{}", cell.rank, cell.action.stage, cell.action.kind),
            0,
            cell.end - cell.start,
        );
    }
    let timeline = trainer.timeline();
    for event in timeline.events.iter().filter(|e| e.track == Track::Compute) {
        let key = match event.label.parse::<Action>() {
            Ok(action) => format!("rank {} {}{}", event.rank, action.stage, action.kind),
            Err(_) => format!("rank {} {}", event.rank, event.label),
        };
        add(key, 1, event.end - event.start);
    }
    for (key, [predicted, measured]) in sums {
        let mean = |(sum, count): (f64, usize)| 1e3 * sum / (count.max(1) as f64);
        println!("    {key:<20} {:>8.2} ms {:>8.2} ms", mean(predicted), mean(measured));
    }
    println!("    makespan {:.1} ms; slowdown {:?}", 1e3 * simulation.makespan, machine.slowdown);
    for link in &machine.links {
        println!("    link {link:?}");
    }
    for device in &machine.devices {
        println!("    {} cores {:.2} {:?}", device.name, device.cores, device.rates);
    }
}
