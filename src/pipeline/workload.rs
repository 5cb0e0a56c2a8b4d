//! A model and a batch in the planner's numbers: what each kind of layer computes and holds.

use super::plan::streams;
use super::{gang, host, link, owners};
use crate::error::Result;
use crate::gpu::{Capabilities, KernelKey};
use crate::graph::{LOGIT_BYTES, Phase, Source, StageGraph};
use crate::mesh::Wire;
use crate::model::tensor::Member;
use crate::model::{KINDS, Model, OF_BLOCK, Parameter, Purpose};
use crate::ops::lower;
use crate::ops::parameters::Layout;
use crate::ops::plan::{MemoryPlan, Streams};
use crate::ops::program::DUMMY_BYTES;
use crate::plan::{
    Batching, EndMemory, Footprint, FormMemory, KindWork, Layer, LayerMemory, Sharding, StageForm, Sums,
    TiedLayers, Work, Workload,
};

/// The workload of a training step of `batch` sequences of `sequence` tokens, divided into each of `microbatches`
/// microbatches, which must divide the batch. All blocks are alike: where an adapter leaves out modules of some, those are taken
/// for as much work as the others. Of each kind of devices that choose the same kernels it has a footprint:
/// `kernels` are what [`kinds_of_kernels`] finds.
pub fn workload(
    model: &Model,
    batch: usize,
    sequence: usize,
    microbatches: &[usize],
    kernels: &[Capabilities],
) -> Result<Workload> {
    let whole = (Sharding::default(), Wire::F32);
    sharded(model, batch, sequence, microbatches, kernels, whole, None)
}

/// As [`workload`], with the state divided like this and tensors that travel as this, and of each layer what this member of a
/// gang has.
pub fn sharded(
    model: &Model,
    batch: usize,
    sequence: usize,
    microbatches: &[usize],
    kernels: &[Capabilities],
    (sharding, wire): (Sharding, Wire),
    member: Option<&Member>,
) -> Result<Workload> {
    let streams = streams(sharding);
    let layers = (0..model.layers()).map(|layer| {
        let own: Vec<_> = model.parts(layer, member).into_iter().filter(|p| p.tied_to.is_none()).collect();
        let trained = || own.iter().filter(|p| !p.frozen);
        let nothing = vec![0..0; own.len()];
        let owned = own.iter().map(|p| if sharding.by_host() { 0..0 } else { 0..p.len() }).collect();
        let state = Layout::streaming(own.clone(), owned, streams).bytes(true);
        Layer {
            name: model.layer_name(layer),
            size: model.layer_size(layer),
            kind: model.layer_kind(layer),
            weights: trained().map(|p| 4 * p.len() as u64).sum(),
            sent: trained().map(|p| p.weight_bytes()).sum(),
            state,
            read: model.parts(layer, member).iter().map(Parameter::weight_bytes).sum(),
            moments: state - Layout::streaming(own.clone(), nothing, streams).bytes(true).min(state),
        }
    });
    let like = model.with_blocks(model.config().layers)?;
    let of = |&m: &usize| batching((&like, member), batch / m, m, sequence, kernels, (streams, wire));
    let batchings = microbatches.iter().map(of).collect::<Result<Vec<_>>>()?;
    let rings = batchings.iter().map(|(_, rings)| *rings).max().unwrap_or(0);
    let batchings = batchings.into_iter().map(|(batching, _)| batching).collect();
    let staging = if sharding.through_host() {
        let elements = (0..model.layers()).flat_map(|layer| model.parts(layer, member)).map(|p| p.len());
        host::rings(elements.sum())
    } else {
        0
    };
    Ok(Workload {
        layers: layers.collect(),
        kinds: KINDS.map(String::from).to_vec(),
        tie: tie(model, (sharding, wire), member),
        tokens: (batch * sequence) as u64,
        bucket: 4 * owners::MOST as u64,
        wire,
        host_rings: staging + rings,
        sharding,
        batchings,
    })
}

/// Of devices with these capabilities, one for each choice of kernels, and which of them each has. How much one binding or
/// buffer may hold decides what is refused, and no kernel.
pub fn kinds_of_kernels<'a>(
    devices: impl IntoIterator<Item = &'a Capabilities>,
) -> (Vec<Capabilities>, Vec<usize>) {
    let mut kinds: Vec<Capabilities> = Vec::new();
    let mut kind = |of: &Capabilities| {
        let alike = |known: &Capabilities| {
            *known == Capabilities { max_binding: known.max_binding, max_buffer: known.max_buffer, ..*of }
        };
        kinds.iter().position(alike).unwrap_or_else(|| {
            kinds.push(*of);
            kinds.len() - 1
        })
    };
    let of_each = devices.into_iter().map(&mut kind).collect();
    (kinds, of_each)
}

