//! Text and batches: which files are read, and which tokens which step sees.

use std::fs;
use std::path::{Path, PathBuf};

use polystage::train::data::{Batches, Corpus, Order};
use proptest::prelude::*;

fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
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

fn text(corpus: &Corpus) -> String {
    let mut tokens = vec![0; corpus.len()];
    corpus.read(0, &mut tokens);
    tokens.into_iter().map(|t| char::from(u8::try_from(t).expect("a byte"))).collect()
}

/// The error's one line.
fn message<T: std::fmt::Debug>(result: polystage::Result<T>) -> String {
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
            corpus.read(start, &mut out);
            assert_eq!(out, (start..start + len).map(|i| u32::from(b'0') + i as u32).collect::<Vec<_>>());
        }
    }
    Corpus::from_bytes(Vec::new()).read(0, &mut []);
}

#[test]
fn the_entropy_is_that_of_the_byte_frequencies() {
    let entropy = |text: &str| Corpus::from_bytes(text.into()).unigram_entropy();
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
    assert_eq!(batches.batch(0), [0, 1, 2, 3, 3, 4, 5, 6]);
    assert_eq!(batches.batch(1), [6, 7, 8, 9, 0, 1, 2, 3]);
    assert_eq!(batches.batch(u64::MAX).len(), 8);
}

#[test]
fn a_batch_may_be_larger_than_the_text() {
    let batches = Batches::new(numbered(2), 5, 4, Order::Sequential, 0).expect("long enough");
    assert_eq!(sequences(&batches.batch(0)), [0, 1, 0, 1, 0]);
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
        sequences(&batches.batch(step))
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
        let mut seen = sequences(&batches.batch(epoch));
        seen.sort();
        prop_assert!(seen.into_iter().eq(0..n));
    }

    #[test]
    fn a_batch_depends_only_on_the_step_and_batches_of_any_size_deal_the_same_order(
        n in 1usize..200, batch in 1usize..50, seed in any::<u64>(), step in 0u64..1000
    ) {
        let new = |batch| Batches::new(numbered(n), batch, 4, Order::Shuffled, seed).expect("long enough");
        let (used, ones) = (new(batch), new(1));
        used.batch(step + 1);
        let first = step * batch as u64;
        let one_by_one: Vec<u32> = (first..first + batch as u64).flat_map(|s| ones.batch(s)).collect();
        prop_assert_eq!(used.batch(step), new(batch).batch(step));
        prop_assert_eq!(used.batch(step), one_by_one);
    }
}

// --- records, tokenizers, token files ---------------------------------------------------------------------------------

use polystage::text::Tokenizer;
use polystage::text::chat::ChatTemplate;
use polystage::train::data::{BadLines, Batch, IGNORE, Reader};

use crate::text::{byte_level, chat_folder, folder as tokenizer_folder, sentence_piece};

/// Everything in a folder, read with a tokenizer.
fn read(tokenizer: &Tokenizer, files: &[(&str, &str)]) -> polystage::Result<Corpus> {
    read_with(&Reader { tokenizer, template: None, bad_lines: BadLines::Refuse }, files)
}

fn read_with(reader: &Reader, files: &[(&str, &str)]) -> polystage::Result<Corpus> {
    let folder = folder(files);
    reader.open(&["*".into()], &[folder.path().to_path_buf()])
}

fn tokens(corpus: &Corpus) -> Vec<u32> {
    let mut tokens = vec![0; corpus.len()];
    corpus.read(0, &mut tokens);
    tokens
}

/// Inputs and targets of every sequence as text, byte by byte: `.` for padding or the end of a document, `_` where
/// nothing is learnt.
fn shown(corpus: Corpus, sequence: usize) -> Vec<(String, String)> {
    let batches = Batches::new(corpus, 1, sequence, Order::Sequential, 0).expect("long enough");
    let show = |tokens: &[u32]| -> String {
        let show = |&token: &u32| match token {
            IGNORE => '_',
            0 => '.',
            byte => char::from(u8::try_from(byte).expect("a byte")),
        };
        tokens.iter().map(show).collect()
    };
    let row = |step| {
        let Batch { inputs, targets } = batches.examples(step);
        (show(&inputs), show(&targets))
    };
    (0..batches.sequences() as u64).map(row).collect()
}

