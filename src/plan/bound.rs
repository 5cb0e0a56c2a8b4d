//! What no schedule of a form can beat: a bound on a step in time proportional to the number of stages.

use super::costs::Prices;
use super::form::Layout;
use super::space::Pool;
use crate::schedule::{Costs, RankCost};

/// Seconds that a step with these costs takes at least in a schedule of this layout. Three things bound it, each from the moment a stage can have its first input to the moment
/// at which what it does last has reached the first stage:
///
/// - the work of a rank, which does one thing at a time;
/// - the way of a microbatch down to the loss and back: before the first gradient is back, a stage has at most as many
///   forwards to do as it may keep;
/// - the same way, once for every batch of microbatches that a stage may keep.
///
/// Devices that share host cores also have no more than these.
pub(super) fn lower_bound(layout: &Layout, microbatches: usize, costs: &Costs) -> f64 {
    let Layout { own, ahead, split, .. } = layout;
    if !layout.placement.is_single() {
        return work_bound(layout, costs);
    }
    let replicas = layout.placement.replicas();
    let rank_of = |stage: usize| replicas[stage].rank;
    let stages = replicas.len();
    let m = microbatches as f64;
    // Seconds of F, of what the stage before waits for, and of the rest, on the queue of the stage's rank.
    let mut work = Vec::with_capacity(stages);
    for (s, cost) in costs.stages.iter().enumerate() {
        let engine = costs.ranks[rank_of(s)].copy_engine;
        let (mut forward, mut back) = (cost.forward, if split[s] { cost.input } else { cost.backward });
        for (hop, is_before) in [(s.checked_sub(1), true), (Some(s), false)] {
            let Some(hops) = hop.and_then(|hop| costs.hops.get(hop)) else { continue };
            let crosses = hop.is_some_and(|hop| rank_of(hop) != rank_of(hop + 1));
            if engine && crosses {
                continue;
            }
            forward += if is_before { hops.forward.into } else { hops.forward.out };
            back += if is_before { hops.backward.out } else { hops.backward.into };
        }
        work.push((forward, back, if split[s] { cost.weight } else { 0.0 }));
    }
    // Seconds on the way between stages s and s + 1, both directions.
    let delay = |s: usize| {
        let (before, after) = (rank_of(s), rank_of(s + 1));
        if before == after {
            return (0.0, 0.0);
        }
        let beside = |rank: usize, seconds: f64| if costs.ranks[rank].copy_engine { seconds } else { 0.0 };
        let hops = &costs.hops[s];
        let onwards =
            hops.forward.delay() + beside(before, hops.forward.out) + beside(after, hops.forward.into);
        let back =
            hops.backward.delay() + beside(after, hops.backward.out) + beside(before, hops.backward.into);
        (onwards, back)
    };
    // From the start of a stage's F to the start of its I or B for the same microbatch.
    let mut round = vec![0.0; stages];
    for s in (0..stages).rev() {
        round[s] = work[s].0;
        if s + 1 < stages {
            let (onwards, back) = delay(s);
            round[s] += onwards + round[s + 1] + work[s + 1].1 + back;
        }
    }
    let mut end = 0.0_f64;
    // When a stage's first input can be there, and from the end of the stage's last I or B to the end of the step.
    let (mut fill, mut tail) = (0.0_f64, 0.0_f64);
    for s in 0..stages {
        let rank = rank_of(s);
        let cost = &costs.ranks[rank];
        let (forward, back, rest) = work[s];
        fill = fill.max(cost.begin);
        tail = tail.max(rest + cost.end);
        let k = ahead[s];
        let turns = ((microbatches - 1) / k) as f64;
        let there_and_back = round[s] + (microbatches - k) as f64 * forward + m * back;
        let by_turns = (turns + 1.0) * (round[s] + back) + turns * rest;
        end = end.max(fill + there_and_back.max(by_turns) + tail);
        if own[rank][0] == s {
            let load: f64 = own[rank].iter().map(|&s| work[s].0 + work[s].1).sum();
            let rests: f64 = own[rank].iter().map(|&s| work[s].2).sum();
            end = end.max(fill + m * load + tail.max(m * rests + cost.end));
        }
        if s + 1 < stages {
            let (onwards, gradient) = delay(s);
            fill += forward + onwards;
            tail += gradient + back;
        }
    }
    let mut busy = 0.0;
    for (rank, cost) in costs.ranks.iter().enumerate() {
        let load: f64 = own[rank].iter().map(|&s| work[s].0 + work[s].1 + work[s].2).sum();
        busy += cost.cores * (cost.begin + m * load + cost.end + cost.update);
    }
    let shared = if costs.cores > 0.0 { busy / costs.cores } else { 0.0 };
    let update = costs.ranks.iter().map(|cost| cost.update).fold(0.0, f64::max);
    shared.max(end + update)
}

