//! Times for a shape that nobody has measured, from shapes of the same model that somebody has: if those follow a law,
//! and lie around it.
//!
//! Matrix products take a time in proportion to tokens, attention in proportion to tokens times the sequence, and some of
//! the time does not depend on either. Simple laws are tried first, because they need fewer points to be believed. Between
//! two sequences of which one is at most twice the other no law is needed: a power of the sequence through both is within
//! 2 % of any sum of such terms.

use std::collections::BTreeMap;

use super::noise::beside;
use crate::model::{KINDS, OF_BLOCK};
use crate::plan::{Evidence, LayerProfile, ShapeProfile};

/// How far off the points a law may be, as a part of a step: about what two measurements of the same differ by.
const TOLERANCE: f64 = 0.04;
/// How many times as long as the one below the sequence above may be.
const DOUBLING: usize = 2;
/// The most that a step can grow by with the sequence, as a power of it: attention's square, and a little for measurements.
const STEEPEST: f64 = 2.2;
/// Terms of the law with most of them.
const TERMS: usize = 3;

/// Times that are known for one shape of microbatch.
#[derive(Debug, Clone)]
pub(super) struct Point {
    pub(super) extents: Extents,
    pub(super) shape: ShapeProfile,
}

/// Sequences of a microbatch, and tokens of a sequence.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Extents {
    pub(super) sequences: usize,
    pub(super) sequence: usize,
}

impl Extents {
    fn tokens(self) -> f64 {
        (self.sequences * self.sequence) as f64
    }

    /// What a law's times are sums of: in proportion to tokens; and a constant; and what grows with the sequence.
    fn terms(self, count: usize) -> [f64; TERMS] {
        let all = [self.tokens(), 1.0, self.tokens() * self.sequence as f64];
        std::array::from_fn(|term| if term < count { all[term] } else { 0.0 })
    }
}

/// Times for these extents, of a model of so many blocks; none if the points do not lie around them or follow no law. The
/// evidence says that no step was seen.
pub(super) fn priced(points: &[Point], wanted: Extents, blocks: usize) -> Option<ShapeProfile> {
    let is_among = |of: &dyn Fn(Extents) -> f64| {
        let is_over = points.iter().any(|point| of(point.extents) <= of(wanted));
        is_over && points.iter().any(|point| of(point.extents) >= of(wanted))
    };
    if !is_among(&Extents::tokens) || !is_among(&|extents| extents.sequence as f64) {
        return None;
    }
    let known: Vec<Vec<f64>> = points.iter().map(|point| values(&point.shape)).collect::<Option<_>>()?;
    let steps: Vec<f64> = known.iter().map(|values| step(values, blocks, &|value| value)).collect();
    if steps.iter().any(|&seconds| seconds <= 0.0) {
        return None;
    }
    for count in 1..=TERMS.min(points.len() - 1) {
        let rows = || points.iter().map(|point| point.extents.terms(count));
        let fit = |value: usize| {
            let equations = rows().zip(&known).zip(&steps).map(|((terms, values), &step)| {
                // Errors count as parts of a step.
                (terms.map(|term| term / step), values[value] / step)
            });
            solve(equations, count)
        };
        let Some(laws) = (0..known[0].len()).map(fit).collect::<Option<Vec<[f64; TERMS]>>>() else {
            continue;
        };
        let at = |terms: [f64; TERMS]| -> Vec<f64> {
            let sum =
                |law: &[f64; TERMS]| law.iter().zip(terms).map(|(factor, term)| factor * term).sum::<f64>();
            laws.iter().map(|law| sum(law).max(0.0)).collect()
        };
        let off = rows().zip(&known).zip(&steps).map(|((terms, known), step_seconds)| {
            let off: Vec<f64> = at(terms).iter().zip(known).map(|(law, known)| law - known).collect();
            (step(&off, blocks, &f64::abs) / step_seconds).powi(2)
        });
        let off = (off.sum::<f64>() / (points.len() - count) as f64).sqrt();
        if off <= TOLERANCE {
            return Some(shape(&at(wanted.terms(count)), evidence(points, off)));
        }
    }
    between(points, &known, &steps, wanted)
}

