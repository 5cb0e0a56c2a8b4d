//! Which parameters share a pool, and what a pool holds: known before anything is allocated.

use std::ops::Range;

use super::CHUNK;
use crate::graph::DType;
use crate::model::{Parameter, Weights};
use crate::ops::plan::Streams;

/// Bytes that offsets in a pool are multiples of, what every adapter accepts for a binding.
const ALIGN: usize = 256;
/// Bytes after which a pool is closed, so that one binding holds it everywhere.
const POOL_BYTES: u64 = 64 << 20;

#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) pool: usize,
    /// Elements before it in the pool.
    pub(super) offset: usize,
    pub(super) len: usize,
    /// The elements that this device owns: of them it has the optimizer's state.
    pub(super) owned: Range<usize>,
    /// Elements before that state in the pool's.
    pub(super) state: usize,
}

/// What a pool is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// Weight and gradient, and of what the device owns the optimizer's state.
    Trained,
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
            (false, None | Some(false)) => Role::Trained,
            (false, Some(true)) => Role::Alias,
            (true, None | Some(false)) => Role::Frozen,
            (true, Some(true)) => Role::Shared,
        }
    }
}

/// The elements of each buffer of a pool; none where it is not there.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Held {
    /// Weights in f32: those that kernels read, or the masters of packed ones.
    pub(super) full: Option<usize>,
    /// Weights as bf16.
    pub(super) packed: Option<usize>,
    pub(super) gradient: Option<usize>,
    /// Each of both moments.
    pub(super) moments: Option<usize>,
}

pub(super) struct Pool {
    pub(super) role: Role,
    pub(super) weights: Weights,
    pub(super) elements: usize,
    /// Elements that have the optimizer's state.
    pub(super) states: usize,
    pub(super) entries: Vec<usize>,
}

/// Bytes of the smallest element that is bound from where a parameter begins.
fn element(weights: Weights) -> usize {
    if weights.packed() { 2 } else { 4 }
}

impl Pool {
    pub(super) fn held(&self, training: bool, streams: Streams) -> Held {
        let weight = !matches!(self.role, Role::Alias | Role::Shared);
        let states = Some(self.states).filter(|&states| training && states > 0);
        let stored = if weight { self.weights.stored(states.is_some()) } else { &[] };
        // Of what passes the device only what it owns stays.
        let stays = |passes: bool| if passes { states } else { Some(self.elements) };
        let whole = stays(streams.weights);
        Held {
            full: if self.weights.packed() { states } else { whole }.filter(|_| stored.contains(&DType::F32)),
            packed: whole.filter(|_| stored.contains(&DType::BF16)),
            gradient: stays(streams.gradients)
                .filter(|_| training && !matches!(self.role, Role::Frozen | Role::Shared)),
            moments: states,
        }
    }

    fn bytes(&self, training: bool, streams: Streams) -> u64 {
        let held = self.held(training, streams);
        let of = |elements: Option<usize>, dtype: DType| elements.map_or(0, |count| dtype.bytes(count));
        let full = [held.full, held.gradient, held.moments, held.moments];
        full.iter().map(|&elements| of(elements, DType::F32)).sum::<u64>() + of(held.packed, DType::BF16)
    }
}

/// How parameters are laid out: known before anything is allocated.
pub struct Layout {
    pub(super) list: Vec<Parameter>,
    pub(super) entries: Vec<Entry>,
    pub(super) pools: Vec<Pool>,
    pub(super) streams: Streams,
}

impl Layout {
    /// Lays out the parameters of one device, in model order, which owns those that belong to its layers.
    pub fn new(list: Vec<Parameter>) -> Layout {
        let owned = |p: &Parameter| if p.tied_to.is_none() { 0..p.len() } else { 0..0 };
        let owned = list.iter().map(owned).collect();
        Layout::sharded(list, owned)
    }

    /// As [`Layout::new`], of which the device owns these elements of each: whole chunks of [`CHUNK`] elements.
    pub fn sharded(list: Vec<Parameter>, owned: Vec<Range<usize>>) -> Layout {
        Layout::streaming(list, owned, Streams::default())
    }

    /// As [`Layout::sharded`], of what the device holds where weights or gradients pass it: of these only what it owns.
    pub fn streaming(list: Vec<Parameter>, owned: Vec<Range<usize>>, streams: Streams) -> Layout {
        let names: Vec<&str> = list.iter().map(|p| p.name.as_str()).collect();
        let mut pools: Vec<Pool> = Vec::new();
        let mut entries = Vec::new();
        for (index, (parameter, owned)) in list.iter().zip(owned).enumerate() {
            let (role, weights) = (Role::of(parameter, &names), parameter.weights);
            let owned = if role == Role::Trained { owned } else { 0..0 };
            // Frozen and trained parameters take turns, so the last pool of the kind need not be the last one.
            let last = pools.iter().rposition(|pool| (pool.role, pool.weights) == (role, weights));
            let whole = |elements: usize| elements.next_multiple_of(ALIGN / element(weights));
            let elements = whole(parameter.len());
            let fits = |pool: &usize| 4 * (pools[*pool].elements + elements) as u64 <= POOL_BYTES;
            let pool = last.filter(fits).unwrap_or(pools.len());
            if pool == pools.len() {
                pools.push(Pool { role, weights, elements: 0, states: 0, entries: Vec::new() });
            }
            let into = &mut pools[pool];
            let (offset, state, len) = (into.elements, into.states, parameter.len());
            into.elements += elements;
            into.states += whole(owned.len());
            into.entries.push(index);
            entries.push(Entry { pool, offset, len, owned, state });
        }
        Layout { list, entries, pools, streams }
    }

