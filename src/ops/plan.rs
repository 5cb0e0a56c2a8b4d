//! Where every value of a stage lives, decided before anything is allocated.
//!
//! Persistent: weights and their gradients. Stash: what F leaves for I and W, and what is fed from outside; one copy a
//! microbatch in flight. Gradient slots: what I leaves for W. Scratch: the rest, buffers reused by lifetime and shared
//! by the three programs, of which one runs at a time.
//!
//! Weights and gradients that do not stay on the device ([`Streams`]) are scratch too: a weight comes before the first launch of
//! a program that reads it and is gone after the last; a gradient leaves as soon as it is made.

use std::collections::{HashMap, HashSet};

use super::{Lowered, in_place, lower};
use crate::gpu::Capabilities;
use crate::graph::{Fed, Op, Phase, Source, StageGraph, ValueId};

/// Offset alignment of uniform and storage bindings that every adapter accepts.
pub const ALIGNMENT: u64 = 256;

/// Home of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The weight of a parameter.
    Weight,
    /// The gradient of this parameter.
    Gradient(ValueId),
    /// Buffer number of a stash slot.
    Stash(usize),
    /// Buffer number of a gradient slot.
    Slot(usize),
    /// Scratch buffer.
    Scratch(usize),
    /// Buffer of a constant.
    Constant(usize),
    /// Cache number of a stash slot.
    Cache(usize),
}

/// What passes a device instead of staying on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Streams {
    /// Weights, for as long as a program reads them.
    pub weights: bool,
    /// Gradients of parameters, which every microbatch makes anew.
    pub gradients: bool,
}

/// The memory of a stage and the launches of its nodes.
#[derive(Clone, Debug)]
pub struct MemoryPlan {
    /// Home of each value; none for values that nothing uses, and for weights that pass.
    pub place: Vec<Option<Place>>,
    /// The value in whose memory each lies, itself for most, and the first byte there.
    pub whole: Vec<(ValueId, u64)>,
    /// For each program, the scratch buffers of weights that pass.
    pub passing: [HashMap<ValueId, usize>; 3],
    /// Bytes of the buffers of one stash slot.
    pub stash: Vec<u64>,
    /// Bytes of the buffers of one gradient slot.
    pub slot: Vec<u64>,
    /// Bytes of the scratch buffers.
    pub scratch: Vec<u64>,
    /// Bytes of the constants.
    pub constants: Vec<u64>,
    /// Bytes of the caches of one stash slot: what is fed from outside and then changed in place by every run.
    pub caches: Vec<u64>,
    /// Launches of each node.
    pub lowered: Vec<Lowered>,
    /// Scratch buffers behind each node's own scratch.
    pub node_scratch: Vec<Vec<usize>>,
}

/// The number of a phase's program.
pub(super) fn program(phase: Phase) -> usize {
    match phase {
        Phase::Forward => 0,
        Phase::Input => 1,
        Phase::Weight => 2,
    }
}

fn buffer_bytes(bytes: u64) -> u64 {
    bytes.next_multiple_of(4).max(16)
}

impl MemoryPlan {
    /// Plans a stage for devices with these capabilities, on which weights and gradients stay.
    pub fn new(stage: &StageGraph, capabilities: &Capabilities) -> MemoryPlan {
        MemoryPlan::streaming(stage, capabilities, Streams::default())
    }

