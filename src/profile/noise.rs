//! Noise: the part of the host's cores that other programs take while something is measured.
//!
//! What is measured beside other programs is measured too slow, by as much as they happen to take. So a profiler looks
//! before it measures and waits a while for quiet, and every measurement carries how loud it was.

use std::path::Path;
use std::time::Duration;

use super::Progress;
use crate::error::Result;
use crate::folder::files::read_text;
use crate::gpu::{Device, now};
use crate::plan::Evidence;

/// A software adapter's threads are the host's cores. When others take more than this part of them, its times are not
/// the machine's own; and noise that differs by less than this is about the same.
const LOUD: f64 = 0.05;
/// A GPU is disturbed only when hardly a core is left for its driver.
const FULL: f64 = 0.9;
/// Seconds of a look at the machine.
const LOOK: f64 = 0.2;
/// Seconds between two looks …
const PAUSE: f64 = 0.5;
/// … and in all for which a profiler waits.
const PATIENCE: f64 = 4.0;
/// Cores are counted in hundredths of a second: shorter spans say nothing.
const SHORTEST: f64 = 0.1;

/// The part of the cores from which on others disturb a device.
pub fn limit(device: &Device) -> f64 {
    if device.capabilities().software { LOUD } else { FULL }
}

/// Whether it is so much quieter now that what was disturbed then is worth measuring again.
pub fn is_clearly_quieter(now: Option<f64>, then: f64) -> bool {
    now.is_some_and(|now| now < then / 2.0 && then - now > LOUD)
}

/// Whether what was measured beside `others` is as good as what was measured beside `before`: quiet, or at least no
/// louder. `before` is `None` for what nobody knows about, which is no better than anything.
pub fn is_as_good(others: Option<f64>, before: Option<f64>, limit: f64) -> bool {
    others.unwrap_or(0.0) <= before.map_or(1.0, |before| before.max(limit))
}

/// What others took while times were measured, as far as is known.
pub fn beside(evidence: Option<Evidence>) -> Option<f64> {
    evidence.and_then(|evidence| evidence.others)
}

/// A moment from which on others are listened to.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    at: f64,
    /// Seconds of processor time that this process had taken.
    own: f64,
    /// None where the system does not tell.
    cores: Option<Cores>,
}

/// What the cores that this process may use have done so far, in the system's unit.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Cores {
    count: f64,
    busy: f64,
    all: f64,
}

impl Moment {
    /// This moment.
    pub fn now() -> Moment {
        let read = |path: &str| read_text(Path::new(path)).ok();
        let cores = read("/proc/stat").and_then(|stat| {
            let status = read("/proc/self/status").unwrap_or_default();
            cores(&stat, &status)
        });
        Moment { at: now(), own: cpu_seconds(), cores }
    }

    /// Seconds since then.
    pub fn seconds(&self) -> f64 {
        now() - self.at
    }

    /// The part of the cores that others have taken since then; none where the system does not tell, or not yet.
    pub fn others(&self) -> Option<f64> {
        let end = Moment::now();
        let (before, after, seconds) = (self.cores?, end.cores?, end.at - self.at);
        let all = after.all - before.all;
        if all <= 0.0 || seconds < SHORTEST {
            return None;
        }
        let own = (end.own - self.own) / (seconds * after.count);
        Some(((after.busy - before.busy) / all - own).clamp(0.0, 1.0))
    }
}

/// Counters of those cores in `/proc/stat` that `/proc/self/status` allows, of all if it names none.
fn cores(stat: &str, status: &str) -> Option<Cores> {
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    let allowed: Vec<(usize, usize)> = list
        .into_iter()
        .flat_map(|list| list.split(','))
        .filter_map(|range| {
            let (first, last) = range.trim().split_once('-').unwrap_or((range.trim(), range.trim()));
            Some((first.parse().ok()?, last.parse().ok()?))
        })
        .collect();
    let mut cores = Cores::default();
    for line in stat.lines() {
        let mut words = line.split_ascii_whitespace();
        let core = words.next().and_then(|name| name.strip_prefix("cpu")?.parse::<usize>().ok());
        let Some(core) = core else { continue };
        if !allowed.is_empty() && !allowed.iter().any(|(first, last)| (first..=last).contains(&&core)) {
            continue;
        }
        let times: Vec<f64> = words.map_while(|word| word.parse().ok()).collect();
        // What guests take, which follows, is part of the first two.
        let [user, nice, system, idle, waiting, irq, softirq, stolen] = *times.first_chunk()?;
        let busy = user + nice + system + irq + softirq + stolen;
        cores.count += 1.0;
        cores.busy += busy;
        cores.all += busy + idle + waiting;
    }
    (cores.count > 0.0).then_some(cores)
}

/// Seconds of processor time that all threads of this process have taken.
pub fn cpu_seconds() -> f64 {
    #[cfg(unix)]
    {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the call only writes `time`.
        let failed = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
        if failed == 0 { time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9 } else { 0.0 }
    }
    #[cfg(not(unix))]
    {
        0.0
    }
}

