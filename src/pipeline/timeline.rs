//! What every device did, and when: as a picture (SVG) and as a trace for Perfetto or chrome://tracing. Pure data in,
//! text out.

use std::fmt::Write;

use serde_json::{Value, json};

/// Where an event of a device is drawn: its queue works on both, and a copy may run beside compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Track {
    /// Kernels.
    Compute,
    /// What the host does for them.
    Host,
    /// Activations and gradients on their way over a link.
    Copy,
}

const TRACKS: [(Track, &str); 3] =
    [(Track::Compute, "compute"), (Track::Host, "host"), (Track::Copy, "copies")];

/// What a device was doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// F.
    Forward,
    /// B: I then W.
    Backward,
    /// I: the gradient of the input.
    BackwardInput,
    /// W: the gradients of the weights.
    BackwardWeight,
    /// The update of the weights.
    Optimizer,
    /// A transfer over a link.
    Copy,
    /// Work of the host for which the device waits. The device is not busy.
    Host,
}

use EventKind::*;

/// The order of the legend.
const KINDS: [EventKind; 7] = [Forward, Backward, BackwardInput, BackwardWeight, Optimizer, Copy, Host];

impl EventKind {
    /// Name in the legend, colour of the cell, colour of the text on it (as in the zero-bubble papers: F blue, B and I
    /// teal, W green).
    fn style(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Forward => ("forward", "#3f7fe0", "#ffffff"),
            Backward => ("backward", "#5cc8c0", "#0b3b38"),
            BackwardInput => ("backward, input", "#8fdcd5", "#0b3b38"),
            BackwardWeight => ("backward, weights", "#3fa45b", "#ffffff"),
            Optimizer => ("optimizer", "#8b62cf", "#ffffff"),
            Copy => ("copy", "#98a2b0", "#1f2933"),
            Host => ("host", "#ecc765", "#4a3500"),
        }
    }
}

/// One thing that one device did.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Position of the device in the pipeline.
    pub rank: usize,
    /// Compute or copy.
    pub track: Track,
    /// The action: "0F3", "1SEND_B2", "step".
    pub label: String,
    /// What it was.
    pub kind: EventKind,
    /// The microbatch, where there is one.
    pub microbatch: Option<usize>,
    /// Seconds on the host's clock since the start of the run.
    pub start: f64,
    /// Seconds on the host's clock since the start of the run.
    pub end: f64,
    /// Bytes moved; 0 for compute.
    pub bytes: u64,
}

/// The events of a run, or of some of its steps, in any order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Timeline {
    /// The devices' names, by rank.
    pub devices: Vec<String>,
    /// What they did. An event that ends before it starts, or lies more than 1e9 s from 0, is ignored.
    pub events: Vec<Event>,
}

impl Timeline {
    /// The share of the time between the first start and the last end of all events in which the device computed: 0 to
    /// 1, and 0 if nothing took time. Waiting for the host and copying are not computing.
    pub fn busy_fraction(&self, rank: usize) -> f64 {
        let (first, last) = self.span();
        let (mut busy, mut until) = (0.0, f64::NEG_INFINITY);
        for event in self.track(rank, Track::Compute).filter(|event| event.kind != Host) {
            busy += (event.end - event.start.max(until)).max(0.0);
            until = until.max(event.end);
        }
        if last > first { busy / (last - first) } else { 0.0 }
    }

    /// A picture: for each device a row of compute, a thin row of copies below it and its busy share; a legend and an
    /// axis. It stands alone, scales, brings its own background, and names an event under the pointer.
    pub fn to_svg(&self, title: &str) -> String {
        Picture::new(self).draw(title)
    }

