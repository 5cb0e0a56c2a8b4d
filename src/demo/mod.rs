//! What the page does with the engine: a run that is opened with settings, trained step by step, looked at, and opened
//! again with others while the model keeps what it has learnt. Natively the same, so that most tests need no browser.

mod advise;
mod export;
mod report;
mod settings;
mod show;
mod task;

use std::collections::BTreeMap;

pub use report::{Advice, EQUAL, Example, Failure, Run, Shown, Span, Step, Stepped};
pub use settings::{Catalog, Choice, Settings, Size, catalog};
use task::Lesson;
pub use task::Task;

use crate::error::Result;
use crate::generate::Generator;
use crate::gpu::{self, Device, OpenOptions, now};
use crate::layers::Layers;
use crate::model::{KINDS, Model};
use crate::pipeline::Plan;
use crate::plan::{Candidate, DeviceProfile, Link, Machine, Rates};
use crate::timeline::{self, Prediction};
use crate::train::config::Config;
use crate::train::data::Batches;
use crate::train::planning::Planning;
use crate::train::snapshot::Snapshot;
use crate::train::trainer::Trainer;

/// Seconds after which the state is copied to the host's memory again.
const SNAPSHOT: f64 = 20.0;
/// The step from which on times are learnt from: in the first kernels are compiled.
const TELLING: u64 = 2;
/// Later every so many steps.
const EVERY: u64 = 20;

/// What is assumed of a device of which nothing has been measured; the first steps teach better.
const GUESS: Rates = Rates {
    matmul_gflops: 5.0,
    memory_gb_s: 5.0,
    launch_us: 50.0,
    submit_us: 500.0,
    optimizer_gb_s: None,
    norm_gb_s: None,
    clear_gb_s: None,
    barrier_us: 1000.0,
};
const LINK: Link = Link { latency_us: 500.0, gb_s: 1.0, out_gb_s: None, into_gb_s: None };

/// A run.
pub struct Session {
    settings: Settings,
    devices: Vec<Device>,
    planning: Planning,
    model: Model,
    plan: Candidate,
    bytes: Vec<u64>,
    predicted: Step,
    trainer: Trainer,
    /// The same model on the first device alone.
    reference: Option<Trainer>,
    lesson: Lesson,
    generator: Option<Generator>,
    /// The state some seconds ago; none while there is nothing but the beginning to go back to.
    snapshot: Option<Snapshot>,
    /// When that was, or the run was opened.
    taken: f64,
    /// Steps since it was opened.
    steps: u64,
}

/// What one run leaves to the next.
#[derive(Default)]
struct Left {
    devices: Vec<Device>,
    /// As its devices are when nothing makes them slower.
    machine: Option<Machine>,
    snapshot: Option<Snapshot>,
}

impl Session {
    /// Opens a run. Goes on with the devices of the one before, whose kernels are compiled, and where the model is the same and
    /// to be kept, with its weights and step.
    ///
    /// # Errors
    /// What the settings contradict, and what devices refuse.
    pub async fn open(settings: Settings, earlier: Option<Session>, keep: bool) -> Result<Session> {
        let mut left = match earlier {
            Some(earlier) => earlier.leave(&settings, keep).await,
            None => Left::default(),
        };
        left.devices = devices(settings.devices, left.devices).await?;
        Session::launch(settings, left).await
    }

    /// Whether there is a plan for these settings on devices like this run's: asked before this run is given up for another.
    ///
    /// # Errors
    /// Those of [`Session::open`] that need no device.
    pub fn check(&self, settings: &Settings) -> Result<()> {
        settings.check()?;
        let mut devices = self.devices.clone();
        devices.resize(settings.devices, self.devices[0].clone());
        planning(settings, &devices, None)?.search().map(drop)
    }

    /// Opens a run on these devices.
    ///
    /// # Errors
    /// As [`Session::open`].
    pub async fn on(settings: Settings, devices: Vec<Device>) -> Result<Session> {
        Session::launch(settings, Left { devices, ..Left::default() }).await
    }

    async fn launch(mut settings: Settings, left: Left) -> Result<Session> {
        settings.check()?;
        let Left { devices, machine: known, snapshot } = left;
        let planning = planning(&settings, &devices, known)?;
        let config = &planning.config;
        let best = planning.search()?.best;
        settings.cuts = best.cuts();
        let plan = planning.plan(&best)?;
        let model = plan.model.clone();
        let bytes = plan.ranks.iter().map(|rank| rank.bytes).collect();
        let lesson = settings.task.lesson(&settings.text, settings.seed);
        let mut trainer = Trainer::launch(config, plan, &devices, batches(config, &lesson)?)?;
        let mut reference = match settings.reference && settings.devices > 1 {
            true => Some(alone(&settings, &devices[0], &lesson)?),
            false => None,
        };
        for trainer in std::iter::once(&mut trainer).chain(&mut reference) {
            match &snapshot {
                Some(snapshot) => trainer.take_up(snapshot).await?,
                None => trainer.initialise().await?,
            }
        }
        for (rank, &device) in best.devices.iter().enumerate() {
            trainer.executor().slow(rank, settings.slow(device))?;
        }
        let predicted = predicted(&planning, &best)?;
        Ok(Session {
            settings,
            devices,
            planning,
            model,
            plan: best,
            bytes,
            predicted,
            trainer,
            reference,
            lesson,
            generator: None,
            snapshot,
            taken: now(),
            steps: 0,
        })
    }

