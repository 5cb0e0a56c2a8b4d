//! What training runs add to the profiles in the cache.
//!
//! A run's steps are what a profile is for, so they count for more than what it has from a probe or an earlier run:
//! what a finding says of a device takes the place of all but [`OLD`] steps of that. Noise has the last word: what was
//! found beside other programs never touches what was measured in quiet.

use super::noise::{beside, is_as_good, is_clearly_quieter, limit};
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
            _ => None,
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

/// What becomes of a finding.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Outcome {
    /// The profile in the cache is corrected, and rests on this.
    Learnt(Evidence),
    /// The next run measures again: what was there was measured beside other programs, which took this part of the cores.
    MeasuredAgain(f64),
    /// The profile stays, because it rests on less noise.
    Louder,
    /// The profile stays, because the cache cannot be written or has nothing to correct.
    Unwritten,
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

/// What a run was planned with on one device, and what became of it since.
#[derive(Debug, Clone, Copy)]
pub struct Basis<'a> {
    /// The device's profile as it was in the cache when the run was planned.
    pub profile: &'a DeviceProfile,
    /// Of the plan's microbatches.
    pub shape: &'a str,
    /// The part of the cores that other programs took while the plan's times were measured, if they disturbed that.
    pub loudest: Option<f64>,
    /// What the run's last correction rests on, if it has made one.
    pub taught: Option<Evidence>,
}

impl Cache {
    /// Corrects what there is of a device by what a run found. May be done several times in a run, with what it has found
    /// by then: the last correction takes the place of those before.
    pub fn learn(&self, device: &Device, basis: &Basis, finding: &Finding) -> Outcome {
        // How much was their fault in a device's times, and how much in its neighbours' slowdown, nobody can tell.
        if let Some(then) = basis.loudest.filter(|&then| is_clearly_quieter(finding.others, then)) {
            return Outcome::MeasuredAgain(then);
        }
        // The newest, because other runs learn too.
        let mut profile = self.read_device(device).unwrap_or_else(|| basis.profile.clone());
        match corrected(&mut profile, basis, finding, limit(device)) {
            Outcome::Learnt(_) if !self.write_device(device, profile) => Outcome::Unwritten,
            outcome => outcome,
        }
    }
}

