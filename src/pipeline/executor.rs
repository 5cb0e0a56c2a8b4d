//! Starts one rank a device and drives them: the global view of a run.

use std::collections::HashMap;
use std::sync::Arc;

use futures_channel::mpsc;
use futures_util::StreamExt;

use super::batch::Batch;
use super::decode::{Grow, Readback};
use super::link::{Incoming, Outgoing, connect, connect_local};
use super::log::{Log, State};
use super::plan::Plan;
use super::rank::{Command, Rank, Replies, Reply, Stage};
use super::tied::tie;
use super::timeline::Event;
use crate::error::{Error, Result};
use crate::gpu::{Device, Mapping};
use crate::graph::DType;
use crate::model::Parameter;
use crate::ops::parameters::{AdamStep, Parameters, Part};
use crate::ops::program::StageProgram;
use crate::schedule::{Action, Kind};

/// Seconds without progress after which a device counts as stalled.
const STALL_SECONDS: f64 = 25.0;

/// What a step gave.
#[derive(Clone, Debug)]
pub struct StepReport {
    /// Mean loss in nats a token that counts, before the update.
    pub loss: f64,
    /// Loss of each row of each microbatch; 0 where the target does not count.
    pub losses: Vec<f32>,
    /// Makes the gradients on the devices, which are divided by all tokens of the batch, those of `loss`: 1 where every
    /// token counts.
    pub gradient_scale: f64,
    /// Norm of the whole gradient of `loss`, before clipping.
    pub gradient_norm: f64,
    /// Everything that every device did.
    pub events: Vec<Event>,
    /// Bytes each device has sent over its links in this step.
    pub bytes: Vec<u64>,
}

/// Ranks at work. Dropping it stops them.
pub struct Executor {
    commands: Vec<mpsc::UnboundedSender<Command>>,
    replies: mpsc::UnboundedReceiver<(usize, Result<Reply>)>,
    logs: Vec<Arc<Log>>,
    names: Vec<String>,
    parameters: Vec<Parameter>,
    owner: HashMap<String, usize>,
    /// Parameters tied to one that another rank owns, by the owner's name: (rank, name).
    users: HashMap<String, (usize, String)>,
    sent: Vec<u64>,
    pub(super) devices: Vec<Device>,
    /// Tokens of a step.
    rows: usize,
    training: bool,
}

impl Executor {
    /// Allocates and compiles everything, one device after another, and starts the ranks.
    pub fn launch(plan: Plan, devices: &[Device]) -> Result<Executor> {
        let parameters = plan.model.parameters();
        let logs: Vec<Arc<Log>> = (0..devices.len()).map(|rank| Arc::new(Log::new(rank))).collect();
        let names = devices.iter().map(|d| d.info().name.clone()).collect();
        let tied = plan.tied().into_iter();
        let users = tied.map(|(name, owner, user, _)| (owner, (user, name))).collect();
        let rows = plan.setup.batch * plan.setup.sequence * plan.schedule.microbatches;
        let training = plan.setup.purpose.trains();
        let ranks = build(plan, devices, &logs)?;
        let mut owner = HashMap::new();
        for rank in &ranks {
            for parameter in rank.parameters.list() {
                if rank.parameters.owns(&parameter.name) {
                    owner.insert(parameter.name.clone(), rank.index);
                }
            }
        }
        let (reply, replies) = mpsc::unbounded();
        let commands = ranks
            .into_iter()
            .map(|rank| {
                let (command, inbox) = mpsc::unbounded();
                start(rank, inbox, reply.clone())?;
                Ok(command)
            })
            .collect::<Result<Vec<_>>>()?;
        let sent = vec![0; devices.len()];
        let devices = devices.to_vec();
        Ok(Executor {
            commands,
            replies,
            logs,
            names,
            parameters,
            owner,
            users,
            sent,
            devices,
            rows,
            training,
        })
    }

