//! A model divided among the members of a gang computes what it computes whole: losses and every gradient in f64, by the
//! definitions of the ops.

use std::collections::HashMap;

use polystage::graph::{Fed, Op, Phase, StageGraph};
use polystage::mesh::Division;
use polystage::model::init::philox;
use polystage::model::tensor::{Member, Split, members};
use polystage::model::{Kind, Lora, Model, ModelConfig, Parameter, Purpose};
use polystage::ops::sort_rows;

use crate::oracle;

const BATCH: usize = 2;
const SEQUENCE: usize = 5;

/// Numbers that depend on a name alone.
fn numbers(name: &str, n: usize) -> Vec<f64> {
    let stream = name.bytes().fold(7u32, |sum, byte| sum.wrapping_mul(31).wrapping_add(u32::from(byte)));
    let word = |i: u32| philox([i, stream, 0, 0], [1, 2])[0];
    (0..n as u32).map(|i| 0.5 * (word(i) as f64 / 2_147_483_648.0 - 1.0)).collect()
}

/// For each element of a part which of the whole it is.
fn elements(part: &Parameter) -> Vec<usize> {
    let Some(piece) = &part.piece else { return (0..part.len()).collect() };
    let inner: usize = piece.shape[piece.axis + 1..].iter().product();
    let outer: usize = piece.shape[..piece.axis].iter().product();
    let indices: Vec<usize> = piece.ranges.iter().cloned().flatten().collect();
    let row = |outer: usize| {
        let of = move |&index: &usize| (outer * piece.shape[piece.axis] + index) * inner;
        indices.iter().map(of).flat_map(|start| start..start + inner).collect::<Vec<_>>()
    };
    (0..outer).flat_map(row).collect()
}

/// What a stage that has all layers is fed, of which a member has these tokens.
fn fed(
    stage: &StageGraph,
    vocabulary: usize,
    own: std::ops::Range<usize>,
    context: usize,
) -> Vec<(Fed, Vec<f64>)> {
    let whole = |list: &[u32]| list.iter().map(|&x| x as f64).collect::<Vec<f64>>();
    let rows = BATCH * SEQUENCE;
    let id = |i: usize, key: u32| philox([i as u32, 0, 0, 0], [3, key])[0] % vocabulary as u32;
    let tokens: Vec<u32> = (0..rows).map(|i| id(i, 4).wrapping_sub(own.start as u32)).collect();
    // One that does not count among them.
    let targets: Vec<u32> = (0..rows).map(|i| if i == 3 { u32::MAX } else { id(i, 5) }).collect();
    let starts: Vec<u32> = (0..rows).map(|i| if i % SEQUENCE < 2 { 0 } else { 2 }).collect();
    let places: Vec<u32> = (0..rows).map(|i| (i % SEQUENCE) as u32 - starts[i]).collect();
    let (by_token, by_place) = (sort_rows(&tokens, own.len()), sort_rows(&places, context));
    let of = |fed: Fed| match fed {
        Fed::Tokens => whole(&tokens),
        Fed::Targets => whole(&targets),
        Fed::TokenSegments => whole(&by_token.0),
        Fed::TokenOrder => whole(&by_token.1),
        Fed::Starts => whole(&starts),
        Fed::Places => whole(&places),
        Fed::PlaceSegments => whole(&by_place.0),
        Fed::PlaceOrder => whole(&by_place.1),
        other => panic!("{other} is not fed to all layers"),
    };
    stage.graph.fed().map(|(what, _)| (what, of(what))).collect()
}

