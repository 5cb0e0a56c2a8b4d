//! One device at work: runs its list of actions over its stages and links.

use std::collections::HashMap;
use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures_channel::mpsc;
use futures_util::{FutureExt, StreamExt};

use super::batch::Batch;
use super::decode::{Decoder, Grow, Logits};
use super::exchange::Exchange;
use super::gang::Gang;
use super::host::HostLink;
use super::link::{Incoming, Outgoing};
use super::log::{Log, State};
use crate::error::{Error, Result, said};
use crate::gpu::{Buffer, Device};
use crate::graph::DType;
use crate::ops::parameters::{AdamStep, Parameters, Part};
use crate::ops::program::StageProgram;
use crate::schedule::{Action, Kind, Placement, SlotPlan};
use crate::timeline::Event;

/// What a rank is told.
pub(super) enum Command {
    /// Run the schedule on this batch.
    Step(Arc<Batch>),
    /// Run its forward actions only; the last stage answers losses.
    Evaluate(Arc<Batch>),
    /// One AdamW step.
    Update(AdamStep),
    /// Wait until the device has done all that it was given.
    Settle,
    /// Make each action take so many times as long.
    Slow(f64),
    /// Take gradients so many times while they are in f16.
    Scale(f32),
    /// Logits of these rows of one microbatch, from the last stage.
    Infer(Arc<Batch>, Vec<usize>),
    /// New tokens of a group of texts; only the last stage answers, logits.
    Decode(Arc<Grow>),
    /// Copy what is in a mapped buffer over elements of part of a parameter that are held as this, from the given one on.
    Place(String, Part, DType, usize, crate::gpu::Range),
    /// Overwrite elements of part of a parameter, from the given one on.
    Write(String, Part, usize, Arc<Vec<f32>>),
    /// Read this many elements of part of a parameter, from the given one on.
    Read(String, Part, usize, usize),
}

/// What it answers.
pub(super) enum Reply {
    Step(StepPart),
    Values(Vec<f32>),
    Logits(Logits),
    /// All gradients of a step are in the host's store: from no rank.
    Summed,
    /// All new weights are: from no rank.
    Renewed,
    /// The buffer of a [`Command::Place`], mapped again.
    Placed(Buffer),
    Done,
}

/// Where answers go, with the number of the rank.
pub(super) type Replies = mpsc::UnboundedSender<(usize, Result<Reply>)>;

/// A rank's share of a step's results.
pub(super) struct StepPart {
    /// Unscaled loss of every row of its microbatches, one after another; on the last stage.
    pub(super) losses: Vec<f32>,
    /// Sum of squares of each chunk of gradients that it owns, by parameter and number of the chunk.
    pub(super) squares: Vec<(String, usize, f32)>,
    /// What was done when.
    pub(super) events: Vec<Event>,
    /// Bytes sent over links.
    pub(super) bytes: u64,
}

/// A stage with its ends and its slots.
pub(super) struct Stage {
    pub(super) program: StageProgram,
    pub(super) stash: SlotPlan,
    pub(super) gradient: SlotPlan,
    pub(super) ends: Ends,
}

/// The links of a stage on a rank, by number of the hop: one on a side, unless that side has several replicas.
#[derive(Default)]
pub(super) struct Ends {
    pub(super) forward_in: HashMap<usize, Incoming>,
    pub(super) forward_out: HashMap<usize, Outgoing>,
    pub(super) backward_in: HashMap<usize, Incoming>,
    pub(super) backward_out: HashMap<usize, Outgoing>,
}

impl Ends {
    /// Bytes sent so far.
    pub(super) fn sent(&self) -> u64 {
        self.forward_out.values().chain(self.backward_out.values()).map(|link| link.bytes).sum()
    }
}

/// One device with everything it holds.
pub(super) struct Rank {
    pub(super) index: usize,
    /// Which list of the schedule it runs: its own, or that of its gang.
    pub(super) list: usize,
    /// Its ends in the gang that divides its layers.
    pub(super) gang: Option<Gang>,
    pub(super) device: Device,
    pub(super) parameters: Parameters,
    pub(super) stages: HashMap<usize, Stage>,
    pub(super) actions: Vec<Action>,
    pub(super) placement: Arc<Placement>,
    pub(super) exchange: Exchange,
    /// The way to the host's memory, where gradients and weights go by that.
    pub(super) host: Option<HostLink>,
    /// Whether the gradients of aliases have been added to their owners' in this step.
    pub(super) folded: bool,
    pub(super) batch: usize,
    pub(super) sequence: usize,
    /// The tokens of which it has rows of the table and logits.
    pub(super) vocabulary: Range<usize>,
    pub(super) context: usize,
    pub(super) losses: Option<(Buffer, Buffer)>,
    /// Where texts grow.
    pub(super) decoder: Option<Decoder>,
    pub(super) sums: Buffer,
    pub(super) log: Arc<Log>,
    pub(super) steps: usize,
    /// How many times as long each action is to take.
    pub(super) slow: f64,
    /// What gradients are taken times while they are in f16.
    pub(super) scale: f32,
}

