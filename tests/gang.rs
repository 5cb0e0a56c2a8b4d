//! The tensor axis: devices that divide every layer among them compute what one device does.

use polystage::mesh::Division;
use polystage::ops::parameters::Part;
use polystage::pipeline::{Plan, Setup};
use polystage::plan::Machine;
use polystage::schedule::{Schedule, generate};
use polystage::train::config::Config;
use polystage::train::planning::Planning;
use polystage::train::trainer::Trainer;

use crate::cli::{Place, one_line};
use crate::common::{adapters, cut_at, nmse, open};
use crate::pipeline::{assert_same, config, measure, train};
use crate::replicas::{Run, mesh, of_shares, steps};

fn setup(config: &Config, schedule: Schedule, tensor: &[usize]) -> Setup {
    let ranks = schedule.ranks.len();
    let setup = Trainer::setup_in(config, schedule, vec![None; ranks]).unwrap();
    let division = Division { shares: tensor.to_vec(), ..config.mesh.division() };
    Setup { tensor: division, budgets: vec![None; ranks * tensor.len()], ..setup }
}

/// Over devices of one adapter.
fn begin(config: &Config, schedule: Schedule, tensor: &[usize], adapter: usize) -> Trainer {
    let setup = setup(config, schedule, tensor);
    let devices = vec![adapter; setup.budgets.len()];
    train(config, setup, &devices)
}

fn run(config: &Config, schedule: Schedule, tensor: &[usize], adapter: usize) -> Run {
    measure(begin(config, schedule, tensor, adapter), 2)
}

fn flat(microbatches: usize) -> Schedule {
    generate("1f1b", 1, microbatches).unwrap()
}

/// Losses of ten steps, and gradients of one, beside those of one device.
fn assert_near(what: &str, config: &Config, tensor: &[usize], adapter: usize) {
    let microbatches = config.microbatches()[0];
    let (alone, gang) = (
        measure(begin(config, flat(microbatches), &[1], adapter), 1),
        measure(begin(config, flat(microbatches), tensor, adapter), 1),
    );
    for ((name, want), (_, got)) in alone.1.iter().zip(&gang.1) {
        let want: Vec<f64> = want.iter().map(|&x| f64::from(x)).collect();
        let error = nmse(got, &want);
        // Sums in another order, of terms whose rounding errors are 1e-7 each.
        assert!(error < 1e-9, "{what}: the gradient of {name} has NMSE {error:.2e}");
    }
    let mut trainers = [&[1][..], tensor].map(|shares| begin(config, flat(microbatches), shares, adapter));
    let losses = trainers.each_mut().map(|trainer| steps(trainer, 10));
    for (one, many) in losses[0].iter().zip(&losses[1]) {
        approx::assert_relative_eq!(one, many, max_relative = 1e-6);
    }
}

const TENSORS: [&[usize]; 4] = [&[1, 1], &[1, 1, 1], &[5, 3], &[2, 1, 1]];

