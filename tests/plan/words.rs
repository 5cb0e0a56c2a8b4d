//! What is fixed by hand, what is refused, what does not fit, and what is said about a plan.

use polystage::layers::Layers;
use polystage::plan::{Machine, Options, RecomputeChoice, ScheduleChoice, Workload, plan, without};
use polystage::schedule::{AUTO, NAMES, Schedule, generate};

use super::workloads::{Gpt, gpu, machine};
use crate::common::cut_at;

const MIB: u64 = 1 << 20;

fn workload() -> Workload {
    Gpt { blocks: 10, width: 512, vocabulary: 4096, sequence: 512, batch: 16 }.workload()
}

fn two_cards(memory: [Option<u64>; 2]) -> Machine {
    machine(vec![gpu("fast card", 3000.0, memory[0]), gpu("slow card", 1000.0, memory[1])])
}

fn named(name: &str) -> ScheduleChoice {
    ScheduleChoice::Named(name.into())
}

#[test]
fn what_is_fixed_by_hand_is_kept() {
    let (workload, machine) = (workload(), two_cards([None, None]));
    for name in NAMES.iter().chain([&AUTO]) {
        let options = Options { schedule: named(name), ..Options::default() };
        assert_eq!(plan(&workload, &machine, &options).unwrap().best.schedule.name, *name);
    }
    for devices in [vec![0], vec![1], vec![0, 1], vec![1, 0]] {
        let options = Options { devices: Some(devices.clone()), ..Options::default() };
        assert_eq!(plan(&workload, &machine, &options).unwrap().best.devices, devices);
    }
    for microbatches in [2, 8] {
        let options = Options { microbatches: Some(microbatches), ..Options::default() };
        let best = plan(&workload, &machine, &options).unwrap().best;
        assert_eq!((best.microbatches, best.batch), (microbatches, 16 / microbatches));
    }
    let options = Options { cuts: Some(cut_at(&[9])), ..Options::default() };
    assert_eq!(plan(&workload, &machine, &options).unwrap().best.stages, [0..9, 9..12]);
    let options = Options { cuts: Some(cut_at(&[3, 6, 9])), ..Options::default() };
    let best = plan(&workload, &machine, &options).unwrap().best;
    assert_eq!((best.stages.len(), best.devices.len()), (4, 2), "two stages a device");
    for (recompute, expected) in [
        (RecomputeChoice::Always, [true, true]),
        (RecomputeChoice::Never, [false, false]),
        (RecomputeChoice::Stages(vec![false, true]), [false, true]),
        (RecomputeChoice::Stages(vec![true]), [true, false]),
    ] {
        let options =
            Options { recompute, schedule: named("1f1b"), devices: Some(vec![0, 1]), ..Options::default() };
        assert_eq!(plan(&workload, &machine, &options).unwrap().best.recompute, expected);
    }
}

#[test]
fn a_schedule_by_hand_is_followed_to_the_letter() {
    let (workload, machine) = (workload(), two_cards([None, None]));
    let text = "# name: mine\n0F0 0F1 3F0 3I0 3F1 0B0 3I1 3W0 3W1 0B1\n1F0 2F0 1F1 2F1 2B0 1B0 2B1 1B1\n";
    let mut schedule: Schedule = text.parse().unwrap();
    let options = Options { schedule: ScheduleChoice::Given(schedule.clone()), ..Options::default() };
    let best = plan(&workload, &machine, &options).unwrap().best;
    assert_eq!((&best.schedule, best.microbatches), (&schedule, 2));
    let ranks: Vec<usize> = best.placement.replicas().iter().map(|of| of.rank).collect();
    assert_eq!(ranks, [0, 1, 1, 0]);
    // The same plan again, with everything fixed: what replanning does.
    let again = Options {
        devices: Some(best.devices.clone()),
        cuts: Some(best.cuts()),
        recompute: RecomputeChoice::Stages(best.recompute.clone()),
        microbatches: Some(2),
        ..options
    };
    assert_eq!(plan(&workload, &machine, &again).unwrap().best, best);
    schedule.ranks[0].swap(0, 9);
    let options = Options { schedule: ScheduleChoice::Given(schedule), ..Options::default() };
    assert!(plan(&workload, &machine, &options).unwrap_err().to_string().starts_with("schedule: "));
    let three = generate("1f1b", 3, 2).unwrap();
    let options = Options { schedule: ScheduleChoice::Given(three), ..Options::default() };
    let error = plan(&workload, &machine, &options).unwrap_err().to_string();
    assert!(error.contains("over 3 of 2 devices"), "{error}");
}

