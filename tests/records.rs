//! Records, tokenised text and token files: which tokens count, in which sequences.

use std::fs;

use polystage::text::Tokenizer;
use polystage::text::chat::ChatTemplate;
use polystage::train::data::{BadLines, Batch, Batches, Corpus, IGNORE, Order, Reader, RecordFormat};
use proptest::prelude::*;

use crate::data::{folder, message, text};
use crate::text::{byte_level, chat_folder, folder as tokenizer_folder, sentence_piece};

/// Everything in a folder, read with a tokenizer.
fn read(tokenizer: &Tokenizer, files: &[(&str, &str)]) -> polystage::Result<Corpus> {
    read_with(&Reader { tokenizer, template: None, format: &RecordFormat::default(), ends: true }, files)
}

fn read_with(reader: &Reader, files: &[(&str, &str)]) -> polystage::Result<Corpus> {
    let folder = folder(files);
    reader.open(&["*".into()], &[folder.path().to_path_buf()])
}

fn tokens(corpus: &Corpus) -> Vec<u32> {
    let mut tokens = vec![0; corpus.len()];
    corpus.read(0, &mut tokens).expect("unchanged");
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
        let Batch { inputs, targets, .. } = batches.examples(step).expect("read");
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
    let reader =
        Reader { tokenizer: &tokenizer, template: None, format: &RecordFormat::default(), ends: true };
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
        let (rows, Batch { inputs, targets, .. }) =
            (batches.batch(step).expect("read"), batches.examples(step).expect("read"));
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
    let template = ChatTemplate::open(folder.path(), jiff::civil::DateTime::default()).expect("opened");
    let reader = Reader {
        tokenizer: &tokenizer,
        template: template.as_ref(),
        format: &RecordFormat::default(),
        ends: true,
    };
    let line =
        r#"{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "hello"}]}"#;
    let corpus = read_with(&reader, &[("a.jsonl", line)]).expect("read");
    let all = tokens(&corpus);
    assert_eq!(tokenizer.decode(&all).expect("decoded"), "user\nQ\nassistant\nhello\n");
    let sequence = all.len() - 1;
    let batches = Batches::new(corpus, 1, sequence, Order::Sequential, 0).expect("long enough");
    let batch = batches.examples(0).expect("read");
    let counted: Vec<u32> = batch.targets.iter().copied().filter(|&t| t != IGNORE).collect();
    // he, ll, o, the mark, the line feed; no other end follows, because the mark is one.
    assert_eq!(counted, [256, 257, 111, 261, 10]);
    assert_eq!(batch.counted(), 5);
    let without = Reader { template: None, ..reader };
    assert!(
        message(read_with(&without, &[("a.jsonl", line)]))
            .contains("line 1: has messages, and the model has no chat")
    );
}

