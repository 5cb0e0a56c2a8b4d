//! Measures this machine for a model: layers on each adapter, links between each pair, how much two disturb each other.
//! Every figure comes from [real steps](probe) and takes seconds; a [`Cache`] keeps them, with what they rest on:
//! what was measured beside other programs is measured again when they are gone, and training runs correct the rest.

mod agenda;
mod cache;
mod gangs;
mod host;
mod law;
mod layers;
mod learn;
pub mod noise;
mod pair;
mod probe;

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{SystemTime, UNIX_EPOCH};

use agenda::{Agenda, Task};
pub use cache::Cache;
use law::{Extents, Point, priced};
pub use learn::{Basis, Finding, KINDS_OF_WORK, Outcome, Work};
use noise::{Quiet, beside, limit};
use pair::Pair;
use probe::{MICROBATCHES, Place, Stages};

use crate::error::Result;
use crate::gpu::Device;
use crate::model::{KINDS, Model, OF_BLOCK};
use crate::pipeline::workload::{extents, kernels, shape_key};
use crate::plan::{DeviceProfile, Evidence, LayerProfile, Link, LinkProfile, Machine, Rates, ShapeProfile};

/// What the machine is called that a profiler measures.
const THIS: &str = "this machine";
/// A way between devices of which nothing is known.
const USUAL: Link = Link { latency_us: 0.0, gb_s: 10.0, out_gb_s: None, into_gb_s: None };
const GIGA: f64 = 1e9;
const MICRO: f64 = 1e-6;
/// Seconds that a measurement takes at least, if steps are not very short.
const SECONDS: f64 = 1.2;
/// Seconds that the first steps with one size of microbatch may take; sizes that would take longer are extrapolated.
const LONGEST: f64 = 12.0;
/// Steps that a measurement makes about if they are long, in both of its probes and with those that compile.
const STEPS_OF_A_MEASUREMENT: f64 = 5.0;

/// What to measure, and where results are kept.
pub struct Profiler<'a> {
    /// The model.
    pub model: &'a Model,
    /// Tokens of a sequence.
    pub sequence: usize,
    /// The devices of the machine; one adapter may be opened several times and is measured once.
    pub devices: &'a [Device],
    /// Bytes that each device may use.
    pub budgets: &'a [Option<u64>],
    /// Earlier measurements.
    pub cache: Option<Cache>,
    /// Measure again what the cache has.
    pub fresh: bool,
    /// Seconds that one measurement may take on a machine whose speed wanders, until the mean is steady.
    pub patience: f64,
}

/// What a profiler says while it measures.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Progress<'a> {
    /// So many measurements will be made; said before the first, if there is any.
    Planned(usize),
    /// A measurement begins; again, with the same number, whenever more is known about how long it takes.
    Measuring {
        /// What it measures.
        what: &'a str,
        /// Its number, from 1 on.
        number: usize,
        /// How many there are, as far as is known by now.
        count: usize,
        /// How long it takes from its beginning; none before there is something to go by.
        remaining: Option<Remaining>,
    },
    /// It waits, because other programs take this part of the cores.
    Waiting(f64),
    /// A step of a probe has ended, and nothing runs at the moment. Not said of two devices side by side: what they give is
    /// a ratio, which does not depend on how fast the machine is just then.
    Step,
}

/// Seconds that measuring still takes, about.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Remaining {
    /// The measurement that begins.
    pub this: f64,
    /// All that come after it.
    pub later: f64,
}

/// Whether a probe's step is so long that no more is measured than must be: microbatches of one size, I and W apart.
fn is_too_long(step: f64) -> bool {
    step * STEPS_OF_A_MEASUREMENT > LONGEST
}

/// Says that a measurement begins, and which number it has.
fn begin(task: Task, what: &str, agenda: &mut Agenda, say: &mut dyn FnMut(Progress)) -> usize {
    let number = agenda.begin(task);
    let (count, remaining) = (agenda.count(), agenda.remaining());
    if number == 1 {
        say(Progress::Planned(count));
    }
    say(Progress::Measuring { what, number, count, remaining });
    number
}

