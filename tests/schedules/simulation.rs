//! The simulator: queues, links, shared cores, the end of a step, memory, causes of idle time.

use polystage::schedule::{
    Action, Cell, Costs, Exchange, Hop, Hops, Idle, Jitter, Kind, NAMES, RankCost, Schedule, Simulator,
    StageCost, attribute, default_chunks, generate, replicate, simulate, stage_ranks,
};

use super::machines::{Random, machine};

/// One after another on one rank each: F takes 1 second, I and W 1 each, B 2.
fn textbook(name: &str, ranks: usize, microbatches: usize) -> (Schedule, Costs) {
    let schedule = generate(name, ranks, microbatches).unwrap();
    let costs = Costs::uniform(&schedule, 1.0, 1.0, 1.0, 0.0);
    (schedule, costs)
}

/// When each action starts and ends, such as `0F0 0-1`.
fn spans(schedule: &Schedule, costs: &Costs) -> Vec<String> {
    let cells = simulate(schedule, costs).unwrap().cells;
    let computed = cells.iter().filter(|cell| cell.action.kind.computes());
    computed.map(|cell| format!("{} {}-{}", cell.action, cell.start, cell.end)).collect()
}

#[test]
fn a_hop_takes_both_queues_or_both_copy_engines_and_the_way_between() {
    let (schedule, mut costs) = textbook("1f1b", 2, 1);
    let hop = Hop { out: 1.0, latency: 4.0, copy: 8.0, into: 16.0, bytes: 0 };
    costs.hops[0] = Hops { forward: hop, backward: hop };
    assert_eq!(spans(&schedule, &costs), ["0F0 0-2", "0B0 46-64", "1F0 14-31", "1B0 31-34"]);
    costs.ranks[1].copy_engine = true;
    assert_eq!(spans(&schedule, &costs), ["0F0 0-2", "0B0 46-64", "1F0 30-31", "1B0 31-33"]);
    costs.ranks[0].copy_engine = true;
    assert_eq!(spans(&schedule, &costs), ["0F0 0-1", "0B0 62-64", "1F0 30-31", "1B0 31-33"]);
}

#[test]
fn stages_of_one_rank_hand_over_on_the_queue_alone() {
    let schedule: Schedule = "0F0 1F0 1B0 0B0".parse().unwrap();
    let mut costs = Costs::uniform(&schedule, 1.0, 1.0, 1.0, 0.0);
    let hop = Hop { out: 0.25, latency: 4.0, copy: 8.0, into: 0.5, bytes: 0 };
    costs.hops[0] = Hops { forward: hop, backward: Hop::default() };
    costs.ranks[0].copy_engine = true;
    assert_eq!(spans(&schedule, &costs), ["0F0 0-1.25", "1F0 1.25-2.75", "1B0 2.75-4.75", "0B0 4.75-6.75"]);
}

#[test]
fn a_link_carries_one_tensor_at_a_time_each_way() {
    let (schedule, mut costs) = textbook("gpipe", 2, 3);
    costs.hops[0].forward = Hop { copy: 5.0, latency: 0.5, ..Hop::default() };
    costs.hops[0].backward = Hop { copy: 0.5, ..Hop::default() };
    let lowered = schedule.lowered().unwrap();
    let simulation = simulate(&lowered, &costs).unwrap();
    let sent = |name: &str| {
        let cell = simulation.cells.iter().find(|cell| cell.action.to_string() == name).unwrap();
        (cell.start, cell.end)
    };
    // The way of a tensor includes its wait for the one before.
    assert_eq!(["0SEND_F0", "0SEND_F1", "0SEND_F2"].map(sent), [(1.0, 6.5), (2.0, 11.5), (3.0, 16.5)]);
    assert_eq!(sent("1RECV_F2"), (3.0, 16.5));
    assert_eq!(["1SEND_B0", "1SEND_B1"].map(sent), [(19.5, 20.0), (21.5, 22.0)]);
}

/// In a V two boundaries share the link between two ranks.
#[test]
fn all_stages_of_two_ranks_share_their_link() {
    let schedule: Schedule = "0F0 0F1 0F2 3F0 3B0 3F1 3B1 3F2 3B2 0B0 0B1 0B2
         1F0 2F0 1F1 2F1 1F2 2F2 2B0 2B1 2B2 1B0 1B1 1B2"
        .parse()
        .unwrap();
    let mut costs = Costs::uniform(&schedule, 1.0, 1.0, 1.0, 0.0);
    costs.hops[0].forward.copy = 10.0;
    costs.hops[2].backward.copy = 2.0;
    let simulation = simulate(&schedule.lowered().unwrap(), &costs).unwrap();
    let sent = |name: &str| {
        let cell = simulation.cells.iter().find(|cell| cell.action.to_string() == name).unwrap();
        (cell.start, cell.end)
    };
    assert_eq!(["0SEND_F1", "0SEND_F2", "3SEND_B0"].map(sent), [(2.0, 21.0), (3.0, 31.0), (16.0, 33.0)]);
}

