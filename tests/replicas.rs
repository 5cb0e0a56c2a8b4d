//! The data axis: replicas of stages, each for some of the microbatches, with one gradient and one set of weights.

use polystage::layers::Layers;
use polystage::ops::parameters::Part;
use polystage::pipeline::{Plan, Setup};
use polystage::schedule::{Kind, Schedule, generate, replicate};
use polystage::timeline::{Track, What};
use polystage::train::config::Config;
use polystage::train::trainer::Trainer;

use crate::cli::Place;
use crate::common::{adapters, cut_at};
use crate::pipeline::{assert_same, config, measure, train};

pub type Run = (Vec<f64>, Vec<(String, Vec<f32>)>);

/// Replicas of the recipe called `name` over so many ranks each, with these shares of the microbatches.
pub fn mesh(name: &str, ranks: usize, shares: &[usize]) -> Schedule {
    let replicas = shares.iter().map(|&share| generate(name, ranks, share).unwrap());
    replicate(&replicas.collect::<Vec<_>>()).unwrap()
}

pub fn run(config: &Config, schedule: Schedule, cuts: Option<Vec<Layers>>, indices: &[usize]) -> Run {
    let setup = Trainer::setup_in(config, schedule, vec![None; indices.len()]).unwrap();
    measure(train(config, Setup { cuts, ..setup }, indices), 2)
}

pub fn of_shares(shares: &[usize], more: &[&str]) -> Config {
    let microbatches: usize = shares.iter().sum();
    let batch = format!("train.batch={}", 2 * microbatches);
    config(&[&[batch.as_str(), &format!("pipeline.microbatches={microbatches}")], more].concat())
}

pub const SHARES: [&[usize]; 4] = [&[2, 2], &[5, 3], &[3, 1], &[2, 1, 3]];

#[test]
fn a_mesh_gives_the_same_bits_in_any_placement_and_one_devices_losses_nearly() {
    for adapter in adapters() {
        let i = adapter.index;
        for shares in SHARES {
            let config = of_shares(shares, &[]);
            let ranks = |stages: usize| vec![i; stages * shares.len()];
            let flat = run(&config, mesh("1f1b", 1, shares), None, &ranks(1));
            // Each kind of schedule for most shares: all for all would take minutes.
            let kinds = [("gpipe", [2.0]), ("1f1b", [4.0]), ("zb-h1", [2.5])];
            for (name, cuts) in kinds.into_iter().cycle().skip(shares[0]).take(2) {
                let what = format!("{shares:?} {name} on {}", adapter.name);
                assert_same(
                    &what,
                    &flat,
                    &run(&config, mesh(name, 2, shares), Some(cut_at(&cuts)), &ranks(2)),
                );
            }
            let alone = crate::pipeline::run(&config, &[i], 2);
            for (one, replicated) in alone.0.iter().zip(&flat.0) {
                // The same sums in another order.
                approx::assert_relative_eq!(one, replicated, max_relative = 1e-6);
            }
        }
    }
}

/// Every tensor of what is trained.
fn contents(trainer: &mut Trainer) -> Vec<(String, Part, Vec<f32>)> {
    let watch = trainer.watch();
    let own = trainer.executor().parameters().iter().filter(|p| p.tied_to.is_none());
    let names: Vec<String> = own.map(|p| p.name.clone()).collect();
    let parts = [Part::Weight, Part::First, Part::Second];
    let all = names.iter().flat_map(|name| parts.map(|part| (name.clone(), part)));
    let mut read = |(name, part): (String, Part)| {
        let values = watch.block_on(trainer.executor().read(&name, part)).unwrap();
        (name, part, values)
    };
    all.map(&mut read).collect()
}

pub fn steps(trainer: &mut Trainer, count: usize) -> Vec<f64> {
    let watch = trainer.watch();
    (0..count).map(|_| watch.block_on(trainer.step()).unwrap().loss).collect()
}

fn begin(config: &Config, schedule: Schedule, indices: &[usize]) -> Trainer {
    train(config, Trainer::setup_in(config, schedule, vec![None; indices.len()]).unwrap(), indices)
}

