//! Checkpoints: bit-for-bit round trips, and damage and crashes of every kind.

use std::fs;
use std::path::{Path, PathBuf};

use polystage::Error;
use polystage::folder::{Dtype, Kind, Layout};
use polystage::train::checkpoint::{Writer, latest, open, open_model, resolve, write_atomic};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::contents::{Contents, Tensor, load, read, save};

const FILES: [&str; 5] =
    ["config.json", "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"];

fn tensor(name: &str, shape: &[usize], data: Vec<f32>) -> Tensor {
    Tensor { name: name.into(), shape: shape.to_vec(), data }
}

fn contents(step: u64) -> Contents {
    let weights: Vec<f32> = (0..6).map(|i| i as f32 + step as f32).collect();
    Contents {
        step,
        config: json!({"model_type": "gpt2", "n_layer": 2}),
        model: vec![tensor("a.weight", &[2, 3], weights.clone()), tensor("b", &[], vec![0.5])],
        optimizer: vec![tensor("exp_avg.a.weight", &[2, 3], weights)],
        state: json!({"tokens": 12345, "loss": [2.5, null]}),
    }
}

fn run() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder")
}

/// Saves the steps, keeping all, and returns the last one's folder.
fn save_all(run: &Path, steps: impl IntoIterator<Item = u64>) -> PathBuf {
    steps.into_iter().map(|step| save(run, &contents(step), 100).expect("saved")).last().expect("a step")
}

fn names(run: &Path) -> Vec<String> {
    let entries = fs::read_dir(run.join("checkpoints")).expect("listed");
    let mut names: Vec<String> =
        entries.map(|e| e.expect("listed").file_name().into_string().expect("UTF-8")).collect();
    names.sort();
    names
}

/// The error's one line.
fn message<T: std::fmt::Debug>(result: polystage::Result<T>) -> String {
    let error = result.expect_err("an error");
    assert!(matches!(error, Error::Checkpoint { .. }), "{error:?}");
    assert_eq!(error.to_string().lines().count(), 1);
    error.to_string()
}

/// A safetensors file with this header and this data.
fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// The configuration and all parameters of a model folder, sorted by name.
fn load_model(folder: &Path) -> polystage::Result<(Value, Vec<Tensor>)> {
    let folder = open_model(folder)?;
    Ok((folder.config().clone(), read(folder.tensors())?))
}

/// What is read from a model folder with these bytes as weights.
fn read_model(bytes: &[u8]) -> polystage::Result<(Value, Vec<Tensor>)> {
    let folder = run();
    fs::write(folder.path().join("config.json"), "{}").expect("written");
    fs::write(folder.path().join("model.safetensors"), bytes).expect("written");
    load_model(folder.path())
}

#[test]
fn a_round_trip_keeps_every_bit_of_odd_shapes_and_nans() {
    let run = run();
    let odd =
        [0x7fc0_1234, 0xffa0_0001, 0x8000_0000, 0x0000_0001, 0x7f80_0000, 0xff80_0000].map(f32::from_bits);
    let mut contents = contents(7);
    contents.model = vec![
        tensor("empty.0", &[0], vec![]),
        tensor("empty.1", &[3, 0, 2], vec![]),
        tensor("nans", &[1, 6, 1], odd.to_vec()),
        tensor("scalar", &[], vec![-0.0]),
        tensor("wéird \"name\"\n", &[1], vec![1.0]),
    ];
    // More than one chunk of the writer.
    contents.optimizer = vec![tensor("exp_avg.nans", &[3, 50_000], (0..150_000).map(|i| i as f32).collect())];
    let folder = save(run.path(), &contents, 1).expect("saved");
    assert_eq!(folder, run.path().join("checkpoints/000007"));
    let read = load(&folder).expect("loaded");
    let bits = |tensors: &[Tensor]| -> Vec<(String, Vec<usize>, Vec<u32>)> {
        let bits = |t: &Tensor| t.data.iter().map(|x| x.to_bits()).collect();
        tensors.iter().map(|t| (t.name.clone(), t.shape.clone(), bits(t))).collect()
    };
    assert_eq!(bits(&read.model), bits(&contents.model));
    assert_eq!(bits(&read.optimizer), bits(&contents.optimizer));
    assert_eq!((read.step, read.config, read.state), (7, contents.config, contents.state));
}