#[test]
fn what_cannot_be_is_refused_with_the_reason() {
    let (workload, machine) = (workload(), two_cards([None, None]));
    let base = Options::default;
    for (options, says) in [
        (Options { schedule: named("zb-h3"), ..base() }, "did you mean `zb-h"),
        (
            Options { microbatches: Some(3), ..base() },
            "3 microbatches do not divide the batch; use one of 1, 2, 4, 8, 16",
        ),
        (Options { devices: Some(vec![]), ..base() }, "the list is empty"),
        (Options { devices: Some(vec![0, 2]), ..base() }, "device 2 does not exist: test has 2 (0 to 1)"),
        (Options { devices: Some(vec![1, 1]), ..base() }, "device 1 is named twice"),
        (Options { cuts: Some(cut_at(&[4, 4])), ..base() }, "[4, 4] does not cut 12 layers"),
        (Options { cuts: Some(cut_at(&[12])), ..base() }, "between 1 and 11"),
        (Options { cuts: Some(cut_at(&[0])), ..base() }, "between 1 and 11"),
        (
            Options { cuts: Some(cut_at(&[2, 4])), ..base() },
            "no schedule has the 3 stages of `cuts` on 1 to 2 devices",
        ),
        (
            Options { cuts: Some(cut_at(&[2, 4])), schedule: named("1f1b"), ..base() },
            "1f1b is not a schedule that has the 3 stages",
        ),
        (
            Options { recompute: RecomputeChoice::Stages(vec![true; 9]), ..base() },
            "the 9 stages of `recompute`",
        ),
        (Options { budgets: vec![None; 3], ..base() }, "3 sizes for 2 devices"),
        (
            Options {
                schedule: named("interleaved-1f1b"),
                devices: Some(vec![0, 1]),
                microbatches: Some(1),
                ..base()
            },
            "needs a multiple of its 2 ranks",
        ),
    ] {
        let error = plan(&workload, &machine, &options).unwrap_err();
        let message = error.to_string();
        assert!(error.is_input() && message.contains(says) && !message.contains('\n'), "{message}");
    }
    let tiny = Gpt { blocks: 1, width: 64, vocabulary: 256, sequence: 64, batch: 1 }.workload();
    let four = super::workloads::machine((0..4).map(|_| gpu("card", 100.0, None)).collect());
    let options = Options { devices: Some(vec![0, 1, 2, 3]), ..base() };
    let message = plan(&tiny, &four, &options).unwrap_err().to_string();
    assert!(message.contains("3 layers cannot be divided over 4 devices"), "{message}");
}

/// What a message suggests after `it would fit with`.
fn suggestions(message: &str) -> Vec<String> {
    let (_, list) = message.split_once("it would fit with ").unwrap_or_else(|| panic!("{message}"));
    list.split(", or with ").map(String::from).collect()
}

#[test]
fn a_model_too_large_says_by_how_many_bytes_and_what_would_help() {
    let workload = workload();
    let machine = two_cards([None, None]);
    let budgets = vec![Some(1000 * MIB), Some(500 * MIB)];
    let one = Options {
        microbatches: Some(1),
        recompute: RecomputeChoice::Never,
        budgets: budgets.clone(),
        ..Options::default()
    };
    let gpipe = Options {
        microbatches: Some(16),
        recompute: RecomputeChoice::Never,
        schedule: named("gpipe"),
        budgets,
        ..Options::default()
    };
    let both = Options { microbatches: Some(1), ..gpipe.clone() };
    let after = ["smaller microbatches instead of 1", "another schedule", "all choices left to the planner"];
    for (options, help) in [one, gpipe, both].iter().zip(after) {
        check_suggestions(&workload, &machine, options, help);
    }
}

