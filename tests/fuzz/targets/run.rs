//! What a run leaves in its folder, and reads when it goes on.

use std::fs;
use std::path::{Path, PathBuf};

use polystage::schedule::{Costs, generate};
use polystage::timeline::{Comparison, DeviceName, Prediction, Timeline};
use polystage::train::checkpoint::{latest, open, open_model, resolve};
use polystage::train::data::Corpus;
use polystage::train::run::Run;
use polystage::train::source::{Fingerprints, Origin};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::folder::{file, read};
use super::{Target, outcome, parts, whole};

/// The rows of a run that is continued.
pub static METRICS: Target = Target {
    name: "metrics",
    words: r#""step" "loss" "valid_loss" "step_seconds" "tokens" null { } : ,"#,
    seeds: |_| {
        let row = |step: u64| {
            format!("{{\"step\":{step},\"loss\":2.5,\"valid_loss\":2.{step},\"step_seconds\":0.1}}\n")
        };
        vec![
            (1..6).map(row).collect::<String>().into_bytes(),
            b"{\"step\":1,\"loss\":2.5}\n{\"step\":2,\"lo".to_vec(),
        ]
    },
    run: |folder, input| {
        fs::write(folder.join("metrics.jsonl"), input).expect("written");
        let train = Corpus::from_bytes(b"text".to_vec()).fingerprint().expect("nobody changes it");
        let origin = Origin {
            config: json!({}),
            companions: Vec::new(),
            tokenizer: "bytes".into(),
            pretrained: None,
            fingerprints: Fingerprints { train, valid: None, base: None },
        };
        let run = Run::open(folder, "", origin, 1, 3);
        outcome(run.map(|run| format!("{:?} {}", run.best(), run.stale())))
    },
};

/// The files of a checkpoint whose manifest fits them: the state, the model's configuration, the headers of weights and
/// optimizer.
pub static STATE: Target = Target {
    name: "state",
    words: r#""step" "seed" "tokenizer" "bytes" null true { } [ ] : ,"#,
    seeds: |_| {
        let header = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
        vec![whole(&[
            r#"{"step":7,"seed":1,"tokenizer":"bytes"}"#,
            r#"{"model_type":"gpt2"}"#,
            header,
            header,
        ])]
    },
    run: |run, input| {
        let [state, config, weights, optimizer] = parts(input);
        let folder = checkpoint(run, [state, config, &file(weights), &file(optimizer)]);
        outcome(open(&folder).and_then(|checkpoint| {
            Ok(format!("{} {}", read(&checkpoint.weights)?, read(&checkpoint.optimizer)?))
        }))
    },
};

const FILES: [&str; 4] = ["state.json", "config.json", "model.safetensors", "optimizer.safetensors"];

/// Writes the checkpoint of step 7 with these files and their manifest.
fn checkpoint(run: &Path, files: [&[u8]; 4]) -> PathBuf {
    let folder = run.join("checkpoints/000007");
    fs::create_dir_all(&folder).expect("a folder");
    let mut listed = serde_json::Map::new();
    for (name, bytes) in FILES.into_iter().zip(files) {
        fs::write(folder.join(name), bytes).expect("written");
        let sha256: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        listed.insert(name.into(), json!({"bytes": bytes.len(), "sha256": sha256}));
    }
    fs::write(folder.join("manifest.json"), json!({"step": 7, "files": listed}).to_string())
        .expect("written");
    folder
}

