//! Which parameters share a pool, and what a pool holds: known before anything is allocated.

use super::CHUNK;
use crate::graph::DType;
use crate::model::{Parameter, Weights};

/// Bytes that offsets in a pool are multiples of, what every adapter accepts for a binding.
const ALIGN: usize = 256;
/// Bytes after which a pool is closed, so that one binding holds it everywhere.
const POOL_BYTES: u64 = 64 << 20;

#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub(super) pool: usize,
    /// Elements before it in the pool.
    pub(super) offset: usize,
    pub(super) len: usize,
}

/// What a pool is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
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

/// The buffers of a pool.
#[derive(Clone, Copy, Debug)]
pub(super) struct Held {
    /// Weights in f32: those that kernels read, or the masters of packed ones.
    pub(super) full: bool,
    /// Weights as bf16.
    pub(super) packed: bool,
    pub(super) gradient: bool,
    /// Both moments.
    pub(super) moments: bool,
}

pub(super) struct Pool {
    pub(super) role: Role,
    pub(super) weights: Weights,
    pub(super) elements: usize,
    pub(super) entries: Vec<usize>,
}

impl Pool {
    pub(super) fn held(&self, training: bool) -> Held {
        let weight = !matches!(self.role, Role::Alias | Role::Shared);
        let moments = training && self.role == Role::Owned;
        let stored = self.weights.stored(moments);
        Held {
            full: weight && stored.contains(&DType::F32),
            packed: weight && stored.contains(&DType::BF16),
            gradient: training && !matches!(self.role, Role::Frozen | Role::Shared),
            moments,
        }
    }

    fn bytes(&self, training: bool) -> u64 {
        let held = self.held(training);
        let full = held.full as u64 + held.gradient as u64 + 2 * held.moments as u64;
        full * DType::F32.bytes(self.elements) + held.packed as u64 * DType::BF16.bytes(self.elements)
    }
}

/// How parameters are laid out: known before anything is allocated.
pub struct Layout {
    pub(super) list: Vec<Parameter>,
    pub(super) entries: Vec<Entry>,
    pub(super) pools: Vec<Pool>,
}

impl Layout {
    /// Lays out the parameters of one device, in model order.
    pub fn new(list: Vec<Parameter>) -> Layout {
        let names: Vec<&str> = list.iter().map(|p| p.name.as_str()).collect();
        let mut pools: Vec<Pool> = Vec::new();
        let mut entries = Vec::new();
        for (index, parameter) in list.iter().enumerate() {
            let (role, weights) = (Role::of(parameter, &names), parameter.weights);
            let element = if weights.packed() { 2 } else { 4 };
            let elements = parameter.len().next_multiple_of(ALIGN / element);
            // Frozen and trained parameters take turns, so the last pool of the kind need not be the last one.
            let last = pools.iter().rposition(|pool| (pool.role, pool.weights) == (role, weights));
            let fits = |pool: &usize| 4 * (pools[*pool].elements + elements) as u64 <= POOL_BYTES;
            let pool = last.filter(fits).unwrap_or(pools.len());
            if pool == pools.len() {
                pools.push(Pool { role, weights, elements: 0, entries: Vec::new() });
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

    /// Bytes that [`Parameters::new`](super::Parameters::new) will allocate; without gradients and moments for inference.
    pub fn bytes(&self, training: bool) -> u64 {
        let pools: u64 = self.pools.iter().map(|pool| pool.bytes(training)).sum();
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
    pub(super) fn chunks(&self, pool: usize) -> Vec<[u32; 4]> {
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
