//! `polystage trace`.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

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
/// Earlier plans whose steps are shown: the last of them.
const EARLIER: usize = 3;
/// Steps that were shorter by this part with an earlier plan are worth a sentence.
const WORSE: f64 = 0.05;
/// Fewer steps of a plan are no reason for it.
const FEW: usize = 3;

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
    let Plans { present, earlier } = Plans::of(&rows, timeline.step);
    let steps: Vec<StepTimes> = present.rows.iter().filter_map(|row| StepTimes::of(row)).collect();
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
        report["steps"] = json!(present.rows.len());
        report["median_step_seconds"] = json!(present.median());
        report["earlier_plans"] = earlier.iter().map(Stretch::to_json).collect();
        report["picture"] = json!(picture);
        report["advice"] = match &advice {
            Advice::Change(change) => json!({
                "settings": change.settings, "gain": change.gain,
                "predicted_step_seconds": change.plan.simulation.expected,
            }),
            _ => json!(null),
        };
        report["not_sure"] = match &advice {
            Advice::Keep { what, gain, unsure, why } if !what.is_empty() => {
                json!({ "what": what, "gain": gain, "unsure": unsure, "why": why })
            }
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
    report(run, &comparison, (&present, &earlier), &advice, width, terminal && !plain)?;
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
    (present, earlier): (&Stretch, &[Stretch]),
    advice: &Advice,
    width: usize,
    colour: bool,
) -> Result<()> {
    let median = present.median();
    let since = match present.since() {
        Some(since) if since > 0 => {
            format!(" since step {since}, when this plan came into force (a resume, or a move)")
        }
        _ => String::new(),
    };
    say(format!("steps      {}{since}: {}", present.rows.len(), present.times()))?;
    for before in earlier.iter().rev().take(EARLIER) {
        say(format!("earlier    {}: {}, with {}", before.which(), before.times(), before.plan(present)))?;
    }
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
        Advice::Keep { what, .. } if what.is_empty() => {
            say(wrap("no other plan is faster, with the speeds that these steps show", width))?;
        }
        Advice::Keep { what, gain, unsure, why } => say(wrap(
            &format!(
                "no other plan is surely faster: the best one ({what}) is said to save {:.1} % of a step, which is not \
                 sure; predictions here may be {:.1} % off: {why}",
                100.0 * gain,
                100.0 * unsure
            ),
            width,
        ))?,
        Advice::None(why) => say(wrap(&format!("no other plan can be advised: {why}"), width))?,
    }
    if !matches!(advice, Advice::Change(_)) {
        comparison.spare().iter().try_for_each(|hint| say(wrap(hint, width)))?;
    }
    if let Some(better) = earlier.iter().rev().find(|before| before.is_better(present)) {
        let slower = 100.0 * (median / better.median() - 1.0);
        let text = format!(
            "{} took {} with {}: the steps since take {slower:.1} % longer",
            better.which(),
            duration(better.median()),
            better.plan(present)
        );
        say(wrap(&text, width))?;
    }
    let sequences = trained_with(run, &[])
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
    // A trace may lie somewhere by itself.
    let members = trained_with(run, &[]).map_or(1, |config| config.mesh.division().members());
    let timeline = Timeline::from_chrome_trace(&text, &trace.display().to_string())?.of_gangs(members);
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

/// Steps of one plan.
struct Stretch<'a> {
    /// At least one.
    rows: Vec<&'a Entry>,
    /// Their seconds, ascending.
    seconds: Vec<f64>,
}

impl<'a> Stretch<'a> {
    fn of(rows: Vec<&'a Entry>) -> Stretch<'a> {
        let mut seconds: Vec<f64> = rows.iter().filter_map(|row| row.step_seconds).collect();
        seconds.sort_by(f64::total_cmp);
        Stretch { rows, seconds }
    }

    /// Steps that were done when it began.
    fn since(&self) -> Option<u64> {
        self.rows.first().and_then(|row| row.plan_since_step)
    }

    fn median(&self) -> f64 {
        median(&self.seconds)
    }

    /// Whether another plan made shorter steps than these, as far as few steps say.
    fn is_better(&self, present: &Stretch) -> bool {
        let is_other = self.rows[0].plan.is_none() || self.rows[0].plan != present.rows[0].plan;
        let enough = self.rows.len().min(present.rows.len()) >= FEW;
        is_other && enough && self.median() < (1.0 - WORSE) * present.median()
    }

    fn times(&self) -> String {
        let ends = [self.seconds[0], self.seconds[self.seconds.len() - 1]].map(duration);
        format!("{} (median), {} to {}", duration(self.median()), ends[0], ends[1])
    }

    fn which(&self) -> String {
        match (self.rows[0].step, self.rows[self.rows.len() - 1].step) {
            (first, last) if first == last => format!("step {first}"),
            (first, last) => format!("steps {first} to {last}"),
        }
    }

    /// Its plan, in words beside that of other steps.
    fn plan(&self, other: &Stretch) -> String {
        let [own, other] = [self, other].map(|stretch| stretch.rows[0].plan.as_ref());
        match own {
            None => "another plan".into(),
            Some(_) if own == other => "the same plan".into(),
            Some(plan) => format!("another plan ({plan})"),
        }
    }

    fn to_json(&self) -> Value {
        json!({
            "first_step": self.rows[0].step, "steps": self.rows.len(), "median_step_seconds": self.median(),
            "plan": self.rows[0].plan,
        })
    }
}

/// The steps of a run by their plans.
struct Plans<'a> {
    /// Those of the plan that made the traced step, by which alone its prediction can be judged.
    present: Stretch<'a>,
    /// Those of the plans before, in order.
    earlier: Vec<Stretch<'a>>,
}

impl Plans<'_> {
    /// Of at least one row, each with its seconds.
    fn of(rows: &[Entry], traced: Option<u64>) -> Plans<'_> {
        let row = traced.and_then(|traced| rows.iter().find(|row| row.step == traced)).or(rows.last());
        let plan = row.and_then(|row| row.plan_since_step);
        let (present, others): (Vec<&Entry>, Vec<&Entry>) =
            rows.iter().partition(|row| row.plan_since_step == plan);
        let before: Vec<&Entry> = others.into_iter().filter(|row| row.plan_since_step < plan).collect();
        let stretches = before.chunk_by(|a, b| a.plan_since_step == b.plan_since_step);
        let earlier = stretches.map(|rows| Stretch::of(rows.to_vec())).collect();
        Plans { present: Stretch::of(present), earlier }
    }
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
