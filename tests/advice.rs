//! What `trace` advises: what the planner says of whole plans with what was measured, and nothing that is not surely
//! faster. No GPU: what is "measured" is the simulation of a machine that is not the one that was planned for, so that the
//! truth is known.

use std::path::Path;

use polystage::plan::{Candidate, Machine};
use polystage::timeline::{DeviceName, Prediction, Timeline};
use polystage::train::advice::{Advice, StepTimes, advise, freed, improve};
use polystage::train::config::Config;
use polystage::train::planning::Planning;
use serde_json::{Value, json};

use crate::common::cut_at;

const CONFIG: &str = "
[model]
kind = 'gpt2'
layers = 12
width = 256
heads = 4
context = 128
vocabulary = 256
[data]
train = ['unused']
[train]
steps = 100
batch = 8
sequence = 128
[pipeline]
microbatches = 8
";

/// Cards with these speeds, 1 for 1000 GFLOP/s.
pub fn machine(speeds: &[f64]) -> Machine {
    let mut text = String::from("name = 'cards'\nlink = { latency_us = 20, gb_s = 5 }\n");
    for (number, speed) in speeds.iter().enumerate() {
        text += &format!(
            "[[devices]]\nname = 'card {number}'\ncores = 0\ncopy_engine = false\nrates = {{ matmul_gflops = {}, \
             memory_gb_s = {}, launch_us = 2, submit_us = 20, barrier_us = 50 }}\n",
            1000.0 * speed,
            100.0 * speed
        );
    }
    Machine::parse(&text, "test").unwrap()
}

pub fn config(choices: &[&str]) -> Config {
    let choices: Vec<String> = choices.iter().map(|choice| choice.to_string()).collect();
    Config::parse(CONFIG, &choices, "test").unwrap()
}

/// A run as it would be measured: planned for one machine, on another.
struct Case {
    config: Config,
    planned_for: Machine,
    planning: Planning,
    plan: Candidate,
    prediction: Prediction,
    timeline: Timeline,
    steps: Vec<StepTimes>,
}

impl Case {
    fn new(choices: &[&str], planned_for: Machine, real: &Machine) -> Case {
        let config = config(choices);
        let planning = Planning::for_machine(&config, planned_for.clone(), None).unwrap();
        let plan = planning.search().unwrap().best;
        let names: Vec<DeviceName> = (0..planned_for.devices.len())
            .map(|number| DeviceName { number, adapter: Some(number), name: format!("card {number}") })
            .collect();
        let prediction = Prediction::of_plan(&plan, &names);
        let truth = Prediction::of_plan(&in_truth(&planning, &plan, real), &names);
        let mut timeline = truth.timeline().unwrap();
        timeline.step = Some(12);
        let seconds = truth.simulate().unwrap().expected;
        let busy: Vec<f64> = (0..plan.devices.len()).map(|rank| timeline.busy_fraction(rank)).collect();
        let steps = (1..=12).map(|step| StepTimes { step, seconds, busy: busy.clone() }).collect();
        Case { config, planned_for, planning, plan, prediction, timeline, steps }
    }

    fn advice(&self) -> Advice {
        let freed = freed(&self.config, self.planned_for.clone()).unwrap();
        let present = freed.predicted(&self.prediction).unwrap();
        assert_eq!(present.stages, self.plan.stages);
        improve(freed, &present, &self.prediction, &self.config, &self.steps, &self.timeline).unwrap()
    }
}

/// What a plan is on another machine.
fn in_truth(planning: &Planning, plan: &Candidate, real: &Machine) -> Candidate {
    let mut planning = planning.clone();
    planning.machine = real.clone();
    planning.again(plan).unwrap()
}

