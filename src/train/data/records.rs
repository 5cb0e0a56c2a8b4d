//! Records: one JSON object a line.

use serde_json::Value;

/// Longest line that is read; one without an end would take all the memory.
const LONGEST: usize = 64 << 20;

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
        let value: Value = serde_json::from_slice(line).map_err(|e| {
            let message = e.to_string();
            format!("is not JSON ({})", message.replacen("line 1 ", "", 1))
        })?;
        let Value::Object(mut map) = value else {
            let kind = match value {
                Value::Array(_) => "an array",
                Value::String(_) => "a string",
                Value::Number(_) => "a number",
                _ => "a literal",
            };
            return Err(format!("is {kind}, not an object"));
        };
        let mut text = |key: &str| match map.remove(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(format!("has a {key:?} that is not a string")),
        };
        if let Some(text) = text("text")? {
            return Ok(Record::Text(text));
        }
        match (text("prompt")?, text("completion")?) {
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
        match map.remove("messages") {
            Some(Value::Array(messages)) => {
                if let Some(i) = messages.iter().position(|message| !message["role"].is_string()) {
                    return Err(format!("has a message {i} without a role"));
                }
                let tools = map.remove("tools").unwrap_or_default();
                Ok(Record::Partial(Partial::Messages { messages, tools }))
            }
            Some(_) => Err("has \"messages\" that are not a list".into()),
            None => Err("has neither text, nor prompt and completion, nor messages".into()),
        }
    }
}
