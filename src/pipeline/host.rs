//! A rank's way to the host's memory and back: gradients go to the [`Store`] in blocks, sums and weights come from it.
//!
//! Two rings of staging buffers, each of which holds as many blocks as fit: what comes from a device is mapped when the
//! submission that copies it has finished, and taken by the store in that callback, so a ring never waits for another rank.

use std::collections::HashMap;
use std::ops::Range as Span;
use std::sync::Arc;

use futures_channel::mpsc;
use futures_util::StreamExt;

use super::compute::{Recording, Stops};
use super::link::{self, HostCopy, Recorded, Ring};
use super::log::{Log, State};
use super::owners::MOST;
use super::plan::Plan;
use super::rank::Rank;
use super::store::{Arrived, BlockId, Inbox, Store, Term};
use crate::error::{Error, Result};
use crate::gpu::{Buffer, Device, Mapping, Range, now};
use crate::graph::{DType, Phase};
use crate::mesh::Wire;
use crate::model::Parameter;
use crate::ops::parameters::Part;
use crate::schedule::{Action, Kind};
use crate::timeline::What;

/// Staging buffers of each way.
const SLOTS: usize = 4;

/// Bytes that offsets in a mapped buffer are multiples of.
const ALIGNED: u64 = 8;

/// Bytes of a staging buffer of a rank: a block of the usual size, or less where its parameters are few.
fn slot_bytes(plan: &Plan, rank: usize) -> u64 {
    let has =
        |of: &Parameter| plan.holders.get(&of.name).is_some_and(|all| all.iter().any(|h| h.rank == rank));
    slot(plan.all_parts().filter(|of| has(of)).map(|of| of.len()).sum())
}

fn slot(elements: usize) -> u64 {
    4 * elements.min(MOST) as u64
}

/// Bytes of the staging buffers of a rank.
pub(super) fn memory(plan: &Plan, rank: usize) -> u64 {
    2 * link::memory(slot_bytes(plan, rank), SLOTS, Wire::F32)
}

/// The same of a rank that has so many elements of parameters.
pub(super) fn rings(elements: usize) -> u64 {
    2 * link::memory(slot(elements), SLOTS, Wire::F32)
}

/// The ends of a rank.
pub(super) struct HostLink {
    store: Arc<Store>,
    inbox: Inbox,
    down: Down,
    up: Up,
    /// Blocks that the rank owns, and those that others own of what it keeps.
    own: Vec<(BlockId, Span<usize>)>,
    others: Vec<(BlockId, Span<usize>)>,
    /// Whether gradients leave with every microbatch, and weights come with every program.
    gradients: bool,
    weights: bool,
    /// The parameters of which gradients leave when the step's last is added, and whether they have left: stage by stage.
    whole: HashMap<usize, Vec<(String, bool)>>,
    log: Arc<Log>,
    /// Bytes of the rank's link with the host, both ways.
    pub(super) bytes: u64,
}

/// The parameters of each stage of a rank whose gradients stay on it until they are complete, but for those that are added to
/// another's there.
fn whole(plan: &Plan, rank: usize) -> HashMap<usize, Vec<String>> {
    let list = plan.ranks[rank].layout.parameters();
    let leaves = |parameter: &Parameter| {
        let here = |owner: &String| list.iter().any(|other| other.name == *owner);
        !parameter.frozen && !parameter.tied_to.as_ref().is_some_and(here)
    };
    let of = |stage: usize| {
        plan.parts(stage, rank).into_iter().filter(leaves).map(|parameter| parameter.name).collect()
    };
    let stages = (0..plan.stages.len()).filter(|&stage| plan.holds(rank, stage));
    stages.filter(|_| !plan.setup.sharding.streams_gradients()).map(|stage| (stage, of(stage))).collect()
}

/// From the device.
struct Down {
    ring: Ring,
    back: mpsc::UnboundedSender<Buffer>,
    /// The buffer that is being filled: bytes used, and what they are.
    open: Option<(Buffer, u64, Vec<Arrived>)>,
    slot: u64,
}

/// To the device.
struct Up {
    ring: Ring,
    writable: mpsc::UnboundedSender<Buffer>,
    open: Option<(Buffer, u64)>,
    slot: u64,
}

