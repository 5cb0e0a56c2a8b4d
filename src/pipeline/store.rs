//! What is in the host's memory of a model in training: sums of gradients on their way to whoever updates weights, and where the
//! configuration says so AdamW's state and the weights.
//!
//! Ranks send blocks of gradients and get back sums or weights ([`host`](super::host)). Each block of a parameter has one
//! owner: a rank, or the host. What arrives is added in an order that depends on the microbatches, or on the replicas, alone;
//! what comes too early waits here, so that nobody who sends ever waits for another rank.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use futures_channel::mpsc;

use super::owners::MOST;
use super::plan::Plan;
use super::rank::{Replies, Reply};
use super::update::{advance, square_sums};
use crate::error::{Error, Result};
use crate::graph::DType;
use crate::model::Parameter;
use crate::ops::packed::{halves, round, widen, words};
use crate::ops::parameters::{AdamStep, CHUNK, Part};
use crate::plan::Sharding;

/// A block: which parameter, and which of its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct BlockId {
    pub(super) parameter: usize,
    pub(super) block: usize,
}

/// Which of the gradients of a block: terms are added inner by inner, and the sums of these outer by outer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Term {
    pub(super) outer: usize,
    pub(super) inner: usize,
}

/// What lies in a buffer that has come from a device.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arrived {
    pub(super) block: BlockId,
    /// Bytes before it.
    pub(super) at: u64,
    /// Which gradient; a new weight if none.
    pub(super) term: Option<Term>,
}

/// Where a rank hears of what is ready for it.
pub(super) struct Inbox {
    /// Whole gradients of blocks that it owns.
    pub(super) sums: mpsc::UnboundedReceiver<(BlockId, Arc<Vec<f32>>)>,
    /// New weights of blocks that others own, as kernels read them.
    pub(super) weights: mpsc::UnboundedReceiver<(BlockId, Arc<Vec<u32>>)>,
}

/// How a parameter is divided into blocks, known before anything is allocated.
#[derive(Clone, Debug)]
pub(super) struct BlockPlan {
    /// The elements of each block and the rank that owns it; none where the host does, or where nothing changes it.
    pub(super) blocks: Vec<(Range<usize>, Option<usize>)>,
    /// How many terms each outer sum has.
    terms: Vec<usize>,
    /// Which term each rank sends that has one, of sums by microbatch of the first.
    of_rank: HashMap<usize, Term>,
    /// How many terms each microbatch has of sums by microbatch: as many as members of a gang that have one.
    of_microbatch: usize,
    /// The ranks that have the parameter.
    holders: Vec<usize>,
}

/// How the parameters of a plan are divided into blocks: those that are not tied to another, in model order.
pub(super) fn block_plans(plan: &Plan) -> Vec<(Parameter, BlockPlan)> {
    let sharding = plan.setup.sharding;
    let all: Vec<Parameter> = plan.all_parts().collect();
    let own = all.iter().filter(|parameter| parameter.tied_to.is_none());
    let of = |parameter: &Parameter| {
        let holders = plan.holders.get(&parameter.name).map_or(&[][..], Vec::as_slice);
        let mut blocks: Vec<(Range<usize>, Option<usize>)> = Vec::new();
        let mut cut = |range: Range<usize>, owner: Option<usize>| {
            let steps = range.clone().step_by(MOST);
            blocks.extend(steps.map(|start| (start..range.end.min(start + MOST), owner)));
        };
        match parameter.frozen || sharding.by_host() {
            true => cut(0..parameter.len(), None),
            false => holders.iter().for_each(|holder| cut(holder.owned.clone(), Some(holder.rank))),
        }
        let mut of_rank = HashMap::new();
        let mut of_microbatch = 1;
        let adding = || holders.iter().filter(|holder| holder.adds);
        let terms = if sharding.streams_gradients() {
            // Those of one use of the parameter in one gang: in order of the members.
            let mut gangs: BTreeMap<(usize, &str), usize> = BTreeMap::new();
            for holder in adding() {
                let inner = gangs.entry((plan.gang(holder.rank), &holder.name)).or_default();
                of_rank.insert(holder.rank, Term { outer: 0, inner: *inner });
                *inner += 1;
                of_microbatch = of_microbatch.max(*inner);
            }
            let copies = all.iter().filter(|p| p.tied_to.as_ref() == Some(&parameter.name)).count() + 1;
            vec![plan.schedule.microbatches * of_microbatch; copies]
        } else {
            let mut groups: BTreeMap<usize, usize> = BTreeMap::new();
            for holder in adding() {
                *groups.entry(holder.replica).or_default() += 1;
            }
            for (outer, &replica) in groups.keys().enumerate() {
                let group = adding().filter(|holder| holder.replica == replica);
                of_rank.extend(group.enumerate().map(|(inner, holder)| (holder.rank, Term { outer, inner })));
            }
            groups.into_values().collect()
        };
        let holders = holders.iter().map(|holder| holder.rank).collect();
        BlockPlan { blocks, terms, of_rank, of_microbatch, holders }
    };
    own.map(|parameter| (parameter.clone(), of(parameter))).collect()
}

