//! Inputs that nobody means, for every parser of files from outside: none may panic, abort, take more than ten seconds or
//! a gigabyte, and every refusal is one line.
//!
//! A seeded runner of mutations. This process starts workers, which are this program again, and watches them, so that it
//! outlives whatever an input does to one: `watch` is this side, `worker` the other, `mutate` makes the inputs and
//! `targets` says what is done with them.
//!
//! ```text
//! cargo test --test fuzz                                        some seconds for each target
//! cargo test --test fuzz -- schedule --seconds 600 --seed 7     one target, for ten minutes
//! cargo test --test fuzz -- --input FILE                        one input again
//! ```
#![allow(missing_docs, reason = "nothing here is used elsewhere")]

mod mutate;
mod targets;
mod watch;
mod worker;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::Duration;

use targets::{FAULTS, Target};
use watch::{Inputs, Job, Report};

/// Seconds of everything if not said otherwise.
const SECONDS: u64 = 40;
/// Longest time for one input.
const PATIENCE: Duration = Duration::from_secs(10);

struct Arguments {
    seconds: u64,
    seed: u64,
    input: Option<PathBuf>,
    /// Part of the names of the targets to run, as `cargo test` takes it for other tests.
    filter: String,
}

impl Arguments {
    /// What `cargo test` gives to every test binary is understood or has no meaning here.
    fn parse(mut words: impl Iterator<Item = String>) -> Arguments {
        let mut arguments = Arguments { seconds: SECONDS, seed: 0, input: None, filter: String::new() };
        while let Some(word) = words.next() {
            let mut number = || words.next().and_then(|n| n.parse().ok()).expect("a whole number");
            match word.as_str() {
                "--seconds" => arguments.seconds = number(),
                "--seed" => arguments.seed = number(),
                "--input" => arguments.input = words.next().map(PathBuf::from),
                // Only tests that are left out otherwise, or only their names.
                "--ignored" | "--list" => arguments.filter = word,
                other if other.starts_with('-') => {}
                _ => arguments.filter = word,
            }
        }
        arguments
    }
}

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1).peekable();
    if words.next_if(|word| word == worker::FLAG).is_some() {
        worker::main(words);
        return ExitCode::SUCCESS;
    }
    let arguments = Arguments::parse(words);
    let failed = match &arguments.input {
        Some(input) => again(input),
        None => fuzz(&arguments),
    };
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Tries one input again; how many failed.
fn again(input: &Path) -> usize {
    let folder = input.parent().and_then(Path::file_name).unwrap_or_default();
    let target = targets::find(&folder.to_string_lossy()).expect("FILE lies in a folder named as its target");
    let job = Job { target, inputs: Inputs::One(input.to_path_buf()), patience: PATIENCE };
    let failures = watch::run(&job).failures;
    failures.iter().for_each(|failure| println!("{}: {}", target.name, failure.what));
    println!("{} passed, {} failed", 1 - failures.len(), failures.len());
    failures.len()
}

/// Tries many inputs on many targets; how many targets failed.
fn fuzz(arguments: &Arguments) -> usize {
    let chosen = |target: &&Target| target.name.contains(&arguments.filter);
    let chosen: Vec<&'static Target> = targets::ALL.iter().copied().filter(chosen).collect();
    if chosen.is_empty() {
        println!("0 passed, 0 failed");
        return 0;
    }
    check_faults();
    let workers = std::thread::available_parallelism().map_or(1, |n| n.get());
    // Where there are fewer targets than cores, several workers share one.
    let shares = workers.div_ceil(chosen.len());
    let time =
        Duration::from_secs(arguments.seconds).mul_f64(workers as f64 / (shares * chosen.len()) as f64);
    let mut jobs: Vec<Job> = Vec::new();
    for share in 0..shares as u64 {
        for target in &chosen {
            let seed = arguments.seed.wrapping_add(share << 32);
            jobs.push(Job { target, inputs: Inputs::Seeded { seed, time }, patience: PATIENCE });
        }
    }
    println!(
        "fuzzing {} targets, seed {}, {} s on {workers} cores",
        chosen.len(),
        arguments.seed,
        arguments.seconds
    );
    let reports = run_all(jobs, workers);
    let mut failed = 0;
    let (mut inputs, mut seconds) = (0, 0.0);
    for target in &chosen {
        let of_target = || reports.iter().filter(|(name, _)| *name == target.name).map(|(_, report)| report);
        let count: u64 = of_target().map(|report| report.inputs).sum();
        let took: f64 = of_target().map(|report| report.time.as_secs_f64()).sum();
        (inputs, seconds) = (inputs + count, seconds + took);
        println!("{:<14} {count:>10} inputs {:>8.0} a second", target.name, count as f64 / took);
        failed += usize::from(of_target().any(|report| !report.failures.is_empty()));
        for failure in of_target().flat_map(|report| &report.failures) {
            println!(
                "  {}\n  again: cargo test --test fuzz -- --input {}",
                failure.what,
                failure.input.display()
            );
        }
    }
    println!("{:<14} {inputs:>10} inputs {:>8.0} a second", "all", inputs as f64 * workers as f64 / seconds);
    println!("{} passed, {failed} failed", chosen.len() - failed);
    failed
}

/// Does the jobs, as many at a time as there are workers; the reports with the targets' names.
fn run_all(jobs: Vec<Job>, workers: usize) -> Vec<(&'static str, Report)> {
    let (jobs, reports) = (Mutex::new(jobs.into_iter()), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let job = jobs.lock().expect("no panic").next();
                    let Some(job) = job else { return };
                    let report = watch::run(&job);
                    reports.lock().expect("no panic").push((job.target.name, report));
                }
            });
        }
    });
    reports.into_inner().expect("no panic")
}

/// Makes sure that a worker's end is noticed, whatever ends it.
fn check_faults() {
    let folder = tempfile::tempdir().expect("a folder");
    for (fault, noticed) in targets::KINDS_OF_FAULT {
        let input = folder.path().join(fault);
        std::fs::write(&input, fault).expect("written");
        let patience = if fault == "hang" { Duration::from_millis(500) } else { PATIENCE };
        let report = watch::run(&Job { target: &FAULTS, inputs: Inputs::One(input), patience });
        let what: Vec<_> = report.failures.iter().map(|failure| failure.what.as_str()).collect();
        assert!(what.len() == 1 && what[0].contains(noticed), "{fault}: {what:?}");
    }
}