/// What the busiest rank of several pipelines has to do.
fn work_bound(layout: &Layout, costs: &Costs) -> f64 {
    let replica = |&number: &usize| layout.shares[number] as f64 * layout.seconds(costs, number);
    let ranks = costs.ranks.iter().zip(&layout.own);
    let rank = |(cost, own): (&RankCost, &Vec<usize>)| {
        cost.begin + own.iter().map(replica).sum::<f64>() + cost.end + cost.update
    };
    ranks.map(rank).fold(0.0, f64::max)
}

/// Seconds of a microbatch that the busiest of so many ranks has at least, however layers are cut and on whichever
/// devices: the work of all layers, shared out as finely as can be.
pub(super) fn even_load(prices: &Prices, pool: &Pool, ranks: usize) -> f64 {
    let layers = prices.workload.layers.len();
    let seconds = |device: usize, layer: usize| {
        let of = |range| {
            let cost = prices.stage(device, &range, false);
            cost.forward + cost.backward.min(cost.input + cost.weight)
        };
        // Without what each action costs beside its layers.
        of(layer..layer + 1) - of(layer..layer)
    };
    let reference: Vec<f64> = (0..layers).map(|layer| seconds(pool.classes[0][0], layer)).collect();
    let mut speeds: Vec<f64> = Vec::new();
    for class in &pool.classes {
        let slowness =
            |(layer, &reference): (usize, &f64)| seconds(class[0], layer) / reference.max(f64::MIN_POSITIVE);
        let least = reference.iter().enumerate().map(slowness).fold(f64::INFINITY, f64::min);
        speeds.extend(class.iter().map(|_| 1.0 / least.max(f64::MIN_POSITIVE)));
    }
    speeds.sort_by(|a, b| b.total_cmp(a));
    reference.iter().sum::<f64>() / speeds.iter().take(ranks).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::lower_bound;
    use crate::plan::form::Layout;
    use crate::schedule::{
        Costs, Exchange, Hop, Hops, NAMES, RankCost, Replica, StageCost, default_chunks, generate_chunked,
        simulate,
    };

    /// SplitMix64, 0 to 1.
    fn unit(state: &mut u64) -> f64 {
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = *state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z >> 11) as f64 / (1u64 << 53) as f64
    }

    fn any_costs(layout: &Layout, random: &mut u64) -> Costs {
        let ranks = layout.own.len();
        // Sometimes links, ends of a step and sharing cost nothing, so that each part of the bound is put to the test.
        let [on_links, at_ends, shared] = [0; 3].map(|_| if unit(random) < 0.5 { 0.0 } else { 1.0 });
        let mut hop = |on: f64| Hop {
            out: on * unit(random),
            latency: on * unit(random),
            copy: on * unit(random),
            into: on * unit(random),
            bytes: 1,
        };
        let placement = &layout.placement;
        let hops: Vec<Hops> = placement
            .hops()
            .iter()
            .map(|_| Hops { forward: hop(on_links), backward: hop(on_links) })
            .collect();
        let exchanges = if ranks > 1 {
            let (user, from) = (ranks - 1, placement.replicas()[ranks - 1].rank);
            let (gradient, weight) = (hop(at_ends), hop(at_ends));
            vec![Exchange { user, owner: 0, from, to: placement.replicas()[0].rank, gradient, weight }]
        } else {
            Vec::new()
        };
        let stage = |_: &Replica| StageCost {
            forward: unit(random),
            input: unit(random),
            weight: unit(random),
            backward: 2.0 * unit(random),
            ..StageCost::default()
        };
        let stages = placement.replicas().iter().map(stage).collect();
        let rank = |_| RankCost {
            begin: at_ends * unit(random),
            end: at_ends * unit(random),
            update: at_ends * unit(random),
            cores: shared * unit(random),
            copy_engine: unit(random) < 0.5,
            ..RankCost::default()
        };
        let ranks = (0..ranks).map(rank).collect();
        Costs { stages, hops, ranks, exchanges, cores: shared, ..Costs::default() }
    }

    #[test]
    fn no_simulated_step_is_shorter_than_its_bound() {
        let mut random = 1;
        let mut tight = 0;
        for name in NAMES {
            for (ranks, microbatches) in [(1, 1), (1, 4), (2, 1), (2, 4), (3, 3), (3, 12), (4, 8), (5, 20)] {
                for chunks in [default_chunks(name).unwrap(), 3] {
                    let Ok(schedule) = generate_chunked(name, ranks, chunks, microbatches) else { continue };
                    let layout = Layout::new(&schedule).unwrap();
                    for _ in 0..40 {
                        let costs = any_costs(&layout, &mut random);
                        let step = simulate(&schedule, &costs).unwrap().step;
                        let bound = lower_bound(&layout, microbatches, &costs);
                        // The same seconds added up in another order.
                        assert!(
                            bound <= step * (1.0 + 1e-12),
                            "{name} {ranks} {microbatches}: {bound} > {step}"
                        );
                        tight += usize::from(bound > 0.98 * step);
                    }
                }
            }
        }
        assert!(tight > 300, "a bound that is never reached bounds nothing: {tight}");
    }
}
