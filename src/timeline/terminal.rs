//! Lines of text for a terminal, coloured or plain, that are never wider than it.

use std::ops::Range;

use super::colour::Colour;
use super::step::Step;
use super::{Event, EventKind, Track};
use crate::schedule::{Cause, Gap};

/// One line, a character a column, cut off at a width.
pub(super) struct Line {
    width: usize,
    cells: Vec<Cell>,
}

/// One column.
#[derive(Clone, Copy, PartialEq)]
struct Cell {
    text: char,
    style: Style,
}

/// How a character looks where there are colours.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Style {
    pub ink: Option<Colour>,
    pub fill: Option<Colour>,
    pub bold: bool,
    pub faint: bool,
}

impl Style {
    pub const PLAIN: Style = Style { ink: None, fill: None, bold: false, faint: false };
    pub const BOLD: Style = Style { bold: true, ..Style::PLAIN };
    pub const FAINT: Style = Style { faint: true, ..Style::PLAIN };

    pub fn ink(colour: Colour) -> Style {
        Style { ink: Some(colour), ..Style::PLAIN }
    }
}

impl Line {
    pub fn new(width: usize) -> Line {
        Line { width, cells: Vec::new() }
    }

    /// Columns filled so far.
    pub fn len(&self) -> usize {
        self.cells.len()
    }

    /// Appends `text`; what does not fit is left out, the last column then saying so.
    pub fn push(&mut self, text: &str, style: Style) -> &mut Line {
        for c in text.chars() {
            if self.cells.len() < self.width {
                self.cells.push(Cell { text: narrow(c), style });
            } else if let Some(last) = self.cells.last_mut() {
                last.text = '…';
            }
        }
        self
    }

    /// Appends blanks up to column `to`.
    pub fn pad(&mut self, to: usize) -> &mut Line {
        while self.cells.len() < to.min(self.width) {
            self.cells.push(Cell { text: ' ', style: Style::PLAIN });
        }
        self
    }

    /// Appends a line break to `text`, after the line: with escapes for colours, or without any.
    pub fn finish(mut self, text: &mut String, colour: bool) {
        while self.cells.last().is_some_and(|cell| cell.text == ' ' && cell.style.fill.is_none()) {
            self.cells.pop();
        }
        let mut style = Style::PLAIN;
        for cell in self.cells {
            if colour && cell.style != style {
                style = cell.style;
                text.push_str(&escape(style));
            }
            text.push(cell.text);
        }
        if style != Style::PLAIN {
            text.push_str(&escape(Style::PLAIN));
        }
        text.push('\n');
    }
}

/// The ANSI escape that sets a style, whatever was set before.
fn escape(style: Style) -> String {
    let mut text = String::from("\x1b[0");
    for (set, code) in [(style.bold, ";1"), (style.faint, ";2")] {
        if set {
            text.push_str(code);
        }
    }
    for (colour, code) in [(style.ink, 38), (style.fill, 48)] {
        if let Some([red, green, blue]) = colour.map(Colour::channels) {
            text += &format!(";{code};2;{red};{green};{blue}");
        }
    }
    text + "m"
}

/// A character that takes one column, and no escape: names come from drivers and files.
fn narrow(c: char) -> char {
    match c {
        ' '..='~' | '¡'..='ʯ' | '™' | '…' | '→' | '█' | '▌' | '▐' | '─' | '┬' | '└' | '┴' | '├' => {
            c
        }
        _ => '?',
    }
}

/// Where times lie in the columns of a line.
#[derive(Clone, Copy)]
pub(super) struct Columns {
    /// Seconds that fill all of them; they start at 0.
    pub seconds: f64,
    pub count: usize,
}

impl Columns {
    /// The column, with fractions, at which `time` lies.
    pub fn at(&self, time: f64) -> f64 {
        if self.seconds < 1e-9 { 0.0 } else { time / self.seconds * self.count as f64 }
    }

    /// For each of `parts` equal parts of the width the event that fills most of it, where not most of it is idle.
    fn sample<'a>(&self, events: &[&'a Event], parts: usize) -> Vec<Option<&'a Event>> {
        let mut best = vec![(None, 0.0); parts];
        let mut busy = vec![0.0; parts];
        let per_column = parts as f64 / self.count.max(1) as f64;
        for event in events {
            let (start, end) = (self.at(event.start) * per_column, self.at(event.end) * per_column);
            for part in start as usize..(end.ceil() as usize).min(parts) {
                let covered = end.min(part as f64 + 1.0) - start.max(part as f64);
                busy[part] += covered;
                if covered > best[part].1 {
                    best[part] = (Some(*event), covered);
                }
            }
        }
        best.into_iter().zip(busy).map(|((event, _), busy)| event.filter(|_| busy >= 0.5)).collect()
    }

    /// The columns that belong to an event as a whole.
    fn inside(&self, event: &Event) -> Range<usize> {
        let from = (self.at(event.start).ceil() as usize).min(self.count);
        from..(self.at(event.end) as usize).clamp(from, self.count)
    }

    /// The column of `time`, and no further than the last.
    fn nearest(&self, time: f64) -> usize {
        (self.at(time).round().max(0.0) as usize).min(self.count)
    }
}