    /// Chrome's trace format (JSON), which Perfetto opens: a thread a device for compute, one for the host and one
    /// for its copies, times in microseconds. Perfetto drops events that overlap on a thread, so each starts no sooner than the one
    /// before it ended.
    pub fn to_chrome_trace(&self) -> String {
        let mut lines =
            vec![json!({"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "polystage"}})];
        for rank in 0..self.ranks() {
            for (number, (track, what)) in TRACKS.into_iter().enumerate() {
                let tid = TRACKS.len() * rank + number + 1;
                let meta = |name, args| json!({"name": name, "ph": "M", "pid": 1, "tid": tid, "args": args});
                let name = format!("{rank} {} · {what}", self.name(rank));
                lines.push(meta("thread_name", json!({ "name": name })));
                lines.push(meta("thread_sort_index", json!({ "sort_index": tid })));
                // Whole nanoseconds, so that rounding cannot make neighbours overlap.
                let mut until = i64::MIN;
                for event in self.track(rank, track) {
                    let start = ((event.start * 1e9).round() as i64).max(until);
                    until = ((event.end * 1e9).round() as i64).max(start);
                    lines.push(json!({
                        "name": event.label, "cat": event.kind.style().0, "ph": "X", "pid": 1, "tid": tid,
                        "ts": start as f64 / 1e3, "dur": (until - start) as f64 / 1e3, "args": event.args(),
                    }));
                }
            }
        }
        let lines: Vec<String> = lines.iter().map(Value::to_string).collect();
        format!("{{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n{}\n]}}\n", lines.join(",\n"))
    }

    /// Events with usable times.
    fn usable(&self) -> impl Iterator<Item = &Event> {
        // Such times are nonsense, and in nanoseconds they would not fit an i64. NaN fails the comparisons.
        self.events.iter().filter(|e| e.start >= -1e9 && e.start <= e.end && e.end <= 1e9)
    }

    /// The usable events of one track of one device by start.
    fn track(&self, rank: usize, track: Track) -> impl Iterator<Item = &Event> {
        let mut events: Vec<&Event> = self.usable().filter(|e| e.rank == rank && e.track == track).collect();
        events.sort_by(|a, b| a.start.total_cmp(&b.start));
        events.into_iter()
    }

    /// First start and last end in seconds; equal if there is nothing.
    fn span(&self) -> (f64, f64) {
        let first = self.usable().map(|e| e.start).reduce(f64::min).unwrap_or(0.0);
        (first, self.usable().map(|e| e.end).fold(first, f64::max))
    }

    fn ranks(&self) -> usize {
        self.usable().map(|e| e.rank + 1).fold(self.devices.len(), usize::max)
    }

    fn name(&self, rank: usize) -> &str {
        self.devices.get(rank).map_or("unnamed device", String::as_str)
    }
}

impl Event {
    fn args(&self) -> Value {
        let mut args = serde_json::Map::new();
        if let Some(microbatch) = self.microbatch {
            args.insert("microbatch".into(), microbatch.into());
        }
        if self.bytes > 0 {
            args.insert("bytes".into(), self.bytes.into());
        }
        Value::Object(args)
    }

    /// The text under the pointer: what, when, how long, and for a copy how much and how fast.
    fn tooltip(&self) -> String {
        let seconds = self.end - self.start;
        let mut text = format!("{} at {}, took {}", self.label, duration(self.start), duration(seconds));
        if self.bytes > 0 {
            let megabytes = self.bytes as f64 / 1e6;
            let _ = write!(text, ", {megabytes:.3} MB");
            if seconds > 0.0 {
                let _ = write!(text, " ({:.2} GB/s)", megabytes / 1e3 / seconds);
            }
        }
        text
    }
}

fn duration(seconds: f64) -> String {
    if seconds.abs() >= 1.0 { format!("{seconds:.3} s") } else { format!("{:.3} ms", seconds * 1e3) }
}

// --- the picture ------------------------------------------------------------------------------------------------------

const WIDTH: f64 = 1200.0;
const MARGIN: f64 = 28.0;
/// Top of the first device's block: below the title and the legend.
const HEADER: f64 = 88.0;
/// A device's block: its name, compute, copies, and room to the next.
const BLOCK: f64 = 88.0;
const NAME: f64 = 24.0;
const COMPUTE: f64 = 34.0;
const COPIES: f64 = 10.0;
const FOOTER: f64 = 46.0;

const INK: &str = "#1f2933";
const FAINT: &str = "#66717f";
const LANE: &str = "#eef1f5";
const GRID: &str = "#d3d9e1";

/// Times to places on the page, in SVG units.
struct Picture<'a> {
    timeline: &'a Timeline,
    first: f64,
    scale: f64,
    last: f64,
}

impl Picture<'_> {
    fn new(timeline: &Timeline) -> Picture<'_> {
        let (first, last) = timeline.span();
        // Below a nanosecond there is nothing to see, and the division could overflow.
        let scale = if last - first >= 1e-9 { (WIDTH - 2.0 * MARGIN) / (last - first) } else { 0.0 };
        Picture { timeline, first, scale, last }
    }

