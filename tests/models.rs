//! Every architecture against transformers and PyTorch (`golden/make_models.py`), with and without caches.

use std::collections::HashMap;
use std::path::PathBuf;

use polystage::gpu::Device;
use polystage::graph::{Fed, LOGIT_BYTES, Phase, Source, StageGraph};
use polystage::mesh::{Division, Wire};
use polystage::model::{Model, Purpose};
use polystage::ops::parameters::{Layout, Parameters, Part};
use polystage::ops::plan::MemoryPlan;
use polystage::ops::program::{Slots, StageProgram};
use polystage::ops::sort_rows;
use polystage::pipeline::{Setup, Use};
use polystage::plan::Sharding;
use polystage::schedule::generate;
use safetensors::SafeTensors;
use serde_json::Value;

use crate::common::{adapters, launch_on, nmse, open, shifted};
use crate::oracle;

/// Folders in `golden/models`.
pub const NAMES: [&str; 6] = ["gpt2", "llama", "llama_untied", "mistral", "qwen2", "qwen3"];

struct Golden {
    name: &'static str,
    model: Model,
    weights: HashMap<String, Vec<f32>>,
    /// (B,T+1).
    tokens: Vec<u32>,
    batch: usize,
    sequence: usize,
    logits: Vec<f64>,
    losses: Vec<f64>,
    gradients: HashMap<String, Vec<f64>>,
}

fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models").join(name)
}

/// A model's `config.json`.
pub fn json_config(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(folder(name).join("config.json")).unwrap()).unwrap()
}

/// Tensors of a file: shapes and 32-bit words.
pub fn tensors(name: &str, file: &str) -> HashMap<String, (Vec<usize>, Vec<[u8; 4]>)> {
    let bytes = std::fs::read(folder(name).join(file)).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let words = |data: &[u8]| data.chunks(4).map(|b| b.try_into().unwrap()).collect();
    tensors.tensors().into_iter().map(|(n, v)| (n, (v.shape().to_vec(), words(v.data())))).collect()
}

fn golden(name: &'static str) -> Golden {
    let mut found = tensors(name, "golden.safetensors");
    let floats = |words: Vec<[u8; 4]>| words.into_iter().map(f32::from_le_bytes).collect::<Vec<f32>>();
    let doubles = |words| floats(words).into_iter().map(f64::from).collect::<Vec<f64>>();
    let (shape, tokens) = found.remove("tokens").unwrap();
    Golden {
        name,
        model: Model::from_hugging_face(&json_config(name)).unwrap(),
        weights: tensors(name, "model.safetensors").into_iter().map(|(n, (_, w))| (n, floats(w))).collect(),
        tokens: tokens.into_iter().map(u32::from_le_bytes).collect(),
        batch: shape[0],
        sequence: shape[1] - 1,
        logits: doubles(found.remove("logits").unwrap().1),
        losses: doubles(found.remove("losses").unwrap().1),
        gradients: found
            .into_iter()
            .map(|(n, (_, words))| (n.strip_prefix("grad.").unwrap().to_string(), doubles(words)))
            .collect(),
    }
}

impl Golden {
    /// Inputs and targets, (B,T) each.
    fn split(&self) -> (Vec<u32>, Vec<u32>) {
        let rows = || self.tokens.chunks(self.sequence + 1);
        let inputs = rows().flat_map(|row| row[..self.sequence].to_vec()).collect();
        (inputs, rows().flat_map(|row| row[1..].to_vec()).collect())
    }

    fn vocabulary(&self) -> usize {
        self.model.config().vocabulary
    }

    /// Weights under the names of this model's parameters, tied ones under both.
    fn weight(&self, name: &str) -> &[f32] {
        let parameters = self.model.parameters();
        let parameter = parameters.iter().find(|p| p.name == name).unwrap();
        &self.weights[parameter.tied_to.as_deref().unwrap_or(name)]
    }

    /// Feeds of the reference for a graph.
    fn feed(&self, stage: &StageGraph, fed: &[(Fed, Vec<f64>)]) -> Vec<Option<Vec<f64>>> {
        oracle::feed(&stage.graph, fed, |name| self.weight(name).iter().map(|&x| x as f64).collect())
    }
}