impl Profiler<'_> {
    /// The machine, with times for microbatches of each of `sizes` sequences: measured for some of them, interpolated
    /// between. `say` hears how it goes.
    ///
    /// # Errors
    ///
    /// Those of a device that fails. A model of which not even three layers fit a device has no measured times, only
    /// rates.
    pub fn machine(&self, sizes: &[usize], say: &mut dyn FnMut(Progress)) -> Result<Machine> {
        let first = |device: usize| first_of_adapter(self.devices, device);
        let sizes = &sizes.iter().copied().collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>();
        let quiet = &mut Quiet::new(say);
        let mut profiles: HashMap<usize, DeviceProfile> = HashMap::new();
        let mut pairs: HashMap<(usize, usize), Pair> = HashMap::new();
        let count = self.devices.len();
        let adapters: Vec<usize> = (0..count).filter(|&d| first(d) == d).collect();
        let agenda = &mut self.agenda(&adapters, sizes);
        for &device in &adapters {
            profiles.insert(device, self.device(device, sizes, quiet, agenda)?);
        }
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        let cores = threads as f64;
        for i in 0..count {
            for j in i + 1..count {
                let key = (first(i), first(j));
                if let Entry::Vacant(entry) = pairs.entry(key) {
                    let demand = profiles[&key.0].cores + profiles[&key.1].cores;
                    entry.insert(self.pair((i, j), sizes, (demand / cores).max(1.0), quiet, agenda)?);
                }
            }
        }
        let host_update_gb_s = Some(crate::pipeline::update::speed());
        let mut machine = Machine {
            name: THIS.into(),
            cores: Some(cores),
            host_update_gb_s,
            host_memory_gb_s: (count > 1).then(|| host::memory_gb_s(threads)),
            ..Machine::default()
        };
        machine.slowdown = vec![vec![1.0; count]; count];
        for i in 0..count {
            let profile = profiles[&first(i)].clone();
            let adapter = Some(self.devices[i].info().index);
            machine.devices.push(DeviceProfile { adapter, memory: self.budgets[i], ..profile });
            for j in i + 1..count {
                let pair = pairs[&(first(i), first(j))];
                machine.slowdown[i][j] = pair.slowdown.0;
                machine.slowdown[j][i] = pair.slowdown.1;
                machine.links.push(LinkProfile { from: i, to: j, link: pair.there });
                machine.links.push(LinkProfile { from: j, to: i, link: pair.back });
                machine.link = pair.there;
                // The whole rests on the weakest.
                if machine.measured.is_none() || beside(machine.measured) < beside(pair.measured) {
                    machine.measured = pair.measured;
                }
            }
        }
        if count == 1 {
            machine.link = USUAL;
        }
        Ok(machine)
    }

    /// What the cache does not have.
    fn agenda(&self, adapters: &[usize], sizes: &[usize]) -> Agenda {
        let mut tasks = Vec::new();
        for &device in adapters {
            let profile = self.known(device);
            let is_unknown = |size: &usize| profile.shape(&self.shape(*size)).is_none();
            for size in chosen(sizes).into_iter().filter(is_unknown) {
                tasks.extend([true, false].map(|split| Task::Layers { device, size, split }));
            }
        }
        let mut seen = Vec::new();
        for i in 0..self.devices.len() {
            for j in i + 1..self.devices.len() {
                let pair = (first_of_adapter(self.devices, i), first_of_adapter(self.devices, j));
                if !seen.contains(&pair) && self.known_pair((i, j), sizes).is_none() {
                    tasks.extend(self.pair_tasks((i, j), sizes));
                }
                seen.push(pair);
            }
        }
        Agenda::new(tasks)
    }

    /// What the cache has of an adapter.
    fn known(&self, device: usize) -> DeviceProfile {
        let device = &self.devices[device];
        let cached = self.cache.as_ref().filter(|_| !self.fresh).and_then(|cache| cache.read_device(device));
        cached.unwrap_or_else(|| bare(device))
    }

    /// The key of microbatches of so many sequences.
    fn shape(&self, size: usize) -> String {
        shape_key(self.model, size, self.sequence)
    }

    /// One adapter, from the cache as far as it has the shapes, or shapes around them.
    fn device(
        &self,
        index: usize,
        sizes: &[usize],
        quiet: &mut Quiet,
        agenda: &mut Agenda,
    ) -> Result<DeviceProfile> {
        let device = &self.devices[index];
        let limit = limit(device);
        let mut profile = self.known(index);
        let mut samples: BTreeMap<usize, ShapeProfile> = BTreeMap::new();
        let mut measured = Vec::new();
        let mut seconds_per_sequence = 0.0;
        for size in chosen(sizes) {
            let is_own = |task: Task| matches!(task, Task::Layers { device, size: of, .. } if (device, of) == (index, size));
            let known = profile.shape(&self.shape(size)).cloned();
            let is_good = |known: &ShapeProfile, quiet: &mut Quiet| {
                let loudest = beside(known.measured).into_iter().chain(beside(profile.measured));
                !quiet.is_worth(loudest.reduce(f64::max), limit)
            };
            let good = match known {
                Some(known) => Some(known).filter(|known| is_good(known, quiet)),
                None => self.by_law(device, &profile, size, quiet)?,
            };
            if let Some(good) = good {
                seconds_per_sequence = self.step_seconds(&good) / size as f64;
                profile.put(good.clone());
                samples.insert(size, good);
                agenda.leave_out(is_own);
                continue;
            }
            if is_too_long(seconds_per_sequence * size as f64) {
                agenda.leave_out(is_own);
                continue;
            }
            let place = Place::whole(std::slice::from_ref(device));
            let (sample, others) =
                quiet.measure(limit, |say| self.measure((index, place), size, agenda, say))?;
            agenda.leave_out(is_own);
            let Some(sample) = sample else { break };
            let sample = sample.beside(others, self.shape(size));
            sample.put(&mut profile, limit);
            // The one before, if noise has come back.
            let Some(best) = profile.shape(&sample.shape.shape) else { break };
            seconds_per_sequence = self.step_seconds(best) / size as f64;
            samples.insert(size, best.clone());
            measured.push(sample);
        }
        // Where one does not fit, larger ones do not either.
        agenda.leave_out(|task| matches!(task, Task::Layers { device, .. } if device == index));
        let mut is_new = !measured.is_empty();
        if profile.rates.matmul_gflops == 0.0 {
            let what = format!("{}: rates, because no three layers fit", short(device));
            let (number, remaining) = (agenda.count() + 1, None);
            (quiet.say)(Progress::Measuring { what: &what, number, count: number, remaining });
            profile.rates = rates_alone(device)?;
            is_new = true;
        }
        if let Some(cache) = self.cache.as_ref().filter(|_| is_new) {
            // Other programs may have added to the file meanwhile.
            let mut newest = cache.read_device(device).unwrap_or_else(|| bare(device));
            // Whoever asks for new measurements gets them, however loud it is.
            let limit = if self.fresh { 1.0 } else { limit };
            measured.iter().for_each(|sample| sample.put(&mut newest, limit));
            if newest.rates.matmul_gflops == 0.0 {
                newest.rates = profile.rates;
            }
            cache.write_device(device, newest);
        }
        for &size in sizes.iter().filter(|size| !samples.contains_key(size)) {
            let shape = self.shape(size);
            // Training runs have added sizes between those that are measured.
            let good = profile.shape(&shape).is_some_and(|s| !quiet.is_worth(beside(s.measured), limit));
            if !good && let Some(between) = interpolated(&samples, size) {
                profile.put(ShapeProfile { shape, ..between });
            }
        }
        Ok(profile)
    }

    /// About how long a probe's step takes with this shape.
    fn step_seconds(&self, shape: &ShapeProfile) -> f64 {
        let blocks = Stages::of(self.model).blocks();
        let seconds = |(kind, name): (usize, &&str)| {
            let count = if OF_BLOCK.contains(&kind) { blocks } else { 1 };
            shape.layers.get(*name).map_or(0.0, |layer| count as f64 * layer.sum())
        };
        MICROBATCHES as f64 * KINDS.iter().enumerate().map(seconds).sum::<f64>()
    }

    /// Times for microbatches of `size` sequences by those that are known of this model in the same kernels, if they
    /// follow a law.
    fn by_law(
        &self,
        device: &Device,
        profile: &DeviceProfile,
        size: usize,
        quiet: &mut Quiet,
    ) -> Result<Option<ShapeProfile>> {
        let limit = limit(device);
        let kernels = |size, sequence| kernels(self.model, size, sequence, device.capabilities());
        let wanted = kernels(size, self.sequence)?;
        let mut points = Vec::new();
        for shape in &profile.shapes {
            let Some((sequences, sequence)) = extents(self.model, &shape.shape) else { continue };
            // Not what a law says itself.
            let is_seen = shape.measured.is_none_or(|evidence| evidence.steps > 0);
            // A model of the same family may have had a longer context.
            let is_alike = |kernels: Result<Vec<_>>| kernels.is_ok_and(|kernels| kernels == wanted);
            if is_seen
                && !quiet.is_worth(beside(shape.measured), limit)
                && is_alike(kernels(sequences, sequence))
            {
                points.push(Point { extents: Extents { sequences, sequence }, shape: shape.clone() });
            }
        }
        let extents = Extents { sequences: size, sequence: self.sequence };
        let found = priced(&points, extents, self.model.config().layers);
        Ok(found.map(|found| ShapeProfile { shape: self.shape(size), ..found }))
    }
}

