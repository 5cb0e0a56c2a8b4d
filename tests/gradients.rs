//! The reference's gradients against finite differences in f64, op by op and for whole models; fusion changes nothing.

use polystage::graph::{
    Activation, DType, Epilogue, Fed, Graph, Layout, Op, Phase, Source, StageGraph, ValueId, differentiate,
    fuse,
};
use polystage::model::{Kind, Lora, Model, ModelConfig, Purpose, init::philox};
use polystage::ops::sort_rows;

use crate::oracle;

const SCALE: f32 = 0.125;

/// `n` numbers between -1 and 1.
fn numbers(stream: usize, n: usize) -> Vec<f64> {
    let word = |i: u32| philox([i, stream as u32, 0, 0], [1, 2])[0];
    (0..n as u32).map(|i| word(i) as f64 / 2_147_483_648.0 - 1.0).collect()
}

/// Values for everything a stage is fed with; what it computes is left empty.
fn feeds(stage: &StageGraph, vocabulary: usize) -> Vec<Option<Vec<f64>>> {
    let whole = |list: &[u32]| list.iter().map(|&x| x as f64).collect::<Vec<f64>>();
    let ids: Vec<u32> = (0..100).map(|i| philox([i, 0, 0, 0], [3, 4])[0] % vocabulary as u32).collect();
    let fed = |what: Fed| {
        let found = stage.graph.fed().find(|(fed, _)| *fed == what);
        stage.graph.value(found.unwrap().1)
    };
    let by_token = || sort_rows(&ids[..fed(Fed::TokenOrder).len()], vocabulary);
    let by_place = || sort_rows(&after(fed(Fed::Places).shape[1], fed(Fed::Places).len()), CONTEXT);
    let values = stage.graph.values.iter().enumerate();
    values
        .map(|(index, value)| match value.source {
            Source::Node { .. } => None,
            Source::Fed(Fed::Tokens | Fed::Targets) => Some(whole(&ids[..value.len()])),
            Source::Fed(Fed::TokenSegments) => Some(whole(&by_token().0)),
            Source::Fed(Fed::TokenOrder) => Some(whole(&by_token().1)),
            // In each sequence two texts, the second from its third token on.
            Source::Fed(Fed::Starts) => {
                Some(places(value.shape[1], value.len()).map(|t| if t < 2 { 0.0 } else { 2.0 }).collect())
            }
            Source::Fed(Fed::Places) => Some(whole(&after(value.shape[1], value.len()))),
            Source::Fed(Fed::PlaceSegments) => Some(whole(&by_place().0)),
            Source::Fed(Fed::PlaceOrder) => Some(whole(&by_place().1)),
            _ => Some(numbers(index, value.len())),
        })
        .collect()
}

/// The places in their sequences of so many tokens.
fn places(sequence: usize, tokens: usize) -> impl Iterator<Item = usize> {
    (0..tokens).map(move |at| at % sequence)
}

/// The same, counted from the third token of a sequence on from there.
fn after(sequence: usize, tokens: usize) -> Vec<u32> {
    places(sequence, tokens).map(|t| if t < 2 { t as u32 } else { t as u32 - 2 }).collect()
}

/// Rows of the position tables.
const CONTEXT: usize = 6;

/// The scalar that is differentiated: the output in the direction of `d_output`, plus the scaled loss.
fn objective(stage: &StageGraph, values: &[Option<Vec<f64>>]) -> f64 {
    let mut values = values.to_vec();
    oracle::run(&stage.graph, &[Phase::Forward], &mut values);
    let get = |id: ValueId| values[id.0].as_ref().unwrap();
    let output = stage.output.zip(stage.d_output).map(|(y, dy)| {
        let (y, dy) = (get(y), get(dy));
        y.iter().zip(dy).map(|(y, dy)| y * dy).sum::<f64>()
    });
    let loss = stage.loss.map(|loss| SCALE as f64 * get(loss).iter().sum::<f64>());
    output.unwrap_or(0.0) + loss.unwrap_or(0.0)
}

