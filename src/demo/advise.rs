//! What the planner would do with the devices as they have been measured.

use super::report::Advice;
use super::settings::MICROBATCHES;
use super::{Session, Settings, predicted};
use crate::error::Result;
use crate::plan::text::microbatches;
use crate::plan::{Candidate, DataChoice, Options, ScheduleChoice};
use crate::schedule::NAMES;
use crate::train::planning::Planning;

/// A plan must be faster by this part to be worth a change.
const WORTH: f64 = 0.02;

impl Session {
    /// Searches all schedules, cuts, numbers of microbatches and of pipelines for the devices of this run.
    ///
    /// # Errors
    /// Those of the planner.
    pub fn advise(&self) -> Result<Advice> {
        let mut config = self.planning.config.clone();
        (config.pipeline.cuts, config.pipeline.microbatches) = (None, None);
        let open = self.planning.with(&config)?;
        let mut best: Option<(Candidate, Settings)> = None;
        let count = self.settings.devices;
        for replicas in (1..=count).filter(|replicas| count.is_multiple_of(*replicas)) {
            for schedule in NAMES {
                for microbatches in MICROBATCHES {
                    let settings = Settings {
                        replicas,
                        schedule: (*schedule).into(),
                        microbatches,
                        ..self.settings.clone()
                    };
                    // Not every schedule can have every number of microbatches.
                    let Some(found) = search(&open, &settings) else { continue };
                    let faster =
                        |best: &(Candidate, Settings)| found.simulation.step < best.0.simulation.step;
                    if best.as_ref().is_none_or(faster) {
                        let cuts = found.cuts();
                        best = Some((found, Settings { cuts, ..settings }));
                    }
                }
            }
        }
        let now = self.plan.simulation.step;
        let best = best.filter(|(plan, _)| plan.simulation.step < (1.0 - WORTH) * now);
        let Some((plan, settings)) = best else {
            let words = vec!["With these devices no plan is more than 2 % faster than this one.".into()];
            let (settings, predicted) = (self.settings.clone(), self.predicted.clone());
            return Ok(Advice { words, settings, predicted, gain: 1.0 });
        };
        let gain = now / plan.simulation.step;
        let words = self.words(&plan, &settings, gain);
        Ok(Advice { words, predicted: predicted(&open, &plan)?, settings, gain })
    }

    fn words(&self, plan: &Candidate, settings: &Settings, gain: f64) -> Vec<String> {
        let mut words = Vec::new();
        if settings.schedule != self.settings.schedule || settings.microbatches != self.settings.microbatches
        {
            words.push(format!(
                "Use {} with {} microbatches instead of {} with {}.",
                settings.schedule, settings.microbatches, self.settings.schedule, self.settings.microbatches
            ));
        }
        if settings.replicas != self.settings.replicas {
            words.push(match settings.replicas {
                1 => "Put all devices into one pipeline.".to_string(),
                count => {
                    let shares = microbatches(&plan.shares());
                    format!("Train {count} pipelines beside each other, with {shares}.")
                }
            });
        }
        // The page counts devices from 1.
        let has = |(rank, device): (usize, &usize)| {
            format!("device {} has {}", device + 1, plan.layers_of(rank).counted())
        };
        let layers: Vec<String> = plan.devices.iter().enumerate().map(has).collect();
        words.push(format!("Then {}.", layers.join(", ")));
        let milliseconds = |seconds: f64| (1e3 * seconds).round();
        words.push(format!(
            "A step is predicted to take {} ms instead of {} ms: {gain:.2} times as fast.",
            milliseconds(plan.simulation.step),
            milliseconds(self.plan.simulation.step)
        ));
        words
    }
}

fn search(open: &Planning, settings: &Settings) -> Option<Candidate> {
    let mut planning = open.clone();
    planning.options = Options {
        schedule: ScheduleChoice::Named(settings.schedule.clone()),
        microbatches: Some(settings.microbatches),
        cuts: None,
        data: DataChoice::Count(settings.replicas),
        ..planning.options
    };
    planning.search().ok().map(|planned| planned.best)
}
