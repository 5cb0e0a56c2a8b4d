//! Is this card's arithmetic right? Every op and every kernel variant that an adapter can run, on odd and on usual
//! shapes, against the [`crate::reference`] in f64: what `polystage verify` runs on a user's own cards.

use std::ops::ControlFlow;

use serde::Serialize;

use super::arguments::{Argument, arguments, gradient_start};
use super::parameters::{self, Parameters};
use super::plan::MemoryPlan;
use super::program::{Slots, StageProgram};
use super::{Lowered, in_place};
use crate::error::Result;
use crate::gpu::{Capabilities, Device, Range, Recorder, Tiles, source};
use crate::graph::{Epilogue, Fed, Graph, Layout, Op, Phase, StageGraph, ValueId};
use crate::model::{Init, Parameter};
use crate::reference;

pub use super::cases::{Case, cases};

/// How one case went with one set of kernels.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// The op's name.
    pub op: String,
    /// The case's label.
    pub case: String,
    /// The kernels that ran, with their header and lanes.
    pub variant: String,
    /// Squared error over squared reference, of the worst result.
    pub nmse: f64,
    /// The largest error of one element, in units in the last place of a 32-bit float of its size or of the result's
    /// root mean square, whichever is larger.
    pub max_ulp: f64,
    /// The largest `nmse` that passes.
    pub tolerance: f64,
    /// Whether every element is finite and the error within the tolerance.
    pub passed: bool,
}

/// The largest normalised mean squared error of an op, and why it is not smaller. One wrong element of a result with
/// n elements makes about 1/n, so that a tolerance of 1e-10 finds it in all but huge results.
pub fn tolerance(op: &Op) -> (f64, &'static str) {
    match op {
        Op::Add | Op::AddBias | Op::Scale { .. } | Op::Embedding { .. } => {
            (1e-13, "one addition or product in f32: at most 2^-24 of relative error")
        }
        Op::Gather => (0.0, "a copy"),
        Op::PositionBackward { .. } | Op::EmbeddingBackward { .. } => (1e-13, "a sum of few terms in f32"),
        Op::ColumnSum => (1e-11, "a long sum in f32, whose rounding errors grow with its length"),
        Op::Matmul { .. } => {
            (5e-12, "a dot product in f32; of the epilogues, gelu goes through exp and a division")
        }
        Op::Activate(_) | Op::ActivateBackward(_) => {
            (1e-11, "exp may be off by 3 + 2|x| units in the last place, a division by 2.5")
        }
        Op::LayerNorm { .. } => {
            (5e-12, "x − mean cancels digits; inverseSqrt may be off by 2 units in the last place")
        }
        Op::LayerNormBackward { .. } => (1e-12, "three terms cancel, the more the fewer columns there are"),
        Op::LayerNormWeightBackward => (1e-11, "a long sum in f32 of terms in which x − mean cancels digits"),
        Op::RmsNorm { .. } | Op::RmsNormBackward { .. } => (
            1e-12,
            "a sum of like signs or of terms around 1; inverseSqrt may be off by 2 units in the last place",
        ),
        Op::RmsNormWeightBackward => (1e-11, "a long sum in f32, whose rounding errors grow with its length"),
        Op::SwiGlu | Op::SwiGluBackward => {
            (1e-11, "exp may be off by 3 + 2|x| units in the last place, a division by 2.5")
        }
        Op::Rope { .. } | Op::RopeBackward { .. } => (1e-13, "two products and a sum in f32"),
        Op::Attention { .. } | Op::AttentionCached { .. } => {
            (1e-11, "exp of scores: the rounding of a large score is a relative error of its weight")
        }
        Op::AttentionBackward { .. } => {
            (1e-9, "weights recomputed from lse, then do·v − delta cancels digits")
        }
        Op::CrossEntropy { .. } | Op::CrossEntropyPart { .. } => {
            (1e-11, "exp of logits; log may be off by 2^-21, whatever it gives")
        }
        Op::LogitStatistics { .. } => {
            (1e-11, "a long sum of exp, which may be off by 3 + 2|x| units in the last place")
        }
        Op::Slice { .. } | Op::Stack { .. } => (0.0, "the same memory"),
        Op::Sum { .. } | Op::Spread | Op::ReduceScatter { .. } | Op::AllGather { .. } => {
            (0.0, "one member's alone is a copy")
        }
    }
}

/// The largest normalised mean squared error where operands are rounded to f16: each is off by up to 2^-11 of itself, which makes
/// some 5e-8 of a sum of products.
const IN_F16: f64 = 1e-6;

