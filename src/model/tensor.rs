//! The tensor axis (Shoeybi et al. 2019, arXiv 1909.08053): each layer is divided among the members of a gang, by whole heads,
//! by columns inside the feed-forward half and by tokens of the vocabulary, in whatever proportion.
//!
//! What comes into a half of a block is whole on every member; each computes its heads or columns of it, and their products
//! with its rows of the last matrix are terms of what the half gives, which [`Op::Sum`](crate::graph::Op::Sum) adds. The
//! table and the head are divided by tokens, so that logits are whole nowhere.
//!
//! What lies between the halves, norms and sums, is whole on every member; or each has its tokens of it
//! ([`Division::sequence`]): then it is gathered where a half begins
//! ([`Op::AllGather`](crate::graph::Op::AllGather)), and what the half gives is added and divided again
//! ([`Op::ReduceScatter`](crate::graph::Op::ReduceScatter)).

use std::ops::Range;

use super::{ModelConfig, Parameter};
use crate::error::{Error, Result};
use crate::mesh::{Division, divide};

/// Most members of a gang: far more than a machine has devices.
pub const MOST: usize = 1024;

/// Extents that members divide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Heads of queries.
    Heads,
    /// Heads of keys, or of values.
    KvHeads,
    /// Heads of queries, of keys and of values, one after another.
    Packed,
    /// The width inside the feed-forward half.
    Inner,
    /// Tokens.
    Vocabulary,
}

/// How the members of a gang share a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Each has all of it, and all of its gradient.
    Same,
    /// Each has all of it, and a term of its gradient.
    Summed,
    /// As [`Split::Same`], and where members divide tokens as [`Split::Summed`].
    ByToken,
    /// The first alone has it.
    First,
    /// Each has its part along an axis; those whose parts are the same have each a term of its gradient.
    Along(usize, Extent),
}

/// The part of a tensor that a member has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The name of the whole.
    pub of: String,
    /// Its extents.
    pub shape: Vec<usize>,
    /// Along which axis it is divided.
    pub axis: usize,
    /// Which indices of that axis the part has, in order.
    pub ranges: Vec<Range<usize>>,
}

impl Piece {
    /// What the part of a tensor is called: no two parts of a tensor that differ have one name.
    fn name(of: &str, ranges: &[Range<usize>]) -> String {
        let ranges: Vec<String> = ranges.iter().map(|r| format!("{}..{}", r.start, r.end)).collect();
        format!("{of}[{}]", ranges.join(","))
    }
}

/// Elements that lie next to each other both in a part and in the whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// How many of the part come before them.
    pub part: usize,
    /// Which of the whole they are.
    pub whole: Range<usize>,
}

impl Parameter {
    /// Where the elements lie that both the part and a range of the whole have, in order; of a parameter that is whole that
    /// range.
    pub fn runs(&self, whole: Range<usize>) -> Vec<Run> {
        let clip = |run: Run| {
            let (start, end) = (run.whole.start.max(whole.start), run.whole.end.min(whole.end));
            (start < end).then(|| Run { part: run.part + start - run.whole.start, whole: start..end })
        };
        let stride = self.piece.as_ref().map_or(1, |piece| piece.shape[piece.axis..].iter().product());
        self.all_runs(whole.start / stride..whole.end.div_ceil(stride)).filter_map(clip).collect()
    }

    /// The same of a range of the part.
    pub fn runs_of_part(&self, part: Range<usize>) -> Vec<Run> {
        let clip = |run: Run| {
            let (start, end) = (run.part.max(part.start), (run.part + run.whole.len()).min(part.end));
            let first = run.whole.start + start - run.part.min(start);
            (start < end).then(|| Run { part: start, whole: first..first + end - start })
        };
        let width = self.piece.as_ref().map_or(1, |piece| self.shape[piece.axis..].iter().product());
        self.all_runs(part.start / width..part.end.div_ceil(width)).filter_map(clip).collect()
    }

