//! Compares steps with their prediction, and cuts the model again when they keep apart.

use super::planning::Planning;
use crate::error::Result;
use crate::plan::Candidate;
use crate::timeline::Event;

/// Steps of which the median is compared.
pub(super) const STEPS: usize = 5;
/// Steps after a start that still compile, or touch fresh memory.
pub(super) const WARM_UP: usize = 2;
/// How far a step may be off its prediction.
const TOLERANCE: f64 = 0.1;
/// How much faster another plan must be to be worth moving to.
const GAIN: f64 = 0.03;

/// The plan in force and how well it has kept its promise so far.
pub struct Replanner {
    planning: Planning,
    current: Candidate,
    recent: Vec<f64>,
    skip: usize,
}

/// What followed from a step.
pub enum Verdict {
    /// Nothing.
    Keep,
    /// The prediction was wrong, but there is no better plan: from now on this many seconds are promised.
    Corrected {
        /// Seconds of a step.
        seconds: f64,
        /// How far steps were off: measured ÷ predicted − 1.
        off: f64,
    },
    /// Another plan is better.
    Move {
        /// The plan.
        to: Box<Candidate>,
        /// How far steps were off: measured ÷ predicted − 1.
        off: f64,
        /// Seconds of a step if nothing moved.
        staying: f64,
    },
}

impl Replanner {
    /// Watches over a plan.
    pub fn new(planning: Planning, current: Candidate) -> Replanner {
        Replanner { planning, current, recent: Vec::new(), skip: WARM_UP }
    }

    /// The plan in force.
    pub fn current(&self) -> &Candidate {
        &self.current
    }

    /// What it plans with.
    pub fn planning(&self) -> &Planning {
        &self.planning
    }

    /// Measured ÷ predicted − 1 of the median of the last steps, once there are enough.
    pub fn residual(&self) -> Option<f64> {
        let mut recent = self.recent.clone();
        recent.sort_by(f64::total_cmp);
        let median = recent.get(STEPS / 2).filter(|_| recent.len() == STEPS)?;
        Some(median / self.current.simulation.expected - 1.0)
    }

    /// Hears of a step, and changes nothing.
    pub fn listen(&mut self, seconds: f64) -> Verdict {
        if self.skip > 0 {
            self.skip -= 1;
            return Verdict::Keep;
        }
        if self.recent.len() == STEPS {
            self.recent.remove(0);
        }
        self.recent.push(seconds);
        Verdict::Keep
    }

    /// Hears of a step. After [`Verdict::Move`] the plan in force is the new one.
    pub fn step(&mut self, seconds: f64, events: &[Event]) -> Result<Verdict> {
        self.listen(seconds);
        let Some(off) = self.residual().filter(|off| off.abs() > TOLERANCE) else { return Ok(Verdict::Keep) };
        self.planning.learn(&self.current, events);
        self.current = self.planning.again(&self.current)?;
        let staying = self.current.simulation.expected;
        let best = self.planning.search_again(&self.current)?;
        self.recent.clear();
        self.skip = WARM_UP;
        if best.simulation.expected > (1.0 - GAIN) * staying {
            return Ok(Verdict::Corrected { seconds: staying, off });
        }
        self.current = best.clone();
        Ok(Verdict::Move { to: Box::new(best), off, staying })
    }
}
