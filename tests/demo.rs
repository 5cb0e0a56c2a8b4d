//! What the page does with the engine, without a browser: runs that are opened, trained, changed and looked at.

use approx::assert_relative_eq;
use pollster::block_on;
use polystage::demo::{Advice, EQUAL, Failure, Run, Session, Settings, Size, Stepped, Task, catalog};
use polystage::error::Error;

use crate::common::{adapters, cut_at, open};

fn small() -> Settings {
    Settings { task: Task::Sorting, size: Size::Small, ..Settings::default() }
}

/// The adapter of these tests: lavapipe where it is, which compiles kernels in a tenth of SwiftShader's time.
fn adapter() -> usize {
    let adapters = adapters();
    adapters.iter().find(|adapter| adapter.name.contains("llvmpipe")).unwrap_or(&adapters[0]).index
}

/// A run of these settings on that adapter alone.
fn begin(settings: &Settings) -> Session {
    block_on(Session::on(settings.clone(), open(&vec![adapter(); settings.devices]))).expect("opens")
}

fn steps(session: &mut Session, count: usize) -> Vec<Stepped> {
    (0..count).map(|_| block_on(session.step()).expect("a step")).collect()
}

fn losses(steps: &[Stepped]) -> Vec<u64> {
    steps.iter().map(|step| step.loss.to_bits()).collect()
}

#[test]
fn one_two_and_three_devices_in_every_schedule_give_the_same_bits() {
    let one = losses(&steps(&mut begin(&Settings { devices: 1, ..small() }), 4));
    for (devices, schedule) in [(2, "gpipe"), (2, "zb-h1"), (3, "1f1b"), (2, "interleaved-1f1b")] {
        let settings = Settings { devices, schedule: schedule.into(), ..small() };
        assert_eq!(losses(&steps(&mut begin(&settings), 4)), one, "{devices} devices, {schedule}");
    }
}

#[test]
fn a_run_beside_its_reference_says_to_how_many_digits_they_agree() {
    let mut session = begin(&Settings { reference: true, ..small() });
    for step in steps(&mut session, 3) {
        assert_eq!(step.digits, Some(EQUAL), "{:?}", (step.loss, step.reference));
    }
    // Replicas add gradients in another order.
    let mut session = begin(&Settings { reference: true, replicas: 2, ..small() });
    let last = steps(&mut session, 3).pop().expect("a step");
    assert!(last.digits > Some(4), "{:?}", last.digits);
    assert_relative_eq!(last.loss, last.reference.expect("a loss"), max_relative = 1e-5);
}

#[test]
fn a_run_that_is_cut_elsewhere_or_gets_a_device_goes_on_with_the_same_losses() {
    let whole = losses(&steps(&mut begin(&small()), 6));
    let mut session = begin(&small());
    let mut seen = losses(&steps(&mut session, 2));
    let before = session.run();
    let elsewhere = cut_at(if before.settings.cuts == cut_at(&[2]) { &[1.5] } else { &[2.0] });
    let settings = Settings { cuts: elsewhere.clone(), ..before.settings };
    let mut session = block_on(Session::open(settings, Some(session), true)).expect("opens again");
    assert_eq!((session.run().settings.cuts, session.run().step), (elsewhere, 2));
    seen.extend(losses(&steps(&mut session, 2)));
    let settings = Settings { devices: 1, cuts: Vec::new(), ..session.run().settings };
    let mut session = block_on(Session::open(settings, Some(session), true)).expect("opens with one device");
    assert!(session.run().devices[0].adapter.starts_with(&format!("{}:", adapter())));
    seen.extend(losses(&steps(&mut session, 2)));
    assert_eq!(seen, whole);
}

#[test]
fn another_task_begins_anew() {
    let mut session = begin(&small());
    steps(&mut session, 1);
    let settings = Settings { task: Task::Addition, ..session.run().settings };
    let session = block_on(Session::open(settings, Some(session), true)).expect("opens");
    assert_eq!(session.run().step, 0);
}

