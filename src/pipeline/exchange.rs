//! What several ranks have of the weights, at the end of a step: each sends its gradients to their owners, which add them to
//! their own, and gets back the new weights, packed if they are stored so. Both travel in buckets, so that no device needs
//! room for a second copy of all.
//!
//! What can move without waiting moves while the rank computes: a bucket leaves as soon as the last backward pass has
//! completed it, and one that has arrived is added once the rank's own gradients of the stage are complete. R sends as many
//! buckets as a link holds; what is left then, A moves, where a rank sends and receives at the same time, so that it never
//! waits for a receiver that waits for it. All go through the shards in the same order.

use std::collections::HashMap;
use std::sync::Arc;

use futures_util::future::try_join;

use super::compute::phases;
use super::link::{Combine, Incoming, Outgoing, Piece, connect_all, length};
use super::log::State;
use super::owners::{Other, Shard};
use super::pace::Work;
use super::rank::Rank;
use crate::error::Result;
use crate::gpu::{BindGroup, Buffer, Device, Kernel, KernelKey, Specialisation, now};
use crate::graph::DType;
use crate::mesh::Wire;
use crate::ops::parameters::{Bucket, Parameters, Segment};
use crate::schedule::{Action, Kind};
use crate::timeline::What;

/// The ends that a rank has, shard by shard.
#[derive(Default)]
pub(super) struct Exchange {
    gradients_out: Vec<Out>,
    gradients_in: Vec<Sum>,
    weights_out: Vec<Out>,
    weights_in: Vec<In>,
    /// The stages of which gradients are complete only with those of stages that use the same parameters here.
    folds: Vec<usize>,
    /// Of each stage of which gradients leave the last B or W, which completes them.
    completing: Vec<Action>,
    /// The stages whose R has been in this step: the rank's own gradients of them are complete.
    left: Vec<usize>,
}

/// Buckets that leave.
struct Out {
    stage: usize,
    link: Outgoing,
    buckets: Vec<Vec<Piece>>,
    /// After how many launches of the stage's last B or W each of them is complete; never where that shows only later.
    complete: Vec<usize>,
    /// How many the link holds.
    slots: usize,
    /// How many have left in this step.
    sent: usize,
}

impl Out {
    fn new(stage: usize, link: Outgoing, buckets: Vec<Vec<Piece>>, slots: usize) -> Out {
        Out { stage, link, complete: vec![usize::MAX; buckets.len()], buckets, slots, sent: 0 }
    }
}

/// Buckets that arrive where they stay.
struct In {
    stage: usize,
    link: Incoming,
    buckets: Vec<Vec<Piece>>,
}

/// Buckets that arrive to be added.
struct Sum {
    stage: usize,
    link: Incoming,
    arrived: Buffer,
    add: Arc<Kernel>,
    buckets: Vec<(u64, BindGroup, [u32; 3])>,
    /// As [`Out::complete`], of the rank's own gradients.
    complete: Vec<usize>,
    /// Whether the same buckets come from others too, whose sums are added before.
    follows: bool,
    /// How many have been added in this step.
    added: usize,
}

impl Exchange {
    /// Of a rank with these actions, where the gradients of the stages `folds` are complete only with those of others. Those
    /// of all stages leave, or those that have an R.
    pub(super) fn new(folds: Vec<usize>, actions: &[Action], all: bool) -> Exchange {
        let adds = |of: &Action| matches!(of.kind, Kind::B | Kind::W);
        let leaves = |stage: usize| all || actions.contains(&Action::of_stage(stage, Kind::R));
        let is_last = |&(at, action): &(usize, &Action)| {
            let again = |later: &Action| later.stage == action.stage && adds(later);
            adds(action) && leaves(action.stage) && !actions[at + 1..].iter().any(again)
        };
        let completing = actions.iter().enumerate().filter(is_last).map(|(_, action)| *action);
        Exchange { folds, completing: completing.collect(), ..Exchange::default() }
    }

    /// Whether an action is the last to add to the gradients of its stage, which then leave.
    pub(super) fn completes(&self, action: Action) -> bool {
        self.completing.contains(&action)
    }

    /// Bytes sent so far.
    pub(super) fn sent(&self) -> u64 {
        self.gradients_out.iter().chain(&self.weights_out).map(|out| out.link.bytes).sum()
    }
}