/// A model of each architecture, divided like this.
fn assert_architectures_near(division: impl Fn(usize) -> (&'static [usize], bool)) {
    let i = adapters()[0].index;
    let grouped = |kind: &str, kv_heads: usize, head_dim: usize| {
        let kind = format!("model.kind={kind}");
        let [kv_heads, head_dim] =
            [format!("model.kv_heads={kv_heads}"), format!("model.head_dim={head_dim}")];
        vec![kind, kv_heads, head_dim, "model.heads=8".into()]
    };
    let models = [
        vec!["model.heads=7".into(), "model.vocabulary=1003".into(), "model.layers=2".into()],
        vec!["model.kind=mlp".into(), "model.layers=2".into()],
        grouped("llama", 2, 6),
        grouped("qwen2", 4, 80),
        grouped("qwen3", 1, 10),
        grouped("mistral", 8, 4),
    ];
    for (number, model) in models.iter().enumerate() {
        let (tensor, by_token) = division(number);
        let mut config = config(&model.iter().map(String::as_str).collect::<Vec<_>>());
        config.mesh.sequence_parallel = by_token;
        assert_near(&format!("{model:?} {tensor:?} by token: {by_token}"), &config, tensor, i);
    }
}

#[test]
fn every_architecture_learns_over_a_gang_in_some_proportion_what_it_learns_on_one_device() {
    assert_architectures_near(|number| (TENSORS[number % TENSORS.len()], number % 2 == 0));
}

#[test]
#[ignore = "takes two minutes; the same holds in f64 for all of them, and here for some"]
fn every_architecture_learns_over_a_gang_in_any_proportion_what_it_learns_on_one_device() {
    for tensor in TENSORS {
        for by_token in [false, true] {
            assert_architectures_near(|_| (tensor, by_token));
        }
    }
}

#[test]
fn a_gang_gives_the_same_bits_in_any_placement_on_every_adapter() {
    for (number, adapter) in adapters().into_iter().enumerate() {
        let i = adapter.index;
        let tensors: &[&[usize]] = if number == 0 { &[&[2, 1], &[1, 1, 1]] } else { &[&[2, 1]] };
        for tensor in tensors {
            let config = config(&[]);
            let one = run(&config, flat(3), tensor, i);
            let deep = setup(&config, generate("zb-h1", 2, 3).unwrap(), tensor);
            let devices = vec![i; deep.budgets.len()];
            let deep = Setup { cuts: Some(cut_at(&[2.5])), recompute: vec![0], ..deep };
            let what = format!("{tensor:?} on {}", adapter.name);
            assert_same(&what, &one, &measure(train(&config, deep.clone(), &devices), 2));
            // What lies between the halves of blocks divided by token.
            let tensor = Division { sequence: true, ..deep.tensor };
            let flat = Setup { tensor: tensor.clone(), ..setup(&config, flat(3), &tensor.shares) };
            let one = measure(train(&config, flat, &devices[..tensor.members()]), 2);
            let deep = Setup { tensor, ..deep };
            assert_same(&format!("{what} by token"), &one, &measure(train(&config, deep, &devices), 2));
        }
    }
}

#[test]
fn all_three_axes_at_once_learn_what_one_device_does_at_every_level() {
    let i = adapters()[0].index;
    let shares = [3, 1];
    let alone = crate::pipeline::run(&of_shares(&shares, &[]), &[i], 2);
    let by_microbatch =
        |level: &str, optimizer: &str| of_shares(&shares, &[level, &format!("mesh.optimizer={optimizer}")]);
    // By share, on the devices.
    let config = of_shares(&shares, &[]);
    let cube = run(&config, mesh("1f1b", 2, &shares), &[2, 1], i);
    assert_same("2 x 2 x 2", &run(&config, mesh("1f1b", 1, &shares), &[2, 1], i), &cube);
    for (one, many) in alone.0.iter().zip(&cube.0) {
        approx::assert_relative_eq!(one, many, max_relative = 1e-6);
    }
    // By microbatch: the bits of one gang.
    for optimizer in ["device", "host"] {
        let gang = run(&by_microbatch("mesh.sum=microbatch", optimizer), flat(4), &[2, 1], i);
        for level in ["mesh.zero=2", "mesh.zero=3"] {
            let config = by_microbatch(level, optimizer);
            let cube = run(&config, mesh("gpipe", 2, &shares), &[2, 1], i);
            assert_same(&format!("{level} {optimizer}"), &gang, &cube);
        }
    }
}

#[test]
fn a_gang_trains_adapters_packed_weights_and_texts_that_share_sequences() {
    let i = adapters()[0].index;
    let llama = ["model.kind=llama", "model.heads=6", "model.kv_heads=2", "model.head_dim=6"];
    for more in [
        &["adapter.rank=3", "adapter.alpha=6"][..],
        &["train.weights=bf16"],
        &["train.weights=bf16-only", "mesh.zero=3"],
        &["adapter.rank=3", "train.weights=bf16", "mesh.optimizer=host"],
    ] {
        for kind in [&[][..], &llama, &[&["model.kind=qwen3"], &llama[1..]].concat()] {
            let config = config(&[kind, more].concat());
            let alone = run(&config, flat(3), &[1], i);
            let gang = run(&config, flat(3), &[2, 1], i);
            for (one, many) in alone.0.iter().zip(&gang.0) {
                // Rounded to bf16 after sums in another order.
                approx::assert_relative_eq!(one, many, max_relative = 1e-4);
            }
        }
    }
}

#[test]
fn unlike_adapters_learn_as_a_gang_what_one_learns() {
    let all = adapters();
    let (first, last) = (all[0].index, all[all.len() - 1].index);
    let config = config(&[]);
    let mut mixed = train(&config, setup(&config, flat(3), &[2, 1]), &[first, last]);
    let mut alone = begin(&config, flat(3), &[1], first);
    for (a, b) in steps(&mut mixed, 50).into_iter().zip(steps(&mut alone, 50)) {
        approx::assert_relative_eq!(a, b, max_relative = 1e-4);
    }
}

#[test]
fn a_member_holds_its_share_of_what_is_divided() {
    let i = adapters()[0].index;
    let config = config(&["model.width=96", "model.heads=8"]);
    let devices = open(&[i, i]);
    let bytes = |tensor: &[usize]| -> Vec<u64> {
        let count = tensor.len();
        let plan = Plan::for_devices(setup(&config, flat(3), tensor), &devices[..count]).unwrap();
        plan.ranks.iter().map(|rank| rank.state).collect()
    };
    let (whole, halves) = (bytes(&[1])[0], bytes(&[1, 1]));
    // What is whole, norms and positions, is with the first.
    assert!(halves[0] as f64 <= 0.55 * whole as f64 && halves[1] <= halves[0], "{halves:?} of {whole}");
}

#[test]
fn dividing_tokens_too_leaves_a_member_half_of_all_activations() {
    let i = adapters()[0].index;
    let devices = open(&[i, i]);
    // What grows with the microbatches that are in flight is what is kept of each.
    let kept = |tensor: &[usize], by_token: bool| {
        let mut config = config(&["model.width=96", "model.heads=8"]);
        config.mesh.sequence_parallel = by_token;
        let bytes = |microbatches: usize| {
            let one = setup(&config, flat(6), tensor);
            let gpipe = generate("gpipe", 1, microbatches).unwrap();
            let plan = Plan::for_devices(Setup { schedule: gpipe, ..one }, &devices[..tensor.len()]).unwrap();
            plan.ranks.iter().map(|rank| rank.bytes).max().unwrap()
        };
        bytes(6) - bytes(3)
    };
    let (whole, halves, all) = (kept(&[1], false), kept(&[1, 1], false), kept(&[1, 1], true));
    // Tokens, targets and losses are whole on every member.
    assert!((all as f64) < 0.55 * whole as f64, "{all} of {whole}");
    assert!(halves as f64 > 0.6 * whole as f64, "{halves} of {whole}");
}

#[test]
fn a_gangs_state_is_written_and_read_as_one_devices() {
    let i = adapters()[0].index;
    let config = config(&[]);
    let mut gang = begin(&config, flat(3), &[2, 1], i);
    let mut alone = begin(&config, flat(3), &[1], i);
    // Both are then at the same text.
    for trainer in [&mut gang, &mut alone] {
        steps(trainer, 2);
    }
    let watch = gang.watch();
    let names: Vec<String> =
        gang.executor().parameters().iter().filter(|p| p.tied_to.is_none()).map(|p| p.name.clone()).collect();
    for name in &names {
        for part in [Part::Weight, Part::First, Part::Second] {
            let values = watch.block_on(gang.executor().read(name, part)).unwrap();
            watch.block_on(alone.executor().write(name, part, &values)).unwrap();
            assert_eq!(watch.block_on(alone.executor().read(name, part)).unwrap(), values, "{name}");
            // A few elements from the middle on.
            let (first, count) = (values.len() / 3, values.len() / 2);
            let some = watch.block_on(gang.executor().read_from(name, part, first, count)).unwrap();
            assert_eq!(some, values[first..first + count], "{name}");
            watch.block_on(gang.executor().write(name, part, &values)).unwrap();
        }
    }
    approx::assert_relative_eq!(steps(&mut alone, 1)[0], steps(&mut gang, 1)[0], max_relative = 1e-6);
}

/// One block of which the feed-forward half alone is most of the model.
const BLOCK: [&str; 4] = ["model.layers=1", "model.width=64", "model.heads=4", "model.intermediate=4096"];

#[test]
fn a_block_that_is_larger_than_either_device_trains_over_both() {
    let i = adapters()[0].index;
    let config = config(&BLOCK);
    let devices = open(&[i, i]);
    let over = |schedule: Schedule, tensor: &[usize], budget: Option<u64>| {
        let setup = setup(&config, schedule, tensor);
        Plan::within(Setup { budgets: vec![budget; 2], ..setup }, &devices)
    };
    let gang = over(flat(3), &[1, 1], None).unwrap();
    let needed = gang.ranks.iter().map(|rank| rank.bytes + rank.passing).max();
    let pipeline = over(generate("1f1b", 2, 3).unwrap(), &[1], needed).err().expect("does not fit");
    assert!(matches!(pipeline, polystage::Error::Memory { .. }), "{pipeline}");
    let mut trainer = begin(&config, flat(3), &[1, 1], i);
    let losses = steps(&mut trainer, 8);
    assert!(losses[7] < losses[0], "{losses:?}");
    over(flat(3), &[1, 1], needed).unwrap();
}

/// Two cards with a way between them of so many gigabytes a second.
fn cards(memory: &str, gb_s: f64) -> Machine {
    let card = |name: &str| {
        format!(
            "[[devices]]\nname = '{name}'\nmemory = '{memory}'\nrates = {{ peak_tflops = 20, peak_gb_s = 600 }}\n"
        )
    };
    let link = format!("[link]\nlatency_us = 5\ngb_s = {gb_s}\n");
    Machine::parse(&[link, card("left"), card("right")].concat(), "cards.toml").unwrap()
}

/// What is planned where the number of devices that divide layers is left open, and what is said of it.
fn planned(more: &[&str], machine: Machine) -> (Vec<usize>, String) {
    let sizes =
        ["model.width=1024", "model.heads=16", "model.context=512", "train.sequence=512", "mesh.data=1"];
    let config = config(&[&sizes[..], &["mesh.tensor=auto"], more].concat());
    let planning = Planning::for_machine(&config, machine, None).unwrap();
    let (planning, planned) = planning.choose().unwrap();
    let plan = planning.plan(&planned.best).unwrap();
    assert_eq!(planning.called(&planned.best).len(), plan.ranks.len());
    (plan.setup.tensor.shares, planning.explain(&planned).to_string())
}

#[test]
fn the_planner_divides_layers_where_that_is_faster_or_the_only_way_and_says_what_else_there_was() {
    // One microbatch, so that a pipeline keeps only one of the cards busy, and a way as fast as memory.
    let one = ["train.batch=1", "pipeline.microbatches=1"];
    let (tensor, words) = planned(&one, cards("24GiB", 600.0));
    assert_eq!(tensor, [1, 1], "{words}");
    assert!(words.contains("every layer divided among 2 devices, 1 : 1; tensor = 1 would take "), "{words}");
    let (tensor, words) = planned(&one, cards("24GiB", 0.1));
    assert_eq!(tensor, [1], "{words}");
    assert!(words.contains("whole layers; tensor = 2 would take "), "{words}");
    // A layer that no card can hold.
    let large = ["model.layers=1", "model.intermediate=65536", "train.batch=1", "pipeline.microbatches=1"];
    let (tensor, words) = planned(&large, cards("1800MiB", 0.1));
    assert_eq!(tensor, [1, 1], "{words}");
    assert!(words.contains("with tensor = 1 nothing fits"), "{words}");
}

#[test]
fn a_run_goes_on_over_a_gang_and_off_it_again_and_what_cannot_be_is_refused_in_a_line() {
    let place = Place::new();
    let train = |out: &str, steps: usize, more: &[&str]| {
        let steps = format!("train.steps={steps}");
        let fixed = ["train", "tiny.toml", "--out", out, "--set", &steps];
        place.succeed(&[&fixed[..], &["--set", "train.minimum_learning_rate=1e-2"], more].concat())
    };
    let gang = ["--set", "mesh.tensor=2"];
    train("alone", 6, &["--no-plan", "--devices", "0"]);
    let said = train("run", 2, &gang);
    assert!(said.contains("layers   every layer divided among 2 devices, 1 : 1"), "{said}");
    assert!(said.contains("a step was predicted to take") || said.contains("time     2 steps of"), "{said}");
    let traced = place.succeed(&["trace", "run"]);
    assert!(traced.contains("predicted") && traced.contains("0 F"), "{traced}");
    assert!(traced.contains("no other plan can be advised: the devices divide every layer"), "{traced}");
    train("run", 3, &["--resume", "--no-plan", "--devices", "0", "--set", "mesh.tensor=1"]);
    train("run", 4, &["--resume", "--no-plan", "--devices", "0,0", "--set", "mesh.tensor=[2, 1]"]);
    let by_token = ["--set", "mesh.sequence_parallel=true"];
    train(
        "run",
        6,
        &[&["--resume", "--set", "mesh.tensor=auto", "--set", "mesh.zero=3"][..], &by_token].concat(),
    );
    for ((_, a), (_, b)) in place.losses("run").into_iter().zip(place.losses("alone")) {
        approx::assert_relative_eq!(a, b, max_relative = 1e-5);
    }
    let plan = place.succeed(&["plan", "tiny.toml", "--set", "mesh.tensor=2"]);
    assert!(plan.contains("every layer divided among 2 devices, 1 : 1"), "{plan}");
    let generated = ["generate", "run", "--prompt", "every", "--max-tokens", "8", "--temperature", "0"];
    let one = place.succeed(&[&generated[..], &["--devices", "0"]].concat());
    assert_eq!(one, place.succeed(&[&generated[..], &["--devices", "0,0", "--tensor", "2"]].concat()));
    for (set, what) in [
        ("mesh.tensor=0", "needs for each member a share of at least 1"),
        ("mesh.tensor=[1, 0]", "needs for each member a share of at least 1"),
        ("mesh.tensor=99", "so many devices cannot divide the "),
        ("mesh.sequence_parallel=true", "mesh.tensor is not set"),
        ("mesh.wire=f16", "mesh.wire"),
        ("mesh.tensor=half", "mesh.tensor = \"half\" is not known; write \"auto\""),
    ] {
        let output = place.run(&["train", "tiny.toml", "--out", "out", "--set", set]);
        let line = one_line(&output);
        assert!(output.status.code() == Some(2) && line.contains(what), "{set}: {line}");
        assert!(!place.path("out").exists(), "{set} has left a folder");
    }
    let three = ["train", "tiny.toml", "--out", "out", "--devices", "0,0,0", "--set", "mesh.tensor=2"];
    let line = one_line(&place.run(&three));
    assert!(line.contains("gangs of 2 cannot be made of 3 devices"), "{line}");
    let sets = ["mesh.tensor=2", "mesh.sequence_parallel=true", "train.sequence=1"];
    let sets = [&sets[..], &["train.batch=1", "pipeline.microbatches=1"]].concat();
    let sets: Vec<&str> = sets.into_iter().flat_map(|set| ["--set", set]).collect();
    let one = ["train", "tiny.toml", "--out", "out", "--devices", "0,0"];
    let line = one_line(&place.run(&[&one[..], &sets].concat()));
    assert!(line.contains("2 members cannot divide the 1 tokens of a microbatch"), "{line}");
}
