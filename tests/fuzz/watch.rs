//! The side that watches: starts a worker, follows the count of its inputs, and keeps the one at which it ended.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use crate::targets::Target;
use crate::worker::{CURRENT, FLAG, read_current};

/// How often a worker is looked at.
const PAUSE: Duration = Duration::from_millis(20);
/// Failures after which a target is given up.
const MOST: usize = 10;

pub struct Job {
    pub target: &'static Target,
    pub inputs: Inputs,
    /// Longest time for one input.
    pub patience: Duration,
}

pub enum Inputs {
    /// The corpus, and then mutations for so long.
    Seeded { seed: u64, time: Duration },
    /// This file alone.
    One(PathBuf),
}

#[derive(Default)]
pub struct Report {
    pub inputs: u64,
    pub time: Duration,
    pub failures: Vec<Failure>,
}

pub struct Failure {
    /// What happened, in one line.
    pub what: String,
    /// The input, kept.
    pub input: PathBuf,
}

/// Runs workers until the job is done; a new one takes the place of one that failed.
pub fn run(job: &Job) -> Report {
    let (mut report, start) = (Report::default(), Instant::now());
    loop {
        let (inputs, failure) = attempt(job, start.elapsed(), report.failures.len() as u64);
        report.inputs += inputs;
        let Some(failure) = failure else { break };
        // A worker begins with the corpus, so what is wrong there would end every one.
        let known = report.failures.iter().any(|other| other.input == failure.input);
        if !known {
            report.failures.push(failure);
        }
        let Inputs::Seeded { time, .. } = job.inputs else { break };
        if known || report.failures.len() == MOST || start.elapsed() >= time {
            break;
        }
    }
    report.time = start.elapsed();
    report
}

/// One worker; how many inputs it tried and what ended it.
fn attempt(job: &Job, used: Duration, attempt: u64) -> (u64, Option<Failure>) {
    // Files in memory, where the system has that.
    let place = Some(Path::new("/dev/shm")).filter(|place| place.is_dir());
    let place = place.map_or_else(std::env::temp_dir, Path::to_path_buf);
    let scratch = tempfile::Builder::new().prefix("polystage-fuzz-").tempdir_in(place).expect("a folder");
    let said = scratch.path().join("stderr");
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.arg(FLAG).arg(job.target.name).arg(scratch.path());
    match &job.inputs {
        Inputs::Seeded { seed, time } => {
            command.arg(seed.wrapping_add(attempt << 16).to_string());
            command.arg(time.saturating_sub(used).as_millis().to_string());
        }
        Inputs::One(input) => drop(command.arg(std::path::absolute(input).expect("a path"))),
    }
    // The worker ends when the other end of its standard input does.
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(fs::File::create(&said).expect("a file"));
    let mut worker = command.env("RUST_BACKTRACE", "0").spawn().expect("starts");
    let (mut count, mut since) = (0, Instant::now());
    let ended = loop {
        if let Some(status) = worker.try_wait().expect("a child") {
            break Some(status);
        }
        let now = read_current(&scratch.path().join(CURRENT)).0;
        if now != count {
            (count, since) = (now, Instant::now());
        } else if since.elapsed() > job.patience {
            worker.kill().and_then(|()| worker.wait()).expect("ends");
            break None;
        }
        std::thread::sleep(PAUSE);
    };
    let (count, input) = read_current(&scratch.path().join(CURRENT));
    let what = match ended {
        Some(status) if status.success() => return (count, None),
        Some(status) => format!("{status}: {}", words(&fs::read(&said).unwrap_or_default())),
        None => format!("does not end within {} s", job.patience.as_secs_f64()),
    };
    (count, Some(Failure { what, input: keep(job.target, &input) }))
}

/// The end of what a worker said, in one line.
fn words(said: &[u8]) -> String {
    let said = String::from_utf8_lossy(said);
    let lines: Vec<&str> =
        said.lines().filter(|line| !line.is_empty() && !line.starts_with("note:")).collect();
    polystage::error::one_line(&lines[lines.len().saturating_sub(3)..].join(" "), 400)
}

/// Writes an input below `target/`, under its own hash.
fn keep(target: &Target, input: &[u8]) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("fuzz-failures").join(target.name);
    fs::create_dir_all(&folder).expect("a folder");
    let hash: String = Sha256::digest(input)[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    let path = folder.join(hash);
    fs::write(&path, input).expect("written");
    path
}
