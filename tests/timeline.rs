//! Timelines: busy shares, the SVG and the Chrome trace, on two devices in 1F1B and on hostile input.

use polystage::schedule::{Action, Kind};
use polystage::timeline::{DeviceName, Event, EventKind, Timeline, Track, What};
use proptest::prelude::*;
use serde_json::Value;

fn event(rank: usize, what: What, start: f64, end: f64) -> Event {
    let is_copy = matches!(what, What::Action(action) if action.kind.is_transfer());
    let (track, bytes) = if is_copy { (Track::Copy, 6_291_456) } else { (Track::Compute, 0) };
    Event { rank, track, what, start, end, bytes }
}

fn action(stage: usize, kind: Kind, microbatch: usize) -> What {
    What::Action(Action::new(stage, kind, microbatch))
}

/// One step of 1F1B on two unlike devices: the second is slower, and each hop takes a while. Times in ms.
fn one_f_one_b(microbatches: usize) -> Timeline {
    const HOP: f64 = 0.9;
    let (forward, backward) = ([3.1, 3.6], [6.0, 7.1]);
    let mut events = Vec::new();
    let mut free = [0.0f64; 2];
    let mut run = |rank: usize, what, ready: f64, took: f64, free: &mut [f64; 2]| {
        let start = free[rank].max(ready);
        free[rank] = start + took;
        events.push(event(rank, what, start / 1e3, free[rank] / 1e3));
        free[rank]
    };
    let mut sent = vec![0.0; microbatches];
    let (mut next_f, mut hops) = (0, Vec::new());
    for m in 0..microbatches {
        // Rank 0 warms up with two forwards, then one more after each backward.
        while next_f < microbatches && next_f < m + 2 {
            let end = run(0, action(0, Kind::F, next_f), 0.0, forward[0], &mut free);
            hops.push(event(0, action(0, Kind::SendF, next_f), end / 1e3, (end + HOP) / 1e3));
            sent[next_f] = end + HOP;
            next_f += 1;
        }
        run(1, action(1, Kind::F, m), sent[m], forward[1], &mut free);
        let end = run(1, action(1, Kind::B, m), 0.0, backward[1], &mut free);
        hops.push(event(1, action(1, Kind::SendB, m), end / 1e3, (end + HOP) / 1e3));
        run(0, action(0, Kind::B, m), end + HOP, backward[0], &mut free);
    }
    for rank in 0..2 {
        run(rank, What::UPDATE, 0.0, 2.4, &mut free);
    }
    events.extend(hops);
    Timeline {
        devices: DeviceName::list(["NVIDIA GeForce RTX 4070", "AMD Radeon RX 7800 XT (RADV NAVI32)"]),
        step: None,
        events,
    }
}

/// Every tag closed in order, every attribute quoted, every `&` a known entity.
pub fn assert_well_formed(xml: &str) {
    let mut open: Vec<&str> = Vec::new();
    let mut rest = xml;
    while let Some(at) = rest.find('<') {
        assert_text(&rest[..at]);
        let end = at + rest[at..].find('>').expect("an unclosed tag");
        let tag = &rest[at + 1..end];
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name));
        } else {
            assert_eq!(tag.matches('"').count() % 2, 0, "unpaired quotes in {tag}");
            assert_text(tag);
            if !tag.ends_with('/') {
                open.push(tag.split_whitespace().next().expect("a name"));
            }
        }
        rest = &rest[end + 1..];
    }
    assert_eq!(rest.trim(), "");
    assert!(open.is_empty(), "not closed: {open:?}");
}

fn assert_text(text: &str) {
    for (at, _) in text.match_indices('&') {
        assert!(["&amp;", "&lt;", "&gt;", "&quot;"].iter().any(|e| text[at..].starts_with(e)), "{text}");
    }
    assert!(!text.chars().any(|c| c.is_control() && c != '\n'), "{text:?}");
    assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
}

/// Asserts that the trace is JSON without overlaps, and returns how many events lie on each thread of each process.
fn assert_trace(trace: &str) -> std::collections::BTreeMap<(u64, u64), usize> {
    let trace: Value = serde_json::from_str(trace).expect("JSON");
    let (mut until, mut counts) = (std::collections::BTreeMap::new(), std::collections::BTreeMap::new());
    for event in trace["traceEvents"].as_array().expect("a list") {
        let pid = event["pid"].as_u64().expect("a process");
        if event["ph"] == "X" {
            let tid = event["tid"].as_u64().expect("a thread");
            let (ts, dur) =
                (event["ts"].as_f64().expect("a start"), event["dur"].as_f64().expect("a length"));
            assert!(dur >= 0.0);
            let before = until.insert((pid, tid), ts + dur).unwrap_or(f64::NEG_INFINITY);
            assert!(ts >= before - 1e-4, "{event} starts before {before} us");
            *counts.entry((pid, tid)).or_insert(0) += 1;
        } else {
            assert_eq!(event["ph"], "M");
        }
    }
    counts
}

