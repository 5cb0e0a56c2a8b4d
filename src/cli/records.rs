//! Records as arguments say how to read them, and what is said of those that were not taken as they are.

use std::collections::BTreeMap;

use super::show_count;
use crate::error::{Error, Result, nearest};
use crate::train::data::{BadLines, Corpus, FIELDS, RecordFormat};

/// How records are written.
#[derive(clap::Args)]
pub(super) struct RecordArguments {
    /// Leave out lines of records that are none, instead of refusing them.
    #[arg(long)]
    skip_bad_lines: bool,
    /// Fields of records that have other names in the files, such as prompt=question,completion=answer.
    #[arg(long, value_name = "FIELD=NAME,...", value_delimiter = ',')]
    keys: Vec<String>,
}

impl RecordArguments {
    /// The same for the library.
    pub(super) fn format(&self) -> Result<RecordFormat> {
        let bad_lines = if self.skip_bad_lines { BadLines::Skip } else { BadLines::Refuse };
        let pairs = self.keys.iter().map(|pair| {
            let split = pair.split_once('=').map(|(field, name)| (field.trim(), name.trim()));
            let Some((field, name)) = split.filter(|(field, name)| !field.is_empty() && !name.is_empty())
            else {
                let message = format!("{pair:?} is not field=name, such as prompt=question");
                return Err(Error::config("--keys", message));
            };
            if !FIELDS.contains(&field) {
                let near = nearest(field, FIELDS);
                let message = format!("{field} is no field of a record; did you mean {near}?");
                return Err(Error::config("--keys", message));
            }
            Ok((field.to_string(), name.to_string()))
        });
        Ok(RecordFormat { keys: pairs.collect::<Result<BTreeMap<_, _>>>()?, bad_lines })
    }
}

/// What an evaluation goes through.
#[derive(Clone, Copy)]
pub(super) struct Evaluated {
    /// Sequences that it computes.
    pub(super) rows: usize,
    /// Records that are packed into them; none for a text without records.
    records: Option<usize>,
}

impl Evaluated {
    /// Of a text in sequences of so many tokens.
    pub(super) fn new(corpus: &Corpus, sequence: usize) -> Evaluated {
        let records = corpus.tally(sequence).map(|tally| tally.records - tally.without);
        Evaluated { rows: corpus.windows(sequence).len(), records }
    }

    /// How far it is after so many sequences. Of records, about: people know how many there are, and not into how many
    /// sequences they were packed.
    pub(super) fn words(&self, done: usize) -> String {
        match self.records {
            Some(all) => format!("record {}/{all}", done * all / self.rows.max(1)),
            None => format!("window {done}/{}", self.rows),
        }
    }
}

/// What of a text was left out, or cut where records go into sequences of so many tokens one by one (`apart`), and why.
pub(super) fn left_out(corpus: &Corpus, sequence: usize, apart: bool) -> Vec<String> {
    let mut said = Vec::new();
    if let (skipped @ 1.., first) = corpus.skipped() {
        let first = first.first().map_or(String::new(), |first| format!(" (the first: {first})"));
        let lines = if skipped == 1 { "line is no record and is" } else { "lines are no records and are" };
        said.push(format!("{} {lines} left out{first}", show_count(skipped as u64)));
    }
    let Some(tally) = corpus.tally(sequence) else { return said };
    if tally.without > 0 {
        let records = if tally.without == 1 { "record has" } else { "records have" };
        said.push(format!(
            "{} {records} no answer that counts and no part",
            show_count(tally.without as u64)
        ));
    }
    if tally.cut > 0 && apart {
        let records = if tally.cut == 1 { "record is" } else { "records are" };
        said.push(format!(
            "{} {records} longer than a sequence of {sequence} tokens and cut (the longest has {})",
            show_count(tally.cut as u64),
            show_count(tally.longest as u64)
        ));
    }
    said
}