/// Stage 0 on two small devices, stage 1 on a large one; and the other way round, with the parameter that both use.
pub const UNEVEN: [&str; 2] = [
    "0F0 0F2 0B0 0B2\n0F1 0F3 0B1 0B3\n1F0 1B0 1F1 1B1 1F2 1B2 1F3 1B3",
    "0F0 0F1 0F2 0F3 0B0 0B1 0B2 0B3\n1F0 1F1 1I0 1W0 1I1 1W1\n1F2 1F3 1I2 1I3 1W2 1W3",
];

#[test]
fn a_stage_may_have_more_replicas_than_another_and_all_share_one_set_of_weights() {
    let i = adapters()[0].index;
    let config = of_shares(&[2, 2], &[]);
    for text in UNEVEN {
        let schedule: Schedule = text.parse().unwrap();
        schedule.completed(&[(1, 0)]).unwrap().validate().unwrap();
        let mut replicated = begin(&config, schedule, &[i; 3]);
        let mut alone = begin(&config, generate("gpipe", 1, 4).unwrap(), &[i]);
        for (a, b) in steps(&mut replicated, 3).into_iter().zip(steps(&mut alone, 3)) {
            approx::assert_relative_eq!(a, b, max_relative = 1e-6);
        }
        // A state that is put together from its owners is a whole one: it goes on elsewhere.
        let state = contents(&mut replicated);
        let watch = alone.watch();
        for (name, part, values) in &state {
            watch.block_on(alone.executor().write(name, *part, values)).unwrap();
        }
        let same = contents(&mut alone);
        assert!(same.iter().zip(&state).all(|(a, b)| a.2 == b.2));
        approx::assert_relative_eq!(
            steps(&mut alone, 1)[0],
            steps(&mut replicated, 1)[0],
            max_relative = 1e-6
        );
    }
}

#[test]
fn adapters_and_packed_weights_are_summed_and_sent_as_others_are() {
    let i = adapters()[0].index;
    for more in [
        &["train.weights=bf16"][..],
        &["train.weights=bf16-only"],
        &["adapter.rank=3", "adapter.alpha=6"],
        &["adapter.rank=3", "train.weights=bf16"],
    ] {
        let config = of_shares(&[2, 1], more);
        let flat = run(&config, mesh("1f1b", 1, &[2, 1]), None, &[i; 2]);
        let deep = run(&config, mesh("zb-h1", 2, &[2, 1]), Some(cut_at(&[3])), &[i; 4]);
        assert_same(&format!("{more:?}"), &flat, &deep);
        let alone = crate::pipeline::run(&config, &[i], 2);
        for (one, replicated) in alone.0.iter().zip(&flat.0) {
            // Rounded to bf16 after sums in another order.
            approx::assert_relative_eq!(one, replicated, max_relative = 1e-4);
        }
    }
}

#[test]
fn replicas_on_unlike_adapters_learn_what_one_learns() {
    let all = adapters();
    let (first, last) = (all[0].index, all[all.len() - 1].index);
    let config = of_shares(&[3, 1], &[]);
    let mut mixed = begin(&config, mesh("1f1b", 1, &[3, 1]), &[first, last]);
    let mut alone = begin(&config, generate("1f1b", 1, 4).unwrap(), &[first]);
    for (a, b) in steps(&mut mixed, 50).into_iter().zip(steps(&mut alone, 50)) {
        approx::assert_relative_eq!(a, b, max_relative = 1e-4);
    }
}

#[test]
fn each_replica_has_its_part_of_the_optimizers_state_and_of_what_travels() {
    let i = adapters()[0].index;
    let config = of_shares(&[2, 2], &[]);
    let devices = crate::common::open(&[i, i]);
    let setup = |schedule: Schedule, count| Trainer::setup_in(&config, schedule, vec![None; count]).unwrap();
    let one = Plan::for_devices(setup(generate("1f1b", 1, 4).unwrap(), 1), &devices[..1]).unwrap();
    let two = Plan::for_devices(setup(mesh("1f1b", 1, &[2, 2]), 2), &devices).unwrap();
    let trained: u64 =
        one.model.parameters().iter().filter(|p| p.tied_to.is_none()).map(|p| 4 * p.len() as u64).sum();
    let state: Vec<u64> = two.ranks.iter().map(|rank| rank.state).collect();
    // Two moments, in chunks of 8192 elements, with what fills parameters up.
    assert!(state.iter().all(|&bytes| bytes.abs_diff(trained) < 2 * 4 * 2 * 8192), "{state:?} of {trained}");
    let mut trainer = begin(&config, mesh("1f1b", 1, &[2, 2]), &[i, i]);
    // The weights of an update are counted with the step that follows.
    steps(&mut trainer, 1);
    let row = trainer.watch().block_on(trainer.step()).unwrap();
    let sent: Vec<u64> = row.devices.iter().map(|device| device.bytes_moved).collect();
    // Gradients of what the other owns, weights of what it owns itself: together one model's worth, and what fills it up.
    assert!(
        sent.iter().all(|&bytes| bytes >= trained && bytes < trained + (1 << 16)),
        "{sent:?} of {trained}"
    );
}

