//! The loop's body: batch, step, clip, update; and its state as checkpoint contents.

use serde::Serialize;
use serde_json::json;

use super::checkpoint::{Contents, Tensor};
use super::config::{Config, Recompute};
use super::data::Batches;
use super::optimizer::{adam_step, learning_rate};
use crate::error::{Error, Result};
use crate::gpu::{Device, now};
use crate::model::{Model, init};
use crate::ops::parameters::Part;
use crate::pipeline::timeline::{Event, Timeline, Track};
use crate::pipeline::{Executor, Plan, Setup, Use, Watch};
use crate::schedule;

/// One row of `metrics.jsonl`.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Steps done, this one included.
    pub step: u64,
    /// Mean loss of the batch in nats a token, before the update.
    pub loss: f64,
    /// Norm of the whole gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate of the update.
    pub learning_rate: f64,
    /// Tokens of the batch over the seconds of the step.
    pub tokens_per_second: f64,
    /// Wall-clock seconds.
    pub step_seconds: f64,
    /// Seconds that the plan promised; none for a run without a planner.
    pub predicted_step_seconds: Option<f64>,
    /// Each device in pipeline order.
    pub devices: Vec<DeviceRow>,
}

/// A device's share of a step.
#[derive(Clone, Debug, Serialize)]
pub struct DeviceRow {
    /// The adapter's name.
    pub adapter: String,
    /// Part of the step in which its queue worked.
    pub busy_fraction: f64,
    /// Part of the step in which its thread recorded, submitted or copied.
    pub host_fraction: f64,
    /// Bytes that it sent over links.
    pub bytes_moved: u64,
}

/// A model in training.
pub struct Trainer {
    config: Config,
    model: Model,
    executor: Executor,
    batches: Batches,
    adapters: Vec<String>,
    step: u64,
    timeline: Vec<Event>,
    predicted: Option<f64>,
}

impl Trainer {
    /// The setup that a config asks for without a planner, on devices with these budgets: what is left open is 1f1b, as
    /// many microbatches as sequences, and stages balanced by floating-point operations.
    pub fn setup(config: &Config, budgets: Vec<Option<u64>>) -> Result<Setup> {
        let microbatches = config.microbatches();
        let name = config.pipeline.schedule.as_deref().unwrap_or("1f1b");
        let schedule = schedule::generate(name, budgets.len(), microbatches)?;
        Ok(Setup {
            model: config.model.clone(),
            adapter: None,
            batch: config.train.batch / microbatches,
            sequence: config.train.sequence,
            recompute: match &config.pipeline.recompute {
                Some(Recompute::All(true)) => (0..schedule.stages).collect(),
                Some(Recompute::Stages(stages)) => stages.clone(),
                Some(Recompute::All(false)) | None => Vec::new(),
            },
            schedule,
            cuts: config.pipeline.cuts.clone(),
            purpose: Use::Training,
            budgets,
        })
    }

    /// Allocates, compiles and starts; weights are not set yet.
    pub fn launch(config: &Config, plan: Plan, devices: &[Device], batches: Batches) -> Result<Trainer> {
        let model = plan.model.clone();
        let executor = Executor::launch(plan, devices)?;
        let (config, timeline, adapters) = (config.clone(), Vec::new(), names(devices));
        Ok(Trainer { config, model, executor, batches, adapters, step: 0, timeline, predicted: None })
    }

    /// Sets the seconds that a step is said to take.
    pub fn predict(&mut self, seconds: f64) {
        self.predicted = Some(seconds);
    }

    /// Goes on with another plan: everything that training depends on moves over the host to where the plan wants it,
    /// and the next step is the one that would have been next.
    pub async fn move_to(&mut self, plan: Plan, devices: &[Device]) -> Result<()> {
        let contents = self.contents().await?;
        self.executor.stop().await;
        self.executor = Executor::launch(plan, devices)?;
        self.adapters = names(devices);
        self.restore(&contents, std::path::Path::new("the run itself")).await
    }

    /// For blocking on this trainer's futures.
    pub fn watch(&self) -> Watch {
        self.executor.watch()
    }

    /// Steps done.
    pub fn step_number(&self) -> u64 {
        self.step
    }

