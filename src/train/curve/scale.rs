//! Numbers to places on an axis, and its marks.

use crate::picture::round_step;

/// How many times its least number the largest of an axis may be before it counts decades.
const DECADES: f64 = 100.0;

/// An axis from a number at its low end to one at its high end.
pub(super) struct Scale {
    low: f64,
    high: f64,
    decades: bool,
    /// Places of the ends on the page.
    ends: (f64, f64),
}

impl Scale {
    /// From the least to the largest of finite numbers; `room` is what is left free beyond both, of the length of the
    /// axis. Where they lie far apart it counts decades.
    pub fn around(numbers: impl Iterator<Item = f64>, room: f64, ends: (f64, f64)) -> Scale {
        let (least, most) =
            numbers.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), n| (a.min(n), b.max(n)));
        let (least, most) = if least <= most { (least, most) } else { (0.0, 1.0) };
        if least > 0.0 && most / least > DECADES {
            let beyond = room * (most.log10() - least.log10());
            let [low, high] = [least.log10() - beyond, most.log10() + beyond].map(|n| 10f64.powf(n));
            return Scale { low: low.max(f64::MIN_POSITIVE), high: high.min(f64::MAX), decades: true, ends };
        }
        let beyond = match most - least {
            length if length > 1e-9 * most.abs().max(least.abs()) && length > 0.0 => room * length,
            // All the same: it lies in the middle.
            _ if most == 0.0 => 0.5,
            _ => 0.1 * most.abs(),
        };
        // What is never negative has no axis that is.
        let low = if least >= 0.0 { (least - beyond).max(0.0) } else { least - beyond };
        Scale { low, high: most + beyond, decades: false, ends }
    }

    /// From one number to a larger one.
    pub fn between(low: f64, high: f64, ends: (f64, f64)) -> Scale {
        Scale { low, high, decades: false, ends }
    }

    /// The place of a number; of one far beyond the axis, a place beyond it.
    pub fn place(&self, number: f64) -> f64 {
        let part = match self.decades {
            true => (number.max(self.low) / self.low).log10() / (self.high / self.low).log10(),
            false => (number - self.low) / (self.high - self.low),
        };
        // An axis of one number has it in the middle.
        let part = if part.is_nan() { 0.5 } else { part.clamp(-1.0, 2.0) };
        self.ends.0 + part * (self.ends.1 - self.ends.0)
    }

    /// About `count` numbers that are marked, and how they are written.
    pub fn marks(&self, count: usize) -> Vec<(f64, String)> {
        if self.decades {
            return self.marked_decades(count);
        }
        let length = self.high - self.low;
        if length.is_nan() || length <= 0.0 {
            return vec![(self.low, written(self.low, 1.0))];
        }
        let step = round_step(length, count);
        let marks = (0..=2 * count).map(|i| ((self.low / step).ceil() + i as f64) * step);
        // Adding 0 turns -0 into 0.
        marks.take_while(|&n| n <= self.high).map(|n| (n, written(n + 0.0, step))).collect()
    }

    fn marked_decades(&self, count: usize) -> Vec<(f64, String)> {
        let (low, high) = (self.low.log10(), self.high.log10());
        let every = round_step(high - low, count).max(1.0);
        let within: &[f64] = if high - low < 3.0 { &[1.0, 2.0, 5.0] } else { &[1.0] };
        let powers = (0..=2 * count).map(|i| ((low / every).floor() + i as f64) * every);
        let marks = powers.flat_map(|power| within.iter().map(move |n| n * 10f64.powf(power)));
        let marks = marks.filter(|n| (self.low..=self.high).contains(n));
        marks.map(|n| (n, written(n, n))).collect()
    }
}

/// A number in as many digits as a step of this size needs; very large and very small ones with an exponent.
fn written(number: f64, step: f64) -> String {
    let digits = |of: f64| (-((of.abs().log10() + 1e-9).floor())).clamp(0.0, 15.0) as usize;
    if number != 0.0 && !(1e-4..1e7).contains(&number.abs()) {
        return format!("{number:.*e}", digits(step / number));
    }
    format!("{number:.*}", digits(step))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(scale: &Scale, count: usize) -> Vec<String> {
        scale.marks(count).into_iter().map(|(_, label)| label).collect()
    }

    #[test]
    fn marks_are_round_and_few_whatever_the_numbers() {
        let of = |numbers: &[f64]| Scale::around(numbers.iter().copied(), 0.05, (0.0, 1.0));
        assert_eq!(labels(&of(&[1.2, 5.6]), 6), ["1", "2", "3", "4", "5"]);
        assert_eq!(labels(&of(&[2.41, 2.46]), 6), ["2.41", "2.42", "2.43", "2.44", "2.45", "2.46"]);
        assert_eq!(labels(&of(&[0.02, 6.0]), 6), ["0.02", "0.05", "0.1", "0.2", "0.5", "1", "2", "5"]);
        assert_eq!(labels(&of(&[1e-3, 1e300]), 6)[..2], ["1", "1e100"]);
        for numbers in [
            &[][..],
            &[2.0],
            &[0.0],
            &[-1.0],
            &[1e300],
            &[-1e300, 1e300],
            &[0.0, 1e300],
            &[1e16, 1e16 + 2.0],
            &[5e-324],
            &[5e-324, 1e300],
            &[1.0, 1.0 + 1e-15],
            &[3e-7, 5e-7],
        ] {
            let scale = of(numbers);
            let marks = scale.marks(6);
            assert!((1..=13).contains(&marks.len()), "{numbers:?}: {marks:?}");
            for number in numbers.iter().copied().chain(marks.iter().map(|mark| mark.0)) {
                assert!((-1e-9..=1.0 + 1e-9).contains(&scale.place(number)), "{number} of {numbers:?}");
            }
        }
    }
}
