//! One error type for the library. Every variant says what went wrong, where, and (where a user can act) what to do,
//! in one line.

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
        "device {device} ({adapter}) lacks {} bytes: the plan needs {need} and its budget is {budget}; use more devices, a smaller model, sequence or batch, more microbatches, or a larger --memory",
        need - budget
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
    },
    /// A tensor larger than what one binding or buffer of the adapter can hold.
    #[error(
        "{tensor} takes {need} bytes, but {adapter} binds at most {limit} at once; use more microbatches, a shorter sequence or a smaller model"
    )]
    Binding {
        /// The tensor's name.
        tensor: String,
        /// The adapter's name.
        adapter: String,
        /// Bytes of the tensor.
        need: u64,
        /// Bytes the adapter allows.
        limit: u64,
    },
    /// A checkpoint or model folder that cannot be read.
    #[error("{}: {message}", path.display())]
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
    /// Shapes that an op does not accept: a mistake in a model's layers.
    #[error("{op}: {message}")]
    Shape {
        /// The op.
        op: &'static str,
        /// Expected and given shapes.
        message: String,
    },
    /// A driver error: validation, out of memory, lost device, failed mapping.
    #[error("{adapter}: {context}: {message}")]
    Gpu {
        /// The adapter's name.
        adapter: String,
        /// What was being done.
        context: String,
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
    #[error("{}: {source}", path.display())]
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
            | Checkpoint { .. }
            | Schedule { .. } => true,
            Shape { .. } | Gpu { .. } | Stall { .. } | Io { .. } => false,
        }
    }

    /// A [`Error::Config`].
    pub fn config(place: impl Into<String>, message: impl Into<String>) -> Self {
        Error::Config { place: place.into(), message: message.into() }
    }

    /// A [`Error::Data`].
    pub fn data(message: impl Into<String>) -> Self {
        Error::Data { message: message.into() }
    }

    /// A [`Error::Checkpoint`].
    pub fn checkpoint(path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Error::Checkpoint { path: path.as_ref().to_path_buf(), message: message.into() }
    }

    /// Names the file in an I/O error: `.map_err(Error::io(path))`.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { path, source }
    }
}
