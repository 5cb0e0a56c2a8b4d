//! Weights packed as bf16: in training with f32 masters and without, in generation, on one device and on several.

use std::path::{Path, PathBuf};

use polystage::folder::{Dtype, adapter};
use polystage::generate::{Extent, Generator, Sampling};
use polystage::gpu::Capabilities;
use polystage::graph::LOGIT_BYTES;
use polystage::mesh::{Division, Wire};
use polystage::model::{Model, Weights};
use polystage::ops::packed::{round, widen};
use polystage::ops::parameters::{AdamStep, Layout, Part};
use polystage::pipeline::workload::{shape_key, workload};
use polystage::pipeline::{Batch, Executor, Setup, Use};
use polystage::plan::Sharding;
use polystage::schedule::generate;
use polystage::train::config::Config;
use polystage::train::export::{Output, export};
use polystage::train::source::{Pretrained, describe};
use polystage::train::trainer::Trainer;

use crate::common::{adapters, launch, open};
use crate::pipeline::{assert_same, config, run, trainer};

/// All weights, or all gradients.
fn all(executor: &mut Executor, part: Part) -> Vec<(String, Vec<f32>)> {
    let watch = executor.watch();
    let owned = executor.parameters().iter().filter(|p| p.tied_to.is_none() && !(p.frozen));
    let names: Vec<String> = owned.map(|p| p.name.clone()).collect();
    let mut read = |name: String| (name.clone(), watch.block_on(executor.read(&name, part)).unwrap());
    names.into_iter().map(&mut read).collect()
}

fn set(executor: &mut Executor, weights: &[(String, Vec<f32>)]) {
    let watch = executor.watch();
    for (name, values) in weights {
        watch.block_on(executor.write(name, Part::Weight, values)).unwrap();
    }
}

/// The numbers that a device computes with: matrices as bf16.
fn rounded(weights: &[(String, Vec<f32>)], config: &Config) -> Vec<(String, Vec<f32>)> {
    let model = Model::new(&config.model).unwrap().with_weights(Weights::BF16);
    let parameters = model.parameters();
    let packed = |name: &str| parameters.iter().any(|p| p.name == name && p.weights.packed());
    let each = |(name, values): &(String, Vec<f32>)| match packed(name) {
        true => (name.clone(), values.iter().map(|&value| widen(round(value))).collect()),
        false => (name.clone(), values.clone()),
    };
    weights.iter().map(each).collect()
}

fn bits(lists: &[(String, Vec<f32>)]) -> Vec<(&str, Vec<u32>)> {
    lists.iter().map(|(name, list)| (name.as_str(), list.iter().map(|x| x.to_bits()).collect())).collect()
}

fn adam(step: i32) -> AdamStep {
    let (beta1, beta2) = (0.9, 0.95);
    AdamStep {
        clip: 0.5,
        rate: 1e-2,
        beta1,
        beta2,
        epsilon: 1e-8,
        decay: 1e-3,
        correction1: 1.0 / (1.0 - beta1.powi(step)),
        correction2: 1.0 / (1.0 - beta2.powi(step)),
    }
}

/// Width 21: matrices with an odd number of elements, whose last shares its word with none.
const ODD_WIDTH: [&str; 4] = ["model.width=21", "model.layers=2", "train.batch=2", "pipeline.microbatches=2"];

fn odd(weights: &str) -> Config {
    config(&[&ODD_WIDTH[..], &[weights]].concat())
}

