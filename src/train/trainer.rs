//! The loop's body: batch, step, clip, update.

use std::ops::Range;

use serde::Serialize;

use super::config::{Config, Recompute};
use super::data::{Batches, Corpus};
use super::evaluate::{Evaluation, evaluate};
use super::loss_scale::LossScale;
use super::optimizer::{adam_step, learning_rate};
use crate::error::{Error, Result};
use crate::gpu::{Device, now};
use crate::layers::Layers;
use crate::model::Parameter;
use crate::pipeline::{Executor, Plan, Setup, Use, Watch};
use crate::plan::text::{counted, layers_of};
use crate::schedule::{self, Schedule};
use crate::timeline::{DeviceName, Event, Timeline, Track};

/// One row of `metrics.jsonl`.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Steps done, this one included.
    pub step: u64,
    /// Mean loss of the batch in nats a token, before the update.
    pub loss: f64,
    /// Mean loss on the text for evaluation after the update, if it was due.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub valid_loss: Option<f64>,
    /// Norm of the whole gradient before clipping.
    pub grad_norm: f64,
    /// What gradients were taken times while they were in f16; none where no device computes in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<f64>,
    /// The gradient was not finite at this loss scale, so weights have stayed as they were.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub skipped: bool,
    /// Learning rate of the update.
    pub learning_rate: f64,
    /// Tokens of the batch over the seconds of the step.
    pub tokens_per_second: f64,
    /// Wall-clock seconds.
    pub step_seconds: f64,
    /// Seconds that the plan promised; none for a run without a planner.
    pub predicted_step_seconds: Option<f64>,
    /// Steps that were done when this plan came into force: at the start, when the run was resumed, or when it moved.
    pub plan_since_step: u64,
    /// That plan in words: schedule, microbatches, layers of each device.
    pub plan: String,
    /// Each device in pipeline order.
    pub devices: Vec<DeviceRow>,
}

/// A device's share of a step.
#[derive(Clone, Debug, Serialize)]
pub struct DeviceRow {
    /// Its number.
    pub device: usize,
    /// Number and name of its adapter.
    pub adapter: String,
    /// Part of the step in which its queue worked: [`Timeline::busy_fraction`].
    pub busy_fraction: f64,
    /// Part of the step in which its thread recorded, submitted or copied.
    pub host_fraction: f64,
    /// Bytes that it sent over links.
    pub bytes_moved: u64,
}

/// What is said of a plan in a row.
pub(super) struct Shape {
    schedule: String,
    microbatches: usize,
    /// Of each rank.
    layers: Vec<Layers>,
}

impl Shape {
    pub(super) fn of(plan: &Plan) -> Shape {
        let size = |layers: &Range<usize>| layers.clone().map(|layer| plan.model.layer_size(layer)).sum();
        let layers = plan.ranks.iter().map(|rank| rank.layers.iter().map(size).sum());
        let Schedule { name, microbatches, .. } = &plan.schedule;
        Shape { schedule: name.clone(), microbatches: *microbatches, layers: layers.collect() }
    }

    fn words(&self, devices: &[DeviceName]) -> String {
        let layers = devices.iter().map(|device| device.number).zip(self.layers.iter().copied());
        format!("{}, {}, {}", self.schedule, counted(self.microbatches, "microbatch"), layers_of(layers))
    }
}

/// A model in training.
pub struct Trainer {
    pub(super) config: Config,
    pub(super) executor: Executor,
    batches: Batches,
    valid: Option<Corpus>,
    pub(super) devices: Vec<DeviceName>,
    pub(super) shape: Shape,
    pub(super) step: u64,
    /// Steps that were done when the plan in force began.
    pub(super) since: u64,
    /// For devices that compute in f16.
    pub(super) scale: LossScale,
    pub(super) timeline: Vec<Event>,
    predicted: Option<f64>,
}

