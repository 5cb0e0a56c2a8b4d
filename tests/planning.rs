//! Plans for machines that are not there, as a user asks for them: no adapter is opened.

use std::path::{Path, PathBuf};
use std::process::Output;

use serde_json::Value;

use polystage::train::config::Config;

use crate::cli::{Place, one_line};

const CARDS: &str = "
[[devices]]
name = 'first'
memory = '8GiB'
rates = { peak_tflops = 40, peak_gb_s = 1000 }
[[devices]]
name = 'second'
memory = '4GiB'
rates = { peak_tflops = 30, peak_gb_s = 800 }
[[devices]]
name = 'third'
memory = '2GiB'
rates = { peak_tflops = 20, peak_gb_s = 600 }
[[links]]
from = 2
to = 0
latency_us = 50
gb_s = 8
";

/// A place with a machine file and a config whose blocks are large enough for three cards.
fn place() -> Place {
    let place = Place::new();
    std::fs::write(place.path("cards.toml"), CARDS).unwrap();
    let config = std::fs::read_to_string(place.path("tiny.toml")).unwrap();
    let config = config.replace("layers = 2", "layers = 8").replace("width = 32", "width = 512");
    let config = config.replace("context = 32", "context = 512").replace("sequence = 32", "sequence = 512");
    std::fs::write(place.path("gpt.toml"), config.replace("devices = [0, 0]\nmicrobatches = 2\n", ""))
        .unwrap();
    place
}

/// Runs where there is no adapter.
fn run(place: &Place, arguments: &[&str]) -> Output {
    let mut command = place.command(arguments);
    command.env("VK_ICD_FILENAMES", "/dev/null").env("VK_DRIVER_FILES", "/dev/null");
    command.output().unwrap()
}

