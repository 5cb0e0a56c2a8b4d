//! The way between two stages: the only place that moves data between devices.
//!
//! Staged: the sender copies into a read-back buffer of its own device and maps it; the receiver copies from that
//! mapping straight into a mapped upload buffer of its device, one host copy in all, and gives the read-back buffer
//! back. Both rings are kept for the whole run. As many buffers as microbatches can be in flight, and one more, so a
//! send never has to wait for the receiver and the schedule's proof holds.
//!
//! Local: two stages on one device hand over through device memory, without the host.

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
    device: Device,
    way: OutgoingWay,
    /// Bytes sent so far.
    pub bytes: u64,
}

enum OutgoingWay {
    Staged { free: mpsc::UnboundedReceiver<Buffer>, filled: mpsc::UnboundedSender<Message> },
    Local { ring: Vec<Buffer> },
}

/// The receiving end.
pub struct Incoming {
    device: Device,
    way: IncomingWay,
}

enum IncomingWay {
    Staged {
        filled: mpsc::UnboundedReceiver<Message>,
        back: mpsc::UnboundedSender<Buffer>,
        early: HashMap<usize, Message>,
        free: mpsc::UnboundedReceiver<Buffer>,
        mapped: mpsc::UnboundedSender<Buffer>,
    },
    Local {
        ring: Vec<Buffer>,
    },
}

/// A buffer whose copy is recorded; [`Outgoing::sent`] or [`Incoming::received`] follows the submission.
pub struct Recorded {
    tag: usize,
    buffer: Option<Buffer>,
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

/// Bytes a link of `slots` tensors of `bytes` takes on (the sender, the receiver).
pub fn memory(same_device: bool, bytes: u64, slots: usize) -> (u64, u64) {
    let ring = slots as u64 * bytes.next_multiple_of(4).max(16);
    if same_device { (ring, 0) } else { (ring, ring) }
}

/// Connects two devices for tensors of up to `bytes` bytes, `slots` at a time. `same_device`: both are one handle.
pub fn connect(
    from: &Device,
    to: &Device,
    same_device: bool,
    bytes: u64,
    slots: usize,
) -> Result<(Outgoing, Incoming)> {
    if same_device {
        let ring = (0..slots).map(|_| from.buffer("handover", bytes)).collect::<Result<Vec<_>>>()?;
        return Ok((
            Outgoing { device: from.clone(), way: OutgoingWay::Local { ring: ring.clone() }, bytes: 0 },
            Incoming { device: to.clone(), way: IncomingWay::Local { ring } },
        ));
    }
    let (back, free) = mpsc::unbounded();
    let (filled, arriving) = mpsc::unbounded();
    let (mapped, writable) = mpsc::unbounded();
    for _ in 0..slots {
        // The receivers of both channels are held here, so sending cannot fail.
        let _ = back.unbounded_send(from.staging("link read-back", bytes, Mapping::Read)?);
        let _ = mapped.unbounded_send(to.staging("link upload", bytes, Mapping::Write)?);
    }
    let incoming =
        IncomingWay::Staged { filled: arriving, back, early: HashMap::new(), free: writable, mapped };
    Ok((
        Outgoing { device: from.clone(), way: OutgoingWay::Staged { free, filled }, bytes: 0 },
        Incoming { device: to.clone(), way: incoming },
    ))
}

fn closed() -> Error {
    let (adapter, context) = ("link".to_string(), "passing data between devices".to_string());
    Error::Gpu { adapter, context, message: "the other device has stopped".into() }
}

impl Outgoing {
    /// Records the copy of tensor number `tag` out of `from`.
    pub async fn record(&mut self, recorder: &mut Recorder<'_>, from: &Range, tag: usize) -> Result<Recorded> {
        self.bytes += from.bytes;
        match &mut self.way {
            OutgoingWay::Local { ring } => {
                let target = &ring[tag % ring.len()];
                recorder.copy(&from.buffer, from.offset, target, 0, from.bytes);
                Ok(Recorded { tag, buffer: None })
            }
            OutgoingWay::Staged { free, .. } => {
                let buffer = free.next().await.ok_or_else(closed)?;
                recorder.copy(&from.buffer, from.offset, &buffer, 0, from.bytes);
                Ok(Recorded { tag, buffer: Some(buffer) })
            }
        }
    }

    /// Lets the copy travel as soon as the submission that holds it has finished.
    pub fn sent(&self, recorded: Recorded) {
        if let (OutgoingWay::Staged { filled, .. }, Some(staging)) = (&self.way, recorded.buffer) {
            let (filled, tag, handle) = (filled.clone(), recorded.tag, staging.clone());
            staging.map(Mapping::Read, move |mapped| {
                // A receiver that is gone has failed and said so.
                let _ = filled.unbounded_send(Message { tag, staging: handle, mapped });
            });
        }
    }

    /// The sending device.
    pub fn device(&self) -> &Device {
        &self.device
    }
}

impl Incoming {
    /// Waits for tensor number `tag` and records its copy into `to`.
    pub async fn record(
        &mut self,
        recorder: &mut Recorder<'_>,
        to: &Range,
        tag: usize,
    ) -> Result<(Recorded, Option<HostCopy>)> {
        match &mut self.way {
            IncomingWay::Local { ring } => {
                let source = &ring[tag % ring.len()];
                recorder.copy(source, 0, &to.buffer, to.offset, to.bytes);
                Ok((Recorded { tag, buffer: None }, None))
            }
            IncomingWay::Staged { filled, back, early, free, .. } => {
                let message = loop {
                    if let Some(message) = early.remove(&tag) {
                        break message;
                    }
                    let message = filled.next().await.ok_or_else(closed)?;
                    early.insert(message.tag, message);
                };
                if !message.mapped {
                    return Err(self.device.error("receiving", "the sender's read-back failed"));
                }
                let upload = free.next().await.ok_or_else(closed)?;
                let start = now();
                message.staging.copy_mapped(&upload, to.bytes)?;
                let copy = HostCopy { start, end: now(), bytes: to.bytes };
                message.staging.unmap();
                upload.unmap();
                // A sender that is gone needs its buffer no more.
                let _ = back.unbounded_send(message.staging);
                recorder.copy(&upload, 0, &to.buffer, to.offset, to.bytes);
                Ok((Recorded { tag, buffer: Some(upload) }, Some(copy)))
            }
        }
    }

    /// Makes the upload buffer writable again after the submission that reads it.
    pub fn received(&self, recorded: Recorded) {
        if let (IncomingWay::Staged { mapped, .. }, Some(upload)) = (&self.way, recorded.buffer) {
            let (mapped, handle) = (mapped.clone(), upload.clone());
            upload.map(Mapping::Write, move |ok| {
                if ok {
                    let _ = mapped.unbounded_send(handle);
                }
            });
        }
    }
}
