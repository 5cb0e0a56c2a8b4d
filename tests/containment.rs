//! Tokenizers and chat templates that do harm: what comes of them is one line, and the program goes on.

use std::path::Path;
use std::time::Instant;

use jiff::civil::{DateTime, date};
use polystage::Result;
use polystage::text::chat::ChatTemplate;
use polystage::text::{Isolation, Tokenizer, open};
use serde_json::{Value, json};

use crate::text::{byte_level, chat_folder, folder, sentence_piece};

fn isolated() -> Isolation {
    Isolation::Process(env!("CARGO_BIN_EXE_polystage").into())
}

fn morning() -> DateTime {
    date(2026, 7, 26).at(7, 30, 0, 0)
}

fn contained(path: &Path) -> Result<(Tokenizer, Option<ChatTemplate>)> {
    open(path, morning(), &isolated())
}

fn one_line<T: std::fmt::Debug>(result: Result<T>) -> String {
    let error = result.expect_err("an error");
    assert!(error.is_input(), "{error:?}");
    let text = error.to_string();
    assert!(text.lines().count() == 1 && text.chars().count() < 700, "{text}");
    text
}

#[test]
fn a_contained_tokenizer_and_template_say_what_they_say_in_this_process() {
    for place in [chat_folder(), folder(&sentence_piece(), &json!({"bos_token": "<s>"}))] {
        let (there, template_there) = contained(place.path()).expect("opened");
        let (here, template_here) = open(place.path(), morning(), &Isolation::None).expect("opened");
        assert_eq!(
            (there.vocabulary(), there.bos(), there.eos()),
            (here.vocabulary(), here.bos(), here.eos())
        );
        assert_eq!(there.start(), here.start());
        let text = "hello, wé\n\"quoted\" \u{1f680}";
        let tokens = there.encode(text, true).expect("encoded");
        assert_eq!(tokens, here.encode(text, true).expect("encoded"));
        assert_eq!(there.decode(&tokens).expect("decoded"), here.decode(&tokens).expect("decoded"));
        assert_eq!(template_there.is_some(), template_here.is_some());
        let (Some(there), Some(here)) = (template_there, template_here) else { continue };
        let messages =
            [json!({"role": "user", "content": "Q"}), json!({"role": "assistant", "content": "A"})];
        for prompt in [false, true] {
            let render = |t: &ChatTemplate| t.render(&messages, &Value::Null, prompt).expect("rendered");
            assert_eq!(render(&there), render(&here));
        }
        let spans = |t: &ChatTemplate| t.render_with_spans(&messages, &Value::Null).expect("rendered");
        assert_eq!(spans(&there), spans(&here));
        let refused = |t: &ChatTemplate| one_line(t.render_with_spans(&messages[..1], &Value::Null));
        assert_eq!(refused(&there), refused(&here));
    }
    let empty = tempfile::tempdir().expect("a folder");
    let here = open(empty.path(), morning(), &Isolation::None);
    assert_eq!(one_line(contained(empty.path())), one_line(here));
}

#[test]
fn a_contained_template_sees_the_moment_at_which_it_was_opened() {
    let source = "{{ strftime_now('%Y-%m-%dT%H:%M:%S') }}";
    let place = folder(&byte_level(), &json!({ "chat_template": source }));
    let template = contained(place.path()).expect("opened").1.expect("a template");
    assert_eq!(template.render(&[], &Value::Null, false).expect("rendered"), "2026-07-26T07:30:00");
}