fn whole(values: &[u32]) -> Vec<f64> {
    values.iter().map(|&x| x as f64).collect()
}

pub fn distance(got: &[f64], want: &[f64]) -> f64 {
    let error: f64 = got.iter().zip(want).map(|(g, w)| (g - w).powi(2)).sum();
    error / want.iter().map(|w| w * w).sum::<f64>()
}

/// transformers takes norms, softmax and angles through f32 even in float64, and the files hold f32: about 1e-14.
const REFERENCE: f64 = 1e-12;

#[test]
fn the_reference_agrees_with_transformers_in_losses_and_gradients_of_every_architecture() {
    for golden in NAMES.map(golden) {
        let (inputs, targets) = golden.split();
        let layers = golden.model.layers();
        let purpose = Purpose::Training { tokens: inputs.len() };
        let stage = golden.model.stage_graph(0..layers, golden.batch, golden.sequence, purpose).unwrap();
        let (segments, order) = sort_rows(&inputs, golden.vocabulary());
        let fed = [
            (Fed::Tokens, inputs),
            (Fed::Targets, targets),
            (Fed::TokenSegments, segments),
            (Fed::TokenOrder, order),
        ];
        let mut values = golden.feed(&stage, &fed.map(|(fed, list)| (fed, whole(&list))));
        oracle::run(&stage.graph, &[Phase::Forward, Phase::Input, Phase::Weight], &mut values);
        let error = distance(values[stage.loss.unwrap().0].as_ref().unwrap(), &golden.losses);
        assert!(error < REFERENCE, "{}: losses are off by {error:.2e}", golden.name);
        let mut sums: HashMap<String, Vec<f64>> = HashMap::new();
        let parameters = golden.model.parameters();
        for &(parameter, gradient) in &stage.gradients {
            let name = &stage.graph.value(parameter).name;
            let owner = parameters.iter().find(|p| p.name == *name).unwrap().tied_to.as_ref().unwrap_or(name);
            let values = values[gradient.0].as_ref().unwrap();
            let sum = sums.entry(owner.clone()).or_insert_with(|| vec![0.0; values.len()]);
            sum.iter_mut().zip(values).for_each(|(s, v)| *s += v);
        }
        assert_eq!(sums.len(), golden.gradients.len(), "{}", golden.name);
        for (name, want) in &golden.gradients {
            let error = distance(&sums[name], want);
            assert!(error < REFERENCE, "{}: gradient of {name} is off by {error:.2e}", golden.name);
        }
    }
}

/// f32 throughout: a few hundred roundings of 6e-8 each, squared.
const DEVICE: f64 = 1e-10;