/// Compares every gradient with central differences, at up to `samples` elements of each argument.
fn check(what: &str, stage: &StageGraph, vocabulary: usize, samples: usize) {
    stage.graph.verify().unwrap();
    let mut values = feeds(stage, vocabulary);
    let mut results = values.clone();
    oracle::run(&stage.graph, &[Phase::Forward, Phase::Input, Phase::Weight], &mut results);
    let pairs: Vec<(ValueId, ValueId)> =
        stage.gradients.iter().copied().chain(stage.input.zip(stage.d_input)).collect();
    assert!(!pairs.is_empty(), "{what}: nothing to differentiate");
    for (argument, gradient) in pairs {
        let got = results[gradient.0].clone().unwrap();
        let n = stage.graph.value(argument).len();
        assert_eq!(n, got.len());
        let picked: Vec<usize> = match n <= samples {
            true => (0..n).collect(),
            false => {
                (0..samples as u32).map(|i| philox([i, n as u32, 0, 0], [5, 6])[0] as usize % n).collect()
            }
        };
        for i in picked {
            let mut at = |step: f64| {
                let kept = values[argument.0].as_ref().unwrap()[i];
                values[argument.0].as_mut().unwrap()[i] = kept + step;
                let result = objective(stage, &values);
                values[argument.0].as_mut().unwrap()[i] = kept;
                result
            };
            // Fourth order: the error is about h⁴ from the curve and 1e-16/h from rounding.
            let h = 1e-3;
            let want = (8.0 * (at(h) - at(-h)) - (at(2.0 * h) - at(-2.0 * h))) / (12.0 * h);
            let name = &stage.graph.value(argument).name;
            let error = (got[i] - want).abs();
            assert!(error <= 1e-7 * (1.0 + want.abs()), "{what}: d {name}[{i}] is {}, not {want}", got[i]);
        }
    }
}

/// A graph of one op whose first argument is the stage's input, the others parameters.
fn single(op: Op, shapes: &[&[usize]]) -> StageGraph {
    let mut graph = Graph::default();
    let input = graph.input(Fed::Input, shapes[0]);
    let mut arguments = vec![input];
    for (i, shape) in shapes.iter().enumerate().skip(1) {
        arguments.push(graph.parameter(&format!("argument {i}"), shape));
    }
    let output = graph.forward(op, &arguments).unwrap();
    differentiate(graph, Some(input), Some(output)).unwrap()
}

fn matmul(layout: Layout) -> Op {
    Op::Matmul { layout, epilogue: Epilogue::None }
}

#[test]
fn every_ops_gradient_matches_finite_differences_in_every_argument() {
    let epsilon = 1e-5;
    check("layernorm", &single(Op::LayerNorm { epsilon }, &[&[2, 3, 7], &[7], &[7]]), 1, 100);
    check("matmul NN", &single(matmul(Layout::NN), &[&[2, 3, 5], &[5, 4]]), 1, 100);
    check("matmul NT", &single(matmul(Layout::NT), &[&[2, 3, 5], &[4, 5]]), 1, 100);
    check("add_bias", &single(Op::AddBias, &[&[2, 3, 5], &[5]]), 1, 100);
    check("scale", &single(Op::Scale { factor: -1.7 }, &[&[3, 9]]), 1, 100);
    check("gelu", &single(Op::Activate(Activation::GeluTanh), &[&[3, 9]]), 1, 100);
    check("rmsnorm", &single(Op::RmsNorm { epsilon }, &[&[2, 3, 7], &[7]]), 1, 100);
    check("rmsnorm of heads", &single(Op::RmsNorm { epsilon }, &[&[2, 3, 15], &[5]]), 1, 100);
    for (heads, kv_heads, size) in [(1, 1, 1), (2, 2, 3), (3, 3, 2), (6, 2, 2), (3, 1, 4)] {
        let shape = [2, 5, (heads + 2 * kv_heads) * size];
        check("attention", &single(Op::Attention { heads, kv_heads, starts: false }, &[&shape]), 1, 100);
        let mut graph = Graph::default();
        let input = graph.input(Fed::Input, &shape);
        let starts = graph.input(Fed::Starts, &[2, 5]);
        let op = Op::Attention { heads, kv_heads, starts: true };
        let output = graph.forward(op, &[input, starts]).unwrap();
        let stage = differentiate(graph, Some(input), Some(output)).unwrap();
        check("attention in texts that share a sequence", &stage, 1, 100);
    }
}

