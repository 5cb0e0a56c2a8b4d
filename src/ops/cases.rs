//! What [`verify`](super::verify) runs: every op on sizes that are odd in every way a kernel can get wrong, and on one
//! that is usual in training, with arguments that belong together.

use super::{packed, sort_rows};
use crate::graph::{Activation, DType, Epilogue, Layout, Op};
use crate::model::init::philox;
use crate::reference;

/// One op on arguments of one shape.
#[derive(Clone, Debug)]
pub struct Case {
    /// The op with its variant.
    pub op: Op,
    /// Shapes of its arguments.
    pub shapes: Vec<Vec<usize>>,
    /// Op, shapes and what is special, for people.
    pub label: String,
    /// Its results are added to the gradients of parameters.
    pub accumulate: bool,
    /// Its weights are numbers that bf16 has.
    pub rounded: bool,
    /// Its weights are packed as bf16; then they are rounded too.
    pub packed: bool,
    /// How large the argument is that exp or a reciprocal root sees; 1 is usual.
    pub amplitude: f64,
}

impl Case {
    /// An op on arguments of these shapes, in f32.
    pub fn new(op: Op, shapes: &[&[usize]]) -> Case {
        let sizes: Vec<String> = shapes
            .iter()
            .map(|shape| shape.iter().map(usize::to_string).collect::<Vec<_>>().join("x"))
            .collect();
        let label = format!("{op:?} {}", sizes.join(" "));
        let shapes = shapes.iter().map(|shape| shape.to_vec()).collect();
        Case { op, shapes, label, accumulate: false, rounded: false, packed: false, amplitude: 1.0 }
    }

    /// Element type of an argument: token ids and index tables are whole numbers.
    pub fn dtype(&self, argument: usize) -> DType {
        match (&self.op, argument) {
            (Op::Embedding | Op::Gather, 0)
            | (Op::EmbeddingBackward { .. }, 1 | 2)
            | (Op::CrossEntropy { .. } | Op::AttentionCached { .. }, 1)
            | (Op::Rope { .. }, 4)
            | (Op::RopeBackward { .. }, 2) => DType::U32,
            _ if self.packed && self.op.reads_packed(argument) => DType::BF16,
            _ => DType::F32,
        }
    }

    fn packed(mut self) -> Case {
        (self.rounded, self.packed) = (true, true);
        self.label += ", packed";
        self
    }

    fn accumulated(mut self) -> Case {
        self.accumulate = true;
        self.label += ", added to a gradient";
        self
    }

    fn amplified(mut self, amplitude: f64) -> Case {
        self.amplitude = amplitude;
        self.label += &format!(", {amplitude} times as large");
        self
    }
}

/// Every op and variant on several shapes.
pub fn cases() -> Vec<Case> {
    let mut all = matmuls();
    all.extend(elementwise());
    all.extend(rows());
    all.extend(embeddings());
    all.extend(attentions());
    all.extend(rotations());
    all.extend(caches());
    all.extend(packed_weights());
    all
}

const LAYOUTS: [Layout; 3] = [Layout::NN, Layout::NT, Layout::TN];

fn matmul(layout: Layout, epilogue: Epilogue, [m, n, k]: [usize; 3]) -> Case {
    let (a, b) = match layout {
        Layout::NN => ([m, k], [k, n]),
        Layout::NT => ([m, k], [n, k]),
        Layout::TN => ([k, m], [k, n]),
    };
    let (bias, c) = ([n], [m, n]);
    let more: &[&[usize]] = match epilogue {
        Epilogue::None => &[],
        Epilogue::Bias | Epilogue::BiasGelu => &[&bias],
        Epilogue::BiasResidual => &[&bias, &c],
        Epilogue::GeluBackward | Epilogue::Residual => &[&c],
    };
    Case::new(Op::Matmul { layout, epilogue }, &[&[&a[..], &b[..]], more].concat())
}

