//! Round times for an axis, the same for pictures and terminals.

use crate::picture::round_step;

/// Places on a time axis with what stands there.
pub(super) struct Axis {
    /// Seconds and the number beside the mark.
    pub marks: Vec<(f64, String)>,
    /// What the numbers count.
    pub unit: &'static str,
}

/// About `count` marks between two times in seconds, 1, 2 or 5 times a power of ten apart. None where no time passes.
pub(super) fn axis(first: f64, last: f64, count: usize) -> Axis {
    let (unit, factor) = match last - first {
        span if span >= 2.0 => ("s", 1.0),
        span if span >= 2e-3 => ("ms", 1e3),
        _ => ("µs", 1e6),
    };
    let count = count.max(1);
    // Below a nanosecond there is nothing to see, and the divisions could overflow.
    if last - first < 1e-9 {
        return Axis { marks: Vec::new(), unit };
    }
    let step = round_step(last - first, count);
    let decimals = (-((step * factor).log10() + 1e-9).floor()).clamp(0.0, 9.0) as usize;
    let times = (0..=count).map(|i| ((first / step).ceil() + i as f64) * step);
    let marks = times.take_while(|&time| time <= last + step * 1e-6);
    // Adding 0 turns -0 into 0.
    Axis { marks: marks.map(|time| (time, format!("{:.decimals$}", time * factor + 0.0))).collect(), unit }
}

/// Seconds in words, in four digits: `1.234 s`, `12.34 ms`, `123.4 µs`.
pub fn duration(seconds: f64) -> String {
    let (value, unit) = match seconds.abs() {
        s if s >= 1.0 => (seconds, "s"),
        s if s >= 1e-3 || s == 0.0 => (seconds * 1e3, "ms"),
        _ => (seconds * 1e6, "µs"),
    };
    let digits = value.abs().max(1.0).log10().floor();
    format!("{value:.0$} {unit}", (3.0 - digits).max(0.0) as usize)
}
