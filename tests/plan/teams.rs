//! The data axis of plans: several pipelines beside each other, each for a share of the microbatches.

use std::path::Path;

use polystage::plan::{
    DataChoice, Machine, Optimizer, Options, ScheduleChoice, Sharding, Sum, Workload, plan,
};
use polystage::schedule::{generate, replicate};
use polystage::train::config::Config;
use polystage::train::planning::Planning;

use super::search::check;
use super::workloads::{Gpt, Random, any_machine, any_workload, gpu, machine};

fn with(data: DataChoice) -> Options {
    Options { data, ..Options::default() }
}

#[test]
fn a_plan_with_replicas_fits_is_what_it_says_and_is_never_slower_than_one_pipeline() {
    let mut several = 0;
    for seed in 500..540 {
        let mut random = Random(seed);
        let (layers, devices) = (3 + random.below(12) as usize, 2 + random.below(5) as usize);
        let workload = any_workload(&mut random, layers);
        let mut machine = any_machine(&mut random, devices, seed % 3 > 0);
        for device in &mut machine.devices {
            device.memory = device.memory.map(|bytes| bytes * layers as u64 / 4);
        }
        let one = plan(&workload, &machine, &Options::default());
        let Ok(planned) = plan(&workload, &machine, &with(DataChoice::Any)) else {
            assert!(one.is_err(), "seed {seed}: there is a pipeline");
            continue;
        };
        check(&planned, &workload, &machine);
        if let Ok(one) = one {
            assert!(planned.best.simulation.step <= one.best.simulation.step, "seed {seed}");
        }
        let shares = planned.best.shares();
        assert_eq!(shares.iter().sum::<usize>(), planned.best.microbatches);
        several += usize::from(shares.len() > 1);
    }
    assert!(several > 5, "only {several} of 40 machines are better off with replicas");
}

#[test]
fn shares_are_in_proportion_to_speed_and_those_that_are_given_go_to_whom_they_suit() {
    let workload = Gpt { blocks: 4, width: 512, vocabulary: 256, sequence: 512, batch: 16 }.workload();
    let machine = machine(vec![gpu("slow", 1000.0, None), gpu("fast", 3000.0, None)]);
    let options = Options { microbatches: Some(16), ..with(DataChoice::Count(2)) };
    let best = plan(&workload, &machine, &options).unwrap().best;
    let share = |device: usize| best.shares()[best.devices.iter().position(|&d| d == device).unwrap()];
    assert_eq!((share(0), share(1)), (4, 12));
    let best = plan(&workload, &machine, &with(DataChoice::Shares(vec![5, 11]))).unwrap().best;
    assert_eq!((best.devices, best.placement.shares()), (vec![0, 1], Some(vec![5, 11])));
    // Devices in order, replica by replica.
    let options = Options { devices: Some(vec![1, 0]), ..with(DataChoice::Shares(vec![5, 11])) };
    let best = plan(&workload, &machine, &options).unwrap().best;
    assert_eq!((best.devices, best.placement.shares()), (vec![1, 0], Some(vec![5, 11])));
}

#[test]
fn what_no_replicas_can_be_is_refused_in_a_line() {
    let workload = Gpt { blocks: 4, width: 512, vocabulary: 256, sequence: 512, batch: 8 }.workload();
    let two = machine(vec![gpu("a", 1000.0, None), gpu("b", 1000.0, None)]);
    let refusal = |data: DataChoice| plan(&workload, &two, &with(data)).unwrap_err().to_string();
    assert_eq!(refusal(DataChoice::Count(3)), "mesh.data: 3 replicas need as many devices, and there are 2");
    let small = machine(vec![gpu("a", 1000.0, Some(1 << 20)), gpu("b", 1000.0, Some(1 << 20))]);
    let error = plan(&workload, &small, &with(DataChoice::Count(2))).unwrap_err().to_string();
    assert!(error.contains("no plan fits") && error.contains("2 replicas"), "{error}");
}