fn matmuls() -> Vec<Case> {
    use Epilogue::{Bias, BiasGelu, BiasResidual, GeluBackward, None, Residual};
    let mut list = Vec::new();
    for layout in LAYOUTS {
        for epilogue in [None, Bias, BiasGelu, BiasResidual, GeluBackward, Residual] {
            // Tiles are 64 or 8 rows, 64 columns, 16 or 4 of K; the last two sizes run the kernels for multiples of 4.
            for size in [[1, 1, 1], [7, 5, 3], [65, 129, 17], [4, 4, 4], [68, 132, 20]] {
                list.push(matmul(layout, epilogue, size));
            }
        }
        for size in [[67, 1, 13], [1, 67, 3], [2, 3, 131], [64, 64, 16], [63, 127, 33], [256, 192, 128]] {
            list.push(matmul(layout, None, size));
        }
        // Few rows, which have kernels of their own.
        for size in [[1, 132, 68], [2, 67, 257], [3, 64, 36], [5, 36, 64], [11, 35, 67], [16, 132, 20]] {
            list.push(matmul(layout, None, size));
        }
    }
    for (layout, epilogue) in [(Layout::NN, BiasGelu), (Layout::NN, BiasResidual), (Layout::NT, GeluBackward)]
    {
        list.push(matmul(layout, epilogue, [128, 192, 96]));
    }
    for size in [[1, 1, 1], [7, 5, 3], [65, 129, 17], [68, 132, 20], [192, 128, 256]] {
        list.push(matmul(Layout::TN, None, size).accumulated());
    }
    let op = Op::Matmul { layout: Layout::NT, epilogue: None };
    list.push(Case::new(op, &[&[3, 11, 24], &[1003, 24]]));
    list
}

/// Weights packed as bf16: odd numbers of elements and of columns, where rows begin in the middle of a word.
fn packed_weights() -> Vec<Case> {
    use Epilogue::{Bias, BiasGelu, BiasResidual, None, Residual};
    let mut list = Vec::new();
    for layout in [Layout::NN, Layout::NT] {
        for size in [
            [1, 1, 1],
            [7, 5, 3],
            [65, 129, 17],
            [63, 127, 33],
            [68, 132, 20],
            [256, 192, 128],
            [1, 132, 68],
            [2, 67, 257],
            [3, 64, 36],
            [5, 36, 64],
            [11, 35, 67],
            [16, 132, 20],
        ] {
            list.push(matmul(layout, None, size).packed());
        }
        for epilogue in [Bias, BiasGelu, BiasResidual, Residual] {
            list.push(matmul(layout, epilogue, [65, 129, 17]).packed());
            list.push(matmul(layout, epilogue, [68, 132, 20]).packed());
        }
    }
    for [b, t, v, c, p] in [[1, 1, 1, 1, 1], [2, 7, 5, 3, 7], [3, 33, 1003, 65, 64], [4, 130, 257, 64, 130]] {
        list.push(Case::new(Op::Embedding, &[&[b, t], &[v, c], &[p, c]]).packed());
        list.push(Case::new(Op::Gather, &[&[b, t], &[v, c]]).packed());
    }
    list
}

fn elementwise() -> Vec<Case> {
    let gelu = Activation::GeluTanh;
    let mut list = Vec::new();
    for shape in [&[1][..], &[63], &[65], &[7, 131], &[2, 130, 64]] {
        list.push(Case::new(Op::Add, &[shape, shape]));
        list.push(Case::new(Op::Scale { factor: -0.3 }, &[shape]));
        for amplitude in [1.0, 30.0] {
            list.push(Case::new(Op::SwiGlu, &[shape, shape]).amplified(amplitude));
            list.push(Case::new(Op::SwiGluBackward, &[shape, shape, shape]).amplified(amplitude));
        }
        // Far left gelu is nothing but rounding; a single element may lie there.
        let amplitudes: &[f64] = if shape == [1] { &[1.0] } else { &[1.0, 30.0] };
        for &amplitude in amplitudes {
            list.push(Case::new(Op::Activate(gelu), &[shape]).amplified(amplitude));
            list.push(Case::new(Op::ActivateBackward(gelu), &[shape, shape]).amplified(amplitude));
        }
    }
    for [rows, columns] in [[1, 1], [7, 3], [65, 1], [33, 67], [260, 64]] {
        list.push(Case::new(Op::AddBias, &[&[rows, columns], &[columns]]));
    }
    // Blocks are 32 rows, and more beyond 32768.
    for [rows, columns] in [[1, 1], [31, 5], [32, 64], [33, 65], [1000, 7], [40000, 3], [256, 192]] {
        list.push(Case::new(Op::ColumnSum, &[&[rows, columns]]));
        list.push(Case::new(Op::ColumnSum, &[&[rows, columns]]).accumulated());
    }
    list
}

