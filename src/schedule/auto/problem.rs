//! The orders among which a schedule is searched, and what each of them costs.

use crate::error::{Error, Result};
use crate::schedule::clock::{Join, NONE, Task};
use crate::schedule::costs::Costs;
use crate::schedule::generate::check_size;
use crate::schedule::times::{COMPUTED, Times, whole_way, whole_work};
use crate::schedule::whole::{self, Shared};
use crate::schedule::{Action, Kind, Placement, Schedule};

/// A kind of computation of a stage, for the next microbatch in turn: `4 stage + kind`. Microbatches are all alike, so
/// no schedule is better than one in which every stage takes them in order.
pub(super) type Letter = u32;

/// The letter of a stage's computation.
pub(super) fn letter(stage: usize, kind: Kind) -> Letter {
    (COMPUTED * stage) as Letter + kind as Letter
}

/// Stage and kind of a letter.
pub(super) fn parts(letter: Letter) -> (usize, Kind) {
    (letter as usize / COMPUTED, Kind::ALL[letter as usize % COMPUTED])
}

/// What each rank does in which order.
#[derive(Clone, PartialEq)]
pub(super) struct Orders {
    /// Which stages do B; the others do I and W.
    pub joined: Vec<bool>,
    /// The letters of each rank.
    pub words: Vec<Vec<Letter>>,
}

/// What is to be scheduled.
pub(super) struct Problem<'a> {
    pub costs: &'a Costs,
    /// The rank of each stage.
    pub owner: &'a [usize],
    pub microbatches: usize,
    pub times: Times,
    /// What ends a step after all words, in an order in which each comes after what it waits for. Its tasks have the ids
    /// after those of the words and of C.
    pub ends: Vec<Task>,
    pub joins: Vec<Vec<Join>>,
    /// The stages of each rank.
    pub stages_of: Vec<Vec<usize>>,
    /// Bytes that each rank has for stashes and gradients.
    pub room: Vec<Option<u64>>,
    /// Seconds in which no order can end a step.
    pub bound: f64,
}

impl<'a> Problem<'a> {
    /// # Errors
    ///
    /// [`Error::Config`] for costs that do not fit the placement, and for ranks whose budget is too small for a single
    /// microbatch.
    pub fn new(costs: &'a Costs, owner: &'a [usize], microbatches: usize) -> Result<Self> {
        check_size(owner.len(), microbatches)?;
        let ranks = costs.ranks.len();
        let placement = Placement::of_stages(owner, microbatches);
        costs.check(&placement, ranks)?;
        let mut stages_of = vec![Vec::new(); ranks];
        for (stage, &rank) in owner.iter().enumerate() {
            let Some(stages) = stages_of.get_mut(rank) else {
                let message =
                    format!("stage {stage} is on rank {rank}, beyond the last, {}", ranks.saturating_sub(1));
                return Err(Error::config("stage ranks", message));
            };
            stages.push(stage);
        }
        if let Some(rank) = stages_of.iter().position(Vec::is_empty) {
            return Err(Error::config("stage ranks", format!("rank {rank} has no stage; leave it out")));
        }
        let mut lacking = Vec::new();
        let mut room = Vec::with_capacity(ranks);
        for (rank, cost) in costs.ranks.iter().enumerate() {
            let least = |&stage: &usize| costs.stages[stage].stash + costs.stages[stage].gradient;
            let least: u64 = stages_of[rank].iter().map(least).sum();
            if let Some(budget) = cost.budget
                && cost.fixed + least > budget
            {
                lacking.push(format!(
                    "rank {rank} lacks {} bytes: its budget is {budget}, it holds {} throughout, and one microbatch takes {least}",
                    cost.fixed + least - budget,
                    cost.fixed
                ));
            }
            room.push(cost.budget.map(|budget| budget.saturating_sub(cost.fixed)));
        }
        if !lacking.is_empty() {
            return Err(Error::config("memory", lacking.join("; ")));
        }
        let shared = Shared::of_ties(&placement, &costs.tied());
        let times = Times::new(costs, &placement, &shared);
        let first = COMPUTED * owner.len() * microbatches + ranks;
        let (ends, joins) = ends(owner.len(), ranks, &shared, first);
        let mut problem =
            Problem { costs, owner, microbatches, times, ends, joins, stages_of, room, bound: 0.0 };
        problem.bound = problem.bound();
        Ok(problem)
    }

