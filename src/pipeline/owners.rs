//! Who owns what of the weights that several ranks have: of each layer every rank that has it a part, in chunks. Layer by layer,
//! so that gradients travel both ways during the whole of a backward pass, which comes to the layers one after another.
//!
//! The owner of an element adds up its gradient, has its optimizer state and sends its new weight to the others. Which rank
//! that is changes no result: sums are taken in an order that depends on the replicas alone. A replica adds what its stages
//! have of a parameter, and the replicas are added in order.

use std::collections::HashMap;
use std::ops::Range;

use super::link;
use super::plan::Plan;
use crate::mesh::Wire;
use crate::model::Parameter;
use crate::model::tensor::Split;
use crate::ops::parameters::{Bucket, CHUNK};
use crate::plan::EXCHANGE_SLOTS;

/// Most elements that travel together, 1 MiB of gradients: few enough that some are complete long before others.
pub(super) const MOST: usize = 1 << 18;

/// A rank's copy of a parameter.
#[derive(Clone, Debug)]
pub(super) struct Holder {
    pub(super) rank: usize,
    /// What it is called there: where it is tied to the parameter of another rank, otherwise.
    pub(super) name: String,
    /// The elements that the rank owns.
    pub(super) owned: Range<usize>,
    /// Which replica the rank belongs to with it.
    pub(super) replica: usize,
    /// Whether it has a term of the gradient, and not what another member of its gang has too.
    pub(super) adds: bool,
}

/// The ranks that have each parameter that is not tied to another: first those whose stage it belongs to.
pub(super) type Holders = HashMap<String, Vec<Holder>>;

/// Who has which parameters of a model whose stages are placed.
pub(super) fn holders(plan: &Plan) -> Holders {
    let mut all = Holders::new();
    let owned_by_all = |p: &Parameter| p.tied_to.is_none() && !p.frozen && !plan.setup.sharding.by_host();
    for (stage, layers) in plan.stages.iter().enumerate() {
        let chunks = |p: &Parameter| if owned_by_all(p) { p.len().div_ceil(CHUNK) } else { 0 };
        let mut shares: HashMap<Vec<usize>, Shares> = HashMap::new();
        for Held { owners, others, list } in layers.clone().flat_map(|layer| held(plan, layer)) {
            let of = |members: &[usize]| -> Vec<(usize, usize)> {
                let gangs = plan.placement.holders(stage).enumerate();
                let first = gangs.map(|(replica, gang)| (replica, plan.devices(gang).start));
                first.flat_map(|(at, first)| members.iter().map(move |member| (at, first + member))).collect()
            };
            let ranks = of(&owners);
            let shares = shares
                .entry(owners)
                .or_insert_with(|| Shares::new(memory_of_each(plan, ranks.iter().map(|of| of.1))));
            let parts = shares.take(list.iter().map(chunks).sum());
            for ((replica, rank), part) in ranks.into_iter().zip(parts) {
                let mut before = 0;
                for parameter in list.iter().filter(|p| p.tied_to.is_none()) {
                    let end = before + chunks(parameter);
                    let within = |chunk: usize| CHUNK * (chunk.clamp(before, end) - before);
                    let owned = within(part.start)..parameter.len().min(within(part.end));
                    let owned = if owned.is_empty() { 0..0 } else { owned };
                    let holder = Holder { rank, name: parameter.name.clone(), owned, replica, adds: true };
                    all.entry(parameter.name.clone()).or_default().push(holder);
                    before = end;
                }
            }
            for (replica, rank) in of(&others) {
                for parameter in list.iter().filter(|p| p.tied_to.is_none()) {
                    let name = parameter.name.clone();
                    let holder = Holder { rank, name: name.clone(), owned: 0..0, replica, adds: false };
                    all.entry(name).or_default().push(holder);
                }
            }
        }
    }
    for stage in 0..plan.stages.len() {
        for (replica, gang) in plan.placement.holders(stage).enumerate() {
            for rank in plan.devices(gang) {
                for parameter in plan.parts(stage, rank) {
                    let holders = parameter.tied_to.as_ref().and_then(|owner| all.get_mut(owner));
                    let known = |holders: &Vec<Holder>| holders.iter().any(|holder| holder.rank == rank);
                    if let Some(holders) = holders.filter(|holders| !known(holders)) {
                        let name = parameter.name;
                        holders.push(Holder { rank, name, owned: 0..0, replica, adds: true });
                    }
                }
            }
        }
    }
    all
}