/// The key of measured times: everything that they depend on beside the device and the shaders.
pub fn shape_key(model: &Model, sequences: usize, sequence: usize) -> String {
    format!("{}{BATCH}{sequences}{SEQUENCE}{sequence}", family_key(model))
}

/// The sequences of a microbatch and their tokens, of which `key` is this model's key; none if it is another's.
pub fn extents(model: &Model, key: &str) -> Option<(usize, usize)> {
    let rest = key.strip_prefix(&family_key(model))?.strip_prefix(BATCH)?;
    let (sequences, sequence) = rest.split_once(SEQUENCE)?;
    Some((sequences.parse().ok()?, sequence.parse().ok()?))
}

const BATCH: &str = " batch ";
const SEQUENCE: &str = " sequence ";

/// What the keys of a model's shapes have in common.
pub fn family_key(model: &Model) -> String {
    let mut config = serde_json::to_value(model.config()).unwrap_or_default();
    if let Some(table) = config.as_object_mut() {
        // Whatever the number of blocks, one takes the same time; and so does a sequence, however long it might be.
        table.remove("layers");
        table.remove("context");
    }
    if let (Some(adapter), Some(table)) = (model.adapter(), config.as_object_mut()) {
        table.insert("adapter rank".into(), adapter.rank.into());
        table.insert("adapts".into(), model.adapted_parts().join(" ").into());
    }
    if let (true, Some(table)) = (model.logits() != LOGIT_BYTES, config.as_object_mut()) {
        table.insert("logits".into(), model.logits().into());
    }
    if let (true, Some(table)) = (model.weights().packed(), config.as_object_mut()) {
        table.insert("weights".into(), model.weights().name().into());
    }
    config.to_string().replace(['{', '}', '"'], "").replace([':', ','], " ")
}

/// The kernels of a training step of such microbatches, in order. Where they differ, so does the law that times follow.
pub fn kernels(
    model: &Model,
    sequences: usize,
    sequence: usize,
    capabilities: &Capabilities,
) -> Result<Vec<KernelKey>> {
    let model = model.with_blocks(1)?;
    let purpose = Purpose::Training { tokens: sequences * sequence };
    let graph = model.stage_graph(0..model.layers(), sequences, sequence, purpose)?.graph;
    let gradients = graph.gradients();
    let lowered = |node| lower(&graph, node, capabilities, false, &gradients);
    let launches = graph.nodes.iter().flat_map(|node| lowered(node).launches);
    Ok(launches.map(|launch| launch.key).collect())
}

fn tie(model: &Model, (sharding, wire): (Sharding, Wire), member: Option<&Member>) -> Option<TiedLayers> {
    let (user, parameter) = (0..model.layers()).find_map(|layer| {
        let tied = model.parts(layer, member).into_iter().find(|p| p.tied_to.is_some())?;
        Some((layer, tied))
    })?;
    let owner = (0..model.layers()).find(|&layer| {
        model.parts(layer, member).iter().any(|p| Some(&p.name) == parameter.tied_to.as_ref())
    })?;
    let (bytes, weight) = (4 * parameter.len() as u64, parameter.weight_bytes());
    let weight = if sharding.streams_weights() { 0 } else { weight };
    if parameter.frozen {
        // A copy of the weight, and nothing to exchange.
        return Some(TiedLayers { user, owner, bytes: 0, together: 0, user_apart: weight, owner_apart: 0 });
    }
    // A gradient where both layers are; a weight and a gradient, and the ends of both links, where they are apart.
    let [user_ends, owner_ends] =
        if sharding.through_host() { [0, 0] } else { owners::memory(&parameter, wire) };
    let gradient = if sharding.streams_gradients() { 0 } else { bytes };
    let (together, user_apart, owner_apart) = (gradient, gradient + weight + user_ends, owner_ends);
    Some(TiedLayers { user, owner, bytes, together, user_apart, owner_apart })
}