/// The message for options that leave no plan suggests `help` among others, and every suggestion holds.
fn check_suggestions(workload: &Workload, machine: &Machine, options: &Options, help: &str) {
    let message = plan(workload, machine, options).unwrap_err().to_string();
    assert!(message.contains("lacks ") && message.contains(" bytes: it needs "), "{message}");
    assert!(message.contains("fast card") || message.contains("slow card"), "{message}");
    // The number of bytes is exact: with one byte less than the suggested memory it does not fit.
    let all = suggestions(&message);
    let memory = all.iter().find_map(|one| one.strip_prefix("--memory ")).unwrap();
    let mut budgets = options.budgets.clone();
    for part in memory.split(',') {
        let (device, size) = part.split_once('=').unwrap();
        let size: u64 = size.strip_suffix("MiB").unwrap().parse().unwrap();
        budgets[device.parse::<usize>().unwrap()] = Some(size * MIB);
    }
    let with = |budgets: Vec<Option<u64>>| plan(workload, machine, &Options { budgets, ..options.clone() });
    with(budgets.clone()).unwrap();
    for device in 0..2 {
        let mut less = budgets.clone();
        if let Some(bytes) = &mut less[device] {
            *bytes -= MIB;
            assert!(with(less).is_err(), "{message}");
        }
    }
    // Every other suggestion holds too.
    for one in &all {
        let changed = match one.as_str() {
            "recompute where it is needed" => {
                Options { recompute: RecomputeChoice::AsNeeded, ..options.clone() }
            }
            "another schedule" => Options { schedule: ScheduleChoice::Any, ..options.clone() },
            "all choices left to the planner" => {
                Options { budgets: options.budgets.clone(), ..Options::default() }
            }
            one if one.contains("smaller microbatches") => {
                let count = one.split(' ').next().unwrap().parse().unwrap();
                Options { microbatches: Some(count), ..options.clone() }
            }
            _ => continue,
        };
        plan(workload, machine, &changed).unwrap_or_else(|error| panic!("{one}: {error}"));
    }
    assert!(all.iter().any(|one| one.contains(help)), "{message}");
}

#[test]
fn more_memory_than_a_device_has_is_never_suggested() {
    let workload = workload();
    let machine = two_cards([Some(100 * MIB), Some(5000 * MIB)]);
    let says = |budgets: [u64; 2], devices: &[usize]| {
        let budgets = budgets.map(|mib| Some(mib * MIB)).to_vec();
        let options = Options { budgets, devices: Some(devices.to_vec()), ..Options::default() };
        plan(&workload, &machine, &options).unwrap_err().to_string()
    };
    assert!(!says([100, 100], &[0]).contains("--memory"), "it has no more");
    // The position in the list of devices, which is not the machine's number.
    assert!(says([100, 100], &[1]).contains("--memory 1="), "{}", says([100, 100], &[1]));
}

#[test]
fn what_a_device_is_worth_is_said_for_each_that_is_used() {
    let workload = workload();
    let cards = ["a", "a", "b"].map(|name| gpu(name, if name == "a" { 3000.0 } else { 1500.0 }, None));
    let machine = machine(cards.to_vec());
    let options = Options::default();
    let mut planned = plan(&workload, &machine, &options).unwrap();
    planned.without = without(&workload, &machine, &options, &planned.best);
    let text = planned.explain(&workload, &machine).to_string();
    let slower: Vec<f64> = planned.without.iter().map(|without| without.slower.unwrap()).collect();
    assert_eq!(planned.without.iter().map(|without| without.device).collect::<Vec<_>>(), [0, 1, 2]);
    assert_eq!(slower[0], slower[1], "alike");
    assert!(slower[0] > slower[2] && slower[2] > 0.05, "{slower:?}");
    assert!(text.contains(&format!("without device 2 (b): {:.1} % slower", 100.0 * slower[2])), "{text}");
    // In a fixed order those that are left keep theirs.
    let order = Options { devices: Some(vec![2, 0]), ..Options::default() };
    let best = plan(&workload, &machine, &order).unwrap().best;
    let found = without(&workload, &machine, &order, &best);
    let alone = |device| {
        let options = Options { devices: Some(vec![device]), ..Options::default() };
        Some(plan(&workload, &machine, &options).unwrap().best.simulation.expected)
    };
    assert_eq!(found.iter().map(|without| without.step_seconds).collect::<Vec<_>>(), [alone(2), alone(0)]);
    let small = Options { budgets: vec![Some(10 * MIB), None, None], devices: Some(vec![0, 1]), ..order };
    let best = plan(&workload, &machine, &Options { budgets: Vec::new(), ..small.clone() }).unwrap().best;
    let mut planned = plan(&workload, &machine, &Options::default()).unwrap();
    planned.without = without(&workload, &machine, &small, &best);
    assert_eq!(planned.without[1].step_seconds, None);
    let text = planned.explain(&workload, &machine).to_string();
    assert!(text.contains("without device 1 (a): nothing fits"), "{text}");
}

