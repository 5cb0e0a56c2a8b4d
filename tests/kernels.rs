//! Every kernel variant against the reference in f64, on every adapter of the machine.

use polystage::ops::bench;
use polystage::ops::verify::{Outcome, verify};

use crate::common::{adapters, open};

#[test]
fn every_op_with_every_kernel_variant_matches_the_reference_on_every_adapter() {
    for adapter in adapters() {
        let device = &open(&[adapter.index])[0];
        let outcomes = device.block_on(verify(device, |_| ())).expect("runs");
        let failed: Vec<&Outcome> = outcomes.iter().filter(|o| !o.passed).collect();
        assert!(
            failed.is_empty(),
            "{}: {} of {} failed\n{failed:#?}",
            adapter.name,
            failed.len(),
            outcomes.len()
        );
        let kernels: Vec<&str> = outcomes.iter().map(|o| o.variant.as_str()).collect();
        for kernel in ["matmul,", "elementwise", "attention_backward_key 8 lanes", "layernorm 64 lanes"] {
            assert!(kernels.iter().any(|k| k.contains(kernel)), "{}: {kernel} did not run", adapter.name);
        }
    }
}
