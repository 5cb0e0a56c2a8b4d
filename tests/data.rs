//! Text and batches: which files are read, and which tokens which step sees.

use std::fs;
use std::path::{Path, PathBuf};

use polystage::train::data::{Batches, Corpus, Order};
use proptest::prelude::*;

pub fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    for (name, text) in files {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().expect("a parent")).expect("created");
        fs::write(path, text).expect("written");
    }
    folder
}

fn open(patterns: &[&str], bases: &[&Path]) -> polystage::Result<Corpus> {
    let patterns: Vec<String> = patterns.iter().map(|p| p.to_string()).collect();
    let bases: Vec<PathBuf> = bases.iter().map(|b| b.to_path_buf()).collect();
    Corpus::open(&patterns, &bases)
}

pub fn text(corpus: &Corpus) -> String {
    let mut tokens = vec![0; corpus.len()];
    corpus.read(0, &mut tokens).expect("unchanged");
    tokens.into_iter().map(|t| char::from(u8::try_from(t).expect("a byte"))).collect()
}

/// The error's one line.
pub fn message<T: std::fmt::Debug>(result: polystage::Result<T>) -> String {
    let error = result.expect_err("an error");
    assert!(matches!(error, polystage::Error::Data { .. }), "{error:?}");
    assert_eq!(error.to_string().lines().count(), 1);
    error.to_string()
}

/// A text in which every aligned group of four bytes is its own index, so that a sequence of T = 4 tells which it is.
fn numbered(sequences: usize) -> Corpus {
    let mut bytes: Vec<u8> = (0..sequences as u32).flat_map(u32::to_le_bytes).collect();
    bytes.push(0);
    Corpus::from_bytes(bytes)
}

/// The indices of the sequences of a batch of [`numbered`].
fn sequences(batch: &[u32]) -> Vec<usize> {
    batch.chunks(5).map(|row| row[..4].iter().rev().fold(0, |n, &byte| n << 8 | byte as usize)).collect()
}

#[test]
fn files_follow_the_order_of_the_patterns_and_the_matches_of_one_are_sorted() {
    let folder =
        folder(&[("b.txt", "B"), ("a.txt", "A"), ("z/c.txt", "C"), ("first.md", "F"), (".hidden.txt", "H")]);
    assert_eq!(text(&open(&["first.md", "**/*.txt"], &[folder.path()]).expect("opened")), "FABC");
}

#[test]
fn a_file_matched_twice_is_used_once_and_folders_are_skipped() {
    let folder = folder(&[("a.txt", "A"), ("b.txt", "B"), ("sub/c.txt", "C")]);
    assert_eq!(text(&open(&["b.txt", "*", "./a.txt"], &[folder.path()]).expect("opened")), "BA");
}

#[test]
fn the_first_base_with_a_match_wins_and_absolute_paths_need_none() {
    let (one, two) =
        (folder(&[("x.txt", "1")]), folder(&[("x.txt", "2"), ("y.txt", "Y"), ("z[0]/q.txt", "Q")]));
    assert_eq!(text(&open(&["*.txt"], &[one.path(), two.path()]).expect("opened")), "1");
    assert_eq!(text(&open(&["y.txt", "x.txt"], &[one.path(), two.path()]).expect("opened")), "Y1");
    let absolute = two.path().join("y.txt");
    assert_eq!(text(&open(&[absolute.to_str().expect("UTF-8")], &[one.path()]).expect("opened")), "Y");
    assert_eq!(text(&open(&[absolute.to_str().expect("UTF-8")], &[]).expect("opened")), "Y");
    // A base with brackets in its name is a folder, not a glob.
    assert_eq!(text(&open(&["*.txt"], &[&two.path().join("z[0]")]).expect("opened")), "Q");
}

#[test]
fn a_name_that_looks_like_a_glob_is_meant_literally_where_it_exists() {
    let folder = folder(&[("n[1].txt", "L"), ("n1.txt", "G")]);
    assert_eq!(text(&open(&["n[1].txt"], &[folder.path()]).expect("opened")), "L");
}

#[test]
fn errors_name_the_pattern_and_what_to_do() {
    let folder = folder(&[("empty.txt", ""), ("sub/c.txt", "C")]);
    let fails = |pattern: &str| message(open(&[pattern], &[folder.path()]));
    assert!(fails("nope-*.txt").contains("\"nope-*.txt\" matches no file"));
    assert!(fails("nope-*.txt").contains(&folder.path().display().to_string()));
    assert!(fails("sub").contains("only the folder") && fails("sub").contains("sub/*"));
    assert!(fails("a[.txt").contains("not a valid glob"));
    assert!(fails("a\nb").contains("a\\nb"));
    assert!(fails("empty.txt").contains("no text"));
    assert!(message(open(&[], &[folder.path()])).contains("name at least one file"));
}

