//! How long kernels take on a device, learnt from submissions that hold several: what decides where a submission ends.

use std::collections::BTreeMap;

/// Floating-point operations by kernel.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Work(BTreeMap<&'static str, f64>);

impl Work {
    /// One launch more.
    pub(super) fn add(&mut self, kernel: &'static str, flops: f64) {
        *self.0.entry(kernel).or_default() += flops;
    }

    /// Operations of all kernels.
    pub(super) fn flops(&self) -> f64 {
        self.0.values().sum()
    }
}

/// Seconds of an operation before anything is known of a device.
const GPU: f64 = 1e-10;
const SOFTWARE: f64 = 5e-10;

/// The part of a submission's surprise that is learnt from it.
const RATE: f64 = 0.5;
/// The largest surprise that is believed: a submission also waits for other programs.
const MOST: f64 = 10.0;

/// Seconds of an operation of each kernel. One that does little but read and write has few operations, which then take long.
#[derive(Clone, Debug)]
pub(super) struct Pace {
    known: BTreeMap<&'static str, f64>,
    /// Of kernels that have not run yet.
    other: f64,
    heard: bool,
}

impl Pace {
    pub(super) fn new(software: bool) -> Pace {
        Pace { known: BTreeMap::new(), other: if software { SOFTWARE } else { GPU }, heard: false }
    }

    /// Seconds that so many operations of a kernel are expected to take.
    pub(super) fn seconds(&self, kernel: &'static str, flops: f64) -> f64 {
        flops * self.known.get(kernel).unwrap_or(&self.other)
    }

    /// Hears how long a submission took. Its kernels share the surprise by what was expected of each, so that kernels that come in
    /// changing company are told apart (Kaczmarz's method).
    pub(super) fn learn(&mut self, work: &Work, took: f64) {
        let flops = work.flops();
        if flops <= 0.0 || took <= 0.0 {
            return;
        }
        if !self.heard {
            (self.other, self.heard) = (took / flops, true);
        }
        let expected: Vec<f64> = work.0.iter().map(|(kernel, &flops)| self.seconds(kernel, flops)).collect();
        let all: f64 = expected.iter().sum();
        let surprise = (took / all).clamp(1.0 / MOST, MOST) - 1.0;
        for ((&kernel, _), expected) in work.0.iter().zip(expected) {
            *self.known.entry(kernel).or_insert(self.other) *= 1.0 + RATE * surprise * expected / all;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_whose_operations_take_unlike_times_are_told_apart_by_submissions_that_mix_them() {
        let truth = [("matmul", 1e-11), ("attention", 2e-10), ("rmsnorm", 5e-10)];
        let mut pace = Pace::new(false);
        for step in 0..200u32 {
            let mut work = Work::default();
            for (number, (kernel, _)) in truth.iter().enumerate() {
                // Shares that change from one to the next, of which some are 0.
                let part = (step * (2 + number as u32) + number as u32) % 5;
                work.add(kernel, f64::from(part) * [1e9, 1e8, 2e7][number]);
            }
            let took = truth.iter().map(|(kernel, each)| each * work.0[kernel]).sum();
            pace.learn(&work, took);
        }
        for (kernel, each) in truth {
            let off = pace.seconds(kernel, 1.0) / each;
            assert!((0.9..1.1).contains(&off), "{kernel}: {off}");
        }
    }

    #[test]
    fn the_first_submission_sets_what_is_expected_of_kernels_that_nobody_knows() {
        let mut pace = Pace::new(true);
        let mut work = Work::default();
        work.add("matmul", 1e9);
        pace.learn(&work, 0.2);
        assert_eq!(pace.seconds("attention", 1e9), 0.2);
        pace.learn(&Work::default(), 1.0);
        assert_eq!(pace.seconds("matmul", 1e9), 0.2);
    }
}