    /// All runs at these indices of the axes before the one that is divided; of what is not divided those elements.
    fn all_runs(&self, outer: Range<usize>) -> Box<dyn Iterator<Item = Run> + '_> {
        let Some(Piece { shape, axis, ranges, .. }) = &self.piece else {
            return Box::new(std::iter::once(Run { part: outer.start, whole: outer }));
        };
        let inner: usize = shape[axis + 1..].iter().product();
        let runs = move |outer: usize| {
            let mut part = outer * self.shape[*axis];
            ranges.iter().map(move |range| {
                let first = outer * shape[*axis] + range.start;
                let run = Run { part: part * inner, whole: first * inner..(first + range.len()) * inner };
                part += range.len();
                run
            })
        };
        Box::new(outer.flat_map(runs))
    }
}

/// The name of the tensor that a parameter is part of, or all of.
pub(super) fn whole(name: &str) -> &str {
    name.split('[').next().unwrap_or(name)
}

/// Query heads with the key-value heads that they use: each serves equally many.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Of queries.
    pub heads: Range<usize>,
    /// Of keys and values; another section, or another member, may have some of them too.
    pub kv_heads: Range<usize>,
}

/// One of those that divide the layers of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Which of them, from 0 on.
    pub number: usize,
    /// Its heads, in order.
    pub sections: Vec<Section>,
    /// Its columns inside the feed-forward half.
    pub inner: Range<usize>,
    /// Its tokens of the vocabulary.
    pub vocabulary: Range<usize>,
    /// How all of them divide layers.
    pub division: Division,
}

/// The members of a gang of which each has about this share of every layer.
///
/// # Errors
///
/// [`Error::Config`] of `mesh.tensor` for a share of nothing, for more members than the model has heads, columns or tokens, and
/// for more than [`MOST`].
pub fn members(config: &ModelConfig, division: &Division) -> Result<Vec<Member>> {
    gang(config, division, |heads, _, shares| divide(heads, shares))
}

/// As [`members`], where query heads that share a key-value head stay together as far as that goes: shares of heads are then further
/// from what was asked for, and a half of a block is fewer launches, which are what a single token takes its time for.
///
/// # Errors
///
/// As [`members`].
pub fn members_by_group(config: &ModelConfig, division: &Division) -> Result<Vec<Member>> {
    gang(config, division, by_group)
}

/// The members of a gang of which each has these of H query heads over K key-value heads.
fn gang(
    config: &ModelConfig,
    division: &Division,
    heads: fn(usize, usize, &[usize]) -> Vec<Range<usize>>,
) -> Result<Vec<Member>> {
    let (shares, count) = (&division.shares[..], division.members());
    let refuse = |message: String| Err(Error::config("mesh.tensor", message));
    if count == 0 || shares.contains(&0) {
        return refuse("needs for each member a share of at least 1".into());
    }
    if count > MOST {
        return refuse(format!("{count} members are more than the {MOST} that a gang may have"));
    }
    for (what, most) in
        [("heads", config.heads), ("columns", config.intermediate()), ("tokens", config.vocabulary)]
    {
        if count > most {
            return refuse(format!("{count} members cannot divide the {most} {what} of the model"));
        }
    }
    let heads = heads(config.heads, config.kv_heads(), shares);
    let sharing = config.heads / config.kv_heads();
    let (inner, vocabulary) = (even(config.intermediate(), shares), even(config.vocabulary, shares));
    let member = |number: usize| Member {
        number,
        sections: sections(&heads[number], sharing),
        inner: inner[number].clone(),
        vocabulary: vocabulary[number].clone(),
        division: division.clone(),
    };
    Ok((0..count).map(member).collect())
}

/// As [`divide`], at multiples of 4 where that is no great matter: kernels read four neighbours at once.
fn even(total: usize, shares: &[usize]) -> Vec<Range<usize>> {
    let unit = if total >= 16 * shares.len() { 4 } else { 1 };
    let ranges = divide(total / unit, shares).into_iter();
    let last = shares.len() - 1;
    let end = |number: usize, end: usize| if number == last { total } else { unit * end };
    ranges.enumerate().map(|(number, range)| unit * range.start..end(number, range.end)).collect()
}