/// Connects the ranks that have what a shard is of.
pub(super) fn connect_shard(ranks: &mut [Rank], shard: &Shard) -> Result<()> {
    let Shard { stage, owner, buckets, others, arrivals, wire } = shard;
    let (stage, slots) = (*stage, shard.slots());
    let (largest_gradient, largest_weight) = shard.largest();
    let devices: Vec<Device> = ranks.iter().map(|rank| rank.device.clone()).collect();
    let home = &devices[*owner];
    let sums = match arrivals.is_empty() {
        true => None,
        false => {
            let arrived = home.buffer("arrived gradients", largest_gradient)?;
            let sums = buckets.iter().map(|bucket| adding(&ranks[*owner].parameters, home, bucket, &arrived));
            let sums = sums.collect::<Result<Vec<_>>>()?;
            let key = KernelKey { name: "accumulate", specialisation: Specialisation::default() };
            Some((arrived, sums, home.kernel(&key)?))
        }
    };
    for (arrival, groups) in arrivals.iter().enumerate() {
        let from: Vec<Vec<&Device>> =
            groups.iter().map(|group| group.iter().map(|&o| &devices[others[o].rank]).collect()).collect();
        let (outgoing, mut incoming) = connect_all(&from, &[home], largest_gradient, slots, *wire)?;
        for (&other, link) in groups.iter().flatten().zip(outgoing) {
            let rank = &mut ranks[others[other].rank];
            let gradient = |name: &str| Ok((rank.parameters.gradient(name)?, DType::F32));
            let mut out = Out::new(stage, link, pieces(buckets, &others[other], gradient)?, slots);
            out.complete = complete(rank, stage, buckets, &others[other]);
            rank.exchange.gradients_out.push(out);
        }
        let Some((arrived, buckets, add)) = sums.clone() else { continue };
        let (link, follows) = (incoming.remove(0).ahead()?, arrival > 0);
        let own = Other { rank: *owner, names: HashMap::new(), adds: true };
        let complete = complete(&ranks[*owner], stage, &shard.buckets, &own);
        let sum = Sum { stage, link, arrived, add, buckets, complete, follows, added: 0 };
        ranks[*owner].exchange.gradients_in.push(sum);
    }
    let to: Vec<&Device> = others.iter().map(|other| &devices[other.rank]).collect();
    let (mut outgoing, incoming) = connect_all(&[vec![home]], &to, largest_weight, slots, Wire::F32)?;
    let weight = |of: &Parameters, bucket: &Bucket, name: &str| Ok((of.weight(name)?, bucket.dtype()));
    for (other, link) in others.iter().zip(incoming) {
        let rank = &mut ranks[other.rank];
        let of = |bucket: &Bucket| {
            pieces(std::slice::from_ref(bucket), other, |name| weight(&rank.parameters, bucket, name))
        };
        let buckets = buckets.iter().map(of).collect::<Result<Vec<_>>>()?.concat();
        rank.exchange.weights_in.push(In { stage, link: link.ahead()?, buckets });
    }
    let own = Other { rank: *owner, names: HashMap::new(), adds: true };
    let rank = &mut ranks[*owner];
    let of = |bucket: &Bucket| {
        pieces(std::slice::from_ref(bucket), &own, |name| weight(&rank.parameters, bucket, name))
    };
    let buckets = buckets.iter().map(of).collect::<Result<Vec<_>>>()?.concat();
    let link = outgoing.remove(0);
    rank.exchange.weights_out.push(Out::new(stage, link, buckets, slots));
    Ok(())
}

/// After how many launches of a rank's last B or W of a stage each bucket is complete there.
fn complete(rank: &Rank, stage: usize, buckets: &[Bucket], on: &Other) -> Vec<usize> {
    let last = rank.exchange.completing.iter().find(|action| action.stage == stage);
    let Some((of, last)) = rank.stages.get(&stage).zip(last) else {
        return vec![usize::MAX; buckets.len()];
    };
    let after = of.program.completed(phases(last.kind));
    let parameter = |segment: &Segment| {
        let name = on.names.get(&segment.name).unwrap_or(&segment.name);
        let known = after.get(name.as_str()).filter(|_| !rank.parameters.is_folded(name));
        known.copied().unwrap_or(usize::MAX)
    };
    let bucket = |bucket: &Bucket| bucket.segments.iter().map(parameter).max().unwrap_or(0);
    buckets.iter().map(bucket).collect()
}

