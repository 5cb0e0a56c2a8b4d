//! Going on with runs that somebody has damaged, or that no longer have what they began with.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use polystage::folder::{Dtype, FolderWriter, Kind, Layout, Tensors};
use polystage::train::data::Corpus;
use polystage::train::metrics::Metrics;
use polystage::train::run::Run;
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::cli::{Place, one_line};
use crate::pipeline::origin;

/// Makes a pipe that nobody writes to.
#[cfg(unix)]
pub fn pipe(path: &Path) {
    let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: a C string that outlives the call.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (path, to) = (entry.as_ref().unwrap().path(), to.join(entry.unwrap().file_name()));
        if path.is_dir() {
            copy(&path, &to);
        } else {
            fs::copy(&path, &to).unwrap();
        }
    }
}

/// The bytes of every regular file below a folder; nothing for what else is there.
fn everything(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let (path, kind) = (entry.as_ref().unwrap().path(), entry.unwrap().file_type().unwrap());
        if kind.is_dir() {
            all.extend(everything(&path));
        }
        let bytes = if kind.is_file() { fs::read(&path).unwrap() } else { Vec::new() };
        all.insert(path, bytes);
    }
    all
}

const TRAIN: [&str; 8] = [
    "train",
    "tiny.toml",
    "--no-plan",
    "--set",
    "data.split=0.2",
    "--set",
    "train.evaluate_every=4",
    "--out",
];

/// A place with a run of twelve steps in `run`: checkpoints of steps 8 and 12, evaluations at 4, 8 and 12.
fn place() -> Place {
    let place = Place::new();
    place.succeed(&[&TRAIN[..], &["run"]].concat());
    place
}

fn resume(place: &Place, run: &str, more: &[&str]) -> Output {
    place.run(&[&TRAIN[..], &[run, "--resume", "--set", "train.steps=14"], more].concat())
}

/// What was said on standard error by a command that succeeded.
fn said(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{text}");
    text
}

