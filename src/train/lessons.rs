//! What a run's own steps say about the devices, for the profiles that the next run plans with.

use std::collections::VecDeque;

use super::planning::{Planning, TELLING};
use crate::gpu::Device;
use crate::plan::{Candidate, Evidence, Machine};
use crate::profile::noise::{Moment, beside, limit};
use crate::profile::{Basis, Cache, Finding, KINDS_OF_WORK, Outcome, Work, first_of_adapter};
use crate::schedule::{Action, Kind};
use crate::timeline::{Event, Track, What};

/// Steps after a start that still compile, or touch fresh memory.
const WARM_UP: usize = 2;
/// Fewer steps say too little.
const FEW: usize = 10;
/// Steps that are remembered of each kind, quiet and loud: the machine as it is now.
const MOST: usize = 200;
/// Of so many steps, one may be an accident.
const PER_ACCIDENT: usize = 20;
/// Seconds of steps after which it is asked what other programs took meanwhile.
const SPAN: f64 = 0.5;

/// Seconds of each kind of work.
type Seconds = [f64; KINDS_OF_WORK];

/// Collects what a run's steps say of each adapter.
pub struct Lessons {
    cache: Cache,
    /// As the run was planned: whatever is learnt in mid-run, the machine here stays what the cache had.
    planning: Planning,
    devices: Vec<Device>,
    students: Vec<Student>,
    plan: Candidate,
    skip: usize,
    span: Moment,
}

/// An adapter of the plan.
#[derive(Default)]
struct Student {
    /// The first of the machine's devices that is this adapter.
    device: usize,
    /// What a step of the plan in force is said to take.
    assumed: Seconds,
    /// Steps of the span that has not ended.
    pending: Vec<Step>,
    quiet: VecDeque<Step>,
    loud: VecDeque<Step>,
    /// What its last correction rests on.
    taught: Option<Evidence>,
}

#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Step {
    measured: Seconds,
    assumed: Seconds,
    others: Option<f64>,
}

/// What a run has found out about an adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct Lesson {
    /// The adapter's name.
    pub name: String,
    /// Seconds of its actions, measured ÷ assumed by the plan.
    pub ratio: f64,
    /// The part of the cores that other programs took during these steps.
    pub others: Option<f64>,
    /// What the next run does with it.
    pub outcome: Outcome,
}

impl Lessons {
    /// For a run of the plan `best`, made by `planning` with profiles from the cache.
    pub fn new(cache: Cache, planning: Planning, devices: Vec<Device>, best: Candidate) -> Lessons {
        let (students, span) = (Vec::new(), Moment::now());
        let mut lessons = Lessons { cache, planning, devices, students, plan: best, skip: 0, span };
        lessons.begin();
        lessons
    }

    /// The run goes on with another plan.
    pub fn change(&mut self, plan: &Candidate) {
        self.end_span();
        // Without the original machine's times for it there is nothing to compare with.
        let Ok(plan) = self.planning.again(plan) else {
            self.students.iter_mut().for_each(|student| student.assumed = Seconds::default());
            return;
        };
        self.plan = plan;
        self.begin();
    }

    fn begin(&mut self) {
        for device in self.plan.devices.iter().map(|&device| first_of_adapter(&self.devices, device)) {
            if !self.students.iter().any(|student| student.device == device) {
                self.students.push(Student { device, ..Student::default() });
            }
        }
        for student in &mut self.students {
            student.assumed = Seconds::default();
        }
        let assumed = assumed(&self.plan, &self.planning.machine);
        self.add(&assumed, |student| &mut student.assumed);
        self.skip = WARM_UP;
        self.span = Moment::now();
    }

    /// Adds the seconds of each rank to those of its adapter.
    fn add(&mut self, ranks: &[Seconds], mut of: impl FnMut(&mut Student) -> &mut Seconds) {
        for (rank, seconds) in ranks.iter().enumerate() {
            let device = self.plan.devices.get(rank).map(|&device| first_of_adapter(&self.devices, device));
            let student = self.students.iter_mut().find(|student| Some(student.device) == device);
            let Some(student) = student else { continue };
            of(student).iter_mut().zip(seconds).for_each(|(sum, seconds)| *sum += seconds);
        }
    }

    /// Hears of a step.
    pub fn step(&mut self, events: &[Event]) {
        if self.skip > 0 {
            self.skip -= 1;
            self.span = Moment::now();
            return;
        }
        let measured = measured(events, self.plan.devices.len());
        for student in &mut self.students {
            student.pending.push(Step { assumed: student.assumed, ..Step::default() });
        }
        let last = self.students.first().map_or(0, |student| student.pending.len() - 1);
        self.add(&measured, |student| &mut student.pending[last].measured);
        if self.span.seconds() >= SPAN {
            self.end_span();
        }
    }

