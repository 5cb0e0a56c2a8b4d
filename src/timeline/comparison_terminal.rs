//! A comparison for a terminal: the lanes of every device on one axis, and tables.

use super::EventKind;
use super::axis::{axis, duration};
use super::colour::Colour;
use super::comparison::{Comparison, difference};
use super::step::Step;
use super::terminal::{Columns, Drawn, Line, Style, lane};
use crate::schedule::Cause;

/// Columns in front of the lanes and of the tables.
const LABEL: usize = 12;
/// Columns behind the lanes, where the terminal has at least [`WIDE`].
const BUSY: usize = 12;
const WIDE: usize = 60;
/// Columns for each mark of the axis.
const MARK: usize = 14;
/// Columns of a number and of a time in a table.
const COUNT: usize = 8;
const TIME: usize = 13;

impl Step {
    /// The predicted step alone, as [`Comparison::to_terminal`].
    pub fn to_terminal(&self, width: usize, colour: bool) -> String {
        View { steps: vec![("predicted", self)] }.draw(width, colour)
    }
}

/// Steps with their names, one lane below the other.
struct View<'a> {
    steps: Vec<(&'static str, &'a Step)>,
}

impl View<'_> {
    fn end(&self) -> f64 {
        self.steps.iter().map(|(_, step)| step.seconds).fold(0.0, f64::max)
    }

    fn ranks(&self) -> usize {
        self.steps.first().map_or(0, |(_, step)| step.schedule.ranks.len())
    }

    fn draw(&self, width: usize, colour: bool) -> String {
        let (mut text, mut drawn) = (String::new(), Drawn::default());
        let busy = if width >= WIDE { BUSY } else { 0 };
        let columns = Columns { seconds: self.end(), count: width.saturating_sub(LABEL + busy) };
        for rank in 0..self.ranks() {
            if rank > 0 {
                text.push('\n');
            }
            let mut line = Line::new(width);
            // As measured, where it was: the last of the steps.
            let device = self.steps[self.steps.len() - 1].1.timeline.device(rank);
            line.push(&format!("{} ", device.number), Style::FAINT).push(&device.title(), Style::BOLD);
            line.finish(&mut text, colour);
            for &(what, step) in &self.steps {
                let mut line = Line::new(width);
                line.push("  ", Style::PLAIN).push(what, Style::FAINT).pad(LABEL);
                lane(&mut line, step, rank, columns, colour, &mut drawn);
                if busy > 0 {
                    let share = 100.0 * step.busy(rank);
                    line.pad(width - busy).push(&format!("  busy {share:>3.0} %"), Style::PLAIN);
                }
                line.finish(&mut text, colour);
            }
        }
        let mut line = Line::new(width);
        let axis = axis(0.0, columns.seconds, columns.count / MARK);
        for (time, number) in &axis.marks {
            line.pad(LABEL + columns.at(*time) as usize).push("|", Style::FAINT).push(number, Style::PLAIN);
        }
        line.push(&format!(" {}", axis.unit), Style::FAINT);
        line.finish(&mut text, colour);
        legend(&mut text, &drawn, width, colour);
        text
    }
}

/// What the colours or letters mean that are drawn, broken into lines: kinds of events, then causes of idle time.
fn legend(text: &mut String, drawn: &Drawn, width: usize, colour: bool) {
    let kinds = EventKind::ALL.into_iter().filter(|kind| drawn.kinds.contains(kind)).map(|kind| {
        let mark = if colour { "██".into() } else { kind.letter().to_string() };
        (mark, kind.colours().0, kind.name())
    });
    let mut explain = |entries: Vec<(String, Colour, &str)>| {
        if entries.is_empty() {
            return;
        }
        let indent = LABEL.min(width / 4);
        let mut line = Line::new(width);
        line.pad(indent);
        for (mark, ink, name) in entries {
            if line.len() > indent && line.len() + mark.chars().count() + name.len() + 3 > width {
                std::mem::replace(&mut line, Line::new(width)).finish(text, colour);
                line.pad(indent);
            } else if line.len() > indent {
                line.push("  ", Style::PLAIN);
            }
            line.push(&mark, Style::ink(ink)).push(" ", Style::PLAIN).push(name, Style::PLAIN);
        }
        line.finish(text, colour);
    };
    if !colour {
        return explain(kinds.chain(drawn.idle.then(|| (".".into(), Colour(0), "idle"))).collect());
    }
    explain(kinds.collect());
    let causes = Cause::ALL.into_iter().filter(|cause| drawn.causes.contains(cause));
    explain(causes.map(|cause| ("··".into(), cause.colours().1, cause.name())).collect());
}

impl Comparison {
    /// Both steps, device by device, on one axis; no line is wider than `width` columns. With `colour` in the colours of
    /// [`Comparison::to_svg`] (24-bit ANSI escapes), with dots for idle time in the colour of its cause. Without, in
    /// letters: `F0---` is the forward of microbatch 0, a dot is idle time.
    pub fn to_terminal(&self, width: usize, colour: bool) -> String {
        View { steps: self.steps().collect() }.draw(width, colour)
    }

    /// A table of where the time of the steps goes, in per cent of each.
    pub fn shares_to_terminal(&self, width: usize, colour: bool) -> String {
        let mut table = Table { text: String::new(), width, colour };
        let names = self.measured.parts(0).map(|(name, _)| (name.to_string(), name.len() + 2));
        table.row("", &names, Style::FAINT);
        for rank in 0..self.ranks() {
            for (row, (what, step)) in self.steps().enumerate() {
                let number = self.number(rank);
                let label = if row == 0 { format!("{number} {what}") } else { format!("  {what}") };
                let shares = step.parts(rank).map(|(name, seconds)| {
                    (format!("{:.1}", 100.0 * seconds / step.seconds.max(f64::MIN_POSITIVE)), name.len() + 2)
                });
                table.row(&label, &shares, Style::PLAIN);
            }
        }
        table.text
    }

    /// A table of the mean times of each kind of action.
    pub fn actions_to_terminal(&self, width: usize, colour: bool) -> String {
        let mut table = Table { text: String::new(), width, colour };
        let columns = ["device", "count", "predicted", "measured", "difference"];
        let shown = |column: usize| self.predicted.is_some() || !matches!(column, 2 | 4);
        let pick = |cells: [String; 5]| -> Vec<(String, usize)> {
            let cells = cells.into_iter().enumerate().filter(|&(column, _)| shown(column));
            cells.map(|(column, text)| (text, if column < 2 { COUNT } else { TIME })).collect()
        };
        table.row("stage, kind", &pick(columns.map(String::from)), Style::FAINT);
        for action in &self.actions {
            let cells = [
                self.number(action.rank).to_string(),
                action.count.to_string(),
                action.predicted.map_or("–".into(), duration),
                duration(action.measured),
                action.error().map_or("–".into(), difference),
            ];
            table.row(&format!("{} {}", action.stage, action.kind), &pick(cells), Style::PLAIN);
        }
        table.text
    }
}

/// Rows of a label and right-aligned cells.
struct Table {
    text: String,
    width: usize,
    colour: bool,
}

impl Table {
    fn row(&mut self, label: &str, cells: &[(String, usize)], style: Style) {
        let mut line = Line::new(self.width);
        line.push(label, Style::FAINT).pad(LABEL);
        for (text, width) in cells {
            line.push(&format!("{text:>width$}"), if text == "0.0" { Style::FAINT } else { style });
        }
        line.finish(&mut self.text, self.colour);
    }
}
