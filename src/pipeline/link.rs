//! The way between devices: the only place that moves data between them while a step runs.
//!
//! Staged: a sender copies into a read-back buffer of its own device and maps it; a receiver copies from that mapping
//! straight into a mapped upload buffer of its device, one host copy in all, and gives the read-back buffer back
//! ([`super::courier`]). Where a link has several senders, the host adds what they sent as it copies; where it has several
//! receivers, each copies from the one mapping, and the last gives it back. Rings are kept for the whole run. Between stages they have as many buffers as
//! microbatches can be in flight, and one more, so a send never has to wait for the receiver and the schedule's proof holds.
//!
//! Tensors travel as they are, or each rounded to bf16 ([`Wire`]): then sums are taken in f32 and rounded once more.
//!
//! Two stages on one device hand over through a ring of the device's own memory; the host sees nothing of it.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};

use futures_channel::mpsc;
use futures_util::StreamExt;

use super::courier::{Collector, Courier, Order, Source};
use super::log::Log;
use super::store::{Arrived, Store};
use super::wire::Narrow;
use crate::error::{Error, Result};
use crate::gpu::{Buffer, Device, Mapping, Range, Recorder, now};
use crate::mesh::Wire;
use crate::timeline::What;

/// Bytes of a link's largest tensor from which on a thread may copy: fewer take less time than a thread to wake.
const LARGE: u64 = 2 << 20;

/// The free buffers of one end.
pub(super) struct Ring {
    free: mpsc::UnboundedReceiver<Buffer>,
    /// One that has been looked for and found.
    found: Option<Buffer>,
}

impl Ring {
    pub(super) fn new(free: mpsc::UnboundedReceiver<Buffer>) -> Ring {
        Ring { free, found: None }
    }

    /// Whether there is a free one now.
    pub(super) fn has_room(&mut self) -> bool {
        self.found = self.found.take().or_else(|| self.free.try_recv().ok());
        self.found.is_some()
    }

    /// Waits for a free one.
    pub(super) async fn next(&mut self) -> Result<Buffer> {
        match self.found.take() {
            Some(buffer) => Ok(buffer),
            None => self.free.next().await.ok_or_else(closed),
        }
    }
}

/// A filled buffer on its way.
pub(super) struct Message {
    pub(super) tag: usize,
    pub(super) filled: Arc<Filled>,
}

/// A sender's buffer, which goes back to its ring when the last receiver is done with it.
pub(super) struct Filled {
    pub(super) buffer: Buffer,
    mapped: bool,
    back: mpsc::UnboundedSender<Buffer>,
}

impl Drop for Filled {
    fn drop(&mut self) {
        if self.mapped {
            self.buffer.unmap();
        }
        // A sender that is gone needs its buffer no more.
        let _ = self.back.unbounded_send(self.buffer.clone());
    }
}

/// The sending end.
pub struct Outgoing {
    free: Ring,
    /// The receivers have it: where all are gone, no buffer comes back, and nobody waits for one.
    back: Weak<mpsc::UnboundedSender<Buffer>>,
    filled: Vec<mpsc::UnboundedSender<Message>>,
    local: bool,
    /// Where tensors are rounded, if they are.
    narrow: Option<Narrow>,
    /// Bytes sent to another device so far.
    pub bytes: u64,
}

/// The receiving end.
pub struct Incoming(Arrival);

enum Arrival {
    /// Both ends are on one device.
    Local(Source),
    Staged(Box<Staged>),
}

struct Staged {
    /// Bytes of the largest tensor, as it travels.
    bytes: u64,
    courier: Courier,
    /// What was ordered and has not been taken, in order.
    ordered: VecDeque<usize>,
    /// Where rounded tensors become f32 again, if they are.
    narrow: Option<Narrow>,
    /// Where upload buffers go back to.
    writable: mpsc::UnboundedSender<Buffer>,
}

/// A copy that is recorded; [`Recorded::submitted`] follows the submission.
#[must_use = "the buffer is of no use to anyone before the submission is followed by `submitted`"]
pub struct Recorded(After);

/// The store, and the ring to which the buffer goes back.
type Kept = (Arc<Store>, mpsc::UnboundedSender<Buffer>);

/// What follows the submission.
enum After {
    /// Both ends are on one device: nothing.
    Nothing,
    /// The read-back buffer is mapped and goes to the receivers.
    Travel { tag: usize, filled: Filled, to: Vec<mpsc::UnboundedSender<Message>> },
    /// The read-back buffer is mapped, its first bytes go to the store, and it goes back to its ring.
    Store { buffer: Buffer, bytes: u64, arrived: Vec<Arrived>, to: Kept, log: (What, Arc<Log>) },
    /// The upload buffer is mapped and goes back to its ring.
    Return { buffer: Buffer, writable: mpsc::UnboundedSender<Buffer> },
}