#[test]
fn more_devices_are_suggested_where_they_help() {
    let workload = workload();
    let machine = machine(vec![gpu("card", 1000.0, Some(400 * MIB)), gpu("card", 1000.0, Some(400 * MIB))]);
    let message = plan(&workload, &machine, &Options::default()).unwrap_err().to_string();
    let device =
        suggestions(&message).into_iter().find(|one| one.starts_with("one more device like")).unwrap();
    assert!(device.contains("(card)"), "{message}");
    let mut more = machine.clone();
    more.devices.push(machine.devices[0].clone());
    plan(&workload, &more, &Options::default()).unwrap();
}

#[test]
fn infeasible_cuts_are_refused_and_others_suggested() {
    let workload = workload();
    let machine = two_cards([Some(1500 * MIB), Some(250 * MIB)]);
    let free = plan(&workload, &machine, &Options::default()).unwrap();
    assert!(free.best.stages.len() > 1 || free.best.devices == [0]);
    let options = Options { cuts: Some(cut_at(&[2])), devices: Some(vec![0, 1]), ..Options::default() };
    let message = plan(&workload, &machine, &options).unwrap_err().to_string();
    assert!(message.contains("device 1 (slow card) lacks "), "{message}");
    assert!(suggestions(&message).contains(&"other cuts".to_string()), "{message}");
}

#[test]
fn a_tensor_too_large_for_a_binding_is_named() {
    let mut workload = workload();
    let mut machine = two_cards([None, None]);
    let table = 4 * 4096 * 512;
    machine.devices[1].max_binding = Some(table - 1);
    for batching in &mut workload.batchings {
        batching.largest_tensor = vec![table, 1024, table];
    }
    let best = plan(&workload, &machine, &Options::default()).unwrap().best;
    let ends = [0, workload.layers.len() - 1];
    for (stage, range) in best.stages.iter().enumerate() {
        let device = best.devices[best.placement.rank(stage, 0)];
        assert!(device == 0 || !ends.iter().any(|layer| range.contains(layer)), "{:?}", best.stages);
    }
    machine.devices[0].max_binding = Some(table - 1);
    let message = plan(&workload, &machine, &Options::default()).unwrap_err().to_string();
    assert!(message.contains("binds at most") && message.contains("`embedding`"), "{message}");
    assert!(!message.contains("sequence"), "the table is as large whatever the sequence: {message}");
}

#[test]
fn a_budget_by_hand_replaces_that_of_the_profile() {
    let workload = workload();
    let machine = two_cards([Some(4096 * MIB), Some(4096 * MIB)]);
    let budgets = vec![None, Some(200 * MIB)];
    let best = plan(&workload, &machine, &Options { budgets, ..Options::default() }).unwrap().best;
    for (rank, &device) in best.devices.iter().enumerate() {
        let budget = [4096 * MIB, 200 * MIB][device];
        assert_eq!(best.costs.ranks[rank].budget, Some(budget));
        assert!(best.simulation.slot_bytes[rank] <= budget);
    }
}

#[test]
fn an_explanation_adds_up() {
    let (workload, machine) = (workload(), two_cards([Some(4096 * MIB), None]));
    let planned = plan(&workload, &machine, &Options::default()).unwrap();
    let explained = planned.explain(&workload, &machine);
    let best = &planned.best;
    assert_eq!(
        explained.devices.iter().map(|share| share.layers).sum::<Layers>(),
        Layers::whole(workload.layers.len())
    );
    let work: f64 = explained.devices.iter().map(|share| share.work).sum();
    assert!((work - 1.0).abs() < 1e-9, "{work}");
    for (rank, share) in explained.devices.iter().enumerate() {
        let idle = &share.idle_seconds;
        let idle = idle.warm_up + idle.drain + idle.imbalance + idle.link + idle.host;
        let all = share.busy_seconds + idle + best.costs.ranks[rank].begin;
        assert!((all / best.simulation.makespan - 1.0).abs() < 1e-9, "{share:?}");
        assert_eq!(share.peak_bytes, best.simulation.slot_bytes[rank]);
    }
    let m = best.microbatches as u64;
    let activation = workload.batchings[best.batching].activation;
    let crossings =
        (1..best.stages.len()).filter(|&stage| best.placement.crosses(stage - 1, 0)).count() as u64;
    let tied: u64 = best.costs.exchanges.iter().map(|way| way.gradient.bytes + way.weight.bytes).sum();
    let bytes: u64 = explained.links.iter().map(|link| link.bytes).sum();
    assert_eq!(bytes, 2 * crossings * m * activation + tied);
    assert!((1..=5).contains(&explained.alternatives.len()));
    assert!(explained.alternatives.is_sorted_by(|a, b| a.step_seconds <= b.step_seconds));
}

