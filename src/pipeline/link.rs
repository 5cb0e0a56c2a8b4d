//! The way between two stages: the only place that moves data between devices.
//!
//! Staged: the sender copies into a read-back buffer of its own device and maps it; the receiver copies from that
//! mapping straight into a mapped upload buffer of its device, one host copy in all, and gives the read-back buffer
//! back. Both rings are kept for the whole run. As many buffers as microbatches can be in flight, and one more, so a
//! send never has to wait for the receiver and the schedule's proof holds.

use std::collections::HashMap;

use futures_channel::mpsc;
use futures_util::StreamExt;

use crate::error::{Error, Result};
use crate::gpu::{Buffer, Device, Mapping, Range, Recorder, now};

/// A filled read-back buffer on its way.
struct Message {
    tag: usize,
    staging: Buffer,
    mapped: bool,
}

/// The sending end.
pub struct Outgoing {
    free: mpsc::UnboundedReceiver<Buffer>,
    filled: mpsc::UnboundedSender<Message>,
    /// Bytes sent so far.
    pub bytes: u64,
}

/// The receiving end.
pub struct Incoming {
    device: Device,
    filled: mpsc::UnboundedReceiver<Message>,
    back: mpsc::UnboundedSender<Buffer>,
    early: HashMap<usize, Message>,
    free: mpsc::UnboundedReceiver<Buffer>,
    writable: mpsc::UnboundedSender<Buffer>,
}

/// A buffer whose copy is recorded; [`Outgoing::sent`] or [`Incoming::received`] follows the submission.
pub struct Recorded {
    tag: usize,
    buffer: Buffer,
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
    let (back, returned) = mpsc::unbounded();
    let (filled, arriving) = mpsc::unbounded();
    let (writable, free) = mpsc::unbounded();
    for _ in 0..slots {
        // The receivers of both channels are held here, so sending cannot fail.
        let _ = back.unbounded_send(from.staging("link read-back", bytes, Mapping::Read)?);
        let _ = writable.unbounded_send(to.staging("link upload", bytes, Mapping::Write)?);
    }
    let device = to.clone();
    let incoming = Incoming { device, filled: arriving, back, early: HashMap::new(), free, writable };
    Ok((Outgoing { free: returned, filled, bytes: 0 }, incoming))
}

fn closed() -> Error {
    let (adapter, context) = ("link".to_string(), "passing data between devices".to_string());
    Error::Gpu { adapter, context, message: "the other device has stopped".into() }
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
        self.bytes += from.bytes;
        Ok(Recorded { tag, buffer })
    }

    /// Lets the copy travel as soon as the submission that holds it has finished.
    pub fn sent(&self, recorded: Recorded) {
        let Recorded { tag, buffer } = recorded;
        let (filled, staging) = (self.filled.clone(), buffer.clone());
        buffer.map(Mapping::Read, move |mapped| {
            // A receiver that is gone has failed and said so.
            let _ = filled.unbounded_send(Message { tag, staging, mapped });
        });
    }
}

impl Incoming {
    /// Waits for tensor number `tag` and records its copy into `to`.
    pub async fn record(
        &mut self,
        recorder: &mut Recorder<'_>,
        to: &Range,
        tag: usize,
    ) -> Result<(Recorded, HostCopy)> {
        let message = loop {
            if let Some(message) = self.early.remove(&tag) {
                break message;
            }
            let message = self.filled.next().await.ok_or_else(closed)?;
            self.early.insert(message.tag, message);
        };
        if !message.mapped {
            return Err(self.device.error("receiving", "the sender's read-back failed"));
        }
        let upload = self.free.next().await.ok_or_else(closed)?;
        let start = now();
        message.staging.copy_mapped(&upload, to.bytes)?;
        let copy = HostCopy { start, end: now(), bytes: to.bytes };
        message.staging.unmap();
        upload.unmap();
        // A sender that is gone needs its buffer no more.
        let _ = self.back.unbounded_send(message.staging);
        recorder.copy(&upload, 0, &to.buffer, to.offset, to.bytes);
        Ok((Recorded { tag, buffer: upload }, copy))
    }

    /// Makes the upload buffer writable again after the submission that reads it.
    pub fn received(&self, recorded: Recorded) {
        let (writable, upload) = (self.writable.clone(), recorded.buffer.clone());
        recorded.buffer.map(Mapping::Write, move |ok| {
            if ok {
                let _ = writable.unbounded_send(upload);
            }
        });
    }
}
