//! Who has what of the state: levels of ZeRO, sums by microbatch, the host's memory.

use polystage::gpu::{Capabilities, Device};
use polystage::pipeline::Plan;
use polystage::schedule::{Schedule, generate, replicate_in_turn};
use polystage::train::checkpoint;
use polystage::train::config::Config;
use polystage::train::trainer::Trainer;

use crate::cli::Place;
use crate::common::{adapters, cut_at, nmse, open};
use crate::pipeline::{assert_same, measure, train, train_on};
use crate::replicas::{SHARES, UNEVEN, mesh, of_shares, run};

/// As [`mesh`], with the microbatches dealt out.
fn dealt(name: &str, ranks: usize, shares: &[usize]) -> Schedule {
    let replicas = shares.iter().map(|&share| generate(name, ranks, share).unwrap());
    replicate_in_turn(&replicas.collect::<Vec<_>>()).unwrap()
}

const LEVELS: [&str; 3] = ["mesh.sum=\"microbatch\"", "mesh.zero=2", "mesh.zero=3"];

#[test]
fn added_by_microbatch_every_level_has_the_bits_of_one_device() {
    for (number, adapter) in adapters().into_iter().enumerate() {
        let i = adapter.index;
        // Shares of two and three replicas on one adapter, and on others what has the most parts.
        let shares = if number == 0 { &[SHARES[1], SHARES[3]][..] } else { &[SHARES[3]] };
        for &shares in shares {
            let alone = crate::pipeline::run(&of_shares(shares, &[]), &[i], 2);
            for (at, level) in LEVELS.into_iter().enumerate().skip(if number == 0 { 0 } else { 2 }) {
                let config = of_shares(shares, &[level]);
                let what = format!("{level} {shares:?} on {}", adapter.name);
                let flat = run(&config, mesh("1f1b", 1, shares), None, &vec![i; shares.len()]);
                assert_same(&what, &alone, &flat);
                // Pipelines too where compiling is quick.
                if number > 0 {
                    continue;
                }
                let (name, cut) = [("gpipe", 2.0), ("1f1b", 3.5), ("zb-h1", 1.0)][(at + shares[0]) % 3];
                let deep =
                    run(&config, dealt(name, 2, shares), Some(cut_at(&[cut])), &vec![i; 2 * shares.len()]);
                assert_same(&format!("{what}, {name}"), &alone, &deep);
            }
        }
    }
}

/// Arithmetic of the host: the same on every mesh, and nearly that of a device.
#[test]
fn the_hosts_optimizer_gives_the_same_bits_in_any_placement_and_nearly_those_of_the_devices() {
    let i = adapters()[0].index;
    for shares in [SHARES[1], SHARES[3]] {
        let host = |more: &str| of_shares(shares, &["mesh.optimizer=host", more]);
        let flat = |config: &Config| run(config, mesh("1f1b", 1, shares), None, &vec![i; shares.len()]);
        let deep = |config: &Config| {
            let ranks = vec![i; 2 * shares.len()];
            run(config, mesh("zb-h1", 2, shares), Some(cut_at(&[2])), &ranks)
        };
        let by_share = host("mesh.zero=1");
        assert_same(&format!("{shares:?}"), &flat(&by_share), &deep(&by_share));
        let by_devices = flat(&of_shares(shares, &[]));
        for (host, device) in flat(&by_share).0.iter().zip(&by_devices.0) {
            approx::assert_relative_eq!(host, device, max_relative = 1e-6);
        }
        let alone = crate::pipeline::run(&host("mesh.sum=microbatch"), &[i], 2);
        for level in ["mesh.sum=microbatch", "mesh.zero=2", "mesh.zero=3"] {
            let config = host(level);
            assert_same(&format!("{level} {shares:?}"), &alone, &flat(&config));
            assert_same(&format!("{level} {shares:?}, pipelines"), &alone, &deep(&config));
        }
    }
}