#[test]
fn busy_counts_overlapping_compute_once_and_neither_copies_nor_the_host() {
    let timeline = Timeline {
        devices: DeviceName::list(["a", "b"]),
        step: None,
        events: vec![
            event(0, action(0, Kind::F, 0), 0.0, 4.0),
            event(0, action(0, Kind::B, 0), 3.0, 5.0),
            event(0, action(0, Kind::F, 1), 3.5, 4.5),
            Event { track: Track::Host, ..event(0, action(0, Kind::F, 2), 5.0, 8.0) },
            event(1, action(1, Kind::SendB, 0), 2.0, 10.0),
        ],
    };
    assert_eq!(timeline.busy_fraction(0), 0.5);
    assert_eq!(timeline.busy_fraction(1), 0.0);
    assert_eq!(timeline.busy_fraction(7), 0.0);
    assert_eq!(Timeline::default().busy_fraction(0), 0.0);
}

#[test]
fn the_picture_of_1f1b_is_well_formed_and_shows_devices_microbatches_and_shares() {
    let timeline = one_f_one_b(8);
    let svg = timeline.to_svg("GPT-2 on two GPUs, 1F1B, 8 microbatches");
    assert_well_formed(&svg);
    assert!(
        svg.contains("NVIDIA GeForce RTX 4070") && svg.contains(">7</text>") && svg.contains("time in ms")
    );
    for rank in 0..2 {
        assert!(svg.contains(&format!("busy {:.0} %", 100.0 * timeline.busy_fraction(rank))));
    }
    assert!(
        svg.contains("optimizer</text>") && !svg.contains("host</text>"),
        "the legend lists only what occurs"
    );
}

#[test]
fn the_picture_escapes_names_and_the_title() {
    let mut timeline = one_f_one_b(2);
    timeline.devices[0].name = "A<B> & \"C\" \u{1b}[0m".into();
    timeline.devices[1].name = "</title><script>".into();
    let svg = timeline.to_svg("</svg> & more");
    assert_well_formed(&svg);
    assert!(!svg.contains("<script>") && svg.contains("A&lt;B&gt; &amp; &quot;C&quot;"));
}

#[test]
fn the_trace_of_1f1b_has_a_process_for_each_device_with_a_thread_for_compute_and_one_for_copies() {
    let mut timeline = one_f_one_b(8);
    (timeline.devices[0].number, timeline.devices[0].adapter) = (2, Some(5));
    let trace = timeline.to_chrome_trace();
    let counts = assert_trace(&trace).into_iter().collect::<Vec<_>>();
    assert_eq!(counts, [((1, 1), 17), ((1, 3), 8), ((2, 1), 17), ((2, 3), 8)]);
    let parsed: Value = serde_json::from_str(&trace).unwrap();
    let named = |what: &str| -> Vec<(u64, u64, String)> {
        let events = parsed["traceEvents"].as_array().unwrap().iter().filter(|e| e["name"] == what);
        let number = |value: &Value| value.as_u64().unwrap();
        let name = |e: &Value| e["args"]["name"].as_str().unwrap().to_string();
        events.map(|e| (number(&e["pid"]), number(&e["tid"]), name(e))).collect()
    };
    let processes =
        ["device 2 (adapter 5: NVIDIA GeForce RTX 4070)", "device 1 (AMD Radeon RX 7800 XT (RADV NAVI32))"];
    assert_eq!(named("process_name"), [(1, 0, processes[0].into()), (2, 0, processes[1].into())]);
    let threads = named("thread_name");
    assert_eq!(threads.len(), 6);
    assert_eq!(threads[5], (2, 3, "copies".into()));
    assert!(trace.contains("\"polystage\""));
    assert!(trace.contains("\"bytes\":6291456") && trace.contains("\"microbatch\":7"));
}

#[test]
fn a_long_run_is_shown_in_seconds() {
    let events = vec![event(0, action(0, Kind::F, 0), 100.0, 130.0)];
    let svg = Timeline { devices: DeviceName::list(["a"]), events, step: None }.to_svg("long");
    assert!(svg.contains("time in s") && svg.contains(">105</text>") && svg.contains("busy 100 %"));
}

/// Everything that is done once a step, with its label.
pub const OTHERS: [(What, &str); 6] = [
    (What::CLEAR, "C"),
    (What::Action(Action::of_stage(12, Kind::R)), "12R"),
    (What::NORM, "N"),
    (What::UPDATE, "U"),
    (What::Action(Action::of_stage(3, Kind::G)), "3G"),
    (What::Losses, "losses"),
];

const KINDS: [(Kind, &str, EventKind); 8] = [
    (Kind::F, "F", EventKind::Forward),
    (Kind::B, "B", EventKind::Backward),
    (Kind::I, "I", EventKind::BackwardInput),
    (Kind::W, "W", EventKind::BackwardWeight),
    (Kind::SendF, "SEND_F", EventKind::Copy),
    (Kind::RecvF, "RECV_F", EventKind::Copy),
    (Kind::SendB, "SEND_B", EventKind::Copy),
    (Kind::RecvB, "RECV_B", EventKind::Copy),
];