#[test]
fn what_is_measured_and_what_is_simulated_have_the_same_actions_on_the_same_devices() {
    let mut session = begin(&Settings { schedule: "zb-h1".into(), ..small() });
    let run = session.run();
    let last = steps(&mut session, 3).pop().expect("a step");
    let computed = |step: &polystage::demo::Step| {
        let json = serde_json::to_value(step).expect("JSON");
        let spans = json["spans"].as_array().expect("a list").clone();
        let mut all: Vec<String> = spans
            .iter()
            .filter(|span| span["track"] == "compute" && span["microbatch"].as_i64() >= Some(0))
            .map(|span| format!("{} {}", span["rank"], span["label"]))
            .collect();
        all.sort();
        all.dedup();
        all
    };
    let measured = computed(&last.measured);
    assert_eq!(measured, computed(&last.predicted));
    // F, I and W of each microbatch; the first stage has no gradient to send, and F and B alone.
    assert_eq!(measured.len(), run.settings.microbatches * (3 * run.stages.len() - 1));
    for step in [&last.measured, &last.predicted] {
        assert!(
            step.seconds > 0.0 && (0.0..1.0).contains(&step.bubble),
            "{} s, {}",
            step.seconds,
            step.bubble
        );
        assert!(step.busy.iter().all(|busy| (0.0..=1.0).contains(busy)), "{:?}", step.busy);
    }
}

#[test]
fn a_device_that_is_made_slower_waits_and_the_planner_gives_it_less() {
    // In one pipeline of one block a device each, both have about the same to do.
    let mut session = begin(&small());
    steps(&mut session, 3);
    let bits = losses(&steps(&mut session, 2));
    let working = |step: &Stepped| {
        let json = serde_json::to_value(&step.measured).expect("JSON");
        let spans = json["spans"].as_array().expect("a list").clone();
        let seconds = |span: &serde_json::Value| {
            span["end"].as_f64().expect("a number") - span["start"].as_f64().expect("a number")
        };
        let own = spans.iter().filter(|span| {
            span["track"] == "compute" && span["rank"] == 1 && span["microbatch"].as_i64() >= Some(0)
        });
        own.map(seconds).sum::<f64>()
    };
    let mut slowed = begin(&small());
    // The shortest: in any of them other tests may have had the cores.
    let usual = steps(&mut slowed, 3)[1..].iter().map(working).fold(f64::INFINITY, f64::min);
    slowed.slow(vec![1.0, 5.0]).expect("is slowed");
    let slow = steps(&mut slowed, 2);
    assert_eq!(losses(&slow), bits, "a device that waits computes the same");
    // Five times, but for what other tests take of the cores meanwhile.
    assert!(working(&slow[1]) > 2.5 * usual, "{} s instead of {usual} s", working(&slow[1]));
    let Advice { settings, gain, words, predicted } = slowed.advise().expect("advice");
    let before = slowed.run();
    let taken = block_on(Session::open(settings.clone(), Some(slowed), true)).expect("can be taken over");
    let after = taken.run();
    assert_eq!(after.settings, settings);
    // Fewer layers, or fewer microbatches of a pipeline of its own: less to do.
    let works = |run: &Run, step: &polystage::demo::Step| {
        let rank = run.devices.iter().position(|device| device.index == 1).expect("has a part");
        step.busy[rank] * step.seconds
    };
    let (less, more) = (works(&after, &predicted), works(&before, &before.predicted));
    assert!(gain > 1.02 && less < more, "{less} s instead of {more} s, {settings:?}: {words:?}");
}

#[test]
fn a_run_that_loses_a_device_goes_on_with_the_others_from_where_it_last_was_whole() {
    let first = adapters()[0].index;
    // Devices of its own: no other test is to have the lost one.
    let device = || block_on(polystage::gpu::Device::open(first, Default::default())).expect("opens");
    let mut session = block_on(Session::on(small(), vec![device(), device()])).expect("opens");
    let before = losses(&steps(&mut session, 2));
    session.lose(1);
    let error = block_on(session.step()).expect_err("a lost device");
    let failure = Failure::new(&error, session.failed());
    assert_eq!((failure.kind, failure.device), ("lost", 1), "{}", failure.message);
    let settings = Settings { devices: 1, cuts: Vec::new(), ..session.run().settings };
    let mut session = block_on(Session::open(settings, Some(session), true)).expect("goes on");
    // No snapshot is so young, but the beginning is known.
    assert_eq!(session.run().step, 0);
    assert_eq!(losses(&steps(&mut session, 2)), before);
    // One that was opened with another's weights has theirs.
    let again = |session: Session| {
        block_on(Session::open(session.run().settings, Some(session), true)).expect("goes on")
    };
    let mut session = again(session);
    let next = losses(&steps(&mut session, 1));
    session.lose(0);
    block_on(session.step()).expect_err("a lost device");
    let mut session = again(session);
    assert_eq!(session.run().step, 2);
    assert_eq!(losses(&steps(&mut session, 1)), next);
}

