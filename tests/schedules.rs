//! Schedules: text form, recipes, lowering, validation, simulation, slots. No GPU.

mod auto;
mod exact;
mod formulas;
mod machines;
mod simulation;
mod whole;

use std::collections::HashSet;
use std::path::Path;

use polystage::error::Error;
use polystage::schedule::{
    Action, Costs, Kind, NAMES, Schedule, Simulation, Simulator, SlotPlan, generate, grid, simulate,
};
use proptest::prelude::*;

fn parse(text: &str) -> Schedule {
    text.parse().unwrap()
}

/// The words of an error that concerns a schedule, and its grid.
fn rejection(schedule: &Schedule) -> (String, String) {
    match schedule.validate() {
        Err(Error::Schedule { message, grid }) => (message, grid),
        other => panic!("expected a rejected schedule, got {other:?} for\n{schedule}"),
    }
}

/// The costs of the textbook: the backward pass takes twice as long as the forward pass, and a hop costs latency alone.
fn textbook(schedule: &Schedule, hop: f64) -> Simulation {
    simulate(schedule, &Costs::uniform(schedule, 1.0, 1.0, 1.0, hop)).unwrap()
}

/// Two ranks of two stages each; rank 0 holds both ends of the network, as in a V.
const TWO_STAGES_A_RANK: &str = "
0F0 0F1 3F0 3I0 3F1 0B0 3I1 3W0 3W1 0B1  # stages 0 and 3
1F0 2F0 1F1 2F1 2B0 1B0 2B1 1B1          # stages 1 and 2
";

// --- golden files ---

fn goldens() -> Vec<(String, String, &'static str)> {
    let golden = |name: &str, content: String, recorded| (format!("{name}.txt"), content, recorded);
    let [gpipe, one_f_one_b, h1, v] =
        ["gpipe", "1f1b", "zb-h1", "zb-v"].map(|name| generate(name, 3, 4).unwrap());
    let texts: Vec<String> = NAMES.iter().map(|name| generate(name, 3, 6).unwrap().to_string()).collect();
    let lowered = |schedule: &Schedule| schedule.lowered().unwrap().to_string();
    vec![
        golden("texts", texts.join("\n"), include_str!("golden/schedules/texts.txt")),
        golden("gpipe_lowered", lowered(&gpipe), include_str!("golden/schedules/gpipe_lowered.txt")),
        golden("gpipe_grid", grid(&gpipe), include_str!("golden/schedules/gpipe_grid.txt")),
        golden("1f1b_lowered", lowered(&one_f_one_b), include_str!("golden/schedules/1f1b_lowered.txt")),
        golden("1f1b_grid", grid(&one_f_one_b), include_str!("golden/schedules/1f1b_grid.txt")),
        golden("zb-h1_grid", grid(&h1), include_str!("golden/schedules/zb-h1_grid.txt")),
        golden("zb-v_lowered", lowered(&v), include_str!("golden/schedules/zb-v_lowered.txt")),
        golden("zb-v_grid", grid(&v), include_str!("golden/schedules/zb-v_grid.txt")),
        golden(
            "two_stages_a_rank_grid",
            grid(&parse(TWO_STAGES_A_RANK)),
            include_str!("golden/schedules/two_stages_a_rank_grid.txt"),
        ),
    ]
}

#[test]
fn goldens_hold() {
    for (file, content, recorded) in goldens() {
        assert_eq!(content, recorded, "{file}; if the change is meant, re-record (see `record_goldens`)");
    }
}

/// Re-records `tests/golden/schedules/`: run this test by name with `-- --ignored`, then read the diff.
#[test]
#[ignore = "writes the golden files"]
fn record_goldens() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/schedules");
    for (file, content, _) in goldens() {
        std::fs::write(folder.join(file), content).unwrap();
    }
}

// --- text form ---

