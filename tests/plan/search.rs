//! The search: as good as trying everything where that can be done, and sensible where it cannot.

use std::collections::HashMap;
use std::ops::Range;
use std::time::Instant;

use polystage::plan::{Assignment, Machine, Options, Planned, ScheduleChoice, Workload, costs, plan};
use polystage::schedule::{
    AUTO, Jitter, Kind, NAMES, Schedule, Simulator, default_chunks, generate_chunked, simulate, stage_ranks,
};

use super::workloads::{Gpt, Random, any_machine, any_workload, gpu, machine};
use crate::common::cut_at;

/// Relative difference that two ways to add up the same seconds may have.
const ROUNDING: f64 = 1e-9;

/// Every way to choose `count` of `0..of` in order.
fn orders(of: usize, count: usize) -> Vec<Vec<usize>> {
    if count == 0 {
        return vec![Vec::new()];
    }
    let shorter = orders(of, count - 1);
    let longer = shorter.iter().flat_map(|order| {
        let rest = (0..of).filter(|next| !order.contains(next));
        rest.map(|next| [&order[..], &[next]].concat())
    });
    longer.collect()
}

/// Every way to cut `layers` into `stages`.
fn cuts(layers: usize, stages: usize) -> Vec<Vec<Range<usize>>> {
    if stages == 1 {
        return vec![vec![0..layers]];
    }
    let mut all = Vec::new();
    for last in stages - 1..layers {
        for mut start in cuts(last, stages - 1) {
            start.push(last..layers);
            all.push(start);
        }
    }
    all
}

/// All that a schedule fixes, found without the planner.
struct Shape {
    split: Vec<bool>,
    in_flight: Vec<usize>,
}

fn shape(schedule: &Schedule) -> Shape {
    let stages = 0..schedule.stages;
    let placement = schedule.placement().unwrap();
    let replicas = placement.replicas();
    let owner = |stage| schedule.rank_of(stage).unwrap();
    let has_i = |stage: usize| {
        schedule.ranks[owner(stage)].iter().any(|action| action.stage == stage && action.kind == Kind::I)
    };
    Shape {
        split: stages.map(has_i).collect(),
        in_flight: replicas.iter().map(|of| schedule.slots(of.stage, of.rank).count).collect(),
    }
}

/// The shortest step of all plans with the schedule called `name` that fit.
fn brute_force(workload: &Workload, machine: &Machine, name: &str) -> Option<f64> {
    let layers = workload.layers.len();
    let mut best: Option<f64> = None;
    let usual = default_chunks(name).unwrap();
    let has_memory = machine.devices.iter().any(|device| device.memory.is_some());
    for batching in &workload.batchings {
        for ranks in 1..=machine.devices.len() {
            for chunks in (usual..=4).filter(|&chunks| stage_ranks(name, ranks, chunks).is_ok()) {
                let stages = ranks * chunks;
                let Ok(schedule) = generate_chunked(name, ranks, chunks, batching.microbatches) else {
                    continue;
                };
                if stages > layers {
                    continue;
                }
                // By the stages that share a parameter.
                let mut simulators = HashMap::new();
                let (placement, Shape { split, in_flight }) =
                    (schedule.placement().unwrap(), shape(&schedule));
                let ways = if has_memory { 1 << stages } else { 1 };
                for devices in orders(machine.devices.len(), ranks) {
                    for ranges in cuts(layers, stages) {
                        for way in 0..ways {
                            let recompute: Vec<bool> =
                                (0..stages).map(|stage| way >> stage & 1 == 1).collect();
                            let assignment = Assignment {
                                devices: &devices,
                                stages: &ranges,
                                placement: &placement,
                                recompute: &recompute,
                                split: &split,
                                in_flight: &in_flight,
                            };
                            let costs = costs(workload, batching, machine, &assignment);
                            let simulator = simulators
                                .entry(costs.tied())
                                .or_insert_with(|| Simulator::new(&schedule, &costs.tied()).unwrap());
                            let step = simulator.step(&costs).unwrap();
                            if best.is_some_and(|best| step >= best) {
                                continue;
                            }
                            let bytes = simulate(&schedule, &costs).unwrap().slot_bytes;
                            let budgets = costs.ranks.iter().map(|rank| rank.budget.unwrap_or(u64::MAX));
                            if bytes.iter().zip(budgets).all(|(bytes, budget)| *bytes <= budget) {
                                best = Some(step);
                            }
                        }
                    }
                }
            }
        }
    }
    best
}