#[test]
fn the_gradient_of_the_embedding_matches_finite_differences_also_for_repeated_tokens() {
    let mut graph = Graph::default();
    let tokens = graph.input(Fed::Tokens, &[2, 4]);
    let (table, positions) = (graph.parameter("table", &[3, 5]), graph.parameter("positions", &[CONTEXT, 5]));
    let mut placed = graph.clone();
    let output = graph.forward(Op::Embedding { places: false }, &[tokens, table, positions]).unwrap();
    check("embedding", &differentiate(graph, None, Some(output)).unwrap(), 3, 100);
    let places = placed.input(Fed::Places, &[2, 4]);
    let op = Op::Embedding { places: true };
    let output = placed.forward(op, &[tokens, table, positions, places]).unwrap();
    check("embedding with places", &differentiate(placed, None, Some(output)).unwrap(), 3, 100);
}

#[test]
fn the_gradient_of_a_gather_matches_finite_differences_also_for_repeated_tokens() {
    let mut graph = Graph::default();
    let tokens = graph.input(Fed::Tokens, &[2, 4]);
    let table = graph.parameter("table", &[3, 5]);
    let output = graph.forward(Op::Gather, &[tokens, table]).unwrap();
    check("gather", &differentiate(graph, None, Some(output)).unwrap(), 3, 100);
}

#[test]
fn the_gradients_of_rope_match_finite_differences_in_queries_keys_and_values() {
    for positions in [false, true] {
        let mut graph = Graph::default();
        let x = graph.input(Fed::Input, &[2, 3, 4]);
        // Three different functions of the input, so that each part has a gradient of its own.
        let mut part = |heads: usize| {
            let w = graph.parameter(&format!("w{}", graph.values.len()), &[heads * 6, 4]);
            graph.forward(matmul(Layout::NT), &[x, w]).unwrap()
        };
        let (q, k, v) = (part(4), part(2), part(2));
        let mut arguments = vec![q, k, v, graph.input(Fed::Argument(DType::F32), &[5, 6])];
        if positions {
            // Tokens are whole numbers below the length of the table.
            arguments.push(graph.input(Fed::Tokens, &[2, 3]));
        }
        let op = Op::Rope { heads: 4, kv_heads: 2, positions };
        let output = graph.forward(op, &arguments).unwrap();
        check("rope", &differentiate(graph, Some(x), Some(output)).unwrap(), 5, 100);
    }
}

#[test]
fn the_gradients_of_swiglu_match_finite_differences_in_both_arguments() {
    let mut graph = Graph::default();
    let x = graph.input(Fed::Input, &[2, 3, 4]);
    let mut part = || {
        let w = graph.parameter(&format!("w{}", graph.values.len()), &[5, 4]);
        graph.forward(matmul(Layout::NT), &[x, w]).unwrap()
    };
    let (gate, up) = (part(), part());
    let output = graph.forward(Op::SwiGlu, &[gate, up]).unwrap();
    check("swiglu", &differentiate(graph, Some(x), Some(output)).unwrap(), 1, 100);
}