#[test]
fn the_same_contents_give_the_same_bytes() {
    let (one, two) = (run(), run());
    let save = |run: &tempfile::TempDir| save(run.path(), &contents(1), 1).expect("saved");
    let (a, b) = (save(&one), save(&two));
    for name in FILES {
        assert_eq!(fs::read(a.join(name)).expect("read"), fs::read(b.join(name)).expect("read"), "{name}");
    }
    assert_eq!(load(&b).expect("loaded"), contents(1));
    let model = fs::read(a.join("model.safetensors")).expect("read");
    let header = String::from_utf8_lossy(&model[8..]).into_owned();
    assert!(header.starts_with(r#"{"__metadata__":{"format":"pt"},"#), "{header}");
    assert_eq!(u64::from_le_bytes(model[..8].try_into().expect("8 bytes")) % 8, 0);
}

/// Names and shapes.
fn announce(tensors: &[Tensor]) -> Vec<(String, Vec<usize>)> {
    tensors.iter().map(|t| (t.name.clone(), t.shape.clone())).collect()
}

#[test]
fn a_checkpoint_written_as_a_stream_is_the_one_written_at_once() {
    let (one, two) = (run(), run());
    let whole = contents(3);
    let tensors = announce(&whole.model);
    let layout = Layout {
        kind: Kind::Model,
        config: &whole.config,
        tensors: &tensors,
        dtype: Dtype::F32,
        shard_bytes: 0,
        copy: &[],
    };
    let create = || Writer::create(two.path(), 3, &layout, &announce(&whole.optimizer)).expect("created");
    let mut writer = create();
    // Weights and optimizer in turns, and in pieces.
    writer.weights("a.weight", &whole.model[0].data[..5]).expect("written");
    writer.optimizer("exp_avg.a.weight", &whole.optimizer[0].data).expect("written");
    writer.weights("a.weight", &whole.model[0].data[5..]).expect("written");
    assert!(message(writer.weights("a.weight", &[0.0])).contains("was given where \"b\" was due"));
    writer.weights("b", &whole.model[1].data).expect("written");
    let streamed = writer.finish(&whole.state, 1).expect("finished");
    let saved = save(one.path(), &whole, 1).expect("saved");
    for name in FILES {
        assert_eq!(
            fs::read(streamed.join(name)).expect("read"),
            fs::read(saved.join(name)).expect("read"),
            "{name}"
        );
    }
    // One that is given up leaves the last as it was.
    drop(create());
    assert!(
        message(create().finish(&whole.state, 1)).contains("\"a.weight\" has 6 elements and was given 0")
    );
    assert_eq!(names(two.path()), ["000003", "latest"]);
    let read = open(&streamed).expect("opened");
    let mut middle = [0.0; 2];
    read.weights.read("a.weight", 2..4, &mut middle).expect("read");
    assert_eq!((read.kind, read.step, middle), (Kind::Model, 3, [5.0, 6.0]));
    assert_eq!(read.optimizer.read_all("exp_avg.a.weight").expect("read"), whole.optimizer[0].data);
}

#[test]
fn the_checkpoint_of_an_adapter_is_pefts_folder_and_a_hash_covers_what_was_copied() {
    let run = run();
    let tokenizer = run.path().join("tokenizer.json");
    fs::write(&tokenizer, "T").expect("written");
    let tensors = [("x.lora_A.weight".to_string(), vec![1])];
    let layout = Layout {
        kind: Kind::Adapter,
        config: &json!({"peft_type": "LORA"}),
        tensors: &tensors,
        dtype: Dtype::F32,
        shard_bytes: 0,
        copy: std::slice::from_ref(&tokenizer),
    };
    let mut writer = Writer::create(run.path(), 1, &layout, &[]).expect("created");
    writer.weights("x.lora_A.weight", &[2.5]).expect("written");
    let folder = writer.finish(&json!({}), 1).expect("finished");
    assert_eq!(resolve(run.path()).expect("a run"), folder);
    assert_eq!(resolve(&folder).expect("an adapter"), folder);
    let read = open(&folder).expect("opened");
    assert_eq!((read.kind, read.config["peft_type"].as_str()), (Kind::Adapter, Some("LORA")));
    assert_eq!(read.weights.read_all("x.lora_A.weight").expect("read"), [2.5]);
    assert!(folder.join("adapter_model.safetensors").is_file() && !folder.join("config.json").exists());
    fs::write(folder.join("tokenizer.json"), "U").expect("damaged");
    assert!(message(open(&folder)).contains("tokenizer.json: does not match its SHA-256"));
}

#[test]
fn a_manifest_cannot_name_files_outside_its_folder() {
    let run = run();
    let folder = save_all(run.path(), [1]);
    let path = folder.join("manifest.json");
    let manifest = fs::read_to_string(&path).expect("read");
    for name in ["../x", "/etc/passwd", "..", "a\\\\b", "C:x"] {
        let entry = format!("\"files\": {{\"{name}\": {{\"bytes\": 1, \"sha256\": \"\"}},");
        fs::write(&path, manifest.replace("\"files\": {", &entry)).expect("written");
        assert!(message(open(&folder)).contains("which is not in the folder"), "{name}");
    }
}

#[test]
fn tensors_that_cannot_be_stored_are_refused_and_nothing_is_left_behind() {
    let run = run();
    save_all(run.path(), [1]);
    let mut twice = contents(2);
    twice.model.push(twice.model[0].clone());
    assert!(message(save(run.path(), &twice, 1)).contains("two tensors are named \"a.weight\""));
    let mut short = contents(2);
    short.optimizer[0].data.pop();
    assert!(message(save(run.path(), &short, 1)).contains("exp_avg.a.weight"));
    assert_eq!(names(run.path()), ["000001", "latest"]);
}

#[test]
fn a_flipped_byte_in_any_file_is_found_and_the_previous_good_checkpoint_offered() {
    let run = run();
    let folder = save_all(run.path(), [1, 2, 3]);
    fs::write(run.path().join("checkpoints/000002/state.json"), "{}").expect("damaged");
    for name in FILES {
        let path = folder.join(name);
        let good = fs::read(&path).expect("read");
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1 << (at % 8);
            fs::write(&path, bad).expect("written");
            let message = message(load(&folder));
            let previous = run.path().join("checkpoints/000001");
            assert!(message.contains(&format!("previous good one is {} (", previous.display())), "{message}");
            assert!(message.ends_with(&format!("--resume --from {})", previous.display())), "{message}");
            assert!(name == "manifest.json" || message.starts_with(&path.display().to_string()), "{message}");
        }
        fs::remove_file(&path).expect("removed");
        assert!(message(load(&folder)).contains(&format!("{name}: is missing")));
        fs::write(&path, good).expect("restored");
    }
    assert_eq!(load(&folder).expect("loaded"), contents(3));
    assert!(!message(load(&run.path().join("checkpoints/000002"))).contains("000003"));
}

#[test]
fn without_a_good_one_nothing_is_offered() {
    let run = run();
    let folder = save_all(run.path(), [1]);
    fs::write(folder.join("state.json"), "{}").expect("damaged");
    let message = message(load(&folder));
    assert!(
        message.contains("state.json: has 2 bytes instead of") && !message.contains("previous"),
        "{message}"
    );
}

#[test]
fn only_the_newest_are_kept_and_always_the_one_just_written() {
    let run = run();
    for step in [10, 20, 30, 1_000_000] {
        save(run.path(), &contents(step), 2).expect("saved");
    }
    assert_eq!(names(run.path()), ["000030", "1000000", "latest"]);
    // A run resumed from an older step does not delete what it has just written.
    let folder = save(run.path(), &contents(15), 0).expect("saved");
    assert_eq!(names(run.path()), ["000015", "latest"]);
    assert_eq!(latest(run.path()).expect("listed"), Some(folder));
}

#[test]
fn a_step_saved_again_is_replaced() {
    let run = run();
    save_all(run.path(), [1, 2]);
    let mut again = contents(2);
    again.state = json!("again");
    let folder = save(run.path(), &again, 5).expect("saved");
    assert_eq!(load(&folder).expect("loaded"), again);
    assert_eq!(names(run.path()), ["000001", "000002", "latest"]);
}

#[test]
fn after_a_crash_the_newest_complete_checkpoint_is_found() {
    let run = run();
    assert_eq!(latest(run.path()).expect("listed"), None);
    let newest = save_all(run.path(), [1, 2]);
    let root = run.path().join("checkpoints");
    let found = || latest(run.path()).expect("listed");

    // Killed while writing step 3: a hidden folder, half full, and half a pointer beside it.
    fs::create_dir(root.join(".tmp-3-99")).expect("created");
    fs::write(root.join(".tmp-3-99/model.safetensors"), "half").expect("written");
    fs::write(root.join(".tmp-latest-99"), "0000").expect("written");
    assert_eq!(found(), Some(newest.clone()));
    // Killed before the pointer was moved, or the pointer is lost, dangling, or nonsense.
    fs::write(root.join("latest"), "000001\n").expect("written");
    assert_eq!(found(), Some(root.join("000001")));
    for pointer in ["000009", "", "../../etc", "+2", "\u{0}"] {
        fs::write(root.join("latest"), pointer).expect("written");
        assert_eq!(found(), Some(newest.clone()), "{pointer:?}");
    }
    fs::remove_file(root.join("latest")).expect("removed");
    assert_eq!(found(), Some(newest.clone()));
    // Killed while deleting step 7, or damaged: not complete.
    fs::create_dir(root.join("000007")).expect("created");
    fs::create_dir(root.join("notes")).expect("created");
    assert_eq!(found(), Some(newest.clone()));
    // Killed between moving step 2 aside and moving its successor in.
    fs::rename(&newest, root.join(".old-2-99")).expect("renamed");
    assert_eq!(found(), Some(root.join(".old-2-99")));
    assert_eq!(load(&root.join(".old-2-99")).expect("loaded"), contents(2));
    // And the next save cleans up.
    save(run.path(), &contents(8), 2).expect("saved");
    assert_eq!(names(run.path()), ["000007", "000008", "latest", "notes"]);
}

#[test]
fn where_no_checkpoint_is_complete_it_is_said_what_is_wrong_with_each() {
    let run = run();
    save_all(run.path(), [1, 2]);
    let root = run.path().join("checkpoints");
    fs::remove_file(root.join("latest")).expect("removed");
    fs::remove_file(root.join("000001/model.safetensors")).expect("removed");
    fs::remove_file(root.join("000002/manifest.json")).expect("removed");
    for line in [message(latest(run.path())), message(resolve(run.path()))] {
        assert!(line.contains("checkpoints: holds no complete checkpoint: 000002/manifest.json is missing"));
        assert!(line.contains("000001/model.safetensors is missing"), "{line}");
    }
    for step in 3..30 {
        fs::create_dir(root.join(format!("{step:06}"))).expect("created");
    }
    let line = message(latest(run.path()));
    assert!(line.contains("000029") && line.contains("and 24 more") && line.len() < 1000, "{line}");

    // A pointer is left of what was there once; hidden folders are left of what never was.
    fs::remove_dir_all(&root).expect("removed");
    fs::create_dir_all(root.join(".tmp-000004-99")).expect("created");
    fs::write(root.join("best"), "000004\n").expect("written");
    assert_eq!(latest(run.path()).expect("listed"), None);
    fs::write(root.join("latest"), "000004\n").expect("written");
    assert!(message(latest(run.path())).contains("latest names 000004, which is gone"));
    fs::remove_dir_all(&root).expect("removed");
    fs::write(&root, "").expect("written");
    assert!(message(latest(run.path())).contains("checkpoints: is not a folder"));
}

#[test]
#[cfg(unix)]
fn links_are_removed_or_replaced_and_what_they_lead_to_stays() {
    use std::os::unix::fs::symlink;
    let (run, outside) = (run(), run());
    let root = run.path().join("checkpoints");
    let moved = outside.path().join("000001");
    fs::rename(save_all(run.path(), [1]), &moved).expect("moved");
    symlink(&moved, root.join("000001")).expect("linked");
    let precious = outside.path().join("precious");
    fs::write(&precious, "precious").expect("written");
    let process = std::process::id();
    for name in [".tmp-7-99".into(), ".old-7-99".into(), format!(".tmp-000002-{process}")] {
        symlink(outside.path(), root.join(name)).expect("linked");
    }
    symlink(&precious, root.join(format!(".tmp-latest-{process}"))).expect("linked");
    symlink(outside.path().join("nowhere"), root.join("000002")).expect("linked");
    assert_eq!(
        latest(run.path()).expect("listed"),
        Some(root.join("000001")),
        "a link is as good as a folder"
    );

    assert_eq!(load(&save(run.path(), &contents(2), 1).expect("saved")).expect("loaded"), contents(2));
    assert_eq!(names(run.path()), ["000002", "latest"]);
    assert_eq!(load(&moved).expect("still there"), contents(1));
    assert_eq!(fs::read_to_string(&precious).expect("still there"), "precious");

    // Of a folder that is removed, the manifest goes first.
    fs::remove_file(root.join("000002/manifest.json")).expect("removed");
    symlink(&precious, root.join("000002/manifest.json")).expect("linked");
    save(run.path(), &contents(3), 1).expect("saved");
    assert_eq!(names(run.path()), ["000003", "latest"]);
    assert_eq!(fs::read_to_string(&precious).expect("still there"), "precious");
}

#[test]
#[cfg(unix)]
fn a_pipe_in_a_checkpoint_is_never_waited_for() {
    use crate::resume::pipe;
    let run = run();
    let folder = save_all(run.path(), [1, 2]);
    let root = run.path().join("checkpoints");
    for pointer in ["latest", "best"] {
        let _ = fs::remove_file(root.join(pointer));
        pipe(&root.join(pointer));
    }
    assert_eq!(latest(run.path()).expect("listed"), Some(folder.clone()));
    for name in ["state.json", "manifest.json"] {
        fs::remove_file(folder.join(name)).expect("removed");
        pipe(&folder.join(name));
        assert!(message(open(&folder)).contains(&format!("{name}: is not a regular file")));
        assert_eq!(latest(run.path()).expect("listed"), Some(root.join("000001")));
    }
}

/// The process that the next test kills: saves steps, each twice, as fast as it can. Does nothing unless told where.
#[test]
fn child_saves_until_killed() {
    let Some(run) = std::env::var_os("POLYSTAGE_TEST_CHILD_RUN") else { return };
    let run = Path::new(&run);
    let newest = latest(run).expect("listed").expect("one");
    for step in load(&newest).expect("complete").step.. {
        for _ in 0..2 {
            save(run, &contents(step), 2).expect("saved");
        }
    }
}

#[test]
fn a_process_killed_at_any_moment_leaves_a_complete_checkpoint_no_older_than_before() {
    let run = run();
    save_all(run.path(), [0]);
    let (_, module) = module_path!().split_once("::").expect("a module of the test binary");
    let mut seen = 0;
    for round in 0..12 {
        let mut child = std::process::Command::new(std::env::current_exe().expect("this binary"))
            .args(["--exact", &format!("{module}::child_saves_until_killed")])
            .env("POLYSTAGE_TEST_CHILD_RUN", run.path())
            .stdout(std::process::Stdio::null())
            .spawn()
            .expect("started");
        // Once it is past its first save, at some moment or other.
        let started = std::time::Instant::now();
        // Any later one: the next may have come and gone before this thread has its turn.
        let later = |name: String| name.parse::<u64>().is_ok_and(|step| step > seen);
        let saved = || {
            let folders = std::fs::read_dir(run.path().join("checkpoints")).expect("a folder");
            folders.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).any(later)
        };
        while !saved() {
            assert!(started.elapsed().as_secs() < 60, "the child never came to save");
            std::thread::yield_now();
        }
        std::thread::sleep(std::time::Duration::from_micros(370 * round));
        child.kill().expect("killed");
        child.wait().expect("ended");
        let step = load(&latest(run.path()).expect("listed").expect("one")).expect("complete").step;
        assert!(step >= seen, "step {step} after step {seen}");
        seen = step;
    }
}

