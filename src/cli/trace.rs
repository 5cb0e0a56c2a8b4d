//! `polystage trace`.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::{in_the_way, note, print, save, say};
use crate::error::{Error, Result};
use crate::folder::files::{Unreadable, read_text};
use crate::timeline::{Comparison, Prediction, Timeline, duration};
use crate::train::advice::{Advice, Change, StepTimes, advise, trained_with};
use crate::train::metrics::{Entry, METRICS, Metrics};
use crate::train::run::{PREDICTION, TRACE};

/// Columns where the output is no terminal.
const WIDTH: usize = 100;
/// Single actions listed as slowest: at most so many, and only those that took so many times the mean of their kind.
const SLOWEST: usize = 5;
const SLOW: f64 = 1.1;

/// Explains a run: predicted and measured time side by side, why devices were idle, what dominates and what to try.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  polystage trace runs/tiny-1\n  polystage trace runs/tiny-1 --json\n\nAlso writes comparison.svg. trace.json of the same folder opens in ui.perfetto.dev. What else lies there: docs/run.md."
)]
pub(super) struct Arguments {
    /// The run's folder.
    run: PathBuf,
    /// Where comparison.svg goes (default: the run's folder).
    #[arg(long)]
    out: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &Arguments, plain: bool) -> Result<u8> {
    let run = &arguments.run;
    if !run.is_dir() {
        let message = "is not a folder; give that of a run, such as runs/tiny-1";
        return Err(Error::config(run.display().to_string(), message));
    }
    let rows = rows(run)?;
    let (timeline, comparison) = compare(run)?;
    let steps = StepTimes::of_plan(&rows, timeline.step);
    let mut seconds: Vec<f64> = steps.iter().map(|step| step.seconds).collect();
    seconds.sort_by(f64::total_cmp);
    let advice = match &comparison.prediction {
        Some(prediction) => advise(run, prediction, &steps, &timeline),
        None => Advice::None("the run was not planned".into()),
    };
    let name = std::path::absolute(run).unwrap_or_else(|_| run.clone());
    let name = name.file_name().map_or("run".into(), |name| name.to_string_lossy().into_owned());
    let what = if comparison.predicted.is_some() { "predicted and measured" } else { "measured" };
    let svg = comparison.to_svg(&format!("A step of {name}, {what}"));
    let picture = match &arguments.out {
        Some(out) => Some(draw(out, &svg)?),
        // A run that may only be read can still be explained.
        None => draw(run, &svg).map_err(|error| note(format!("note: there is no picture: {error}"))).ok(),
    };
    if arguments.json {
        let mut report = comparison.to_json();
        report["run"] = json!(run);
        report["steps"] = json!(seconds.len());
        report["median_step_seconds"] = json!(median(&seconds));
        report["picture"] = json!(picture);
        report["advice"] = match &advice {
            Advice::Change(change) => json!({
                "settings": change.settings, "gain": change.gain,
                "predicted_step_seconds": change.plan.simulation.expected,
            }),
            _ => json!(null),
        };
        print(serde_json::to_string_pretty(&report).unwrap_or_default())?;
        return Ok(0);
    }
    if comparison.predicted.is_none() {
        note(format!(
            "note: {} does not exist, so there is nothing to compare with; runs that `polystage train` plans have one",
            run.join(PREDICTION).display()
        ));
    }
    let terminal = std::io::stdout().is_terminal();
    let size = console::Term::stdout().size_checked().filter(|_| terminal);
    let width = size.map_or(WIDTH, |(_, columns)| usize::from(columns));
    report(run, &comparison, &seconds, &advice, width, terminal && !plain)?;
    picture.map_or(Ok(()), |picture| say(format!("picture    {}", picture.display())))?;
    Ok(0)
}

/// Writes the picture into a folder, creating it.
fn draw(folder: &Path, svg: &str) -> Result<PathBuf> {
    std::fs::create_dir_all(folder).map_err(Error::io(folder)).map_err(in_the_way)?;
    let picture = folder.join("comparison.svg");
    save(&picture, svg)?;
    Ok(picture)
}