#[test]
fn copies_over_all_links_share_the_hosts_memory() {
    let pipeline = generate("gpipe", 2, 1).unwrap();
    let schedule = replicate(&[pipeline.clone(), pipeline]).unwrap();
    let mut costs = Costs::uniform(&schedule, 1.0, 1.0, 1.0, 0.0);
    for hops in &mut costs.hops {
        hops.forward = Hop { copy: 4.0, bytes: 1_000_000_000, ..Hop::default() };
    }
    // Both leave at 1; a copy reads and writes what it carries.
    let arrived = |host_gb_s: f64| {
        let costs = Costs { host_gb_s, ..costs.clone() };
        let cells = simulate(&schedule, &costs).unwrap().cells;
        let second = cells.iter().filter(|cell| cell.action.kind == Kind::F && cell.action.stage == 1);
        second.map(|cell| cell.start).collect::<Vec<_>>()
    };
    assert_eq!(arrived(0.0), [5.0, 5.0]);
    assert_eq!(arrived(1.0), [5.0, 5.0]);
    assert_eq!(arrived(0.8), [5.0, 6.0]);
    // One alone takes as long as was measured, whatever the memory is said to give.
    assert_eq!(arrived(0.1), [5.0, 9.0]);
}

#[test]
fn devices_that_share_cores_slow_each_other_down() {
    let (schedule, mut costs) = textbook("gpipe", 2, 2);
    costs.cores = 1.0;
    costs.ranks.iter_mut().for_each(|rank| rank.cores = 1.0);
    let expected =
        ["0F0 0-1", "0F1 1-3", "0B0 6-10", "0B1 10-12", "1F0 1-3", "1F1 3-4", "1B0 4-6", "1B1 6-10"];
    assert_eq!(spans(&schedule, &costs), expected);
    // A GPU beside a software adapter: there are cores enough for both.
    costs.ranks[0].cores = 0.0;
    let unshared = textbook("gpipe", 2, 2).1;
    assert_eq!(spans(&schedule, &costs), spans(&schedule, &unshared));
}

#[test]
fn a_device_may_slow_another_down_and_not_itself() {
    let (schedule, mut costs) = textbook("gpipe", 2, 2);
    costs.slowdown = vec![vec![7.0, 2.0], vec![1.0, 7.0]];
    let expected = [
        "0F0 0-1",
        "0F1 1-2.5",
        "0B0 5.5-8.5",
        "0B1 8.5-10.5",
        "1F0 1-2",
        "1F1 2.5-3.5",
        "1B0 3.5-5.5",
        "1B1 5.5-7.5",
    ];
    assert_eq!(spans(&schedule, &costs), expected);
}

#[test]
fn a_step_ends_with_tied_gradients_the_norm_of_all_and_the_update() {
    let (schedule, mut costs) = textbook("1f1b", 2, 1);
    costs.ranks[0] = RankCost { begin: 0.5, end: 0.25, update: 3.0, ..RankCost::default() };
    costs.ranks[1] = RankCost { begin: 1.0, end: 10.0, update: 1.0, ..RankCost::default() };
    let simulation = simulate(&schedule, &costs).unwrap();
    // 0F0 0.5-1.5, 1F0 1.5-2.5, 1B0 2.5-4.5, 0B0 4.5-6.5; rank 1 is ready for the update at 14.5.
    assert_eq!((simulation.makespan, simulation.step), (6.5, 17.5));
    let gradient = Hop { out: 1.0, latency: 2.0, copy: 3.0, into: 4.0, bytes: 0 };
    let weight = Hop { out: 0.5, latency: 0.25, copy: 1.0, into: 2.0, bytes: 0 };
    costs.exchanges = vec![Exchange { user: 1, owner: 0, from: 1, to: 0, gradient, weight }];
    // The user sends until 5.5 and ends at 15.5; the owner receives from 10.5 to 14.5 and ends at 14.75. The update takes
    // rank 0 until 18.5, its sending until 19, and rank 1 has the weight at 22.25.
    let simulation = simulate(&schedule, &costs).unwrap();
    assert_eq!((simulation.makespan, simulation.step), (6.5, 22.25));
    let whole = simulation.cells.iter().filter(|cell| cell.action.kind.is_whole());
    let times: Vec<String> =
        whole.map(|cell| format!("{} {} {}-{}", cell.rank, cell.action, cell.start, cell.end)).collect();
    assert_eq!(
        times,
        [
            "0 C 0-0.5",
            "0 0A 10.5-14.5",
            "0 N 14.5-14.75",
            "0 U 15.5-19",
            "1 C 0-1",
            "1 0R 4.5-5.5",
            "1 N 5.5-15.5",
            "1 U 15.5-16.5",
            "1 0G 20.25-22.25"
        ]
    );
    costs.exchanges[0] = Exchange { to: 1, ..costs.exchanges[0] };
    assert!(simulate(&schedule, &costs).unwrap_err().to_string().starts_with("costs.exchanges[0]"));
}