#[test]
fn the_gradient_of_cross_entropy_matches_finite_differences() {
    let mut graph = Graph::default();
    let logits = graph.input(Fed::Input, &[2, 3, 7]);
    let targets = graph.input(Fed::Targets, &[2, 3]);
    graph.push(Op::CrossEntropy { scale: SCALE }, &[logits, targets], Phase::Forward).unwrap();
    check("cross_entropy", &differentiate(graph, Some(logits), None).unwrap(), 7, 100);
}

#[test]
fn gradients_of_a_value_used_several_times_are_summed() {
    for layout in [Layout::NN, Layout::NT] {
        let mut graph = Graph::default();
        let x = graph.input(Fed::Input, &[4, 4]);
        let y = graph.forward(Op::Activate(Activation::GeluTanh), &[x]).unwrap();
        // Both operands are activations, one of them twice.
        let z = graph.forward(matmul(layout), &[y, x]).unwrap();
        let sum = graph.forward(Op::Add, &[z, y]).unwrap();
        let twice = graph.forward(Op::Add, &[sum, sum]).unwrap();
        check("a diamond", &differentiate(graph, Some(x), Some(twice)).unwrap(), 1, 100);
    }
}

#[test]
fn ops_of_the_backward_pass_refuse_to_be_differentiated() {
    let mut graph = Graph::default();
    let x = graph.input(Fed::Input, &[3, 4]);
    let output = graph.forward(Op::ColumnSum, &[x]).unwrap();
    let error = differentiate(graph, Some(x), Some(output)).unwrap_err().to_string();
    assert!(error.contains("column_sum") && error.contains("no gradient"), "{error}");
}

const KINDS: [Kind; 6] = [Kind::Gpt2, Kind::Mlp, Kind::Llama, Kind::Mistral, Kind::Qwen2, Kind::Qwen3];

fn model(kind: Kind) -> Model {
    let mut config =
        ModelConfig { kind, layers: 2, width: 6, heads: 2, context: 6, vocabulary: 11, ..Default::default() };
    if kind.is_llama() {
        config.kv_heads = Some(1);
        config.head_dim = Some(4);
        config.intermediate = Some(7);
        // Large beside the squares of small weights, so that the curve is smooth enough for differences.
        config.norm_epsilon = Some(0.1);
    }
    Model::new(&config).unwrap()
}

/// All layers of a model of two blocks, those before and after its middle, its blocks, and halves that are of two of them.
fn ranges(model: &Model) -> [std::ops::Range<usize>; 5] {
    let (all, middle) = (model.layers(), model.layers() / 2);
    [0..all, 0..middle, 1..all - 1, middle..all, middle - 1..middle + 1]
}

#[test]
fn gradients_of_whole_models_and_of_every_stage_match_finite_differences() {
    for kind in KINDS {
        let model = model(kind);
        for range in ranges(&model) {
            let what = format!("{kind:?} layers {range:?}");
            let purpose = Purpose::Training { tokens: (1.0 / SCALE) as usize };
            let stage = model.stage_graph(range, 2, 5, purpose).unwrap();
            check(&what, &stage, 11, 6);
        }
    }
}