impl Trainer {
    /// The setup that a config asks for without a planner, on devices with these budgets: what is left open is 1f1b, the
    /// most microbatches that the config leaves to choose from, and stages balanced by floating-point operations.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for a schedule that only a planner can make and for replicas that have not as many devices each, and
    /// those of [`schedule::generate`].
    pub fn setup(config: &Config, budgets: Vec<Option<u64>>) -> Result<Setup> {
        let name = config.pipeline.schedule.as_deref().unwrap_or("1f1b");
        if name == schedule::AUTO {
            let message = "\"auto\" is made by the planner, for times that it measures; let it plan, or name another schedule";
            return Err(Error::config("pipeline.schedule", message));
        }
        let microbatches = config.microbatches().last().copied().unwrap_or(1);
        let shares = config.mesh.shares(microbatches);
        let members = config.mesh.division().members();
        let ranks = budgets.len() / (shares.len() * members);
        if ranks * shares.len() * members != budgets.len() || ranks == 0 {
            let (devices, replicas) = (budgets.len(), shares.len());
            let message = match members {
                1 => format!(
                    "{replicas} replicas cannot have {devices} devices alike; use a multiple of {replicas}, or let the planner choose"
                ),
                _ => format!(
                    "{replicas} x {members} parts (mesh.data x mesh.tensor) cannot have {devices} devices alike; use a multiple of {}",
                    replicas * members
                ),
            };
            return Err(Error::config(if members > 1 { "mesh.tensor" } else { "mesh.data" }, message));
        }
        let replicas: Result<Vec<Schedule>> =
            shares.iter().map(|&share| schedule::generate(name, ranks, share)).collect();
        let schedule = config.mesh.sharding()?.replicate(&replicas?)?;
        Trainer::setup_in(config, schedule, budgets)
    }

    /// The same in this schedule, whatever the config says of schedule and microbatches.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for a schedule for another number of devices.
    pub fn setup_in(config: &Config, schedule: Schedule, budgets: Vec<Option<u64>>) -> Result<Setup> {
        let tensor = config.mesh.division();
        let (ranks, devices) = (schedule.ranks.len() * tensor.members(), budgets.len());
        if ranks != devices {
            let message = format!("it is for {ranks} devices, and the run has {devices}");
            return Err(Error::config("pipeline.schedule", message));
        }
        let microbatches = schedule.microbatches;
        Ok(Setup {
            model: config.model.clone(),
            adapter: config.lora()?,
            weights: config.train.weights,
            logits: config.train.logit_bytes(),
            batch: config.train.batch / microbatches,
            sequence: config.train.sequence,
            recompute: match &config.pipeline.recompute {
                Some(Recompute::All(true)) => (0..schedule.stages).collect(),
                Some(Recompute::Stages(stages)) => stages.clone(),
                Some(Recompute::All(false)) | None => Vec::new(),
            },
            schedule,
            cuts: config.pipeline.cuts.clone(),
            shared: config.shared,
            sharding: config.mesh.sharding()?,
            tensor,
            wire: config.mesh.wire,
            host: None,
            purpose: Use::Training,
            budgets,
        })
    }

    /// Allocates, compiles and starts; weights are not set yet.
    pub fn launch(config: &Config, plan: Plan, devices: &[Device], batches: Batches) -> Result<Trainer> {
        let shape = Shape::of(&plan);
        let executor = Executor::launch(plan, devices)?;
        let (config, timeline, devices) = (config.clone(), Vec::new(), names(devices));
        let (valid, predicted) = (None, None);
        Ok(Trainer {
            config,
            executor,
            batches,
            valid,
            devices,
            shape,
            step: 0,
            since: 0,
            scale: LossScale::default(),
            timeline,
            predicted,
        })
    }

    /// Sets what its devices are called; until then their positions are their numbers.
    pub fn call(&mut self, devices: Vec<DeviceName>) {
        self.devices = devices;
    }

    /// Sets the text for evaluation.
    pub fn evaluate_on(&mut self, valid: Option<Corpus>) {
        self.valid = valid;
    }

    /// Sets the seconds that a step is said to take.
    pub fn predict(&mut self, seconds: f64) {
        self.predicted = Some(seconds);
    }

    /// For blocking on this trainer's futures.
    pub fn watch(&self) -> Watch {
        self.executor.watch()
    }

    /// Steps done.
    pub fn step_number(&self) -> u64 {
        self.step
    }

    /// Everything that every device did in the last step.
    pub fn events(&self) -> &[Event] {
        &self.timeline
    }

    /// The data it draws from.
    pub fn batches(&self) -> &Batches {
        &self.batches
    }

    /// The executor, for reading parameters.
    pub fn executor(&mut self) -> &mut Executor {
        &mut self.executor
    }