    /// Sorts steps by whether others took the cores meanwhile.
    fn end_span(&mut self) {
        let others = self.span.others();
        for student in &mut self.students {
            let is_loud = others.is_some_and(|others| others > limit(&self.devices[student.device]));
            let steps = if is_loud { &mut student.loud } else { &mut student.quiet };
            let known = student.pending.drain(..).filter(|step| step.off().is_finite());
            steps.extend(known.map(|step| Step { others, ..step }));
            steps.drain(..steps.len().saturating_sub(MOST));
        }
        self.span = Moment::now();
    }

    /// Corrects the cache by what is known so far, and says what that is. May be done several times.
    pub fn teach(&mut self) -> Vec<Lesson> {
        self.end_span();
        let mut lessons = Vec::new();
        let loudest = loudest(&self.plan, &self.planning, &self.devices);
        let shape = &self.planning.workload.batchings[self.plan.batching].shape;
        for student in &mut self.students {
            // How long an embedding alone takes says nothing of how long blocks would.
            if student.assumed.iter().sum::<f64>() < TELLING * self.plan.simulation.step {
                continue;
            }
            let Some(finding) = finding(&student.quiet, &student.loud) else { continue };
            let profile = &self.planning.machine.devices[student.device];
            let basis = Basis { profile, shape, loudest, taught: student.taught };
            let outcome = self.cache.learn(&self.devices[student.device], &basis, &finding);
            if let Outcome::Learnt(rests_on) = outcome {
                student.taught = Some(rests_on);
            }
            let (name, ratio) = (profile.name.clone(), finding.ratio());
            lessons.push(Lesson { name, ratio, others: finding.others, outcome });
        }
        lessons
    }
}

/// The greatest part of the cores that other programs took while something was measured that a plan rests on, if it was
/// enough to disturb its device.
pub fn loudest(plan: &Candidate, planning: &Planning, devices: &[Device]) -> Option<f64> {
    let shape = &planning.workload.batchings[plan.batching].shape;
    let limits = plan.devices.iter().map(|&device| limit(&devices[device]));
    let pairs = (plan.devices.len() > 1).then_some(planning.machine.measured);
    let pairs = pairs.map(|measured| (limits.fold(1.0, f64::min), measured));
    let own = plan.devices.iter().flat_map(|&device| {
        let profile = &planning.machine.devices[device];
        let shape = profile.shape(shape).and_then(|shape| shape.measured);
        [profile.measured, shape].map(|measured| (limit(&devices[device]), measured))
    });
    let marks = own.chain(pairs).filter_map(|(limit, measured)| Some((limit, beside(measured)?)));
    marks.filter(|(limit, others)| others > limit).map(|(_, others)| others).reduce(f64::max)
}

/// What a plan assumes of each rank's step.
fn assumed(plan: &Candidate, machine: &Machine) -> Vec<Seconds> {
    let mut ranks = vec![Seconds::default(); plan.devices.len()];
    for cell in &plan.simulation.cells {
        if let Some(work) = Work::of(cell.action.kind) {
            ranks[cell.rank][work as usize] += cell.end - cell.start;
        }
    }
    for ((seconds, &device), cost) in ranks.iter_mut().zip(&plan.devices).zip(&plan.costs.ranks) {
        let read_back = 1e-6 * machine.devices[device].rates.barrier_us;
        seconds[Work::Ends as usize] = cost.begin + (cost.end - read_back).max(0.0) + cost.update;
    }
    ranks
}

/// What each rank's step took. An action takes from the end of what its device did before, as a probe's does; only where
/// it waited for another device, from its own start.
fn measured(events: &[Event], ranks: usize) -> Vec<Seconds> {
    let mut seconds = vec![Seconds::default(); ranks];
    let mut before = vec![f64::INFINITY; ranks];
    let mut compute: Vec<&Event> = events.iter().filter(|e| e.track == Track::Compute).collect();
    compute.sort_by(|a, b| a.start.total_cmp(&b.start));
    for event in compute.into_iter().filter(|event| event.rank < ranks) {
        let own = &mut seconds[event.rank];
        let before = std::mem::replace(&mut before[event.rank], event.end);
        let work = match event.what {
            What::Action(action) => Work::of(action.kind).map(|work| (action, work)),
            _ => None,
        };
        let Some((action, work)) = work else {
            own[Work::Ends as usize] += event.end - event.start;
            continue;
        };
        let receive =
            Action { kind: if action.kind == Kind::F { Kind::RecvF } else { Kind::RecvB }, ..action };
        let receive = What::Action(receive);
        let arrived = events.iter().find(|e| e.rank == event.rank && e.what == receive).map(|e| e.end);
        let waited = action.kind != Kind::W && arrived.is_some_and(|arrived| arrived > before);
        own[work as usize] += event.end - if waited { event.start } else { before.min(event.start) };
    }
    seconds
}

