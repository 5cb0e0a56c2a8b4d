//! Bubble and memory of the named schedules against the formulas of their papers.

use polystage::schedule::{
    Costs, NAMES, Schedule, Simulation, default_chunks, generate, generate_chunked, simulate,
};

/// Durations of F, I and W.
#[derive(Clone, Copy, Debug)]
struct Times {
    f: f64,
    i: f64,
    w: f64,
}

const EQUAL: Times = Times { f: 1.0, i: 1.0, w: 1.0 };
/// As the zero-bubble paper finds them in a transformer: W takes less than F, and I and W together twice as long.
const TRANSFORMER: Times = Times { f: 1.0, i: 1.25, w: 0.75 };

/// Free links; a stash weighs one byte and what I leaves to W nothing, so that bytes count microbatches.
fn run(schedule: &Schedule, times: Times) -> Simulation {
    let mut costs = Costs::uniform(schedule, times.f, times.i, times.w, 0.0);
    costs.stages.iter_mut().for_each(|stage| stage.stash = 1);
    simulate(schedule, &costs).unwrap()
}

/// Every schedule with this name for up to 8 ranks and 32 microbatches.
fn all(name: &str, chunks: usize) -> impl Iterator<Item = (usize, usize, Schedule)> {
    (1..=8).flat_map(move |p| {
        let fits = move |m: &usize| name != "interleaved-1f1b" || m.is_multiple_of(p);
        (1..=32).filter(fits).map(move |m| (p, m, generate_chunked(name, p, chunks, m).unwrap()))
    })
}

/// Seconds of a rank's computations.
fn work(schedule: &Schedule, times: Times) -> f64 {
    (schedule.microbatches * schedule.stages / schedule.ranks.len()) as f64 * (times.f + times.i + times.w)
}

#[track_caller]
fn assert_close(found: f64, expected: f64, what: &str) {
    assert!((found - expected).abs() < 1e-9, "{what}: {found}, expected {expected}");
}

#[test]
fn gpipe_and_both_1f1b_have_their_published_bubble() {
    for name in ["gpipe", "1f1b", "eager-1f1b"] {
        for times in [EQUAL, TRANSFORMER] {
            for (p, m, schedule) in all(name, 1) {
                let what = format!("{name} p={p} m={m} {times:?}");
                let simulation = run(&schedule, times);
                let Times { f, i, w } = times;
                let bubble = (p - 1) as f64 * (f + i + w);
                assert_close(simulation.makespan - work(&schedule, times), bubble, &what);
                assert_close(simulation.bubble, (p - 1) as f64 / (m + p - 1) as f64, &what);
            }
        }
    }
}

#[test]
fn interleaving_divides_the_bubble_by_the_number_of_chunks() {
    for chunks in 2..=4 {
        for times in [EQUAL, TRANSFORMER] {
            for (p, m, schedule) in all("interleaved-1f1b", chunks) {
                let what = format!("p={p} m={m} v={chunks} {times:?}");
                let Times { f, i, w } = times;
                // The whole rank takes `chunks` times as long as one of its stages.
                let of_a_rank = chunks as f64 * (f + i + w);
                let bubble = (p - 1) as f64 * of_a_rank / chunks as f64;
                assert_close(run(&schedule, times).makespan - work(&schedule, times), bubble, &what);
            }
        }
    }
}

/// Table 2 of the paper for at least as many microbatches as stages, Appendix H for at most as many.
#[test]
fn zb_h1_has_its_published_bubble() {
    for times in [EQUAL, TRANSFORMER] {
        for (p, m, schedule) in all("zb-h1", 1) {
            let what = format!("p={p} m={m} {times:?}");
            let Times { f, i, w } = times;
            let makespan = run(&schedule, times).makespan;
            if m >= p {
                let bubble = (p - 1) as f64 * (f + i - w);
                assert_close(makespan - work(&schedule, times), bubble, &what);
            }
            if m <= p {
                assert_close(makespan, (m + p - 1) as f64 * (f + i) + w, &what);
            }
        }
    }
}

/// The paper's bubble of ZB-H2 and ZB-V is that of a rank between its own first and last action, as no rank waits for
/// others before its optimizer step. It vanishes once the pipeline fills.
#[test]
fn zb_h2_and_zb_v_leave_no_rank_idle_between_its_first_and_last_action() {
    for (name, chunks) in [("zb-h2", 1), ("zb-v", 2)] {
        for (p, m, schedule) in all(name, chunks) {
            let simulation = run(&schedule, EQUAL);
            for (rank, idle) in simulation.idle.iter().enumerate() {
                let what = format!("{name} p={p} m={m} rank {rank}");
                let inside = idle.imbalance + idle.link + idle.host;
                if m >= 2 * p - 1 {
                    assert_close(inside, 0.0, &what);
                }
                assert_close(
                    idle.warm_up + idle.drain + inside,
                    simulation.makespan - work(&schedule, EQUAL),
                    &what,
                );
            }
            if m >= 2 * p - 1 {
                let staggered = (p - 1) as f64;
                assert_close(simulation.makespan - work(&schedule, EQUAL), staggered, "ranks start in turn");
            }
        }
    }
}

/// With a barrier before the optimizer step, as here, ZB-H2 takes as long as ZB-H1, also for few microbatches.
#[test]
fn zb_h2_ends_when_zb_h1_does_if_all_ranks_wait_for_each_other() {
    for (p, m, h2) in all("zb-h2", 1) {
        let h1 = generate("zb-h1", p, m).unwrap();
        assert_close(run(&h2, EQUAL).makespan, run(&h1, EQUAL).makespan, &format!("p={p} m={m}"));
    }
}

