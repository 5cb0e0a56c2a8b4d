//! The side that works: tries inputs one after the other, each written down before it is tried.

use std::collections::HashSet;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::mutate::Mutator;
use crate::targets::{self, Target};

/// The first argument of a worker.
pub const FLAG: &str = "--worker";
/// The file with the number of inputs so far, and the one that is being tried.
pub const CURRENT: &str = "current";
/// Most bytes of everything that is written to.
const MEMORY: u64 = 1 << 30;
/// Most inputs that are kept because what came of them was new, and most bytes of one.
const KEPT: (usize, usize) = (400, 4096);

/// Works as the arguments say: a target's name, a folder, and either a seed and milliseconds or a file.
pub fn main(mut words: impl Iterator<Item = String>) {
    let mut next = || words.next();
    let target = targets::find(&next().expect("a target")).expect("a known target");
    let scratch = PathBuf::from(next().expect("a folder"));
    let (first, second) = (next().expect("a seed or a file"), next());
    end_with_parent(scratch.clone());
    limit();
    let files = scratch.join("files");
    fs::create_dir(&files).expect("a folder");
    let mut worker =
        Worker { target, current: File::create(scratch.join(CURRENT)).expect("a file"), files, count: 0 };
    let seeds = (target.seeds)(&worker.files);
    match second {
        None => drop(worker.attempt(&fs::read(first).expect("an input"))),
        Some(time) => {
            let time = Duration::from_millis(time.parse().expect("milliseconds"));
            worker.fuzz(seeds, first.parse().expect("a seed"), time);
        }
    }
}

struct Worker {
    target: &'static Target,
    current: File,
    /// A folder for the target.
    files: PathBuf,
    count: u64,
}

impl Worker {
    fn fuzz(&mut self, seeds: Vec<Vec<u8>>, seed: u64, time: Duration) {
        let start = Instant::now();
        for seed in &seeds {
            let came = self.attempt(seed);
            assert!(came.starts_with("ok"), "a seed is refused: {came}");
        }
        let mut pool = seeds;
        for input in corpus(self.target) {
            self.attempt(&input);
            pool.push(input);
        }
        let (mut mutator, own) = (Mutator::new(seed ^ hash(self.target.name), self.target.words), pool.len());
        // What comes of an input stands for the way it takes through a parser: one that leads to something new is worth
        // going on from.
        let mut known = HashSet::new();
        while start.elapsed() < time {
            let input = mutator.mutate(&pool);
            let came = self.attempt(&input);
            if input.len() <= KEPT.1 && pool.len() < own + KEPT.0 && known.insert(hash(shape(&came))) {
                pool.push(input);
            }
        }
    }

    /// Tries an input; what came of it.
    fn attempt(&mut self, input: &[u8]) -> String {
        self.count += 1;
        let lengths = [self.count, input.len() as u64].map(u64::to_le_bytes).concat();
        let written =
            self.current.rewind().and_then(|()| self.current.write_all(&[&lengths, input].concat()));
        written.expect("written");
        (self.target.run)(&self.files, input)
    }
}

/// How many inputs a worker has tried, and the last of them.
pub fn read_current(path: &Path) -> (u64, Vec<u8>) {
    let bytes = fs::read(path).unwrap_or_default();
    let number = |at: usize| {
        bytes.get(8 * at..).and_then(|rest| rest.first_chunk()).map_or(0, |&n| u64::from_le_bytes(n))
    };
    let input = bytes.get(16..).unwrap_or_default();
    (number(0), input[..input.len().min(number(1) as usize)].to_vec())
}

/// What once broke.
fn corpus(target: &Target) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(target.name);
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("listed").path()).collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).expect("read")).collect()
}

/// A message without its numbers and what it quotes.
fn shape(message: &str) -> String {
    let plain = message.split(['"', '`']).step_by(2).flat_map(str::chars);
    plain.filter(|c| !c.is_ascii_digit()).take(120).collect()
}

fn hash(value: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// Ends this process, and what it wrote, with the one that started it, even if an input holds it up.
fn end_with_parent(scratch: PathBuf) {
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        let _ = fs::remove_dir_all(scratch);
        std::process::exit(1);
    });
}

/// Has the system refuse memory beyond what is meant, and leave no dumps.
fn limit() {
    #[cfg(unix)]
    for (what, most) in [(libc::RLIMIT_DATA, MEMORY), (libc::RLIMIT_CORE, 0)] {
        let limit = libc::rlimit { rlim_cur: most as libc::rlim_t, rlim_max: most as libc::rlim_t };
        // SAFETY: the structure lives through the call, which keeps nothing of it.
        assert_eq!(unsafe { libc::setrlimit(what, &limit) }, 0, "the limit is set");
    }
}
