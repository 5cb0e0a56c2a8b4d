//! Messages as the text that a model was trained on: its chat template, a Jinja program that comes with the tokenizer.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use jiff::civil::DateTime;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::helper::Client;
use super::template::{Engine, on_large_stack};
use super::token_text;
use crate::error::{Error, Result, one_line};
use crate::folder::files::{broken, read_json, read_whole};

/// Messages of a conversation whose answers are to be found.
const MESSAGES: usize = 1024;
/// The tokens that a template may name.
const TOKENS: [&str; 4] = ["bos_token", "eos_token", "unk_token", "pad_token"];

/// A model's chat template.
#[derive(Clone, Debug)]
pub struct ChatTemplate(Place);

#[derive(Clone, Debug)]
enum Place {
    Here(Box<Engine>),
    There(Arc<Client>),
}

/// A conversation as text, and which parts of it the assistant says: the answers and the marks that end them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rendered {
    /// The whole text.
    pub text: String,
    /// Byte ranges of it, ascending and apart.
    pub spans: Vec<Range<usize>>,
}

impl ChatTemplate {
    /// Reads the template of a model folder: `chat_template.jinja`, or what `tokenizer_config.json` says. None if the
    /// model has none. `now` is the moment that templates see; one moment for a whole run keeps its texts the same.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a damaged file or a template with a mistake in it.
    pub fn open(folder: &Path, now: DateTime) -> Result<Option<ChatTemplate>> {
        let path = folder.join("tokenizer_config.json");
        let settings = if path.exists() { read_json(&path)? } else { Value::Null };
        let file = folder.join("chat_template.jinja");
        let (path, source) = if file.exists() {
            let text = String::from_utf8(read_whole(&file)?);
            (file.clone(), text.map_err(|_| broken(&file, "is not valid UTF-8"))?)
        } else {
            // One template, or several with names.
            let listed = settings["chat_template"].as_array();
            let default = listed.and_then(|list| list.iter().find(|t| t["name"] == "default"));
            let source = default.map_or(&settings["chat_template"], |t| &t["template"]);
            let Some(source) = source.as_str() else { return Ok(None) };
            (path, source.to_string())
        };
        let tokens = TOKENS.map(|name| (name, token_text(&settings[name])));
        let tokens: Vec<_> = tokens.iter().filter_map(|&(name, text)| Some((name, text?))).collect();
        ChatTemplate::new(&source, &tokens, now).map(Some).map_err(|e| broken(path, e))
    }

