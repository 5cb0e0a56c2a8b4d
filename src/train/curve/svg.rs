//! The losses of a run as a picture.

use std::fmt::Write;

use super::scale::Scale;
use super::series::Series;
use super::{Curve, Evaluation};
use crate::picture::{FAINT, GRID, INK, MARGIN, WIDTH, entry, open};

/// Left edge of both plots; numbers stand before it.
const LEFT: f64 = MARGIN + 56.0;
const RIGHT: f64 = WIDTH - MARGIN;
/// Top and bottom of the losses, and of the strip for the learning rate below them.
const LOSS: (f64, f64) = (104.0, 424.0);
const RATE: (f64, f64) = (458.0, 506.0);
const FOOTER: f64 = 54.0;
/// Room below the losses for the marks of checkpoints.
const FOOT: f64 = 14.0;
/// Most evaluations that are drawn as points.
const POINTS: usize = 150;
/// Checkpoints nearer than this are one mark.
const APART: f64 = 6.0;

const TRAINING: &str = "#a9c6f5";
const SMOOTHED: &str = "#2f6fd6";
const EVALUATION: &str = "#d9652b";
const LEARNING_RATE: &str = "#8b62cf";
const CHECKPOINT: &str = "#3fa45b";

impl Curve {
    /// A picture: the loss of every step, its mean over neighbouring steps, the evaluations with the best of them, marks
    /// at the steps of `checkpoints`, and the learning rate below. It stands alone, scales, and brings its own
    /// background. Its size is bounded: of a long run each place shows the lowest and the highest of some steps.
    pub fn to_svg(&self, title: &str, checkpoints: &[u64]) -> String {
        let mut evaluations = Series::default();
        self.evaluations.iter().for_each(|e| evaluations.push(e.step, e.loss));
        let (x, y) = (self.steps(), self.losses(&evaluations));
        let mut svg = open(title, RATE.1 + FOOTER);
        let _ = writeln!(svg, "<text x=\"{MARGIN}\" y=\"62\">{}</text>", self.summary(&evaluations));
        grid(&mut svg, &x, &y);
        draw_range(&mut svg, &self.training, &x, &y);
        let smoothed = self.training.smoothed();
        if let Some(line) = &smoothed {
            path(&mut svg, line.iter().copied(), &x, &y, SMOOTHED, 2.5);
        }
        let marked = draw_checkpoints(&mut svg, checkpoints, &x);
        self.draw_evaluations(&mut svg, &evaluations, &x, &y);
        self.draw_rates(&mut svg, &x);
        let best = self.best();
        if let Some(best) = best {
            draw_best(&mut svg, best, &x, &y);
        }
        let occurs = [
            (!self.training.buckets().is_empty(), line(TRAINING, 1.5), "loss of a step"),
            (smoothed.is_some(), line(SMOOTHED, 2.5), "smoothed"),
            (
                !evaluations.buckets().is_empty(),
                line(EVALUATION, 2.0) + &circle(7.0, 7.0, "evaluation"),
                "evaluation",
            ),
            (best.is_some(), ring(7.0, 7.0), "best evaluation"),
            (marked, triangle(7.0, 2.0, "checkpoint"), "checkpoint"),
            (!self.rates.buckets().is_empty(), line(LEARNING_RATE, 2.0), "learning rate"),
        ];
        let mut left = MARGIN;
        for (_, sign, name) in occurs.iter().filter(|(occurs, ..)| *occurs) {
            let sign = format!("<g transform=\"translate({left:.1} 76)\">{sign}</g>");
            left = entry(&mut svg, left, 76.0, &sign, name);
        }
        svg.push_str("</svg>\n");
        svg
    }

    /// The last numbers in words.
    fn summary(&self, evaluations: &Series) -> String {
        let mut parts = Vec::new();
        match self.training.tail() {
            Some((1, loss)) => parts.push(format!("training {}", short(loss))),
            Some((steps, loss)) => {
                parts.push(format!("training {} over the last {steps} steps", short(loss)))
            }
            None => {}
        }
        let last = self.evaluations.iter().rfind(|evaluation| evaluation.loss.is_finite());
        if let (Some(last), Some(best)) = (last, self.best()) {
            parts.push(format!("evaluation {} at step {}", short(last.loss), last.step));
            if best.step != last.step {
                parts.push(format!("best {} at step {}", short(best.loss), best.step));
            }
        }
        let odd = self.training.odd + evaluations.odd;
        if odd > 0 {
            parts.push(format!("{odd} that are not finite are left out"));
        }
        match parts.is_empty() {
            true => "no step yet".into(),
            false => format!("Loss in nats a token: {}", parts.join("; ")),
        }
    }