#[test]
fn every_kind_prints_and_parses() {
    for (kind, text) in [
        (Kind::F, "2F0"),
        (Kind::B, "2B0"),
        (Kind::I, "2I0"),
        (Kind::W, "2W0"),
        (Kind::SendF, "2SEND_F0"),
        (Kind::RecvF, "2RECV_F0"),
        (Kind::SendB, "2SEND_B0"),
        (Kind::RecvB, "2RECV_B0"),
    ] {
        let action = Action::new(2, kind, 0);
        assert_eq!(action.to_string(), text);
        assert_eq!(text.parse::<Action>().unwrap(), action);
    }
}

#[test]
fn what_is_not_an_action_is_refused() {
    let words = [
        "",
        "F",
        "2F",
        "F0",
        "2f0",
        "2X0",
        "2F0 ",
        "-1F0",
        "2F-1",
        "2SEND0",
        "2F0F0",
        "99999999999999999999F0",
    ];
    for word in words.into_iter().chain(["٣F0", "2é0"]) {
        let error = word.parse::<Action>().unwrap_err();
        assert!(error.is_input() && error.to_string().contains("2F0"), "{word}: {error}");
    }
}

#[test]
fn a_text_by_hand_may_have_comments_blank_lines_commas_and_no_header() {
    let schedule = parse("# mine\n\n0F0 0F1 .  0B0 0B1 # first\r\n1F0,1B0,1F1,1B1,,\n");
    assert_eq!((schedule.stages, schedule.microbatches, schedule.ranks.len()), (2, 2, 2));
    assert_eq!(schedule.name, "custom");
    schedule.validate().unwrap();
    assert_eq!(parse("# name: mine\n0F0 0B0\n").name, "mine");
}

#[test]
fn an_unreadable_text_is_refused_with_line_and_word() {
    let error = "0F0 0B0\n1F0 1BO 1F1\n".parse::<Schedule>().unwrap_err();
    let text = error.to_string();
    assert!(text.contains("line 2") && text.contains("1F0 1BO <-- 1F1"), "{text}");
    for text in
        ["", "\n# nothing\n", "# name: x, stages: two, microbatches: 1\n0F0", "# name: x, microbatches: 1\n"]
    {
        assert!(text.parse::<Schedule>().unwrap_err().is_input(), "{text}");
    }
}

fn any_schedule() -> impl Strategy<Value = Schedule> {
    let action = (any::<usize>(), 0..KINDS.len(), any::<usize>())
        .prop_map(|(stage, kind, microbatch)| Action::new(stage, KINDS[kind], microbatch));
    let ranks = prop::collection::vec(prop::collection::vec(action, 0..6), 0..5);
    ("[ -~é]{0,12}", any::<usize>(), any::<usize>(), ranks)
        .prop_map(|(name, stages, microbatches, ranks)| Schedule { name, stages, microbatches, ranks })
}

const KINDS: [Kind; 8] =
    [Kind::F, Kind::B, Kind::I, Kind::W, Kind::SendF, Kind::RecvF, Kind::SendB, Kind::RecvB];

// --- recipes ---

#[test]
fn an_unknown_schedule_is_refused_with_the_nearest_name() {
    let text = generate("1fb", 2, 4).unwrap_err().to_string();
    assert!(text.contains("did you mean `1f1b`"), "{text}");
    assert!(NAMES.iter().all(|name| text.contains(name)), "{text}");
}

#[test]
fn no_stages_no_microbatches_and_absurdly_many_are_refused() {
    for name in NAMES {
        for (stages, microbatches) in [(0, 1), (1, 0), (usize::MAX, 2), (1 << 20, 1 << 20)] {
            let error = generate(name, stages, microbatches).unwrap_err();
            assert!(matches!(error, Error::Config { .. }), "{error}");
            let mut schedule = generate(name, 1, 1).unwrap();
            (schedule.stages, schedule.microbatches) = (stages, microbatches);
            assert!(matches!(schedule.validate(), Err(Error::Config { .. })));
        }
    }
}