    /// As [`MemoryPlan::new`], where these pass the device.
    pub fn streaming(stage: &StageGraph, capabilities: &Capabilities, streams: Streams) -> MemoryPlan {
        let graph = &stage.graph;
        let gradients: HashMap<ValueId, ValueId> = stage.gradients.iter().map(|&(p, g)| (g, p)).collect();
        // A result in the place of what is fed from outside stays until the next run.
        let mut updated: HashSet<ValueId> = HashSet::new();
        for node in &graph.nodes {
            if let Some((argument, result)) = in_place(&node.op)
                && matches!(graph.value(node.inputs[argument]).source, Source::Fed(_))
            {
                updated.insert(node.outputs[result]);
            }
        }
        let whole = wholes(stage);
        let home: Vec<ValueId> = whole.iter().map(|of| of.0).collect();
        let last_phase = {
            let mut last: HashMap<ValueId, Phase> = HashMap::new();
            for node in &graph.nodes {
                for input in &node.inputs {
                    let phase = last.entry(home[input.0]).or_insert(node.phase);
                    *phase = (*phase).max(node.phase);
                }
            }
            last
        };
        let mut plan = MemoryPlan {
            place: vec![None; graph.values.len()],
            whole,
            passing: Default::default(),
            stash: Vec::new(),
            slot: Vec::new(),
            scratch: Vec::new(),
            constants: Vec::new(),
            caches: Vec::new(),
            lowered: Vec::new(),
            node_scratch: Vec::new(),
        };
        for (index, value) in graph.values.iter().enumerate() {
            let id = ValueId(index);
            let used_until = last_phase.get(&id).copied();
            plan.place[index] = match value.source {
                Source::Removed => None,
                _ if home[index] != id => None,
                Source::Parameter | Source::Frozen => (!streams.weights).then_some(Place::Weight),
                Source::Constant => Some(push(&mut plan.constants, value.bytes(), Place::Constant)),
                Source::Fed(Fed::OutputGradient) => Some(push(&mut plan.slot, value.bytes(), Place::Slot)),
                Source::Fed(_) => Some(push(&mut plan.stash, value.bytes(), Place::Stash)),
                Source::Node { node, .. } => match (graph.nodes[node].phase, used_until) {
                    _ if gradients.contains_key(&id) => {
                        (!streams.gradients).then_some(Place::Gradient(gradients[&id]))
                    }
                    _ if updated.contains(&id) => Some(push(&mut plan.caches, value.bytes(), Place::Cache)),
                    (Phase::Forward, Some(Phase::Input | Phase::Weight)) => {
                        Some(push(&mut plan.stash, value.bytes(), Place::Stash))
                    }
                    (Phase::Input, Some(Phase::Weight)) => {
                        Some(push(&mut plan.slot, value.bytes(), Place::Slot))
                    }
                    _ => None,
                },
            };
        }
        let made_of_loss = graph.gradients();
        plan.lowered = graph
            .nodes
            .iter()
            .map(|node| {
                let accumulate = node.outputs.iter().any(|o| gradients.contains_key(&home[o.0]));
                lower(graph, node, capabilities, accumulate, &made_of_loss)
            })
            .collect();
        plan.node_scratch = vec![Vec::new(); graph.nodes.len()];
        for phase in [Phase::Forward, Phase::Input, Phase::Weight] {
            plan.place_scratch(stage, phase, &home, streams);
        }
        for (index, &at) in home.iter().enumerate() {
            if at != ValueId(index) {
                plan.place[index] = plan.place[at.0];
            }
        }
        plan
    }

    /// Gives scratch buffers to the values of one phase that have no home yet, reusing those whose value is dead.
    fn place_scratch(&mut self, stage: &StageGraph, phase: Phase, home: &[ValueId], streams: Streams) {
        let graph = &stage.graph;
        let mut results: HashSet<ValueId> = stage.results().into_iter().collect();
        if streams.gradients {
            stage.gradients.iter().for_each(|(_, gradient)| _ = results.remove(gradient));
        }
        let passes = |id: &ValueId| {
            streams.weights && matches!(graph.value(*id).source, Source::Parameter | Source::Frozen)
        };
        let mut last_use: HashMap<ValueId, usize> = HashMap::new();
        let mut last_read: HashMap<ValueId, usize> = HashMap::new();
        for (index, node) in graph.nodes.iter().enumerate() {
            for value in node.inputs.iter().chain(&node.outputs) {
                last_use.insert(home[value.0], index);
            }
            if node.phase == phase {
                last_read
                    .extend(node.inputs.iter().map(|id| home[id.0]).filter(passes).map(|id| (id, index)));
            }
        }
        // B runs I and W in one go and sends the input's gradient after both, so a result keeps its buffer.
        let kept: Vec<Option<Place>> = results.iter().map(|r| self.place[r.0]).collect();
        let mut free: Vec<usize> =
            (0..self.scratch.len()).filter(|&b| !kept.contains(&Some(Place::Scratch(b)))).collect();
        for (index, node) in graph.nodes.iter().enumerate().filter(|(_, n)| n.phase == phase) {
            for weight in node.inputs.iter().map(|id| home[id.0]).filter(passes) {
                if !self.passing[program(phase)].contains_key(&weight) {
                    let buffer = take(&mut self.scratch, &mut free, graph.value(weight).bytes());
                    self.passing[program(phase)].insert(weight, buffer);
                }
            }
            for output in &node.outputs {
                let id = home[output.0];
                // A part of a weight that passes lies where that does.
                if self.place[id.0].is_none() && !passes(&id) {
                    let buffer = take(&mut self.scratch, &mut free, graph.value(id).bytes());
                    self.place[id.0] = Some(Place::Scratch(buffer));
                }
            }
            let own: Vec<usize> = self.lowered[index]
                .scratch
                .iter()
                .map(|&bytes| take(&mut self.scratch, &mut free, bytes))
                .collect();
            free.extend(&own);
            self.node_scratch[index] = own;
            let mut dead: Vec<ValueId> = node.inputs.iter().chain(&node.outputs).map(|v| home[v.0]).collect();
            dead.sort();
            dead.dedup();
            for id in dead {
                if let Some(Place::Scratch(buffer)) = self.place[id.0]
                    && last_use[&id] == index
                    && !results.contains(&id)
                {
                    free.push(buffer);
                }
            }
            let read: HashSet<ValueId> = node.inputs.iter().map(|id| home[id.0]).collect();
            let mut gone: Vec<ValueId> =
                read.into_iter().filter(|id| last_read.get(id) == Some(&index)).collect();
            gone.sort();
            free.extend(gone.iter().filter_map(|id| self.passing[program(phase)].get(id)));
        }
    }

