//! Measures this machine for a model: layers on each adapter, links between each pair, how much two disturb each other.
//! Every figure comes from [real steps](super::probe) and takes seconds; a cache keeps them.

mod cache;
mod pair;

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use pair::Pair;

use super::probe::{LAYERS, MICROBATCHES, Probe, Times, layers_schedule};
use super::workload::{KINDS, shape_key};
use crate::error::{Error, Result};
use crate::gpu::Device;
use crate::graph::Phase;
use crate::model::{Model, Purpose};
use crate::plan::{DeviceProfile, LayerProfile, Link, LinkProfile, Machine, Rates, ShapeProfile};
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
    /// Folder of measurements.
    pub cache: Option<PathBuf>,
    /// Whatever else the times depend on, such as the settings of a driver; part of the cache's key.
    pub environment: String,
    /// Measure again what the cache has.
    pub fresh: bool,
    /// Seconds that one measurement may take on a machine whose speed wanders, until the mean is steady.
    pub patience: f64,
}

/// What a profiler says while it measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress<'a> {
    /// It begins to measure something: what.
    Measuring(&'a str),
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
        let adapter = |device: usize| self.devices[device].info().index;
        let first = |device: usize| (0..=device).find(|&d| adapter(d) == adapter(device)).unwrap_or(device);
        let mut profiles: HashMap<usize, DeviceProfile> = HashMap::new();
        let mut pairs: HashMap<(usize, usize), Pair> = HashMap::new();
        let count = self.devices.len();
        for device in (0..count).filter(|&d| first(d) == d) {
            profiles.insert(device, self.device(device, sizes, say)?);
        }
        let cores = std::thread::available_parallelism().map_or(1.0, |n| n.get() as f64);
        for i in 0..count {
            for j in i + 1..count {
                let key = (first(i), first(j));
                if let Entry::Vacant(entry) = pairs.entry(key) {
                    let demand = profiles[&key.0].cores + profiles[&key.1].cores;
                    entry.insert(self.pair((i, j), sizes, (demand / cores).max(1.0), say)?);
                }
            }
        }
        let mut machine = Machine { name: "this machine".into(), cores: Some(cores), ..Machine::default() };
        machine.slowdown = vec![vec![1.0; count]; count];
        for i in 0..count {
            let profile = profiles[&first(i)].clone();
            machine.devices.push(DeviceProfile { memory: self.budgets[i], ..profile });
            for j in i + 1..count {
                let pair = pairs[&(first(i), first(j))];
                machine.slowdown[i][j] = pair.slowdown.0;
                machine.slowdown[j][i] = pair.slowdown.1;
                machine.links.push(LinkProfile { from: i, to: j, link: pair.there });
                machine.links.push(LinkProfile { from: j, to: i, link: pair.back });
                machine.link = pair.there;
            }
        }
        if count == 1 {
            machine.link = Link { latency_us: 0.0, gb_s: 10.0, ..Link::default() };
        }
        Ok(machine)
    }

    /// One adapter, from the cache as far as it has the shapes.
    fn device(&self, index: usize, sizes: &[usize], say: &mut dyn FnMut(Progress)) -> Result<DeviceProfile> {
        let device = &self.devices[index];
        let key = self.key(&[device]);
        let known = self.read(&key).and_then(|machine| machine.devices.into_iter().next());
        let mut profile = known.unwrap_or_else(|| DeviceProfile {
            name: device.info().name.clone(),
            driver: device.info().driver.clone(),
            max_binding: Some(device.capabilities().max_binding),
            ..DeviceProfile::default()
        });
        let shape = |size: usize| shape_key(self.model, size, self.sequence);
        let mut sorted = sizes.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        let mut samples: BTreeMap<usize, ShapeProfile> = BTreeMap::new();
        let mut seconds_per_sequence = 0.0;
        for size in chosen(&sorted) {
            if let Some(known) = profile.shape(&shape(size)) {
                seconds_per_sequence = step_seconds(known) / size as f64;
                samples.insert(size, known.clone());
                continue;
            }
            if seconds_per_sequence * size as f64 * STEPS_OF_A_MEASUREMENT > LONGEST {
                continue;
            }
            let what = format!("measuring {}: microbatches of {size} sequences", profile.name);
            say(Progress::Measuring(&what));
            let Some(measured) = self.measure(device, size, &mut profile, say)? else { break };
            seconds_per_sequence = step_seconds(&measured) / size as f64;
            profile.shapes.push(ShapeProfile { shape: shape(size), ..measured.clone() });
            samples.insert(size, measured);
        }
        if profile.rates.matmul_gflops == 0.0 {
            let what = format!("measuring {}: rates, because no three layers fit", profile.name);
            say(Progress::Measuring(&what));
            profile.rates = rates_alone(device)?;
        }
        let machine = Machine {
            name: key.clone(),
            link: Link { gb_s: 1.0, ..Link::default() },
            devices: vec![profile.clone()],
            ..Machine::default()
        };
        self.write(&key, &machine);
        for &size in &sorted {
            if profile.shape(&shape(size)).is_none()
                && let Some(between) = interpolated(&samples, size)
            {
                profile.shapes.push(ShapeProfile { shape: shape(size), ..between });
            }
        }
        Ok(profile)
    }

    /// Measures the layers for microbatches of `size` sequences, and the rates of `profile` with them. None where the
    /// layers do not fit.
    fn measure(
        &self,
        device: &Device,
        size: usize,
        profile: &mut DeviceProfile,
        say: &mut dyn FnMut(Progress),
    ) -> Result<Option<ShapeProfile>> {
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
        profile.jitter = Some(Jitter { part, ..joined.jitter });
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
        // A software adapter's demand is its number of threads; what goes beyond is this program's own.
        profile.cores = if software { joined.cores.round().max(1.0) } else { joined.cores.min(1.0) };
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
        // An adapter's few weights say little about how fast many are updated.
        if !adapted || profile.rates.matmul_gflops == 0.0 {
            profile.rates = rates;
        }
        Ok(Some(ShapeProfile { shape: String::new(), submit_us: Some(submit / MICRO), layers }))
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
    Some(ShapeProfile { shape: String::new(), submit_us: below.1.submit_us, layers })
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