fn named(name: &str) -> Options {
    Options { schedule: ScheduleChoice::Named(name.into()), ..Options::default() }
}

fn check_against_brute_force(seed: u64, memory: bool, shared: bool) {
    let mut random = Random(seed);
    let layers = 3 + random.below(if memory { 4 } else { 5 }) as usize;
    let devices = 2 + random.below(2) as usize;
    let workload = any_workload(&mut random, layers);
    let mut machine = any_machine(&mut random, devices, memory);
    if shared {
        machine.cores = Some(2.0);
        machine.devices.iter_mut().for_each(|device| device.cores = 1.0 + random.below(2) as f64);
        let row = |_| (0..devices).map(|_| random.between(1.0, 1.3)).collect();
        machine.slowdown = (0..devices).map(row).collect();
    }
    let mut best: Option<f64> = None;
    for name in NAMES {
        let expected = brute_force(&workload, &machine, name);
        match (plan(&workload, &machine, &named(name)), expected) {
            (Ok(planned), Some(expected)) => {
                let found = planned.best.simulation.step;
                assert!(planned.complete, "seed {seed} {name}");
                assert!(
                    (found / expected - 1.0).abs() < ROUNDING,
                    "seed {seed} {name}: {found} instead of {expected}: {:?} {:?} {:?}",
                    planned.best.devices,
                    planned.best.stages,
                    planned.best.recompute
                );
                best = Some(best.map_or(expected, |best: f64| best.min(expected)));
            }
            (Err(error), None) => assert!(error.is_input(), "seed {seed} {name}: {error}"),
            (planned, expected) => panic!("seed {seed} {name}: {planned:?} instead of {expected:?}"),
        }
    }
    match (plan(&workload, &machine, &Options::default()), best) {
        (Ok(planned), Some(best)) => {
            let found = planned.best.simulation.step;
            assert!(found <= best * (1.0 + ROUNDING), "seed {seed}: {found} is worse than {best}");
            if planned.best.schedule.name != AUTO {
                assert!(
                    found >= best * (1.0 - ROUNDING),
                    "seed {seed}: {found} is impossible, {best} is the best"
                );
            }
        }
        // A schedule made for the machine may need less memory than any that has a name.
        (Ok(planned), None) => assert_eq!(planned.best.schedule.name, AUTO, "seed {seed}"),
        (Err(error), None) => assert!(error.to_string().contains("no plan fits"), "seed {seed}: {error}"),
        (Err(error), Some(_)) => panic!("seed {seed}: {error}"),
    }
}

#[test]
fn without_budgets_no_plan_is_faster_than_the_one_found() {
    (0..20).for_each(|seed| check_against_brute_force(seed, false, false));
}

#[test]
fn within_budgets_no_plan_is_faster_than_the_one_found() {
    (100..115).for_each(|seed| check_against_brute_force(seed, true, false));
}

#[test]
fn where_devices_slow_each_other_down_no_plan_is_faster_than_the_one_found() {
    (200..210).for_each(|seed| check_against_brute_force(seed, false, true));
}