#[test]
fn a_stash_is_held_from_f_to_w_and_a_gradient_from_i_to_w() {
    let schedule: Schedule = "0F0 0F1 0I0 0W0 0I1 0W1".parse().unwrap();
    let mut costs = Costs::uniform(&schedule, 1.0, 1.0, 1.0, 0.0);
    costs.stages[0] = StageCost { stash: 100, gradient: 10, ..costs.stages[0] };
    costs.ranks[0].fixed = 1000;
    let simulation = simulate(&schedule, &costs).unwrap();
    let held: [(f64, u64); 7] =
        [(0.0, 1000), (0.0, 1100), (1.0, 1200), (2.0, 1210), (4.0, 1100), (4.0, 1110), (6.0, 1000)];
    assert_eq!(simulation.memory, [held]);
    assert_eq!((simulation.peak_bytes[0], simulation.slot_bytes[0]), (1210, 1210));
    // B holds a gradient too, while it runs.
    let joined: Schedule = "0F0 0B0".parse().unwrap();
    assert_eq!(
        simulate(&joined, &costs).unwrap().memory[0],
        [(0.0, 1000), (0.0, 1100), (1.0, 1110), (3.0, 1000)]
    );
}

#[test]
fn buffers_of_several_stages_add_up_though_they_are_never_all_in_use() {
    let schedule: Schedule = "0F0 1F0 0F1 1B0 1F1 1B1 0B0 0B1".parse().unwrap();
    let mut costs = Costs::uniform(&schedule, 1.0, 1.0, 1.0, 0.0);
    costs.stages[0].stash = 1;
    costs.stages[1].stash = 100;
    costs.stages[1].gradient = 7;
    let simulation = simulate(&schedule, &costs).unwrap();
    assert_eq!((simulation.peak_bytes[0], simulation.slot_bytes[0]), (109, 109));
    let schedule: Schedule = "0F0 0F1 1F0 1B0 0B0 1F1 1B1 0B1".parse().unwrap();
    costs.stages[0].gradient = 9;
    let simulation = simulate(&schedule, &costs).unwrap();
    assert_eq!((simulation.peak_bytes[0], simulation.slot_bytes[0]), (109, 2 + 100 + 7 + 9));
}

#[test]
fn idle_time_has_its_cause() {
    let (schedule, mut costs) = textbook("1f1b", 2, 2);
    costs.hops[0].forward.latency = 0.25;
    costs.hops[0].backward.latency = 0.5;
    costs.ranks[1].begin = 0.125;
    // 0F0 0-1, 0F1 1-2, 0B0 4.75-6.75, 0B1 7.75-9.75; 1F0 1.25-2.25, 1B0 2.25-4.25, 1F1 4.25-5.25, 1B1 5.25-7.25.
    let simulation = simulate(&schedule, &costs).unwrap();
    let expected = [
        Idle { imbalance: 2.25 + 0.5, link: 0.5 + 0.5, ..Idle::default() },
        Idle { warm_up: 1.125, drain: 2.5, ..Idle::default() },
    ];
    assert_eq!(simulation.idle, expected);
    assert!((simulation.bubble - (3.75 + 3.625) / 19.5).abs() < 1e-12);
    let lowered = schedule.lowered().unwrap();
    assert_eq!(simulate(&lowered, &costs).unwrap().idle, expected);
}