/// Ops that reduce rows. Two columns are left out for the backward pass: there the exact result is nearly 0.
fn rows() -> Vec<Case> {
    let epsilon = 1e-5;
    let mut list = Vec::new();
    for [m, c] in [[1, 1], [1, 3], [7, 5], [63, 65], [130, 100], [5, 1003], [256, 192]] {
        let (x, gain, statistics) = ([m, c], [c], [m, 2]);
        for amplitude in [1.0, 100.0] {
            list.push(Case::new(Op::LayerNorm { epsilon }, &[&x, &gain, &gain]).amplified(amplitude));
        }
        for residual in [false, true] {
            let more: &[&[usize]] = if residual { &[&x] } else { &[] };
            let arguments = [&[&x[..], &x[..], &gain[..], &statistics[..]], more].concat();
            list.push(Case::new(Op::LayerNormBackward { residual }, &arguments));
        }
    }
    // Heads side by side in a row: their number, and the size of each. Rows of one or two elements are left out, where
    // the exact result of the backward pass is nearly 0.
    for [m, heads, c] in [
        [1, 1, 3],
        [7, 1, 5],
        [63, 1, 65],
        [130, 1, 100],
        [5, 1, 1003],
        [256, 1, 192],
        [7, 3, 5],
        [33, 9, 80],
    ] {
        let (x, gain, statistics) = ([m, heads * c], [c], [m * heads]);
        for amplitude in [1.0, 100.0] {
            let epsilon = 1e-6;
            list.push(Case::new(Op::RmsNorm { epsilon }, &[&x, &gain]).amplified(amplitude));
        }
        for residual in [false, true] {
            let more: &[&[usize]] = if residual { &[&x] } else { &[] };
            let arguments = [&[&x[..], &x[..], &gain[..], &statistics[..]], more].concat();
            list.push(Case::new(Op::RmsNormBackward { residual }, &arguments));
        }
        let case = Case::new(Op::RmsNormWeightBackward, &[&x, &x, &statistics]);
        list.extend([case.clone(), case.accumulated()]);
    }
    list.push(Case::new(Op::RmsNormWeightBackward, &[&[40000, 3], &[40000, 3], &[40000]]).accumulated());
    for [m, c] in [[1, 3], [31, 5], [33, 65], [130, 100], [40000, 3], [256, 192]] {
        let case = Case::new(Op::LayerNormWeightBackward, &[&[m, c], &[m, c], &[m, 2]]);
        list.extend([case.clone(), case.accumulated()]);
    }
    for [rows, vocabulary] in [[1, 1], [7, 2], [33, 65], [5, 1003], [130, 257], [4, 50257]] {
        let op = Op::CrossEntropy { scale: 1.0 / rows as f32 };
        for amplitude in [1.0, 20.0] {
            list.push(Case::new(op.clone(), &[&[rows, vocabulary], &[rows]]).amplified(amplitude));
        }
    }
    list
}

fn embeddings() -> Vec<Case> {
    let mut list = Vec::new();
    for [b, t, v, c, p] in [[1, 1, 1, 1, 1], [2, 7, 5, 3, 7], [3, 33, 1003, 65, 64], [4, 130, 257, 64, 130]] {
        list.push(Case::new(Op::Embedding, &[&[b, t], &[v, c], &[p, c]]));
        list.push(Case::new(Op::Gather, &[&[b, t], &[v, c]]));
        let rows = b * t;
        let op = Op::EmbeddingBackward { vocabulary: v };
        list.push(Case::new(op, &[&[b, t, c], &[rows.min(v), 3], &[rows]]).accumulated());
        list.push(Case::new(Op::PositionBackward { context: p }, &[&[b, t, c]]).accumulated());
    }
    list
}

fn attentions() -> Vec<Case> {
    let mut list = Vec::new();
    let mut grouped = |[b, t, heads, kv_heads, size]: [usize; 5], amplitude: f64| {
        let (qkv, o, lse) = ([b, t, (heads + 2 * kv_heads) * size], [b, t, heads * size], [b, heads, t]);
        list.push(Case::new(Op::Attention { heads, kv_heads }, &[&qkv]).amplified(amplitude));
        let backward = Op::AttentionBackward { heads, kv_heads };
        list.push(Case::new(backward, &[&o, &qkv, &o, &lse]).amplified(amplitude));
    };
    for size in [3, 64, 80] {
        grouped([2, 7, 6, 2, size], 1.0);
        grouped([1, 33, 9, 3, size], 1.0);
    }
    grouped([2, 70, 4, 1, 16], 1.0);
    let mut add = |[b, t, heads, size]: [usize; 4], amplitude| grouped([b, t, heads, heads, size], amplitude);
    // A workgroup has 8 queries; blocks of keys are 32 or 128, columns of a workgroup 64 or 256.
    for size in [1, 3, 16, 50, 64, 80, 128] {
        add([2, 7, 3, size], 1.0);
        add([1, 33, 2, size], 1.0);
    }
    for size in [3, 64] {
        add([1, 1, 2, size], 1.0);
        add([1, 8, 1, size], 1.0);
    }
    // Several blocks for every one of the 8 queries, and columns in both halves of a lane's 8.
    for size in [7, 8] {
        add([1, 167, 2, size], 1.0);
    }
    add([1, 9, 1, 259], 1.0);
    add([1, 9, 1, 260], 1.0);
    add([2, 130, 4, 32], 1.0);
    add([1, 130, 1, 16], 6.0);
    list
}