/// Runs cases with every set of launches that the device can run; `each` sees the outcomes as they come, with the number of
/// their case from 1 on, and says whether to go on.
pub async fn verify(
    device: &Device,
    cases: &[Case],
    mut each: impl FnMut(usize, &Outcome) -> ControlFlow<()>,
) -> Result<Vec<Outcome>> {
    let mut outcomes = Vec::new();
    for (number, case) in (1..).zip(cases) {
        let arguments = arguments(case);
        let wanted = wanted(case, &arguments);
        let node = single_node(case)?;
        for (choice, capabilities) in choices(device.capabilities(), case)? {
            let plan = MemoryPlan::new(&node.0, &capabilities);
            let variant = describe(&plan.lowered[0]);
            let rounds = plan.lowered[0].launches.iter().any(|launch| launch.scaled);
            let tolerance = if rounds { IN_F16 } else { tolerance(&case.op).0 };
            let got = run(device, case, &arguments, node.clone(), plan).await?;
            device.check(&format!("{}, {choice}", case.label))?;
            let outcome = judge(case, variant, tolerance, &got, &wanted);
            let on = each(number, &outcome);
            outcomes.push(outcome);
            if on.is_break() {
                return Ok(outcomes);
            }
        }
    }
    Ok(outcomes)
}

/// The results of a case with the launches that a device with these capabilities would choose.
pub async fn results(
    device: &Device,
    case: &Case,
    capabilities: &Capabilities,
) -> Result<(String, Vec<Vec<f32>>)> {
    let node = single_node(case)?;
    let plan = MemoryPlan::new(&node.0, capabilities);
    let variant = describe(&plan.lowered[0]);
    Ok((variant, run(device, case, &arguments(case), node, plan).await?))
}