    pub fn stages(&self) -> usize {
        self.owner.len()
    }

    /// Seconds of a stage's computation on its rank's queue.
    pub fn seconds(&self, stage: usize, kind: Kind) -> f64 {
        self.times.works[letter(stage, kind) as usize]
    }

    /// Seconds of a letter's computation.
    pub fn seconds_of(&self, letter: Letter) -> f64 {
        self.times.works[letter as usize]
    }

    /// Seconds of a stage's whole backward pass, in one or in two.
    fn backward_seconds(&self, stage: usize) -> f64 {
        let split = self.seconds(stage, Kind::I) + self.seconds(stage, Kind::W);
        split.min(self.seconds(stage, Kind::B))
    }

    /// Each rank waits for its first input, works, and ends; the first microbatch goes through all stages and back; then
    /// all update.
    fn bound(&self) -> f64 {
        let Costs { stages, hops, ranks, .. } = self.costs;
        let delay =
            |stage: usize, hop: f64| if self.owner[stage] == self.owner[stage + 1] { 0.0 } else { hop };
        let mut arrival = 0.0_f64;
        let mut first = vec![f64::INFINITY; ranks.len()];
        for stage in 0..stages.len() {
            let first = &mut first[self.owner[stage]];
            arrival = arrival.max(ranks[self.owner[stage]].begin);
            *first = first.min(arrival);
            arrival += self.seconds(stage, Kind::F);
            if stage + 1 < stages.len() {
                arrival += delay(stage, hops[stage].forward.delay());
            }
        }
        let mut end = 0.0_f64;
        for (rank, stages) in self.stages_of.iter().enumerate() {
            let work = |&stage: &usize| self.seconds(stage, Kind::F) + self.backward_seconds(stage);
            let work: f64 = stages.iter().map(work).sum();
            end = end.max(first[rank] + self.microbatches as f64 * work + ranks[rank].end);
        }
        for stage in (0..stages.len()).rev() {
            let input = self.seconds(stage, Kind::I).min(self.seconds(stage, Kind::B));
            end = end.max(arrival + self.backward_seconds(stage) + ranks[self.owner[stage]].end);
            arrival += input;
            if stage > 0 {
                arrival += delay(stage - 1, hops[stage - 1].backward.delay());
            }
        }
        end + ranks.iter().map(|rank| rank.update).fold(0.0, f64::max)
    }

    /// The orders of a schedule of this placement.
    pub fn orders(&self, schedule: &Schedule) -> Orders {
        let mut joined = vec![false; self.stages()];
        let word = |actions: &Vec<Action>| {
            let computed = actions.iter().filter(|action| action.kind.computes());
            computed.map(|action| letter(action.stage, action.kind)).collect::<Vec<Letter>>()
        };
        let words: Vec<Vec<Letter>> = schedule.ranks.iter().map(word).collect();
        for &letter in words.iter().flatten() {
            let (stage, kind) = parts(letter);
            joined[stage] |= kind == Kind::B;
        }
        Orders { joined, words }
    }

    /// The schedule of these orders.
    pub fn schedule(&self, orders: &Orders, name: &str) -> Schedule {
        let list = |word: &Vec<Letter>| {
            let mut next = vec![0; COMPUTED * self.stages()];
            let action = |&letter: &Letter| {
                let (stage, kind) = parts(letter);
                let microbatch = next[letter as usize];
                next[letter as usize] += 1;
                Action { stage, kind, microbatch }
            };
            word.iter().map(action).collect()
        };
        Schedule {
            name: name.to_string(),
            stages: self.stages(),
            microbatches: self.microbatches,
            ranks: orders.words.iter().map(list).collect(),
        }
    }

