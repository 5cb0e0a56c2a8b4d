//! Predicted and measured steps side by side: what the parts add up to, what is drawn, what is said. No GPU: a
//! "measured" timeline is the simulation of other costs, so that the truth is known.

use polystage::schedule::{
    Action, Cause, Costs, Exchange, Hop, Hops, Idle, Kind, NAMES, RankCost, attribute, generate, simulate,
};
use polystage::timeline::{
    Comparison, DeviceName, Event, EventKind, Prediction, Step, Timeline, Track, What,
};
use proptest::prelude::*;
use serde_json::Value;

use crate::timeline::{OTHERS, assert_well_formed};

/// The start of every control sequence of a terminal.
const ESCAPE: char = '\u{1b}';
/// Seconds; sums of some hundred of them differ in the last bits.
const ROUNDING: f64 = 1e-9;

/// A prediction for unlike devices with links that take time.
fn plan(schedule: &str, devices: usize, microbatches: usize) -> Prediction {
    let schedule = generate(schedule, devices, microbatches).unwrap();
    let mut costs = Costs::uniform(&schedule, 0.011, 0.012, 0.010, 0.0);
    for (at, stage) in costs.stages.iter_mut().enumerate() {
        let rank = schedule.rank_of(at).unwrap();
        for seconds in [&mut stage.forward, &mut stage.input, &mut stage.weight, &mut stage.backward] {
            *seconds *= [1.0, 1.1, 1.3, 0.9][rank % 4];
        }
    }
    let hop = Hop { out: 2e-4, latency: 3e-4, copy: 1e-3, into: 1e-4, bytes: 6 << 20 };
    costs.hops.fill(Hops { forward: hop, backward: hop });
    costs.ranks.fill(RankCost { begin: 4e-4, end: 2e-3, update: 8e-3, ..RankCost::default() });
    let names = ["NVIDIA GeForce RTX 3090", "AMD Radeon RX 7900 XTX", "Intel Arc A770", "AMD Radeon 780M"];
    Prediction::new(DeviceName::list((0..devices).map(|rank| names[rank % 4])), &schedule, costs)
}

/// What would be measured if stage 1 took 11 % longer than planned.
fn slower(plan: &Prediction) -> Timeline {
    let mut real = plan.clone();
    let stage = &mut real.costs.stages[1];
    for seconds in [&mut stage.forward, &mut stage.input, &mut stage.weight, &mut stage.backward] {
        *seconds *= 1.11;
    }
    real.timeline().unwrap()
}

fn compare(plan: &Prediction) -> Comparison {
    Comparison::new(Some(plan.clone()), &slower(plan)).unwrap()
}

fn one_line(error: polystage::Error) -> String {
    assert!(error.is_input());
    let text = error.to_string();
    assert_eq!(text.lines().count(), 1, "{text}");
    text
}

/// The characters a terminal shows of a text.
fn shown(text: &str) -> String {
    let mut plain = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('\u{1b}') {
        plain += &rest[..at];
        let end = at + rest[at..].find('m').expect("the end of an escape");
        assert!(rest[at + 1..end].starts_with('['), "an escape that sets no colour: {:?}", &rest[at..end]);
        rest = &rest[end + 1..];
    }
    plain + rest
}

#[test]
fn a_prediction_survives_its_file() {
    for name in NAMES {
        let plan = plan(name, 3, 6);
        let read = Prediction::from_json(&plan.to_json(), "prediction.json").unwrap();
        assert_eq!(read, plan);
        assert_eq!(read.simulate().unwrap(), plan.simulate().unwrap());
        let alone = simulate(&generate(name, 3, 6).unwrap(), &plan.costs).unwrap();
        assert_eq!(read.simulate().unwrap().step, alone.step, "{name}: transfers change nothing");
    }
}

