//! What the page is told: plain data that serialises as `web/src/protocol.ts` has it.

use serde::Serialize;

use super::settings::Settings;
use crate::error::Error;
use crate::layers::Layers;
use crate::schedule::Cause;
use crate::timeline::{self, Event, Track, What};

/// A run that has been opened.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    /// The settings, with the cuts that were found.
    pub settings: Settings,
    /// Physical GPUs among the devices.
    pub adapters: usize,
    /// By rank.
    pub devices: Vec<Device>,
    /// The model's layers.
    pub layers: Vec<Layer>,
    /// The layers of each stage.
    pub stages: Vec<Stage>,
    /// The schedule's text, a line a device.
    pub schedule: String,
    /// Parameters of the model.
    pub parameters: usize,
    /// A step of the plan as simulated.
    pub predicted: Step,
    /// Tokens of a step.
    pub tokens: usize,
    /// Steps done.
    pub step: u64,
}

/// A device of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Device {
    /// Its number: its place in [`Settings::slow`].
    pub index: usize,
    /// Its adapter's name.
    pub name: String,
    /// What tells adapters apart.
    pub adapter: String,
    /// Bytes that the plan allocates on it.
    pub bytes: u64,
    /// Its stages.
    pub stages: Vec<usize>,
    /// Its layers in words.
    pub layers: String,
    /// How many times as long it is made to take.
    pub slow: f64,
}

/// A layer of the model.
#[derive(Clone, Debug, Serialize)]
pub struct Layer {
    /// What people call it.
    pub name: String,
    /// Its kind.
    pub kind: &'static str,
    /// Where a cut before it is.
    pub start: Layers,
    /// Parameters that are its own.
    pub parameters: usize,
}

/// A run of layers.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Stage {
    /// Number of the first layer.
    pub first: usize,
    /// Number of the layer after the last.
    pub end: usize,
}

/// A step that was trained.
#[derive(Clone, Debug, Serialize)]
pub struct Stepped {
    /// Steps done, this one included.
    pub step: u64,
    /// Nats a token, before the update.
    pub loss: f64,
    /// Norm of the gradient.
    pub norm: f64,
    /// Wall-clock seconds.
    pub seconds: f64,
    /// Tokens of the batch over these seconds.
    pub tokens_per_second: f64,
    /// What every device did.
    pub measured: Step,
    /// What it was predicted to do, with what has been measured so far.
    pub predicted: Step,
    /// Loss of the same step on one device.
    pub reference: Option<f64>,
    /// Decimal digits to which the two agree; [`EQUAL`] for the same bits.
    pub digits: Option<u32>,
}

/// Digits of two losses that are the same bits.
pub const EQUAL: u32 = 17;

/// A step on a clock of its own, measured or simulated.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Step {
    /// Of the whole step.
    pub seconds: f64,
    /// What devices did.
    pub spans: Vec<Span>,
    /// What they did not, and why.
    pub gaps: Vec<Gap>,
    /// Part of all devices' time, up to the last computation, in which they had nothing to do.
    pub bubble: f64,
    /// Part of the step in which each device worked.
    pub busy: Vec<f64>,
}

/// Something that a device did.
#[derive(Clone, Debug, Serialize)]
pub struct Span {
    rank: usize,
    track: &'static str,
    kind: &'static str,
    label: String,
    stage: i64,
    microbatch: i64,
    start: f64,
    end: f64,
    bytes: u64,
}

/// A time in which a device has nothing to do.
#[derive(Clone, Debug, Serialize)]
pub struct Gap {
    rank: usize,
    cause: &'static str,
    peer: i64,
    start: f64,
    end: f64,
}

/// What the model can do.
#[derive(Clone, Debug, Serialize)]
pub struct Shown {
    /// Steps done.
    pub step: u64,
    /// What it writes; empty where it answers questions.
    pub text: String,
    /// Some questions that it has never seen, and its answers.
    pub examples: Vec<Example>,
    /// Part of the questions that it answers right.
    pub accuracy: Option<f64>,
    /// Questions asked.
    pub asked: usize,
}

/// A question with what the model says.
#[derive(Clone, Debug, Serialize)]
pub struct Example {
    /// The question.
    pub question: String,
    /// What the model says.
    pub answer: String,
    /// What is right.
    pub right: String,
}

/// What the planner would do.
#[derive(Clone, Debug, Serialize)]
pub struct Advice {
    /// In sentences.
    pub words: Vec<String>,
    /// To take over.
    pub settings: Settings,
    /// A step of it as simulated.
    pub predicted: Step,
    /// How many times as fast as the plan in force is predicted to be.
    pub gain: f64,
}

/// What went wrong.
#[derive(Clone, Debug, Serialize)]
pub struct Failure {
    /// What the page offers depends on it.
    pub kind: &'static str,
    /// One line.
    pub message: String,
    /// The device, if it is one's failure; -1 for none in particular.
    pub device: i64,
}

impl Failure {
    /// For the page. `device` is whose failure it is, if that is known.
    pub fn new(error: &Error, device: Option<usize>) -> Failure {
        let kind = match error {
            Error::NoAdapter { .. } => "no-webgpu",
            Error::Lost { .. } => "lost",
            Error::OutOfMemory { .. } | Error::Memory { .. } | Error::Binding { .. } => "memory",
            error if error.is_input() => "input",
            _ => "failed",
        };
        // Below the message of a schedule there is a drawing.
        let message = error.to_string().lines().next().unwrap_or_default().to_string();
        Failure { kind, message, device: number(device) }
    }
}

fn number(position: Option<usize>) -> i64 {
    position.map_or(-1, |position| position as i64)
}

impl Step {
    /// For the page.
    pub fn new(step: &timeline::Step) -> Step {
        let ranks = step.idle.len();
        let last = step.cells.iter().map(|cell| cell.end).fold(0.0, f64::max);
        let idle: f64 = step.gaps.iter().map(|gap| gap.end - gap.start).sum();
        let gaps = step.gaps.iter().map(|gap| Gap {
            rank: gap.rank,
            cause: Cause::name(gap.cause),
            peer: number(gap.peer),
            start: gap.start,
            end: gap.end,
        });
        Step {
            seconds: step.seconds,
            spans: step.timeline.events.iter().map(Span::new).collect(),
            gaps: gaps.collect(),
            bubble: if last > 0.0 && ranks > 0 { idle / (last * ranks as f64) } else { 0.0 },
            busy: (0..ranks).map(|rank| step.busy(rank)).collect(),
        }
    }
}

impl Span {
    fn new(event: &Event) -> Span {
        let track = match event.track {
            Track::Compute => "compute",
            Track::Copy => "copy",
            Track::Host => "host",
        };
        let action = match event.what {
            What::Action(action) if !action.kind.is_whole() => Some(action),
            What::Action(_) | What::Losses => None,
        };
        Span {
            rank: event.rank,
            track,
            kind: event.kind().name(),
            label: event.what.to_string(),
            stage: number(action.map(|action| action.stage)),
            microbatch: number(action.map(|action| action.microbatch)),
            start: event.start,
            end: event.end,
            bytes: event.bytes,
        }
    }
}