/// The query heads of each member: all that share some key-value heads, or some of those that share one, so that all are one section.
fn by_group(heads: usize, kv_heads: usize, shares: &[usize]) -> Vec<Range<usize>> {
    let (count, sharing) = (shares.len(), heads / kv_heads);
    if count <= kv_heads {
        let ranges = divide(kv_heads, shares).into_iter();
        return ranges.map(|range| range.start * sharing..range.end * sharing).collect();
    }
    let sum = |shares: &[usize]| shares.iter().map(|&share| share as f64).sum::<f64>();
    let due = |end: usize| sum(&shares[..end]) / sum(shares) * heads as f64;
    let (mut all, mut first) = (Vec::with_capacity(count), 0);
    for kv_head in 0..kv_heads {
        let left = kv_heads - 1 - kv_head;
        // Enough of them are left for the others, and not more than those have query heads.
        let least = (first + 1).max(count.saturating_sub(left * sharing));
        let most = (first + sharing).min(count - left);
        let off = |end: &usize| (due(*end) - ((kv_head + 1) * sharing) as f64).abs();
        let end = (least..=most).min_by(|a, b| off(a).total_cmp(&off(b))).unwrap_or(most);
        let ranges = divide(sharing, &shares[first..end]).into_iter();
        all.extend(ranges.map(|range| kv_head * sharing + range.start..kv_head * sharing + range.end));
        first = end;
    }
    all
}

/// Query heads in pieces in which each key-value head serves equally many: where a range begins or ends within those that share
/// one, these are apart.
fn sections(heads: &Range<usize>, sharing: usize) -> Vec<Section> {
    let (first, last) = (heads.start.next_multiple_of(sharing), heads.end / sharing * sharing);
    let parts = match first <= last {
        true => vec![heads.start..first, first..last, last..heads.end],
        // All of them share one.
        false => vec![heads.clone()],
    };
    let section =
        |heads: Range<usize>| Section { kv_heads: heads.start / sharing..heads.end.div_ceil(sharing), heads };
    parts.into_iter().filter(|part| !part.is_empty()).map(section).collect()
}

impl Member {
    /// Its tokens of what lies between the divided halves, of a microbatch of so many; none where it has all of them.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for fewer tokens than there are members.
    pub(super) fn rows(&self, tokens: usize) -> Result<Option<Range<usize>>> {
        let members = self.division.members();
        if self.division.sequence && tokens < members {
            let message = format!("{members} members cannot divide the {tokens} tokens of a microbatch");
            return Err(Error::config("mesh.sequence_parallel", message));
        }
        Ok(self.division.sequence.then(|| self.division.rows(self.number, tokens)))
    }

    /// The indices of an extent that it has, a list for each parameter, which may have several runs of them.
    fn ranges(&self, config: &ModelConfig, extent: Extent) -> Vec<Vec<Range<usize>>> {
        let size = config.head_dim();
        let heads =
            |from: usize, heads: &Range<usize>| (from + heads.start) * size..(from + heads.end) * size;
        let each = |of: &dyn Fn(&Section) -> Vec<Range<usize>>| self.sections.iter().map(of).collect();
        match extent {
            Extent::Heads => each(&|of| vec![heads(0, &of.heads)]),
            Extent::KvHeads => each(&|of| vec![heads(0, &of.kv_heads)]),
            Extent::Packed => {
                let values = config.heads + config.kv_heads();
                each(&|Section { heads: queries, kv_heads }| {
                    vec![heads(0, queries), heads(config.heads, kv_heads), heads(values, kv_heads)]
                })
            }
            Extent::Inner => vec![vec![self.inner.clone()]],
            Extent::Vocabulary => vec![vec![self.vocabulary.clone()]],
        }
    }

