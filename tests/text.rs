//! Tokenizers and chat templates.

use std::fs;
use std::path::Path;

use jiff::civil::{DateTime, date};
use polystage::text::Tokenizer;
use polystage::text::chat::ChatTemplate;
use proptest::prelude::*;
use serde_json::{Value, json};

/// The error's one line.
fn message<T: std::fmt::Debug>(result: polystage::Result<T>) -> String {
    let error = result.expect_err("an error");
    assert!(error.is_input(), "{error:?}");
    assert_eq!(error.to_string().lines().count(), 1);
    error.to_string()
}

/// GPT-2's printable stand-in of each byte.
fn stand_in(byte: u8) -> char {
    let printable = |b: u8| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return byte.into();
    }
    let others = (0..byte).filter(|&b| !printable(b)).count();
    char::from_u32(256 + others as u32).expect("a character")
}

/// A byte-level BPE as GPT-2's with a few merges: `he`, `ll`, ` w`, `é`. Tokens 0 to 255 are the bytes, 260 and 261 the
/// marks `<|im_start|>` and `<|im_end|>`.
pub fn byte_level() -> Value {
    let mut vocabulary: serde_json::Map<String, Value> =
        (0..=255u8).map(|byte| (stand_in(byte).to_string(), json!(byte))).collect();
    let space = stand_in(b' ');
    let merges = [("h", "e"), ("l", "l"), (&space.to_string(), "w"), ("Ã", "©")];
    for (i, (a, b)) in merges.iter().enumerate() {
        vocabulary.insert(format!("{a}{b}"), json!(256 + i));
    }
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    json!({
        "version": "1.0",
        // What somebody's last batch left behind; it must have no effect.
        "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        "padding": null,
        "added_tokens": [special(260, "<|im_start|>"), special(261, "<|im_end|>")],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocabulary,
            "merges": merges.map(|(a, b)| format!("{a} {b}"))},
    })
}

/// A BPE like Llama 2's: spaces are `▁`, a text begins with one, unknown characters fall back to bytes, and `<s>` comes
/// first. Tokens 3 to 258 are the bytes.
pub fn sentence_piece() -> Value {
    let mut vocabulary = serde_json::Map::new();
    for (id, token) in ["<unk>", "<s>", "</s>"].into_iter().enumerate() {
        vocabulary.insert(token.into(), json!(id));
    }
    for byte in 0..=255u8 {
        vocabulary.insert(format!("<0x{byte:02X}>"), json!(3 + byte as usize));
    }
    for (i, token) in ["▁", "h", "e", "l", "o", "w", "▁h", "▁he"].into_iter().enumerate() {
        vocabulary.insert(token.into(), json!(259 + i));
    }
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [{"id": 1, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocabulary,
            "merges": ["▁ h", "▁h e"]},
    })
}

const CHATML: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// Writes a tokenizer and its settings.
pub fn folder(tokenizer: &Value, settings: &Value) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).expect("written");
    fs::write(folder.path().join("tokenizer_config.json"), settings.to_string()).expect("written");
    folder
}

/// A folder with the byte-level tokenizer, ended by `<|im_end|>`, and a chat template.
pub fn chat_folder() -> tempfile::TempDir {
    folder(&byte_level(), &json!({"eos_token": "<|im_end|>", "chat_template": CHATML}))
}

fn open(tokenizer: &Value) -> Tokenizer {
    Tokenizer::open(folder(tokenizer, &json!({})).path()).expect("opened")
}

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::new(source, &[("bos_token", "<s>"), ("eos_token", "</s>")], noon()).expect("compiled")
}

fn noon() -> DateTime {
    date(2026, 7, 26).at(12, 0, 0, 0)
}

fn say(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

// --- tokenizers -------------------------------------------------------------------------------------------------------

#[test]
fn text_becomes_the_tokens_of_the_merges_whatever_truncation_the_file_asks_for() {
    let tokenizer = open(&byte_level());
    assert_eq!(tokenizer.vocabulary(), 262);
    let tokens = tokenizer.encode("hello w\u{e9}<|im_end|>", true).expect("encoded");
    assert_eq!(tokens, [256, 257, 111, 258, 259, 261]);
    assert_eq!(tokenizer.decode(&tokens).expect("decoded"), "hello w\u{e9}");
    assert_eq!(tokenizer.encode("", true).expect("encoded"), [0u32; 0]);
}

#[test]
fn the_first_token_of_a_text_comes_only_where_it_is_asked_for() {
    let settings = json!({"bos_token": {"content": "<s>"}, "eos_token": "</s>"});
    let tokenizer = Tokenizer::open(folder(&sentence_piece(), &settings).path()).expect("opened");
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.start()), (Some(1), Some(2), &[1][..]));
    assert_eq!(tokenizer.encode("hello", true).expect("encoded"), [1, 266, 262, 262, 263]);
    assert_eq!(tokenizer.encode("hello", false).expect("encoded"), [266, 262, 262, 263]);
    assert_eq!(tokenizer.decode(&[1, 266, 262, 262, 263, 2]).expect("decoded"), "hello</s>");
}