#[test]
fn templates_without_end_bottom_or_measure_do_no_harm_and_the_next_text_is_rendered() {
    let nest = "{% set n = namespace(x=[]) %}{% for i in range(400) %}{% for j in range(400) %}{% set n.x = [n.x] %}{% endfor %}{% endfor %}";
    let cycle = "{% set n = namespace() %}{% set n.a = n %}";
    let pair = "{% set n = namespace() %}{% set m = namespace(n=n) %}{% set n.m = [m] %}";
    let double = |step: &str, from: &str| {
        format!(
            "{{% set n = namespace(s={from}) %}}{{% for i in range(60) %}}{{% set n.s = {step} %}}{{% endfor %}}{{{{ n.s }}}}"
        )
    };
    let hostile = [
        format!("{cycle}{{{{ n }}}}"),
        format!("{cycle}{{{{ n|string }}}}"),
        format!("{cycle}{{{{ 'x' ~ n }}}}"),
        format!("{cycle}{{{{ n|tojson }}}}"),
        format!("{cycle}{{{{ [n, n]|join(',') }}}}"),
        format!("{pair}{{{{ m }}}}"),
        format!("{pair}{{{{ m == n }}}}{{{{ [m, n]|sort }}}}{{{{ m|pprint }}}}"),
        format!("{nest}{{{{ n.x }}}}"),
        format!("{nest}{{{{ n.x|string }}}}"),
        double("n.s.replace('a', 'aa')", "'a'"),
        double("n.s|replace('a', 'aa')", "'a'"),
        double("n.s ~ n.s", "'a'"),
        double("n.s + n.s", "[1]"),
        double("[n.s, n.s]", "1"),
        double("n.s * 8", "'a'"),
        "{{ 'a'|center(100000000000) }}".into(),
        "{{ 'x' * 100000000000 }}".into(),
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}".into(),
        "{% macro f(x) %}{{ f([x]) }}{% endmacro %}{{ f(1) }}".into(),
        format!("{{% if messages %}}{}{{% endif %}}", "0123456789abcdef".repeat(64).repeat(1 << 9))
            + &"{{ messages }}".repeat(30_000),
    ];
    for source in hostile {
        let shown = &source[..source.len().min(200)];
        let started = Instant::now();
        let place = folder(&byte_level(), &json!({"chat_template": source}));
        let opened = contained(place.path());
        let messages = [json!({"role": "user", "content": "x".repeat(4000)})];
        match opened.map(|(_, template)| template.expect("a template")) {
            Err(error) => drop(one_line::<()>(Err(error))),
            // Deep or long is not wrong by itself; without bound it is.
            Ok(template) => match template.render(&messages, &Value::Null, false) {
                Ok(text) => assert!(text.len() <= 64 << 20, "{shown}"),
                Err(error) => {
                    let said = one_line::<()>(Err(error));
                    assert!(said.contains("chat template"), "{shown}: {said}");
                }
            },
        }
        assert!(started.elapsed().as_secs() < 30, "{shown}");
    }
    let source =
        "{% if messages|length > 1 %}{% set n = namespace() %}{% set n.a = n %}{{ n|string }}{% endif %}fine";
    let place = folder(&byte_level(), &json!({"chat_template": source}));
    let bomb = contained(place.path()).expect("opened").1.expect("a template");
    let message = json!({"role": "user", "content": "x"});
    let render = |count: usize| bomb.render(&vec![message.clone(); count], &Value::Null, false);
    one_line(render(2));
    assert_eq!(render(1).expect("rendered"), "fine", "another helper takes over");
}

#[test]
fn templates_too_deep_to_be_compiled_are_refused() {
    let chain = |link: &str, count: usize| link.repeat(count);
    for source in [
        format!("{{{{ 1{} }}}}", chain(" + 1", 100_000)),
        format!("{{{{ {}1{} }}}}", chain("[", 100_000), chain("]", 100_000)),
        format!("{{{{ 1{} }}}}", chain("|string", 100_000)),
        format!("{{{{ x{} }}}}", chain(".x", 100_000)),
        format!("{{{{ {}x }}}}", chain("not ", 100_000)),
        format!("{}{}", chain("{% if x %}", 20_000), chain("{% endif %}", 20_000)),
        format!("{{% if x %}}{}{{% endif %}}", chain("{% elif x %}", 60_000)),
    ] {
        let started = Instant::now();
        let place = folder(&byte_level(), &json!({"chat_template": source}));
        match contained(place.path()) {
            Err(error) => drop(one_line::<()>(Err(error))),
            // Long is not wrong: what can be compiled must also run.
            Ok((_, template)) => drop(template.expect("a template").render(&[], &Value::Null, false)),
        }
        assert!(started.elapsed().as_secs() < 30);
    }
}

