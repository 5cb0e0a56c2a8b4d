//! What is done with an input: a target for each kind of file that comes from outside.

mod config;
mod data;
mod folder;
mod run;
mod schedule;
mod text;

use std::path::Path;

/// A parser, and what is done with what it yields.
pub struct Target {
    pub name: &'static str,
    /// Words that mean something in the format.
    pub words: &'static str,
    /// Writes what all inputs need to an empty folder, and makes valid inputs.
    pub seeds: fn(&Path) -> Vec<Vec<u8>>,
    /// Reads an input, with that folder to write to. What came of it: `ok` and more, or why it is refused.
    pub run: fn(&Path, &[u8]) -> String,
}

pub const ALL: &[&Target] = &[
    &config::EXPERIMENT,
    &config::MODEL,
    &folder::SAFETENSORS,
    &folder::MODEL_FOLDER,
    &folder::ADAPTER,
    &text::TOKENIZER,
    &text::CHAT_TEMPLATE,
    &data::RECORDS,
    &data::TOKENS,
    &data::PATHS,
    &schedule::SCHEDULE,
    &schedule::MACHINE,
    &run::METRICS,
    &run::STATE,
    &run::MANIFEST,
    &run::PREDICTION,
    &run::TRACE,
];

pub fn find(name: &str) -> Option<&'static Target> {
    ALL.iter().copied().chain([&FAULTS]).find(|target| target.name == name)
}

/// Parts of an input, each of which becomes a file: what stands between lines of this kind.
pub const SEAM: &str = "\n-----8<-----\n";

/// All parts of an input, at least one.
fn pieces(input: &[u8]) -> Vec<&[u8]> {
    let (mut pieces, mut rest) = (Vec::new(), input);
    while let Some(at) = rest.windows(SEAM.len()).position(|window| window == SEAM.as_bytes()) {
        pieces.push(&rest[..at]);
        rest = &rest[at + SEAM.len()..];
    }
    pieces.push(rest);
    pieces
}

/// The first parts of an input; those that it does not have are empty.
fn parts<const N: usize>(input: &[u8]) -> [&[u8]; N] {
    let pieces = pieces(input);
    std::array::from_fn(|at| pieces.get(at).copied().unwrap_or_default())
}

/// An input of these parts.
fn whole(parts: &[&str]) -> Vec<u8> {
    parts.join(SEAM).into_bytes()
}

/// What came of a parser; every refusal must be one line of bearable length that does nothing to a terminal.
fn outcome(result: polystage::Result<String>) -> String {
    match result {
        Ok(more) => format!("ok {more}"),
        Err(error) => {
            assert!(error.is_input(), "a bad input has status 2: {error:?}");
            let text = error.to_string();
            // Below its message an error about a schedule draws it.
            let lines = if matches!(error, polystage::Error::Schedule { .. }) { 100 } else { 1 };
            assert!(text.lines().count() <= lines && text.len() < 50_000, "{} bytes: {error:?}", text.len());
            assert!(!text.contains(|c: char| c.is_control() && c != '\n'), "{error:?}");
            text
        }
    }
}

/// What ends a worker in each of the ways there are, and a part of what is said then.
pub const KINDS_OF_FAULT: [(&str, &str); 5] = [
    ("panic", "this is one"),
    ("abort", "signal"),
    ("overflow", "overflowed its stack"),
    ("memory", "memory allocation"),
    ("hang", "does not end"),
];

/// Does what its input says, so that the runner can be tried.
pub static FAULTS: Target = Target {
    name: "faults",
    words: "",
    seeds: |_| Vec::new(),
    run: |_, input| {
        match input {
            b"panic" => panic!("this is one"),
            b"abort" => std::process::abort(),
            b"overflow" => return deep(0).to_string(),
            b"memory" => return std::hint::black_box(vec![1u8; 2 << 30]).len().to_string(),
            _ => {}
        }
        loop {
            std::thread::park();
        }
    },
};

fn deep(depth: usize) -> usize {
    let frame = std::hint::black_box([depth; 100]);
    if depth == usize::MAX { 0 } else { 1 + deep(depth + 1) + frame[depth % 100] }
}