#[test]
fn a_path_means_a_run_a_checkpoint_or_a_model() {
    let run = run();
    assert!(message(resolve(&run.path().join("nope"))).contains("does not exist"));
    assert!(message(resolve(run.path())).contains("neither a model folder"));
    let folder = save_all(run.path(), [1, 2]);
    assert_eq!(resolve(run.path()).expect("a run"), folder);
    assert_eq!(resolve(&folder).expect("a checkpoint"), folder);
    assert!(message(resolve(&folder.join("state.json"))).contains("is a file"));
    // A configuration beside the checkpoints does not hide them.
    fs::write(run.path().join("config.json"), "{}").expect("written");
    assert_eq!(resolve(run.path()).expect("a run"), folder);
    fs::remove_dir_all(run.path().join("checkpoints")).expect("removed");
    assert_eq!(resolve(run.path()).expect("a model without weights"), run.path());
}

#[test]
fn a_checkpoint_is_a_model_folder_whose_hashes_are_verified() {
    let run = run();
    let folder = save_all(run.path(), [1]);
    let (config, model) = load_model(&folder).expect("loaded");
    assert_eq!((config, model), (contents(1).config, contents(1).model));
    // What a model does not need may be missing.
    fs::remove_file(folder.join("optimizer.safetensors")).expect("removed");
    assert!(load_model(&folder).is_ok());
    let mut bytes = fs::read(folder.join("model.safetensors")).expect("read");
    *bytes.last_mut().expect("not empty") ^= 1;
    fs::write(folder.join("model.safetensors"), bytes).expect("written");
    assert!(message(load_model(&folder)).contains("does not match its SHA-256"));
    fs::remove_file(folder.join("manifest.json")).expect("removed");
    assert!(load_model(&folder).is_ok());
}