#[test]
fn a_step_by_hand_that_leaves_replicas_apart_is_refused() {
    for (text, what) in [
        ("C 0F0 0B0 N U\nC 0F1 0B1 N U", "every rank that shares stage 0 with others needs 0R, 0A and 0G"),
        ("C 0F0 0B0 0R N U 0G\nC 0F1 0B1 0R 0A N U 0G", "rank 0 has no 0A"),
        ("C 0F0 0B0 0A 0R N U 0G\nC 0F1 0B1 0R 0A N U 0G", "0A needs 0R, which comes later on rank 0"),
        ("0F0 0B0\n0F1 0B1 0B0", "microbatch 0 of stage 0 is already on rank 0"),
        ("0F0 0B0\n0F1 0B1\n2F0 2B0", "stage 1 is on no rank"),
        ("0F0 0F2 0B2 0B0\n0F1 0B1", "must be added in microbatch order"),
    ] {
        let error = text.parse::<Schedule>().unwrap().validate().unwrap_err().to_string();
        assert!(error.contains(what), "{text}: {error}");
    }
    replicate(&[generate("1f1b", 2, 3).unwrap(), generate("1f1b", 3, 3).unwrap()]).unwrap_err();
}

/// A model whose last backward pass is several submissions long, and whose gradients are several buckets: a quarter of a
/// second each on an adapter of which nothing is known yet.
const LONG: [&str; 6] = [
    "model.layers=4",
    "model.width=192",
    "model.heads=4",
    "model.context=96",
    "train.sequence=96",
    "pipeline.schedule=1f1b",
];

#[test]
fn gradients_leave_while_the_last_backward_pass_goes_on_and_no_bit_changes() {
    let all = adapters();
    let i = all[all.len() - 1].index;
    let config = of_shares(&[1, 1], &LONG);
    let mut flat = begin(&config, mesh("1f1b", 1, &[1, 1]), &[i; 2]);
    let mut losses = steps(&mut flat, 1);
    let row = flat.watch().block_on(flat.step()).unwrap();
    losses.push(row.loss);
    let (mut sent, mut early) = (0, 0);
    for rank in 0..2 {
        let of = |kind: Kind| {
            flat.events().iter().filter(move |event| {
                let is = matches!(event.what, What::Action(action) if action.kind == kind);
                event.rank == rank && event.track == Track::Compute && is
            })
        };
        let last = of(Kind::B).map(|event| event.end).fold(0.0, f64::max);
        sent += of(Kind::R).count();
        early += of(Kind::R).filter(|event| event.start < last).count();
    }
    assert!(early > 0 && early < sent, "{early} of {sent} buckets left before the last B had ended");
    let deep = mesh("zb-h1", 2, &[1, 1]);
    let setup = Trainer::setup_in(&config, deep, vec![None; 4]).unwrap();
    let deep = measure(train(&config, Setup { cuts: Some(cut_at(&[3])), ..setup }, &[i; 4]), 2);
    assert_same("buckets that left early", &(losses, measure(flat, 0).1), &deep);
}

