//! What has to be computed, for no device in particular: the planner's view of a model and a batch.

use std::ops::Range;

use serde::Serialize;

/// A model and a batch, in the numbers that a plan depends on.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Workload {
    /// The layers in order; no layer is ever cut.
    pub layers: Vec<Layer>,
    /// Names of the kinds of layers: `embedding`, `block`, `head`. Layers of one kind cost the same.
    pub kinds: Vec<String>,
    /// A parameter that two layers use.
    pub tie: Option<TiedLayers>,
    /// Tokens of a training step.
    pub tokens: u64,
    /// The ways to divide the batch into microbatches, from which the planner chooses. All have the same product of
    /// sequences and microbatches.
    pub batchings: Vec<Batching>,
}

/// One layer.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Layer {
    /// For people: `block 3`.
    pub name: String,
    /// Position in [`Workload::kinds`].
    pub kind: usize,
    /// Bytes of the weights that it owns and the optimizer updates, so none of a frozen one. A tied weight counts for its
    /// owner alone.
    pub weights: u64,
    /// Bytes of its weights, gradients and moments on the device, as allocated. Of a tied weight only the owner's.
    pub state: u64,
}

/// A weight that belongs to one layer and is used by another one too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct TiedLayers {
    /// The layer that uses it.
    pub user: usize,
    /// The layer that owns it.
    pub owner: usize,
    /// Bytes of the weight, and of its gradient, that travel in a step if the layers are apart; 0 if it is frozen.
    pub bytes: u64,
    /// Bytes more on the device that has both layers.
    pub together: u64,
    /// Bytes more on the user's device if the owner is on another one.
    pub user_apart: u64,
    /// Bytes more on the owner's device if the user is on another one.
    pub owner_apart: u64,
}

/// One way to divide the batch into microbatches.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Batching {
    /// Sequences of a microbatch.
    pub sequences: usize,
    /// Microbatches of a step.
    pub microbatches: usize,
    /// The key under which profiles hold measured times.
    pub shape: String,
    /// What one layer of each kind computes, as [`Workload::kinds`].
    pub work: Vec<KindWork>,
    /// What one layer of each kind holds.
    pub memory: Vec<KindMemory>,
    /// What a stage holds because of its place.
    pub ends: EndMemory,
    /// Bytes of an activation between two layers, and of its gradient.
    pub activation: u64,
    /// Bytes that each end of a link takes for a tensor in flight.
    pub link_buffer: u64,
    /// Bytes of the largest tensor that one binding must hold, by kind of layer.
    pub largest_tensor: Vec<u64>,
}

/// The work of one layer for one microbatch.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct KindWork {
    /// F.
    pub forward: Work,
    /// I.
    pub input: Work,
    /// W.
    pub weight: Work,
}

/// An amount of work.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Work {
    /// Floating-point operations.
    pub flops: f64,
    /// Bytes read and written.
    pub bytes: f64,
    /// Kernel launches.
    pub launches: usize,
}

/// How a stage is compiled, as far as memory depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize)]
pub struct Mode {
    /// Whether I and W are separate actions.
    pub split: bool,
    /// Whether F keeps the stage's input alone and the backward pass repeats F.
    pub recompute: bool,
}

/// Bytes of one layer in each [`Mode`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct KindMemory {
    /// B in one action.
    pub whole: LayerMemory,
    /// I and W apart.
    pub split: LayerMemory,
    /// B in one action, F repeated.
    pub whole_recompute: LayerMemory,
    /// I and W apart, F repeated.
    pub split_recompute: LayerMemory,
}

/// Bytes of one layer in one mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct LayerMemory {
    /// Held throughout, added up over the layers of a stage: parameters of kernels, what recomputation brings back.
    pub fixed: u64,
    /// Held while it works and shared with the other layers of the stage: only the largest counts.
    pub scratch: u64,
    /// Held from F until W (or B) has ended, for each microbatch in flight.
    pub stash: u64,
    /// Held from I until W has ended, and during B.
    pub gradient: u64,
}

/// Bytes of a stage that its place decides: whether it reads the data, whether it computes the loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct EndMemory {
    /// The stage with the first layer.
    pub first: KindMemory,
    /// Every stage but that one: its input is kept.
    pub after_first: KindMemory,
    /// The stage with the last layer.
    pub last: KindMemory,
    /// Every stage but that one: the gradient of its output arrives.
    pub before_last: KindMemory,
}

/// Bytes of a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct StageNeed {
    /// Held throughout, weights and links aside.
    pub fixed: u64,
    /// For each stash slot.
    pub stash: u64,
    /// For each gradient slot.
    pub gradient: u64,
}

impl KindMemory {
    /// The bytes in one mode.
    pub fn in_mode(&self, mode: Mode) -> LayerMemory {
        match (mode.split, mode.recompute) {
            (false, false) => self.whole,
            (true, false) => self.split,
            (false, true) => self.whole_recompute,
            (true, true) => self.split_recompute,
        }
    }

    /// The bytes in one mode, to be set.
    pub fn in_mode_mut(&mut self, mode: Mode) -> &mut LayerMemory {
        match (mode.split, mode.recompute) {
            (false, false) => &mut self.whole,
            (true, false) => &mut self.split,
            (false, true) => &mut self.whole_recompute,
            (true, true) => &mut self.split_recompute,
        }
    }
}

impl Workload {
    /// What the stage of these layers holds: sums over its layers, the largest scratch, and what its place adds.
    pub fn need(&self, batching: &Batching, range: &Range<usize>, mode: Mode) -> StageNeed {
        let kinds = self.layers[range.clone()].iter().map(|layer| &batching.memory[layer.kind]);
        let mut need = StageNeed::default();
        let mut scratch = 0;
        for part in kinds.chain(self.ends(batching, range)).map(|memory| memory.in_mode(mode)) {
            need.add(&part);
            scratch = scratch.max(part.scratch);
        }
        need.fixed += scratch;
        need
    }

    /// What the place of a stage adds.
    pub(super) fn ends<'a>(
        &self,
        batching: &'a Batching,
        range: &Range<usize>,
    ) -> impl Iterator<Item = &'a KindMemory> + use<'a> {
        let ends = &batching.ends;
        let first = if range.start == 0 { &ends.first } else { &ends.after_first };
        let last = if range.end == self.layers.len() { &ends.last } else { &ends.before_last };
        [first, last].into_iter()
    }
}