#[test]
fn following_the_advice_makes_no_step_longer_by_more_than_three_percent() {
    let cases: [(&[&str], &[f64], &[f64]); 10] = [
        // Poor cuts, poor schedules, poor orders; devices as known, slower, faster, and not alike.
        (&["pipeline.devices=2", "pipeline.cuts=[3]"], &[1.0, 1.0], &[1.0, 1.0]),
        (&["pipeline.devices=2", "pipeline.cuts=[7]"], &[1.0, 0.25], &[1.0, 0.25]),
        (&["pipeline.devices=2", "pipeline.cuts=[7]"], &[0.25, 1.0], &[0.25, 1.0]),
        (&["pipeline.devices=2", "pipeline.cuts=[7]"], &[1.0, 1.0], &[1.0, 0.5]),
        (&["pipeline.devices=2", "pipeline.cuts=[12]"], &[1.0, 1.0], &[0.7, 0.6]),
        (&["pipeline.devices=2", "pipeline.schedule=gpipe"], &[1.0, 1.0], &[1.0, 1.0]),
        (&["pipeline.devices=2", "pipeline.schedule=gpipe", "pipeline.cuts=[5]"], &[1.0, 0.5], &[1.1, 0.4]),
        (&["pipeline.devices=3", "pipeline.cuts=[5,9]"], &[1.0, 1.0, 0.3], &[1.0, 0.9, 0.3]),
        (&["pipeline.devices=2"], &[1.0, 0.05], &[1.0, 0.05]),
        (&["pipeline.devices=2"], &[1.0, 1.0], &[1.0, 1.0]),
    ];
    let (mut followed, mut shorter) = (0, 0);
    for (choices, known, real) in cases {
        let real = machine(real);
        let case = Case::new(choices, machine(known), &real);
        let before = in_truth(&case.planning, &case.plan, &real).simulation.expected;
        let Advice::Change(change) = case.advice() else { continue };
        let after = in_truth(&case.planning, &change.plan, &real).simulation.expected;
        assert!(after <= 1.03 * before, "{choices:?}: {before} s, {after} s after {}", change.what);
        followed += 1;
        shorter += usize::from(after <= 0.95 * before);
        assert_eq!(change.plan.microbatches, case.plan.microbatches);
    }
    assert!(followed >= 6 && shorter == followed, "{followed} with advice, {shorter} of them shorter");
}

