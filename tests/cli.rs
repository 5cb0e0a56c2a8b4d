//! The program as a user runs it: real processes, real files, real signals.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use polystage::train::checkpoint;

use crate::common::{program, program_on_all};

const CONFIG: &str = "
[model]
kind = 'gpt2'
layers = 2
width = 32
heads = 2
context = 32
vocabulary = 256
[data]
train = ['text.txt']
[train]
steps = 12
batch = 4
sequence = 32
learning_rate = 1e-2
warmup = 2
[pipeline]
devices = [0, 0]
microbatches = 2
[output]
checkpoint_every = 4
keep = 2
";

/// A folder with a config and a text.
pub struct Place(tempfile::TempDir);

impl Place {
    pub fn new() -> Place {
        let place = Place(tempfile::tempdir().unwrap());
        std::fs::write(place.path("tiny.toml"), CONFIG).unwrap();
        std::fs::write(place.path("text.txt"), "every device has something to do. ".repeat(200)).unwrap();
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        self.of(program(), arguments)
    }

    fn of(&self, mut command: Command, arguments: &[&str]) -> Command {
        command.args(arguments).current_dir(self.0.path()).stdin(Stdio::null());
        // Measured once for all tests, and not into the user's own cache.
        command.env("POLYSTAGE_CACHE", Path::new(env!("CARGO_TARGET_TMPDIR")).join("profiles"));
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    pub fn succeed(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    pub fn start(&self, arguments: &[&str]) -> Child {
        self.command(arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    }

    pub fn losses(&self, run: &str) -> Vec<(u64, f64)> {
        let text = std::fs::read_to_string(self.path(run).join("metrics.jsonl")).unwrap_or_default();
        // A process killed while it writes leaves half a line at the end.
        let rows = text.lines().filter_map(|l| serde_json::from_str::<serde_json::Value>(l).ok());
        rows.map(|r| (r["step"].as_u64().unwrap(), r["loss"].as_f64().unwrap())).collect()
    }

    pub fn wait_for_steps(&self, run: &str, steps: usize) {
        let start = Instant::now();
        while self.losses(run).len() < steps {
            assert!(start.elapsed() < Duration::from_secs(120), "no {steps} steps in two minutes");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

pub fn one_line(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let lines: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).collect();
    assert_eq!(lines.len(), 1, "one clear line, not: {text}");
    lines[0].to_string()
}

#[test]
fn a_run_writes_its_folder_learns_and_continues_a_prompt() {
    let place = Place::new();
    let train = place.of(program_on_all(), &["train", "tiny.toml", "--out", "run"]).output().unwrap();
    assert!(train.status.success(), "{}", String::from_utf8_lossy(&train.stderr));
    let shown = String::from_utf8_lossy(&train.stdout);
    assert!(shown.contains("device 1 (adapter 0: ") && shown.contains("sample"), "{shown}");
    let losses = place.losses("run");
    assert_eq!(losses.iter().map(|l| l.0).collect::<Vec<_>>(), (1..=12).collect::<Vec<_>>());
    assert!(losses[11].1 < losses[0].1 - 1.0, "{losses:?}");
    let run = place.path("run");
    for name in [
        "config.toml",
        "timeline.svg",
        "trace.json",
        "loss.svg",
        "prediction.json",
        "machine.toml",
        "checkpoints/latest",
        "checkpoints/000012/manifest.json",
    ] {
        assert!(run.join(name).exists(), "{name}");
    }
    assert!(!run.join("checkpoints/000004").exists(), "only the last two are kept");
    crate::docs::assert_described(&run, "000012");
    let picture = std::fs::read_to_string(run.join("loss.svg")).unwrap();
    assert!(picture.contains("checkpoint of step 8") && picture.contains("checkpoint of step 12"));
    let row = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let row: serde_json::Value = serde_json::from_str(row.lines().last().unwrap()).unwrap();
    for key in [
        "step",
        "loss",
        "grad_norm",
        "learning_rate",
        "tokens_per_second",
        "step_seconds",
        "predicted_step_seconds",
    ] {
        assert!(row[key].is_number(), "{key}");
    }
    for device in row["devices"].as_array().unwrap() {
        assert!(device["busy_fraction"].as_f64().unwrap() > 0.0);
        // One activation each way a microbatch, and the tied table once each way.
        assert!(device["bytes_moved"].as_u64().unwrap() >= 2 * 2 * 32 * 32 * 4, "{device}");
    }
    let text = place.succeed(&[
        "generate",
        "run",
        "--prompt",
        "every dev",
        "--max-tokens",
        "20",
        "--temperature",
        "0",
        "--devices",
        "0",
    ]);
    assert!(text.starts_with("every dev") && text.len() >= 29, "{text}");
    let split = [
        "generate",
        "run/checkpoints/000012",
        "--prompt",
        "every dev",
        "--max-tokens",
        "20",
        "--temperature",
        "0",
        "--devices",
        "0,0",
    ];
    assert_eq!(text, place.succeed(&split), "two stages sample what one samples");
    let again = place.run(&["train", "tiny.toml", "--out", "run"]);
    assert_eq!(again.status.code(), Some(2));
    assert!(one_line(&again).contains("already holds a run"));
}

#[test]
fn a_killed_run_loses_only_the_steps_since_its_last_checkpoint_and_resumes_bit_for_bit() {
    let place = Place::new();
    // A run that was killed before its first checkpoint is planned afresh, by what the runs before it have taught: with the
    // replicas left open that may be a plan with another order of sums.
    let train = ["train", "tiny.toml", "--set", "mesh.data=1", "--out"];
    place.succeed(&[&train[..], &["whole"]].concat());
    let whole = place.losses("whole");
    for (number, steps) in [1, 5, 9].into_iter().enumerate() {
        let run = format!("killed-{number}");
        let mut child = place.start(&[&train[..], &[&run]].concat());
        place.wait_for_steps(&run, steps);
        child.kill().unwrap();
        child.wait().unwrap();
        let reached = place.losses(&run).len() as u64;
        let kept = checkpoint::latest(&place.path(&run)).unwrap().map(|p| checkpoint::open(&p).unwrap().step);
        assert!(kept.unwrap_or(0) + 4 >= reached, "reached {reached}, kept {kept:?}");
        place.succeed(&[&train[..], &[&run, "--resume"]].concat());
        assert_eq!(place.losses(&run), whole, "killed after {steps} steps");
    }
}

#[test]
#[cfg(unix)]
fn ctrl_c_finishes_the_step_saves_and_exits_cleanly() {
    let place = Place::new();
    let train = [
        "train",
        "tiny.toml",
        "--no-plan",
        "--out",
        "run",
        "--set",
        "train.steps=100000",
        "--memory",
        "1GiB",
    ];
    let child = place.command(&train).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    place.wait_for_steps("run", 6);
    // SAFETY: signals a child that has not been waited for.
    unsafe { libc::kill(child.id() as i32, libc::SIGINT) };
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let reached = place.losses("run").last().unwrap().0;
    let kept = checkpoint::latest(&place.path("run")).unwrap().unwrap();
    assert_eq!(checkpoint::open(&kept).unwrap().step, reached);
    // What it says goes on with it.
    let said = String::from_utf8(output.stdout).unwrap();
    let again = said.lines().last().unwrap().trim();
    assert_eq!(
        again,
        "polystage train tiny.toml --set train.steps=100000 --memory 1GiB --no-plan --resume --out run"
    );
    let steps = format!("train.steps={}", reached + 1);
    let again: Vec<&str> = again.split(' ').skip(1).chain(["--set", &steps]).collect();
    place.succeed(&again);
    assert_eq!(place.losses("run").last().unwrap().0, reached + 1);
}

#[test]
fn bad_input_gets_one_line_and_status_2_and_touches_nothing() {
    let place = Place::new();
    std::fs::write(place.path("empty.txt"), "").unwrap();
    std::fs::write(place.path("short.txt"), "too short").unwrap();
    std::fs::write(place.path("broken.toml"), "[model\nkind = 3").unwrap();
    let set = |value: &'static str| vec!["train", "tiny.toml", "--out", "out", "--set", value];
    for (arguments, expected) in [
        (set("train.learnig_rate=1"), "did you mean train.learning_rate"),
        (set("trian.steps=1"), "did you mean [train]"),
        (set("train.steps=0"), "at least 1"),
        (set("train.steps='many'"), "steps"),
        (set("train.learning_rate=-1"), "train.learning_rate"),
        (set("nonsense"), "key.sub=value"),
        (set("data.train=['missing.txt']"), "missing.txt"),
        (set("data.train=['empty.txt']"), "empty.txt"),
        (set("data.train=['short.txt']"), "33"),
        (set("data.tokenizer='bpe'"), "bytes"),
        (set("train.sequence=64"), "model.context = 32"),
        (set("pipeline.microbatches=3"), "2 and 4 do"),
        (set("train.batch=1"), "does not divide train.batch = 1; 1 does"),
        (set("pipeline.schedule='1f2b'"), "did you mean \"1f1b\""),
        (set("pipeline.cuts=[9]"), "cuts"),
        (set("pipeline.devices=[0,0,0,0,0,0,0]"), "4 layers cannot be divided over 7 devices"),
        (set("model.layers=1000000"), "model.layers"),
        (set("train.batch=4611686018427387904"), "train.batch"),
        (set("data.train=['text.txt'"), "TOML"),
        (set("model.heads=5"), "5 heads do not divide the width 32"),
        (set("model.kind='gpt9'"), "gpt9"),
        (set("model.vocabulary=100"), "at least 256"),
        (vec!["train", "tiny.toml", "--out", "out", "--devices", "0,99"], "adapter 99 does not exist"),
        (vec!["train", "tiny.toml", "--out", "out", "--devices", "x"], "--devices"),
        (vec!["train", "tiny.toml", "--out", "out", "--memory", "0=64KiB"], "device 0"),
        (vec!["train", "tiny.toml", "--out", "out", "--memory", "lots"], "--memory"),
        (vec!["train", "tiny.toml", "--out", "out", "--resume"], "does not exist"),
        (vec!["train", "broken.toml", "--out", "out"], "line 1"),
        (vec!["train", "nowhere.toml", "--out", "out"], "nowhere.toml"),
        (vec!["generate", "nowhere", "--prompt", "x"], "nowhere"),
        (vec!["generate", ".", "--prompt", "x"], "."),
        (vec!["schedule", "1f1b", "--stages", "0"], "stages"),
        (vec!["schedule", "zigzag"], "gpipe"),
    ] {
        let output = place.run(&arguments);
        assert_eq!(
            output.status.code(),
            Some(2),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let line = one_line(&output);
        assert!(line.contains(expected), "{arguments:?} says {line:?}, not {expected:?}");
        assert!(!place.path("out").exists(), "{arguments:?} wrote something");
    }
}

#[test]
fn a_damaged_checkpoint_is_named_and_the_previous_good_one_offered() {
    let place = Place::new();
    place.succeed(&["train", "tiny.toml", "--out", "run"]);
    let file = place.path("run/checkpoints/000012/model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let more = ["train", "tiny.toml", "--out", "run", "--resume", "--set", "train.steps=14"];
    let output = place.run(&more);
    assert_eq!(output.status.code(), Some(2));
    let line = one_line(&output);
    assert!(line.contains("model.safetensors") && line.contains("000008"), "{line}");
    let generate = place.run(&["generate", "run", "--prompt", "x"]);
    assert_eq!(generate.status.code(), Some(2));
    let good = [&more[..], &["--from", "run/checkpoints/000008"]].concat();
    place.succeed(&good);
    assert_eq!(place.losses("run").len(), 14);
}

#[test]
fn a_reader_that_goes_away_or_a_second_process_does_not_harm_a_run() {
    let place = Place::new();
    let mut child = place.start(&["train", "tiny.toml", "--out", "run", "--set", "train.steps=60"]);
    // The progress goes to a pipe that nobody reads any more.
    drop(child.stderr.take());
    place.wait_for_steps("run", 6);
    let second = place.run(&["train", "tiny.toml", "--out", "run", "--resume"]);
    assert_eq!(second.status.code(), Some(2));
    let text = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(text.contains("another process is training"), "{text}");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(place.losses("run").len(), 60);
}

#[test]
fn kernels_are_measured_beside_ceilings_and_drawn_and_verify_looks_at_one_op() {
    let place = Place::new();
    let small = ["--devices", "0", "--sequence", "9", "--width", "24", "--heads", "3", "--vocabulary", "50"];
    let bench = |more: &[&str]| place.succeed(&[&["bench"], &small[..], more].concat());
    let report: serde_json::Value = serde_json::from_str(&bench(&["--json", "--svg", "roof.svg"])).unwrap();
    let report = &report[0]["report"];
    for number in ["gflops", "gb_s"] {
        assert!(report["ceilings"][number].as_f64().unwrap() > 0.0, "{report}");
    }
    let kernels = report["kernels"].as_array().unwrap();
    assert!(kernels.len() > 25 && report["left_out"].as_array().unwrap().is_empty(), "{report}");
    for kernel in kernels {
        assert!(
            kernel["seconds"].as_f64().unwrap() > 0.0 && kernel["share"].as_f64().unwrap() > 0.0,
            "{kernel}"
        );
    }
    let svg = std::fs::read_to_string(place.path("roof.svg")).unwrap();
    assert!(svg.contains("MLP down, dW") && svg.ends_with("</svg>\n"), "{svg}");
    assert!(bench(&[]).contains("tokens/s through one block"));
    for (wrong, says) in
        [(["--heads", "5"], "divide"), (["--width", "0"], "between 1"), (["--batch", "x"], "--batch")]
    {
        let output = place.command(&[&["bench"][..], &wrong].concat()).output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        assert!(one_line(&output).contains(says), "{wrong:?}");
    }
    let only = place.succeed(&["verify", "--devices", "0", "--only", "Gather"]);
    assert!(
        only.contains("gather") && !only.contains("matmul") && only.contains("everything passed"),
        "{only}"
    );
    // Every software adapter has subgroups of one size, and so kernels for them.
    let cached = ["verify", "--only", "AttentionCached { heads: 3"];
    assert!(place.succeed(&cached).contains("attention_subgroup"));
    for without in ["subgroups", "f16,subgroups,coop"] {
        let plain = place.succeed(&[&cached[..], &["--without", without]].concat());
        assert!(!plain.contains("_subgroup") && plain.contains("everything passed"), "{without}: {plain}");
    }
    let output = place.command(&["verify", "--without", "tensors"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(one_line(&output).contains("--without"));
    let nothing = place.command(&["verify", "--only", "nothing"]).output().unwrap();
    assert_eq!(nothing.status.code(), Some(2));
    assert!(one_line(&nothing).contains("no op or shape"));
}

#[test]
fn a_machine_without_an_adapter_is_told_how_to_get_one() {
    let place = Place::new();
    for verb in [&["devices"][..], &["train", "tiny.toml", "--out", "out"], &["verify"]] {
        let output = place
            .command(verb)
            .env("VK_ICD_FILENAMES", "/nowhere.json")
            .env("VK_DRIVER_FILES", "/nowhere.json")
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(2));
        assert!(one_line(&output).contains("apt-get install mesa-vulkan-drivers"));
    }
}

#[test]
fn devices_and_schedules_are_shown_for_people_and_programs() {
    let place = Place::new();
    let list: serde_json::Value = serde_json::from_str(&place.succeed(&["devices", "--json"])).unwrap();
    assert_eq!(list[0]["index"], 0);
    assert!(list[0]["max_binding"].as_u64().unwrap() >= 128 << 20);
    assert!(place.succeed(&["devices"]).contains(list[0]["name"].as_str().unwrap()));
    assert!(place.succeed(&["schedule", "1f1b", "--stages", "3", "--microbatches", "4"]).contains("F3"));
    let dry = place.succeed(&["train", "tiny.toml", "--dry-run", "--set", "train.steps=7"]);
    assert!(dry.contains("steps = 7") && dry.contains("device 1"), "{dry}");
    assert!(!place.path("runs").exists());
}

#[test]
fn a_schedule_is_saved_edited_proved_and_drawn() {
    let place = Place::new();
    let text = place.succeed(&["schedule", "zb-v", "--stages", "2", "--microbatches", "3", "--text"]);
    assert!(text.starts_with("# name: zb-v, stages: 4, microbatches: 3\n0F0 0SEND_F0"), "{text}");
    std::fs::write(place.path("mine.txt"), &text).unwrap();
    let drawn = place.succeed(&["schedule", "mine.txt"]);
    assert_eq!(drawn, place.succeed(&["schedule", "zb-v", "--stages", "2", "--microbatches", "3"]));
    assert!(drawn.contains("bubble") && drawn.contains("peak in flight by stage: 3 3 2 1"), "{drawn}");
    let json: serde_json::Value =
        serde_json::from_str(&place.succeed(&["schedule", "mine.txt", "--json"])).unwrap();
    assert_eq!(json["ranks"][0][0], "0F0");
    let auto = place.succeed(&["schedule", "auto", "--stages", "2", "--microbatches", "3", "--json"]);
    let auto: serde_json::Value = serde_json::from_str(&auto).unwrap();
    assert_eq!((auto["name"].as_str(), auto["makespan"].as_f64()), (Some("auto"), Some(10.0)));
    std::fs::write(place.path("bad.txt"), text.replace("0F1 0SEND_F1", "0SEND_F1 0F1")).unwrap();
    for (arguments, words) in [
        (&["schedule", "bad.txt"][..], "0SEND_F1 <-- 0F1"),
        (&["schedule", "mine.txt", "--stages", "3"], "leave --stages out"),
        (&["schedule", "yours.txt"], "no file yours.txt"),
        (&["schedule", "zb-h1", "--chunks", "2"], "chunks"),
        (&["schedule", "interleaved-1f1b", "--microbatches", "6"], "use 4 or 8"),
    ] {
        let output = place.run(arguments);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(2) && error.contains(words), "{arguments:?}: {error}");
    }
}

/// Stops a thread of another process, as a driver that never returns does.
#[cfg(target_os = "linux")]
fn freeze(thread: i32) {
    // SAFETY: attaches to a thread of a child of this process and stops it; the child is killed later.
    unsafe {
        assert_eq!(libc::ptrace(libc::PTRACE_SEIZE, thread, 0, 0), 0, "{}", std::io::Error::last_os_error());
        assert_eq!(libc::ptrace(libc::PTRACE_INTERRUPT, thread, 0, 0), 0);
    }
}

/// The driver's threads: they keep the program's name, where the program names its own.
#[cfg(target_os = "linux")]
fn driver_threads(process: u32) -> Vec<i32> {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let ids = tasks.filter_map(|t| t.ok()?.file_name().to_str()?.parse().ok());
    let unnamed = |id: &i32| {
        let comm = Path::new("/proc").join(id.to_string()).join("comm");
        *id != process as i32 && std::fs::read_to_string(comm).is_ok_and(|c| c.trim_end() == "polystage")
    };
    ids.filter(unnamed).collect()
}

#[test]
#[cfg(target_os = "linux")]
fn a_driver_that_never_returns_is_reported_within_30_seconds_and_the_checkpoint_stays() {
    let place = Place::new();
    let mut command = place.command(&["train", "tiny.toml", "--out", "run", "--set", "train.steps=100000"]);
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    place.wait_for_steps("run", 6);
    let workers = driver_threads(child.id());
    if workers.is_empty() {
        child.kill().unwrap();
        child.wait().unwrap();
        eprintln!(
            "SKIPPED: the driver of adapter 0 works without threads of its own, so none can be stopped"
        );
        return;
    }
    workers.iter().for_each(|&thread| freeze(thread));
    let start = Instant::now();
    let mut text = String::new();
    child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}: {text}", start.elapsed());
    // A traced thread is reaped by its tracer before the process can be.
    for worker in workers {
        // SAFETY: waits for a thread that this thread traces.
        unsafe { libc::waitpid(worker, std::ptr::null_mut(), libc::__WALL) };
    }
    assert_eq!(child.wait().unwrap().code(), Some(1), "{text}");
    assert!(
        text.contains("stalled: rank ")
            && text.contains("has not finished ")
            && text.contains("the last checkpoint is"),
        "{text}"
    );
    let kept = checkpoint::latest(&place.path("run")).unwrap().unwrap();
    assert!(checkpoint::open(&kept).unwrap().step >= 4);
}

#[test]
#[cfg(unix)]
#[ignore = "takes 40 s; the arithmetic has a test of its own beside the code"]
fn a_process_that_was_stopped_for_longer_than_a_stall_goes_on() {
    let place = Place::new();
    let mut child = place.start(&["train", "tiny.toml", "--out", "run", "--set", "train.steps=1000"]);
    place.wait_for_steps("run", 6);
    // SAFETY: stops a child of this process and has it go on.
    unsafe { libc::kill(child.id() as i32, libc::SIGSTOP) };
    let stopped = place.losses("run").len();
    std::thread::sleep(Duration::from_secs(35));
    // SAFETY: as above.
    unsafe { libc::kill(child.id() as i32, libc::SIGCONT) };
    place.wait_for_steps("run", stopped + 10);
    // SAFETY: interrupts a child of this process.
    unsafe { libc::kill(child.id() as i32, libc::SIGINT) };
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

/// A machine file whose second device is said to take `factor` times as long as was measured.
fn tampered(machine: &str, factor: f64) -> String {
    let mut table: toml::Table = machine.parse().unwrap();
    let shapes = table["devices"][1]["shapes"].as_array_mut().unwrap();
    for shape in shapes {
        // On a machine that is busy with other tests submitting may take as long as all the rest.
        if let Some(seconds) = shape.get_mut("submit_us") {
            *seconds = toml::Value::Float(seconds.as_float().unwrap() * factor);
        }
        for (_, layer) in shape["layers"].as_table_mut().unwrap() {
            for (_, seconds) in layer.as_table_mut().unwrap() {
                *seconds = toml::Value::Float(seconds.as_float().unwrap() * factor);
            }
        }
    }
    table.to_string()
}

#[test]
fn a_plan_explains_itself_and_what_it_writes_can_be_used_again() {
    let place = Place::new();
    let files = ["--write-machine", "here.toml", "--write-schedule", "s.txt", "--svg", "plan.svg"];
    let text = place.succeed(&[&["plan", "tiny.toml"], &files[..]].concat());
    for word in ["tokens/s", "bubble", "memory", "links", "other plans", "predicted"] {
        assert!(text.contains(word), "{word}: {text}");
    }
    assert!(std::fs::read_to_string(place.path("plan.svg")).unwrap().starts_with("<svg"));
    let again =
        ["plan", "tiny.toml", "--machine", "here.toml", "--set", "pipeline.schedule='s.txt'", "--json"];
    let json: serde_json::Value = serde_json::from_str(&place.succeed(&again)).unwrap();
    assert!(json["step_seconds"].as_f64().unwrap() > 0.0);
    assert_eq!(json["devices"].as_array().unwrap().len(), 2);
    assert!(json["devices"][0]["peak_bytes"].as_u64().unwrap() > 0);
    let damaged =
        std::fs::read_to_string(place.path("here.toml")).unwrap().replace("barrier_us", "barier_us");
    std::fs::write(place.path("damaged.toml"), damaged).unwrap();
    let refused = place.run(&["plan", "tiny.toml", "--machine", "damaged.toml"]);
    assert_eq!(refused.status.code(), Some(2));
    let line = one_line(&refused);
    assert!(
        line.contains("damaged.toml") && line.contains("barier_us") && line.contains("barrier_us"),
        "{line}"
    );
    let small = place.run(&["plan", "tiny.toml", "--machine", "here.toml", "--memory", "20KiB"]);
    assert_eq!(small.status.code(), Some(2));
    assert!(one_line(&small).contains("bytes"), "{}", one_line(&small));
}

#[test]
fn a_machine_file_that_is_wrong_is_noticed_and_replanning_changes_no_loss() {
    let place = Place::new();
    // With the replicas left open the order of sums is the planner's choice.
    let size = ["model.layers=5", "model.width=64", "train.steps=14", "mesh.data=1"];
    let size: Vec<&str> = size.into_iter().flat_map(|key| ["--set", key]).collect();
    place.succeed(&[&["plan", "tiny.toml", "--write-machine", "here.toml"], &size[..]].concat());
    let machine = std::fs::read_to_string(place.path("here.toml")).unwrap();
    std::fs::write(place.path("wrong.toml"), tampered(&machine, 0.05)).unwrap();
    let wrong =
        ["train", "tiny.toml", "--machine", "wrong.toml", "--set", "pipeline.replan=true", "--out", "moved"];
    let moved = place.run(&[&wrong[..], &size[..]].concat());
    let said = String::from_utf8_lossy(&moved.stderr).into_owned();
    assert!(moved.status.success(), "{said}");
    assert!(said.contains("off their prediction"), "{said}");
    place.succeed(&[&["train", "tiny.toml", "--no-plan", "--out", "plain"], &size[..]].concat());
    assert_eq!(place.losses("moved"), place.losses("plain"));
}

#[test]
fn two_small_devices_take_turns_behind_a_large_one_and_a_run_on_them_goes_on_bit_for_bit() {
    let place = Place::new();
    let device = |name: &str, memory: &str, gflops: f64| {
        format!(
            "[[devices]]\nname = '{name}'\nadapter = 0\nmemory = '{memory}'\n[devices.rates]\nmatmul_gflops = {gflops}\n\
             memory_gb_s = 25\nlaunch_us = 1\nsubmit_us = 5\nbarrier_us = 20\n"
        )
    };
    let [large, small] = [device("large", "64MiB", 8.0), device("small", "6MiB", 3.0)];
    let machine = format!("link = {{ latency_us = 50, gb_s = 8 }}\n{large}{small}{small}");
    std::fs::write(place.path("three.toml"), machine).unwrap();
    let text = "[model]\nkind = 'gpt2'\nlayers = 2\nwidth = 128\nheads = 4\ncontext = 32\nvocabulary = 256\n\
        [data]\ntrain = ['text.txt']\n[train]\nsteps = 4\nbatch = 8\nsequence = 32\n[output]\ncheckpoint_every = 2\n";
    std::fs::write(place.path("three.config.toml"), text).unwrap();
    let config = ["three.config.toml", "--machine", "three.toml"];
    let said = place.succeed(&[&["plan"], &config[..]].concat());
    assert!(said.contains("devices with the same layers take turns"), "{said}");
    let run = |more: &[&str]| place.succeed(&[&["train"], &config[..], &["--out", "run"], more].concat());
    run(&[]);
    let whole = place.losses("run");
    std::fs::remove_dir_all(place.path("run/checkpoints/000004")).unwrap();
    run(&["--resume"]);
    assert_eq!((place.losses("run"), whole.len()), (whole, 4));
}

/// What a run with this standard output says, and its status.
#[cfg(target_os = "linux")]
fn with_output(place: &Place, arguments: &[&str], output: &str) -> (Option<i32>, String) {
    let file = std::fs::OpenOptions::new().write(true).open(output).unwrap();
    let child = place.command(arguments).stdout(file).stderr(Stdio::piped()).spawn().unwrap();
    let output = child.wait_with_output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

const MACHINE: &str = "
name = 'two'
link = { latency_us = 100.0, gb_s = 10.0 }
[[devices]]
name = 'first'
rates = { matmul_gflops = 1000.0, memory_gb_s = 100.0, launch_us = 2.0, submit_us = 50.0, barrier_us = 200.0 }
[[devices]]
name = 'second'
rates = { matmul_gflops = 1000.0, memory_gb_s = 100.0, launch_us = 2.0, submit_us = 50.0, barrier_us = 200.0 }
";

/// A place with the file of a machine.
fn imagined() -> Place {
    let place = Place::new();
    std::fs::write(place.path("two.toml"), MACHINE).unwrap();
    place
}

#[test]
#[cfg(target_os = "linux")]
fn only_a_reader_that_has_gone_may_be_ignored_by_what_is_printed() {
    let place = imagined();
    for arguments in [
        &["schedule", "1f1b"][..],
        &["schedule", "1f1b", "--json"],
        &["plan", "tiny.toml", "--machine", "two.toml"],
        &["plan", "tiny.toml", "--machine", "two.toml", "--json"],
        &["--help"],
        &["train", "--help"],
        &["--version"],
    ] {
        let (status, said) = with_output(&place, arguments, "/dev/full");
        assert_eq!((status, said.lines().count()), (Some(1), 1), "{arguments:?}: {said}");
        assert!(said.contains("standard output"), "{said}");
        let mut child = place.command(arguments).stdout(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        assert_eq!(child.wait().unwrap().code(), Some(0), "{arguments:?}");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_behind_standard_output_ends_a_run_before_it_begins() {
    let place = Place::new();
    // Without a planner nothing is measured, and nothing said of that.
    let train = ["train", "tiny.toml", "--no-plan", "--out", "run"];
    let (status, said) = with_output(&place, &train, "/dev/full");
    assert_eq!((status, said.lines().count()), (Some(1), 1), "{said}");
    assert!(!place.path("run").exists());
}

#[test]
fn what_is_no_order_gets_one_line_that_does_nothing_to_a_terminal() {
    let place = Place::new();
    let long = "x".repeat(100_000);
    let hostile = "\u{1b}[31mred\u{202e}\u{7}";
    let key = format!("train.{long}=1");
    for (arguments, expected) in [
        (&["train"][..], "<CONFIG>; see polystage train --help"),
        (&["plan", "tiny.toml", "--machin", "two.toml"], "'--machine'; see polystage plan --help"),
        (&["trian"], "'train'; see polystage --help"),
        (&["schedule", "1f1b", "--stages", hostile], "--stages"),
        (&["schedule", hostile], "no schedule"),
        (&["schedule", &long], "no schedule"),
        (&["train", hostile], "does not exist"),
        (&["plan", "tiny.toml", "--set", &key], "unknown key"),
        (&["plan", "tiny.toml", "--set", hostile], "key.sub=value"),
    ] {
        let output = place.run(arguments);
        let line = one_line(&output);
        assert_eq!(output.status.code(), Some(2), "{line}");
        assert!(line.contains(expected), "{line}");
        assert!(line.len() < 3000 && !line.contains(['\u{1b}', '\u{202e}', '\u{7}']), "{line}");
    }
    let help = place.run(&[]);
    assert!(help.status.code() == Some(2) && String::from_utf8_lossy(&help.stderr).contains("Usage"));
}

#[test]
#[cfg(unix)]
fn what_is_no_text_file_is_named_as_such_wherever_one_is_read() {
    let place = imagined();
    let path = place.path("pipe");
    let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: a path that ends in 0.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    std::fs::create_dir(place.path("folder")).unwrap();
    std::fs::write(place.path("binary"), b"0F0 \xff").unwrap();
    let huge = std::fs::File::create(place.path("huge")).unwrap();
    huge.set_len(100 << 20).unwrap();
    // Of few bytes many values.
    std::fs::write(place.path("many"), "a = [".to_string() + &"1,".repeat(3 << 20) + "]").unwrap();
    for (file, expected) in [
        ("./pipe", "is not a regular file"),
        ("/dev/zero", "is not a regular file"),
        ("./folder", "is a folder"),
        ("./binary", "line 1 is not valid UTF-8"),
        ("./huge", "bytes"),
        ("./missing", ""),
    ] {
        let schedule = format!("pipeline.schedule='{file}'");
        for arguments in [
            &["plan", "tiny.toml", "--machine", file][..],
            &["plan", file],
            &["train", file, "--out", "out"],
            &["schedule", file],
            &["plan", "tiny.toml", "--machine", "two.toml", "--set", &schedule],
            &["generate", ".", "--prompt-file", file],
        ] {
            let output = place.run(arguments);
            let line = one_line(&output);
            assert_eq!(output.status.code(), Some(2), "{arguments:?}: {line}");
            let joined = line.contains("/dev/zero, and no schedule");
            assert!(line.contains(expected) || joined, "{arguments:?}: {line}");
            assert!(line.contains(file.trim_start_matches("./")), "{arguments:?}: {line}");
        }
    }
    for arguments in [&["plan", "many"][..], &["plan", "tiny.toml", "--machine", "many"]] {
        assert!(one_line(&place.run(arguments)).contains("more than 2097152 bytes"));
    }
    assert!(!place.path("out").exists());
}

#[test]
fn an_override_is_one_key_and_one_value_or_refused_whole() {
    let place = imagined();
    let plan = |set: &str| place.run(&["plan", "tiny.toml", "--machine", "two.toml", "--set", set]);
    for (set, expected) in [
        ("train.steps=5\n[model]\nlayers=9", "not a TOML value"),
        ("train.steps=5\ntrain.batch=8", "not a TOML value"),
        ("pipeline.schedule=1f1b\n[model]", "not a TOML value"),
        ("train.steps=1, train.batch=2", "train.steps"),
        ("train.steps=", "not a TOML value"),
        ("train.steps.more=5", "not table.key"),
        ("'train'.steps=5", "not table.key"),
        ("train. steps=5", "not table.key"),
        ("train.=5", "not table.key"),
        (".steps=5", "not table.key"),
        ("train={steps=5}", "not table.key"),
        ("model.rope_scaling={factor=1,factor=2}", "not a TOML value"),
    ] {
        let output = plan(set);
        assert_eq!(output.status.code(), Some(2), "{set}");
        assert!(one_line(&output).contains(expected), "{set}: {}", one_line(&output));
    }
    for set in ["train.steps=5", "train.steps = 5", "pipeline.schedule=1f1b", "data.train=['a', 'b']"] {
        assert!(plan(set).status.success(), "{set}");
    }
}

#[test]
fn counts_beyond_reason_are_refused_in_one_line_at_once() {
    let place = imagined();
    let header = format!("# name: x, stages: {0}, microbatches: {0}\n0F0 0B0\n", u64::MAX);
    std::fs::write(place.path("header.txt"), header).unwrap();
    std::fs::write(place.path("ranks.txt"), "0F0 0B0\n".repeat(100_000)).unwrap();
    std::fs::write(place.path("actions.txt"), "0F0 ".repeat(9_000_000)).unwrap();
    let plan = |sets: &[&'static str]| {
        let sets = sets.iter().flat_map(|&set| ["--set", set]);
        ["plan", "tiny.toml", "--machine", "two.toml"].into_iter().chain(sets).collect::<Vec<_>>()
    };
    let long = ["model.context=4194304", "train.sequence=4194304"];
    for arguments in [
        vec!["schedule", "1f1b", "--stages", "100000"],
        vec!["schedule", "zb-v", "--stages", "500000", "--microbatches", "1"],
        vec!["schedule", "interleaved-1f1b", "--chunks", "4611686018427387905"],
        vec!["schedule", "gpipe", "--microbatches", "18446744073709551615"],
        vec!["schedule", "auto", "--stages", "1000"],
        vec!["schedule", "auto", "--stages", "1", "--microbatches", "500000"],
        vec!["schedule", "auto", "--chunks", "9223372036854775807"],
        vec!["schedule", "header.txt"],
        vec!["schedule", "ranks.txt"],
        vec!["schedule", "actions.txt"],
        plan(&["pipeline.microbatches=1000000000000000000"]),
        plan(&["train.batch=1000000000000000000"]),
        plan(&[long[0], long[1], "train.batch=1048576"]),
        plan(&[long[0], long[1], "model.vocabulary=16777216", "model.width=131072"]),
        plan(&[long[0], long[1], "model.kind='llama'", "model.head_dim=4096"]),
        plan(&["model.kind='llama'", "model.head_dim=4096", "model.heads=131072", "model.width=131072"]),
        plan(&["model.layers=1000000000"]),
        plan(&["model.layers=1024", "model.width=65536"]),
        plan(&["adapter.rank=1000000000000000000"]),
    ] {
        let output = place.run(&arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.starts_with("error: ") && said.len() < 4000, "{arguments:?}: {said}");
    }
    // Large, and meant.
    let large = plan(&["train.batch=1048576", "pipeline.microbatches=64", "model.layers=32"]);
    assert!(place.run(&large).status.success());
}

#[test]
fn a_schedule_by_hand_runs_without_a_planner_and_disagrees_with_no_key() {
    let place = imagined();
    let text = place.succeed(&["schedule", "gpipe", "--stages", "2", "--microbatches", "2", "--text"]);
    std::fs::write(place.path("mine.txt"), text).unwrap();
    let by_hand = ["--set", "pipeline.schedule='mine.txt'"];
    let plain = ["train", "tiny.toml", "--no-plan", "--set", "train.steps=2"];
    place.succeed(&[&plain[..], &by_hand, &["--out", "by-hand"]].concat());
    place.succeed(&[&plain[..], &["--out", "usual"]].concat());
    assert_eq!(place.losses("by-hand"), place.losses("usual"));
    let refused = |arguments: &[&str], expected: &[&str]| {
        let output = place.run(arguments);
        let line = one_line(&output);
        assert_eq!(output.status.code(), Some(2), "{line}");
        assert!(expected.iter().all(|word| line.contains(word)), "{line}");
    };
    let more = ["--set", "pipeline.microbatches=4", "--out", "out"];
    refused(&[&plain[..], &by_hand, &more].concat(), &["for 2 microbatches", "pipeline.microbatches = 4"]);
    let plan = ["plan", "tiny.toml", "--machine", "two.toml"];
    refused(
        &[&plan[..], &by_hand, &more[..2]].concat(),
        &["for 2 microbatches", "pipeline.microbatches = 4"],
    );
    let auto = ["--set", "pipeline.schedule=auto", "--out", "out"];
    refused(&[&plain[..], &auto].concat(), &["\"auto\" is made by the planner"]);
    let three = [&plain[..], &by_hand, &["--devices", "0,0,0", "--out", "out"]].concat();
    refused(&three, &["for 2 devices", "the run has 3"]);
    assert!(!place.path("out").exists());
}

#[test]
fn a_model_that_sees_few_tokens_is_trained_and_continues_a_short_prompt() {
    let place = Place::new();
    for context in ["8", "2"] {
        let sizes = [format!("model.context={context}"), format!("train.sequence={context}")];
        let out = format!("run-{context}");
        let train = ["train", "tiny.toml", "--no-plan", "--set", "train.steps=2", "--out", &out];
        let shown = place.succeed(&[&train[..], &["--set", &sizes[0], "--set", &sizes[1]]].concat());
        assert!(shown.contains("sample   "), "{shown}");
    }
}

#[test]
fn a_loss_that_is_no_number_is_a_failure_and_not_bad_input() {
    let place = Place::new();
    // A weight is multiplied by about a million in every step.
    let rates = ["--set", "train.learning_rate=1000", "--set", "train.weight_decay=1000"];
    let train = ["train", "tiny.toml", "--no-plan", "--out", "run"];
    let output = place.run(&[&train[..], &rates].concat());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("not finite"), "{said}");
    assert_eq!(output.status.code(), Some(1), "{said}");
}

#[test]
fn a_file_that_cannot_be_written_where_it_was_named_is_bad_input() {
    let place = imagined();
    let plan = ["plan", "tiny.toml", "--machine", "two.toml"];
    for flag in ["--svg", "--write-schedule", "--write-machine"] {
        for path in ["nowhere/file", "two.toml/file", ".", "/dev/full"] {
            let output = place.run(&[&plan[..], &[flag, path]].concat());
            let line = one_line(&output);
            assert_eq!(output.status.code(), Some(2), "{flag} {path}: {line}");
            assert!(line.contains("cannot be written"), "{line}");
        }
    }
}
