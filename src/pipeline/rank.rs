//! One device at work: runs its list of actions over its stages and links.

use std::cell::LazyCell;
use std::collections::{HashMap, HashSet};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures_channel::mpsc;
use futures_util::{FutureExt, StreamExt};

use super::batch::Batch;
use super::decode::{Decoder, Grow, Logits};
use super::exchange::Exchange;
use super::host::HostLink;
use super::link::{Incoming, Outgoing, Recorded};
use super::log::{Log, State};
use crate::error::{Error, Result, said};
use crate::gpu::{Buffer, Device, Recorder, now};
use crate::graph::{DType, Fed, Phase, ValueId};
use crate::ops::parameters::{AdamStep, Parameters, Part};
use crate::ops::program::{Slots, StageProgram};
use crate::ops::sort_rows;
use crate::schedule::{Action, Kind, Placement, SlotPlan};
use crate::timeline::{Event, What};

/// Submissions a rank hands to its device before the first has finished: a GPU starts the next without waiting for the
/// host. Lavapipe runs one at a time and makes the host wait inside the second call, deaf to its neighbours.
const DEPTH: usize = 2;
const SOFTWARE_DEPTH: usize = 1;
/// Seconds of device time a submission should stay under: desktops stutter and drivers reset when it is long.
const SUBMISSION_SECONDS: f64 = 0.1;

/// Submissions in which the backward pass goes that completes gradients which others wait for.
const PARTS: f64 = 8.0;

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

/// A submission in the making.
pub(super) struct Recording<'d> {
    device: &'d Device,
    pub(super) recorder: Recorder<'d>,
    /// Copies in it that something follows.
    pub(super) copies: Vec<Recorded>,
    what: What,
    /// Floating-point operations in it.
    used: f64,
    /// Since when it has been recorded.
    started: f64,
}

