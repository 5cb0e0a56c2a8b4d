//! The best plan, where some things are left open: who has what of the state, how many devices divide layers; and what would help
//! where there is none.

use std::iter::successors;

use super::{ALIKE, Planning};
use crate::error::{Error, Result};
use crate::graph::FEW_LOGIT_BYTES;
use crate::mesh::Division;
use crate::model::Weights;
use crate::plan::{Optimizer, Planned, ScheduleChoice, Sharding, check, fits, plan};
use crate::timeline::duration;
use crate::train::config::{AdapterConfig, Axis, Config, TrainConfig};

/// Times that the planner's own count of bytes is corrected by the exact one.
const CORRECTIONS: usize = 6;

/// Tokens below which a shorter sequence is no help.
const SHORTEST: usize = 16;

impl Planning {
    /// Refuses what is wrong on these devices whatever they measure, and limits within which nothing fits.
    ///
    /// # Errors
    ///
    /// As [`check`] and [`Planning::search`].
    pub fn check(self) -> Result<()> {
        let is_limited = self.options.host.is_some() || self.options.budgets.iter().any(Option::is_some);
        match self.config.mesh.tensor {
            _ if is_limited => self.choose().map(drop),
            // Of several ways to divide layers another may do.
            Some(Axis::Named(_)) => Ok(()),
            _ => check(&self.workload, &self.machine, &self.options),
        }
    }

    /// The best plan, its bytes counted as they will be allocated.
    ///
    /// # Errors
    ///
    /// Those of [`plan`] and [`Plan::new`]: nothing fits, or what was fixed by hand cannot be.
    pub fn search(&self) -> Result<Planned> {
        self.find().map_err(|error| self.helped(error))
    }

    /// An error of [`Planning::find`], with what else would help.
    fn helped(&self, error: Error) -> Error {
        match error {
            Error::NoPlan { lacks, mut help } => {
                help.extend(self.other_models());
                Error::NoPlan { lacks, help }
            }
            other => other,
        }
    }

    /// The best plan, where the config leaves open how many devices divide every layer: the one that is faster by more than
    /// what plans that are alike differ by, of few devices rather than of many.
    ///
    /// # Errors
    ///
    /// As [`Planning::search`].
    pub fn choose(self) -> Result<(Planning, Planned)> {
        if !matches!(self.config.mesh.tensor, Some(Axis::Named(_))) {
            return self.choose_state();
        }
        let gangs = self.config.mesh.divisions(self.candidates().len(), self.config.model.heads);
        let mut found: Vec<(usize, Result<(Planning, Planned)>)> = Vec::new();
        for members in std::iter::once(1).chain(gangs.iter().map(Division::members)) {
            let mut config = self.config.clone();
            config.mesh.tensor = (members > 1).then_some(Axis::Count(members));
            let planning = self.with(&config).and_then(|mut planning| {
                planning.limit(self.options.budgets.clone());
                planning.limit_host(self.options.host);
                planning.choose_state()
            });
            found.push((members, planning));
        }
        let seconds = |of: &Result<(Planning, Planned)>| {
            of.as_ref().map_or(f64::INFINITY, |(_, planned)| planned.best.simulation.expected)
        };
        let least = found.iter().map(|(_, of)| seconds(of)).fold(f64::INFINITY, f64::min);
        let alike = |(_, of): &(usize, Result<(Planning, Planned)>)| seconds(of) <= (1.0 + ALIKE) * least;
        let at = found.iter().position(alike).unwrap_or(0);
        let (members, chosen) = found.swap_remove(at);
        let (mut planning, planned) = chosen?;
        found.sort_by_key(|(members, _)| *members);
        let words = |(members, of): &(usize, Result<(Planning, Planned)>)| match seconds(of) {
            seconds if seconds.is_finite() => {
                format!("tensor = {members} would take {}", duration(seconds))
            }
            _ => format!("with tensor = {members} nothing fits"),
        };
        let others: Vec<String> = found.iter().map(words).collect();
        let others = if others.is_empty() { "there is no other way".into() } else { others.join(", ") };
        planning.axis = Some(match members {
            1 => format!("whole layers; {others}"),
            _ => format!("{}; {others}", planning.axis().unwrap_or_default()),
        });
        Ok((planning, planned))
    }

    /// The best plan, where the config leaves open who has what of the state: with the first way in which there is one.
    fn choose_state(self) -> Result<(Planning, Planned)> {
        let ways = self.config.mesh.shardings()?;
        let mut first: Option<(Planning, Error)> = None;
        for sharding in ways {
            let mut planning = self.sharded(sharding)?;
            match (planning.find(), &first) {
                (Ok(planned), _) => {
                    planning.because = first.and_then(|(_, error)| match error {
                        Error::NoPlan { lacks, .. } => Some(lacks),
                        _ => None,
                    });
                    return Ok((planning, planned));
                }
                (Err(error @ Error::NoPlan { .. }), None) => first = Some((planning, error)),
                (Err(Error::NoPlan { .. }), Some(_)) => {}
                (Err(error), _) => return Err(error),
            }
        }
        match first {
            Some((planning, error)) => Err(planning.helped(error)),
            None => self.search().map(|planned| (self, planned)),
        }
    }

