//! Ten AdamW steps of a small GPT-2 against PyTorch in float64 (`golden/make_gpt2_tiny.py`).

use std::collections::HashMap;

use polystage::gpu::{Capabilities, Device};
use polystage::graph::LOGIT_BYTES;
use polystage::mesh::{Division, Wire};
use polystage::model::{Model, Weights};
use polystage::ops::parameters::Part;
use polystage::pipeline::{Setup, Use};
use polystage::plan::{Optimizer, Sharding, Sum};
use polystage::schedule::{generate, replicate};
use safetensors::SafeTensors;

use crate::common::{adam, adapters, launch, launch_on, nmse, open, shifted};

struct Golden {
    model: Model,
    weights: HashMap<String, Vec<f32>>,
    gradients: HashMap<String, Vec<f64>>,
    finals: HashMap<String, Vec<f64>>,
    tokens: Vec<Vec<u32>>,
    loss: Vec<f64>,
    norm: Vec<f64>,
}

fn folder() -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/gpt2_tiny")
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn golden() -> Golden {
    let read = |name: &str| std::fs::read(folder().join(name)).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&read("config.json")).unwrap();
    let numbers: serde_json::Value = serde_json::from_slice(&read("golden.json")).unwrap();
    let list = |key: &str| numbers[key].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
    let (model_file, golden_file) = (read("model.safetensors"), read("golden.safetensors"));
    let model_tensors = SafeTensors::deserialize(&model_file).unwrap();
    let tensors = SafeTensors::deserialize(&golden_file).unwrap();
    let with_prefix = |prefix: &str| {
        let named = tensors.tensors().into_iter().filter_map(|(name, view)| {
            let values = floats(view.data()).into_iter().map(f64::from).collect();
            name.strip_prefix(prefix).map(|n| (n.to_string(), values))
        });
        named.collect()
    };
    let tokens = tensors.tensor("tokens").unwrap();
    let ids: Vec<u32> = tokens.data().chunks(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect();
    Golden {
        model: Model::from_hugging_face(&config).unwrap(),
        weights: model_tensors.tensors().into_iter().map(|(n, v)| (n, floats(v.data()))).collect(),
        gradients: with_prefix("grad."),
        finals: with_prefix("final."),
        tokens: ids.chunks(8 * 33).map(<[u32]>::to_vec).collect(),
        loss: list("loss"),
        norm: list("grad_norm"),
    }
}

/// Replicas with these shares of the microbatches, on as many devices each, or gangs that divide layers like this.
fn setup(golden: &Golden, schedule: &str, shares: &[usize], devices: usize, tensor: &Division) -> Setup {
    let microbatches: usize = shares.iter().sum();
    let ranks = devices / (shares.len() * tensor.members());
    let replica = |&share: &usize| generate(schedule, ranks, share).unwrap();
    Setup {
        model: golden.model.config().clone(),
        adapter: None,
        weights: Weights::F32,
        logits: LOGIT_BYTES,
        batch: 8 / microbatches,
        sequence: 32,
        schedule: replicate(&shares.iter().map(replica).collect::<Vec<_>>()).unwrap(),
        cuts: None,
        shared: false,
        recompute: Vec::new(),
        sharding: Sharding::default(),
        tensor: tensor.clone(),
        wire: Wire::F32,
        host: None,
        purpose: Use::Training,
        budgets: vec![None; devices],
    }
}

/// Ten steps from the golden weights; checks losses, norms, the gradients of step 0 and the final weights.
fn check(golden: &Golden, devices: &[usize], schedule: &str, shares: &[usize]) {
    check_sharded(golden, devices, schedule, shares, Sharding::default());
}

/// The same with the state divided like this.
fn check_sharded(golden: &Golden, devices: &[usize], schedule: &str, shares: &[usize], sharding: Sharding) {
    check_divided(golden, devices, schedule, shares, sharding, &Division::none());
}

/// The same with layers divided like this.
fn check_divided(
    golden: &Golden,
    devices: &[usize],
    schedule: &str,
    shares: &[usize],
    sharding: Sharding,
    tensor: &Division,
) {
    let at = format!("{devices:?} {schedule} {shares:?} {sharding:?} {tensor:?}");
    let setup = Setup { sharding, ..setup(golden, schedule, shares, devices.len(), tensor) };
    let mut executor = launch(&setup, devices);
    let watch = executor.watch();
    for (name, values) in &golden.weights {
        watch.block_on(executor.write(name, Part::Weight, values)).unwrap();
    }
    for (step, tokens) in golden.tokens.iter().enumerate() {
        let report = watch.block_on(executor.step(shifted(tokens, 32))).unwrap();
        // The issue asks for 1e-4; f32 against f64 gives about 1e-6 here.
        let off = (report.loss - golden.loss[step]).abs() / golden.loss[step];
        assert!(off < 1e-5, "{at}: loss of step {step} is {}, PyTorch's {}", report.loss, golden.loss[step]);
        if step == 0 {
            for (name, want) in &golden.gradients {
                let got = watch.block_on(executor.read(name, Part::Gradient)).unwrap();
                let error = nmse(&got, want);
                assert!(error < 1e-9, "{at}: gradient of {name} has NMSE {error:.2e}");
            }
        }
        let off = (report.gradient_norm - golden.norm[step]).abs() / golden.norm[step];
        assert!(
            off < 1e-4,
            "{at}: norm of step {step} is {}, not {}",
            report.gradient_norm,
            golden.norm[step]
        );
        watch.block_on(executor.update(adam(step, report.gradient_norm, 1e-3))).unwrap();
    }
    for (name, want) in &golden.finals {
        let got = watch.block_on(executor.read(name, Part::Weight)).unwrap();
        let error = nmse(&got, want);
        assert!(error < 1e-8, "{at}: final {name} has NMSE {error:.2e}");
    }
}

