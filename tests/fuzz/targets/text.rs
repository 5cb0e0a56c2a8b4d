//! Tokenizers and chat templates, which are other people's programs.

use std::fs;
use std::path::Path;

use jiff::civil::DateTime;
use polystage::text::chat::ChatTemplate;
use polystage::text::{self, Isolation, Tokenizer};
use serde_json::{Value, json};

use super::{Target, outcome, parts, whole};

/// `tokenizer.json`, `tokenizer_config.json`, a text.
pub static TOKENIZER: Target = Target {
    name: "tokenizer",
    words: r#"
        "type" "BPE" "WordPiece" "WordLevel" "Unigram" "Sequence" "normalizers" "NFKC" "Prepend" "Replace"
        "Precompiled" "precompiled_charsmap" "Lowercase" "Strip" "BertNormalizer" "pretokenizers"
        "ByteLevel" "Metaspace" "Split" "Whitespace" "Digits" "UnicodeScripts" "FixedLength" "processors"
        "TemplateProcessing" "RobertaProcessing" "decoders" "ByteFallback" "Fuse" "CTC" "pattern" "Regex"
        "String" "content" "vocab" "merges" "added_tokens" "special" "lstrip" "normalized" "unk_token"
        "unk_id" "continuing_subword_prefix" "max_input_chars_per_word" "dropout" "length" "behavior"
        "Isolated" "truncation" "padding" "eos_token" "bos_token" null true { } [ ]"#,
    seeds: |_| {
        let settings = r#"{"eos_token":"</s>","bos_token":{"content":"<s>"}}"#;
        tokenizers()
            .iter()
            .map(|json| whole(&[&json.to_string(), settings, "he hello wörld\n<s>12 x"]))
            .collect()
    },
    run: |folder, input| {
        let [tokenizer, settings, text] = parts(input);
        fs::write(folder.join("tokenizer.json"), tokenizer).expect("written");
        fs::write(folder.join("tokenizer_config.json"), settings).expect("written");
        outcome(contained(folder).and_then(|(tokenizer, _)| {
            let tokens = tokenizer.encode(&String::from_utf8_lossy(text), true)?;
            let decoded = tokenizer.decode(&tokens)?;
            let mut stream = tokenizer.stream();
            for &token in tokens.iter().take(200) {
                stream.push(token)?;
            }
            stream.finish()?;
            tokenizer.decode(&[0, 1, 2, 1_000_000, u32::MAX])?;
            Ok(format!("{} {} {}", tokens.len(), tokenizer.start().len(), decoded.len()))
        }))
    },
};

/// As the program opens them: in a helper process.
fn contained(folder: &Path) -> polystage::Result<(Tokenizer, Option<ChatTemplate>)> {
    let isolation = Isolation::Process(env!("CARGO_BIN_EXE_polystage").into());
    text::open(folder, DateTime::default(), &isolation)
}

