//! Weights, gradients and optimizer state of one device, pooled: a few buffers, one dispatch each for the norm and
//! for AdamW.
//!
//! A pool is cut into chunks that never cross a parameter, so sums of squares can be added in parameter order on the
//! host, whatever the cut into stages. A parameter tied to one on the same device shares its weight and has only a
//! gradient; tied to one elsewhere, it has a weight and a gradient, and the owner keeps the optimizer state. A frozen
//! parameter has a weight alone, in pools of its own, or nothing where it shares that too.

use std::collections::HashMap;
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::spread;
use crate::error::{Error, Result};
use crate::gpu::{Buffer, Device, Kernel, KernelKey, Range, Recorder, Specialisation};
use crate::model::Parameter;

/// Elements of a chunk: one workgroup's work in `square_sum` and `adamw`.
const CHUNK: usize = 8192;
/// Elements that offsets in a pool are multiples of: 256 bytes, what every adapter accepts for a binding.
const ALIGN: usize = 64;
/// Bytes after which a pool is closed, so that one binding holds it everywhere.
const POOL_BYTES: u64 = 64 << 20;

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

#[derive(Clone, Copy, Debug)]
struct Entry {
    pool: usize,
    offset: usize,
    len: usize,
}

/// What a pool holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// Weight, gradient, moments.
    Owned,
    /// Weight and gradient of a parameter that another device owns.
    Remote,
    /// Gradient of a parameter tied to one on this device.
    Alias,
    /// Weight of a frozen parameter, also where it is tied to one elsewhere.
    Frozen,
    /// Nothing: a frozen parameter tied to one on this device.
    Shared,
}

impl Role {
    /// Whether the pool has (weights, gradients, moments) in training.
    fn holds(self) -> (bool, bool, bool) {
        match self {
            Role::Owned => (true, true, true),
            Role::Remote => (true, true, false),
            Role::Alias => (false, true, false),
            Role::Frozen => (true, false, false),
            Role::Shared => (false, false, false),
        }
    }

    fn of(parameter: &Parameter, here: &[&str]) -> Role {
        let alias = parameter.tied_to.as_ref().map(|owner| here.contains(&owner.as_str()));
        match (parameter.frozen, alias) {
            (false, None) => Role::Owned,
            (false, Some(true)) => Role::Alias,
            (false, Some(false)) => Role::Remote,
            (true, None | Some(false)) => Role::Frozen,
            (true, Some(true)) => Role::Shared,
        }
    }
}

struct Pool {
    role: Role,
    elements: usize,
    entries: Vec<usize>,
}

/// How parameters are laid out: known before anything is allocated.
pub struct Layout {
    list: Vec<Parameter>,
    entries: Vec<Entry>,
    pools: Vec<Pool>,
}

impl Layout {
    /// Lays out the parameters of one device, in model order.
    pub fn new(list: Vec<Parameter>) -> Layout {
        let names: Vec<&str> = list.iter().map(|p| p.name.as_str()).collect();
        let mut pools: Vec<Pool> = Vec::new();
        let mut entries = Vec::new();
        for (index, parameter) in list.iter().enumerate() {
            let role = Role::of(parameter, &names);
            let elements = parameter.len().next_multiple_of(ALIGN);
            // Frozen and trained parameters take turns, so the last pool of the role need not be the last one.
            let last = pools.iter().rposition(|pool| pool.role == role);
            let fits = |pool: &usize| 4 * (pools[*pool].elements + elements) as u64 <= POOL_BYTES;
            let pool = last.filter(fits).unwrap_or(pools.len());
            if pool == pools.len() {
                pools.push(Pool { role, elements: 0, entries: Vec::new() });
            }
            entries.push(Entry { pool, offset: pools[pool].elements, len: parameter.len() });
            pools[pool].elements += elements;
            pools[pool].entries.push(index);
        }
        Layout { list, entries, pools }
    }

    /// The parameters, in model order.
    pub fn parameters(&self) -> &[Parameter] {
        &self.list
    }

    /// Bytes that [`Parameters::new`] will allocate; without gradients and moments for inference.
    pub fn bytes(&self, training: bool) -> u64 {
        let pools: u64 = self.pools.iter().map(|p| 4 * p.elements as u64 * copies(p.role, training)).sum();
        if !training {
            return pools;
        }
        let owned = self.owned_chunks() as u64;
        let bound = |p: &Pool| match p.role {
            Role::Owned => 2,
            Role::Alias => p.entries.len() as u64,
            Role::Remote | Role::Frozen | Role::Shared => 0,
        };
        let uniforms = 16 * self.pools.iter().map(bound).sum::<u64>();
        pools + 16 * owned + (4 * owned).max(16) + 32 + uniforms
    }

    /// (offset, length, decay, 0) of each chunk of a pool.
    fn chunks(&self, pool: usize) -> Vec<[u32; 4]> {
        let mut chunks = Vec::new();
        for &index in &self.pools[pool].entries {
            let entry = self.entries[index];
            for start in (0..entry.len).step_by(CHUNK) {
                let length = CHUNK.min(entry.len - start);
                let decay = self.list[index].decays() as u32;
                chunks.push([(entry.offset + start) as u32, length as u32, decay, 0]);
            }
        }
        chunks
    }

