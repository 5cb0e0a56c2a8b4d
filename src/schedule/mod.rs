//! When each device computes what: pipeline schedules as plain data.
//!
//! A [`Schedule`] holds an ordered list of [`Action`]s for each rank, and nothing else says when things happen. It is
//! generated ([`generate`]), searched for given devices ([`synthesise`]) or written by hand, prints and parses
//! ([`std::fmt::Display`], [`std::str::FromStr`]), is turned from computation only into computation with transfers
//! ([`Schedule::lowered`]) and into a whole step ([`Schedule::completed`]), is proved to end ([`Schedule::validate`]),
//! timed on devices that [`Costs`] describe ([`simulate`], [`Simulator`]) and drawn ([`grid`]):
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
//! is not a rank: one rank may have several stages, in any order, and several ranks may have a stage, each for some of the
//! microbatches ([`Placement`]). The notation is that of PyTorch's
//! `torch.distributed.pipelining`. What each action waits for stands in one table of edges, which the proof, the
//! simulator and the attribution of idle time read.
//!
//! Three rules keep a run's results independent of its schedule. Every microbatch passes every stage exactly once; a
//! rank adds up a stage's weight gradients in microbatch order; and a rank does its list in order, waiting where an input is
//! not there yet. Sends never wait, because the transport holds as many messages as the schedule needs; receives do.

mod auto;
mod check;
mod clock;
mod costs;
mod draw;
mod edges;
mod generate;
mod idle;
mod index;
mod lower;
mod memory;
mod order;
mod placement;
pub(crate) mod random;
mod replicate;
mod simulate;
mod slots;
mod text;
mod times;
mod whole;
mod zero_bubble;

pub use auto::{Effort, synthesise};
pub use costs::{Costs, Exchange, Hop, Hops, Jitter, RankCost, StageCost};
pub use draw::grid;
pub use generate::{ALL_NAMES, AUTO, NAMES, default_chunks, generate, generate_chunked, stage_ranks};
pub use idle::{Cause, Gap, Idle, attribute};
pub use placement::{Placement, Replica};
pub use replicate::{replicate, replicate_in_turn};
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
    /// Clears the gradients of all weights of the rank, once a step, before any is added to.
    C,
    /// Sends the rank's gradients of a stage's weights to the ranks that own them: of a stage that several ranks have, or of
    /// a parameter that a stage of the rank shares with that stage on another.
    R,
    /// Adds the gradients of a stage's weights that others have sent to those of what the rank owns.
    A,
    /// Sums the squares of the gradients of all that the rank owns: its part of the norm of the whole gradient.
    N,
    /// Updates the weights that the rank owns, and sends them where they are used too. It needs the norm, so every rank's
    /// [`Kind::N`].
    U,
    /// Receives the new weights of a stage that other ranks own.
    G,
}

/// What an action is one of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    /// Of a stage, for each microbatch.
    Microbatch,
    /// Of a stage, once a step.
    Stage,
    /// Of a rank, once a step.
    Rank,
}

impl Kind {
    const ALL: [Kind; 14] = [
        Kind::F,
        Kind::B,
        Kind::I,
        Kind::W,
        Kind::SendF,
        Kind::RecvF,
        Kind::SendB,
        Kind::RecvB,
        Kind::C,
        Kind::R,
        Kind::A,
        Kind::N,
        Kind::U,
        Kind::G,
    ];

    /// F, B, I or W: it computes for a microbatch.
    pub fn computes(self) -> bool {
        matches!(self, Kind::F | Kind::B | Kind::I | Kind::W)
    }

    /// A send or receive between neighbouring stages: it moves a tensor between ranks and computes nothing.
    pub fn is_transfer(self) -> bool {
        matches!(self, Kind::SendF | Kind::RecvF | Kind::SendB | Kind::RecvB)
    }

    /// C, R, A, N, U or G: it stands for the whole step.
    pub fn is_whole(self) -> bool {
        self.scope() != Scope::Microbatch
    }

    pub(crate) fn scope(self) -> Scope {
        match self {
            Kind::C | Kind::N | Kind::U => Scope::Rank,
            Kind::R | Kind::A | Kind::G => Scope::Stage,
            _ => Scope::Microbatch,
        }
    }
}

/// One step of a rank. Prints and parses as stage, kind, microbatch: `2F0`, `1I3`, `3SEND_F1`, `0RECV_B2`. What is done once
/// a step has no microbatch (`0R`, `0G`), and if it is done for all stages of a rank, no stage either (`C`, `N`, `U`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Action {
    /// The stage that computes, sends or receives; from 0. 0 where the action has none.
    pub stage: usize,
    /// What it does.
    pub kind: Kind,
    /// The microbatch it does it for; from 0. 0 where the action has none.
    pub microbatch: usize,
}

impl Action {
    /// The action `kind` of `stage` for `microbatch`.
    pub const fn new(stage: usize, kind: Kind, microbatch: usize) -> Self {
        Action { stage, kind, microbatch }
    }

    /// What a rank does once a step for all its stages.
    pub const fn of_rank(kind: Kind) -> Self {
        Action { stage: 0, kind, microbatch: 0 }
    }

    /// What a rank does once a step for one stage.
    pub const fn of_stage(stage: usize, kind: Kind) -> Self {
        Action { stage, kind, microbatch: 0 }
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
    /// The rank that has `stage`, the first if several have, or `None` if no rank has it.
    pub fn rank_of(&self, stage: usize) -> Option<usize> {
        let has = |action: &Action| action.stage == stage && !action.kind.is_whole();
        self.ranks.iter().position(|actions| actions.iter().any(has))
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

    /// Whether it holds any action that stands for the whole step. Then it must hold all: it says how a step begins and
    /// ends too.
    pub fn is_complete(&self) -> bool {
        self.ranks.iter().flatten().any(|action| action.kind.is_whole())
    }

    /// The computations alone, as they are written by hand.
    pub fn computation(&self) -> Schedule {
        let computed =
            |actions: &Vec<Action>| actions.iter().copied().filter(|action| action.kind.computes()).collect();
        Schedule { ranks: self.ranks.iter().map(computed).collect(), ..self.clone() }
    }
}