fn rotations() -> Vec<Case> {
    let mut list = Vec::new();
    for [b, t, heads, kv_heads, size, context] in
        [[1, 1, 1, 1, 2, 1], [2, 7, 3, 1, 6, 9], [1, 33, 9, 3, 80, 64], [2, 130, 4, 4, 64, 130]]
    {
        let part = |heads: usize| [b, t, heads * size];
        let (q, k, qkv, table, at) =
            (part(heads), part(kv_heads), part(heads + 2 * kv_heads), [context, size], [b, t]);
        for positions in [false, true] {
            let more: &[&[usize]] = if positions { &[&at] } else { &[] };
            let forward = [&[&q[..], &k, &k, &table], more].concat();
            list.push(Case::new(Op::Rope { heads, kv_heads, positions }, &forward));
            let backward = [&[&qkv[..], &table], more].concat();
            list.push(Case::new(Op::RopeBackward { heads, kv_heads, positions }, &backward));
        }
    }
    list
}

/// New tokens after some that are in the cache, which is full in the end or not.
fn caches() -> Vec<Case> {
    let mut list = Vec::new();
    for [b, t, heads, kv_heads, size, capacity] in [
        [1, 1, 1, 1, 3, 1],
        [2, 1, 9, 3, 80, 40],
        [3, 1, 4, 4, 64, 300],
        [2, 5, 6, 2, 7, 33],
        [1, 33, 9, 3, 64, 167],
        [1, 16, 8, 1, 16, 16],
        [2, 9, 3, 3, 260, 20],
    ] {
        let shapes = [[b, t, (heads + 2 * kv_heads) * size], [b, capacity, 2 * kv_heads * size]];
        let op = Op::AttentionCached { heads, kv_heads };
        list.push(Case::new(op, &[&shapes[0], &[b, t], &shapes[1]]));
    }
    list
}

/// The content of an argument: 32-bit floats or whole numbers, held as f64.
pub struct Argument {
    /// Elements.
    pub values: Vec<f64>,
    dtype: DType,
}

impl Argument {
    fn floats(values: impl IntoIterator<Item = f64>) -> Argument {
        // Rounded here, so that the reference starts from what the device gets.
        Argument { values: values.into_iter().map(|v| v as f32 as f64).collect(), dtype: DType::F32 }
    }

    /// As numbers that bf16 has, held in this type.
    fn rounded(self, dtype: DType) -> Argument {
        let round = |v: f64| packed::widen(packed::round(v as f32)) as f64;
        Argument { values: self.values.into_iter().map(round).collect(), dtype }
    }

    fn whole(values: &[u32]) -> Argument {
        Argument { values: values.iter().map(|&v| v as f64).collect(), dtype: DType::U32 }
    }

    /// The 32-bit words that a device gets.
    pub(super) fn words(&self) -> Vec<u32> {
        let values = self.values.iter();
        match self.dtype {
            DType::F32 => values.map(|&v| (v as f32).to_bits()).collect(),
            DType::U32 => values.map(|&v| v as u32).collect(),
            DType::BF16 => packed::words(&values.map(|&v| packed::round(v as f32)).collect::<Vec<_>>()),
        }
    }
}

/// `n` numbers between -√3 and √3: mean 0, variance 1.
fn numbers(stream: usize, n: usize) -> impl Iterator<Item = f64> {
    let words = (0..n.div_ceil(4) as u32).flat_map(move |i| philox([i, stream as u32, 0, 0], [0x5e, 0]));
    words.take(n).map(|word| (word as f64 / 2_147_483_648.0 - 1.0) * 3f64.sqrt())
}

/// `n` token ids below `vocabulary`, some more often than others.
fn tokens(n: usize, vocabulary: usize) -> Vec<u32> {
    let squared = |x: f64| (x / 3f64.sqrt()).powi(2);
    numbers(99, n).map(|x| (squared(x) * vocabulary as f64) as u32 % vocabulary as u32).collect()
}

/// What the gradient of parameter `index` holds before a case adds to it.
pub(super) fn gradient_start(index: usize, n: usize) -> Argument {
    Argument::floats(numbers(50 + index, n))
}

