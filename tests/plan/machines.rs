//! Machine files: what is read, what is refused, what the examples lead to.

use std::path::Path;

use polystage::plan::{
    Assignment, EndMemory, FormMemory, LayerMemory, Machine, Options, StageForm, costs, plan,
};
use polystage::schedule::generate;

use super::workloads::{Gpt, gpu, machine};

fn example(name: &str) -> (String, Machine) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/machines").join(name);
    let text = std::fs::read_to_string(&path).unwrap();
    let machine = Machine::parse(&text, name).unwrap();
    (text, machine)
}

const EXAMPLES: [&str; 4] = ["three-vendors.toml", "laptop.toml", "eight-cards.toml", "two-cards.toml"];

#[test]
fn examples_say_that_nothing_in_them_was_measured_and_how_to_measure() {
    for name in EXAMPLES {
        let (text, _) = example(name);
        let said = text.lines().take_while(|line| line.starts_with('#')).collect::<String>();
        assert!(
            said.contains("Nothing here was measured") && said.contains("--write-machine"),
            "{name}: {said}"
        );
    }
}

#[test]
fn examples_lead_to_plans_that_fit_and_use_every_layer_once() {
    let small = Gpt { blocks: 12, width: 768, vocabulary: 256, sequence: 1024, batch: 16 };
    let large = Gpt { blocks: 24, width: 1024, vocabulary: 50257, sequence: 1024, batch: 32 };
    for name in EXAMPLES {
        let (_, machine) = example(name);
        for gpt in [&small, &large] {
            let workload = gpt.workload();
            let best = plan(&workload, &machine, &Options::default()).unwrap().best;
            let covered: Vec<usize> = best.stages.iter().cloned().flatten().collect();
            assert_eq!(covered, (0..workload.layers.len()).collect::<Vec<_>>(), "{name}");
            for (&device, &bytes) in best.devices.iter().zip(&best.simulation.slot_bytes) {
                assert!(bytes <= machine.devices[device].memory.unwrap(), "{name}: {bytes} on {device}");
            }
            // What each card would do alone if it had enough memory.
            let mut endless = machine.clone();
            endless.devices.iter_mut().for_each(|device| device.memory = None);
            let alone = (0..machine.devices.len()).map(|device| {
                let options = Options { devices: Some(vec![device]), ..Options::default() };
                plan(&workload, &endless, &options).unwrap().best.tokens_per_second
            });
            let alone: Vec<f64> = alone.collect();
            let (most, sum) = (alone.iter().copied().fold(0.0, f64::max), alone.iter().sum::<f64>());
            let together = best.tokens_per_second;
            // Several cards must pay, and cannot do more than all of them alone; 5 % for shorter queues of work a card.
            assert!(together >= most && together <= 1.05 * sum.max(most), "{name}: {together} of {alone:?}");
            assert!(together > 0.6 * sum, "{name}: {together} of {alone:?}");
        }
    }
}

#[test]
fn a_faster_card_gets_more_of_the_work() {
    let (_, machine) = example("three-vendors.toml");
    let gpt = Gpt { blocks: 24, width: 1024, vocabulary: 256, sequence: 1024, batch: 32 };
    let workload = gpt.workload();
    let planned = plan(&workload, &machine, &Options::default()).unwrap();
    let shares = planned.explain(&workload, &machine).devices;
    let work =
        |device: usize| shares.iter().find(|share| share.device == device).map_or(0.0, |share| share.work);
    assert!(work(0) > 2.0 * work(2) && work(1) > 2.0 * work(2) && work(2) > 0.05, "{shares:?}");
}