/// What occurs in lanes, for the legend below them.
#[derive(Default)]
pub(super) struct Drawn {
    pub kinds: Vec<EventKind>,
    pub causes: Vec<Cause>,
    /// Whether there is idle time of any cause.
    pub idle: bool,
}

/// Appends what a device did in a step: coloured, two parts of time in a column; plain, letters.
pub(super) fn lane(
    line: &mut Line,
    step: &Step,
    rank: usize,
    columns: Columns,
    colour: bool,
    drawn: &mut Drawn,
) {
    let events: Vec<&Event> = step.timeline.track(rank, Track::Compute).collect();
    let parts = columns.sample(&events, if colour { 2 * columns.count } else { columns.count });
    drawn.kinds.extend(parts.iter().flatten().map(|event| event.kind()));
    let mut cells: Vec<Option<Cell>> = if colour {
        parts.chunks(2).map(|half| coloured(half[0], half[1])).collect()
    } else {
        let cell = |event: &Event| Cell { text: event.kind().letter(), style: Style::PLAIN };
        parts.iter().map(|event| event.map(cell)).collect()
    };
    let mut before: Option<&Event> = None;
    // Numbers here and there would say nothing about the rest.
    let numbered = events.iter().filter(|event| event.microbatch().is_some());
    let roomy = numbered.clone().filter(|event| columns.inside(event).len() >= number(event).len());
    let numbers = 2 * roomy.count() > numbered.count();
    for event in events {
        let (number, (fill, ink)) = (number(event), event.kind().colours());
        if colour {
            let style = |ink| Style { ink: Some(ink), fill: Some(fill), ..Style::PLAIN };
            let room = columns.inside(event);
            if numbers && number.len() <= room.len() {
                let at = room.start + (room.len() - number.len()) / 2;
                write(&mut cells[at..], &number, style(ink));
            }
            let half = |time: f64| (2.0 * columns.at(time)).round() as usize;
            let touches =
                |before: &Event| before.kind() == event.kind() && half(before.end) == half(event.start);
            if before.is_some_and(touches)
                && let Some(Some(cell)) = cells.get_mut(half(event.start) / 2)
                && *cell == blank(fill)
            {
                *cell = Cell { text: '▏', style: style(fill.darker()) };
            }
        } else {
            let (from, to) = (columns.nearest(event.start), columns.nearest(event.end));
            let text = format!("{}{number}", event.kind().letter());
            if text.len() <= to - from {
                write(&mut cells[from..to], &format!("{text:-<0$}", to - from), Style::PLAIN);
            }
        }
        before = Some(event);
    }
    let gaps: Vec<&Gap> = step.gaps.iter().filter(|gap| gap.rank == rank).collect();
    let ends = columns.nearest(step.seconds);
    for (column, cell) in cells.into_iter().enumerate() {
        let time = (column as f64 + 0.5) / columns.count as f64 * columns.seconds;
        let gap = gaps.iter().find(|gap| gap.start <= time && time < gap.end);
        if cell.is_none() {
            drawn.causes.extend(gap.map(|gap| gap.cause));
            drawn.idle |= gap.is_some() || column < ends;
        }
        let idle = match gap {
            Some(gap) if colour => Cell { text: '·', style: Style::ink(gap.cause.colours().1) },
            _ if column >= ends => Cell { text: ' ', style: Style::PLAIN },
            _ => Cell { text: if colour { '·' } else { '.' }, style: Style::FAINT },
        };
        if line.cells.len() < line.width {
            line.cells.push(cell.unwrap_or(idle));
        }
    }
}

fn number(event: &Event) -> String {
    event.microbatch().map(|microbatch| microbatch.to_string()).unwrap_or_default()
}

fn write(cells: &mut [Option<Cell>], text: &str, style: Style) {
    for (cell, text) in cells.iter_mut().zip(text.chars()) {
        *cell = Some(Cell { text, style });
    }
}

fn blank(fill: Colour) -> Cell {
    Cell { text: ' ', style: Style { fill: Some(fill), ..Style::PLAIN } }
}

/// The left and the right half of a column. Where both are alike it is a coloured blank, so that a text can go there.
fn coloured(left: Option<&Event>, right: Option<&Event>) -> Option<Cell> {
    let colour = |event: Option<&Event>| event.map(|event| event.kind().colours().0);
    let (text, style) = match (colour(left), colour(right)) {
        (None, None) => return None,
        (Some(left), Some(right)) if left == right => (' ', Style { fill: Some(left), ..Style::PLAIN }),
        (Some(left), right) => ('▌', Style { ink: Some(left), fill: right, ..Style::PLAIN }),
        (None, Some(right)) => ('▐', Style::ink(right)),
    };
    Some(Cell { text, style })
}