    /// Stops the ranks and resolves once their memory is free.
    pub async fn stop(&mut self) {
        self.commands.clear();
        while self.replies.next().await.is_some() {}
    }

    /// What blocks a native thread on this executor's futures, and notices a stall.
    pub fn watch(&self) -> Watch {
        Watch { logs: self.logs.clone(), names: self.names.clone() }
    }

    /// The model's parameters, in model order.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    pub(super) fn tell(&self, rank: usize, command: Command) -> Result<()> {
        self.commands[rank].unbounded_send(command).map_err(|_| stopped(&self.names[rank]))
    }

    /// The next answer; an error of any rank comes first.
    pub(super) async fn answer(&mut self) -> Result<(usize, Reply)> {
        match self.replies.next().await {
            Some((rank, Ok(reply))) => Ok((rank, reply)),
            Some((_, Err(error))) => Err(error),
            None => Err(stopped("every device")),
        }
    }

    /// Runs the schedule on a batch: forward, backward, gradient norm. Weights stay.
    ///
    /// # Errors
    ///
    /// [`Error::Data`] for a batch without a target that counts; those of a device.
    pub async fn step(&mut self, batch: Batch) -> Result<StepReport> {
        let (counted, all) = (self.counted(&batch)?, batch.targets.len());
        let batch = Arc::new(batch);
        let count = self.commands.len();
        for rank in 0..count {
            self.tell(rank, Command::Step(batch.clone()))?;
        }
        let (mut losses, mut events, mut squares) = (Vec::new(), Vec::new(), HashMap::new());
        let mut bytes = vec![0; count];
        for _ in 0..count {
            let (rank, reply) = self.answer().await?;
            let Reply::Step(part) = reply else { return Err(stopped(&self.names[rank])) };
            if !part.losses.is_empty() {
                losses = part.losses;
            }
            events.extend(part.events);
            squares.extend(part.squares);
            bytes[rank] = part.bytes - self.sent[rank];
            self.sent[rank] = part.bytes;
        }
        // In parameter order, whatever device each is on: the sum does not depend on the cut.
        let owned = self.parameters.iter().filter_map(|p| squares.get(&p.name));
        let gradient_scale = all as f64 / counted as f64;
        let gradient_norm = gradient_scale * owned.sum::<f64>().sqrt();
        let loss = sum(&losses) / counted as f64;
        Ok(StepReport { loss, losses, gradient_scale, gradient_norm, events, bytes })
    }

    /// Targets that count; there must be some, and as many rows as a step has.
    fn counted(&self, batch: &Batch) -> Result<usize> {
        if batch.inputs.len() != self.rows || batch.targets.len() != self.rows {
            let (inputs, targets) = (batch.inputs.len(), batch.targets.len());
            let message = format!("{inputs} tokens with {targets} targets; a step takes {}", self.rows);
            return Err(Error::Shape { op: "executor", message });
        }
        match batch.counted() {
            0 => Err(Error::data(
                "a batch has no token whose loss counts; use a longer train.sequence or batch",
            )),
            counted => Ok(counted),
        }
    }

    /// The sum of the losses of a batch, in nats, and how many of its targets count; for a plan that trains or
    /// evaluates.
    ///
    /// # Errors
    ///
    /// As [`Executor::step`].
    pub async fn evaluate(&mut self, batch: Batch) -> Result<(f64, usize)> {
        let counted = self.counted(&batch)?;
        let batch = Arc::new(batch);
        for rank in 0..self.commands.len() {
            self.tell(rank, Command::Evaluate(batch.clone()))?;
        }
        let mut total = 0.0;
        for _ in 0..self.commands.len() {
            if let (_, Reply::Values(losses)) = self.answer().await? {
                total += sum(&losses);
            }
        }
        Ok((total, counted))
    }

    /// One AdamW step on every device.
    pub async fn update(&mut self, step: AdamStep) -> Result<()> {
        for rank in 0..self.commands.len() {
            self.tell(rank, Command::Update(step))?;
        }
        for _ in 0..self.commands.len() {
            self.answer().await?;
        }
        Ok(())
    }

    /// Logits, V each, of these rows of a (B,T) microbatch; for a plan without training.
    pub async fn infer(&mut self, tokens: Vec<u32>, rows: Vec<usize>) -> Result<Vec<f32>> {
        let batch = Arc::new(Batch { inputs: tokens, targets: Vec::new() });
        for rank in 0..self.commands.len() {
            self.tell(rank, Command::Infer(batch.clone(), rows.clone()))?;
        }
        let mut logits = Vec::new();
        for _ in 0..self.commands.len() {
            if let (_, Reply::Values(values)) = self.answer().await?
                && !values.is_empty()
            {
                logits = values;
            }
        }
        Ok(logits)
    }

    /// Sends new tokens of a group of texts on their way through the pipeline, for a plan that decodes. The logits come
    /// in the order of the calls, from [`Executor::logits`]; other groups may follow at once.
    pub fn grow(&self, grow: Grow) -> Result<()> {
        let grow = Arc::new(grow);
        (0..self.commands.len()).try_for_each(|rank| self.tell(rank, Command::Decode(grow.clone())))
    }

    /// The next group's logits, (B,V), and its number.
    pub async fn logits(&mut self) -> Result<(usize, Vec<f32>)> {
        loop {
            if let (_, Reply::Logits(logits)) = self.answer().await? {
                return logits.take();
            }
        }
    }

    /// Part of a parameter, from the device that owns it.
    pub async fn read(&mut self, name: &str, part: Part) -> Result<Vec<f32>> {
        let len = self.parameters.iter().find(|p| p.name == name).map_or(0, Parameter::len);
        self.read_from(name, part, 0, len).await
    }

    /// As [`Executor::read`] for `count` of the elements, from number `first` on.
    pub async fn read_from(
        &mut self,
        name: &str,
        part: Part,
        first: usize,
        count: usize,
    ) -> Result<Vec<f32>> {
        let unknown = || Error::config("parameter", format!("{name} has no elements {first} + {count}"));
        let parameter = self.parameters.iter().find(|p| p.name == name).ok_or_else(unknown)?;
        let rank = self.owner.get(name).copied().ok_or_else(unknown)?;
        if first + count > parameter.len() {
            return Err(unknown());
        }
        self.tell(rank, Command::Read(name.into(), part, first, count))?;
        match self.answer().await? {
            (_, Reply::Values(values)) => Ok(values),
            _ => Err(stopped(&self.names[rank])),
        }
    }

    /// Overwrites part of a parameter; a weight also where it is tied to.
    pub async fn write(&mut self, name: &str, part: Part, values: &[f32]) -> Result<()> {
        let len = self.parameters.iter().find(|p| p.name == name).map_or(values.len(), |p| p.len());
        if len != values.len() {
            let message = format!("{name} has {len} elements, not {}", values.len());
            return Err(Error::config("parameter", message));
        }
        self.write_from(name, part, 0, values.to_vec()).await
    }

    /// As [`Executor::write`] for some of the elements, from number `first` on.
    pub async fn write_from(&mut self, name: &str, part: Part, first: usize, values: Vec<f32>) -> Result<()> {
        let places = self.places(name, part, first + values.len())?;
        let values = Arc::new(values);
        for (rank, name) in &places {
            self.tell(*rank, Command::Write(name.clone(), part, first, values.clone()))?;
        }
        for _ in &places {
            self.answer().await?;
        }
        Ok(())
    }

    /// As what the rank that has a parameter of this name holds part of it.
    pub(super) fn stored(&self, name: &str, part: Part) -> &'static [DType] {
        let parameter = self.parameters.iter().find(|p| p.name == name && part == Part::Weight);
        parameter.map_or(&[DType::F32], |p| p.stored(self.training))
    }

    /// The ranks that hold part of a parameter of at least `len` elements, and its name there: the owner's and, of a
    /// weight, also where it is tied to.
    pub(super) fn places(&self, name: &str, part: Part, len: usize) -> Result<Vec<(usize, String)>> {
        let Some(parameter) = self.parameters.iter().find(|p| p.name == name) else {
            return Err(Error::config("parameter", format!("{name} is not in this model")));
        };
        if len > parameter.len() {
            let message = format!("{name} has {} elements, not {len}", parameter.len());
            return Err(Error::config("parameter", message));
        }
        let mut places = vec![(self.owner.get(name).copied().unwrap_or(0), name.to_string())];
        if part == Part::Weight {
            places.extend(self.users.get(name).cloned());
        }
        Ok(places)
    }
}