#[test]
fn ties_across_uneven_replicas_adapters_packed_weights_and_recomputation_change_no_bit_at_any_level() {
    let i = adapters()[0].index;
    let shares = [2, 2];
    for more in [
        &[][..],
        &["train.weights=bf16"],
        &["train.weights=bf16-only"],
        &["adapter.rank=3", "train.weights=bf16"],
        &["pipeline.recompute=true"],
    ] {
        for optimizer in ["device", "host"] {
            let optimizer = format!("mesh.optimizer={optimizer}");
            let with = |level: &str| {
                let more = [more, &[level, optimizer.as_str()]].concat();
                of_shares(&shares, &more)
            };
            let alone = crate::pipeline::run(&with("mesh.sum=microbatch"), &[i], 2);
            for (level, text) in LEVELS.into_iter().zip(UNEVEN.into_iter().cycle()) {
                let what = format!("{more:?} {optimizer} {level}");
                let uneven = run(&with(level), text.parse().unwrap(), None, &[i; 3]);
                assert_same(&what, &alone, &uneven);
            }
            if optimizer.ends_with("host") {
                // Added by share, on meshes with the same shares.
                let flat = run(&with("mesh.zero=1"), mesh("1f1b", 1, &shares), None, &[i; 2]);
                let deep = run(&with("mesh.zero=1"), mesh("gpipe", 2, &shares), None, &[i; 4]);
                assert_same(&format!("{more:?} by share"), &flat, &deep);
            }
        }
    }
}

/// Logits of 2.4 MB in three parts, of which only one exists at a time.
#[test]
fn logits_in_parts_give_the_same_bits_on_every_mesh_and_the_losses_and_gradients_of_whole_ones() {
    let ways =
        [(&[][..], false), (&[], true), (&["train.weights=bf16"], false), (&["adapter.rank=3"], false)];
    for (number, adapter) in adapters().into_iter().enumerate() {
        // All on the last adapter, and on others the first.
        let is_last = number + 1 == adapters().len();
        for &(more, f16) in
            ways[..if is_last { ways.len() } else { 1 }].iter().filter(|way| !way.1 || adapter.f16)
        {
            let config = |of: &[&str]| {
                let size = ["model.vocabulary=16001", "mesh.sum=microbatch"];
                crate::pipeline::config(&[&size[..], more, of].concat())
            };
            let devices = |count: usize| -> Vec<Device> {
                let f16 = |device: Device| device.with(Capabilities { f16, ..*device.capabilities() });
                open(&vec![adapter.index; count]).into_iter().map(f16).collect()
            };
            let run = |of: &[&str], schedule: Option<Schedule>, count: usize| {
                let (config, devices) = (config(of), devices(count));
                let budgets = vec![None; count];
                let setup = match schedule {
                    Some(schedule) => Trainer::setup_in(&config, schedule, budgets),
                    None => Trainer::setup(&config, budgets),
                };
                let bytes =
                    Plan::for_devices(setup.as_ref().unwrap().clone(), &devices).unwrap().ranks[0].bytes;
                (bytes, measure(train_on(&config, setup.unwrap(), &devices), 2))
            };
            let (what, most) = (format!("{more:?} on {}, f16: {f16}", adapter.name), "train.logits=1");
            let (whole, parts) = (run(&[], None, 1), run(&[most], None, 1));
            assert!(whole.0 - parts.0 > 1_000_000, "{what}: {} and {} bytes", whole.0, parts.0);
            // Sums over the vocabulary are added in another order: in f32, or of operands rounded to f16.
            let (loss, gradient) = if f16 { (1e-4, 1e-5) } else { (1e-6, 1e-8) };
            for (a, b) in whole.1.0.iter().zip(&parts.1.0) {
                approx::assert_relative_eq!(a, b, max_relative = loss);
            }
            for ((name, a), (_, b)) in whole.1.1.iter().zip(&parts.1.1) {
                let error = nmse(b, &a.iter().map(|&x| x as f64).collect::<Vec<_>>());
                assert!(error < gradient, "{what}: gradient of {name} has NMSE {error:.2e}");
            }
            // I and W in one and apart; weights and gradients that pass the devices.
            for (name, recompute) in
                [("1f1b", "pipeline.recompute=false"), ("zb-h1", "pipeline.recompute=true")]
            {
                let deep = run(&[most, recompute], Some(generate(name, 2, 3).unwrap()), 2);
                assert_same(&format!("{what} {name}"), &parts.1, &deep.1);
                let passing = run(&[most, "mesh.zero=3"], Some(mesh(name, 1, &[2, 1])), 2);
                assert_same(&format!("{what} ZeRO 3 {name}"), &parts.1, &passing.1);
            }
        }
    }
}

