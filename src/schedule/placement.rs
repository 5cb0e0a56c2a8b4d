//! Which rank does which stage of which microbatch.
//!
//! A stage may be on several ranks, each of which does some of the microbatches: its *replicas*. They are numbered stage by
//! stage, and rank by rank within a stage; where each stage is on one rank, a replica's number is its stage's.

use std::ops::Range;

use super::Schedule;
use super::generate::check_size;
use crate::error::Result;

/// A stage on one of its ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Replica {
    /// The stage.
    pub stage: usize,
    /// The rank.
    pub rank: usize,
}

/// Which rank does what of a schedule: [`Schedule::placement`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    microbatches: usize,
    replicas: Vec<Replica>,
    /// The number of each stage's first replica, and that of all.
    first: Vec<usize>,
    /// By stage and microbatch: the replica. The stage's first where no rank does it.
    of: Vec<u32>,
    /// By boundary and microbatch: the hop. Empty where every stage has one replica.
    hop_of: Vec<u32>,
    hops: Vec<(usize, usize)>,
}

impl Schedule {
    /// Which rank does what. Of a schedule that is not valid: where a stage's microbatch is first named.
    ///
    /// # Errors
    ///
    /// [`Error::Config`](crate::error::Error::Config) for a schedule without stages or microbatches, or with absurdly many.
    pub fn placement(&self) -> Result<Placement> {
        check_size(self.stages, self.microbatches)?;
        let mut rank_of = vec![NOWHERE; self.stages * self.microbatches];
        for (rank, actions) in self.ranks.iter().enumerate() {
            for action in actions.iter().filter(|action| !action.kind.is_whole()) {
                let inside = action.stage < self.stages && action.microbatch < self.microbatches;
                let cell = action.stage * self.microbatches + action.microbatch;
                if inside && rank_of[cell] == NOWHERE {
                    rank_of[cell] = rank as u32;
                }
            }
        }
        Ok(Placement::new(self.stages, self.microbatches, &rank_of))
    }
}

/// No rank.
pub(super) const NOWHERE: u32 = u32::MAX;

impl Placement {
    /// From the rank of each stage and microbatch. A stage that is [`NOWHERE`] has no replica.
    pub(super) fn new(stages: usize, microbatches: usize, rank_of: &[u32]) -> Placement {
        let (mut replicas, mut first, mut of) = (Vec::new(), vec![0], Vec::with_capacity(rank_of.len()));
        for (stage, ranks) in rank_of.chunks_exact(microbatches).enumerate() {
            let start = replicas.len();
            let mut own: Vec<u32> = Vec::new();
            for &rank in ranks.iter().filter(|rank| **rank != NOWHERE) {
                if own.last() != Some(&rank) && !own.contains(&rank) {
                    own.push(rank);
                }
            }
            own.sort_unstable();
            let number = |rank: &u32| own.binary_search(rank).unwrap_or(0);
            of.extend(ranks.iter().map(|rank| (start + number(rank)) as u32));
            replicas.extend(own.iter().map(|&rank| Replica { stage, rank: rank as usize }));
            first.push(replicas.len());
        }
        let mut placement = Placement {
            microbatches,
            replicas,
            first,
            of,
            hop_of: Vec::new(),
            hops: (1..stages).map(|stage| (stage - 1, stage)).collect(),
        };
        if !placement.is_single() {
            placement.find_hops(stages);
        }
        placement
    }

    /// Every stage on one rank for all microbatches.
    pub(super) fn of_stages(owner: &[usize], microbatches: usize) -> Placement {
        let ranks = owner.iter().flat_map(|&rank| std::iter::repeat_n(rank as u32, microbatches));
        Placement::new(owner.len(), microbatches, &ranks.collect::<Vec<_>>())
    }

    fn find_hops(&mut self, stages: usize) {
        let pair = |this: &Self, boundary: usize, microbatch: usize| {
            (this.replica(boundary, microbatch), this.replica(boundary + 1, microbatch))
        };
        self.hops.clear();
        for boundary in 0..stages - 1 {
            let start = self.hops.len();
            let mut own: Vec<_> = (0..self.microbatches).map(|m| pair(self, boundary, m)).collect();
            own.sort_unstable();
            own.dedup();
            let numbers = (0..self.microbatches)
                .map(|m| (start + own.binary_search(&pair(self, boundary, m)).unwrap_or(0)) as u32);
            let numbers: Vec<u32> = numbers.collect();
            self.hop_of.extend(numbers);
            self.hops.extend(own);
        }
    }

    /// Every stage on every rank that has it: stage by stage, rank by rank.
    pub fn replicas(&self) -> &[Replica] {
        &self.replicas
    }

    /// Whether every stage is on one rank.
    pub fn is_single(&self) -> bool {
        self.replicas.len() == self.stages()
    }

    /// The microbatches of each of several pipelines that do the same stages, in the order of their ranks; none where stages
    /// are not all on as many ranks.
    pub fn shares(&self) -> Option<Vec<usize>> {
        let count = self.of_stage(0).len();
        let shares = |stage: usize| -> Vec<usize> {
            self.of_stage(stage).map(|replica| self.microbatches(replica).count()).collect()
        };
        let alike = (0..self.stages()).all(|stage| self.of_stage(stage).len() == count);
        alike.then(|| shares(0))
    }

    /// How many stages there are.
    pub fn stages(&self) -> usize {
        self.first.len() - 1
    }

    /// The numbers of a stage's replicas.
    pub fn of_stage(&self, stage: usize) -> Range<usize> {
        self.first[stage]..self.first[stage + 1]
    }

    /// The ranks that have a stage, ascending.
    pub fn holders(&self, stage: usize) -> impl ExactSizeIterator<Item = usize> + '_ {
        self.replicas[self.of_stage(stage)].iter().map(|replica| replica.rank)
    }

    /// Whether a rank has a stage.
    pub fn holds(&self, rank: usize, stage: usize) -> bool {
        self.holders(stage).any(|holder| holder == rank)
    }

    /// The replica that does a stage's microbatch.
    pub fn replica(&self, stage: usize, microbatch: usize) -> usize {
        self.of[stage * self.microbatches + microbatch] as usize
    }

    /// The rank that does a stage's microbatch.
    pub fn rank(&self, stage: usize, microbatch: usize) -> usize {
        self.replicas[self.replica(stage, microbatch)].rank
    }

    /// The microbatches that a replica does, ascending.
    pub fn microbatches(&self, replica: usize) -> impl Iterator<Item = usize> + '_ {
        let stage = self.replicas[replica].stage;
        (0..self.microbatches).filter(move |&microbatch| self.replica(stage, microbatch) == replica)
    }

    /// Each pair of replicas of neighbouring stages between which microbatches pass: boundary by boundary.
    pub fn hops(&self) -> &[(usize, usize)] {
        &self.hops
    }

    /// Which of [`Placement::hops`] a microbatch takes from a stage to the next.
    pub fn hop(&self, boundary: usize, microbatch: usize) -> usize {
        match self.hop_of.is_empty() {
            true => boundary,
            false => self.hop_of[boundary * self.microbatches + microbatch] as usize,
        }
    }

    /// Whether a microbatch passes from one rank to another between a stage and the next.
    pub fn crosses(&self, boundary: usize, microbatch: usize) -> bool {
        self.rank(boundary, microbatch) != self.rank(boundary + 1, microbatch)
    }

    /// Whether the ends of a hop are on different ranks.
    pub fn is_link(&self, hop: usize) -> bool {
        let (from, to) = self.hops[hop];
        self.replicas[from].rank != self.replicas[to].rank
    }
}