/// Of the devices that are the same adapter as this one, the first.
pub fn first_of_adapter(devices: &[Device], device: usize) -> usize {
    // What it computes in makes it another one.
    let adapter = |device: usize| (devices[device].info().index, devices[device].capabilities().f16);
    (0..=device).find(|&d| adapter(d) == adapter(device)).unwrap_or(device)
}

/// This machine with these budgets before anything is measured: one device is as fast as another.
pub fn unmeasured(devices: &[Device], budgets: &[Option<u64>]) -> Machine {
    let rates = Rates { matmul_gflops: 1e3, memory_gb_s: 1e2, ..Rates::default() };
    let profile = |(device, &memory): (&Device, &Option<u64>)| DeviceProfile {
        adapter: Some(device.info().index),
        memory,
        rates,
        ..bare(device)
    };
    let devices = devices.iter().zip(budgets).map(profile).collect();
    Machine { name: THIS.into(), devices, link: USUAL, ..Machine::default() }
}

/// A profile of an adapter of which nothing is known.
fn bare(device: &Device) -> DeviceProfile {
    DeviceProfile {
        name: device.info().name.clone(),
        driver: device.info().driver.clone(),
        max_binding: Some(device.capabilities().max_binding),
        ..DeviceProfile::default()
    }
}

/// An adapter's name without what drivers add in brackets.
fn short(device: &Device) -> &str {
    let name = &device.info().name;
    name.split(" (").next().unwrap_or(name)
}