#[test]
fn an_explanation_says_why() {
    let (workload, machine) = (workload(), two_cards([Some(4096 * MIB), None]));
    let text =
        plan(&workload, &machine, &Options::default()).unwrap().explain(&workload, &machine).to_string();
    for words in [
        "predicted: ",
        "times as fast as device 1",
        "the slowest of the devices",
        "has the head, as much work as",
        "4.00 GiB",
        "links, each step:",
        "other plans:",
        "plans considered",
    ] {
        assert!(text.contains(words), "{words:?} is not in\n{text}");
    }
    let alone = Options { devices: Some(vec![0]), ..Options::default() };
    let text = plan(&workload, &machine, &alone).unwrap().explain(&workload, &machine).to_string();
    assert!(text.contains("not among the devices that were asked for"), "{text}");
}

#[test]
fn devices_of_one_speed_are_as_fast_as_each_other_and_the_others_faster_than_the_slowest() {
    let workload = workload();
    let why = |speeds: &[f64]| -> Vec<String> {
        let cards = speeds.iter().map(|&speed| gpu("card", speed, None)).collect();
        let cards = machine(cards);
        let options = Options { devices: Some((0..speeds.len()).collect()), ..Options::default() };
        let shares = plan(&workload, &cards, &options).unwrap().explain(&workload, &cards).devices;
        shares.into_iter().map(|share| share.why[0].clone()).collect()
    };
    assert_eq!(why(&[1000.0, 1010.0]), ["as fast as device 1", "as fast as device 0"]);
    assert_eq!(why(&[1000.0, 1010.0, 1020.0]), ["as fast as the others"; 3]);
    let three = why(&[1000.0, 3000.0, 1010.0]);
    assert_eq!((&three[0][..], &three[2][..]), ("as fast as device 2", "as fast as device 0"));
    assert!(three[1].ends_with(" times as fast as device 0"), "{three:?}");
    let near = why(&[1000.0, 1300.0]);
    assert_eq!(near[0], "the slowest of the devices");
    assert!(near[1].ends_with(" % faster than device 0"), "{near:?}");
}

/// Programs read these keys.
#[test]
fn the_json_keys_are_stable() {
    let (workload, machine) = (workload(), two_cards([Some(4096 * MIB), None]));
    let explained = plan(&workload, &machine, &Options::default()).unwrap().explain(&workload, &machine);
    let json = serde_json::to_value(&explained).unwrap();
    let keys = |value: &serde_json::Value| {
        let mut keys: Vec<String> = value.as_object().unwrap().keys().cloned().collect();
        keys.sort_unstable();
        keys
    };
    let mut top = vec![
        "machine",
        "step_seconds",
        "tokens_per_second",
        "bubble",
        "update_seconds",
        "schedule",
        "chunks",
        "microbatches",
        "sequences",
        "shares",
        "one_pipeline",
        "devices",
        "links",
        "shared",
        "left_out",
        "without",
        "alternatives",
        "jitter_seconds",
        "considered",
        "evaluated",
        "complete",
    ];
    top.sort_unstable();
    assert_eq!(keys(&json), top);
    let mut device = vec![
        "rank",
        "device",
        "adapter",
        "name",
        "layers",
        "stages",
        "work",
        "speed",
        "why",
        "busy_seconds",
        "idle_seconds",
        "peak_bytes",
        "budget",
    ];
    device.sort_unstable();
    assert_eq!(keys(&json["devices"][0]), device);
    let mut other = vec![
        "schedule",
        "chunks",
        "microbatches",
        "devices",
        "layers",
        "shares",
        "recompute",
        "step_seconds",
        "slower",
    ];
    other.sort_unstable();
    assert_eq!(keys(&json["alternatives"][0]), other);
    assert_eq!(json["step_seconds"].as_f64().unwrap(), explained.step_seconds);
}
