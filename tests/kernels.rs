//! Every kernel variant against the reference in f64, on every adapter of the machine, and the measurements of speed.

use polystage::ops::bench;
use polystage::ops::verify::{Outcome, verify};

use crate::common::{adapters, open};

#[test]
fn every_op_with_every_kernel_variant_matches_the_reference_on_every_adapter() {
    for adapter in adapters() {
        let device = &open(&[adapter.index])[0];
        let outcomes = device.block_on(verify(device, |_| ())).expect("runs");
        let failed: Vec<&Outcome> = outcomes.iter().filter(|o| !o.passed).collect();
        let counts = format!("{}: {} of {} failed", adapter.name, failed.len(), outcomes.len());
        assert!(failed.is_empty(), "{counts}\n{failed:#?}");
        let ran = |kernel: &str| outcomes.iter().any(|o| o.variant.contains(kernel));
        for kernel in ["matmul,", "elementwise", "attention_backward_key, 8 lanes", "layernorm, 64 lanes"] {
            assert!(ran(kernel), "{}: {kernel} did not run", adapter.name);
        }
        assert_eq!(ran("matmul_subgroup"), device.capabilities().subgroup.is_some(), "{}", adapter.name);
    }
}

#[test]
fn speeds_are_finite_and_positive_on_every_adapter() {
    for adapter in adapters() {
        let device = &open(&[adapter.index])[0];
        let speed = device.block_on(bench::measure(device)).expect("measures");
        eprintln!("{}: {speed:?}", adapter.name);
        for number in [
            speed.matmul_gflops,
            speed.memory_gb_s,
            speed.upload_gb_s,
            speed.readback_gb_s,
            speed.readback_latency_ms,
        ] {
            assert!(number.is_finite() && number > 0.0, "{}: {speed:?}", adapter.name);
        }
    }
}
