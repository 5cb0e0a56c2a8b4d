//! The pages in docs/ say what the code does: every key and field, with its default and unit, and nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use polystage::plan::{MACHINE_KEYS, Machine};
use polystage::schedule::{Costs, Schedule, generate, grid};
use polystage::timeline::{DeviceName, Prediction};
use polystage::train::config::{Absent, Config, TABLES, Table, defaults, literal, smallest};
use polystage::train::trainer::{DeviceRow, Row};
use serde_json::Value;

fn page(name: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs").join(name)).unwrap()
}

/// The rows of all tables whose first heading is one of `headings`, under each heading of the page.
fn tables(page: &str, headings: &[&str]) -> Vec<(String, Vec<Vec<String>>)> {
    let mut found: Vec<(String, Vec<Vec<String>>)> = Vec::new();
    let (mut section, mut inside) = (String::new(), false);
    for line in page.lines() {
        if let Some(title) = line.strip_prefix("## ") {
            section = title.to_string();
        }
        let Some(row) = line.strip_prefix("| ").and_then(|line| line.strip_suffix(" |")) else {
            inside &= line.starts_with("|---");
            continue;
        };
        let cells: Vec<String> = row.split('|').map(|cell| cell.trim().to_string()).collect();
        match (inside, headings.contains(&cells[0].as_str())) {
            (false, true) => found.push((section.clone(), Vec::new())),
            (false, false) => continue,
            (true, _) => found.last_mut().unwrap().1.push(cells),
        }
        inside = true;
    }
    found
}

/// The names in the first column, which are in backticks.
fn names(rows: &[Vec<String>]) -> BTreeSet<String> {
    let names: BTreeSet<String> = rows.iter().map(|row| row[0].trim_matches('`').to_string()).collect();
    assert_eq!(names.len(), rows.len(), "a name twice");
    names
}

/// The fenced blocks of a kind.
fn blocks<'a>(page: &'a str, kind: &str) -> Vec<&'a str> {
    let fence = format!("```{kind}\n");
    let parts = page.split(fence.as_str()).skip(1);
    parts.map(|part| &part[..part.find("```").unwrap()]).collect()
}

fn keys(value: &Value) -> BTreeSet<String> {
    value.as_object().unwrap().keys().cloned().collect()
}

/// The table of a page of configs that the code asks for.
fn expected(table: &Table) -> String {
    let defaults = defaults().unwrap();
    let mut text = String::from("| key | default | unit | what |\n|---|---|---|---|\n");
    for key in table.keys {
        let default = match key.absent {
            Absent::Refused(_) => "required".to_string(),
            Absent::Default => format!("`{}`", literal(&defaults[table.name][key.name])),
            Absent::Otherwise { words, .. } => words.to_string(),
        };
        let unit = if key.unit.is_empty() { String::new() } else { format!("{} ", key.unit) };
        text += &format!("| `{}` | {default} | {unit}| {} |\n", key.name, key.about);
    }
    text
}

#[test]
fn the_page_of_configs_has_every_key_with_its_default_and_unit_and_no_other() {
    let page = page("config.md");
    for table in TABLES {
        let expected = format!("## [{}]\n\n{}\n\n{}", table.name, table.about, expected(table));
        assert!(page.contains(&expected), "docs/config.md should have:\n{expected}");
    }
    let rows: usize = tables(&page, &["key"]).iter().map(|(_, rows)| rows.len()).sum();
    assert_eq!(rows, TABLES.iter().map(|table| table.keys.len()).sum::<usize>(), "a row that is no key");
    assert!(!blocks(&page, "toml").is_empty());
    for example in blocks(&page, "toml") {
        Config::parse(example, &[], "docs/config.md").unwrap();
    }
}

/// A table of a machine file by its path; of lists the first entry.
fn at<'a>(mut table: &'a mut toml::Table, path: &str) -> &'a mut toml::Table {
    for part in path.split('.').filter(|part| !part.is_empty()) {
        let mut entry = table.get_mut(part).unwrap();
        if entry.is_array() {
            entry = entry.get_mut(0).unwrap();
        }
        // Times are a table for each kind of layer.
        if part == "layers" {
            entry = entry.get_mut("mlp").unwrap();
        }
        table = entry.as_table_mut().unwrap();
    }
    table
}

