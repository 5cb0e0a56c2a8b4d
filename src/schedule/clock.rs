//! When every task of a step starts and ends: the arithmetic of the simulator.
//!
//! A task occupies its rank's queue for some seconds, may wait for the result of one task of another rank, and may send
//! its own result along a way; the few that wait for several have a list of them. Ranks do their tasks in order. Where ranks do not slow each other down, one pass over
//! the tasks in an order in which each comes after what it waits for is enough; else time advances from event to event.

use super::costs::{Costs, Hop};

/// No task, or no way.
pub(super) const NONE: u32 = u32::MAX;

/// One piece of work of a rank.
#[derive(Clone, Copy)]
pub(super) struct Task {
    pub rank: u32,
    /// Which of the durations.
    pub work: u32,
    /// The task whose result it waits for, or [`NONE`].
    pub need: u32,
    /// The way its result takes to another rank, or [`NONE`] if it stays.
    pub way: u32,
    /// Which of the lists of what it waits for beside that, or [`NONE`].
    pub joins: u32,
}

/// One of several tasks of other ranks that a task waits for.
#[derive(Clone, Copy)]
pub(super) struct Join {
    pub need: u32,
    /// The way of what it sends to the task that waits, or [`NONE`] if its end is enough.
    pub way: u32,
}

/// How often a tensor on its way between two ranks goes into the host's memory or out of it, in each part of the way: the
/// sender writes it there, the host reads it and writes it again, the receiver reads it.
const PASSES: [f64; 3] = [1.0, 2.0, 1.0];

/// The way from one rank to another. The parts follow one another, and each carries one tensor at a time, in the order
/// of sending; nothing limits `latency`. All ways share the host's memory, which serves them in the order of their times.
#[derive(Clone, Copy)]
pub(super) struct Way {
    /// Seconds on the sender's copy engine.
    pub out: f64,
    pub latency: f64,
    pub copy: f64,
    /// Seconds on the receiver's copy engine.
    pub into: f64,
    /// Seconds for which it would have the host's memory to itself: never more than its parts take.
    pub memory: f64,
    /// Which of the links: one for each ordered pair of ranks.
    pub link: usize,
}

/// When the parts of a link are free again.
#[derive(Clone, Copy, Default)]
pub(super) struct Link {
    out: f64,
    copy: f64,
    into: f64,
}

impl Way {
    pub fn new(hop: &Hop, costs: &Costs, from: usize, to: usize) -> Way {
        let beside = |rank: usize, seconds| if costs.ranks[rank].copy_engine { seconds } else { 0.0 };
        let (out, into) = (beside(from, hop.out), beside(to, hop.into));
        let parts = PASSES.iter().zip([out, hop.copy, into]);
        let memory = match costs.host_gb_s > 0.0 {
            true => parts
                .map(|(passes, part)| part.min(passes * hop.bytes as f64 / (costs.host_gb_s * 1e9)))
                .sum(),
            false => 0.0,
        };
        let link = from * costs.ranks.len() + to;
        Way { out, latency: hop.latency, copy: hop.copy, into, memory, link }
    }

    /// The most of the host's memory that it takes on average while one tensor follows another.
    pub fn demand(&self) -> f64 {
        let narrowest = self.out.max(self.copy).max(self.into);
        if narrowest > 0.0 { self.memory / narrowest } else { 0.0 }
    }

    /// When a tensor arrives that leaves at `time`; `memory` is when the host's has served all that left before.
    fn carry(&self, time: f64, links: &mut [Link], memory: &mut f64) -> f64 {
        let link = &mut links[self.link];
        let (left, mut time) = (time, time);
        for (seconds, delay, free) in [
            (self.out, 0.0, &mut link.out),
            (self.copy, self.latency, &mut link.copy),
            (self.into, 0.0, &mut link.into),
        ] {
            time += delay;
            if seconds > 0.0 {
                time = time.max(*free) + seconds;
                *free = time;
            }
        }
        if self.memory > 0.0 {
            *memory = memory.max(left) + self.memory;
            time = time.max(*memory);
        }
        time
    }
}

/// Tasks with their durations, and what is known about their times.
pub(super) struct Clock<'a> {
    pub costs: &'a Costs,
    pub works: &'a [f64],
    pub ways: &'a [Way],
    pub joins: &'a [Vec<Join>],
    pub links: Vec<Link>,
    /// When the host's memory has served all copies so far.
    pub memory: f64,
    /// How the ranks' speeds wander; none for mean speeds.
    pub course: Option<Course>,
    /// When each rank has ended the tasks done so far.
    pub free: Vec<f64>,
}

/// One of the courses that the ranks' [`Jitter`](super::Jitter) may take.
pub(super) struct Course {
    pub number: u64,
    /// Seconds of work that each rank has done, at its mean speed.
    pub worked: Vec<f64>,
}

/// When a task starts and ends, and when its result is where it is needed.
#[derive(Clone, Copy)]
pub(super) struct Span {
    pub start: f64,
    pub end: f64,
    pub ready: f64,
}

impl Span {
    /// Of a task that has not ended.
    pub const UNKNOWN: Span = Span { start: f64::INFINITY, end: f64::INFINITY, ready: f64::INFINITY };
}