#[test]
fn the_largest_schedules_take_no_time() {
    let start = std::time::Instant::now();
    for name in NAMES {
        let schedule = generate(name, 64, 1024).unwrap().lowered().unwrap();
        schedule.validate().unwrap();
        textbook(&schedule, 0.1);
        assert_eq!(schedule.slots(63, 63).slot.len(), 1024);
        assert!(grid(&schedule).len() < 100_000);
        assert_eq!(parse(&schedule.to_string()), schedule);
    }
    // Seconds in a debug build; quadratic work would take hours.
    assert!(start.elapsed().as_secs() < 60, "{:?}", start.elapsed());
}

// --- lowering ---

#[test]
fn several_stages_on_a_rank_lower_validate_and_simulate() {
    let schedule = parse(TWO_STAGES_A_RANK);
    schedule.validate().unwrap();
    assert_eq!([0, 1, 2, 3].map(|stage| schedule.rank_of(stage).unwrap()), [0, 1, 1, 0]);
    let lowered = schedule.lowered().unwrap();
    lowered.validate().unwrap();
    let transfers: HashSet<String> = lowered
        .ranks
        .iter()
        .flatten()
        .filter(|action| action.kind.is_transfer() && action.microbatch == 0)
        .map(Action::to_string)
        .collect();
    let expected =
        ["0SEND_F0", "1RECV_F0", "2SEND_F0", "3RECV_F0", "3SEND_B0", "2RECV_B0", "1SEND_B0", "0RECV_B0"];
    assert_eq!(transfers, expected.map(String::from).into(), "stages 1 and 2 hand over without transfers");
    let [before, after] = [&schedule, &lowered].map(|schedule| textbook(schedule, 0.5));
    assert_eq!((before.makespan, &before.peak_in_flight), (after.makespan, &after.peak_in_flight));
}

#[test]
fn a_send_follows_its_producer_and_a_receive_precedes_its_consumer() {
    let lowered = generate("1f1b", 3, 4).unwrap().lowered().unwrap();
    assert!(lowered.is_lowered());
    assert_eq!(lowered.lowered().unwrap(), lowered, "lowering twice changes nothing");
    for actions in &lowered.ranks {
        for (at, action) in actions.iter().enumerate() {
            let (neighbour, kind) = match action.kind {
                Kind::SendF => (at - 1, Kind::F),
                Kind::SendB => (at - 1, Kind::B),
                Kind::RecvF => (at + 1, Kind::F),
                Kind::RecvB => (at + 1, Kind::B),
                _ => continue,
            };
            assert_eq!(actions[neighbour], Action { kind, ..*action });
        }
    }
    assert!(!generate("1f1b", 1, 4).unwrap().lowered().unwrap().is_lowered(), "one stage sends nothing");
}

// --- validation ---

#[test]
fn weight_gradients_out_of_microbatch_order_are_refused() {
    for text in ["0F0 0F1 0B1 0B0", "0F0 0F1 0I0 0I1 0W1 0W0"] {
        let (message, grid) = rejection(&parse(text));
        assert!(message.contains("microbatch order"), "{message}");
        assert!(grid.ends_with("0 <-- "), "{grid}");
    }
    parse("0F1 0F0 0I1 0I0 0W0 0W1").validate().expect("only the sum has an order");
}

#[test]
fn a_deadlock_is_refused_and_shows_who_waits_for_whom() {
    // Rank 0 wants its gradient of microbatch 0 before it sends microbatch 1, without which rank 1 does not go on.
    let schedule = parse(
        "0F0 0SEND_F0 0RECV_B0 0B0 0F1 0SEND_F1 0RECV_B1 0B1
         1RECV_F0 1F0 1RECV_F1 1F1 1B0 1SEND_B0 1B1 1SEND_B1",
    );
    let (message, grid) = rejection(&schedule);
    assert!(message.starts_with("deadlock"), "{message}");
    assert!(message.contains("rank 0 waits at 0RECV_B0 for 1SEND_B0 of rank 1"), "{message}");
    assert!(message.contains("rank 1 waits at 1RECV_F1 for 0SEND_F1 of rank 0"), "{message}");
    assert!(grid.contains("rank 0: 0F0 0SEND_F0 0RECV_B0 <-- 0B0"), "{grid}");
    assert!(grid.contains("rank 1: 1RECV_F0 1F0 1RECV_F1 <-- 1F1"), "{grid}");
    assert!(Simulator::new(&schedule, &[]).is_err());
    assert!(polystage::schedule::grid(&schedule).contains("deadlock"));

    let computation = parse("0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1");
    let (message, _) = rejection(&computation);
    assert!(message.contains("rank 0 waits at 0B0 for 1B0 of rank 1"), "{message}");
    assert!(computation.lowered().is_err());
}