/// A token file in llm.c's layout.
fn token_file(magic: u32, version: u32, count: u32, data: &[u8]) -> Vec<u8> {
    let mut header = vec![0u32; 256];
    (header[0], header[1], header[2]) = (magic, version, count);
    [header.iter().flat_map(|x| x.to_le_bytes()).collect(), data.to_vec()].concat()
}

fn read_tokens(bytes: &[u8]) -> polystage::Result<Corpus> {
    let folder = folder(&[]);
    fs::write(folder.path().join("a.bin"), bytes).expect("written");
    let tokenizer = Tokenizer::bytes();
    let reader = Reader { tokenizer: &tokenizer, template: None, bad_lines: BadLines::Refuse };
    reader.open(&["a.bin".into()], &[folder.path().to_path_buf()])
}

#[test]
fn text_of_bytes_is_read_as_it_is_and_its_examples_are_its_batches() {
    let files = [("a.txt", "0123"), ("b.md", "456789")];
    let corpus = read(&Tokenizer::bytes(), &files).expect("read");
    assert_eq!(text(&corpus), "0123456789");
    assert!(!corpus.is_masked());
    let batches = Batches::new(corpus, 2, 3, Order::Shuffled, 5).expect("long enough");
    for step in 0..9 {
        let (rows, Batch { inputs, targets }) = (batches.batch(step), batches.examples(step));
        let joined: Vec<u32> = inputs
            .chunks(3)
            .zip(targets.chunks(3))
            .flat_map(|(inputs, targets)| inputs.iter().copied().chain([targets[2]]).collect::<Vec<_>>())
            .collect();
        assert_eq!(joined, rows);
        assert_eq!(inputs[1..3], targets[0..2]);
    }
}

#[test]
fn records_of_text_follow_each_other_with_the_end_of_a_text_between_them() {
    let lines = "\u{feff}{\"text\": \"ab\", \"id\": 1}\r\n\n  \n{\"text\": \"c\"}";
    let corpus =
        read(&Tokenizer::bytes(), &[("a.jsonl", lines), ("b.ndjson", "{\"text\": \"d\"}\n")]).expect("read");
    assert_eq!(text(&corpus), "ab\0c\0d\0");
    assert!(!corpus.is_masked());
}

#[test]
fn a_document_of_a_tokenizer_begins_and_ends_with_the_models_tokens() {
    let settings = serde_json::json!({"bos_token": "<s>", "eos_token": "</s>"});
    let folder = tokenizer_folder(&sentence_piece(), &settings);
    let tokenizer = Tokenizer::open(folder.path()).expect("opened");
    let files = [("a.txt", "hello"), ("b.jsonl", "{\"text\": \"he\"}"), ("empty.txt", "")];
    let corpus = read(&tokenizer, &files).expect("read");
    assert_eq!(tokens(&corpus), [1, 266, 262, 262, 263, 2, 1, 266, 2]);
    assert_eq!(corpus.largest() as usize, tokenizer.vocabulary() - 1);
}

#[test]
fn only_completions_count_and_records_are_packed_whole() {
    let record = |prompt: &str, completion: &str| {
        format!("{{\"prompt\": {prompt:?}, \"completion\": {completion:?}}}\n")
    };
    let lines = [record("ab", "cd"), record("e", "f"), record("ghi", "jk"), record("l", "m")].concat();
    let corpus = read(&Tokenizer::bytes(), &[("a.jsonl", &lines)]).expect("read");
    assert!(corpus.is_masked());
    assert_eq!(text(&corpus), "abcd\0ef\0ghijk\0lm\0");
    let wanted = [("abcd.ef.", "_cd._f._"), ("ghijk.lm", "__jk._m.")];
    assert_eq!(
        shown(corpus.clone(), 8),
        wanted.map(|(inputs, targets)| (inputs.to_string(), targets.to_string()))
    );
    // In longer sequences more fit, in shorter ones fewer.
    assert_eq!(shown(corpus.clone(), 16).len(), 1);
    let short = shown(corpus, 5);
    assert_eq!(short[0], ("abcd.".into(), "_cd._".into()));
    assert_eq!(short[1], ("ef...".into(), "f.___".into()));
}

#[test]
fn records_longer_than_a_sequence_are_cut_so_that_every_target_counts_once() {
    let line = "{\"prompt\": \"0123456789\", \"completion\": \"abcdefgh\"}";
    let rows = shown(read(&Tokenizer::bytes(), &[("a.jsonl", line)]).expect("read"), 4);
    let wanted = [("89ab", "_abc"), ("cdef", "defg"), ("gh..", "h.__")];
    assert_eq!(rows, wanted.map(|(inputs, targets)| (inputs.to_string(), targets.to_string())));
}