/// Parameters of a layer, or parts of them, that the same members of a gang have: those who own them, each with a term of their
/// gradients, and others who have them too.
struct Held {
    owners: Vec<usize>,
    others: Vec<usize>,
    list: Vec<Parameter>,
}

fn held(plan: &Plan, layer: usize) -> Vec<Held> {
    let mut parts: Vec<(Parameter, Vec<usize>)> = Vec::new();
    for (number, member) in plan.members.iter().enumerate() {
        for part in plan.model.parts(layer, member.as_ref()) {
            match parts.iter_mut().find(|(known, _)| known.name == part.name) {
                Some((_, members)) => members.push(number),
                None => parts.push((part, vec![number])),
            }
        }
    }
    let mut all: Vec<Held> = Vec::new();
    for (part, mut owners) in parts {
        // Of what all have the whole gradient of, the first one's counts, and it alone updates.
        let others = if part.split == Split::Same { owners.split_off(1) } else { Vec::new() };
        match all.iter_mut().find(|held| (&held.owners, &held.others) == (&owners, &others)) {
            Some(held) => held.list.push(part),
            None => all.push(Held { owners, others, list: vec![part] }),
        }
    }
    all
}

/// Shares things out one by one in fixed proportions: each taker has at any moment what is due to it within one.
struct Shares {
    weights: Vec<u128>,
    taken: Vec<u128>,
}

impl Shares {
    fn new(weights: Vec<u128>) -> Shares {
        Shares { taken: vec![0; weights.len()], weights }
    }

    /// The next so many: each taker's range of them.
    fn take(&mut self, count: usize) -> Vec<Range<usize>> {
        let (sum, mut mine) = (self.weights.iter().sum::<u128>(), vec![0; self.weights.len()]);
        for _ in 0..count {
            let due = self.taken.iter().sum::<u128>() + 1;
            let lacking = |&taker: &usize| {
                let (owed, has) = (due * self.weights[taker], self.taken[taker] * sum);
                // The first of those that lack most.
                (owed as i128 - has as i128, std::cmp::Reverse(taker))
            };
            let Some(next) = (0..mine.len()).max_by_key(lacking) else { break };
            self.taken[next] += 1;
            mine[next] += 1;
        }
        let mut end = 0;
        let range = |own: usize| {
            end += own;
            end - own..end
        };
        mine.into_iter().map(range).collect()
    }
}

/// In what proportion ranks that have the same weights own them: that of their memory, or equal where one is not known.
fn memory_of_each(plan: &Plan, ranks: impl ExactSizeIterator<Item = usize>) -> Vec<u128> {
    let budget = |rank: usize| plan.setup.budgets.get(rank).copied().flatten().filter(|&bytes| bytes > 0);
    let count = ranks.len();
    let known: Option<Vec<u128>> = ranks.map(|rank| budget(rank).map(u128::from)).collect();
    known.unwrap_or_else(|| vec![1; count])
}

/// What a rank owns of a stage and others have too.
pub(super) struct Shard {
    pub(super) stage: usize,
    pub(super) owner: usize,
    pub(super) buckets: Vec<Bucket>,
    /// The others, and what they call the parameters that have another name there.
    pub(super) others: Vec<Other>,
    /// Sums that arrive one after another, each over groups of those of `others` with these numbers.
    pub(super) arrivals: Vec<Vec<Vec<usize>>>,
    /// As what gradients travel.
    pub(super) wire: Wire,
}

/// Another rank that has what one owns.
pub(super) struct Other {
    pub(super) rank: usize,
    pub(super) names: HashMap<String, String>,
    /// Whether gradients come from it.
    pub(super) adds: bool,
}

/// Everything that travels between ranks at the end of a step, shard by shard in the order in which it is done.
pub(super) fn shards(plan: &Plan) -> Vec<Shard> {
    let mut shards = Vec::new();
    for stage in 0..plan.stages.len() {
        for owner in plan.placement.holders(stage).flat_map(|gang| plan.devices(gang)) {
            let layout = &plan.ranks[owner].layout;
            // The parameters that the same others have travel together.
            let mut groups: Vec<Vec<&str>> = Vec::new();
            let ranks = |name: &str| -> Vec<(usize, bool)> {
                let holders = plan.holders.get(name).into_iter().flatten();
                holders.map(|holder| (holder.rank, holder.adds)).collect()
            };
            for parameter in plan.parts(stage, owner) {
                let Some((name, _)) = plan.holders.get_key_value(&parameter.name) else { continue };
                match groups.iter_mut().find(|group| ranks(group[0]) == ranks(name)) {
                    Some(group) => group.push(name),
                    None => groups.push(vec![name]),
                }
            }
            for group in groups {
                let mut buckets = layout.buckets(|p| group.contains(&p.name.as_str()), MOST);
                // What is complete first goes first: the backward pass comes to the last layers first.
                let place = |bucket: &Bucket| {
                    let first = bucket.segments.first().map(|segment| &segment.name);
                    group.iter().position(|name| Some(*name) == first.map(String::as_str))
                };
                buckets.sort_by_key(|bucket| std::cmp::Reverse(place(bucket)));
                let holders = &plan.holders[group[0]];
                if holders.len() > 1 && !buckets.is_empty() {
                    shards.push(shard(plan, stage, owner, &group, buckets));
                }
            }
        }
    }
    shards
}

