//! Profiles in the cache, and what runs make of them: the program as a user runs it.

use std::path::PathBuf;
use std::process::Output;

use toml::{Table, Value};

use crate::cli::Place;

/// A folder with an experiment for one device and a cache of its own.
struct Lab(Place);

impl Lab {
    fn cache(&self) -> PathBuf {
        self.0.path("profiles")
    }

    /// Plans with another sequence, and gives what was said meanwhile.
    fn plan(&self, sequence: usize) -> String {
        let sequence = format!("train.sequence={sequence}");
        // Few rows are summed by other kernels.
        let whole = "pipeline.microbatches=1";
        let output = self.run(&["plan", "tiny.toml", "--set", &sequence, "--set", whole]);
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let arguments = [arguments, &["--devices", "0"]].concat();
        let output = self.0.command(&arguments).env("POLYSTAGE_CACHE", self.cache()).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        output
    }

    /// The only file in the cache.
    fn file(&self) -> PathBuf {
        let files: Vec<_> = std::fs::read_dir(self.cache()).unwrap().map(|f| f.unwrap().path()).collect();
        assert_eq!(files.len(), 1, "{files:?}");
        files[0].clone()
    }

    fn read(&self) -> Table {
        std::fs::read_to_string(self.file()).unwrap().parse().unwrap()
    }

    /// Seconds of F of a block.
    fn forward(&self) -> f64 {
        let layers = &self.read()["devices"][0]["shapes"][0]["layers"];
        ["attention", "mlp"].iter().map(|half| layers[half]["forward"].as_float().unwrap()).sum()
    }

    /// Has the cache say that everything takes `factor` times as long, and nothing of what that rests on.
    fn tamper(&self, factor: f64) {
        let mut table = self.read();
        let device = table["devices"][0].as_table_mut().unwrap();
        device.remove("measured");
        for shape in device["shapes"].as_array_mut().unwrap() {
            shape.as_table_mut().unwrap().remove("measured");
            for (_, layer) in shape["layers"].as_table_mut().unwrap() {
                for (_, seconds) in layer.as_table_mut().unwrap() {
                    *seconds = Value::Float(seconds.as_float().unwrap() * factor);
                }
            }
        }
        std::fs::write(self.file(), table.to_string()).unwrap();
    }

    fn predicted(&self) -> f64 {
        let output = self.run(&["plan", "tiny.toml", "--json"]);
        let plan: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        plan["step_seconds"].as_f64().unwrap()
    }
}

/// The factor is far beyond what a loud machine makes of a measurement.
#[test]
fn a_run_corrects_a_wrong_profile_and_says_so_and_measuring_anew_replaces_it() {
    let lab = Lab(Place::new());
    lab.predicted();
    let rests_on = &lab.read()["devices"][0]["shapes"][0]["measured"];
    assert!(rests_on["steps"].as_integer().unwrap() > 4, "{rests_on}");
    assert!(rests_on["unix_seconds"].as_integer().unwrap() > 1_700_000_000, "{rests_on}");
    assert_eq!(rests_on["trained"].as_bool(), Some(false));
    lab.tamper(40.0);
    let (wrong, wrong_forward) = (lab.predicted(), lab.forward());
    let run = lab.run(&["train", "tiny.toml", "--set", "train.steps=16", "--out", "run"]);
    let said = String::from_utf8_lossy(&run.stderr).into_owned();
    let line = said.lines().find(|line| line.contains("less time for its work than the plan assumed"));
    assert!(line.is_some_and(|line| line.contains("the next run plans with that")), "{said}");
    assert!(lab.forward() < 0.4 * wrong_forward, "{} {wrong_forward}", lab.forward());
    assert_eq!(lab.read()["devices"][0]["shapes"][0]["measured"]["trained"].as_bool(), Some(true));
    let corrected = lab.predicted();
    assert!(corrected < 0.5 * wrong, "{corrected} {wrong}");
    // A run without the planner, or with another machine than that of the cache, teaches nothing.
    lab.tamper(40.0);
    let before = lab.read();
    lab.run(&["train", "tiny.toml", "--no-plan", "--set", "train.steps=14", "--out", "plain"]);
    let file = lab.file();
    std::fs::copy(&file, lab.0.path("here.toml")).unwrap();
    lab.run(&["train", "tiny.toml", "--machine", "here.toml", "--set", "train.steps=14", "--out", "told"]);
    assert_eq!(lab.read(), before);
    let wrong_forward = lab.forward();
    lab.run(&["plan", "tiny.toml", "--measure"]);
    assert!(lab.forward() < 0.4 * wrong_forward, "{} {wrong_forward}", lab.forward());
}

/// What the cache has is made by hand, so that it does not depend on this machine.
#[test]
fn another_sequence_is_measured_only_where_no_law_of_those_before_holds_and_that_is_said_at_once() {
    let lab = Lab(Place::new());
    let said = lab.plan(16);
    assert!(said.starts_with("measuring this machine for the planner: 2 measurements"), "{said}");
    assert!(said.contains("kept in "), "{said}");
    // The same for a sequence more than twice as long: times in proportion in one lab, the same times in the other. What a
    // model with a longer context has left is no hindrance.
    let mut table = lab.read();
    let device = table["devices"][0].as_table_mut().unwrap();
    device.remove("measured");
    let shapes = device["shapes"].as_array_mut().unwrap();
    shapes[0].as_table_mut().unwrap().remove("measured");
    let known = shapes[0].clone();
    let of = |tokens: &str, times: f64| {
        let mut shape = known.as_table().unwrap().clone();
        let name = shape["shape"].as_str().unwrap().replace(" sequence 16", &format!(" sequence {tokens}"));
        shape.insert("shape".into(), Value::String(name));
        for (_, layer) in shape["layers"].as_table_mut().unwrap() {
            for (_, seconds) in layer.as_table_mut().unwrap() {
                *seconds = Value::Float(seconds.as_float().unwrap() * times);
            }
        }
        Value::Table(shape)
    };
    std::fs::write(lab.file(), table.to_string()).unwrap();
    assert_eq!(lab.plan(16), "");
    for (factor, is_measured) in [(32.0 / 12.0, false), (1.0, true)] {
        table["devices"][0]["shapes"] = Value::Array(vec![of("12", 1.0), of("32", factor), of("48", 1.0)]);
        std::fs::write(lab.file(), table.to_string()).unwrap();
        let said = lab.plan(24);
        assert_eq!(said.contains("measuring this machine"), is_measured, "{factor}: {said}");
        assert_eq!(lab.read() == table, !is_measured, "{factor}");
    }
}

#[test]
#[cfg(unix)]
fn a_pipe_in_the_place_of_a_profile_counts_as_none() {
    let lab = Lab(Place::new());
    lab.predicted();
    let file = lab.file();
    std::fs::remove_file(&file).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(&file).status().unwrap().success());
    lab.predicted();
    assert!(lab.forward() > 0.0);
}
