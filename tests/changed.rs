//! Files that another program changes while they are in use.

use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::path::Path;
use std::time::{Duration, SystemTime};

use polystage::Error;
use polystage::folder::Tensors;
use polystage::train::checkpoint;
use polystage::train::data::{Batches, Corpus, Order};

use super::cli::Place;
use super::folder::safetensors;

/// Writes into a file where it lies. Its time is set, since that of a file just made may have not moved on yet.
fn rewrite(path: &Path, bytes: &[u8]) {
    let mut file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all(bytes).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    file.set_modified(SystemTime::now() + Duration::from_secs(100)).unwrap();
}

/// The words about a file that has changed.
fn changed<T: std::fmt::Debug>(result: polystage::Result<T>) -> String {
    let error = result.expect_err("an error");
    assert!(matches!(error, Error::Changed { .. }) && !error.is_input(), "{error:?}");
    error.to_string()
}

/// Two files of 100 bytes, in sequences of 10.
fn texts(folder: &Path) -> Corpus {
    fs::write(folder.join("a"), [b'a'; 100]).unwrap();
    fs::write(folder.join("b"), [b'b'; 100]).unwrap();
    Corpus::open(&["a".into(), "b".into()], &[folder.to_path_buf()]).unwrap()
}

#[test]
fn a_text_that_was_truncated_rewritten_or_added_to_is_not_read_any_more() {
    for (bytes, words) in [
        (vec![b'x'; 50], "b: was truncated from 100 to 50 bytes"),
        (vec![], "b: was truncated from 100 to 0 bytes"),
        (vec![b'x'; 100], "b: was rewritten while it was in use"),
        (vec![b'b'; 101], "b: has grown from 100 to 101 bytes"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let corpus = texts(folder.path());
        let batches = Batches::new(corpus.clone(), 1, 10, Order::Sequential, 0).unwrap();
        rewrite(&folder.path().join("b"), &bytes);
        let mut tokens = [0; 10];
        assert!(changed(corpus.read(95, &mut tokens)).contains(words));
        assert!(changed(batches.batch(15)).contains(words));
        assert!(changed(batches.examples(15)).contains(words));
        assert!(changed(corpus.unigram_entropy()).contains(words));
        assert!(changed(corpus.windows(30).collect::<Result<Vec<_>, _>>()).contains(words));
        // What touches only the other file goes on.
        corpus.read(90, &mut tokens).unwrap();
        batches.examples(3).unwrap();
        assert_eq!(corpus.windows(30).take_while(Result::is_ok).count(), 3);
    }
}

// Windows lets nobody replace or delete what is mapped.
#[cfg(not(windows))]
#[test]
fn a_text_that_was_replaced_or_deleted_is_read_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let corpus = texts(folder.path());
    fs::write(folder.path().join("new"), "x").unwrap();
    fs::rename(folder.path().join("new"), folder.path().join("a")).unwrap();
    fs::remove_file(folder.path().join("b")).unwrap();
    let mut tokens = [0; 4];
    corpus.read(98, &mut tokens).unwrap();
    assert_eq!(tokens, [b'a', b'a', b'b', b'b'].map(u32::from));
}

#[test]
fn token_files_and_tensors_that_have_changed_are_not_read_any_more() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let header = r#"{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#;
    let bytes = safetensors(header, &[0; 16]);
    fs::write(&path, &bytes).unwrap();
    let tensors = Tensors::open(&path).unwrap();
    assert_eq!(tensors.read_all("x").unwrap(), [0.0; 4]);
    rewrite(&path, &bytes);
    let words = "model.safetensors: was rewritten while it was in use";
    assert!(changed(tensors.read_all("x")).contains(words));
    assert!(changed(tensors.read_bf16("x", 0..2, &mut [0; 2])).contains(words));
    assert!(changed(tensors.raw("x", 0..4, |_| ())).contains(words));
    rewrite(&path, &bytes[..bytes.len() - 1]);
    assert!(changed(tensors.read_all("x")).contains("was truncated from"));
}

/// Trains, changes a file after three steps, puts it back and trains on: the run must end with a word about the file and
/// lose nothing.
fn change_while_training(name: &str, change: impl Fn(&Path), words: &str) {
    let place = Place::new();
    let text = fs::read(place.path("text.txt")).unwrap();
    fs::write(place.path("valid.txt"), &text[..100]).unwrap();
    let set =
        ["--set", "train.steps=24", "--set", "data.valid=['valid.txt']", "--set", "train.evaluate_every=1"];
    let train = |more: &[&'static str]| [&["train", "tiny.toml", "--no-plan"], &set[..], more].concat();
    let mut child = place.start(&train(&["--out", "run"]));
    place.wait_for_steps("run", 3);
    let before = fs::read(place.path(name)).unwrap();
    change(&place.path(name));
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1), "{said}");
    let last = said.lines().last().unwrap();
    assert!(last.starts_with("error: ") && last.contains(&format!("{name}: {words}")), "{said}");
    let kept = checkpoint::latest(&place.path("run")).unwrap().unwrap();
    assert_eq!(checkpoint::open(&kept).unwrap().step, place.losses("run").len() as u64, "{said}");
    rewrite(&place.path(name), &before);
    place.succeed(&train(&["--out", "run", "--resume"]));
    place.succeed(&train(&["--out", "whole"]));
    assert_eq!(place.losses("run"), place.losses("whole"));
}

#[test]
fn training_on_a_text_that_is_truncated_saves_what_it_has_learnt_and_ends_with_the_reason() {
    // By less than a page: the bytes stay readable even where the change wins the race against a look at the file.
    let truncate = |path: &Path| OpenOptions::new().write(true).open(path).unwrap().set_len(5000).unwrap();
    change_while_training("text.txt", truncate, "was truncated from 6800 to 5000 bytes");
}

#[test]
fn training_saves_and_ends_too_when_the_text_for_evaluation_is_rewritten() {
    let overwrite = |path: &Path| rewrite(path, &[b'x'; 100]);
    change_while_training("valid.txt", overwrite, "was rewritten while it was in use");
}
