//! From what is wanted to what each device will hold, before anything is allocated.

use std::ops::Range;

use super::decode::DecodePlan;
use super::{link, load, partition, tied};
use crate::error::{Error, Result};
use crate::gpu::{AdapterInfo, Capabilities, Device};
use crate::graph::StageGraph;
use crate::model::{Lora, Model, ModelConfig, Purpose, Weights};
use crate::ops::parameters::Layout;
use crate::ops::plan::MemoryPlan;
use crate::ops::program::DUMMY_BYTES;
use crate::schedule::{Schedule, SlotPlan};

/// What a pipeline is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Training steps.
    Training,
    /// Losses of whole sequences.
    Evaluation,
    /// Logits of whole sequences.
    Logits,
    /// Logits of the last token of growing texts. A microbatch is a group of `batch` texts that grow together, up to
    /// `sequence` tokens at a time or one; every group has caches.
    Decoding {
        /// Tokens of a text that the caches hold.
        capacity: usize,
    },
}

impl Use {
    /// Whether there are gradients and an optimizer.
    pub fn trains(self) -> bool {
        self == Use::Training
    }

    /// Whether the last stage ends in losses.
    pub fn scores(self) -> bool {
        matches!(self, Use::Training | Use::Evaluation)
    }
}

/// What to run.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The model.
    pub model: ModelConfig,
    /// What is trained beside the model's own weights, which then stay as they are.
    pub adapter: Option<Lora>,
    /// How the model's matrices are stored.
    pub weights: Weights,
    /// Sequences of a microbatch.
    pub batch: usize,
    /// Tokens of a sequence.
    pub sequence: usize,
    /// When each device computes what; says the number of stages, whose stages are where, and the microbatches of a step.
    pub schedule: Schedule,
    /// First layers of the stages after the first; balanced by floating-point operations if none.
    pub cuts: Option<Vec<usize>>,
    /// Whether a sequence may hold several texts, which do not see one another ([`Batch`](super::Batch) says where each
    /// begins).
    pub shared: bool,
    /// Stages that compute the activations of their layers again in the backward pass.
    pub recompute: Vec<usize>,
    /// What for.
    pub purpose: Use,
    /// Bytes each device may use; none where it is unknown.
    pub budgets: Vec<Option<u64>>,
}

impl Setup {
    /// The model, with its adapter, stored as it says.
    pub fn model(&self) -> Result<Model> {
        let model = Model::with_adapter(&self.model, self.adapter.as_ref())?.with_weights(self.weights);
        Ok(model.with_shared_sequences(self.shared))
    }
}

/// One stage of a plan.
pub(super) struct StagePlan {
    pub(super) stage: usize,
    pub(super) graph: StageGraph,
    pub(super) memory: MemoryPlan,
    pub(super) stash: SlotPlan,
    pub(super) gradient: SlotPlan,
}

/// A parameter that two devices have.
pub(super) struct Exchanged {
    /// Its name where it is used.
    pub(super) name: String,
    /// The name of the parameter that it is tied to.
    pub(super) owner: String,
    /// The rank that uses it.
    pub(super) user: usize,
    /// The rank that owns it.
    pub(super) home: usize,
    /// The stage that owns it.
    pub(super) stage: usize,
}

/// One device of a plan.
pub struct RankPlan {
    /// Position in the pipeline.
    pub rank: usize,
    /// The layers of its stages, stage by stage.
    pub layers: Vec<Range<usize>>,
    /// Bytes that will be allocated on it.
    pub bytes: u64,
    /// Bytes that it takes beside them while weights are loaded or saved.
    pub passing: u64,
    /// Floating-point operations of a step on it.
    pub flops: f64,
    pub(super) stages: Vec<StagePlan>,
    pub(super) layout: Layout,
    /// Where texts grow.
    pub(super) decoding: Option<DecodePlan>,
}

/// A checked plan.
pub struct Plan {
    /// What it was made from.
    pub setup: Setup,
    /// The model.
    pub model: Model,
    /// The lowered, validated schedule; when training, of the whole step.
    pub schedule: Schedule,
    /// Layers of each stage.
    pub stages: Vec<Range<usize>>,
    /// The devices.
    pub ranks: Vec<RankPlan>,
}

/// A tensor must fit one binding.
fn check_bindings(stage: &StageGraph, adapter: &AdapterInfo, capabilities: &Capabilities) -> Result<()> {
    let limit = capabilities.max_binding;
    match stage.graph.values.iter().find(|value| value.bytes() > limit) {
        None => Ok(()),
        Some(value) => Err(Error::Binding {
            tensor: format!("{} {:?}", value.name, value.shape),
            adapter: adapter.name.clone(),
            need: value.bytes(),
            limit,
            help: None,
        }),
    }
}