/// Times between those of the next shorter and the next longer sequence, for as many sequences.
fn between(points: &[Point], known: &[Vec<f64>], steps: &[f64], wanted: Extents) -> Option<ShapeProfile> {
    let length = |&at: &usize| points[at].extents.sequence;
    let alike = || (0..points.len()).filter(|&at| points[at].extents.sequences == wanted.sequences);
    let below = alike().filter(|at| length(at) <= wanted.sequence).max_by_key(length)?;
    let above = alike().filter(|at| length(at) >= wanted.sequence).min_by_key(length)?;
    let (low, high) = (length(&below), length(&above));
    if low == high || high > DOUBLING * low {
        return None;
    }
    let ratio = |of: usize| (of as f64 / low as f64).ln();
    let power = (steps[above] / steps[below]).ln() / ratio(high);
    if !(0.0..=STEEPEST).contains(&power) {
        return None;
    }
    let part = ratio(wanted.sequence) / ratio(high);
    let at = |(&low, &high): (&f64, &f64)| match low > 0.0 && high > 0.0 {
        true => low * (high / low).powf(part),
        // Too short to be seen in one of them.
        false => low + part * (high - low),
    };
    let values: Vec<f64> = known[below].iter().zip(&known[above]).map(at).collect();
    let both = [points[below].clone(), points[above].clone()];
    Some(shape(&values, evidence(&both, 0.0)))
}

/// Times of one kind of layer.
const TIMES: usize = 4;

/// All times of a shape: F, I, W, B of each of [`KINDS`], nothing for one that the model does not have, then what an action
/// costs beside them.
fn values(shape: &ShapeProfile) -> Option<Vec<f64>> {
    let mut values = Vec::new();
    for kind in KINDS {
        values.extend(shape.layers.get(kind).copied().unwrap_or_default().times());
    }
    values.push(shape.submit_us?);
    Some(values)
}

fn shape(values: &[f64], measured: Evidence) -> ShapeProfile {
    let layer = |times: &[f64]| LayerProfile {
        forward: times[0],
        input: times[1],
        weight: times[2],
        backward: Some(times[3]),
    };
    let layers = KINDS.iter().zip(values.chunks(TIMES)).map(|(kind, times)| (kind.to_string(), layer(times)));
    ShapeProfile {
        shape: String::new(),
        submit_us: values.last().copied(),
        measured: Some(measured),
        layers: layers.collect::<BTreeMap<_, _>>(),
    }
}

/// F, I and W of all layers of a model of so many blocks.
fn step(values: &[f64], blocks: usize, of: &dyn Fn(f64) -> f64) -> f64 {
    let count = |kind: usize| if OF_BLOCK.contains(&kind) { blocks as f64 } else { 1.0 };
    let kinds = values.chunks_exact(TIMES).enumerate();
    kinds.map(|(kind, times)| count(kind) * times[..3].iter().map(|&time| of(time)).sum::<f64>()).sum()
}

/// What all of them rest on: no step of this shape, the newest moment, the loudest noise.
fn evidence(points: &[Point], off: f64) -> Evidence {
    let known = || points.iter().filter_map(|point| point.shape.measured);
    Evidence {
        unix_seconds: known().map(|evidence| evidence.unix_seconds).max().unwrap_or_default(),
        steps: 0,
        spread: off,
        others: points.iter().filter_map(|point| beside(point.shape.measured)).reduce(f64::max),
        trained: false,
    }
}