/// Bytes that a model's state takes in the host's memory, beside the sums that wait for others.
pub(super) fn memory(plan: &Plan) -> u64 {
    let sharding = plan.setup.sharding;
    if !plan.setup.purpose.trains() || !sharding.through_host() {
        return 0;
    }
    let of = |(parameter, blocks): &(Parameter, BlockPlan)| {
        let (kept, full) = (Kept::of(sharding, parameter), 4 * parameter.len() as u64);
        let sums = if parameter.frozen { 0 } else { blocks.terms.len() as u64 };
        let times = u64::from(kept.masters) + 2 * u64::from(kept.moments) + sums;
        u64::from(kept.weights) * parameter.weight_bytes() + times * full
    };
    block_plans(plan).iter().map(of).sum()
}

/// What is here of a parameter from step to step.
struct Kept {
    weights: bool,
    masters: bool,
    moments: bool,
}

impl Kept {
    fn of(sharding: Sharding, parameter: &Parameter) -> Kept {
        let moments = sharding.by_host() && !parameter.frozen;
        Kept {
            weights: moments || sharding.streams_weights(),
            masters: moments && parameter.stored(true).len() > 1,
            moments,
        }
    }
}

struct Stored {
    parameter: Parameter,
    plan: BlockPlan,
    blocks: Vec<Mutex<Block>>,
}

#[derive(Default)]
struct Block {
    outers: Vec<Outer>,
    /// The whole gradient, once all terms are there, where the host keeps it, and the sums of squares of its chunks.
    total: Vec<f32>,
    squares: Vec<f32>,
    /// As kernels read them.
    weights: Arc<Vec<u32>>,
    /// Where weights are packed and have masters.
    masters: Vec<f32>,
    first: Vec<f32>,
    second: Vec<f32>,
}

#[derive(Default)]
struct Outer {
    /// How many terms have been added.
    added: usize,
    sum: Vec<f32>,
    /// Terms that came before their turn.
    early: BTreeMap<usize, Vec<f32>>,
}

impl Outer {
    fn add(&mut self, inner: usize, values: &[f32]) {
        if inner != self.added {
            self.early.insert(inner, values.to_vec());
            return;
        }
        self.append(values);
        while let Some(next) = self.early.remove(&self.added) {
            self.append(&next);
        }
    }

    fn append(&mut self, values: &[f32]) {
        match self.added {
            0 => self.sum.extend_from_slice(values),
            _ => add(&mut self.sum, values),
        }
        self.added += 1;
    }
}

fn add(sum: &mut [f32], values: &[f32]) {
    sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
}

