//! Records: one JSON object a line.

use std::borrow::Cow;

use serde::Deserializer;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::{FIELDS, RecordFormat};
use crate::error::one_line;

/// Longest line that is read; one without an end would take all the memory.
const LONGEST: usize = 64 << 20;
/// Longest list of messages or tools, and the commas and brackets in it, those of its texts included.
const MESSAGES: usize = 32 << 20;
const PARTS: usize = 1 << 20;

/// What a line says.
#[derive(Debug, PartialEq)]
pub(super) enum Record {
    /// A text that counts everywhere.
    Text(String),
    /// A text of which parts count.
    Partial(Partial),
}

/// A text of which parts count.
#[derive(Debug, PartialEq)]
pub(super) enum Partial {
    /// The second half does.
    Completion { prompt: String, completion: String },
    /// The answers of a conversation do.
    Messages { messages: Vec<Value>, tools: Value },
    /// Alpaca's form: the output does.
    Instruction { system: Option<String>, instruction: String, input: Option<String>, output: String },
}

impl Partial {
    /// What is given and what counts, as text; of a conversation nothing. Alpaca's form is that of its paper's training
    /// code (Taori et al. 2023, github.com/tatsu-lab/stanford_alpaca).
    pub(super) fn halves(&self) -> (String, &str) {
        match self {
            Partial::Completion { prompt, completion } => (prompt.clone(), completion),
            Partial::Instruction { system, instruction, input, output } => {
                let task = "Below is an instruction that describes a task";
                let opening = match (system, input) {
                    (Some(system), _) => system.clone(),
                    (None, Some(_)) => format!(
                        "{task}, paired with an input that provides further context. Write a response that \
                         appropriately completes the request."
                    ),
                    (None, None) => {
                        format!("{task}. Write a response that appropriately completes the request.")
                    }
                };
                let input = input.as_ref().map_or(String::new(), |input| format!("### Input:\n{input}\n\n"));
                let prompt =
                    format!("{opening}\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n");
                (prompt, output)
            }
            Partial::Messages { .. } => (String::new(), ""),
        }
    }
}

impl Record {
    /// Reads a line, or says what is wrong with it.
    pub(super) fn parse(line: &[u8], format: &RecordFormat) -> Result<Record, String> {
        if line.len() > LONGEST {
            return Err(format!("is longer than {} MiB", LONGEST >> 20));
        }
        let no_json =
            |e: serde_json::Error| format!("is not JSON ({})", e.to_string().replacen("line 1 ", "", 1));
        let kind = match line.trim_ascii().first() {
            Some(b'{') | None => None,
            Some(b'[') => Some("an array"),
            Some(b'"') => Some("a string"),
            Some(b'-' | b'0'..=b'9') => Some("a number"),
            Some(_) => Some("a literal"),
        };
        if let Some(kind) = kind {
            serde_json::from_slice::<IgnoredAny>(line).map_err(no_json)?;
            return Err(format!("is {kind}, not an object"));
        }
        let mut reader = serde_json::Deserializer::from_slice(line);
        let fields = Fields::read(format, &mut reader).map_err(no_json)?;
        reader.end().map_err(no_json)?;
        fields.record()
    }
}

/// The parts of a line that matter, where they lie in it; of what occurs twice the last. The rest, whatever it is, takes
/// no memory.
struct Fields<'a> {
    format: &'a RecordFormat,
    /// In the order of [`FIELDS`].
    raw: [Option<&'a RawValue>; FIELDS.len()],
}