fn shard(plan: &Plan, stage: usize, owner: usize, group: &[&str], buckets: Vec<Bucket>) -> Shard {
    let holders = &plan.holders[group[0]];
    let mut others: Vec<&Holder> = holders.iter().filter(|holder| holder.rank != owner).collect();
    others.sort_by_key(|holder| holder.replica);
    let own = holders.iter().find(|holder| holder.rank == owner).map_or(0, |holder| holder.replica);
    let of = |replica: usize| -> Vec<usize> {
        let is_term = |other: &Holder| other.replica == replica && other.adds;
        (0..others.len()).filter(|&other| is_term(others[other])).collect()
    };
    let last = others.iter().map(|holder| holder.replica).max().unwrap_or(0);
    // Its own replica's, to be added to its own; then the sum of the replicas before, which it is added to (the order of two
    // makes no difference); then each of those after.
    let before: Vec<Vec<usize>> = (0..own).map(of).collect();
    let mut arrivals = vec![vec![of(own)], before];
    arrivals.extend((own + 1..=last).map(|replica| vec![of(replica)]));
    for arrival in &mut arrivals {
        arrival.retain(|group| !group.is_empty());
    }
    arrivals.retain(|arrival| !arrival.is_empty());
    let others = others.iter().map(|other| {
        let name = |name: &str| {
            let same = plan.holders[name].iter().find(|holder| holder.rank == other.rank)?;
            Some((name.to_string(), same.name.clone()))
        };
        let names = group.iter().filter_map(|of| name(of)).collect();
        Other { rank: other.rank, names, adds: other.adds }
    });
    Shard { stage, owner, buckets, others: others.collect(), arrivals, wire: plan.setup.wire }
}

impl Shard {
    /// Buffers of a link: while one bucket travels others are on their way.
    pub(super) fn slots(&self) -> usize {
        self.buckets.len().min(EXCHANGE_SLOTS)
    }

    /// Bytes of the largest bucket: of gradients and of weights.
    pub(super) fn largest(&self) -> (u64, u64) {
        let most = |bytes: fn(&Bucket) -> u64| self.buckets.iter().map(bytes).max().unwrap_or(0);
        (most(Bucket::gradient_bytes), most(Bucket::weight_bytes))
    }

    /// Bytes that it takes on a rank, beside what it is a part of.
    pub(super) fn bytes(&self, rank: usize) -> u64 {
        let (gradient, weight) = self.largest();
        // Weights that are to be the same everywhere are not rounded.
        let [gradients, weights] = [(gradient, self.wire), (weight, Wire::F32)]
            .map(|(bytes, wire)| link::memory(bytes, self.slots(), wire));
        if rank == self.owner {
            let arrived =
                if self.arrivals.is_empty() { 0 } else { gradient + 16 * self.buckets.len() as u64 };
            return self.arrivals.len() as u64 * gradients + weights + arrived;
        }
        let here = self.others.iter().filter(|other| other.rank == rank);
        here.map(|other| weights + if other.adds { gradients } else { 0 }).sum()
    }
}

/// Bytes that a parameter of so many elements takes on the device of its user and of its owner, where these are two.
pub(super) fn memory(parameter: &Parameter, wire: Wire) -> [u64; 2] {
    let layout = crate::ops::parameters::Layout::new(vec![Parameter { tied_to: None, ..parameter.clone() }]);
    let buckets = layout.buckets(|_| true, MOST);
    let others = vec![Other { rank: 1, names: HashMap::new(), adds: true }];
    let shard = Shard { stage: 0, owner: 0, buckets, others, arrivals: vec![vec![vec![0]]], wire };
    [shard.bytes(1), shard.bytes(0)]
}
