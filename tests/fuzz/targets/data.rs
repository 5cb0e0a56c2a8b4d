//! What is trained on: records, files of tokens, and the patterns that name files.

use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use jiff::civil::DateTime;
use polystage::text::Tokenizer;
use polystage::text::chat::ChatTemplate;
use polystage::train::data::{BadLines, Batches, Corpus, Order, Reader, RecordFormat};
use polystage::train::source::Text;

use super::{Target, outcome};

/// JSON, one record a line.
pub static RECORDS: Target = Target {
    name: "records",
    words: r#"
        "text" "prompt" "completion" "messages" "tools" "role" "content" "user" "assistant" "system"
        "</think>" null { } [ ] : , {"text":""}"#,
    seeds: |_| {
        vec![
            b"{\"text\":\"one line of text that is long enough\"}\n{\"text\":\"\"}\n\n{\"text\":\"another\"}\n".to_vec(),
            b"\xef\xbb\xbf{\"prompt\":\"2+2=\",\"completion\":\"4\"}\n{\"prompt\":\"\",\"completion\":\"\xc3\xa9\"}".to_vec(),
            concat!(
                r#"{"messages":[{"role":"system","content":"S"},{"role":"user","content":"Q"},{"role":"assistant","content":"A"}]}"#,
                "\n",
                r#"{"messages":[{"role":"user","content":"A"},{"role":"assistant","content":"<think>x</think> A "}],"tools":[{"name":"f"}]}"#,
            )
            .as_bytes()
            .to_vec(),
        ]
    },
    run: |folder, input| {
        fs::write(folder.join("records.jsonl"), input).expect("written");
        static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(Tokenizer::bytes);
        static TEMPLATE: LazyLock<ChatTemplate> = LazyLock::new(|| {
            let source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}|{{ tools | tojson if tools }}\n{% endfor %}";
            ChatTemplate::new(source, &[], DateTime::default()).expect("a template")
        });
        let read = |bad_lines| {
            let reader = Reader {
                tokenizer: &TOKENIZER,
                template: Some(&TEMPLATE),
                format: &RecordFormat { bad_lines, ..RecordFormat::default() },
                ends: true,
            };
            reader.open(&["records.jsonl".into()], &[folder.to_path_buf()])
        };
        let refused = outcome(read(BadLines::Refuse).map(|corpus| format!("{:?}", corpus.is_masked())));
        format!("{refused}, {}", outcome(read(BadLines::Skip).map(use_up)))
    },
};

/// Everything that training and evaluation ask of a text.
fn use_up(corpus: Corpus) -> String {
    let entropy = corpus.unigram_entropy().expect("nobody changes it");
    assert!(entropy >= 0.0, "{entropy}");
    let windows =
        corpus.windows(8).map(|batch| batch.expect("nobody changes it").inputs.len()).sum::<usize>();
    let split = corpus.split(0.25).map(|(train, valid)| train.len() + valid.len());
    assert!(split.is_err() || split.is_ok_and(|sum| sum == corpus.len()));
    let skipped = corpus.skipped().0;
    let batches = [(2, 16, Order::Shuffled), (1, 3, Order::Sequential)].map(|(batch, sequence, order)| {
        let batches = Batches::new(corpus.clone(), batch, sequence, order, 7);
        outcome(batches.map(|batches| {
            let (tokens, examples) = (batches.batch(5), batches.examples(u64::MAX));
            let (tokens, examples) = (tokens.expect("unchanged"), examples.expect("unchanged"));
            assert_eq!((tokens.len(), examples.targets.len()), (batch * (sequence + 1), batch * sequence));
            batches.sequences().to_string()
        }))
    });
    format!("{skipped} {windows} {}", batches.join(" "))
}

/// llm.c's tokens.
pub static TOKENS: Target = Target {
    name: "tokens",
    words: "",
    seeds: |_| vec![tokens(20_240_520, 1, 2), tokens(20_240_801, 7, 4)],
    run: |folder, input| {
        fs::write(folder.join("tokens.bin"), input).expect("written");
        let text = Text::bytes();
        let read = text.read(
            &["tokens.bin".into()],
            &[folder.to_path_buf()],
            50_257,
            &RecordFormat::default(),
            true,
        );
        outcome(read.map(use_up))
    },
};

fn tokens(magic: u32, version: u32, width: usize) -> Vec<u8> {
    let ids = 0..40u32;
    let mut bytes = vec![0; 1024];
    for (at, word) in [magic, version, ids.end].into_iter().enumerate() {
        bytes[4 * at..][..4].copy_from_slice(&word.to_le_bytes());
    }
    bytes.extend(ids.flat_map(|id| (1000 + id).to_le_bytes()[..width].to_vec()));
    bytes
}

/// A pattern a line.
pub static PATHS: Target = Target {
    name: "paths",
    words: r#"* ** **/ ? [a-z] [!a] [ ] / ./ // . folder a.txt {a,b} \"#,
    seeds: |folder| {
        for name in ["folder/deep/er", "folder/empty"] {
            fs::create_dir_all(folder.join(name)).expect("a folder");
        }
        let long = "a".repeat(200);
        for name in
            ["a.txt", "b[1].txt", "folder/c.txt", "folder/deep/er/.hidden", "folder/deep/ü.txt", &long]
        {
            fs::write(folder.join(name), "text").expect("written");
        }
        #[cfg(unix)]
        {
            use std::os::unix::ffi::OsStrExt;
            for (to, name) in [("..", "folder/up"), ("nowhere", "dangling"), ("a.txt", "link.txt")] {
                std::os::unix::fs::symlink(to, folder.join(name)).expect("a link");
            }
            let name = std::ffi::OsStr::from_bytes(b"no\xffutf8.txt");
            // Some systems have no such names.
            let _ = fs::write(folder.join(name), "text");
        }
        ["a.txt", "*.txt", "folder/**/*.txt", "b[1].txt\nfolder/c.txt", "folder/[a-d].*\n?.txt", "*a*a*a*a*"]
            .map(|patterns| patterns.as_bytes().to_vec())
            .to_vec()
    },
    run: |folder, input| {
        let Ok(text) = std::str::from_utf8(input) else { return "not text".into() };
        // Not out of the folder: what is there is no part of the input.
        let inside = |pattern: &&str| !Path::new(pattern).is_absolute() && !pattern.contains("..");
        let patterns: Vec<String> = text.lines().filter(inside).map(String::from).collect();
        outcome(Corpus::open(&patterns, &[folder.to_path_buf()]).map(|corpus| corpus.len().to_string()))
    },
};