impl HostLink {
    /// Of a rank of a plan.
    pub(super) fn new(
        device: &Device,
        plan: &Plan,
        rank: usize,
        store: Arc<Store>,
        inbox: Inbox,
        log: Arc<Log>,
    ) -> Result<HostLink> {
        let whole = whole(plan, rank);
        let slot = slot_bytes(plan, rank);
        let ring = |label: &str, mapping| -> Result<(mpsc::UnboundedSender<Buffer>, Ring)> {
            let (back, free) = mpsc::unbounded();
            for _ in 0..SLOTS {
                let _ = back.unbounded_send(device.staging(label, slot, mapping)?);
            }
            Ok((back, Ring::new(free)))
        };
        let (back, down) = ring("to the host", Mapping::Read)?;
        let (writable, up) = ring("from the host", Mapping::Write)?;
        let [own, others] = store.blocks_of(rank);
        let sharding = plan.setup.sharding;
        let left = |names: Vec<String>| names.into_iter().map(|name| (name, false)).collect();
        Ok(HostLink {
            others: if sharding.streams_weights() { Vec::new() } else { others },
            own,
            store,
            inbox,
            down: Down { ring: down, back, open: None, slot },
            up: Up { ring: up, writable, open: None, slot },
            gradients: sharding.streams_gradients(),
            weights: sharding.streams_weights(),
            whole: whole.into_iter().map(|(stage, names)| (stage, left(names))).collect(),
            log,
            bytes: 0,
        })
    }

    /// Whether a program's launches stop for the gradients that an action adds to.
    pub(super) fn sends(&self, completes: bool) -> bool {
        self.gradients || completes
    }

    /// Whether gradients leave with the microbatch that makes them.
    pub(super) fn streams_gradients(&self) -> bool {
        self.gradients
    }

    /// Whether weights come for each program.
    pub(super) fn streams_weights(&self) -> bool {
        self.weights
    }

    /// Copies blocks that lie one after another in `from`, all of a parameter, out of it.
    async fn leave(
        &mut self,
        rank: &Rank,
        recording: &mut Recording<'_>,
        from: &Range,
        held: Span<usize>,
        dtype: DType,
        blocks: impl Iterator<Item = (BlockId, Span<usize>, Option<Term>)>,
    ) -> Result<()> {
        for (block, elements, term) in blocks {
            let bytes = dtype.bytes(elements.len());
            if self.down.open.as_ref().is_some_and(|open| open.1 + bytes > self.down.slot) {
                self.flush(recording);
            }
            if self.down.open.is_none() {
                if !self.down.ring.has_room() {
                    self.hand_over(rank, recording).await;
                }
                self.down.open = Some((self.down.ring.next().await?, 0, Vec::new()));
            }
            let Some((buffer, used, arrived)) = &mut self.down.open else { continue };
            let offset = from.offset + dtype.bytes(elements.start - held.start);
            recording.recorder.copy(&from.buffer, offset, buffer, *used, bytes);
            arrived.push(Arrived { block, at: *used, term });
            *used = (*used + bytes).next_multiple_of(ALIGNED);
            self.bytes += bytes;
        }
        Ok(())
    }

    /// Lets what has been recorded travel with the submission.
    pub(super) fn flush(&mut self, recording: &mut Recording<'_>) {
        if let Some((buffer, used, arrived)) = self.down.open.take() {
            let (store, back) = (self.store.clone(), self.down.back.clone());
            let used = used.min(self.down.slot);
            let log = (recording.sent(), self.log.clone());
            recording.copies.push(Recorded::down(buffer, used, arrived, (store, back), log));
        }
        if let Some((buffer, _)) = self.up.open.take() {
            buffer.unmap();
            recording.copies.push(Recorded::up(buffer, self.up.writable.clone()));
        }
    }

    /// Hands over what has been recorded: buffers come back after it.
    pub(super) async fn hand_over(&mut self, rank: &Rank, recording: &mut Recording<'_>) {
        self.flush(recording);
        rank.submit_part(recording).await;
    }

    /// Copies bytes to where they belong on the device.
    async fn arrive(
        &mut self,
        rank: &Rank,
        recording: &mut Recording<'_>,
        to: &Range,
        offset: u64,
        bytes: &[u8],
    ) -> Result<()> {
        let length = bytes.len() as u64;
        if self.up.open.as_ref().is_some_and(|open| open.1 + length > self.up.slot) {
            self.flush(recording);
        }
        if self.up.open.is_none() {
            if !self.up.ring.has_room() {
                self.hand_over(rank, recording).await;
            }
            self.up.open = Some((self.up.ring.next().await?, 0));
        }
        if let Some((buffer, used)) = &mut self.up.open {
            let start = now();
            buffer.write_mapped(*used, bytes)?;
            recording.recorder.copy(buffer, *used, &to.buffer, to.offset + offset, length);
            *used = (*used + length).next_multiple_of(ALIGNED);
            self.bytes += length;
            let copy = HostCopy { start, end: now(), bytes: length };
            rank.log.copied(recording.received(), Some(copy));
        }
        Ok(())
    }