/// And the bytes of a member's ends in its gang.
fn batching(
    (model, member): (&Model, Option<&Member>),
    sequences: usize,
    microbatches: usize,
    sequence: usize,
    kernels: &[Capabilities],
    (streams, wire): (Streams, Wire),
) -> Result<(Batching, u64)> {
    let graphs = Graphs::new((model, member), sequences, microbatches, sequence)?;
    let activation = graphs.activation;
    let largest = |stage: &StageGraph| {
        let exist = stage.graph.values.iter().filter(|value| value.source != Source::Removed);
        exist.map(|value| value.bytes()).max().unwrap_or(0)
    };
    let largest = |kind: &Option<StageGraph>| kind.as_ref().map_or(0, largest);
    let rings =
        gang::largest(graphs.single.iter().flatten(), wire).map_or(0, |bytes| gang::rings(bytes, wire));
    let batching = Batching {
        sequences,
        microbatches,
        shape: shape_key(model, sequences, sequence),
        footprints: kernels.iter().map(|capabilities| graphs.footprint(capabilities, streams)).collect(),
        activation: wire.travelling(activation),
        // With half of what the shortest ring has beside its two buffers.
        link_buffer: link::memory(activation, 1, wire) - wire.buffers(activation) / 2,
        largest_tensor: graphs.single.iter().map(largest).collect(),
        sums: member.map_or(Vec::new(), |_| graphs.single.iter().map(|stage| sums(stage, wire)).collect()),
    };
    Ok((batching, rings))
}

/// The stages from which it is seen what a layer holds.
struct Graphs {
    /// One layer of each of [`KINDS`], alone; none of a kind that the model does not have.
    single: Vec<Option<StageGraph>>,
    /// Of each kind beside the first and the last a layer with its neighbour, the one before if that is part of a block; and
    /// the neighbour's kind. None if it has none.
    pairs: Vec<Option<(usize, StageGraph)>>,
    /// The last two blocks, or the one that there is: many layers need more scratch than two.
    blocks: StageGraph,
    /// Bytes of an activation.
    activation: u64,
    /// Bytes of the losses of the whole batch.
    losses: u64,
}

impl Graphs {
    fn new(
        (model, member): (&Model, Option<&Member>),
        sequences: usize,
        microbatches: usize,
        sequence: usize,
    ) -> Result<Graphs> {
        let tokens = sequences * microbatches * sequence;
        let purpose = Purpose::Training { tokens };
        let graph = |range| model.part_of_stage(range, sequences, sequence, purpose, member);
        let is_within = |layer: usize| OF_BLOCK.contains(&model.layer_kind(layer));
        let last = model.layers() - 1;
        let all = sequences * sequence;
        let rows = member.map_or(all, |member| member.division.rows(member.number, all).len());
        let mut graphs = Graphs {
            blocks: graph(last - model.layers_of_block() * model.config().layers.min(2)..last)?,
            single: Vec::new(),
            pairs: Vec::new(),
            activation: 4 * (rows * model.config().width) as u64,
            losses: 4 * tokens as u64,
        };
        for kind in 0..KINDS.len() {
            // The last one: the gradient of its input is wanted even where nothing is trained before the first.
            let last = (0..model.layers()).rfind(|&layer| model.layer_kind(layer) == kind);
            let pair = |layer: usize| {
                let neighbour = [layer - 1, layer + 1].into_iter().find(|&beside| is_within(beside))?;
                let range = layer.min(neighbour)..layer.max(neighbour) + 1;
                Some(graph(range).map(|stage| (model.layer_kind(neighbour), stage)))
            };
            graphs.single.push(last.map(|layer| graph(layer..layer + 1)).transpose()?);
            graphs.pairs.push(last.filter(|&layer| is_within(layer)).and_then(pair).transpose()?);
        }
        Ok(graphs)
    }

    fn footprint(&self, capabilities: &Capabilities, streams: Streams) -> Footprint {
        let activation = self.activation;
        let mut memory = vec![FormMemory::default(); KINDS.len()];
        let mut ends = EndMemory::default();
        for form in StageForm::ALL {
            let held = |graph: &StageGraph| held(graph, form, capabilities, streams);
            let single: Vec<LayerMemory> =
                self.single.iter().map(|graph| graph.as_ref().map(held).unwrap_or_default()).collect();
            let after_first = LayerMemory { stash: activation, ..LayerMemory::default() };
            let before_last =
                LayerMemory { gradient: activation, fixed: DUMMY_BYTES, ..LayerMemory::default() };
            let last_end = LayerMemory { fixed: DUMMY_BYTES, ..LayerMemory::default() };
            let scratch = held(&self.blocks).scratch;
            for (kind, pair) in self.pairs.iter().enumerate() {
                // What it adds to its neighbour is its own; the rest belongs to the stage's ends.
                let own = |(beside, pair): &(usize, StageGraph)| {
                    let pair = held(pair);
                    LayerMemory { scratch, ..difference(&pair, &single[*beside]) }
                };
                memory[kind][form] = pair.as_ref().map_or(single[kind], own);
            }
            let (first, last) = (0, KINDS.len() - 1);
            memory[first][form] = difference(&single[first], &before_last);
            memory[last][form] = difference(&single[last], &sum(&after_first, &last_end));
            ends.after_first[form] = after_first;
            ends.before_last[form] = before_last;
            // Losses of the whole batch, and their read-back.
            ends.last[form] = LayerMemory { fixed: last_end.fixed + 2 * self.losses, ..last_end };
        }
        let of_kind = |stage: &Option<StageGraph>| stage.as_ref().map(|stage| work(stage, capabilities));
        let work = self.single.iter().map(|stage| of_kind(stage).unwrap_or_default()).collect();
        Footprint { work, memory, ends }
    }
}