/// What an adapter's steps say: those in quiet if there are enough, else all. Of many, the longest are left out: accidents.
fn finding(quiet: &VecDeque<Step>, loud: &VecDeque<Step>) -> Option<Finding> {
    let loud = loud.iter().filter(|_| quiet.len() < FEW);
    let mut steps: Vec<Step> = quiet.iter().chain(loud).copied().collect();
    steps.sort_by(|a, b| a.off().total_cmp(&b.off()));
    steps.truncate(steps.len() - steps.len() / PER_ACCIDENT);
    if steps.len() < FEW {
        return None;
    }
    let count = steps.len() as f64;
    let mean = |of: &dyn Fn(&Step) -> f64| steps.iter().map(of).sum::<f64>() / count;
    let off = mean(&Step::off);
    let known: Vec<f64> = steps.iter().filter_map(|step| step.others).collect();
    Some(Finding {
        measured: std::array::from_fn(|work| mean(&|step| step.measured[work])),
        assumed: std::array::from_fn(|work| mean(&|step| step.assumed[work])),
        steps: steps.len() as u64,
        spread: (mean(&|step| (step.off() - off).powi(2)) * count / (count - 1.0)).sqrt() / off,
        others: (!known.is_empty()).then(|| known.iter().sum::<f64>() / known.len() as f64),
    })
}

impl Step {
    /// Measured ÷ assumed; not finite where one of them is not known.
    fn off(&self) -> f64 {
        let (measured, assumed): (f64, f64) = (self.measured.iter().sum(), self.assumed.iter().sum());
        if measured > 0.0 && assumed > 0.0 { measured / assumed } else { f64::INFINITY }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(rank: usize, what: What, start: f64, end: f64) -> Event {
        let is_copy = matches!(what, What::Action(action) if action.kind.is_transfer());
        let track = if is_copy { Track::Copy } else { Track::Compute };
        Event { rank, track, what, start, end, bytes: 0 }
    }

    #[test]
    fn an_action_takes_from_the_end_of_the_one_before_unless_it_waits_for_another_device() {
        let action = |stage, kind| What::Action(Action::new(stage, kind, 0));
        let events = [
            event(0, What::CLEAR, 0.0, 1.0),
            event(0, action(0, Kind::F), 1.5, 3.0),
            // Arrived before its device was free.
            event(0, action(0, Kind::RecvB), 2.0, 2.5),
            event(0, action(0, Kind::B), 3.25, 7.0),
            event(1, What::CLEAR, 0.0, 1.0),
            event(1, action(1, Kind::RecvF), 3.0, 4.0),
            event(1, action(1, Kind::F), 4.5, 6.0),
            event(1, action(1, Kind::W), 6.5, 8.0),
            event(1, What::NORM, 9.0, 9.5),
        ];
        let [first, second] = measured(&events, 2)[..] else { panic!("two ranks") };
        assert_eq!(first, [2.0, 0.0, 0.0, 4.0, 1.0]);
        assert_eq!(second, [1.5, 0.0, 2.0, 0.0, 1.5]);
    }

    fn steps(count: usize, measured: f64, others: Option<f64>) -> VecDeque<Step> {
        let of = |seconds| [seconds, 0.0, 0.0, 2.0 * seconds, 0.0];
        vec![Step { measured: of(measured), assumed: of(1.0), others }; count].into()
    }

    #[test]
    fn ten_quiet_steps_are_enough_else_loud_ones_count_too() {
        let (quiet, loud) = (steps(10, 1.2, Some(0.0)), steps(30, 3.0, Some(0.5)));
        let found = finding(&quiet, &loud).unwrap();
        assert!((found.ratio() - 1.2).abs() < 1e-9 && found.steps == 10 && found.others == Some(0.0));
        let found = finding(&steps(9, 1.2, Some(0.0)), &loud).unwrap();
        assert!(found.ratio() > 2.0 && found.others.unwrap() > 0.3, "{found:?}");
        assert_eq!(finding(&steps(5, 1.2, None), &steps(4, 3.0, None)), None);
    }

    #[test]
    fn the_longest_of_twenty_steps_is_an_accident() {
        let mut quiet = steps(19, 1.0, None);
        quiet.extend(steps(1, 100.0, None));
        let found = finding(&quiet, &VecDeque::new()).unwrap();
        assert!((found.ratio() - 1.0).abs() < 1e-9 && found.spread < 1e-9 && found.others.is_none());
    }
}