#[test]
fn tokenizers_that_panic_or_explode_are_refused_and_say_no_more_than_one_line() {
    let with = |key: &str, value: Value| {
        let mut tokenizer = byte_level();
        tokenizer[key] = value;
        tokenizer
    };
    let replace = json!({"type": "Replace", "pattern": {"Regex": "."}, "content": "0123456789abcdef"});
    let hostile = [
        with("pre_tokenizer", json!({"type": "FixedLength", "length": 0})),
        with("normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8AAAAAAAA="})),
        with("normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="})),
        with("normalizer", json!({"type": "Replace", "pattern": {"String": ""}, "content": "x"})),
        with("normalizer", json!({"type": "Sequence", "normalizers": vec![replace.clone(); 7]})),
        with("decoder", json!({"type": "Sequence", "decoders": vec![replace; 7]})),
        with("decoder", json!({"type": "Replace", "pattern": {"String": ""}, "content": "x"})),
        with(
            "post_processor",
            json!({"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "[GONE]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [], "special_tokens": {}}),
        ),
        with("normalizer", json!({"type": "Replace", "pattern": {"Regex": "(a*)*b"}, "content": "x"})),
        with(
            "pre_tokenizer",
            json!({"type": "Split", "pattern": {"Regex": "((a|b)*)*c"}, "behavior": "Isolated", "invert": false}),
        ),
    ];
    for tokenizer in hostile {
        let place = folder(&tokenizer, &json!({}));
        let text = "hello ab".repeat(2000);
        // Some of these do work; none may end the process or say more than a line.
        let tried = contained(place.path()).and_then(|(tokenizer, _)| {
            let tokens = tokenizer.encode(&text, true)?;
            tokenizer.decode(&tokens)
        });
        if let Err(error) = tried {
            one_line::<()>(Err(error));
        }
    }
}

#[test]
fn the_program_says_one_line_of_a_model_whose_tokenizer_or_template_does_harm() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models/llama");
    let mut bad = byte_level();
    bad["pre_tokenizer"] = json!({"type": "FixedLength", "length": 0});
    let cycle = "{% set n = namespace() %}{% set n.a = n %}{{ n|string }}";
    let cases = [
        (folder(&bad, &json!({})), vec!["generate", ".", "--prompt", "hello", "--devices", "0"]),
        (folder(&byte_level(), &json!({"chat_template": cycle})), vec!["chat", ".", "--devices", "0"]),
    ];
    for (place, arguments) in cases {
        for name in ["config.json", "model.safetensors"] {
            std::fs::copy(golden.join(name), place.path().join(name)).expect("copied");
        }
        let (output, error) = crate::speaking::fail(&place, &arguments, "hello\n");
        assert!(error.starts_with("error: ") && error.trim().lines().count() == 1, "{output}{error}");
        assert!(!error.contains("panicked"), "{error}");
    }
}

#[test]
fn a_long_text_is_cut_where_its_tokens_stay_the_same_even_without_lines_and_spaces() {
    let (tokenizer, whole) = (contained(chat_folder().path()).expect("opened").0, chat_folder());
    let here = Tokenizer::open(whole.path()).expect("opened");
    let words = "hello well whale héé ".repeat(40_000);
    for text in [words.clone(), words.replace(' ', ""), words.replace(' ', "\n")] {
        let tokens = tokenizer.encode(&text, false).expect("encoded");
        // A short text is tokenised as one; what repeats does not depend on where it stands.
        assert_eq!(tokenizer.decode(&tokens).expect("decoded"), text);
        let part = text.len() / 40_000 * 1000;
        let expected = here.encode(&text[..part], false).expect("encoded");
        assert_eq!(tokens[..expected.len() - 2], expected[..expected.len() - 2]);
    }
}
