//! What [`verify`](super::verify) runs: every op on sizes that are odd in every way a kernel can get wrong, and on one
//! that is usual in training.

use crate::graph::{Activation, DType, Epilogue, Layout, Op};

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
            (Op::Embedding { .. } | Op::Gather, 0)
            | (Op::Embedding { .. }, 3)
            | (Op::Attention { .. }, 1)
            | (Op::AttentionBackward { .. }, 4)
            | (Op::EmbeddingBackward { .. }, 1 | 2)
            | (Op::CrossEntropy { .. } | Op::AttentionCached { .. }, 1)
            | (Op::LogitStatistics { .. } | Op::CrossEntropyPart { .. }, 1)
            | (Op::Rope { .. }, 4)
            | (Op::RopeBackward { .. }, 2) => DType::U32,
            _ if self.packed && self.op.reads_packed(argument) => DType::BF16,
            _ => DType::F32,
        }
    }

    /// The argument that is a gradient in a backward pass: of matmuls alone, which care.
    pub fn gradient(&self) -> Option<usize> {
        let Op::Matmul { layout, epilogue } = self.op else { return None };
        match (layout, epilogue) {
            // Both orders occur: of weights that are (in, out) and of those that are (out, in).
            (Layout::TN, _) => Some(usize::from(self.accumulate)).filter(|_| !self.packed),
            (_, Epilogue::None | Epilogue::GeluBackward) => Some(0),
            _ => None,
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
        // Tiles are 64 or 128 rows and columns (8 rows on software adapters), 16 or 4 of K; the last two sizes run the kernels for
        // multiples of 4.
        for size in [[1, 1, 1], [7, 5, 3], [65, 129, 17], [4, 4, 4], [68, 132, 20]] {
            list.push(matmul(layout, None, size));
        }
        // Every way of finishing is the same code for every layout and tile, and some drivers compile for seconds: NN has all, in
        // one tile.
        let epilogues: &[Epilogue] = match layout {
            Layout::NN => &[Bias, BiasGelu, BiasResidual, GeluBackward, Residual],
            Layout::NT => &[GeluBackward],
            Layout::TN => &[],
        };
        for &epilogue in epilogues {
            for size in [[1, 1, 1], [7, 5, 3], [61, 63, 17], [4, 4, 4], [64, 60, 20]] {
                list.push(matmul(layout, epilogue, size));
            }
        }
        // Tiles of 128 x 16 and 16 x 128, and K so long that it is split, in slices of which the last is shorter.
        for size in [
            [67, 15, 33],
            [13, 67, 35],
            [136, 16, 36],
            [16, 136, 20],
            [65, 70, 533],
            [68, 72, 776],
            [9, 12, 1028],
        ] {
            list.push(matmul(layout, None, size));
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
        list.push(matmul(layout, epilogue, [67, 69, 519]));
    }
    for size in
        [[1, 1, 1], [7, 5, 3], [65, 129, 17], [68, 132, 20], [192, 128, 256], [66, 71, 517], [68, 72, 1044]]
    {
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
        let epilogues: &[Epilogue] =
            if layout == Layout::NN { &[Bias, BiasGelu, BiasResidual, Residual] } else { &[Bias] };
        for &epilogue in epilogues {
            list.push(matmul(layout, epilogue, [61, 63, 17]).packed());
            list.push(matmul(layout, epilogue, [64, 60, 20]).packed());
        }
    }
    for [b, t, v, c, p] in [[1, 1, 1, 1, 1], [2, 7, 5, 3, 7], [3, 33, 1003, 65, 64], [4, 130, 257, 64, 130]] {
        list.push(Case::new(Op::Embedding { places: false }, &[&[b, t], &[v, c], &[p, c]]).packed());
        list.push(Case::new(Op::Embedding { places: true }, &[&[b, t], &[v, c], &[p, c], &[b, t]]).packed());
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
    // Cards keep up to 2048 columns of a row in registers, or 8192 in vectors of four.
    let long = [[3, 2048], [2, 2051], [2, 4100], [2, 8300]];
    for [m, c] in
        [[1, 1], [1, 3], [7, 5], [63, 65], [130, 100], [5, 1003], [256, 192]].into_iter().chain(long)
    {
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
    ]
    .into_iter()
    .chain(long.map(|[m, c]| [m, 1, c]))
    {
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
    // A vocabulary in three parts: the columns of one of them, and its first token.
    for [rows, columns, member, first] in [[1, 1, 0, 0], [7, 2, 2, 9], [33, 65, 1, 70], [130, 257, 0, 0]] {
        let (logits, targets, statistics) = ([rows, columns], [rows], [3, rows, 3]);
        for amplitude in [1.0, 20.0] {
            let op = Op::LogitStatistics { member, members: 3, first };
            list.push(Case::new(op, &[&logits, &targets]).amplified(amplitude));
            let op =
                Op::CrossEntropyPart { scale: 1.0 / rows as f32, first, vocabulary: first + columns + 40 };
            list.push(Case::new(op, &[&logits, &targets, &statistics]).amplified(amplitude));
        }
    }
    list
}

fn embeddings() -> Vec<Case> {
    let mut list = Vec::new();
    for [b, t, v, c, p] in [[1, 1, 1, 1, 1], [2, 7, 5, 3, 7], [3, 33, 1003, 65, 64], [4, 130, 257, 64, 130]] {
        list.push(Case::new(Op::Embedding { places: false }, &[&[b, t], &[v, c], &[p, c]]));
        list.push(Case::new(Op::Embedding { places: true }, &[&[b, t], &[v, c], &[p, c], &[b, t]]));
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
        for starts in [false, true] {
            let more: &[&[usize]] = if starts { &[&[b, t]] } else { &[] };
            let forward = Op::Attention { heads, kv_heads, starts };
            list.push(Case::new(forward, &[&[&qkv[..]], more].concat()).amplified(amplitude));
            let backward = Op::AttentionBackward { heads, kv_heads, starts };
            list.push(Case::new(backward, &[&[&o[..], &qkv, &o, &lse], more].concat()).amplified(amplitude));
        }
    };
    for size in [3, 64, 80] {
        grouped([2, 7, 6, 2, size], 1.0);
        grouped([1, 33, 9, 3, size], 1.0);
    }
    grouped([2, 70, 4, 1, 16], 1.0);
    let mut add = |[b, t, heads, size]: [usize; 4], amplitude| grouped([b, t, heads, heads, size], amplitude);
    // A workgroup has 16, 32 or 64 queries and up to 128 columns of the head, blocks have 32 keys; on software adapters it has 8
    // queries, blocks of 32, columns of 32 or 64.
    for size in [1, 3, 16, 50, 64, 80, 128] {
        add([2, 7, 3, size], 1.0);
        add([1, 33, 2, size], 1.0);
    }
    for size in [3, 64] {
        add([1, 1, 2, size], 1.0);
        add([1, 8, 1, size], 1.0);
    }
    // Several workgroups of each form, with heads that share keys.
    grouped([1, 130, 2, 1, 64], 1.0);
    grouped([1, 70, 3, 1, 100], 1.0);
    let mut add = |[b, t, heads, size]: [usize; 4], amplitude| grouped([b, t, heads, heads, size], amplitude);
    add([1, 65, 1, 136], 1.0);
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