#[test]
fn a_run_goes_on_over_replicas_a_pipeline_and_one_device_and_back_with_the_bits_of_its_arithmetic() {
    let place = Place::new();
    let train = |out: &str, steps: usize, more: &[&str]| {
        let steps = format!("train.steps={steps}");
        let fixed = ["train", "tiny.toml", "--no-plan", "--out", out, "--set", &steps];
        let rate = ["--set", "train.minimum_learning_rate=1e-2", "--set", "pipeline.microbatches=4"];
        place.succeed(&[&fixed[..], &rate, more].concat());
    };
    let two = ["--set", "mesh.data=2"];
    let copy = |from: &str, to: &str| crate::common::copy_folder(&place.path(from), &place.path(to));
    train("run", 2, &two);
    ["pipeline", "alone", "unequal"].into_iter().for_each(|to| copy("run", to));
    // The same replicas once more, uninterrupted.
    train("whole", 4, &two);
    train("run", 4, &[&two[..], &["--resume"]].concat());
    assert_eq!(place.losses("run"), place.losses("whole"));
    train("pipeline", 4, &["--resume"]);
    train("alone", 4, &["--resume", "--devices", "0"]);
    assert_eq!(place.losses("pipeline"), place.losses("alone"), "two stages are one device");
    train("unequal", 4, &["--resume", "--set", "mesh.data=[3, 1]"]);
    // Back from one device to replicas, as from the pipeline.
    for run in ["pipeline", "alone"] {
        train(run, 6, &[&two[..], &["--resume"]].concat());
    }
    assert_eq!(place.losses("pipeline"), place.losses("alone"));
    for ((_, a), (_, b)) in place.losses("unequal").into_iter().zip(place.losses("whole")) {
        approx::assert_relative_eq!(a, b, max_relative = 1e-5);
    }
}

#[test]
fn replicas_that_cannot_be_are_refused_in_a_line_before_anything_is_touched() {
    let place = Place::new();
    std::fs::write(place.path("two.txt"), "0F0 0B0\n0F1 0B1").unwrap();
    std::fs::write(place.path("none.txt"), "0F0 0B0\n0F1 0B1\n2F0 2B0").unwrap();
    for (set, what) in [
        (&["mesh.data=3"][..], "mesh.data = 3 is out of range"),
        (&["mesh.data=0"], "mesh.data = 0 is out of range"),
        (&["mesh.data=[3, 1]"], "mesh.data = [3, 1] are 4 microbatches, but pipeline.microbatches = 2"),
        (&["mesh.data=[2, 0]"], "every replica needs at least one microbatch"),
        (&["mesh.data=[]"], "every replica needs at least one microbatch"),
        (&["mesh.data=some"], "mesh.data = \"some\" is not known; write \"auto\""),
        (&["mesh.dat=2"], "did you mean mesh.data"),
        (&["mesh.data=[1, 1, 1]", "pipeline.microbatches=3"], "does not divide train.batch"),
        (&["mesh.data=4", "pipeline.microbatches=4"], "4 replicas need as many devices, and there are 2"),
        (&["mesh.data=[1, 1]", "pipeline.schedule=none.txt"], "stage 1 is on no rank"),
        (&["mesh.data=1", "pipeline.schedule=two.txt"], "says itself which replicas there are"),
    ] {
        let set: Vec<&str> = set.iter().flat_map(|set| ["--set", set]).collect();
        let output = place.run(&[&["train", "tiny.toml", "--out", "out"], &set[..]].concat());
        // A schedule is shown below the line that says what is wrong with it.
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let line = text.lines().next().unwrap_or_default();
        assert!(output.status.code() == Some(2) && line.contains(what), "{set:?}: {text}");
        assert!(!place.path("out").exists(), "{set:?} has left a folder");
    }
}

#[test]
fn a_planned_run_with_replicas_keeps_its_shares_says_what_they_are_and_is_traced() {
    let place = Place::new();
    let train = ["train", "tiny.toml", "--out", "run", "--set", "mesh.data=2"];
    place.succeed(&train);
    let config = std::fs::read_to_string(place.path("run/config.toml")).unwrap();
    assert!(config.contains("[mesh]\ndata = [1, 1]") || config.contains("[mesh]\ndata = [\n"), "{config}");
    let trace = place.succeed(&["trace", "run"]);
    assert!(trace.contains("predicted ") && trace.contains("traced "), "{trace}");
    let again = place.succeed(&[&train[..], &["--resume", "--set", "train.steps=14"]].concat());
    assert!(!again.contains("plan changed"), "{again}");
    let plan = place.succeed(&["plan", "tiny.toml", "--set", "mesh.data=2"]);
    assert!(plan.contains("2 pipelines beside each other, of 1 + 1 microbatches"), "{plan}");
    assert!(plan.contains("between devices with the same layers"), "{plan}");
    // Over whatever devices there are.
    place.succeed(&["plan", "run"]);
}
