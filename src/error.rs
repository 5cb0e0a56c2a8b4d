//! One error type for the library. Every variant says what went wrong, where, and (where a user can act) what to do,
//! in one line of bearable length: names, values and paths in it may come from a damaged file, so [`one_line`] has the
//! last word about them.

use std::any::Any;
use std::fmt;
use std::path::{Path, PathBuf};

/// The result of everything in this library that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong. [`Error::is_input`] tells a user's mistake from a failure of the machine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    // --- what a user asked for ---
    /// A configuration, flag or argument that cannot be used.
    #[error("{place}: {message}")]
    Config {
        /// The file and key, or the flag.
        place: String,
        /// What is wrong and what to do.
        message: String,
    },
    /// Training text that is missing, empty or too short.
    #[error("data: {message}")]
    Data {
        /// What is wrong and with which path.
        message: String,
    },
    /// No usable adapter on this machine.
    #[error("no WebGPU adapter found: {help}")]
    NoAdapter {
        /// The command that installs or enables one on this system.
        help: String,
    },
    /// An adapter index that `polystage devices` does not list.
    #[error("adapter {index} does not exist: this machine has {count} (0 to {}); see `polystage devices`", count - 1)]
    AdapterIndex {
        /// The index asked for.
        index: usize,
        /// How many adapters there are; at least one.
        count: usize,
    },
    /// A plan that would not fit, refused before anything is allocated.
    #[error(
        "device {device} ({adapter}) lacks {} bytes: it needs {need} and may use {budget}{}",
        need - budget,
        would_fit(help.as_deref())
    )]
    Memory {
        /// Position of the device in the pipeline.
        device: usize,
        /// The adapter's name.
        adapter: String,
        /// Bytes the plan allocates on it.
        need: u64,
        /// Bytes it may allocate.
        budget: u64,
        /// Changes of which each makes it fit; none if nobody has tried any.
        help: Option<Vec<String>>,
    },
    /// A tensor larger than what one binding or buffer of the adapter can hold.
    #[error("{tensor} takes {need} bytes, but {adapter} binds at most {limit} at once{}", would_fit(help.as_deref()))]
    Binding {
        /// The tensor's name.
        tensor: String,
        /// The adapter's name.
        adapter: String,
        /// Bytes of the tensor.
        need: u64,
        /// Bytes the adapter allows.
        limit: u64,
        /// Changes of which each makes it fit; none if nobody has tried any.
        help: Option<Vec<String>>,
    },
    /// No plan keeps within what the devices can hold.
    #[error("plan: no plan fits: {lacks}{}", would_fit(Some(help)))]
    NoPlan {
        /// What the plan that comes closest lacks.
        lacks: String,
        /// Changes of which each makes one fit.
        help: Vec<String>,
    },
    /// A checkpoint or model folder that cannot be read.
    #[error("{}: {message}", Shown(path))]
    Checkpoint {
        /// The file or folder concerned.
        path: PathBuf,
        /// What is wrong and what to do.
        message: String,
    },
    /// A schedule that is malformed or could wait forever. `grid` shows it with the offending cell marked.
    #[error("schedule: {message}\n{grid}")]
    Schedule {
        /// What is wrong.
        message: String,
        /// The schedule as a grid, one line a rank.
        grid: String,
    },

    // --- what the machine did ---
    /// The loss or the gradient is no longer a number.
    #[error("step {step}: {message}")]
    Diverged {
        /// The step.
        step: u64,
        /// What is not finite and what to do.
        message: String,
    },
    /// A file that another program has changed while it was in use.
    #[error("{}: {message}", Shown(path))]
    Changed {
        /// The file.
        path: PathBuf,
        /// What has changed and what to do.
        message: String,
    },
    /// Something that this program, not its user, is to blame for or cannot help: a thread or a helper that has died, a
    /// signal that cannot be caught.
    #[error("{place}: {message}")]
    Failed {
        /// What has failed.
        place: String,
        /// How.
        message: String,
    },
    /// Shapes that an op does not accept: a mistake in a model's layers.
    #[error("{op}: {message}")]
    Shape {
        /// The op.
        op: &'static str,
        /// Expected and given shapes.
        message: String,
    },
    /// A device that is gone.
    #[error(
        "{device} was lost while {doing} ({message}): its driver was reset or the card unplugged; start again when \
         `polystage devices` lists it, training with --resume from its last checkpoint"
    )]
    Lost {
        /// The device.
        device: String,
        /// What it was doing.
        doing: String,
        /// The driver's or wgpu's words, on one line.
        message: String,
    },
    /// A driver that has no memory left for what the plan counted on.
    #[error(
        "{device} ran out of memory while {doing}: less was free than planned for; give it less with --memory, so that \
         the plan recomputes or cuts otherwise, or use smaller microbatches"
    )]
    OutOfMemory {
        /// The device.
        device: String,
        /// What it was doing.
        doing: String,
    },
    /// Any other failure of a device: an invalid call, a mistake in its driver, a buffer that could not be mapped.
    #[error("{device} failed while {doing}: {message}; see whether `polystage verify` passes on it")]
    Gpu {
        /// The device.
        device: String,
        /// What it was doing.
        doing: String,
        /// The driver's or wgpu's words, on one line.
        message: String,
    },
    /// No device made progress for too long.
    #[error("stalled: {message}")]
    Stall {
        /// Rank, stage, microbatch and action that does not return, and for how long.
        message: String,
    },
    /// The file system refused.
    #[error("{}: {source}", Shown(path))]
    Io {
        /// The file concerned.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
}

