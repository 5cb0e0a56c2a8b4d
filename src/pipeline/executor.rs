//! Starts one rank a device and drives them: the global view of a run.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;

use futures_channel::mpsc;
use futures_util::StreamExt;

use super::batch::Batch;
use super::launch::{Threads, build};
use super::log::{Log, State};
use super::owners::{Holder, Holders};
use super::plan::Plan;
use super::rank::{Command, Rank, Reply};
use super::store::Store;
use super::watch::Watch;
use crate::error::{Error, Result};
use crate::gpu::{Device, now};
use crate::graph::DType;
use crate::model::Parameter;
use crate::model::tensor::Run;
use crate::ops::parameters::{AdamStep, Part};
use crate::plan::Sharding;
use crate::timeline::{Event, What};

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
    /// The parts of each parameter that devices have, of those in order; itself where it is not divided.
    parts: Vec<Vec<Parameter>>,
    holders: Holders,
    /// The rank that tells the losses of the last stage, by microbatch.
    last: Vec<usize>,
    /// How many devices divide each layer.
    pub(super) members: usize,
    /// Tokens of the vocabulary.
    pub(super) vocabulary: usize,
    /// Logits of groups of texts that have not come from all members of a gang.
    pub(super) parts_of_logits: HashMap<usize, BTreeMap<usize, Vec<f32>>>,
    sent: Vec<u64>,
    /// What is in the host's memory.
    pub(super) store: Option<Arc<Store>>,
    sharding: Sharding,
    pub(super) devices: Vec<Device>,
    /// Tokens of a step.
    rows: usize,
    /// Floating-point operations of a step.
    flops: f64,
    training: bool,
    threads: Threads,
}

impl Drop for Executor {
    /// Waits for the ranks' threads: a process that ends while one of them still gives back its device takes the
    /// driver down under it. Not for one that has stalled: a driver that never returns must not keep that from being said.
    fn drop(&mut self) {
        self.commands.clear();
        self.replies.close();
        self.store.iter().for_each(|store| store.close());
        let asked = now();
        let last_sign = |rank: usize| match self.logs[rank].standing() {
            (State::Idle, _) => asked,
            (_, sign) => sign,
        };
        self.threads.join(|rank| now() - last_sign(rank));
    }
}

impl Executor {
    /// Allocates and compiles everything, one device after another, and starts the ranks.
    pub fn launch(plan: Plan, devices: &[Device]) -> Result<Executor> {
        let (parameters, parts) = plan.divided().into_iter().unzip();
        let (members, vocabulary) = (plan.members.len(), plan.setup.model.vocabulary);
        let log = |(rank, device): (usize, &Device)| Arc::new(Log::new(rank, device.capabilities().software));
        let logs: Vec<Arc<Log>> = devices.iter().enumerate().map(log).collect();
        let names = devices.iter().map(|d| d.info().name.clone()).collect();
        let holders = plan.holders.clone();
        let last = plan.placement.stages() - 1;
        let last = (0..plan.schedule.microbatches).map(|m| plan.devices(plan.placement.rank(last, m)).start);
        let last = last.collect();
        let rows = plan.setup.batch * plan.setup.sequence * plan.schedule.microbatches;
        let training = plan.setup.purpose.trains();
        let sharding = plan.setup.sharding;
        let (reply, replies) = mpsc::unbounded();
        let store = (training && sharding.through_host()).then(|| Store::new(&plan, reply.clone()));
        let kept = store.as_ref().map(|store| store.0.clone());
        let ranks = build(plan, devices, &logs, store)?;
        let flops = ranks.iter().map(Rank::step_flops).sum();
        let (mut commands, mut threads) = (Vec::new(), Threads::default());
        for rank in ranks {
            let (command, inbox) = mpsc::unbounded();
            threads.start(rank, inbox, reply.clone())?;
            commands.push(command);
        }
        let sent = vec![0; devices.len()];
        let devices = devices.to_vec();
        Ok(Executor {
            commands,
            replies,
            logs,
            names,
            parameters,
            parts,
            holders,
            last,
            members,
            vocabulary,
            parts_of_logits: HashMap::new(),
            sent,
            store: kept,
            sharding,
            devices,
            rows,
            flops,
            training,
            threads,
        })
    }

