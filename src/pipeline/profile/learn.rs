//! What training runs add to the profiles in the cache.
//!
//! A run's steps are what a profile is for, so they count for more than what it has from a probe or an earlier run:
//! what a finding says of a device takes the place of all but [`OLD`] steps of that. Noise has the last word: what was
//! found beside other programs never touches what was measured in quiet.

use super::noise::{beside, is_as_good, limit};
use super::{Cache, unix_seconds};
use crate::gpu::Device;
use crate::plan::{DeviceProfile, Evidence, LayerProfile, ShapeProfile};
use crate::schedule::Kind;

/// Steps for which everything counts at most that was known before.
const OLD: f64 = 2.0;
/// Seconds between two measurements of one session.
const SESSION: u64 = 10 * 60;
/// Clearing, norm and update together, as a part of the work: less says little about their rates.
const WORTH: f64 = 0.01;
/// More than any device can be off.
const MOST: f64 = 1000.0;

/// What a device does in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// F.
    Forward,
    /// I.
    Input,
    /// W.
    Weight,
    /// B.
    Backward,
    /// Clearing gradients, their norm, the update.
    Ends,
}

/// How many kinds of work there are.
pub const KINDS_OF_WORK: usize = 5;

impl Work {
    /// What an action of a schedule is; none for a transfer.
    pub fn of(kind: Kind) -> Option<Work> {
        match kind {
            Kind::F => Some(Work::Forward),
            Kind::I => Some(Work::Input),
            Kind::W => Some(Work::Weight),
            Kind::B => Some(Work::Backward),
            Kind::SendF | Kind::RecvF | Kind::SendB | Kind::RecvB => None,
        }
    }
}

/// What the steps of a run say of a device.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Finding {
    /// Seconds of each kind of work in a mean step.
    pub measured: [f64; KINDS_OF_WORK],
    /// The same as the plan assumed it.
    pub assumed: [f64; KINDS_OF_WORK],
    /// How many steps.
    pub steps: u64,
    /// Standard deviation of a step's work as a part of its mean.
    pub spread: f64,
    /// The part of the cores that other programs took; none where the system does not tell.
    pub others: Option<f64>,
}

impl Finding {
    /// Seconds of all layers, measured ÷ assumed.
    pub fn ratio(&self) -> f64 {
        let layers = Work::Ends as usize;
        ratio(self.measured[..layers].iter().sum(), self.assumed[..layers].iter().sum()).unwrap_or(1.0)
    }

    /// The same for one kind of work; that of all layers where there was none of it.
    fn ratio_of(&self, work: Work) -> f64 {
        ratio(self.measured[work as usize], self.assumed[work as usize]).unwrap_or_else(|| self.ratio())
    }

    /// A time that is `old` in the cache and was `assumed` by the plan, as it should be from now on.
    fn mixed(&self, old: f64, old_steps: f64, assumed: f64, ratio: f64) -> f64 {
        (old_steps * old + self.steps as f64 * assumed * ratio) / (old_steps + self.steps as f64)
    }

    fn correct(&self, old: &mut ShapeProfile, old_steps: f64, assumed: &ShapeProfile) {
        let mixed = |old, assumed, ratio| self.mixed(old, old_steps, assumed, ratio);
        for (kind, layer) in &mut old.layers {
            let Some(planned) = assumed.layers.get(kind) else { continue };
            let backward = layer.backward.zip(planned.backward);
            *layer = LayerProfile {
                forward: mixed(layer.forward, planned.forward, self.ratio_of(Work::Forward)),
                input: mixed(layer.input, planned.input, self.ratio_of(Work::Input)),
                weight: mixed(layer.weight, planned.weight, self.ratio_of(Work::Weight)),
                backward: backward.map(|(b, planned)| mixed(b, planned, self.ratio_of(Work::Backward))),
            };
        }
        let submit = old.submit_us.zip(assumed.submit_us);
        old.submit_us = submit.map(|(submit, planned)| mixed(submit, planned, self.ratio()));
    }
}

fn ratio(measured: f64, assumed: f64) -> Option<f64> {
    (measured > 0.0 && assumed > 0.0).then(|| (measured / assumed).clamp(1.0 / MOST, MOST))
}

impl Cache {
    /// Corrects what there is of a device by what a run found, which planned with the profile `assumed` and microbatches
    /// of the shape `shape`. Whether that is kept: not if it was loud and what there is was not, nor if the folder cannot
    /// be written. May be done several times in a run, with what it has found by then.
    pub fn learn(&self, device: &Device, assumed: &DeviceProfile, shape: &str, finding: &Finding) -> bool {
        // The newest, because other runs learn too.
        let mut profile = self.read_device(device).unwrap_or_else(|| assumed.clone());
        corrected(&mut profile, assumed, shape, finding, limit(device)) && self.write_device(device, profile)
    }
}

/// Corrects `profile`, which may be newer than what the run assumed; whether it did.
///
/// Where several devices run at once, their mutual slowdown may be to blame as well as their own times. The correction
/// goes to their own times, which makes the next prediction of the same plan right whichever it was; a plan of other
/// devices is then wrong by as much as the slowdown was, until it has been run.
fn corrected(
    profile: &mut DeviceProfile,
    assumed: &DeviceProfile,
    shape: &str,
    finding: &Finding,
    limit: f64,
) -> bool {
    let Some(planned) = assumed.shape(shape) else { return false };
    let mut own = profile.shape(shape).unwrap_or(planned).clone();
    if !is_as_good(finding.others, beside(own.measured), limit) {
        return false;
    }
    let old_steps = own.measured.map_or(OLD, |evidence| OLD.min(evidence.steps as f64));
    finding.correct(&mut own, old_steps, planned);
    own.measured = Some(Evidence {
        unix_seconds: unix_seconds(),
        steps: finding.steps + old_steps as u64,
        spread: finding.spread,
        others: finding.others,
        trained: true,
    });
    // What made these times wrong was there during the whole session, so its other measurements are as wrong.
    for mate in assumed.shapes.iter().filter(|mate| is_mate(planned, mate, limit)) {
        if let Some(newest) = profile.shapes.iter_mut().find(|newest| newest.shape == mate.shape)
            && newest.measured == mate.measured
        {
            finding.correct(newest, old_steps, mate);
        }
    }
    profile.put(own);
    let layers: f64 = finding.assumed.iter().sum();
    if finding.assumed[Work::Ends as usize] > WORTH * layers {
        let ratio = finding.ratio_of(Work::Ends);
        let rates = [
            (&mut profile.rates.optimizer_gb_s, assumed.rates.optimizer_gb_s),
            (&mut profile.rates.norm_gb_s, assumed.rates.norm_gb_s),
            (&mut profile.rates.clear_gb_s, assumed.rates.clear_gb_s),
        ];
        for (rate, planned) in rates {
            let both = rate.zip(planned);
            *rate =
                both.map(|(rate, planned)| 1.0 / finding.mixed(1.0 / rate, old_steps, 1.0 / planned, ratio));
        }
    }
    true
}

/// Whether `other` was measured in the same session as `own`, beside as much noise, and no run knows either.
fn is_mate(own: &ShapeProfile, other: &ShapeProfile, limit: f64) -> bool {
    let (Some(a), Some(b)) = (own.measured, other.measured) else { return false };
    let is_loud = |evidence: Evidence| evidence.others.is_some_and(|others| others > limit);
    own.shape != other.shape
        && !a.trained
        && !b.trained
        && a.unix_seconds.abs_diff(b.unix_seconds) <= SESSION
        && is_loud(a) == is_loud(b)
}