/// Of 7.3 MB, where 4 can be bound.
#[test]
fn logits_in_parts_are_planned_where_whole_ones_are_too_large_for_one_binding() {
    let adapter = &adapters()[0];
    let device = &open(&[adapter.index])[0];
    let small = Capabilities { max_binding: 4 << 20, ..*device.capabilities() };
    let plan = |more: &[&str]| {
        let size = ["model.vocabulary=16001", "pipeline.microbatches=1"];
        let config = crate::pipeline::config(&[&size[..], more].concat());
        let setup = Trainer::setup(&config, vec![None]).unwrap();
        Plan::new(setup, &[(device.info().clone(), small)]).map(|_| ())
    };
    let refused = plan(&[]).unwrap_err().to_string();
    assert!(refused.contains("16001]"), "{refused}");
    plan(&["train.logits=4"]).unwrap();
}

#[test]
fn i_of_logits_in_parts_out_of_the_order_of_microbatches_is_refused_as_it_makes_a_gradient() {
    let plan = |actions: &str, most: &str| {
        let text = format!("# name: by hand, stages: 1, microbatches: 2\n{actions}\n");
        let config = crate::pipeline::config(&["model.vocabulary=16001", most]);
        let setup = Trainer::setup_in(&config, text.parse().unwrap(), vec![None]).unwrap();
        Plan::for_devices(setup, &open(&[adapters()[0].index])).map(|_| ())
    };
    let (out, of) = ("0F0 0F1 0I1 0I0 0W0 0W1", "0F0 0F1 0I0 0I1 0W0 0W1");
    plan(out, "train.logits=2048").unwrap();
    plan(of, "train.logits=1").unwrap();
    let refused = plan(out, "train.logits=1").unwrap_err().to_string();
    assert!(refused.contains("pipeline.schedule") && refused.contains("raise train.logits"), "{refused}");
}

#[test]
fn a_run_goes_on_at_other_levels_over_other_meshes_with_the_bits_of_one_device() {
    let place = Place::new();
    let train = |out: &str, steps: usize, more: &[&str]| {
        let steps = format!("train.steps={steps}");
        let fixed = ["train", "tiny.toml", "--no-plan", "--out", out, "--set", &steps];
        let rate = ["--set", "train.minimum_learning_rate=1e-2", "--set", "pipeline.microbatches=4"];
        place.succeed(&[&fixed[..], &rate, more].concat());
    };
    for weights in ["train.weights=f32", "train.weights=bf16"] {
        let weights = ["--set", weights];
        train("alone", 5, &[&weights[..], &["--devices", "0"]].concat());
        let meshes: [&[&str]; 5] = [
            &["--set", "mesh.data=2", "--set", "mesh.zero=3"],
            &["--set", "mesh.zero=3", "--resume"],
            &["--set", "mesh.data=[3, 1]", "--set", "mesh.zero=2", "--resume"],
            &["--devices", "0", "--resume"],
            &["--set", "mesh.data=2", "--set", "mesh.sum=\"microbatch\"", "--resume"],
        ];
        for (step, mesh) in meshes.into_iter().enumerate() {
            train("run", step + 1, &[&weights[..], mesh].concat());
        }
        assert_eq!(place.losses("run"), place.losses("alone"), "{weights:?}");
        ["run", "alone"].into_iter().for_each(|of| std::fs::remove_dir_all(place.path(of)).unwrap());
    }
}

