//! Synthesised schedules against the published ones and against the optimum.

use polystage::error::Error;
use polystage::schedule::{
    Costs, Effort, NAMES, Schedule, Simulation, default_chunks, generate_chunked, grid, simulate,
    stage_ranks, synthesise,
};

use super::exact::shortest;
use super::machines::{Random, machine};

fn fits(simulation: &Simulation, costs: &Costs) -> bool {
    let budgets = costs.ranks.iter().map(|rank| rank.budget);
    simulation
        .slot_bytes
        .iter()
        .zip(budgets)
        .all(|(&bytes, budget)| budget.is_none_or(|budget| bytes <= budget))
}

/// The synthesised schedule's step; it is valid and fits.
fn synthesised(costs: &Costs, placement: &[usize], microbatches: usize, effort: Effort) -> f64 {
    let schedule = synthesise(costs, placement, microbatches, effort).unwrap();
    schedule.validate().unwrap();
    for (stage, &rank) in placement.iter().enumerate() {
        assert_eq!(schedule.rank_of(stage), Some(rank));
    }
    assert_eq!((schedule.name.as_str(), schedule.microbatches), ("auto", microbatches));
    let simulation = simulate(&schedule, costs).unwrap();
    assert!(fits(&simulation, costs), "{schedule}");
    simulation.step
}

/// Scales every stage so that all ranks have about the same work: the cases in which the order matters most.
fn balance(costs: &mut Costs, placement: &[usize], random: &mut Random) {
    for (stage, &rank) in placement.iter().enumerate() {
        let same_rank = placement.iter().filter(|&&other| other == rank).count() as f64;
        let cost = &mut costs.stages[stage];
        let factor = random.between(2.7, 3.3) / same_rank / (cost.forward + cost.input + cost.weight);
        for seconds in [&mut cost.forward, &mut cost.input, &mut cost.weight, &mut cost.backward] {
            *seconds *= factor;
        }
    }
}

/// Gives each rank room for some microbatches, more or less.
fn limit_memory(costs: &mut Costs, placement: &[usize], microbatches: usize, random: &mut Random) {
    for (rank, cost) in costs.ranks.iter_mut().enumerate() {
        if random.flip() {
            continue;
        }
        let mut room = random.below(50) as u64;
        for (stage, _) in placement.iter().enumerate().filter(|(_, other)| **other == rank) {
            let stashes = 1 + random.below(microbatches);
            let gradients = 1 + random.below(stashes);
            room +=
                stashes as u64 * costs.stages[stage].stash + gradients as u64 * costs.stages[stage].gradient;
        }
        cost.budget = Some(cost.fixed + room);
    }
}

/// The shortest step of the published schedules that have this placement and fit.
fn best_published(costs: &Costs, placement: &[usize], microbatches: usize) -> Option<(f64, Schedule)> {
    let ranks = costs.ranks.len();
    let chunks = placement.len() / ranks;
    let known =
        NAMES.iter().filter(|name| stage_ranks(name, ranks, chunks).is_ok_and(|known| known == placement));
    known
        .filter_map(|name| generate_chunked(name, ranks, chunks, microbatches).ok())
        .filter_map(|schedule| {
            let simulation = simulate(&schedule, costs).unwrap();
            fits(&simulation, costs).then_some((simulation.step, schedule))
        })
        .min_by(|a, b| a.0.total_cmp(&b.0))
}

#[test]
fn auto_is_never_worse_than_a_published_schedule_on_a_thousand_unequal_machines() {
    let mut random = Random(7);
    let (mut compared, mut better) = (0, 0);
    for case in 0..1000 {
        let name = NAMES[case % NAMES.len()];
        let (p, chunks) = (1 + random.below(4), default_chunks(name).unwrap());
        let m = (1 + random.below(8)).next_multiple_of(if name == "interleaved-1f1b" { p } else { 1 });
        let placement = stage_ranks(name, p, chunks).unwrap();
        let mut costs = machine(&mut random, &placement);
        if random.flip() {
            balance(&mut costs, &placement, &mut random);
        }
        if random.flip() {
            limit_memory(&mut costs, &placement, m, &mut random);
        }
        if random.below(8) == 0 {
            costs.cores = random.between(1.0, p as f64);
            costs.ranks.iter_mut().for_each(|rank| rank.cores = 1.0);
        }
        let step = synthesised(&costs, &placement, m, Effort::Quick);
        let Some((published, schedule)) = best_published(&costs, &placement, m) else { continue };
        compared += 1;
        // Sums of the same numbers in another order.
        assert!(step <= published * (1.0 + 1e-11), "case {case}: {step}, but {published} with\n{schedule}");
        better += usize::from(step < published * (1.0 - 1e-3));
    }
    // Budgets leave out some; where only the bottleneck's work counts there is nothing to gain.
    assert!(compared > 800 && better > 300, "{better} of {compared}");
}

