//! Shapes, the split into I and W, and memory plans, as properties. No GPU.

use std::collections::HashMap;

use polystage::gpu::Capabilities;
use polystage::graph::{Activation, Epilogue, Fed, Graph, Layout, Op, Phase, StageGraph, ValueId};
use polystage::model::{Kind, Model, ModelConfig, Purpose};
use polystage::ops::in_place;
use polystage::ops::plan::{MemoryPlan, Place, Streams};
use polystage::ops::verify::cases;
use polystage::reference;
use proptest::prelude::*;

fn any_op() -> impl Strategy<Value = Op> {
    use Epilogue::{Bias, BiasGelu, BiasResidual, GeluBackward, Residual};
    let layouts = prop::sample::select(vec![Layout::NN, Layout::NT, Layout::TN]);
    let epilogues =
        prop::sample::select(vec![Epilogue::None, Bias, BiasGelu, BiasResidual, GeluBackward, Residual]);
    let heads = (0usize..4, 0usize..3);
    prop_oneof![
        any::<bool>().prop_map(|places| Op::Embedding { places }),
        (1usize..5).prop_map(|vocabulary| Op::EmbeddingBackward { vocabulary }),
        (1usize..5).prop_map(|context| Op::PositionBackward { context }),
        Just(Op::LayerNorm { epsilon: 1e-5 }),
        any::<bool>().prop_map(|residual| Op::LayerNormBackward { residual }),
        Just(Op::LayerNormWeightBackward),
        (layouts, epilogues).prop_map(|(layout, epilogue)| Op::Matmul { layout, epilogue }),
        Just(Op::AddBias),
        Just(Op::Add),
        Just(Op::Scale { factor: 0.5 }),
        Just(Op::Activate(Activation::GeluTanh)),
        Just(Op::ActivateBackward(Activation::GeluTanh)),
        Just(Op::ColumnSum),
        Just(Op::Gather),
        Just(Op::RmsNorm { epsilon: 1e-6 }),
        any::<bool>().prop_map(|residual| Op::RmsNormBackward { residual }),
        Just(Op::RmsNormWeightBackward),
        Just(Op::SwiGlu),
        Just(Op::SwiGluBackward),
        (heads.clone(), any::<bool>()).prop_map(|((heads, kv_heads), positions)| Op::Rope {
            heads,
            kv_heads,
            positions
        }),
        (heads.clone(), any::<bool>()).prop_map(|((heads, kv_heads), positions)| Op::RopeBackward {
            heads,
            kv_heads,
            positions
        }),
        (heads.clone(), any::<bool>()).prop_map(|((heads, kv_heads), starts)| Op::Attention {
            heads,
            kv_heads,
            starts
        }),
        (heads.clone(), any::<bool>()).prop_map(|((heads, kv_heads), starts)| Op::AttentionBackward {
            heads,
            kv_heads,
            starts
        }),
        heads.prop_map(|(heads, kv_heads)| Op::AttentionCached { heads, kv_heads }),
        Just(Op::CrossEntropy { scale: 0.5 }),
        Just(Op::Sum { exact: false }),
        Just(Op::Spread),
        (0usize..4, 0usize..4).prop_map(|(first, count)| Op::Slice { first, count }),
        (0usize..4).prop_map(|parts| Op::Stack { parts }),
        (0usize..3, 0usize..3, 0usize..4).prop_map(|(member, members, first)| Op::LogitStatistics {
            member,
            members,
            first
        }),
        (0usize..4, 0usize..9).prop_map(|(first, vocabulary)| Op::CrossEntropyPart {
            scale: 0.5,
            first,
            vocabulary
        }),
    ]
}

fn any_shape() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(prop::sample::select(vec![0usize, 1, 1, 2, 2, 3, 6]), 0..4)
}

