//! A timeline as a picture, and the parts that pictures of steps share.

use std::fmt::Write;

use super::axis::{axis, duration};
use super::{DeviceName, Event, EventKind, Timeline, Track};
use crate::error::one_line;
use crate::picture::{FAINT, GRID, MARGIN, WIDTH, escape, open, swatch};

/// Empty rows.
const LANE: &str = "#eef1f5";
/// Top of the first device's block: below the title and the legend.
const HEADER: f64 = 88.0;
/// A device's block: its name, compute, copies, and room to the next.
const BLOCK: f64 = 88.0;
const NAME: f64 = 24.0;
/// Most characters of a name, beside which there is room for more.
const NAMED: usize = 110;
const COMPUTE: f64 = 34.0;
const COPIES: f64 = 10.0;
const FOOTER: f64 = 46.0;

impl Timeline {
    /// A picture: for each device a row of compute, a thin row of copies and the host's work below it, and its busy
    /// share; a legend and an axis. It stands alone, scales, brings its own background, and names an event under the
    /// pointer.
    pub fn to_svg(&self, title: &str) -> String {
        let (first, last) = self.span();
        let scale = Scale::new(first, last, MARGIN, WIDTH - MARGIN);
        let bottom = HEADER + BLOCK * self.ranks() as f64;
        let mut svg = open(title, bottom + FOOTER);
        legend(&mut svg, self.kinds(), 56.0);
        let lanes: Vec<Lane> = (0..self.ranks())
            .map(|rank| Lane { top: HEADER + BLOCK * rank as f64 + NAME, compute: COMPUTE, copies: COPIES })
            .collect();
        for (rank, lane) in lanes.iter().enumerate() {
            let y = lane.top - 8.0;
            let _ = writeln!(
                svg,
                "{}<text x=\"{}\" y=\"{y}\" text-anchor=\"end\">busy {:.0} %</text>",
                device(&self.device(rank), y),
                WIDTH - MARGIN,
                100.0 * self.busy_fraction(rank),
            );
            lane.draw(&mut svg, &scale, last);
        }
        // Over the lanes, where the eye compares devices, and under the cells.
        scale.draw(&mut svg, bottom - 8.0, &lanes);
        let labels = Labels::new(&[self], &scale);
        for (rank, lane) in lanes.iter().enumerate() {
            lane.cells(&mut svg, &scale, &labels, self, rank);
        }
        svg.push_str("</svg>\n");
        svg
    }

    /// The kinds that occur, in the order of the legend.
    pub(super) fn kinds(&self) -> impl Iterator<Item = EventKind> {
        EventKind::ALL.into_iter().filter(|&kind| self.usable().any(|event| event.kind() == kind))
    }
}

/// Colours and names in a row at `y`.
pub(super) fn legend(svg: &mut String, kinds: impl Iterator<Item = EventKind>, y: f64) {
    let mut x = MARGIN;
    for kind in kinds {
        x = swatch(svg, x, y, kind.colours().0, kind.name());
    }
}

/// A device's number and name.
pub(super) fn device(device: &DeviceName, y: f64) -> String {
    format!(
        "<text x=\"{MARGIN}\" y=\"{y}\"><tspan fill=\"{FAINT}\">{}</tspan><tspan dx=\"8\" \
         font-weight=\"600\">{}</tspan></text>",
        device.number,
        escape(&one_line(&device.title(), NAMED))
    )
}

/// Times to places on the page, in SVG units.
pub(super) struct Scale {
    first: f64,
    last: f64,
    left: f64,
    right: f64,
    per_second: f64,
}

impl Scale {
    pub fn new(first: f64, last: f64, left: f64, right: f64) -> Scale {
        // Below a nanosecond there is nothing to see, and the division could overflow.
        let per_second = if last - first >= 1e-9 { (right - left) / (last - first) } else { 0.0 };
        Scale { first, last, left, right, per_second }
    }

    pub fn x(&self, time: f64) -> f64 {
        self.left + (time - self.first) * self.per_second
    }

    /// What an event takes.
    fn width(&self, event: &Event) -> f64 {
        (event.end - event.start) * self.per_second
    }