#[test]
fn a_damaged_prediction_is_refused_in_one_line_that_names_the_file() {
    let good: Value = serde_json::from_str(&plan("1f1b", 2, 4).to_json()).unwrap();
    let with = |change: fn(&mut Value)| {
        let mut value = good.clone();
        change(&mut value);
        value.to_string()
    };
    for text in [
        String::new(),
        "[]".into(),
        good.to_string()[..200].into(),
        with(|v| v["devices"] = serde_json::json!(["no number"])),
        with(|v| drop(v["devices"].as_array_mut().unwrap().pop())),
        with(|v| v["schedule"] = "0F0 0B0\n0F0".into()),
        with(|v| v["schedule"] = "0F0 1F0 nonsense".into()),
        with(|v| v["schedule"] = "# name: x, stages: 999999999, microbatches: 999999999\n0F0 0B0".into()),
        with(|v| v["costs"]["stages"][0]["forward"] = (-1.0).into()),
        with(|v| v["costs"]["stages"][0]["forward"] = "fast".into()),
        with(|v| v["costs"]["hops"] = serde_json::json!([])),
        with(|v| drop(v["costs"].as_object_mut().unwrap().remove("ranks"))),
    ] {
        let message = one_line(Prediction::from_json(&text, "runs/x/prediction.json").unwrap_err());
        assert!(message.starts_with("runs/x/prediction.json: is damaged ("), "{message}");
        assert!(message.ends_with("train again, or remove it to see the measurements alone"), "{message}");
    }
}

#[test]
fn a_predicted_timeline_holds_every_action_and_ends_with_the_step() {
    for name in NAMES {
        for devices in 1..5 {
            let plan = plan(name, devices, 12);
            let timeline = plan.timeline().unwrap();
            let schedule = plan.schedule().unwrap();
            for action in schedule.ranks.iter().flatten() {
                let found = timeline.events.iter().filter(|e| e.what == What::Action(*action));
                assert_eq!(found.map(|e| e.track).collect::<Vec<_>>(), [Track::Compute], "{action}");
            }
            let count = |kind| timeline.events.iter().filter(|e| e.kind() == kind).count();
            let lowered = schedule.lowered().unwrap();
            let sends =
                lowered.ranks.iter().flatten().filter(|a| matches!(a.kind, Kind::SendF | Kind::SendB));
            assert_eq!(count(EventKind::Copy), sends.count(), "{name}: each tensor is on its way once");
            assert_eq!(count(EventKind::Optimizer), 3 * devices, "clearing, norm and update of each device");
            let end = timeline.events.iter().map(|e| e.end).fold(0.0, f64::max);
            let step = plan.simulate().unwrap().step;
            assert!((end - step).abs() < ROUNDING, "{name} on {devices}: {end} s, the step takes {step} s");
        }
    }
}

#[test]
fn a_tied_parameter_delays_the_update_in_the_picture_too() {
    let mut plan = plan("1f1b", 2, 4);
    let hop = Hop { out: 1e-3, latency: 2e-3, copy: 3e-3, into: 1e-3, bytes: 1 << 20 };
    plan.costs.exchanges = vec![Exchange { user: 1, owner: 0, from: 1, to: 0, gradient: hop, weight: hop }];
    let step = plan.simulate().unwrap().step;
    let timeline = plan.timeline().unwrap();
    let updates = timeline.events.iter().filter(|e| e.what == What::UPDATE);
    let end = updates.map(|e| e.end).fold(0.0, f64::max);
    // The new weight's way comes after the update; it is no event of either device's queue but for its ends.
    assert!(end < step && step - end <= hop.out + hop.delay() + hop.into + ROUNDING, "{end} s of {step} s");
}

