//! From what is wanted to what each device will hold, before anything is allocated.

use std::ops::Range;

use super::decode::DecodePlan;
use super::owners::{Holders, Shard, holders, shards};
use super::{gang, host, link, load, partition, store};
use crate::error::{Error, Result};
use crate::gpu::{AdapterInfo, Capabilities, Device};
use crate::graph::{Phase, Source, StageGraph, ValueId};
use crate::layers::Layers;
use crate::mesh::{Division, Wire};
use crate::model::tensor::{Member, members, members_by_group};
use crate::model::{Lora, Model, ModelConfig, Parameter, Purpose, Weights};
use crate::ops::parameters::Layout;
use crate::ops::plan::{MemoryPlan, Streams};
use crate::ops::program::DUMMY_BYTES;
use crate::plan::Sharding;
use crate::schedule::{Kind, Placement, Schedule, SlotPlan};

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
    /// When each device, or gang, computes what; says the number of stages, whose stages are where, and the microbatches of a
    /// step.
    pub schedule: Schedule,
    /// First layers of the stages after the first; balanced by floating-point operations if none.
    pub cuts: Option<Vec<Layers>>,
    /// Whether a sequence may hold several texts, which do not see one another ([`Batch`](super::Batch) says where each
    /// begins).
    pub shared: bool,
    /// Stages that compute the activations of their layers again in the backward pass.
    pub recompute: Vec<usize>,
    /// Most bytes of logits that exist at once ([`Model::with_logits`]).
    pub logits: u64,
    /// Who has what of the state when training.
    pub sharding: Sharding,
    /// How the members of a gang divide every layer. A rank of the schedule is a gang; its devices follow one another.
    pub tensor: Division,
    /// As what tensors travel between devices.
    pub wire: Wire,
    /// What for.
    pub purpose: Use,
    /// Bytes each device may use; none where it is unknown.
    pub budgets: Vec<Option<u64>>,
    /// Bytes of the host's memory that may be used; none for as many as there are.
    pub host: Option<u64>,
}

impl Setup {
    /// What passes the devices instead of staying on them.
    fn streams(&self) -> Streams {
        if self.purpose.trains() { streams(self.sharding) } else { Streams::default() }
    }

    /// The model, with its adapter, stored as it says.
    pub fn model(&self) -> Result<Model> {
        let model = Model::with_adapter(&self.model, self.adapter.as_ref())?.with_weights(self.weights);
        Ok(model.with_shared_sequences(self.shared).with_logits(self.logits))
    }
}

/// What passes the devices in training instead of staying on them.
pub(super) fn streams(sharding: Sharding) -> Streams {
    Streams { weights: sharding.streams_weights(), gradients: sharding.streams_gradients() }
}

/// One stage of a plan.
pub(super) struct StagePlan {
    pub(super) stage: usize,
    pub(super) graph: StageGraph,
    pub(super) memory: MemoryPlan,
    pub(super) stash: SlotPlan,
    pub(super) gradient: SlotPlan,
}

/// One device of a plan.
pub struct RankPlan {
    /// Position among the devices.
    pub rank: usize,
    /// The layers of its stages, stage by stage.
    pub layers: Vec<Range<usize>>,
    /// Bytes that will be allocated on it.
    pub bytes: u64,
    /// Bytes that it takes beside them while weights are loaded or saved.
    pub passing: u64,
    /// Those of them that hold the optimizer's moments.
    pub state: u64,
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
    /// Which rank of it, a device or a gang, does what.
    pub placement: Placement,
    /// The members of each gang; none where a device has whole layers.
    pub(super) members: Vec<Option<Member>>,
    /// Layers of each stage.
    pub stages: Vec<Range<usize>>,
    /// The devices.
    pub ranks: Vec<RankPlan>,
    /// Who has which parameters.
    pub(super) holders: Holders,
    /// What travels at the end of a step from rank to rank.
    pub(super) shards: Vec<Shard>,
    /// Bytes in the host's memory, beside gradients that wait there for others.
    pub host: u64,
}