impl<'a> Fields<'a> {
    fn read<D: Deserializer<'a>>(format: &'a RecordFormat, reader: D) -> Result<Fields<'a>, D::Error> {
        reader.deserialize_map(Fields { format, raw: [None; FIELDS.len()] })
    }

    fn raw(&self, field: &str) -> Option<&'a RawValue> {
        FIELDS.iter().position(|known| *known == field).and_then(|at| self.raw[at])
    }

    /// A string; none where it is absent or null.
    fn string(&self, field: &str) -> Result<Option<String>, String> {
        let parsed = self.raw(field).map(|raw| serde_json::from_str::<Option<String>>(raw.get()));
        let name = self.format.name(field);
        parsed.transpose().map(Option::flatten).map_err(|_| format!("has {name:?}, which is not a string"))
    }

    fn record(&self) -> Result<Record, String> {
        let name = |field: &'static str| self.format.name(field);
        if let Some(text) = self.string("text")? {
            return Ok(Record::Text(text));
        }
        let pair = |question: &'static str, answer: &'static str| match (
            self.string(question)?,
            self.string(answer)?,
        ) {
            (Some(_), Some(said)) if said.is_empty() => Err(format!("has {} that is empty", name(answer))),
            (Some(asked), Some(said)) => Ok(Some((asked, said))),
            (Some(_), None) => Err(format!("has {} and no {}", name(question), name(answer))),
            (None, Some(_)) => Err(format!("has {} and no {}", name(answer), name(question))),
            (None, None) => Ok(None),
        };
        if let Some((prompt, completion)) = pair("prompt", "completion")? {
            return Ok(Record::Partial(Partial::Completion { prompt, completion }));
        }
        for list in ["messages", "conversations"] {
            if let Some(raw) = self.raw(list) {
                return self.messages(name(list), raw).map(Record::Partial);
            }
        }
        let (system, input) = (self.string("system")?, self.string("input")?);
        let filled = |text: Option<String>| text.filter(|text| !text.trim().is_empty());
        if let Some((instruction, output)) = pair("instruction", "output")? {
            let (system, input) = (filled(system), filled(input));
            return Ok(Record::Partial(Partial::Instruction { system, instruction, input, output }));
        }
        Err(format!(
            "has neither {}, nor {} and {}, nor {}, nor {} (ShareGPT), nor {} and {} (Alpaca); data.keys gives \
             fields other names",
            name("text"),
            name("prompt"),
            name("completion"),
            name("messages"),
            name("conversations"),
            name("instruction"),
            name("output")
        ))
    }

    /// A conversation: each message with a role and what it says, in OpenAI's names or in ShareGPT's.
    fn messages(&self, list: &str, raw: &RawValue) -> Result<Partial, String> {
        let Value::Array(mut messages) = value(list, raw)? else {
            return Err(format!("has {list:?}, which is not a list"));
        };
        let [role, content, from, said] = ["role", "content", "from", "value"].map(|f| self.format.name(f));
        for (i, message) in messages.iter_mut().enumerate() {
            let usual = role == "role" && content == "content";
            if usual && message["role"].is_string() {
                continue;
            }
            let field = |names: [&str; 2]| names.into_iter().find_map(|name| message.get(name));
            let Some(speaker) = field([role, from]).and_then(Value::as_str) else {
                return Err(format!("has a message {i} without {role} (or {from})"));
            };
            let speaker = match speaker {
                "human" | "user" => "user",
                "gpt" | "assistant" | "chatgpt" | "model" | "bot" => "assistant",
                "system" => "system",
                "observation" | "function_response" | "tool" => "tool",
                other => {
                    let shown = one_line(other, 40);
                    return Err(format!(
                        "has a message {i} of {shown:?}, which is neither human nor gpt nor system"
                    ));
                }
            };
            let Some(content) = field([content, said]) else {
                return Err(format!("has a message {i} without {content} (or {said})"));
            };
            *message = json!({"role": speaker, "content": content});
        }
        if let Some(system) = self.string("system")?.filter(|system| !system.trim().is_empty())
            && messages.first().is_none_or(|first| first["role"] != "system")
        {
            messages.insert(0, json!({"role": "system", "content": system}));
        }
        let tools = self.raw("tools").map(|raw| value("tools", raw)).transpose()?.unwrap_or_default();
        Ok(Partial::Messages { messages, tools })
    }
}

impl<'de> Visitor<'de> for Fields<'de> {
    type Value = Fields<'de>;

    fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Fields<'de>, A::Error> {
        while let Some(key) = map.next_key::<Cow<str>>()? {
            match self.format.field(&key) {
                Some(at) => self.raw[at] = Some(map.next_value()?),
                None => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(self)
    }
}

/// Any JSON of bearable size: a value takes many times the memory of a comma.
fn value(key: &str, raw: &RawValue) -> Result<Value, String> {
    let text = raw.get();
    let parts = text.bytes().filter(|byte| matches!(byte, b',' | b'[' | b'{')).count();
    if text.len() > MESSAGES || parts > PARTS {
        return Err(format!("has {key:?} of {} bytes, which is more than a conversation", text.len()));
    }
    serde_json::from_str(text).map_err(|e| format!("has {key:?} that cannot be read ({e})"))
}