#[test]
fn half_floats_are_widened_exactly() {
    let f16 = [
        (0x0000u16, 0.0f32.to_bits()),
        (0x8000, (-0.0f32).to_bits()),
        (0x3c00, 1.0f32.to_bits()),
        (0xc580, (-5.5f32).to_bits()),
        (0x7bff, 65504.0f32.to_bits()),
        (0x0001, 2f32.powi(-24).to_bits()),
        (0x83ff, (-1023.0 * 2f32.powi(-24)).to_bits()),
        (0x0400, 2f32.powi(-14).to_bits()),
        (0x7c00, f32::INFINITY.to_bits()),
        (0xfc00, f32::NEG_INFINITY.to_bits()),
        (0x7e01, 0x7fc0_2000),
    ];
    let header = r#"{"h":{"dtype":"F16","shape":[11],"data_offsets":[0,22]}}"#;
    let data: Vec<u8> = f16.iter().flat_map(|(half, _)| half.to_le_bytes()).collect();
    let (_, tensors) = read_model(&safetensors(header, &data)).expect("read");
    let bits: Vec<u32> = tensors[0].data.iter().map(|x| x.to_bits()).collect();
    assert_eq!(bits, f16.map(|(_, float)| float));

    let header = r#"{"b":{"dtype":"BF16","shape":[1,2],"data_offsets":[0,4]}}"#;
    let (_, tensors) = read_model(&safetensors(header, &[0x80, 0x3f, 0x49, 0xc0])).expect("read");
    assert_eq!(tensors, [tensor("b", &[1, 2], vec![1.0, -3.140625])]);
}

