//! Which layers go to which stage.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::layers::Layers;

/// Contiguous stages whose largest sum of `weights` is as small as possible, found by dynamic programming over (layer,
/// stages): exact, O(layers² · stages).
pub fn balanced(weights: &[f64], stages: usize) -> Result<Vec<Range<usize>>> {
    balanced_where(weights, stages, |_, _| true).ok_or_else(|| {
        Error::config(
            "pipeline.devices",
            format!(
                "{stages} stages cannot share the {} parts of a model (embedding, head, and the halves of its blocks); use at most {0} devices",
                weights.len()
            ),
        )
    })
}

/// As [`balanced`] among the stages that `fits` allows, given their number and layers; none if there are no such.
pub fn balanced_where(
    weights: &[f64],
    stages: usize,
    fits: impl Fn(usize, Range<usize>) -> bool,
) -> Option<Vec<Range<usize>>> {
    let n = weights.len();
    if stages == 0 || stages > n {
        return None;
    }
    let mut prefix = vec![0.0];
    for w in weights {
        prefix.push(prefix[prefix.len() - 1] + w);
    }
    // best[k][i]: the smallest possible maximum for the first i layers in k+1 stages, and where the last one starts.
    let first = |(end, &sum): (usize, &f64)| (if fits(0, 0..end) { sum } else { f64::INFINITY }, 0);
    let mut best: Vec<Vec<(f64, usize)>> = vec![prefix.iter().enumerate().map(first).collect()];
    for k in 1..stages {
        let mut row = vec![(f64::INFINITY, 0); n + 1];
        for (end, cell) in row.iter_mut().enumerate().skip(k + 1) {
            for start in k..end {
                let worst = best[k - 1][start].0.max(prefix[end] - prefix[start]);
                if worst < cell.0 && fits(k, start..end) {
                    *cell = (worst, start);
                }
            }
        }
        best.push(row);
    }
    if best[stages - 1][n].0.is_infinite() {
        return None;
    }
    let mut ranges = Vec::new();
    let mut end = n;
    for k in (0..stages).rev() {
        let start = best[k][end].1;
        ranges.push(start..end);
        end = start;
    }
    ranges.reverse();
    Some(ranges)
}

/// Stages cut by hand: `cuts` are where a new stage starts, of layers that begin at `starts`, the last of which is the end.
pub fn from_cuts(cuts: &[Layers], starts: &[Layers], stages: usize) -> Result<Vec<Range<usize>>> {
    let refused = |message| Error::config("pipeline.cuts", message);
    if cuts.len() + 1 != stages {
        let message = format!("{} are not the {} cuts of {stages} stages", Layers::list(cuts), stages - 1);
        return Err(refused(message));
    }
    let inside = Layers::cut(cuts, starts).map_err(refused)?;
    let bounds: Vec<usize> = [0].into_iter().chain(inside).chain([starts.len() - 1]).collect();
    Ok(bounds.windows(2).map(|pair| pair[0]..pair[1]).collect())
}

#[cfg(test)]
mod tests {
    use super::{balanced, balanced_where, from_cuts};
    use crate::layers::Layers;

    fn starts(layers: usize) -> Vec<Layers> {
        (0..=layers).map(Layers::whole).collect()
    }

    #[test]
    fn a_balanced_split_has_the_smallest_possible_largest_stage() {
        let weights = [5.0, 1.0, 1.0, 1.0, 4.0, 2.0, 3.0];
        for stages in 1..=7 {
            let ranges = balanced(&weights, stages).unwrap();
            let worst = |r: &[std::ops::Range<usize>]| {
                r.iter().map(|r| weights[r.clone()].iter().sum::<f64>()).fold(0.0, f64::max)
            };
            // Every way to choose stages-1 cuts among 6 gaps.
            let mut least = f64::INFINITY;
            for mask in 0u32..64 {
                if mask.count_ones() as usize == stages - 1 {
                    let cuts = (0..6).filter(|i| mask >> i & 1 == 1).map(|i| Layers::whole(i + 1));
                    least =
                        least.min(worst(&from_cuts(&cuts.collect::<Vec<_>>(), &starts(7), stages).unwrap()));
                }
            }
            assert_eq!(worst(&ranges), least, "{stages} stages: {ranges:?}");
            assert_eq!((ranges[0].start, ranges[stages - 1].end), (0, 7));
        }
    }

    #[test]
    fn a_limited_split_keeps_to_its_limits_and_to_none_that_cannot_be_kept() {
        let weights = [1.0; 8];
        let at_most = |limits: [usize; 3]| balanced_where(&weights, 3, |k, layers| layers.len() <= limits[k]);
        assert_eq!(at_most([2, 8, 2]), Some(vec![0..2, 2..6, 6..8]));
        assert_eq!(at_most([3, 8, 1]).map(|r| r[2].clone()), Some(7..8));
        assert_eq!(at_most([2, 3, 2]), None);
    }

    #[test]
    fn impossible_splits_are_refused() {
        assert!(balanced(&[1.0, 1.0], 3).is_err());
        let cut = |cuts: &[usize], stages| {
            from_cuts(&cuts.iter().copied().map(Layers::whole).collect::<Vec<_>>(), &starts(5), stages)
        };
        assert!(cut(&[2, 2], 3).is_err());
        assert!(cut(&[5], 2).is_err());
        assert!(cut(&[1, 2], 2).is_err());
    }
}