#[test]
fn a_pattern_reaches_hidden_files_only_where_it_names_their_dot() {
    let files = [(".a.txt", "A"), ("b.txt", "B"), (".git/c.txt", "C"), ("d/.e.txt", "E"), ("d/f.txt", "F")];
    let folder = folder(&files);
    let read = |pattern: &str| text(&open(&[pattern], &[folder.path()]).expect("opened"));
    assert_eq!(read("*.txt"), "B");
    assert_eq!(read(".*.txt"), "A");
    assert_eq!(read("**/*.txt"), "BF");
    assert_eq!(read("**/.*.txt"), "AE");
    assert_eq!(read(".g*/*.txt"), "C");
    assert_eq!(read("./d/../[b-d]/?.txt"), "F");
    assert_eq!(read("**/d/**/**/f.txt"), "F");
    assert!(message(open(&["**"], &[folder.path()])).contains("only the folder"));
    assert!(message(open(&["[bd]*/"], &[folder.path()])).contains("only the folder"));
    assert!(message(open(&["b.txt/*"], &[folder.path()])).contains("matches no file"));
    assert!(message(open(&["a**/b"], &[folder.path()])).contains("not a valid glob"));
}

#[cfg(unix)]
#[test]
fn links_to_folders_are_followed_and_those_in_a_circle_have_an_end() {
    use std::os::unix::fs::symlink;
    let folder = folder(&[("real/a.txt", "A"), ("real/deep/b.txt", "B"), ("text/c.txt", "C")]);
    let at = |name: &str| folder.path().join(name);
    symlink(at("real"), at("text/link")).expect("linked");
    symlink(at("text"), at("real/deep/back")).expect("linked");
    symlink("itself", at("text/itself")).expect("linked");
    assert_eq!(text(&open(&["text/**/*.txt"], &[folder.path()]).expect("opened")), "CAB");
}

#[cfg(target_os = "linux")]
#[test]
fn names_that_are_not_utf8_match_patterns_like_any_other() {
    use std::os::unix::ffi::OsStrExt;
    let folder = folder(&[("a.txt", "A"), ("z.md", "Z")]);
    let odd = |bytes: &[u8]| folder.path().join(std::ffi::OsStr::from_bytes(bytes));
    fs::write(odd(b"b\xff.txt"), "B").expect("written");
    fs::create_dir(odd(b"c\xfe")).expect("created");
    fs::write(odd(b"c\xfe/d.txt"), "D").expect("written");
    let read = |pattern: &str, base: &Path| text(&open(&[pattern], &[base]).expect("opened"));
    assert_eq!(read("*.txt", folder.path()), "AB");
    assert_eq!(read("b?.txt", folder.path()), "B");
    assert_eq!(read("**/*.txt", folder.path()), "ABD");
    assert_eq!(read("*.txt", &odd(b"c\xfe")), "D");
    assert_eq!(read("*.md", folder.path()), "Z");
}

#[cfg(unix)]
#[test]
fn a_pipe_is_refused_instead_of_waited_for_and_a_dangling_link_is_named() {
    let folder = folder(&[]);
    assert!(
        std::process::Command::new("mkfifo")
            .arg(folder.path().join("pipe"))
            .status()
            .expect("mkfifo")
            .success()
    );
    assert!(message(open(&["pipe"], &[folder.path()])).contains("not a regular file"));
    assert!(message(open(&["p*"], &[folder.path()])).contains("not a regular file"));
    std::os::unix::fs::symlink("gone", folder.path().join("link.txt")).expect("linked");
    assert!(message(open(&["*.txt"], &[folder.path()])).contains("link.txt"));
}

#[test]
fn tokens_are_read_across_the_borders_of_files() {
    let folder = folder(&[("a", "0123"), ("b", ""), ("c", "4"), ("d", "56789")]);
    let corpus = open(&["*"], &[folder.path()]).expect("opened");
    for start in 0..=10 {
        for len in 0..=10 - start {
            let mut out = vec![0; len];
            corpus.read(start, &mut out).expect("unchanged");
            assert_eq!(out, (start..start + len).map(|i| u32::from(b'0') + i as u32).collect::<Vec<_>>());
        }
    }
    Corpus::from_bytes(Vec::new()).read(0, &mut []).expect("nothing to read");
}