/// One host copy: when, and how many bytes.
#[derive(Clone, Copy, Debug)]
pub struct HostCopy {
    /// Seconds on the common clock.
    pub start: f64,
    /// Seconds on the common clock.
    pub end: f64,
    /// Bytes copied.
    pub bytes: u64,
}

/// Bytes that a link of `slots` tensors of `bytes` takes on each of its ends.
pub fn memory(bytes: u64, slots: usize, wire: Wire) -> u64 {
    let travelling = wire.travelling(bytes);
    slots as u64 * travelling.next_multiple_of(4).max(16) + wire.buffers(bytes)
}

/// Connects two devices for tensors of up to `bytes` bytes, `slots` at a time.
pub fn connect(
    from: &Device,
    to: &Device,
    bytes: u64,
    slots: usize,
    wire: Wire,
) -> Result<(Outgoing, Incoming)> {
    let (mut out, mut inward) = connect_all(&[vec![from]], &[to], bytes, slots, wire)?;
    Ok((out.remove(0), inward.remove(0)))
}

/// Connects groups of senders with receivers, each of which gets the sum over groups of the sum over each group's members:
/// the ends of the senders, group by group, and those of the receivers.
pub fn connect_all(
    from: &[Vec<&Device>],
    to: &[&Device],
    bytes: u64,
    slots: usize,
    wire: Wire,
) -> Result<(Vec<Outgoing>, Vec<Incoming>)> {
    let travelling = wire.travelling(bytes);
    let mut outgoing = Vec::new();
    let mut arriving: Vec<Vec<Vec<Source>>> = to.iter().map(|_| Vec::new()).collect();
    for group in from {
        arriving.iter_mut().for_each(|groups| groups.push(Vec::new()));
        for device in group {
            let buffer = || device.staging("link read-back", travelling, Mapping::Read);
            let (end, sources) = join(to.len(), slots, buffer)?;
            let groups = arriving.iter_mut().filter_map(|groups| groups.last_mut());
            groups.zip(sources).for_each(|(group, source)| group.push(source));
            outgoing.push(Outgoing { narrow: Narrow::new(device, wire, bytes, true)?, ..end });
        }
    }
    let mut incoming = Vec::new();
    for (device, groups) in to.iter().zip(arriving) {
        let (writable, free) = mpsc::unbounded();
        for _ in 0..slots {
            // The receiver is held here, so sending cannot fail.
            let _ = writable.unbounded_send(device.staging("link upload", travelling, Mapping::Write)?);
        }
        let narrow = Narrow::new(device, wire, bytes, false)?;
        let courier = Courier::new(Collector { groups, free: Ring::new(free) });
        let staged = Staged { bytes: travelling, courier, ordered: VecDeque::new(), narrow, writable };
        incoming.push(Incoming(Arrival::Staged(Box::new(staged))));
    }
    Ok((outgoing, incoming))
}

/// Connects two stages on one device.
pub fn connect_local(device: &Device, bytes: u64, slots: usize) -> Result<(Outgoing, Incoming)> {
    let (outgoing, mut sources) = join(1, slots, || device.buffer("hand-over", bytes))?;
    Ok((Outgoing { local: true, ..outgoing }, Incoming(Arrival::Local(sources.remove(0)))))
}

/// A sender to so many receivers, and where each of them gets what it sends.
#[cfg_attr(
    target_arch = "wasm32",
    expect(clippy::arc_with_non_send_sync, reason = "one thread there, and threads everywhere else")
)]
fn join(
    receivers: usize,
    slots: usize,
    buffer: impl Fn() -> Result<Buffer>,
) -> Result<(Outgoing, Vec<Source>)> {
    let (back, free) = mpsc::unbounded();
    for _ in 0..slots {
        let _ = back.unbounded_send(buffer()?);
    }
    let back = Arc::new(back);
    let source = |_| {
        let (sender, arriving) = mpsc::unbounded();
        (sender, Source::new(arriving, back.clone()))
    };
    let (filled, sources) = (0..receivers).map(source).unzip();
    let outgoing = Outgoing {
        free: Ring::new(free),
        back: Arc::downgrade(&back),
        filled,
        local: false,
        narrow: None,
        bytes: 0,
    };
    Ok((outgoing, sources))
}

/// What a receiver makes of what its senders sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Combine {
    /// The sum over groups of the sum over each group, from this element of theirs on.
    Sum {
        /// Elements before it.
        first: usize,
    },
    /// So many elements of each, one after another.
    Beside(Vec<usize>),
}