#[test]
fn the_page_of_machine_files_has_every_key_with_its_default_and_no_other() {
    let page = page("machine.md");
    let examples = blocks(&page, "toml");
    examples.iter().for_each(|example| drop(Machine::parse(example, "docs/machine.md").unwrap()));
    let example: toml::Table = examples[examples.len() - 1].parse().unwrap();
    let parse = |table: &toml::Table| Machine::parse(&table.to_string(), "docs/machine.md");
    parse(&example).unwrap();
    let described = tables(&page, &["key"]);
    assert_eq!(described.len(), MACHINE_KEYS.len());
    for ((heading, rows), (path, keys)) in described.iter().zip(MACHINE_KEYS) {
        let title = heading.replace(['[', ']'], "").replace(".KIND", "").replace("The file", "");
        assert_eq!(&title, path);
        assert_eq!(names(rows), keys.iter().map(|key| key.to_string()).collect(), "{heading}");
        for row in rows {
            let (key, default) = (row[0].trim_matches('`'), row[1].as_str());
            let place = format!("{heading} {key}");
            let mut without = example.clone();
            assert!(at(&mut without, path).remove(key).is_some(), "the example lacks {place}");
            let parsed = parse(&without);
            assert_eq!(parsed.is_err(), default == "required", "{place}: {:?}", parsed.err());
            let value = default.strip_prefix('`').and_then(|default| default.strip_suffix('`'));
            if let Some(value) = value.and_then(|value| format!("v = {value}").parse::<toml::Table>().ok()) {
                let mut with = example.clone();
                at(&mut with, path).insert(key.into(), value["v"].clone());
                assert_eq!(parse(&with).unwrap(), parsed.unwrap(), "{place} = {default}");
            }
        }
    }
}

#[test]
fn the_schedules_of_their_page_are_proved_and_drawn_as_it_shows() {
    let page = page("schedules.md");
    let texts = blocks(&page, "text");
    let schedule: Schedule = texts[0].parse().unwrap();
    schedule.validate().unwrap();
    schedule.lowered().unwrap().validate().unwrap();
    assert_eq!(grid(&schedule), texts[1]);
    // The same without header, comments, columns and dots.
    let bare: Schedule = texts[2].parse().unwrap();
    assert_eq!(bare.ranks, schedule.ranks);
    assert_eq!((bare.stages, bare.microbatches), (schedule.stages, schedule.microbatches));
    let (wrong, error) = texts[3].split_once("\n\n").unwrap();
    let refused = wrong.parse::<Schedule>().unwrap().validate().unwrap_err();
    assert_eq!(refused.to_string(), error.trim_end());
    let replicas = texts[4].parse::<Schedule>().unwrap().completed(&[]).unwrap();
    let shares = replicas.placement().unwrap();
    assert_eq!([0, 1].map(|replica| shares.microbatches(replica).count()), [5, 3]);
    for (_, rows) in tables(&page, &["kind"]) {
        for kind in names(&rows) {
            format!("0{kind}0").parse::<polystage::schedule::Action>().unwrap();
        }
        assert_eq!(rows.len(), 8);
    }
    for (_, rows) in tables(&page, &["once a step"]) {
        for action in names(&rows) {
            assert!(action.parse::<polystage::schedule::Action>().unwrap().kind.is_whole());
        }
        assert_eq!(rows.len(), 6);
    }
    "C 0F0 0F1 0B0 0B1 N U".parse::<Schedule>().unwrap().validate().unwrap();
}

/// The tables of run.md by the heading of their first column.
fn of_run(heading: &str) -> BTreeSet<String> {
    let found = tables(&page("run.md"), &[heading]);
    found.iter().flat_map(|(_, rows)| names(rows)).collect()
}

#[test]
fn the_page_of_runs_has_every_field_of_metrics_and_predictions_and_no_other() {
    let device =
        DeviceRow { device: 0, adapter: "a".into(), busy_fraction: 0.5, host_fraction: 0.1, bytes_moved: 1 };
    let row = Row {
        step: 1,
        loss: 1.0,
        valid_loss: Some(1.0),
        grad_norm: 1.0,
        loss_scale: Some(1.0),
        skipped: true,
        learning_rate: 1.0,
        tokens_per_second: 1.0,
        step_seconds: 1.0,
        predicted_step_seconds: Some(1.0),
        plan_since_step: 0,
        plan: "1f1b, 1 microbatch, layers 0:1".into(),
        devices: vec![device],
    };
    let row = serde_json::to_value(row).unwrap();
    let metrics = tables(&page("run.md"), &["field"]);
    let fields: BTreeMap<String, BTreeSet<String>> =
        metrics.iter().map(|(section, rows)| (section.clone(), names(rows))).collect();
    assert_eq!(fields["metrics.jsonl"], keys(&row));
    assert_eq!(of_run("field of a device"), keys(&row["devices"][0]));
    let schedule = generate("1f1b", 2, 2).unwrap();
    let costs = Costs::uniform(&schedule, 1.0, 1.0, 1.0, 0.0);
    let prediction = Prediction::new(DeviceName::list(["a", "b"]), &schedule, costs).to_json();
    assert_eq!(fields["prediction.json"], keys(&serde_json::from_str(&prediction).unwrap()));
}

/// Asserts that the page of runs names every file of a run's folder and of its last checkpoint, and the fields of both
/// files that say what it is.
pub fn assert_described(run: &Path, checkpoint: &str) {
    let files = of_run("file");
    let checkpoint = run.join("checkpoints").join(checkpoint);
    for folder in [run, &checkpoint] {
        for entry in std::fs::read_dir(folder).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            assert!(files.contains(&name), "docs/run.md does not describe {name}");
        }
    }
    for name in files.iter().filter(|name| *name != "comparison.svg") {
        assert!(run.join(name).exists() || checkpoint.join(name).exists(), "docs/run.md describes {name}");
    }
    for name in ["state.json", "manifest.json"] {
        let text = std::fs::read_to_string(checkpoint.join(name)).unwrap();
        assert_eq!(
            of_run(&format!("field of {name}")),
            keys(&serde_json::from_str(&text).unwrap()),
            "{name}"
        );
    }
}