#[test]
fn a_machine_written_and_read_again_is_the_same() {
    for name in EXAMPLES {
        let (_, machine) = example(name);
        assert_eq!(Machine::parse(&machine.to_toml(), "again").unwrap(), machine, "{}", machine.to_toml());
    }
    let mut full = machine(vec![gpu("a", 10.0, Some(12345)), gpu("b", 20.0, Some(3 << 30))]);
    full.cores = Some(2.0);
    full.slowdown = vec![vec![1.0, 1.5], vec![1.25, 1.0]];
    full.devices[0].driver = "llvmpipe 25.0 (\"LLVM\")".into();
    full.devices[0].cores = 1.0;
    full.devices[0].jitter = Some(polystage::schedule::Jitter { part: 0.07, seconds: 0.25 });
    full.devices[1].rates.optimizer_gb_s = Some(3.0);
    full.devices[1].rates.norm_gb_s = Some(4.0);
    full.devices[1].rates.clear_gb_s = Some(5.0);
    let rests_on = |others| polystage::plan::Evidence {
        unix_seconds: 1_790_000_000,
        steps: 24,
        spread: 0.03,
        others,
        trained: true,
    };
    full.measured = Some(rests_on(None));
    full.devices[0].measured = Some(rests_on(Some(0.5)));
    let layer =
        polystage::plan::LayerProfile { forward: 1.0 / 3.0, input: 0.2, weight: 1e-9, backward: Some(0.1) };
    full.devices[1].shapes.push(polystage::plan::ShapeProfile {
        shape: "gpt2 b4".into(),
        submit_us: Some(12.5),
        measured: Some(rests_on(Some(0.0))),
        layers: [("block".to_string(), layer), ("the head".to_string(), layer)].into(),
    });
    assert_eq!(Machine::parse(&full.to_toml(), "full").unwrap(), full);
}