/// Losses and gradients of one step in microbatches of one sequence, and logits of each, against transformers. Returns
/// losses, gradients and logits in a fixed order.
fn check(golden: &Golden, devices: &[Device], recompute: &[usize], tensor: &Division) -> Vec<Vec<f32>> {
    let stages = devices.len() / tensor.members();
    let at = format!("{} on {} x {}", golden.name, devices.len(), devices[0].info().name);
    let setup = |microbatches: usize, training: bool| Setup {
        model: golden.model.config().clone(),
        adapter: golden.model.adapter().cloned(),
        weights: golden.model.weights(),
        logits: LOGIT_BYTES,
        batch: 1,
        sequence: golden.sequence,
        schedule: generate(if training { "1f1b" } else { "gpipe" }, stages, microbatches).unwrap(),
        cuts: None,
        shared: false,
        recompute: if training { recompute.to_vec() } else { Vec::new() },
        sharding: Sharding::default(),
        tensor: tensor.clone(),
        wire: Wire::F32,
        host: None,
        purpose: if training { Use::Training } else { Use::Logits },
        budgets: vec![None; devices.len()],
    };
    let mut executor = launch_on(&setup(golden.batch, true), devices);
    let watch = executor.watch();
    for (name, values) in &golden.weights {
        watch.block_on(executor.write(name, Part::Weight, values)).unwrap();
    }
    let report = watch.block_on(executor.step(shifted(&golden.tokens, golden.sequence))).unwrap();
    let error = nmse(&report.losses, &golden.losses);
    assert!(error < DEVICE, "{at}: losses are off by {error:.2e}");
    let mut results = vec![report.losses];
    let mut names: Vec<&String> = golden.gradients.keys().collect();
    names.sort();
    for name in names {
        let want = &golden.gradients[name];
        let got = watch.block_on(executor.read(name, Part::Gradient)).unwrap();
        let error = nmse(&got, want);
        assert!(error < DEVICE, "{at}: gradient of {name} is off by {error:.2e}");
        results.push(got);
    }
    pollster::block_on(executor.stop());
    let mut executor = launch_on(&setup(1, false), devices);
    let watch = executor.watch();
    for (name, values) in &golden.weights {
        watch.block_on(executor.write(name, Part::Weight, values)).unwrap();
    }
    let inputs = golden.split().0;
    let wanted = golden.logits.chunks(golden.sequence * golden.vocabulary());
    for (tokens, want) in inputs.chunks(golden.sequence).zip(wanted) {
        let rows = (0..golden.sequence).collect();
        let got = watch.block_on(executor.infer(tokens.to_vec(), rows)).unwrap();
        let error = nmse(&got, want);
        assert!(error < DEVICE, "{at}: logits are off by {error:.2e}");
        results.push(got);
    }
    pollster::block_on(executor.stop());
    results
}

#[test]
fn every_architecture_matches_transformers_on_every_adapter_and_two_recomputing_stages_match_one_bit_for_bit()
{
    for adapter in adapters() {
        let devices = open(&[adapter.index, adapter.index]);
        for golden in NAMES.map(golden) {
            let one = check(&golden, &devices[..1], &[], &Division::none());
            let two = check(&golden, &devices, &[0, 1], &Division::none());
            assert!(one == two, "{}: two stages that recompute differ in some bit", golden.name);
        }
    }
}

#[test]
fn every_architecture_matches_transformers_over_a_gang_of_two() {
    let i = adapters()[0].index;
    let devices = open(&[i, i]);
    for golden in NAMES.map(golden) {
        for sequence in [false, true] {
            check(&golden, &devices, &[0], &Division { shares: vec![2, 1], sequence });
        }
    }
}

/// Chunks in which a sequence of `n` tokens is decoded: first several tokens at once, then one by one.
fn chunks(n: usize) -> Vec<usize> {
    let mut list = vec![5, 4];
    list.resize(2 + n - 9, 1);
    list
}

/// What a decoding stage is fed for `count` tokens after the first `start`: tokens, positions, last rows.
fn decode_feeds(golden: &Golden, start: usize, count: usize) -> [(Fed, Vec<u32>); 3] {
    let inputs = golden.split().0;
    let rows = inputs.chunks(golden.sequence);
    let tokens = rows.flat_map(|row| row[start..start + count].to_vec()).collect();
    let positions = (0..golden.batch).flat_map(|_| start as u32..(start + count) as u32).collect();
    let last = (1..=golden.batch as u32).map(|b| b * count as u32 - 1).collect();
    [(Fed::Tokens, tokens), (Fed::Positions, positions), (Fed::Last, last)]
}

/// Logits (B,V) of the token at `position` of each sequence.
fn logits_at(golden: &Golden, position: usize) -> Vec<f64> {
    let v = golden.vocabulary();
    golden.logits.chunks(golden.sequence * v).flat_map(|l| l[position * v..][..v].to_vec()).collect()
}