/// A tensor must fit one binding.
fn check_bindings(stage: &StageGraph, adapter: &AdapterInfo, capabilities: &Capabilities) -> Result<()> {
    let limit = capabilities.max_binding;
    let mut exist = stage.graph.values.iter().filter(|value| value.source != Source::Removed);
    match exist.find(|value| value.bytes() > limit) {
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

/// The gradient of a weight that I makes, as of logits in parts, is added in the order of I, which schedules need not keep: only
/// that of W is theirs to keep.
fn check_sums(graph: &StageGraph, schedule: &Schedule, rank: usize, stage: usize) -> Result<()> {
    let is_made = |id: &ValueId| graph.gradients.iter().any(|(_, gradient)| gradient == id);
    let mut of_i = graph.graph.nodes.iter().filter(|node| node.phase == Phase::Input);
    if !schedule.splits(stage) || !of_i.any(|node| node.outputs.iter().any(is_made)) {
        return Ok(());
    }
    let own = schedule.ranks[rank].iter().filter(|of| of.kind == Kind::I && of.stage == stage);
    if own.map(|action| action.microbatch).is_sorted() {
        return Ok(());
    }
    let message = format!(
        "I of stage {stage} is not in the order of microbatches, in which the gradient of logits in parts is added, or the results \
         would depend on the schedule; order it so, or raise train.logits"
    );
    Err(Error::config("pipeline.schedule", message))
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
        let members = match setup.tensor.divides() {
            true => match setup.purpose {
                Use::Decoding { .. } => members_by_group(&setup.model, &setup.tensor)?,
                _ => members(&setup.model, &setup.tensor)?,
            }
            .into_iter()
            .map(Some)
            .collect(),
            false => vec![None],
        };
        if count != ranks * members.len() {
            let gangs = if members.len() > 1 { format!(" of {} each", members.len()) } else { String::new() };
            let message =
                format!("the schedule {} is for {ranks} devices{gangs}, not {count}", schedule.name);
            return Err(Error::config("pipeline.schedule", message));
        }
        let flops = model.layer_flops(setup.batch, setup.sequence)?;
        let stages = match &setup.cuts {
            Some(cuts) => partition::from_cuts(cuts, &model.layer_starts(), schedule.stages)?,
            None => partition::balanced(&flops, schedule.stages)?,
        };
        if let Some(stage) = setup.recompute.iter().find(|&&stage| stage >= schedule.stages) {
            let message = format!("there is no stage {stage}; the last is {}", schedule.stages - 1);
            return Err(Error::config("pipeline.recompute", message));
        }
        let microbatches = schedule.microbatches;
        let passing = load::memory(model.parameters().iter().map(|p| p.len()).max().unwrap_or(0));
        let placement = schedule.placement()?;
        let (ranks, holding, shared) = (Vec::new(), Holders::new(), Vec::new());
        let mut plan = Plan {
            setup,
            model,
            schedule,
            placement,
            members,
            stages,
            ranks,
            holders: holding,
            shards: shared,
            host: 0,
        };
        plan.holders = holders(&plan);
        for (rank, (adapter, capabilities)) in devices.iter().enumerate() {
            let mine: Vec<usize> = (0..plan.stages.len()).filter(|&stage| plan.holds(rank, stage)).collect();
            let stages = mine
                .iter()
                .map(|&stage| plan.plan_stage(stage, rank, adapter, capabilities))
                .collect::<Result<Vec<_>>>()?;
            let layers: Vec<Range<usize>> = mine.iter().map(|&s| plan.stages[s].clone()).collect();
            let list: Vec<Parameter> = mine.iter().flat_map(|&stage| plan.parts(stage, rank)).collect();
            let owned = list.iter().map(|parameter| plan.owned(rank, &parameter.name)).collect();
            let layout = Layout::streaming(list, owned, plan.setup.streams());
            let state = if plan.setup.purpose.trains() { layout.state_bytes() } else { 0 };
            let done = |stage: usize| {
                (0..microbatches).filter(|&m| plan.placement.rank(stage, m) == plan.gang(rank)).count() as f64
            };
            let shares = &plan.setup.tensor.shares;
            let share = shares[rank % shares.len()] as f64 / shares.iter().map(|&s| s as f64).sum::<f64>();
            let of_stage =
                |&stage: &usize| share * flops[plan.stages[stage].clone()].iter().sum::<f64>() * done(stage);
            let flops = mine.iter().map(of_stage).sum();
            let decoding = match plan.setup.purpose {
                Use::Decoding { capacity } => {
                    Some(DecodePlan::new(&plan, rank, &mine, capacity, capabilities)?)
                }
                Use::Training | Use::Evaluation | Use::Logits => None,
            };
            plan.ranks.push(RankPlan {
                rank,
                layers,
                bytes: 0,
                passing,
                state,
                flops,
                stages,
                layout,
                decoding,
            });
        }
        if plan.setup.purpose.trains() {
            plan.schedule = plan.schedule.completed(&plan.ties())?;
            if !plan.setup.sharding.through_host() {
                plan.shards = shards(&plan);
            }
            plan.host = store::memory(&plan);
        }
        for rank in 0..count {
            plan.ranks[rank].bytes = plan.count_bytes(rank);
        }
        if let Some(budget) = plan.setup.host.filter(|&budget| budget < plan.host) {
            let lacks = plan.host - budget;
            let message =
                format!("the host's memory lacks {lacks} bytes: it needs {} and may use {budget}", plan.host);
            return Err(Error::no_plan(
                message,
                vec![format!("--memory host={}MiB", plan.host.div_ceil(1 << 20))],
            ));
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
        rank: usize,
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
        let (gang, member) = (self.gang(rank), self.member(rank));
        let mut graph = self.model.part_of_stage(layers, batch, sequence, purpose, member)?;
        graph.arrange(self.setup.recompute.contains(&stage), self.schedule.splits(stage));
        check_bindings(&graph, adapter, capabilities)?;
        check_sums(&graph, &self.schedule, gang, stage)?;
        // Every group of texts keeps its caches, whatever the schedule.
        let own = |count| SlotPlan { count, slot: (0..count).collect() };
        Ok(StagePlan {
            stage,
            stash: match self.setup.purpose {
                Use::Decoding { .. } => own(self.schedule.microbatches),
                Use::Training | Use::Evaluation | Use::Logits => self.schedule.slots(stage, gang),
            },
            gradient: self.schedule.gradient_slots(stage, gang),
            memory: MemoryPlan::streaming(&graph, capabilities, self.setup.streams()),
            graph,
        })
    }

    /// The rank of the schedule that a device is, or is a member of.
    pub(super) fn gang(&self, rank: usize) -> usize {
        rank / self.members.len()
    }

    /// The devices of a rank of the schedule.
    pub(super) fn devices(&self, gang: usize) -> Range<usize> {
        gang * self.members.len()..(gang + 1) * self.members.len()
    }

    /// Which member of its gang a device is.
    pub(super) fn member(&self, rank: usize) -> Option<&Member> {
        self.members[rank % self.members.len()].as_ref()
    }

    /// Whether a device has a stage, or its part of one.
    pub(super) fn holds(&self, rank: usize, stage: usize) -> bool {
        self.placement.holds(self.gang(rank), stage)
    }

    /// The tokens of which a device has rows of the table and logits.
    pub(super) fn vocabulary(&self, rank: usize) -> Range<usize> {
        self.member(rank).map_or(0..self.setup.model.vocabulary, |member| member.vocabulary.clone())
    }

    /// What a device has of the parameters of a stage.
    pub(super) fn parts(&self, stage: usize, rank: usize) -> Vec<Parameter> {
        let layers = self.stages[stage].clone();
        layers.flat_map(|layer| self.model.parts(layer, self.member(rank))).collect()
    }

    /// Every parameter of the model with the parts in which gangs have it, each once: itself where it is not divided.
    pub(super) fn divided(&self) -> Vec<(Parameter, Vec<Parameter>)> {
        let of_layer = |layer: usize| {
            let mut all: Vec<(Parameter, Vec<Parameter>)> =
                self.model.layer_parameters(layer).into_iter().map(|whole| (whole, Vec::new())).collect();
            for part in self.members.iter().flat_map(|member| self.model.parts(layer, member.as_ref())) {
                let of = part.piece.as_ref().map_or(&part.name, |piece| &piece.of);
                let whole = all.iter_mut().find(|(whole, _)| whole.name == *of);
                if let Some((_, parts)) = whole.filter(|(_, parts)| parts.iter().all(|p| p.name != part.name))
                {
                    parts.push(part);
                }
            }
            all
        };
        (0..self.model.layers()).flat_map(of_layer).collect()
    }

    /// The parts of all parameters, in model order.
    pub(super) fn all_parts(&self) -> impl Iterator<Item = Parameter> + use<> {
        self.divided().into_iter().flat_map(|(_, parts)| parts)
    }

    /// Directions in which something passes a stage boundary: 2 with gradients.
    pub(super) fn directions(&self, boundary: usize) -> u64 {
        let gradients = self.setup.purpose.trains() && self.model.trains_before(self.stages[boundary].end);
        if gradients { 2 } else { 1 }
    }

    /// Bytes of what passes between stages, from a device to its like.
    pub(super) fn activation_bytes(&self, rank: usize) -> u64 {
        let tokens = self.setup.batch * self.setup.sequence;
        let rows = match self.setup.purpose {
            Use::Decoding { .. } => tokens,
            _ => self.setup.tensor.rows(rank % self.members.len(), tokens).len(),
        };
        4 * (rows * self.setup.model.width) as u64
    }

    /// As what it passes a hop.
    pub(super) fn wire(&self, hop: usize) -> Wire {
        if self.placement.is_link(hop) { self.setup.wire } else { Wire::F32 }
    }

    /// Buffers of the links of a hop: as many as microbatches can be in flight, and one more.
    pub(super) fn link_slots(&self, hop: usize) -> usize {
        let from = self.placement.replicas()[self.placement.hops()[hop].0];
        match self.setup.purpose {
            Use::Training => self.schedule.slots(from.stage, from.rank).count + 1,
            Use::Evaluation | Use::Logits => 2,
            Use::Decoding { .. } => self.schedule.microbatches + 1,
        }
    }

    /// The elements of a parameter that a rank owns.
    fn owned(&self, rank: usize, name: &str) -> Range<usize> {
        let holder = self.holders.get(name).and_then(|all| all.iter().find(|holder| holder.rank == rank));
        holder.map_or(0..0, |holder| holder.owned.clone())
    }

    /// The stages that share a parameter that is trained: pairs (which uses it, which owns it).
    fn ties(&self) -> Vec<(usize, usize)> {
        let parameters = |stage: usize| {
            self.stages[stage]
                .clone()
                .flat_map(|layer| self.model.layer_parameters(layer))
                .collect::<Vec<_>>()
        };
        let stages: Vec<Vec<Parameter>> = (0..self.stages.len()).map(parameters).collect();
        let mut ties = Vec::new();
        for (user, list) in stages.iter().enumerate() {
            for owner in list.iter().filter(|p| !p.frozen).filter_map(|p| p.tied_to.as_ref()) {
                let owner = stages.iter().position(|list| list.iter().any(|p| p.name == *owner));
                ties.extend(owner.filter(|&owner| owner != user).map(|owner| (user, owner)));
            }
        }
        ties
    }

    /// Bytes of the buffers that hold results until the end of a step on the last stage, read-back included.
    pub(super) fn loss_bytes(&self) -> u64 {
        4 * (self.setup.batch * self.setup.sequence * self.schedule.microbatches) as u64
    }

    /// Whether a device tells the losses: of a gang, all of which know them, the first does.
    pub(super) fn reports(&self, rank: usize) -> bool {
        self.holds(rank, self.stages.len() - 1) && rank.is_multiple_of(self.members.len())
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
        if self.reports(rank) {
            bytes += if self.setup.purpose.scores() { 2 * self.loss_bytes().max(16) } else { 0 };
        }
        for (hop, &(from, to)) in self.placement.hops().iter().enumerate() {
            let [from, to] = [from, to].map(|replica| self.placement.replicas()[replica]);
            if self.gang(rank) == from.rank || self.gang(rank) == to.rank {
                let ring = link::memory(self.activation_bytes(rank), self.link_slots(hop), self.wire(hop));
                bytes += self.directions(from.stage) * ring;
            }
        }
        bytes += gang::memory(self, rank);
        bytes += self.shards.iter().map(|shard| shard.bytes(rank)).sum::<u64>();
        if training && self.setup.sharding.through_host() {
            bytes += host::memory(self, rank);
        }
        bytes
    }
}
