//! The way between two stages: the only place that moves data between devices.
//!
//! Staged: the sender copies into a read-back buffer of its own device and maps it; the receiver copies from that
//! mapping straight into a mapped upload buffer of its device, one host copy in all, and gives the read-back buffer
//! back. Both rings are kept for the whole run. As many buffers as microbatches can be in flight, and one more, so a
//! send never has to wait for the receiver and the schedule's proof holds.
//!
//! Two stages on one device hand over through a ring of the device's own memory; the host sees nothing of it.

use std::collections::HashMap;

use futures_channel::mpsc;
use futures_util::StreamExt;

use crate::error::{Error, Result};
use crate::gpu::{Buffer, Device, Mapping, Range, Recorder, now};

/// A filled buffer on its way.
struct Message {
    tag: usize,
    buffer: Buffer,
}

/// The sending end.
pub struct Outgoing {
    free: mpsc::UnboundedReceiver<Buffer>,
    filled: mpsc::UnboundedSender<Message>,
    local: bool,
    /// Bytes sent to another device so far.
    pub bytes: u64,
}

/// The receiving end.
pub struct Incoming {
    filled: mpsc::UnboundedReceiver<Message>,
    back: mpsc::UnboundedSender<Buffer>,
    early: HashMap<usize, Message>,
    /// The upload ring; none where both ends are on one device.
    upload: Option<Upload>,
}

struct Upload {
    free: mpsc::UnboundedReceiver<Buffer>,
    writable: mpsc::UnboundedSender<Buffer>,
}

/// A copy that is recorded; [`Recorded::submitted`] follows the submission.
#[must_use = "the buffer is of no use to anyone before the submission is followed by `submitted`"]
pub struct Recorded(After);

/// What follows the submission.
enum After {
    /// Both ends are on one device: nothing.
    Nothing,
    /// The read-back buffer is mapped and goes to the receiver.
    Travel { tag: usize, buffer: Buffer, filled: mpsc::UnboundedSender<Message> },
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
pub fn memory(bytes: u64, slots: usize) -> u64 {
    slots as u64 * bytes.next_multiple_of(4).max(16)
}

/// Connects two devices for tensors of up to `bytes` bytes, `slots` at a time.
pub fn connect(from: &Device, to: &Device, bytes: u64, slots: usize) -> Result<(Outgoing, Incoming)> {
    let (writable, free) = mpsc::unbounded();
    for _ in 0..slots {
        // The receiver is held here, so sending cannot fail.
        let _ = writable.unbounded_send(to.staging("link upload", bytes, Mapping::Write)?);
    }
    let ring = || from.staging("link read-back", bytes, Mapping::Read);
    join(Some(Upload { free, writable }), slots, ring)
}

/// Connects two stages on one device.
pub fn connect_local(device: &Device, bytes: u64, slots: usize) -> Result<(Outgoing, Incoming)> {
    join(None, slots, || device.buffer("hand-over", bytes))
}

fn join(
    upload: Option<Upload>,
    slots: usize,
    buffer: impl Fn() -> Result<Buffer>,
) -> Result<(Outgoing, Incoming)> {
    let (back, free) = mpsc::unbounded();
    let (filled, arriving) = mpsc::unbounded();
    for _ in 0..slots {
        let _ = back.unbounded_send(buffer()?);
    }
    let local = upload.is_none();
    let incoming = Incoming { filled: arriving, back, early: HashMap::new(), upload };
    Ok((Outgoing { free, filled, local, bytes: 0 }, incoming))
}

/// What a rank says whose neighbour has gone. The neighbour has said before why.
fn closed() -> Error {
    Error::failed("link", "the other device has stopped")
}

impl Outgoing {
    /// Records the copy of tensor number `tag` out of `from`.
    pub async fn record(
        &mut self,
        recorder: &mut Recorder<'_>,
        from: &Range,
        tag: usize,
    ) -> Result<Recorded> {
        let buffer = self.free.next().await.ok_or_else(closed)?;
        recorder.copy(&from.buffer, from.offset, &buffer, 0, from.bytes);
        if !self.local {
            self.bytes += from.bytes;
            return Ok(Recorded(After::Travel { tag, buffer, filled: self.filled.clone() }));
        }
        // The receiver's copy is recorded after this one in the same queue.
        let _ = self.filled.unbounded_send(Message { tag, buffer });
        Ok(Recorded(After::Nothing))
    }
}

impl Incoming {
    /// Waits for tensor number `tag` and records its copy into `to`; says when the host copied it, if it did.
    pub async fn record(
        &mut self,
        recorder: &mut Recorder<'_>,
        to: &Range,
        tag: usize,
    ) -> Result<(Recorded, Option<HostCopy>)> {
        let message = loop {
            if let Some(message) = self.early.remove(&tag) {
                break message;
            }
            let message = self.filled.next().await.ok_or_else(closed)?;
            self.early.insert(message.tag, message);
        };
        let Some(ring) = &mut self.upload else {
            recorder.copy(&message.buffer, 0, &to.buffer, to.offset, to.bytes);
            let _ = self.back.unbounded_send(message.buffer);
            return Ok((Recorded(After::Nothing), None));
        };
        let upload = ring.free.next().await.ok_or_else(closed)?;
        let start = now();
        message.buffer.copy_mapped(&upload, to.bytes)?;
        let copy = HostCopy { start, end: now(), bytes: to.bytes };
        message.buffer.unmap();
        upload.unmap();
        // A sender that is gone needs its buffer no more.
        let _ = self.back.unbounded_send(message.buffer);
        recorder.copy(&upload, 0, &to.buffer, to.offset, to.bytes);
        let recorded = Recorded(After::Return { buffer: upload, writable: ring.writable.clone() });
        Ok((recorded, Some(copy)))
    }
}

impl Recorded {
    /// Lets the copy travel, or its buffer return, as soon as the submission that holds it has finished.
    pub fn submitted(self) {
        match self.0 {
            After::Nothing => {}
            After::Travel { tag, buffer, filled } => {
                let message = buffer.clone();
                buffer.map(Mapping::Read, move || {
                    // A receiver that is gone has failed and said so.
                    let _ = filled.unbounded_send(Message { tag, buffer: message });
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