impl Rank {
    /// Answers commands until their sender is gone, one fails, or the device does.
    pub(super) async fn serve(mut self, mut commands: mpsc::UnboundedReceiver<Command>, replies: Replies) {
        let (index, device, log) = (self.index, self.device.clone(), self.log.clone());
        let doing = || format!("rank {index} ran {}", log.doing());
        let answering = device.unless_failed(doing, self.answer(&mut commands, &replies));
        let ended = AssertUnwindSafe(answering).catch_unwind().await.unwrap_or_else(|panic| {
            let what =
                format!("its thread has died in {}: {}; please report it", log.recording(), said(&*panic));
            Err(Error::failed(format!("rank {index} ({})", device.info().name), what))
        });
        if let Err(error) = ended {
            // Before its links and its inbox close, so that it is heard before what follows from it.
            let _ = replies.unbounded_send((index, Err(error)));
        }
        // Whoever waits for the channel's end may count on the memory being free.
        drop(self);
        drop(replies);
    }

    async fn answer(
        &mut self,
        commands: &mut mpsc::UnboundedReceiver<Command>,
        replies: &Replies,
    ) -> Result<()> {
        while let Some(command) = commands.next().await {
            self.log.state(State::Starting);
            self.device.compiled().await?;
            let reply = match command {
                Command::Step(batch) => self.step(&batch).await.map(Reply::Step)?,
                Command::Evaluate(batch) => self.evaluate(&batch).await.map(Reply::Values)?,
                Command::Update(step) => self.update(step).await.map(|()| Reply::Done)?,
                Command::Settle => self.settle().await.map(|()| Reply::Done)?,
                Command::Infer(batch, rows) => self.infer(&batch, &rows).await.map(Reply::Values)?,
                Command::Slow(times) => {
                    self.slow = times;
                    continue;
                }
                Command::Scale(scale) => {
                    if self.scale != scale {
                        self.stages.values().for_each(|stage| stage.program.scale(scale));
                        self.scale = scale;
                    }
                    continue;
                }
                // The device answers these two, when it has done them.
                Command::Decode(grow) => {
                    self.decode(&grow, replies).await?;
                    continue;
                }
                Command::Place(name, part, dtype, first, from) => {
                    self.place((&name, part, dtype), first, from, replies).await?;
                    continue;
                }
                Command::Write(name, part, first, values) => {
                    self.write(&name, part, first, &values).await.map(|()| Reply::Done)?
                }
                Command::Read(name, part, first, count) => {
                    self.read(&name, part, first, count).await.map(Reply::Values)?
                }
            };
            self.log.state(State::Idle);
            if replies.unbounded_send((self.index, Ok(reply))).is_err() {
                break;
            }
        }
        Ok(())
    }

    async fn write(&mut self, name: &str, part: Part, first: usize, values: &[f32]) -> Result<()> {
        self.parameters.write(&self.device, name, part, first, values).await?;
        // The driver keeps a copy until the next submission has finished; a model's worth of them would not fit.
        self.device.record().submit(|| ());
        self.device.below(1).await;
        self.device.check("writing a parameter")
    }

    async fn settle(&mut self) -> Result<()> {
        self.device.below(1).await;
        self.device.check("settling")
    }

    async fn read(&mut self, name: &str, part: Part, first: usize, count: usize) -> Result<Vec<f32>> {
        self.parameters.read(&self.device, name, part, first, count).await
    }

    async fn step(&mut self, batch: &Batch) -> Result<StepPart> {
        self.steps += 1;
        let actions = self.actions.clone();
        self.order(actions.iter().copied().filter(|action| !action.kind.is_whole()))?;
        self.order_gradients();
        for &action in &actions[..self.update_at()] {
            match action.kind {
                Kind::C => self.clear().await?,
                Kind::R => self.send_gradients(action.stage).await?,
                // What arrives is added at once before N, while the rank sends.
                Kind::A => {}
                Kind::N => self.norm().await?,
                _ => self.compute(action, batch).await?,
            }
            self.progress(None).await?;
        }
        self.report().await
    }

    /// From the update on, which needs the norm of all.
    async fn update(&mut self, step: AdamStep) -> Result<()> {
        let actions = self.actions.clone();
        for &action in &actions[self.update_at()..] {
            // What is received comes while the rank sends, after U.
            if action.kind == Kind::U {
                self.adam(step).await?;
            }
        }
        self.device.check(&format!("rank {} updated weights", self.index))
    }

    /// Where in its list the rank waits for the norm of the whole gradient.
    fn update_at(&self) -> usize {
        self.actions.iter().position(|action| action.kind == Kind::U).unwrap_or(self.actions.len())
    }
}
