//! Adapters, tolerances and golden data.

use std::cell::RefCell;
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use polystage::gpu::{AdapterInfo, Device, OpenOptions};
use polystage::layers::Layers;
use polystage::ops::parameters::AdamStep;
use polystage::pipeline::{Batch, Executor, Plan, Setup};

/// Cuts after so many layers each; 3.5 is in the middle of block 2.
pub fn cut_at<T: Into<f64> + Copy>(layers: &[T]) -> Vec<Layers> {
    let halves = |&layers: &T| (2.0 * layers.into()) as usize;
    layers.iter().map(|layers| std::iter::repeat_n(Layers::HALF, halves(layers)).sum()).collect()
}

/// Every adapter of the machine. Without one the tests fail, with the line that installs one.
pub fn adapters() -> Vec<AdapterInfo> {
    let adapters = pollster::block_on(polystage::gpu::list(false));
    assert!(!adapters.is_empty(), "{}", polystage::gpu::none_found());
    for adapter in &adapters {
        eprintln!("adapter {}: {} ({}, {})", adapter.index, adapter.name, adapter.backend, adapter.driver);
    }
    adapters
}

/// The program, which sees one adapter alone where the drivers of the tests have lavapipe among them: it compiles a model's
/// shaders in a tenth of the time that SwiftShader takes, and a program compiles all of them at every start. What runs on
/// every adapter are the library's tests, and [`program_on_all`]'s.
pub fn program() -> Command {
    let mut command = program_on_all();
    let drivers = std::env::var("VK_ICD_FILENAMES").unwrap_or_default();
    if let Some(lavapipe) = drivers.split(':').find(|path| path.contains("lvp_icd")) {
        command.env("VK_ICD_FILENAMES", lavapipe);
    }
    command
}

/// The program, which sees every adapter.
pub fn program_on_all() -> Command {
    Command::new(env!("CARGO_BIN_EXE_polystage"))
}

/// Devices that no test uses at the moment. They keep their kernels, whose compilation takes most of the time of a test
/// on a small model.
static IDLE: Mutex<Vec<Device>> = Mutex::new(Vec::new());

/// The devices of a test, which runs in a thread of its own: idle again when that ends.
#[derive(Default)]
struct Used(Vec<Device>);

impl Drop for Used {
    fn drop(&mut self) {
        IDLE.lock().unwrap_or_else(PoisonError::into_inner).append(&mut self.0);
    }
}

thread_local! {
    static USED: RefCell<Used> = RefCell::default();
}

/// Opened adapters by index; an index may repeat. What this test has opened before and holds no memory any more is used
/// again, then what other tests have.
pub fn open(indices: &[usize]) -> Vec<Device> {
    USED.with_borrow_mut(|Used(used)| {
        let mut free: Vec<Device> = used.iter().filter(|device| rests(device)).cloned().collect();
        let mut take = |index: usize| {
            let is = |device: &Device| device.info().index == index;
            if let Some(at) = free.iter().position(is) {
                return free.swap_remove(at);
            }
            let mut idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
            let at = idle.iter().position(|device| is(device) && rests(device));
            let known = at.map(|at| idle.swap_remove(at));
            drop(idle);
            let options = OpenOptions::default();
            let device =
                known.unwrap_or_else(|| pollster::block_on(Device::open(index, options)).expect("opens"));
            used.push(device.clone());
            device
        };
        indices.iter().map(|&index| take(index)).collect()
    })
}

/// Whether a device holds no memory, or soon does not: ranks free it in threads of their own.
fn rests(device: &Device) -> bool {
    let start = Instant::now();
    while device.allocated() > 0 && start.elapsed() < Duration::from_millis(50) {
        std::thread::sleep(Duration::from_millis(1));
    }
    device.allocated() == 0 && device.check("resting").is_ok()
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

/// From B sequences of T + 1 tokens, each of which follows the one before it.
pub fn shifted(tokens: &[u32], sequence: usize) -> Batch {
    let rows = tokens.chunks_exact(sequence + 1);
    Batch {
        inputs: rows.clone().flat_map(|row| &row[..sequence]).copied().collect(),
        targets: rows.flat_map(|row| &row[1..]).copied().collect(),
        starts: Vec::new(),
    }
}

/// Normalised mean squared error.
pub fn nmse(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let error: f64 = got.iter().zip(want).map(|(&g, &w)| (g as f64 - w).powi(2)).sum();
    let size: f64 = want.iter().map(|w| w * w).sum();
    if size == 0.0 { error } else { error / size }
}

/// A folder with all that is in it once more.
pub fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let (path, name) = entry.map(|entry| (entry.path(), entry.file_name())).unwrap();
        match path.is_dir() {
            true => copy_folder(&path, &to.join(name)),
            false => drop(std::fs::copy(&path, to.join(name)).unwrap()),
        }
    }
}

/// What PyTorch's AdamW does after a step, counted from 0, with the settings of the scripts that made the golden data.
pub fn adam(step: usize, norm: f64, rate: f64) -> AdamStep {
    let t = step as i32 + 1;
    AdamStep {
        clip: (1.0 / (norm + 1e-6)).min(1.0) as f32,
        rate: rate as f32,
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        decay: (rate * 0.1) as f32,
        correction1: (1.0 / (1.0 - 0.9f64.powi(t))) as f32,
        correction2: (1.0 / (1.0 - 0.95f64.powi(t))) as f32,
    }
}