#[test]
fn questions_are_not_in_what_is_learnt_and_answers_are_right() {
    for task in [Task::Addition, Task::Sorting] {
        let mut session = begin(&Settings { task, ..small() });
        steps(&mut session, 1);
        let shown = block_on(session.show()).expect("answers");
        assert_eq!((shown.asked, shown.step), (100, 1));
        assert!(shown.accuracy < Some(0.5), "nothing is learnt in a step");
        for example in shown.examples {
            let right = match task {
                Task::Sorting => {
                    let mut digits: Vec<char> = example.question.chars().collect();
                    digits.sort_unstable();
                    digits.into_iter().collect()
                }
                _ => {
                    let numbers = example.question.split(" + ").map(|n| n.parse::<u32>().expect("a number"));
                    numbers.sum::<u32>().to_string()
                }
            };
            assert_eq!(example.right, right, "{}", example.question);
        }
    }
}

#[test]
fn a_text_is_continued_and_a_short_one_is_enough_to_learn_from() {
    for text in ["", "x", "stage after stage after stage, "] {
        let mut session = begin(&Settings { task: Task::Text, text: text.into(), ..small() });
        let step = steps(&mut session, 1).pop().expect("a step");
        assert!(step.loss.is_finite());
        let shown = block_on(session.show()).expect("a text");
        assert!(shown.text.starts_with("The ") && shown.accuracy.is_none(), "{:?}", shown.text);
    }
}

#[test]
fn the_model_is_a_folder_for_transformers_in_a_zip_file() {
    let mut session = begin(&small());
    let bytes = block_on(session.export()).expect("a file");
    let mut zip = zip::ZipArchive::new(std::io::Cursor::new(bytes)).expect("a zip file");
    let folder = tempfile::tempdir().expect("a folder");
    zip.extract(folder.path()).expect("unpacks");
    let model = polystage::train::checkpoint::open_model(&folder.path().join("polystage-model"));
    let model = model.expect("a model folder");
    assert_eq!(model.config()["model_type"], "gpt2");
    let Run { parameters, .. } = session.run();
    let stored: usize = model.tensors().iter().map(|info| info.len()).sum();
    assert_eq!(stored, parameters);
}

#[test]
fn settings_that_no_run_can_have_are_refused_in_a_line_that_names_them() {
    let refused = |json: &str| Settings::parse(json).expect_err("refused").to_string();
    for (json, what) in [
        ("{", "settings"),
        (r#"{"devices": 5}"#, "devices"),
        (r#"{"devices": 3, "replicas": 2}"#, "replicas"),
        (r#"{"schedule": "none"}"#, "schedule"),
        (r#"{"microbatches": 3}"#, "microbatches"),
        (r#"{"slow": [0.5]}"#, "slow"),
        (r#"{"task": "flying"}"#, "settings"),
        (r#"{"colour": 1}"#, "settings"),
    ] {
        let line = refused(json);
        assert!(line.starts_with(&format!("{what}: ")) && !line.contains('\n'), "{json}: {line}");
    }
    // Three stages on two devices; a run that goes on is asked first.
    let settings = Settings { cuts: cut_at(&[1, 2]), ..small() };
    let mut session = begin(&small());
    let error = session.check(&settings).expect_err("refused");
    assert!(matches!(error, Error::Config { .. }), "{error}");
    assert_eq!(steps(&mut session, 1)[0].step, 1);
    let same = block_on(Session::on(settings, open(&[adapter(); 2]))).err().expect("refused");
    assert_eq!(same.to_string(), error.to_string());
}

#[test]
fn whatever_the_catalog_offers_can_be_opened() {
    let json = serde_json::to_value(catalog()).expect("JSON");
    let names = |list: &str| -> Vec<String> {
        let list = json[list].as_array().expect("a list");
        list.iter().map(|choice| choice["name"].as_str().expect("a name").to_string()).collect()
    };
    for schedule in names("schedules") {
        let settings = serde_json::json!({ "schedule": schedule, "task": names("tasks")[1] });
        let settings = Settings::parse(&settings.to_string()).expect("settings");
        assert_eq!(steps(&mut begin(&settings), 1).len(), 1, "{schedule}");
    }
}
