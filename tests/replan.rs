//! Steps that do not keep to their prediction: what is learnt from them, and moving in mid-run.

use polystage::layers::Layers;
use polystage::plan::{Candidate, Machine};
use polystage::timeline::{Event, Track, What};
use polystage::train::config::Config;
use polystage::train::planning::Planning;
use polystage::train::replan::{Replanner, Verdict};

const MACHINE: &str = "
name = 'two of a kind'
[link]
latency_us = 20
gb_s = 5
[[devices]]
name = 'one'
cores = 0
copy_engine = false
rates = { matmul_gflops = 1000, memory_gb_s = 100, launch_us = 2, submit_us = 20, barrier_us = 50 }
[[devices]]
name = 'other'
cores = 0
copy_engine = false
rates = { matmul_gflops = 1000, memory_gb_s = 100, launch_us = 2, submit_us = 20, barrier_us = 50 }
";

const CONFIG: &str = "
[model]
kind = 'gpt2'
layers = 12
width = 256
heads = 4
context = 128
vocabulary = 256
[data]
train = ['unused']
[train]
steps = 1
batch = 8
sequence = 128
[pipeline]
devices = 2
";

fn replanner() -> Replanner {
    let config = Config::parse(CONFIG, &[], "test").unwrap();
    let planning = Planning::for_machine(&config, Machine::parse(MACHINE, "test").unwrap(), None).unwrap();
    let best = planning.search().unwrap().best;
    Replanner::new(planning, best)
}

/// What a step of the plan would show if rank 1 took `factor` times as long as predicted.
fn events(plan: &Candidate, factor: f64) -> Vec<Event> {
    let computed = plan.simulation.cells.iter().filter(|cell| cell.action.kind.computes());
    let event = |cell: &polystage::schedule::Cell| Event {
        rank: cell.rank,
        track: Track::Compute,
        what: What::Action(cell.action),
        start: cell.start,
        end: cell.start + (cell.end - cell.start) * if cell.rank == 1 { factor } else { 1.0 },
        bytes: 0,
    };
    computed.map(event).collect()
}

fn layers(plan: &Candidate, rank: usize) -> Layers {
    plan.layers_of(rank)
}

#[test]
fn a_device_that_turns_out_slower_loses_layers_and_microbatches_stay_as_they_are() {
    let mut replanner = replanner();
    let before = replanner.current().clone();
    let slow = 2.5 * before.simulation.step;
    let moved = (0..20).find_map(|_| {
        let events = events(replanner.current(), 3.0);
        match replanner.step(slow, &events).unwrap() {
            Verdict::Move { to, off, staying } => Some((*to, off, staying)),
            _ => None,
        }
    });
    let (to, off, staying) = moved.expect("moves");
    assert!((off - 1.5).abs() < 1e-9, "{off}");
    let slower = before.devices[1];
    let rank = to.devices.iter().position(|&d| d == slower).unwrap();
    assert!(layers(&to, rank) < layers(&before, 1), "{} of {}", layers(&to, rank), layers(&before, 1));
    assert!(to.simulation.step < 0.97 * staying);
    assert_eq!((to.microbatches, to.batch), (before.microbatches, before.batch));
    assert_eq!(replanner.current(), &to);
}

#[test]
fn steps_that_keep_to_their_prediction_within_a_tenth_change_nothing() {
    let mut replanner = replanner();
    let before = replanner.current().clone();
    for step in 0..40 {
        let seconds = before.simulation.step * if step % 2 == 0 { 1.09 } else { 0.92 };
        let events = events(&before, 1.0);
        assert!(matches!(replanner.step(seconds, &events).unwrap(), Verdict::Keep));
    }
    assert_eq!(replanner.current(), &before);
}

#[test]
fn steps_that_are_slow_everywhere_correct_the_prediction_and_move_nothing() {
    let mut replanner = replanner();
    let before = replanner.current().clone();
    let events: Vec<Event> = events(&before, 1.0)
        .into_iter()
        .map(|mut event| {
            event.end = event.start + 2.0 * (event.end - event.start);
            event
        })
        .collect();
    let corrected =
        (0..20).find_map(|_| match replanner.step(1.9 * before.simulation.step, &events).unwrap() {
            Verdict::Keep => None,
            Verdict::Corrected { seconds, .. } => Some(seconds),
            Verdict::Move { .. } => panic!("moves though both devices are equally slow"),
        });
    let seconds = corrected.expect("notices");
    // Twice the computation; links and the end of the step cost what they did.
    assert!(seconds > 1.7 * before.simulation.step && seconds < 2.05 * before.simulation.step);
    assert_eq!(replanner.current().stages, before.stages);
}

#[test]
fn a_device_that_did_not_work_is_off_by_what_all_the_others_are() {
    let config = Config::parse(&CONFIG.replace("devices = 2", "devices = [0]"), &[], "test").unwrap();
    let mut planning =
        Planning::for_machine(&config, Machine::parse(MACHINE, "test").unwrap(), None).unwrap();
    planning.options.devices = Some(vec![0]);
    let plan = planning.search().unwrap().best;
    let slow: Vec<Event> = events(&plan, 1.0)
        .into_iter()
        .map(|mut event| {
            event.end = event.start + 2.0 * (event.end - event.start);
            event
        })
        .collect();
    let before = planning.machine.devices[1].rates.matmul_gflops;
    let ratios = planning.learn(&plan, &slow);
    assert!((ratios[0] - 2.0).abs() < 1e-9 && ratios.len() == 1, "{ratios:?}");
    assert!((planning.machine.devices[1].rates.matmul_gflops - before / 2.0).abs() < 1e-6);
}