/// Runs the graphs of a gang side by side; at each sum they wait for each other. The values of each.
fn run(stages: &[StageGraph], mut values: Vec<Vec<Option<Vec<f64>>>>) -> Vec<Vec<Option<Vec<f64>>>> {
    for phase in [Phase::Forward, Phase::Input, Phase::Weight] {
        let nodes: Vec<Vec<_>> = stages
            .iter()
            .map(|stage| stage.graph.nodes.iter().filter(|node| node.phase == phase).collect())
            .collect();
        let mut at = vec![0; stages.len()];
        loop {
            for (member, stage) in stages.iter().enumerate() {
                while let Some(node) = nodes[member].get(at[member]).filter(|node| !node.op.is_collective()) {
                    oracle::run_node(&stage.graph, node, &mut values[member]);
                    at[member] += 1;
                }
            }
            let waiting: Vec<_> = (0..stages.len()).filter_map(|m| nodes[m].get(at[m])).collect();
            assert!(waiting.len() == stages.len() || waiting.is_empty(), "a member waits for nobody");
            if waiting.is_empty() {
                break;
            }
            let given: Vec<Vec<f64>> =
                waiting.iter().zip(&values).map(|(node, of)| of[node.inputs[0].0].clone().unwrap()).collect();
            let add = |a: Vec<f64>, b: Vec<f64>| a.iter().zip(&b).map(|(a, b)| a + b).collect();
            for (member, node) in waiting.iter().enumerate() {
                let columns = stages[member].graph.value(node.outputs[0]).columns();
                values[member][node.outputs[0].0] = Some(match node.op {
                    Op::AllGather { .. } => given.concat(),
                    Op::ReduceScatter { first, count } => {
                        let sum: Vec<f64> = given.clone().into_iter().reduce(add).unwrap();
                        sum[first * columns..(first + count) * columns].to_vec()
                    }
                    _ => given.clone().into_iter().reduce(add).unwrap(),
                });
            }
            at.iter_mut().for_each(|at| *at += 1);
        }
    }
    values
}

fn graph(model: &Model, member: Option<&Member>) -> StageGraph {
    let purpose = Purpose::Training { tokens: BATCH * SEQUENCE };
    model.part_of_stage(0..model.layers(), BATCH, SEQUENCE, purpose, member).unwrap()
}

/// Loss by row, and gradients by parameter.
type Results = (Vec<f64>, HashMap<String, Vec<f64>>);

/// Loss by row, and each parameter's gradient as the whole model has it, of a model that so many members divide.
fn results(model: &Model, division: &Division) -> Results {
    let config = model.config();
    let gang: Vec<Option<Member>> = match division.divides() {
        false => vec![None],
        true => members(config, division).unwrap().into_iter().map(Some).collect(),
    };
    let whole: HashMap<String, Parameter> =
        model.parameters().into_iter().map(|parameter| (parameter.name.clone(), parameter)).collect();
    let mut stages: Vec<StageGraph> = gang.iter().map(|member| graph(model, member.as_ref())).collect();
    // As they run: what is computed meanwhile, and computed again, is as well there.
    stages.iter_mut().for_each(|stage| stage.arrange(division.sequence, !division.sequence));
    let parts: Vec<HashMap<String, Parameter>> = gang
        .iter()
        .map(|member| {
            let all = (0..model.layers()).flat_map(|layer| model.parts(layer, member.as_ref()));
            all.map(|part| (part.name.clone(), part)).collect()
        })
        .collect();
    let of = |part: &Parameter| part.piece.as_ref().map_or(part.name.clone(), |piece| piece.of.clone());
    let values = stages.iter().zip(&gang).zip(&parts).map(|((stage, member), parts)| {
        let own = member.as_ref().map_or(0..config.vocabulary, |member| member.vocabulary.clone());
        oracle::feed(&stage.graph, &fed(stage, config.vocabulary, own, config.context), |name| {
            let part = &parts[name];
            let all = numbers(&of(part), whole[&of(part)].len());
            elements(part).into_iter().map(|at| all[at]).collect()
        })
    });
    let values = run(&stages, values.collect());
    let losses: Vec<Vec<f64>> =
        stages.iter().zip(&values).map(|(stage, of)| of[stage.loss.unwrap().0].clone().unwrap()).collect();
    assert!(losses.iter().all(|of| *of == losses[0]), "members disagree about the loss");
    let mut gradients: HashMap<String, Vec<f64>> = HashMap::new();
    for (member, stage) in stages.iter().enumerate() {
        for &(parameter, gradient) in &stage.gradients {
            let part = &parts[member][&stage.graph.value(parameter).name];
            let own = values[member][gradient.0].as_ref().unwrap();
            let sum = gradients.entry(of(part)).or_insert_with(|| vec![0.0; whole[&of(part)].len()]);
            // Each member has all of such a gradient.
            let same = part.split == Split::Same && member > 0;
            for (at, value) in elements(part).into_iter().zip(own) {
                if same {
                    assert!((sum[at] - value).abs() < 1e-12, "{}: members disagree", part.name);
                } else {
                    sum[at] += value;
                }
            }
        }
    }
    (losses[0].clone(), gradients)
}

