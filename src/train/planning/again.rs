//! A plan that is in force, with what its steps have taught of the machine.

use std::ops::RangeInclusive;

use super::{ALIKE, Planning, TELLING};
use crate::error::Result;
use crate::layers::Layers;
use crate::plan::{Candidate, DataChoice, Options, Planned, RecomputeChoice, ScheduleChoice, plan};
use crate::schedule::Schedule;
use crate::timeline::{Event, Prediction, Track, of_gangs};

/// How many times longer than predicted a device may take; anything else is no measurement.
const PLAUSIBLE: RangeInclusive<f64> = 1e-3..=1e3;

impl Planning {
    /// Corrects the machine by what a step of `candidate` took: each device's times by the ratio of its measured to its
    /// predicted seconds of work, and those of a device that did not work by what all the others are off at least.
    /// Returns the ratios of those that worked.
    pub fn learn(&mut self, candidate: &Candidate, events: &[Event]) -> Vec<f64> {
        let events = of_gangs(events, self.members());
        let ratio = |rank: usize| {
            let cells = candidate.simulation.cells.iter();
            let predicted: f64 = cells
                .filter(|cell| cell.rank == rank && cell.action.kind.computes())
                .map(|cell| cell.end - cell.start)
                .sum();
            let actions = events.iter().filter(|e| e.rank == rank && e.track == Track::Compute);
            let measured: f64 = actions.filter(|e| e.microbatch().is_some()).map(|e| e.end - e.start).sum();
            let enough = predicted >= TELLING * candidate.simulation.step;
            Some(measured / predicted).filter(|ratio| enough && PLAUSIBLE.contains(ratio))
        };
        let ratios: Vec<Option<f64>> = (0..candidate.devices.len()).map(ratio).collect();
        let known = || ratios.iter().flatten().copied();
        let Some((least, most)) = known().reduce(f64::min).zip(known().reduce(f64::max)) else {
            return Vec::new();
        };
        let common = 1f64.clamp(least, most);
        for (number, device) in self.machine.devices.iter_mut().enumerate() {
            match candidate.devices.iter().position(|&used| used == number) {
                Some(rank) => device.scale(ratios[rank].unwrap_or(1.0)),
                None => device.scale(common),
            }
        }
        known().collect()
    }

    /// The same plan with the machine's present times.
    pub fn again(&self, candidate: &Candidate) -> Result<Candidate> {
        Ok(self.alone(candidate)?.best)
    }

    /// The same plan with the machine's present times, as if there were no other.
    pub(in crate::train) fn alone(&self, candidate: &Candidate) -> Result<Planned> {
        let (devices, schedule) = (candidate.devices.clone(), candidate.schedule.clone());
        self.given(devices, schedule, candidate.cuts(), candidate.recompute.clone())
    }

    /// The plan that made a prediction, with the machine's present times.
    pub fn predicted(&self, prediction: &Prediction) -> Result<Candidate> {
        self.predicted_on(prediction, prediction.devices.iter().map(|device| device.number).collect())
    }

    /// The same on other devices.
    pub(in crate::train) fn predicted_on(
        &self,
        prediction: &Prediction,
        devices: Vec<usize>,
    ) -> Result<Candidate> {
        let schedule = prediction.schedule()?;
        let recompute = (0..schedule.stages).map(|stage| prediction.recompute.contains(&stage)).collect();
        Ok(self.given(devices, schedule, prediction.cuts.clone(), recompute)?.best)
    }

    fn given(
        &self,
        devices: Vec<usize>,
        schedule: Schedule,
        cuts: Vec<Layers>,
        recompute: Vec<bool>,
    ) -> Result<Planned> {
        let options = Options {
            devices: Some(devices),
            microbatches: Some(schedule.microbatches),
            schedule: ScheduleChoice::Given(schedule),
            cuts: Some(cuts),
            recompute: RecomputeChoice::Stages(recompute),
            data: DataChoice::default(),
            budgets: self.options.budgets.clone(),
            host: self.options.host,
        };
        plan(&self.workload, &self.machine, &options)
    }

    /// The best plan with the machine's present times and the same microbatches for each replica, on which rounding
    /// depends. Of plans that are about as fast the one that changes least: another schedule, else other cuts, else both,
    /// else other devices. Everything that decides whether a running plan is to be left for another asks here.
    pub fn search_again(&self, candidate: &Candidate) -> Result<Candidate> {
        let mut open = Options {
            microbatches: Some(candidate.microbatches),
            data: DataChoice::Shares(candidate.shares()),
            ..self.options.clone()
        };
        // Where stages have unequal numbers of replicas the schedule alone says who adds up what.
        if candidate.placement.shares().is_none() {
            open.schedule = ScheduleChoice::Given(candidate.schedule.clone());
        }
        let devices = Options { devices: Some(candidate.devices.clone()), ..open.clone() };
        let schedule = ScheduleChoice::Given(candidate.schedule.clone());
        let narrow = [
            Options { cuts: Some(candidate.cuts()), ..devices.clone() },
            Options { schedule, ..devices.clone() },
            devices,
        ];
        let search = |options| Planning { options, ..self.clone() }.search().map(|planned| planned.best);
        let best = search(open)?;
        // What has no plan within these bounds has one without them.
        let plans = narrow.into_iter().filter_map(|options| search(options).ok()).chain([best]);
        let plans: Vec<Candidate> = plans.collect();
        let seconds = |plan: &Candidate| plan.simulation.expected;
        let least = plans.iter().map(seconds).fold(f64::INFINITY, f64::min);
        let alike = plans.iter().find(|plan| seconds(plan) <= (1.0 + ALIKE) * least);
        Ok(alike.unwrap_or(&plans[plans.len() - 1]).clone())
    }
}