    fn steps(&self) -> Scale {
        let buckets = self.training.buckets().iter().chain(self.rates.buckets());
        let steps = buckets.flat_map(|bucket| [bucket.steps.0, bucket.steps.1]);
        let steps = steps.chain(self.evaluations.iter().map(|evaluation| evaluation.step));
        let (first, last) =
            steps.fold((u64::MAX, 0), |(first, last), step| (first.min(step), last.max(step)));
        Scale::between(first.min(last) as f64, last as f64, (LEFT + 10.0, RIGHT - 10.0))
    }

    fn losses(&self, evaluations: &Series) -> Scale {
        let buckets = self.training.buckets().iter().chain(evaluations.buckets());
        Scale::around(buckets.flat_map(|b| [b.range.0, b.range.1]), 0.04, (LOSS.1 - FOOT, LOSS.0))
    }

    fn draw_evaluations(&self, svg: &mut String, evaluations: &Series, x: &Scale, y: &Scale) {
        let buckets = evaluations.buckets();
        path(svg, buckets.iter().map(|b| (b.step(), b.mean)), x, y, EVALUATION, 2.0);
        if !evaluations.is_exact() || buckets.len() > POINTS {
            return;
        }
        for bucket in buckets {
            let tip = format!("step {}: {}", bucket.steps.0, short(bucket.mean));
            let _ = writeln!(svg, "{}", circle(x.place(bucket.step()), y.place(bucket.mean), &tip));
        }
    }

    fn draw_rates(&self, svg: &mut String, x: &Scale) {
        let buckets = self.rates.buckets();
        let most = buckets.iter().map(|bucket| bucket.range.1).fold(0.0, f64::max);
        if most <= 0.0 {
            return;
        }
        let y = Scale::between(0.0, most, (RATE.1, RATE.0));
        for (rate, label) in [(0.0, "0".to_string()), (most, format!("{most:.1e}").replace(".0e", "e"))] {
            let _ = writeln!(
                svg,
                "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"{FAINT}\">{label}</text>",
                LEFT - 8.0,
                y.place(rate) + 4.5
            );
        }
        path(svg, buckets.iter().map(|b| (b.step(), b.mean)), x, &y, LEARNING_RATE, 2.0);
    }
}

/// Frames of both plots, marks and numbers of both axes.
fn grid(svg: &mut String, x: &Scale, y: &Scale) {
    let _ = writeln!(svg, "<g fill=\"{FAINT}\" text-anchor=\"end\">");
    for (loss, label) in y.marks(6) {
        let y = y.place(loss);
        let _ = writeln!(
            svg,
            "<path stroke=\"{GRID}\" d=\"M{LEFT} {y:.1}H{RIGHT}\"/><text x=\"{}\" y=\"{:.1}\">{label}</text>",
            LEFT - 8.0,
            y + 4.5
        );
    }
    svg.push_str("</g>\n");
    let _ = writeln!(svg, "<g fill=\"{FAINT}\" text-anchor=\"middle\">");
    let (top, bottom) = (LOSS.0, RATE.1);
    for (step, label) in x.marks(10).into_iter().filter(|(step, _)| step.fract() == 0.0) {
        let x = x.place(step);
        let _ = writeln!(
            svg,
            "<path stroke=\"{GRID}\" d=\"M{x:.1} {top}V{}M{x:.1} {}V{}\"/><text x=\"{x:.1}\" y=\"{}\">{label}</text>",
            LOSS.1,
            RATE.0,
            bottom + 5.0,
            bottom + 21.0
        );
    }
    let _ = writeln!(
        svg,
        "<text x=\"{}\" y=\"{}\">step</text>\n</g>\n<path stroke=\"{FAINT}\" d=\"M{LEFT} {2}H{RIGHT}M{LEFT} {bottom}H{RIGHT}\"/>",
        (LEFT + RIGHT) / 2.0,
        bottom + 40.0,
        LOSS.1
    );
}