fn report(
    run: &Path,
    comparison: &Comparison,
    seconds: &[f64],
    advice: &Advice,
    width: usize,
    colour: bool,
) -> Result<()> {
    let (Some(least), Some(most)) = (seconds.first(), seconds.last()) else { return Ok(()) };
    let median = median(seconds);
    let [least, middle, most] = [*least, median, *most].map(duration);
    say(format!("steps      {}: {middle} (median), {least} to {most}", seconds.len()))?;
    if let Some(predicted) = &comparison.predicted {
        let error = 100.0 * (median / predicted.expected - 1.0);
        say(format!("predicted  {}; the median is {error:+.1} % off", duration(predicted.expected)))?;
    }
    let traced = duration(comparison.measured.seconds);
    let error = comparison.error().map_or(String::new(), |error| format!(", {:+.1} % off", 100.0 * error));
    say(format!("traced     {traced}{error}: the last step that was traced, shown here"))?;
    say("")?;
    print(comparison.to_terminal(width, colour))?;
    say("Where the time goes, in % of the step")?;
    print(comparison.shares_to_terminal(width, colour))?;
    say("Mean time of an action")?;
    print(comparison.actions_to_terminal(width, colour))?;
    say("Slowest single actions")?;
    let mut slowest = comparison.slowest();
    slowest.retain(|(_, times)| *times >= SLOW);
    for (cell, times) in slowest.iter().take(SLOWEST) {
        let (action, took) = (cell.action.to_string(), duration(cell.end - cell.start));
        say(format!(
            "  {action:<8} device {}  {took:>10}  {times:.2} x the mean of its kind",
            comparison.number(cell.rank)
        ))?;
    }
    if slowest.is_empty() {
        say(format!("  none took {SLOW} times the mean of its kind"))?;
    }
    say("")?;
    say("What dominates")?;
    comparison.findings().iter().try_for_each(|finding| say(wrap(finding, width)))?;
    say("")?;
    say("What to try")?;
    match advice {
        Advice::Change(change) => propose(change, width)?,
        Advice::Keep { gain, unsure } => say(wrap(
            &format!(
                "no other plan is surely faster: the best one is said to take {:.1} % less, and predictions here may \
                 be {:.1} % off",
                100.0 * gain,
                100.0 * unsure
            ),
            width,
        ))?,
        Advice::None(why) => say(wrap(&format!("no other plan can be advised: {why}"), width))?,
    }
    let sequences = trained_with(run)
        .ok()
        .map(|config| config.train.batch / comparison.measured.schedule.microbatches.max(1));
    comparison.hints(sequences).iter().try_for_each(|hint| say(wrap(hint, width)))?;
    say("")
}

/// A better plan: what it is, what it is said to bring, and what to type for it.
fn propose(change: &Change, width: usize) -> Result<()> {
    say(wrap(
        &format!(
            "{}: a step is said to take {:.1} % less, {} (simulated with the measured speeds of the devices). With a new \
             run or --resume:",
            change.what,
            100.0 * change.gain,
            duration(change.plan.simulation.expected)
        ),
        width,
    ))?;
    // In one line, to be copied.
    let settings: Vec<String> = change.settings.iter().map(|setting| format!("--set '{setting}'")).collect();
    say(format!("  {}", settings.join(" ")))
}

/// A sentence as an entry of a list, in lines of at most `width` columns where its words allow it.
fn wrap(sentence: &str, width: usize) -> String {
    // No number without its unit.
    let sentence = [" %", " s", " ms", " µs"].into_iter().fold(sentence.to_string(), |sentence, unit| {
        let joined = unit.replace(' ', "\u{a0}");
        [" ", ",", ";", ")", ":"].into_iter().fold(sentence, |sentence, after| {
            sentence.replace(&format!("{unit}{after}"), &format!("{joined}{after}"))
        })
    });
    let (mut text, mut column) = (String::from("-"), 1);
    for word in sentence.split(' ') {
        let length = word.chars().count();
        if column > 1 && column + 1 + length > width {
            text.push_str("\n ");
            column = 1;
        }
        text.push(' ');
        text.push_str(word);
        column += 1 + length;
    }
    text.replace('\u{a0}', " ")
}

/// The traced step of a run, alone and beside its prediction if there is one.
fn compare(run: &Path) -> Result<(Timeline, Comparison)> {
    let at = |path: &Path| {
        let place = path.display().to_string();
        move |error: Error| match error {
            Error::Config { message, .. } => Error::config(place, message),
            other => other,
        }
    };
    let trace = run.join(TRACE);
    let text = read(
        &trace,
        "a run writes it with every checkpoint and when it ends; continue the run with --resume",
    )?;
    let timeline = Timeline::from_chrome_trace(&text, &trace.display().to_string())?;
    let measured = Comparison::new(None, &timeline).map_err(at(&trace))?;
    let prediction = run.join(PREDICTION);
    if !prediction.exists() {
        return Ok((timeline, measured));
    }
    let text = read(&prediction, "")?;
    let promised = Prediction::from_json(&text, &prediction.display().to_string())?;
    let comparison = Comparison::new(Some(promised), &timeline).map_err(at(&prediction))?;
    Ok((timeline, comparison))
}

/// Every step that the run logged.
fn rows(run: &Path) -> Result<Vec<Entry>> {
    let path = run.join(METRICS);
    if !path.exists() {
        return Err(missing(&path, "the folder holds no run; give one that `polystage train` has written"));
    }
    let metrics = Metrics::open(run).map_err(|error| error.config(&path))?;
    let refuse = |message: String| Err(Error::config(path.to_string_lossy(), message));
    if let Some(damage) = metrics.damage() {
        return refuse(format!("{damage}; remove what is no row, as --resume does"));
    }
    let mut rows = metrics.entries;
    rows.retain(|row| row.step_seconds.is_some());
    if rows.is_empty() {
        return refuse("holds no step yet; continue the run with --resume".into());
    }
    Ok(rows)
}

fn read(path: &Path, help: &str) -> Result<String> {
    read_text(path).map_err(|error| match error {
        Unreadable::Missing => missing(path, help),
        Unreadable::Binary { .. } => Error::config(path.to_string_lossy(), format!("is damaged: it {error}")),
        other => other.config(path),
    })
}

fn missing(path: &Path, help: &str) -> Error {
    Error::config(path.to_string_lossy(), format!("does not exist: {help}"))
}

/// Of ascending numbers, at least one.
fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}