#[test]
fn a_wait_at_an_early_receive_is_not_the_hosts() {
    let schedule: Schedule = "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0RECV_B1 0B0 0B1
         1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1"
        .parse()
        .unwrap();
    let simulation = simulate(&schedule, &Costs::uniform(&schedule, 1.0, 1.0, 1.0, 0.25)).unwrap();
    assert_eq!(simulation.idle[0], Idle { imbalance: 5.0, link: 0.5, ..Idle::default() });
}

#[test]
fn measured_times_are_attributed_with_and_without_arrivals() {
    let schedule = generate("1f1b", 2, 2).unwrap();
    let cell = |rank, kind, microbatch, start, end| Cell {
        rank,
        action: Action::new(rank, kind, microbatch),
        start,
        end,
    };
    let cells = [
        cell(1, Kind::F, 0, 12.0, 13.0),
        cell(0, Kind::F, 0, 10.0, 11.0),
        cell(0, Kind::F, 1, 11.5, 12.5),
        cell(1, Kind::B, 0, 13.0, 15.0),
        cell(0, Kind::B, 0, 16.0, 18.0),
        cell(1, Kind::F, 1, 15.25, 16.0),
        cell(1, Kind::B, 1, 16.0, 19.0),
        cell(0, Kind::B, 1, 20.0, 22.0),
    ];
    let arrivals = |rank: usize, at: usize| (rank == 0 && at == 2).then_some(15.25);
    let idle = Idle::of(&attribute(&schedule, &cells, &[9.0, 9.5], arrivals).unwrap(), 2);
    // Rank 0: half a second of host before 0F1; 0B0 was computed at 15, arrived at 15.25 and started at 16; when 0B1
    // arrived nobody knows.
    let first = Idle { warm_up: 1.0, host: 0.5 + 0.75, imbalance: 2.5 + 1.0, link: 0.25 + 1.0, drain: 0.0 };
    // Rank 1: 1F1 was there long before it started, but the arrival is not known.
    let second = Idle { warm_up: 2.5, link: 0.25, drain: 3.0, ..Idle::default() };
    assert_eq!(idle, [first, second]);
    let text = attribute(&schedule, &cells[1..], &[9.0, 9.5], arrivals).unwrap_err().to_string();
    assert!(text.contains("1F0"), "{text}");
    assert!(attribute(&schedule, &cells, &[9.0], arrivals).is_err());
}

#[test]
fn a_rank_by_itself_takes_its_mean_however_its_speed_wanders() {
    let (schedule, mut costs) = textbook("1f1b", 1, 32);
    let steady = simulate(&schedule, &costs).unwrap();
    assert_eq!(steady.expected, steady.step);
    costs.ranks[0].jitter = Jitter { part: 0.3, seconds: 1.0 };
    let wandering = simulate(&schedule, &costs).unwrap();
    assert_eq!((wandering.step, &wandering.cells), (steady.step, &steady.cells));
    // 96 periods a step in each of 200 steps: a standard error of 0.2 %.
    assert!((wandering.expected / steady.step - 1.0).abs() < 0.01, "{}", wandering.expected);
}

#[test]
fn a_step_of_several_ranks_waits_for_whichever_is_slow() {
    let (schedule, mut costs) = textbook("1f1b", 2, 1);
    costs.stages.fill(StageCost::default());
    for rank in &mut costs.ranks {
        *rank = RankCost { begin: 10.0, jitter: Jitter { part: 0.3, seconds: 1e3 }, ..RankCost::default() };
    }
    // The larger of two times 10 (0.7 + 0.3 x), with exponentially distributed x, whose larger one is 1.5 on average. The
    // standard error of 200 draws is 0.24.
    let expected = simulate(&schedule, &costs).unwrap().expected;
    assert!((expected - 11.5).abs() < 0.5, "{expected}");
    for name in NAMES {
        let (schedule, mut costs) = textbook(name, 4, 8);
        costs.ranks.iter_mut().for_each(|rank| rank.jitter = Jitter { part: 0.2, seconds: 2.0 });
        let simulation = simulate(&schedule, &costs).unwrap();
        assert!(simulation.expected > 1.01 * simulation.step, "{name}: {}", simulation.expected);
    }
}

