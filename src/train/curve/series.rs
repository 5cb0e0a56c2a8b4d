//! Numbers over steps in bounded memory.

/// Most buckets of a series: a pair of columns of pixels each. When there are more, neighbours become one.
const MOST: usize = 600;
/// Largest magnitude: sums and differences of such numbers are still finite.
const LARGEST: f64 = 1e300;

/// Numbers over steps, each bucket those of as many rows.
#[derive(Clone, Debug)]
pub(super) struct Series {
    rows: u64,
    buckets: Vec<Bucket>,
    /// Numbers that were not finite and are left out.
    pub(super) odd: u64,
}

/// Neighbouring rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Bucket {
    rows: u64,
    /// First and last step.
    pub(super) steps: (u64, u64),
    /// Lowest and highest number.
    pub(super) range: (f64, f64),
    pub(super) mean: f64,
}

impl Default for Series {
    fn default() -> Series {
        Series { rows: 1, buckets: Vec::new(), odd: 0 }
    }
}

impl Bucket {
    fn joined(self, other: Bucket) -> Bucket {
        let rows = self.rows + other.rows;
        Bucket {
            rows,
            steps: (self.steps.0.min(other.steps.0), self.steps.1.max(other.steps.1)),
            range: (self.range.0.min(other.range.0), self.range.1.max(other.range.1)),
            mean: self.mean + (other.mean - self.mean) * (other.rows as f64 / rows as f64),
        }
    }

    /// Where it is drawn.
    pub(super) fn step(&self) -> f64 {
        (self.steps.0 as f64 + self.steps.1 as f64) / 2.0
    }
}

impl Series {
    pub(super) fn push(&mut self, step: u64, value: f64) {
        if !value.is_finite() {
            self.odd += 1;
            return;
        }
        let value = value.clamp(-LARGEST, LARGEST);
        let new = Bucket { rows: 1, steps: (step, step), range: (value, value), mean: value };
        match self.buckets.last_mut() {
            Some(last) if last.rows < self.rows => *last = last.joined(new),
            _ => self.buckets.push(new),
        }
        if self.buckets.len() > MOST {
            let pairs = self.buckets.chunks(2).map(|pair| pair.iter().copied().reduce(Bucket::joined));
            self.buckets = pairs.flatten().collect();
            self.rows *= 2;
        }
    }

    pub(super) fn buckets(&self) -> &[Bucket] {
        &self.buckets
    }

    /// Whether each bucket is one row.
    pub(super) fn is_exact(&self) -> bool {
        self.rows == 1
    }

    /// Buckets on each side over which is smoothed: a fiftieth of the series.
    fn reach(&self) -> usize {
        (self.buckets.len() / 50).max(2)
    }

    /// The mean of the last rows, and how many they are.
    pub(super) fn tail(&self) -> Option<(u64, f64)> {
        let last = self.buckets.iter().rev().take(self.reach()).copied().reduce(Bucket::joined);
        last.map(|bucket| (bucket.rows, bucket.mean))
    }

    /// Means around every place, over as much less on both sides where the series begins and ends; none where there is
    /// too little to smooth.
    pub(super) fn smoothed(&self) -> Option<Vec<(f64, f64)>> {
        let (count, reach) = (self.buckets.len(), self.reach());
        let around = |at: usize| {
            let reach = reach.min(at).min(count - 1 - at);
            self.buckets[at - reach..=at + reach].iter().copied().reduce(Bucket::joined)
        };
        let mean = |at: usize| around(at).map_or(f64::NAN, |bucket| bucket.mean);
        (count >= 10).then(|| (0..count).map(|at| (self.buckets[at].step(), mean(at))).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_series_keeps_its_ends_its_extremes_and_its_mean_in_bounded_memory() {
        let mut series = Series::default();
        let value = |step: u64| if step == 77_777 { 9.0 } else { (step % 3) as f64 };
        for step in 1..=100_000 {
            series.push(step, value(step));
        }
        series.push(100_001, f64::NAN);
        let buckets = series.buckets();
        assert!((MOST / 2..=MOST).contains(&buckets.len()), "{}", buckets.len());
        assert_eq!((buckets[0].steps.0, buckets[buckets.len() - 1].steps.1), (1, 100_000));
        assert!(buckets.windows(2).all(|pair| pair[0].steps.1 + 1 == pair[1].steps.0));
        let all = buckets.iter().copied().reduce(Bucket::joined).unwrap();
        assert_eq!((all.rows, all.range, series.odd), (100_000, (0.0, 9.0), 1));
        assert!((all.mean - 1.0).abs() < 1e-3, "{}", all.mean);
    }
}