#[test]
fn auto_is_within_two_percent_of_the_optimum() {
    let mut random = Random(11);
    let (mut proved, mut worst) = (0, 0.0_f64);
    for case in 0..300 {
        let p = 1 + random.below(3);
        let m = 1 + random.below(if p == 3 { 4 } else { 6 });
        let placement: Vec<usize> = (0..p).collect();
        let mut costs = machine(&mut random, &placement);
        if case % 4 > 0 {
            balance(&mut costs, &placement, &mut random);
        }
        if case % 2 == 0 {
            limit_memory(&mut costs, &placement, m, &mut random);
        }
        let step = synthesised(&costs, &placement, m, Effort::Quick);
        if let Some(optimum) = shortest(&costs, &placement, m, 20_000) {
            assert!(step >= optimum * (1.0 - 1e-9), "case {case}: {step} beats the oracle's {optimum}");
            worst = worst.max(step / optimum - 1.0);
            assert!(worst <= 0.02, "case {case} p={p} m={m}: {step}, optimum {optimum}");
            proved += 1;
        }
    }
    assert!(proved >= 280, "{proved} proved, worst {worst}");
}

#[test]
fn auto_is_within_two_percent_of_the_optimum_with_several_stages_a_rank() {
    let mut random = Random(13);
    let mut proved = 0;
    for case in 0..24 {
        let placement = [&[0, 1, 1, 0][..], &[0, 1, 0, 1], &[0, 1, 0], &[0, 0, 1]][case % 4];
        let m = 1 + random.below(3);
        let mut costs = machine(&mut random, placement);
        balance(&mut costs, placement, &mut random);
        // What the oracle's argument needs: a link's order must not depend on that of unlike stages.
        for hop in costs.hops.iter_mut().flat_map(|hops| [&mut hops.forward, &mut hops.backward]) {
            (hop.out, hop.copy, hop.into) = (0.0, 0.0, 0.0);
        }
        let step = synthesised(&costs, placement, m, Effort::Quick);
        if let Some(optimum) = shortest(&costs, placement, m, 20_000) {
            assert!(step >= optimum * (1.0 - 1e-9), "case {case}: {step} beats the oracle's {optimum}");
            assert!(step <= optimum * 1.02, "case {case} m={m}: {step}, optimum {optimum}");
            proved += 1;
        }
    }
    assert!(proved >= 16, "{proved}");
}

/// The oracle finds what is known in closed form: nothing ends before ZB-H1 where times are equal and as much memory is
/// there, and one microbatch passes all stages and returns.
#[test]
fn the_oracle_knows_the_published_optimum() {
    for (p, m) in [(2, 2), (2, 4), (3, 3)] {
        let schedule = generate_chunked("zb-h1", p, 1, m).unwrap();
        let costs = Costs::uniform(&schedule, 1.0, 1.0, 1.0, 0.0);
        let placement: Vec<usize> = (0..p).collect();
        let step = simulate(&schedule, &costs).unwrap().step;
        assert_eq!(shortest(&costs, &placement, m, 1_000_000), Some(step), "p={p} m={m}");
    }
    let schedule = generate_chunked("1f1b", 3, 1, 1).unwrap();
    let costs = Costs::uniform(&schedule, 1.0, 2.0, 0.5, 0.25);
    assert_eq!(shortest(&costs, &[0, 1, 2], 1, 1000), Some(3.0 * 3.0 + 0.5 + 4.0 * 0.25));
}