#[test]
fn training_with_packed_weights_is_training_in_f32_with_weights_rounded_before_every_step_bit_for_bit() {
    for adapter in adapters() {
        for (weights, masters) in [("bf16", true), ("bf16-only", false)] {
            let (packed, full) = (odd(&format!("train.weights={weights}")), odd("train.weights=f32"));
            let mut packed = trainer(&packed, &[adapter.index]);
            let mut plain = trainer(&full, &[adapter.index]);
            let watch = plain.watch();
            // What the optimizer updates: of packed weights without masters, the packed ones.
            let mut held = all(plain.executor(), Part::Weight);
            for step in 1..=4 {
                let what = format!("{weights}, step {step} on {}", adapter.name);
                let seen = rounded(&held, &full);
                if !masters {
                    held = seen.clone();
                }
                assert_eq!(bits(&all(packed.executor(), Part::Weight)), bits(&held), "weights, {what}");
                set(plain.executor(), &seen);
                let batch = packed.batches().examples(step as u64).unwrap();
                let got = watch.block_on(packed.executor().step(batch.clone())).unwrap();
                let want = watch.block_on(plain.executor().step(batch)).unwrap();
                assert_eq!(got.losses, want.losses, "{what}");
                let gradients = |trainer: &mut Trainer| all(trainer.executor(), Part::Gradient);
                assert_eq!(bits(&gradients(&mut packed)), bits(&gradients(&mut plain)), "{what}");
                set(plain.executor(), &held);
                watch.block_on(packed.executor().update(adam(step))).unwrap();
                watch.block_on(plain.executor().update(adam(step))).unwrap();
                held = all(plain.executor(), Part::Weight);
            }
        }
    }
}

#[test]
fn packed_weights_change_no_bit_over_two_and_three_devices_with_the_tied_head_on_another() {
    for adapter in adapters() {
        let i = adapter.index;
        for weights in ["train.weights=bf16", "train.weights=bf16-only"] {
            let config = config(&[weights]);
            let alone = run(&config, &[i], 3);
            assert_same(weights, &alone, &run(&config, &[i, i], 3));
            assert_same(weights, &alone, &run(&config, &[i, i, i], 3));
        }
    }
}

#[test]
fn a_model_learns_with_packed_weights_and_without_masters_too() {
    let i = adapters()[0].index;
    let losses = |weights: &str| run(&config(&[weights]), &[i], 30).0;
    let full = losses("train.weights=f32");
    for weights in ["train.weights=bf16", "train.weights=bf16-only"] {
        let packed = losses(weights);
        assert!(packed[29] < 0.8 * packed[0], "{weights}: {} to {}", packed[0], packed[29]);
        // Weights are off by up to 2^-9 of themselves, and so is what the first step computes, on the average less.
        assert!((packed[0] - full[0]).abs() < full[0] / 512.0, "{weights}: {} and {}", packed[0], full[0]);
        assert_ne!(packed, full, "{weights}");
    }
}

#[test]
fn parts_of_packed_weights_are_read_and_written_from_any_element_on_and_leave_their_neighbours() {
    let i = adapters()[0].index;
    for weights in ["bf16", "bf16-only"] {
        let config = odd(&format!("train.weights={weights}"));
        let mut trainer = trainer(&config, &[i, i]);
        let watch = trainer.watch();
        // (21,21), and the table that the head of another device shares.
        for name in ["transformer.wpe.weight", "transformer.wte.weight"] {
            let executor = trainer.executor();
            let mut want = watch.block_on(executor.read(name, Part::Weight)).unwrap();
            let len = want.len();
            assert_eq!(len % 2, 1, "{name}");
            for (first, count) in
                [(0, 1), (1, 1), (3, 4), (4, 3), (7, 6), (len - 1, 1), (len - 2, 2), (0, len)]
            {
                let new: Vec<f32> = (0..count).map(|i| 0.25 * (first + i + 1) as f32).collect();
                let new: Vec<f32> = new.into_iter().map(|x| widen(round(x))).collect();
                watch.block_on(executor.write_from(name, Part::Weight, first, new.clone())).unwrap();
                want[first..first + count].copy_from_slice(&new);
                let got = watch.block_on(executor.read_from(name, Part::Weight, first, count)).unwrap();
                assert_eq!(got, new, "{weights} {name} {first} {count}");
                assert_eq!(watch.block_on(executor.read(name, Part::Weight)).unwrap(), want);
            }
        }
    }
}

fn golden(kind: &str, name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(kind).join(name)
}

/// The folder of a golden model with its weights stored as bf16.
fn narrow(name: &str, place: &Path) -> PathBuf {
    let path = place.join(name);
    let output = Output { path: &path, dtype: Some(Dtype::BF16), shard_bytes: 1 << 30 };
    export(&golden("models", name), &output, &mut |_, _| ()).unwrap();
    path
}

