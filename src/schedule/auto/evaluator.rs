//! What orders take, with the arithmetic of the simulator.

use super::problem::{Letter, Orders, Problem, letter};
use crate::schedule::clock::{Clock, NONE, Span, Task};
use crate::schedule::times::{COMPUTED, action_work, backward_way, forward_way, whole_work};
use crate::schedule::whole::Shared;
use crate::schedule::{Action, Kind};

/// Times orders of one problem again and again.
pub(super) struct Evaluator<'p> {
    pub problem: &'p Problem<'p>,
    /// Tasks of every stage, kind and microbatch (`letter x microbatches + microbatch`), of which a stage uses those of
    /// its form; then C of each rank, and what ends the step.
    pub tasks: Vec<Task>,
    pub clock: Clock<'p>,
    pub spans: Vec<Span>,
    /// How often each letter has come.
    pub next: Vec<u32>,
    joined: Vec<bool>,
    lists: Vec<Vec<u32>>,
}

/// What orders take.
#[derive(Clone, Copy)]
pub(super) struct Score {
    /// Seconds of the step.
    pub step: f64,
    /// Sum of the times at which the ranks end.
    pub ends: f64,
}

impl<'p> Evaluator<'p> {
    pub fn new(problem: &'p Problem<'p>) -> Self {
        let (stages, ranks) = (problem.stages(), problem.costs.ranks.len());
        let total = COMPUTED * stages * problem.microbatches + ranks + problem.ends.len();
        let mut evaluator = Evaluator {
            problem,
            tasks: Vec::with_capacity(total),
            clock: problem.times.clock(problem.costs, &problem.joins),
            spans: vec![Span::UNKNOWN; total],
            next: vec![0; COMPUTED * stages],
            joined: Vec::new(),
            lists: vec![Vec::new(); ranks],
        };
        evaluator.set_forms(&vec![false; stages]);
        evaluator
    }

    /// The task of a letter's microbatch.
    pub fn id(&self, letter: Letter, microbatch: u32) -> u32 {
        letter * self.problem.microbatches as u32 + microbatch
    }

    fn begin(&self) -> usize {
        COMPUTED * self.problem.stages() * self.problem.microbatches
    }

    /// Prepares for orders in which these stages are joined.
    pub fn set_forms(&mut self, joined: &[bool]) {
        if self.joined == joined {
            return;
        }
        self.joined = joined.to_vec();
        let problem = self.problem;
        let (stages, last) = (problem.stages(), problem.stages() - 1);
        self.tasks.clear();
        for stage in 0..stages {
            let rank = problem.owner[stage];
            let crosses = |hop: usize| problem.owner[hop] != problem.owner[hop + 1];
            for &kind in &Kind::ALL[..COMPUTED] {
                let (from, way) = match kind {
                    Kind::F => {
                        let from = (stage > 0).then(|| letter(stage - 1, Kind::F));
                        (from, (stage < last && crosses(stage)).then(|| forward_way(stage)))
                    }
                    Kind::W => (None, None),
                    _ => {
                        let form = |stage: usize| if joined[stage] { Kind::B } else { Kind::I };
                        let from = (stage < last).then(|| letter(stage + 1, form(stage + 1)));
                        (from, (stage > 0 && crosses(stage - 1)).then(|| backward_way(stage - 1)))
                    }
                };
                for microbatch in 0..problem.microbatches {
                    self.tasks.push(Task {
                        rank: rank as u32,
                        work: action_work(stages, stage, kind),
                        need: from.map_or(NONE, |from| self.id(from, microbatch as u32)),
                        way: way.unwrap_or(NONE),
                        joins: NONE,
                    });
                }
            }
        }
        let ranks = problem.costs.ranks.len();
        for rank in 0..ranks {
            let work = whole_work(stages, ranks, &Shared::default(), rank, Action::of_rank(Kind::C));
            self.tasks.push(Task { rank: rank as u32, work, need: NONE, way: NONE, joins: NONE });
        }
        self.tasks.extend_from_slice(&problem.ends);
    }

    /// Back to the start of the step, when every rank has begun.
    pub fn reset(&mut self) {
        self.spans.fill(Span::UNKNOWN);
        self.next.fill(0);
        self.clock.restart();
        let begin = self.begin();
        for id in begin..begin + self.problem.costs.ranks.len() {
            self.clock.advance(&self.tasks[id], &mut self.spans, id);
        }
    }

    /// Does the next microbatch of a letter, if its input is known.
    pub fn advance(&mut self, letter: Letter) -> bool {
        let id = self.id(letter, self.next[letter as usize]) as usize;
        let task = &self.tasks[id];
        if task.need != NONE && self.spans[task.need as usize].ready == f64::INFINITY {
            return false;
        }
        self.clock.advance(task, &mut self.spans, id);
        self.next[letter as usize] += 1;
        true
    }

    /// Times orders of which each word fits; none if ranks wait for each other for ever.
    pub fn evaluate(&mut self, orders: &Orders) -> Option<Score> {
        self.set_forms(&orders.joined);
        if self.problem.times.is_shared {
            return self.evaluate_shared(orders);
        }
        self.reset();
        let mut at = vec![0; orders.words.len()];
        let mut progress = true;
        while progress {
            progress = false;
            for (rank, word) in orders.words.iter().enumerate() {
                while at[rank] < word.len() && self.advance(word[at[rank]]) {
                    at[rank] += 1;
                    progress = true;
                }
            }
        }
        if at.iter().zip(&orders.words).any(|(&at, word)| at < word.len()) {
            return None;
        }
        let ends = self.clock.free.iter().sum();
        for id in self.tasks.len() - self.problem.ends.len()..self.tasks.len() {
            self.clock.advance(&self.tasks[id], &mut self.spans, id);
        }
        Some(Score { step: self.clock.latest(), ends })
    }

    fn evaluate_shared(&mut self, orders: &Orders) -> Option<Score> {
        self.spans.fill(Span::UNKNOWN);
        self.next.fill(0);
        self.clock.restart();
        let begin = self.begin();
        for (rank, word) in orders.words.iter().enumerate() {
            let mut list = std::mem::take(&mut self.lists[rank]);
            list.clear();
            list.push((begin + rank) as u32);
            for &letter in word {
                list.push(self.id(letter, self.next[letter as usize]));
                self.next[letter as usize] += 1;
            }
            self.lists[rank] = list;
        }
        let last: Vec<usize> = self.lists.iter().map(|list| list[list.len() - 1] as usize).collect();
        for id in self.tasks.len() - self.problem.ends.len()..self.tasks.len() {
            self.lists[self.tasks[id].rank as usize].push(id as u32);
        }
        self.clock.share(&self.tasks, &self.lists, &mut self.spans);
        let ends: f64 = last.iter().map(|&id| self.spans[id].end).sum();
        ends.is_finite().then_some(Score { step: self.clock.latest(), ends })
    }
}