/// Arguments of a case, the same on every machine. What another op would have made (statistics, lse, segments) is made
/// by that op.
pub fn arguments(case: &Case) -> Vec<Argument> {
    let shapes: Vec<&[usize]> = case.shapes.iter().map(Vec::as_slice).collect();
    let length = |i: usize| shapes[i].iter().product::<usize>();
    let mut list: Vec<Argument> = (0..shapes.len())
        .map(|i| {
            let large = if amplified(&case.op) == Some(i) { case.amplitude } else { 1.0 };
            Argument::floats(numbers(i, length(i)).map(|x| large * x))
        })
        .collect();
    let whole = (0..shapes.len()).find(|&i| case.dtype(i) == DType::U32);
    match (&case.op, whole) {
        (Op::EmbeddingBackward { vocabulary }, _) => {
            let (segments, order) = sort_rows(&tokens(length(2), *vocabulary), *vocabulary);
            list[1] = Argument::whole(&segments);
            list[2] = Argument::whole(&order);
        }
        (Op::Embedding | Op::Gather, Some(i)) => list[i] = Argument::whole(&tokens(length(i), shapes[1][0])),
        (Op::CrossEntropy { .. }, Some(i)) => {
            let vocabulary = length(0) / length(i);
            // One past the vocabulary, which does not count, among them.
            list[i] = Argument::whole(&tokens(length(i), vocabulary + 1));
        }
        (Op::Rope { .. } | Op::RopeBackward { .. }, Some(i)) => {
            let table = if let Op::Rope { .. } = case.op { 3 } else { 1 };
            list[i] = Argument::whole(&positions(shapes[i], shapes[table][0]));
        }
        (Op::AttentionCached { .. }, Some(i)) => {
            list[i] = Argument::whole(&positions(shapes[i], shapes[2][1]));
        }
        (Op::LayerNorm { .. }, _) => shift(&mut list[0], case.amplitude),
        (Op::LayerNormBackward { .. } | Op::LayerNormWeightBackward, _) => {
            shift(&mut list[1], case.amplitude);
            let c = [shapes[1][shapes[1].len() - 1]];
            let ones = vec![1.0; c[0]];
            let forward = Op::LayerNorm { epsilon: 1e-5 };
            let made = reference::apply(&forward, &[shapes[1], &c, &c], &[&list[1].values, &ones, &ones]);
            let statistics = if let Op::LayerNormWeightBackward = case.op { 2 } else { 3 };
            list[statistics] = Argument::floats(made[1].iter().copied());
        }
        (Op::RmsNormBackward { .. } | Op::RmsNormWeightBackward, _) => {
            let weight = matches!(case.op, Op::RmsNormWeightBackward);
            let statistics = if weight { 2 } else { 3 };
            let c = length(1) / length(statistics);
            let forward = Op::RmsNorm { epsilon: 1e-6 };
            let made = reference::apply(&forward, &[shapes[1], &[c]], &[&list[1].values, &vec![1.0; c]]);
            list[statistics] = Argument::floats(made[1].iter().copied());
        }
        (&Op::AttentionBackward { heads, kv_heads }, _) => {
            let forward = Op::Attention { heads, kv_heads };
            let made = reference::apply(&forward, &shapes[1..2], &[&list[1].values]);
            list[2] = Argument::floats(made[0].iter().copied());
            list[3] = Argument::floats(made[1].iter().copied());
        }
        _ => {}
    }
    if case.rounded {
        let rounded = |(i, argument): (usize, Argument)| match case.op.reads_packed(i) {
            true => argument.rounded(case.dtype(i)),
            false => argument,
        };
        list = list.into_iter().enumerate().map(rounded).collect();
    }
    list
}

/// Consecutive positions (B,T) in a context, of which the last sequence reaches the end and the others less far.
fn positions(shape: &[usize], context: usize) -> Vec<u32> {
    let (batch, tokens) = (shape[0], shape[1]);
    let start = |b: usize| (context - tokens) * (b + 1) / batch;
    (0..batch).flat_map(|b| (0..tokens).map(move |t| (start(b) + t) as u32)).collect()
}

/// A mean other than 0, which the norm must take away.
fn shift(x: &mut Argument, amplitude: f64) {
    *x = Argument::floats(x.values.iter().map(|v| v + 3.0 * amplitude));
}

/// The argument that a case's amplitude is about.
fn amplified(op: &Op) -> Option<usize> {
    match op {
        Op::LayerNorm { .. }
        | Op::RmsNorm { .. }
        | Op::Activate(_)
        | Op::SwiGlu
        | Op::Attention { .. }
        | Op::CrossEntropy { .. } => Some(0),
        Op::LayerNormBackward { .. }
        | Op::ActivateBackward(_)
        | Op::SwiGluBackward
        | Op::AttentionBackward { .. } => Some(1),
        _ => None,
    }
}