/// What adds a bucket that has arrived to the gradients of its elements: its bytes, bindings and grid.
fn adding(
    parameters: &Parameters,
    device: &Device,
    bucket: &Bucket,
    arrived: &Buffer,
) -> Result<(u64, BindGroup, [u32; 3])> {
    let kernel =
        device.kernel(&KernelKey { name: "accumulate", specialisation: Specialisation::default() })?;
    let (bytes, elements) = (bucket.gradient_bytes(), bucket.elements);
    let uniform = device.uniform("arrived gradients", bytemuck::cast_slice(&[1, elements as u32]))?;
    let ranges = [uniform.whole(), arrived.range(0, bytes), parameters.bucket_gradient(bucket)?];
    let groups = crate::ops::spread(elements.div_ceil(64), device.capabilities());
    Ok((bytes, device.bind(&kernel, &ranges), groups))
}

/// Where the elements of buckets lie on a rank, `whole` being all of a parameter there and its type. Neighbours become one.
fn pieces(
    buckets: &[Bucket],
    on: &Other,
    whole: impl Fn(&str) -> Result<(crate::gpu::Range, DType)>,
) -> Result<Vec<Vec<Piece>>> {
    let of = |bucket: &Bucket| {
        let mut pieces: Vec<Piece> = Vec::new();
        for Segment { name, at, elements } in &bucket.segments {
            let (range, dtype) = whole(on.names.get(name).unwrap_or(name))?;
            let (offset, at) = (range.offset + dtype.bytes(elements.start), dtype.bytes(*at));
            let bytes = dtype.bytes(elements.len());
            match pieces.last_mut() {
                // As far apart here as in the bucket: what fills a parameter up lies between them.
                Some((before, first))
                    if before.buffer.is(&range.buffer) && offset - before.offset == at - *first =>
                {
                    before.bytes = at - *first + bytes;
                }
                _ => pieces.push((range.buffer.range(offset, bytes), at)),
            }
        }
        Ok(pieces)
    };
    buckets.iter().map(of).collect()
}

impl Rank {
    /// Orders the gradients that others will send in this step.
    pub(super) fn order_gradients(&mut self) {
        let first = self.tag(0);
        for sum in &mut self.exchange.gradients_in {
            for (at, bucket) in sum.buckets.iter().enumerate() {
                sum.link.order(first.wrapping_add(at), bucket.0, Combine::Sum { first: 0 }, false);
            }
        }
    }

    /// R: sends the gradients of a stage, as many as the links hold; [`Rank::exchange_gradients`] sends the rest.
    pub(super) async fn send_gradients(&mut self, stage: usize) -> Result<()> {
        if self.exchange.folds.contains(&stage) {
            self.fold().await?;
        }
        if self.host.is_some() {
            return self.send_whole(Some(stage)).await;
        }
        let mut exchange = std::mem::take(&mut self.exchange);
        for out in exchange.gradients_out.iter_mut().filter(|out| out.stage == stage) {
            self.send_buckets(out, out.slots, Kind::R).await?;
        }
        exchange.left.push(stage);
        self.exchange = exchange;
        Ok(())
    }

    /// Moves what can be moved without waiting: gradients that are complete here, and those of others that are added to them.
    /// Complete are those of the stages whose R has been, and some of a stage whose last B or W is at work, after so many
    /// launches: `working`.
    pub(super) async fn progress(&mut self, working: Option<(usize, usize)>) -> Result<()> {
        if self.exchange.left.is_empty() && working.is_none() {
            return Ok(());
        }
        let mut exchange = std::mem::take(&mut self.exchange);
        let Exchange { gradients_out, gradients_in, left, .. } = &mut exchange;
        let is_complete = |stage: usize, after: Option<&usize>| match (after, working) {
            (None, _) => false,
            (Some(_), _) if left.contains(&stage) => true,
            (Some(&after), Some((at, launches))) => at == stage && after <= launches,
            (Some(_), None) => false,
        };
        for out in gradients_out.iter_mut() {
            while is_complete(out.stage, out.complete.get(out.sent)) && out.link.has_room() {
                self.send_buckets(out, out.sent + 1, Kind::R).await?;
            }
        }
        let mut before = 0;
        for sum in gradients_in.iter_mut() {
            let most = if sum.follows { before } else { sum.buckets.len() };
            while sum.added < most
                && is_complete(sum.stage, sum.complete.get(sum.added))
                && sum.link.has(self.tag(sum.added))
            {
                self.add_bucket(sum).await?;
            }
            before = sum.added;
        }
        self.exchange = exchange;
        Ok(())
    }

