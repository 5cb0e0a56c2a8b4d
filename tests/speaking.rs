//! `generate` and `chat` as a user runs them, on a Llama of the golden models with a tokenizer of 262 tokens.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Output, Stdio};

use jiff::civil::DateTime;
use polystage::text::chat::ChatTemplate;
use serde_json::{Value, json};

use crate::text::{byte_level, chat_folder, folder};

/// Puts the golden Llama (context 160, vocabulary 1003) beside a tokenizer.
fn llama(place: tempfile::TempDir) -> tempfile::TempDir {
    let golden = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models/llama");
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(golden.join(name), place.path().join(name)).unwrap();
    }
    place
}

/// A model that can chat.
pub fn chatty() -> tempfile::TempDir {
    llama(chat_folder())
}

fn run(place: &tempfile::TempDir, arguments: &[&str], input: &str) -> Output {
    let mut command = crate::common::program();
    command.args(arguments).current_dir(place.path());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // A program that has gone reads nothing; its status says why.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

fn succeed(place: &tempfile::TempDir, arguments: &[&str], input: &str) -> (String, String) {
    let output = run(place, arguments, input);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{arguments:?}: {error}");
    (String::from_utf8(output.stdout).unwrap(), error)
}

/// What a run says that fails, on both outputs.
pub fn fail(place: &tempfile::TempDir, arguments: &[&str], input: &str) -> (String, String) {
    let output = run(place, arguments, input);
    assert!(matches!(output.status.code(), Some(1 | 2)), "{arguments:?}: {:?}", output.status);
    (String::from_utf8_lossy(&output.stdout).into(), String::from_utf8_lossy(&output.stderr).into())
}

/// Greedy, at most 12 tokens.
fn generate(place: &tempfile::TempDir, prompts: &[&str], more: &[&str]) -> Value {
    let mut arguments = vec!["generate", ".", "--max-tokens", "12", "--temperature", "0", "--json"];
    prompts.iter().for_each(|prompt| arguments.extend(["--prompt", prompt]));
    arguments.extend(more);
    serde_json::from_str(&succeed(place, &arguments, "").0).unwrap()
}

#[test]
fn two_prompts_over_two_devices_continue_as_each_alone_on_one() {
    let place = chatty();
    let prompts = ["hello, wé", "a much longer text than the first one"];
    let both = generate(&place, &prompts, &["--devices", "0,0"]);
    for (at, prompt) in prompts.iter().enumerate() {
        let alone = generate(&place, &[prompt], &["--devices", "0"]);
        assert_eq!(both["texts"][at], alone["texts"][0]);
        assert_eq!(alone["texts"][0]["tokens"].as_array().unwrap().len(), 12);
        assert_eq!(alone["texts"][0]["finish"], "length");
    }
    assert_eq!(both["texts"][0]["prompt_tokens"], 6, "`he`, `ll`, `o`, `,`, ` w`, `é`");
    assert!(both["weight_seconds"].as_f64().unwrap() > 0.0);
    // The same for people: streamed for one, under headings for several.
    let said = |at: usize| both["texts"][at]["text"].as_str().unwrap();
    let greedy = ["generate", ".", "--max-tokens", "12", "--temperature", "0", "--devices", "0"];
    let (one, pace) = succeed(&place, &[&greedy[..], &["--prompt", prompts[0]]].concat(), "");
    assert_eq!(one, format!("{}{}\n", prompts[0], said(0)));
    assert!(pace.contains("tokens/s") && pace.contains("weights in"), "{pace}");
    std::fs::write(place.path().join("second.txt"), format!("{}\n", prompts[1])).unwrap();
    let file = ["--prompt", prompts[0], "--prompt-file", "second.txt"];
    let (two, _) = succeed(&place, &[&greedy[..], &file].concat(), "");
    let under = |at: usize| format!("=== text {} of 2 ===\n{}{}\n", at + 1, prompts[at], said(at));
    assert_eq!(two, under(0) + &under(1));
}

#[test]
fn logits_and_losses_that_are_no_numbers_are_a_failure_and_not_bad_input() {
    let place = chatty();
    let file = place.path().join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    // Not a number in every type.
    bytes[header..].fill(0xff);
    std::fs::write(&file, bytes).unwrap();
    std::fs::write(place.path().join("text.txt"), "a text that is long enough for a window").unwrap();
    for (arguments, says) in [
        (&["generate", ".", "--devices", "0", "--prompt", "hello"][..], "its logits are not finite"),
        (&["eval", ".", "--devices", "0", "--data", "text.txt"], "the loss is NaN"),
    ] {
        let output = run(&place, arguments, "");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(1) && said.contains(says), "{:?}: {said}", output.status);
    }
}