/// Every complaint names the line, the key and what is wrong.
#[test]
fn a_tampered_file_is_refused_with_its_line() {
    let (text, _) = example("three-vendors.toml");
    let line_of = |part: &str| text[..text.find(part).unwrap()].matches('\n').count() as isize + 1;
    for (old, new, says) in [
        (
            "memory_gb_s = 700.0",
            "memroy_gb_s = 700.0",
            "unknown key devices[0].rates.memroy_gb_s; did you mean devices[0].rates.memory_gb_s?",
        ),
        (
            "matmul_gflops = 3700.0",
            "matmul_gflops = -3700.0",
            "devices[1].rates.matmul_gflops = -3700 must be between",
        ),
        (
            "matmul_gflops = 3700.0",
            "matmul_gflops = nan",
            "devices[1].rates.matmul_gflops = NaN must be between",
        ),
        (
            "matmul_gflops = 3700.0",
            "matmul_gflops = inf",
            "devices[1].rates.matmul_gflops = inf must be between",
        ),
        (
            "matmul_gflops = 3700.0",
            "matmul_gflops = \"fast\"",
            "devices[1].rates.matmul_gflops must be a number, not string",
        ),
        ("memory_gb_s = 390.0", "", "devices[2].rates.memory_gb_s (or peak_gb_s) is missing"),
        (
            "memory = \"15GiB\"",
            "memory = \"15 gigs\"",
            "devices[2].memory: \"15 gigs\" is not a size such as 5GB or 24GiB",
        ),
        ("memory = \"15GiB\"", "memory = -1", "devices[2].memory: \"-1\" is not a size such as 5GB or 24GiB"),
        ("memory = \"15GiB\"", "memory = true", "devices[2].memory must be a size such as"),
        ("memory = \"15GiB\"", "memory = 15", "devices[2].memory: 15 is 15 bytes; write \"15GiB\""),
        ("memory = \"15GiB\"", "memory = 15.5", "devices[2].memory: 15.5 is 15.5 bytes; write \"15.5GiB\""),
        (
            "memory = \"15GiB\"",
            "memory = \"15360\"",
            "devices[2].memory: 15360 is 15360 bytes; write \"15360MiB\"",
        ),
        (
            "copy_engine = false",
            "jitter = { part = 1.5, seconds = 1 }\ncopy_engine = false",
            "devices[0].jitter.part = 1.5 must be between 0 and 1",
        ),
        (
            "copy_engine = false",
            "jitter = { part = 0.5 }\ncopy_engine = false",
            "devices[0].jitter.seconds is missing",
        ),
        (
            "copy_engine = false",
            "measured = { unix_seconds = 0, steps = 1, spread = 0, others = 1.5, trained = true }\ncopy_engine = false",
            "devices[0].measured.others = 1.5 must be between 0 and 1",
        ),
        (
            "copy_engine = false",
            "measured = { unix_seconds = 0, steps = -1, spread = 0, trained = true }\ncopy_engine = false",
            "devices[0].measured.steps = -1 must be between 0 and",
        ),
        (
            "copy_engine = false",
            "measured = { unix_seconds = 0, steps = 1, spread = 0 }\ncopy_engine = false",
            "devices[0].measured.trained is missing",
        ),
        (
            "copy_engine = false",
            "measured = { unix_second = 0, steps = 1, spread = 0, trained = false }\ncopy_engine = false",
            "unknown key devices[0].measured.unix_second; did you mean devices[0].measured.unix_seconds?",
        ),
        ("copy_engine = false", "copy_engine = 0", "devices[0].copy_engine must be true or false"),
        (
            "latency_us = 150.0",
            "latency_us = 1e9",
            "link.latency_us = 1000000000 must be between 0 and 60000000",
        ),
        (
            "[[links]]\nfrom = 0\nto = 2",
            "[[links]]\nfrom = 0\nto = 3",
            "links[0].to = 3 is no device: this machine has 3 (0 to 2)",
        ),
        (
            "[[links]]\nfrom = 0\nto = 2",
            "[[links]]\nfrom = 2\nto = 2",
            "links[0] goes from device 2 to itself",
        ),
        (
            "[[links]]\nfrom = 1\nto = 2",
            "[[links]]\nfrom = 0\nto = 2",
            "links[1] is the second link from device 0 to 2",
        ),
        ("name = \"Intel Arc A770\"", "name = \"Intel\\nArc\"", "devices[2].name must be one line"),
        ("[link]", "cores = -1\n[link]", "cores = -1 must be between"),
        ("[link]", "slowdown = [[1, 1], [1, 1]]\n[link]", "slowdown must be 3 rows of 3 numbers"),
        (
            "[link]",
            "slowdown = [[1, 1, 1], [1, 0.5, 1], [1, 1, 1]]\n[link]",
            "slowdown[1][1] = 0.5 must be between 1 and",
        ),
        ("[link]", "[linc]", "unknown key linc; did you mean link?"),
        ("[link]", "devices = 3\n[link]", "duplicate key"),
        ("name = \"3090", "name = 3090 #", "name must be text in quotes"),
        ("gb_s = 4.0", "gb_s = = 4.0", ""),
    ] {
        assert!(text.contains(old), "{old}");
        let error = Machine::parse(&text.replacen(old, new, 1), "m.toml").unwrap_err();
        let message = error.to_string();
        assert!(error.is_input() && message.starts_with("m.toml: line "), "{new}: {message}");
        assert!(message.contains(says) && !message.contains('\n'), "{new}: {message}");
        let line: isize = message["m.toml: line ".len()..].split(':').next().unwrap().parse().unwrap();
        let after = match new {
            // A missing key is told with the table that lacks it.
            "" => -2,
            _ if says.starts_with("links[0].to") => 2,
            _ if says == "duplicate key" => 7,
            _ => 0,
        };
        assert_eq!(line, line_of(old) + after, "{new}: {message}");
    }
}

#[test]
fn files_without_devices_or_with_too_many_are_refused() {
    let (text, _) = example("eight-cards.toml");
    let (head, cards) = text.split_at(text.find("[[devices]]").unwrap());
    for (text, says) in
        [(head.to_string(), "it has 0"), (format!("{head}{cards}{cards}{cards}"), "it has 24")]
    {
        let message = Machine::parse(&text, "m.toml").unwrap_err().to_string();
        assert!(message.contains(says), "{message}");
    }
}