#[test]
fn every_file_that_names_an_ending_token_counts_and_the_tokenizers_own_is_the_separator() {
    let folder = chat_folder();
    let path = folder.path();
    fs::write(path.join("generation_config.json"), r#"{"eos_token_id": [7, 261, 999], "bos_token_id": 5}"#)
        .expect("written");
    fs::write(path.join("config.json"), r#"{"eos_token_id": 8}"#).expect("written");
    let tokenizer = Tokenizer::open(path).expect("opened");
    assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(5), Some(261)));
    let ends: Vec<u32> = (0..1000).filter(|&token| tokenizer.ends(token)).collect();
    assert_eq!(ends, [7, 8, 261]);
    let bytes = Tokenizer::bytes();
    assert_eq!((bytes.bos(), bytes.eos(), bytes.ends(0), bytes.vocabulary()), (None, Some(0), false, 256));
}

#[test]
fn an_embedding_may_be_larger_than_the_tokenizer_and_not_smaller() {
    let tokenizer = open(&byte_level());
    assert!(tokenizer.check_embedding(262, Path::new("m")).is_ok());
    assert!(tokenizer.check_embedding(320, Path::new("m")).is_ok());
    let refused = message(tokenizer.check_embedding(261, Path::new("m")));
    assert!(
        refused.contains("m: the tokenizer has tokens up to 261 and the model's embedding only 261 rows"),
        "{refused}"
    );
}

#[test]
fn tokenizers_that_are_missing_or_damaged_are_named() {
    let folder = tempfile::tempdir().expect("a folder");
    assert!(message(Tokenizer::open(folder.path())).contains("tokenizer.json: is missing; give a folder"));
    fs::write(folder.path().join("tokenizer.model"), "").expect("written");
    assert!(message(Tokenizer::open(folder.path())).contains("make it out of tokenizer.model"));
    let file = folder.path().join("tokenizer.json");
    for text in ["", "{", "{}", "[]", r#"{"model": {"type": "BPE"}}"#] {
        fs::write(&file, text).expect("written");
        assert!(message(Tokenizer::open(&file)).contains("tokenizer.json: is no tokenizer"), "{text}");
    }
    let mut empty = byte_level();
    empty["model"]["vocab"] = json!({});
    empty["model"]["merges"] = json!([]);
    empty["added_tokens"] = json!([]);
    fs::write(&file, empty.to_string()).expect("written");
    assert!(message(Tokenizer::open(&file)).contains("has no tokens"));
}

#[test]
fn a_stream_holds_back_what_is_no_whole_character_yet() {
    for tokenizer in [Tokenizer::bytes(), open(&byte_level())] {
        let mut stream = tokenizer.stream();
        let pushed: Vec<String> =
            "aé漢🙂".bytes().map(|byte| stream.push(byte.into()).expect("pushed")).collect();
        assert_eq!(pushed, ["a", "", "é", "", "", "漢", "", "", "", "🙂"]);
        assert_eq!(stream.push(0xf0).expect("pushed"), "");
        assert_eq!(stream.finish().expect("finished"), "\u{fffd}");
    }
    let tokenizer = open(&sentence_piece());
    let mut stream = tokenizer.stream();
    let pushed: Vec<String> =
        [266, 262, 265, 1, 266, 3 + 0xc3, 3 + 0xa9].map(|token| stream.push(token).expect("pushed")).into();
    assert_eq!(pushed, ["he", "l", " h", "", " he", "", "é"]);
}

#[test]
fn a_stream_gives_up_on_bytes_that_never_become_a_character() {
    let tokenizer = open(&byte_level());
    let mut stream = tokenizer.stream();
    let text: String = (0..100).map(|_| stream.push(0x80).expect("pushed")).collect();
    assert!(text.chars().count() >= 50 && text.chars().all(|c| c == '\u{fffd}'), "{text:?}");
}

