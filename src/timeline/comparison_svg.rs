//! A comparison as a picture: for each device the predicted row above the measured one, on one time axis.

use std::fmt::Write;

use super::axis::duration;
use super::comparison::{ActionTime, Comparison, difference};
use super::svg::{Labels, Lane, Scale, device, legend};
use super::{EventKind, Timeline};
use crate::picture::{FAINT, GRID, INK, MARGIN, WIDTH, escape, open, swatch};
use crate::schedule::{Cause, Gap};

/// Top of the first device's block: below the title, the summary and two rows of legend.
const HEADER: f64 = 122.0;
/// Left and right of the lanes: what a row is, and how busy.
const LABEL: f64 = 84.0;
const BUSY: f64 = 92.0;
const NAME: f64 = 24.0;
const COMPUTE: f64 = 26.0;
const COPIES: f64 = 6.0;
/// From one row to the next, and below the last.
const ROW: f64 = 42.0;
const BLOCK_GAP: f64 = 10.0;
const AXIS: f64 = 56.0;
/// Gaps of a cause that are narrower together are not seen.
const SEEN: f64 = 1.0;
/// A line of a table.
const LINE: f64 = 20.0;
/// Right edges of the columns of the left table; of the right one, whose first column starts there.
const SHARES: [f64; 7] = [200.0, 284.0, 354.0, 442.0, 506.0, 570.0, 642.0];
const TIMES: [f64; 4] = [760.0, 940.0, 1056.0, WIDTH - MARGIN];
/// Lines that the right table may have even where the left one has fewer.
const ACTIONS: usize = 8;

impl Comparison {
    /// A picture: both steps with the causes of idle time, where the time went, and which actions took longer than
    /// predicted. It stands alone, scales, brings its own background, and names what is under the pointer.
    pub fn to_svg(&self, title: &str) -> String {
        let rows = self.steps().count() as f64;
        let block = NAME + ROW * rows + BLOCK_GAP;
        let bottom = HEADER + block * self.ranks() as f64;
        let table = bottom + AXIS;
        let mut actions = self.largest_differences();
        actions.truncate(ACTIONS.max(self.ranks() * self.steps().count()));
        let lines = (self.ranks() * self.steps().count()).max(actions.len()) as f64;
        let mut svg = open(title, table + LINE * (lines + 2.0) + 28.0);
        let _ = writeln!(svg, "<text x=\"{MARGIN}\" y=\"62\">{}</text>", escape(&self.summary()));
        let scale = Scale::new(0.0, self.end(), MARGIN + LABEL, WIDTH - MARGIN - BUSY);
        self.legends(&mut svg, &scale);
        let lane = |rank: usize, row: usize| Lane {
            top: HEADER + block * rank as f64 + NAME + ROW * row as f64,
            compute: COMPUTE,
            copies: COPIES,
        };
        let mut lanes = Vec::new();
        for rank in 0..self.ranks() {
            let y = HEADER + block * rank as f64 + NAME - 8.0;
            svg += &device(&self.measured.timeline.device(rank), y);
            for (row, (what, step)) in self.steps().enumerate() {
                let lane = lane(rank, row);
                lane.draw(&mut svg, &scale, step.seconds);
                label(&mut svg, &lane, what, step.busy(rank));
                for gap in step.gaps.iter().filter(|gap| gap.rank == rank) {
                    idle(&mut svg, &scale, &lane, gap, &self.words(gap));
                }
                lanes.push(lane);
            }
        }
        scale.draw(&mut svg, bottom - 8.0, &lanes);
        let timelines: Vec<&Timeline> = self.steps().map(|(_, step)| &step.timeline).collect();
        let labels = Labels::new(&timelines, &scale);
        for rank in 0..self.ranks() {
            for (row, (_, step)) in self.steps().enumerate() {
                lane(rank, row).cells(&mut svg, &scale, &labels, &step.timeline, rank);
            }
        }
        self.shares(&mut svg, table + LINE);
        times(&mut svg, table + LINE, &actions);
        svg.push_str("</svg>\n");
        svg
    }

    fn legends(&self, svg: &mut String, scale: &Scale) {
        let occurs = |timeline: &Timeline, kind| timeline.kinds().any(|k| k == kind);
        let kinds = EventKind::ALL.into_iter();
        legend(svg, kinds.filter(|&kind| self.steps().any(|(_, step)| occurs(&step.timeline, kind))), 76.0);
        let gaps = || self.steps().flat_map(|(_, step)| &step.gaps);
        let width = |cause: &Cause| -> f64 {
            let own = gaps().filter(|gap| gap.cause == *cause);
            own.map(|gap| scale.x(gap.end) - scale.x(gap.start)).sum()
        };
        let occurs = |cause: &Cause| width(cause) >= SEEN;
        let mut x = MARGIN;
        for cause in Cause::ALL.into_iter().filter(occurs) {
            x = swatch(svg, x, 98.0, cause.colours().0, &format!("idle: {}", cause.name()));
        }
    }