#[test]
fn everything_that_is_missing_is_listed_at_once() {
    let text = "[link]\ngb_s = 4\n[[devices]]\nmemory = \"1GiB\"\n[[devices]]\nname = \"b\"\nrates = { launch_us = 1 }\n";
    let message = Machine::parse(text, "m.toml").unwrap_err().to_string();
    assert_eq!(
        message,
        "m.toml: line 3: devices[0].name, devices[0].rates.matmul_gflops (or peak_tflops), \
         devices[0].rates.memory_gb_s (or peak_gb_s), devices[1].rates.matmul_gflops (or peak_tflops), \
         devices[1].rates.memory_gb_s (or peak_gb_s), link.latency_us are missing"
    );
}

#[test]
fn two_numbers_of_a_data_sheet_are_enough_and_what_is_known_better_counts_before_them() {
    let text = "[[devices]]\nname = \"a\"\nrates = { peak_tflops = 40, peak_gb_s = 1000 }\n\
                [[devices]]\nname = \"b\"\nrates = { peak_tflops = 40, peak_gb_s = 1000, matmul_gflops = 5000, launch_us = 1 }\n";
    let machine = Machine::parse(text, "m.toml").unwrap();
    assert_eq!(machine.name, "a + b");
    let [a, b] = [0, 1].map(|device| machine.devices[device].rates);
    assert_eq!((a.matmul_gflops, a.memory_gb_s, a.launch_us), (4000.0, 750.0, 3.0));
    assert_eq!((b.matmul_gflops, b.memory_gb_s, b.launch_us), (5000.0, 750.0, 1.0));
    let way = machine.link(0, 1);
    assert!(way.latency_us > 0.0 && way.gb_s > 0.0 && way.out_gb_s.is_some() && way.into_gb_s.is_some());
    assert_eq!(Machine::parse(&machine.to_toml(), "again").unwrap(), machine);
}

#[test]
fn a_list_of_adapters_means_the_devices_that_are_these_adapters() {
    let (_, mut machine) = example("three-vendors.toml");
    assert_eq!(machine.of_adapters(&[2, 0]).unwrap(), [2, 0]);
    let says = |machine: &Machine, list: &[usize]| machine.of_adapters(list).unwrap_err().to_string();
    assert!(says(&machine, &[3]).contains("device 3 does not exist: 3090 + 7900 XTX + A770 has 3 (0, 1, 2)"));
    assert!(says(&machine, &[1, 1]).contains("device 1 is named more often"));
    for (device, adapter) in machine.devices.iter_mut().zip([1, 0, 0]) {
        device.adapter = Some(adapter);
    }
    assert_eq!(machine.of_adapters(&[0, 1, 0]).unwrap(), [1, 0, 2]);
    assert!(says(&machine, &[2]).contains("has 3 (1, 0, 0)"));
}

#[test]
fn without_a_device_the_others_keep_their_links_and_disturb_each_other_as_before() {
    let (_, mut machine) = example("three-vendors.toml");
    machine.slowdown = (1..4).map(|i| (1..4).map(|j| f64::from(10 * i + j)).collect()).collect();
    let others = machine.without(1);
    let kept = [0, 2];
    for (i, &old) in kept.iter().enumerate() {
        assert_eq!(others.devices[i], machine.devices[old]);
        for (j, &other) in kept.iter().enumerate() {
            assert_eq!(others.link(i, j), machine.link(old, other));
            assert_eq!(others.slowdown(i, j), machine.slowdown(old, other));
        }
    }
}