/// Corrects `profile`, which may be newer than what the run was planned with.
///
/// Where several devices run at once, their mutual slowdown may be to blame as well as their own times. The correction
/// goes to their own times, which makes the next prediction of the same plan right whichever it was; a plan of other
/// devices is then wrong by as much as the slowdown was, until it has been run.
fn corrected(profile: &mut DeviceProfile, basis: &Basis, finding: &Finding, limit: f64) -> Outcome {
    let planned = basis.profile;
    let Some(assumed) = planned.shape(basis.shape) else { return Outcome::Unwritten };
    // A run that corrects itself begins where it began before.
    let newest = profile.shape(basis.shape).filter(|newest| newest.measured != basis.taught);
    let mut own = newest.unwrap_or(assumed).clone();
    if !is_as_good(finding.others, beside(own.measured), limit) {
        return Outcome::Louder;
    }
    let old_steps = own.measured.map_or(OLD, |evidence| OLD.min(evidence.steps as f64));
    finding.correct(&mut own, old_steps, assumed);
    let rests_on = Evidence {
        unix_seconds: unix_seconds(),
        steps: finding.steps + old_steps as u64,
        spread: finding.spread,
        others: finding.others,
        trained: true,
    };
    own.measured = Some(rests_on);
    // What made these times wrong was there during the whole session, so its other measurements are as wrong.
    for mate in planned.shapes.iter().filter(|mate| is_mate(assumed, mate, limit)) {
        if let Some(newest) = profile.shapes.iter_mut().find(|newest| newest.shape == mate.shape)
            && newest.measured == mate.measured
        {
            newest.clone_from(mate);
            finding.correct(newest, old_steps, mate);
        }
    }
    profile.put(own);
    let all: f64 = finding.assumed.iter().sum();
    if finding.assumed[Work::Ends as usize] > WORTH * all {
        let ratio = finding.ratio_of(Work::Ends);
        let mixed = |rate: f64| 1.0 / finding.mixed(1.0 / rate, old_steps, 1.0 / rate, ratio);
        profile.rates.optimizer_gb_s = planned.rates.optimizer_gb_s.map(mixed);
        profile.rates.norm_gb_s = planned.rates.norm_gb_s.map(mixed);
        profile.rates.clear_gb_s = planned.rates.clear_gb_s.map(mixed);
    }
    Outcome::Learnt(rests_on)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Rates;

    const LIMIT: f64 = 0.05;

    fn evidence(unix_seconds: u64, others: Option<f64>) -> Option<Evidence> {
        Some(Evidence { unix_seconds, steps: 24, spread: 0.02, others, trained: false })
    }

    fn shape(name: &str, seconds: f64, measured: Option<Evidence>) -> ShapeProfile {
        let layer = LayerProfile {
            forward: seconds,
            input: 2.0 * seconds,
            weight: seconds,
            backward: Some(3.0 * seconds),
        };
        let layers = [("block".to_string(), layer)].into();
        ShapeProfile { shape: name.into(), submit_us: Some(100.0), measured, layers }
    }

    fn profile(shapes: Vec<ShapeProfile>) -> DeviceProfile {
        let rates = Rates { optimizer_gb_s: Some(4.0), norm_gb_s: Some(8.0), ..Rates::default() };
        DeviceProfile { shapes, rates, ..DeviceProfile::default() }
    }

    /// All work takes `ratio` times as long as assumed.
    fn finding(ratio: f64, others: Option<f64>) -> Finding {
        let assumed = [1.0, 0.0, 0.0, 3.0, 0.5];
        Finding { measured: assumed.map(|s| s * ratio), assumed, steps: 18, spread: 0.04, others }
    }

    fn learn(after: &mut DeviceProfile, before: &DeviceProfile, shape: &str, finding: &Finding) -> Outcome {
        let basis = Basis { profile: before, shape, loudest: None, taught: None };
        corrected(after, &basis, finding, LIMIT)
    }

    fn forward(profile: &DeviceProfile, name: &str) -> f64 {
        profile.shape(name).unwrap().layers["block"].forward
    }

    #[test]
    fn a_run_moves_a_profile_nine_tenths_of_the_way_and_says_what_it_rests_on_now() {
        let before = profile(vec![shape("s", 1.8, evidence(1000, None))]);
        let mut after = before.clone();
        let outcome = learn(&mut after, &before, "s", &finding(1.0 / 1.8, None));
        let block = after.shape("s").unwrap().layers["block"];
        let want = (2.0 * 1.8 + 18.0) / 20.0;
        for (is, times) in
            [(block.forward, 1.0), (block.input, 2.0), (block.weight, 1.0), (block.backward.unwrap(), 3.0)]
        {
            assert!((is - times * want).abs() < 1e-9, "{block:?}");
        }
        let rests_on = after.shape("s").unwrap().measured.unwrap();
        assert_eq!(outcome, Outcome::Learnt(rests_on));
        assert!(rests_on.trained && rests_on.steps == 20 && rests_on.spread == 0.04, "{rests_on:?}");
        assert!(rests_on.unix_seconds > 1000);
        let rate = after.rates.optimizer_gb_s.unwrap();
        assert!((rate - 4.0 * 1.8 / want).abs() < 1e-9 && after.rates.clear_gb_s.is_none(), "{rate}");
    }

    #[test]
    fn what_is_learnt_at_every_checkpoint_is_not_learnt_twice_nor_refused_for_a_little_more_noise() {
        let before = profile(vec![shape("s", 1.0, None), shape("t", 5.0, None)]);
        let mut after = before.clone();
        let mut basis = Basis { profile: &before, shape: "s", loudest: None, taught: None };
        for checkpoint in 0..20 {
            let finding = finding(2.0, Some(0.5 + 0.01 * f64::from(checkpoint)));
            let Outcome::Learnt(rests_on) = corrected(&mut after, &basis, &finding, LIMIT) else {
                panic!("checkpoint {checkpoint}")
            };
            basis.taught = Some(rests_on);
            assert!((forward(&after, "s") - 1.9).abs() < 1e-9, "{after:?}");
            assert!((after.rates.norm_gb_s.unwrap() - 8.0 / 1.9).abs() < 1e-9, "{after:?}");
        }
        // What another run has learnt meanwhile is no lesson of this one.
        let mut theirs = shape("s", 1.0, evidence(1000, Some(0.0)));
        theirs.measured.iter_mut().for_each(|evidence| evidence.trained = true);
        after.put(theirs);
        assert_eq!(corrected(&mut after, &basis, &finding(2.0, Some(0.5)), LIMIT), Outcome::Louder);
        assert_eq!(forward(&after, "s"), 1.0);
    }

    #[test]
    fn shapes_of_a_session_are_corrected_once_however_often_it_is_done() {
        let shapes = vec![shape("s", 1.0, evidence(1000, None)), shape("t", 5.0, evidence(1060, None))];
        let before = profile(shapes);
        let mut after = before.clone();
        for _ in 0..20 {
            learn(&mut after, &before, "s", &finding(2.0, None));
            assert!((forward(&after, "t") - 9.5).abs() < 1e-9, "{after:?}");
        }
    }

    #[test]
    fn shapes_of_the_same_session_follow_and_no_others() {
        let trained = Evidence { trained: true, ..evidence(1000, None).unwrap() };
        let shapes = vec![
            shape("s", 1.0, evidence(1000, Some(0.0))),
            shape("same session", 1.0, evidence(1300, Some(0.02))),
            shape("another day", 1.0, evidence(90_000, Some(0.0))),
            shape("loud", 1.0, evidence(1000, Some(0.5))),
            shape("trained", 1.0, Some(trained)),
            shape("unknown", 1.0, None),
        ];
        let before = profile(shapes);
        let mut after = before.clone();
        // Another program has measured it meanwhile.
        after.put(shape("newer", 1.0, evidence(1200, Some(0.0))));
        learn(&mut after, &before, "s", &finding(2.0, Some(0.01)));
        for (name, seconds) in [("s", 1.9), ("same session", 1.9)] {
            assert!((forward(&after, name) - seconds).abs() < 1e-9, "{name}");
        }
        for name in ["another day", "loud", "trained", "unknown", "newer"] {
            assert_eq!(forward(&after, name), 1.0, "{name}");
        }
        assert_eq!(
            after.shape("same session").unwrap().measured,
            before.shape("same session").unwrap().measured
        );
    }

    #[test]
    fn noise_never_touches_what_was_measured_in_quiet() {
        let before = profile(vec![shape("s", 1.0, evidence(1000, Some(0.01)))]);
        let mut after = before.clone();
        assert_eq!(learn(&mut after, &before, "s", &finding(1.5, Some(0.4))), Outcome::Louder);
        assert_eq!(after, before);
        assert_eq!(learn(&mut after, &before, "t", &finding(1.5, None)), Outcome::Unwritten);
        assert_eq!(after, before);
    }
}