    /// What it has of a parameter of the whole model: of heads a part for each of its sections.
    pub(super) fn parts(&self, config: &ModelConfig, parameter: Parameter) -> Vec<Parameter> {
        let (axis, extent) = match parameter.split {
            Split::Same | Split::Summed => return vec![parameter],
            Split::ByToken => {
                let split = if self.division.sequence { Split::Summed } else { Split::Same };
                return vec![parameter.split(split)];
            }
            Split::First if self.number == 0 => return vec![parameter],
            Split::First => return Vec::new(),
            Split::Along(axis, extent) => (axis, extent),
        };
        let part = |ranges: Vec<Range<usize>>| {
            let mut part = parameter.clone();
            part.name = Piece::name(&parameter.name, &ranges);
            part.shape[axis] = ranges.iter().map(Range::len).sum();
            part.tied_to = parameter.tied_to.as_ref().map(|owner| Piece::name(owner, &ranges));
            let (of, shape) = (parameter.name.clone(), parameter.shape.clone());
            part.piece = Some(Piece { of, shape, axis, ranges });
            part
        };
        self.ranges(config, extent).into_iter().map(part).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_of_columns_are_multiples_of_four_where_there_are_many() {
        assert_eq!(even(1003, &[1, 1, 1]), [0..332, 332..668, 668..1003]);
        assert_eq!(even(7, &[1, 1]), [0..4, 4..7]);
    }

    #[test]
    fn in_each_section_all_key_value_heads_serve_equally_many_query_heads() {
        let all = |heads: Range<usize>, sharing| -> Vec<(Range<usize>, Range<usize>)> {
            sections(&heads, sharing).into_iter().map(|of| (of.heads, of.kv_heads)).collect()
        };
        assert_eq!(all(0..5, 2), [(0..4, 0..2), (4..5, 2..3)]);
        assert_eq!(all(5..8, 2), [(5..6, 2..3), (6..8, 3..4)]);
        assert_eq!(all(1..3, 4), [(1..3, 0..1)]);
        assert_eq!(all(3..9, 4), [(3..4, 0..1), (4..8, 1..2), (8..9, 2..3)]);
        assert_eq!(all(2..7, 1), [(2..7, 2..7)]);
        for (sharing, start, end) in
            (1..6).flat_map(|sharing| (0..12).flat_map(move |s| (s + 1..13).map(move |e| (sharing, s, e))))
        {
            let all = sections(&(start..end), sharing);
            let heads: Vec<usize> = all.iter().flat_map(|of| of.heads.clone()).collect();
            assert_eq!(heads, (start..end).collect::<Vec<_>>());
            for Section { heads, kv_heads } in all {
                assert!(heads.len().is_multiple_of(kv_heads.len()));
                let each = heads.len() / kv_heads.len();
                for head in heads.clone() {
                    assert_eq!(kv_heads.start + (head - heads.start) / each, head / sharing);
                }
            }
        }
    }

    #[test]
    fn members_lie_within_a_key_value_head_or_have_all_that_share_some() {
        assert_eq!(by_group(8, 4, &[5, 3]), [0..6, 6..8]);
        assert_eq!(by_group(9, 3, &[1, 1]), [0..6, 6..9]);
        assert_eq!(by_group(8, 2, &[2, 1, 1]), [0..4, 4..6, 6..8]);
        assert_eq!(by_group(8, 1, &[5, 3]), [0..5, 5..8]);
        for (count, kv_heads) in (1..=6).flat_map(|sharing| (1..=6).map(move |kv| (sharing * kv, kv))) {
            for shares in [vec![1; 2], vec![2, 1, 1], vec![1, 9, 1, 3], vec![1; count]] {
                if shares.len() > count {
                    continue;
                }
                let all = by_group(count, kv_heads, &shares);
                let sharing = count / kv_heads;
                let whole =
                    |r: &Range<usize>| r.start.is_multiple_of(sharing) && r.end.is_multiple_of(sharing);
                let within = |r: &Range<usize>| r.start / sharing == (r.end - 1) / sharing;
                assert!(all.iter().all(|r| !r.is_empty() && (whole(r) || within(r))), "{all:?}");
                let ends: Vec<usize> = all.iter().map(|r| r.end).collect();
                let starts: Vec<usize> = all.iter().map(|r| r.start).collect();
                assert_eq!([&starts[1..], &[count]].concat(), ends);
            }
        }
    }
}
