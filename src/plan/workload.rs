//! What has to be computed, for no device in particular: the planner's view of a model and a batch.

use std::ops::Range;

use serde::Serialize;

use super::sharding::Sharding;
use crate::layers::Layers;
use crate::mesh::Wire;

/// A model and a batch, in the numbers that a plan depends on.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Workload {
    /// The layers in order; no layer is ever cut.
    pub layers: Vec<Layer>,
    /// Names of the kinds of layers: `embedding`, `attention`, `mlp`, `head`. Layers of one kind cost the same.
    pub kinds: Vec<String>,
    /// A parameter that two layers use.
    pub tie: Option<TiedLayers>,
    /// Tokens of a training step.
    pub tokens: u64,
    /// The most bytes of gradients that travel at once between devices that have the same layers.
    pub bucket: u64,
    /// Who has what of the state.
    pub sharding: Sharding,
    /// As what activations, their gradients and those of weights travel between devices.
    pub wire: Wire,
    /// Bytes of a device's staging buffers for what goes to the host's memory and comes from it.
    pub host_rings: u64,
    /// The ways to divide the batch into microbatches, from which the planner chooses. All have the same product of
    /// sequences and microbatches.
    pub batchings: Vec<Batching>,
}

impl Workload {
    /// Where each layer begins, and where the last one ends.
    pub fn starts(&self) -> Vec<Layers> {
        Layers::starts(self.layers.iter().map(|layer| layer.size))
    }
}

/// One layer.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Layer {
    /// For people: `attention of block 3`.
    pub name: String,
    /// How much of a layer it is among people, who count blocks.
    pub size: Layers,
    /// Position in [`Workload::kinds`].
    pub kind: usize,
    /// Bytes of the weights that it owns and the optimizer updates, so none of a frozen one. A tied weight counts for its
    /// owner alone.
    pub weights: u64,
    /// Bytes of these weights as they travel to other devices that have the layer.
    pub sent: u64,
    /// Bytes of all weights that its kernels read, frozen and tied ones too.
    pub read: u64,
    /// Bytes of its weights, gradients and moments on the device, as allocated. Of a tied weight only the owner's.
    pub state: u64,
    /// Those of them that only who updates a weight must have: of several devices that have the layer each has a part.
    pub moments: u64,
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
    /// What layers compute and hold, by the kernels that devices choose:
    /// [`DeviceProfile::kernels`](super::DeviceProfile::kernels) says which of these is a device's.
    pub footprints: Vec<Footprint>,
    /// Bytes of an activation between two layers, and of its gradient.
    pub activation: u64,
    /// Bytes that each end of a link takes for a tensor in flight.
    pub link_buffer: u64,
    /// Bytes of the largest tensor that one binding must hold, by kind of layer.
    pub largest_tensor: Vec<u64>,
    /// What a gang adds up in F and in I of a layer, by kind of layer; empty where devices have whole layers.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub sums: Vec<[Sums; 2]>,
}

/// Sums over a gang.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Sums {
    /// How many.
    pub count: usize,
    /// Bytes of all of them together.
    pub bytes: u64,
}

/// What layers compute and hold on devices that choose the same kernels for them.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Footprint {
    /// What one layer of each kind computes, as [`Workload::kinds`].
    pub work: Vec<KindWork>,
    /// What one layer of each kind holds.
    pub memory: Vec<FormMemory>,
    /// What a stage holds because of its place.
    pub ends: EndMemory,
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
pub struct StageForm {
    /// Whether I and W are separate actions.
    pub split: bool,
    /// Whether F keeps the stage's input alone and the backward pass repeats F.
    pub recompute: bool,
}

impl StageForm {
    /// Every form.
    pub const ALL: [StageForm; 4] = [
        StageForm { split: false, recompute: false },
        StageForm { split: true, recompute: false },
        StageForm { split: false, recompute: true },
        StageForm { split: true, recompute: true },
    ];

    /// Its position in [`StageForm::ALL`].
    pub fn index(self) -> usize {
        usize::from(self.split) + 2 * usize::from(self.recompute)
    }
}

/// Bytes of one layer in each of [`StageForm::ALL`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct FormMemory(pub [LayerMemory; StageForm::ALL.len()]);

impl std::ops::Index<StageForm> for FormMemory {
    type Output = LayerMemory;

    fn index(&self, form: StageForm) -> &LayerMemory {
        &self.0[form.index()]
    }
}

impl std::ops::IndexMut<StageForm> for FormMemory {
    fn index_mut(&mut self, form: StageForm) -> &mut LayerMemory {
        &mut self.0[form.index()]
    }
}

/// Bytes of one layer in one form.
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
    pub first: FormMemory,
    /// Every stage but that one: its input is kept.
    pub after_first: FormMemory,
    /// The stage with the last layer.
    pub last: FormMemory,
    /// Every stage but that one: the gradient of its output arrives.
    pub before_last: FormMemory,
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

impl Footprint {
    /// What the place of a stage of these layers adds, of so many.
    pub(super) fn ends(&self, range: &Range<usize>, layers: usize) -> [&FormMemory; 2] {
        let first = if range.start == 0 { &self.ends.first } else { &self.ends.after_first };
        let last = if range.end == layers { &self.ends.last } else { &self.ends.before_last };
        [first, last]
    }
}