    /// The same with the state divided like this.
    fn sharded(&self, sharding: Sharding) -> Result<Planning> {
        let mut config = self.config.clone();
        config.mesh.settle(sharding);
        let planning = self.with(&config)?;
        Ok(Planning { options: self.options.clone(), ..planning })
    }

    /// The same for another config.
    ///
    /// # Errors
    ///
    /// As [`Planning::for_machine`].
    pub fn with(&self, config: &Config) -> Result<Planning> {
        let given = match &self.options.schedule {
            ScheduleChoice::Given(schedule) => Some(schedule.clone()),
            _ => None,
        };
        let (machine, names) = match &self.gangs {
            Some(gangs) => (&gangs.devices, &gangs.names),
            None => (&self.machine, &self.names),
        };
        let mut planning =
            Planning::new(config, machine.clone(), self.adapters.clone(), names.clone(), given)?;
        if let Some((now, before)) = planning.gangs.as_mut().zip(self.gangs.as_ref()) {
            now.budgets = before.budgets.clone();
        }
        Ok(planning)
    }

    fn find(&self) -> Result<Planned> {
        let mut options = self.options.clone();
        options.budgets.resize(self.machine.devices.len(), None);
        let mut tries = 0;
        loop {
            let mut planned = plan(&self.workload, &self.machine, &options)?;
            match self.count(&mut planned.best) {
                Ok(()) => return Ok(planned),
                // The planner adds up layers, so it may be a little off; it looks again with so much less.
                Err(Error::Memory { device, need, budget, .. }) if tries < CORRECTIONS => {
                    let device = planned.best.devices[device / self.members()];
                    let short = need.saturating_sub(budget).max(budget / 256);
                    let room = options.budgets[device].or(self.machine.devices[device].memory);
                    options.budgets[device] = room.map(|bytes| bytes.saturating_sub(short));
                    tries += 1;
                }
                Err(Error::Memory { device, need, budget, .. }) => {
                    let name = &self.called(&planned.best)[device].name;
                    let device = self.devices(&planned.best)[device];
                    let lacks = need.saturating_sub(budget);
                    let message = format!(
                        "device {device} ({name}) lacks {lacks} bytes: it needs {need} and may use {budget}"
                    );
                    return Err(Error::no_plan(message, Vec::new()));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// A way to divide the state with which a plan fits, in such words: one key to set.
    fn other_sharding(&self) -> Option<String> {
        let (now, mesh) = (self.workload.sharding, &self.config.mesh);
        let fits = |level: u8, words: &str| {
            let sharding = Sharding::new(level.max(now.zero), now.sum, Optimizer::Host).ok()?;
            let fits = sharding != now && self.sharded(sharding).is_ok_and(|other| other.find().is_ok());
            fits.then(|| words.to_string())
        };
        if now.by_host() {
            return fits(3, "--set mesh.zero=3");
        }
        let open = || mesh.zero.is_none().then(|| fits(3, "--set mesh.optimizer=auto")).flatten();
        fits(1, "--set mesh.optimizer=host").or_else(open)
    }

    /// Changes of what is trained with which a plan fits, in words that follow `it would fit with`.
    fn other_models(&self) -> Vec<String> {
        let fits = |config: &Config| {
            let fits = |other: Planning| fits(&other.workload, &self.machine, &self.options);
            self.with(config).and_then(fits).unwrap_or(false)
        };
        let mut found = Vec::new();
        let config = &self.config;
        found.extend(self.other_sharding());
        let stored = [Weights::BF16, Weights::BF16Only].map(|weights| {
            let train = TrainConfig { weights, ..config.train.clone() };
            (Config { train, ..config.clone() }, format!("--set train.weights={}", weights.name()))
        });
        found.extend(stored.into_iter().find(|(config, _)| fits(config)).map(|(_, words)| words));
        let logits = config.train.logits.min(FEW_LOGIT_BYTES >> 20);
        let parts = Config { train: TrainConfig { logits, ..config.train.clone() }, ..config.clone() };
        found.extend(fits(&parts).then(|| format!("--set train.logits={logits}")));
        let shorter = successors(Some(config.train.sequence / 2), |sequence| Some(sequence / 2));
        let mut shorter = shorter.take_while(|&sequence| sequence >= SHORTEST).map(|sequence| {
            let train = TrainConfig { sequence, ..config.train.clone() };
            (Config { train, ..config.clone() }, format!("--set train.sequence={sequence}"))
        });
        found.extend(shorter.find(|(config, _)| fits(config)).map(|(_, words)| words));
        if config.path.is_some() && config.adapter.is_none() {
            let adapter = AdapterConfig::default();
            let words = format!("--set adapter.rank={}, which trains an adapter alone", adapter.rank);
            let config = Config { adapter: Some(adapter), ..config.clone() };
            found.extend(fits(&config).then_some(words));
        }
        found
    }
}
