//! Weights, gradients and optimizer state of one device, pooled: a few buffers, one dispatch each for the norm and
//! for AdamW.
//!
//! A pool is cut into chunks that never cross a parameter, so sums of squares can be added in parameter order on the
//! host, whatever the cut into stages. A parameter tied to one on the same device shares its weight and has only a
//! gradient; tied to one elsewhere, it has a weight and a gradient, and the owner keeps the optimizer state. Of a parameter that several
//! devices have each owns some chunks, and has the optimizer state (and f32 masters) of these alone. A frozen
//! parameter has a weight alone, in pools of its own, or nothing where it shares that too. Packed weights have pools of
//! their own as well; those that are trained here may have f32 masters, which the optimizer updates and rounds.

mod access;
mod layout;

pub use layout::{Bucket, Layout, Segment};

use std::collections::HashMap;
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::spread;
use crate::error::{Error, Result};
use crate::gpu::{Buffer, Device, Kernel, KernelKey, Range, Recorder, Specialisation};
use crate::graph::DType;
use crate::model::{Parameter, Weights};
use layout::Role;

/// Elements of a chunk: one workgroup's work in `square_sum` and `adamw`.
pub const CHUNK: usize = 8192;
/// Headers of `adamw` for packed weights.
const WITH_MASTERS: &str = include_str!("../../../shaders/headers/adamw_masters.wgsl");
const PACKED: &str = include_str!("../../../shaders/headers/adamw_packed.wgsl");

/// Numbers of one AdamW step, as `shaders/adamw.wgsl` reads them.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct AdamStep {
    /// Factor of the gradient, for clipping.
    pub clip: f32,
    /// Learning rate.
    pub rate: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Learning rate times weight decay.
    pub decay: f32,
    /// 1 / (1 − beta1^step).
    pub correction1: f32,
    /// 1 / (1 − beta2^step).
    pub correction2: f32,
}

/// Which tensors of a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The value.
    Weight,
    /// The gradient of the step.
    Gradient,
    /// AdamW's first moment.
    First,
    /// AdamW's second moment.
    Second,
}

/// Where part of a parameter lies.
#[derive(Clone, Debug)]
pub struct Home {
    /// In f32: these elements of it.
    pub full: Option<(Range, std::ops::Range<usize>)>,
    /// As bf16: a weight, beside its master or without one, these elements of it.
    pub packed: Option<(Range, std::ops::Range<usize>)>,
}

/// A dispatch with its bindings.
struct Bound {
    kernel: Arc<Kernel>,
    group: crate::gpu::BindGroup,
    groups: [u32; 3],
}

impl Bound {
    fn record(&self, recorder: &mut Recorder) {
        recorder.dispatch(&self.kernel, &self.group, self.groups);
    }
}

struct Buffers {
    full: Option<Buffer>,
    packed: Option<Buffer>,
    gradient: Option<Buffer>,
    first: Option<Buffer>,
    second: Option<Buffer>,
}

/// The parameters of one device.
pub struct Parameters {
    layout: Layout,
    names: HashMap<String, usize>,
    buffers: Vec<Buffers>,
    training: Option<Training>,
}

struct Training {
    sums: Buffer,
    /// For each chunk sum, the index of its parameter and the chunk's number there.
    owners: Vec<(usize, usize)>,
    step: Buffer,
    norm: Vec<Bound>,
    adam: Vec<Bound>,
    fold: Vec<Bound>,
}

impl Parameters {
    /// Allocates. Weights are zero until written.
    pub fn new(device: &Device, layout: Layout, training: bool) -> Result<Parameters> {
        let names = layout.list.iter().enumerate().map(|(i, p)| (p.name.clone(), i)).collect();
        let mut buffers = Vec::new();
        for pool in &layout.pools {
            let make = |label: &str, elements: Option<usize>, dtype: DType| {
                elements.map(|elements| device.buffer(label, dtype.bytes(elements))).transpose()
            };
            let held = pool.held(training, layout.streams);
            buffers.push(Buffers {
                full: make("weights", held.full, DType::F32)?,
                packed: make("packed weights", held.packed, DType::BF16)?,
                gradient: make("gradients", held.gradient, DType::F32)?,
                first: make("first moments", held.moments, DType::F32)?,
                second: make("second moments", held.moments, DType::F32)?,
            });
        }
        let mut parameters = Parameters { layout, names, buffers, training: None };
        if training {
            parameters.training = Some(parameters.prepare(device)?);
        }
        Ok(parameters)
    }

