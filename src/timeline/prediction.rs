//! What a plan promised for every step of a run, as a file beside the run's measurements.

use serde::{Deserialize, Serialize};

use super::{DeviceName, Timeline};
use crate::error::{Error, Result};
use crate::layers::Layers;
use crate::plan::Candidate;
use crate::schedule::{self, Costs, Schedule, Simulation};

/// Everything that is needed to simulate a step of a run again: `prediction.json` of a run folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// The devices, in pipeline order.
    pub devices: Vec<DeviceName>,
    /// The machine's other devices.
    pub left_out: Vec<DeviceName>,
    /// The schedule, computation only, in its text form.
    pub schedule: String,
    /// Where the stages after the first begin.
    pub cuts: Vec<Layers>,
    /// Stages that compute activations again in the backward pass.
    pub recompute: Vec<usize>,
    /// What the simulator was given, in seconds and bytes.
    pub costs: Costs,
}

impl Prediction {
    /// Of a plan for a machine with these devices.
    pub fn of_plan(plan: &Candidate, devices: &[DeviceName]) -> Prediction {
        let left_out = devices.iter().filter(|device| !plan.devices.contains(&device.number));
        Prediction {
            devices: plan.devices.iter().map(|&number| devices[number].clone()).collect(),
            left_out: left_out.cloned().collect(),
            schedule: plan.schedule.to_string(),
            cuts: plan.cuts(),
            recompute: plan.repeated(),
            costs: plan.costs.clone(),
        }
    }

    /// Of a schedule and its costs, for layers that nobody knows.
    pub fn new(devices: Vec<DeviceName>, schedule: &Schedule, costs: Costs) -> Prediction {
        let (left_out, cuts, recompute) = (Vec::new(), Vec::new(), Vec::new());
        Prediction { devices, left_out, schedule: schedule.to_string(), cuts, recompute, costs }
    }

    /// Text for a file.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).unwrap_or_default() + "\n"
    }

    /// Reads [`Prediction::to_json`], and makes sure that it can be simulated. `place` names the text in errors.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] in one line for what is damaged or contradicts itself.
    pub fn from_json(text: &str, place: &str) -> Result<Prediction> {
        let refuse = |message: String| {
            Error::config(
                place,
                format!("is damaged ({message}); train again, or remove it to see the measurements alone"),
            )
        };
        let prediction: Prediction = serde_json::from_str(text).map_err(|error| refuse(error.to_string()))?;
        prediction.simulate().map_err(|error| refuse(first_line(&error)))?;
        Ok(prediction)
    }

    /// The schedule as data.
    ///
    /// # Errors
    ///
    /// [`Error::Schedule`] for a text that is none.
    pub fn schedule(&self) -> Result<Schedule> {
        self.schedule.parse()
    }

    /// Simulates a step, transfers included.
    ///
    /// # Errors
    ///
    /// Those of [`schedule::simulate`], and [`Error::Config`] for another number of devices than the schedule has ranks.
    pub fn simulate(&self) -> Result<Simulation> {
        let schedule = self.schedule()?.lowered()?;
        if self.devices.len() != schedule.ranks.len() {
            let message = format!("{} devices for {} ranks", self.devices.len(), schedule.ranks.len());
            return Err(Error::config("devices", message));
        }
        schedule::simulate(&schedule, &self.costs)
    }

    /// The predicted step as a timeline that starts at 0: [`Timeline::from_simulation`].
    ///
    /// # Errors
    ///
    /// Those of [`Prediction::simulate`].
    pub fn timeline(&self) -> Result<Timeline> {
        Ok(Timeline::from_simulation(self.devices.clone(), &self.simulate()?))
    }
}

/// The message of an error without the drawing below it.
pub(super) fn first_line(error: &Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_string()
}