/// What a stage holds on its own.
fn held(stage: &StageGraph, form: StageForm, capabilities: &Capabilities, streams: Streams) -> LayerMemory {
    let mut stage = stage.clone();
    stage.arrange(form.recompute, form.split);
    let plan = MemoryPlan::streaming(&stage, capabilities, streams);
    let scratch = plan.scratch.iter().sum();
    let (stash, gradient) = (plan.bytes(1, 0) - plan.bytes(0, 0), plan.bytes(0, 1) - plan.bytes(0, 0));
    LayerMemory { fixed: plan.uniform_bytes() + DUMMY_BYTES, scratch, stash, gradient }
}

fn difference(a: &LayerMemory, b: &LayerMemory) -> LayerMemory {
    LayerMemory {
        fixed: a.fixed.saturating_sub(b.fixed),
        scratch: a.scratch,
        stash: a.stash.saturating_sub(b.stash),
        gradient: a.gradient.saturating_sub(b.gradient),
    }
}

fn sum(a: &LayerMemory, b: &LayerMemory) -> LayerMemory {
    LayerMemory {
        fixed: a.fixed + b.fixed,
        scratch: a.scratch.max(b.scratch),
        stash: a.stash + b.stash,
        gradient: a.gradient + b.gradient,
    }
}

/// What a gang adds up in F and in I of a layer.
fn sums(stage: &Option<StageGraph>, wire: Wire) -> [Sums; 2] {
    [Phase::Forward, Phase::Input].map(|phase| {
        let nodes = stage.iter().flat_map(|stage| stage.graph.nodes.iter().map(move |node| (stage, node)));
        let own = nodes.filter(|(_, node)| node.phase == phase && node.op.is_collective());
        own.fold(Sums::default(), |sums, (stage, node)| {
            // Down and up alike, as in a sum.
            let both: u64 =
                [node.inputs[0], node.outputs[0]].iter().map(|&of| stage.graph.value(of).bytes()).sum();
            Sums { count: sums.count + 1, bytes: sums.bytes + wire.travelling(both / 2) }
        })
    })
}