    /// Whether every stage does all its microbatches.
    pub fn is_complete(&self, orders: &Orders) -> bool {
        let letters = |stage: usize| if orders.joined[stage] { 2 } else { 3 };
        orders.words.iter().zip(&self.stages_of).all(|(word, stages)| {
            word.len() == self.microbatches * stages.iter().map(|&stage| letters(stage)).sum::<usize>()
        })
    }

    /// Whether a rank could do its word if all inputs were there: I after F, W after I, buffers within its budget.
    pub fn fits(&self, rank: usize, word: &[Letter], counts: &mut Vec<Held>) -> bool {
        counts.clear();
        counts.resize(self.stages(), Held::default());
        for &letter in word {
            let (stage, kind) = parts(letter);
            if !counts[stage].count(kind) {
                return false;
            }
        }
        let bytes = |&stage: &usize| counts[stage].bytes(self.costs, stage);
        self.room[rank].is_none_or(|room| self.stages_of[rank].iter().map(bytes).sum::<u64>() <= room)
    }
}

/// The tasks that follow all words, the first of which has the id `first`, and what they wait for.
fn ends(stages: usize, ranks: usize, shared: &Shared, first: usize) -> (Vec<Task>, Vec<Vec<Join>>) {
    let of = |list: &[(usize, usize)], kind| -> Vec<(usize, Action)> {
        list.iter().map(|&(rank, stage)| (rank, Action::of_stage(stage, kind))).collect()
    };
    let all = |kind| (0..ranks).map(|rank| (rank, Action::of_rank(kind))).collect();
    let actions = [
        of(&shared.senders, Kind::R),
        of(&shared.owners, Kind::A),
        all(Kind::N),
        all(Kind::U),
        of(&shared.senders, Kind::G),
    ]
    .concat();
    let (mut tasks, mut joins, mut needs) = (Vec::new(), Vec::new(), Vec::new());
    for &(rank, action) in &actions {
        let work = whole_work(stages, ranks, shared, rank, action);
        needs.clear();
        whole::needs(shared, ranks, rank, action, &mut needs);
        let others = needs.iter().filter(|need| need.rank != rank);
        let join = others.filter_map(|need| {
            let at = actions.iter().position(|other| *other == (need.rank, need.action))?;
            Some(Join { need: (first + at) as u32, way: whole_way(stages - 1, need.moves) })
        });
        let join: Vec<Join> = join.collect();
        let list = if join.is_empty() { NONE } else { joins.len() as u32 };
        joins.extend((!join.is_empty()).then_some(join));
        tasks.push(Task { rank: rank as u32, work, need: NONE, way: NONE, joins: list });
    }
    (tasks, joins)
}

/// What a stage holds, and the most it ever held: stashes from F to W, gradients from I to W.
#[derive(Clone, Copy, Default)]
pub(super) struct Held {
    pub stashes: u32,
    pub gradients: u32,
    pub most_stashes: u32,
    pub most_gradients: u32,
}

impl Held {
    /// Counts one more computation; false if it cannot come yet.
    pub fn count(&mut self, kind: Kind) -> bool {
        match kind {
            Kind::F => {
                self.stashes += 1;
                self.most_stashes = self.most_stashes.max(self.stashes);
            }
            Kind::I => {
                if self.gradients >= self.stashes {
                    return false;
                }
                self.gradients += 1;
                self.most_gradients = self.most_gradients.max(self.gradients);
            }
            Kind::W => {
                if self.gradients == 0 {
                    return false;
                }
                (self.gradients, self.stashes) = (self.gradients - 1, self.stashes - 1);
            }
            _ => {
                if self.stashes == 0 {
                    return false;
                }
                self.most_gradients = self.most_gradients.max(1);
                self.stashes -= 1;
            }
        }
        true
    }

    /// How many buffers the stage needs.
    pub fn buffers(&self) -> u64 {
        u64::from(self.most_stashes) + u64::from(self.most_gradients)
    }

    /// Bytes of the stage's buffers.
    pub fn bytes(&self, costs: &Costs, stage: usize) -> u64 {
        let cost = &costs.stages[stage];
        u64::from(self.most_stashes) * cost.stash + u64::from(self.most_gradients) * cost.gradient
    }
}