#[test]
fn text_beside_completions_counts_everywhere() {
    let files =
        [("a.txt", "text"), ("b.jsonl", "{\"prompt\": \"p\", \"completion\": \"c\"}\n{\"text\": \"t\"}")];
    let rows = shown(read(&Tokenizer::bytes(), &files).expect("read"), 8);
    assert_eq!(rows, [("textpc.t".to_string(), "ext_c._.".to_string())]);
}

#[test]
fn of_messages_the_answers_count_with_the_mark_that_ends_them() {
    let folder = chat_folder();
    let tokenizer = Tokenizer::open(folder.path()).expect("opened");
    let template = ChatTemplate::open(folder.path(), std::time::SystemTime::UNIX_EPOCH).expect("opened");
    let reader = Reader { tokenizer: &tokenizer, template: template.as_ref(), bad_lines: BadLines::Refuse };
    let line =
        r#"{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "hello"}]}"#;
    let corpus = read_with(&reader, &[("a.jsonl", line)]).expect("read");
    let all = tokens(&corpus);
    assert_eq!(tokenizer.decode(&all).expect("decoded"), "user\nQ\nassistant\nhello\n");
    let sequence = all.len() - 1;
    let batch = Batches::new(corpus, 1, sequence, Order::Sequential, 0).expect("long enough").examples(0);
    let counted: Vec<u32> = batch.targets.iter().copied().filter(|&t| t != IGNORE).collect();
    // he, ll, o, the mark, the line feed; no other end follows, because the mark is one.
    assert_eq!(counted, [256, 257, 111, 261, 10]);
    assert_eq!(batch.trained(), 5);
    let without = Reader { template: None, ..reader };
    assert!(
        message(read_with(&without, &[("a.jsonl", line)]))
            .contains("line 1: has messages, and the model has no chat")
    );
}

#[test]
fn lines_that_are_no_records_are_named_by_number_and_refused_or_counted() {
    let bad = [
        ("[1]", "is an array, not an object"),
        ("\"x\"", "is a string, not an object"),
        ("7", "is a number, not an object"),
        ("null", "is a literal, not an object"),
        ("{\"text\": 5}", "has a \"text\" that is not a string"),
        ("{\"prompt\": \"x\"}", "has a prompt and no completion"),
        ("{\"completion\": \"x\"}", "has a completion and no prompt"),
        ("{\"prompt\": \"x\", \"completion\": \"\"}", "has an empty completion"),
        ("{\"messages\": 5}", "has \"messages\" that are not a list"),
        ("{\"messages\": [{}]}", "has a message 0 without a role"),
        ("{}", "has neither text, nor prompt and completion, nor messages"),
        ("{\"text\": \"x\"", "is not JSON (EOF while parsing an object at column 12)"),
    ];
    let tokenizer = Tokenizer::bytes();
    for (line, wanted) in bad {
        let file = format!("{{\"text\": \"good\"}}\n\n{line}\n");
        let refused = message(read(&tokenizer, &[("a.jsonl", &file)]));
        assert!(refused.contains(&format!("a.jsonl line 3: {wanted}; correct it")), "{refused}");
    }
    let lines = bad.map(|(line, _)| format!("{line}\n")).concat() + "{\"text\": \"good\"}\n";
    let skip = Reader { tokenizer: &tokenizer, template: None, bad_lines: BadLines::Skip };
    let corpus = read_with(&skip, &[("a.jsonl", &lines)]).expect("read");
    assert_eq!(text(&corpus), "good\0");
    let (count, first) = corpus.skipped();
    assert_eq!((count, first.len()), (12, 10));
    assert!(first[9].contains("a.jsonl line 10: has a message 0 without a role"), "{}", first[9]);
    assert!(message(read_with(&skip, &[("a.jsonl", "[]")])).contains("no text"));
    let nothing =
        read(&tokenizer, &[("a.jsonl", "{\"prompt\": \"abc\", \"completion\": \"x\"}")]).expect("read");
    assert!(Batches::new(nothing, 1, 4, Order::Shuffled, 0).is_ok());
}