#[test]
fn label_kind_and_microbatch_follow_from_what_was_done_and_where() {
    for (kind, name, on_device) in KINDS {
        let event = event(1, action(2, kind, 5), 0.0, 1.0);
        assert_eq!((event.what.to_string(), event.kind()), (format!("2{name}5"), on_device));
        assert_eq!(event.microbatch(), (!kind.is_transfer()).then_some(5));
        let host = Event { track: Track::Host, ..event };
        assert_eq!((host.kind(), host.microbatch()), (EventKind::Host, None));
    }
    for (what, label) in OTHERS {
        let event = event(0, what, 0.0, 1.0);
        assert_eq!((what.to_string().as_str(), event.kind()), (label, EventKind::Optimizer));
        assert_eq!(Event { track: Track::Copy, ..event }.kind(), EventKind::Copy);
        assert_eq!(event.microbatch(), None);
    }
}

#[test]
fn every_kind_of_event_survives_the_trace_on_every_track() {
    let actions = KINDS.into_iter().map(|(kind, ..)| action(7, kind, 11));
    let whats = actions.chain(OTHERS.into_iter().map(|(what, _)| what));
    let tracks = [Track::Compute, Track::Host, Track::Copy];
    let mut events: Vec<Event> = tracks
        .into_iter()
        .flat_map(|track| whats.clone().map(move |what| Event { track, ..event(0, what, 0.0, 0.0) }))
        .collect();
    for (at, event) in events.iter_mut().enumerate() {
        (event.start, event.end, event.bytes) = (at as f64, at as f64 + 0.1, at as u64);
    }
    let timeline = Timeline { devices: DeviceName::list(["a"]), events, step: Some(3) };
    let read = Timeline::from_chrome_trace(&timeline.to_chrome_trace(), "trace.json").unwrap();
    assert_eq!(read, timeline);
}

/// A trace as versions before this one wrote it, an event of each kind.
#[test]
fn a_trace_of_an_earlier_version_is_read() {
    let event = |tid: usize, name: &str, cat: &str, more: &str| {
        format!(
            r#"{{"name":"{name}","cat":"{cat}","ph":"X","pid":1,"tid":{tid},"ts":0.0,"dur":1.0,"args":{{"start_seconds":0.0,"end_seconds":1e-6{more}}}}}"#
        )
    };
    let events = [
        event(1, "clear", "optimizer", ""),
        event(1, "0F3", "forward", r#","microbatch":3"#),
        event(1, "tied gradient", "optimizer", ""),
        event(1, "norm", "optimizer", ""),
        event(1, "step", "optimizer", ""),
        event(2, "0F3", "host", ""),
        event(3, "0RECV_B3", "copy", r#","bytes":8"#),
        event(3, "tied weight", "copy", r#","bytes":4"#),
    ];
    let trace = format!(
        r#"{{"displayTimeUnit":"ms","otherData":{{"polystage":{{"step":1,"devices":[{{"number":0,"adapter":null,"name":"a"}}]}}}},"traceEvents":[{}]}}"#,
        events.join(",\n")
    );
    let read = Timeline::from_chrome_trace(&trace, "trace.json").unwrap();
    let found: Vec<What> = read.events.iter().map(|event| event.what).collect();
    let done = [
        What::CLEAR,
        action(0, Kind::F, 3),
        What::Action(Action::of_stage(0, Kind::R)),
        What::NORM,
        What::UPDATE,
        action(0, Kind::F, 3),
        action(0, Kind::RecvB, 3),
        What::Action(Action::of_stage(0, Kind::G)),
    ];
    assert_eq!(found, done);
}

proptest! {
    #[test]
    fn any_times_give_well_formed_output_without_overlaps(
        times in prop::collection::vec((0usize..4, any::<bool>(), prop_oneof![
            (0.0..5.0f64, 0.0..0.5f64),
            (-1e9..1e9f64, -1.0..1e-9f64),
            (prop::num::f64::ANY, prop::num::f64::ANY),
        ]), 0..30)
    ) {
        let events = times.into_iter().enumerate().map(|(i, (rank, copy, (start, took)))| {
            let kind = if copy { Kind::RecvB } else { Kind::I };
            event(rank, action(0, kind, i), start, start + took)
        });
        let timeline = Timeline { devices: DeviceName::list(["only one is named"]), events: events.collect(), step: None };
        assert_well_formed(&timeline.to_svg("any"));
        for rank in 0..4 {
            prop_assert!((0.0..=1.0 + 1e-9).contains(&timeline.busy_fraction(rank)));
        }
        serde_json::from_str::<Value>(&timeline.to_chrome_trace()).expect("JSON");
        // Beyond a few years in nanoseconds f64 cannot tell neighbours apart.
        if timeline.events.iter().all(|e| e.start.abs() < 1e6 && e.end.abs() < 1e6) {
            assert_trace(&timeline.to_chrome_trace());
        }
    }
}