#[test]
fn ranks_that_merely_queue_behind_a_deadlock_are_not_blamed() {
    let schedule = parse("0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1\n2F0 2F1 2B0 2B1");
    let (message, grid) = rejection(&schedule);
    assert!(message.contains("rank 1 waits") && message.contains("rank 2 waits"), "{message}");
    assert!(!message.contains("rank 0 waits"), "{message}");
    assert_eq!(grid.matches("<-- ").count(), 2, "{grid}");
}

#[test]
fn every_fault_is_named_and_marked() {
    for (text, words, cell) in [
        ("0F0 0F0 0B0", "stands twice", "0F0 0F0 <-- 0B0"),
        ("0F0 0B0 1F0\n1B0", "already on rank 0", "1B0 <-- "),
        ("0F0 0B0\n.", "rank 1 has no actions", "rank 1: (end) <-- "),
        ("0F0 0B0\n2F0 2B0", "stage 1 is on no rank", "2B0 (end) <-- "),
        ("0B0 0F0", "comes later", "0B0 <-- 0F0"),
        ("0F0 0W0 0I0", "comes later", "0W0 <-- 0I0"),
        ("0F0 0I0", "has no W", "0I0 <-- "),
        ("0F0 0W0", "has no I", "0W0 <-- "),
        ("0F0", "has no B", "0F0 <-- "),
        ("0B0", "has no F", "0B0 <-- "),
        ("0F0 0B0 0F2 0B2", "does nothing for microbatch 1", "0B2 (end) <-- "),
        ("0F0 0B0 0W0", "B and I or W", "0W0 <-- "),
        ("0F0 0F1 0I0 0B1 0W0", "for others I and W", "0B1 <-- "),
        ("0F0 0F1 0B0 0I1 0W1", "for others I and W", "0B0 <-- "),
        ("0F0 0SEND_F0 0B0", "no other end", "0SEND_F0 <-- 0B0"),
        ("0F0 0SEND_B0 0B0", "no other end", "0SEND_B0 <-- 0B0"),
        ("0F0 0SEND_F0 1RECV_F0 1F0 1B0 0B0", "both on rank 0", "0SEND_F0 <-- "),
        ("0F0 0SEND_F0 0B0\n1F0 1B0", "never received", "0SEND_F0 <-- "),
        ("0F0 0SEND_F0 0B0\n1RECV_F0 1F0 1B0", "0B0 needs 0RECV_B0", "0B0 <-- "),
        ("0F0 0B0\n1RECV_F0 1F0 1B0", "0B0 needs 0RECV_B0", "0B0 <-- "),
        (
            "0SEND_F0 0F0 0RECV_B0 0B0\n1RECV_F0 1F0 1B0 1SEND_B0",
            "needs 0F0, which comes later",
            "0SEND_F0 <-- 0F0",
        ),
        ("# name: x, stages: 1, microbatches: 1\n0F0 0B0 1F0", "beyond the last stage", "1F0 <-- "),
        ("# name: x, stages: 1, microbatches: 1\n0F0 0B0 0F1", "beyond the last microbatch", "0F1 <-- "),
        ("# name: x, stages: 1, microbatches: 1\n", "on no rank", ""),
    ] {
        let (message, grid) = rejection(&parse(text));
        assert!(message.contains(words), "{text}: {message}");
        assert!(grid.contains(cell), "{text}:\n{grid}");
    }
}