    /// What the page draws of it.
    pub fn run(&self) -> Run {
        let model = &self.model;
        let stages_of = |rank: usize| self.plan.stages_of(rank).collect::<Vec<usize>>();
        let devices = self.plan.devices.iter().enumerate().map(|(rank, &at)| {
            let info = self.devices[at].info();
            let layers: Vec<String> =
                stages_of(rank).iter().map(|&stage| Layers::between(&self.plan.places[stage])).collect();
            report::Device {
                index: at,
                name: info.name.clone(),
                adapter: format!("{}: {} {}", info.index, info.vendor, info.name),
                bytes: self.bytes[rank],
                stages: stages_of(rank),
                layers: layers.join(", "),
                slow: self.settings.slow(at),
            }
        });
        let starts = model.layer_starts();
        let layers = (0..model.layers()).map(|layer| {
            let own = model.layer_parameters(layer).into_iter().filter(|p| p.tied_to.is_none());
            report::Layer {
                name: model.layer_name(layer),
                kind: KINDS[model.layer_kind(layer)],
                start: starts[layer],
                parameters: own.map(|p| p.len()).sum(),
            }
        });
        let mut adapters: Vec<usize> = self.devices.iter().map(|device| device.info().index).collect();
        adapters.sort_unstable();
        adapters.dedup();
        Run {
            settings: self.settings.clone(),
            adapters: adapters.len(),
            devices: devices.collect(),
            layers: layers.collect(),
            stages: self.plan.stages.iter().map(|s| report::Stage { first: s.start, end: s.end }).collect(),
            schedule: self.plan.schedule.to_string(),
            parameters: model.parameter_count(),
            predicted: self.predicted.clone(),
            tokens: self.planning.config.train.batch * self.planning.config.train.sequence,
            step: self.trainer.step_number(),
        }
    }

    /// One step, on one device too if that was asked for.
    ///
    /// # Errors
    /// Those of [`Trainer::step`].
    pub async fn step(&mut self) -> Result<Stepped> {
        let row = self.trainer.step().await?;
        let reference = match &mut self.reference {
            Some(reference) => Some(reference.step().await?.loss),
            None => None,
        };
        let measured = Step::new(&timeline::Step::measured(&self.trainer.timeline())?);
        self.steps += 1;
        self.learn()?;
        if now() - self.taken > SNAPSHOT {
            self.snapshot = Some(self.trainer.snapshot().await?);
            self.taken = now();
        }
        Ok(Stepped {
            step: row.step,
            loss: row.loss,
            norm: row.grad_norm,
            seconds: row.step_seconds,
            tokens_per_second: row.tokens_per_second,
            measured,
            predicted: self.predicted.clone(),
            reference,
            digits: reference.map(|other| digits(row.loss, other)),
        })
    }

    /// Makes devices take so many times as long; 1 where the list ends.
    ///
    /// # Errors
    /// What is out of range; those of a rank that has stopped.
    pub fn slow(&mut self, slow: Vec<f64>) -> Result<()> {
        let settings = Settings { slow, ..self.settings.clone() };
        settings.check()?;
        for (rank, &device) in self.plan.devices.iter().enumerate() {
            let (before, after) = (self.settings.slow(device), settings.slow(device));
            self.trainer.executor().slow(rank, after)?;
            self.planning.machine.devices[device].scale(after / before);
        }
        self.settings = settings;
        self.predict()
    }

    /// Gives a device up, as if its card had been unplugged: the next step fails.
    pub fn lose(&mut self, rank: usize) {
        if let Some(device) = self.plan.devices.get(rank) {
            self.devices[*device].lose();
        }
    }

    /// The last step for Perfetto and chrome://tracing.
    pub fn trace(&self) -> String {
        self.trainer.timeline().to_chrome_trace()
    }

    /// The rank whose device has failed, if one has.
    pub fn failed(&self) -> Option<usize> {
        self.plan.devices.iter().position(|&device| self.devices[device].check("training").is_err())
    }

    /// Stops everything; resolves once the memory is free.
    pub async fn close(mut self) {
        self.stop().await;
    }

    async fn stop(&mut self) {
        for trainer in std::iter::once(&mut self.trainer).chain(&mut self.reference) {
            trainer.executor().stop().await;
        }
        if let Some(generator) = &mut self.generator {
            generator.executor().stop().await;
        }
    }