#[test]
fn text_that_is_not_utf8_is_named_with_its_place_where_it_must_be_tokenised() {
    let folder = folder(&[]);
    fs::write(folder.path().join("a.txt"), b"hello \xff").expect("written");
    let tokenizers = tokenizer_folder(&byte_level(), &serde_json::Value::Null);
    let tokenizer = Tokenizer::open(tokenizers.path()).expect("opened");
    let reader = Reader { tokenizer: &tokenizer, template: None, bad_lines: BadLines::Refuse };
    let refused = message(reader.open(&["a.txt".into()], &[folder.path().to_path_buf()]));
    assert!(refused.contains("a.txt: is not valid UTF-8 at byte 6"), "{refused}");
}

#[test]
fn a_text_tokenised_in_pieces_has_the_tokens_of_the_whole() {
    // Above 3 MiB, with everything that tokenizers treat specially around line ends, and characters of many bytes.
    let mut long = String::new();
    for i in 0..90_000 {
        long += ["hello we\n", "  indented, é漢🙂\r\n", "\n\n", "x\n \n", "word word\n\tw\n"][i % 5];
        long += &format!("{}", i * 7919 % 1000);
    }
    assert!(long.len() > 1 << 20);
    for tokenizer in [byte_level(), sentence_piece()] {
        let folder = tokenizer_folder(&tokenizer, &serde_json::Value::Null);
        let tokenizer = Tokenizer::open(folder.path()).expect("opened");
        let corpus = read(&tokenizer, &[("a.txt", &long)]).expect("read");
        assert!(tokens(&corpus) == tokenizer.encode(&long, true).expect("encoded"));
    }
}

#[test]
fn token_files_of_both_kinds_are_read_in_place_and_know_their_largest_token() {
    let two: Vec<u8> = [1u16, 50_256, 7].iter().flat_map(|t| t.to_le_bytes()).collect();
    let corpus = read_tokens(&token_file(20_240_520, 1, 3, &two)).expect("read");
    assert_eq!((tokens(&corpus), corpus.largest()), (vec![1, 50_256, 7], 50_256));
    let four: Vec<u8> = [128_000u32, 5].iter().flat_map(|t| t.to_le_bytes()).collect();
    let corpus = read_tokens(&token_file(20_240_801, 7, 2, &four)).expect("read");
    assert_eq!((tokens(&corpus), corpus.largest()), (vec![128_000, 5], 128_000));
}

#[test]
fn token_files_of_other_kinds_and_lengths_are_refused() {
    let fails = |bytes: &[u8]| message(read_tokens(bytes));
    assert!(fails(b"short").contains("a.bin: has 5 bytes; a file of tokens begins with a header of 1024"));
    assert!(fails(&token_file(20_240_520, 2, 1, &[0; 2])).contains("magic number 20240520 and version 2"));
    assert!(fails(&token_file(1, 1, 1, &[0; 2])).contains("is no file of tokens"));
    assert!(fails(&token_file(20_240_520, 1, 2, &[0; 2])).contains("has 1026 bytes; 2 tokens need 1028"));
    assert!(fails(&token_file(20_240_520, 1, u32::MAX, &[0; 2])).contains("is damaged"));
    assert!(fails(&token_file(20_240_520, 1, 0, &[])).contains("no text"));
}

#[test]
fn the_last_part_is_cut_off_for_validation_at_a_document_where_documents_are_packed() {
    let (train, valid) = Corpus::from_bytes((0..10).collect()).split(0.25).expect("split");
    assert_eq!((tokens(&train), tokens(&valid)), ((0..7).collect(), (7..10).collect()));
    let record = |text: &str| format!("{{\"prompt\": \"{text}\", \"completion\": \"{text}\"}}\n");
    let corpus =
        read(&Tokenizer::bytes(), &[("a.jsonl", &["a", "b", "c", "d"].map(record).concat())]).expect("read");
    let (train, valid) = corpus.split(0.4).expect("split");
    assert_eq!((text(&train), text(&valid)), ("aa\0bb\0cc\0".into(), "dd\0".into()));
    assert_eq!(shown(valid, 4), [("dd..".to_string(), "d.__".to_string())]);
    assert_eq!(shown(train, 4).len(), 3);
    for fraction in [0.0, 1.0, -1.0, f64::NAN] {
        assert!(message(corpus.split(fraction)).contains("must be above 0 and below 1"));
    }
    assert!(message(corpus.split(0.01)).contains("12 tokens in 4 documents leaves nothing"));
    assert!(message(Corpus::from_bytes(vec![1]).split(0.5)).contains("leaves nothing"));
}