    /// Compiles a template, to be run in this process. `tokens` are the texts of `bos_token`, `eos_token`, `unk_token`
    /// and `pad_token`.
    ///
    /// # Errors
    /// [`Error::Data`] with the line of a mistake.
    pub fn new(source: &str, tokens: &[(&'static str, &str)], now: DateTime) -> Result<ChatTemplate> {
        Ok(ChatTemplate(Place::Here(Box::new(Engine::new(source, tokens, now)?))))
    }

    /// The template that a helper has open.
    pub(super) fn of(client: Arc<Client>) -> ChatTemplate {
        ChatTemplate(Place::There(client))
    }

    /// The text of a conversation: objects with a `role` and what the template wants beside it, usually `content`.
    /// `tools` is what may be called, or null. With `generation_prompt` the text ends where an answer begins.
    ///
    /// # Errors
    /// [`Error::Data`] with what the template objects to.
    pub fn render(&self, messages: &[Value], tools: &Value, generation_prompt: bool) -> Result<String> {
        match &self.0 {
            Place::Here(engine) => on_large_stack(|| engine.render(messages, tools, generation_prompt)),
            Place::There(client) => client.render(messages, tools, generation_prompt),
        }
    }

    /// The text of a whole conversation, and where in it the assistant speaks.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`]; [`Error::Data`] if there is no answer in it, or one cannot be found in the text.
    pub fn render_with_spans(&self, messages: &[Value], tools: &Value) -> Result<Rendered> {
        match &self.0 {
            Place::Here(engine) => on_large_stack(|| engine.render_with_spans(messages, tools)),
            Place::There(client) => client.render_with_spans(messages, tools),
        }
    }
}

impl Engine {
    fn render_with_spans(&self, messages: &[Value], tools: &Value) -> Result<Rendered> {
        // For each answer the conversation is rendered up to it.
        if messages.len() > MESSAGES {
            let message =
                format!("a conversation has {} messages; at most {MESSAGES} are read", messages.len());
            return Err(Error::data(message));
        }
        let text = self.render(messages, tools, false)?;
        let mut spans: Vec<Range<usize>> = Vec::new();
        for (i, message) in messages.iter().enumerate().filter(|(_, message)| message["role"] == "assistant")
        {
            let from = spans.last().map_or(0, |span| span.end);
            let start = self.start(&text, messages, i, tools, from);
            let end = start.and_then(|start| self.end(&text, messages, i, tools, start));
            match (start, end) {
                (Some(start), Some(end)) if from <= start && start < end => spans.push(start..end),
                _ => {
                    let content = one_line(&message["content"].to_string(), 60);
                    let message = format!("the chat template does not show message {i} as it is: {content}");
                    return Err(Error::data(message));
                }
            }
        }
        if spans.is_empty() {
            return Err(Error::data("messages have no answer of the role \"assistant\""));
        }
        Ok(Rendered { text, spans })
    }

    /// Where the answer `i` begins: where the text of the messages before it ends if an answer is asked for. Some
    /// templates then open a thought that a finished answer does not have, so as much counts as the two have in common.
    fn start(&self, text: &str, messages: &[Value], i: usize, tools: &Value, from: usize) -> Option<usize> {
        let plain = self.render(&messages[..i], tools, false).ok().filter(|plain| text.starts_with(plain));
        let asked = self.render(&messages[..i], tools, true).ok();
        match (plain, asked) {
            (Some(plain), Some(asked)) => Some(plain.len().max(common(text, &asked))),
            (Some(plain), None) => Some(plain.len()),
            (None, Some(asked)) if text.starts_with(&asked) => Some(asked.len()),
            // Templates may refuse the beginning of a conversation, such as one without a question.
            _ => said(&messages[i]).find_map(|content| Some(from + text.get(from..)?.find(content)?)),
        }
    }

    /// Where the answer `i`, with the mark that ends it, ends: where the text of the messages up to it does. Some
    /// templates shorten earlier answers; then it is where the content ends, and what follows it in that text.
    fn end(&self, text: &str, messages: &[Value], i: usize, tools: &Value, start: usize) -> Option<usize> {
        let upto = self.render(&messages[..=i], tools, false).ok();
        if let Some(upto) = upto.as_ref().filter(|upto| text.starts_with(upto.as_str())) {
            return Some(upto.len());
        }
        said(&messages[i]).find_map(|content| {
            let end = start + text.get(start..)?.find(content)? + content.len();
            let mark = upto.as_ref().and_then(|upto| Some(&upto[upto.rfind(content)? + content.len()..]));
            Some(end + mark.map_or(0, |mark| common(&text[end..], mark)))
        })
    }
}

/// What an answer says, as templates may show it: as it is but for white space around it, or without the thought before
/// it.
fn said(message: &Value) -> impl Iterator<Item = &str> {
    let content = message["content"].as_str().unwrap_or_default();
    let spoken = content.rsplit("</think>").next().unwrap_or_default();
    [content.trim(), spoken.trim()].into_iter().filter(|text| !text.is_empty())
}

/// Bytes of the whole characters that two texts begin with in common.
fn common(a: &str, b: &str) -> usize {
    a.chars().zip(b.chars()).take_while(|(a, b)| a == b).map(|(c, _)| c.len_utf8()).sum()
}
