//! How files of records are written, as a config says it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What to do with a line that is no record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BadLines {
    /// It is an error that names the line.
    #[default]
    Refuse,
    /// It is left out and counted ([`Corpus::skipped`]).
    Skip,
}

/// How records are written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecordFormat {
    /// Other names for fields: by one of [`FIELDS`] the name that stands for it in the files.
    pub keys: BTreeMap<String, String>,
    /// What to do with lines that are no records.
    pub bad_lines: BadLines,
}

/// The fields that are read. The last four are those of a message; ShareGPT's names for them come last.
pub const FIELDS: [&str; 14] = [
    "text",
    "prompt",
    "completion",
    "messages",
    "tools",
    "conversations",
    "system",
    "instruction",
    "input",
    "output",
    "role",
    "content",
    "from",
    "value",
];

#[cfg(not(target_arch = "wasm32"))]
impl RecordFormat {
    /// The name that stands for a field.
    pub(super) fn name<'a>(&'a self, field: &'a str) -> &'a str {
        self.keys.get(field).map_or(field, String::as_str)
    }

    /// The field of [`FIELDS`] that a name stands for.
    pub(super) fn field(&self, name: &str) -> Option<usize> {
        FIELDS.iter().position(|field| self.name(field) == name)
    }
}