proptest! {
    #[test]
    fn a_streams_pieces_joined_are_the_text(text in "(\\PC|▁){0,40}") {
        // SentencePiece writes a space as U+2581, so it cannot tell the two in the text apart.
        let spaced = text.replace('\u{2581}', " ");
        let tokenizers =
            [(Tokenizer::bytes(), &text), (open(&byte_level()), &text), (open(&sentence_piece()), &spaced)];
        for (tokenizer, expected) in tokenizers {
            let tokens = tokenizer.encode(&text, false).expect("encoded");
            let mut stream = tokenizer.stream();
            let mut joined: String = tokens.iter().map(|&t| stream.push(t).expect("pushed")).collect();
            joined += &stream.finish().expect("finished");
            prop_assert_eq!(&joined, &tokenizer.decode(&tokens).expect("decoded"));
            prop_assert_eq!(&joined, expected);
        }
    }

    #[test]
    fn damaged_tokenizer_files_are_an_error_or_a_tokenizer_and_never_a_panic(
        at in 0.0..1.0f64, flip in 1u8.., cut in any::<bool>(), piece in any::<bool>(),
    ) {
        let mut bytes = (if piece { sentence_piece() } else { byte_level() }).to_string().into_bytes();
        let at = (at * bytes.len() as f64) as usize;
        if cut { bytes.truncate(at) } else { bytes[at] ^= flip }
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("tokenizer.json"), bytes).expect("written");
        match Tokenizer::open(folder.path()) {
            Ok(tokenizer) => drop(tokenizer.encode("hello wörld", true)),
            Err(error) => prop_assert_eq!(error.to_string().lines().count(), 1),
        }
    }
}

// --- chat templates ---------------------------------------------------------------------------------------------------

#[test]
fn a_template_is_found_where_transformers_finds_it() {
    let folder = chat_folder();
    let open = || ChatTemplate::open(folder.path(), noon());
    let rendered =
        |template: ChatTemplate| template.render(&[say("user", "hi")], &Value::Null, true).expect("rendered");
    let chatml = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(rendered(open().expect("opened").expect("one")), chatml);
    fs::write(folder.path().join("chat_template.jinja"), "{{ eos_token }}{{ messages[0].content }}")
        .expect("written");
    assert_eq!(rendered(open().expect("opened").expect("one")), "<|im_end|>hi");
    fs::remove_file(folder.path().join("chat_template.jinja")).expect("removed");
    let several = json!({"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]});
    fs::write(folder.path().join("tokenizer_config.json"), several.to_string()).expect("written");
    assert_eq!(rendered(open().expect("opened").expect("one")), "D");
    fs::write(folder.path().join("tokenizer_config.json"), "{}").expect("written");
    assert!(open().expect("opened").is_none());
    fs::write(folder.path().join("chat_template.jinja"), "{% for %}").expect("written");
    assert!(message(open()).contains("chat_template.jinja: data: the chat template has a mistake"));
}

#[test]
fn templates_have_pythons_methods_and_transformers_functions() {
    for (source, wanted) in [
        (
            "{{ '  x '.strip() }}|{{ 'a</think>b'.split('</think>')[-1] }}|{{ 'xay'.startswith('xa') }}",
            "x|b|True",
        ),
        (
            "{{ ' a\n'.rstrip('\n') }}|{{ 'A'.lower() }}|{{ 'b'.upper() }}|{{ 'b-c'.replace('-', '+') }}",
            " a|a|B|b+c",
        ),
        ("{% for m in messages[::-1] %}{{ m.role[0] }}{% endfor %}", "au"),
        (
            "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}",
            "b",
        ),
        (
            "{% set ns = namespace(x=1) %}{% for m in messages %}{% set ns.x = ns.x + 1 %}{% endfor %}{{ ns.x }}",
            "3",
        ),
        ("{{ {'b': [1, true, none], 'a': 'é<'} | tojson }}", "{\"b\": [1, true, null], \"a\": \"é<\"}"),
        ("{{ {'b': [1], 'a': []} | tojson(indent=2) }}", "{\n  \"b\": [\n    1\n  ],\n  \"a\": []\n}"),
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2026"),
        (
            "{{ strftime_now('%A %-d %B, %H:%M:%S %I%p %j %x') }}",
            "Sunday 26 July, 12:00:00 12PM 207 07/26/26",
        ),
        ("{{ bos_token }}{{ nothing }}{{ eos_token }}", "<s></s>"),
        ("a\n  {% if true %}\n  b\n  {% endif %}\nc", "a\n  b\nc"),
        ("{%- generation %}\n x{% endgeneration -%}\n y", " xy"),
        ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f('q') }}", "[q]"),
        ("{{ messages | map(attribute='role') | join(',') }}", "user,assistant"),
        ("{% if messages[0].content is string and messages is iterable %}ok{% endif %}", "ok"),
        ("{% if tools is defined and tools %}T{% else %}F{% endif %}", "F"),
    ] {
        let messages = [say("user", "a"), say("assistant", "b")];
        assert_eq!(
            template(source).render(&messages, &Value::Null, false).expect(source),
            wanted,
            "{source}"
        );
    }
}