fn assert_alike(what: &str, model: &Model, shares: &[usize]) {
    for sequence in [false, true] {
        let division = Division { shares: shares.to_vec(), sequence };
        assert_near(
            &format!("{what} {division:?}"),
            &results(model, &Division::none()),
            results(model, &division),
        );
    }
}

fn assert_near(what: &str, wanted: &Results, got: Results) {
    for (want, got) in wanted.0.iter().zip(&got.0) {
        assert!((want - got).abs() < 1e-12 * (1.0 + want.abs()), "{what}: loss {got}, not {want}");
    }
    assert_eq!(wanted.1.len(), got.1.len(), "{what}");
    for (name, want) in &wanted.1 {
        let size: f64 = want.iter().map(|x| x * x).sum();
        let error: f64 = want.iter().zip(&got.1[name]).map(|(a, b)| (a - b) * (a - b)).sum();
        assert!(
            error <= 1e-24 * size.max(1e-12),
            "{what}: the gradient of {name} is off by {error} of {size}"
        );
    }
}

fn config(kind: Kind) -> ModelConfig {
    let mut config = ModelConfig {
        kind,
        layers: 2,
        width: 24,
        heads: 6,
        context: 8,
        vocabulary: 19,
        intermediate: Some(22),
        ..Default::default()
    };
    if kind.is_llama() {
        config.kv_heads = Some(2);
        config.head_dim = Some(2);
    }
    config
}

#[test]
fn a_gang_computes_the_losses_and_gradients_of_the_whole_model_in_any_proportion() {
    for kind in [Kind::Gpt2, Kind::Mlp, Kind::Llama, Kind::Mistral, Kind::Qwen2, Kind::Qwen3] {
        for tied_head in [false, true] {
            let config = ModelConfig { tied_head: kind.is_llama().then_some(tied_head), ..config(kind) };
            let model = Model::new(&config).unwrap();
            for shares in [&[1, 1][..], &[1, 1, 1], &[5, 3], &[2, 1, 1], &[1; 6]] {
                assert_alike(&format!("{kind:?} {shares:?}"), &model, shares);
            }
        }
    }
}

#[test]
fn so_does_one_whose_sequences_hold_several_texts_and_one_of_which_an_adapter_is_trained() {
    for kind in [Kind::Gpt2, Kind::Llama, Kind::Qwen2] {
        let model = Model::new(&config(kind)).unwrap();
        assert_alike("shared", &model.clone().with_shared_sequences(true), &[3, 2]);
        let modules = model.linear_layers().into_iter().map(|layer| layer.name).collect();
        let adapter = Lora { rank: 3, scale: 1.5, modules };
        let model = Model::with_adapter(&config(kind), Some(&adapter)).unwrap();
        assert_alike("adapter", &model, &[2, 1, 1]);
    }
}

#[test]
fn what_cannot_be_divided_is_refused_in_one_line_that_names_the_key() {
    for (shares, what) in
        [(&[][..], "share"), (&[2, 0], "share"), (&[1; 7], "7 members cannot divide the 6 heads")]
    {
        let error = members(&config(Kind::Gpt2), &Division::of(shares)).unwrap_err().to_string();
        assert!(error.contains("mesh.tensor") && error.contains(what), "{error}");
    }
}