/// What every plan must hold, whatever it was made for.
pub fn check(planned: &Planned, workload: &Workload, machine: &Machine) {
    for candidate in std::iter::once(&planned.best).chain(&planned.alternatives) {
        let covered: Vec<usize> = candidate.stages.iter().cloned().flatten().collect();
        assert_eq!(covered, (0..workload.layers.len()).collect::<Vec<_>>());
        assert!(candidate.stages.iter().all(|range| !range.is_empty()));
        let mut devices = candidate.devices.clone();
        devices.sort_unstable();
        devices.dedup();
        assert_eq!(devices.len(), candidate.schedule.ranks.len());
        candidate.schedule.lowered().unwrap().validate().unwrap();
        let Shape { split, in_flight } = shape(&candidate.schedule);
        assert_eq!(candidate.schedule.placement().unwrap(), candidate.placement);
        let batching = &workload.batchings[candidate.batching];
        assert_eq!(
            (candidate.microbatches, candidate.batch, candidate.schedule.microbatches),
            (batching.microbatches, batching.sequences, batching.microbatches)
        );
        let assignment = Assignment {
            devices: &candidate.devices,
            stages: &candidate.stages,
            placement: &candidate.placement,
            recompute: &candidate.recompute,
            split: &split,
            in_flight: &in_flight,
        };
        let costs = costs(workload, batching, machine, &assignment);
        assert_eq!(costs, candidate.costs);
        assert_eq!(simulate(&candidate.schedule, &costs).unwrap(), candidate.simulation);
        for (rank, &device) in candidate.devices.iter().enumerate() {
            let bytes = candidate.simulation.slot_bytes[rank];
            let budget = machine.devices[device].memory.unwrap_or(u64::MAX);
            assert!(bytes <= budget, "rank {rank}: {bytes} of {budget} bytes in {}", candidate.schedule.name);
        }
        // Several pipelines must be faster by a hundredth to be preferred to one.
        let worth = if candidate.placement.is_single() { 0.0 } else { 0.01 };
        assert!(candidate.simulation.step >= planned.best.simulation.step * (1.0 - worth - ROUNDING));
        let rate = workload.tokens as f64 / candidate.simulation.step;
        assert_eq!(candidate.tokens_per_second, rate);
    }
    let used = planned.best.devices.len();
    assert_eq!(planned.left_out.len(), machine.devices.len() - used);
}

#[test]
fn every_plan_fits_and_is_what_it_says() {
    for seed in 300..330 {
        let mut random = Random(seed);
        let (layers, devices) = (4 + random.below(20) as usize, 1 + random.below(5) as usize);
        let workload = any_workload(&mut random, layers);
        let mut machine = any_machine(&mut random, devices, seed % 3 > 0);
        for device in &mut machine.devices {
            device.memory = device.memory.map(|bytes| bytes * layers as u64 / 4);
        }
        match plan(&workload, &machine, &Options::default()) {
            Ok(planned) => check(&planned, &workload, &machine),
            Err(error) => assert!(error.to_string().contains("no plan fits"), "seed {seed}: {error}"),
        }
    }
}

#[test]
fn where_speeds_wander_the_plan_that_is_promised_is_the_best_of_those_shown() {
    let mut longer = 0;
    for seed in 700..720 {
        let mut random = Random(seed);
        let workload = any_workload(&mut random, 8);
        let mut machine = any_machine(&mut random, 3, false);
        for device in &mut machine.devices {
            device.jitter = Some(Jitter { part: random.between(0.0, 0.3), seconds: 1e-2 });
        }
        let planned = plan(&workload, &machine, &Options::default()).unwrap();
        let best = &planned.best.simulation;
        for other in &planned.alternatives {
            assert!(best.expected <= other.simulation.expected, "seed {seed}");
        }
        assert_eq!(planned.best.tokens_per_second, workload.tokens as f64 / best.expected);
        longer += usize::from(best.expected > 1.001 * best.step);
    }
    assert!(longer > 5, "only {longer} of 20 steps are longer for it");
}

#[test]
fn a_schedule_made_for_the_machine_is_never_slower_than_a_named_one() {
    let mut gains = 0;
    for seed in 400..412 {
        let mut random = Random(seed);
        let (layers, devices) = (6 + random.below(10) as usize, 2 + random.below(3) as usize);
        let workload = any_workload(&mut random, layers);
        let machine = any_machine(&mut random, devices, false);
        let made = plan(&workload, &machine, &named(AUTO)).unwrap().best;
        assert_eq!(made.schedule.name, AUTO);
        let names = NAMES.iter().filter_map(|name| plan(&workload, &machine, &named(name)).ok());
        let best = names.map(|planned| planned.best.simulation.step).fold(f64::INFINITY, f64::min);
        assert!(
            made.simulation.step <= best * (1.0 + ROUNDING),
            "seed {seed}: {} {best}",
            made.simulation.step
        );
        gains += usize::from(made.simulation.step < best * 0.999);
    }
    assert!(gains > 2, "a made schedule was faster {gains} times");
}

