//! `polystage trace` as a user runs it, on a run of this machine and on folders that are incomplete or damaged.

use std::path::Path;
use std::process::{Output, Stdio};

use polystage::schedule::{Costs, generate};
use polystage::timeline::{DeviceName, Prediction, Timeline};
use serde_json::Value;

use crate::timeline::assert_well_formed;

fn run(folder: &Path, arguments: &[&str]) -> Output {
    let mut command = crate::common::program();
    command.args(arguments).current_dir(folder).stdin(Stdio::null()).output().unwrap()
}

fn succeed(folder: &Path, arguments: &[&str]) -> String {
    let output = run(folder, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// One line on stderr, status 2, nothing on stdout, no picture.
fn refuse(folder: &Path, arguments: &[&str]) -> String {
    let output = run(folder, arguments);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!((output.status.code(), text.lines().count()), (Some(2), 1), "{text}");
    assert!(output.stdout.is_empty() && !folder.join("run/comparison.svg").exists());
    text
}

/// A prediction for two devices and four microbatches.
fn prediction() -> Prediction {
    let schedule = generate("1f1b", 2, 4).unwrap();
    let mut costs = Costs::uniform(&schedule, 0.010, 0.010, 0.010, 1e-3);
    costs.ranks.iter_mut().for_each(|rank| rank.update = 5e-3);
    Prediction::new(DeviceName::list(["first", "second"]), &schedule, costs)
}

/// A run folder as `train` leaves it, without a GPU: three steps that went as predicted.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    std::fs::create_dir(&run).unwrap();
    let rows = (1..=3).map(|step| format!("{{\"step\":{step},\"loss\":2.5,\"step_seconds\":0.{step}}}\n"));
    std::fs::write(run.join("metrics.jsonl"), rows.collect::<String>()).unwrap();
    std::fs::write(run.join("trace.json"), prediction().timeline().unwrap().to_chrome_trace()).unwrap();
    std::fs::write(run.join("prediction.json"), prediction().to_json()).unwrap();
    folder
}

#[test]
fn a_run_of_this_machine_is_explained_with_and_without_a_prediction() {
    let place = tempfile::tempdir().unwrap();
    let config = "
        [model]\nkind = 'gpt2'\nlayers = 2\nwidth = 32\nheads = 2\ncontext = 32\nvocabulary = 256
        [data]\ntrain = ['text.txt']
        [train]\nsteps = 3\nbatch = 4\nsequence = 32\nlearning_rate = 1e-2\nwarmup = 2
        [pipeline]\ndevices = [0, 0]\nmicrobatches = 4\nschedule = '1f1b'
        [output]\ncheckpoint_every = 0\nkeep = 1";
    std::fs::write(place.path().join("tiny.toml"), config).unwrap();
    std::fs::write(place.path().join("text.txt"), "what did every device do, and when? ".repeat(100))
        .unwrap();
    let trained = succeed(place.path(), &["train", "tiny.toml", "--out", "run"]);
    let run_folder = place.path().join("run");
    let trace = std::fs::read_to_string(run_folder.join("trace.json")).unwrap();
    let timeline = Timeline::from_chrome_trace(&trace, "trace.json").unwrap();
    assert_eq!(timeline.devices.len(), 2);
    let rows = || {
        let text = std::fs::read_to_string(run_folder.join("metrics.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<Value>>()
    };
    // One number, and one meaning of busy, wherever they are written.
    let json: Value = serde_json::from_str(&succeed(place.path(), &["trace", "run", "--json"])).unwrap();
    let picture = std::fs::read_to_string(run_folder.join("timeline.svg")).unwrap();
    for (rank, row) in rows()[2]["devices"].as_array().unwrap().iter().enumerate() {
        let name = timeline.devices[rank].to_string();
        assert_eq!((row["device"].as_u64(), timeline.devices[rank].number), (Some(rank as u64), rank));
        assert_eq!(name, format!("device {rank} ({})", row["adapter"].as_str().unwrap()));
        let busy = row["busy_fraction"].as_f64().unwrap();
        assert!((json["devices"][rank]["busy"].as_f64().unwrap() - busy).abs() < 1e-6, "{busy}");
        let shown = format!("busy {:.0} %", 100.0 * busy);
        assert!(
            picture.contains(&shown) && trained.contains(&format!("{name}: {shown}")),
            "{shown}: {trained}"
        );
    }

    // Without a planner nothing is promised, and what an earlier plan promised is gone.
    assert!(run_folder.join("prediction.json").exists() && run_folder.join("machine.toml").exists());
    succeed(
        place.path(),
        &["train", "tiny.toml", "--out", "run", "--resume", "--no-plan", "--set", "train.steps=5"],
    );
    assert!(!run_folder.join("prediction.json").exists() && !run_folder.join("machine.toml").exists());
    let since = rows().iter().map(|row| row["plan_since_step"].as_u64().unwrap()).collect::<Vec<_>>();
    assert_eq!(since, [0, 0, 0, 3, 3]);

    let alone = run(place.path(), &["trace", "run"]);
    let note = String::from_utf8_lossy(&alone.stderr).into_owned();
    assert!(
        alone.status.success() && note.lines().count() == 1 && note.contains("prediction.json"),
        "{note}"
    );
    let shown = String::from_utf8(alone.stdout).unwrap();
    for part in [
        "steps      2 since step 3, ",
        "measured",
        "imbalance",
        "1 B ",
        "What dominates",
        "What to try",
        "comparison.svg",
    ] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    assert_well_formed(&std::fs::read_to_string(run_folder.join("comparison.svg")).unwrap());

    let promised = Prediction { devices: timeline.devices, ..prediction() };
    std::fs::write(run_folder.join("prediction.json"), promised.to_json()).unwrap();
    let both = succeed(place.path(), &["trace", "run"]);
    // Lines are wrapped wherever the numbers make them too long.
    let words = both.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(["longer", "shorter"].iter().any(|w| words.contains(&format!("{w} than predicted"))), "{both}");
    let json: Value = serde_json::from_str(&succeed(place.path(), &["trace", "run", "--json"])).unwrap();
    let sum =
        |device: &Value| -> f64 { device.as_object().unwrap().values().filter_map(Value::as_f64).sum() };
    let step = json["measured_step_seconds"].as_f64().unwrap();
    for device in json["devices"].as_array().unwrap() {
        // Sums of seven numbers.
        assert!((sum(&device["measured"]) - step).abs() < 1e-9, "{device} of {step}");
        assert!(device["measured"]["compute"].as_f64().unwrap() > 0.0);
    }
    assert_eq!((json["steps"].as_u64(), json["actions"].as_array().unwrap().len()), (Some(2), 4));
}

#[test]
fn the_report_compares_the_median_step_and_writes_the_picture_where_it_is_told() {
    let folder = folder();
    let shown = succeed(folder.path(), &["trace", "run", "--out", "elsewhere/pictures"]);
    let step = prediction().simulate().unwrap().step;
    assert!(shown.contains("steps      3: 200.0 ms (median), 100.0 ms to 300.0 ms"), "{shown}");
    let error = 100.0 * (0.2 / step - 1.0);
    assert!(shown.contains(&format!("the median is {error:+.1} % off")), "{shown}");
    assert!(shown.contains(", +0.0 % off: the last step that was traced"), "{shown}");
    assert!(!folder.path().join("run/comparison.svg").exists());
    let picture = std::fs::read_to_string(folder.path().join("elsewhere/pictures/comparison.svg")).unwrap();
    assert!(picture.contains("A step of run, predicted and measured") && picture.contains("0.0 % longer"));
}

#[test]
fn output_into_a_file_has_no_escapes_and_at_most_a_hundred_columns() {
    let folder = folder();
    let shown = succeed(folder.path(), &["trace", "run"]);
    assert!(!shown.contains('\u{1b}') && shown.contains("F0-"));
    assert!(shown.lines().all(|line| line.chars().count() <= 100), "{shown}");
}

#[test]
fn half_a_row_at_the_end_of_the_metrics_of_a_killed_run_is_left_out() {
    let folder = folder();
    let metrics = folder.path().join("run/metrics.jsonl");
    let rows = std::fs::read_to_string(&metrics).unwrap();
    std::fs::write(&metrics, rows + "{\"step\":4,\"lo").unwrap();
    assert!(succeed(folder.path(), &["trace", "run"]).contains("steps      3: "));
}

#[test]
fn what_is_missing_or_damaged_is_named_with_what_to_do() {
    let cut = |text: String| text[..text.len() / 2].to_string();
    let empty = |_: String| String::new();
    let more = |text: String| text + "{\"loss\":1}\n";
    let other = |_: String| {
        let schedule = generate("1f1b", 2, 8).unwrap();
        let costs = Costs::uniform(&schedule, 0.01, 0.01, 0.01, 0.0);
        Prediction::new(DeviceName::list(["first", "second"]), &schedule, costs).to_json()
    };
    // One action twice and another not at all.
    let one = |text: String| -> String {
        let twice = |line: &str| line.replace("1B3", "1B2").replace("\"microbatch\":3", "\"microbatch\":2");
        let lines = text.lines().map(|line| if line.contains("1B3") { twice(line) } else { line.into() });
        lines.collect::<Vec<_>>().join("\n")
    };
    type Change<'a> = (&'a str, Option<&'a dyn Fn(String) -> String>, &'a str);
    let changes: [Change; 10] = [
        ("metrics.jsonl", None, "run/metrics.jsonl: does not exist: the folder holds no run"),
        (
            "metrics.jsonl",
            Some(&empty),
            "run/metrics.jsonl: holds no step yet; continue the run with --resume",
        ),
        ("metrics.jsonl", Some(&more), "run/metrics.jsonl: line 4 is damaged"),
        (
            "trace.json",
            None,
            "run/trace.json: does not exist: a run writes it with every checkpoint and when it ends",
        ),
        ("trace.json", Some(&cut), "run/trace.json: is damaged or not a trace"),
        ("trace.json", Some(&empty), "run/trace.json: is damaged or not a trace"),
        ("trace.json", Some(&one), "run/trace.json: the timeline does not hold one whole training step"),
        ("prediction.json", Some(&cut), "run/prediction.json: is damaged"),
        ("prediction.json", Some(&empty), "run/prediction.json: is damaged"),
        (
            "prediction.json",
            Some(&other),
            "run/prediction.json: is of another plan (2 stages on 2 devices, 8 microbatches)",
        ),
    ];
    for (name, change, words) in changes {
        let folder = folder();
        let path = folder.path().join("run").join(name);
        match change {
            Some(change) => std::fs::write(&path, change(std::fs::read_to_string(&path).unwrap())).unwrap(),
            None => std::fs::remove_file(&path).unwrap(),
        }
        let text = refuse(folder.path(), &["trace", "run"]);
        assert!(text.contains(words), "{name}: {text}");
    }
    let folder = folder();
    assert!(
        refuse(folder.path(), &["trace", "runs/nowhere"])
            .contains("runs/nowhere: is not a folder; give that of a run")
    );
    assert!(refuse(folder.path(), &["trace", "run/trace.json"]).contains("is not a folder"));
    std::fs::write(folder.path().join("run/trace.json"), [0xff, 0xfe]).unwrap();
    assert!(refuse(folder.path(), &["trace", "run"]).contains("run/trace.json: is damaged: it is not text"));
}

#[test]
#[cfg(unix)]
fn a_pipe_or_a_folder_where_a_file_should_be_is_named_and_never_waited_for() {
    use crate::resume::pipe;
    type Make = fn(&Path);
    for name in ["metrics.jsonl", "trace.json", "prediction.json"] {
        let kinds: [(Make, &str); 2] = [
            (pipe, "is not a regular file"),
            (|path| std::fs::create_dir(path).unwrap(), "is a folder, not a file"),
        ];
        for (make, words) in kinds {
            let folder = folder();
            let path = folder.path().join("run").join(name);
            std::fs::remove_file(&path).unwrap();
            make(&path);
            let text = refuse(folder.path(), &["trace", "run"]);
            assert!(text.contains(&format!("run/{name}: {words}")), "{text}");
        }
    }
}

#[test]
fn a_run_whose_picture_cannot_be_written_is_explained_without_one() {
    let folder = folder();
    // A folder in its place refuses every user.
    std::fs::create_dir_all(folder.path().join("run/comparison.svg/in the way")).unwrap();
    let output = run(folder.path(), &["trace", "run", "--json"]);
    let note = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && note.contains("there is no picture"), "{note}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((report["steps"].as_u64(), &report["picture"]), (Some(3), &Value::Null));
    assert!(!succeed(folder.path(), &["trace", "run"]).contains("picture    "));
    let named = run(folder.path(), &["trace", "run", "--json", "--out", "run/metrics.jsonl"]);
    assert_eq!(named.status.code(), Some(2));
}

#[test]
fn a_plan_for_a_machine_file_names_devices_by_their_position_in_it_everywhere() {
    let place = tempfile::tempdir().unwrap();
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    let path = |name: &str| repository.join(name).to_string_lossy().into_owned();
    let (config, machine) = (path("gpt2.toml"), path("machines/three-vendors.toml"));
    let arguments = ["plan", &config, "--machine", &machine, "--devices", "2,0,1", "--svg", "plan.svg"];
    let shown = succeed(place.path(), &arguments);
    let json: Value =
        serde_json::from_str(&succeed(place.path(), &[&arguments[..], &["--json"]].concat())).unwrap();
    let shares = json["devices"].as_array().unwrap();
    let names: Vec<String> = shares
        .iter()
        .map(|share| format!("{} {}", share["device"], share["name"].as_str().unwrap()))
        .collect();
    // In another order than the file's, or the test says nothing.
    assert!(shares.iter().enumerate().any(|(rank, share)| share["device"] != rank), "{names:?}");
    let lanes: Vec<&str> = shown.lines().filter(|line| names.iter().any(|name| name == line)).collect();
    assert_eq!(lanes, names);
    let picture = std::fs::read_to_string(place.path().join("plan.svg")).unwrap();
    let words = picture.replace("</tspan><tspan dx=\"8\" font-weight=\"600\">", " ");
    assert!(names.iter().all(|name| words.contains(&format!(">{name}</tspan>"))), "{words}");
}