#[test]
fn a_schedule_with_replicas_by_hand_is_planned_and_its_traffic_is_part_of_the_step() {
    let workload = Gpt { blocks: 4, width: 512, vocabulary: 256, sequence: 512, batch: 8 }.workload();
    let machine = machine(vec![gpu("a", 1000.0, None), gpu("b", 1000.0, None)]);
    let schedule = replicate(&[generate("1f1b", 1, 3).unwrap(), generate("1f1b", 1, 5).unwrap()]).unwrap();
    let options = Options { schedule: ScheduleChoice::Given(schedule.clone()), ..Options::default() };
    let best = plan(&workload, &machine, &options).unwrap().best;
    assert_eq!((&best.schedule, best.shares()), (&schedule, vec![3, 5]));
    let weights: u64 = workload.layers.iter().map(|layer| layer.weights).sum();
    for (from, to) in [(0, 1), (1, 0)] {
        let ways = best.costs.exchanges.iter().filter(|way| (way.from, way.to) == (from, to));
        // Half of the gradients down from each, and half of the weights back.
        let bytes: u64 = ways.map(|way| way.gradient.bytes).sum();
        assert!(bytes.abs_diff(weights / 2) < 8, "{bytes} of {weights}");
    }
    assert!(best.simulation.step > best.simulation.makespan);
}

#[test]
fn what_the_hosts_memory_gives_to_all_copies_bounds_replicas_and_who_sends_to_the_host() {
    let gpt = Gpt { blocks: 4, width: 512, vocabulary: 256, sequence: 512, batch: 8 };
    let four = machine((0..4).map(|_| gpu("card", 10_000.0, None)).collect());
    let workload = gpt.workload();
    let step = |workload: &Workload, host_memory_gb_s: Option<f64>| {
        let machine = Machine { host_memory_gb_s, ..four.clone() };
        plan(workload, &machine, &with(DataChoice::Count(4))).unwrap().best.simulation.step
    };
    let through_host = Sharding::new(1, Sum::Share, Optimizer::Host).unwrap();
    for workload in [workload.clone(), Workload { sharding: through_host, ..workload }] {
        let [unlimited, plenty, little] = [None, Some(1e4), Some(10.0)].map(|rate| step(&workload, rate));
        assert_eq!(unlimited, plenty);
        assert!(little > 1.1 * unlimited, "{little} s where little is given, {unlimited} s without a limit");
    }
}

#[test]
fn twelve_blocks_over_eight_cards_are_cut_within_blocks_or_in_pipelines_beside_each_other() {
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    let text = |name: &str| std::fs::read_to_string(configs.join(name)).unwrap();
    let config = Config::parse(&text("gpt2.toml"), &[], "gpt2.toml").unwrap();
    let machine = Machine::parse(&text("machines/eight-cards.toml"), "eight-cards.toml").unwrap();
    let planning = Planning::for_machine(&config, machine, None).unwrap();
    let best = planning.search().unwrap().best;
    let mut alone = planning.clone();
    alone.options.data = DataChoice::Count(1);
    let one = alone.search().unwrap().best;
    // Of whole blocks alone four of eight cards have two and four have one: 71,047 tokens a second.
    let whole = 71_047.0;
    assert!(one.cuts().iter().any(|cut| !cut.is_whole()), "{:?}", one.cuts());
    for (plan, gain) in [(one, 1.05), (best, 1.2)] {
        let times = plan.tokens_per_second / whole;
        assert!(times > gain, "{times} times as fast with shares {:?}", plan.shares());
    }
}

#[test]
fn two_small_cards_take_turns_behind_a_large_one_where_neither_holds_the_model() {
    let workload = Gpt { blocks: 2, width: 1024, vocabulary: 256, sequence: 512, batch: 16 }.workload();
    const MIB: u64 = 1 << 20;
    let small = || gpu("small", 1000.0, Some(400 * MIB));
    let machine = machine(vec![gpu("large", 2000.0, Some(1024 * MIB)), small(), small()]);
    let one = plan(&workload, &machine, &with(DataChoice::Count(1))).unwrap().best;
    let planned = plan(&workload, &machine, &with(DataChoice::Any)).unwrap();
    check(&planned, &workload, &machine);
    let best = &planned.best;
    let holders: Vec<usize> =
        (0..best.stages.len()).map(|stage| best.placement.holders(stage).len()).collect();
    assert!(holders.contains(&1) && holders.contains(&2), "{holders:?} on {:?}", best.devices);
    assert_eq!(best.placement.shares(), None);
    for stage in 0..best.stages.len() {
        let done = best.placement.of_stage(stage).map(|replica| best.placement.microbatches(replica).count());
        assert_eq!(done.sum::<usize>(), best.microbatches, "stage {stage}");
    }
    let gain = one.simulation.step / best.simulation.step;
    assert!(gain > 1.3, "{gain} times as fast as one pipeline");
    let said = planned.explain(&workload, &machine).to_string();
    assert!(said.contains("devices with the same layers take turns"), "{said}");
}