impl Plan {
    /// Plans for opened devices: [`Plan::new`] with what they are.
    pub fn for_devices(setup: Setup, devices: &[Device]) -> Result<Plan> {
        let described: Vec<_> = devices.iter().map(|d| (d.info().clone(), *d.capabilities())).collect();
        Plan::new(setup, &described)
    }

    /// Plans for these devices. Refuses, naming the device and the missing bytes, what does not fit.
    pub fn new(setup: Setup, devices: &[(AdapterInfo, Capabilities)]) -> Result<Plan> {
        let model = setup.model()?;
        if setup.sequence == 0 || setup.sequence > setup.model.context {
            let message = format!(
                "a sequence of {} tokens does not fit the model's context of {}; lower train.sequence or raise model.context",
                setup.sequence, setup.model.context
            );
            return Err(Error::config("train.sequence", message));
        }
        if setup.batch == 0 {
            return Err(Error::config("train.batch", "a microbatch needs at least one sequence"));
        }
        let schedule = setup.schedule.lowered()?;
        let (count, ranks) = (devices.len(), schedule.ranks.len());
        if count != ranks {
            let message = format!("the schedule {} is for {ranks} devices, not {count}", schedule.name);
            return Err(Error::config("pipeline.schedule", message));
        }
        let flops = model.layer_flops(setup.batch, setup.sequence)?;
        let stages = match &setup.cuts {
            Some(cuts) => partition::from_cuts(cuts, model.layers(), schedule.stages)?,
            None => partition::balanced(&flops, schedule.stages)?,
        };
        if let Some(stage) = setup.recompute.iter().find(|&&stage| stage >= schedule.stages) {
            let message = format!("there is no stage {stage}; the last is {}", schedule.stages - 1);
            return Err(Error::config("pipeline.recompute", message));
        }
        let microbatches = schedule.microbatches;
        let passing = load::memory(model.parameters().iter().map(|p| p.len()).max().unwrap_or(0));
        let mut plan = Plan { setup, model, schedule, stages, ranks: Vec::new() };
        for (rank, (adapter, capabilities)) in devices.iter().enumerate() {
            let mine: Vec<usize> =
                (0..plan.stages.len()).filter(|&s| plan.schedule.rank_of(s) == Some(rank)).collect();
            let stages = mine
                .iter()
                .map(|&stage| plan.plan_stage(stage, adapter, capabilities))
                .collect::<Result<Vec<_>>>()?;
            let layers: Vec<Range<usize>> = mine.iter().map(|&s| plan.stages[s].clone()).collect();
            let list = layers.iter().flat_map(Clone::clone).flat_map(|l| plan.model.layer_parameters(l));
            let layout = Layout::new(list.collect());
            let flops = layers.iter().flat_map(|l| &flops[l.clone()]).sum::<f64>() * microbatches as f64;
            let decoding = match plan.setup.purpose {
                Use::Decoding { capacity } => Some(DecodePlan::new(&plan, &mine, capacity, capabilities)?),
                Use::Training | Use::Evaluation | Use::Logits => None,
            };
            plan.ranks.push(RankPlan { rank, layers, bytes: 0, passing, flops, stages, layout, decoding });
        }
        if plan.setup.purpose.trains() {
            let stages = |of: Exchanged| (plan.stage_of(&of.name), of.stage);
            let ties: Vec<(usize, usize)> = plan.exchanged().into_iter().map(stages).collect();
            plan.schedule = plan.schedule.completed(&ties)?;
        }
        for rank in 0..count {
            plan.ranks[rank].bytes = plan.count_bytes(rank);
        }
        for (rank, (adapter, _)) in devices.iter().enumerate() {
            if let Some(Some(budget)) = plan.setup.budgets.get(rank)
                && plan.ranks[rank].bytes + passing > *budget
            {
                return Err(Error::Memory {
                    device: rank,
                    adapter: adapter.name.clone(),
                    need: plan.ranks[rank].bytes + passing,
                    budget: *budget,
                    help: None,
                });
            }
        }
        Ok(plan)
    }

    fn plan_stage(
        &self,
        stage: usize,
        adapter: &AdapterInfo,
        capabilities: &Capabilities,
    ) -> Result<StagePlan> {
        let Setup { batch, sequence, .. } = self.setup;
        let tokens = batch * sequence * self.schedule.microbatches;
        let purpose = match self.setup.purpose {
            Use::Training => Purpose::Training { tokens },
            Use::Evaluation => Purpose::Evaluation,
            Use::Logits => Purpose::Inference,
            Use::Decoding { capacity } => Purpose::Decode { capacity },
        };
        let layers = self.stages[stage].clone();
        let mut graph = self.model.stage_graph(layers, batch, sequence, purpose)?;
        if self.setup.recompute.contains(&stage) {
            graph.recompute();
        }
        if !self.schedule.splits(stage) {
            graph.join_backward();
        }
        check_bindings(&graph, adapter, capabilities)?;
        // Every group of texts keeps its caches, whatever the schedule.
        let own = |count| SlotPlan { count, slot: (0..count).collect() };
        Ok(StagePlan {
            stage,
            stash: match self.setup.purpose {
                Use::Decoding { .. } => own(self.schedule.microbatches),
                Use::Training | Use::Evaluation | Use::Logits => self.schedule.slots(stage),
            },
            gradient: self.schedule.gradient_slots(stage),
            memory: MemoryPlan::new(&graph, capabilities),
            graph,
        })
    }