#[test]
fn a_text_ends_at_any_of_the_end_tokens_that_the_model_names() {
    let place = chatty();
    let whole = generate(&place, &["hello"], &["--devices", "0"]);
    let tokens = whole["texts"][0]["tokens"].as_array().unwrap().clone();
    let end = tokens[5].as_u64().unwrap();
    let first = tokens.iter().position(|token| token.as_u64() == Some(end)).unwrap();
    std::fs::write(
        place.path().join("generation_config.json"),
        json!({"eos_token_id": [261, end]}).to_string(),
    )
    .unwrap();
    let ended = generate(&place, &["hello"], &["--devices", "0"]);
    assert_eq!(ended["texts"][0]["tokens"].as_array().unwrap()[..], tokens[..=first]);
    assert_eq!(ended["texts"][0]["finish"], "end");
}

#[test]
fn a_conversation_through_a_pipe_says_what_processing_it_again_says() {
    let place = chatty();
    let template = ChatTemplate::open(place.path(), DateTime::default()).unwrap().unwrap();
    let mut messages = vec![json!({"role": "system", "content": "be brief"})];
    let mut expected = String::new();
    for question in ["hello", "well"] {
        messages.push(json!({"role": "user", "content": question}));
        let prompt = template.render(&messages, &Value::Null, true).unwrap();
        let answer = generate(&place, &[&prompt], &["--devices", "0"]);
        let answer = answer["texts"][0]["text"].as_str().unwrap();
        expected += &format!("> {question}\n{answer}\n");
        messages.push(json!({"role": "assistant", "content": answer}));
    }
    let chat = ["chat", ".", "--system", "be brief", "--max-tokens", "12", "--temperature", "0"];
    for devices in ["0", "0,0"] {
        let chat = [&chat[..], &["--devices", devices]].concat();
        assert_eq!(succeed(&place, &chat, "hello\nwell\n").0, expected);
        let again = succeed(&place, &chat, "hello\n\n/reset\nhello\nwell\n/exit\nignored\n").0;
        let first: String = expected.split_inclusive('\n').take(2).collect();
        assert!(again.ends_with(&expected) && again.starts_with(&first), "{again:?}");
    }
}

#[test]
fn a_conversation_that_outgrows_the_context_loses_its_oldest_turns() {
    let place = chatty();
    let chat = ["chat", ".", "--context", "96", "--max-tokens", "12", "--temperature", "0", "--devices", "0"];
    let long = "x".repeat(100);
    let (said, notes) = succeed(&place, &chat, &format!("one\ntwo\nthree\n{long}\nfour\n"));
    assert!(notes.contains("messages are left out from here"), "{notes}");
    assert!(notes.contains("this message makes") && notes.contains("room for 84"), "{notes}");
    // What is left is a conversation of its own.
    assert!(!said.is_empty());
}