    fn prepare(&self, device: &Device) -> Result<Training> {
        let plain = |name| KernelKey { name, specialisation: Specialisation::default() };
        let lanes = if device.capabilities().software { 8 } else { 64 };
        let square_sum = KernelKey {
            name: "square_sum",
            specialisation: Specialisation { header: None, constants: vec![("LANES", lanes)] },
        };
        let sums = device.buffer("sums of squares", 4 * self.layout.owned_chunks() as u64)?;
        let step = device.buffer("optimizer step", std::mem::size_of::<AdamStep>() as u64)?;
        let bind =
            |key: &KernelKey, words: [u32; 2], ranges: Vec<Range>, groups: [u32; 3]| -> Result<Bound> {
                let kernel = device.kernel(key)?;
                let uniform = device.uniform("pool parameters", bytemuck::cast_slice(&words))?;
                let ranges = [vec![uniform.whole()], ranges].concat();
                Ok(Bound { group: device.bind(&kernel, &ranges), kernel, groups })
            };
        let (mut owners, mut norm, mut adam, mut fold) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (index, pool) in self.layout.pools.iter().enumerate() {
            let buffers = &self.buffers[index];
            let part = |buffer: &Option<Buffer>| -> Result<Range> {
                buffer.as_ref().map(Buffer::whole).ok_or_else(|| missing("pool"))
            };
            match pool.role {
                Role::Trained if pool.states > 0 => {
                    let streams = self.layout.streams;
                    let table = |only_owned: bool| -> Result<Buffer> {
                        let chunks = self.layout.chunks(index, only_owned);
                        let table = device.buffer("chunks", 16 * chunks.len() as u64)?;
                        device.upload(&table, 0, bytemuck::cast_slice(&chunks));
                        Ok(table)
                    };
                    let of_gradients = table(streams.gradients)?;
                    let apart = streams.gradients && !streams.weights;
                    let table = if apart { table(false)? } else { of_gradients.clone() };
                    let chunks = self.layout.chunks(index, false);
                    let words = [chunks.len() as u32, owners.len() as u32];
                    let groups = spread(chunks.len(), device.capabilities());
                    let gradient = part(&buffers.gradient)?;
                    let ranges = vec![of_gradients.whole(), gradient.clone(), sums.whole()];
                    norm.push(bind(&square_sum, words, ranges, groups)?);
                    let weight = if buffers.full.is_some() { &buffers.full } else { &buffers.packed };
                    let mut ranges = vec![
                        table.whole(),
                        step.whole(),
                        gradient,
                        part(weight)?,
                        part(&buffers.first)?,
                        part(&buffers.second)?,
                    ];
                    if pool.weights == Weights::BF16 {
                        ranges.push(part(&buffers.packed)?);
                    }
                    let mut key = adamw(pool.weights);
                    key.specialisation.constants.push(("GRADIENT_LAGS", apart as u32));
                    adam.push(bind(&key, words, ranges, groups)?);
                    for &entry in &pool.entries {
                        let owned = self.layout.entries[entry].owned.clone();
                        owners.extend(owned.step_by(CHUNK).map(|start| (entry, start / CHUNK)));
                    }
                }
                Role::Alias if !self.layout.streams.gradients => {
                    for &entry in &pool.entries {
                        let parameter = &self.layout.list[entry];
                        let owner = parameter.tied_to.as_deref().unwrap_or_default();
                        let ranges = vec![self.gradient(&parameter.name)?, self.gradient(owner)?];
                        let groups = spread(parameter.len().div_ceil(64), device.capabilities());
                        fold.push(bind(&plain("accumulate"), [1, parameter.len() as u32], ranges, groups)?);
                    }
                }
                Role::Alias | Role::Trained | Role::Frozen | Role::Shared => {}
            }
        }
        Ok(Training { sums, owners, step, norm, adam, fold })
    }

    /// The parameters, in model order.
    pub fn list(&self) -> &[Parameter] {
        &self.layout.list
    }

