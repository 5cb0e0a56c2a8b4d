//! How far are predictions off? For plans of one, two and three devices, equal and unequal, in several schedules and of
//! two model shapes: the predicted step beside the measured one, on this machine's adapters.
//!
//! It takes about 45 minutes, in which the machine should do nothing else. With `LP_NUM_THREADS=1` a lavapipe device is
//! one core. `POLYSTAGE_PLANS=word` runs the plans with that word in their names.

use std::collections::BTreeMap;
use std::time::Instant;

use polystage::gpu::{Device, OpenOptions, list};
use polystage::model::Model;
use polystage::pipeline::Plan;
use polystage::plan::Machine;
use polystage::profile::{Profiler, Progress};
use polystage::schedule::Simulation;
use polystage::timeline::{Track, What};
use polystage::train::config::Config;
use polystage::train::data::{Batches, Corpus};
use polystage::train::planning::Planning;
use polystage::train::trainer::Trainer;

/// Seconds for which a probe's steps are repeated at most.
const PATIENCE: f64 = 16.0;

struct Case {
    name: &'static str,
    model: &'static str,
    /// 0: the first kind of adapter; 1: the second.
    adapters: &'static [usize],
    schedule: &'static str,
    microbatches: usize,
    /// Layers before each stage after the first; the planner's if empty.
    cuts: &'static [f64],
    /// What is set of the mesh.
    mesh: &'static [&'static str],
}

pub const DEEP: &str = "
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

