//! Growing texts: new tokens pass the stages one group of texts after another, and every stage keeps its own caches.

use futures_channel::mpsc;
use futures_util::StreamExt;

use super::link::Recorded;
use super::log::State;
use super::rank::{Rank, Replies, Reply};
use super::timeline::EventKind;
use crate::error::{Error, Result};
use crate::gpu::{Buffer, Device, Mapping, Range, Recorder, now};
use crate::graph::Phase;
use crate::ops::program::Slots;

/// New tokens of a group of B texts.
#[derive(Clone, Debug)]
pub struct Grow {
    /// The group, which says whose caches they go to.
    pub group: usize,
    /// Counts the calls, from 0, over all groups.
    pub number: usize,
    /// (B,T), T being the plan's `sequence` or 1. Whatever stands after the end of a text is ignored as long as later
    /// tokens take its positions.
    pub tokens: Vec<u32>,
    /// (B,T): the place of each token in its text; consecutive in a row, and below the capacity.
    pub positions: Vec<u32>,
    /// For each text the row among the B·T whose logits are wanted.
    pub last: Vec<u32>,
}

impl Rank {
    /// Runs every stage of this rank on the new tokens. The logits of the last stage are answered when they are on the
    /// host; until then the rank goes on with the next group.
    pub(super) async fn decode(&mut self, grow: &Grow, replies: &Replies) -> Result<()> {
        let mut order: Vec<usize> = self.stages.keys().copied().collect();
        order.sort_unstable();
        for at in order {
            self.decode_stage(at, grow, replies).await?;
        }
        self.log.take_events();
        Ok(())
    }

    async fn decode_stage(&mut self, at: usize, grow: &Grow, replies: &Replies) -> Result<()> {
        let device = self.device.clone();
        let slots = Slots { stash: grow.group, gradient: 0 };
        let one = grow.tokens.len() == self.batch;
        let mut recorder = device.record();
        let Some(stage) = self.stages.get_mut(&at) else { return Ok(()) };
        let program = match &mut stage.single {
            Some(single) if one => single,
            _ => &mut stage.program,
        };
        let started = now();
        for (name, values) in [("tokens", &grow.tokens), ("positions", &grow.positions), ("last", &grow.last)]
        {
            if let Some(id) = program.stage().fed(name) {
                let range = program.range(&self.parameters, id, slots)?;
                if range.bytes != 4 * values.len() as u64 {
                    return Err(wrong_size(name, values.len(), range.bytes as usize / 4));
                }
                device.upload(&range.buffer, range.offset, bytemuck::cast_slice(values));
            }
        }
        let mut copies = Vec::new();
        if let (Some(incoming), Some(input)) = (&mut stage.forward_in, program.stage().input) {
            let to = program.range(&self.parameters, input, slots)?;
            self.log.state(State::Waiting, format!("tokens of group {}", grow.group));
            copies.push(incoming.record(&mut recorder, &to, grow.number).await?.0);
        }
        self.log.state(State::Working, format!("tokens of group {}", grow.group));
        let launches = program.launch_flops(Phase::Forward).len();
        program.record(&mut recorder, &self.parameters, Phase::Forward, 0..launches, slots)?;
        let output =
            program.stage().output.map(|id| program.range(&self.parameters, id, slots)).transpose()?;
        if let (Some(outgoing), Some(from)) = (&mut stage.forward_out, &output) {
            copies.push(outgoing.record(&mut recorder, from, grow.number).await?);
        }
        let mut logits = None;
        if let (None, Some(readback), Some(from)) = (&stage.forward_out, &mut self.logits, &output) {
            logits = Some(readback.record(&mut recorder, from, grow.group).await?);
        }
        self.submit(recorder, "grow", EventKind::Forward, None, 0.0, started).await;
        copies.into_iter().for_each(Recorded::submitted);
        if let Some(logits) = logits {
            logits.submitted(self.index, replies.clone());
        }
        device.check("decoding")
    }
}

/// Buffers through which logits come to the host; each goes back here once it has been read.
pub(super) struct Readback {
    free: mpsc::UnboundedReceiver<Buffer>,
    back: mpsc::UnboundedSender<Buffer>,
}

/// Logits (B,V) of a group on their way to the host, or there.
pub(super) struct Logits {
    group: usize,
    range: Range,
    back: mpsc::UnboundedSender<Buffer>,
}

impl Readback {
    /// Allocates `count` buffers.
    pub(super) fn new(device: &Device, count: usize, bytes: u64) -> Result<Readback> {
        let (back, free) = mpsc::unbounded();
        for _ in 0..count {
            // The receiver is held here, so sending cannot fail.
            let _ = back.unbounded_send(device.staging("logits", bytes, Mapping::Read)?);
        }
        Ok(Readback { free, back })
    }

    async fn record(&mut self, recorder: &mut Recorder<'_>, from: &Range, group: usize) -> Result<Logits> {
        // This end holds a sender too, so the stream has no end.
        let Some(buffer) = self.free.next().await else { return Err(wrong_size("buffers", 0, 1)) };
        recorder.copy(&from.buffer, from.offset, &buffer, 0, from.bytes);
        Ok(Logits { group, range: buffer.range(0, from.bytes), back: self.back.clone() })
    }
}

impl Logits {
    /// Answers them as soon as the submission that copies them has finished.
    fn submitted(self, rank: usize, replies: Replies) {
        self.range.buffer.clone().map(Mapping::Read, move || {
            // An executor that is gone needs no logits.
            let _ = replies.unbounded_send((rank, Ok(Reply::Logits(self))));
        });
    }

    /// The group and its logits; the buffer goes back.
    pub(super) fn take(self) -> Result<(usize, Vec<f32>)> {
        let values = self.range.read_mapped()?;
        self.range.buffer.unmap();
        // A rank that is gone has failed and will say so.
        let _ = self.back.unbounded_send(self.range.buffer);
        Ok((self.group, bytemuck::pod_collect_to_vec(&values)))
    }
}

fn wrong_size(name: &str, got: usize, want: usize) -> Error {
    Error::Shape { op: "decode", message: format!("{got} {name}, the program takes {want}") }
}