#[test]
fn a_measured_layer_counts_before_the_estimate() {
    let workload = Gpt { blocks: 2, width: 64, vocabulary: 256, sequence: 64, batch: 4 }.workload();
    let batching = &workload.batchings[2];
    let mut machine = machine(vec![gpu("a", 100.0, None), gpu("b", 100.0, None)]);
    let layer = polystage::plan::LayerProfile { forward: 1.0, input: 2.0, weight: 3.0, backward: Some(4.0) };
    machine.devices[1].shapes.push(polystage::plan::ShapeProfile {
        shape: batching.shape.clone(),
        submit_us: Some(5e5),
        measured: None,
        layers: [("block".to_string(), layer)].into(),
    });
    let assignment = Assignment {
        devices: &[0, 1],
        stages: &[0..2, 2..4],
        placement: &generate("1f1b", 2, 2).unwrap().placement().unwrap(),
        recompute: &[false, true],
        split: &[false, true],
        in_flight: &[2, 1],
    };
    let costs = costs(&workload, batching, &machine, &assignment);
    // On device 0 all is estimated: launches, operations, a submission.
    let footprint = &batching.footprints[0];
    let block = &footprint.work[1].forward;
    let estimate =
        60e-6 + footprint.work[0].forward.bytes / 20e9 + 2.5e-6 + block.flops / 100e9 + 12.0 * 2.5e-6;
    assert!((costs.stages[0].forward / estimate - 1.0).abs() < 1e-9, "{:?}", costs.stages[0]);
    // On device 1 the block is measured, the head is not; F is repeated.
    let head = &footprint.work[2];
    let seconds = |work: &polystage::plan::Work| {
        (work.flops / 100e9).max(work.bytes / 20e9) + work.launches as f64 * 2.5e-6
    };
    let [f, i, w] = [&head.forward, &head.input, &head.weight].map(seconds);
    let stage = &costs.stages[1];
    let expected = [1.5 + f, 2.5 + i + 1.0 + f, 3.5 + w, 4.5 + i + w + 1.0 + f];
    for (is, should) in [stage.forward, stage.input, stage.weight, stage.backward].iter().zip(expected) {
        assert!((is / should - 1.0).abs() < 1e-12, "{stage:?} {expected:?}");
    }
    // Bytes of the stages as the workload counts them, rings of both links, tied weights.
    let need = |kinds: [usize; 2], ends: [FormMemory; 2], form: StageForm| {
        let layers = kinds.map(|kind| footprint.memory[kind][form]);
        let parts = [layers, ends.map(|end| end[form])].concat();
        let scratch = parts.iter().map(|part| part.scratch).max().unwrap();
        let sum = |of: fn(&LayerMemory) -> u64| parts.iter().map(of).sum::<u64>();
        (sum(|part| part.fixed) + scratch, sum(|part| part.stash), sum(|part| part.gradient))
    };
    let EndMemory { first, after_first, last, before_last } = footprint.ends;
    let [plain, both] = [StageForm::ALL[0], StageForm { split: true, recompute: true }];
    let (first, last) = (need([0, 1], [first, before_last], plain), need([1, 2], [after_first, last], both));
    assert_eq!((costs.stages[0].stash, costs.stages[1].gradient), (first.1, last.2));
    let tie = workload.tie.unwrap();
    let rings = 2 * 3 * batching.link_buffer;
    let state = |range: std::ops::Range<usize>| workload.layers[range].iter().map(|l| l.state).sum::<u64>();
    assert_eq!(costs.ranks[0].fixed, first.0 + state(0..2) + rings + tie.owner_apart);
    assert_eq!(costs.ranks[1].fixed, last.0 + state(2..4) + rings + tie.user_apart);
    let way = costs.exchanges[0];
    assert_eq!((way.user, way.owner, way.from, way.to), (1, 0, 1, 0));
    let hop = &costs.hops[0].forward;
    assert!((hop.copy - batching.activation as f64 / 4e9).abs() < 1e-15 && hop.latency == 150e-6);
}