    /// Waits for the next bucket of a sum and adds it.
    async fn add_bucket(&self, sum: &mut Sum) -> Result<()> {
        let Some((bytes, group, groups)) = sum.buckets.get(sum.added) else { return Ok(()) };
        let to = [(sum.arrived.range(0, *bytes), 0)];
        let what = of(sum.stage, Kind::A);
        self.receive_bucket(&mut sum.link, &to, sum.added, what, Some((&sum.add, group, *groups))).await?;
        sum.added += 1;
        Ok(())
    }

    /// All A: adds the gradients that others have of what this rank owns, and sends what is left of those that it has of
    /// others'.
    pub(super) async fn exchange_gradients(&mut self) -> Result<()> {
        let mut exchange = std::mem::take(&mut self.exchange);
        let (out, inward) = (&mut exchange.gradients_out, &mut exchange.gradients_in);
        let this = &*self;
        let send = async {
            for out in out {
                this.send_buckets(out, usize::MAX, Kind::R).await?;
                out.sent = 0;
            }
            Ok(())
        };
        let receive = async {
            for sum in inward {
                while sum.added < sum.buckets.len() {
                    this.add_bucket(sum).await?;
                }
                sum.added = 0;
            }
            Ok(())
        };
        try_join(send, receive).await?;
        exchange.left.clear();
        self.exchange = exchange;
        Ok(())
    }

    /// All G, and the sending that belongs to U: the weights that this rank owns go to who has them too, and those that
    /// others own arrive.
    pub(super) async fn exchange_weights(&mut self) -> Result<()> {
        let mut exchange = std::mem::take(&mut self.exchange);
        let (out, inward) = (&mut exchange.weights_out, &mut exchange.weights_in);
        for In { link, buckets, .. } in inward.iter_mut() {
            for (at, to) in buckets.iter().enumerate() {
                link.order(self.tag(at), length(to), Combine::Sum { first: 0 }, false);
            }
        }
        let this = &*self;
        let send = async {
            for out in out {
                this.send_buckets(out, usize::MAX, Kind::U).await?;
                out.sent = 0;
            }
            Ok(())
        };
        let receive = async {
            for In { stage, link, buckets } in inward {
                for (tag, to) in buckets.iter().enumerate() {
                    this.receive_bucket(link, to, tag, of(*stage, Kind::G), None).await?;
                }
            }
            Ok(())
        };
        try_join(send, receive).await?;
        self.exchange = exchange;
        Ok(())
    }

    async fn send_buckets(&self, out: &mut Out, most: usize, kind: Kind) -> Result<()> {
        let what = if kind == Kind::U { What::UPDATE } else { of(out.stage, kind) };
        for tag in out.sent..out.buckets.len().min(most) {
            let mut recorder = self.device.record();
            let recorded = out.link.record(&mut recorder, &out.buckets[tag], self.tag(tag)).await?;
            self.submit(recorder, what, Work::default(), now()).await;
            recorded.submitted();
            out.sent = tag + 1;
        }
        Ok(())
    }

    async fn receive_bucket(
        &self,
        link: &mut Incoming,
        to: &[Piece],
        tag: usize,
        what: What,
        after: Option<(&Kernel, &BindGroup, [u32; 3])>,
    ) -> Result<()> {
        self.log.state(State::Waiting(what));
        let mut recorder = self.device.record();
        let (recorded, copy) = link.record(&mut recorder, to, self.tag(tag)).await?;
        self.log.state(State::Working(what));
        self.log.copied(what, copy);
        if let Some((kernel, group, groups)) = after {
            recorder.dispatch(kernel, group, groups);
        }
        self.submit(recorder, what, Work::default(), now()).await;
        recorded.submitted();
        Ok(())
    }

    /// No two buckets that can be on their way together have the same number.
    fn tag(&self, bucket: usize) -> usize {
        self.steps.wrapping_mul(1 << 12).wrapping_add(bucket)
    }
}

fn of(stage: usize, kind: Kind) -> What {
    What::Action(Action::of_stage(stage, kind))
}