pub const WIDE: &str = "
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
    Case { name: "deep 1 device 1f1b", model: DEEP, adapters: &[0], schedule: "1f1b", microbatches: 8, cuts: &[], mesh: &[] },
    Case { name: "wide 1 device gpipe", model: WIDE, adapters: &[0], schedule: "gpipe", microbatches: 4, cuts: &[], mesh: &[] },
    Case { name: "deep 2 equal 1f1b", model: DEEP, adapters: &[0, 0], schedule: "1f1b", microbatches: 8, cuts: &[], mesh: &[] },
    Case { name: "deep 2 equal zb-h1", model: DEEP, adapters: &[0, 0], schedule: "zb-h1", microbatches: 8, cuts: &[], mesh: &[] },
    Case { name: "deep 2 equal gpipe", model: DEEP, adapters: &[0, 0], schedule: "gpipe", microbatches: 4, cuts: &[], mesh: &[] },
    Case { name: "deep 2 equal zb-v", model: DEEP, adapters: &[0, 0], schedule: "zb-v", microbatches: 8, cuts: &[], mesh: &[] },
    Case { name: "deep 2 equal interleaved", model: DEEP, adapters: &[0, 0], schedule: "interleaved-1f1b", microbatches: 8, cuts: &[], mesh: &[] },
    Case { name: "deep 2 equal cut within a block", model: DEEP, adapters: &[0, 0], schedule: "1f1b", microbatches: 8, cuts: &[5.5], mesh: &[] },
    Case { name: "wide 2 equal eager-1f1b", model: WIDE, adapters: &[0, 0], schedule: "eager-1f1b", microbatches: 8, cuts: &[], mesh: &[] },
    Case { name: "wide 2 equal zb-h2", model: WIDE, adapters: &[0, 0], schedule: "zb-h2", microbatches: 16, cuts: &[], mesh: &[] },
    Case { name: "deep 3 equal 1f1b", model: DEEP, adapters: &[0, 0, 0], schedule: "1f1b", microbatches: 8, cuts: &[], mesh: &[] },
    Case { name: "wide 3 equal zb-h1", model: WIDE, adapters: &[0, 0, 0], schedule: "zb-h1", microbatches: 8, cuts: &[], mesh: &[] },
    Case { name: "deep 2 unequal 1f1b", model: DEEP, adapters: &[0, 1], schedule: "1f1b", microbatches: 8, cuts: &[5.0], mesh: &[] },
    Case { name: "deep 2 unequal zb-h1", model: DEEP, adapters: &[1, 0], schedule: "zb-h1", microbatches: 8, cuts: &[3.0], mesh: &[] },
    Case { name: "wide 2 unequal cut within a block", model: WIDE, adapters: &[1, 0], schedule: "gpipe", microbatches: 8, cuts: &[2.5], mesh: &[] },
    Case { name: "wide 3 unequal 1f1b", model: WIDE, adapters: &[0, 0, 1], schedule: "1f1b", microbatches: 8, cuts: &[2.0, 4.0], mesh: &[] },
    Case { name: "data wide 2 devices 2+2", model: WIDE, adapters: &[0, 0], schedule: "1f1b", microbatches: 4, cuts: &[], mesh: &["data=2"] },
    Case { name: "data wide 2 devices 3+1", model: WIDE, adapters: &[0, 0], schedule: "gpipe", microbatches: 4, cuts: &[], mesh: &["data=[3, 1]"] },
    Case { name: "data deep 2 devices 5+3", model: DEEP, adapters: &[0, 0], schedule: "1f1b", microbatches: 8, cuts: &[], mesh: &["data=[5, 3]"] },
    Case { name: "data deep 3 devices 2+1+1", model: DEEP, adapters: &[0, 0, 0], schedule: "1f1b", microbatches: 4, cuts: &[], mesh: &["data=[2, 1, 1]"] },
    Case { name: "data wide 4 devices zb-h1", model: WIDE, adapters: &[0, 0, 0, 0], schedule: "zb-h1", microbatches: 8, cuts: &[2.5], mesh: &["data=2"] },
    Case { name: "data deep 4 devices 5+3", model: DEEP, adapters: &[0, 0, 0, 0], schedule: "1f1b", microbatches: 8, cuts: &[4.0], mesh: &["data=[5, 3]"] },
    Case { name: "data wide 2 devices host", model: WIDE, adapters: &[0, 0], schedule: "1f1b", microbatches: 4, cuts: &[], mesh: &["data=2", "optimizer=host"] },
    Case { name: "data deep 4 devices host", model: DEEP, adapters: &[0, 0, 0, 0], schedule: "gpipe", microbatches: 8, cuts: &[4.0], mesh: &["data=2", "optimizer=host"] },
    Case { name: "data deep 2 devices zero 2", model: DEEP, adapters: &[0, 0], schedule: "1f1b", microbatches: 4, cuts: &[], mesh: &["data=2", "zero=2"] },
    Case { name: "data wide 2 devices zero 3", model: WIDE, adapters: &[0, 0], schedule: "1f1b", microbatches: 4, cuts: &[], mesh: &["data=2", "zero=3"] },
    Case { name: "data wide 2 unequal 3+1", model: WIDE, adapters: &[0, 1], schedule: "1f1b", microbatches: 4, cuts: &[], mesh: &["data=[3, 1]"] },
    Case { name: "data wide 2 zero 3 host", model: WIDE, adapters: &[0, 0], schedule: "1f1b", microbatches: 4, cuts: &[2.0], mesh: &["data=1", "zero=3", "optimizer=host"] },
    Case { name: "tensor deep 2 devices", model: DEEP, adapters: &[0, 0], schedule: "1f1b", microbatches: 8, cuts: &[], mesh: &["tensor=2"] },
    Case { name: "tensor wide 2 devices", model: WIDE, adapters: &[0, 0], schedule: "gpipe", microbatches: 4, cuts: &[], mesh: &["tensor=2"] },
    Case { name: "tensor deep 2 devices 2:1", model: DEEP, adapters: &[0, 0], schedule: "1f1b", microbatches: 4, cuts: &[], mesh: &["tensor=[2, 1]"] },
    Case { name: "tensor wide 3 devices", model: WIDE, adapters: &[0, 0, 0], schedule: "1f1b", microbatches: 4, cuts: &[], mesh: &["tensor=3"] },
    Case { name: "tensor deep 4 devices", model: DEEP, adapters: &[0, 0, 0, 0], schedule: "zb-h1", microbatches: 8, cuts: &[4.0], mesh: &["tensor=2"] },
    Case { name: "tensor deep 4 devices data", model: DEEP, adapters: &[0, 0, 0, 0], schedule: "1f1b", microbatches: 8, cuts: &[], mesh: &["tensor=2", "data=2"] },
    Case { name: "tensor wide 2 devices host", model: WIDE, adapters: &[0, 0], schedule: "1f1b", microbatches: 4, cuts: &[], mesh: &["tensor=2", "optimizer=host"] },
    Case { name: "tensor deep 2 devices zero 3", model: DEEP, adapters: &[0, 0], schedule: "1f1b", microbatches: 4, cuts: &[], mesh: &["tensor=2", "zero=3"] },
    Case { name: "tensor wide 2 unequal 3:1", model: WIDE, adapters: &[0, 1], schedule: "1f1b", microbatches: 4, cuts: &[], mesh: &["tensor=[3, 1]"] },
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
        let open = |&a: &usize| {
            pollster::block_on(Device::open(adapters[a].index, OpenOptions::default())).expect("opens")
        };
        let devices: Vec<Device> = case.adapters.iter().map(open).collect();
        // What is profiled while a trainer is there has devices of its own: wgpu's queues are one thread's at a time.
        let probed: Vec<Device> = case.adapters.iter().map(open).collect();
        let (predicted, bubble, measured) = run(case, &devices, &probed);
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
fn run(case: &Case, devices: &[Device], probed: &[Device]) -> (f64, f64, f64) {
    let adapters: Vec<usize> = devices.iter().map(|d| d.info().index).collect();
    let mut choices = vec![
        format!("pipeline.devices={adapters:?}"),
        format!("pipeline.schedule={}", case.schedule),
        format!("pipeline.microbatches={}", case.microbatches),
    ];
    if !case.cuts.is_empty() {
        choices.push(format!("pipeline.cuts={:?}", case.cuts));
    }
    choices.extend(case.mesh.iter().map(|set| format!("mesh.{set}")));
    let config = Config::parse(case.model, &choices, case.name).expect("parses");
    let (t, model) = (&config.train, Model::new(&config.model).expect("is a model"));
    let mut profiler = Profiler {
        model: &model,
        sequence: t.sequence,
        devices: probed,
        budgets: &vec![None; devices.len()],
        cache: None,
        fresh: true,
        patience: 0.0,
    };
    let sizes = [t.batch / case.microbatches];
    let division = config.mesh.division();
    let mut machine = profiler.machine(&sizes, &mut |_| ()).expect("measures");
    profiler.gangs(&mut machine, (&division, config.mesh.wire), &sizes, &mut |_| ()).expect("measures");
    let numbered = devices.iter().cloned().enumerate().collect();
    let known = machine.clone();
    let planning = Planning::for_devices(&config, machine, &numbered, None).expect("plans");
    let best = planning.search().expect("fits").best;
    let plan = planning.plan(&best).expect("fits");
    let mut trainer = launch(&config, plan, devices);
    let watch = trainer.watch();
    let mut step = || {
        let start = Instant::now();
        watch.block_on(trainer.step()).expect("steps");
        // The update too, before others use the cores.
        watch.block_on(trainer.executor().settle()).expect("settles");
        start.elapsed().as_secs_f64()
    };
    // The first steps compile and touch fresh memory.
    step();
    step();
    // The machine's speed changes by a third within seconds, because others use it too. So it is measured once more, in
    // turns with the steps that are to be predicted, and for half as long as they take.
    profiler.patience = PATIENCE;
    let (mut seconds, mut probed_since) = (Vec::new(), Instant::now());
    let mut say = |progress: Progress| {
        let last = seconds.last().copied().unwrap_or(0.0);
        if progress == Progress::Step && probed_since.elapsed().as_secs_f64() >= 0.5 * last {
            seconds.push(step());
            probed_since = Instant::now();
        }
    };
    // What a gang takes rests on its own probe alone.
    let mut machine = match division.divides() {
        true => Machine { gangs: Vec::new(), ..known },
        false => profiler.machine(&sizes, &mut say).expect("measures"),
    };
    profiler.gangs(&mut machine, (&division, config.mesh.wire), &sizes, &mut say).expect("measures");
    let planning = Planning::for_devices(&config, machine, &numbered, None).expect("plans");
    let best = planning.again(&best).expect("fits");
    if std::env::var("POLYSTAGE_VERBOSE").is_ok() {
        let all: Vec<String> = seconds.iter().map(|s| format!("{:.0}", 1e3 * s)).collect();
        println!("    {}", all.join(" "));
        compare(&best.simulation, &trainer, &planning.machine);
    }
    // The mean, as of the probes; but one accident in twenty steps is none of the plan's.
    seconds.sort_by(f64::total_cmp);
    seconds.truncate(seconds.len() - seconds.len() / 20);
    let measured = seconds.iter().sum::<f64>() / seconds.len() as f64;
    (best.simulation.expected, best.simulation.bubble, measured)
}