/// Every loss, or the lowest and highest of each bucket.
fn draw_range(svg: &mut String, series: &Series, x: &Scale, y: &Scale) {
    let ends = |b: &super::series::Bucket| {
        let (low, high) = b.range;
        let both = [(b.step(), low), (b.step(), high)];
        both.into_iter().take(if low == high { 1 } else { 2 })
    };
    path(svg, series.buckets().iter().flat_map(ends), x, y, TRAINING, 1.5);
}

/// A line through points, or a dot where there is one alone.
fn path(
    svg: &mut String,
    points: impl Iterator<Item = (f64, f64)>,
    x: &Scale,
    y: &Scale,
    stroke: &str,
    width: f64,
) {
    let mut drawn = String::new();
    let mut count = 0;
    for (step, number) in points {
        let _ = write!(
            drawn,
            "{}{:.1} {:.1}",
            if count == 0 { 'M' } else { 'L' },
            x.place(step),
            y.place(number)
        );
        count += 1;
    }
    if count == 1 {
        // A line of no length with round ends.
        drawn.push_str("h0");
    }
    if count > 0 {
        let width = if count == 1 { 6.0 } else { width };
        let _ = writeln!(
            svg,
            "<path fill=\"none\" stroke=\"{stroke}\" stroke-width=\"{width}\" stroke-linejoin=\"round\" \
             stroke-linecap=\"round\" d=\"{drawn}\"/>"
        );
    }
}

/// Marks at the foot of the losses; whether there is any.
fn draw_checkpoints(svg: &mut String, checkpoints: &[u64], x: &Scale) -> bool {
    let mut steps = checkpoints.to_vec();
    steps.sort_unstable();
    let mut before = f64::NEG_INFINITY;
    for step in steps {
        let place = x.place(step as f64);
        if place - before < APART || !(LEFT..=RIGHT).contains(&place) {
            continue;
        }
        before = place;
        let _ = writeln!(svg, "{}", triangle(place, LOSS.1 - 11.0, &format!("checkpoint of step {step}")));
    }
    before.is_finite()
}

/// A ring around the best evaluation, and its loss.
fn draw_best(svg: &mut String, best: Evaluation, x: &Scale, y: &Scale) {
    let (x, y) = (x.place(best.step as f64), y.place(best.loss));
    // On the side that has room.
    let (text, anchor) = if x > RIGHT - 90.0 { (x - 10.0, "end") } else { (x + 10.0, "start") };
    let line = if y > LOSS.1 - FOOT - 20.0 { y - 11.0 } else { y + 18.0 };
    let _ = writeln!(
        svg,
        "{}<text x=\"{text:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\" font-weight=\"600\" stroke=\"#ffffff\" \
         stroke-width=\"3\" paint-order=\"stroke\">{}</text>",
        ring(x, y),
        line,
        short(best.loss)
    );
}

/// A loss in four decimals, or with an exponent where they would say little.
fn short(loss: f64) -> String {
    match loss.abs() {
        n if (1e-3..1e5).contains(&n) || n == 0.0 => format!("{loss:.4}"),
        _ => format!("{loss:.1e}"),
    }
}

fn line(stroke: &str, width: f64) -> String {
    format!("<path stroke=\"{stroke}\" stroke-width=\"{width}\" d=\"M0 7h14\"/>")
}

/// A dot; `tip` is shown under the pointer.
fn circle(x: f64, y: f64, tip: &str) -> String {
    format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{EVALUATION}\"><title>{tip}</title></circle>")
}

fn ring(x: f64, y: f64) -> String {
    format!(
        "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"6\" fill=\"none\" stroke=\"{INK}\" stroke-width=\"1.5\"/>"
    )
}

/// Ten high, its tip at the top; `tip` is shown under the pointer.
fn triangle(x: f64, y: f64, tip: &str) -> String {
    format!("<path fill=\"{CHECKPOINT}\" d=\"M{x:.1} {y}l5 10h-10z\"><title>{tip}</title></path>")
}