/// The factors of `count` terms that come nearest to the values, by least squares; none where the points do not tell them
/// apart.
fn solve(equations: impl Iterator<Item = ([f64; TERMS], f64)> + Clone, count: usize) -> Option<[f64; TERMS]> {
    // Terms differ by orders of magnitude.
    let largest: [f64; TERMS] =
        std::array::from_fn(|term| equations.clone().map(|(terms, _)| terms[term].abs()).fold(0.0, f64::max));
    let mut rows = [[0.0; TERMS + 1]; TERMS];
    for (terms, value) in equations {
        let terms: [f64; TERMS] =
            std::array::from_fn(|term| terms[term] / largest[term].max(f64::MIN_POSITIVE));
        for (row, factor) in rows.iter_mut().zip(terms) {
            terms.iter().chain([&value]).zip(row).for_each(|(term, sum)| *sum += factor * term);
        }
    }
    for pivot in 0..count {
        let best = (pivot..count).max_by(|&a, &b| rows[a][pivot].abs().total_cmp(&rows[b][pivot].abs()))?;
        rows.swap(pivot, best);
        if rows[pivot][pivot].abs() < 1e-9 {
            return None;
        }
        let top = rows[pivot];
        for (_, row) in rows.iter_mut().enumerate().filter(|(row, _)| *row != pivot) {
            let factor = row[pivot] / top[pivot];
            row.iter_mut().zip(top).for_each(|(value, top)| *value -= factor * top);
        }
    }
    Some(std::array::from_fn(|term| match term < count {
        true => rows[term][TERMS] / rows[term][term] / largest[term].max(f64::MIN_POSITIVE),
        false => 0.0,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extents(sequences: usize, sequence: usize) -> Extents {
        Extents { sequences, sequence }
    }

    /// A point at which every time is a multiple of what `law` says for tokens and sequence.
    fn point(sequences: usize, sequence: usize, law: impl Fn(f64, f64) -> f64) -> Point {
        let extents = extents(sequences, sequence);
        let seconds = 1e-6 * law(extents.tokens(), sequence as f64);
        let layer = |part: f64| LayerProfile {
            forward: part * seconds,
            input: 1.1 * part * seconds,
            weight: 0.9 * part * seconds,
            backward: Some(2.0 * part * seconds),
        };
        let layers =
            KINDS.iter().zip([0.01, 0.6, 0.4, 2.0]).map(|(kind, part)| (kind.to_string(), layer(part)));
        let measured = Evidence { unix_seconds: 7, steps: 20, others: Some(0.01), ..Evidence::default() };
        let shape = ShapeProfile {
            shape: "known".into(),
            submit_us: Some(100.0),
            measured: Some(measured),
            layers: layers.collect(),
        };
        Point { extents, shape }
    }

    fn points(list: &[(usize, usize)], law: impl Fn(f64, f64) -> f64 + Copy) -> Vec<Point> {
        list.iter().map(|&(sequences, sequence)| point(sequences, sequence, law)).collect()
    }

    fn forward(shape: &ShapeProfile) -> f64 {
        1e6 * (shape.layers["attention"].forward + shape.layers["mlp"].forward)
    }

    #[test]
    fn a_shape_between_others_costs_what_their_law_says() {
        let law = |tokens: f64, sequence: f64| 300.0 + 2.0 * tokens + 0.01 * tokens * sequence;
        let known = points(&[(1, 64), (4, 64), (1, 256), (4, 256), (8, 128)], law);
        for wanted in [extents(2, 96), extents(3, 128), extents(2, 250)] {
            let priced = priced(&known, wanted, 4).unwrap();
            let want = law(wanted.tokens(), wanted.sequence as f64);
            assert!((forward(&priced) / want - 1.0).abs() < 1e-6, "{wanted:?}: {} {want}", forward(&priced));
            let block = priced.layers["mlp"];
            assert!((block.backward.unwrap() / block.forward - 2.0).abs() < 1e-6);
            assert!((priced.submit_us.unwrap() - 100.0).abs() < 1e-3, "{priced:?}");
        }
    }

    #[test]
    fn what_is_priced_says_that_no_step_was_seen_and_carries_the_loudest_noise() {
        let mut known = points(&[(1, 64), (2, 64), (1, 128), (2, 128)], |tokens, _| tokens);
        known[2].shape.measured =
            Some(Evidence { unix_seconds: 9, steps: 20, others: Some(0.5), ..Evidence::default() });
        let rests_on = priced(&known, extents(1, 96), 4).unwrap().measured.unwrap();
        let want = Evidence { unix_seconds: 9, steps: 0, others: Some(0.5), ..Evidence::default() };
        assert!(rests_on.spread < 1e-9);
        assert_eq!(Evidence { spread: 0.0, ..rests_on }, want);
    }

    #[test]
    fn two_sequences_are_enough_for_what_lies_between_if_one_is_at_most_twice_the_other() {
        let list = [(1, 64), (1, 128)];
        let found = priced(&points(&list, |tokens, _| 10.0 * tokens), extents(1, 96), 4);
        assert!((forward(&found.unwrap()) - 960.0).abs() < 1e-6);
        let laws: [fn(f64, f64) -> f64; 4] = [
            |tokens, _| 400.0 + 10.0 * tokens,
            |tokens, _| 4000.0 + 10.0 * tokens,
            |tokens, sequence| 10.0 * tokens + 0.15 * tokens * sequence,
            |tokens, sequence| 500.0 + tokens + tokens * sequence,
        ];
        for (at, law) in laws.into_iter().enumerate() {
            for sequence in [72, 96, 120] {
                let found = priced(&points(&list, law), extents(1, sequence), 4).unwrap();
                let off = forward(&found) / law(sequence as f64, sequence as f64) - 1.0;
                assert!(off.abs() < 0.02, "law {at} at {sequence}: {off}");
            }
        }
        let law = |tokens: f64, _: f64| 400.0 + 10.0 * tokens;
        // Too far apart; of other sizes; of one alone; a longer sequence in less time.
        for (list, wanted) in [
            (&[(1, 64), (1, 256)][..], extents(1, 96)),
            (&[(1, 64), (2, 128)], extents(1, 96)),
            (&[(1, 64)], extents(1, 64)),
        ] {
            assert_eq!(priced(&points(list, law), wanted, 4), None, "{list:?}");
        }
        let noise = |tokens: f64, _: f64| 1e5 / tokens;
        assert_eq!(priced(&points(&list, noise), extents(1, 96), 4), None);
    }

    #[test]
    fn where_no_law_holds_or_nothing_lies_around_it_a_shape_is_measured() {
        // A kernel that is twice as slow from 200 tokens on, as some are from a number of rows on.
        let steps = |tokens: f64, _: f64| if tokens < 200.0 { 5.0 * tokens } else { 10.0 * tokens };
        let list = [(1, 64), (2, 64), (4, 64), (8, 64), (1, 128), (4, 128)];
        assert_eq!(priced(&points(&list, steps), extents(2, 96), 4), None);
        let law = |tokens: f64, sequence: f64| 2.0 * tokens + 0.01 * tokens * sequence;
        for outside in [extents(1, 32), extents(8, 128), extents(1, 256), extents(16, 64)] {
            assert_eq!(priced(&points(&list, law), outside, 4), None, "{outside:?}");
        }
        assert!(priced(&points(&list, law), extents(4, 128), 4).is_some());
    }

    #[test]
    fn points_of_one_sequence_say_nothing_of_attention_and_are_enough_for_that_sequence() {
        let law = |tokens: f64, sequence: f64| 200.0 + tokens + 0.02 * tokens * sequence;
        let known = points(&[(1, 128), (2, 128), (8, 128)], law);
        let found = priced(&known, extents(4, 128), 4).unwrap();
        assert!((forward(&found) / law(512.0, 128.0) - 1.0).abs() < 1e-6);
        assert_eq!(priced(&known, extents(4, 96), 4), None);
        let mut more = known.clone();
        more.push(point(1, 96, law));
        more.push(point(2, 96, law));
        let found = priced(&more, extents(4, 96), 4).unwrap();
        assert!((forward(&found) / law(384.0, 96.0) - 1.0).abs() < 1e-6);
    }
}
