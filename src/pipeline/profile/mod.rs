//! Measures this machine for a model: layers on each adapter, links between each pair, how much two disturb each other.
//! Every figure comes from [real steps](super::probe) and takes seconds; a [`Cache`] keeps them, with what they rest on:
//! what was measured beside other programs is measured again when they are gone, and training runs correct the rest.

mod cache;
mod learn;
pub mod noise;
mod pair;

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::time::{SystemTime, UNIX_EPOCH};

pub use cache::Cache;
pub use learn::{Basis, Finding, KINDS_OF_WORK, Outcome, Work};
use noise::{Quiet, beside, is_as_good, limit};
use pair::Pair;

use super::probe::{LAYERS, MICROBATCHES, Probe, Times, layers_schedule};
use super::workload::{KINDS, shape_key};
use crate::error::{Error, Result};
use crate::gpu::Device;
use crate::graph::Phase;
use crate::model::{Model, Purpose};
use crate::plan::{DeviceProfile, Evidence, LayerProfile, Link, LinkProfile, Machine, Rates, ShapeProfile};
use crate::schedule::{Jitter, Kind};

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
    /// It begins to measure something: what.
    Measuring(&'a str),
    /// It waits, because other programs take this part of the cores.
    Waiting(f64),
    /// One or more steps of a probe have ended; nothing runs at the moment.
    Step,
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
        let quiet = &mut Quiet::new(say);
        let mut profiles: HashMap<usize, DeviceProfile> = HashMap::new();
        let mut pairs: HashMap<(usize, usize), Pair> = HashMap::new();
        let count = self.devices.len();
        for device in (0..count).filter(|&d| first(d) == d) {
            profiles.insert(device, self.device(device, sizes, quiet)?);
        }
        let cores = std::thread::available_parallelism().map_or(1.0, |n| n.get() as f64);
        for i in 0..count {
            for j in i + 1..count {
                let key = (first(i), first(j));
                if let Entry::Vacant(entry) = pairs.entry(key) {
                    let demand = profiles[&key.0].cores + profiles[&key.1].cores;
                    entry.insert(self.pair((i, j), sizes, (demand / cores).max(1.0), quiet)?);
                }
            }
        }
        let mut machine = Machine { name: "this machine".into(), cores: Some(cores), ..Machine::default() };
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
            machine.link = Link { latency_us: 0.0, gb_s: 10.0, ..Link::default() };
        }
        Ok(machine)
    }

    /// One adapter, from the cache as far as it has the shapes.
    fn device(&self, index: usize, sizes: &[usize], quiet: &mut Quiet) -> Result<DeviceProfile> {
        let device = &self.devices[index];
        let limit = limit(device);
        let bare = || DeviceProfile {
            name: device.info().name.clone(),
            driver: device.info().driver.clone(),
            max_binding: Some(device.capabilities().max_binding),
            ..DeviceProfile::default()
        };
        let cached = || self.cache.as_ref().and_then(|cache| cache.read_device(device));
        let mut profile = cached().filter(|_| !self.fresh).unwrap_or_else(bare);
        let shape = |size: usize| shape_key(self.model, size, self.sequence);
        let mut sorted = sizes.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        let mut samples: BTreeMap<usize, ShapeProfile> = BTreeMap::new();
        let mut measured = Vec::new();
        let mut seconds_per_sequence = 0.0;
        for size in chosen(&sorted) {
            let known = profile.shape(&shape(size)).cloned();
            let is_good = |known: &ShapeProfile, quiet: &mut Quiet| {
                let loudest = beside(known.measured).into_iter().chain(beside(profile.measured));
                !quiet.is_worth(loudest.reduce(f64::max), limit)
            };
            if let Some(known) = known.filter(|known| is_good(known, quiet)) {
                seconds_per_sequence = step_seconds(&known) / size as f64;
                samples.insert(size, known);
                continue;
            }
            if seconds_per_sequence * size as f64 * STEPS_OF_A_MEASUREMENT > LONGEST {
                continue;
            }
            let what = format!("measuring {}: microbatches of {size} sequences", profile.name);
            let (sample, others) = quiet.measure(limit, |say| {
                say(Progress::Measuring(&what));
                self.measure(device, size, say)
            })?;
            let Some(sample) = sample else { break };
            let sample = sample.beside(others, shape(size));
            sample.put(&mut profile, limit);
            // The one before, if noise has come back.
            let Some(best) = profile.shape(&sample.shape.shape) else { break };
            seconds_per_sequence = step_seconds(best) / size as f64;
            samples.insert(size, best.clone());
            measured.push(sample);
        }
        let mut is_new = !measured.is_empty();
        if profile.rates.matmul_gflops == 0.0 {
            let what = format!("measuring {}: rates, because no three layers fit", profile.name);
            (quiet.say)(Progress::Measuring(&what));
            profile.rates = rates_alone(device)?;
            is_new = true;
        }
        if let Some(cache) = self.cache.as_ref().filter(|_| is_new) {
            // Other programs may have added to the file meanwhile.
            let mut newest = cached().unwrap_or_else(bare);
            // Whoever asks for new measurements gets them, however loud it is.
            let limit = if self.fresh { 1.0 } else { limit };
            measured.iter().for_each(|sample| sample.put(&mut newest, limit));
            if newest.rates.matmul_gflops == 0.0 {
                newest.rates = profile.rates;
            }
            cache.write_device(device, newest);
        }
        for &size in sorted.iter().filter(|size| !samples.contains_key(size)) {
            // Training runs have added sizes between those that are measured.
            let good =
                profile.shape(&shape(size)).is_some_and(|s| !quiet.is_worth(beside(s.measured), limit));
            if !good && let Some(between) = interpolated(&samples, size) {
                profile.put(ShapeProfile { shape: shape(size), ..between });
            }
        }
        Ok(profile)
    }

    /// Measures the layers for microbatches of `size` sequences, and rates with them. None where the layers do not fit.
    fn measure(&self, device: &Device, size: usize, say: &mut dyn FnMut(Progress)) -> Result<Option<Sample>> {
        let mut by_split = Vec::new();
        let mut weights = 0;
        for split in [true, false] {
            let Some(mut probe) = self.probe(device, size, split)? else { return Ok(None) };
            let go_on = |enough: bool| {
                say(Progress::Step);
                !enough
            };
            by_split.push(probe.measure(SECONDS, self.patience, go_on)?);
            weights = probe.weights;
            probe.stop()?;
        }
        let (apart, joined) = (&by_split[0], &by_split[1]);
        let part = (apart.jitter.part + joined.jitter.part) / 2.0;
        let adapted = self.model.adapter().is_some();
        let submit = (apart.submit + joined.submit) / 2.0;
        let mut layers = BTreeMap::new();
        for (kind, name) in KINDS.iter().enumerate() {
            let seconds = |times: &Times, action: Kind| match kind {
                0 => (times.of(0, action) - submit).max(0.0),
                1 if adapted && action != Kind::F => ((times.of(2, action) - submit) / 2.0).max(0.0),
                1 => ((times.of(1, action) + times.of(2, action) - 2.0 * submit) / 3.0).max(0.0),
                _ => (times.of(3, action) - submit).max(0.0),
            };
            let profile = LayerProfile {
                forward: (seconds(apart, Kind::F) + seconds(joined, Kind::F)) / 2.0,
                input: seconds(apart, Kind::I),
                weight: seconds(apart, Kind::W),
                backward: Some(seconds(joined, Kind::B)),
            };
            layers.insert(name.to_string(), profile);
        }
        let software = device.capabilities().software;
        let rate = |bytes: u64, seconds: f64| (bytes as f64 / GIGA / (seconds - submit).max(1e-7)).min(1e6);
        let rates = Rates {
            matmul_gflops: self.block_flops(size)? / GIGA / layers["block"].sum().max(1e-9),
            memory_gb_s: rate(7 * weights, joined.update),
            launch_us: 0.0,
            submit_us: submit / MICRO,
            optimizer_gb_s: Some(rate(weights, joined.update)),
            norm_gb_s: Some(rate(weights, joined.norm)),
            clear_gb_s: Some(rate(weights, joined.clear)),
            barrier_us: joined.barrier / MICRO,
        };
        let evidence = Evidence {
            unix_seconds: unix_seconds(),
            steps: (apart.steps + joined.steps) as u64,
            spread: part,
            ..Evidence::default()
        };
        Ok(Some(Sample {
            shape: ShapeProfile {
                submit_us: Some(submit / MICRO),
                measured: Some(evidence),
                layers,
                ..ShapeProfile::default()
            },
            // A software adapter's demand is its number of threads; what goes beyond is this program's own.
            cores: if software { joined.cores.round().max(1.0) } else { joined.cores.min(1.0) },
            jitter: Jitter { part, ..joined.jitter },
            rates,
            adapted,
        }))
    }

    fn block_flops(&self, size: usize) -> Result<f64> {
        let purpose = Purpose::Training { tokens: size * self.sequence };
        let model = self.model.with_blocks(2)?;
        let graph = model.stage_graph(2..3, size, self.sequence, purpose)?.graph;
        Ok([Phase::Forward, Phase::Input, Phase::Weight].iter().map(|&p| graph.phase_flops(p)).sum())
    }

    /// A probe of three blocks between embedding and head; none if it does not fit.
    fn probe(&self, device: &Device, size: usize, split: bool) -> Result<Option<Probe>> {
        let (schedule, cuts) = layers_schedule(split);
        let model = self.model.with_blocks(LAYERS[1].len() + LAYERS[2].len())?;
        let shape = (size, self.sequence);
        match Probe::new(&model, schedule, cuts, shape, std::slice::from_ref(device), device.info().memory) {
            Ok(probe) => Ok(Some(probe)),
            Err(Error::Memory { .. } | Error::Binding { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// What one measurement of a device shows.
struct Sample {
    shape: ShapeProfile,
    cores: f64,
    jitter: Jitter,
    rates: Rates,
    /// Whether an adapter is trained: its few weights say little about how fast many are updated.
    adapted: bool,
}

impl Sample {
    /// Notes for which shape, and what others took meanwhile.
    fn beside(mut self, others: Option<f64>, shape: String) -> Sample {
        self.shape.shape = shape;
        self.shape.measured = self.shape.measured.map(|evidence| Evidence { others, ..evidence });
        self
    }

    /// Puts it into a profile, except where that rests on less noise.
    fn put(&self, profile: &mut DeviceProfile, limit: f64) {
        let others = beside(self.shape.measured);
        let is_better = |before: Option<Evidence>| is_as_good(others, beside(before), limit);
        if profile.shape(&self.shape.shape).is_none_or(|before| is_better(before.measured)) {
            profile.put(self.shape.clone());
        }
        if is_better(profile.measured) {
            (profile.cores, profile.jitter) = (self.cores, Some(self.jitter));
            let is_loud = beside(profile.measured).is_some_and(|others| others > limit);
            if !self.adapted || is_loud || profile.rates.matmul_gflops == 0.0 {
                profile.rates = self.rates;
            }
            profile.measured = self.shape.measured;
        }
    }
}

/// Of the devices that are the same adapter as this one, the first.
pub fn first_of_adapter(devices: &[Device], device: usize) -> usize {
    let adapter = |device: usize| devices[device].info().index;
    (0..=device).find(|&d| adapter(d) == adapter(device)).unwrap_or(device)
}

/// Seconds since the beginning of 1970; 0 on a machine whose clock stands before it.
fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// About how long a probe's step takes with this shape.
fn step_seconds(shape: &ShapeProfile) -> f64 {
    let seconds = |(kind, name): (usize, &&str)| {
        let count = if kind == 1 { LAYERS[1].len() + LAYERS[2].len() } else { 1 };
        shape.layers.get(*name).map_or(0.0, |layer| count as f64 * layer.sum())
    };
    MICROBATCHES as f64 * KINDS.iter().enumerate().map(seconds).sum::<f64>()
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
    // It rests on both; what is known of the one stands for them.
    let ShapeProfile { submit_us, measured, .. } = *below.1;
    Some(ShapeProfile { shape: String::new(), submit_us, measured, layers })
}

/// Rates of a device on which no layers could be measured.
fn rates_alone(device: &Device) -> Result<Rates> {
    let speed = device.block_on(crate::ops::bench::measure(device))?;
    Ok(Rates {
        matmul_gflops: speed.matmul_gflops,
        memory_gb_s: speed.memory_gb_s,
        submit_us: 1e3 * speed.readback_latency_ms,
        barrier_us: 1e3 * speed.readback_latency_ms,
        ..Rates::default()
    })
}
