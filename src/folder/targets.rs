//! Which modules of a model an adapter belongs to, in PEFT's words.

use serde::{Deserialize, Serialize};

use super::Kind;
use crate::error::{Error, Result};
use crate::model::Linear;

/// PEFT's word for every linear layer but the head.
const ALL: &str = "all-linear";
/// The head's name, in every architecture.
const HEAD: &str = "lm_head";

/// Most steps back in matching one name, which is short; there are thousands of names.
const MOST_STEPS: usize = 10_000;

/// Which modules an adapter belongs to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Targets {
    /// Modules whose name is one of these, or ends in a dot and one of these.
    Names(Vec<String>),
    /// A regular expression that matches the whole name, or PEFT's word `all-linear`. Which modules a saved adapter has,
    /// its tensors say.
    Pattern(String),
}

impl Targets {
    /// The names of the layers that are meant, in the order of `layers`.
    ///
    /// # Errors
    /// [`Error::Config`] for a name or a pattern that no linear layer has, and for what is no regular expression.
    pub fn select(&self, layers: &[Linear]) -> Result<Vec<String>> {
        let refuse = |message: String| {
            Error::config(Kind::Adapter.config_name(), format!("target_modules: {message}"))
        };
        let none = |what: &str| {
            let mut ends: Vec<&str> = layers.iter().map(|l| last_part(&l.name)).collect();
            ends.sort_unstable();
            ends.dedup();
            refuse(format!("{what:?} is no linear layer of this model; known: {}", ends.join(", ")))
        };
        let names = layers.iter().map(|layer| layer.name.as_str());
        let picked: Vec<String> = match self {
            Targets::Names(wanted) => {
                if let Some(lost) = wanted.iter().find(|w| !names.clone().any(|name| is_called(name, w))) {
                    return Err(none(lost));
                }
                let meant = |name: &&str| wanted.iter().any(|wanted| is_called(name, wanted));
                names.filter(meant).map(String::from).collect()
            }
            Targets::Pattern(word) if word.eq_ignore_ascii_case(ALL) => {
                names.filter(|n| *n != HEAD).map(String::from).collect()
            }
            Targets::Pattern(pattern) => {
                let invalid = |e: fancy_regex::Error| {
                    refuse(format!("{pattern:?} is neither {ALL} nor a regular expression: {e}"))
                };
                let whole = fancy_regex::RegexBuilder::new(&format!(r"\A(?:{pattern})\z"))
                    .backtrack_limit(MOST_STEPS)
                    .build()
                    .map_err(invalid)?;
                let mut picked = Vec::new();
                for name in names {
                    if whole.is_match(name).map_err(invalid)? {
                        picked.push(name.to_string());
                    }
                }
                picked
            }
        };
        match (picked.is_empty(), self) {
            (true, Targets::Pattern(pattern)) => Err(none(pattern)),
            _ => Ok(picked),
        }
    }
}

/// Whether a module's name is this one or ends in it behind a dot.
fn is_called(module: &str, name: &str) -> bool {
    module.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

fn last_part(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}