    /// Stops, and leaves what a run with these settings can use.
    async fn leave(mut self, settings: &Settings, keep: bool) -> Left {
        let is_alike = (settings.task, settings.size) == (self.settings.task, self.settings.size);
        let is_same =
            is_alike && (settings.seed, &settings.text) == (self.settings.seed, &self.settings.text);
        let mut snapshot = self.snapshot.take();
        if !keep || !is_same {
            snapshot = None;
        } else if self.failed().is_none()
            && let Ok(newest) = self.trainer.snapshot().await
        {
            snapshot = Some(newest);
        }
        self.stop().await;
        let mut machine = self.planning.machine;
        let mut devices = Vec::new();
        let mut profiles = Vec::new();
        for (at, (device, mut profile)) in self.devices.into_iter().zip(machine.devices).enumerate() {
            if device.check("training").is_ok() {
                profile.scale(1.0 / self.settings.slow(at));
                devices.push(device);
                profiles.push(profile);
            }
        }
        machine.devices = profiles;
        // What was measured of another model says nothing of this one.
        let machine = Some(machine).filter(|_| is_alike);
        Left { devices, machine, snapshot }
    }

    /// Learns from the last step how long devices take, now and then.
    fn learn(&mut self) -> Result<()> {
        if self.steps < TELLING || self.steps > TELLING + 2 && !self.steps.is_multiple_of(EVERY) {
            return Ok(());
        }
        self.planning.learn(&self.plan, self.trainer.events());
        self.predict()
    }

    /// Simulates the plan with what is known of the devices by now.
    fn predict(&mut self) -> Result<()> {
        self.plan = self.planning.again(&self.plan)?;
        self.predicted = predicted(&self.planning, &self.plan)?;
        Ok(())
    }
}

/// So many devices: those of before, and others on the adapters that there are in turn.
async fn devices(count: usize, before: Vec<Device>) -> Result<Vec<Device>> {
    let mut devices = before;
    devices.truncate(count);
    let adapters = match devices.len() < count {
        true => gpu::list(false).await.len(),
        false => 1,
    };
    if adapters == 0 {
        return Err(gpu::none_found());
    }
    for at in devices.len()..count {
        devices.push(Device::open(at % adapters, OpenOptions::default()).await?);
    }
    Ok(devices)
}

/// Plans for settings on devices of which so much is known.
fn planning(settings: &Settings, devices: &[Device], known: Option<Machine>) -> Result<Planning> {
    let opened: BTreeMap<usize, Device> = devices.iter().cloned().enumerate().collect();
    Planning::for_devices(&settings.config()?, machine(devices, known, settings), &opened, None)
}

/// What is known of the devices, as slow as they are to be.
fn machine(devices: &[Device], before: Option<Machine>, settings: &Settings) -> Machine {
    let guess = |device: &Device| DeviceProfile {
        name: device.info().name.clone(),
        adapter: Some(device.info().index),
        max_binding: Some(device.capabilities().max_binding),
        rates: GUESS,
        ..DeviceProfile::default()
    };
    let mut machine = Machine { name: "this browser".into(), link: LINK, ..Machine::default() };
    let known = before.map_or(Vec::new(), |before| before.devices);
    for (at, device) in devices.iter().enumerate() {
        // A new device is probably like one that is known.
        let like = known.get(at).or_else(|| known.iter().find(|known| known.name == device.info().name));
        let mut profile = like.cloned().unwrap_or_else(|| guess(device));
        profile.scale(settings.slow(at));
        machine.devices.push(profile);
    }
    machine
}

fn batches(config: &Config, lesson: &Lesson) -> Result<Batches> {
    let train = &config.train;
    Batches::new(lesson.corpus.clone(), train.batch, train.sequence, config.data.order, train.seed)
}

/// The same model on one device, in as many microbatches.
fn alone(settings: &Settings, device: &Device, lesson: &Lesson) -> Result<Trainer> {
    let schedule = "1f1b".into();
    let one = Settings { devices: 1, replicas: 1, cuts: Vec::new(), schedule, ..settings.clone() };
    let config = one.config()?;
    let devices = std::slice::from_ref(device);
    let plan = Plan::for_devices(Trainer::setup(&config, vec![None])?, devices)?;
    Trainer::launch(&config, plan, devices, batches(&config, lesson)?)
}

fn predicted(planning: &Planning, plan: &Candidate) -> Result<Step> {
    let prediction = Prediction::of_plan(plan, planning.names());
    Ok(Step::new(&timeline::Step::predicted(&prediction)?))
}

/// Decimal digits to which two losses agree.
fn digits(one: f64, other: f64) -> u32 {
    if one.to_bits() == other.to_bits() {
        return EQUAL;
    }
    let off = (one - other).abs() / one.abs().max(f64::MIN_POSITIVE);
    (-off.log10()).floor().clamp(0.0, f64::from(EQUAL - 1)) as u32
}