    /// The devices' names, in pipeline order.
    pub fn adapters(&self) -> &[String] {
        &self.adapters
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

    /// Sets the initial weights from the seed.
    pub async fn initialise(&mut self) -> Result<()> {
        for parameter in self.owned() {
            let values = init::initial(&parameter, self.config.train.seed);
            self.executor.write(&parameter.name, Part::Weight, &values).await?;
        }
        Ok(())
    }

    fn owned(&self) -> Vec<crate::model::Parameter> {
        self.executor.parameters().iter().filter(|p| p.tied_to.is_none()).cloned().collect()
    }

    /// One step.
    pub async fn step(&mut self) -> Result<Row> {
        let start = now();
        let report = self.executor.step(self.batches.batch(self.step)).await?;
        if !report.gradient_norm.is_finite() || !report.loss.is_finite() {
            return Err(Error::config(
                format!("step {}", self.step + 1),
                format!(
                    "the loss ({}) or the gradient's norm ({}) is not finite; lower train.learning_rate or train.clip_norm",
                    report.loss, report.gradient_norm
                ),
            ));
        }
        let adam = adam_step(&self.config.train, self.step, report.gradient_norm);
        self.executor.update(adam).await?;
        let rate = learning_rate(&self.config.train, self.step);
        self.step += 1;
        let seconds = now() - start;
        let fraction = |rank: usize, track: Track| {
            // The last update's own events come with this step's; they may lie before it.
            let of = report.events.iter().filter(|e| e.rank == rank && e.track == track && e.end > start);
            of.map(|e| e.end - e.start.max(start)).sum::<f64>() / seconds
        };
        let devices = self.adapters.iter().enumerate().map(|(rank, adapter)| DeviceRow {
            adapter: adapter.clone(),
            busy_fraction: fraction(rank, Track::Compute),
            host_fraction: fraction(rank, Track::Host) + fraction(rank, Track::Copy),
            bytes_moved: report.bytes[rank],
        });
        let devices = devices.collect();
        self.timeline = report.events;
        Ok(Row {
            step: self.step,
            loss: report.loss,
            grad_norm: report.gradient_norm,
            learning_rate: rate,
            tokens_per_second: (self.config.train.batch * self.config.train.sequence) as f64 / seconds,
            step_seconds: seconds,
            predicted_step_seconds: self.predicted,
            devices,
        })
    }

    /// What every device did in the last step.
    pub fn timeline(&self) -> Timeline {
        let origin = self.timeline.iter().map(|e| e.start).fold(f64::INFINITY, f64::min);
        let shifted = self.timeline.iter().map(|e| {
            let mut event = e.clone();
            (event.start, event.end) = (e.start - origin, e.end - origin);
            event
        });
        let devices = self.adapters.clone();
        Timeline { devices, events: shifted.collect() }
    }

    /// Everything that a resumed run needs.
    pub async fn contents(&mut self) -> Result<Contents> {
        let (mut model, mut optimizer) = (Vec::new(), Vec::new());
        for p in self.owned() {
            let (name, shape) = (&p.name, &p.shape);
            for (part, prefix) in [(Part::First, "exp_avg"), (Part::Second, "exp_avg_sq")] {
                let data = self.executor.read(name, part).await?;
                optimizer.push(Tensor { name: format!("{prefix}.{name}"), shape: shape.clone(), data });
            }
            let data = self.executor.read(name, Part::Weight).await?;
            model.push(Tensor { name: name.clone(), shape: shape.clone(), data });
        }
        let state = json!({ "step": self.step, "seed": self.config.train.seed, "tokenizer": self.config.data.tokenizer });
        Ok(Contents { step: self.step, config: self.model.hugging_face_config(), model, optimizer, state })
    }

    /// Takes up the state of a checkpoint, whatever number of devices wrote it.
    pub async fn restore(&mut self, contents: &Contents, path: &std::path::Path) -> Result<()> {
        let saved = Model::from_hugging_face(&contents.config)?;
        if saved.config() != self.model.config() {
            let words = |m: &crate::model::ModelConfig| {
                let json = serde_json::to_value(m).unwrap_or_default();
                json.to_string().replace(['{', '}', '"'], "").replace(':', " ")
            };
            let (there, here) = (words(saved.config()), words(self.model.config()));
            let message = format!(
                "holds another model ({there}) than the config ({here}); use the config it was trained with"
            );
            return Err(Error::checkpoint(path, message));
        }
        for p in self.owned() {
            let sources = [
                (Part::Weight, p.name.clone(), &contents.model),
                (Part::First, format!("exp_avg.{}", p.name), &contents.optimizer),
                (Part::Second, format!("exp_avg_sq.{}", p.name), &contents.optimizer),
            ];
            for (part, name, tensors) in sources {
                let values = find(tensors, &name, &p.shape, path)?;
                self.executor.write(&p.name, part, values).await?;
            }
        }
        self.step = contents.step;
        Ok(())
    }
}

fn names(devices: &[Device]) -> Vec<String> {
    devices.iter().map(|d| format!("adapter {}: {}", d.info().index, d.info().name)).collect()
}

/// A tensor by name, its shape checked.
pub fn find<'a>(
    tensors: &'a [Tensor],
    name: &str,
    shape: &[usize],
    path: &std::path::Path,
) -> Result<&'a [f32]> {
    match tensors.iter().find(|t| t.name == name) {
        Some(tensor) if tensor.shape == shape => Ok(&tensor.data),
        Some(tensor) => {
            let message = format!("{name} has shape {:?}, the model needs {shape:?}", tensor.shape);
            Err(Error::checkpoint(path, message))
        }
        None => Err(Error::checkpoint(path, format!("tensor {name} is missing"))),
    }
}
