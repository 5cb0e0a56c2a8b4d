//! How near a card's kernels come to what it can do: `polystage bench`. Each hot kernel runs alone at the sizes of a model;
//! beside it stand two ceilings that are measured the same way, a loop of multiplications and additions, and a copy
//! (Williams, Waterman and Patterson 2009).

use serde::Serialize;

use super::bench::{REPEATS, median, numbers, together};
use super::parameters::{AdamStep, Layout as Pool, Parameters};
use super::plan::MemoryPlan;
use super::sort_rows;
use super::verify::{Alone, Case, describe, single_node};
use crate::error::Result;
use crate::gpu::{Device, KernelKey, Recorder, Specialisation};
use crate::graph::{DType, Epilogue, Layout, Op, StageGraph, ValueId};
use crate::model::{Init, Parameter};

/// The model at whose sizes kernels run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Sizes {
    /// Sequences of a microbatch.
    pub batch: usize,
    /// Tokens of a sequence.
    pub sequence: usize,
    /// Columns of activations.
    pub width: usize,
    /// Heads of attention; they divide the width.
    pub heads: usize,
    /// Tokens of the vocabulary.
    pub vocabulary: usize,
}

impl Sizes {
    /// GPT-2's, or on a software adapter those of a model that it trains in reasonable time.
    pub fn usual(software: bool) -> Sizes {
        match software {
            true => Sizes { batch: 1, sequence: 256, width: 256, heads: 4, vocabulary: 4096 },
            false => Sizes { batch: 8, sequence: 1024, width: 768, heads: 12, vocabulary: 50257 },
        }
    }
}

/// What a card can do.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Ceilings {
    /// Of a loop of multiplications and additions in f32, in 10⁹ a second, each counted as two.
    pub gflops: f64,
    /// Read and written by a copy, in 10⁹ bytes a second.
    pub gb_s: f64,
}

/// One kernel at one size.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    /// What it does for a model.
    pub role: String,
    /// The kernels that ran, with their variants.
    pub kernels: String,
    /// Shapes of its arguments.
    pub shapes: Vec<Vec<usize>>,
    /// Median of the seconds of one run.
    pub seconds: f64,
    /// In 10⁹ floating-point operations a second, as a model counts them: what is computed again does not count.
    pub gflops: f64,
    /// In 10⁹ bytes a second, arguments and results once each.
    pub gb_s: f64,
    /// Floating-point operations a byte.
    pub intensity: f64,
    /// The part of what the ceilings allow at this intensity, 0 to about 1 (caches may exceed a copy).
    pub share: f64,
    /// How often a block of the model runs it, forward and backward; 0 for what stands outside of blocks.
    pub each_block: usize,
}

/// All of an adapter.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The sizes.
    pub sizes: Sizes,
    /// What the card can do.
    pub ceilings: Ceilings,
    /// The kernels.
    pub kernels: Vec<Measured>,
    /// What does not fit the card's buffers, with the reason.
    pub left_out: Vec<String>,
    /// Seconds of a block, forward and backward.
    pub block_seconds: f64,
}

/// What is measured for a model of these sizes.
struct Task {
    role: &'static str,
    case: Case,
    each_block: usize,
}