    /// Bytes of everything but weights for this many stash and gradient slots.
    pub fn bytes(&self, stash_slots: usize, gradient_slots: usize) -> u64 {
        let sum = |sizes: &[u64]| sizes.iter().map(|&b| buffer_bytes(b)).sum::<u64>();
        sum(&self.scratch)
            + sum(&self.constants)
            + stash_slots as u64 * (sum(&self.stash) + sum(&self.caches))
            + gradient_slots as u64 * sum(&self.slot)
            + buffer_bytes(self.uniform_bytes())
    }

    /// Bytes of the caches of one stash slot.
    pub fn cache_bytes(&self) -> u64 {
        self.caches.iter().map(|&bytes| buffer_bytes(bytes)).sum()
    }

    /// Bytes of the kernel parameters of all launches.
    pub fn uniform_bytes(&self) -> u64 {
        self.lowered.iter().map(|l| l.launches.len() as u64 * ALIGNMENT).sum()
    }
}

/// For each value the one in whose memory it lies, and the first byte there.
fn wholes(stage: &StageGraph) -> Vec<(ValueId, u64)> {
    let graph = &stage.graph;
    let mut within: Vec<Option<(ValueId, u64)>> = vec![None; graph.values.len()];
    for node in &graph.nodes {
        // An argument that a result replaces in memory lies where the result does.
        if let Some((argument, result)) = in_place(&node.op) {
            within[node.inputs[argument].0] = Some((node.outputs[result], 0));
        }
        match node.op {
            Op::Slice { first, .. } => {
                let of = graph.value(node.inputs[0]);
                let row = of.len() / of.shape[0];
                within[node.outputs[0].0] = Some((node.inputs[0], of.dtype.bytes(first * row)));
            }
            Op::Stack { .. } => {
                let mut offset = 0;
                for part in &node.inputs {
                    within[part.0] = Some((node.outputs[0], offset));
                    offset += graph.value(*part).bytes();
                }
            }
            _ => {}
        }
    }
    // What is added to the gradient of one parameter has one place.
    for (at, (parameter, gradient)) in stage.gradients.iter().enumerate() {
        if let Some((_, first)) = stage.gradients[..at].iter().find(|(other, _)| other == parameter) {
            within[gradient.0] = Some((*first, 0));
        }
    }
    let resolve = |id: usize| {
        let mut at = (ValueId(id), 0);
        while let Some((of, offset)) = within[at.0.0] {
            at = (of, at.1 + offset);
        }
        at
    };
    (0..graph.values.len()).map(resolve).collect()
}

fn push(sizes: &mut Vec<u64>, bytes: u64, place: fn(usize) -> Place) -> Place {
    sizes.push(bytes);
    place(sizes.len() - 1)
}

/// The smallest free buffer that is large enough, else the largest free one, grown, else a new one.
fn take(sizes: &mut Vec<u64>, free: &mut Vec<usize>, bytes: u64) -> usize {
    let fitting = free.iter().copied().filter(|&b| sizes[b] >= bytes).min_by_key(|&b| (sizes[b], b));
    let buffer =
        fitting.or_else(|| free.iter().copied().max_by_key(|&b| (sizes[b], b))).unwrap_or_else(|| {
            sizes.push(0);
            sizes.len() - 1
        });
    sizes[buffer] = sizes[buffer].max(bytes);
    free.retain(|&b| b != buffer);
    buffer
}