#[test]
fn a_fault_in_a_long_list_is_shown_with_its_neighbours_only() {
    let mut schedule = generate("gpipe", 2, 1000).unwrap();
    schedule.ranks[1].swap(1500, 1501);
    let (_, grid) = rejection(&schedule);
    assert!(grid.contains("1B499 1B501 1B500 <-- 1B502"), "{grid}");
    assert!(grid.len() < 300 && grid.contains("... ") && grid.contains(" ..."), "{grid}");
}

/// What `validate` must say about a schedule whose stages belong on these ranks, by brute force and from the definitions
/// alone.
fn can_run(schedule: &Schedule, owner: &[usize]) -> bool {
    let mut done = HashSet::new();
    let mut at = vec![0; schedule.ranks.len()];
    let mut added = vec![0; schedule.stages];
    loop {
        let mut progress = false;
        for (rank, actions) in schedule.ranks.iter().enumerate() {
            while let Some(&action) = actions.get(at[rank]) {
                let Action { stage, kind, microbatch } = action;
                let is_done = |stage, kind| done.contains(&Action { stage, kind, microbatch });
                let has_backward = |stage| is_done(stage, Kind::B) || is_done(stage, Kind::I);
                let last = stage + 1 == schedule.stages;
                let from_before = stage > 0 && owner[stage - 1] != rank;
                let from_after = !last && owner[stage + 1] != rank;
                let input = match (stage, schedule.is_lowered() && from_before) {
                    (0, _) => true,
                    (_, true) => is_done(stage, Kind::RecvF),
                    (_, false) => is_done(stage - 1, Kind::F),
                };
                let gradient = match (last, schedule.is_lowered() && from_after) {
                    (true, _) => true,
                    (_, true) => is_done(stage, Kind::RecvB),
                    (_, false) => has_backward(stage + 1),
                };
                let ready = owner[stage] == rank
                    && match kind {
                        Kind::F => input,
                        Kind::B => is_done(stage, Kind::F) && gradient && added[stage] == microbatch,
                        Kind::I => is_done(stage, Kind::F) && gradient,
                        Kind::W => is_done(stage, Kind::I) && added[stage] == microbatch,
                        Kind::SendF => from_after && is_done(stage, Kind::F),
                        Kind::SendB => from_before && has_backward(stage),
                        Kind::RecvF => from_before && is_done(stage - 1, Kind::SendF),
                        Kind::RecvB => from_after && is_done(stage + 1, Kind::SendB),
                        // The schedules that are run here say nothing of how a step begins and ends.
                        Kind::C | Kind::R | Kind::A | Kind::N | Kind::U | Kind::G => false,
                    };
                if !ready || !done.insert(action) {
                    break;
                }
                added[stage] += usize::from(matches!(kind, Kind::B | Kind::W));
                at[rank] += 1;
                progress = true;
            }
        }
        if !progress {
            break;
        }
    }
    let complete = added.iter().all(|&count| count == schedule.microbatches);
    complete && at.iter().zip(&schedule.ranks).all(|(&at, actions)| at == actions.len())
}

/// The rank of each stage.
fn owners(schedule: &Schedule) -> Vec<usize> {
    (0..schedule.stages).map(|stage| schedule.rank_of(stage).unwrap()).collect()
}

// --- simulation and slots ---

#[test]
fn a_simulation_says_when_each_action_runs() {
    let schedule = parse("0F0 0B0\n1F0 1I0 1W0");
    let simulation = simulate(&schedule, &Costs::uniform(&schedule, 2.0, 2.0, 0.5, 0.25)).unwrap();
    let times: Vec<_> = simulation
        .cells
        .iter()
        .filter(|cell| cell.action.kind.computes())
        .map(|cell| (cell.rank, cell.action.to_string(), cell.start, cell.end))
        .collect();
    let expected = [
        (0, "0F0", 0.0, 2.0),
        (0, "0B0", 6.5, 9.0),
        (1, "1F0", 2.25, 4.25),
        (1, "1I0", 4.25, 6.25),
        (1, "1W0", 6.25, 6.75),
    ];
    assert_eq!(times, expected.map(|(rank, action, start, end)| (rank, action.to_string(), start, end)));
    assert_eq!(simulation.makespan, 9.0);
    assert!((simulation.bubble - (1.0 - 9.0 / 18.0)).abs() < 1e-12);
}