    /// The rank of a stage.
    pub(super) fn rank_of(&self, stage: usize) -> usize {
        // A validated schedule has every stage on a rank.
        self.schedule.rank_of(stage).unwrap_or(0)
    }

    /// Whether the boundary after a stage lies between two devices.
    pub(super) fn crosses(&self, boundary: usize) -> bool {
        self.rank_of(boundary) != self.rank_of(boundary + 1)
    }

    /// Directions in which something passes a stage boundary: 2 with gradients.
    pub(super) fn directions(&self, boundary: usize) -> u64 {
        let gradients = self.setup.purpose.trains() && self.model.trains_before(self.stages[boundary].end);
        if gradients { 2 } else { 1 }
    }

    /// Bytes of an activation between stages.
    pub(super) fn activation_bytes(&self) -> u64 {
        4 * (self.setup.batch * self.setup.sequence * self.setup.model.width) as u64
    }

    /// Buffers of the links around a stage boundary: as many as microbatches can be in flight, and one more.
    pub(super) fn link_slots(&self, boundary: usize) -> usize {
        match self.setup.purpose {
            Use::Training => self.schedule.slots(boundary).count + 1,
            Use::Evaluation | Use::Logits => 2,
            Use::Decoding { .. } => self.schedule.microbatches + 1,
        }
    }

    /// The stage whose layers have a parameter.
    fn stage_of(&self, name: &str) -> usize {
        let has = |layer: usize| self.model.layer_parameters(layer).iter().any(|p| p.name == name);
        self.stages.iter().position(|layers| layers.clone().any(has)).unwrap_or(0)
    }

    /// Those of [`Plan::tied`] that change, so that gradients and weights travel in every step.
    pub(super) fn exchanged(&self) -> Vec<Exchanged> {
        let trained = |name: &str| {
            let all = self.ranks.iter().flat_map(|r| r.layout.parameters());
            all.filter(|p| p.name == name).any(|p| !p.frozen)
        };
        let training = self.setup.purpose.trains();
        self.tied().into_iter().filter(|of| training && trained(&of.name)).collect()
    }

    /// The parameters whose second use is on another device than their owner.
    pub(super) fn tied(&self) -> Vec<Exchanged> {
        let rank_of = |name: &str| {
            let has = |r: &&RankPlan| r.layout.parameters().iter().any(|p| p.name == name);
            self.ranks.iter().find(has).map(|r| r.rank)
        };
        let all = self.ranks.iter().flat_map(|r| r.layout.parameters().iter().map(move |p| (r.rank, p)));
        all.filter_map(|(user, p)| {
            let owner = p.tied_to.clone()?;
            let home = rank_of(&owner)?;
            let stage = self.stage_of(&owner);
            (home != user).then(|| Exchanged { name: p.name.clone(), owner, user, home, stage })
        })
        .collect()
    }

    /// Bytes of the buffers that hold results until the end of a step on the last stage, read-back included.
    pub(super) fn loss_bytes(&self) -> u64 {
        4 * (self.setup.batch * self.setup.sequence * self.schedule.microbatches) as u64
    }

    fn count_bytes(&self, rank: usize) -> u64 {
        let plan = &self.ranks[rank];
        let training = self.setup.purpose.trains();
        let mut bytes = plan.layout.bytes(training);
        for stage in &plan.stages {
            bytes += stage.memory.bytes(stage.stash.count, stage.gradient.count) + DUMMY_BYTES;
        }
        bytes += plan.decoding.as_ref().map_or(0, DecodePlan::bytes);
        let sums = if training { 4 * plan.layout.owned_chunks() as u64 } else { 0 };
        bytes += sums.max(16);
        if self.rank_of(self.stages.len() - 1) == rank {
            bytes += if self.setup.purpose.scores() { 2 * self.loss_bytes().max(16) } else { 0 };
        }
        for boundary in 0..self.stages.len() - 1 {
            let directions = self.directions(boundary);
            if rank == self.rank_of(boundary) || rank == self.rank_of(boundary + 1) {
                bytes += directions * link::memory(self.activation_bytes(), self.link_slots(boundary));
            }
        }
        for Exchanged { name, user, home, .. } in self.exchanged() {
            let list = self.ranks[user].layout.parameters();
            let Some(parameter) = list.iter().find(|p| p.name == name) else { continue };
            let [user_bytes, owner_bytes] = tied::memory(parameter);
            bytes += if rank == user { user_bytes } else { 0 };
            if rank == home {
                bytes += owner_bytes;
            }
        }
        bytes
    }
}