/// The store. Shared by all ranks, their devices' callbacks and the executor.
pub(super) struct Store {
    parts: Vec<Stored>,
    /// For each name, a tied one included, the parameter and which of those that share it this is.
    names: HashMap<String, (usize, usize)>,
    sharding: Sharding,
    /// Blocks of which the gradient is not complete in this step, and of which the new weight is not here.
    open: [AtomicUsize; 2],
    sums_to: Vec<mpsc::UnboundedSender<(BlockId, Arc<Vec<f32>>)>>,
    weights_to: Vec<mpsc::UnboundedSender<(BlockId, Arc<Vec<u32>>)>>,
    /// Tells the executor that all gradients, or all new weights, are here.
    replies: Mutex<Option<Replies>>,
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Store {
    /// Of a plan, and what each of its ranks hears it by; weights are zero.
    #[cfg_attr(
        target_arch = "wasm32",
        expect(clippy::arc_with_non_send_sync, reason = "one thread there, and threads everywhere else")
    )]
    pub(super) fn new(plan: &Plan, replies: Replies) -> (Arc<Store>, Vec<Inbox>) {
        let sharding = plan.setup.sharding;
        let (mut sums_to, mut weights_to, mut inboxes) = (Vec::new(), Vec::new(), Vec::new());
        for _ in &plan.ranks {
            let (sum, sums) = mpsc::unbounded();
            let (weight, weights) = mpsc::unbounded();
            sums_to.push(sum);
            weights_to.push(weight);
            inboxes.push(Inbox { sums, weights });
        }
        let mut names = HashMap::new();
        let parts: Vec<Stored> = block_plans(plan)
            .into_iter()
            .map(|(parameter, plan)| {
                let block = |(elements, _): &(Range<usize>, Option<usize>)| {
                    let (count, kept) = (elements.len(), Kept::of(sharding, &parameter));
                    let zeros = |there: bool| vec![0.0; if there { count } else { 0 }];
                    let words = if kept.weights { dtype(&parameter).bytes(count) as usize / 4 } else { 0 };
                    Mutex::new(Block {
                        outers: plan.terms.iter().map(|_| Outer::default()).collect(),
                        total: Vec::new(),
                        squares: Vec::new(),
                        weights: Arc::new(vec![0; words]),
                        masters: zeros(kept.masters),
                        first: zeros(kept.moments),
                        second: zeros(kept.moments),
                    })
                };
                Stored { blocks: plan.blocks.iter().map(block).collect(), parameter, plan }
            })
            .collect();
        for parameter in plan.all_parts() {
            let owner = parameter.tied_to.as_ref().unwrap_or(&parameter.name);
            let Some(number) = parts.iter().position(|part| part.parameter.name == *owner) else { continue };
            let copies = names.values().filter(|of: &&(usize, usize)| of.0 == number).count();
            let copy = if parameter.tied_to.is_none() { 0 } else { copies.max(1) };
            names.insert(parameter.name, (number, copy));
        }
        let store = Store {
            parts,
            names,
            sharding,
            open: [AtomicUsize::new(0), AtomicUsize::new(0)],
            sums_to,
            weights_to,
            replies: Mutex::new(Some(replies)),
        };
        store.open.iter().for_each(|open| open.store(store.trained_blocks(), Ordering::SeqCst));
        (Arc::new(store), inboxes)
    }

    fn trained_blocks(&self) -> usize {
        self.parts.iter().filter(|part| !part.parameter.frozen).map(|part| part.blocks.len()).sum()
    }

    /// Tells the executor nothing any more.
    pub(super) fn close(&self) {
        lock(&self.replies).take();
    }

    fn tell(&self, reply: Reply) {
        if let Some(replies) = &*lock(&self.replies) {
            // An executor that is gone asks no more.
            let _ = replies.unbounded_send((usize::MAX, Ok(reply)));
        }
    }

    fn of(&self, id: BlockId) -> (&Stored, &Mutex<Block>) {
        let stored = &self.parts[id.parameter];
        (stored, &stored.blocks[id.block])
    }

    fn known(&self, name: &str) -> Result<(usize, usize)> {
        let missing = || Error::Shape { op: "store", message: format!("{name} is not in this model") };
        self.names.get(name).copied().ok_or_else(missing)
    }

    /// The blocks of a parameter, by whatever name, and their elements.
    pub(super) fn blocks(&self, name: &str) -> Result<Vec<(BlockId, Range<usize>)>> {
        let parameter = self.known(name)?.0;
        let blocks = self.parts[parameter].plan.blocks.iter().enumerate();
        Ok(blocks.map(|(block, of)| (BlockId { parameter, block }, of.0.clone())).collect())
    }

    /// The blocks that a rank owns, and those of others that it has: names of its own, and their elements.
    pub(super) fn blocks_of(&self, rank: usize) -> [Vec<(BlockId, Range<usize>)>; 2] {
        let mut all = [Vec::new(), Vec::new()];
        for (parameter, stored) in self.parts.iter().enumerate().filter(|(_, of)| !of.parameter.frozen) {
            if !stored.plan.holders.contains(&rank) {
                continue;
            }
            for (block, (elements, owner)) in stored.plan.blocks.iter().enumerate() {
                let others = usize::from(*owner != Some(rank));
                all[others].push((BlockId { parameter, block }, elements.clone()));
            }
        }
        all
    }

    /// The name of a block's parameter.
    pub(super) fn name(&self, block: BlockId) -> &str {
        &self.parts[block.parameter].parameter.name
    }

    /// As what kernels read a block's weights.
    pub(super) fn dtype(&self, block: BlockId) -> DType {
        dtype(&self.parts[block.parameter].parameter)
    }

    /// Which term of its sum the gradient of a parameter is that a rank has of a microbatch, or of all of them; none where
    /// another member of its gang has it too and sends it.
    pub(super) fn term(&self, name: &str, rank: usize, microbatch: usize) -> Result<Option<Term>> {
        let (parameter, copy) = self.known(name)?;
        let BlockPlan { of_rank, of_microbatch, .. } = &self.parts[parameter].plan;
        let Some(&term) = of_rank.get(&rank) else { return Ok(None) };
        Ok(Some(match self.sharding.streams_gradients() {
            true => Term { outer: copy, inner: microbatch * of_microbatch + term.inner },
            false => term,
        }))
    }

    /// The weights of a block, as kernels read them.
    pub(super) fn weights(&self, block: BlockId) -> Arc<Vec<u32>> {
        lock(self.of(block).1).weights.clone()
    }

    /// Takes what has come from a device.
    pub(super) fn take(&self, bytes: &[u8], arrived: &[Arrived]) {
        for &Arrived { block, at, term } in arrived {
            let count = self.of(block).0.plan.blocks[block.block].0.len();
            let at = at as usize;
            match term {
                Some(term) => self.add(block, term, bytemuck::cast_slice(&bytes[at..at + 4 * count])),
                None => {
                    let length = self.dtype(block).bytes(count) as usize;
                    self.renew(block, bytemuck::cast_slice(&bytes[at..at + length]));
                }
            }
        }
    }

    fn add(&self, id: BlockId, term: Term, values: &[f32]) {
        let (stored, block) = self.of(id);
        let mut block = lock(block);
        block.outers[term.outer].add(term.inner, values);
        let is_whole = |(outer, terms): (&Outer, &usize)| outer.added == *terms;
        if !block.outers.iter().zip(&stored.plan.terms).all(is_whole) {
            return;
        }
        let mut outers = block.outers.iter_mut().map(std::mem::take);
        let mut total = outers.next().unwrap_or_default().sum;
        outers.for_each(|outer| add(&mut total, &outer.sum));
        match stored.plan.blocks[id.block].1 {
            // A rank that is gone has said so.
            Some(owner) => _ = self.sums_to[owner].unbounded_send((id, Arc::new(total))),
            // While other gradients are still made.
            None => (block.squares, block.total) = (square_sums(&total), total),
        }
        drop(block);
        if self.open[0].fetch_sub(1, Ordering::SeqCst) == 1 {
            self.open[0].store(self.trained_blocks(), Ordering::SeqCst);
            if self.sharding.by_host() {
                self.tell(Reply::Summed);
            }
        }
    }

    /// New weights of a block, from its owner.
    fn renew(&self, id: BlockId, words: &[u32]) {
        let (stored, block) = self.of(id);
        let weights = Arc::new(words.to_vec());
        if self.sharding.streams_weights() {
            lock(block).weights = weights;
        } else {
            self.spread(stored, id, weights);
        }
        if self.open[1].fetch_sub(1, Ordering::SeqCst) == 1 {
            self.open[1].store(self.trained_blocks(), Ordering::SeqCst);
            self.tell(Reply::Renewed);
        }
    }

    /// Sends new weights to the ranks that have them and did not make them.
    fn spread(&self, stored: &Stored, id: BlockId, weights: Arc<Vec<u32>>) {
        let owner = stored.plan.blocks[id.block].1;
        for &rank in stored.plan.holders.iter().filter(|&&rank| Some(rank) != owner) {
            let _ = self.weights_to[rank].unbounded_send((id, weights.clone()));
        }
    }

    /// The sums of squares of chunks of all gradients, by parameter and number of the chunk, where the host has them.
    pub(super) fn squares(&self) -> Vec<(String, usize, f32)> {
        let mut all = Vec::new();
        for stored in self.parts.iter().filter(|of| !of.parameter.frozen) {
            for (block, (elements, _)) in stored.blocks.iter().zip(&stored.plan.blocks) {
                let chunk = |(at, &sum)| (stored.parameter.name.clone(), elements.start / CHUNK + at, sum);
                all.extend(lock(block).squares.iter().enumerate().map(chunk));
            }
        }
        all
    }

    /// One AdamW step on everything that the host owns, on all cores; new weights go to the ranks that keep them.
    pub(super) fn update(&self, step: AdamStep) {
        let trained = self.parts.iter().enumerate().filter(|(_, of)| !of.parameter.frozen);
        let ids = trained
            .flat_map(|(parameter, of)| (0..of.blocks.len()).map(move |block| BlockId { parameter, block }));
        let ids: Vec<BlockId> = ids.collect();
        super::update::on_all_cores(ids.len(), |at| self.update_block(ids[at], step));
    }

    fn update_block(&self, id: BlockId, step: AdamStep) {
        let (stored, block) = self.of(id);
        let mut block = lock(block);
        let decays = stored.parameter.decays();
        let Block { total, weights, masters, first, second, .. } = &mut *block;
        let words = Arc::make_mut(weights);
        match (dtype(&stored.parameter), masters.is_empty()) {
            (DType::BF16, true) => {
                let mut wide: Vec<f32> = widened(words, total.len());
                advance(step, decays, total, &mut wide, first, second);
                *words = packed(&wide);
            }
            (DType::BF16, false) => {
                advance(step, decays, total, masters, first, second);
                *words = packed(masters);
            }
            _ => advance(step, decays, total, bytemuck::cast_slice_mut(words), first, second),
        }
        let weights = weights.clone();
        drop(block);
        if !self.sharding.streams_weights() {
            self.spread(stored, id, weights);
        }
    }

    /// Whether part of a parameter is here rather than on a device that owns it.
    pub(super) fn keeps(&self, parameter: &Parameter, part: Part) -> bool {
        let moments = Kept::of(self.sharding, parameter).moments;
        moments || part == Part::Weight && self.sharding.streams_weights() && parameter.frozen
    }

    /// Elements of part of a parameter.
    pub(super) fn read(&self, name: &str, part: Part, first: usize, count: usize) -> Result<Vec<f32>> {
        let mut all = Vec::with_capacity(count);
        self.each(name, first, count, |dtype, block, within, _| match (part, dtype) {
            (Part::Weight, DType::BF16) if block.masters.is_empty() => {
                all.extend_from_slice(&widened(&block.weights, within.end)[within]);
            }
            (Part::Weight, DType::BF16) => all.extend_from_slice(&block.masters[within]),
            (Part::Weight, _) => all.extend_from_slice(&bytemuck::cast_slice(&block.weights)[within]),
            (Part::Gradient, _) => match block.total.is_empty() {
                true => all.extend(within.map(|_| 0.0)),
                false => all.extend_from_slice(&block.total[within]),
            },
            (Part::First, _) => all.extend_from_slice(&block.first[within]),
            (Part::Second, _) => all.extend_from_slice(&block.second[within]),
        })?;
        Ok(all)
    }

    /// Overwrites elements of what is here of part of a parameter.
    pub(super) fn write(&self, name: &str, part: Part, first: usize, values: &[f32]) -> Result<()> {
        self.each(name, first, values.len(), |dtype, block, within, from| {
            let values = &values[from..from + within.len()];
            let copy = |to: &mut [f32]| {
                if !to.is_empty() {
                    to[within.clone()].copy_from_slice(values);
                }
            };
            match part {
                Part::Weight if block.weights.is_empty() => {}
                Part::Weight if dtype == DType::BF16 => {
                    copy(&mut block.masters);
                    let words = Arc::make_mut(&mut block.weights);
                    for (at, value) in within.clone().zip(values) {
                        let (shift, half) = (16 * (at % 2), u32::from(round(*value)));
                        words[at / 2] = words[at / 2] & !(0xffff << shift) | half << shift;
                    }
                }
                Part::Weight => {
                    copy(bytemuck::cast_slice_mut(Arc::make_mut(&mut block.weights).as_mut_slice()))
                }
                Part::Gradient => copy(&mut block.total),
                Part::First => copy(&mut block.first),
                Part::Second => copy(&mut block.second),
            }
        })
    }

    /// Calls `each` with every block of a range of elements: its type, itself, which of its elements, and how many come before
    /// them in the range.
    fn each(
        &self,
        name: &str,
        first: usize,
        count: usize,
        mut each: impl FnMut(DType, &mut Block, Range<usize>, usize),
    ) -> Result<()> {
        let stored = &self.parts[self.known(name)?.0];
        let mut order: Vec<usize> = (0..stored.blocks.len()).collect();
        order.sort_by_key(|&block| stored.plan.blocks[block].0.start);
        for at in order {
            let elements = &stored.plan.blocks[at].0;
            let (start, end) = (elements.start.max(first), elements.end.min(first + count));
            if start < end {
                let within = start - elements.start..end - elements.start;
                each(dtype(&stored.parameter), &mut lock(&stored.blocks[at]), within, start - first);
            }
        }
        Ok(())
    }
}

/// As what kernels read a parameter.
fn dtype(parameter: &Parameter) -> DType {
    if parameter.weights.packed() { DType::BF16 } else { DType::F32 }
}

fn widened(words: &[u32], count: usize) -> Vec<f32> {
    halves(&words[..count.div_ceil(2)]).into_iter().take(count).map(widen).collect()
}

fn packed(values: &[f32]) -> Vec<u32> {
    words(&values.iter().map(|&value| round(value)).collect::<Vec<_>>())
}
