//! Two devices beside each other: the links between them, and how much each slows the other down.

use std::any::Any;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::agenda::{Agenda, Task};
use super::noise::{Quiet, beside, is_as_good, limit};
use super::probe::{MICROBATCHES, Place, Probe, spread};
use super::{Cache, GIGA, MICRO, Profiler, SECONDS, begin, first_of_adapter, short, unix_seconds};
use crate::error::{Error, Result, said};
use crate::gpu::{Device, now};
use crate::layers::Layers;
use crate::model::{Model, ModelConfig};
use crate::pipeline::workload::family_key;
use crate::plan::{DeviceProfile, Evidence, Link, LinkProfile, Machine, Rates};
use crate::schedule::generate;

/// Turns in which two devices work, one alone, then both, then the other, so that a change of the machine's speed …
pub(super) const TURNS: usize = 4;
/// … in the seconds of such a turn is not taken for an effect of one on the other. …
pub(super) const TURN: f64 = 0.4;
/// … More of them follow while they differ, but not when all have taken so long together.
pub(super) const LONG_TURNS: f64 = 16.0;
/// Standard error of the effect, as a part, with which turns end.
const STEADY: f64 = 0.03;
/// Tokens that a pair's models know at most: what crosses a boundary does not depend on them, and a head is a matrix product
/// like those of blocks.
const VOCABULARY: usize = 256;
/// The factor from one number of tokens for which pairs are measured to the next: what tensors of about the same size
/// show holds for all of them.
const FACTOR: usize = 4;

/// Two devices at work side by side.
#[derive(Clone, Copy)]
pub(super) struct Pair {
    pub(super) there: Link,
    pub(super) back: Link,
    /// How many times longer the first takes while the second is busy, and the other way round.
    pub(super) slowdown: (f64, f64),
    /// What all of it rests on, if that is known.
    pub(super) measured: Option<Evidence>,
}