    /// The parameters that are trained, in model order.
    pub(super) fn trained(&self) -> Vec<Parameter> {
        trained(self.executor.parameters())
    }

    /// Sets the initial weights from the seed.
    pub async fn initialise(&mut self) -> Result<()> {
        self.executor.initialise(self.config.train.seed).await
    }

    /// One step. Where a device computes in f16 and the gradient is not finite, weights stay as they are and the loss scale is
    /// halved for the next step.
    ///
    /// # Errors
    /// [`Error::Changed`] where a file of the data has: then the model is as it was before the step. [`Error::Diverged`];
    /// those of a device.
    pub async fn step(&mut self) -> Result<Row> {
        let start = now();
        let examples = self.batches.examples(self.step)?;
        let loss_scale = self.executor.computes_in_f16().then(|| self.scale.get());
        if let Some(scale) = loss_scale {
            self.executor.scale(scale as f32)?;
        }
        let report = self.executor.step(examples).await?;
        let skipped = !report.gradient_norm.is_finite() || !report.loss.is_finite();
        if skipped && loss_scale.is_none() {
            let message = format!(
                "the loss ({}) or the gradient's norm ({}) is not finite; lower train.learning_rate or train.clip_norm",
                report.loss, report.gradient_norm
            );
            return Err(Error::Diverged { step: self.step + 1, message });
        }
        if skipped {
            self.scale.bad(self.step + 1)?;
        } else {
            let mut adam =
                adam_step(&self.config.train, self.step, self.scale.skipped(), report.gradient_norm);
            adam.clip *= report.gradient_scale as f32;
            self.executor.update(adam).await?;
            if loss_scale.is_some() {
                self.scale.good();
            }
        }
        let rate = learning_rate(&self.config.train, self.step);
        self.step += 1;
        let seconds = now() - start;
        self.timeline = report.events;
        let timeline = self.timeline();
        let step = timeline.from_its_start();
        let host = |rank: usize| {
            let events = timeline.events.iter().filter(|e| e.rank == rank && e.track != Track::Compute);
            (events.map(|e| e.end - e.start).sum::<f64>() / seconds).min(1.0)
        };
        let devices = self.devices.iter().enumerate().map(|(rank, device)| DeviceRow {
            device: device.number,
            adapter: device.title(),
            busy_fraction: step.busy_fraction(rank),
            host_fraction: host(rank),
            bytes_moved: report.bytes[rank],
        });
        let devices = devices.collect();
        Ok(Row {
            step: self.step,
            loss: report.loss,
            valid_loss: None,
            grad_norm: report.gradient_norm,
            loss_scale,
            skipped,
            learning_rate: rate,
            tokens_per_second: (self.config.train.batch * self.config.train.sequence) as f64 / seconds,
            step_seconds: seconds,
            predicted_step_seconds: self.predicted,
            plan_since_step: self.since,
            plan: self.shape.words(&self.devices),
            devices,
        })
    }

    /// What every device did in the last step.
    pub fn timeline(&self) -> Timeline {
        let origin = self.timeline.iter().map(|e| e.start).fold(f64::INFINITY, f64::min);
        let shifted = self.timeline.iter().map(|e| {
            let mut event = *e;
            (event.start, event.end) = (e.start - origin, e.end - origin);
            event
        });
        let devices = self.devices.clone();
        Timeline { devices, events: shifted.collect(), step: Some(self.step) }
    }

    /// The loss on the text for evaluation, if there is any. `each` hears how many windows are done.
    pub async fn evaluate(&mut self, each: impl FnMut(usize)) -> Result<Option<Evaluation>> {
        let Some(valid) = &self.valid else { return Ok(None) };
        let train = &self.config.train;
        evaluate(&mut self.executor, valid, train.batch, train.sequence, each).await.map(Some)
    }
}

/// Of all parameters those that are trained, in their order.
pub(super) fn trained(parameters: &[Parameter]) -> Vec<Parameter> {
    parameters.iter().filter(|p| p.tied_to.is_none() && !p.frozen).cloned().collect()
}

/// Opened devices with their positions as numbers.
pub fn names(devices: &[Device]) -> Vec<DeviceName> {
    let name = |(number, device): (usize, &Device)| DeviceName {
        number,
        adapter: Some(device.info().index),
        name: device.info().name.clone(),
    };
    devices.iter().enumerate().map(name).collect()
}