#[test]
fn auto_fills_the_bubble_of_equal_devices_as_far_as_memory_allows() {
    let like = generate_chunked("1f1b", 4, 1, 16).unwrap();
    let mut costs = Costs::uniform(&like, 1.0, 1.0, 1.0, 0.0);
    costs.stages.iter_mut().for_each(|stage| stage.stash = 1);
    let placement = [0, 1, 2, 3];
    assert_eq!(synthesised(&costs, &placement, 16, Effort::Quick), 3.0 * 16.0 + 3.0);
    let schedule = synthesise(&costs, &placement, 16, Effort::Quick).unwrap();
    let bytes: u64 = simulate(&schedule, &costs).unwrap().slot_bytes.iter().sum();
    assert!(bytes <= 16, "ZB-H1 is as short with 4 microbatches in flight on every rank, not {bytes} in all");
    // One microbatch at a time: rank 0 takes the next when all others have returned the gradient of the last.
    costs.ranks.iter_mut().for_each(|rank| rank.budget = Some(1));
    assert_eq!(synthesised(&costs, &placement, 16, Effort::Quick), 16.0 * (2.0 * 4.0 + 1.0));
}

#[test]
fn equal_costs_give_equal_schedules_and_effort_never_hurts() {
    let mut random = Random(17);
    for placement in [&[0, 1, 2][..], &[0, 1, 1, 0]] {
        let mut costs = machine(&mut random, placement);
        balance(&mut costs, placement, &mut random);
        let [least, quick] =
            [Effort::Least, Effort::Quick].map(|e| synthesise(&costs, placement, 6, e).unwrap());
        assert_eq!(quick, synthesise(&costs, placement, 6, Effort::Quick).unwrap());
        let thorough = synthesised(&costs, placement, 6, Effort::Thorough);
        let [least, quick] = [least, quick].map(|schedule| simulate(&schedule, &costs).unwrap().step);
        assert!(quick <= least && thorough <= least, "{least} {quick} {thorough}");
    }
}

#[test]
fn what_fits_nowhere_is_refused_with_the_missing_bytes() {
    let schedule = generate_chunked("1f1b", 3, 1, 4).unwrap();
    let mut costs = Costs::uniform(&schedule, 1.0, 1.0, 1.0, 0.0);
    costs.stages.iter_mut().for_each(|stage| (stage.stash, stage.gradient) = (100, 10));
    costs.ranks.iter_mut().for_each(|rank| rank.fixed = 1000);
    costs.ranks[1].budget = Some(1100);
    costs.ranks[2].budget = Some(900);
    let Err(Error::Config { place, message }) = synthesise(&costs, &[0, 1, 2], 4, Effort::Least) else {
        panic!("it cannot fit");
    };
    assert_eq!(place, "memory");
    assert!(
        message.contains("rank 1 lacks 10 bytes") && message.contains("rank 2 lacks 210 bytes"),
        "{message}"
    );
    assert!(!message.contains("rank 0"), "{message}");
    costs.ranks[1].budget = Some(1110);
    costs.ranks[2].budget = None;
    synthesised(&costs, &[0, 1, 2], 4, Effort::Quick);
}

#[test]
fn placements_that_are_none_are_refused() {
    let costs = machine(&mut Random(1), &[0, 1, 2]);
    for (placement, words) in [
        (&[0, 1, 3][..], "beyond the last"),
        (&[0, 1, 1], "rank 2 has no stage"),
        (&[0, 1], "costs.stages"),
        (&[], "at least 1"),
    ] {
        let text = synthesise(&costs, placement, 4, Effort::Quick).unwrap_err().to_string();
        assert!(text.contains(words), "{text}");
    }
    assert!(synthesise(&costs, &[0, 1, 2], 0, Effort::Quick).unwrap_err().is_input());
    assert!(synthesise(&Costs::default(), &[], 4, Effort::Quick).unwrap_err().is_input());
}

#[test]
fn a_synthesised_schedule_prints_draws_and_lowers_like_any_other() {
    let costs = machine(&mut Random(3), &[0, 1, 2]);
    let schedule = synthesise(&costs, &[0, 1, 2], 5, Effort::Least).unwrap();
    assert_eq!(schedule.to_string().parse::<Schedule>().unwrap(), schedule);
    assert!(grid(&schedule).contains("rank 2"));
    let lowered = schedule.lowered().unwrap();
    assert_eq!(simulate(&lowered, &costs).unwrap().step, simulate(&schedule, &costs).unwrap().step);
}