/// A manifest beside files that stay, and the two pointers.
pub static MANIFEST: Target = Target {
    name: "manifest",
    words: r#"
        "step" "files" "bytes" "sha256" "state.json" "config.json" "model.safetensors" "adapter_config.json"
        "../config.json" "/dev/zero" "." "" 000007 000009 { } : ,"#,
    seeds: |run| {
        let header = file(br#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#);
        let folder = checkpoint(run, [b"{}", b"{}", &header, &header]);
        let manifest = fs::read_to_string(folder.join("manifest.json")).expect("read");
        vec![whole(&[&manifest, "000007\n", "000007\n"]), whole(&[&manifest, "", "9"])]
    },
    run: |run, input| {
        let [manifest, newest, best] = parts(input);
        let root = run.join("checkpoints");
        let folder = root.join("000007");
        for (path, bytes) in [
            (folder.join("manifest.json"), manifest),
            (root.join("latest"), newest),
            (root.join("best"), best),
        ] {
            fs::write(path, bytes).expect("written");
        }
        let found = outcome(latest(run).map(|folder| format!("{:?}", folder.is_some())));
        let meant = outcome(resolve(run).map(|_| String::new()));
        let opened = outcome(open(&folder).and_then(|checkpoint| read(&checkpoint.weights)));
        let model = outcome(open_model(&folder).map(|_| String::new()));
        [opened, found, meant, model].join(" ")
    },
};

/// What a plan promised.
pub static PREDICTION: Target = Target {
    name: "prediction",
    words: r#"
        "devices" "number" "adapter" "name" "left_out" "cuts" "recompute" "schedule" "costs" "stages" "hops" "ranks" "ties" "cores" "slowdown" "jitter" "part"
        "seconds" "budget" "user" "owner" "copy_engine" 0F0 1B1 \n null true { } [ ] : ,"#,
    seeds: |_| {
        vec![promise("1f1b", 2, 2).to_json().into_bytes(), promise("zb-v", 2, 2).to_json().into_bytes()]
    },
    run: |_, input| {
        let Ok(text) = std::str::from_utf8(input) else { return "not text".into() };
        outcome(Prediction::from_json(text, "prediction.json").and_then(|prediction| {
            let timeline = prediction.timeline()?;
            let comparison = Comparison::new(Some(prediction), &timeline)?;
            Ok(show(&comparison))
        }))
    },
};

/// What was measured, beside a prediction that stays.
pub static TRACE: Target = Target {
    name: "trace",
    words: r#"
        "otherData" "polystage" "devices" "traceEvents" "name" "number" "adapter" "step" "cat" "ph" "X" "pid" "tid" "args" "start_seconds"
        "end_seconds" "microbatch" "bytes" "0F0" "1B1" "forward" "copy" "host" "step" null { } [ ] : ,"#,
    seeds: |_| {
        let traces = [promise("1f1b", 2, 2), promise("zb-h1", 2, 3)];
        traces.map(|promise| promise.timeline().expect("a timeline").to_chrome_trace().into_bytes()).to_vec()
    },
    run: |_, input| {
        let Ok(text) = std::str::from_utf8(input) else { return "not text".into() };
        outcome(Timeline::from_chrome_trace(text, "trace.json").and_then(|timeline| {
            let drawn = timeline.to_svg("title").len();
            assert_eq!(
                Timeline::from_chrome_trace(&timeline.to_chrome_trace(), "again")?.devices,
                timeline.devices
            );
            let alone = show(&Comparison::new(None, &timeline)?);
            let both =
                outcome(Comparison::new(Some(promise("1f1b", 2, 2)), &timeline).map(|both| show(&both)));
            Ok(format!("{} {alone} {both}", drawn.ilog2()))
        }))
    },
};

fn promise(schedule: &str, ranks: usize, microbatches: usize) -> Prediction {
    let schedule = generate(schedule, ranks, microbatches).expect("a schedule");
    let mut costs = Costs::uniform(&schedule, 0.010, 0.011, 0.012, 1e-3);
    costs.ranks.iter_mut().for_each(|rank| rank.update = 5e-3);
    let names = (0..ranks).map(|rank| format!("card {rank}"));
    Prediction::new(DeviceName::list(names), &schedule, costs)
}

/// Draws and says everything about a step.
fn show(comparison: &Comparison) -> String {
    let report: Value = comparison.to_json();
    let drawn = comparison.to_svg("title").len() + comparison.to_terminal(100, true).len();
    let tables =
        comparison.shares_to_terminal(100, true).len() + comparison.actions_to_terminal(100, true).len();
    let said = comparison.findings().len() + comparison.hints(Some(2)).len() + comparison.slowest().len();
    format!("{} {} {said}", report["devices"], (drawn + tables).ilog2())
}