fn succeed(place: &Place, arguments: &[&str]) -> String {
    let output = run(place, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn refused(place: &Place, arguments: &[&str]) -> String {
    let output = run(place, arguments);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}");
    one_line(&output)
}

fn json(place: &Place, arguments: &[&str]) -> Value {
    serde_json::from_str(&succeed(place, &[arguments, &["--json"]].concat())).unwrap()
}

fn devices(plan: &Value, list: &str) -> Vec<u64> {
    plan[list].as_array().unwrap().iter().map(|share| share["device"].as_u64().unwrap()).collect()
}

const PLAN: [&str; 4] = ["plan", "gpt.toml", "--machine", "cards.toml"];

#[test]
fn the_devices_that_were_asked_for_are_planned_under_the_numbers_of_their_file() {
    let place = place();
    let plan = |more: &[&str]| json(&place, &[&PLAN[..], more].concat());
    let both = plan(&["--devices", "2,0"]);
    assert_eq!((devices(&both, "devices"), devices(&both, "left_out")), (vec![2, 0], vec![1]));
    assert_eq!(both["left_out"][0]["reason"], "not among the devices that were asked for");
    let links = both["links"].as_array().unwrap().iter();
    assert!(links.map(|link| link["from"].as_u64().unwrap()).all(|from| from != 1));
    assert_eq!(devices(&plan(&["--devices", "1"]), "devices"), [1]);
    assert_eq!(devices(&plan(&["--set", "pipeline.devices=2"]), "devices"), [0, 1]);
    assert_eq!(devices(&plan(&["--set", "pipeline.devices=[1, 2]"]), "devices"), [1, 2]);
    let all = plan(&[]);
    assert_eq!(devices(&all, "devices").len() + devices(&all, "left_out").len(), 3);
    // A list for a machine at hand, as long as the file's.
    assert_eq!(devices(&plan(&["--set", "pipeline.devices=[0, 0, 1]"]), "devices"), [0, 1, 2]);
    // Budgets go by the same numbers.
    let limited = plan(&["--devices", "2,0", "--memory", "0=1GiB"]);
    assert_eq!(limited["devices"][1]["budget"], 1u64 << 30);
    assert_eq!(limited["devices"][0]["budget"], 2u64 << 30);
    // What is written is the whole machine, with the budgets in force.
    succeed(
        &place,
        &[&PLAN[..], &["--devices", "2,0", "--memory", "0=1GiB", "--write-machine", "w.toml"]].concat(),
    );
    let written = std::fs::read_to_string(place.path("w.toml")).unwrap();
    assert_eq!(written.matches("[[devices]]").count(), 3);
    assert!(written.contains("memory = \"1GiB\""), "{written}");
    // What is planned for is called after what may be used.
    assert_eq!(
        (&both["machine"], &all["machine"]),
        (&"third + first".into(), &"first + second + third".into())
    );
}

#[test]
fn devices_and_sizes_that_cannot_be_meant_get_one_line() {
    let place = place();
    for (more, says) in [
        (&["--devices", "3"][..], "device 3 does not exist: first + second + third has 3 (0, 1, 2)"),
        (&["--devices", "1,1"], "device 1 is named more often than first + second + third has it"),
        (&["--devices", "0,0,1"], "device 0 is named more often"),
        (&["--set", "pipeline.devices=4"], "4 are asked for, and first + second + third has 3"),
        (&["--set", "pipeline.devices=[0, 0]"], "device 0 is named more often"),
        (&["--set", "pipeline.devices=many"], "\"many\" is not known"),
        (&["--memory", "1300"], "--memory: 1300 is 1300 bytes; write \"1300MiB\""),
        (&["--memory", "6"], "--memory: 6 is 6 bytes; write \"6GiB\""),
        (
            &["--devices", "2,0", "--memory", "1=6GiB"],
            "--memory: \"1=6GiB\": \"1\" is no device that may be used; those are 0, 2 (",
        ),
        (&["--rank", "4"], "--rank: is for a model's folder; what gpt.toml says is changed with --set"),
    ] {
        let line = refused(&place, &[&PLAN[..], more].concat());
        assert!(line.contains(says), "{more:?}: {line}");
    }
    std::fs::write(place.path("small.toml"), CARDS.replace("'8GiB'", "23")).unwrap();
    let line = refused(&place, &["plan", "gpt.toml", "--machine", "small.toml"]);
    assert!(
        line.contains("small.toml: line 4: devices[0].memory: 23 is 23 bytes; write \"23GiB\""),
        "{line}"
    );
}

#[test]
fn each_device_of_a_plan_says_what_it_is_worth() {
    let place = place();
    let plan = json(&place, &PLAN);
    let without = plan["without"].as_array().unwrap();
    assert_eq!(without.len(), plan["devices"].as_array().unwrap().len());
    let slower = |device: usize| without[device]["slower"].as_f64().unwrap();
    assert!(slower(0) > slower(2) && slower(2) > 0.0, "{without:?}");
    let text = succeed(&place, &PLAN);
    assert!(text.contains("without device 0 (first): ") && text.contains(" % slower"), "{text}");
    let alone = json(&place, &[&PLAN[..], &["--devices", "0"]].concat());
    assert_eq!(alone["without"].as_array().unwrap().len(), 0);
}

#[test]
fn a_run_on_a_machine_of_a_file_is_planned_dry_without_an_adapter() {
    let place = place();
    let dry = ["train", "gpt.toml", "--machine", "cards.toml", "--dry-run", "--out", "run"];
    let text = succeed(&place, &[&dry[..], &["--devices", "2,0"]].concat());
    assert!(text.contains("device 2 (third): ") && text.contains("device 0 (first): "), "{text}");
    assert!(!text.contains("(second)") && !text.contains("device 1"), "{text}");
    assert!(text.contains("devices = [2, 0]") || text.contains("devices = [\n    2,\n    0,\n]"), "{text}");
    assert!(!place.path("run").exists());
    let model = golden("llama");
    let model = model.to_str().unwrap();
    let mut tokens: Vec<u8> = [20240520u32, 1, 1000].iter().flat_map(|n| n.to_le_bytes()).collect();
    tokens.resize(1024 + 2 * 1000, 0);
    std::fs::write(place.path("tokens.bin"), tokens).unwrap();
    let tune = ["finetune", model, "--data", "tokens.bin", "--machine", "cards.toml", "--dry-run"];
    let text = succeed(&place, &[&tune[..], &["--sequence", "16"]].concat());
    assert!(text.contains("of them trained") && text.contains(" of 8.00 GiB"), "{text}");
    // A run that is to begin does need one.
    let line = refused(&place, &dry[..4]);
    assert!(line.contains("no WebGPU adapter found"), "{line}");
}

#[test]
fn a_dry_run_says_of_each_device_what_the_plan_says() {
    let place = place();
    // Two stages a device, so that what a device has lies apart.
    let choices = ["--devices", "2,0", "--set", "pipeline.schedule=zb-v", "--set", "pipeline.microbatches=4"];
    let plan = json(&place, &[&PLAN[..], &choices].concat());
    let dry = ["train", "gpt.toml", "--machine", "cards.toml", "--dry-run", "--out", "run"];
    let text = succeed(&place, &[&dry[..], &choices].concat());
    for share in plan["devices"].as_array().unwrap() {
        let (device, work) = (share["device"].as_u64().unwrap(), share["work"].as_f64().unwrap());
        let line = text.lines().find(|line| line.starts_with(&format!("device {device} ("))).unwrap();
        assert!(line.contains(&format!("; {:.1} % of the work", 100.0 * work)), "{line}: {share}");
        let has = |layer: u64| {
            share["stages"].as_array().unwrap().iter().any(|s| s["first"] == layer || s["end"] == layer + 1)
        };
        assert_eq!((line.contains("embedding"), line.contains("head")), (has(0), has(9)), "{line}: {share}");
    }
}

#[test]
fn a_runs_folder_is_planned_as_the_run_and_says_so() {
    let place = place();
    let text = std::fs::read_to_string(place.path("gpt.toml")).unwrap();
    let settings = ["pipeline.devices=[1]", "pipeline.microbatches=2", "train.batch=8"].map(String::from);
    let config = Config::parse(&text, &settings, "gpt.toml").unwrap();
    let run_folder = place.path("run");
    let saved = run_folder.join("checkpoints/000010");
    std::fs::create_dir_all(&saved).unwrap();
    std::fs::write(run_folder.join("config.toml"), config.to_toml()).unwrap();
    let output = run(&place, &["plan", "run", "--machine", "cards.toml", "--json"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && said.lines().count() == 1, "{said}");
    assert!(said.contains("note: run is a run: planned as its config.toml says"), "{said}");
    assert!(said.contains("pipeline.microbatches stays 2"), "{said}");
    let plan: Value = serde_json::from_slice(&output.stdout).unwrap();
    // The devices are chosen anew, all else is the run's.
    let set = ["--set", "pipeline.microbatches=2", "--set", "train.batch=8"];
    assert_eq!(plan, json(&place, &[&PLAN[..], &set].concat()));
    assert!(devices(&plan, "devices").len() > 1);
    fn of<'a>(more: &[&'a str]) -> Vec<&'a str> {
        [&["plan", "run", "--machine", "cards.toml"], more].concat()
    }
    assert_eq!(devices(&json(&place, &of(&["--devices", "1"])), "devices"), [1]);
    assert_eq!(json(&place, &of(&["--set", "train.batch=4"]))["sequences"], 2);
    let line = refused(&place, &of(&["--rank", "4"]));
    assert!(line.contains("run/config.toml says is changed with --set"), "{line}");
    let line = refused(&place, &of(&["--set", "model.layers=2"]));
    assert!(line.contains("a run keeps its model"), "{line}");
    // A checkpoint is a model's folder, of a run that is named.
    std::fs::copy(golden("qwen2").join("config.json"), saved.join("config.json")).unwrap();
    let output = run(&place, &["plan", "run/checkpoints/000010", "--machine", "cards.toml"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && said.contains("is a checkpoint, planned as `finetune`"), "{said}");
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models").join(name)
}

