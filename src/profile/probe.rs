//! Times of real steps of a small model: what profiles are made of.
//!
//! A probe is an executor on one device, or on two, whose model has the layers in question and few of them. So what is
//! measured is what will run: the same kernels, submissions, hand-overs and callbacks.

use std::collections::HashMap;
use std::ops::Range;

use super::noise::cpu_seconds;
use crate::error::{Error, Result};
use crate::gpu::{Device, now};
use crate::layers::Layers;
use crate::mesh::{Division, Wire};
use crate::model::init::{self, philox};
use crate::model::{Model, Parameter};
use crate::ops::parameters::{AdamStep, Part};
use crate::pipeline::{Batch, Executor, Plan, Setup, Use};
use crate::plan::Sharding;
use crate::schedule::{Action, Jitter, Kind, Schedule};
use crate::timeline::{Event, Track, What};

/// Microbatches of a probe's step: two, so that no stash slot is used twice running.
pub(super) const MICROBATCHES: usize = 2;
/// Measured steps go on until their time is up, or this many have been done, …
pub(super) const STEPS: usize = 12;
/// … and then for as long as patience allows until the standard error of their mean is this part of it.
const PRECISION: f64 = 0.01;
/// Fewer samples say nothing about how they spread.
const FEW: usize = 5;
/// Of so many samples, one may be an accident.
const PER_ACCIDENT: usize = 20;

/// Less of a step than this says nothing about how long it takes.
const LITTLE: f64 = 0.05;

/// Elements of a parameter after which its numbers repeat.
const REPEATED: usize = 1 << 16;

/// Where a probe runs: devices, and how they divide layers.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) devices: &'a [Device],
    pub(super) tensor: Option<&'a Division>,
    /// As what tensors travel between them.
    pub(super) wire: Wire,
}

impl<'a> Place<'a> {
    /// Devices that have whole layers.
    pub(super) fn whole(devices: &'a [Device]) -> Place<'a> {
        Place { devices, tensor: None, wire: Wire::F32 }
    }
}

/// An executor with the batch that it repeats.
pub(super) struct Probe {
    executor: Executor,
    /// Whether all devices do the same part of the same work: the first then stands for all.
    gang: bool,
    batch: Batch,
    /// Bytes of the weights that are trained, each counted once.
    pub(super) weights: u64,
    /// How its layers are cut if it is one of a device's layers.
    stages: Stages,
    /// Whether it has run a step.
    warm: bool,
}

/// What is heard of a probe at work.
pub(super) enum Beat {
    /// In the middle of a step that counts, which takes about so many seconds.
    Within { step: f64 },
    /// Between two steps: whether there were enough.
    After { enough: bool },
}

impl Beat {
    /// Whether there were enough steps.
    pub(super) fn is_enough(&self) -> bool {
        matches!(self, Beat::After { enough: true })
    }
}

/// What steps of a probe took, in seconds.
#[derive(Clone, Debug, Default)]
pub(super) struct Times {
    /// Each action of each stage, from the end of what the device did before.
    pub(super) actions: HashMap<(usize, Kind), f64>,
    /// From the end of the first stage's F on rank 0 to the start of the next on rank 1, and the host's copy in it.
    pub(super) forward_hop: (f64, f64),
    /// The same for gradients, from rank 1 to rank 0.
    pub(super) backward_hop: (f64, f64),
    /// Clearing gradients.
    pub(super) clear: f64,
    /// Folding, sums of squares.
    pub(super) norm: f64,
    /// AdamW.
    pub(super) update: f64,
    /// Of a step without its update, in which no device worked at all: messages, read-back, the host's sums.
    pub(super) barrier: f64,
    /// What an action costs beside its layers.
    pub(super) submit: f64,
    /// All actions of a step.
    pub(super) busy: f64,
    /// How that varies from step to step.
    pub(super) jitter: Jitter,
    /// Steps of which all of these are means.
    pub(super) steps: usize,
    /// Host cores in use while the device worked.
    pub(super) cores: f64,
}

impl Times {
    /// Seconds of an action of a stage; 0 if there was none.
    pub(super) fn of(&self, stage: usize, kind: Kind) -> f64 {
        self.actions.get(&(stage, kind)).copied().unwrap_or(0.0)
    }

    /// A whole step, the update included.
    pub(super) fn step(&self) -> f64 {
        self.busy + self.update + self.barrier.max(0.0)
    }

