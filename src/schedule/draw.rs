//! Schedules for the eye: over time for a terminal, and as lists with the fault marked for an error.

use std::fmt::Display;

use super::index::Place;
use super::{Action, Cell, Costs, Schedule, Simulation, Simulator};
use crate::error::one_line;

/// Written behind an offending cell.
const MARK: &str = "<-- ";
/// How many cells an error shows on each side of the offending one.
const CONTEXT: usize = 5;
/// How many ranks, and how many characters of a word, an error shows at most.
const RANKS: usize = 32;
const WORD: usize = 40;

/// Columns of a terminal that a line of the grid fills at most.
const WIDTH: usize = 110;
/// Blocks of lines shown at the start and at the end of a long schedule; what lies between repeats itself.
const BLOCKS: usize = 2;
/// The header names every fifth tick.
const LABELLED: usize = 5;

/// Draws the schedule as one row for each rank over time, for a terminal, taking 1 tick for F, I and W, 2 for B, and no
/// time for transfers. A cell holds the action without its stage (`F0`) if every rank owns the stage of its number, else
/// with it (`2F0`); `--` continues the cell before it, `.` is a tick without work. Long rows are broken, and the middle of very
/// long ones is left out. The last line says makespan, bubble, and the most microbatches in flight on each stage. For a
/// schedule that cannot run, returns the reason instead.
pub fn grid(schedule: &Schedule) -> String {
    // Only of a schedule that has been proved can the costs be made.
    let simulation = Simulator::new(schedule, &[])
        .and_then(|simulator| simulator.simulate(&Costs::uniform(schedule, 1.0, 1.0, 1.0, 0.0)));
    match simulation {
        Ok(simulation) => draw(schedule, &simulation),
        Err(error) => error.to_string(),
    }
}

fn draw(schedule: &Schedule, simulation: &Simulation) -> String {
    let computed = || simulation.cells.iter().filter(|cell| cell.action.kind.computes());
    let with_stage = computed().any(|cell| cell.action.stage != cell.rank);
    let cells: Vec<(&Cell, String)> = computed()
        .map(|cell| {
            let Action { kind, microbatch, .. } = cell.action;
            (cell, if with_stage { cell.action.to_string() } else { format!("{kind}{microbatch}") })
        })
        .collect();
    let cell_width = 1 + cells.iter().map(|(_, text)| text.len()).max().unwrap_or(0);
    let label_width = format!("rank {} ", schedule.ranks.len() - 1).len();
    let most = (WIDTH.saturating_sub(label_width) / cell_width).max(LABELLED) / LABELLED * LABELLED;
    let ticks = simulation.makespan as usize;
    // Blocks of about equal length look better than a last one of a single tick.
    let per_block = ticks.div_ceil(ticks.div_ceil(most).max(1)).next_multiple_of(LABELLED).max(LABELLED);
    let blocks = ticks.div_ceil(per_block);
    let left_out = if blocks > 2 * BLOCKS { BLOCKS..blocks - BLOCKS } else { 0..0 };

    let mut text = String::new();
    for block in (0..blocks).filter(|block| !left_out.contains(block)) {
        if block > 0 && block == left_out.end {
            let (first, end) = (left_out.start * per_block, left_out.end * per_block);
            text += &format!("... ticks {first} to {} are left out ...\n\n", end - 1);
        }
        let shown = block * per_block..((block + 1) * per_block).min(ticks);
        let times = shown.clone().step_by(LABELLED).map(|tick| tick.to_string());
        text += &line("time", label_width, times, LABELLED * cell_width);
        let mut rows = vec![vec!["."; shown.len()]; schedule.ranks.len()];
        for (cell, name) in &cells {
            for tick in (cell.start as usize..cell.end as usize).filter(|tick| shown.contains(tick)) {
                let starts = tick == cell.start as usize;
                rows[cell.rank][tick - shown.start] = if starts { name } else { "--" };
            }
        }
        for (rank, row) in rows.iter().enumerate() {
            text += &line(&format!("rank {rank}"), label_width, row, cell_width);
        }
        text.push('\n');
    }
    let peaks: Vec<String> = simulation.peak_in_flight.iter().map(usize::to_string).collect();
    text += &format!(
        "makespan {ticks} ticks, bubble {:.1} %, peak in flight by stage: {}\n",
        100.0 * simulation.bubble,
        peaks.join(" ")
    );
    text
}

fn line(label: &str, label_width: usize, cells: impl IntoIterator<Item: Display>, width: usize) -> String {
    let mut text = format!("{label:<label_width$}");
    for cell in cells {
        text += &format!("{:<width$}", cell.to_string());
    }
    text.truncate(text.trim_end().len());
    text + "\n"
}

/// The list of every rank near the marks, each marked cell with an arrow behind it. Of very many ranks only those next
/// to the first marks.
pub(super) fn marked(schedule: &Schedule, marks: &[Place]) -> String {
    let all = schedule.ranks.len() <= RANKS;
    let near = |rank: usize| all || marks.iter().any(|mark| mark.0.abs_diff(rank) <= 1);
    let shown = schedule.ranks.iter().enumerate().filter(|(rank, _)| near(*rank)).take(RANKS);
    let lines = shown.map(|(rank, actions)| {
        let mark = marks.iter().find(|mark| mark.0 == rank).map(|mark| mark.1);
        let centre = mark.or(marks.first().map(|mark| mark.1)).unwrap_or(0);
        format!("rank {rank}: {}", window(actions, centre, mark))
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// The words of one line near the one at `mark`, which has an arrow behind it.
pub(super) fn marked_line(words: &[&str], mark: usize) -> String {
    let words: Vec<Word> = words.iter().map(|word| Word(word)).collect();
    window(&words, mark, Some(mark))
}

/// A word of a text that may be anything.
struct Word<'t>(&'t str);

impl Display for Word<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(&one_line(self.0, WORD))
    }
}

fn window(cells: &[impl Display], centre: usize, mark: Option<usize>) -> String {
    let centre = centre.min(cells.len());
    let first = centre.saturating_sub(CONTEXT);
    let end = (centre + CONTEXT + 1).min(cells.len());
    let mut text = String::from(if first > 0 { "... " } else { "" });
    for (at, cell) in cells.iter().enumerate().take(end).skip(first) {
        text += &format!("{cell} {}", if mark == Some(at) { MARK } else { "" });
    }
    if end < cells.len() {
        text += "...";
    }
    if mark.is_some_and(|at| at >= cells.len()) {
        text += &format!("(end) {MARK}");
    }
    if text.ends_with(MARK) { text } else { text.trim_end().to_string() }
}
