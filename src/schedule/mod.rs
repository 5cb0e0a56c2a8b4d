//! When each device computes what: pipeline schedules as plain data.
//!
//! A [`Schedule`] holds an ordered list of [`Action`]s for each rank, and nothing else says when things happen. It is
//! generated ([`generate`]), searched for given devices ([`synthesise`]) or written by hand, prints and parses
//! ([`std::fmt::Display`], [`std::str::FromStr`]), is turned from computation only into computation with transfers
//! ([`Schedule::lowered`]), is proved to end ([`Schedule::validate`]), timed on devices that [`Costs`] describe
//! ([`simulate`], [`Simulator`]) and drawn ([`grid`]):
//!
//! ```
//! use polystage::schedule::{generate, grid};
//!
//! let schedule = generate("1f1b", 2, 4)?;
//! assert_eq!(
//!     schedule.to_string(),
//!     "# name: 1f1b, stages: 2, microbatches: 4\n\
//!      0F0 0F1 0B0 0F2 0B1 0F3 0B2 0B3\n\
//!      1F0 1B0 1F1 1B1 1F2 1B2 1F3 1B3\n"
//! );
//! schedule.lowered()?.validate()?;
//! println!("{}", grid(&schedule));
//! # Ok::<(), polystage::error::Error>(())
//! ```
//!
//! Nothing here knows a GPU or a tensor, so a schedule can be made and judged for a machine that is not there. A stage
//! is not a rank: one rank may own several stages, in any order. The notation is that of PyTorch's
//! `torch.distributed.pipelining`.
//!
//! Three rules keep a run's results independent of its schedule. Every microbatch passes every stage exactly once; a
//! stage adds up its weight gradients in microbatch order; and a rank does its list in order, waiting where an input is
//! not there yet. Sends never wait, because the transport holds as many messages as the schedule needs; receives do.

mod auto;
mod check;
mod clock;
mod costs;
mod draw;
mod generate;
mod idle;
mod index;
mod lower;
mod memory;
mod order;
pub(crate) mod random;
mod simulate;
mod slots;
mod tail;
mod text;
mod times;
mod zero_bubble;

pub use auto::{Effort, synthesise};
pub use costs::{Costs, Hop, Hops, Jitter, RankCost, StageCost, Tie};
pub use draw::grid;
pub use generate::{ALL_NAMES, AUTO, NAMES, default_chunks, generate, generate_chunked, stage_ranks};
pub use idle::{Cause, Gap, Idle, attribute};
pub use simulate::{Cell, Simulation, Simulator, simulate};
pub use slots::SlotPlan;

/// What an [`Action`] does with its stage and microbatch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// Forward.
    F,
    /// The whole backward pass: I, then W.
    B,
    /// The half of the backward pass that yields the gradient of the stage's input, for which the previous stage waits.
    I,
    /// The half of the backward pass that adds to the gradients of the stage's weights; nobody waits for it.
    W,
    /// Sends the stage's output to the next stage.
    SendF,
    /// Receives the stage's input from the previous stage.
    RecvF,
    /// Sends the gradient of the stage's input to the previous stage.
    SendB,
    /// Receives the gradient of the stage's output from the next stage.
    RecvB,
}

impl Kind {
    const ALL: [Kind; 8] =
        [Kind::F, Kind::B, Kind::I, Kind::W, Kind::SendF, Kind::RecvF, Kind::SendB, Kind::RecvB];

    /// A send or receive: it moves a tensor between ranks and computes nothing.
    pub fn is_transfer(self) -> bool {
        matches!(self, Kind::SendF | Kind::RecvF | Kind::SendB | Kind::RecvB)
    }
}

/// One step of a rank. Prints and parses as stage, kind, microbatch: `2F0`, `1I3`, `3SEND_F1`, `0RECV_B2`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Action {
    /// The stage that computes, sends or receives; from 0.
    pub stage: usize,
    /// What it does.
    pub kind: Kind,
    /// The microbatch it does it for; from 0.
    pub microbatch: usize,
}

impl Action {
    /// The action `kind` of `stage` for `microbatch`.
    pub const fn new(stage: usize, kind: Kind, microbatch: usize) -> Self {
        Action { stage, kind, microbatch }
    }
}

/// For each rank, the actions of one training step in the order in which the rank does them.
///
/// The fields are open, so a value may hold nonsense; [`Schedule::validate`] tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    /// The generator's name, or whatever the author called it; one line.
    pub name: String,
    /// How many stages the network is cut into. Stage 0 reads the data; the last computes the loss.
    pub stages: usize,
    /// How many microbatches make one training step.
    pub microbatches: usize,
    /// `ranks[r]` is the list of rank `r`.
    pub ranks: Vec<Vec<Action>>,
}

impl Schedule {
    /// The rank that owns `stage`, or `None` if no rank has an action of it.
    pub fn rank_of(&self, stage: usize) -> Option<usize> {
        self.ranks.iter().position(|actions| actions.iter().any(|action| action.stage == stage))
    }

    /// Whether a stage's backward pass is split into I and W.
    pub fn splits(&self, stage: usize) -> bool {
        self.ranks.iter().flatten().any(|action| action.stage == stage && action.kind == Kind::I)
    }

    /// Whether it holds any send or receive. Without any, a stage's needs are met by the mere end of its neighbour's
    /// action; with some, every need between ranks must be met by a transfer.
    pub fn is_lowered(&self) -> bool {
        self.ranks.iter().flatten().any(|action| action.kind.is_transfer())
    }
}