#[test]
fn equal_arguments_give_equal_plans() {
    let mut random = Random(1);
    let workload = any_workload(&mut random, 12);
    let machine = any_machine(&mut random, 4, true);
    let [one, two] = [0, 1].map(|_| plan(&workload, &machine, &Options::default()).unwrap());
    assert_eq!(one, two);
}

#[test]
fn equal_devices_get_equal_shares() {
    let mut workload = Gpt { blocks: 16, width: 512, vocabulary: 256, sequence: 512, batch: 16 }.workload();
    // Sixteen blocks alone: the ends would make the shares uneven.
    workload.layers.retain(|layer| layer.kind == 1);
    workload.tie = None;
    let devices = machine((0..4).map(|_| gpu("card", 2000.0, None)).collect());
    for name in ["1f1b", "gpipe", "zb-h1"] {
        let best = plan(&workload, &devices, &named(name)).unwrap().best;
        let layers: Vec<usize> = best.stages.iter().map(ExactSizeIterator::len).collect();
        assert_eq!(layers, [4, 4, 4, 4], "{name}");
        assert_eq!(best.devices, [0, 1, 2, 3], "{name}: equal devices in order");
    }
}

#[test]
fn layers_follow_speed() {
    let mut workload = Gpt { blocks: 14, width: 512, vocabulary: 256, sequence: 512, batch: 32 }.workload();
    workload.layers.retain(|layer| layer.kind == 1);
    workload.tie = None;
    let devices = machine([4000.0, 2000.0, 1000.0].map(|gflops| gpu("card", gflops, None)).to_vec());
    let best = plan(&workload, &devices, &named("zb-h2")).unwrap().best;
    let layers = |device: usize| {
        let rank = best.devices.iter().position(|&used| used == device).unwrap();
        best.stages[rank].len()
    };
    assert_eq!([layers(0), layers(1), layers(2)], [8, 4, 2], "4 : 2 : 1");
}

#[test]
fn a_device_that_would_slow_the_others_is_left_out() {
    let workload = Gpt { blocks: 6, width: 256, vocabulary: 256, sequence: 256, batch: 8 }.workload();
    let devices = machine([2000.0, 2000.0, 20.0].map(|gflops| gpu("card", gflops, None)).to_vec());
    let planned = plan(&workload, &devices, &Options::default()).unwrap();
    assert!(!planned.best.devices.contains(&2), "{:?}", planned.best.devices);
    let left_out = planned.left_out.iter().find(|left_out| left_out.device == 2).unwrap();
    assert!(left_out.reason.contains("% longer"), "{}", left_out.reason);
    let all = Options { devices: Some(vec![0, 1, 2]), ..Options::default() };
    let with = plan(&workload, &devices, &all).unwrap().best.simulation.step;
    assert!(with > planned.best.simulation.step);
}

#[test]
fn slow_links_leave_one_device_to_do_it_alone() {
    let workload = Gpt { blocks: 6, width: 256, vocabulary: 256, sequence: 256, batch: 8 }.workload();
    let mut devices = machine(vec![gpu("card", 2000.0, None), gpu("card", 2000.0, None)]);
    let together = plan(&workload, &devices, &Options::default()).unwrap().best;
    assert_eq!(together.devices.len(), 2);
    devices.link.gb_s = 0.001;
    let alone = plan(&workload, &devices, &Options::default()).unwrap().best;
    assert_eq!(alone.devices.len(), 1);
}

#[test]
fn a_full_device_gets_fewer_layers_and_says_so() {
    let workload = Gpt { blocks: 12, width: 512, vocabulary: 256, sequence: 512, batch: 16 }.workload();
    let mut devices = machine(vec![gpu("card", 2000.0, None), gpu("card", 2000.0, None)]);
    let layers_of = |planned: &Planned, device: usize| {
        let rank = planned.best.devices.iter().position(|&used| used == device).unwrap();
        planned.best.stages[rank].len()
    };
    let options = Options { microbatches: Some(16), ..named("1f1b") };
    let free = plan(&workload, &devices, &options).unwrap();
    let rank = free.best.devices.iter().position(|&used| used == 1).unwrap();
    devices.devices[1].memory = Some(free.best.simulation.slot_bytes[rank] * 6 / 10);
    let options = Options { recompute: polystage::plan::RecomputeChoice::Never, ..options };
    let tight = plan(&workload, &devices, &options).unwrap();
    assert!(layers_of(&tight, 1) < layers_of(&free, 1));
    assert!(tight.best.simulation.step > free.best.simulation.step);
    let shares = tight.explain(&workload, &devices).devices;
    let share = shares.iter().find(|share| share.device == 1).unwrap();
    assert!(share.why.iter().any(|why| why.starts_with("limited by memory to")), "{:?}", share.why);
}

