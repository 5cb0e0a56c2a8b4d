//! What the page's models learn: text, addition, sorting.

use serde::{Deserialize, Serialize};

use super::settings::Choice;
use crate::model::init::philox;
use crate::train::data::Corpus;

/// Records that a model learns from.
const RECORDS: u32 = 50_000;
/// Records that it never sees, by which it is judged.
const HELD_OUT: usize = 100;
/// One of so many records is held out.
const PART: u32 = 50;
/// Digits of each number that is added.
const DIGITS: usize = 3;
/// Digits that are sorted.
const SORTED: usize = 6;

/// The text of a run that brings none: what this project says of itself.
const OWN: &str = concat!(
    include_str!("../../README.md"),
    include_str!("../../docs/schedules.md"),
    include_str!("../../docs/axes.md"),
    include_str!("../../docs/config.md"),
);

/// What is learnt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Task {
    /// To write like a text, a byte at a time.
    Text,
    /// Sums of two numbers of three digits.
    Addition,
    /// Six digits in order.
    Sorting,
}

/// How fast a model learns.
pub(super) struct Rates {
    /// Steps over which the learning rate falls to a tenth, where it stays.
    pub(super) steps: u64,
    /// The highest learning rate.
    pub(super) highest: f64,
    /// Standard deviation of the first weights.
    pub(super) spread: f64,
}

/// A question and its answer, as the model reads and writes them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) question: String,
    pub(super) answer: String,
}

/// What a run learns from, and what it is asked.
pub(super) struct Lesson {
    pub(super) corpus: Corpus,
    /// None of them is in the corpus; empty for a text.
    pub(super) held_out: Vec<Record>,
}

impl Task {
    pub(super) const ALL: [Task; 3] = [Task::Addition, Task::Sorting, Task::Text];

    pub(super) fn choice(self) -> Choice {
        let (name, title, about) = match self {
            Task::Text => {
                ("text", "Write text", "It learns to write like a text, one character after another.")
            }
            Task::Addition => {
                ("addition", "Add numbers", "It learns to add two numbers of three digits from examples.")
            }
            Task::Sorting => {
                ("sorting", "Sort digits", "It learns to put six digits in order from examples.")
            }
        };
        Choice { name: name.into(), title: title.into(), about: about.into() }
    }

    /// Sequences of a batch, and tokens of a sequence: one record, whose last token is a target alone.
    pub(super) fn extents(self) -> [usize; 2] {
        match self {
            Task::Text => [32, 64],
            Task::Addition => [64, 2 * DIGITS + 2 + DIGITS],
            Task::Sorting => [64, 2 * SORTED],
        }
    }

    /// With these, sums are 95 % right after fewer than a thousand steps; with the spread of GPT-2, 0.02, a model of this
    /// width learns nothing in the first few hundred.
    pub(super) fn rates(self) -> Rates {
        match self {
            Task::Text => Rates { steps: 10_000, highest: 0.002, spread: 0.02 },
            Task::Addition | Task::Sorting => Rates { steps: 1200, highest: 0.006, spread: 0.08 },
        }
    }

    /// What a run with this seed learns from.
    pub(super) fn lesson(self, text: &str, seed: u32) -> Lesson {
        if self == Task::Text {
            let text = if text.trim().is_empty() { OWN } else { text };
            // A text of less than a sequence says itself again.
            let wanted = self.extents()[1] + 1;
            let times = wanted.div_ceil(text.len().max(1)).max(1);
            return Lesson {
                corpus: Corpus::from_bytes(text.repeat(times).into_bytes()),
                held_out: Vec::new(),
            };
        }
        let mut held_out = Vec::new();
        let mut learnt = Vec::new();
        for at in 0..RECORDS {
            let words = philox([at, 0, self as u32, 0x6465_6d6f], [seed, 0]);
            let (record, number) = self.record(words);
            // Whether it is held out depends on the question alone: no seed learns what another is asked.
            if philox([number, 0, 0, 0], [0, 0])[0].is_multiple_of(PART) {
                held_out.push(record);
            } else {
                learnt.push((record.question.into_bytes(), record.answer.into_bytes()));
            }
        }
        held_out.truncate(HELD_OUT);
        Lesson { corpus: Corpus::from_answers(learnt), held_out }
    }

    /// The record of four random words, and a number that its question alone has.
    fn record(self, words: [u32; 4]) -> (Record, u32) {
        let range = 10u32.pow(if self == Task::Sorting { SORTED as u32 } else { DIGITS as u32 });
        let (a, b) = (words[0] % range, words[1] % range);
        match self {
            Task::Sorting => {
                let mut digits: Vec<u8> = format!("{a:0SORTED$}").into_bytes();
                let question = format!("{a:0SORTED$}=");
                digits.sort_unstable();
                (Record { question, answer: digits.into_iter().map(char::from).collect() }, a)
            }
            Task::Addition | Task::Text => {
                let question = format!("{a:0DIGITS$}+{b:0DIGITS$}=");
                // The lowest digit first: what is carried is known before it is needed.
                let sum = format!("{:01$}", a + b, DIGITS + 1);
                (Record { question, answer: sum.chars().rev().collect() }, a * range + b)
            }
        }
    }

    /// An answer as people write it.
    pub(super) fn readable(self, answer: &str) -> String {
        match self {
            Task::Addition => number(&answer.chars().rev().collect::<String>()).into(),
            Task::Text | Task::Sorting => answer.into(),
        }
    }

    /// A question as people write it.
    pub(super) fn asked(self, question: &str) -> String {
        let question = question.trim_end_matches('=');
        match self {
            Task::Addition => question.split('+').map(number).collect::<Vec<_>>().join(" + "),
            Task::Text | Task::Sorting => question.into(),
        }
    }
}

/// A number without the zeros before it.
fn number(digits: &str) -> &str {
    let short = digits.trim_start_matches('0');
    if short.is_empty() && !digits.is_empty() { "0" } else { short }
}