    /// Stops the ranks and resolves once their memory is free.
    pub async fn stop(&mut self) {
        self.commands.clear();
        self.store.iter().for_each(|store| store.close());
        while self.replies.next().await.is_some() {}
    }

    /// What blocks a native thread on this executor's futures, and notices a stall.
    pub fn watch(&self) -> Watch {
        Watch::new(&self.logs, &self.names, self.flops)
    }

    /// The model's parameters, in model order.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    pub(super) fn tell(&mut self, rank: usize, command: Command) -> Result<()> {
        if self.commands[rank].unbounded_send(command).is_ok() {
            return Ok(());
        }
        // The rank has said why it is gone, unless that was heard before.
        let said = std::iter::from_fn(|| self.replies.try_recv().ok());
        Err(said.filter_map(|(_, reply)| reply.err()).next().unwrap_or_else(|| stopped(&self.names[rank])))
    }

    /// The next answer, or the first failure of a rank: whatever fails because of it comes later.
    pub(super) async fn answer(&mut self) -> Result<(usize, Reply)> {
        match self.replies.next().await {
            Some((rank, reply)) => Ok((rank, reply?)),
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
        let (mut losses, mut events) = (HashMap::new(), Vec::new());
        let mut squares: BTreeMap<(String, usize), f32> = BTreeMap::new();
        let mut bytes = vec![0; count];
        let by_host = self.store.clone().filter(|_| self.sharding.by_host());
        for _ in 0..count + usize::from(by_host.is_some()) {
            let (rank, reply) = self.answer().await?;
            let part = match reply {
                Reply::Step(part) => part,
                Reply::Summed => {
                    let sums = by_host.iter().flat_map(|store| store.squares());
                    squares.extend(sums.map(|(name, chunk, sum)| ((name, chunk), sum)));
                    continue;
                }
                _ => return Err(stopped(&self.names[rank])),
            };
            losses.insert(rank, part.losses);
            events.extend(part.events);
            squares.extend(part.squares.into_iter().map(|(name, chunk, sum)| ((name, chunk), sum)));
            bytes[rank] = part.bytes - self.sent[rank];
            self.sent[rank] = part.bytes;
        }
        let losses = self.in_order(&losses);
        // Chunk by chunk, and then in parameter order, whatever device each is on: the sum does not depend on the cut.
        let of = |p: &Parameter| {
            let chunks = squares.range((p.name.clone(), 0)..=(p.name.clone(), usize::MAX));
            chunks.map(|(_, &sum)| f64::from(sum)).sum::<f64>()
        };
        let owned = self.parts.iter().flatten().map(of);
        let gradient_scale = all as f64 / counted as f64;
        let gradient_norm = gradient_scale * owned.sum::<f64>().sqrt();
        let loss = sum(&losses) / counted as f64;
        Ok(StepReport { loss, losses, gradient_scale, gradient_norm, events, bytes })
    }

    /// The losses of all microbatches in order, of those that each rank has.
    fn in_order(&self, losses: &HashMap<usize, Vec<f32>>) -> Vec<f32> {
        let rows = self.rows / self.last.len().max(1);
        let mut parts: HashMap<usize, _> =
            losses.iter().map(|(&rank, all)| (rank, all.chunks(rows))).collect();
        let next = |rank: &usize| parts.get_mut(rank).and_then(Iterator::next).unwrap_or_default();
        self.last.iter().flat_map(next).copied().collect()
    }

    /// Targets that count; there must be some, and as many rows as a step has.
    fn counted(&self, batch: &Batch) -> Result<usize> {
        let unlike = |list: &[u32]| list.len() != self.rows;
        if unlike(&batch.inputs)
            || unlike(&batch.targets)
            || !batch.starts.is_empty() && unlike(&batch.starts)
        {
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
        let mut losses = HashMap::new();
        for _ in 0..self.commands.len() {
            if let (rank, Reply::Values(part)) = self.answer().await? {
                losses.insert(rank, part);
            }
        }
        Ok((sum(&self.in_order(&losses)), counted))
    }

    /// One AdamW step on every device.
    pub async fn update(&mut self, step: AdamStep) -> Result<()> {
        let Some(store) = self.store.clone() else { return self.tell_all(|| Command::Update(step)).await };
        for rank in 0..self.commands.len() {
            self.tell(rank, Command::Update(step))?;
        }
        if self.sharding.by_host() {
            let started = now();
            store.update(step);
            self.logs.iter().for_each(|log| log.host(What::UPDATE, started));
        }
        // Where devices own weights, the host has the new ones too before anybody asks for them.
        for _ in 0..self.commands.len() + usize::from(!self.sharding.by_host()) {
            self.answer().await?;
        }
        Ok(())
    }

    /// Makes a rank's device wait after each action until that has taken so many times as long: 1 to let it be.
    ///
    /// # Errors
    ///
    /// Those of a rank that has stopped.
    pub fn slow(&mut self, rank: usize, times: f64) -> Result<()> {
        self.tell(rank, Command::Slow(times))
    }

    /// Sets what gradients are taken times while they are in f16, a power of 2: 1 at first. What steps give does not contain it.
    ///
    /// # Errors
    ///
    /// Those of a rank that has stopped.
    pub fn scale(&mut self, scale: f32) -> Result<()> {
        (0..self.commands.len()).try_for_each(|rank| self.tell(rank, Command::Scale(scale)))
    }

    /// Whether any device computes in f16.
    pub fn computes_in_f16(&self) -> bool {
        self.devices.iter().any(|device| device.capabilities().f16)
    }

    /// Waits until every device has done all that it was given: an update returns before its end.
    pub async fn settle(&mut self) -> Result<()> {
        self.tell_all(|| Command::Settle).await
    }

    /// Tells every rank the same, and waits until each has done it.
    async fn tell_all(&mut self, command: impl Fn() -> Command) -> Result<()> {
        for rank in 0..self.commands.len() {
            self.tell(rank, command())?;
        }
        for _ in 0..self.commands.len() {
            self.answer().await?;
        }
        Ok(())
    }

    /// Logits, V each, of these rows of a (B,T) microbatch; for a plan without training.
    pub async fn infer(&mut self, tokens: Vec<u32>, rows: Vec<usize>) -> Result<Vec<f32>> {
        if tokens.len() != self.rows || rows.iter().any(|&row| row >= self.rows) {
            let message = format!("{} tokens, and rows {rows:?}; the plan has {}", tokens.len(), self.rows);
            return Err(Error::Shape { op: "executor", message });
        }
        let batch = Arc::new(Batch { inputs: tokens, ..Batch::default() });
        for rank in 0..self.commands.len() {
            self.tell(rank, Command::Infer(batch.clone(), rows.clone()))?;
        }
        let mut logits = BTreeMap::new();
        for _ in 0..self.commands.len() {
            if let (rank, Reply::Values(values)) = self.answer().await?
                && !values.is_empty()
            {
                logits.insert(rank, values);
            }
        }
        Ok(self.side_by_side(logits))
    }

    /// Part of a parameter, from the devices that own it.
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
        let parts = self.parts_of(name, first + count)?;
        let mut all = vec![0.0; count];
        for piece in parts {
            let runs = piece.runs(first..first + count);
            let Some((start, end)) = ends(&runs) else { continue };
            let values = self.read_part(&piece, part, start, end - start).await?;
            for Run { part, whole } in runs {
                let (from, to) = (part - start, whole.start - first);
                all[to..to + whole.len()].copy_from_slice(&values[from..from + whole.len()]);
            }
        }
        Ok(all)
    }

    /// The parts of a parameter of at least `len` elements.
    pub(super) fn parts_of(&self, name: &str, len: usize) -> Result<Vec<Parameter>> {
        let number = self.parameters.iter().position(|p| p.name == name);
        let unknown = || Error::config("parameter", format!("{name} is not in this model"));
        let number = number.ok_or_else(unknown)?;
        let has = self.parameters[number].len();
        if len > has {
            return Err(Error::config("parameter", format!("{name} has {has} elements, not {len}")));
        }
        Ok(self.parts[number].clone())
    }

    /// As [`Executor::read_from`] of a part that devices have.
    async fn read_part(
        &mut self,
        parameter: &Parameter,
        part: Part,
        first: usize,
        count: usize,
    ) -> Result<Vec<f32>> {
        let name = &parameter.name;
        if let Some(store) = self.store.as_ref().filter(|store| store.keeps(parameter, part)) {
            return store.read(name, part, first, count);
        }
        let missing = || Error::config("parameter", format!("{name} is on no device"));
        let holders = self.holders.get(name).ok_or_else(missing)?;
        let mut owners: Vec<(Range<usize>, usize)> = match parameter.frozen || !self.training {
            true => holders.first().map(|holder| (0..parameter.len(), holder.rank)).into_iter().collect(),
            false => holders.iter().map(|holder| (holder.owned.clone(), holder.rank)).collect(),
        };
        owners.retain(|(owned, _)| owned.start < first + count && first < owned.end);
        owners.sort_by_key(|(owned, _)| owned.start);
        let mut all = Vec::with_capacity(count);
        for (owned, rank) in owners {
            let part_of = owned.start.max(first)..owned.end.min(first + count);
            self.tell(rank, Command::Read(name.clone(), part, part_of.start, part_of.len()))?;
            match self.answer().await? {
                (_, Reply::Values(values)) => all.extend(values),
                _ => return Err(stopped(&self.names[rank])),
            }
        }
        Ok(all)
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
        let whole = first..first + values.len();
        let mut written = 0;
        for piece in self.parts_of(name, whole.end)? {
            let runs = piece.runs(whole.clone());
            let Some((start, _)) = ends(&runs) else { continue };
            let of = |run: &Run| values[run.whole.start - first..run.whole.end - first].iter().copied();
            let values: Arc<Vec<f32>> = Arc::new(runs.iter().flat_map(of).collect());
            if let Some(store) = &self.store {
                store.write(&piece.name, part, start, &values)?;
            }
            for held in self.places(&piece, part) {
                self.tell(held.rank, Command::Write(held.name, part, start, values.clone()))?;
                written += 1;
            }
        }
        for _ in 0..written {
            self.answer().await?;
        }
        Ok(())
    }

    /// The ranks that hold part of what devices have of a parameter: of a weight all that have it, of the rest who owns some of
    /// it.
    pub(super) fn places(&self, parameter: &Parameter, part: Part) -> Vec<Held> {
        let holders = self.holders.get(&parameter.name).into_iter().flatten();
        let held = holders.filter_map(|Holder { rank, name, owned, .. }| {
            let all = 0..parameter.len();
            let owned = if self.training { owned.clone() } else { 0..0 };
            let (streams, by_host) = match self.training {
                true => (self.sharding.streams_weights(), self.sharding.by_host()),
                false => (false, false),
            };
            let mut types: Vec<(DType, Range<usize>)> = match part {
                Part::Weight => {
                    let stored = parameter.weights.stored(!owned.is_empty());
                    let masters = |dtype| dtype == DType::F32 && parameter.weights.packed();
                    let held = |&dtype: &DType| {
                        (dtype, if masters(dtype) || streams { owned.clone() } else { all.clone() })
                    };
                    stored.iter().map(held).collect()
                }
                Part::Gradient if self.sharding.streams_gradients() && self.training => {
                    vec![(DType::F32, owned)]
                }
                Part::Gradient => vec![(DType::F32, all)],
                Part::First | Part::Second if by_host => return None,
                Part::First | Part::Second => vec![(DType::F32, owned)],
            };
            types.retain(|(_, elements)| !elements.is_empty());
            if types.is_empty() {
                return None;
            }
            Some(Held { rank: *rank, name: name.clone(), types })
        });
        held.collect()
    }
}