    /// The axis at `y`, and its marks across the lanes: a line through a device's name would make it hard to read.
    pub fn draw(&self, svg: &mut String, y: f64, lanes: &[Lane]) {
        let Scale { left, right, .. } = *self;
        let _ = writeln!(
            svg,
            "<path d=\"M{left} {y}H{right}\" stroke=\"{FAINT}\"/>\n<g text-anchor=\"middle\" fill=\"{FAINT}\">",
        );
        let axis = axis(self.first, self.last, 10);
        for (time, number) in axis.marks {
            let x = self.x(time);
            let _ = write!(svg, "<path stroke=\"{GRID}\" d=\"M{x:.2} {y}v5");
            for lane in lanes {
                let _ = write!(svg, "M{x:.2} {}v{}", lane.top, lane.height());
            }
            let _ = writeln!(svg, "\"/><text x=\"{x:.2}\" y=\"{}\">{number}</text>", y + 21.0);
        }
        let (x, unit) = ((left + right) / 2.0, axis.unit);
        let _ = writeln!(svg, "<text x=\"{x}\" y=\"{}\">time in {unit}</text>\n</g>", y + 40.0);
    }
}

/// The rows of one device: compute, and below it a thin one for copies and the host's work.
pub(super) struct Lane {
    pub top: f64,
    pub compute: f64,
    pub copies: f64,
}

/// Between the two rows of a lane.
const GAP: f64 = 3.0;

impl Lane {
    pub fn height(&self) -> f64 {
        if self.copies > 0.0 { self.compute + GAP + self.copies } else { self.compute }
    }

    /// The empty rows up to `end`: what stays visible of them is idle time.
    pub fn draw(&self, svg: &mut String, scale: &Scale, end: f64) {
        let x = scale.left;
        let width = if scale.per_second > 0.0 { scale.x(end) - x } else { scale.right - x };
        for (top, height, radius) in [(self.top, self.compute, 3), (self.thin(), self.copies, 2)] {
            if height > 0.0 {
                let _ = writeln!(
                    svg,
                    "<rect x=\"{x}\" y=\"{top}\" width=\"{width:.2}\" height=\"{height}\" rx=\"{radius}\" \
                     fill=\"{LANE}\"/>"
                );
            }
        }
    }

    fn thin(&self) -> f64 {
        self.top + self.compute + GAP
    }

    /// What the device of `rank` did.
    pub fn cells(&self, svg: &mut String, scale: &Scale, labels: &Labels, timeline: &Timeline, rank: usize) {
        svg.push_str("<g text-anchor=\"middle\">\n");
        for (track, top, height) in [
            (Track::Compute, self.top, self.compute),
            (Track::Host, self.thin(), self.copies),
            (Track::Copy, self.thin(), self.copies),
        ] {
            for event in timeline.track(rank, track).filter(|_| height > 0.0) {
                cell(svg, scale, labels, event, top, height);
            }
        }
        svg.push_str("</g>\n");
    }
}

/// What stands on a cell that has room for it.
fn text(event: &Event) -> String {
    event.microbatch().map_or_else(|| event.what.to_string(), |m| m.to_string())
}

/// How cells are labelled: in one size, numbers of a kind only where most of its cells have room, other words wherever
/// they fit. A number needs room for the longest, since numbers that end at 9 would say nothing about the rest. The
/// largest cell of each timeline has a label whatever its size.
pub(super) struct Labels<'a> {
    size: f64,
    kinds: Vec<EventKind>,
    longest: usize,
    largest: Vec<&'a Event>,
}