#[test]
fn a_step_that_is_killed_at_level_3_is_all_that_is_lost() {
    let place = Place::new();
    let train = |out: &str, more: &[&str]| {
        let fixed = ["train", "tiny.toml", "--no-plan", "--out", out].map(String::from);
        let sets = ["mesh.data=2", "mesh.zero=3", "mesh.optimizer=host", "output.checkpoint_every=1"];
        let sets = sets.into_iter().flat_map(|set| ["--set".to_string(), set.to_string()]);
        fixed.into_iter().chain(sets).chain(more.iter().map(|word| word.to_string())).collect::<Vec<_>>()
    };
    let words = |all: &[String]| -> Vec<String> { all.to_vec() };
    let run = |all: Vec<String>| place.succeed(&words(&all).iter().map(String::as_str).collect::<Vec<_>>());
    run(train("whole", &[]));
    let all = train("killed", &[]);
    let mut child = place.start(&all.iter().map(String::as_str).collect::<Vec<_>>());
    place.wait_for_steps("killed", 3);
    child.kill().unwrap();
    child.wait().unwrap();
    let reached = place.losses("killed").len() as u64;
    let kept = checkpoint::latest(&place.path("killed")).unwrap().unwrap();
    assert!(checkpoint::open(&kept).unwrap().step + 1 >= reached);
    run(train("killed", &["--resume"]));
    assert_eq!(place.losses("killed"), place.losses("whole"));
}

#[test]
fn the_planner_takes_what_fits_says_why_and_keeps_it_when_the_run_goes_on() {
    let place = Place::new();
    // 3.7 million parameters: whole 56 MiB, without the optimizer's state 28.
    let model = ["model.width=256", "model.heads=4", "model.layers=4", "train.steps=1", "train.batch=2"];
    let sets: Vec<&str> = model.iter().flat_map(|set| ["--set", set]).collect();
    let train = |more: &[&str]| {
        let fixed = ["train", "tiny.toml", "--devices", "0", "--no-plan"];
        place.run(&[&fixed[..], &sets, more].concat())
    };
    let refused = train(&["--out", "refused", "--memory", "45MiB"]);
    let line = crate::cli::one_line(&refused);
    assert!(refused.status.code() == Some(2) && line.contains("--set mesh.optimizer=host"), "{line}");
    let open = ["--set", "mesh.optimizer=auto"];
    let planned = |out: &str, more: &[&str]| {
        let fixed = ["train", "tiny.toml", "--devices", "0", "--out", out];
        place.run(&[&fixed[..], &sets, &open, more].concat())
    };
    let fits = planned("host", &["--memory", "45MiB"]);
    let said = String::from_utf8_lossy(&fits.stdout).into_owned();
    assert!(fits.status.success(), "{}", String::from_utf8_lossy(&fits.stderr));
    assert!(
        said.contains("AdamW's state and the update in host memory (") && said.contains("; otherwise "),
        "{said}"
    );
    let config = std::fs::read_to_string(place.path("host/config.toml")).unwrap();
    assert!(config.contains("optimizer = \"host\""), "{config}");
    // What would fit on the devices now goes on as it began.
    let on = planned("host", &["--resume", "--set", "train.steps=2"]);
    let said = String::from_utf8_lossy(&on.stdout).into_owned();
    assert!(on.status.success() && said.contains("update in host memory"), "{said}");
    let capped = planned("capped", &["--memory", "45MiB,host=20MiB"]);
    assert_eq!(capped.status.code(), Some(2));
    assert!(!place.path("capped").exists());
    let roomy = planned("roomy", &[]);
    assert!(!String::from_utf8_lossy(&roomy.stdout).contains("host memory"));
}

#[test]
fn ways_to_divide_the_state_that_do_not_exist_are_refused_in_a_line() {
    let place = Place::new();
    for (set, what) in [
        ("mesh.zero=0", "mesh.zero = 0 is no level"),
        ("mesh.zero=4", "mesh.zero = 4 is no level; write 1 (optimizer state), 2 (gradients too) or 3"),
        ("mesh.zero=some", "mesh.zero = \"some\" is not known; write 1, 2, 3 or \"auto\""),
        ("mesh.optimizer=cpu", "mesh.optimizer"),
        ("mesh.sum=both", "mesh.sum"),
    ] {
        let output = place.run(&["train", "tiny.toml", "--out", "out", "--set", set]);
        let line = crate::cli::one_line(&output);
        assert!(output.status.code() == Some(2) && line.contains(what), "{set}: {line}");
        assert!(!place.path("out").exists(), "{set} has left a folder");
    }
    let fixed = ["train", "tiny.toml", "--no-plan", "--out", "out", "--set", "mesh.optimizer=host"];
    let output = place.run(&[&fixed[..], &["--memory", "host=1KiB"]].concat());
    let line = crate::cli::one_line(&output);
    assert!(line.contains("the host's memory lacks ") && line.contains("--memory host="), "{line}");
    assert!(output.status.code() == Some(2) && !place.path("out").exists(), "{line}");
}

