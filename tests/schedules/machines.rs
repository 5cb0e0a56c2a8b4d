//! Random machines: costs of unequal devices and links.

use polystage::schedule::{Costs, Hop, Hops, RankCost, StageCost};

/// SplitMix64 (Steele et al. 2014): the same machines on every run.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    pub fn between(&mut self, from: f64, to: f64) -> f64 {
        from + (to - from) * (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    pub fn flip(&mut self) -> bool {
        self.next() & 1 == 1
    }
}

/// Devices that differ by up to a factor of four, layers by two, links from free to one forward long, with or without
/// copy engines; nothing limits memory.
pub fn machine(random: &mut Random, stage_ranks: &[usize]) -> Costs {
    let ranks = stage_ranks.iter().max().unwrap() + 1;
    let speeds: Vec<f64> = (0..ranks).map(|_| random.between(0.5, 2.0)).collect();
    let stages = stage_ranks.iter().map(|&rank| {
        let size = random.between(0.7, 1.4) / speeds[rank];
        let input = size * random.between(0.7, 1.6);
        let weight = size * random.between(0.5, 1.3);
        StageCost {
            forward: size,
            input,
            weight,
            // I and W share the first part of the backward pass in some stages.
            backward: (input + weight) * if random.flip() { 1.0 } else { random.between(0.8, 1.0) },
            stash: 100 + random.below(100) as u64,
            gradient: 20 + random.below(80) as u64,
        }
    });
    let stages = stages.collect();
    let slow = if random.flip() { 0.0 } else { random.between(0.0, 0.4) };
    let mut hop = || Hop {
        out: slow * random.between(0.0, 0.3),
        latency: slow * random.between(0.0, 1.0),
        copy: slow * random.between(0.0, 1.0),
        into: slow * random.between(0.0, 0.3),
        bytes: 1000,
    };
    let hops = stage_ranks.windows(2).map(|pair| {
        if pair[0] == pair[1] { Hops::default() } else { Hops { forward: hop(), backward: hop() } }
    });
    let hops = hops.collect();
    let ranks = (0..ranks).map(|_| RankCost {
        begin: random.between(0.0, 0.1),
        end: random.between(0.0, 0.2),
        update: random.between(0.0, 0.5),
        copy_engine: random.flip(),
        fixed: 1000 + random.below(1000) as u64,
        ..RankCost::default()
    });
    let ranks = ranks.collect();
    Costs { stages, hops, ranks, ..Costs::default() }
}
