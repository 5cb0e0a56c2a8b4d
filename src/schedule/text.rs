//! The text form: a header, then one line of actions for each rank.

use std::fmt;
use std::str::FromStr;

use super::draw::marked_line;
use super::generate::{MAX_CELLS, MAX_STAGES};
use super::{Action, Kind, Schedule, Scope};
use crate::error::{Error, Result, one_line};

/// Stands for a rank that does nothing, whose line would be blank and so be overlooked; ignored between actions, so
/// that a schedule written by hand may align its columns with it.
const IDLE: &str = ".";

/// What a schedule without a header is called.
const UNNAMED: &str = "custom";

/// Most characters of a name that are kept.
const NAME: usize = 100;

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::F => "F",
            Kind::B => "B",
            Kind::I => "I",
            Kind::W => "W",
            Kind::SendF => "SEND_F",
            Kind::RecvF => "RECV_F",
            Kind::SendB => "SEND_B",
            Kind::RecvB => "RECV_B",
            Kind::C => "C",
            Kind::R => "R",
            Kind::A => "A",
            Kind::N => "N",
            Kind::U => "U",
            Kind::G => "G",
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Action { stage, kind, microbatch } = self;
        match kind.scope() {
            Scope::Microbatch => write!(f, "{stage}{kind}{microbatch}"),
            Scope::Stage => write!(f, "{stage}{kind}"),
            Scope::Rank => write!(f, "{kind}"),
        }
    }
}

impl FromStr for Action {
    type Err = Error;

    /// Reads `2F0` and the like; anything else is an [`Error::Config`] that says what an action looks like.
    fn from_str(text: &str) -> Result<Self> {
        parse_action(text).ok_or_else(|| {
            let names = |wanted: Scope| {
                let kinds = Kind::ALL.into_iter().filter(|kind| kind.scope() == wanted);
                kinds.map(Kind::name).collect::<Vec<_>>().join(", ")
            };
            Error::config(
                format!("action `{text}`"),
                format!(
                    "not an action; write stage, kind and microbatch without spaces, such as 2F0 (kinds: {}); once a step, stage and kind, such as 2R ({}), or the kind alone ({})",
                    names(Scope::Microbatch),
                    names(Scope::Stage),
                    names(Scope::Rank)
                ),
            )
        })
    }
}

fn parse_action(text: &str) -> Option<Action> {
    let kind_on = text.trim_start_matches(|c: char| c.is_ascii_digit());
    let kind = kind_on.trim_end_matches(|c: char| c.is_ascii_digit());
    let stage = &text[..text.len() - kind_on.len()];
    let microbatch = &kind_on[kind.len()..];
    let kind = Kind::ALL.into_iter().find(|known| known.name() == kind)?;
    let number = |text: &str, has: bool| {
        if has { text.parse().ok() } else { text.is_empty().then_some(0) }
    };
    let scope = kind.scope();
    Some(Action {
        stage: number(stage, scope != Scope::Rank)?,
        kind,
        microbatch: number(microbatch, scope == Scope::Microbatch)?,
    })
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        // A line break in the name would make the rest of it a rank.
        let name = self.name.replace(char::is_control, " ");
        writeln!(f, "# name: {name}, stages: {}, microbatches: {}", self.stages, self.microbatches)?;
        for actions in &self.ranks {
            if actions.is_empty() {
                f.write_str(IDLE)?;
            }
            for (i, action) in actions.iter().enumerate() {
                write!(f, "{}{action}", if i == 0 { "" } else { " " })?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

impl FromStr for Schedule {
    type Err = Error;

    /// Reads what [`Display`](fmt::Display) prints, and what a person writes: `#` starts a comment anywhere, blank
    /// lines count for nothing, a rank without actions is `.`, and actions may be separated by commas, as in PyTorch's
    /// CSV form. Without the header line, the schedule is called `custom`, and the numbers of stages and microbatches
    /// follow from the highest ones named.
    ///
    /// # Errors
    ///
    /// [`Error::Schedule`] with line and word for what is not an action, for a text without any rank, and for one with
    /// absurdly many ranks or actions. A schedule that can be read may still be wrong: call [`Schedule::validate`].
    fn from_str(text: &str) -> Result<Self> {
        let mut header = None;
        let mut ranks = Vec::new();
        let mut room = Kind::ALL.len() * MAX_CELLS;
        for (number, line) in text.lines().enumerate() {
            let refuse =
                |message: &str, grid| Err(Error::schedule(format!("line {}: {message}", number + 1), grid));
            if let Some(fields) = line.strip_prefix("# name: ")
                && header.is_none()
            {
                header = parse_header(fields);
                if header.is_none() {
                    return refuse("the header's counts are not numbers", marked_line(&[line], 0));
                }
                continue;
            }
            let code = line.split('#').next().unwrap_or_default();
            let words =
                || code.split(|c: char| c.is_whitespace() || c == ',').filter(|word| !word.is_empty());
            if words().next().is_none() {
                continue;
            }
            if ranks.len() == MAX_STAGES {
                return refuse(&format!("more than {MAX_STAGES} ranks"), String::new());
            }
            let mut actions = Vec::new();
            for (at, word) in words().enumerate().filter(|(_, word)| *word != IDLE) {
                if actions.len() == room {
                    return refuse("more actions than a schedule may have", String::new());
                }
                match word.parse::<Action>() {
                    Ok(action) => actions.push(action),
                    Err(error) => {
                        let grid = marked_line(&words().collect::<Vec<_>>(), at);
                        return refuse(&error.to_string(), grid);
                    }
                }
            }
            room -= actions.len();
            ranks.push(actions);
        }
        if header.is_none() && ranks.is_empty() {
            let message = "the text holds no actions; write one line for each rank, such as 0F0 0F1 0B0 0B1";
            return Err(Error::schedule(message, String::new()));
        }
        let count = |of: fn(&Action) -> usize| {
            ranks.iter().flatten().map(of).max().map_or(0, |highest| highest.saturating_add(1))
        };
        let Header { name, counts } = header.unwrap_or(Header { name: UNNAMED, counts: None });
        let (stages, microbatches) =
            counts.unwrap_or_else(|| (count(|action| action.stage), count(|action| action.microbatch)));
        Ok(Schedule { name: one_line(name, NAME), stages, microbatches, ranks })
    }
}

struct Header<'a> {
    name: &'a str,
    counts: Option<(usize, usize)>,
}

/// Splits from the right, so that a name may hold commas. A header may give the name alone.
fn parse_header(fields: &str) -> Option<Header<'_>> {
    let Some((rest, microbatches)) = fields.rsplit_once(", microbatches: ") else {
        return Some(Header { name: fields, counts: None });
    };
    let (name, stages) = rest.rsplit_once(", stages: ")?;
    Some(Header { name, counts: Some((stages.trim().parse().ok()?, microbatches.trim().parse().ok()?)) })
}