impl<'d> Recording<'d> {
    pub(super) fn new(device: &'d Device, what: What) -> Recording<'d> {
        Recording { device, recorder: device.record(), copies: Vec::new(), what, used: 0.0, started: now() }
    }

    /// As what the host's copies for it are logged: of weights that come, and of gradients that leave.
    pub(super) fn received(&self) -> What {
        self.part(Kind::G)
    }

    pub(super) fn sent(&self) -> What {
        self.part(Kind::R)
    }

    fn part(&self, kind: Kind) -> What {
        match self.what {
            What::Action(of) if !of.kind.is_whole() => What::Action(Action::of_stage(of.stage, kind)),
            what => what,
        }
    }
}

/// Where a program's launches stop.
#[derive(Default)]
struct Stops {
    at: HashSet<usize>,
    /// The gradients that leave: by parameter, and from which launch to before which each is made.
    gradients: Vec<(ValueId, std::ops::Range<usize>)>,
}

/// One device with everything it holds.
pub(super) struct Rank {
    pub(super) index: usize,
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
    pub(super) vocabulary: usize,
    pub(super) context: usize,
    pub(super) losses: Option<(Buffer, Buffer)>,
    /// Where texts grow.
    pub(super) decoder: Option<Decoder>,
    pub(super) sums: Buffer,
    pub(super) log: Arc<Log>,
    pub(super) steps: usize,
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
            let reply = match command {
                Command::Step(batch) => self.step(&batch).await.map(Reply::Step)?,
                Command::Evaluate(batch) => self.evaluate(&batch).await.map(Reply::Values)?,
                Command::Update(step) => self.update(step).await.map(|()| Reply::Done)?,
                Command::Settle => self.settle().await.map(|()| Reply::Done)?,
                Command::Infer(batch, rows) => self.infer(&batch, &rows).await.map(Reply::Values)?,
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

    /// Hands over a submission that the host has been recording since `started`, once the device has room for it.
    pub(super) async fn submit(&self, recorder: Recorder<'_>, what: What, flops: f64, started: f64) {
        self.log.host(what, started);
        let depth = if self.device.capabilities().software { SOFTWARE_DEPTH } else { DEPTH };
        self.device.below(depth).await;
        let handed = now();
        self.log.submitted(what, flops);
        let log = self.log.clone();
        recorder.submit(move || log.finished());
        self.log.host(what, handed);
    }

    async fn step(&mut self, batch: &Batch) -> Result<StepPart> {
        self.steps += 1;
        let actions = self.actions.clone();
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

    /// Floating-point operations of a step's actions, as the log counts them.
    pub(super) fn step_flops(&self) -> f64 {
        self.actions.iter().map(|&action| self.flops_of(action)).sum()
    }

    fn flops_of(&self, action: Action) -> f64 {
        let stage = self.stages.get(&action.stage);
        let flops = |stage: &Stage| {
            phases(action.kind).iter().flat_map(|&phase| stage.program.launch_flops(phase)).sum::<f64>()
        };
        stage.map_or(0.0, flops)
    }

    /// Hands over what has been recorded of something, and goes on recording it.
    pub(super) async fn submit_part(&self, recording: &mut Recording<'_>) {
        let recorder = std::mem::replace(&mut recording.recorder, recording.device.record());
        self.submit(recorder, recording.what, recording.used, recording.started).await;
        recording.copies.drain(..).for_each(Recorded::submitted);
        (recording.used, recording.started) = (0.0, now());
        self.log.state(State::Working(recording.what));
    }

    /// Hands over the last of it.
    pub(super) async fn submit_last(&self, recording: Recording<'_>) {
        let Recording { recorder, copies, what, used, started, .. } = recording;
        self.submit(recorder, what, used, started).await;
        copies.into_iter().for_each(Recorded::submitted);
    }

    /// Runs one action: receive, record, submit in parts, send. A send belongs to the action that makes the data, a
    /// receive to the one that needs it; the schedule's own transfers are there so that its proof can see them.
    async fn compute(&mut self, action: Action, batch: &Batch) -> Result<()> {
        let device = self.device.clone();
        let mut recording = Recording::new(&device, What::Action(action));
        let received = self.receive(action, &mut recording.recorder).await?;
        recording.copies.extend(received);
        recording.started = now();
        self.log.state(State::Working(recording.what));
        if action.kind == Kind::F {
            self.feed(action, batch)?;
        }
        let slots = self.slots(action);
        let budget = SUBMISSION_SECONDS
            * self.log.rate().unwrap_or(if device.capabilities().software { 2e9 } else { 1e10 });
        let completes = self.exchange.completes(action);
        // What others wait for leaves part by part.
        let budget = match completes {
            true => budget.min(self.flops_of(action) / PARTS),
            false => budget,
        };
        let missing = || no_stage(action);
        // Launches of the phases before.
        let mut before = 0;
        for &phase in phases(action.kind) {
            let stops = self.stops(action, phase, completes)?;
            let flops = self.stages.get(&action.stage).ok_or_else(missing)?.program.launch_flops(phase);
            let mut from = 0;
            while from < flops.len() {
                if recording.used > 0.0 && recording.used + flops[from] > budget {
                    self.host.iter_mut().for_each(|host| host.flush(&mut recording));
                    self.submit_part(&mut recording).await;
                    self.progress(completes.then_some((action.stage, before + from))).await?;
                    self.log.state(State::Working(recording.what));
                    recording.started = now();
                }
                let mut to = from;
                while to < flops.len()
                    && (to == from || !stops.at.contains(&to) && recording.used + flops[to] <= budget)
                {
                    recording.used += flops[to];
                    to += 1;
                }
                if stops.at.contains(&from) {
                    let of = (action.stage, phase);
                    self.before_launch(&mut recording, of, &stops.gradients, from).await?;
                }
                let stage = self.stages.get_mut(&action.stage).ok_or_else(missing)?;
                stage.program.record(&mut recording.recorder, &self.parameters, phase, from..to, slots)?;
                if stops.at.contains(&to) {
                    self.after_launch(&mut recording, action, &stops.gradients, to).await?;
                }
                from = to;
            }
            before += flops.len();
        }
        let sent = self.send(action, &mut recording.recorder, slots).await?;
        recording.copies.extend(sent);
        self.host.iter_mut().for_each(|host| host.flush(&mut recording));
        self.submit_last(recording).await;
        device.check(&format!("rank {} ran {action}", self.index))
    }

    /// Where a program's launches stop for what comes from the host or goes there.
    fn stops(&self, action: Action, phase: Phase, completes: bool) -> Result<Stops> {
        let mut stops = Stops::default();
        let Some(host) = &self.host else { return Ok(stops) };
        let program = &self.stages.get(&action.stage).ok_or_else(|| no_stage(action))?.program;
        if host.sends(completes) {
            stops.gradients = program.gradients(phase);
            stops.at.extend(stops.gradients.iter().flat_map(|(_, made)| [made.start, made.end]));
        }
        if host.streams_weights() {
            stops.at.extend(program.passing(phase).into_iter().map(|(_, first)| first));
        }
        Ok(stops)
    }

    fn slots(&self, action: Action) -> Slots {
        let pick = |plan: &SlotPlan| plan.slot.get(action.microbatch).copied().unwrap_or(0);
        let stage = self.stages.get(&action.stage);
        let stash = stage.map_or(0, |s| pick(&s.stash));
        Slots { stash, gradient: stage.map_or(0, |s| pick(&s.gradient)) }
    }

    /// The hops of an action's microbatch before and after its stage; of those that the last has not, no hop has the number.
    pub(super) fn hops(&self, action: Action) -> [usize; 2] {
        let hop = |boundary: Option<usize>| {
            let boundary = boundary.filter(|boundary| boundary + 1 < self.placement.stages());
            boundary.map_or(usize::MAX, |boundary| self.placement.hop(boundary, action.microbatch))
        };
        [hop(action.stage.checked_sub(1)), hop(Some(action.stage))]
    }

    /// Waits for what the action needs from a neighbour and records its copy into place.
    async fn receive(&mut self, action: Action, recorder: &mut Recorder<'_>) -> Result<Option<Recorded>> {
        let (slots, [before, after]) = (self.slots(action), self.hops(action));
        let log = self.log.clone();
        let stage = self.stages.get_mut(&action.stage).ok_or_else(|| no_stage(action))?;
        let (ends, value, kind) = (&mut stage.ends, stage.program.stage(), action.kind);
        let (incoming, value, kind) = match kind {
            Kind::F => (ends.forward_in.get_mut(&before), value.input, Kind::RecvF),
            Kind::I | Kind::B => (ends.backward_in.get_mut(&after), value.d_output, Kind::RecvB),
            _ => return Ok(None),
        };
        let (Some(incoming), Some(value)) = (incoming, value) else { return Ok(None) };
        let to = stage.program.range(&self.parameters, value, slots)?;
        let receive = What::Action(Action { kind, ..action });
        log.state(State::Waiting(receive));
        let (recorded, copy) = incoming.record(recorder, &[(to, 0)], action.microbatch).await?;
        log.copied(receive, copy);
        Ok(Some(recorded))
    }

    /// Records the copy of what the action made for a neighbour, and of the losses.
    async fn send(
        &mut self,
        action: Action,
        recorder: &mut Recorder<'_>,
        slots: Slots,
    ) -> Result<Option<Recorded>> {
        let [before, after] = self.hops(action);
        let stage = self.stages.get_mut(&action.stage).ok_or_else(|| no_stage(action))?;
        if action.kind == Kind::F
            && let (Some(loss), Some((losses, _))) = (stage.program.stage().loss, &self.losses)
        {
            let from = stage.program.range(&self.parameters, loss, slots)?;
            let offset = from.bytes * action.microbatch as u64;
            recorder.copy(&from.buffer, from.offset, losses, offset, from.bytes);
        }
        let (outgoing, value) = match action.kind {
            Kind::F => (stage.ends.forward_out.get_mut(&after), stage.program.stage().output),
            Kind::I | Kind::B => (stage.ends.backward_out.get_mut(&before), stage.program.stage().d_input),
            _ => return Ok(None),
        };
        let (Some(outgoing), Some(value)) = (outgoing, value) else { return Ok(None) };
        let from = stage.program.range(&self.parameters, value, slots)?;
        outgoing.record(recorder, &[(from, 0)], action.microbatch).await.map(Some)
    }

    /// Uploads what a stage is fed of its microbatch.
    fn feed(&self, action: Action, batch: &Batch) -> Result<()> {
        let stage = self.stages.get(&action.stage).ok_or_else(|| no_stage(action))?;
        let slots = self.slots(action);
        let rows = self.batch * self.sequence;
        let rows = action.microbatch * rows..(action.microbatch + 1) * rows;
        let begun = |at: usize| batch.starts.get(rows.start + at).copied().unwrap_or(0);
        let starts = LazyCell::new(|| (0..rows.len()).map(begun).collect::<Vec<u32>>());
        let place = |at: usize| (at % self.sequence) as u32 - begun(at);
        let places = LazyCell::new(|| (0..rows.len()).map(place).collect::<Vec<u32>>());
        let by_token = LazyCell::new(|| sort_rows(&batch.inputs[rows.clone()], self.vocabulary));
        let by_place = LazyCell::new(|| sort_rows(&places, self.context));
        for (fed, id) in stage.program.stage().graph.fed() {
            let values: &[u32] = match fed {
                Fed::Tokens => &batch.inputs[rows.clone()],
                Fed::TokenSegments => &by_token.0,
                Fed::TokenOrder => &by_token.1,
                Fed::Targets => &batch.targets[rows.clone()],
                Fed::Starts => &starts,
                Fed::Places => &places,
                Fed::PlaceSegments => &by_place.0,
                Fed::PlaceOrder => &by_place.1,
                // They come over a link.
                Fed::Input | Fed::OutputGradient => continue,
                Fed::Positions | Fed::Last | Fed::Cache(_) | Fed::Argument(_) => {
                    let message = format!("{action} wants {fed}, which no batch has");
                    return Err(Error::Shape { op: "executor", message });
                }
            };
            let range = stage.program.range(&self.parameters, id, slots)?;
            self.device.upload(&range.buffer, range.offset, bytemuck::cast_slice(values));
        }
        Ok(())
    }

    /// The forward actions alone. Where the schedule has backward actions between them a send may have to wait for the
    /// receiver; it does not wait for ever, because the schedule itself is an order in which no ring overflows.
    async fn run_forward(&mut self, batch: &Batch) -> Result<()> {
        for action in self.actions.clone().into_iter().filter(|action| action.kind == Kind::F) {
            self.compute(action, batch).await?;
        }
        Ok(())
    }

    /// Forward only; the last stage answers the loss of every row.
    async fn evaluate(&mut self, batch: &Batch) -> Result<Vec<f32>> {
        self.run_forward(batch).await?;
        let losses = match &self.losses {
            None => Vec::new(),
            Some((losses, staging)) => {
                let started = now();
                let mut recorder = self.device.record();
                recorder.copy(losses, 0, staging, 0, losses.bytes());
                self.submit(recorder, What::Losses, 0.0, started).await;
                self.read_losses().await?
            }
        };
        self.device.below(1).await;
        self.log.take_events();
        self.device.check("evaluating")?;
        Ok(losses)
    }

    /// The loss of every row of the rank's microbatches, one after another, that a finished submission has copied; on the last
    /// stage.
    pub(super) async fn read_losses(&self) -> Result<Vec<f32>> {
        let Some((losses, staging)) = &self.losses else { return Ok(Vec::new()) };
        let all: Vec<f32> =
            bytemuck::pod_collect_to_vec(&self.device.read_staging(staging, losses.bytes()).await?);
        let (rows, last) = (self.batch * self.sequence, self.placement.stages() - 1);
        let own = all.chunks(rows).enumerate().filter(|(m, _)| self.placement.rank(last, *m) == self.index);
        Ok(own.flat_map(|(_, losses)| losses).copied().collect())
    }

    /// Forward only; the last stage answers the logits of the given rows.
    async fn infer(&mut self, batch: &Batch, rows: &[usize]) -> Result<Vec<f32>> {
        self.run_forward(batch).await?;
        self.log.take_events();
        let mut logits = Vec::new();
        for stage in self.stages.values() {
            if stage.ends.forward_out.is_empty()
                && let Some(output) = stage.program.stage().output
            {
                let range = stage.program.range(&self.parameters, output, Slots { stash: 0, gradient: 0 })?;
                let width = 4 * self.vocabulary as u64;
                for &row in rows {
                    let part = range.buffer.range(range.offset + row as u64 * width, width);
                    logits.extend(self.device.read_f32(&part).await?);
                }
            }
        }
        Ok(logits)
    }
}

/// The phases that an action runs.
pub(super) fn phases(kind: Kind) -> &'static [Phase] {
    match kind {
        Kind::F => &[Phase::Forward],
        Kind::B => &[Phase::Input, Phase::Weight],
        Kind::I => &[Phase::Input],
        Kind::W => &[Phase::Weight],
        _ => &[],
    }
}

fn no_stage(action: Action) -> Error {
    Error::Shape { op: "executor", message: format!("{action} is not on this device") }
}