    /// All actions of a stage in a step.
    pub(super) fn stage(&self, stage: usize) -> f64 {
        let own = self.actions.iter().filter(|((of, _), _)| *of == stage);
        MICROBATCHES as f64 * own.map(|(_, seconds)| seconds).sum::<f64>()
    }
}

impl Probe {
    /// `cuts` of a model into stages that `schedule` runs. Fails as [`Plan::new`] does.
    pub(super) fn new(
        model: &Model,
        schedule: Schedule,
        cuts: Vec<Layers>,
        (sequences, sequence): (usize, usize),
        Place { devices, tensor, wire }: Place,
        budget: Option<u64>,
    ) -> Result<Probe> {
        let setup = Setup {
            model: model.config().clone(),
            adapter: model.adapter().cloned(),
            weights: model.weights(),
            logits: model.logits(),
            batch: sequences,
            sequence,
            cuts: Some(cuts),
            recompute: Vec::new(),
            shared: false,
            sharding: Sharding::default(),
            tensor: tensor.cloned().unwrap_or_else(Division::none),
            wire,
            host: None,
            purpose: Use::Training,
            budgets: vec![budget; devices.len()],
            schedule,
        };
        let count = sequences * sequence * setup.schedule.microbatches;
        let mut executor = Executor::launch(Plan::for_devices(setup, devices)?, devices)?;
        let watch = executor.watch();
        let owned = model.parameters().into_iter().filter(|p| p.tied_to.is_none());
        let mut weights = 0;
        for parameter in owned {
            // Zeros take less power, hence a higher clock, than what a training run multiplies. Numbers that repeat do not.
            let some = Parameter { shape: vec![parameter.len().min(REPEATED)], ..parameter.clone() };
            let some = init::initial(&some, 1);
            let values: Vec<f32> = some.into_iter().cycle().take(parameter.len()).collect();
            weights += if parameter.frozen { 0 } else { 4 * values.len() as u64 };
            watch.block_on(executor.write(&parameter.name, Part::Weight, &values))?;
        }
        let vocabulary = model.config().vocabulary as u32;
        let tokens =
            |key| (0..count as u32).map(|i| philox([i, 0, 0, 0], [key, 0])[0] % vocabulary).collect();
        let batch = Batch { inputs: tokens(1), targets: tokens(2), ..Batch::default() };
        let gang = tensor.is_some_and(Division::divides);
        Ok(Probe { executor, gang, batch, weights, stages: Stages::of(model), warm: false })
    }