    fn x(&self, time: f64) -> f64 {
        MARGIN + (time - self.first) * self.scale
    }

    fn draw(&self, title: &str) -> String {
        let bottom = HEADER + BLOCK * self.timeline.ranks() as f64;
        let height = bottom + FOOTER;
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
             height=\"{height}\" font-family=\"system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif\" \
             font-size=\"13\" fill=\"{INK}\">\n<title>{0}</title>\n\
             <rect x=\"0.5\" y=\"0.5\" width=\"{1}\" height=\"{2}\" rx=\"12\" fill=\"#ffffff\" stroke=\"{GRID}\"/>\n\
             <text x=\"{MARGIN}\" y=\"38\" font-size=\"19\" font-weight=\"600\">{0}</text>\n",
            escape(title),
            WIDTH - 1.0,
            height - 1.0,
        );
        self.legend(&mut svg);
        for rank in 0..self.timeline.ranks() {
            self.lanes(&mut svg, rank);
        }
        // Over the lanes, where the eye compares devices, and under the cells.
        self.axis(&mut svg, bottom);
        for rank in 0..self.timeline.ranks() {
            self.cells(&mut svg, rank);
        }
        svg.push_str("</svg>\n");
        svg
    }

    /// Only the kinds that occur.
    fn legend(&self, svg: &mut String) {
        let mut x = MARGIN;
        for kind in KINDS.into_iter().filter(|&kind| self.timeline.usable().any(|e| e.kind == kind)) {
            let (name, fill, _) = kind.style();
            let _ = writeln!(
                svg,
                "<rect x=\"{x}\" y=\"56\" width=\"14\" height=\"14\" rx=\"3\" fill=\"{fill}\"/>\
                 <text x=\"{}\" y=\"67.5\" fill=\"{FAINT}\">{name}</text>",
                x + 20.0
            );
            x += 48.0 + 7.2 * name.len() as f64;
        }
    }

    /// The device's name and busy share, and the empty lanes: what stays visible of them is idle time.
    fn lanes(&self, svg: &mut String, rank: usize) {
        let y = HEADER + BLOCK * rank as f64;
        let (right, width, copies) = (WIDTH - MARGIN, WIDTH - 2.0 * MARGIN, y + NAME + COMPUTE + 3.0);
        let _ = writeln!(
            svg,
            "<text x=\"{MARGIN}\" y=\"{0}\"><tspan fill=\"{FAINT}\">{rank}</tspan><tspan dx=\"8\" \
             font-weight=\"600\">{name}</tspan></text>\
             <text x=\"{right}\" y=\"{0}\" text-anchor=\"end\">busy {busy:.0} %</text>\n\
             <rect x=\"{MARGIN}\" y=\"{1}\" width=\"{width}\" height=\"{COMPUTE}\" rx=\"3\" fill=\"{LANE}\"/>\
             <rect x=\"{MARGIN}\" y=\"{copies}\" width=\"{width}\" height=\"{COPIES}\" rx=\"2\" fill=\"{LANE}\"/>",
            y + NAME - 8.0,
            y + NAME,
            name = escape(self.timeline.name(rank)),
            busy = 100.0 * self.timeline.busy_fraction(rank),
        );
    }

    fn axis(&self, svg: &mut String, bottom: f64) {
        let bottom = bottom - 8.0;
        let _ = writeln!(
            svg,
            "<path d=\"M{MARGIN} {bottom}H{}\" stroke=\"{FAINT}\"/>\n<g text-anchor=\"middle\" fill=\"{FAINT}\">",
            WIDTH - MARGIN
        );
        // Steps of 1, 2 or 5 times a power of ten, about ten of them.
        let rough = (self.last - self.first).max(f64::MIN_POSITIVE) / 10.0;
        let power = 10f64.powf(rough.log10().floor());
        let step =
            power * [1.0, 2.0, 5.0, 10.0].into_iter().find(|m| m * power >= rough * 0.999).unwrap_or(10.0);
        let (unit, factor) = if self.last - self.first >= 2.0 { ("s", 1.0) } else { ("ms", 1e3) };
        let decimals = (-((step * factor).log10() + 1e-9).floor()).clamp(0.0, 9.0) as usize;
        let ticks = (0..=10).map(|i| ((self.first / step).ceil() + f64::from(i)) * step);
        for tick in ticks.take_while(|&tick| self.scale > 0.0 && tick <= self.last + step * 1e-6) {
            let (x, y, value) = (self.x(tick), bottom + 21.0, tick * factor);
            let _ = write!(svg, "<path stroke=\"{GRID}\" d=\"M{x:.2} {bottom}v5");
            // Only across the lanes: a line through a device's name would make it hard to read.
            for rank in 0..self.timeline.ranks() {
                let _ =
                    write!(svg, "M{x:.2} {}v{}", HEADER + BLOCK * rank as f64 + NAME, COMPUTE + 3.0 + COPIES);
            }
            let _ = writeln!(svg, "\"/><text x=\"{x:.2}\" y=\"{y}\">{value:.decimals$}</text>");
        }
        let _ =
            writeln!(svg, "<text x=\"{}\" y=\"{}\">time in {unit}</text>\n</g>", WIDTH / 2.0, bottom + 40.0);
    }

    fn cells(&self, svg: &mut String, rank: usize) {
        let y = HEADER + BLOCK * rank as f64 + NAME;
        svg.push_str("<g text-anchor=\"middle\">\n");
        for (track, top, height) in [
            (Track::Compute, y, COMPUTE),
            (Track::Host, y + COMPUTE + 3.0, COPIES),
            (Track::Copy, y + COMPUTE + 3.0, COPIES),
        ] {
            for event in self.timeline.track(rank, track) {
                let (_, fill, ink) = event.kind.style();
                let (x, mut width) = (self.x(event.start), (event.end - event.start) * self.scale);
                // A hair of white between neighbours, where there is room; and nothing is too short to be seen.
                width = if width > 4.0 { width - 1.0 } else { width.max(0.5) };
                let radius = if width > 8.0 { 2 } else { 0 };
                let _ = write!(
                    svg,
                    "<rect x=\"{x:.2}\" y=\"{top}\" width=\"{width:.2}\" height=\"{height}\" rx=\"{radius}\" \
                     fill=\"{fill}\"><title>{}</title></rect>",
                    escape(&event.tooltip())
                );
                let text = event.microbatch.map_or_else(|| event.label.clone(), |m| m.to_string());
                if track == Track::Compute && 8.0 * text.chars().count() as f64 + 4.0 <= width {
                    let (x, y) = (x + width / 2.0, top + height / 2.0 + 4.5);
                    let text = escape(&text);
                    let _ = write!(
                        svg,
                        "<text x=\"{x:.2}\" y=\"{y}\" fill=\"{ink}\" pointer-events=\"none\">{text}</text>"
                    );
                }
                svg.push('\n');
            }
        }
        svg.push_str("</g>\n");
    }
}

/// Text for XML; a control character, which XML cannot hold, becomes U+FFFD.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}