    /// Brings a weight to where a program reads it.
    pub(super) async fn fetch(
        &mut self,
        rank: &Rank,
        recording: &mut Recording<'_>,
        name: &str,
        to: &Range,
    ) -> Result<()> {
        let store = self.store.clone();
        for (block, elements) in store.blocks(name)? {
            let (weights, dtype) = (store.weights(block), store.dtype(block));
            let bytes = bytemuck::cast_slice(&weights);
            self.arrive(rank, recording, to, dtype.bytes(elements.start), bytes).await?;
        }
        Ok(())
    }

    /// Sends a gradient that a microbatch has made, or that the last one of a step has completed.
    pub(super) async fn send(
        &mut self,
        rank: &Rank,
        recording: &mut Recording<'_>,
        name: &str,
        action: Action,
        from: &Range,
    ) -> Result<()> {
        if !self.gradients {
            let names = self.whole.get_mut(&action.stage).into_iter().flatten();
            match names.into_iter().find(|of| of.0 == name) {
                Some((_, left @ false)) => *left = true,
                _ => return Ok(()),
            }
        }
        let Some(term) = self.store.term(name, rank.index, action.microbatch)? else { return Ok(()) };
        let blocks = self.store.blocks(name)?;
        let len = blocks.iter().map(|of| of.1.end).max().unwrap_or(0);
        let blocks = blocks.into_iter().map(|(block, elements)| (block, elements, Some(term)));
        self.leave(rank, recording, from, 0..len, DType::F32, blocks).await
    }

    fn not_left(&self, stage: Option<usize>) -> Vec<(usize, String)> {
        let wanted = |of: &usize| stage.is_none_or(|stage| stage == *of);
        let mut stages: Vec<_> = self.whole.iter().filter(|(of, _)| wanted(of)).collect();
        stages.sort_by_key(|of| of.0);
        let names = |(stage, names): (&usize, &Vec<(String, bool)>)| {
            let open = names.iter().filter(|of| !of.1);
            open.map(|of| (*stage, of.0.clone())).collect::<Vec<_>>()
        };
        stages.into_iter().flat_map(names).collect()
    }
}

impl Rank {
    /// The gradients of one stage, or of all, that have not left.
    pub(super) async fn send_whole(&mut self, stage: Option<usize>) -> Result<()> {
        let Some(mut host) = self.host.take() else { return Ok(()) };
        let device = self.device.clone();
        let mut recording = Recording::new(&device, What::NORM);
        for (stage, name) in host.not_left(stage) {
            let from = self.parameters.gradient(&name)?;
            let action = Action { stage, kind: Kind::R, microbatch: 0 };
            host.send(self, &mut recording, &name, action, &from).await?;
        }
        host.flush(&mut recording);
        self.submit_last(recording).await;
        self.host = Some(host);
        Ok(())
    }

    /// Receives the sums of the gradients that the rank owns.
    pub(super) async fn receive_sums(&mut self) -> Result<()> {
        let Some(mut host) = self.host.take() else { return Ok(()) };
        let device = self.device.clone();
        let mut recording = Recording::new(&device, What::NORM);
        for names in host.whole.values_mut() {
            names.iter_mut().for_each(|of| of.1 = false);
        }
        let own: HashMap<BlockId, Span<usize>> = host.own.iter().cloned().collect();
        for _ in 0..own.len() {
            let (block, sum) =
                self.next_of(&mut host, |inbox| &mut inbox.sums, &mut recording, What::NORM).await?;
            let home = self.parameters.part(host.store.name(block), Part::Gradient)?;
            let (to, held) = home.held_as(DType::F32)?;
            let offset = 4 * (own.get(&block).map_or(0, |of| of.start) - held.start) as u64;
            host.arrive(self, &mut recording, &to, offset, bytemuck::cast_slice(&sum)).await?;
        }
        host.flush(&mut recording);
        self.submit_last(recording).await;
        self.host = Some(host);
        Ok(())
    }