/// What is accepted, the reference computes, with the sizes that were inferred; what is not is refused in words.
fn accepted_or_explained(op: &Op, shapes: &[Vec<usize>]) -> Result<bool, TestCaseError> {
    let shapes: Vec<&[usize]> = shapes.iter().map(Vec::as_slice).collect();
    match op.infer(&shapes) {
        Ok(outputs) => {
            let zeros: Vec<Vec<f64>> = shapes.iter().map(|s| vec![0.0; s.iter().product()]).collect();
            let inputs: Vec<&[f64]> = zeros.iter().map(Vec::as_slice).collect();
            let sizes: Vec<usize> = reference::apply(op, &shapes, &inputs).iter().map(Vec::len).collect();
            let inferred: Vec<usize> = outputs.iter().map(|s| s.iter().product()).collect();
            prop_assert_eq!(sizes, inferred, "{:?} {:?}", op, shapes);
            let is_view = matches!(op, Op::Slice { .. } | Op::Stack { .. });
            prop_assert!(is_view || op.flops(&shapes) > 0.0, "{:?} costs nothing", op);
            Ok(true)
        }
        Err(error) => {
            let message = error.to_string();
            prop_assert!(message.contains(op.name()), "{message:?} does not name {op:?}");
            let named = shapes.len() != op.arity() || message.contains(&format!("{shapes:?}"));
            prop_assert!(named, "{message:?} does not show {shapes:?}");
            Ok(false)
        }
    }
}

/// Bytes of a stash slot, of a gradient slot, and of scratch.
fn memory_of(rewrite: impl Fn(&mut StageGraph)) -> (u64, u64, u64) {
    let config = ModelConfig {
        kind: Kind::Gpt2,
        layers: 4,
        width: 64,
        heads: 4,
        context: 32,
        vocabulary: 300,
        ..Default::default()
    };
    let model = Model::new(&config).unwrap();
    let mut stage = model.stage_graph(1..9, 2, 32, Purpose::Training { tokens: 64 }).unwrap();
    rewrite(&mut stage);
    let plan = MemoryPlan::new(&stage, &capabilities(true));
    let sum = |sizes: &[u64]| sizes.iter().sum();
    (sum(&plan.stash), sum(&plan.slot), sum(&plan.scratch))
}

#[test]
fn recomputation_keeps_the_layers_inputs_and_joining_holds_nothing_between_i_and_w() {
    let row = 4 * 2 * 32 * 64;
    let (stash, slot, _) = memory_of(|_| ());
    let (joined_stash, joined_slot, joined_scratch) = memory_of(StageGraph::join_backward);
    // What is left of a gradient slot is the gradient that the next stage feeds.
    assert_eq!((joined_stash, joined_slot), (stash, row));
    assert!(slot > 10 * row, "{slot}");
    let (again, again_slot, again_scratch) = memory_of(|stage| {
        stage.recompute();
        stage.join_backward();
    });
    assert_eq!((again, again_slot), (4 * row, row), "the inputs of four blocks");
    assert!(
        stash > 40 * row && again_scratch < joined_scratch + (stash - again) / 3,
        "{stash} {again_scratch}"
    );
}

#[test]
fn of_logits_in_many_parts_one_exists_at_a_time_and_four_tables_of_what_is_known_of_all() {
    let config = ModelConfig {
        kind: Kind::Gpt2,
        layers: 1,
        width: 4,
        heads: 1,
        context: 64,
        vocabulary: 60 * 128,
        ..Default::default()
    };
    let model = Model::new(&config).unwrap().with_logits(4 * 64 * 128);
    let stage = model.stage_graph(3..4, 1, 64, Purpose::Training { tokens: 64 }).unwrap();
    let plan = MemoryPlan::new(&stage, &capabilities(true));
    let (logits, statistics, activation) = (4 * 64 * 128, 4 * 60 * 64 * 3, 4 * 64 * 4);
    let sum = |sizes: &[u64]| sizes.iter().sum::<u64>();
    let all = sum(&plan.scratch) + sum(&plan.stash);
    assert!(all < logits + 4 * statistics + 20 * activation, "{all}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn wrong_shapes_are_refused_with_op_and_shapes_and_right_ones_are_computed(
        op in any_op(),
        shapes in prop::collection::vec(any_shape(), 0..6),
    ) {
        accepted_or_explained(&op, &shapes)?;
        // The right number of arguments, so that the shapes themselves decide.
        let shapes: Vec<Vec<usize>> = shapes.iter().cycle().take(op.arity() * shapes.len().min(1)).cloned().collect();
        accepted_or_explained(&op, &shapes)?;
    }

    #[test]
    fn a_good_case_with_one_shape_changed_is_accepted_or_refused_but_never_panics(
        which in any::<prop::sample::Index>(),
        argument in any::<prop::sample::Index>(),
        shape in any_shape(),
    ) {
        let small: Vec<_> = cases()
            .into_iter()
            .filter(|c| c.shapes.iter().all(|s| s.iter().product::<usize>() < 500))
            .collect();
        let case = which.get(&small);
        prop_assert!(accepted_or_explained(&case.op, &case.shapes)?, "{}", case.label);
        let mut shapes = case.shapes.clone();
        let at = argument.index(shapes.len());
        shapes[at] = shape;
        accepted_or_explained(&case.op, &shapes)?;
    }
}