/// A small tokenizer of each kind, with different parts around it.
fn tokenizers() -> Vec<Value> {
    let added = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": true})
    };
    let build = |normalizer: Value, before: Value, model: Value, after: Value, decoder: Value| {
        json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [added(0, "<s>"), added(1, "</s>")],
            "normalizer": normalizer, "pre_tokenizer": before, "post_processor": after, "decoder": decoder, "model": model})
    };
    let vocabulary = |tokens: &[&str]| -> Value {
        let ids = tokens.iter().enumerate().map(|(id, token)| (token.to_string(), json!(id)));
        Value::Object(ids.collect())
    };
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let template = json!({"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}});
    vec![
        build(
            Value::Null,
            byte_level.clone(),
            json!({"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "merges": ["h e", "l l"],
                "vocab": vocabulary(&["<s>", "</s>", "h", "e", "l", "o", "he", "ll", "Ġ", "w", "r", "d"])}),
            byte_level.clone(),
            byte_level,
        ),
        build(
            json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}),
            Value::Null,
            json!({"type": "BPE", "dropout": null, "unk_token": "<s>", "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "merges": ["▁ h"],
                "vocab": vocabulary(&["<s>", "</s>", "▁", "h", "e", "▁h", "<0x0A>"])}),
            template,
            json!({"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}),
        ),
        build(
            json!({"type": "NFKC"}),
            json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}),
            json!({"type": "Unigram", "unk_id": 0, "byte_fallback": false,
                "vocab": [["<s>", 0.0], ["</s>", 0.0], ["▁he", -1.5], ["l", -2.0], ["o", -2.5]]}),
            json!({"type": "RobertaProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0], "trim_offsets": true,
                "add_prefix_space": true}),
            json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}),
        ),
        build(
            json!({"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null,
                "lowercase": true}),
            json!({"type": "Sequence", "pretokenizers": [{"type": "BertPreTokenizer"},
                {"type": "Split", "pattern": {"Regex": "[0-9]+"}, "behavior": "Isolated", "invert": false},
                {"type": "Digits", "individual_digits": true}]}),
            json!({"type": "WordPiece", "unk_token": "<s>", "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100, "vocab": vocabulary(&["<s>", "</s>", "he", "##ll", "##o", "x"])}),
            json!({"type": "Sequence", "processors": []}),
            json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
        ),
        build(
            json!({"type": "Lowercase"}),
            json!({"type": "Whitespace"}),
            json!({"type": "WordLevel", "unk_token": "<s>", "vocab": vocabulary(&["<s>", "</s>", "he", "hello"])}),
            Value::Null,
            Value::Null,
        ),
    ]
}

/// A template, and the messages and tools for it as JSON.
pub static CHAT_TEMPLATE: Target = Target {
    name: "chat-template",
    words: r#"
        {% %} {{ }} {# #} {%- -%} for endfor if endif elif else set endset in range( range(300) macro
        endmacro namespace( loop.index messages message |tojson |join |list |safe |length
        |map(attribute='role') .replace('a','aaaa') .split('x') ~ + * [::-1] raise_exception('x')
        strftime_now('%Y') strftime_now('%-255e%999999999Y%') break continue generation endgeneration recursive
        loop( block filter call autoescape do include import extends "role" "content" "assistant" not ( ) [ ] { } 1e999 'é'"#,
    seeds: |_| {
        let messages = r#"[[{"role":"system","content":"S"},{"role":"user","content":"Q"},{"role":"assistant","content":"A"}],null]"#;
        let tools = r#"[[{"role":"user","content":"2"},{"role":"assistant","content":"<think>t</think> 4 "}],[{"name":"f"}]]"#;
        let chatml = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
        let thoughts = "{%- set ns = namespace(last=messages|length - 1) %}\n{%- for m in messages[::-1] %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{%- for m in messages %}{%- if '</think>' in m.content %}{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{% generation %}{{ m.content.strip() }}{% endgeneration %}{% endif %}|{% endfor %}{{ tools | tojson(indent=2) if tools }}";
        let macros = "{% macro say(m) %}[{{ m.role|upper }}] {{ m.content }}{% endmacro %}{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}{{ say(m) }}{{ strftime_now('%d %b') }}\n{% endfor %}";
        [chatml, thoughts, macros]
            .iter()
            .flat_map(|source| [messages, tools].map(|said| whole(&[source, said])))
            .collect()
    },
    run: |folder, input| {
        let [source, messages] = parts(input);
        fs::write(folder.join("tokenizer.json"), tokenizers()[4].to_string()).expect("written");
        fs::write(folder.join("chat_template.jinja"), source).expect("written");
        let json: Value = serde_json::from_slice(messages).unwrap_or_default();
        let messages = json[0].as_array().cloned().unwrap_or_default();
        outcome(contained(folder).and_then(|(_, template)| {
            let template = template.expect("there is one");
            let asked = template.render(&messages, &json[1], true)?.len();
            let said = template.render_with_spans(&messages, &json[1])?;
            assert!(said.spans.iter().all(|span| said.text.get(span.clone()).is_some()));
            Ok(format!("{asked} {}", said.spans.len()))
        }))
    },
};