#[test]
fn a_folder_of_bf16_is_packed_by_default_and_computes_the_same_logits_and_texts_as_in_f32() {
    let place = tempfile::tempdir().unwrap();
    let greedy = Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 1 };
    for name in ["gpt2", "llama", "llama_untied", "qwen3"] {
        assert_eq!(Pretrained::open(&golden("models", name)).unwrap().model.weights(), Weights::F32);
        let pretrained = Pretrained::open(&narrow(name, place.path())).unwrap();
        assert_eq!(pretrained.model.weights(), Weights::BF16);
        let v = pretrained.model.config().vocabulary as u32;
        let tokens = |n: u32| (0..n).map(|t| (t * 17 + 3) % v).collect::<Vec<u32>>();
        for adapter in adapters() {
            let logits = |weights: Weights, devices: usize| {
                let setup = Setup {
                    model: pretrained.model.config().clone(),
                    adapter: None,
                    weights,
                    batch: 1,
                    sequence: 11,
                    schedule: generate("gpipe", devices, 1).unwrap(),
                    cuts: None,
                    shared: false,
                    logits: LOGIT_BYTES,
                    recompute: Vec::new(),
                    sharding: Sharding::default(),
                    tensor: Division::none(),
                    wire: Wire::F32,
                    host: None,
                    purpose: Use::Logits,
                    budgets: vec![None; devices],
                };
                let mut executor = launch(&setup, &vec![adapter.index; devices]);
                let watch = executor.watch();
                watch.block_on(pretrained.load(&mut executor)).unwrap();
                watch.block_on(executor.infer(tokens(11), (0..11).collect())).unwrap()
            };
            let want = logits(Weights::F32, 1);
            for devices in [1, 2] {
                assert_eq!(logits(Weights::BF16, devices), want, "{name} over {devices} x {}", adapter.name);
            }
            let text = |weights: Weights| {
                let model = pretrained.model.clone().with_weights(weights);
                let (devices, extent) =
                    (open(&[adapter.index; 2]), Extent { texts: 3, prompt: 5, tokens: 12 });
                let mut generator = Generator::launch(&model, extent, &devices, vec![None; 2]).unwrap();
                let watch = generator.watch();
                watch.block_on(pretrained.load(generator.executor())).unwrap();
                let prompts = [tokens(5), tokens(2), tokens(4)];
                let said = watch.block_on(generator.run(&prompts, 7, greedy, usize::MAX, |_, _| true));
                (said.unwrap(), devices.iter().map(|d| d.allocated()).sum::<u64>())
            };
            let (packed, full) = (text(Weights::BF16), text(Weights::F32));
            assert_eq!(packed.0, full.0, "{name} on {}", adapter.name);
            assert!(packed.1 < full.1, "{name}: {} and {} bytes", packed.1, full.1);
        }
    }
}

#[test]
fn an_adapter_trains_on_a_packed_base_model_as_on_the_same_numbers_in_f32_bit_for_bit() {
    let place = tempfile::tempdir().unwrap();
    for name in ["gpt2", "llama"] {
        let base = Pretrained::open(&narrow(name, place.path())).unwrap();
        let lora = adapter::open(&golden("adapters", name)).unwrap();
        let v = base.model.config().vocabulary as u32;
        let tokens = |seed: u32| (0..4 * 9).map(|t| (t * 7 + seed) % v).collect::<Vec<u32>>();
        let batch = Batch { inputs: tokens(1), targets: tokens(8), ..Batch::default() };
        for adapter in adapters() {
            let train = |weights: Weights, devices: usize| {
                let setup = Setup {
                    model: base.model.config().clone(),
                    adapter: Some(lora.lora()),
                    weights,
                    batch: 1,
                    sequence: 9,
                    schedule: generate("1f1b", devices, 4).unwrap(),
                    cuts: None,
                    shared: false,
                    logits: LOGIT_BYTES,
                    recompute: Vec::new(),
                    sharding: Sharding::default(),
                    tensor: Division::none(),
                    wire: Wire::F32,
                    host: None,
                    purpose: Use::Training,
                    budgets: vec![None; devices],
                };
                let mut executor = launch(&setup, &vec![adapter.index; devices]);
                let watch = executor.watch();
                watch.block_on(executor.load(base.folder.tensors())).unwrap();
                watch.block_on(executor.load_adapter(&lora.tensors)).unwrap();
                let mut losses = Vec::new();
                for step in 1..=2 {
                    losses.extend(watch.block_on(executor.step(batch.clone())).unwrap().losses);
                    watch.block_on(executor.update(adam(step))).unwrap();
                }
                (losses, all(&mut executor, Part::Gradient))
            };
            let want = train(Weights::F32, 1);
            for devices in [1, 2] {
                let got = train(Weights::BF16, devices);
                assert!(got == want, "{name} over {devices} x {}", adapter.name);
            }
        }
    }
}

