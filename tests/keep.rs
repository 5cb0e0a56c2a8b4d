//! Whether a run that goes on keeps its plan. No GPU: machines are imagined.

use polystage::plan::{Machine, Planned};
use polystage::schedule::NAMES;
use polystage::timeline::Prediction;
use polystage::train::advice::StepTimes;
use polystage::train::keep::{Before, keep};
use polystage::train::planning::Planning;

use crate::common::cut_at;

use crate::advice::{config, machine};

fn planning(choices: &[&str], cards: Machine) -> Planning {
    Planning::for_machine(&config(choices), cards, None).unwrap()
}

/// A run over two cards whose plan was chosen by hand, for these speeds.
fn before(choices: &[&str], speeds: &[f64]) -> Before {
    let planning = planning(&[&["pipeline.devices=2"], choices].concat(), machine(speeds));
    let plan = planning.search().unwrap().best;
    Before { prediction: Prediction::of_plan(&plan, planning.names()), steps: Vec::new() }
}

/// What the run goes on with where so much is fixed, what the planner finds best, and what is said.
fn goes_on(planning: &Planning, before: &Before) -> (Planned, Planned, Option<String>) {
    let best = planning.search().unwrap();
    let (planned, changed) = keep(planning, best.clone(), before).unwrap();
    (planned, best, changed)
}

#[test]
fn a_run_keeps_its_plan_while_another_is_not_surely_faster() {
    let free = planning(&[], machine(&[1.0, 0.9]));
    let least = free.search().unwrap().best.simulation.expected;
    // A schedule that is not the best, by little.
    let run = NAMES.iter().map(|name| before(&[&format!("pipeline.schedule={name}")], &[1.0, 0.9]));
    let is_close =
        |run: &Before| (0.003..0.04).contains(&(1.0 - least / run.prediction.simulate().unwrap().expected));
    let run = run.into_iter().find(is_close).expect("a schedule that is nearly as good");
    let (planned, best, changed) = goes_on(&free, &run);
    assert_eq!((planned.best.schedule.to_string(), changed), (run.prediction.schedule.clone(), None));
    assert_eq!(planned.best.cuts(), run.prediction.cuts);
    assert_ne!(planned.best.schedule, best.best.schedule);
    assert_eq!(planned.alternatives[0].schedule, best.best.schedule, "what is faster is shown");
    assert_eq!(planned.best.simulation.slot_bytes.len(), 2);

    // What is best is kept too.
    let prediction = Prediction::of_plan(&best.best, free.names());
    let (planned, best, changed) = goes_on(&free, &Before { prediction, steps: Vec::new() });
    assert!(planned == best && changed.is_none(), "{changed:?}");
}

#[test]
fn a_run_changes_its_plan_for_one_that_is_surely_faster_and_says_so() {
    let free = planning(&[], machine(&[1.0, 1.0]));
    let mut run = before(&["pipeline.cuts=[2]"], &[1.0, 1.0]);
    let (planned, _, changed) = goes_on(&free, &run);
    let changed = changed.expect("changes");
    assert_ne!(planned.best.cuts(), cut_at(&[2]));
    assert!(
        changed.starts_with("from ") && changed.contains(" on card 0 + card 1 cut at 2 to "),
        "{changed}"
    );
    assert!(changed.contains(", predicted ") && changed.contains(" a step instead of "), "{changed}");
    assert_eq!(planned.best.microbatches, 8);

    // Where its steps took half as long again as is predicted of them, predictions are not to be trusted so far.
    let seconds = 1.5 * run.prediction.simulate().unwrap().expected;
    run.steps = (1..=12).map(|step| StepTimes { step, seconds, busy: vec![0.5; 2] }).collect();
    let (planned, _, changed) = goes_on(&free, &run);
    assert_eq!((planned.best.cuts(), changed), (cut_at(&[2]), None));
}

#[test]
fn a_run_changes_its_plan_where_it_cannot_keep_it_or_is_told_to() {
    let run = before(&["pipeline.cuts=[7]"], &[1.0, 1.0]);
    let changed = |planning: &Planning| goes_on(planning, &run).2.expect("changes");
    let said = changed(&planning(&[], machine(&[1.0])));
    assert!(said.ends_with("because a device of the old plan is not here"), "{said}");
    let said = changed(&planning(&["pipeline.schedule=gpipe"], machine(&[1.0, 1.0])));
    assert!(said.contains(" to gpipe of 8 microbatches on ") && said.contains(" instead of "), "{said}");
    let said = changed(&planning(&["pipeline.devices=2", "pipeline.cuts=[6]"], machine(&[1.0, 1.0])));
    assert!(said.contains(" cut at 7 to ") && said.contains(" cut at 6, "), "{said}");

    let mut small = planning(&[], machine(&[1.0, 1.0]));
    let bytes = small.search().unwrap().best.simulation.slot_bytes[0];
    small.limit(vec![Some(bytes / 2), None]);
    let said = changed(&small);
    assert!(said.ends_with("because the old plan does not fit any more"), "{said}");
}
