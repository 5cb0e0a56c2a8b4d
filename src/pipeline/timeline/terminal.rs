//! Lines of text for a terminal, coloured or plain, that are never wider than it.

use super::colour::Colour;
use super::{Event, EventKind, Timeline, Track};

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
        ' '..='~' | '¡'..='ʯ' | '™' | '…' | '→' | '█' | '▌' | '▐' | '─' | '┬' | '└' | '┴' | '├' => c,
        _ => '?',
    }
}

/// Where a timeline lies in the columns of a line.
#[derive(Clone, Copy)]
pub(super) struct Columns {
    pub first: f64,
    pub last: f64,
    pub columns: usize,
}

impl Columns {
    /// The column, with fractions, at which `time` lies.
    pub fn at(&self, time: f64) -> f64 {
        if self.last - self.first < 1e-9 {
            return 0.0;
        }
        (time - self.first) / (self.last - self.first) * self.columns as f64
    }

    /// For each of `parts` equal parts of the width the event that fills most of it, if that is more than what is idle.
    fn sample<'a>(&self, events: &[&'a Event], parts: usize) -> Vec<Option<&'a Event>> {
        let mut best = vec![(None, 0.0); parts];
        let mut busy = vec![0.0; parts];
        let per_column = parts as f64 / self.columns.max(1) as f64;
        for event in events {
            let (start, end) = (self.at(event.start) * per_column, self.at(event.end) * per_column);
            for part in start.max(0.0) as usize..(end.ceil().max(0.0) as usize).min(parts) {
                let covered = end.min(part as f64 + 1.0) - start.max(part as f64);
                busy[part] += covered;
                if covered > best[part].1 {
                    best[part] = (Some(*event), covered);
                }
            }
        }
        best.into_iter().zip(busy).map(|((event, _), busy)| event.filter(|_| busy >= 0.5)).collect()
    }
}

/// Appends what the device of `rank` computed: coloured, two parts of time in a column; plain, letters.
pub(super) fn lane(line: &mut Line, timeline: &Timeline, rank: usize, columns: Columns, colour: bool) {
    let events: Vec<&Event> = timeline.track(rank, Track::Compute).collect();
    let mut cells: Vec<Cell> = if colour {
        let halves = columns.sample(&events, 2 * columns.columns);
        halves.chunks(2).map(|half| halves_cell(half[0], half[1])).collect()
    } else {
        let whole = columns.sample(&events, columns.columns);
        whole.iter().map(|event| plain_cell(event.map(|event| event.kind))).collect()
    };
    for event in events {
        // Only where all columns of the text belong to the event.
        let (start, end) = (columns.at(event.start), columns.at(event.end));
        let (from, to) = (start.ceil().max(0.0) as usize, (end.floor().max(0.0) as usize).min(cells.len()));
        let (fill, ink) = event.kind.colours();
        let number = event.microbatch.map(|m| m.to_string()).unwrap_or_default();
        let style = Style { ink: Some(ink), fill: Some(fill), ..Style::PLAIN };
        if colour && number.len() < to.saturating_sub(from) {
            let at = from + (to - from - number.len()) / 2;
            for (cell, c) in cells[at..].iter_mut().zip(number.chars()) {
                *cell = Cell { text: c, style };
            }
        } else if !colour {
            let from = start.round().max(0.0) as usize;
            let to = (end.round().max(0.0) as usize).min(cells.len());
            let text = format!("{}{number}", event.kind.letter());
            if text.len() <= to.saturating_sub(from) {
                for (at, cell) in cells[from..to].iter_mut().enumerate() {
                    let c = text.chars().nth(at).unwrap_or('-');
                    *cell = Cell { text: c, style: Style::PLAIN };
                }
            }
        }
    }
    let room = line.width.saturating_sub(line.cells.len());
    line.cells.extend(cells.into_iter().take(room));
}

fn plain_cell(kind: Option<EventKind>) -> Cell {
    Cell { text: kind.map_or('.', EventKind::letter), style: Style::PLAIN }
}

/// The left and the right half of a column. Where both are alike it is a coloured blank, so that a text can go there.
fn halves_cell(left: Option<&Event>, right: Option<&Event>) -> Cell {
    let colour = |event: Option<&Event>| event.map(|event| event.kind.colours().0);
    match (colour(left), colour(right)) {
        (None, None) => Cell { text: '·', style: Style::FAINT },
        (Some(left), Some(right)) if left == right => {
            Cell { text: ' ', style: Style { fill: Some(left), ..Style::PLAIN } }
        }
        (Some(left), right) => {
            Cell { text: '▌', style: Style { ink: Some(left), fill: right, ..Style::PLAIN } }
        }
        (None, Some(right)) => Cell { text: '▐', style: Style::ink(right) },
    }
}