    /// On one device or one gang, within its memory; none if it does not fit.
    pub(super) fn new_if_it_fits(
        model: &Model,
        schedule: Schedule,
        cuts: Vec<Layers>,
        shape: (usize, usize),
        place: Place,
    ) -> Result<Option<Probe>> {
        let memory = place.devices.iter().filter_map(|device| device.info().memory).min();
        match Probe::new(model, schedule, cuts, shape, place, memory) {
            Ok(probe) => Ok(Some(probe)),
            Err(Error::Memory { .. } | Error::Binding { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Runs steps for some seconds and takes their times. Where they vary it goes on for up to `patience` seconds.
    /// Asks `go_on` after each step whether to; what it answers within one does not matter.
    pub(super) fn measure(
        &mut self,
        seconds: f64,
        patience: f64,
        mut go_on: impl FnMut(Beat) -> bool,
    ) -> Result<Times> {
        let watch = self.executor.watch();
        let mut taken: HashMap<Key, Vec<f64>> = HashMap::new();
        let mut elapsed = 0.0;
        let (mut begun, mut before) = (now(), watch.steps());
        // The first step of all also compiles, and touches fresh memory.
        let mut step = usize::from(std::mem::replace(&mut self.warm, true));
        loop {
            if step == 1 {
                (begun, before) = (now(), watch.steps());
            }
            let is_known = || {
                taken.get(&Key::Busy).is_none_or(|steps| {
                    steps.len() >= FEW && spread(steps).1 <= PRECISION * (steps.len() as f64).sqrt()
                })
            };
            let enough = elapsed >= seconds || step > STEPS;
            let enough = step >= 2 && enough && (elapsed >= patience || is_known());
            if step > 0 && !go_on(Beat::After { enough }) {
                break;
            }
            let (start, cpu) = (now(), cpu_seconds());
            let report = watch.block_on_and(self.executor.step(self.batch.clone()), || {
                let steps = watch.steps() - before;
                if step > 0 && steps > LITTLE {
                    go_on(Beat::Within { step: (now() - begun) / steps });
                }
            })?;
            let (middle, cpu) = (now(), cpu_seconds() - cpu);
            watch.block_on(self.executor.update(NO_CHANGE))?;
            watch.block_on(self.executor.settle())?;
            let end = now();
            elapsed += end - start;
            if step > 0 {
                let mut events = report.events;
                events.retain(|event| !self.gang || event.rank == 0);
                note(&events, (start, middle), cpu, &mut taken);
            }
            step += 1;
        }
        let mut times = Times { submit: submit(&taken, self.stages), steps: step - 1, ..Times::default() };
        for (key, seconds) in taken {
            let (seconds, part) = match key {
                // Whatever delays a hop beside the hop itself, it is not there in every step.
                Key::Forward | Key::Backward => (seconds.into_iter().fold(f64::INFINITY, f64::min), 0.0),
                _ => typical(seconds),
            };
            match key {
                Key::Action(stage, kind) => drop(times.actions.insert((stage, kind), seconds)),
                Key::Forward => times.forward_hop.0 = seconds,
                Key::ForwardCopy => times.forward_hop.1 = seconds,
                Key::Backward => times.backward_hop.0 = seconds,
                Key::BackwardCopy => times.backward_hop.1 = seconds,
                Key::Clear => times.clear = seconds,
                Key::Norm => times.norm = seconds,
                Key::Update => times.update = seconds,
                Key::Barrier => times.barrier = seconds,
                Key::Busy => (times.busy, times.jitter) = (seconds, Jitter { part: part.min(1.0), seconds }),
                Key::Cores => times.cores = seconds,
            }
        }
        Ok(times)
    }

    /// Ends it and frees its memory.
    pub(super) fn stop(mut self) -> Result<()> {
        let watch = self.executor.watch();
        watch.block_on(async {
            self.executor.stop().await;
            Ok(())
        })
    }
}

/// A step that leaves every weight as it is.
const NO_CHANGE: AdamStep = AdamStep {
    clip: 1.0,
    rate: 0.0,
    beta1: 0.9,
    beta2: 0.95,
    epsilon: 1e-8,
    decay: 0.0,
    correction1: 1.0,
    correction2: 1.0,
};

#[derive(PartialEq, Eq, Hash)]
enum Key {
    Action(usize, Kind),
    Forward,
    ForwardCopy,
    Backward,
    BackwardCopy,
    Clear,
    Norm,
    Update,
    Barrier,
    Busy,
    Cores,
}

/// Sorts a step's events. The update before it reports with it.
fn note(events: &[Event], (start, middle): (f64, f64), cpu: f64, taken: &mut HashMap<Key, Vec<f64>>) {
    let mut add = |key: Key, seconds: f64| taken.entry(key).or_default().push(seconds);
    let mut compute: Vec<&Event> = events.iter().filter(|e| e.track == Track::Compute).collect();
    compute.sort_by(|a, b| a.start.total_cmp(&b.start));
    let (mut busy, mut finish) = (0.0, 0.0);
    // One that waits in its middle, as gangs do at sums, is several events.
    let mut actions: Vec<(Action, f64)> = Vec::new();
    let alone = compute.iter().all(|e| e.rank == 0);
    for (at, event) in compute.iter().enumerate() {
        let before = compute[..at].iter().rev().find(|e| e.rank == event.rank && e.start >= start);
        let seconds = event.end - before.filter(|_| alone).map_or(event.start, |e| e.end);
        if event.start < start {
            add(Key::Update, event.end - event.start);
            continue;
        }
        busy += seconds;
        finish = event.end;
        match event.what {
            What::CLEAR => add(Key::Clear, seconds),
            What::NORM => add(Key::Norm, seconds),
            What::Action(action) if action.kind.computes() => {
                match actions.iter_mut().find(|(known, _)| *known == action) {
                    Some((_, before)) => *before += seconds,
                    None => actions.push((action, seconds)),
                }
            }
            What::Action(_) | What::Losses => {}
        }
    }
    for (action, seconds) in actions {
        add(Key::Action(action.stage, action.kind), seconds);
    }
    // An action of several submissions may be several events: the last of the sender's counts, the first of the
    // receiver's.
    let of = |stage: usize, kind: Kind| {
        let what = What::Action(Action::new(stage, kind, 0));
        events.iter().filter(move |e| e.what == what && e.start >= start)
    };
    for (sender, receiver, kind, received, hop, copy) in [
        (0, 1, Kind::F, Kind::RecvF, Key::Forward, Key::ForwardCopy),
        (1, 0, Kind::B, Kind::RecvB, Key::Backward, Key::BackwardCopy),
    ] {
        if let (Some(from), Some(to), Some(host)) =
            (of(sender, kind).next_back(), of(receiver, kind).next(), of(receiver, received).next())
        {
            add(hop, to.start - from.end);
            add(copy, host.end - host.start);
        }
    }
    let first = compute.iter().map(|e| e.start).filter(|&s| s >= start).fold(f64::INFINITY, f64::min);
    if alone && finish > first {
        add(Key::Barrier, (middle - start) - (finish - first));
        add(Key::Busy, busy);
        add(Key::Cores, cpu / (middle - start));
    }
}

/// How the layers of a probe on one device are cut: a stage for the embedding, one of a block, one for each part of the next
/// block, one of as many layers together, one for the head.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stages {
    /// Layers of a block.
    pub(super) parts: usize,
    /// Blocks of the stage that has its layers together: as many layers as two parts.
    pub(super) together: usize,
}

impl Stages {
    pub(super) const EMBEDDING: usize = 0;
    pub(super) const BLOCK: usize = 1;

    pub(super) fn of(model: &Model) -> Stages {
        let parts = model.layers_of_block();
        Stages { parts, together: if parts == 1 { 2 } else { 1 } }
    }

    /// The stages that have one part each.
    pub(super) fn apart(&self) -> Range<usize> {
        Self::BLOCK + 1..Self::BLOCK + 1 + self.parts
    }

    pub(super) fn together(&self) -> usize {
        self.apart().end
    }

    pub(super) fn head(&self) -> usize {
        self.together() + 1
    }

    pub(super) fn blocks(&self) -> usize {
        2 + self.together
    }

    /// One rank with all of them, and where they are cut; I and W apart or together.
    pub(super) fn schedule(&self, split: bool) -> (Schedule, Vec<Layers>) {
        let stages = self.head() + 1;
        let pass = |kind: Kind, backward: bool| {
            (0..MICROBATCHES).flat_map(move |m| {
                (0..stages).map(move |s| Action::new(if backward { stages - 1 - s } else { s }, kind, m))
            })
        };
        let kinds: &[Kind] = if split { &[Kind::I, Kind::W] } else { &[Kind::B] };
        let list = pass(Kind::F, false).chain(kinds.iter().flat_map(|&kind| pass(kind, true))).collect();
        let part = if self.parts == 1 { Layers::ONE } else { Layers::HALF };
        let sizes = [Layers::ONE, Layers::ONE]
            .into_iter()
            .chain(std::iter::repeat_n(part, self.parts))
            .chain([Layers::whole(self.together)]);
        let cuts = Layers::starts(sizes).split_off(1);
        let name = "probe".to_string();
        (Schedule { name, stages, microbatches: MICROBATCHES, ranks: vec![list] }, cuts)
    }
}

/// The same layers apart and together: what is left is what an action costs beside its layers. Neighbouring stages of one
/// microbatch run right after one another, and so at about the same speed of the machine. It is at most what the shortest
/// action takes: where layers take long, the difference of two of them is noise.
fn submit(taken: &HashMap<Key, Vec<f64>>, stages: Stages) -> f64 {
    let of = |stage, kind| taken.get(&Key::Action(stage, kind)).map_or(&[][..], Vec::as_slice);
    let mut beside = Vec::new();
    for kind in [Kind::F, Kind::I, Kind::W, Kind::B] {
        for (at, together) in of(stages.together(), kind).iter().enumerate() {
            let apart: Option<f64> = stages.apart().map(|stage| of(stage, kind).get(at)).sum();
            beside.extend(apart.map(|apart| stages.together as f64 * apart - together));
        }
    }
    let actions = taken.iter().filter(|(key, _)| matches!(key, Key::Action(..)));
    let shortest = actions.map(|(_, seconds)| middle(seconds.clone())).fold(f64::INFINITY, f64::min);
    middle(beside).clamp(0.0, shortest.max(0.0))
}

/// The median; 0 of nothing.
fn middle(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// The mean without the longest one of every [`PER_ACCIDENT`] values, and the standard deviation as a part of it. A plan's
/// step takes the sum of what its actions take, so the mean predicts it where a machine's speed wanders, which a median
/// or quartile does not; the accident that befalls one step in many is not in a typical step.
fn typical(mut values: Vec<f64>) -> (f64, f64) {
    values.sort_by(f64::total_cmp);
    spread(&values[..values.len() - values.len() / PER_ACCIDENT])
}

/// Mean, and standard deviation as a part of it.
pub(super) fn spread(values: &[f64]) -> (f64, f64) {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count.max(1.0);
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (count - 1.0).max(1.0);
    (mean, if mean > 0.0 { variance.sqrt() / mean } else { 0.0 })
}