#[test]
fn layers_are_priced_at_the_speed_of_the_device_that_would_get_them() {
    // The second card has a tenth of the layers and is idle most of the time, but at its speed that is all it can do.
    let slow = machine(&[1.0, 0.1]);
    let case = Case::new(&["pipeline.devices=2"], slow.clone(), &slow);
    match case.advice() {
        Advice::Keep { gain, unsure, what, .. } => {
            assert!(gain < unsure && unsure >= 0.05 && (gain > 0.0 || what.is_empty()));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn advice_changes_no_more_than_it_must_and_fixes_it_with_keys_of_a_config() {
    let cards = machine(&[1.0, 1.0]);
    let case = Case::new(
        &["pipeline.devices=2", "pipeline.schedule=1f1b", "pipeline.cuts=[3]"],
        cards.clone(),
        &cards,
    );
    let Advice::Change(change) = case.advice() else { panic!("uneven") };
    assert!(change.gain > 0.2, "{}", change.gain);
    let again: Vec<&str> = change.settings.iter().map(String::as_str).collect();
    let fixed = Planning::for_machine(&config(&again), cards, None).unwrap().search().unwrap().best;
    assert_eq!((fixed.stages, fixed.schedule), (change.plan.stages, change.plan.schedule));
    assert!(change.settings[0] == "pipeline.devices=[0,1]" && change.what.contains("layers instead of"));
}

#[test]
fn budgets_are_kept() {
    let cards = machine(&[1.0, 1.0]);
    let free = Case::new(&["pipeline.devices=2", "pipeline.cuts=[3]"], cards.clone(), &cards);
    let Advice::Change(change) = free.advice() else { panic!("uneven") };
    let enough = free.plan.simulation.slot_bytes[0];
    assert!(change.plan.simulation.slot_bytes[0] > enough);
    let mut tight = cards;
    tight.devices[0].memory = Some(enough);
    let case = Case::new(&["pipeline.devices=2", "pipeline.cuts=[3]"], tight.clone(), &tight);
    if let Advice::Change(change) = case.advice() {
        let rank = change.plan.devices.iter().position(|&device| device == 0).expect("both are used");
        assert!(change.plan.simulation.slot_bytes[rank] <= enough, "{change:?}");
    }
}

#[test]
fn what_steps_vary_by_and_what_the_correction_leaves_open_silences_smaller_gains() {
    let cards = machine(&[1.0, 1.0]);
    let case = || Case::new(&["pipeline.devices=2", "pipeline.cuts=[6]"], cards.clone(), &cards);
    let Advice::Change(sure) = case().advice() else { panic!("uneven") };
    let mut wandering = case();
    for step in &mut wandering.steps {
        step.seconds *= if step.step % 2 == 0 { 1.0 - sure.gain } else { 1.0 + 2.0 * sure.gain };
    }
    let Advice::Keep { what, gain, unsure, why } = wandering.advice() else { panic!("unsteady") };
    assert!(
        what.contains("layers instead of")
            && 0.0 < gain
            && gain < unsure
            && why.contains("differ by as much")
    );
    let mut unexplained = case();
    for step in &mut unexplained.steps {
        // Longer steps in which the devices work no longer.
        step.seconds *= 1.0 + 2.0 * sure.gain;
        step.busy.iter_mut().for_each(|busy| *busy /= 1.0 + 2.0 * sure.gain);
    }
    let Advice::Keep { what, why, .. } = unexplained.advice() else { panic!("unexplained") };
    assert!(what.contains("layers instead of") && why.contains("even with the speeds"), "{why}");
    let (words, report) = trace(folder(&unexplained).path());
    assert!(
        words.contains(&format!("the best one ({what}) is said to save ")) && words.contains(&why),
        "{words}"
    );
    assert_eq!((&report["not_sure"]["what"], &report["advice"]), (&json!(what), &Value::Null));
    let mut few = case();
    few.steps.truncate(6);
    assert!(matches!(few.advice(), Advice::None(why) if why.contains("6 steps of this plan say too little")));
}

/// The folder that `train` would leave of a case.
fn folder(case: &Case) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    std::fs::create_dir(&run).unwrap();
    let row = |step: &StepTimes| {
        let devices: Vec<Value> = step.busy.iter().map(|busy| json!({ "busy_fraction": busy })).collect();
        let (number, seconds) = (step.step, step.seconds);
        json!({ "step": number, "loss": 2.5, "step_seconds": seconds, "plan_since_step": 0, "devices": devices })
            .to_string()
            + "\n"
    };
    std::fs::write(run.join("metrics.jsonl"), case.steps.iter().map(row).collect::<String>()).unwrap();
    std::fs::write(run.join("trace.json"), case.timeline.to_chrome_trace()).unwrap();
    std::fs::write(run.join("prediction.json"), case.prediction.to_json()).unwrap();
    std::fs::write(run.join("machine.toml"), case.planned_for.to_toml()).unwrap();
    std::fs::write(run.join("config.toml"), case.config.to_toml()).unwrap();
    folder
}

fn trace(folder: &Path) -> (String, Value) {
    let run = |arguments: &[&str]| {
        let mut command = crate::common::program();
        let output = command.args(arguments).current_dir(folder).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let words = run(&["trace", "run"]).split_whitespace().collect::<Vec<_>>().join(" ");
    (words, serde_json::from_str(&run(&["trace", "run", "--json"])).unwrap())
}

#[test]
fn trace_prints_what_to_type_even_where_the_model_folder_is_gone() {
    let cards = machine(&[1.0, 1.0]);
    let mut case = Case::new(&["pipeline.devices=2", "pipeline.cuts=[3]"], cards.clone(), &cards);
    case.config.path = Some("gone/away".into());
    let folder = folder(&case);
    let Advice::Change(change) = case.advice() else { panic!("uneven") };
    let (words, report) = trace(folder.path());
    let typed: Vec<String> = change.settings.iter().map(|setting| format!("--set '{setting}'")).collect();
    assert!(words.contains(&typed.join(" ")), "{words}");
    assert!(words.contains(&format!("a step is said to take {:.1} % less", 100.0 * change.gain)), "{words}");
    assert_eq!(report["advice"]["settings"], json!(change.settings));
}

#[test]
fn what_cannot_be_planned_again_gets_no_advice_and_trace_says_why() {
    let cards = machine(&[1.0, 1.0]);
    let case = Case::new(&["pipeline.devices=2", "pipeline.cuts=[3]"], cards.clone(), &cards);
    for (name, text) in [
        ("machine.toml", None),
        ("machine.toml", Some("[[devices]]\nname = 3")),
        ("config.toml", None),
        ("config.toml", Some("[model]\nkind = 'gpt2'")),
    ] {
        let folder = folder(&case);
        let path = folder.path().join("run").join(name);
        match text {
            Some(text) => std::fs::write(&path, text).unwrap(),
            None => std::fs::remove_file(&path).unwrap(),
        }
        let (words, report) = trace(folder.path());
        assert!(words.contains("no other plan can be advised: ") && words.contains(name), "{words}");
        assert_eq!(report["advice"], Value::Null);
    }
    let folder = folder(&case);
    std::fs::remove_file(folder.path().join("run/prediction.json")).unwrap();
    let why = advise(&folder.path().join("run"), &case.prediction, &[], &case.timeline);
    assert!(matches!(why, Advice::None(why) if why.contains("0 steps of this plan")));
    assert!(trace(folder.path()).0.contains("no other plan can be advised: the run was not planned"));
}

#[test]
fn damaged_numbers_are_a_reason_for_no_advice_and_end_nothing() {
    let cards = machine(&[1.0, 1.0]);
    let case = || Case::new(&["pipeline.devices=2", "pipeline.cuts=[3]"], cards.clone(), &cards);
    let advice = |case: &Case| {
        let run = folder(case);
        advise(&run.path().join("run"), &case.prediction, &case.steps, &case.timeline)
    };
    let changes: [fn(&mut Prediction); 5] = [
        |prediction| prediction.devices[1].number = 9,
        |prediction| prediction.devices[1].number = 0,
        |prediction| prediction.cuts = cut_at(&[99]),
        |prediction| prediction.cuts = Vec::new(),
        |prediction| prediction.schedule = "0F0".into(),
    ];
    for change in changes {
        let mut case = case();
        change(&mut case.prediction);
        assert!(matches!(advice(&case), Advice::None(why) if !why.is_empty()));
    }
    // Times that no device takes correct nothing.
    for (times, seconds) in [(1e8, 1.0), (1e-9, 1.0), (1.0, 1e-300), (1.0, 0.0), (1.0, 1e300)] {
        let mut case = case();
        case.timeline.events.iter_mut().for_each(|e| e.end = e.start + times * (e.end - e.start));
        case.steps.iter_mut().for_each(|step| step.seconds *= seconds);
        if let Advice::Change(change) = advice(&case) {
            assert!(change.gain < 1.0 && change.plan.simulation.expected > 0.0, "{times} {seconds}");
        }
    }
}

#[test]
fn only_steps_of_the_plan_that_was_traced_are_compared_with_its_prediction() {
    let cards = machine(&[1.0, 1.0]);
    let case = Case::new(&["pipeline.devices=2"], cards.clone(), &cards);
    let folder = folder(&case);
    let metrics = folder.path().join("run/metrics.jsonl");
    // As after --resume on another layout at step 8.
    let with = |times: f64, before: &str| {
        let rows = case.steps.iter().map(|step| {
            let (since, times, plan) = if step.step <= 8 { (0, times, before) } else { (8, 1.0, "now") };
            let seconds = times * step.seconds;
            json!({ "step": step.step, "step_seconds": seconds, "plan_since_step": since, "plan": plan })
                .to_string()
                + "\n"
        });
        std::fs::write(&metrics, rows.collect::<String>()).unwrap();
        trace(folder.path())
    };
    // Steps that were shorter before are told once more, with their plan.
    let (words, report) = with(0.5, "gpipe, 1 microbatch, layers 0:3 1:4");
    let plan = "another plan (gpipe, 1 microbatch, layers 0:3 1:4)";
    assert!(
        words.contains("earlier steps 1 to 8: ") && words.contains(&format!("with {plan} predicted")),
        "{words}"
    );
    assert!(words.contains(&format!("with {plan}: the steps since take 100.0 % longer")), "{words}");
    assert_eq!(report["earlier_plans"][0]["steps"], 8);
    assert!(with(10.0, "now").0.contains("with the same plan predicted"));
    let (words, report) = with(10.0, "other");
    assert!(words.contains("steps 4 since step 8, when this plan came into force"), "{words}");
    assert!(words.contains("the median is +0.0 % off") && !words.contains("the steps since"), "{words}");
    assert_eq!(report["steps"], 4);
    assert!((report["median_step_seconds"].as_f64().unwrap() / case.steps[0].seconds - 1.0).abs() < 1e-9);
}