#[test]
fn what_cannot_be_continued_is_one_line_and_status_2() {
    let mut large = byte_level();
    large["model"]["vocab"]["hello"] = json!(2000);
    let (place, large, silent) =
        (chatty(), llama(folder(&large, &json!({}))), llama(folder(&byte_level(), &json!({}))));
    let long = "x".repeat(161);
    std::fs::write(place.path().join("long.txt"), &long).unwrap();
    for (place, arguments, words) in [
        (
            &place,
            &["generate", ".", "--prompt-file", "long.txt"][..],
            "161 tokens, but the model sees at most 160",
        ),
        (&place, &["generate", ".", "--prompt-file", "none.txt"], "none.txt"),
        (&place, &["generate", "."], "--prompt"),
        (&place, &["generate", ".", "--prompt", ""], "is empty"),
        (&place, &["generate", ".", "--prompt", "x", "--top-p", "2"], "--top-p"),
        (&place, &["generate", ".", "--prompt", "x", "--memory", "64KiB"], "--memory"),
        (
            &place,
            &["generate", ".", "--prompt", "x", "--devices", "0,0,0,0,0,0,0"],
            "7 stages cannot share the 6 parts of a model",
        ),
        (
            &large,
            &["generate", ".", "--prompt", "x"],
            "tokens up to 2000 and the model's embedding only 1003 rows",
        ),
        (&silent, &["chat", "."], "has no chat template"),
        (&place, &["chat", ".", "--context", "1"], "--context"),
    ] {
        let output = run(place, arguments, "");
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {error}");
        assert_eq!(error.trim().lines().count(), 1, "{arguments:?}: {error}");
        assert!(error.contains(words), "{arguments:?} says {error:?}, not {words:?}");
    }
}

#[test]
fn an_answer_of_no_tokens_is_refused_by_its_own_flag() {
    let place = chatty();
    for (flags, expected) in
        [(["--max-tokens", "0"], "--max-tokens: 0"), (["--context", "1"], "--context: 1")]
    {
        let output = run(&place, &[&["chat", "."], &flags[..]].concat(), "hello\n");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && said.contains(expected), "{said}");
    }
}

#[test]
fn a_message_without_end_is_refused_before_it_takes_the_memory() {
    let (_, error) = fail(&chatty(), &["chat", ".", "--devices", "0"], &"a".repeat(17 << 20));
    assert!(error.contains("standard input: has a line of more than 16777216 bytes"), "{error}");
}

#[test]
fn a_chat_says_what_can_be_said_to_it_and_keeps_strange_commands_from_the_model() {
    let place = chatty();
    let chat = ["chat", ".", "--max-tokens", "4", "--temperature", "0", "--devices", "0"];
    let (said, notes) = succeed(&place, &chat, "/help\n/rest\n/quit\nhello\n");
    assert_eq!(said, "", "nothing reached the model");
    assert!(["/reset", "/quit", "Ctrl-C"].into_iter().all(|words| notes.contains(words)), "{notes}");
    assert!(notes.contains("/rest is not known"), "{notes}");
}

#[test]
#[cfg(unix)]
fn ctrl_c_ends_an_answer_and_not_the_chat() {
    use std::io::{BufRead, BufReader, Read};
    let place = chatty();
    let mut command = crate::common::program();
    let chat =
        ["chat", ".", "--context", "160", "--max-tokens", "80", "--temperature", "0", "--devices", "0"];
    command.args(chat).current_dir(place.path());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let (mut input, mut output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
    let (mut asked, mut first) = (String::new(), [0]);
    input.write_all(b"hello\n").unwrap();
    output.read_line(&mut asked).unwrap();
    assert_eq!(asked, "> hello\n");
    output.read_exact(&mut first).unwrap();
    // SAFETY: a signal to a child that has not been waited for.
    assert_eq!(unsafe { libc::kill(child.id() as i32, libc::SIGINT) }, 0);
    let mut notes = BufReader::new(child.stderr.take().unwrap());
    let mut note = String::new();
    notes.read_line(&mut note).unwrap();
    assert_eq!(note, "the answer was stopped\n");
    input.write_all(b"and now?\n/quit\n").unwrap();
    let mut rest = String::new();
    output.read_to_string(&mut rest).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(rest.lines().count() >= 2, "another answer follows: {rest:?}");
}