#[test]
fn ten_steps_match_pytorch_in_float64_on_every_adapter_with_one_and_two_stages_in_both_schedules() {
    let golden = golden();
    for adapter in adapters() {
        let i = adapter.index;
        check(&golden, &[i], "1f1b", &[4]);
        check(&golden, &[i, i], "1f1b", &[4]);
        check(&golden, &[i], "gpipe", &[2]);
        check(&golden, &[i, i], "gpipe", &[8]);
    }
}

/// One stage in f16, and two of which the second computes in f32.
#[test]
fn ten_steps_in_f16_alone_and_beside_f32_are_within_a_percent_of_pytorch_in_float64() {
    let golden = golden();
    for adapter in adapters() {
        let in_f16 = |device: &Device| device.with(Capabilities { f16: true, ..*device.capabilities() });
        for count in [1, 2] {
            let mut devices = open(&vec![adapter.index; count]);
            devices[0] = in_f16(&devices[0]);
            let setup = setup(&golden, "1f1b", &[4], count, &Division::none());
            let mut executor = launch_on(&setup, &devices);
            executor.scale(65536.0).unwrap();
            let watch = executor.watch();
            for (name, values) in &golden.weights {
                watch.block_on(executor.write(name, Part::Weight, values)).unwrap();
            }
            for (step, tokens) in golden.tokens.iter().enumerate() {
                let report = watch.block_on(executor.step(shifted(tokens, 32))).unwrap();
                for (what, got, want) in [
                    ("loss", report.loss, golden.loss[step]),
                    ("norm", report.gradient_norm, golden.norm[step]),
                ] {
                    let off = (got - want).abs() / want;
                    assert!(
                        off < 0.01,
                        "{} x {count}: {what} of step {step}: {got}, not {want}",
                        adapter.name
                    );
                    // Not f32 by another name.
                    assert!(off > 1e-9, "{} x {count}: {what} of step {step} is {got}", adapter.name);
                }
                watch.block_on(executor.update(adam(step, report.gradient_norm, 1e-3))).unwrap();
            }
        }
    }
}

#[test]
fn ten_steps_of_replicas_with_even_and_uneven_shares_match_pytorch_in_float64() {
    let (golden, all) = (golden(), adapters());
    let i = all[all.len() - 1].index;
    check(&golden, &[i, i], "1f1b", &[2, 2]);
    check(&golden, &[i, i, i, i], "zb-h1", &[5, 3]);
    // Two vendors where there are two.
    check(&golden, &[all[0].index, i], "1f1b", &[3, 1]);
}

#[test]
fn ten_steps_with_the_hosts_optimizer_and_with_weights_that_come_and_go_match_pytorch_in_float64() {
    let (golden, all) = (golden(), adapters());
    let i = all[all.len() - 1].index;
    let of = |zero, optimizer| Sharding::new(zero, Sum::Share, optimizer).unwrap();
    check_sharded(&golden, &[i, i], "1f1b", &[2, 2], of(1, Optimizer::Host));
    check_sharded(&golden, &[i, i], "1f1b", &[4], of(3, Optimizer::Host));
    check_sharded(&golden, &[all[0].index, i], "1f1b", &[3, 1], of(3, Optimizer::Device));
}

#[test]
fn ten_steps_over_gangs_alone_and_with_replicas_and_levels_match_pytorch_in_float64() {
    let (golden, all) = (golden(), adapters());
    let i = all[all.len() - 1].index;
    let of = |zero| Sharding::new(zero, Sum::Share, Optimizer::Device).unwrap();
    let whole = Division::of;
    let by_token = |shares: &[usize]| Division { sequence: true, ..whole(shares) };
    check_divided(&golden, &[i, i], "1f1b", &[4], of(1), &whole(&[1, 1]));
    check_divided(&golden, &[i; 8], "zb-h1", &[3, 1], of(3), &by_token(&[2, 1]));
    // Two vendors where there are two.
    check_divided(&golden, &[all[0].index, i], "1f1b", &[2], of(1), &by_token(&[1, 2]));
    check_divided(&golden, &[all[0].index, i], "1f1b", &[2], of(1), &whole(&[1, 2]));
}