#[derive(Clone, Debug)]
struct StageSetup {
    config: ModelConfig,
    range: std::ops::Range<usize>,
    batch: usize,
    sequence: usize,
    training: bool,
    /// Without training: as for generation, with caches.
    cached: bool,
}

impl StageSetup {
    fn graph(&self) -> StageGraph {
        let tokens = self.batch * self.sequence;
        let purpose = match (self.training, self.cached) {
            (true, _) => Purpose::Training { tokens },
            (false, false) => Purpose::Inference,
            (false, true) => Purpose::Decode { capacity: self.config.context },
        };
        let model = Model::new(&self.config).unwrap();
        model.stage_graph(self.range.clone(), self.batch, self.sequence, purpose).unwrap()
    }
}

fn any_stage() -> impl Strategy<Value = StageSetup> {
    let all = vec![Kind::Gpt2, Kind::Mlp, Kind::Llama, Kind::Mistral, Kind::Qwen2, Kind::Qwen3];
    let kinds = prop::sample::select(all);
    let extents = (1usize..4, 1usize..4, 1usize..9, 1usize..3, 1usize..80, 1usize..300);
    (kinds, extents, any::<(u8, u8)>(), prop::bool::weighted(0.8), any::<bool>()).prop_map(
        |(kind, (layers, heads, size, batch, sequence, vocabulary), (from, to), training, cached)| {
            let grouped = kind.is_llama();
            let config = ModelConfig {
                kind,
                layers,
                width: heads * size,
                heads,
                context: sequence + 3,
                vocabulary,
                head_dim: grouped.then_some(2 * size),
                kv_heads: grouped.then_some(if heads % 2 == 1 { 1 } else { heads }),
                ..Default::default()
            };
            let count = 2 + layers * if kind == Kind::Mlp { 1 } else { 2 };
            let start = from as usize % count;
            let end = start + 1 + to as usize % (count - start);
            StageSetup { config, range: start..end, batch, sequence, training, cached }
        },
    )
}

fn capabilities(software: bool) -> Capabilities {
    let (max_binding, max_buffer) = (1 << 30, 1 << 30);
    Capabilities {
        software,
        subgroup: software.then_some(8),
        has_f16: false,
        f16: false,
        cooperative: 0,
        sums: 16,
        fill: 256,
        written_out: true,
        tiles: Default::default(),
        dispatch: u64::MAX,
        max_binding,
        max_buffer,
        max_groups: 65535,
    }
}

/// The value in whose memory each value lies, if an op works in place or takes or makes part of something.
fn homes(stage: &StageGraph) -> Vec<ValueId> {
    let mut home: Vec<ValueId> = (0..stage.graph.values.len()).map(ValueId).collect();
    for node in &stage.graph.nodes {
        if let Some((argument, result)) = in_place(&node.op) {
            home[node.inputs[argument].0] = node.outputs[result];
        }
        match node.op {
            Op::Slice { .. } => home[node.outputs[0].0] = node.inputs[0],
            Op::Stack { .. } => node.inputs.iter().for_each(|part| home[part.0] = node.outputs[0]),
            _ => {}
        }
    }
    home
}