#[test]
fn a_run_whose_checkpoints_config_or_metrics_are_damaged_is_refused_and_stays_as_it_is() {
    let place = place();
    type Damage = fn(&Path);
    let cases: &[(Damage, &[&str])] = &[
        (
            |run| each(run, |folder| fs::remove_file(folder.join("manifest.json")).unwrap()),
            &["000012/manifest.json is missing", "000008/manifest.json is missing"],
        ),
        (
            |run| {
                fs::remove_file(run.join("checkpoints/latest")).unwrap();
                each(run, |folder| fs::remove_file(folder.join("model.safetensors")).unwrap());
            },
            &["000012/model.safetensors is missing", "000008/model.safetensors is missing"],
        ),
        (
            |run| {
                fs::remove_file(run.join("checkpoints/latest")).unwrap();
                each(run, |folder| {
                    let state = fs::read_to_string(folder.join("state.json")).unwrap();
                    fs::write(folder.join("state.json"), state + " ").unwrap();
                });
            },
            &["000012/state.json has ", "000008/state.json has ", "it is damaged"],
        ),
        (
            |run| each(run, |folder| fs::remove_dir_all(folder).unwrap()),
            &["checkpoints: holds no complete checkpoint: latest names 000012, which is gone"],
        ),
        (
            |run| fs::remove_dir_all(run.join("checkpoints")).unwrap(),
            &["checkpoints: holds no checkpoint, although metrics.jsonl reaches step 12"],
        ),
        (
            |run| {
                fs::remove_dir_all(run.join("checkpoints")).unwrap();
                fs::write(run.join("checkpoints"), "").unwrap();
            },
            &["checkpoints: is not a folder"],
        ),
        (|run| fs::write(run.join("config.toml"), b"a = '\xff'").unwrap(), &["config.toml: is not text"]),
        (|run| fs::write(run.join("config.toml"), "[model\n").unwrap(), &["config.toml: is damaged"]),
        (
            |run| fs::write(run.join("config.toml"), "").unwrap(),
            &["config.toml: is damaged: it lacks [model]"],
        ),
        (|run| instead_of(run, "config.toml"), &["config.toml: is a folder"]),
        (|run| instead_of(run, "metrics.jsonl"), &["metrics.jsonl: is a folder"]),
        #[cfg(unix)]
        (|run| pipe_instead_of(run, "config.toml"), &["config.toml: is not a regular file"]),
        #[cfg(unix)]
        (|run| pipe_instead_of(run, "metrics.jsonl"), &["metrics.jsonl: is not a regular file"]),
    ];
    for (number, (damage, words)) in cases.iter().enumerate() {
        let name = format!("damaged-{number}");
        let run = place.path(&name);
        copy(&place.path("run"), &run);
        fs::write(run.join(".lock"), "kept").unwrap();
        damage(&run);
        let before = everything(&run);
        let output = resume(&place, &name, &[]);
        let line = one_line(&output);
        assert_eq!(output.status.code(), Some(2), "{line}");
        assert!(words.iter().all(|words| line.contains(words)), "{line}, not {words:?}");
        assert!(everything(&run) == before, "{words:?}: something was touched");
        if number < 4 {
            let line = one_line(&place.run(&["generate", &name, "--prompt", "x"]));
            assert!(words.iter().all(|words| line.contains(words)), "{line}, not {words:?}");
        }
    }

    // The checkpoint that is asked for, whatever others there are.
    let state = place.path("run/checkpoints/000008/state.json");
    let damaged = fs::read_to_string(&state).unwrap() + " ";
    fs::write(state, damaged).unwrap();
    let before = everything(&place.path("run"));
    let output = resume(&place, "run", &["--from", "run/checkpoints/000008"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(one_line(&output).contains("000008/state.json: has "));
    assert!(everything(&place.path("run")) == before);

    // And where an older one is complete, the run goes on from there.
    fs::remove_file(place.path("damaged-0/checkpoints/latest")).unwrap();
    fs::copy(
        place.path("run/checkpoints/000012/manifest.json"),
        place.path("damaged-0/checkpoints/000012/manifest.json"),
    )
    .unwrap();
    fs::create_dir(place.path("damaged-0/checkpoints/000020")).unwrap();
    fs::write(place.path("damaged-0/checkpoints/latest"), "000020\n").unwrap();
    let text = said(&resume(&place, "damaged-0", &[]));
    assert!(text.contains("warning: checkpoint \"000020\" is incomplete; continuing from "), "{text}");
    assert_eq!(place.losses("damaged-0").len(), 14);
}

/// Both checkpoints.
fn each(run: &Path, damage: impl Fn(&Path)) {
    ["000008", "000012"].iter().for_each(|step| damage(&run.join("checkpoints").join(step)));
}

fn instead_of(run: &Path, name: &str) {
    fs::remove_file(run.join(name)).unwrap();
    fs::create_dir(run.join(name)).unwrap();
}

#[cfg(unix)]
fn pipe_instead_of(run: &Path, name: &str) {
    fs::remove_file(run.join(name)).unwrap();
    pipe(&run.join(name));
}

#[test]
fn a_damaged_row_costs_that_row_alone_and_the_file_as_it_was_is_kept() {
    let place = place();
    let metrics = place.path("run/metrics.jsonl");
    let whole = place.losses("run");
    let mut rows: Vec<Vec<u8>> =
        fs::read(&metrics).unwrap().split_inclusive(|&b| b == b'\n').map(<[u8]>::to_vec).collect();
    // In a name, which nobody reads.
    let name = rows[2].windows(9).position(|bytes| bytes == b"\"adapter\"").unwrap();
    rows[2][name + 12] = 0xff;
    rows[6] = b"\0\0\0\n".to_vec();
    let damaged = [rows.concat(), b"{\"step\":13,\"lo".to_vec()].concat();
    fs::write(&metrics, &damaged).unwrap();

    let output = resume(&place, "run", &[]);
    let text = said(&output);
    let warnings: Vec<&str> = text.lines().filter(|line| line.starts_with("warning")).collect();
    let [steps, lines] = warnings[..] else { panic!("two warnings, not {warnings:?}") };
    assert_eq!(steps, "warning: resuming with train.steps = 14, which was 12");
    assert!(lines.contains("run/metrics.jsonl: 2 lines are damaged (3, 7) and left out; "), "{lines}");
    assert_eq!(fs::read(place.path("run/metrics.jsonl.damaged")).unwrap(), damaged);
    let kept: Vec<_> = whole.iter().filter(|(step, _)| ![3, 7].contains(step)).copied().collect();
    let losses = place.losses("run");
    assert_eq!(losses[..10], kept[..]);
    assert_eq!(losses[10..].iter().map(|row| row.0).collect::<Vec<_>>(), [13, 14]);
    // The best evaluation is still known.
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("best     step"), "{text}");

    // What was kept is not overwritten by the next.
    fs::write(&metrics, b"\xff\n").unwrap();
    said(&resume(&place, "run", &[]));
    assert_eq!(fs::read(place.path("run/metrics.jsonl.damaged")).unwrap(), damaged);
    assert_eq!(fs::read(place.path("run/metrics.jsonl.damaged-2")).unwrap(), b"\xff\n");
}

#[test]
fn rows_are_read_whatever_lies_between_them() {
    let read = |bytes: &[u8]| {
        let metrics = Metrics::read(bytes).unwrap();
        (metrics.entries.iter().map(|entry| entry.step).collect::<Vec<_>>(), metrics.damage())
    };
    assert_eq!(read(b""), (vec![], None));
    assert_eq!(read(b"{\"step\":1}\r\n\n  \n{\"step\":2,\"valid_loss\":null}"), (vec![1, 2], None));
    assert_eq!(read(b"{\"step\":1}\n{\"step\":2"), (vec![1], None));
    assert_eq!(
        read("{\"step\":1}\n{\"adapter\":\"\u{e9}".as_bytes().strip_suffix(b"\xa9").unwrap()),
        (vec![1], None)
    );
    assert_eq!(read(b"{\"step\":1}\n{\"step\":2}\xff"), (vec![1], Some("line 2 is damaged".into())));
    assert_eq!(read(b"[1]\n{\"step\":2}\n"), (vec![2], Some("line 1 is damaged".into())));
    let long = [b"{\"step\":1}".as_slice(), &vec![b' '; 3 << 20], b"\n{\"step\":2}\n"].concat();
    assert_eq!(read(&long), (vec![2], Some("line 1 is damaged".into())));
    let many = b"\xff\n".repeat(7);
    assert_eq!(read(&many), (vec![], Some("7 lines are damaged (1, 2, 3, 4, 5 and others)".into())));
}

#[test]
#[cfg(unix)]
fn a_lock_is_neither_followed_nor_truncated_nor_waited_for() {
    use std::os::unix::fs::symlink;
    let open = |run: &Path| Run::open(run, "config", origin(), 1, 0);
    let place = tempfile::tempdir().unwrap();
    let precious = place.path().join("precious");
    fs::write(&precious, "precious").unwrap();
    type Make<'a> = &'a dyn Fn(&Path);
    let makes: [(&str, Make); 4] = [
        ("link", &|lock| symlink(&precious, lock).unwrap()),
        ("dangling", &|lock| symlink(place.path().join("nowhere"), lock).unwrap()),
        ("pipe", &pipe),
        ("folder", &|lock| fs::create_dir(lock).unwrap()),
    ];
    for (name, make) in makes {
        let run = place.path().join(name);
        fs::create_dir(&run).unwrap();
        make(&run.join(".lock"));
        let error = open(&run).err().expect("refused");
        assert!(error.is_input() && error.to_string().contains(".lock is not a regular file"), "{error}");
        assert_eq!(fs::read_dir(&run).unwrap().count(), 1, "{name}: something was written");
    }
    assert_eq!(fs::read_to_string(&precious).unwrap(), "precious");
    assert!(!place.path().join("nowhere").exists());

    let run = place.path().join("run");
    fs::create_dir(&run).unwrap();
    fs::write(run.join(".lock"), "a note").unwrap();
    let held = open(&run).unwrap();
    assert!(open(&run).err().expect("held").to_string().contains("another process is training"));
    drop(held);
    assert_eq!(fs::read_to_string(run.join(".lock")).unwrap(), "a note");
}

#[test]
fn a_folder_where_a_run_writes_a_file_is_refused_before_anything_is_written() {
    for name in [
        "prediction.json",
        "machine.toml",
        "trace.json",
        "timeline.svg",
        "checkpoints/latest",
        "checkpoints/best",
    ] {
        let run = tempfile::tempdir().unwrap();
        fs::create_dir_all(run.path().join(name)).unwrap();
        let before = everything(run.path());
        let error = Run::open(run.path(), "config", origin(), 1, 0).err().expect("refused");
        assert!(error.is_input() && error.to_string().contains(&format!("{name} is a folder")), "{error}");
        assert!(everything(run.path()) == before, "{name}");
    }
}

#[test]
fn what_killed_runs_left_half_written_is_removed_and_nothing_else() {
    let run = tempfile::tempdir().unwrap();
    let at = |name: &str| run.path().join(name);
    // The lock proves that nobody writes them, whoever has their number now.
    let process = std::process::id();
    fs::create_dir_all(at("checkpoints/.tmp-000004-1")).unwrap();
    fs::write(at("checkpoints/.tmp-000004-1/model.safetensors"), "half").unwrap();
    let left = ["config.toml", "metrics.jsonl", "prediction.json", "timeline.svg", "trace.json"];
    let mut left: Vec<String> = left.map(|name| format!(".tmp-{name}-1")).into();
    left.extend([format!(".tmp-trace.json-{process}"), "checkpoints/.tmp-latest-1".into()]);
    left.extend(["checkpoints/.tmp-best-1".into()]);
    let other = [".tmp-config.toml", ".tmp-config.toml-x", ".tmp-comparison.svg-1", ".tmp-notes", "tmp-1"];
    let other = [&other[..], &["checkpoints/.tmp-mine-1", "checkpoints/000004", "checkpoints/best"]].concat();
    left.iter()
        .map(String::as_str)
        .chain(other.iter().copied())
        .for_each(|name| fs::write(at(name), "x").unwrap());
    Run::open(run.path(), "config", origin(), 1, 0).unwrap();
    left.iter().for_each(|name| assert!(!at(name).exists(), "{name} is still there"));
    other.iter().for_each(|name| assert!(at(name).exists(), "{name} is gone"));
    assert!(!at("checkpoints/.tmp-000004-1").exists());
}

/// A process that has ended.
#[cfg(unix)]
fn dead_process() -> u32 {
    let mut child = std::process::Command::new("true").spawn().unwrap();
    child.wait().unwrap();
    child.id()
}

/// Writes a model folder of these tensors, each of two elements, in files of at most `shard_bytes`.
fn write_folder(path: &Path, shard_bytes: u64, values: &[(&str, [f32; 2])]) {
    let tensors: Vec<_> = values.iter().map(|(name, _)| (name.to_string(), vec![2])).collect();
    let layout = Layout {
        kind: Kind::Model,
        config: &json!({}),
        tensors: &tensors,
        dtype: Dtype::F32,
        shard_bytes,
        copy: &[],
    };
    let mut writer = FolderWriter::create(path, &layout).unwrap();
    values.iter().for_each(|(name, values)| writer.write(name, values).unwrap());
    writer.finish().unwrap();
}

#[test]
#[cfg(unix)]
fn what_killed_exports_left_of_a_folder_is_removed_when_it_is_written_again_and_nothing_else() {
    let place = tempfile::tempdir().unwrap();
    let at = |name: String| place.path().join(name);
    let dead = dead_process();
    fs::create_dir(at(format!(".tmp-model-{dead}"))).unwrap();
    fs::write(at(format!(".tmp-model-{dead}/model.safetensors")), "half").unwrap();
    let stays = [".tmp-model-1".into(), format!(".tmp-model-b-{dead}"), format!(".tmp-mod-{dead}")];
    let stays = [&stays[..], &[".tmp-model-x".into(), ".tmp-model-4294967296".into()]].concat();
    stays.iter().for_each(|name| fs::create_dir(at(name.clone())).unwrap());
    write_folder(&at("model".into()), u64::MAX, &[("a", [1.0, 2.0])]);
    assert!(!at(format!(".tmp-model-{dead}")).exists() && at("model".into()).is_dir());
    stays.iter().for_each(|name| assert!(at(name.clone()).exists(), "{name} is gone"));
}

#[test]
fn a_fingerprint_tells_other_data_and_not_other_files() {
    let place = tempfile::tempdir().unwrap();
    let weights = |name: &str, shard_bytes: u64, values: &[(&str, [f32; 2])]| {
        let path = place.path().join(name);
        write_folder(&path, shard_bytes, values);
        polystage::train::checkpoint::open_model(&path).unwrap().tensors().fingerprint().unwrap()
    };
    let one = weights("one", u64::MAX, &[("a", [1.0, 2.0]), ("b", [3.0, 4.0])]);
    assert_eq!(one, weights("shards", 8, &[("a", [1.0, 2.0]), ("b", [3.0, 4.0])]));
    assert_ne!(one, weights("value", 8, &[("a", [1.0, 2.0]), ("b", [3.0, 4.5])]));
    assert_ne!(one, weights("name", 8, &[("a", [1.0, 2.0]), ("c", [3.0, 4.0])]));
    assert_eq!(one.bytes, 16);

    let text = |text: &str| Corpus::from_bytes(text.into()).fingerprint().unwrap();
    assert_eq!(text("abc"), text("abc"));
    assert_ne!(text("abc"), text("abd"));
    assert_ne!(text("abc"), text("abcd"));
    assert_eq!(text("abc").bytes, 12);
}

#[test]
fn what_is_no_longer_as_it_was_when_the_checkpoint_was_written_is_said_or_refused() {
    let place = Place::new();
    place.succeed(&["train", "tiny.toml", "--no-plan", "--set", "train.steps=1", "--out", "base"]);
    place.succeed(&["export", "base", "--out", "model"]);
    let held = "what was held back ".repeat(20);
    fs::write(place.path("held.txt"), &held).unwrap();
    let tune = |steps: &'static str, more: &[&str]| {
        let all =
            ["finetune", "model", "--data", "text.txt", "--steps", steps, "--devices", "0", "--no-plan"];
        let set = ["--set", "pipeline.microbatches=2", "--batch", "2", "--sequence", "16", "--out", "run"];
        place.run(&[&all[..], &set, more].concat())
    };
    let warnings = |output: Output| -> Vec<String> {
        let lines = said(&output);
        lines.lines().filter(|line| line.starts_with("warning")).map(String::from).collect()
    };
    said(&tune("2", &["--valid", "held.txt"]));
    assert_eq!(warnings(tune("2", &["--valid", "held.txt", "--resume"])), [""; 0]);

    let found = warnings(tune("3", &["--resume", "--alpha", "32"]));
    assert_eq!(
        found,
        [
            "warning: resuming with adapter.alpha = 32.0, which was 16.0",
            "warning: resuming with train.steps = 3, which was 2",
        ]
    );

    // 34 bytes 200 times, then 10 more; and as many bytes, but others.
    let text = fs::read_to_string(place.path("text.txt")).unwrap();
    fs::write(place.path("text.txt"), text + "it has grown").unwrap();
    let found = warnings(tune("4", &["--resume", "--alpha", "32", "--valid", "held.txt"]));
    let grown = "warning: resuming with another text for training, of 6812 tokens, which was of 6800";
    assert!(found.contains(&grown.to_string()) && found.len() == 2, "{found:?}");
    fs::write(place.path("held.txt"), held.to_uppercase()).unwrap();
    let found = warnings(tune("4", &["--resume", "--alpha", "32", "--valid", "held.txt"]));
    assert_eq!(
        found,
        [format!("warning: resuming with another text for evaluation, of {} tokens as before", held.len())]
    );

    let weights = place.path("model/model.safetensors");
    let tensors = Tensors::open(&weights).unwrap().fingerprint().unwrap();
    let mut bytes = fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&weights, bytes).unwrap();
    assert_ne!(Tensors::open(&weights).unwrap().fingerprint().unwrap(), tensors);
    let before = everything(&place.path("run"));
    let output = tune("5", &["--resume", "--alpha", "32", "--valid", "held.txt"]);
    let line = one_line(&output);
    assert_eq!(output.status.code(), Some(2), "{line}");
    assert!(
        line.contains("model: is not what the adapter in run/checkpoints/000004 was trained on"),
        "{line}"
    );
    assert!(everything(&place.path("run")) == before);
}

#[test]
fn a_checkpoint_of_an_earlier_version_goes_on_without_a_word() {
    let place = place();
    for step in ["000008", "000012"] {
        let folder = place.path("run/checkpoints").join(step);
        let state = fs::read_to_string(folder.join("state.json")).unwrap();
        let mut state: serde_json::Value = serde_json::from_str(&state).unwrap();
        assert!(state.as_object_mut().unwrap().remove("origin").is_some());
        let state = serde_json::to_vec(&state).unwrap();
        let path = folder.join("manifest.json");
        let mut manifest: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let digits: String = Sha256::digest(&state).iter().map(|byte| format!("{byte:02x}")).collect();
        manifest["files"]["state.json"] = json!({"bytes": state.len(), "sha256": digits});
        fs::write(folder.join("state.json"), state).unwrap();
        fs::write(path, serde_json::to_vec(&manifest).unwrap()).unwrap();
    }
    let text = place.path("text.txt");
    fs::write(&text, fs::read_to_string(&text).unwrap() + "it has grown").unwrap();
    let text = said(&place.run(&[&TRAIN[..], &["run", "--resume"]].concat()));
    assert!(!text.contains("warning"), "{text}");
}