/// Finds quiet moments for the measurements of one profiler.
pub(super) struct Quiet<'s> {
    /// Hears how it goes.
    pub(super) say: &'s mut dyn FnMut(Progress),
    /// Seconds that may still be waited.
    patience: f64,
    /// What others took when it was first asked.
    found: Option<Option<f64>>,
}

impl<'s> Quiet<'s> {
    pub(super) fn new(say: &'s mut dyn FnMut(Progress)) -> Quiet<'s> {
        Quiet { say, patience: PATIENCE, found: None }
    }

    /// Whether what was measured while others took so much is worth measuring again now.
    pub(super) fn is_worth(&mut self, then: Option<f64>, limit: f64) -> bool {
        // A look takes time, so only where it matters.
        then.filter(|&then| then > limit)
            .is_some_and(|then| is_clearly_quieter(*self.found.get_or_insert_with(look), then))
    }

    /// Measures, in quiet if it can be had, and says what others took meanwhile. If they came while it measured, it
    /// measures once more as soon as they are gone.
    pub(super) fn measure<T>(
        &mut self,
        limit: f64,
        mut once: impl FnMut(&mut dyn FnMut(Progress)) -> Result<T>,
    ) -> Result<(T, Option<f64>)> {
        let mut listen = |quiet: &mut Self| {
            let start = Moment::now();
            let measured = once(quiet.say)?;
            Ok((measured, start.others()))
        };
        self.wait(limit);
        let first = listen(self)?;
        if first.1.is_none_or(|others| others <= limit) || !self.wait(limit) {
            return Ok(first);
        }
        let second = listen(self)?;
        Ok(if second.1 < first.1 { second } else { first })
    }

    /// Waits for quiet while there is patience. Whether it came.
    fn wait(&mut self, limit: f64) -> bool {
        while let Some(others) = look().filter(|&others| others > limit) {
            if self.patience <= 0.0 {
                return false;
            }
            (self.say)(Progress::Waiting(others));
            std::thread::sleep(Duration::from_secs_f64(PAUSE));
            self.patience -= PAUSE + LOOK;
        }
        true
    }
}

/// What others take now.
fn look() -> Option<f64> {
    let start = Moment::now();
    start.cores?;
    std::thread::sleep(Duration::from_secs_f64(LOOK));
    start.others()
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT: &str = "cpu  70 3 9 300 5 2 1 10 0 0
cpu0 40 1 5 100 2 1 1 0 0 0
cpu1 30 2 4 200 3 1 0 10 30 0
cpu12 100 0 0 0 0 0 0 0 0 0
intr 123 0 0
ctxt 5
";

    #[test]
    fn the_cores_that_a_process_may_use_are_counted_and_no_others() {
        let both = Cores { count: 2.0, busy: 48.0 + 47.0, all: 150.0 + 250.0 };
        assert_eq!(cores(STAT, "Name:\tx\nCpus_allowed_list:\t0-1,7\n"), Some(both));
        let last = Cores { count: 1.0, busy: 100.0, all: 100.0 };
        assert_eq!(cores(STAT, "Cpus_allowed_list:\t3,10-12"), Some(last));
        assert_eq!(cores(STAT, "").map(|cores| cores.count), Some(3.0));
        for nothing in ["", "cpu 1 2 3 4 5 6 7 8\n", "cpu0 1 2 3\n", "cpu0 a b\n"] {
            assert_eq!(cores(nothing, ""), None, "{nothing:?}");
        }
    }

    #[test]
    fn only_a_clearly_quieter_machine_is_worth_measuring_again() {
        for (then, now) in [(0.5, 0.0), (0.5, 0.2), (0.06, 0.0), (0.95, 0.4)] {
            assert!(is_clearly_quieter(Some(now), then), "{then} {now}");
        }
        for (then, now) in [(0.5, 0.3), (0.08, 0.035), (0.5, 0.9)] {
            assert!(!is_clearly_quieter(Some(now), then), "{then} {now}");
        }
        assert!(!is_clearly_quieter(None, 0.5));
        // What did not disturb the device then is good, and nobody need look: this would be clearly quieter.
        let mut quiet = Quiet { say: &mut |_| (), patience: 0.0, found: Some(Some(0.0)) };
        assert!(quiet.is_worth(Some(0.5), LOUD) && !quiet.is_worth(Some(0.5), FULL));
        assert!(!quiet.is_worth(Some(0.04), 0.05) && !quiet.is_worth(None, LOUD));
    }

    #[test]
    fn loud_evidence_is_not_as_good_as_quiet_and_quiet_is_as_good_as_any() {
        for before in [None, Some(0.0), Some(0.5)] {
            assert!(is_as_good(Some(0.03), before, LOUD) && is_as_good(None, before, LOUD));
        }
        assert!(!is_as_good(Some(0.5), Some(0.0), LOUD) && !is_as_good(Some(0.5), Some(0.3), LOUD));
        assert!(is_as_good(Some(0.5), Some(0.6), LOUD) && is_as_good(Some(0.5), None, LOUD));
    }
}