    /// The table of where the time of a step goes.
    fn shares(&self, svg: &mut String, top: f64) {
        heading(svg, MARGIN, SHARES[6], top, "Where the time goes, in % of the step");
        for ((name, _), x) in self.measured.parts(0).into_iter().zip(SHARES) {
            number(svg, x, top + LINE, FAINT, name);
        }
        let mut y = top + LINE;
        for rank in 0..self.ranks() {
            for (row, (what, step)) in self.steps().enumerate() {
                y += LINE;
                let device = if row == 0 { self.number(rank).to_string() } else { String::new() };
                text(svg, MARGIN, y, FAINT, &device);
                text(svg, MARGIN + 24.0, y, FAINT, what);
                for ((_, seconds), x) in step.parts(rank).into_iter().zip(SHARES) {
                    let share = 100.0 * seconds / step.seconds.max(f64::MIN_POSITIVE);
                    let ink = if share < 0.05 { GRID } else { INK };
                    number(svg, x, y, ink, &format!("{share:.1}"));
                }
            }
        }
    }

    /// The text under the pointer.
    fn words(&self, gap: &Gap) -> String {
        let took = duration(gap.end - gap.start);
        match (gap.cause, gap.peer.map(|peer| self.number(peer))) {
            (Cause::Imbalance, Some(peer)) => format!("imbalance: waits {took} for device {peer}"),
            (Cause::Link, Some(peer)) => format!("link: waits {took} for a tensor from device {peer}"),
            (cause, _) => format!("{}: nothing to do for {took}", cause.name()),
        }
    }

    /// The kinds of actions, those first whose time made the step most different from the prediction.
    pub(super) fn largest_differences(&self) -> Vec<ActionTime> {
        let mut actions = self.actions.clone();
        let weight = |a: &ActionTime| match a.predicted {
            Some(predicted) => (a.measured - predicted).abs() * a.count as f64,
            None => a.measured * a.count as f64,
        };
        actions.sort_by(|a, b| weight(b).total_cmp(&weight(a)));
        actions
    }
}

/// What a row is and how busy its device.
fn label(svg: &mut String, lane: &Lane, what: &str, busy: f64) {
    let y = lane.top + COMPUTE / 2.0 + 4.5;
    let ink = if what == "measured" { INK } else { FAINT };
    let _ = writeln!(
        svg,
        "<text x=\"{}\" y=\"{y}\" text-anchor=\"end\" fill=\"{ink}\">{what}</text>\
         <text x=\"{}\" y=\"{y}\" text-anchor=\"end\" fill=\"{ink}\">busy {:.0} %</text>",
        MARGIN + LABEL - 10.0,
        WIDTH - MARGIN,
        100.0 * busy
    );
}

fn idle(svg: &mut String, scale: &Scale, lane: &Lane, gap: &Gap, words: &str) {
    let (x, width) = (scale.x(gap.start), scale.x(gap.end) - scale.x(gap.start));
    let fill = gap.cause.colours().0;
    let _ = writeln!(
        svg,
        "<rect x=\"{x:.2}\" y=\"{}\" width=\"{width:.2}\" height=\"{COMPUTE}\" fill=\"{fill}\">\
         <title>{words}</title></rect>",
        lane.top,
    );
}

/// The table of mean times of actions.
fn times(svg: &mut String, top: f64, actions: &[ActionTime]) {
    let predicted = actions.iter().any(|a| a.predicted.is_some());
    let title = if predicted {
        "Mean time of an action in ms, largest differences first"
    } else {
        "Mean time of an action in ms, largest share first"
    };
    heading(svg, TIMES[0], TIMES[3], top, title);
    let mut row = |y: f64, ink: &str, cells: [String; 4]| {
        text(svg, TIMES[0], y, ink, &cells[0]);
        if predicted {
            (1..4).for_each(|column| number(svg, TIMES[column], y, ink, &cells[column]));
        } else {
            number(svg, TIMES[3], y, ink, &cells[2]);
        }
    };
    row(top + LINE, FAINT, ["action", "predicted", "measured", "difference"].map(String::from));
    for (line, action) in actions.iter().enumerate() {
        let milliseconds = |seconds: f64| format!("{:.3}", 1e3 * seconds);
        let cells = [
            format!("{} × {}{}", action.count, action.stage, action.kind),
            action.predicted.map_or("–".into(), milliseconds),
            milliseconds(action.measured),
            // A minus as wide as the plus.
            action.error().map_or("–".into(), |error| difference(error).replace('-', "−")),
        ];
        row(top + LINE * (line as f64 + 2.0), INK, cells);
    }
}

fn heading(svg: &mut String, left: f64, right: f64, y: f64, text: &str) {
    let _ = writeln!(
        svg,
        "<text x=\"{left}\" y=\"{}\" font-weight=\"600\">{text}</text>\
         <path d=\"M{left} {}H{right}\" stroke=\"{GRID}\"/>",
        y - 4.0,
        y + 4.0
    );
}

fn text(svg: &mut String, x: f64, y: f64, ink: &str, text: &str) {
    let _ = writeln!(svg, "<text x=\"{x}\" y=\"{y}\" fill=\"{ink}\">{text}</text>");
}

/// Text that ends at `x`.
fn number(svg: &mut String, x: f64, y: f64, ink: &str, text: &str) {
    let _ = writeln!(svg, "<text x=\"{x}\" y=\"{y}\" text-anchor=\"end\" fill=\"{ink}\">{text}</text>");
}