/// Whether a matmul in each layout is right on the kernels that a device chooses for it; for one that computes in f16.
///
/// # Errors
/// Those of the device.
pub async fn matmuls_are_right(device: &Device) -> Result<bool> {
    // More than a tile: multiples of 4, and of nothing.
    for ([m, n, k], layout) in [[132, 136, 80], [131, 135, 77]]
        .into_iter()
        .flat_map(|extents| [Layout::NN, Layout::NT, Layout::TN].map(|layout| (extents, layout)))
    {
        let op = Op::Matmul { layout, epilogue: Epilogue::None };
        let [a, b] = match layout {
            Layout::NN => [[m, k], [k, n]],
            Layout::NT => [[m, k], [n, k]],
            Layout::TN => [[k, m], [k, n]],
        };
        let case = Case::new(op, &[&a, &b]);
        let (variant, got) = results(device, &case, device.capabilities()).await?;
        if !judge(&case, variant, IN_F16, &got, &wanted(&case, &arguments(&case))).passed {
            return Ok(false);
        }
    }
    // What many workgroups at once might spoil: the same bits twice, near those of another kernel. Whole, and with K in slices.
    for [m, n, k] in [[1024, 1024, 256], [256, 256, 4096]] {
        let case =
            Case::new(Op::Matmul { layout: Layout::NN, epilogue: Epilogue::None }, &[&[m, k], &[k, n]]);
        let alone = Capabilities { cooperative: 0, ..*device.capabilities() };
        let (_, wanted) = results(device, &case, &alone).await?;
        let (variant, got) = results(device, &case, device.capabilities()).await?;
        let (_, again) = results(device, &case, device.capabilities()).await?;
        let wanted: Vec<Vec<f64>> =
            wanted.iter().map(|values| values.iter().map(|&value| value.into()).collect()).collect();
        if got != again || !judge(&case, variant, IN_F16, &got, &wanted).passed {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The choices of kernels to try on a device: its own first, then what other devices would choose and it can run too.
fn variants(native: &Capabilities) -> Vec<(String, Capabilities)> {
    let single = Capabilities { software: false, fill: 1, ..*native };
    let other = Capabilities { software: !native.software, ..*native };
    let mut variants = vec![
        ("native".into(), *native),
        (if native.software { "as on a GPU" } else { "as on a CPU" }.into(), other),
        ("without subgroups".into(), Capabilities { subgroup: None, ..*native }),
        // What large matrices get on cards with many registers, with less, and where K is split.
        (
            "as on a large GPU".into(),
            Capabilities { software: false, sums: 64, fill: 1, dispatch: 1, ..*native },
        ),
        (
            "as on a GPU with few registers".into(),
            Capabilities { software: false, sums: 32, fill: 1, ..*native },
        ),
        ("K in slices".into(), Capabilities { software: false, sums: 64, fill: 3, dispatch: 1, ..*native }),
        // Tiles that only a measurement chooses.
        ("tiles of 64x128".into(), Capabilities { tiles: Tiles([[4; 3]; 3]), sums: 64, ..single }),
        ("tiles of 64x32".into(), Capabilities { tiles: Tiles([[5; 3]; 3]), sums: 64, ..single }),
        // As few as a huge tensor leaves: the grid must go on along the second axis.
        ("few groups along an axis".into(), Capabilities { max_groups: 5, ..*native }),
    ];
    if native.has_f16 {
        variants.push(("in f16".into(), Capabilities { f16: true, cooperative: 0, ..*native }));
        let card = Capabilities { f16: true, cooperative: 0, software: false, sums: 64, fill: 1, ..*native };
        variants.push(("in f16 as on a large GPU".into(), card));
    }
    if native.cooperative > 0 {
        let card = Capabilities { f16: true, software: false, fill: 1, ..*native };
        variants.push(("in f16 by cooperative matrices".into(), card));
        let sliced = Capabilities { fill: 3, dispatch: 1, ..card };
        variants.push(("in f16 by cooperative matrices, K in slices".into(), sliced));
    }
    variants
}

/// Of [`variants`] those that run a case on other launches than the ones before.
pub fn choices(native: &Capabilities, case: &Case) -> Result<Vec<(String, Capabilities)>> {
    let (stage, ..) = single_node(case)?;
    let mut seen: Vec<Vec<Lowered>> = Vec::new();
    let mut list = variants(native);
    list.retain(|(_, capabilities)| {
        let lowered = MemoryPlan::new(&stage, capabilities).lowered;
        let new = !seen.contains(&lowered);
        if new {
            seen.push(lowered);
        }
        new
    });
    Ok(list)
}

/// A stage of one node, with its arguments and results.
pub fn single_node(case: &Case) -> Result<(StageGraph, Vec<ValueId>, Vec<ValueId>)> {
    let mut graph = Graph::default();
    let inputs: Vec<ValueId> = case
        .shapes
        .iter()
        .enumerate()
        .map(|(i, shape)| match case.gradient() == Some(i) {
            true => graph.input(Fed::OutputGradient, shape),
            false => graph.input(Fed::Argument(case.dtype(i)), shape),
        })
        .collect();
    let outputs = graph.push(case.op.clone(), &inputs, Phase::Forward)?;
    let mut gradients = Vec::new();
    if case.accumulate {
        for (index, &output) in outputs.iter().enumerate() {
            let shape = graph.shape(output).to_vec();
            gradients.push((graph.parameter(&parameter_name(index), &shape), output));
        }
    }
    let (input, output, d_output, d_input, loss) = (None, None, None, None, None);
    let boundaries = Vec::new();
    Ok((StageGraph { graph, input, output, d_output, d_input, loss, gradients, boundaries }, inputs, outputs))
}

fn parameter_name(index: usize) -> String {
    format!("parameter {index}")
}

/// What the reference gives, added to what the gradients hold at first.
fn wanted(case: &Case, arguments: &[Argument]) -> Vec<Vec<f64>> {
    let shapes: Vec<&[usize]> = case.shapes.iter().map(Vec::as_slice).collect();
    let inputs: Vec<&[f64]> = arguments.iter().map(|a| a.values.as_slice()).collect();
    let mut wanted = reference::apply(&case.op, &shapes, &inputs);
    if case.accumulate {
        for (index, want) in wanted.iter_mut().enumerate() {
            let start = gradient_start(index, want.len());
            want.iter_mut().zip(start.values).for_each(|(w, s)| *w += s);
        }
    }
    wanted
}

/// The loss scale of a node alone: what is around 1 then stays within f16.
const SCALE: f32 = 1024.0;

/// One node on a device, with the parameters whose gradients it adds to.
pub(super) struct Alone {
    parameters: Parameters,
    program: StageProgram,
}

impl Alone {
    const SLOTS: Slots = Slots { stash: 0, gradient: 0 };

    pub(super) fn new(device: &Device, stage: StageGraph, plan: MemoryPlan) -> Result<Alone> {
        let parameter = |(i, &(_, gradient)): (usize, &(ValueId, ValueId))| {
            Parameter::new(parameter_name(i), stage.graph.shape(gradient), Init::Zeros)
        };
        let list: Vec<_> = stage.gradients.iter().enumerate().map(parameter).collect();
        let accumulates = !list.is_empty();
        let parameters = Parameters::new(device, parameters::Layout::new(list), accumulates)?;
        let program = StageProgram::new(device, stage, plan, 1, 1)?;
        program.scale(SCALE);
        Ok(Alone { parameters, program })
    }

    pub(super) fn range(&self, id: ValueId) -> Result<Range> {
        self.program.range(&self.parameters, id, Alone::SLOTS)
    }

    pub(super) fn record(&mut self, recorder: &mut Recorder<'_>) -> Result<()> {
        let launches = self.program.launches(Phase::Forward).len();
        self.program.record(recorder, &self.parameters, Phase::Forward, 0..launches, Alone::SLOTS)
    }
}

async fn run(
    device: &Device,
    case: &Case,
    arguments: &[Argument],
    (stage, inputs, outputs): (StageGraph, Vec<ValueId>, Vec<ValueId>),
    plan: MemoryPlan,
) -> Result<Vec<Vec<f32>>> {
    let mut alone = Alone::new(device, stage, plan)?;
    let ranges = |ids: &[ValueId]| ids.iter().map(|&id| alone.range(id)).collect::<Result<Vec<Range>>>();
    let (from, to) = (ranges(&inputs)?, ranges(&outputs)?);
    for (index, range) in to.iter().enumerate() {
        // Unless it is to be added to, a result starts as NaN, so that an element nobody writes is found.
        let words = match case.accumulate {
            true => gradient_start(index, range.bytes as usize / 4).words(),
            false => vec![u32::MAX; range.bytes as usize / 4],
        };
        if in_place(&case.op).is_none_or(|(_, result)| result != index) {
            device.upload(&range.buffer, range.offset, bytemuck::cast_slice(&words));
        }
    }
    for (range, argument) in from.iter().zip(arguments) {
        device.upload(&range.buffer, range.offset, bytemuck::cast_slice(&argument.words()));
    }
    device.compiled().await?;
    let mut recorder = device.record();
    alone.record(&mut recorder)?;
    recorder.submit(|| ());
    let mut got = Vec::new();
    for range in &to {
        got.push(device.read_f32(range).await?);
    }
    Ok(got)
}

fn judge(case: &Case, variant: String, tolerance: f64, got: &[Vec<f32>], wanted: &[Vec<f64>]) -> Outcome {
    let (mut nmse, mut max_ulp, mut finite) = (0.0f64, 0.0f64, true);
    for (got, wanted) in got.iter().zip(wanted) {
        let size: f64 = wanted.iter().map(|w| w * w).sum();
        let errors = || got.iter().zip(wanted).map(|(&g, &w)| (g as f64 - w, w));
        let error: f64 = errors().map(|(e, _)| e * e).sum();
        // Where all of the result is 0, the arguments, which are around 1, set the scale.
        let (size, scale) = match size {
            0.0 => (wanted.len() as f64, 1.0),
            _ => (size, (size / wanted.len() as f64).sqrt()),
        };
        nmse = nmse.max(error / size);
        max_ulp = errors().map(|(e, w)| e.abs() / ulp(w.abs().max(scale))).fold(max_ulp, f64::max);
        finite &= got.iter().all(|g| g.is_finite());
    }
    let passed = finite && nmse <= tolerance;
    // JSON has no infinities; no error that counts is this large.
    let (nmse, max_ulp) = if finite { (nmse, max_ulp) } else { (f64::MAX, f64::MAX) };
    Outcome { op: case.op.name().into(), case: case.label.clone(), variant, nmse, max_ulp, tolerance, passed }
}

/// The distance between neighbouring 32-bit floats around `x`.
fn ulp(x: f64) -> f64 {
    (x.log2().floor() - 23.0).exp2()
}

/// Kernels of a lowering, each once, then what tells their variants apart.
pub(super) fn describe(lowered: &Lowered) -> String {
    let (mut names, mut details) = (Vec::new(), Vec::new());
    let add = |list: &mut Vec<String>, text: String| {
        if !list.contains(&text) {
            list.push(text);
        }
    };
    for launch in &lowered.launches {
        let specialisation = &launch.key.specialisation;
        add(&mut names, launch.key.name.to_string());
        let constant = |wanted: &str| {
            specialisation.constants.iter().find(|(name, _)| *name == wanted).map(|&(_, value)| value)
        };
        if let Some(lanes) = constant("LANES") {
            add(&mut details, format!("{lanes} lanes"));
        }
        if let (Some(across), Some(rows), Some(fours)) =
            (constant("ACROSS"), constant("ROWS"), constant("FOURS"))
        {
            add(&mut details, format!("tiles of {}x{}", 256 / across * rows, 4 * across * fours));
        }
        if let (Some(rows), Some(chunks)) = (constant("ROWS"), constant("CHUNKS")) {
            add(&mut details, format!("tiles of {rows}x{}", 32 * chunks));
        }
        let text = source(launch.key.name, specialisation.header);
        if let Some(header) = text.split("// Header \"").nth(1).and_then(|rest| rest.split('"').next()) {
            add(&mut details, header.to_string());
        }
    }
    [vec![names.join(" + ")], details].concat().join(", ")
}