#[test]
fn decoding_with_caches_gives_the_logits_without_in_the_reference() {
    for golden in NAMES.map(golden) {
        let mut caches: HashMap<usize, Vec<f64>> = HashMap::new();
        let mut start = 0;
        for count in chunks(golden.sequence) {
            let purpose = Purpose::Decode { capacity: golden.sequence };
            let stage =
                golden.model.stage_graph(0..golden.model.layers(), golden.batch, count, purpose).unwrap();
            let fed = decode_feeds(&golden, start, count).map(|(fed, list)| (fed, whole(&list)));
            let mut values = golden.feed(&stage, &fed);
            for (fed, id) in stage.graph.fed() {
                if let Fed::Cache(block, 0) = fed {
                    let zeros = || vec![0.0; stage.graph.value(id).len()];
                    values[id.0] = Some(caches.remove(&block).unwrap_or_else(zeros));
                }
            }
            oracle::run(&stage.graph, &[Phase::Forward], &mut values);
            for node in stage.graph.nodes.iter().filter(|n| n.op.name() == "attention_cached") {
                let Source::Fed(Fed::Cache(block, 0)) = stage.graph.value(node.inputs[2]).source else {
                    panic!("a cache")
                };
                caches.insert(block, values[node.outputs[1].0].clone().unwrap());
            }
            start += count;
            let got = values[stage.output.unwrap().0].as_ref().unwrap();
            let error = distance(got, &logits_at(&golden, start - 1));
            assert!(error < REFERENCE, "{} after {start} tokens: off by {error:.2e}", golden.name);
        }
    }
}

/// Programs of a whole model for several numbers of new tokens, on one set of caches.
struct Decoder {
    parameters: Parameters,
    programs: HashMap<usize, StageProgram>,
}

impl Decoder {
    fn new(golden: &Golden, device: &Device) -> Decoder {
        let parameters = Parameters::new(device, Layout::new(golden.model.parameters()), false).unwrap();
        for p in golden.model.parameters() {
            let range = parameters.weight(&p.name).unwrap();
            device.upload(&range.buffer, range.offset, bytemuck::cast_slice(golden.weight(&p.name)));
        }
        let mut programs: HashMap<usize, StageProgram> = HashMap::new();
        for count in [5, 4, 1] {
            let purpose = Purpose::Decode { capacity: golden.sequence };
            let layers = 0..golden.model.layers();
            let stage = golden.model.stage_graph(layers, golden.batch, count, purpose).unwrap();
            let plan = MemoryPlan::new(&stage, device.capabilities());
            let program = match programs.values().next() {
                None => StageProgram::new(device, stage, plan, 2, 0),
                Some(other) => StageProgram::with_caches(device, stage, plan, 0, other.caches().to_vec()),
            };
            programs.insert(count, program.unwrap());
        }
        Decoder { parameters, programs }
    }

    /// Logits (B,V) after `count` more tokens of the prompt in this slot.
    fn run(&mut self, golden: &Golden, device: &Device, slot: usize, start: usize, count: usize) -> Vec<f32> {
        let program = self.programs.get_mut(&count).unwrap();
        let slots = Slots { stash: slot, gradient: 0 };
        let lists = decode_feeds(golden, start, count);
        for (fed, id) in program.stage().graph.fed() {
            if let Some((_, list)) = lists.iter().find(|(listed, _)| *listed == fed) {
                let range = program.range(&self.parameters, id, slots).unwrap();
                device.upload(&range.buffer, range.offset, bytemuck::cast_slice(list));
            }
        }
        let launches = program.launches(Phase::Forward).len();
        let mut recorder = device.record();
        program.record(&mut recorder, &self.parameters, Phase::Forward, 0..launches, slots).unwrap();
        recorder.submit(|| ());
        let output = program.stage().output.unwrap();
        let range = program.range(&self.parameters, output, slots).unwrap();
        device.block_on(device.read_f32(&range)).unwrap()
    }
}

#[test]
fn decoding_with_caches_gives_the_logits_without_on_every_adapter_two_prompts_in_turn() {
    for adapter in adapters() {
        let device = &open(&[adapter.index])[0];
        for golden in NAMES.map(golden) {
            let mut decoder = Decoder::new(&golden, device);
            let mut start = 0;
            for count in chunks(golden.sequence) {
                for slot in [0, 1] {
                    let got = decoder.run(&golden, device, slot, start, count);
                    let error = nmse(&got, &logits_at(&golden, start + count - 1));
                    let at = format!("{} on {}, slot {slot}", golden.name, adapter.name);
                    assert!(error < DEVICE, "{at}: {count} tokens after {start} are off by {error:.2e}");
                }
                start += count;
            }
        }
    }
}