#[test]
fn the_entropy_is_that_of_the_byte_frequencies() {
    let entropy = |text: &str| Corpus::from_bytes(text.into()).unigram_entropy().expect("unchanged");
    assert_eq!(entropy("aaaa"), 0.0);
    assert_eq!(entropy(""), 0.0);
    assert!((entropy("abab") - 2f64.ln()).abs() < 1e-12);
    assert!((entropy("aaab") - (0.75 * (4f64 / 3.0).ln() + 0.25 * 4f64.ln())).abs() < 1e-12);
}

#[test]
fn sequential_batches_match_the_definition_and_wrap() {
    let corpus = Corpus::from_bytes((0..=10).collect());
    let batches = Batches::new(corpus, 2, 3, Order::Sequential, 0).expect("long enough");
    assert_eq!(batches.sequences(), 3);
    assert_eq!(batches.batch(0).expect("read"), [0, 1, 2, 3, 3, 4, 5, 6]);
    assert_eq!(batches.batch(1).expect("read"), [6, 7, 8, 9, 0, 1, 2, 3]);
    assert_eq!(batches.batch(u64::MAX).expect("read").len(), 8);
}

#[test]
fn a_batch_may_be_larger_than_the_text() {
    let batches = Batches::new(numbered(2), 5, 4, Order::Sequential, 0).expect("long enough");
    assert_eq!(sequences(&batches.batch(0).expect("read")), [0, 1, 0, 1, 0]);
}

#[test]
fn text_shorter_than_a_sequence_and_zero_sizes_are_refused_with_the_numbers() {
    let new = |len: usize, batch, sequence| {
        Batches::new(Corpus::from_bytes(vec![0; len]), batch, sequence, Order::Shuffled, 0)
    };
    assert!(message(new(4, 1, 4)).contains("has 4 tokens and one sequence of 4 needs 5"));
    assert!(message(new(4, 1, usize::MAX)).contains("has 4 tokens"));
    assert!(message(new(4, 0, 1)).contains("at least 1") && message(new(4, 1, 0)).contains("at least 1"));
    assert_eq!(new(5, 1, 4).expect("just long enough").sequences(), 1);
}

#[test]
fn the_order_is_spelt_in_lower_case() {
    assert_eq!(serde_json::to_string(&Order::Shuffled).expect("JSON"), "\"shuffled\"");
    assert_eq!(serde_json::from_str::<Order>("\"sequential\"").expect("JSON"), Order::Sequential);
}

#[test]
fn shuffling_depends_on_seed_and_epoch_and_spreads_evenly() {
    let epoch = |seed, step| {
        let batches = Batches::new(numbered(1000), 1000, 4, Order::Shuffled, seed).expect("long enough");
        sequences(&batches.batch(step).expect("read"))
    };
    assert_ne!(epoch(1, 0), epoch(2, 0));
    assert_ne!(epoch(1, 0), epoch(1, 1));
    // Over 400 epochs each sequence's mean position is 500 with a standard error of 14.4: five of them are allowed.
    let mut positions = vec![0; 1000];
    for step in 0..400 {
        for (position, sequence) in epoch(7, step).into_iter().enumerate() {
            positions[sequence] += position;
        }
    }
    for (sequence, sum) in positions.into_iter().enumerate() {
        let mean = sum as f64 / 400.0;
        assert!((mean - 499.5).abs() < 72.0, "sequence {sequence} lies at {mean} on average");
    }
}

proptest! {
    #[test]
    fn every_sequence_appears_exactly_once_an_epoch(
        n in 1usize..3000, seed in any::<u64>(), epoch in 0u64..1 << 40, sequential in any::<bool>()
    ) {
        let order = if sequential { Order::Sequential } else { Order::Shuffled };
        let batches = Batches::new(numbered(n), n, 4, order, seed).expect("long enough");
        let mut seen = sequences(&batches.batch(epoch).expect("read"));
        seen.sort();
        prop_assert!(seen.into_iter().eq(0..n));
    }

    #[test]
    fn a_batch_depends_only_on_the_step_and_batches_of_any_size_deal_the_same_order(
        n in 1usize..200, batch in 1usize..50, seed in any::<u64>(), step in 0u64..1000
    ) {
        let new = |batch| Batches::new(numbered(n), batch, 4, Order::Shuffled, seed).expect("long enough");
        let (used, ones) = (new(batch), new(1));
        used.batch(step + 1).expect("read");
        let first = step * batch as u64;
        let one_by_one: Vec<u32> = (first..first + batch as u64).flat_map(|s| ones.batch(s).expect("read")).collect();
        prop_assert_eq!(used.batch(step).expect("read"), new(batch).batch(step).expect("read"));
        prop_assert_eq!(used.batch(step).expect("read"), one_by_one);
    }
}
