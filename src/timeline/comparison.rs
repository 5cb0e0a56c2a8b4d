//! A prediction beside a measurement.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::Timeline;
use super::prediction::Prediction;
use super::step::Step;
use crate::error::{Error, Result};
use crate::schedule::{Cell, Kind};

/// One step as it was measured and, if there is a prediction, as it was predicted. Draws itself
/// ([`Comparison::to_svg`], [`Comparison::to_terminal`]) and puts into words what dominates
/// ([`Comparison::findings`]).
#[derive(Clone, Debug)]
pub struct Comparison {
    /// What was predicted.
    pub prediction: Option<Prediction>,
    /// The step that follows from it.
    pub predicted: Option<Step>,
    /// What was measured.
    pub measured: Step,
    /// Mean times of each kind of computation in each stage, in the order of stages.
    pub actions: Vec<ActionTime>,
}

/// How long a kind of computation takes in a stage.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ActionTime {
    /// The stage.
    pub stage: usize,
    /// Its device.
    pub rank: usize,
    /// F, B, I or W.
    pub kind: Kind,
    /// How often it runs in a step.
    pub count: usize,
    /// Predicted mean seconds, transfers in the device's queue included.
    pub predicted: Option<f64>,
    /// Measured mean seconds.
    pub measured: f64,
}

impl ActionTime {
    /// Measured over predicted seconds, less 1; none without a prediction.
    pub fn error(&self) -> Option<f64> {
        let predicted = self.predicted.filter(|&predicted| predicted > 0.0)?;
        Some(self.measured / predicted - 1.0)
    }
}

impl Comparison {
    /// Of a measured step, and what was predicted for it.
    ///
    /// # Errors
    ///
    /// Those of [`Step::measured`] and [`Step::predicted`], and [`Error::Config`] for a prediction of other stages,
    /// devices or microbatches.
    pub fn new(prediction: Option<Prediction>, measured: &Timeline) -> Result<Comparison> {
        let measured = Step::measured(measured)?;
        let predicted = prediction.as_ref().map(Step::predicted).transpose()?;
        if let Some(predicted) = &predicted {
            let shape = |step: &Step| {
                let schedule = &step.schedule;
                format!(
                    "{} stages on {} devices, {} microbatches",
                    schedule.stages,
                    schedule.ranks.len(),
                    schedule.microbatches
                )
            };
            let (there, here) = (shape(predicted), shape(&measured));
            if there != here {
                let message = format!("is of another plan ({there}) than what was measured ({here})");
                return Err(Error::config("prediction", message));
            }
        }
        let mut kinds: BTreeMap<(usize, Kind), usize> = BTreeMap::new();
        for cell in &measured.cells {
            kinds.insert((cell.action.stage, cell.action.kind), cell.rank);
        }
        let actions = kinds.into_iter().filter_map(|((stage, kind), rank)| {
            let (mean, count) = measured.mean(stage, kind)?;
            let predicted = predicted.as_ref().and_then(|step| step.mean(stage, kind)).map(|(mean, _)| mean);
            Some(ActionTime { stage, rank, kind, count, predicted, measured: mean })
        });
        let actions = actions.collect();
        Ok(Comparison { prediction, predicted, measured, actions })
    }

    /// Measured over predicted seconds of the step, less 1; none without a prediction.
    pub fn error(&self) -> Option<f64> {
        let predicted = self.predicted.as_ref()?.expected;
        (predicted > 0.0).then(|| self.measured.seconds / predicted - 1.0)
    }

    /// The measured computations, slowest for their kind first, each with its seconds over the mean of its kind in its
    /// stage.
    pub fn slowest(&self) -> Vec<(Cell, f64)> {
        let times = |cell: &Cell| {
            let (mean, _) = self.measured.mean(cell.action.stage, cell.action.kind)?;
            (mean > 0.0).then(|| (*cell, (cell.end - cell.start) / mean))
        };
        let mut cells: Vec<(Cell, f64)> = self.measured.cells.iter().filter_map(times).collect();
        cells.sort_by(|a, b| b.1.total_cmp(&a.1));
        cells
    }

    /// The steps with what they are called, the predicted one first.
    pub(super) fn steps(&self) -> impl Iterator<Item = (&'static str, &Step)> {
        let predicted = self.predicted.iter().map(|step| ("predicted", step));
        predicted.chain([("measured", &self.measured)])
    }

    /// Seconds of the longest of the steps: the end of their common axis.
    pub(super) fn end(&self) -> f64 {
        self.steps().map(|(_, step)| step.seconds).fold(0.0, f64::max)
    }

    /// The number of the device of a rank.
    pub fn number(&self, rank: usize) -> usize {
        self.measured.timeline.device(rank).number
    }

    /// Devices of the pipeline.
    pub(super) fn ranks(&self) -> usize {
        self.measured.idle.len()
    }

    /// Everything in numbers, for programs. Seconds; an error is measured over predicted, less 1.
    pub fn to_json(&self) -> Value {
        let parts = |step: &Step, rank: usize| {
            let parts = step.parts(rank).into_iter();
            parts.map(|(name, seconds)| (name.replace('-', "_"), seconds.into())).collect::<Map<_, _>>()
        };
        let devices: Vec<Value> = (0..self.ranks())
            .map(|rank| {
                json!({
                    "device": self.number(rank),
                    "name": self.measured.timeline.device(rank).title(),
                    "busy": self.measured.busy(rank),
                    "predicted": self.predicted.as_ref().map(|step| parts(step, rank)),
                    "measured": parts(&self.measured, rank),
                })
            })
            .collect();
        let actions: Vec<Value> = self
            .actions
            .iter()
            .map(|a| {
                json!({
                    "stage": a.stage, "device": self.number(a.rank), "kind": a.kind.to_string(), "count": a.count,
                    "predicted_seconds": a.predicted, "measured_seconds": a.measured, "error": a.error(),
                })
            })
            .collect();
        json!({
            "predicted_step_seconds": self.predicted.as_ref().map(|step| step.expected),
            "measured_step_seconds": self.measured.seconds,
            "error": self.error(),
            "devices": devices,
            "actions": actions,
            "findings": self.findings(),
        })
    }
}

/// A share in words: `12.3 %`.
pub(super) fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// A difference in words: `+12.3 %`.
pub(super) fn difference(share: f64) -> String {
    format!("{:+.1} %", 100.0 * share)
}
