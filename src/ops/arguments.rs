//! What the cases of [`verify`](super::verify) are run on: numbers that are the same on every machine, and belong together
//! where one argument follows from another.

use super::cases::Case;
use super::{packed, sort_rows};
use crate::graph::{DType, Op};
use crate::model::init::philox;
use crate::reference;

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
        (Op::Embedding { .. } | Op::Gather, Some(i)) => {
            // One past the table, whose row is zeros, among them.
            list[i] = Argument::whole(&tokens(length(i), shapes[1][0] + 1));
            if let Op::Embedding { places: true } = case.op {
                list[3] = Argument::whole(&tokens(length(3), shapes[2][0]));
            }
        }
        (Op::CrossEntropy { .. }, Some(i)) => {
            let vocabulary = length(0) / length(i);
            // One past the vocabulary, which does not count, among them.
            list[i] = Argument::whole(&tokens(length(i), vocabulary + 1));
        }
        (Op::LogitStatistics { first, .. }, Some(i)) => {
            // Some before the part, and some after it.
            list[i] = Argument::whole(&tokens(length(i), first + 2 * length(0) / length(i)));
        }
        (&Op::CrossEntropyPart { first, vocabulary, .. }, Some(i)) => {
            list[i] = Argument::whole(&tokens(length(i), vocabulary + 1));
            let members = shapes[2][0];
            // The own part's in the first place; in the others those of other logits.
            let mut statistics = vec![0.0; length(2)];
            for member in 0..members {
                let logits: Vec<f64> = numbers(60 + member, length(0)).map(|x| case.amplitude * x).collect();
                let logits = if member == 0 { &list[0].values } else { &logits };
                let first = if member == 0 { first } else { vocabulary };
                let op = Op::LogitStatistics { member, members, first };
                let made = reference::apply(&op, &shapes[..2], &[logits, &list[1].values]);
                statistics.iter_mut().zip(&made[0]).for_each(|(sum, x)| *sum += x);
            }
            list[2] = Argument::floats(statistics);
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
        (Op::Attention { .. }, Some(i)) => list[i] = Argument::whole(&starts(shapes[i])),
        (&Op::AttentionBackward { heads, kv_heads, starts: restricted }, _) => {
            let forward = Op::Attention { heads, kv_heads, starts: restricted };
            if restricted {
                list[4] = Argument::whole(&starts(shapes[4]));
            }
            let more = list[4..].iter().map(|starts| &starts.values[..]);
            let inputs: Vec<&[f64]> = std::iter::once(&list[1].values[..]).chain(more).collect();
            let shapes: Vec<&[usize]> = [&shapes[1..2], &shapes[4..]].concat();
            let made = reference::apply(&forward, &shapes, &inputs);
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

/// Where the texts begin that share sequences (B,T), for each token: texts of 1, 4, 9, .. tokens, a fifth or more of a
/// sequence long from the second sequence on.
fn starts(shape: &[usize]) -> Vec<u32> {
    let (batch, tokens) = (shape[0], shape[1]);
    let mut starts = Vec::with_capacity(batch * tokens);
    for sequence in 0..batch {
        let (mut start, mut number) = (0, 1);
        while start < tokens {
            let length = (number * number).max(sequence * tokens / 5).min(tokens - start);
            starts.extend(std::iter::repeat_n(start as u32, length));
            (start, number) = (start + length, number + 1);
        }
    }
    starts
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
        | Op::CrossEntropy { .. }
        | Op::LogitStatistics { .. }
        | Op::CrossEntropyPart { .. } => Some(0),
        Op::LayerNormBackward { .. }
        | Op::ActivateBackward(_)
        | Op::SwiGluBackward
        | Op::AttentionBackward { .. } => Some(1),
        _ => None,
    }
}