    /// Chunks whose squares are summed on this device.
    pub fn owned_chunks(&self) -> usize {
        let owned = (0..self.pools.len()).filter(|&p| self.pools[p].role == Role::Owned);
        owned.map(|p| self.chunks(p).len()).sum()
    }
}

fn copies(role: Role, training: bool) -> u64 {
    let (weights, gradients, moments) = role.holds();
    let state = gradients as u64 + 2 * moments as u64;
    weights as u64 + if training { state } else { 0 }
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
    weight: Option<Buffer>,
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
    /// For each chunk sum, the index of its parameter.
    owners: Vec<usize>,
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
            let make = |label: &str, wanted: bool| {
                wanted.then(|| device.buffer(label, 4 * pool.elements as u64)).transpose()
            };
            let (weights, gradients, moments) = pool.role.holds();
            buffers.push(Buffers {
                weight: make("weights", weights)?,
                gradient: make("gradients", training && gradients)?,
                first: make("first moments", training && moments)?,
                second: make("second moments", training && moments)?,
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
                Role::Owned => {
                    let chunks = self.layout.chunks(index);
                    let table = device.buffer("chunks", 16 * chunks.len() as u64)?;
                    device.upload(&table, 0, bytemuck::cast_slice(&chunks));
                    let words = [chunks.len() as u32, owners.len() as u32];
                    let groups = spread(chunks.len(), device.capabilities());
                    let gradient = part(&buffers.gradient)?;
                    let ranges = vec![table.whole(), gradient.clone(), sums.whole()];
                    norm.push(bind(&square_sum, words, ranges, groups)?);
                    let ranges = vec![
                        table.whole(),
                        step.whole(),
                        gradient,
                        part(&buffers.weight)?,
                        part(&buffers.first)?,
                        part(&buffers.second)?,
                    ];
                    adam.push(bind(&plain("adamw"), words, ranges, groups)?);
                    for &entry in &pool.entries {
                        let count = self.layout.entries[entry].len.div_ceil(CHUNK);
                        owners.extend(std::iter::repeat_n(entry, count));
                    }
                }
                Role::Alias => {
                    for &entry in &pool.entries {
                        let parameter = &self.layout.list[entry];
                        let owner = parameter.tied_to.as_deref().unwrap_or_default();
                        let ranges = vec![self.gradient(&parameter.name)?, self.gradient(owner)?];
                        let groups = spread(parameter.len().div_ceil(64), device.capabilities());
                        fold.push(bind(&plain("accumulate"), [1, parameter.len() as u32], ranges, groups)?);
                    }
                }
                Role::Remote | Role::Frozen | Role::Shared => {}
            }
        }
        Ok(Training { sums, owners, step, norm, adam, fold })
    }

    /// The parameters, in model order.
    pub fn list(&self) -> &[Parameter] {
        &self.layout.list
    }

    /// Whether a parameter is at home on this device: its optimizer state, if it is trained, and its weight, of which
    /// another device may have a copy.
    pub fn owns(&self, name: &str) -> bool {
        self.names.get(name).is_some_and(|&index| self.layout.list[index].tied_to.is_none())
    }

    /// Where part of a parameter lies.
    pub fn part(&self, name: &str, part: Part) -> Result<Range> {
        let index = *self.names.get(name).ok_or_else(|| missing(name))?;
        let entry = self.layout.entries[index];
        let buffers = &self.buffers[entry.pool];
        let role = self.layout.pools[entry.pool].role;
        if part == Part::Weight && matches!(role, Role::Alias | Role::Shared) {
            let owner = self.layout.list[index].tied_to.as_deref().unwrap_or_default();
            return self.part(owner, part);
        }
        let buffer = match part {
            Part::Weight => &buffers.weight,
            Part::Gradient => &buffers.gradient,
            Part::First => &buffers.first,
            Part::Second => &buffers.second,
        };
        let buffer = buffer.as_ref().ok_or_else(|| missing(name))?;
        Ok(buffer.range(4 * entry.offset as u64, 4 * entry.len as u64))
    }

    /// Where a weight lies.
    pub fn weight(&self, name: &str) -> Result<Range> {
        self.part(name, Part::Weight)
    }

    /// Where a gradient lies.
    pub fn gradient(&self, name: &str) -> Result<Range> {
        self.part(name, Part::Gradient)
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

    /// Adds chunk sums per parameter: (name, sum of squares) in model order.
    pub fn squares(&self, sums: &[f32]) -> Vec<(String, f64)> {
        let Some(training) = &self.training else { return Vec::new() };
        let mut squares: Vec<(String, f64)> = Vec::new();
        let mut last = None;
        for (&owner, &sum) in training.owners.iter().zip(sums) {
            if last != Some(owner) {
                squares.push((self.layout.list[owner].name.clone(), 0.0));
                last = Some(owner);
            }
            if let Some(entry) = squares.last_mut() {
                entry.1 += sum as f64;
            }
        }
        squares
    }

    /// Records one AdamW step on all owned parameters.
    pub fn record_adam(&self, device: &Device, recorder: &mut Recorder, step: AdamStep) -> Result<()> {
        let training = self.training.as_ref().ok_or_else(|| missing("optimizer"))?;
        device.upload(&training.step, 0, bytemuck::bytes_of(&step));
        training.adam.iter().for_each(|bound| bound.record(recorder));
        Ok(())
    }
}

fn missing(name: &str) -> Error {
    Error::Shape { op: "parameter", message: format!("{name} is not on this device") }
}