    /// The parameters, in model order.
    pub fn parameters(&self) -> &[Parameter] {
        &self.list
    }

    /// Bytes that [`Parameters::new`](super::Parameters::new) will allocate; without gradients and moments for inference.
    pub fn bytes(&self, training: bool) -> u64 {
        let pools: u64 = self.pools.iter().map(|pool| pool.bytes(training, self.streams)).sum();
        if !training {
            return pools;
        }
        let owned = self.owned_chunks() as u64;
        let bound = |p: &Pool| match p.role {
            Role::Trained if p.states > 0 => 2,
            Role::Alias if !self.streams.gradients => p.entries.len() as u64,
            Role::Alias | Role::Trained | Role::Frozen | Role::Shared => 0,
        };
        let uniforms = 16 * self.pools.iter().map(bound).sum::<u64>();
        // Where gradients are in other places than weights, their chunks have a table of their own.
        let tables = if self.streams.gradients && !self.streams.weights { 2 } else { 1 };
        pools + tables * 16 * owned + (4 * owned).max(16) + 32 + uniforms
    }

    /// Bytes of the optimizer's moments when training.
    pub fn state_bytes(&self) -> u64 {
        2 * self.pools.iter().map(|pool| DType::F32.bytes(pool.states)).sum::<u64>()
    }

    /// (offset, length, decay, lag) of each chunk that the device owns of a pool, in buffers of which the device has all of the
    /// pool or only what it owns: by the lag its state comes earlier in its buffers.
    pub(super) fn chunks(&self, pool: usize, only_owned: bool) -> Vec<[u32; 4]> {
        let mut chunks = Vec::new();
        for &index in &self.pools[pool].entries {
            let Entry { offset, owned, state, .. } = &self.entries[index];
            for start in owned.clone().step_by(CHUNK) {
                let length = CHUNK.min(owned.end - start);
                let decay = self.list[index].decays() as u32;
                let offset = if only_owned { *state } else { offset + owned.start };
                let lag = (offset - state) as u32;
                chunks.push([(offset + start - owned.start) as u32, length as u32, decay, lag]);
            }
        }
        chunks
    }

    /// Chunks whose squares are summed on this device.
    pub fn owned_chunks(&self) -> usize {
        self.entries.iter().map(|entry| entry.owned.len().div_ceil(CHUNK)).sum()
    }

    /// What the device owns of the parameters that `wanted` picks, in buckets of at most so many elements.
    pub fn buckets(&self, wanted: impl Fn(&Parameter) -> bool, most: usize) -> Vec<Bucket> {
        let mut buckets: Vec<Bucket> = Vec::new();
        for (number, pool) in self.pools.iter().enumerate() {
            let mut open: Option<Bucket> = None;
            for &index in pool.entries.iter().filter(|&&index| wanted(&self.list[index])) {
                let Entry { offset, owned, .. } = &self.entries[index];
                for start in owned.clone().step_by(most) {
                    let elements = start..owned.end.min(start + most);
                    let at = offset + start;
                    // Only what fills a parameter up to where the next may begin lies between them.
                    let fits = |open: &Bucket| {
                        at - (open.first + open.elements) < ALIGN / element(pool.weights)
                            && at + elements.len() - open.first <= most
                    };
                    if !open.as_ref().is_some_and(fits) {
                        let fresh = Bucket {
                            pool: number,
                            first: at,
                            elements: 0,
                            packed: pool.weights.packed(),
                            segments: Vec::new(),
                        };
                        buckets.extend(open.replace(fresh));
                    }
                    if let Some(open) = &mut open {
                        let name = self.list[index].name.clone();
                        open.segments.push(Segment { name, at: at - open.first, elements: elements.clone() });
                        open.elements = at + elements.len() - open.first;
                    }
                }
            }
            buckets.extend(open);
        }
        buckets
    }
}

/// Elements that one device owns and that travel together: what lies in one run of a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// The pool on the device that owns them.
    pub(super) pool: usize,
    /// Elements before them in that pool.
    pub(super) first: usize,
    /// How many they are, with what lies between them.
    pub elements: usize,
    /// Whether their weights are packed.
    pub packed: bool,
    /// What they belong to.
    pub segments: Vec<Segment>,
}

/// Elements of one parameter in a [`Bucket`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The parameter.
    pub name: String,
    /// Elements of the bucket before them.
    pub at: usize,
    /// Which they are.
    pub elements: Range<usize>,
}

impl Bucket {
    /// Bytes of their gradients.
    pub fn gradient_bytes(&self) -> u64 {
        DType::F32.bytes(self.elements)
    }

    /// As what kernels read their weights.
    pub fn dtype(&self) -> DType {
        if self.packed { DType::BF16 } else { DType::F32 }
    }

    /// Bytes of their weights.
    pub fn weight_bytes(&self) -> u64 {
        self.dtype().bytes(self.elements)
    }
}
