//! A roofline as a picture: what a card can do at each intensity, and its kernels below.

use std::fmt::Write;

use super::roofline::{Measured, Report};
use crate::picture::{FAINT, GRID, INK, MARGIN, WIDTH, entry, escape, open};

const HEIGHT: f64 = 640.0;
const LEFT: f64 = MARGIN + 62.0;
const RIGHT: f64 = WIDTH - 360.0;
const TOP: f64 = 96.0;
const BOTTOM: f64 = HEIGHT - 62.0;

/// Matmuls, attention, everything else: colours that differ in lightness too, and shapes that tell them apart without colour.
const KINDS: [(&str, &str); 3] =
    [("matmul", "#1d4ed8"), ("attention", "#c2410c"), ("bound by memory", "#0f766e")];

fn kind(kernel: &Measured) -> usize {
    match kernel.kernels.split(['_', ',', ' ']).next() {
        Some("matmul") => 0,
        Some("attention") => 1,
        _ => 2,
    }
}

/// A logarithmic axis: from a to b of what is measured, drawn from `start` to `end`.
struct Axis {
    a: f64,
    b: f64,
    start: f64,
    end: f64,
}

impl Axis {
    fn new(values: impl Iterator<Item = f64>, start: f64, end: f64) -> Axis {
        let (mut a, mut b) = (f64::MAX, f64::MIN_POSITIVE);
        for value in values.filter(|v| v.is_finite() && *v > 0.0) {
            (a, b) = (a.min(value), b.max(value));
        }
        // Whole powers of ten, at least one of them.
        let a = 10f64.powf(a.log10().floor());
        let b = 10f64.powf(b.log10().ceil()).max(10.0 * a);
        Axis { a, b, start, end }
    }

    fn at(&self, value: f64) -> f64 {
        let part = (value.max(self.a) / self.a).log10() / (self.b / self.a).log10();
        self.start + part.min(1.0) * (self.end - self.start)
    }

    fn marks(&self) -> impl Iterator<Item = f64> {
        let count = (self.b / self.a).log10().round() as i32;
        (0..=count).map(|power| self.a * 10f64.powi(power))
    }
}

/// A number of 10⁹ in words.
fn billions(value: f64) -> String {
    match value {
        v if v >= 1000.0 => format!("{} T", v / 1000.0),
        v => format!("{v} G"),
    }
}

fn sign(kind: usize, x: f64, y: f64) -> String {
    let colour = KINDS[kind].1;
    match kind {
        0 => format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"5.5\" fill=\"{colour}\"/>"),
        1 => format!("<path d=\"M{x:.1} {:.1}l6.5 11.5h-13z\" fill=\"{colour}\"/>", y - 7.0),
        _ => format!(
            "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"10\" height=\"10\" fill=\"{colour}\"/>",
            x - 5.0,
            y - 5.0
        ),
    }
}

impl Report {
    /// The roofline of an adapter.
    pub fn to_svg(&self, adapter: &str) -> String {
        let mut svg = open(&format!("What {adapter} can do, and what its kernels do"), HEIGHT);
        let ridge = self.ceilings.gflops / self.ceilings.gb_s;
        let x = Axis::new(
            self.kernels.iter().map(|k| k.intensity).chain([ridge / 4.0, ridge * 4.0]),
            LEFT,
            RIGHT,
        );
        let y = Axis::new(self.kernels.iter().map(|k| k.gflops).chain([self.ceilings.gflops]), BOTTOM, TOP);
        let mut at = MARGIN;
        for (i, (name, _)) in KINDS.iter().enumerate() {
            at = entry(&mut svg, at, 56.0, &sign(i, at + 7.0, 63.0), name);
        }
        let line = format!(
            "<line x1=\"{at:.1}\" x2=\"{:.1}\" y1=\"63\" y2=\"63\" stroke=\"{INK}\" stroke-width=\"2\"/>",
            at + 14.0
        );
        let (gflops, gb_s) = (self.ceilings.gflops, self.ceilings.gb_s);
        let words = format!("ceilings, measured: {gflops:.0} GFLOP/s, {gb_s:.1} GB/s");
        entry(&mut svg, at, 56.0, &line, &words);
        for mark in x.marks() {
            let at = x.at(mark);
            let _ = writeln!(
                svg,
                "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{BOTTOM}\" stroke=\"{GRID}\"/>\
                 <text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\" fill=\"{FAINT}\">{mark}</text>",
                BOTTOM + 18.0
            );
        }
        for mark in y.marks() {
            let at = y.at(mark);
            let _ = writeln!(
                svg,
                "<line x1=\"{LEFT}\" x2=\"{RIGHT}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"{GRID}\"/>\
                 <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"{FAINT}\">{}</text>",
                LEFT - 8.0,
                at + 4.0,
                billions(mark)
            );
        }
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\" fill=\"{FAINT}\">operations a byte</text>\
             <text x=\"{LEFT}\" y=\"{}\" text-anchor=\"end\" fill=\"{FAINT}\">FLOP/s</text>",
            (LEFT + RIGHT) / 2.0,
            BOTTOM + 42.0,
            TOP - 10.0
        );
        // Up to the ridge the copy's speed is the limit, then the arithmetic's.
        let start = x.a.max(y.a / gb_s);
        let points = [(start, start * gb_s), (ridge, gflops), (x.b, gflops)];
        let points = points.map(|(i, speed)| format!("{:.1},{:.1}", x.at(i), y.at(speed))).join(" ");
        let _ = writeln!(
            svg,
            "<polyline points=\"{points}\" fill=\"none\" stroke=\"{INK}\" stroke-width=\"2\"/>"
        );
        // The points by number, and what they stand for beside them, best first.
        let mut kernels: Vec<&Measured> = self.kernels.iter().collect();
        kernels.sort_by(|a, b| b.share.total_cmp(&a.share));
        let step = ((BOTTOM - TOP + 26.0) / kernels.len().max(1) as f64).min(19.0);
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\" fill=\"{FAINT}\">of its ceiling</text>",
            WIDTH - MARGIN,
            TOP - 26.0
        );
        for (i, kernel) in kernels.iter().enumerate() {
            let (px, py) = (x.at(kernel.intensity), y.at(kernel.gflops));
            let line = TOP + i as f64 * step;
            let (number, kind, role) = (i + 1, kind(kernel), escape(&kernel.role));
            let share = 100.0 * kernel.share;
            let _ = writeln!(
                svg,
                "<g><title>{role}: {share:.0} % of its ceiling, {:.1} GFLOP/s, {:.2} GB/s, {:.3} ms</title>{}\
                 <text x=\"{:.1}\" y=\"{:.1}\" font-size=\"11\">{number}</text></g>{}\
                 <text x=\"{}\" y=\"{line:.1}\" font-size=\"12\">{number} {role}</text>\
                 <text x=\"{}\" y=\"{line:.1}\" font-size=\"12\" text-anchor=\"end\">{share:.0} %</text>",
                kernel.gflops,
                kernel.gb_s,
                1e3 * kernel.seconds,
                sign(kind, px, py),
                px + 8.0,
                py + 4.0,
                sign(kind, RIGHT + 36.0, line - 4.0),
                RIGHT + 50.0,
                WIDTH - MARGIN,
            );
        }
        svg + "</svg>\n"
    }
}