#[test]
fn an_adapters_config_packs_a_base_model_of_bf16_unless_it_says_otherwise_and_a_full_one_does_not() {
    let place = tempfile::tempdir().unwrap();
    let narrow = narrow("llama", place.path());
    let read = |folder: &Path, more: &str, overrides: &[String]| {
        let folder = folder.display();
        let text = format!(
            "[model]\npath = '{folder}'\n[data]\ntrain = ['x']\n[train]\nsteps = 1\nbatch = 1\nsequence = 4\n{more}"
        );
        Config::parse_with(&text, overrides, "test", |path| describe(path, &[PathBuf::new()]))
    };
    let weights = |folder: &Path, more: &str, overrides: &[String]| {
        read(folder, more, overrides).unwrap().train.weights
    };
    let full = ["train.weights=f32".to_string()];
    assert_eq!(weights(&narrow, "[adapter]\n", &[]), Weights::BF16);
    assert_eq!(weights(&narrow, "[adapter]\n", &full), Weights::F32);
    assert_eq!(weights(&narrow, "", &[]), Weights::F32);
    assert_eq!(weights(&narrow, "", &["train.weights=bf16-only".into()]), Weights::BF16Only);
    assert_eq!(weights(&golden("models", "llama"), "[adapter]\n", &[]), Weights::F32);
    let error = read(&narrow, "", &["train.weights=f16".into()]).unwrap_err().to_string();
    assert!(error.contains("f16") && error.contains("bf16-only"), "{error}");
}

#[test]
fn the_planner_counts_the_bytes_of_packed_weights_layer_by_layer_and_keys_its_times_by_them() {
    let config = config(&[]);
    let capabilities = Capabilities {
        software: true,
        subgroup: None,
        has_f16: false,
        f16: false,
        cooperative: 0,
        sums: 16,
        fill: 1,
        written_out: true,
        tiles: Default::default(),
        dispatch: u64::MAX,
        max_binding: 1 << 30,
        max_buffer: 1 << 30,
        max_groups: 65535,
    };
    let mut keys = Vec::new();
    let mut totals = Vec::new();
    for weights in [Weights::F32, Weights::BF16, Weights::BF16Only] {
        let model = Model::new(&config.model).unwrap().with_weights(weights);
        let work = workload(&model, 2, 19, &[2], &[capabilities]).unwrap();
        let counted = work.layers.iter().map(|l| l.state).sum::<u64>() + work.tie.unwrap().together;
        let exact = Layout::new(model.parameters()).bytes(true);
        // A layer, which is half a block, counts uniforms of pools that it shares with others in the end, 16 bytes each.
        let off = counted as i64 - exact as i64;
        assert!((0..800).contains(&off), "{weights:?}: {counted} counted, {exact} needed");
        keys.push(shape_key(&model, 1, 19));
        totals.push(exact);
    }
    assert!(keys[0] != keys[1] && keys[1] != keys[2]);
    let matrices = Model::new(&config.model).unwrap().parameters();
    let matrices = matrices.iter().filter(|p| p.shape.len() == 2 && p.tied_to.is_none());
    let elements: u64 = matrices.map(|p| p.len() as u64).sum();
    // Besides padding, the packed copies come on top of the masters, or take the place of what is twice their size.
    assert!(totals[1].abs_diff(totals[0] + 2 * elements) < totals[0] / 100, "{totals:?} {elements}");
    assert!(totals[2].abs_diff(totals[0] - 2 * elements) < totals[0] / 100, "{totals:?} {elements}");
}