#[test]
fn damaged_and_foreign_models_give_one_clear_line() {
    let fails = |header: &str, data: &[u8]| message(read_model(&safetensors(header, data)));
    let foreign = fails(r#"{"ids\n":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}"#, &[0; 8]);
    assert!(foreign.contains(r#"tensor "ids\n" is I64; convert it"#), "{foreign}");
    for (header, data) in [
        ("{", &[][..]),
        (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#, &[0; 4]),
        (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, &[0; 5]),
        (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#, &[0; 4]),
        (r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}"#, &[0; 4]),
        (r#"{"a":{"dtype":"F3\n2","shape":[1],"data_offsets":[0,4]}}"#, &[0; 4]),
    ] {
        assert!(fails(header, data).contains("invalid safetensors"), "{header}");
    }
    for length in [0, 1, 99, 100_000_001, u64::MAX - 7, u64::MAX] {
        assert!(message(read_model(&length.to_le_bytes())).contains("invalid safetensors"), "{length}");
    }
    let long = format!("{{\"a\":{{\"dtype\":\"{}\"}}}}", "x".repeat(1_000_000));
    assert!(fails(&long, &[]).len() < 1000);

    let folder = run();
    assert!(message(load_model(folder.path())).contains("config.json: is missing"));
    fs::write(folder.path().join("model.safetensors.index.json"), "{}").expect("written");
    fs::create_dir(folder.path().join("model.safetensors")).expect("created");
    fs::write(folder.path().join("config.json"), "[".repeat(100_000)).expect("written");
    assert!(message(load_model(folder.path())).contains("invalid JSON"));
    fs::write(folder.path().join("config.json"), "{}").expect("written");
    assert!(message(load_model(folder.path())).contains("is a folder, not a file"));
}

#[test]
fn write_atomic_replaces_the_bytes_and_leaves_nothing_else() {
    let folder = run();
    let path = folder.path().join("file");
    for bytes in [&b"old"[..], b"", b"newer"] {
        write_atomic(&path, bytes).expect("written");
        assert_eq!(fs::read(&path).expect("read"), bytes);
    }
    assert_eq!(fs::read_dir(folder.path()).expect("listed").count(), 1);
    let error = write_atomic(&folder.path().join("no/file"), b"").expect_err("an error");
    assert!(error.to_string().contains("no/file"), "{error}");
}

proptest! {
    #[test]
    fn a_file_cut_at_any_length_is_an_error_and_never_a_panic(file in 0usize..5, keep in 0.0..1.0f64) {
        let run = run();
        let folder = save_all(run.path(), [1]);
        let path = folder.join(FILES[file]);
        let bytes = fs::read(&path).expect("read");
        fs::write(&path, &bytes[..(keep * bytes.len() as f64) as usize]).expect("cut");
        // The manifest's last byte is a line feed, which it does not need.
        prop_assume!(file != 4 || ((keep * bytes.len() as f64) as usize) < bytes.len() - 1);
        message(load(&folder));
        if file == 1 {
            fs::remove_file(folder.join("manifest.json")).expect("removed");
            message(load_model(&folder));
        }
    }

    #[test]
    fn arbitrary_bytes_are_an_error_and_never_a_panic(
        header in "\\{(\"[ab]\":\\{\"dtype\":\"(F32|F16|BF16|F64)\",\"shape\":\\[[0-3](,[0-3])?\\],\"data_offsets\":\\[[0-9],[0-9]\\]\\},?){0,3}\\}",
        data in prop::collection::vec(any::<u8>(), 0..20),
        raw in any::<bool>(),
    ) {
        let bytes = if raw { data } else { safetensors(&header, &data) };
        match read_model(&bytes) {
            Ok((_, tensors)) => for tensor in tensors {
                prop_assert_eq!(tensor.data.len(), tensor.shape.iter().product::<usize>());
            },
            Err(error) => prop_assert_eq!(error.to_string().lines().count(), 1),
        }
    }
}
