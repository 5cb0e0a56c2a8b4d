//! Where the search begins: the devices and cuts with which the busiest rank has the least to do.

use std::ops::Range;

use super::costs::Prices;
use super::space::Space;

/// Devices in order and layers for each, one stage a rank.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Start {
    /// What the worst rank costs, in the unit of the price asked for.
    pub worst: f64,
    pub devices: Vec<usize>,
    pub stages: Vec<Range<usize>>,
}

/// For each number of ranks, the choice of devices, their order and the cuts with the smallest `price(rank, class of the
/// device, marks)` of the worst rank; none if every choice has an infinite one. Marks are positions in [`Space::marks`].
/// Exact, by dynamic programming over (devices used of each class, layers done).
pub(super) fn smallest_worst(
    space: &Space,
    most: usize,
    price: impl Fn(usize, usize, Range<usize>) -> f64,
) -> Vec<Option<Start>> {
    let pool = &space.pool;
    let mut strides = Vec::new();
    let mut sets = 1;
    for class in &pool.classes {
        strides.push(sets);
        sets *= class.len() + 1;
    }
    let used = |set: usize, class: usize| set / strides[class] % (pool.classes[class].len() + 1);
    let width = space.marks.len();
    // The smallest worst price with these devices for so many layers; the class of the last device and where it starts.
    let mut best = vec![(f64::INFINITY, 0, 0); sets * width];
    best[0].0 = 0.0;
    let mut result: Vec<Option<Start>> = vec![None; most + 1];
    for set in 0..sets {
        let rank: usize = (0..pool.classes.len()).map(|class| used(set, class)).sum();
        let (worst, ..) = best[set * width + width - 1];
        let improves = |start: &Option<Start>| start.as_ref().is_none_or(|start| worst < start.worst);
        if rank <= most && worst.is_finite() && improves(&result[rank]) {
            result[rank] = Some(Start { worst, ..trace(space, &strides, &best, set) });
        }
        if rank >= most {
            continue;
        }
        for class in 0..pool.classes.len() {
            let taken = used(set, class);
            let is_next = pool.order.as_ref().is_none_or(|order| order[rank] == pool.classes[class][0]);
            if taken == pool.classes[class].len() || !is_next {
                continue;
            }
            let next = (set + strides[class]) * width;
            for start in 0..width - 1 {
                let (before, ..) = best[set * width + start];
                if !before.is_finite() {
                    continue;
                }
                for end in start + 1..if space.is_cut { start + 2 } else { width } {
                    let worst = before.max(price(rank, class, start..end));
                    if worst < best[next + end].0 {
                        best[next + end] = (worst, class, start);
                    }
                }
            }
        }
    }
    result
}

/// Walks back from the last device.
fn trace(space: &Space, strides: &[usize], best: &[(f64, usize, usize)], set: usize) -> Start {
    let pool = &space.pool;
    let width = space.marks.len();
    let mut set = set;
    let mut end = width - 1;
    let mut ranks: Vec<(usize, Range<usize>)> = Vec::new();
    while set > 0 {
        let (_, class, start) = best[set * width + end];
        ranks.push((class, start..end));
        set -= strides[class];
        end = start;
    }
    ranks.reverse();
    let mut taken = vec![0; pool.classes.len()];
    let mut devices = Vec::new();
    for (class, _) in &ranks {
        devices.push(pool.classes[*class][taken[*class]]);
        taken[*class] += 1;
    }
    let stages = ranks.into_iter().map(|(_, range)| space.range(range)).collect();
    Start { worst: 0.0, devices, stages }
}

/// The least seconds that a device needs for a microbatch of these layers, in any schedule with one stage a rank.
pub(super) fn seconds(prices: &Prices, device: usize, range: &Range<usize>) -> f64 {
    if !prices.binds(device, range) {
        return f64::INFINITY;
    }
    let cost = prices.stage(device, range, false);
    cost.forward + cost.backward.min(cost.input + cost.weight)
}

impl Space<'_> {
    /// The layers between two marks.
    pub fn range(&self, marks: Range<usize>) -> Range<usize> {
        self.marks[marks.start]..self.marks[marks.end]
    }

    /// [`smallest_worst`] in seconds of a microbatch, as if memory were no limit.
    pub fn fastest(&self, batching: usize, most: usize) -> Vec<Option<Start>> {
        let prices = &self.prices[batching];
        smallest_worst(self, most, |_, class, marks| {
            seconds(prices, self.pool.classes[class][0], &self.range(marks))
        })
    }
}