#[test]
fn a_receive_makes_its_rank_wait_where_it_stands() {
    // Rank 0 could run microbatch 1 while it waits for the gradient, had it not asked for the gradient first.
    let early = parse(
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0RECV_B1 0B0 0B1
         1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1",
    );
    let late = parse("0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1");
    let [early, late] = [early, late].map(|schedule| textbook(&schedule, 0.0).makespan);
    assert_eq!((early, late), (11.0, 9.0));
}

#[test]
fn times_that_are_no_times_are_refused() {
    let schedule = generate("1f1b", 2, 2).unwrap();
    for time in [-1.0, f64::NAN, f64::INFINITY] {
        type Spoil = fn(&mut Costs, f64);
        let wrong: [(&str, Spoil); 5] = [
            ("costs.stages[1]", |costs, time| costs.stages[1].weight = time),
            ("costs.hops[0].backward", |costs, time| costs.hops[0].backward.copy = time),
            ("costs.ranks[1]", |costs, time| costs.ranks[1].update = time),
            ("costs.cores", |costs, time| costs.cores = time),
            ("costs.slowdown[0]", |costs, time| costs.slowdown = vec![vec![1.0, time], vec![1.0, 1.0]]),
        ];
        for (place, spoil) in wrong {
            let mut costs = Costs::uniform(&schedule, 1.0, 1.0, 1.0, 0.0);
            spoil(&mut costs, time);
            let error = simulate(&schedule, &costs).unwrap_err().to_string();
            assert!(error.starts_with(place) && error.contains(&time.to_string()), "{place}: {error}");
        }
    }
    let idle = simulate(&schedule, &Costs::uniform(&schedule, 0.0, 0.0, 0.0, 0.0)).unwrap();
    assert_eq!((idle.makespan, idle.bubble), (0.0, 0.0));
}

#[test]
fn a_slot_is_taken_by_f_and_given_back_after_w() {
    let schedule = parse("0F0 0F1 0I0 0I1 0F2 0W0 0F3 0W1 0I2 0W2 0I3 0W3");
    schedule.validate().unwrap();
    assert_eq!(schedule.slots(0, 0), SlotPlan { count: 3, slot: vec![0, 1, 2, 0] });
    assert_eq!(schedule.gradient_slots(0, 0), SlotPlan { count: 2, slot: vec![0, 1, 0, 0] });
    assert_eq!(schedule.slots(7, 0), SlotPlan::default());
    let one_f_one_b = generate("1f1b", 3, 5).unwrap();
    assert_eq!(one_f_one_b.slots(0, 0), SlotPlan { count: 3, slot: vec![0, 1, 2, 0, 1] });
    assert_eq!(one_f_one_b.gradient_slots(0, 0), SlotPlan { count: 1, slot: vec![0; 5] });
}

#[test]
fn a_long_grid_is_broken_and_its_middle_left_out() {
    let text = grid(&generate("1f1b", 2, 100).unwrap());
    assert!(text.lines().all(|line| line.len() <= 110), "{text}");
    assert!(text.contains("are left out") && text.contains("B99"), "{text}");
    assert!(text.lines().count() < 30, "{text}");
}

/// A named schedule for about so many microbatches.
fn make(name: usize, ranks: usize, microbatches: usize) -> Schedule {
    let unit = if NAMES[name] == "interleaved-1f1b" { ranks } else { 1 };
    generate(NAMES[name], ranks, microbatches.next_multiple_of(unit)).unwrap()
}

fn generated() -> impl Strategy<Value = Schedule> {
    (0..NAMES.len(), 1..6_usize, 1..9_usize, any::<bool>()).prop_map(|(name, ranks, microbatches, lower)| {
        let schedule = make(name, ranks, microbatches);
        if lower { schedule.lowered().unwrap() } else { schedule }
    })
}