fn sum(losses: &[f32]) -> f64 {
    losses.iter().map(|&loss| loss as f64).sum()
}

fn stopped(name: &str) -> Error {
    Error::Gpu {
        adapter: name.into(),
        context: "running".into(),
        message: "the device's thread has stopped".into(),
    }
}

#[cfg(not(target_arch = "wasm32"))]
fn start(rank: Rank, inbox: mpsc::UnboundedReceiver<Command>, reply: Replies) -> Result<()> {
    let device = rank.device.clone();
    let thread = std::thread::Builder::new().name(format!("rank {}", rank.index));
    // Not joined: a driver that never returns must not keep the process from reporting it.
    let spawned = thread.spawn(move || device.block_on(rank.serve(inbox, reply)));
    spawned.map(drop).map_err(Error::io("thread"))
}

#[cfg(target_arch = "wasm32")]
fn start(rank: Rank, inbox: mpsc::UnboundedReceiver<Command>, reply: Replies) -> Result<()> {
    wasm_bindgen_futures::spawn_local(rank.serve(inbox, reply));
    Ok(())
}

/// Two ends for each direction of each boundary.
type Ends = HashMap<(Kind, usize), (Option<Outgoing>, Option<Incoming>)>;

fn links(plan: &Plan, devices: &[Device]) -> Result<Ends> {
    let mut ends: Ends = HashMap::new();
    for boundary in 0..plan.stages.len() - 1 {
        let (bytes, slots) = (plan.activation_bytes(), plan.link_slots(boundary));
        let (before, after) = (&devices[plan.rank_of(boundary)], &devices[plan.rank_of(boundary + 1)]);
        let directions = [(Kind::F, before, after), (Kind::B, after, before)];
        for (kind, from, to) in directions.into_iter().take(plan.directions(boundary) as usize) {
            let (out, inward) = match plan.crosses(boundary) {
                true => connect(from, to, bytes, slots)?,
                false => connect_local(from, bytes, slots)?,
            };
            ends.insert((kind, boundary), (Some(out), Some(inward)));
        }
    }
    Ok(ends)
}