impl Clock<'_> {
    /// Back to time 0.
    pub fn restart(&mut self) {
        self.links.fill(Link::default());
        self.memory = 0.0;
        self.course.iter_mut().for_each(|course| course.worked.fill(0.0));
        self.free.fill(0.0);
    }

    /// When the last rank has ended the tasks done so far.
    pub fn latest(&self) -> f64 {
        self.free.iter().copied().fold(0.0, f64::max)
    }

    /// Seconds of a rank's next task, if nothing else is busy.
    fn work(&mut self, task: &Task) -> f64 {
        let mean = self.works[task.work as usize];
        let Some(course) = &mut self.course else { return mean };
        let worked = &mut course.worked[task.rank as usize];
        let factor = self.costs.ranks[task.rank as usize].jitter.factor(course.number, task.rank, *worked);
        *worked += mean;
        mean * factor
    }

    /// When all that a task waits for is there; infinity if some of it has not been done. What it waits for along a way
    /// leaves when the last of it has been done, so it must be asked only once then.
    fn input(&mut self, task: &Task, spans: &[Span]) -> f64 {
        let mut input = if task.need == NONE { 0.0 } else { spans[task.need as usize].ready };
        if task.joins != NONE {
            let all = self.joins;
            let joins = &all[task.joins as usize];
            if joins.iter().any(|join| spans[join.need as usize].end == f64::INFINITY) {
                return f64::INFINITY;
            }
            for join in joins {
                let end = spans[join.need as usize].end;
                let ready = if join.way == NONE {
                    end
                } else {
                    self.ways[join.way as usize].carry(end, &mut self.links, &mut self.memory)
                };
                input = input.max(ready);
            }
        }
        input
    }

    /// Does one task; all that it waits for has been done.
    pub fn advance(&mut self, task: &Task, spans: &mut [Span], id: usize) {
        let input = self.input(task, spans);
        let start = self.free[task.rank as usize].max(input);
        let work = self.work(task);
        let end = start + work;
        self.free[task.rank as usize] = end;
        let ready = if task.way == NONE {
            end
        } else {
            self.ways[task.way as usize].carry(end, &mut self.links, &mut self.memory)
        };
        spans[id] = Span { start, end, ready };
    }

    /// Does all tasks, of which `lists` holds the ids for each rank, while busy ranks slow each other down: processor
    /// sharing, after [`Costs::cores`] and [`Costs::slowdown`].
    pub fn share(&mut self, tasks: &[Task], lists: &[Vec<u32>], spans: &mut [Span]) {
        let ranks = lists.len();
        let mut next = vec![0; ranks];
        let mut running = vec![None::<Running>; ranks];
        let mut rates = vec![1.0; ranks];
        // When all is there that each rank's next task waits for, once that is known.
        let mut inputs = vec![None::<f64>; ranks];
        let mut time = 0.0_f64;
        loop {
            let mut changed = false;
            let mut event = f64::INFINITY;
            let mut rank = 0;
            while rank < ranks {
                if let Some(at) = running[rank]
                    && at.finish <= time
                {
                    running[rank] = None;
                    changed = true;
                    let task = &tasks[at.id];
                    self.free[rank] = at.finish;
                    let ready = if task.way == NONE {
                        at.finish
                    } else {
                        self.ways[task.way as usize].carry(at.finish, &mut self.links, &mut self.memory)
                    };
                    spans[at.id] = Span { start: at.start, end: at.finish, ready };
                    // A rank before this one may wait for the result.
                    (rank, event) = (0, f64::INFINITY);
                    continue;
                }
                if running[rank].is_none()
                    && let Some(&id) = lists[rank].get(next[rank])
                {
                    let task = &tasks[id as usize];
                    if inputs[rank].is_none() {
                        inputs[rank] = Some(self.input(task, spans)).filter(|input| input.is_finite());
                    }
                    let start = self.free[rank].max(inputs[rank].unwrap_or(f64::INFINITY));
                    if start <= time {
                        inputs[rank] = None;
                        let work = self.work(task);
                        running[rank] = Some(Running { id: id as usize, start: time, finish: time + work });
                        rates[rank] = 1.0;
                        next[rank] += 1;
                        changed = true;
                        continue;
                    }
                    event = event.min(start);
                }
                rank += 1;
            }
            if changed {
                self.set_rates(&mut running, &mut rates, time);
            }
            for at in running.iter().flatten() {
                event = event.min(at.finish);
            }
            if event == f64::INFINITY {
                return;
            }
            time = event;
        }
    }

    /// The rates of a new set of busy ranks, and when what they do will be finished at these rates.
    fn set_rates(&self, running: &mut [Option<Running>], rates: &mut [f64], time: f64) {
        let cores = &self.costs.cores;
        let busy = |running: &[Option<Running>], rank: usize| running[rank].is_some();
        let wanted: f64 =
            (0..rates.len()).filter(|&r| busy(running, r)).map(|r| self.costs.ranks[r].cores).sum();
        let share = if *cores > 0.0 && wanted > *cores { cores / wanted } else { 1.0 };
        for rank in 0..rates.len() {
            let mut rate = share;
            // Where cores are too few for all, the others are at work in only a part of the moments in which this rank is.
            let own = self.costs.ranks[rank].cores;
            let beside = if share < 1.0 { ((cores - own) / (wanted - own)).clamp(0.0, 1.0) } else { 1.0 };
            if let Some(slowdown) = self.costs.slowdown.get(rank) {
                for (other, factor) in slowdown.iter().enumerate() {
                    if other != rank && busy(running, other) {
                        rate /= if beside < 1.0 { factor.powf(beside) } else { *factor };
                    }
                }
            }
            if let Some(at) = &mut running[rank]
                && rate != rates[rank]
            {
                at.finish = time + (at.finish - time) * rates[rank] / rate;
                rates[rank] = rate;
            }
        }
    }
}

/// The task a rank is at, and when it ends if nothing changes.
#[derive(Clone, Copy)]
struct Running {
    id: usize,
    start: f64,
    finish: f64,
}