/// Seconds since the beginning of 1970; 0 on a machine whose clock stands before it.
fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The sizes that are measured: the smallest, the largest and one between.
fn chosen(sorted: &[usize]) -> Vec<usize> {
    let last = sorted.len().saturating_sub(1);
    let mut chosen: Vec<usize> = [0, last / 2, last].iter().filter_map(|&i| sorted.get(i)).copied().collect();
    chosen.dedup();
    chosen
}

/// Times for a size between two measured ones, on a line through them; beyond them in proportion, because a line would
/// promise larger microbatches a gain that nobody has seen.
fn interpolated(samples: &BTreeMap<usize, ShapeProfile>, size: usize) -> Option<ShapeProfile> {
    let below = samples.range(..=size).next_back().or_else(|| samples.iter().next())?;
    let above = samples.range(below.0 + 1..).next().filter(|_| *below.0 <= size);
    let at = |low: f64, high: Option<f64>| {
        let (x, x0) = (size as f64, *below.0 as f64);
        match (high, above) {
            (Some(high), Some((&x1, _))) => (low + (high - low) * (x - x0) / (x1 as f64 - x0)).max(0.0),
            _ => low * x / x0,
        }
    };
    let mut layers = BTreeMap::new();
    for (kind, low) in &below.1.layers {
        let high = above.and_then(|(_, shape)| shape.layers.get(kind));
        let profile = LayerProfile {
            forward: at(low.forward, high.map(|h| h.forward)),
            input: at(low.input, high.map(|h| h.input)),
            weight: at(low.weight, high.map(|h| h.weight)),
            backward: low.backward.map(|b| at(b, high.and_then(|h| h.backward))),
        };
        layers.insert(kind.clone(), profile);
    }
    // It rests on both; what is known of the one stands for them, but for the steps.
    let ShapeProfile { submit_us, measured, .. } = *below.1;
    let measured = measured.map(|evidence| Evidence { steps: 0, ..evidence });
    Some(ShapeProfile { shape: String::new(), submit_us, measured, layers })
}

/// Rates of a device on which no layers could be measured.
fn rates_alone(device: &Device) -> Result<Rates> {
    let speed = device.block_on(crate::ops::bench::measure(device, || ()))?;
    Ok(Rates {
        matmul_gflops: speed.matmul_gflops,
        memory_gb_s: speed.memory_gb_s,
        submit_us: 1e3 * speed.readback_latency_ms,
        barrier_us: 1e3 * speed.readback_latency_ms,
        ..Rates::default()
    })
}