/// Also of a frozen head, where only what comes before it is trained.
#[test]
fn divided_logits_give_the_losses_and_gradients_of_whole_ones_and_never_exist_whole() {
    for kind in KINDS {
        let config = ModelConfig { vocabulary: 300, ..model(kind).config().clone() };
        let plain = Model::new(&config).unwrap();
        let first = plain.linear_layers()[0].name.clone();
        let adapter = Lora { rank: 2, scale: 0.5, modules: vec![first] };
        let frozen = Model::with_adapter(&config, Some(&adapter)).unwrap();
        let (all, head) = (0..plain.layers(), plain.layers() - 1..plain.layers());
        for (model, range) in [(&plain, &all), (&plain, &head), (&frozen, &all)] {
            for purpose in [Purpose::Training { tokens: 10 }, Purpose::Evaluation] {
                let what = format!("{kind:?} layers {range:?}, {purpose:?}");
                let whole = model.stage_graph(range.clone(), 2, 5, purpose).unwrap();
                let mut divided = whole.clone();
                // Three parts of 128, 128 and 44 columns.
                divided.divide_logits(4 * 10 * 128).unwrap();
                divided.graph.verify().unwrap();
                let [a, b] = [&whole, &divided].map(|stage| {
                    let mut values = feeds(stage, 300);
                    let phases = [Phase::Forward, Phase::Input, Phase::Weight];
                    oracle::run(&stage.graph, &phases, &mut values);
                    let made = stage.graph.nodes.iter().flat_map(|node| &node.outputs);
                    let rows_of_three = made.map(|&id| stage.graph.shape(id)).filter(|s| s.len() == 3);
                    let results: Vec<Vec<f64>> =
                        stage.results().iter().map(|id| values[id.0].clone().unwrap()).collect();
                    (rows_of_three.map(|s| s[2]).max(), results)
                });
                assert_eq!((a.0, b.0), (Some(300), Some(128)), "{what}");
                assert_eq!(whole.results(), divided.results(), "{what}");
                for (a, b) in a.1.iter().flatten().zip(b.1.iter().flatten()) {
                    approx::assert_relative_eq!(a, b, epsilon = 1e-14, max_relative = 1e-10);
                }
            }
        }
    }
}

#[test]
fn gradients_of_an_adapter_match_finite_differences_and_frozen_weights_have_none() {
    for kind in KINDS {
        let plain = model(kind);
        let layers = plain.linear_layers();
        // Everything, and only some of the second block and the head: nothing is trained before it.
        let late = layers.iter().skip(layers.len() / 2 + 1).step_by(2);
        for modules in [layers.iter().collect::<Vec<_>>(), late.collect()] {
            let modules: Vec<String> = modules.iter().map(|l| l.name.clone()).collect();
            let adapter = Lora { rank: 2, scale: 0.5, modules: modules.clone() };
            let model = Model::with_adapter(plain.config(), Some(&adapter)).unwrap();
            for range in ranges(&model) {
                let what = format!("{kind:?} layers {range:?} with {modules:?}");
                let purpose = Purpose::Training { tokens: (1.0 / SCALE) as usize };
                let stage = model.stage_graph(range.clone(), 2, 5, purpose).unwrap();
                let trained = range.clone().flat_map(|l| model.layer_parameters(l)).filter(|p| !p.frozen);
                assert_eq!(stage.gradients.len(), trained.count(), "{what}");
                assert_eq!(stage.d_input.is_some(), model.trains_before(range.start), "{what}");
                assert_eq!(
                    stage.d_output.is_some(),
                    range.end < model.layers() && model.trains_before(range.end),
                    "{what}"
                );
                let backward = stage.graph.nodes.iter().any(|n| n.phase != Phase::Forward);
                assert_eq!(backward, model.trains_before(range.end), "{what}");
                if backward {
                    check(&what, &stage, 11, 6);
                }
            }
        }
    }
}