/// Runs the phases on paper: who was the last to write each scratch buffer. Every argument must still be there when a
/// node reads it, and every result at the end.
fn memory_is_sound(stage: &StageGraph, plan: &MemoryPlan, streams: Streams) -> Result<(), TestCaseError> {
    let (graph, home) = (&stage.graph, homes(stage));
    let mut owner: HashMap<usize, ValueId> = HashMap::new();
    let mut done = Vec::new();
    for (number, phase) in [Phase::Forward, Phase::Input, Phase::Weight].into_iter().enumerate() {
        let passing = |id: ValueId| plan.passing[number].get(&home[id.0]).copied();
        let scratch = |id: ValueId| match plan.place[id.0] {
            Some(Place::Scratch(buffer)) => Some(buffer),
            _ => passing(id),
        };
        let mut came = std::collections::HashSet::new();
        for (index, node) in graph.nodes.iter().enumerate().filter(|(_, n)| n.phase == phase) {
            for &input in &node.inputs {
                // A weight that passes comes before the first that reads it.
                if let Some(buffer) = passing(input).filter(|_| came.insert(home[input.0])) {
                    owner.insert(buffer, home[input.0]);
                }
                let is_there = plan.place[input.0].is_some() || passing(input).is_some();
                prop_assert!(is_there, "{} has no home", graph.value(input).name);
                if let Some(buffer) = scratch(input) {
                    prop_assert_eq!(
                        owner.get(&buffer),
                        Some(&home[input.0]),
                        "{:?} lost an argument",
                        node.op
                    );
                }
            }
            // Writes nothing: its result is part of what it takes.
            if let Op::Slice { .. } = node.op {
                done.extend(node.outputs.iter().copied());
                continue;
            }
            let mut written = plan.node_scratch[index].clone();
            for (&buffer, &bytes) in written.iter().zip(&plan.lowered[index].scratch) {
                prop_assert!(plan.scratch[buffer] >= bytes);
            }
            for &output in &node.outputs {
                if let Some(buffer) = scratch(output) {
                    prop_assert!(plan.scratch[buffer] >= graph.value(output).bytes());
                    written.push(buffer);
                }
            }
            let distinct: std::collections::HashSet<usize> = written.iter().copied().collect();
            prop_assert_eq!(distinct.len(), written.len(), "{:?} writes a buffer twice", node.op);
            for &input in node.inputs.iter().filter(|i| !node.outputs.contains(&home[i.0])) {
                let read = scratch(input);
                prop_assert!(
                    read.is_none_or(|b| !distinct.contains(&b)),
                    "{:?} writes what it reads",
                    node.op
                );
            }
            owner.retain(|buffer, _| !distinct.contains(buffer));
            owner.extend(node.outputs.iter().filter_map(|&o| Some((scratch(o)?, home[o.0]))));
            done.extend(node.outputs.iter().copied());
        }
        // F's results are taken when F ends; those of I when W, which may follow at once, has ended.
        if phase != Phase::Input {
            // A gradient that passes has left as soon as it was made.
            let left = |id: &ValueId| streams.gradients && stage.gradients.iter().any(|of| of.1 == *id);
            for result in stage.results().into_iter().filter(|r| done.contains(r) && !left(r)) {
                if let Some(buffer) = scratch(result) {
                    prop_assert_eq!(
                        owner.get(&buffer),
                        Some(&home[result.0]),
                        "{} was lost",
                        graph.value(result).name
                    );
                }
            }
            done.clear();
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_input_half_makes_no_parameter_gradient_and_the_weight_half_nothing_else(setup in any_stage()) {
        let stage = setup.graph();
        let made: Vec<ValueId> = stage.gradients.iter().map(|g| g.1).collect();
        let mut needed: Vec<ValueId> = stage.d_input.into_iter().collect();
        for node in stage.graph.nodes.iter().rev() {
            let gradients = node.outputs.iter().filter(|o| made.contains(o)).count();
            match node.phase {
                Phase::Weight => {
                    prop_assert_eq!(gradients, node.outputs.len(), "{:?} is no gradient of a parameter", node.op);
                    // Without an input's gradient to make, I is the chain that feeds W.
                    needed.extend(node.inputs.iter().filter(|_| stage.input.is_none()));
                }
                Phase::Input => {
                    prop_assert_eq!(gradients, 0, "{:?} makes a parameter's gradient", node.op);
                    let useful = node.outputs.iter().any(|o| needed.contains(o));
                    prop_assert!(useful, "{:?} is not on the way to the input's gradient", node.op);
                    needed.extend(&node.inputs);
                }
                Phase::Forward => prop_assert_eq!(gradients, 0),
            }
        }
        let parameters = stage.graph.parameters().count();
        prop_assert_eq!(made.len(), if setup.training { parameters } else { 0 }, "a gradient for each parameter");
        prop_assert_eq!(stage.d_input.is_some(), setup.training && setup.range.start > 0);
    }

    #[test]
    fn scratch_buffers_are_shared_only_by_values_that_do_not_live_together(
        setup in any_stage(),
        software in any::<bool>(),
        recompute in any::<bool>(),
        join in any::<bool>(),
        divide in any::<bool>(),
        streams in any::<[bool; 2]>(),
    ) {
        let mut stage = setup.graph();
        if recompute {
            stage.recompute();
        }
        if divide {
            stage.divide_logits((4 * 128 * setup.batch * setup.sequence) as u64).unwrap();
        }
        if join {
            stage.join_backward();
        }
        stage.graph.verify().unwrap();
        let streams = Streams { weights: streams[0], gradients: streams[1] };
        let plan = MemoryPlan::streaming(&stage, &capabilities(software), streams);
        memory_is_sound(&stage, &plan, streams)?;
        // Stash and slots belong to one value each, unless a result takes an argument's place.
        let home = homes(&stage);
        let mut owned: HashMap<(bool, usize), ValueId> = HashMap::new();
        for (index, place) in plan.place.iter().enumerate() {
            let (key, sizes) = match *place {
                Some(Place::Stash(i)) => ((true, i), &plan.stash),
                Some(Place::Slot(i)) => ((false, i), &plan.slot),
                _ => continue,
            };
            prop_assert!(sizes[key.1] >= stage.graph.values[index].bytes());
            let before = owned.insert(key, home[index]);
            prop_assert!(before.is_none_or(|b| b == home[index]), "{place:?} has two values");
        }
    }
}

#[test]
fn a_use_before_the_definition_and_a_wrong_shape_are_found() {
    let build = || {
        let mut graph = Graph::default();
        let x = graph.input(Fed::Input, &[2, 3]);
        let y = graph.forward(Op::Activate(Activation::GeluTanh), &[x]).unwrap();
        graph.forward(Op::Add, &[y, x]).unwrap();
        graph
    };
    build().verify().unwrap();
    let mut graph = build();
    graph.nodes.swap(0, 1);
    let error = graph.verify().unwrap_err().to_string();
    assert!(error.contains("add") && error.contains("gelu before it is computed"), "{error}");
    let mut graph = build();
    graph.values[2].shape = vec![3, 2];
    let error = graph.verify().unwrap_err().to_string();
    assert!(error.contains("add") && error.contains("[2, 3]") && error.contains("[3, 2]"), "{error}");
    let mut graph = build();
    graph.values[1].shape = vec![3, 2];
    let error = graph.verify().unwrap_err().to_string();
    assert!(error.contains("gelu") && error.contains("[3, 2]"), "{error}");
}

#[test]
fn a_parameter_used_twice_in_one_stage_has_both_terms_of_its_gradient_in_one_place() {
    let mut graph = Graph::default();
    let x = graph.input(Fed::Input, &[2, 3]);
    let w = graph.parameter("shared", &[3, 3]);
    let op = Op::Matmul { layout: Layout::NN, epilogue: Epilogue::None };
    let y = graph.forward(op.clone(), &[x, w]).unwrap();
    let z = graph.forward(op, &[y, w]).unwrap();
    let stage = polystage::graph::differentiate(graph, Some(x), Some(z)).unwrap();
    assert_eq!(stage.gradients.iter().map(|of| of.0).collect::<Vec<_>>(), [w, w]);
    for gradients in [false, true] {
        let streams = Streams { weights: false, gradients };
        let plan = MemoryPlan::streaming(&stage, &capabilities(true), streams);
        let [a, b] = [0, 1].map(|of| plan.place[stage.gradients[of].1.0]);
        assert!(a.is_some() && a == b, "{a:?} and {b:?}");
    }
}
