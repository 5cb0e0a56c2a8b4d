//! The shortest possible step by branch and bound, for small cases: an oracle that shares nothing with the library but
//! the costs.
//!
//! Giffler and Thompson's active schedules (1960), with a table of what was reached before: of two partial schedules that
//! have done the same, the one in which everything is later cannot end sooner.

use std::collections::HashMap;

use polystage::schedule::{Costs, Hop};

/// F, then I and W, or F and B.
const KINDS: usize = 4;
const F: usize = 0;
const I: usize = 1;
const W: usize = 2;
const B: usize = 3;

struct Exact<'a> {
    costs: &'a Costs,
    owner: &'a [usize],
    microbatches: usize,
    /// Seconds on the queue of each stage's F, I, W and B.
    seconds: Vec<[f64; KINDS]>,
    joined: Vec<bool>,
    /// The most microbatches of each stage between F and W, and between I and W.
    stashes: Vec<usize>,
    gradients: Vec<usize>,
    /// At least so many seconds follow after the last I (or B) and the last F of a stage.
    after_backward: Vec<f64>,
    after_forward: Vec<f64>,
    best: f64,
    nodes: usize,
    seen: HashMap<Vec<u8>, Vec<Vec<f64>>>,
}

#[derive(Clone)]
struct State {
    done: Vec<[usize; KINDS]>,
    free: Vec<f64>,
    /// When the input of each stage's microbatches arrives: activations and gradients.
    activations: Vec<Vec<f64>>,
    output_gradients: Vec<Vec<f64>>,
    /// When each direction of each boundary is free: both engines and the link.
    links: Vec<[[f64; 3]; 2]>,
}

/// Seconds of the shortest step, or none if it could not be proved within so many nodes.
pub fn shortest(costs: &Costs, owner: &[usize], microbatches: usize, nodes: usize) -> Option<f64> {
    assert!(costs.exchanges.is_empty() && costs.cores == 0.0 && costs.slowdown.is_empty());
    let stages = owner.len();
    let update = costs.ranks.iter().map(|rank| rank.update).fold(0.0, f64::max);
    let mut best = f64::INFINITY;
    let mut left = nodes;
    for form in 0..1_u32 << stages {
        let joined: Vec<bool> = (0..stages).map(|stage| form >> stage & 1 == 1).collect();
        for (stashes, gradients) in limits(costs, owner, &joined, microbatches) {
            let mut exact = Exact {
                costs,
                owner,
                microbatches,
                seconds: seconds(costs, owner),
                joined: joined.clone(),
                stashes,
                gradients,
                after_backward: Vec::new(),
                after_forward: Vec::new(),
                best,
                nodes: left,
                seen: HashMap::new(),
            };
            exact.set_tails();
            let state = State {
                done: vec![[0; KINDS]; stages],
                free: costs.ranks.iter().map(|rank| rank.begin).collect(),
                activations: vec![vec![f64::INFINITY; microbatches]; stages],
                output_gradients: vec![vec![f64::INFINITY; microbatches]; stages],
                links: vec![[[0.0; 3]; 2]; stages],
            };
            if !exact.search(state) {
                return None;
            }
            (best, left) = (exact.best, exact.nodes);
        }
    }
    Some(best + update)
}

/// The largest numbers of buffers that fit every rank's budget.
fn limits(
    costs: &Costs,
    owner: &[usize],
    joined: &[bool],
    microbatches: usize,
) -> Vec<(Vec<usize>, Vec<usize>)> {
    let stages = owner.len();
    let mut all = vec![(vec![], vec![])];
    for &joined in joined {
        let mut longer = Vec::new();
        for (stashes, gradients) in &all {
            for stash in 1..=microbatches {
                for gradient in 1..=if joined { 1 } else { microbatches } {
                    longer.push(([&stashes[..], &[stash]].concat(), [&gradients[..], &[gradient]].concat()));
                }
            }
        }
        all = longer;
    }
    let fits = |(stashes, gradients): &(Vec<usize>, Vec<usize>)| {
        costs.ranks.iter().enumerate().all(|(rank, cost)| {
            let bytes = |stage: usize| {
                stashes[stage] as u64 * costs.stages[stage].stash
                    + gradients[stage] as u64 * costs.stages[stage].gradient
            };
            let bytes: u64 = (0..stages).filter(|&stage| owner[stage] == rank).map(bytes).sum();
            cost.budget.is_none_or(|budget| cost.fixed + bytes <= budget)
        })
    };
    all.retain(fits);
    let at_most = |a: &(Vec<usize>, Vec<usize>), b: &(Vec<usize>, Vec<usize>)| {
        a != b && a.0.iter().zip(&b.0).all(|(a, b)| a <= b) && a.1.iter().zip(&b.1).all(|(a, b)| a <= b)
    };
    let kept: Vec<_> = all.iter().filter(|a| !all.iter().any(|b| at_most(a, b))).cloned().collect();
    kept
}