fn build(plan: Plan, devices: &[Device], logs: &[Arc<Log>]) -> Result<Vec<Rank>> {
    let training = plan.setup.purpose.trains();
    let mut ends = links(&plan, devices)?;
    let scores = plan.setup.purpose.scores();
    let ties = plan.exchanged();
    let (loss_bytes, last) = (plan.loss_bytes(), plan.rank_of(plan.stages.len() - 1));
    let logit_buffers = plan.logit_buffers();
    let mut ranks = Vec::new();
    for part in plan.ranks {
        let (index, device) = (part.rank, &devices[part.rank]);
        let owned = part.layout.owned_chunks() as u64;
        let parameters = Parameters::new(device, part.layout, training)?;
        let mut stages = HashMap::new();
        for stage in part.stages {
            let at = stage.stage;
            let (stash, gradient) = (stage.stash, stage.gradient);
            let program = StageProgram::new(device, stage.graph, stage.memory, stash.count, gradient.count)?;
            let single = stage.single.map(|(graph, memory)| {
                StageProgram::with_caches(device, graph, memory, 0, program.caches().to_vec())
            });
            let single = single.transpose()?;
            let mut out = |kind, boundary| ends.get_mut(&(kind, boundary)).and_then(|e| e.0.take());
            let (forward_out, backward_out) =
                (out(Kind::F, at), at.checked_sub(1).and_then(|b| out(Kind::B, b)));
            let mut inward = |kind, boundary| ends.get_mut(&(kind, boundary)).and_then(|e| e.1.take());
            let (forward_in, backward_in) =
                (at.checked_sub(1).and_then(|b| inward(Kind::F, b)), inward(Kind::B, at));
            stages.insert(
                at,
                Stage {
                    program,
                    single,
                    stash,
                    gradient,
                    forward_in,
                    forward_out,
                    backward_in,
                    backward_out,
                },
            );
        }
        let losses = (scores && index == last)
            .then(|| {
                let buffer = device.buffer("losses", loss_bytes)?;
                Ok::<_, Error>((buffer, device.staging("losses", loss_bytes, Mapping::Read)?))
            })
            .transpose()?;
        let logits = logit_buffers.filter(|_| index == last);
        let logits = logits.map(|(count, bytes)| Readback::new(device, count, bytes)).transpose()?;
        let mut actions = plan.schedule.ranks[index].clone();
        actions.retain(|action| !action.kind.is_transfer() && (training || action.kind == Kind::F));
        let sums = device.staging("sums", if training { 4 * owned } else { 0 }, Mapping::Read)?;
        ranks.push(Rank {
            index,
            device: device.clone(),
            parameters,
            stages,
            actions,
            tied: Vec::new(),
            batch: plan.setup.batch,
            sequence: plan.setup.sequence,
            vocabulary: plan.setup.model.vocabulary,
            losses,
            logits,
            sums,
            log: logs[index].clone(),
            steps: 0,
        });
    }
    for (name, owner, user, home) in ties {
        tie(&mut ranks, name, owner, user, home)?;
    }
    Ok(ranks)
}