#[test]
fn a_folder_with_config_json_alone_is_planned_as_finetune_trains_it() {
    let place = place();
    std::fs::create_dir(place.path("model")).unwrap();
    std::fs::copy(golden("qwen2").join("config.json"), place.path("model/config.json")).unwrap();
    let plan = |model: &str, more: &[&str]| {
        json(&place, &[&["plan", model, "--machine", "cards.toml"], more].concat())
    };
    let bare = plan("model", &[]);
    assert_eq!(bare["sequences"].as_u64().unwrap() * bare["microbatches"].as_u64().unwrap(), 8);
    assert_eq!(bare, plan(golden("qwen2").to_str().unwrap(), &[]), "the weights say nothing more");
    let seconds = |more: &[&str]| plan("model", more)["step_seconds"].as_f64().unwrap();
    assert!(seconds(&["--full", "--devices", "0"]) > seconds(&["--devices", "0"]));
    assert!(seconds(&["--batch", "64", "--devices", "0"]) > seconds(&["--devices", "0"]));
    // As the flags of `finetune` do in a config.
    let config = "[model]\npath = 'model'\n[adapter]\nrank = 4\n[data]\ntrain = ['text.txt']\n\
                  [train]\nsteps = 1\nbatch = 4\nsequence = 16\n";
    std::fs::write(place.path("lora.toml"), config).unwrap();
    assert_eq!(plan("lora.toml", &[]), plan("model", &["--rank", "4", "--batch", "4", "--sequence", "16"]));
    let line = refused(&place, &["plan", "model", "--machine", "cards.toml", "--full", "--rank", "4"]);
    assert!(line.contains("--full"), "{line}");
    // Whatever needs weights says so.
    std::fs::write(place.path("t.txt"), "text").unwrap();
    let line = refused(&place, &["finetune", "model", "--data", "t.txt"]);
    assert!(line.contains("model.safetensors"), "{line}");
}