/// A transformer block and a head without any fusion: input (2,5,6), loss at the end.
fn unfused_block() -> StageGraph {
    let (mut g, epsilon) = (Graph::default(), 1e-5);
    let x = g.input(Fed::Input, &[2, 5, 6]);
    let weight = |g: &mut Graph, shape: &[usize]| g.parameter(&format!("w{}", g.values.len()), shape);
    let norm = |g: &mut Graph, x| {
        let (gain, bias) = (weight(g, &[6]), weight(g, &[6]));
        g.forward(Op::LayerNorm { epsilon }, &[x, gain, bias]).unwrap()
    };
    let linear = |g: &mut Graph, x, inputs: usize, outputs: usize| {
        let (w, b) = (weight(g, &[inputs, outputs]), weight(g, &[outputs]));
        let y = g.forward(matmul(Layout::NN), &[x, w]).unwrap();
        g.forward(Op::AddBias, &[y, b]).unwrap()
    };
    let y = norm(&mut g, x);
    let qkv = linear(&mut g, y, 6, 18);
    let o = g.forward(Op::Attention { heads: 2, kv_heads: 2, starts: false }, &[qkv]).unwrap();
    let y = linear(&mut g, o, 6, 6);
    let x1 = g.forward(Op::Add, &[x, y]).unwrap();
    let y = norm(&mut g, x1);
    let u = linear(&mut g, y, 6, 24);
    let a = g.forward(Op::Activate(Activation::GeluTanh), &[u]).unwrap();
    let y = linear(&mut g, a, 24, 6);
    let x2 = g.forward(Op::Add, &[x1, y]).unwrap();
    let y = norm(&mut g, x2);
    let table = g.parameter("table", &[11, 6]);
    let logits = g.forward(matmul(Layout::NT), &[y, table]).unwrap();
    let targets = g.input(Fed::Targets, &[2, 5]);
    g.push(Op::CrossEntropy { scale: SCALE }, &[logits, targets], Phase::Forward).unwrap();
    differentiate(g, Some(x), None).unwrap()
}

#[test]
fn fusion_shortens_the_graph_and_keeps_every_result() {
    let plain = unfused_block();
    let mut fused = plain.clone();
    fuse::fuse(&mut fused);
    fused.graph.verify().unwrap();
    let run = |stage: &StageGraph| {
        let mut values = feeds(stage, 11);
        oracle::run(&stage.graph, &[Phase::Forward, Phase::Input, Phase::Weight], &mut values);
        values
    };
    let (want, got) = (run(&plain), run(&fused));
    for id in plain.results() {
        let (want, got) = (want[id.0].as_ref().unwrap(), got[id.0].as_ref().unwrap());
        for (w, g) in want.iter().zip(got) {
            assert!((w - g).abs() <= 1e-12 * (1.0 + w.abs()), "{}: {g}, not {w}", plain.graph.value(id).name);
        }
    }
    let uses = |op: Op| fused.graph.nodes.iter().filter(|n| n.op == op).count();
    let tail = |layout, epilogue| uses(Op::Matmul { layout, epilogue });
    assert_eq!(tail(Layout::NN, Epilogue::Bias), 1, "qkv");
    assert_eq!(tail(Layout::NN, Epilogue::BiasGelu), 1, "feed-forward, first half");
    assert_eq!(tail(Layout::NN, Epilogue::BiasResidual), 2, "both projections");
    assert_eq!(tail(Layout::NT, Epilogue::GeluBackward), 1, "feed-forward, backward");
    assert_eq!(uses(Op::LayerNormBackward { residual: true }), 2, "both norms inside the block");
    assert_eq!(uses(Op::AddBias) + uses(Op::Add) + uses(Op::Activate(Activation::GeluTanh)), 0);
}

#[test]
fn fusion_leaves_no_sums_or_biases_in_a_block_of_llama() {
    for kind in [Kind::Llama, Kind::Qwen2, Kind::Qwen3] {
        let stage = model(kind).stage_graph(1..3, 2, 5, Purpose::Training { tokens: 10 }).unwrap();
        let uses = |op: Op| stage.graph.nodes.iter().filter(|n| n.op == op).count();
        let tail = |layout, epilogue| uses(Op::Matmul { layout, epilogue });
        assert_eq!(
            tail(Layout::NT, Epilogue::Residual),
            2,
            "{kind:?}: both projections to the residual stream"
        );
        assert_eq!(
            tail(Layout::NN, Epilogue::Residual),
            3,
            "{kind:?}: gradients of q, k and v, of gate and up"
        );
        assert_eq!(uses(Op::RmsNormBackward { residual: true }), 2, "{kind:?}: both norms inside the block");
        assert_eq!(tail(Layout::NT, Epilogue::Bias), if kind == Kind::Qwen2 { 3 } else { 0 });
        assert_eq!(uses(Op::AddBias) + uses(Op::Add), 0, "{kind:?}");
    }
}