fn tasks(sizes: Sizes) -> Vec<Task> {
    let Sizes { batch, sequence, width, heads, vocabulary } = sizes;
    let (rows, hidden) = (batch * sequence, 4 * width);
    let mut list = Vec::new();
    let mut add = |role, op: Op, shapes: &[&[usize]], each_block, accumulate| {
        let case = Case { accumulate, ..Case::new(op, shapes) };
        list.push(Task { role, case, each_block });
    };
    let forward = |epilogue| Op::Matmul { layout: Layout::NN, epilogue };
    let input = |epilogue| Op::Matmul { layout: Layout::NT, epilogue };
    let weight = Op::Matmul { layout: Layout::TN, epilogue: Epilogue::None };
    let none = Epilogue::None;
    // One of a block's four: (columns in, columns out).
    let (x, h, q) = ([rows, width], [rows, hidden], [rows, 3 * width]);
    add("qkv", forward(Epilogue::Bias), &[&x, &[width, 3 * width], &[3 * width]], 1, false);
    add("projection", forward(Epilogue::BiasResidual), &[&x, &[width, width], &[width], &x], 1, false);
    add("MLP up", forward(Epilogue::BiasGelu), &[&x, &[width, hidden], &[hidden]], 1, false);
    add("MLP down", forward(Epilogue::BiasResidual), &[&h, &[hidden, width], &[width], &x], 1, false);
    add("qkv, dX", input(none), &[&q, &[width, 3 * width]], 1, false);
    add("projection, dX", input(none), &[&x, &[width, width]], 1, false);
    add("MLP up, dX", input(none), &[&h, &[width, hidden]], 1, false);
    add("MLP down, dX", input(Epilogue::GeluBackward), &[&x, &[hidden, width], &h], 1, false);
    add("qkv, dW", weight.clone(), &[&x, &q], 1, true);
    add("projection, dW", weight.clone(), &[&x, &x], 1, true);
    add("MLP up, dW", weight.clone(), &[&x, &h], 1, true);
    add("MLP down, dW", weight.clone(), &[&h, &x], 1, true);
    let (qkv, o, lse) = ([batch, sequence, 3 * width], [batch, sequence, width], [batch, heads, sequence]);
    let kv_heads = heads;
    add("attention", Op::Attention { heads, kv_heads, starts: false }, &[&qkv], 1, false);
    let backward = Op::AttentionBackward { heads, kv_heads, starts: false };
    add("attention, backward", backward, &[&o, &qkv, &o, &lse], 1, false);
    let (row, statistics) = ([width], [rows, 2]);
    add("layer norm", Op::LayerNorm { epsilon: 1e-5 }, &[&x, &row, &row], 2, false);
    let backward = Op::LayerNormBackward { residual: true };
    add("layer norm, backward", backward, &[&x, &x, &row, &statistics, &x], 2, false);
    add("layer norm, gradients", Op::LayerNormWeightBackward, &[&x, &x, &statistics], 2, true);
    add("bias of qkv, gradient", Op::ColumnSum, &[&q], 1, true);
    add("bias of width, gradient", Op::ColumnSum, &[&x], 2, true);
    add("bias of MLP, gradient", Op::ColumnSum, &[&h], 1, true);
    add("RMS norm", Op::RmsNorm { epsilon: 1e-5 }, &[&x, &row], 0, false);
    add("SwiGLU", Op::SwiGlu, &[&h, &h], 0, false);
    let logits = [rows, vocabulary];
    add("head", input(none), &[&x, &[vocabulary, width]], 0, false);
    add("head, dX", forward(none), &[&logits, &[vocabulary, width]], 0, false);
    add("head, dW", weight, &[&logits, &x], 0, true);
    add("cross-entropy", Op::CrossEntropy { scale: 1.0 / rows as f32 }, &[&logits, &[rows]], 0, false);
    let segments = rows.min(vocabulary);
    let backward = Op::EmbeddingBackward { vocabulary };
    add("embedding, gradient", backward, &[&x, &[segments, 3], &[rows]], 0, true);
    list
}

/// The two ceilings and the optimizer, which is no op.
const MORE: usize = 3;

/// How many measurements [`measure`] makes.
pub fn measurements(sizes: Sizes) -> usize {
    tasks(sizes).len() + MORE
}