/// Part of a parameter on a rank.
pub(super) struct Held {
    pub(super) rank: usize,
    /// What the parameter is called there.
    pub(super) name: String,
    /// As what it is held, and which elements.
    pub(super) types: Vec<(DType, Range<usize>)>,
}

/// Where runs of a part begin and end there.
pub(super) fn ends(runs: &[Run]) -> Option<(usize, usize)> {
    let (first, last) = (runs.first()?, runs.last()?);
    Some((first.part, last.part + last.whole.len()))
}

fn sum(losses: &[f32]) -> f64 {
    losses.iter().map(|&loss| loss as f64).sum()
}

fn stopped(name: &str) -> Error {
    Error::failed(name, "its thread has stopped and takes no more work")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::OpenOptions;
    use crate::mesh::{Division, Wire};
    use crate::model::{Kind, ModelConfig, Weights};
    use crate::pipeline::{Setup, Use};
    use crate::schedule::generate;

    /// Two stages on two devices.
    fn pair() -> (Executor, [Device; 2]) {
        let model = ModelConfig {
            kind: Kind::Gpt2,
            layers: 1,
            width: 8,
            heads: 1,
            context: 8,
            vocabulary: 16,
            ..Default::default()
        };
        let setup = Setup {
            model,
            adapter: None,
            weights: Weights::F32,
            logits: crate::graph::LOGIT_BYTES,
            batch: 1,
            sequence: 8,
            schedule: generate("gpipe", 2, 2).unwrap(),
            cuts: None,
            shared: false,
            recompute: Vec::new(),
            sharding: Sharding::default(),
            tensor: Division::none(),
            wire: Wire::F32,
            host: None,
            purpose: Use::Training,
            budgets: vec![None; 2],
        };
        let open = |_| pollster::block_on(Device::open(0, OpenOptions::default())).unwrap();
        let devices = [0, 1].map(open);
        let executor = Executor::launch(Plan::for_devices(setup, &devices).unwrap(), &devices).unwrap();
        (executor, devices)
    }

    fn step(executor: &mut Executor) -> Result<StepReport> {
        let batch = Batch { inputs: vec![1; 16], targets: vec![2; 16], ..Batch::default() };
        executor.watch().block_on(executor.step(batch))
    }

    #[test]
    fn of_a_run_that_loses_a_device_the_loss_is_told_and_not_what_follows_from_it_and_nothing_goes_on() {
        for lost in 0..2 {
            let (mut executor, devices) = pair();
            step(&mut executor).unwrap();
            devices[lost].lose();
            let error = step(&mut executor).unwrap_err();
            assert!(matches!(error, Error::Lost { .. }), "{error:?}");
            assert!(error.to_string().contains(&format!("while rank {lost} ran ")), "{error}");
            let error = executor.watch().block_on(executor.settle()).unwrap_err();
            assert!(matches!(error, Error::Failed { .. }) && !error.is_input(), "{error:?}");
            let ranks: Vec<_> = executor.logs.iter().map(Arc::downgrade).collect();
            drop(executor);
            // A lost device keeps what was to be done when it would have finished.
            drop(devices);
            assert!(ranks.iter().all(|log| log.strong_count() == 0), "a rank goes on");
        }
    }

    #[test]
    fn a_thread_that_dies_is_a_failure_that_names_its_device() {
        let (mut executor, _) = pair();
        // The rank takes it for granted that a batch has as many tokens as the plan says.
        executor.tell(0, Command::Step(Arc::new(Batch::default()))).unwrap();
        let error = executor.watch().block_on(executor.answer()).err().unwrap();
        let said = error.to_string();
        assert!(matches!(error, Error::Failed { .. }) && !error.is_input(), "{error:?}");
        assert!(said.starts_with("rank 0 (") && said.contains("has died in action 0F0"), "{said}");
        let error = executor.watch().block_on(executor.infer(vec![1; 3], vec![0])).unwrap_err();
        assert!(error.to_string().contains("3 tokens"), "{error}");
    }
}