#[test]
fn a_name_on_the_hub_is_no_folder_and_every_verb_says_how_to_get_it() {
    let place = place();
    let named = "[model]\npath = 'owner/a-model'\n[data]\ntrain = ['text.txt']\n[train]\nsteps = 1\nbatch = 1\nsequence = 8\n";
    std::fs::write(place.path("named.toml"), named).unwrap();
    for arguments in [
        &["plan", "owner/a-model"][..],
        &["finetune", "owner/a-model", "--data", "text.txt"],
        &["eval", "owner/a-model", "--data", "text.txt"],
        &["generate", "owner/a-model", "--prompt", "x"],
        &["chat", "owner/a-model"],
        &["export", "owner/a-model", "--out", "x"],
        &["merge", "owner/a-model", "--out", "x"],
        &["train", "named.toml"],
        &["plan", "named.toml"],
    ] {
        let line = refused(&place, arguments);
        let says = "`hf download owner/a-model --local-dir a-model`";
        assert!(line.contains(says) && line.contains("give a-model"), "{arguments:?}: {line}");
    }
    std::fs::create_dir(place.path("a-model")).unwrap();
    let line = refused(&place, &["generate", "owner/a-model", "--prompt", "x"]);
    assert!(line.contains("does not exist, but a-model does; give that"), "{line}");
    let line = refused(&place, &["plan", "configs/gpt.toml"]);
    assert!(line.contains("does not exist") && !line.contains("hf download"), "{line}");
}

#[test]
fn what_would_help_is_what_the_asker_can_do_and_was_tried() {
    let place = place();
    let says = |more: &[&str]| refused(&place, &[&PLAN[..], &["--devices", "2"], more].concat());
    let line = says(&["--memory", "150MiB"]);
    assert!(line.contains("device 2 (third) lacks") && line.contains("--memory 2="), "{line}");
    // More than the card has is no advice.
    let large = ["--set", "model.layers=60", "--set", "model.width=1024"];
    let line = says(&large);
    assert!(line.contains("lacks") && !line.contains("--memory"), "{line}");
    for advice in
        line.split("it would fit with ").nth(1).into_iter().flat_map(|list| list.split(", or with "))
    {
        if let Some(set) = advice.strip_prefix("--set ") {
            let set = set.split(',').next().unwrap();
            succeed(&place, &[&PLAN[..], &["--devices", "2"], &large, &["--set", set]].concat());
        }
    }
}

#[test]
fn a_tensor_larger_than_a_file_may_be_has_one_of_its_own_and_is_named() {
    let place = place();
    let model = golden("llama");
    let model = model.to_str().unwrap();
    let export =
        |out: &str, size: &str| run(&place, &["export", model, "--out", out, "--max-shard-size", size]);
    let output = export("many", "20KB");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    assert!(
        said.contains("warning: model.embed_tokens.weight takes") && said.contains("a file of its own"),
        "{said}"
    );
    let said = String::from_utf8_lossy(&export("one", "1GB").stderr).into_owned();
    assert!(!said.contains("warning"), "{said}");
    let line = one_line(&export("none", "5"));
    assert!(line.contains("--max-shard-size: 5 is 5 bytes; write \"5GiB\""), "{line}");
    assert!(!place.path("none").exists());
}

#[test]
fn a_device_with_next_to_nothing_to_do_is_called_needless_and_each_says_which_layers_it_has() {
    let place = place();
    let slow = "\n[[devices]]\nname = 'slow'\nrates = { peak_tflops = 0.01, peak_gb_s = 1 }\n";
    std::fs::write(place.path("cards.toml"), CARDS.replace("\n[[links]]", &format!("{slow}[[links]]")))
        .unwrap();
    let dry = |devices: &str| {
        let more = [
            "--machine",
            "cards.toml",
            "--devices",
            devices,
            "--dry-run",
            "--set",
            "train.evaluate_every=12",
        ];
        succeed(&place, &[&["train", "gpt.toml", "--set", "data.split=0.2"][..], &more].concat())
    };
    let text = dry("3,0,1");
    assert!(
        text.contains("         a step is as fast without device 3: --devices 0,1 leaves it out\n"),
        "{text}"
    );
    assert!(text.contains(": 1 layer (embedding); 0.0 % of the work"), "{text}");
    assert!(text.contains(" bytes, at the end\n"), "{text}");
    assert!(!dry("0,1").contains("leaves it out"));
}