    /// Where part of a parameter lies.
    pub fn part(&self, name: &str, part: Part) -> Result<Home> {
        let index = *self.names.get(name).ok_or_else(|| missing(name))?;
        let entry = &self.layout.entries[index];
        let buffers = &self.buffers[entry.pool];
        let pool = &self.layout.pools[entry.pool];
        if part == Part::Weight && matches!(pool.role, Role::Alias | Role::Shared) {
            let owner = self.layout.list[index].tied_to.as_deref().unwrap_or_default();
            return self.part(owner, part);
        }
        let streams = self.layout.streams;
        let (full, is_state) = match part {
            Part::Weight => (&buffers.full, pool.weights.packed() || streams.weights),
            Part::Gradient => (&buffers.gradient, streams.gradients),
            Part::First => (&buffers.first, true),
            Part::Second => (&buffers.second, true),
        };
        let packed = buffers.packed.as_ref().filter(|_| part == Part::Weight);
        let range =
            |buffer: &Buffer, dtype: DType, first, len| buffer.range(dtype.bytes(first), dtype.bytes(len));
        let (first, elements) = match is_state {
            true => (entry.state, entry.owned.clone()),
            false => (entry.offset, 0..entry.len),
        };
        let full = full.as_ref().filter(|_| !elements.is_empty());
        let of_packed = match streams.weights {
            true => (entry.state, entry.owned.clone()),
            false => (entry.offset, 0..entry.len),
        };
        let packed = packed.filter(|_| !of_packed.1.is_empty());
        let home = Home {
            full: full.map(|buffer| (range(buffer, DType::F32, first, elements.len()), elements)),
            packed: packed.map(|buffer| {
                let (first, elements) = of_packed;
                (range(buffer, DType::BF16, first, elements.len()), elements)
            }),
        };
        if home.full.is_none() && home.packed.is_none() { Err(missing(name)) } else { Ok(home) }
    }

    /// Where the weight lies that kernels read: packed, if it is stored so.
    pub fn weight(&self, name: &str) -> Result<Range> {
        let home = self.part(name, Part::Weight)?;
        home.packed.or(home.full).map(|held| held.0).ok_or_else(|| missing(name))
    }

    /// Where a gradient lies.
    pub fn gradient(&self, name: &str) -> Result<Range> {
        self.part(name, Part::Gradient)?.full.map(|full| full.0).ok_or_else(|| missing(name))
    }

    /// Where the gradients of a bucket lie of which this device owns the elements.
    pub fn bucket_gradient(&self, bucket: &Bucket) -> Result<Range> {
        let buffer = self.buffers[bucket.pool].gradient.as_ref().ok_or_else(|| missing("bucket"))?;
        Ok(buffer.range(DType::F32.bytes(bucket.first), bucket.gradient_bytes()))
    }

    /// Whether the gradient of a parameter is complete only with that of one that is tied to it on this device.
    pub fn is_folded(&self, name: &str) -> bool {
        let alias = |pool: &&layout::Pool| pool.role == Role::Alias;
        let entries = self.layout.pools.iter().filter(alias).flat_map(|pool| &pool.entries);
        entries.into_iter().any(|&entry| self.layout.list[entry].tied_to.as_deref() == Some(name))
    }

    /// Sets all gradients to zero.
    pub fn record_clear(&self, recorder: &mut Recorder) {
        for buffer in self.buffers.iter().filter_map(|b| b.gradient.as_ref()) {
            recorder.clear(&buffer.whole());
        }
    }

    /// Adds the gradients of aliases to their owners'.
    pub fn record_fold(&self, recorder: &mut Recorder) {
        self.training.iter().flat_map(|t| &t.fold).for_each(|bound| bound.record(recorder));
    }

    /// Computes the sums of squares of all owned gradients; where they lie.
    pub fn record_norm(&self, recorder: &mut Recorder) -> Result<Range> {
        let training = self.training.as_ref().ok_or_else(|| missing("optimizer"))?;
        training.norm.iter().for_each(|bound| bound.record(recorder));
        Ok(training.sums.range(0, 4 * training.owners.len() as u64))
    }

    /// Chunks whose squares [`Parameters::record_norm`] sums.
    pub fn owned_chunks(&self) -> usize {
        self.training.as_ref().map_or(0, |training| training.owners.len())
    }

    /// The sums of squares of chunks, each with its parameter and its number there.
    pub fn squares(&self, sums: &[f32]) -> Vec<(String, usize, f32)> {
        let owners = self.training.iter().flat_map(|training| &training.owners);
        owners.zip(sums).map(|(&(of, chunk), &sum)| (self.layout.list[of].name.clone(), chunk, sum)).collect()
    }

    /// Records one AdamW step on all owned parameters.
    pub fn record_adam(&self, device: &Device, recorder: &mut Recorder, step: AdamStep) -> Result<()> {
        let training = self.training.as_ref().ok_or_else(|| missing("optimizer"))?;
        device.upload(&training.step, 0, bytemuck::bytes_of(&step));
        training.adam.iter().for_each(|bound| bound.record(recorder));
        Ok(())
    }
}

/// The optimizer of weights that are stored so.
pub fn adamw(weights: Weights) -> KernelKey {
    let header = match weights {
        Weights::F32 => None,
        Weights::BF16 => Some(WITH_MASTERS),
        Weights::BF16Only => Some(PACKED),
    };
    KernelKey { name: "adamw", specialisation: Specialisation { header, constants: Vec::new() } }
}

fn missing(name: &str) -> Error {
    Error::Shape { op: "parameter", message: format!("{name} is not on this device") }
}