#[test]
fn recompute_is_used_only_where_it_is_needed() {
    let workload = Gpt { blocks: 8, width: 512, vocabulary: 256, sequence: 512, batch: 16 }.workload();
    let mut devices = machine(vec![gpu("card", 2000.0, None), gpu("card", 2000.0, None)]);
    let options = Options { devices: Some(vec![0, 1]), cuts: Some(cut_at(&[5])), ..named("1f1b") };
    let options = Options { microbatches: Some(16), ..options };
    let free = plan(&workload, &devices, &options).unwrap().best;
    assert_eq!(free.recompute, [false, false]);
    devices.devices[0].memory = Some(free.simulation.slot_bytes[0] - 1);
    let tight = plan(&workload, &devices, &options).unwrap().best;
    assert_eq!(tight.recompute, [true, false]);
    assert!(
        tight.simulation.step > free.simulation.step
            && tight.costs.stages[0].stash < free.costs.stages[0].stash
    );
}

#[test]
fn very_many_layers_and_devices_are_planned_in_groups() {
    let workload = Gpt { blocks: 1000, width: 64, vocabulary: 256, sequence: 64, batch: 4 }.workload();
    let gflops = |i: usize| 1000.0 + 100.0 * i as f64;
    let devices = machine((0..14).map(|i| gpu("card", gflops(i), None)).collect());
    let options = Options { microbatches: Some(4), ..named("1f1b") };
    let planned = plan(&workload, &devices, &options).unwrap();
    check(&planned, &workload, &devices);
    assert!(!planned.complete);
    // The four slowest of fourteen unlike devices are not looked at.
    let ignored = |device: usize| {
        let reason = planned.left_out.iter().find(|left_out| left_out.device == device);
        reason.is_some_and(|left_out| left_out.reason.contains("too many unlike devices"))
    };
    assert!(ignored(0) && ignored(3) && !ignored(4), "{:?}", planned.left_out);
}

/// Seconds of planning; run by name with `-- --ignored --nocapture`, in release.
#[test]
#[ignore = "prints times"]
fn planning_times() {
    let small = Gpt { blocks: 30, width: 768, vocabulary: 50257, sequence: 1024, batch: 64 }.workload();
    let large = Gpt { blocks: 78, width: 1280, vocabulary: 50257, sequence: 1024, batch: 64 }.workload();
    let unlike = |gflops: &[f64], memory: &[u64]| {
        let cards = gflops.iter().zip(memory).map(|(&g, &m)| gpu("card", g, (m > 0).then_some(m << 30)));
        machine(cards.collect())
    };
    let four = [3400.0, 2100.0, 1200.0, 700.0];
    let eight = [8000.0, 3400.0, 5200.0, 2700.0, 6000.0, 4500.0, 2000.0, 3700.0];
    for (name, workload, machine) in [
        ("32 layers, 4 unequal devices", &small, unlike(&four, &[0; 4])),
        ("32 layers, 4 unequal devices, tight memory", &small, unlike(&four, &[6, 5, 4, 8])),
        ("80 layers, 8 equal devices", &large, unlike(&[5000.0; 8], &[24; 8])),
        ("80 layers, 8 unequal devices", &large, unlike(&eight, &[0; 8])),
        (
            "80 layers, 8 unequal devices, tight memory",
            &large,
            unlike(&eight, &[24, 16, 12, 16, 24, 20, 24, 10]),
        ),
    ] {
        let start = Instant::now();
        let planned = plan(workload, &machine, &Options::default()).unwrap();
        let Planned { considered, evaluated, .. } = planned;
        println!("{name}: {:.2?}, {considered} considered, {evaluated} simulated", start.elapsed());
    }
}