#[test]
fn records_of_alpaca_and_sharegpt_are_the_conversations_that_they_mean() {
    let folder = chat_folder();
    let tokenizer = Tokenizer::open(folder.path()).expect("opened");
    let template = ChatTemplate::open(folder.path(), jiff::civil::DateTime::default()).expect("opened");
    let mut format = RecordFormat::default();
    let read = |format: &RecordFormat, line: &str| {
        let reader = Reader { tokenizer: &tokenizer, template: template.as_ref(), format, ends: true };
        let corpus = read_with(&reader, &[("a.jsonl", line)])?;
        let batch = corpus.windows(corpus.len()).next().expect("counts")?;
        Ok((tokenizer.decode(&tokens(&corpus))?, batch.counted()))
    };
    let plain = read(
        &format,
        r#"{"messages": [{"role": "user", "content": "Q\n\nI"}, {"role": "assistant", "content": "hello"}]}"#,
    )
    .expect("read");
    for same in [
        r#"{"instruction": "Q", "input": "I", "output": "hello"}"#,
        r#"{"conversations": [{"from": "human", "value": "Q\n\nI"}, {"from": "gpt", "value": "hello"}]}"#,
        r#"{"conversations": [{"role": "user", "content": "Q\n\nI"}, {"role": "assistant", "content": "hello"}]}"#,
    ] {
        assert_eq!(read(&format, same).expect("read"), plain, "{same}");
    }
    let empty = read(&format, r#"{"instruction": "Q", "input": "", "output": "hello"}"#).expect("read");
    assert_eq!(empty.0, "user\nQ\nassistant\nhello\n");
    let system = r#"{"system": "S", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}"#;
    assert!(read(&format, system).expect("read").0.starts_with("system\nS\nuser\nQ"));
    let stranger = r#"{"conversations": [{"from": "alien", "value": "Q"}]}"#;
    let refused = message(read(&format, stranger));
    assert!(refused.contains("line 1: has a message 0 of \"alien\"") && refused.contains("data.bad_lines"));

    // The same under other names, which then are the only ones.
    let names = [
        ("instruction", "task"),
        ("output", "reply"),
        ("messages", "talk"),
        ("role", "who"),
        ("content", "what"),
    ];
    format.keys = names.map(|(field, name)| (field.to_string(), name.to_string())).into();
    let renamed = r#"{"task": "Q", "input": "I", "reply": "hello", "output": 7}"#;
    assert_eq!(read(&format, renamed).expect("read"), plain);
    let talk = r#"{"talk": [{"who": "human", "what": "Q\n\nI"}, {"who": "gpt", "what": "hello"}]}"#;
    assert_eq!(read(&format, talk).expect("read"), plain);
    assert!(message(read(&format, r#"{"instruction": "Q", "output": "A"}"#)).contains("task and reply"));
}

#[test]
fn an_instruction_without_a_chat_template_is_asked_in_alpacas_words() {
    let line = r#"{"instruction": "Add.", "input": "1 and 2", "output": "3"}"#;
    let corpus = read(&Tokenizer::bytes(), &[("a.jsonl", line)]).expect("read");
    let whole = text(&corpus);
    assert!(
        whole.starts_with("Below is an instruction that describes a task, paired with an input"),
        "{whole}"
    );
    assert!(
        whole.ends_with("### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n3\0"),
        "{whole}"
    );
    let (_, answer) = corpus.question(1000).expect("read").expect("has one");
    assert_eq!(answer, [u32::from(b'3'), 0]);
}

#[test]
fn records_are_evaluated_whole_whatever_the_window_and_cut_only_where_they_do_not_fit() {
    let record = |prompt: &str, completion: &str| {
        format!("{{\"prompt\": {prompt:?}, \"completion\": {completion:?}}}\n")
    };
    let lines =
        [record("abc", "de"), record("f", "gh"), record("ijklmnop", "qrs"), record("t", "u")].concat();
    let corpus = read(&Tokenizer::bytes(), &[("a.jsonl", &lines)]).expect("read");
    // What counts, each with all of its record that stands before it.
    let seen = |length: usize| -> Vec<(Vec<u32>, u32)> {
        let rows = corpus.windows(length).map(|row| row.expect("read"));
        let each = rows.flat_map(|row| {
            let counted = (0..length).filter(|&t| row.targets[t] != IGNORE).collect::<Vec<_>>();
            let of = |t: usize| (row.inputs[row.starts[t] as usize..=t].to_vec(), row.targets[t]);
            counted.into_iter().map(of).collect::<Vec<_>>()
        });
        each.collect()
    };
    let tally = |length: usize| corpus.tally(length).expect("has records");
    for length in [11, 12, 16, 40, 1000] {
        assert_eq!(seen(length), seen(64), "{length}");
        assert_eq!((tally(length).cut, tally(length).records, tally(length).longest), (0, 4, 12));
    }
    assert_eq!(seen(64).len(), 3 + 3 + 4 + 2);
    assert_eq!((seen(10).len(), tally(10).cut), (12, 1), "one is cut, and every answer still counts");
    // Text has no records, and its windows share nothing.
    let plain = read(&Tokenizer::bytes(), &[("a.txt", "0123456789")]).expect("read");
    assert!(plain.tally(4).is_none() && plain.windows(4).len() == 3);
}

#[test]
fn lines_that_are_no_records_are_named_by_number_and_refused_or_counted() {
    let bad = [
        ("[1]", "is an array, not an object"),
        ("\"x\"", "is a string, not an object"),
        ("7", "is a number, not an object"),
        ("null", "is a literal, not an object"),
        ("{\"text\": 5}", "has \"text\", which is not a string"),
        ("{\"prompt\": \"x\"}", "has prompt and no completion"),
        ("{\"completion\": \"x\"}", "has completion and no prompt"),
        ("{\"prompt\": \"x\", \"completion\": \"\"}", "has completion that is empty"),
        ("{\"messages\": 5}", "has \"messages\", which is not a list"),
        ("{\"messages\": [{}]}", "has a message 0 without role (or from)"),
        ("{}", "has neither text, nor prompt and completion, nor messages"),
        ("{\"text\": \"x\"", "is not JSON (EOF while parsing an object at column 12)"),
    ];
    let tokenizer = Tokenizer::bytes();
    for (line, wanted) in bad {
        let file = format!("{{\"text\": \"good\"}}\n\n{line}\n");
        let refused = message(read(&tokenizer, &[("a.jsonl", &file)]));
        let (said, help) = refused.split_once("; correct it").expect(&refused);
        assert!(said.contains(&format!("a.jsonl line 3: {wanted}")), "{refused}");
        assert!(help.contains("data.bad_lines = \"skip\" (--skip-bad-lines)"), "{refused}");
    }
    let lines = bad.map(|(line, _)| format!("{line}\n")).concat() + "{\"text\": \"good\"}\n";
    let skip = Reader {
        tokenizer: &tokenizer,
        template: None,
        format: &RecordFormat { bad_lines: BadLines::Skip, ..RecordFormat::default() },
        ends: true,
    };
    let corpus = read_with(&skip, &[("a.jsonl", &lines)]).expect("read");
    assert_eq!(text(&corpus), "good\0");
    let (count, first) = corpus.skipped();
    assert_eq!((count, first.len()), (12, 10));
    assert!(first[9].contains("a.jsonl line 10: has a message 0 without role"), "{}", first[9]);
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
    let reader =
        Reader { tokenizer: &tokenizer, template: None, format: &RecordFormat::default(), ends: true };
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
    // A line that is no record is told of once.
    let format = RecordFormat { bad_lines: BadLines::Skip, ..RecordFormat::default() };
    let lines = ["a", "b", "c"].map(record).concat() + "{}\n";
    let reader = Reader { tokenizer: &Tokenizer::bytes(), template: None, format: &format, ends: true };
    let corpus = read_with(&reader, &[("a.jsonl", &lines)]).expect("read");
    let (train, valid) = corpus.split(0.4).expect("split");
    assert_eq!((train.skipped().0, valid.skipped().0), (1, 0));
    assert!(message(Corpus::from_bytes(vec![1]).split(0.5)).contains("leaves nothing"));
}

#[test]
fn windows_follow_each_other_and_the_last_is_filled_up() {
    let corpus = Corpus::from_bytes((1..=8).collect());
    let windows = |length| -> Vec<(Vec<u32>, Vec<u32>)> {
        corpus.windows(length).map(|batch| batch.expect("read")).map(|b| (b.inputs, b.targets)).collect()
    };
    let no = IGNORE;
    assert_eq!(
        windows(3),
        [(vec![1, 2, 3], vec![2, 3, no]), (vec![4, 5, 6], vec![5, 6, no]), (vec![7, 8, 0], vec![8, no, no])]
    );
    assert_eq!(windows(7).len(), 1);
    assert_eq!(windows(100).len(), 1);
    assert_eq!(Corpus::from_bytes(vec![1]).windows(4).count(), 0);
    let lines = "{\"prompt\": \"ab\", \"completion\": \"c\"}";
    let masked = read(&Tokenizer::bytes(), &[("a.jsonl", lines)]).expect("read");
    let targets: Vec<_> = masked.windows(4).map(|batch| batch.expect("read").targets).collect();
    assert_eq!(targets, [[no, u32::from(b'c'), 0, no]]);
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
            let Batch { inputs, targets, .. } = batches.examples(step).expect("read");
            let row = batches.batch(step).expect("read");
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
        let reader = Reader { tokenizer: &tokenizer, template: None, format: &RecordFormat { bad_lines, ..RecordFormat::default() }, ends: true };
        match reader.open(&["*".into()], &[folder.path().to_path_buf()]) {
            Ok(corpus) => {
                prop_assert_eq!(tokens(&corpus).len(), corpus.len());
                if let Ok(batches) = Batches::new(corpus, 1, 2, Order::Shuffled, 0) {
                    prop_assert!(batches.examples(0).expect("read").counted() > 0);
                }
            }
            Err(error) => prop_assert_eq!(error.to_string().lines().count(), 1),
        }
    }
}