#[test]
fn microbatches_that_are_dealt_out_come_in_turn_and_each_once() {
    for shares in SHARES.into_iter().chain([&[7, 1, 4][..]]) {
        let schedule = dealt("1f1b", 2, shares);
        schedule.validate().unwrap();
        let total: usize = shares.iter().sum();
        let placement = schedule.placement().unwrap();
        assert_eq!(placement.shares().unwrap(), shares);
        // After any number of microbatches every replica has had its part of them, within one.
        let mut had = vec![0.0; shares.len()];
        for microbatch in 0..total {
            had[placement.rank(0, microbatch) / 2] += 1.0;
            for (had, share) in had.iter().zip(shares) {
                let due = *share as f64 * (microbatch + 1) as f64 / total as f64;
                assert!((had - due).abs() <= 1.0, "{shares:?}");
            }
        }
    }
}

#[test]
fn of_what_is_divided_each_device_has_its_part_and_the_host_moves_one_gradient_and_one_weight() {
    let i = adapters()[0].index;
    let devices = crate::common::open(&[i, i]);
    let bytes = |more: &[&str], shares: &[usize]| {
        // Large enough that staging buffers are the least of it.
        let model = ["model.width=256", "model.heads=4", "model.layers=4"];
        let config = of_shares(&[2, 2], &[&model[..], more].concat());
        let schedule = mesh("1f1b", 1, shares);
        let count = schedule.ranks.len();
        let setup = Trainer::setup_in(&config, schedule, vec![None; count]).unwrap();
        let plan = Plan::for_devices(setup, &devices[..count]).unwrap();
        let all = plan.model.parameters().into_iter().filter(|p| p.tied_to.is_none());
        let trained: u64 = all.map(|p| 4 * p.len() as u64).sum();
        (plan.ranks.iter().map(|rank| (rank.bytes, rank.state)).collect::<Vec<_>>(), plan.host, trained)
    };
    let (ranks, _, trained) = bytes(&["mesh.zero=3"], &[2, 2]);
    // Two moments of half of the elements each, in chunks, with what fills parameters up.
    let chunk = 2 * 4 * 2 * 8192;
    assert!(ranks.iter().all(|of| of.1.abs_diff(trained) < chunk), "{ranks:?} of {trained}");
    let (whole, _, _) = bytes(&[], &[2, 2]);
    for (divided, whole) in ranks.iter().zip(&whole) {
        assert!(divided.0 < whole.0, "{divided:?} beside {whole:?}");
    }
    let (by_host, host, _) = bytes(&["mesh.optimizer=host"], &[2, 2]);
    assert!(by_host.iter().all(|of| of.1 == 0), "{by_host:?}");
    // Weights, two moments, and the gradient of each replica.
    assert!(host >= 5 * trained && host < 5 * trained + (1 << 16), "{host} of {trained}");
    let config = of_shares(&[2, 2], &["mesh.optimizer=host"]);
    let setup = Trainer::setup_in(&config, mesh("1f1b", 1, &[2, 2]), vec![None; 2]).unwrap();
    let all = Plan::for_devices(setup.clone(), &devices).unwrap().model.parameters();
    let trained: u64 = all.iter().filter(|p| p.tied_to.is_none()).map(|p| 4 * p.len() as u64).sum();
    let mut trainer = train(&config, setup, &[i, i]);
    // The weights of an update are counted with the step that follows.
    crate::replicas::steps(&mut trainer, 1);
    let row = trainer.watch().block_on(trainer.step()).unwrap();
    let moved: Vec<u64> = row.devices.iter().map(|device| device.bytes_moved).collect();
    assert!(
        moved.iter().all(|&bytes| bytes == 2 * trained),
        "{moved:?}, one gradient of {trained} and one weight"
    );
}