/// Sees what every rank is doing.
#[derive(Clone)]
pub struct Watch {
    logs: Vec<Arc<Log>>,
    names: Vec<String>,
}

impl Watch {
    /// The rank that has made no progress for too long, if any: one whose device works rather than one that waits
    /// for it.
    pub fn stall(&self) -> Option<Error> {
        let standings: Vec<_> = self.logs.iter().map(|log| log.standing()).collect();
        let stuck = |state: State| standings.iter().position(|s| s.0 == state && s.1 > STALL_SECONDS);
        let all_wait = standings.iter().all(|s| s.0 != State::Working);
        let rank = stuck(State::Working).or_else(|| all_wait.then(|| stuck(State::Waiting)).flatten())?;
        let (state, seconds, doing) = &standings[rank];
        let doing = match doing.parse::<Action>() {
            Ok(a) => format!("action {doing} (stage {}, microbatch {})", a.stage, a.microbatch),
            Err(_) => format!("action {doing:?}"),
        };
        let what = if *state == State::Waiting { "has waited for" } else { "has not finished" };
        let message = format!(
            "device {rank} ({}) {what} {doing} for {seconds:.0} s; its driver does not return",
            self.names[rank]
        );
        Some(Error::Stall { message })
    }

    /// Runs a future on this thread, looking for stalls: the explicit blocking wrapper for native programs.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn block_on<T>(&self, future: impl Future<Output = Result<T>>) -> Result<T> {
        struct Unpark(std::thread::Thread);
        impl std::task::Wake for Unpark {
            fn wake(self: Arc<Self>) {
                self.0.unpark();
            }
        }
        let waker = std::task::Waker::from(Arc::new(Unpark(std::thread::current())));
        let mut context = std::task::Context::from_waker(&waker);
        let mut future = std::pin::pin!(future);
        loop {
            if let std::task::Poll::Ready(output) = future.as_mut().poll(&mut context) {
                return output;
            }
            if let Some(stall) = self.stall() {
                return Err(stall);
            }
            std::thread::park_timeout(std::time::Duration::from_millis(200));
        }
    }
}