fn seconds(costs: &Costs, owner: &[usize]) -> Vec<[f64; KINDS]> {
    let mut seconds: Vec<[f64; KINDS]> =
        costs.stages.iter().map(|cost| [cost.forward, cost.input, cost.weight, cost.backward]).collect();
    for (stage, hops) in costs.hops.iter().enumerate() {
        let (before, after) = (owner[stage], owner[stage + 1]);
        let queue =
            |rank: usize, time| if costs.ranks[rank].copy_engine && before != after { 0.0 } else { time };
        seconds[stage][F] += queue(before, hops.forward.out);
        seconds[stage + 1][F] += queue(after, hops.forward.into);
        for kind in [I, B] {
            seconds[stage + 1][kind] += queue(after, hops.backward.out);
            seconds[stage][kind] += queue(before, hops.backward.into);
        }
    }
    seconds
}

impl Exact<'_> {
    fn backward(&self, stage: usize) -> usize {
        if self.joined[stage] { B } else { I }
    }

    fn hop(&self, from: usize, to: usize) -> &Hop {
        if from < to { &self.costs.hops[from].forward } else { &self.costs.hops[to].backward }
    }

    /// Seconds from the end of the sending action to the arrival, if nothing else is on the way.
    fn delay(&self, from: usize, to: usize) -> f64 {
        let (sender, receiver) = (self.owner[from], self.owner[to]);
        if sender == receiver {
            return 0.0;
        }
        let hop = self.hop(from, to);
        let engine = |rank: usize, time| if self.costs.ranks[rank].copy_engine { time } else { 0.0 };
        engine(sender, hop.out) + hop.latency + hop.copy + engine(receiver, hop.into)
    }

    fn set_tails(&mut self) {
        let stages = self.owner.len();
        let own = |stage: usize| {
            let weight = if self.joined[stage] { 0.0 } else { self.seconds[stage][W] };
            weight + self.costs.ranks[self.owner[stage]].end
        };
        let mut backward = vec![0.0; stages];
        for stage in 0..stages {
            let before = if stage == 0 {
                0.0
            } else {
                self.delay(stage, stage - 1)
                    + self.seconds[stage - 1][self.backward(stage - 1)]
                    + backward[stage - 1]
            };
            backward[stage] = f64::max(own(stage), before);
        }
        let mut forward = vec![0.0; stages];
        for stage in (0..stages).rev() {
            let turn = self.seconds[stage][self.backward(stage)] + backward[stage];
            forward[stage] = if stage + 1 == stages {
                turn
            } else {
                self.delay(stage, stage + 1) + self.seconds[stage + 1][F] + forward[stage + 1]
            };
        }
        (self.after_backward, self.after_forward) = (backward, forward);
    }

    /// False when the nodes are used up.
    fn search(&mut self, state: State) -> bool {
        if self.nodes == 0 {
            return false;
        }
        self.nodes -= 1;
        if self.bound(&state) >= self.best - 1e-9 {
            return true;
        }
        let m = self.microbatches;
        if state.done.iter().enumerate().all(|(s, done)| done[if self.joined[s] { B } else { W }] == m) {
            let end = |rank: usize| state.free[rank] + self.costs.ranks[rank].end;
            self.best = (0..state.free.len()).map(end).fold(0.0, f64::max);
            return true;
        }
        if self.is_dominated(&state) {
            return true;
        }
        let mut ready: Vec<(usize, usize, f64, f64)> = Vec::new();
        for stage in 0..self.owner.len() {
            let free = state.free[self.owner[stage]];
            let mut offer = |kind: usize, input: f64| {
                if input.is_finite() {
                    let start = free.max(input);
                    ready.push((stage, kind, start, start + self.seconds[stage][kind]));
                }
            };
            let [f, i, w, b] = state.done[stage];
            let (back, freed) = if self.joined[stage] { (b, b) } else { (i, w) };
            if f < m && f - freed < self.stashes[stage] {
                offer(F, if stage == 0 { 0.0 } else { state.activations[stage][f] });
            }
            if back < f && (self.joined[stage] || i - w < self.gradients[stage]) {
                let last = stage + 1 == self.owner.len();
                let input = if last { 0.0 } else { state.output_gradients[stage][back] };
                offer(self.backward(stage), input);
            }
            if !self.joined[stage] && w < i {
                offer(W, 0.0);
            }
        }
        let Some(first) = ready.iter().copied().min_by(|a, b| a.3.total_cmp(&b.3)) else { return true };
        let rank = self.owner[first.0];
        let mut branches: Vec<(f64, State)> = Vec::new();
        for (stage, kind, start, end) in ready {
            if self.owner[stage] == rank && start < first.3 {
                let mut next = state.clone();
                self.apply(&mut next, stage, kind, end);
                branches.push((self.bound(&next), next));
            }
        }
        branches.sort_by(|a, b| a.0.total_cmp(&b.0));
        branches.into_iter().all(|(_, next)| self.search(next))
    }

    fn apply(&self, state: &mut State, stage: usize, kind: usize, end: f64) {
        let microbatch = state.done[stage][kind];
        state.done[stage][kind] += 1;
        state.free[self.owner[stage]] = end;
        let (to, boundary) = match kind {
            F if stage + 1 < self.owner.len() => (stage + 1, stage),
            I | B if stage > 0 => (stage - 1, stage - 1),
            _ => return,
        };
        let mut time = end;
        let (sender, receiver) = (self.owner[stage], self.owner[to]);
        if sender != receiver {
            let hop = *self.hop(stage, to);
            let engine = |rank: usize, time| if self.costs.ranks[rank].copy_engine { time } else { 0.0 };
            let free = &mut state.links[boundary][usize::from(to < stage)];
            let parts = [engine(sender, hop.out), hop.copy, engine(receiver, hop.into)];
            for (part, (free, seconds)) in free.iter_mut().zip(parts).enumerate() {
                time += if part == 1 { hop.latency } else { 0.0 };
                if seconds > 0.0 {
                    time = time.max(*free) + seconds;
                    *free = time;
                }
            }
        }
        let inputs = if to > stage { &mut state.activations } else { &mut state.output_gradients };
        inputs[to][microbatch] = time;
    }

    fn bound(&self, state: &State) -> f64 {
        let m = self.microbatches;
        let mut bound = 0.0_f64;
        let mut work = state.free.clone();
        for stage in 0..self.owner.len() {
            let free = state.free[self.owner[stage]];
            let left = |kind: usize| (m - state.done[stage][kind]) as f64 * self.seconds[stage][kind];
            let backward = left(self.backward(stage));
            work[self.owner[stage]] += left(F) + backward + if self.joined[stage] { 0.0 } else { left(W) };
            if state.done[stage][F] < m {
                bound = bound.max(free + left(F) + self.after_forward[stage]);
            }
            if state.done[stage][self.backward(stage)] < m {
                bound = bound.max(free + left(F) + backward + self.after_backward[stage]);
            }
        }
        for (rank, work) in work.iter().enumerate() {
            bound = bound.max(work + self.costs.ranks[rank].end);
        }
        bound
    }

    fn is_dominated(&mut self, state: &State) -> bool {
        let mut key = Vec::new();
        let mut times = state.free.clone();
        for (stage, done) in state.done.iter().enumerate() {
            key.extend(done.iter().map(|&count| count as u8));
            let back = done[self.backward(stage)];
            // What has arrived before the rank is free makes no difference.
            let free = state.free[self.owner[stage]];
            let open = |times: &[f64], from: usize| {
                let known = times[from..].iter().take_while(|time| time.is_finite());
                known.map(|time| time.max(free)).collect::<Vec<f64>>()
            };
            times.extend(open(&state.activations[stage], done[F].min(self.microbatches)));
            times.extend(open(&state.output_gradients[stage], back));
            times.extend(state.links[stage].iter().flatten());
        }
        let known = self.seen.entry(key).or_default();
        let later = |a: &Vec<f64>, b: &Vec<f64>| a.iter().zip(b).all(|(a, b)| *a <= b + 1e-12);
        if known.iter().any(|known| later(known, &times)) {
            return true;
        }
        known.retain(|known| !later(&times, known));
        known.push(times);
        false
    }
}