impl<'a> Labels<'a> {
    pub fn new(timelines: &[&'a Timeline], scale: &Scale) -> Labels<'a> {
        let computed = |timeline: &&'a Timeline| timeline.usable().filter(|e| e.track == Track::Compute);
        let all = || timelines.iter().flat_map(computed).filter(|event| event.microbatch().is_some());
        let longest = all().map(|event| text(event).len()).max().unwrap_or(0);
        let largest = timelines.iter().filter_map(|timeline| {
            // The first of several.
            computed(timeline).reduce(|a, b| if b.end - b.start > a.end - a.start { b } else { a })
        });
        let mut labels = Labels { size: LARGE, kinds: Vec::new(), longest, largest: largest.collect() };
        let most = |labels: &Labels, kind| {
            let fits = |event: &&Event| labels.fits(event, scale.width(event));
            let of_kind = || all().filter(|event| event.kind() == kind);
            2 * of_kind().filter(fits).count() > of_kind().count()
        };
        let kinds = |labels: &Labels| EventKind::ALL.into_iter().filter(|&kind| most(labels, kind)).collect();
        let large: Vec<EventKind> = kinds(&labels);
        labels.size = SMALL;
        labels.kinds = kinds(&labels);
        if large == labels.kinds {
            labels.size = LARGE;
        }
        labels
    }

    /// Whether the text of an event fits into this width.
    fn fits(&self, event: &Event, width: f64) -> bool {
        let letters =
            if event.microbatch().is_some() { self.longest } else { event.what.to_string().chars().count() };
        breadth(letters, self.size) <= width
    }

    /// In which size an event is labelled on a cell of this width, and whether upright, if it is.
    fn of(&self, event: &Event, width: f64, height: f64) -> Option<(f64, bool)> {
        let shown = event.microbatch().is_none() || self.kinds.contains(&event.kind());
        if shown && self.fits(event, width) {
            return Some((self.size, false));
        }
        // In the size for which there is room: who wants to read it can enlarge the picture.
        let is_largest = self.largest.iter().any(|largest| std::ptr::eq(*largest, event));
        let letters = text(event).chars().count();
        let room = |along: f64, across: f64| (along / breadth(letters, 1.0)).min(0.9 * across).min(self.size);
        let (flat, upright) = (room(width, height), room(height, width));
        is_largest.then_some((flat.max(upright), upright > flat))
    }
}

/// Sizes of labels.
const LARGE: f64 = 13.0;
const SMALL: f64 = 10.0;

/// What so many letters of a size take, with air on both sides.
fn breadth(letters: usize, size: f64) -> f64 {
    size * (0.62 * letters as f64 + 0.25)
}

fn cell(svg: &mut String, scale: &Scale, labels: &Labels, event: &Event, top: f64, height: f64) {
    let (fill, ink) = event.kind().colours();
    let (x, mut width) = (scale.x(event.start), scale.width(event));
    // A hair of white between neighbours, where there is room; and nothing is too short to be seen.
    width = if width > 4.0 { width - 1.0 } else { width.max(0.5) };
    let radius = if width > 8.0 { 2 } else { 0 };
    let _ = write!(
        svg,
        "<rect x=\"{x:.2}\" y=\"{top}\" width=\"{width:.2}\" height=\"{height}\" rx=\"{radius}\" \
         fill=\"{fill}\"><title>{}</title></rect>",
        escape(&tooltip(event))
    );
    let label = labels.of(event, width, height).filter(|_| event.track == Track::Compute);
    if let Some((size, upright)) = label {
        let (x, y) = (x + width / 2.0, top + height / 2.0);
        // Turned about the middle of the cell.
        let turn = if upright { format!(" transform=\"rotate(-90 {x:.2} {y:.2})\"") } else { String::new() };
        let _ = write!(
            svg,
            "<text x=\"{x:.2}\" y=\"{:.2}\" font-size=\"{size:.4}\" fill=\"{ink}\" pointer-events=\"none\"{turn}>{}</text>",
            y + 0.35 * size,
            escape(&text(event))
        );
    }
    svg.push('\n');
}

/// The text under the pointer: what, when, how long, and for a copy how much and how fast.
fn tooltip(event: &Event) -> String {
    let seconds = event.end - event.start;
    let mut text = format!("{} at {}, took {}", event.what, duration(event.start), duration(seconds));
    if event.bytes > 0 {
        let megabytes = event.bytes as f64 / 1e6;
        let _ = write!(text, ", {megabytes:.3} MB");
        let rate = megabytes / 1e3 / seconds;
        if seconds > 0.0 && rate.is_finite() {
            let _ = write!(text, " ({rate:.2} GB/s)");
        }
    }
    text
}