#[test]
fn the_keys_of_a_config_are_printed_as_a_config_and_a_files_own_values_are_marked() {
    let place = crate::cli::Place::new();
    let printed = place.succeed(&["config"]);
    assert_eq!(
        Config::parse(&printed, &[], "printed").unwrap(),
        Config::parse(&smallest(), &[], "").unwrap()
    );
    for table in TABLES {
        assert!(printed.contains(&format!("[{}]", table.name)));
        assert!(table.keys.iter().all(|key| printed.contains(key.about)));
    }
    let of_file = place.succeed(&["config", "tiny.toml", "--set", "train.seed=7"]);
    let line = |name: &str| of_file.lines().find(|line| line.starts_with(&format!("{name} = "))).unwrap();
    assert!(line("seed").contains("7") && line("seed").contains("default: 1"), "{of_file}");
    assert!(line("keep").contains("2") && line("keep").contains("default: 3"), "{of_file}");
    assert!(!line("epsilon").contains("default"), "{of_file}");
    std::fs::write(place.path("again.toml"), &of_file).unwrap();
    assert_eq!(place.succeed(&["config", "again.toml"]), of_file, "what is printed can be used");
    for (arguments, words) in [
        (&["config", "nowhere.toml"][..], "nowhere.toml"),
        (&["config", "--set", "train.stepz=1"], "did you mean train.steps"),
        (&["config", "."], "folder"),
    ] {
        let output = place.run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(crate::cli::one_line(&output).contains(words), "{arguments:?}");
    }
}

#[test]
fn pages_are_linked_from_the_readme_and_from_the_help_of_their_verbs() {
    let readme = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let place = crate::cli::Place::new();
    for (name, verbs) in [
        ("config.md", &["train", "plan", "finetune", "config"][..]),
        ("machine.md", &["train", "plan"]),
        ("schedules.md", &["schedule", "plan"]),
        ("run.md", &["train", "finetune", "trace"]),
        ("first-lora.md", &["finetune"]),
        ("kernels.md", &["verify", "bench"]),
        ("measurements.md", &[]),
    ] {
        assert!(readme.contains(&format!("(docs/{name})")), "{name}");
        for verb in verbs {
            assert!(place.succeed(&[verb, "--help"]).contains(&format!("docs/{name}")), "{verb}: {name}");
        }
        for link in page(name).split("](").skip(1).map(|rest| &rest[..rest.find(')').unwrap()]) {
            let file = link.split('#').next().unwrap();
            let there = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs").join(file).exists();
            assert!(link.contains("://") || file.is_empty() || there, "docs/{name}: {link}");
        }
    }
}

/// The commands of the page in one shell, with a Llama of six hundred thousand parameters in the place of the model.
#[test]
fn the_page_of_the_first_lora_leads_to_an_adapter_that_answers() {
    let page = page("first-lora.md");
    let place = crate::cli::Place::new();
    let model = crate::speaking::chatty();
    std::fs::rename(model.path(), place.path("SmolLM2-135M-Instruct")).unwrap();
    let commands = blocks(&page, "sh").concat();
    let names = |verb: &str| commands.contains(&format!("polystage {verb} "));
    assert!(["finetune", "eval", "chat", "merge"].into_iter().all(names), "{commands}");
    std::fs::write(place.path("commands.sh"), &commands).unwrap();
    std::fs::write(place.path("said.txt"), "What is station 7 called?\n/help\n/quit\n").unwrap();
    let program = Path::new(env!("CARGO_BIN_EXE_polystage"));
    let path = std::env::var("PATH").unwrap_or_default();
    let like_a_user = place.command(&[]);
    let mut shell = std::process::Command::new("bash");
    shell.args(["-e", "commands.sh"]).current_dir(place.path(""));
    shell.env("PATH", format!("{}:{path}", program.parent().unwrap().display()));
    shell.envs(like_a_user.get_envs().filter_map(|(key, value)| Some((key, value?))));
    shell.stdin(std::fs::File::open(place.path("said.txt")).unwrap());
    let output = shell.output().unwrap();
    let (said, noted) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}\n{noted}");
    for words in ["records, packed into", "steps of", "epochs in all", "expected", "answer"] {
        assert!(said.contains(words), "no {words:?} in {said}");
    }
    assert!(noted.contains("/reset"), "the page's chat answers its commands: {noted}");
    assert!(place.path("runs/chats/checkpoints/latest").exists());
    assert!(place.path("SmolLM2-mine/model.safetensors").exists());
    assert!(place.losses("runs/chats").len() > 1);
}
