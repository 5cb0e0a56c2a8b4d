//! How fast is this card? A few seconds of measurements for `polystage devices --bench`.

use serde::Serialize;

use super::plan::MemoryPlan;
use super::verify::{Alone, Case, single_node};
use crate::error::Result;
use crate::gpu::{Buffer, Device, Mapping, Recorder, now};
use crate::graph::{Epilogue, Layout as MatmulLayout, Op};

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Speed {
    /// Of a square f32 matmul, in 10⁹ floating-point operations a second.
    pub matmul_gflops: f64,
    /// Read and written by an addition, in 10⁹ bytes a second.
    pub memory_gb_s: f64,
    /// From mapped memory of one buffer into the device's, in 10⁹ bytes a second.
    pub upload_gb_s: f64,
    /// From the device into host memory, in 10⁹ bytes a second.
    pub readback_gb_s: f64,
    /// Until four bytes are on the host, in milliseconds.
    pub readback_latency_ms: f64,
}

/// Seconds after which a measurement is long enough not to measure its own overhead.
const LONG_ENOUGH: f64 = 0.025;
/// Measurements of which the median counts.
pub(super) const REPEATS: usize = 5;

/// What [`measure`] measures, one after another.
pub const MEASUREMENTS: u64 = 4;

/// Measures a device; nothing else should run on it. `each` hears of every measurement that is done.
pub async fn measure(device: &Device, mut each: impl FnMut()) -> Result<Speed> {
    let matmul = Op::Matmul { layout: MatmulLayout::NN, epilogue: Epilogue::None };
    let square = |n: usize| vec![vec![n, n], vec![n, n]];
    let (n, seconds) = grow(device, &matmul, 256, 8192, &square).await?;
    let matmul_gflops = 2.0 * (n as f64).powi(3) / seconds / 1e9;
    each();
    let pair = |n: usize| vec![vec![n], vec![n]];
    let (n, seconds) = grow(device, &Op::Add, 4 << 20, 64 << 20, &pair).await?;
    let memory_gb_s = 12.0 * n as f64 / seconds / 1e9;
    each();
    let bytes = if device.capabilities().software { 16 << 20 } else { 64 << 20 };
    let bytes = bytes.min(device.capabilities().max_buffer);
    let (upload, readback) = transfers(device, bytes).await?;
    each();
    let (_, latency) = transfers(device, 4).await?;
    each();
    let speed = |seconds: f64| bytes as f64 / seconds / 1e9;
    Ok(Speed {
        matmul_gflops,
        memory_gb_s,
        upload_gb_s: speed(upload),
        readback_gb_s: speed(readback),
        readback_latency_ms: 1e3 * latency,
    })
}

/// Doubles the size until a run is long enough or the device is full; that size and the median of its seconds.
async fn grow(
    device: &Device,
    op: &Op,
    start: usize,
    limit: usize,
    shapes: &dyn Fn(usize) -> Vec<Vec<usize>>,
) -> Result<(usize, f64)> {
    let capabilities = device.capabilities();
    let room = device.info().memory.unwrap_or(u64::MAX) / 8;
    let most = capabilities.max_binding.min(capabilities.max_buffer).min(room);
    let mut n = start;
    loop {
        let seconds = run(device, op, &shapes(n), 1).await?;
        let next: usize = shapes(2 * n)[0].iter().product();
        if seconds >= LONG_ENOUGH || 2 * n > limit || 4 * next as u64 > most {
            return Ok((n, seconds));
        }
        n *= 2;
    }
}

/// The median of the seconds of a node that runs alone, so many times in a submission.
pub(super) async fn run(device: &Device, op: &Op, shapes: &[Vec<usize>], times: usize) -> Result<f64> {
    let shapes: Vec<&[usize]> = shapes.iter().map(Vec::as_slice).collect();
    let (stage, inputs, _) = single_node(&Case::new(op.clone(), &shapes))?;
    let plan = MemoryPlan::new(&stage, device.capabilities());
    let mut alone = Alone::new(device, stage, plan)?;
    for input in inputs {
        let range = alone.range(input)?;
        device.upload(&range.buffer, range.offset, bytemuck::cast_slice(&numbers(range.bytes as usize / 4)));
    }
    let mut record = |recorder: &mut Recorder<'_>| alone.record(recorder);
    // The first run also compiles and uploads.
    together(device, &mut record, 1).await?;
    let mut seconds = Vec::new();
    for _ in 0..REPEATS {
        seconds.push(together(device, &mut record, times).await?);
    }
    Ok(median(seconds))
}

/// What is multiplied: zeros take less power, hence a higher clock, than what a training run has.
pub(super) fn numbers(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i % 251) as f32 / 251.0 - 0.5).collect()
}

/// Seconds of so many runs of what `record` records, in one submission.
pub(super) async fn together(
    device: &Device,
    record: &mut impl FnMut(&mut Recorder<'_>) -> Result<()>,
    times: usize,
) -> Result<f64> {
    let start = now();
    let mut recorder = device.record();
    for _ in 0..times {
        record(&mut recorder)?;
    }
    recorder.submit(|| ());
    device.below(1).await;
    device.check("measuring")?;
    Ok(now() - start)
}

/// Medians of the seconds to bring bytes from mapped memory to a device's buffer, and from there to the host.
async fn transfers(device: &Device, bytes: u64) -> Result<(f64, f64)> {
    let source = device.staging("measured source", bytes, Mapping::Read)?;
    let write = device.staging("measured upload", bytes, Mapping::Write)?;
    let read = device.staging("measured read-back", bytes, Mapping::Read)?;
    let buffer = device.buffer("measured", bytes)?;
    device.mapped(&source, Mapping::Read).await?;
    let (mut uploads, mut readbacks) = (Vec::new(), Vec::new());
    for _ in 0..=REPEATS {
        let start = now();
        source.copy_mapped(&write, bytes)?;
        write.unmap();
        copy(device, &write, &buffer, bytes);
        device.below(1).await;
        uploads.push(now() - start);
        device.mapped(&write, Mapping::Write).await?;
        let start = now();
        copy(device, &buffer, &read, bytes);
        device.read_staging(&read, bytes).await?;
        readbacks.push(now() - start);
    }
    // The first of each touches fresh pages.
    Ok((median(uploads.split_off(1)), median(readbacks.split_off(1))))
}

fn copy(device: &Device, from: &Buffer, to: &Buffer, bytes: u64) {
    let mut recorder = device.record();
    recorder.copy(from, 0, to, 0, bytes);
    recorder.submit(|| ());
}

pub(super) fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