#[test]
fn the_parts_of_a_step_add_up_to_it_and_gaps_to_the_attributed_idle_time() {
    for name in NAMES {
        for devices in 1..5 {
            let comparison = match devices {
                1 => {
                    let plan = plan(name, 1, 12);
                    Comparison::new(Some(plan.clone()), &plan.timeline().unwrap()).unwrap()
                }
                _ => compare(&plan(name, devices, 12)),
            };
            for step in [comparison.predicted.as_ref().unwrap(), &comparison.measured] {
                for rank in 0..devices {
                    let sum: f64 = step.parts(rank).iter().map(|part| part.1).sum();
                    assert!((sum - step.seconds).abs() < ROUNDING, "{name}: {sum} of {}", step.seconds);
                    assert_eq!(step.parts(rank)[0], ("compute", step.computing(rank)));
                    // Cells and gaps follow one another without overlap.
                    let cells = step.cells.iter().filter(|c| c.rank == rank).map(|c| (c.start, c.end));
                    let gaps = step.gaps.iter().filter(|g| g.rank == rank).map(|g| (g.start, g.end));
                    let mut spans: Vec<(f64, f64)> = cells.chain(gaps).collect();
                    spans.sort_by(|a, b| a.0.total_cmp(&b.0));
                    for pair in spans.windows(2) {
                        assert!((pair[0].1 - pair[1].0).abs() < ROUNDING, "{name}, rank {rank}: {pair:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_step_that_runs_as_predicted_is_measured_with_the_predicted_idle_times() {
    for name in NAMES {
        for devices in 2..5 {
            let plan = plan(name, devices, 12);
            let step = Step::measured(&plan.timeline().unwrap()).unwrap();
            assert_eq!(step.schedule.ranks, plan.schedule().unwrap().ranks, "{name}: read off the timeline");
            let simulation = plan.simulate().unwrap();
            for (rank, (measured, predicted)) in step.idle.iter().zip(&simulation.idle).enumerate() {
                for cause in Cause::ALL {
                    let error = cause.seconds(measured) - cause.seconds(predicted);
                    assert!(error.abs() < ROUNDING, "{name}, rank {rank}, {cause:?}: {error} s");
                }
            }
            assert!(simulation.idle.iter().any(|idle| idle.link > 0.0), "{name}: nothing to tell apart");
        }
    }
}

#[test]
fn idle_time_between_arrival_and_start_is_the_hosts_and_before_it_the_links() {
    let event = |rank, kind: Kind, start, end| Event {
        rank,
        track: if kind.is_transfer() { Track::Copy } else { Track::Compute },
        what: What::Action(Action::new(rank, kind, 0)),
        start,
        end,
        bytes: 0,
    };
    let timeline = Timeline {
        devices: DeviceName::list(["a", "b"]),
        step: None,
        events: vec![
            event(0, Kind::F, 0.0, 1.0),
            event(1, Kind::F, 1.5, 2.5),
            event(1, Kind::B, 2.75, 5.0),
            event(0, Kind::RecvB, 5.0, 5.5),
            event(0, Kind::B, 6.25, 8.0),
        ],
    };
    let step = Step::measured(&timeline).unwrap();
    let (first, second) = (step.idle[0], step.idle[1]);
    assert_eq!((first.imbalance, first.link, first.host), (4.0, 0.5, 0.75));
    assert_eq!((second.warm_up, second.host, second.drain), (1.5, 0.25, 3.0));
    let waits: Vec<_> =
        step.gaps.iter().filter(|gap| gap.rank == 0).map(|gap| (gap.cause, gap.peer)).collect();
    assert_eq!(waits, [(Cause::Imbalance, Some(1)), (Cause::Link, Some(1)), (Cause::Host, None)]);
    let again = attribute(&step.schedule, &step.cells, &[0.0; 2], |rank, at| (rank + at == 1).then_some(5.5));
    assert_eq!(Idle::of(&again.unwrap(), 2), step.idle);
}

#[test]
fn the_update_of_the_step_before_is_moved_to_where_this_steps_own_comes() {
    let plan = plan("1f1b", 3, 6);
    let timeline = plan.timeline().unwrap();
    let whole = Step::measured(&timeline).unwrap();
    // As the executor logs it: the events of a step begin with the update of the one before.
    let mut logged = timeline.clone();
    for event in logged.events.iter_mut().filter(|event| event.what == What::UPDATE) {
        (event.start, event.end) = (event.start - whole.seconds, event.end - whole.seconds);
    }
    for event in &mut logged.events {
        (event.start, event.end) = (event.start + 17.0, event.end + 17.0);
    }
    let step = Step::measured(&logged).unwrap();
    assert!((step.seconds - whole.seconds).abs() < ROUNDING, "{} s, {} s", step.seconds, whole.seconds);
    assert_eq!(step.schedule, whole.schedule);
    let start = |step: &Step, what| step.timeline.events.iter().find(|e| e.what == what).unwrap().start;
    let (first, last) = (Action::new(0, Kind::F, 0), Action::new(2, Kind::B, 5));
    for what in [What::CLEAR, What::Action(first), What::Action(last), What::UPDATE] {
        assert!((start(&step, what) - start(&whole, what)).abs() < ROUNDING, "{what}");
    }
}

#[test]
fn an_action_that_was_handed_over_in_parts_is_one_computation() {
    let plan = plan("1f1b", 2, 4);
    let mut timeline = plan.timeline().unwrap();
    let done = What::Action(Action::new(0, Kind::B, 2));
    let whole = timeline.events.iter_mut().find(|event| event.what == done).unwrap();
    let (mut second, middle) = (*whole, (whole.start + whole.end) / 2.0);
    (whole.end, second.start) = (middle - 1e-3, middle);
    timeline.events.push(second);
    let parts = Comparison::new(Some(plan.clone()), &timeline).unwrap();
    let action = parts.actions.iter().find(|a| a.stage == 0 && a.kind == Kind::B).unwrap();
    assert_eq!(action.count, 4);
    assert!(action.error().unwrap().abs() < ROUNDING, "{action:?}");
}

#[test]
fn what_is_not_one_whole_step_is_refused_in_one_line() {
    let whole = plan("1f1b", 2, 4).timeline().unwrap();
    let mut twice = whole.clone();
    twice.events.extend(whole.events.iter().map(|event| {
        let (start, end) = (event.start + 5.0, event.end + 5.0);
        Event { start, end, ..*event }
    }));
    let mut missing = whole.clone();
    missing.events.retain(|event| event.what != What::Action(Action::new(1, Kind::B, 2)));
    let mut idle = whole.clone();
    idle.devices.push(DeviceName { number: 2, name: "did nothing".into(), ..DeviceName::default() });
    let mut huge = whole.clone();
    huge.events[0].what = What::Action(Action::new(usize::MAX, Kind::F, usize::MAX));
    for timeline in [Timeline::default(), twice, missing, idle, huge] {
        let message = one_line(Comparison::new(None, &timeline).unwrap_err());
        assert!(message.contains("does not hold one whole training step ("), "{message}");
    }
}

#[test]
fn a_prediction_of_another_plan_is_refused() {
    let measured = plan("1f1b", 2, 4).timeline().unwrap();
    let error = Comparison::new(Some(plan("1f1b", 2, 8)), &measured).unwrap_err();
    let message = one_line(error);
    assert!(message.contains("2 stages on 2 devices, 8 microbatches") && message.contains("4 microbatches)"));
}

#[test]
fn the_stage_that_was_predicted_wrong_is_named_with_its_device_and_its_error() {
    let comparison = compare(&plan("zb-h1", 4, 8));
    let wrong: Vec<_> = comparison.actions.iter().filter(|a| a.error().unwrap() > 0.05).collect();
    assert_eq!(
        wrong.iter().map(|a| (a.stage, a.rank, a.kind)).collect::<Vec<_>>(),
        [(1, 1, Kind::F), (1, 1, Kind::I), (1, 1, Kind::W)]
    );
    for action in wrong {
        // Transfers in the queue take as long as predicted, so the whole is off by a little less than 11 %.
        assert!((0.10..=0.11 + ROUNDING).contains(&action.error().unwrap()), "{action:?}");
    }
    let findings = comparison.findings().join("\n");
    assert!(
        findings.contains("stage 1 on device 1 computed") && findings.contains("longer than predicted (F +1")
    );
    assert!(!findings.contains("stage 0 on") && !findings.contains("stage 2 on"), "{findings}");
}

#[test]
fn findings_name_the_pace_maker_and_the_longest_waits_with_their_cause() {
    let comparison = compare(&plan("1f1b", 3, 6));
    let findings = comparison.findings();
    let share = |cause: Cause, rank: usize| {
        let step = &comparison.measured;
        format!("{:.1} %", 100.0 * cause.seconds(&step.idle[rank]) / step.seconds)
    };
    // Device 2 is the slowest of the three; device 0 waits for what device 1 must pass on.
    assert!(findings[1].starts_with("device 2 computes"), "{findings:?}");
    let wait = format!("device 0 waits {} of the step", share(Cause::Imbalance, 0));
    assert!(
        findings.iter().any(|f| f.starts_with(&wait) && f.ends_with("for device 1 to compute: imbalance"))
    );
    let drain = format!("({} of the step): drain", share(Cause::Drain, 2));
    assert!(findings.iter().any(|f| f.contains("device 2 has nothing left to do") && f.ends_with(&drain)));
}

#[test]
fn hints_are_measured_shares_and_name_only_what_the_batch_allows() {
    let plan = plan("1f1b", 3, 6);
    let comparison = Comparison::new(Some(plan.clone()), &plan.timeline().unwrap()).unwrap();
    let step = &comparison.measured;
    let ends: f64 = step.idle.iter().map(|idle| idle.warm_up + idle.drain).sum();
    let wanted =
        format!("warm-up and drain take {:.1} % of the devices' time", 100.0 * ends / 3.0 / step.seconds);
    let hints = comparison.hints(Some(2));
    assert!(hints.iter().any(|h| h.starts_with(&wanted) && h.contains("now 6")), "{hints:?}");
    // A microbatch of one sequence cannot be divided, and of an unknown number nothing is known.
    for sequences in [Some(1), None] {
        let hints = comparison.hints(sequences);
        assert!(!hints.iter().any(|hint| hint.contains("more microbatches")), "{hints:?}");
    }
}

/// A first stage that trains nothing, measured and predicted: no gradient comes back to it, so its B is done at once.
fn frozen() -> Comparison {
    let mut plan = plan("1f1b", 2, 2);
    let stage = &mut plan.costs.stages[0];
    (stage.forward, stage.backward) = (1e-3 * stage.forward, 1e-3 * stage.backward);
    let mut timeline = plan.timeline().unwrap();
    let is_b = |e: &Event| matches!(e.what, What::Action(a) if a.kind == Kind::B);
    let is_first = |e: &Event| e.rank == 0;
    let last = timeline.events.iter().filter(|e| is_first(e) && !is_b(e) && e.microbatch().is_some());
    let mut end = last.map(|e| e.end).fold(0.0, f64::max);
    for event in timeline.events.iter_mut().filter(|e| is_first(e) && is_b(e)) {
        let length = event.end - event.start;
        (event.start, event.end) = (end, end + length);
        end += length;
    }
    Comparison::new(Some(plan), &timeline).unwrap()
}

#[test]
fn a_device_that_trains_nothing_is_said_to_be_idle_at_another_time_than_predicted() {
    let comparison = frozen();
    let words = "device 0 trains nothing, so no gradient comes back to it";
    assert!(comparison.findings().iter().any(|f| f.starts_with(words)), "{:?}", comparison.findings());
    let usual = plan("1f1b", 2, 2);
    let usual = Comparison::new(Some(usual.clone()), &usual.timeline().unwrap()).unwrap();
    assert!(!usual.findings().iter().any(|finding| finding.contains("trains nothing")));
}

#[test]
fn a_device_that_hardly_works_is_to_be_left_out_and_no_reason_for_more_microbatches() {
    let comparison = frozen();
    let spare = comparison.spare();
    assert!(spare.len() == 1 && spare[0].starts_with("device 0 (") && spare[0].contains("do without it"));
    // Of the other device's time little is idle.
    assert_eq!(comparison.hints(Some(2)), Vec::<String>::new());
    assert_eq!(compare(&plan("1f1b", 3, 6)).spare(), Vec::<String>::new());
}

#[test]
fn one_busy_device_gets_no_hints() {
    let plan = plan("1f1b", 1, 8);
    let comparison = Comparison::new(None, &plan.timeline().unwrap()).unwrap();
    assert_eq!(comparison.hints(Some(2)), Vec::<String>::new());
    assert!(comparison.findings()[0].starts_with("the device computes 9"), "{:?}", comparison.findings());
}

#[test]
fn the_picture_shows_both_steps_and_the_causes_and_is_well_formed() {
    for name in NAMES {
        let mut plan = plan(name, 4, 8);
        plan.devices[0].name = "A<B> & \"C\" \u{1b}[0m".into();
        let comparison = compare(&plan);
        let svg = comparison.to_svg("</svg> & more");
        assert_well_formed(&svg);
        for text in [
            ">predicted</text>",
            ">measured</text>",
            ">drain</text>",
            "idle: link",
            "A&lt;B&gt;",
            "time in ms",
        ] {
            assert!(svg.contains(text), "{name}: {text}");
        }
        assert!(svg.contains(&comparison.summary()) && svg.contains("longer than predicted"));
        let share = 100.0 * comparison.measured.idle[0].imbalance / comparison.measured.seconds;
        assert!(svg.contains(&format!(">{share:.1}</text>")), "{name}");
    }
}

#[test]
fn without_a_prediction_the_picture_shows_the_measured_half_alone() {
    let comparison = Comparison::new(None, &slower(&plan("1f1b", 2, 8))).unwrap();
    let svg = comparison.to_svg("measured");
    assert_well_formed(&svg);
    assert!(
        svg.contains(">measured</text>") && !svg.contains(">predicted</text>") && !svg.contains("difference")
    );
    assert!(!comparison.to_terminal(100, false).contains("predicted"));
    assert!(!comparison.actions_to_terminal(100, false).contains("predicted"));
    assert_eq!(comparison.to_json()["predicted_step_seconds"], Value::Null);
}

#[test]
fn terminal_and_picture_use_the_same_colours_and_letters_stand_in_for_them() {
    let comparison = compare(&plan("zb-h1", 3, 6));
    let (svg, coloured) = (comparison.to_svg("colours"), comparison.to_terminal(120, true));
    for (name, letter) in
        [("forward", 'F'), ("backward, input", 'I'), ("backward, weights", 'W'), ("optimizer", 'O')]
    {
        let legend = svg[..svg.find(&format!(">{name}</text>")).unwrap()].rsplit("fill=\"#").nth(1).unwrap();
        let part = |at: usize| u8::from_str_radix(&legend[at..at + 2], 16).unwrap();
        let escape = format!("8;2;{};{};{}", part(0), part(2), part(4));
        assert!(coloured.contains(&format!("\u{1b}[0;4{escape}m")), "{name} fills cells");
        let plain = comparison.to_terminal(120, false);
        assert!(plain.contains(&format!("{letter} {name}")) && plain.matches(letter).count() > 6, "{plain}");
    }
}

#[test]
fn plain_lanes_read_like_the_schedule() {
    let mut plan = plan("1f1b", 2, 4);
    plan.costs = Costs::uniform(&plan.schedule().unwrap(), 1.0, 1.0, 1.0, 0.0);
    let comparison = Comparison::new(None, &plan.timeline().unwrap()).unwrap();
    let lanes = comparison.to_terminal(12 + 12 + 5 * 15, false);
    let lanes: Vec<&str> = lanes.lines().filter_map(|line| line.strip_prefix("  measured  ")).collect();
    assert_eq!(
        lanes,
        [
            "F0---F1---..........B0--------F2---B1--------F3---B2--------.....B3--------  busy  80 %",
            ".....F0---B0--------F1---B1--------F2---B2--------F3---B3--------..........  busy  80 %",
        ]
    );
}

#[test]
fn the_json_report_holds_every_number_of_the_tables() {
    let comparison = compare(&plan("1f1b", 2, 8));
    let json = comparison.to_json();
    assert_eq!(json["measured_step_seconds"], comparison.measured.seconds);
    assert_eq!(json["error"], comparison.error().unwrap());
    for rank in 0..2 {
        for (name, seconds) in comparison.measured.parts(rank) {
            assert_eq!(json["devices"][rank]["measured"][name.replace('-', "_")], seconds, "{name}");
        }
    }
    assert_eq!(json["actions"].as_array().unwrap().len(), 4);
    assert_eq!(json["actions"][2]["kind"], "F");
    assert_eq!(json["findings"].as_array().unwrap().len(), comparison.findings().len());
}

proptest! {
    #[test]
    fn no_line_is_wider_than_the_terminal(
        width in 0usize..200,
        name in 0..NAMES.len(),
        devices in 2usize..5,
        rounds in 1usize..5,
        device in "\\PC{0,40}",
    ) {
        let mut plan = plan(NAMES[name], devices, devices * rounds);
        plan.devices[0].name = format!("{device}\u{1b}[2J\n漢字🙂");
        let comparison = compare(&plan);
        for colour in [false, true] {
            for text in [
                comparison.to_terminal(width, colour),
                comparison.shares_to_terminal(width, colour),
                comparison.actions_to_terminal(width, colour),
            ] {
                prop_assert!(colour || !text.contains(ESCAPE), "an escape in plain text");
                for line in shown(&text).lines() {
                    prop_assert!(line.chars().count() <= width, "{width}: {line:?}");
                    // Wide and combining characters would take other numbers of columns.
                    prop_assert!(line.chars().all(|c| c < '\u{2b0}' || "™…–█▌▐▏·".contains(c)), "{line:?}");
                }
            }
        }
    }

    #[test]
    fn events_survive_the_trace_without_loss(
        events in prop::collection::vec((0usize..3, 0usize..3, 0usize..14, any::<usize>(), any::<usize>(),
            -1e6..1e6f64, 0.0..10.0f64, any::<u64>()), 0..30)
    ) {
        let tracks = [Track::Compute, Track::Host, Track::Copy];
        let kinds = [Kind::F, Kind::B, Kind::I, Kind::W, Kind::SendF, Kind::RecvF, Kind::SendB, Kind::RecvB];
        let events = events.into_iter().map(|(rank, track, what, stage, microbatch, start, took, bytes)| Event {
            rank,
            track: tracks[track],
            what: match kinds.get(what) {
                Some(&kind) => What::Action(Action::new(stage, kind, microbatch)),
                None => OTHERS[what - kinds.len()].0,
            },
            start,
            end: start + took,
            bytes,
        });
        let mut devices = DeviceName::list(["a \"quoted\"\nname", "", "GPU™ 漢字"]);
        (devices[1].number, devices[1].adapter) = (7, Some(3));
        let timeline = Timeline { devices, events: events.collect(), step: Some(40) };
        let read = Timeline::from_chrome_trace(&timeline.to_chrome_trace(), "trace.json").unwrap();
        let sorted = |timeline: &Timeline| {
            let mut events = timeline.events.clone();
            events.sort_by(|a, b| a.start.total_cmp(&b.start).then(a.what.to_string().cmp(&b.what.to_string())).then(a.bytes.cmp(&b.bytes)));
            events
        };
        prop_assert_eq!((&read.devices, read.step), (&timeline.devices, timeline.step));
        prop_assert_eq!(sorted(&read), sorted(&timeline));
        prop_assert_eq!(read.to_chrome_trace(), timeline.to_chrome_trace());
    }
}

#[test]
fn a_damaged_or_foreign_trace_is_refused_in_one_line_that_names_the_file() {
    let good = plan("1f1b", 2, 4).timeline().unwrap().to_chrome_trace();
    let foreign = r#"{"traceEvents":[{"name":"x","ph":"X","pid":1,"tid":1,"ts":0,"dur":1}]}"#;
    for (text, word) in [
        (String::new(), "damaged or not a trace"),
        (good[..good.len() / 2].into(), "damaged or not a trace"),
        ("{}".into(), "damaged or not a trace"),
        (foreign.into(), "not one that this version of polystage wrote"),
        (good.replace("\"tid\":3", "\"tid\":40"), "is damaged"),
        (good.replace("\"pid\":2", "\"pid\":3"), "is damaged"),
        (good.replace("\"devices\":[", "\"devices\":[\"no number\","), "not one that this version"),
        (good.replace("\"tid\":1,", "\"tid\":0,"), "is damaged"),
        (good.replace("start_seconds", "begin"), "is damaged"),
        (good.replace("\"cat\":\"forward\"", "\"cat\":\"sideways\""), "is damaged"),
        (good.replace("\"cat\":\"forward\"", "\"cat\":\"host\""), "is damaged"),
        (good.replace("\"microbatch\":3", "\"microbatch\":2"), "is damaged"),
        (good.replace("\"name\":\"N\"", "\"name\":\"rest\""), "is damaged"),
        (good.replace("\"end_seconds\":", "\"end_seconds\":-"), "is damaged"),
    ] {
        let message = one_line(Timeline::from_chrome_trace(&text, "runs/x/trace.json").unwrap_err());
        assert!(message.starts_with("runs/x/trace.json: ") && message.contains(word), "{message}");
        assert!(message.contains("polystage train"), "{message}");
    }
}

#[test]
fn every_view_names_a_device_by_its_number_and_not_by_its_rank() {
    let mut plan = plan("1f1b", 3, 6);
    for (device, number) in plan.devices.iter_mut().zip([40, 50, 60]) {
        (device.number, device.adapter) = (number, Some(7));
    }
    let comparison = compare(&plan);
    let lanes = comparison.to_terminal(100, false);
    assert!(lanes.starts_with("40 adapter 7: NVIDIA GeForce RTX 3090\n"), "{lanes}");
    assert!(comparison.shares_to_terminal(100, false).contains("\n60 predicted"));
    let actions = comparison.actions_to_terminal(100, false);
    let row = actions.lines().find(|line| line.starts_with("1 F")).unwrap();
    assert_eq!(row.split_whitespace().nth(2), Some("50"), "{actions}");
    let findings = comparison.findings().join("\n");
    assert!(
        findings.contains("device 60 computes") && findings.contains("stage 1 on device 50"),
        "{findings}"
    );
    assert!(!["device 0 ", "device 1 ", "device 2 "].iter().any(|device| findings.contains(device)));
    let json = comparison.to_json();
    assert_eq!((&json["devices"][2]["device"], &json["actions"][0]["device"]), (&60.into(), &40.into()));
    let svg = comparison.to_svg("numbers");
    assert!(svg.contains(">50</tspan>") && svg.contains("waits") && svg.contains("for device 50"), "{svg}");
    assert!(!svg.contains("device 1<"));
    assert!(plan.timeline().unwrap().to_svg("numbers").contains(">60</tspan>"));
}

/// The letters in front of the names in the legend below plain lanes, and those in the lanes.
fn legend_and_lanes(text: &str) -> (String, String) {
    let (lanes, others): (Vec<&str>, Vec<&str>) =
        text.lines().partition(|line| line.starts_with("  measured"));
    let legend = others[others.iter().rposition(|line| line.contains('|')).unwrap() + 1..].join("  ");
    let entries = legend.split("  ").filter(|entry| !entry.is_empty());
    let marks = entries.map(|entry| entry.trim().chars().next().unwrap()).collect();
    let drawn = lanes.iter().map(|lane| lane[12..].split("  busy").next().unwrap()).collect();
    (marks, drawn)
}

#[test]
fn the_legend_of_a_terminal_shows_what_is_drawn_and_nothing_else() {
    for (name, devices, microbatches, width) in
        [("1f1b", 1, 4, 200), ("1f1b", 2, 64, 80), ("zb-h1", 5, 20, 120), ("gpipe", 8, 16, 60)]
    {
        let plan = plan(name, devices, microbatches);
        let comparison = Comparison::new(None, &plan.timeline().unwrap()).unwrap();
        let (marks, lanes) = legend_and_lanes(&comparison.to_terminal(width, false));
        for mark in "FBIWO.".chars() {
            assert_eq!(
                marks.contains(mark),
                lanes.contains(mark),
                "{name} {width}: {mark} in {marks:?}, {lanes}"
            );
        }
    }
}

#[test]
fn a_legend_names_no_cause_that_takes_no_time() {
    // One device that never waits, but for rounding.
    let svg = compare_with_itself(&plan("1f1b", 1, 8)).to_svg("alone");
    assert!(!svg.contains("idle: "), "{svg}");
    let svg = compare_with_itself(&plan("1f1b", 3, 6)).to_svg("three");
    assert!(svg.contains("idle: warm-up") && svg.contains("idle: imbalance") && !svg.contains("idle: host"));
}

fn compare_with_itself(plan: &Prediction) -> Comparison {
    Comparison::new(Some(plan.clone()), &plan.timeline().unwrap()).unwrap()
}

#[test]
fn the_largest_cell_is_labelled_however_small_it_is() {
    for (name, devices, microbatches) in [
        ("1f1b", 1, 1),
        ("1f1b", 1, 400),
        ("zb-h1", 2, 2),
        ("1f1b", 2, 64),
        ("zb-h1", 5, 20),
        ("gpipe", 8, 256),
        ("zb-v", 8, 16),
    ] {
        let timeline = plan(name, devices, microbatches).timeline().unwrap();
        let longest = |e: &Event| if e.track == Track::Compute { e.end - e.start } else { 0.0 };
        let largest = timeline.events.iter().max_by(|a, b| longest(a).total_cmp(&longest(b))).unwrap();
        let seconds = longest(largest);
        let of_its_size = |e: &&Event| longest(e) > (1.0 - 1e-9) * seconds;
        let names: Vec<String> =
            timeline.events.iter().filter(of_its_size).map(|e| format!("<title>{} at", e.what)).collect();
        let svg = timeline.to_svg(name);
        let labelled =
            |line: &&str| line.contains("pointer-events") && names.iter().any(|name| line.contains(name));
        let line = svg.lines().find(labelled);
        let line = line.unwrap_or_else(|| panic!("{name} {devices} {microbatches}: no label on {names:?}"));
        // Within its cell, along and across.
        let number = |from: &str, key: &str| -> f64 {
            let at = from.find(key).unwrap() + key.len();
            from[at..].split('"').next().unwrap().parse().unwrap()
        };
        let (size, width) = (number(line, "font-size=\""), number(line, " width=\""));
        let text = line.rsplit("</text>").nth(1).and_then(|part| part.rsplit('>').next()).unwrap();
        let along = 0.62 * size * text.chars().count() as f64;
        match line.contains("rotate(-90") {
            true => assert!(size <= width && along <= 34.0, "{line}"),
            false => assert!(along <= width, "{line}"),
        }
    }
}