#[test]
fn stages_keep_as_many_microbatches_as_published() {
    for name in ["gpipe", "1f1b", "eager-1f1b", "zb-h1", "zb-h2"] {
        for (p, m, schedule) in all(name, 1) {
            let published = |stage: usize| match name {
                "gpipe" => m,
                "1f1b" => p - stage,
                "eager-1f1b" => 2 * (p - stage) - 1,
                "zb-h1" => p,
                _ => 2 * p - 1,
            };
            let expected: Vec<usize> = (0..p).map(|stage| published(stage).min(m)).collect();
            let simulation = run(&schedule, EQUAL);
            assert_eq!(simulation.peak_in_flight, expected, "{name} p={p} m={m}");
            assert_eq!(simulation.peak_bytes, expected.iter().map(|&n| n as u64).collect::<Vec<_>>());
            let slots: Vec<usize> = (0..p).map(|stage| schedule.slots(stage, stage).count).collect();
            assert_eq!(slots, expected, "{name} p={p} m={m}");
        }
    }
}

/// Between I and W of the zero-bubble schedules: stage `s` keeps W of `s` microbatches waiting in ZB-H1, of `2s` in ZB-H2
/// (Table 2: `(i-1) M_W` and `(2i-2) M_W` for stage `i`), and the one of which I is running.
#[test]
fn weight_gradients_wait_as_long_as_published() {
    for (name, factor) in [("zb-h1", 1), ("zb-h2", 2)] {
        for (p, m, schedule) in all(name, 1).filter(|&(p, m, _)| m >= 2 * p - 1) {
            for stage in 0..p {
                let count = schedule.gradient_slots(stage, stage).count;
                assert_eq!(count, factor * stage + 1, "{name} p={p} m={m} stage {stage}");
            }
        }
    }
}

#[test]
fn interleaved_ranks_keep_megatrons_warm_up_and_one_more() {
    for chunks in 2..=4 {
        for (p, m, schedule) in all("interleaved-1f1b", chunks) {
            let warm_up = |rank: usize| (2 * (p - rank - 1) + (chunks - 1) * p + 1).min(chunks * m) as u64;
            let expected: Vec<u64> = (0..p).map(warm_up).collect();
            assert_eq!(run(&schedule, EQUAL).peak_bytes, expected, "p={p} m={m} v={chunks}");
        }
    }
}

/// `2p` stashes of half a rank's layers: as much as 1F1B keeps on its first rank. Where each stage has its own buffers,
/// they add up to one more on all ranks but the last.
#[test]
fn zb_v_keeps_the_same_on_every_rank() {
    for (p, m, schedule) in all("zb-v", 2) {
        let simulation = run(&schedule, EQUAL);
        let (full, most) = (2 * p as u64, 2 * m.min(p) as u64);
        for rank in 0..p {
            let peak = simulation.peak_bytes[rank];
            if m >= 2 * p {
                assert_eq!(peak, full, "p={p} m={m} rank {rank}");
            }
            assert!(peak <= full && peak <= 2 * m as u64, "p={p} m={m} rank {rank}: {peak} of {most}");
            assert!(simulation.slot_bytes[rank] <= full + 1, "p={p} m={m} rank {rank}");
        }
    }
}

/// 3 stages, 16 microbatches; the percentages come from an independent list scheduler, written before this one.
#[test]
fn hops_cost_what_an_independent_scheduler_says() {
    for (name, hop, percent) in [
        ("gpipe", 0.25, 12.7),
        ("gpipe", 0.5, 14.3),
        ("gpipe", 1.0, 17.2),
        ("1f1b", 0.25, 20.0),
        ("1f1b", 0.5, 27.3),
        ("1f1b", 1.0, 38.5),
        ("eager-1f1b", 0.25, 12.7),
        ("eager-1f1b", 0.5, 14.3),
        ("eager-1f1b", 1.0, 17.2),
        ("zb-h1", 0.25, 7.7),
        ("zb-h1", 0.5, 11.1),
        ("zb-h1", 1.0, 27.3),
    ] {
        let schedule = generate(name, 3, 16).unwrap();
        let simulation = simulate(&schedule, &Costs::uniform(&schedule, 1.0, 1.0, 1.0, hop)).unwrap();
        assert!((100.0 * simulation.bubble - percent).abs() < 0.05, "{name} {hop}: {}", simulation.bubble);
    }
}

#[test]
fn a_name_says_how_many_chunks_it_can_have() {
    for name in NAMES {
        let chunks = default_chunks(name).unwrap();
        assert_eq!(generate(name, 4, 8).unwrap().stages, 4 * chunks);
        for wrong in [0, 3, usize::MAX] {
            if (*name, wrong) == ("interleaved-1f1b", 3) {
                continue;
            }
            let error = generate_chunked(name, 4, wrong, 8).unwrap_err();
            assert!(error.is_input(), "{name} {wrong}: {error}");
        }
    }
    let text = generate("interleaved-1f1b", 4, 6).unwrap_err().to_string();
    assert!(text.contains("use 4 or 8"), "{text}");
    let text = generate("interleaved-1f1b", 4, 3).unwrap_err().to_string();
    assert!(text.contains("use 4"), "{text}");
}