/// A part of a tensor on a device, and the bytes before it in what travels.
pub type Piece = (Range, u64);

pub(super) fn length(pieces: &[Piece]) -> u64 {
    pieces.iter().map(|(range, at)| at + range.bytes).max().unwrap_or(0)
}

/// What a rank says whose neighbour has gone. The neighbour has said before why.
pub(super) fn closed() -> Error {
    Error::failed("link", "the other device has stopped")
}

impl Outgoing {
    /// Whether the next tensor can be recorded without waiting.
    pub fn has_room(&mut self) -> bool {
        self.free.has_room()
    }

    /// Records the copy of tensor number `tag` out of `from`.
    pub async fn record(
        &mut self,
        recorder: &mut Recorder<'_>,
        from: &[Piece],
        tag: usize,
    ) -> Result<Recorded> {
        self.give(recorder, from, tag, false).await
    }

    /// As [`Outgoing::record`]; what is `exact` travels as it is, whatever the wire.
    pub async fn give(
        &mut self,
        recorder: &mut Recorder<'_>,
        from: &[Piece],
        tag: usize,
        exact: bool,
    ) -> Result<Recorded> {
        let buffer = self.free.next().await?;
        let (bytes, narrow) = (length(from), self.narrow.as_ref().filter(|_| !exact));
        let to = narrow.map_or(&buffer, |narrow| &narrow.wide);
        for (range, at) in from {
            recorder.copy(&range.buffer, range.offset, to, *at, range.bytes);
        }
        let travelling = if narrow.is_some() { Wire::BF16 } else { Wire::F32 }.travelling(bytes);
        if let Some(narrow) = narrow {
            narrow.record(recorder, bytes);
            recorder.copy(&narrow.words, 0, &buffer, 0, travelling);
        }
        let back = self.back.upgrade().ok_or_else(closed)?;
        let filled = Filled { buffer, mapped: false, back: (*back).clone() };
        if !self.local {
            self.bytes += travelling;
            return Ok(Recorded(After::Travel { tag, filled, to: self.filled.clone() }));
        }
        // The receiver's copy is recorded after this one in the same queue.
        deliver(tag, filled, &self.filled);
        Ok(Recorded(After::Nothing))
    }
}

/// Gives a filled buffer to the receivers. One that is gone has failed and said so.
#[cfg_attr(
    target_arch = "wasm32",
    expect(clippy::arc_with_non_send_sync, reason = "one thread there, and threads everywhere else")
)]
fn deliver(tag: usize, filled: Filled, to: &[mpsc::UnboundedSender<Message>]) {
    let filled = Arc::new(filled);
    for receiver in to {
        let _ = receiver.unbounded_send(Message { tag, filled: filled.clone() });
    }
}

/// Makes what is ordered of what the senders sent, in a buffer that is mapped for writing.
pub(super) fn fill(buffer: &Buffer, groups: &[Vec<Arc<Filled>>], order: &Order) -> Result<HostCopy> {
    let (elements, bytes) = (order.bytes as usize / 4, order.wire.travelling(order.bytes));
    let size = if order.wire == Wire::BF16 { 2 } else { 4 };
    let start = now();
    match (&order.combine, groups) {
        (Combine::Sum { first: 0 }, [group]) if group.len() == 1 => {
            group[0].buffer.copy_mapped(buffer, bytes)?;
        }
        (Combine::Sum { first }, groups) => {
            let buffers = |group: &Vec<Arc<Filled>>| group.iter().map(|of| of.buffer.clone()).collect();
            let buffers: Vec<Vec<Buffer>> = groups.iter().map(buffers).collect();
            buffer.sum_mapped(&buffers, *first..first + elements, order.wire == Wire::BF16)?;
        }
        (Combine::Beside(sizes), groups) => {
            let senders = groups.iter().flatten().map(|filled| &filled.buffer);
            buffer.join_mapped(senders.zip(sizes.iter().map(|of| size * of)), size * elements)?;
        }
    }
    Ok(HostCopy { start, end: now(), bytes })
}

impl Incoming {
    /// Lets a thread copy what is ordered as soon as it arrives, if there are threads and tensors are large.
    ///
    /// # Errors
    ///
    /// Where the system has no thread for it.
    pub fn ahead(mut self) -> Result<Incoming> {
        if let Arrival::Staged(staged) = &mut self.0
            && staged.bytes >= LARGE
        {
            staged.courier.start()?;
        }
        Ok(self)
    }

