//! Adapters, tolerances and golden data.

use polystage::gpu::{AdapterInfo, Device, OpenOptions};
use polystage::pipeline::{Executor, Plan, Setup};

/// Every adapter of the machine. Without one the tests fail, with the line that installs one.
pub fn adapters() -> Vec<AdapterInfo> {
    let adapters = pollster::block_on(polystage::gpu::list(false));
    assert!(!adapters.is_empty(), "{}", polystage::gpu::none_found());
    for adapter in &adapters {
        eprintln!("adapter {}: {} ({}, {})", adapter.index, adapter.name, adapter.backend, adapter.driver);
    }
    adapters
}

/// Opens adapters by index; an index may repeat.
pub fn open(indices: &[usize]) -> Vec<Device> {
    let options = OpenOptions::default();
    indices.iter().map(|&i| pollster::block_on(Device::open(i, options)).expect("opens")).collect()
}

/// Launches a setup on these adapters.
pub fn launch(setup: &Setup, indices: &[usize]) -> Executor {
    launch_on(setup, &open(indices))
}

/// Launches a setup on devices that have compiled some kernels already.
pub fn launch_on(setup: &Setup, devices: &[Device]) -> Executor {
    let before: Vec<u64> = devices.iter().map(|d| d.allocated()).collect();
    let described: Vec<_> = devices.iter().map(|d| (d.info().clone(), *d.capabilities())).collect();
    let plan = Plan::new(setup.clone(), &described).expect("plans");
    let predicted: Vec<u64> = plan.ranks.iter().map(|r| r.bytes).collect();
    let executor = Executor::launch(plan, devices).expect("launches");
    let allocated: Vec<u64> = devices.iter().zip(before).map(|(d, before)| d.allocated() - before).collect();
    assert_eq!(predicted, allocated, "the plan's bytes are what is allocated, to the byte");
    executor
}

/// Normalised mean squared error.
pub fn nmse(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let error: f64 = got.iter().zip(want).map(|(&g, &w)| (g as f64 - w).powi(2)).sum();
    let size: f64 = want.iter().map(|w| w * w).sum();
    if size == 0.0 { error } else { error / size }
}
