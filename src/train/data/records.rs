//! Records: one JSON object a line.

use std::borrow::Cow;

use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use serde_json::value::RawValue;

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
}

impl Record {
    /// Reads a line, or says what is wrong with it.
    pub(super) fn parse(line: &[u8]) -> Result<Record, String> {
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
        let fields: Fields = serde_json::from_slice(line).map_err(no_json)?;
        let text = |key: &str, raw: Option<&RawValue>| {
            let parsed = raw.map(|raw| serde_json::from_str::<String>(raw.get())).transpose();
            parsed.map_err(|_| format!("has a {key:?} that is not a string"))
        };
        if let Some(text) = text("text", fields.text)? {
            return Ok(Record::Text(text));
        }
        match (text("prompt", fields.prompt)?, text("completion", fields.completion)?) {
            (Some(_), Some(completion)) if completion.is_empty() => {
                return Err("has an empty completion".into());
            }
            (Some(prompt), Some(completion)) => {
                return Ok(Record::Partial(Partial::Completion { prompt, completion }));
            }
            (Some(_), None) => return Err("has a prompt and no completion".into()),
            (None, Some(_)) => return Err("has a completion and no prompt".into()),
            (None, None) => {}
        }
        let Some(messages) = fields.messages else {
            return Err("has neither text, nor prompt and completion, nor messages".into());
        };
        let messages: Vec<Value> = match value("messages", messages)? {
            Value::Array(messages) => messages,
            _ => return Err("has \"messages\" that are not a list".into()),
        };
        if let Some(i) = messages.iter().position(|message| !message["role"].is_string()) {
            return Err(format!("has a message {i} without a role"));
        }
        let tools = fields.tools.map(|tools| value("tools", tools)).transpose()?.unwrap_or_default();
        Ok(Record::Partial(Partial::Messages { messages, tools }))
    }
}

/// The parts of a line that matter, where they lie in it; of what occurs twice the last. The rest, whatever it is, takes
/// no memory.
#[derive(Default)]
struct Fields<'a> {
    text: Option<&'a RawValue>,
    prompt: Option<&'a RawValue>,
    completion: Option<&'a RawValue>,
    messages: Option<&'a RawValue>,
    tools: Option<&'a RawValue>,
}

impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Fields<'de>, D::Error> {
        struct Visit;
        impl<'de> Visitor<'de> for Visit {
            type Value = Fields<'de>;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields<'de>, A::Error> {
                let mut fields = Fields::default();
                while let Some(key) = map.next_key::<Cow<str>>()? {
                    let place = match &*key {
                        "text" => &mut fields.text,
                        "prompt" => &mut fields.prompt,
                        "completion" => &mut fields.completion,
                        "messages" => &mut fields.messages,
                        "tools" => &mut fields.tools,
                        _ => {
                            map.next_value::<IgnoredAny>()?;
                            continue;
                        }
                    };
                    *place = Some(map.next_value()?);
                }
                Ok(fields)
            }
        }
        deserializer.deserialize_map(Visit)
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