/// Operations, bytes and launches of a layer's three programs, sums over a gang aside.
fn work(stage: &StageGraph, capabilities: &Capabilities) -> KindWork {
    let gradients = stage.graph.gradients();
    let of = |phase: Phase| {
        let mut work = Work::default();
        for node in stage.graph.nodes.iter().filter(|n| n.phase == phase && !n.op.is_collective()) {
            work.flops += stage.graph.flops(node);
            let touched = node.inputs.iter().chain(&node.outputs);
            work.bytes += touched.map(|&v| stage.graph.value(v).bytes() as f64).sum::<f64>();
            work.launches += lower(&stage.graph, node, capabilities, false, &gradients).launches.len();
        }
        work
    };
    KindWork { forward: of(Phase::Forward), input: of(Phase::Input), weight: of(Phase::Weight) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::imagined;
    use crate::layers::Layers;
    use crate::mesh::Division;
    use crate::model::Weights;
    use crate::pipeline::{Plan, Setup, Use};
    use crate::plan::{Assignment, DeviceProfile, Link, Machine, Rates, costs};
    use crate::schedule::{generate, replicate, simulate};

    /// A card beside a software adapter, each of which lowers the same layers to other kernels.
    #[test]
    fn what_a_stage_holds_is_counted_for_every_choice_of_kernels_as_it_is_allocated() {
        let model = "kind = 'gpt2'\nlayers = 4\nwidth = 32\nheads = 2\ncontext = 64\nvocabulary = 96";
        let config = toml::from_str(model).unwrap();
        let model = Model::new(&config).unwrap();
        let (info, card) = imagined(0, "card", None);
        let software = Capabilities { software: true, subgroup: Some(8), ..card };
        let large = Capabilities { max_binding: 1 << 30, ..card };
        let (kernels, of_each) = kinds_of_kernels([&card, &software, &large]);
        assert_eq!((kernels.len(), of_each), (2, vec![0, 1, 0]));
        let schedule = generate("1f1b", 2, 2).unwrap();
        let counted = |of_each: [usize; 2], end: usize| {
            let work = workload(&model, 4, 64, &[2], &kernels).unwrap();
            let device = |kernels| DeviceProfile { kernels, ..DeviceProfile::default() };
            let machine = Machine { devices: of_each.map(device).to_vec(), ..Machine::default() };
            let assignment = Assignment {
                devices: &[0, 1],
                stages: &[0..end, end..10],
                placement: &schedule.placement().unwrap(),
                recompute: &[false; 2],
                split: &[false; 2],
                in_flight: &[2, 1],
            };
            let costs = costs(&work, &work.batchings[0], &machine, &assignment);
            let slots = [2, 1];
            let stage = |s: usize| {
                let stage = &costs.stages[s];
                costs.ranks[s].fixed + slots[s] * stage.stash + stage.gradient
            };
            [0, 1].map(stage)
        };
        let setup = |cut: Layers| Setup {
            model: config.clone(),
            adapter: None,
            weights: Weights::F32,
            logits: LOGIT_BYTES,
            batch: 2,
            sequence: 64,
            schedule: schedule.clone(),
            cuts: Some(vec![cut]),
            shared: false,
            recompute: Vec::new(),
            sharding: Sharding::default(),
            tensor: Division::none(),
            wire: Wire::F32,
            host: None,
            purpose: Use::Training,
            budgets: vec![None; 2],
        };
        let needed = |of_each: [usize; 2], cut: Layers| {
            let setup = setup(cut);
            let devices = of_each.map(|kind| (info.clone(), kernels[kind]));
            let plan = Plan::new(setup, &devices).unwrap();
            [0, 1].map(|rank: usize| plan.ranks[rank].bytes)
        };
        // Two pipelines beside each other, the second on devices of the other kind.
        let schedule = replicate(&[schedule.clone(), schedule.clone()]).unwrap();
        let layout = schedule.placement().unwrap();
        let work = workload(&model, 8, 64, &[4], &kernels).unwrap();
        let kinds = [0, 1, 1, 0];
        let rates = Rates { matmul_gflops: 1.0, memory_gb_s: 1.0, ..Rates::default() };
        let device = |kernels| DeviceProfile { kernels, rates, ..DeviceProfile::default() };
        let link = Link { gb_s: 1.0, ..Link::default() };
        let machine = Machine { devices: kinds.map(device).to_vec(), link, ..Machine::default() };
        let assignment = Assignment {
            devices: &[0, 1, 2, 3],
            stages: &[0..5, 5..10],
            placement: &layout,
            recompute: &[false; 2],
            split: &[false; 2],
            in_flight: &[2, 2, 1, 1],
        };
        let costs = costs(&work, &work.batchings[0], &machine, &assignment);
        let simulation = simulate(&schedule, &costs).unwrap();
        let setup = Setup { schedule, budgets: vec![None; 4], ..setup(Layers::whole(3)) };
        let devices = kinds.map(|kind| (info.clone(), kernels[kind]));
        let plan = Plan::new(setup, &devices).unwrap();
        for rank in 0..4 {
            let (counted, needed) = (simulation.slot_bytes[rank], plan.ranks[rank].bytes);
            let off = counted as f64 / needed as f64 - 1.0;
            // What travels between replicas is counted by shares of bytes, and allocated by buckets: of this small model eight
            // of them are a third of all.
            assert!(off.abs() < 0.08, "rank {rank} of replicas: {counted} counted, {needed} needed");
        }
        // Before a block, and between its attention and its MLP.
        for (cut, end) in [(Layers::whole(3), 5), (Layers::whole(3) + Layers::HALF, 6)] {
            for of_each in [[0, 0], [0, 1], [1, 0], [1, 1]] {
                for (counted, needed) in counted(of_each, end).into_iter().zip(needed(of_each, cut)) {
                    let off = counted as f64 / needed as f64 - 1.0;
                    let what = format!("{of_each:?} cut at {cut}");
                    assert!((0.0..0.02).contains(&off), "{what}: {counted} counted, {needed} needed");
                }
            }
        }
    }
}