impl Error {
    /// A mistake in what the user gave (exit status 2), not a failure while running (exit status 1).
    pub fn is_input(&self) -> bool {
        use Error::*;
        match self {
            Config { .. }
            | Data { .. }
            | NoAdapter { .. }
            | AdapterIndex { .. }
            | Memory { .. }
            | Binding { .. }
            | NoPlan { .. }
            | Checkpoint { .. }
            | Schedule { .. } => true,
            Diverged { .. }
            | Changed { .. }
            | Failed { .. }
            | Shape { .. }
            | Lost { .. }
            | OutOfMemory { .. }
            | Gpu { .. }
            | Stall { .. }
            | Io { .. } => false,
        }
    }

    /// A [`Error::Config`].
    pub fn config(place: impl Into<String>, message: impl Into<String>) -> Self {
        Error::Config { place: one_line(&place.into(), LONGEST), message: one_line(&message.into(), LONGEST) }
    }

    /// A [`Error::NoPlan`].
    pub fn no_plan(lacks: impl Into<String>, help: Vec<String>) -> Self {
        Error::NoPlan { lacks: one_line(&lacks.into(), LONGEST), help }
    }

    /// A [`Error::Data`].
    pub fn data(message: impl Into<String>) -> Self {
        Error::Data { message: one_line(&message.into(), LONGEST) }
    }

    /// A [`Error::Checkpoint`].
    pub fn checkpoint(path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Error::Checkpoint { path: path.as_ref().to_path_buf(), message: one_line(&message.into(), LONGEST) }
    }

    /// A [`Error::Schedule`].
    pub fn schedule(message: impl Into<String>, grid: impl Into<String>) -> Self {
        Error::Schedule { message: one_line(&message.into(), LONGEST), grid: grid.into() }
    }

    /// A [`Error::Changed`].
    pub fn changed(path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Error::Changed { path: path.as_ref().to_path_buf(), message: one_line(&message.into(), LONGEST) }
    }

    /// A [`Error::Failed`].
    pub fn failed(place: impl Into<String>, message: impl Into<String>) -> Self {
        Error::Failed { place: one_line(&place.into(), LONGEST), message: one_line(&message.into(), LONGEST) }
    }

    /// A [`Error::Lost`].
    pub fn lost(device: &str, doing: &str, message: impl Into<String>) -> Self {
        let [device, doing, message] = lines([device, doing, &message.into()]);
        Error::Lost { device, doing, message }
    }

    /// A [`Error::OutOfMemory`].
    pub fn out_of_memory(device: &str, doing: &str) -> Self {
        let [device, doing] = lines([device, doing]);
        Error::OutOfMemory { device, doing }
    }

    /// A [`Error::Gpu`].
    pub fn gpu(device: &str, doing: &str, message: impl Into<String>) -> Self {
        let [device, doing, message] = lines([device, doing, &message.into()]);
        Error::Gpu { device, doing, message }
    }

    /// Names the file in an I/O error: `.map_err(Error::io(path))`.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { path, source }
    }
}

/// What makes a thing fit that does not, after what is wrong: changes that were tried.
fn would_fit(help: Option<&[String]>) -> String {
    match help {
        None => String::new(),
        Some([]) => "; no single change would make it fit: use a smaller model".into(),
        Some(help) => one_line(&format!("; it would fit with {}", help.join(", or with ")), LONGEST),
    }
}

/// Each text on one line of bearable length.
fn lines<const N: usize>(texts: [&str; N]) -> [String; N] {
    texts.map(|text| one_line(text, LONGEST))
}

/// Most characters of a message.
const LONGEST: usize = 600;

/// What a panic said.
pub(crate) fn said(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref().copied()).unwrap_or("no reason was given")
}

/// A path as messages show it.
struct Shown<'a>(&'a Path);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&one_line(&self.0.to_string_lossy(), LONGEST))
    }
}

/// A text on one line that does nothing to a terminal: what moves a cursor or is not to be seen is escaped. Of a longer one than `most`
/// characters the beginning and the end are left, because the one says what is wrong and the other what to do.
pub fn one_line(text: &str, most: usize) -> String {
    let plain = |part: &str| -> String { part.chars().map(Plain).map(|c| c.to_string()).collect() };
    let count = text.chars().count();
    if count <= most {
        return plain(text);
    }
    // So that a text that was shortened is not shortened again.
    let half = most.saturating_sub(40) / 2;
    let gap = format!(" ... ({} characters left out) ... ", count - 2 * half);
    let at = |chars: usize| text.char_indices().nth(chars).map_or(text.len(), |(at, _)| at);
    plain(&text[..at(half)]) + &gap + &plain(&text[at(count - half)..])
}

/// A character, escaped if it moves the cursor, colours, or reorders what is around it.
struct Plain(char);

impl fmt::Display for Plain {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self.0 {
            '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}' => {
                write!(f, "{}", self.0.escape_unicode())
            }
            '\n' | '\r' | '\t' => f.write_str(" "),
            c if c.is_control() => write!(f, "{}", c.escape_default()),
            c => write!(f, "{c}"),
        }
    }
}

/// The most likely meaning of a name that is not known. Of a long one the beginning is compared.
pub(crate) fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> &'a str {
    let name: String = name.chars().take(64).collect();
    let likeness = |known: &str| strsim::jaro_winkler(&name, known);
    let best = known.into_iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
    best.unwrap_or_default()
}