#[test]
fn a_date_in_a_format_that_is_none_stays_as_it_is_written_and_takes_no_room() {
    for format in
        ["%", "%5", "%-", "%!", "%é", "%.", "%:", "%999999999Y", "%99999999999999999999d", "%256m", "é\n"]
    {
        let source = format!("{{{{ strftime_now({format:?}) }}}}");
        assert_eq!(template(&source).render(&[], &Value::Null, false).expect(format), format);
    }
}

#[test]
fn what_a_template_objects_to_and_endless_ones_are_errors_of_one_line() {
    let fails = |source: &str| message(template(source).render(&[say("user", "x")], &Value::Null, false));
    let refused = fails("{{ raise_exception('roles must\nalternate') }}");
    assert!(refused.contains("the chat template refuses: roles must alternate"), "{refused}");
    let endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
    assert!(fails(endless).contains("fuel"), "{}", fails(endless));
    assert!(fails("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}").contains("refuses"));
    assert!(fails("{{ nothing.x }}").contains("undefined"));
    assert!(message(ChatTemplate::new("{{", &[], noon())).contains("(line 1)"));
}

/// What the assistant says in a conversation, by its spans.
fn spoken(source: &str, messages: &[Value]) -> polystage::Result<Vec<String>> {
    let rendered = template(source).render_with_spans(messages, &Value::Null)?;
    Ok(rendered.spans.into_iter().map(|span| rendered.text[span].to_string()).collect())
}

#[test]
fn the_assistants_part_of_a_conversation_is_each_answer_with_the_mark_that_ends_it() {
    let messages = [
        say("system", "S"),
        say("user", "A1"),
        say("assistant", "A1"),
        say("user", "Q"),
        say("assistant", " A2\n"),
    ];
    assert_eq!(spoken(CHATML, &messages).expect("rendered"), ["A1<|im_end|>\n", " A2\n<|im_end|>\n"]);
    // Llama 2's and Mistral's: no prompt for an answer, and a complaint about conversations that begin otherwise.
    let mistral = "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content.strip() + eos_token }}{% endif %}{% endfor %}";
    assert_eq!(spoken(mistral, &messages[1..]).expect("rendered"), [" A1</s>", " A2</s>"]);
    assert_eq!(spoken(CHATML, &[say("assistant", "x")]).expect("rendered"), ["x<|im_end|>\n"]);
}

/// The parts of Qwen3's template that matter here: thoughts are shown of the last answer only, and if it has none an
/// empty one is.
const QWEN3: &str = r#"{%- set ns = namespace(last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and ns.last_query_index == messages|length - 1 and index < ns.last_query_index %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- else %}
        {%- set content = message.content %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and loop.last %}
            {{- '<|im_start|>assistant\n<think>\n' + thought + '\n</think>\n\n' + content }}
        {%- else %}
            {{- '<|im_start|>assistant\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"#;

#[test]
fn answers_that_a_template_shortens_later_are_found_as_they_are_shown() {
    let messages = [
        say("user", "Q1"),
        say("assistant", "<think>\nT1\n</think>\n\nA1"),
        say("user", "A1"),
        say("assistant", "A1"),
    ];
    let spoken = spoken(QWEN3, &messages).expect("rendered");
    assert_eq!(spoken, ["A1<|im_end|>\n", "<think>\n\n</think>\n\nA1<|im_end|>\n"]);
}

#[test]
fn conversations_without_an_answer_or_with_one_that_is_not_shown_are_refused() {
    assert!(message(spoken(CHATML, &[say("user", "x")])).contains("no answer of the role"));
    assert!(message(spoken(CHATML, &[])).contains("no answer"));
    let hides = "{% for m in messages %}{{ m.role if m.role == 'user' }}{% endfor %}";
    let refused = message(spoken(hides, &[say("user", "x"), say("assistant", "secret")]));
    assert!(refused.contains("does not show message 1 as it is: \"secret\""), "{refused}");
}
