//! AdamW on the host: the arithmetic of `shaders/adamw.wgsl` and `shaders/square_sum.wgsl`, for state that is in its memory.

use crate::ops::parameters::{AdamStep, CHUNK};

/// Sums that are taken side by side, so that the compiler adds them at once.
const LANES: usize = 16;

/// One AdamW step (Loshchilov and Hutter 2019): `weights`, `first` and `second` from the gradient, which `step` scales.
pub(super) fn advance(
    step: AdamStep,
    decays: bool,
    gradient: &[f32],
    weights: &mut [f32],
    first: &mut [f32],
    second: &mut [f32],
) {
    let shrink = if decays { 1.0 - step.decay } else { 1.0 };
    let moments = first.iter_mut().zip(second);
    for ((weight, &gradient), (m, v)) in weights.iter_mut().zip(gradient).zip(moments) {
        let gradient = gradient * step.clip;
        *m = step.beta1 * *m + (1.0 - step.beta1) * gradient;
        *v = step.beta2 * *v + (1.0 - step.beta2) * gradient * gradient;
        let update = step.rate * *m * step.correction1 / ((*v * step.correction2).sqrt() + step.epsilon);
        *weight = *weight * shrink - update;
    }
}

/// 10⁹ bytes of weights a second that all cores update, as they do it for a model: blocks that no cache holds.
#[cfg(not(target_arch = "wasm32"))]
pub(crate) fn speed() -> f64 {
    use std::sync::Mutex;
    use std::time::Instant;
    const BLOCKS: usize = 32;
    const ELEMENTS: usize = 1 << 18;
    let step = AdamStep {
        clip: 1.0,
        rate: 1e-3,
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        decay: 1e-4,
        correction1: 1.0,
        correction2: 1.0,
    };
    let fresh = |at: usize| Mutex::new([0, 1, 2, 3].map(|part| vec![(at + part) as f32 * 1e-3; ELEMENTS]));
    let blocks: Vec<_> = (0..BLOCKS).map(fresh).collect();
    let all = || {
        let started = Instant::now();
        on_all_cores(BLOCKS, |at| {
            let mut block = blocks[at].lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            let [gradient, weights, first, second] = &mut *block;
            advance(step, true, gradient, weights, first, second);
        });
        (4 * BLOCKS * ELEMENTS) as f64 / 1e9 / started.elapsed().as_secs_f64().max(1e-9)
    };
    // The first finds its memory; of the others the middle one.
    let mut speeds = [0.0; 4].map(|_: f64| all());
    speeds[1..].sort_by(f64::total_cmp);
    speeds[2]
}

/// The sum of squares of each chunk of a gradient.
pub(super) fn square_sums(gradient: &[f32]) -> Vec<f32> {
    let of = |chunk: &[f32]| {
        let mut lanes = [0.0f32; LANES];
        for values in chunk.chunks(LANES) {
            lanes.iter_mut().zip(values).for_each(|(lane, value)| *lane += value * value);
        }
        let mut half = LANES / 2;
        while half > 0 {
            (0..half).for_each(|lane| lanes[lane] += lanes[lane + half]);
            half /= 2;
        }
        lanes[0]
    };
    gradient.chunks(CHUNK).map(of).collect()
}

/// Calls `work` with every number below `count`, on all cores.
#[cfg(not(target_arch = "wasm32"))]
pub(super) fn on_all_cores(count: usize, work: impl Fn(usize) + Sync) {
    use std::sync::atomic::{AtomicUsize, Ordering};
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get()).min(count.max(1));
    let next = AtomicUsize::new(0);
    let run = || {
        while let Some(at) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&at| at < count) {
            work(at);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..cores {
            scope.spawn(run);
        }
        run();
    });
}

/// As above, on the one that a page has.
#[cfg(target_arch = "wasm32")]
pub(super) fn on_all_cores(count: usize, work: impl Fn(usize)) {
    (0..count).for_each(work);
}