#[test]
fn windows_follow_each_other_and_the_last_is_filled_up() {
    let corpus = Corpus::from_bytes((1..=8).collect());
    let windows = |length, stride| -> Vec<(Vec<u32>, Vec<u32>)> {
        corpus.windows(length, stride).map(|Batch { inputs, targets }| (inputs, targets)).collect()
    };
    let no = IGNORE;
    assert_eq!(
        windows(3, 3),
        [(vec![1, 2, 3], vec![2, 3, 4]), (vec![4, 5, 6], vec![5, 6, 7]), (vec![7, 8, 0], vec![8, no, no])]
    );
    assert_eq!(
        windows(2, 3),
        [(vec![1, 2], vec![2, 3]), (vec![4, 5], vec![5, 6]), (vec![7, 8], vec![8, no])]
    );
    assert_eq!(windows(100, 100).len(), 1);
    assert_eq!(Corpus::from_bytes(vec![1]).windows(4, 4).count(), 0);
    let lines = "{\"prompt\": \"ab\", \"completion\": \"c\"}";
    let masked = read(&Tokenizer::bytes(), &[("a.jsonl", lines)]).expect("read");
    let targets: Vec<_> = masked.windows(3, 3).map(|batch| batch.targets).collect();
    assert_eq!(targets, [[no, u32::from(b'c'), 0]]);
}

proptest! {
    #[test]
    fn every_target_that_counts_is_a_target_once_in_packed_records_of_any_length(
        records in prop::collection::vec((0usize..9, 1usize..9), 1..20), sequence in 1usize..12,
    ) {
        let mut lines = String::new();
        for (prompt, completion) in records {
            let (prompt, completion) = ("p".repeat(prompt), "C".repeat(completion));
            lines += &format!("{{\"prompt\": \"{prompt}\", \"completion\": \"{completion}\"}}\n");
        }
        let corpus = read(&Tokenizer::bytes(), &[("a.jsonl", &lines)]).expect("read");
        let all = tokens(&corpus);
        let batches = Batches::new(corpus, 1, sequence, Order::Sequential, 0).expect("something counts");
        let mut counted = 0;
        for step in 0..batches.sequences() as u64 {
            let Batch { inputs, targets } = batches.examples(step);
            let row = batches.batch(step);
            prop_assert_eq!(&row[..sequence], &inputs[..]);
            for (i, &target) in targets.iter().enumerate() {
                prop_assert!(target == IGNORE || target == row[i + 1]);
                prop_assert!(target != u32::from(b'p'));
            }
            prop_assert!(targets.iter().any(|&t| t != IGNORE), "a sequence without a target");
            counted += targets.iter().filter(|&&t| t != IGNORE).count();
        }
        // The completions and the ends of the records, but not what a record begins with.
        let wanted = (1..all.len()).filter(|&i| all[i] != u32::from(b'p') && all[i - 1] != 0).count();
        prop_assert_eq!(counted, wanted);
    }

    #[test]
    fn damaged_records_and_token_files_are_an_error_or_tokens_and_never_a_panic(
        at in 0.0..1.0f64, flip in 1u8.., cut in any::<bool>(), bin in any::<bool>(), skip in any::<bool>(),
    ) {
        let lines = "{\"text\": \"hé\"}\n{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"messages\": [{\"role\": \"user\"}]}\n";
        let mut bytes = if bin { token_file(20_240_520, 1, 2, &[1, 2, 3, 4]) } else { lines.as_bytes().to_vec() };
        let at = (at * bytes.len() as f64) as usize;
        if cut { bytes.truncate(at) } else { bytes[at] ^= flip }
        let folder = folder(&[]);
        fs::write(folder.path().join(if bin { "a.bin" } else { "a.jsonl" }), bytes).expect("written");
        let tokenizer = Tokenizer::bytes();
        let bad_lines = if skip { BadLines::Skip } else { BadLines::Refuse };
        let reader = Reader { tokenizer: &tokenizer, template: None, bad_lines };
        match reader.open(&["*".into()], &[folder.path().to_path_buf()]) {
            Ok(corpus) => {
                prop_assert_eq!(tokens(&corpus).len(), corpus.len());
                if let Ok(batches) = Batches::new(corpus, 1, 2, Order::Shuffled, 0) {
                    prop_assert!(batches.examples(0).trained() > 0);
                }
            }
            Err(error) => prop_assert_eq!(error.to_string().lines().count(), 1),
        }
    }
}