#[test]
fn costs_of_another_schedule_are_refused() {
    let (schedule, costs) = textbook("1f1b", 2, 2);
    type Spoil = fn(&mut Costs);
    let wrong: [(&str, Spoil); 6] = [
        ("costs.stages", |costs| costs.stages.truncate(1)),
        ("costs.hops", |costs| costs.hops.push(Hops::default())),
        ("costs.ranks", |costs| costs.ranks.truncate(1)),
        ("costs.ranks[1]", |costs| costs.ranks[1].jitter.part = 1.5),
        ("costs.slowdown", |costs| costs.slowdown = vec![vec![1.0; 2]]),
        ("costs.slowdown[1]", |costs| costs.slowdown = vec![vec![1.0; 2], vec![1.0]]),
    ];
    for (place, spoil) in wrong {
        let mut costs = costs.clone();
        spoil(&mut costs);
        let text = simulate(&schedule, &costs).unwrap_err().to_string();
        assert!(text.starts_with(&format!("{place}: ")), "{text}");
    }
}

/// What holds for every schedule on every machine; the two ways to compute times, with and without sharing, agree.
#[test]
fn simulations_of_random_machines_add_up() {
    let mut random = Random(1);
    for case in 0..300 {
        let name = NAMES[case % NAMES.len()];
        let (p, chunks) = (1 + random.below(5), default_chunks(name).unwrap());
        let m = (1 + random.below(9)).next_multiple_of(if name == "interleaved-1f1b" { p } else { 1 });
        let mut costs = machine(&mut random, &stage_ranks(name, p, chunks).unwrap());
        if p > 1 && random.flip() {
            let Hops { forward: gradient, backward: weight } = costs.hops[random.below(costs.hops.len())];
            let from = *stage_ranks(name, p, chunks).unwrap().last().unwrap();
            let user = p * chunks - 1;
            let tied = Exchange { user, owner: 0, from, to: 0, gradient, weight };
            costs.exchanges.extend((from != 0).then_some(tied));
        }
        let schedule = generate(name, p, m).unwrap();
        let simulator = Simulator::new(&schedule, &costs.tied()).unwrap();
        let simulation = simulator.simulate(&costs).unwrap();
        let what = format!("{name} p={p} m={m} case {case}");
        assert_eq!(simulator.step(&costs).unwrap(), simulation.step, "{what}");

        let close = |a: f64, b: f64| (a - b).abs() <= 1e-9 * (1.0 + a.abs());
        let mut unused = 0.0;
        for (rank, idle) in simulation.idle.iter().enumerate() {
            let computes = |cell: &&Cell| cell.rank == rank && cell.action.kind.computes();
            let cells = simulation.cells.iter().filter(computes);
            let busy = costs.ranks[rank].begin + cells.map(|cell| cell.end - cell.start).sum::<f64>();
            assert!(close(idle.total(), simulation.makespan - busy), "{what}: {idle:?}");
            let Idle { warm_up, drain, imbalance, link, host } = *idle;
            assert!([warm_up, drain, imbalance, link].iter().all(|&part| part >= 0.0), "{what}: {idle:?}");
            assert_eq!(host, 0.0, "{what}");
            unused += idle.total();
            let bytes = simulation.memory[rank].iter().map(|&(_, bytes)| bytes);
            assert_eq!(bytes.max(), Some(simulation.peak_bytes[rank]), "{what}");
            assert!(simulation.memory[rank].is_sorted_by_key(|&(time, _)| time), "{what}");
            assert_eq!(simulation.memory[rank].last().unwrap().1, costs.ranks[rank].fixed, "{what}");
            assert!(simulation.slot_bytes[rank] >= simulation.peak_bytes[rank], "{what}");
        }
        assert!(close(simulation.bubble * simulation.makespan * p as f64, unused), "{what}");
        let of = |kind| simulation.cells.iter().filter(move |cell| cell.action.kind == kind);
        let together = of(Kind::N).map(|cell| cell.end).fold(0.0, f64::max);
        assert!(of(Kind::U).all(|cell| cell.start >= together), "{what}: all wait for the norm");
        assert!(simulation.cells.iter().all(|cell| cell.end <= simulation.step), "{what}");

        // So little more that only the other way of computing is taken.
        costs.slowdown = vec![vec![1.0 + f64::EPSILON; p]; p];
        let shared = simulator.simulate(&costs).unwrap();
        assert!(close(shared.step, simulation.step), "{what}");
        for (one, other) in simulation.cells.iter().zip(&shared.cells) {
            assert!(close(one.start, other.start) && close(one.end, other.end), "{what}: {one:?} {other:?}");
        }
        costs.slowdown = vec![vec![1.5; p]; p];
        let slower = simulator.step(&costs).unwrap();
        assert!(slower >= simulation.step * (1.0 - 1e-9), "{what}");
        assert!(slower <= simulation.step * 1.5_f64.powi(p as i32 - 1) * (1.0 + 1e-9), "{what}");
    }
}