/// Measures; nothing else should run on the device. `each` hears of every measurement that is done.
pub async fn measure(device: &Device, sizes: Sizes, mut each: impl FnMut()) -> Result<Report> {
    let gflops = arithmetic(device).await?;
    each();
    let gb_s = copying(device).await?;
    each();
    let ceilings = Ceilings { gflops, gb_s };
    let mut report =
        Report { sizes, ceilings, kernels: Vec::new(), left_out: Vec::new(), block_seconds: 0.0 };
    for task in tasks(sizes) {
        let (stage, inputs, outputs) = single_node(&task.case)?;
        let capabilities = device.capabilities();
        let most = capabilities.max_binding.min(capabilities.max_buffer);
        let values = inputs.iter().chain(&outputs);
        let largest = values.map(|&id| stage.graph.value(id).bytes()).max().unwrap_or(0);
        if largest > most {
            let reason = format!("{largest} bytes in one binding, which holds {most}");
            report.left_out.push(format!("{}: {reason}", task.role));
        } else {
            report.kernels.push(node(device, ceilings, task, (stage, inputs, outputs)).await?);
        }
        each();
    }
    report.kernels.push(optimizer(device, ceilings, sizes).await?);
    each();
    report.block_seconds = report.kernels.iter().map(|k| k.each_block as f64 * k.seconds).sum();
    Ok(report)
}

/// Seconds that the runs of one measurement take together, at least.
const LONG_ENOUGH: f64 = 0.03;
/// Seconds that drivers let one submission take, with room.
const MOST: f64 = 0.25;