proptest! {
    // Failures are printed in full and need no seed file in the tree.
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_printed_parses_back(schedule in any_schedule()) {
        prop_assert_eq!(&parse(&schedule.to_string()), &schedule);
    }

    #[test]
    fn no_text_makes_the_parser_panic(text in "([0-9]{1,3}(F|B|SEND_F|é)?[0-9]?[ ,\n#.]|\\PC){0,20}") {
        let _ = text.parse::<Schedule>();
    }

    #[test]
    fn no_schedule_makes_anything_panic(schedule in any_schedule(), stage in any::<usize>()) {
        prop_assert!(schedule.validate().is_err());
        prop_assert!(schedule.lowered().is_err());
        prop_assert!(!grid(&schedule).is_empty());
        schedule.slots(stage, stage);
        schedule.gradient_slots(stage, stage);
    }

    #[test]
    fn generated_schedules_validate_lowered_or_not(schedule in generated()) {
        schedule.validate().unwrap();
        prop_assert!(can_run(&schedule, &owners(&schedule)));
    }

    #[test]
    fn lowering_changes_no_prediction(name in 0..NAMES.len(), p in 1..6_usize, m in 1..9_usize, hop in 0.0..3.0) {
        let schedule = make(name, p, m);
        let (before, mut after) = (textbook(&schedule, hop), textbook(&schedule.lowered().unwrap(), hop));
        after.cells.retain(|cell| !cell.action.kind.is_transfer());
        prop_assert_eq!(before, after);
    }

    #[test]
    fn removing_any_action_is_refused(
        schedule in generated(),
        rank in any::<prop::sample::Index>(),
        at in any::<prop::sample::Index>(),
    ) {
        let mut broken = schedule;
        let rank = rank.index(broken.ranks.len());
        let at = at.index(broken.ranks[rank].len());
        broken.ranks[rank].remove(at);
        let (_, grid) = rejection(&broken);
        prop_assert!(grid.contains("<-- "), "{}", grid);
    }

    #[test]
    fn swapping_two_actions_is_refused_exactly_if_it_breaks_a_rule(
        schedule in generated(),
        ranks in any::<[prop::sample::Index; 2]>(),
        places in any::<[prop::sample::Index; 2]>(),
    ) {
        let mut swapped = schedule.clone();
        let [a, b] = [0, 1].map(|i| {
            let rank = ranks[i].index(schedule.ranks.len());
            (rank, places[i].index(schedule.ranks[rank].len()))
        });
        swapped.ranks[a.0][a.1] = schedule.ranks[b.0][b.1];
        swapped.ranks[b.0][b.1] = schedule.ranks[a.0][a.1];
        let verdict = swapped.validate();
        prop_assert_eq!(verdict.is_ok(), can_run(&swapped, &owners(&schedule)), "{:?}", verdict);
        if let Err(error) = verdict {
            prop_assert!(error.to_string().contains("<-- "), "{}", error);
        }
    }

    #[test]
    fn microbatches_that_share_a_slot_never_overlap(schedule in generated()) {
        for stage in 0..schedule.stages {
            let rank = schedule.rank_of(stage).unwrap();
            let plan = schedule.slots(stage, rank);
            let gradients = schedule.gradient_slots(stage, rank);
            let mut used = vec![false; plan.count];
            let mut waits = vec![false; gradients.count];
            let actions = schedule.ranks[rank].iter();
            for action in actions.filter(|action| action.stage == stage) {
                let slot = &mut used[plan.slot[action.microbatch]];
                let gradient = &mut waits[gradients.slot[action.microbatch]];
                match action.kind {
                    Kind::F => prop_assert!(!std::mem::replace(slot, true)),
                    Kind::I => prop_assert!(*slot && !std::mem::replace(gradient, true)),
                    Kind::W => {
                        prop_assert!(std::mem::replace(slot, false) && std::mem::replace(gradient, false))
                    }
                    Kind::B => prop_assert!(std::mem::replace(slot, false) && !*gradient),
                    _ => {}
                }
            }
        }
    }
}