    /// Orders tensor number `tag` of so many bytes, which is to be taken after all that were ordered before.
    pub fn order(&mut self, tag: usize, bytes: u64, combine: Combine, exact: bool) {
        if let Arrival::Staged(staged) = &mut self.0 {
            let wire = if exact || staged.narrow.is_none() { Wire::F32 } else { Wire::BF16 };
            staged.courier.ask(Order { tag, bytes, combine, wire });
            staged.ordered.push_back(tag);
        }
    }

    /// Whether tensor number `tag`, which was ordered, can be recorded without waiting.
    pub(super) fn has(&mut self, tag: usize) -> bool {
        match &mut self.0 {
            Arrival::Local(_) => false,
            Arrival::Staged(staged) => staged.ordered.front() == Some(&tag) && staged.courier.has_next(),
        }
    }

    /// Waits for tensor number `tag` and records its copy into `to`; says when the host copied it, if it did. It is the next that
    /// was ordered, or the only one that is not.
    pub async fn record(
        &mut self,
        recorder: &mut Recorder<'_>,
        to: &[Piece],
        tag: usize,
    ) -> Result<(Recorded, Option<HostCopy>)> {
        self.take(recorder, to, tag, &Combine::Sum { first: 0 }, false).await
    }

    /// As [`Incoming::record`] what this makes of what the senders sent, which they say whether it is `exact`.
    pub async fn take(
        &mut self,
        recorder: &mut Recorder<'_>,
        to: &[Piece],
        tag: usize,
        combine: &Combine,
        exact: bool,
    ) -> Result<(Recorded, Option<HostCopy>)> {
        let bytes = length(to);
        if let Arrival::Staged(staged) = &self.0
            && staged.ordered.is_empty()
        {
            self.order(tag, bytes, combine.clone(), exact);
        }
        let copy = |recorder: &mut Recorder<'_>, buffer: &Buffer| {
            for (to, at) in to {
                recorder.copy(buffer, *at, &to.buffer, to.offset, to.bytes);
            }
        };
        let staged = match &mut self.0 {
            Arrival::Staged(staged) => staged,
            Arrival::Local(source) => {
                copy(recorder, &source.wait(tag).await?.buffer);
                return Ok((Recorded(After::Nothing), None));
            }
        };
        if let Some(next) = staged.ordered.pop_front()
            && next != tag
        {
            let message = format!("tensor {tag} is to be taken before {next}; please report it");
            return Err(Error::failed("link", message));
        }
        let ready = staged.courier.next().await?;
        match staged.narrow.as_ref().filter(|_| !exact) {
            None => copy(recorder, &ready.buffer),
            Some(narrow) => {
                recorder.copy(&ready.buffer, 0, &narrow.words, 0, ready.copy.bytes);
                narrow.record(recorder, bytes);
                copy(recorder, &narrow.wide);
            }
        }
        let recorded = Recorded(After::Return { buffer: ready.buffer, writable: staged.writable.clone() });
        Ok((recorded, Some(ready.copy)))
    }
}

impl Recorded {
    /// A read-back buffer whose first `bytes` go to the store.
    pub(super) fn down(
        buffer: Buffer,
        bytes: u64,
        arrived: Vec<Arrived>,
        to: Kept,
        log: (What, Arc<Log>),
    ) -> Recorded {
        Recorded(After::Store { buffer, bytes, arrived, to, log })
    }

    /// An upload buffer that goes back to its ring.
    pub(super) fn up(buffer: Buffer, writable: mpsc::UnboundedSender<Buffer>) -> Recorded {
        Recorded(After::Return { buffer, writable })
    }

    /// Lets the copy travel, or its buffer return, as soon as the submission that holds it has finished.
    pub fn submitted(self) {
        match self.0 {
            After::Nothing => {}
            After::Travel { tag, mut filled, to } => {
                let buffer = filled.buffer.clone();
                buffer.map(Mapping::Read, move || {
                    filled.mapped = true;
                    deliver(tag, filled, &to);
                });
            }
            After::Store { buffer, bytes, arrived, to: (to, back), log: (what, log) } => {
                let filled = buffer.clone();
                buffer.map(Mapping::Read, move || {
                    let start = now();
                    // What cannot be read is a failure of the device, which says so itself.
                    let _ = filled.view(bytes, |bytes| to.take(bytes, &arrived));
                    log.copied(what, Some(HostCopy { start, end: now(), bytes }));
                    filled.unmap();
                    let _ = back.unbounded_send(filled);
                });
            }
            After::Return { buffer, writable } => {
                let upload = buffer.clone();
                buffer.map(Mapping::Write, move || {
                    let _ = writable.unbounded_send(upload);
                });
            }
        }
    }
}