/// Median of the seconds of what `record` records once. It runs as often as it takes to measure it.
async fn timed(device: &Device, mut record: impl FnMut(&mut Recorder<'_>) -> Result<()>) -> Result<f64> {
    // The first run also compiles and uploads.
    together(device, &mut record, 1).await?;
    let mut times = 1;
    let mut seconds = together(device, &mut record, times).await?;
    while seconds < LONG_ENOUGH && times < 4096 {
        let one = seconds / times as f64;
        let most = ((MOST / one) as usize).max(1);
        let next = ((LONG_ENOUGH / one).ceil() as usize + 1).min(most).min(8 * times);
        if next <= times {
            break;
        }
        times = next;
        seconds = together(device, &mut record, times).await?;
    }
    let mut list = Vec::new();
    for _ in 0..REPEATS {
        list.push(together(device, &mut record, times).await? / times as f64);
    }
    Ok(median(list))
}

/// 10⁹ operations a second of the kernel that does nothing else.
async fn arithmetic(device: &Device) -> Result<f64> {
    const EACH: f64 = 2.0 * 8.0 * 32.0;
    let key = KernelKey { name: "ceiling", specialisation: Specialisation::default() };
    let kernel = device.kernel(&key)?;
    let software = device.capabilities().software;
    let (groups, rounds) = if software { (64u32, 64u32) } else { (8192, 256) };
    let invocations = 64 * groups as u64;
    let parameters = device.uniform("rounds", bytemuck::bytes_of(&[rounds, 0, 0, 0]))?;
    let factors = device.buffer("factors", 32)?;
    device.upload(&factors, 0, bytemuck::bytes_of(&[0.5f32, 0.25, 0.75, 0.375, 0.1, 0.2, 0.3, 0.4]));
    let out = device.buffer("sums", 16 * invocations)?;
    let group = device.bind(&kernel, &[parameters.whole(), factors.whole(), out.whole()]);
    let seconds = timed(device, |recorder| {
        recorder.dispatch(&kernel, &group, [groups, 1, 1]);
        Ok(())
    });
    Ok(EACH * rounds as f64 * invocations as f64 / seconds.await? / 1e9)
}

/// 10⁹ bytes a second of a copy, larger than caches where there is room.
async fn copying(device: &Device) -> Result<f64> {
    let software = device.capabilities().software;
    let room = device.info().memory.unwrap_or(u64::MAX) / 8;
    let bytes = if software { 64u64 << 20 } else { 512 << 20 };
    let bytes = bytes.min(device.capabilities().max_buffer).min(room) / 4 * 4;
    let (from, to) = (device.buffer("copied", bytes)?, device.buffer("copy", bytes)?);
    let seconds = timed(device, |recorder| {
        recorder.copy(&from, 0, &to, 0, bytes);
        Ok(())
    });
    Ok(2.0 * bytes as f64 / seconds.await? / 1e9)
}

fn judged(ceilings: Ceilings, seconds: f64, flops: f64, bytes: f64) -> Measured {
    let (gflops, gb_s, intensity) = (flops / seconds / 1e9, bytes / seconds / 1e9, flops / bytes);
    let share = gflops / ceilings.gflops.min(ceilings.gb_s * intensity);
    let (role, kernels, shapes) = (String::new(), String::new(), Vec::new());
    Measured { role, kernels, shapes, seconds, gflops, gb_s, intensity, share, each_block: 0 }
}

async fn node(
    device: &Device,
    ceilings: Ceilings,
    task: Task,
    (stage, inputs, outputs): (StageGraph, Vec<ValueId>, Vec<ValueId>),
) -> Result<Measured> {
    let Task { role, case, each_block } = task;
    let flops = stage.graph.flops(&stage.graph.nodes[0]);
    let bytes_of = |id: &ValueId| 4.0 * stage.graph.value(*id).len() as f64;
    // Where something is added to, it is read too.
    let again = if case.accumulate { 2.0 } else { 1.0 };
    let bytes = match case.op {
        // Of the table only the rows of the tokens, at most as many as there are tokens.
        Op::EmbeddingBackward { .. } => 3.0 * bytes_of(&inputs[0]),
        _ => inputs.iter().map(bytes_of).sum::<f64>() + again * outputs.iter().map(bytes_of).sum::<f64>(),
    };
    let plan = MemoryPlan::new(&stage, device.capabilities());
    let kernels = describe(&plan.lowered[0]);
    let mut alone = Alone::new(device, stage, plan)?;
    for (i, &input) in inputs.iter().enumerate() {
        let range = alone.range(input)?;
        device.upload(&range.buffer, range.offset, bytemuck::cast_slice(&content(&case, i)));
    }
    let seconds = timed(device, |recorder| alone.record(recorder));
    let measured = judged(ceilings, seconds.await?, flops, bytes);
    Ok(Measured { role: role.into(), kernels, shapes: case.shapes, each_block, ..measured })
}

/// Words of an argument.
fn content(case: &Case, argument: usize) -> Vec<u32> {
    let length: usize = case.shapes[argument].iter().product();
    if case.dtype(argument) == DType::F32 {
        return bytemuck::cast_vec(numbers(length));
    }
    let tokens = |n: usize, vocabulary: usize| (0..n).map(|i| (i * 7919 % vocabulary) as u32).collect();
    match case.op {
        Op::EmbeddingBackward { vocabulary } => {
            let tokens: Vec<u32> = tokens(case.shapes[2][0], vocabulary);
            let (segments, order) = sort_rows(&tokens, vocabulary);
            if argument == 1 { segments } else { order }
        }
        _ => tokens(length, case.shapes[0][1]),
    }
}

/// AdamW on as many weights as a block has.
async fn optimizer(device: &Device, ceilings: Ceilings, sizes: Sizes) -> Result<Measured> {
    let shape = [sizes.width, sizes.width];
    let weights = (0..12).map(|i| Parameter::new(format!("weights {i}"), &shape, Init::Zeros)).collect();
    let parameters = Parameters::new(device, Pool::new(weights), true)?;
    let step = AdamStep {
        clip: 1.0,
        rate: 1e-3,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        decay: 1e-5,
        correction1: 1.0,
        correction2: 1.0,
    };
    let seconds = timed(device, |recorder| parameters.record_adam(device, recorder, step)).await?;
    // Gradient, weight and two moments read, the last three written.
    let elements = 12.0 * (shape[0] * shape[1]) as f64;
    let measured = judged(ceilings, seconds, 14.0 * elements, 28.0 * elements);
    let (role, kernels) = ("AdamW".into(), "adamw, f32".into());
    Ok(Measured { role, kernels, shapes: vec![shape.to_vec(); 12], each_block: 0, ..measured })
}