impl Profiler<'_> {
    /// Two devices: the links between them, and how much slower each is while the other works. `shared` is the factor
    /// that sharing the host's cores explains.
    pub(super) fn pair(
        &self,
        (i, j): (usize, usize),
        sizes: &[usize],
        shared: f64,
        quiet: &mut Quiet,
        agenda: &mut Agenda,
    ) -> Result<Pair> {
        let (a, b) = (&self.devices[i], &self.devices[j]);
        let limit = limit(a).min(limit(b));
        let known = self.known_pair((i, j), sizes);
        let tasks = self.pair_tasks((i, j), sizes);
        if let Some(known) = known
            && !quiet.is_worth(beside(known.measured), limit)
        {
            agenda.leave_out(|task| tasks.contains(&task));
            return Ok(known);
        }
        let what = format!("{} beside {}", short(a), short(b));
        let size = smallest(sizes);
        let (pair, others) = quiet.measure(limit, |say| {
            let started = now();
            begin(tasks[0], &what, agenda, say);
            let (there, back) = self.links(a, b, size)?;
            agenda.end(now() - started);
            let started = now();
            begin(tasks[1], &what, agenda, say);
            let (slowdown, measured) = self.disturbance(a, b, size, shared)?;
            agenda.end(now() - started);
            Ok(Pair { there, back, slowdown, measured: Some(measured) })
        })?;
        let measured = pair.measured.map(|evidence| Evidence { others, ..evidence });
        let pair = Pair { measured, ..pair };
        // Noise may have come back.
        if let Some(known) = known
            && !is_as_good(others, beside(known.measured), limit)
        {
            return Ok(known);
        }
        let bare = |device: &Device| DeviceProfile {
            name: device.info().name.clone(),
            rates: Rates { matmul_gflops: 1.0, memory_gb_s: 1.0, ..Rates::default() },
            ..DeviceProfile::default()
        };
        let machine = Machine {
            slowdown: vec![vec![1.0, pair.slowdown.0], vec![pair.slowdown.1, 1.0]],
            measured: pair.measured,
            link: pair.there,
            devices: vec![bare(a), bare(b)],
            links: vec![LinkProfile { from: 1, to: 0, link: pair.back }],
            ..Machine::default()
        };
        if let Some(cache) = &self.cache {
            cache.write(&self.pair_key(cache, (i, j), sizes), machine);
        }
        Ok(pair)
    }

    /// What is measured of two devices.
    pub(super) fn pair_tasks(&self, (i, j): (usize, usize), sizes: &[usize]) -> [Task; 2] {
        let pair = (first_of_adapter(self.devices, i), first_of_adapter(self.devices, j));
        let size = smallest(sizes);
        [Task::Links { pair, size }, Task::Slowdown { pair, size }]
    }

    /// What the cache has of two devices.
    pub(super) fn known_pair(&self, pair: (usize, usize), sizes: &[usize]) -> Option<Pair> {
        let cache = self.cache.as_ref().filter(|_| !self.fresh)?;
        let known = cache.read(&self.pair_key(cache, pair, sizes))?;
        (known.devices.len() == 2).then(|| Pair {
            there: known.link(0, 1),
            back: known.link(1, 0),
            slowdown: (known.slowdown(0, 1), known.slowdown(1, 0)),
            measured: known.measured,
        })
    }

    fn pair_key(&self, cache: &Cache, (i, j): (usize, usize), sizes: &[usize]) -> String {
        let tokens = smallest(sizes) * self.sequence;
        let about =
            std::iter::successors(Some(1usize), |most| most.checked_mul(FACTOR)).find(|&most| most >= tokens);
        let devices = cache.key(&[&self.devices[i], &self.devices[j]]);
        format!("{devices} {} tokens up to {}", family_key(self.model), about.unwrap_or(tokens))
    }

    /// The model with one block and few tokens, without an adapter: then gradients cross every boundary.
    fn small(&self) -> Result<Model> {
        let config = self.model.config();
        let vocabulary = config.vocabulary.min(VOCABULARY);
        let model = Model::new(&ModelConfig { layers: 1, vocabulary, ..config.clone() })?;
        Ok(model.with_weights(self.model.weights()))
    }

    /// A pipeline of two ranks and one microbatch: every hop lies open.
    fn links(&self, a: &Device, b: &Device, size: usize) -> Result<(Link, Link)> {
        let pair = [a.clone(), b.clone()];
        let shape = (size, self.sequence);
        let model = self.small()?;
        let mut probe = Probe::new(
            &model,
            generate("gpipe", 2, 1)?,
            vec![Layers::ONE],
            shape,
            Place::whole(&pair),
            None,
        )?;
        let times = probe.measure(SECONDS, 0.0, |beat| !beat.is_enough())?;
        probe.stop()?;
        let bytes = 4.0 * (size * self.sequence * self.model.config().width) as f64;
        let link = |(hop, copy): (f64, f64)| Link {
            latency_us: (hop - copy).clamp(0.0, 10.0) / MICRO,
            gb_s: (bytes / GIGA / copy.max(1e-9)).clamp(1e-3, 1e6),
            ..Link::default()
        };
        Ok((link(times.forward_hop), link(times.backward_hop)))
    }

    /// How many times longer each device's actions take while the other repeats steps of its own than alone, beyond the
    /// factor `shared`, and what that rests on.
    fn disturbance(
        &self,
        a: &Device,
        b: &Device,
        size: usize,
        shared: f64,
    ) -> Result<((f64, f64), Evidence)> {
        let model = self.small()?;
        let probe = |device: &Device| {
            let schedule = generate("gpipe", 1, MICROBATCHES)?;
            let place = Place::whole(std::slice::from_ref(device));
            Probe::new_if_it_fits(&model, schedule, Vec::new(), (size, self.sequence), place)
        };
        let mut measured = Evidence { unix_seconds: unix_seconds(), steps: 1, ..Evidence::default() };
        let (Some(mut first), Some(mut second)) = (probe(a)?, probe(b)?) else {
            return Ok(((1.0, 1.0), measured));
        };
        // Two devices of one adapter are alike.
        let alike = a.info().index == b.info().index;
        let mut factors = [Vec::new(), Vec::new()];
        let mut spreads = Vec::new();
        let started = now();
        loop {
            let turns = factors[0].len();
            let steady = factors.iter().all(|turns| error(turns) <= STEADY);
            if turns >= 2 && now() - started > LONG_TURNS || turns >= TURNS && steady {
                break;
            }
            let mut by_itself = |probe: &mut Probe| -> Result<f64> {
                let times = probe.measure(TURN, 0.0, |beat| !beat.is_enough())?;
                measured.steps += times.steps as u64;
                spreads.push(times.jitter.part);
                Ok(times.busy)
            };
            // Both in the middle, so that a machine that gets slower or faster all the while does not count.
            let one = by_itself(&mut first)?;
            let mut beside = together(&mut first, &mut second)?;
            let mut alone = [one, by_itself(&mut second)?];
            if alike {
                (alone, beside) = ([alone[0] + alone[1]; 2], [beside[0] + beside[1]; 2]);
            }
            for (device, turns) in factors.iter_mut().enumerate() {
                turns.push(beside[device] / alone[device].max(1e-9) / shared);
            }
        }
        first.stop()?;
        second.stop()?;
        let [first, second] = factors.map(|turns| middle(turns).clamp(1.0, 100.0));
        measured.spread = spreads.iter().sum::<f64>() / spreads.len() as f64;
        Ok(((first, second), measured))
    }
}

/// The standard error of their mean, as a part of it.
fn error(turns: &[f64]) -> f64 {
    spread(turns).1 / (turns.len() as f64).sqrt()
}

/// The mean of turns without the largest and the smallest, which may have met with what other programs do.
fn middle(mut turns: Vec<f64>) -> f64 {
    turns.sort_by(f64::total_cmp);
    let most = turns.len() - usize::from(turns.len() > 2);
    let middle = &turns[turns.len() - most..most];
    middle.iter().sum::<f64>() / middle.len() as f64
}

/// The size with which pairs are measured.
fn smallest(sizes: &[usize]) -> usize {
    sizes.iter().copied().min().unwrap_or(1)
}

/// Seconds of all actions of a step of each probe while both are at work: each goes on until the other has enough.
fn together(first: &mut Probe, second: &mut Probe) -> Result<[f64; 2]> {
    let measuring = AtomicUsize::new(2);
    let beside = |probe: &mut Probe| {
        let mut counted = false;
        let mut leave = || {
            if !std::mem::replace(&mut counted, true) {
                measuring.fetch_sub(1, Ordering::AcqRel);
            }
        };
        let times = probe.measure(TURN, 0.0, |beat| {
            if beat.is_enough() {
                leave();
            }
            !beat.is_enough() || measuring.load(Ordering::Acquire) > 0
        });
        // After a failure too, or the other would go on for ever.
        leave();
        Ok(times?.busy)
    };
    std::thread::scope(|scope| {
        let other = scope.spawn(|| beside(second));
        let one = beside(first);
        let died = |panic: Box<dyn Any + Send>| {
            Error::failed("measuring", format!("the thread of a device has died: {}", said(&*panic)))
        };
        Ok([one?, other.join().map_err(died)??])
    })
}
