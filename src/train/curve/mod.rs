//! The course of a run's losses: kept in bounded memory, drawn as `loss.svg`, and watched for a model that learns its
//! text by heart. Pure data in, text out.

mod scale;
mod series;
mod svg;

use std::path::Path;

use super::metrics::Entry;
use super::trainer::Row;
use series::Series;

/// Evaluations in a row whose loss rises before anything is said.
const RISES: usize = 3;

/// What is drawn of a row of `metrics.jsonl`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Point {
    /// Steps done.
    pub step: u64,
    /// Loss of the step's batch.
    pub loss: Option<f64>,
    /// Loss on the text for evaluation.
    pub valid_loss: Option<f64>,
    /// Learning rate of the step.
    pub learning_rate: Option<f64>,
}

impl From<&Row> for Point {
    fn from(row: &Row) -> Point {
        Point {
            step: row.step,
            loss: Some(row.loss),
            valid_loss: row.valid_loss,
            learning_rate: Some(row.learning_rate),
        }
    }
}

impl From<&Entry> for Point {
    fn from(entry: &Entry) -> Point {
        let Entry { step, loss, valid_loss, learning_rate, .. } = *entry;
        Point { step, loss, valid_loss, learning_rate }
    }
}

/// An evaluation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    /// After this step.
    pub step: u64,
    /// Mean loss on the text for evaluation.
    pub loss: f64,
    /// Mean loss of the steps since the evaluation before; NaN if none had a finite one.
    pub training: f64,
}

/// What a run's rows say, in the order of its steps. Losses and rates take no more memory the longer a run is;
/// evaluations, which are rare, are all kept.
#[derive(Clone, Debug, Default)]
pub struct Curve {
    training: Series,
    rates: Series,
    evaluations: Vec<Evaluation>,
    /// Losses since the last evaluation, and their sum.
    recent: (u64, f64),
}

impl Curve {
    /// Takes in a row.
    pub fn push(&mut self, point: Point) {
        if let Some(loss) = point.loss {
            self.training.push(point.step, loss);
            if loss.is_finite() {
                self.recent = (self.recent.0 + 1, self.recent.1 + loss);
            }
        }
        if let Some(rate) = point.learning_rate {
            self.rates.push(point.step, rate);
        }
        if let Some(loss) = point.valid_loss {
            let (count, sum) = std::mem::take(&mut self.recent);
            self.evaluations.push(Evaluation { step: point.step, loss, training: sum / count as f64 });
        }
    }

    /// All evaluations.
    pub fn evaluations(&self) -> &[Evaluation] {
        &self.evaluations
    }

    /// The best evaluation whose loss is finite, the earliest of several.
    pub fn best(&self) -> Option<Evaluation> {
        let by_loss = |a: &Evaluation, b: &Evaluation| a.loss.total_cmp(&b.loss).then(a.step.cmp(&b.step));
        self.evaluations.iter().copied().filter(|evaluation| evaluation.loss.is_finite()).min_by(by_loss)
    }
}

/// The evaluations from the lowest to the last, if their loss has risen three times in a row while the training loss
/// fell, and this was not so before the last of them: so it is told once until the loss falls again.
pub fn overfitting(evaluations: &[Evaluation]) -> Option<&[Evaluation]> {
    let has_risen = |pair: &[Evaluation]| pair[1].loss > pair[0].loss;
    let lowest = evaluations.windows(2).rposition(|pair| !has_risen(pair)).map_or(0, |at| at + 1);
    let rise = &evaluations[lowest..];
    let holds = |rise: &[Evaluation]| match rise {
        [first, .., last] => rise.len() > RISES && last.training < first.training,
        _ => false,
    };
    (holds(rise) && (1..rise.len()).all(|before| !holds(&rise[..before]))).then_some(rise)
}

/// That in one line. `best` is the folder of the best checkpoint; `stops` says that the run stops by itself.
pub fn warn(rise: &[Evaluation], best: &Path, stops: bool) -> String {
    let [first, .., last] = rise else { return String::new() };
    let stop = if stops { "" } else { "; with train.patience = 3 a run stops by itself" };
    format!(
        "warning: from step {} to {} the loss on the text for evaluation has risen {} times in a row ({:.4} to {:.4}) while the training loss fell ({:.4} to {:.4}): the model learns its text by heart; the best checkpoint is kept at {}{stop}",
        first.step,
        last.step,
        rise.len() - 1,
        first.loss,
        last.loss,
        first.training,
        last.training,
        best.display()
    )
}