/// A model in training on noise.
pub fn launch(config: &Config, plan: Plan, devices: &[Device]) -> Trainer {
    let t = &config.train;
    let text: Vec<u8> = (0u32..1 << 16).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let batches = Batches::new(Corpus::from_bytes(text), t.batch, t.sequence, config.data.order, t.seed);
    let mut trainer =
        Trainer::launch(config, plan, devices, batches.expect("is long enough")).expect("launches");
    trainer.watch().block_on(trainer.initialise()).expect("initialises");
    trainer
}

/// Mean seconds of each kind of action, predicted and measured, for whoever looks for the cause of an error.
fn compare(simulation: &Simulation, trainer: &Trainer, machine: &Machine) {
    let mut sums: BTreeMap<String, [(f64, usize); 2]> = BTreeMap::new();
    let mut add = |key: String, which: usize, seconds: f64| {
        let sum = &mut sums.entry(key).or_default()[which];
        *sum = (sum.0 + seconds, sum.1 + 1);
    };
    for cell in simulation.cells.iter().filter(|c| c.action.kind.computes()) {
        add(
            format!("rank {} {}{}", cell.rank, cell.action.stage, cell.action.kind),
            0,
            cell.end - cell.start,
        );
    }
    let timeline = trainer.timeline();
    for event in timeline.events.iter().filter(|e| e.track == Track::Compute) {
        let key = match event.what {
            What::Action(action) => format!("rank {} {}{}", event.rank, action.stage, action.kind),
            other => format!("rank {} {other}", event.rank),
        };
        add(key, 1, event.end - event.start);
    }
    for (key, [predicted, measured]) in sums {
        let mean = |(sum, count): (f64, usize)| 1e3 * sum / (count.max(1) as f64);
        println!("    {key:<20} {:>8.2} ms {:>8.2} ms", mean(predicted), mean(measured));
    }
    println!(
        "    makespan {:.1} ms, step {:.1} ms, with jitter {:.1} ms; slowdown {:?}",
        1e3 * simulation.makespan,
        1e3 * simulation.step,
        1e3 * simulation.expected,
        machine.slowdown
    );
    for link in &machine.links {
        println!("    link {link:?}");
    }
    for device in &machine.devices {
        println!("    {} cores {:.2} {:?} {:?}", device.name, device.cores, device.jitter, device.rates);
    }
}