    /// Sends the new weights of what the rank owns, and receives those of the rest where they stay on it.
    pub(super) async fn renew_weights(&mut self) -> Result<()> {
        let Some(mut host) = self.host.take() else { return Ok(()) };
        let device = self.device.clone();
        let mut recording = Recording::new(&device, What::UPDATE);
        for (block, elements) in host.own.clone() {
            let dtype = host.store.dtype(block);
            let home = self.parameters.part(host.store.name(block), Part::Weight)?;
            let (from, held) = home.held_as(dtype)?;
            let block = std::iter::once((block, elements, None));
            host.leave(self, &mut recording, &from, held, dtype, block).await?;
        }
        let others: HashMap<BlockId, Span<usize>> = host.others.iter().cloned().collect();
        for _ in 0..others.len() {
            let (block, weights) =
                self.next_of(&mut host, |inbox| &mut inbox.weights, &mut recording, What::UPDATE).await?;
            let dtype = host.store.dtype(block);
            let to = self.weight_here(host.store.name(block))?;
            let offset = dtype.bytes(others.get(&block).map_or(0, |of| of.start));
            host.arrive(self, &mut recording, &to, offset, bytemuck::cast_slice(&weights)).await?;
        }
        host.flush(&mut recording);
        self.submit_last(recording).await;
        self.host = Some(host);
        Ok(())
    }

    /// The next of what is ready for the rank. What has been recorded is handed over before it has to wait.
    async fn next_of<T>(
        &self,
        host: &mut HostLink,
        of: impl Fn(&mut Inbox) -> &mut mpsc::UnboundedReceiver<T>,
        recording: &mut Recording<'_>,
        what: What,
    ) -> Result<T> {
        let ready = of(&mut host.inbox).try_recv().ok();
        let ready = match ready {
            Some(ready) => ready,
            None => {
                host.hand_over(self, recording).await;
                self.log.state(State::Waiting(what));
                of(&mut host.inbox).next().await.ok_or_else(gone)?
            }
        };
        self.log.state(State::Working(what));
        Ok(ready)
    }

    /// Where a weight lies that the rank keeps, by its own name or that of one which is tied to it here.
    fn weight_here(&self, name: &str) -> Result<Range> {
        let tied = || self.parameters.list().iter().find(|p| p.tied_to.as_deref() == Some(name));
        let here = self.parameters.list().iter().find(|p| p.name == name).or_else(tied);
        self.parameters.weight(here.map_or(name, |parameter| &parameter.name))
    }

    /// Brings the weights that a launch is the first of its program to read, and clears the gradients that it is the first to
    /// add to.
    pub(super) async fn before_launch(
        &mut self,
        recording: &mut Recording<'_>,
        (stage, phase): (usize, Phase),
        stops: &Stops,
        at: usize,
    ) -> Result<()> {
        let Some(mut host) = self.host.take() else { return Ok(()) };
        if let Some(of) = self.stages.get(&stage) {
            for &(id, _) in stops.weights.iter().filter(|(_, first)| *first == at) {
                let name = of.program.stage().graph.value(id).name.clone();
                if let Some(to) = of.program.passing_range(phase, id) {
                    host.fetch(self, recording, &name, &to).await?;
                }
            }
        }
        if let Some(of) = self.stages.get(&stage).filter(|_| host.gradients) {
            for (id, _) in stops.gradients.iter().filter(|(_, launches)| launches.start == at) {
                if let Some(range) = of.program.gradient_range(&self.parameters, *id)? {
                    recording.recorder.clear(&range);
                }
            }
        }
        self.host = Some(host);
        Ok(())
    }

    /// Sends the gradients that so many launches have made.
    pub(super) async fn after_launch(
        &mut self,
        recording: &mut Recording<'_>,
        action: Action,
        stops: &Stops,
        launches: usize,
    ) -> Result<()> {
        let Some(mut host) = self.host.take() else { return Ok(()) };
        if let Some(of) = self.stages.get(&action.stage) {
            for (id, _) in stops.gradients.iter().filter(|(_, made)| made.end == launches) {
                let name = of.program.stage().graph.value(*id).name.clone();
                if !host.gradients && self.parameters.is_folded(&name) {
                    continue;
                }
                if let Some(from) = of.program.gradient_range(&self.parameters, *id)? {
                    host.send(self, recording, &name, action, &from).await?;
                }
            }
        }
        self.host = Some(host);
        Ok(())
    }
}

fn gone() -> Error {
    Error::failed("store", "the other devices have stopped")
}
