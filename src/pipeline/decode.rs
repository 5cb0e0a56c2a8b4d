//! Growing texts: new tokens pass the stages one group of texts after another, and every stage keeps its own caches.

use super::link::Recorded;
use super::log::State;
use super::rank::{Rank, Reply};
use super::timeline::EventKind;
use crate::error::{Error, Result};
use crate::gpu::now;
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
    /// Runs every stage of this rank on the new tokens; the last stage answers the logits.
    pub(super) async fn decode(&mut self, grow: &Grow) -> Result<Reply> {
        let mut order: Vec<usize> = self.stages.keys().copied().collect();
        order.sort_unstable();
        let mut logits = None;
        for at in order {
            logits = self.decode_stage(at, grow).await?;
        }
        self.log.take_events();
        Ok(logits.map_or(Reply::Done, |values| Reply::Logits(grow.group, values)))
    }

    async fn decode_stage(&mut self, at: usize, grow: &Grow) -> Result<Option<Vec<f32>>> {
        let device = self.device.clone();
        let slots = Slots { stash: grow.group, gradient: 0 };
        let one = grow.tokens.len() == self.batch;
        let mut recorder = device.record();
        let Some(stage) = self.stages.get_mut(&at) else { return Ok(None) };
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
        let last = stage.forward_out.is_none();
        self.submit(recorder, "grow", EventKind::Forward, None, 0.0, started).await;
        copies.into_iter().for_each(Recorded::submitted);
        device.check("decoding")?;
        match output.filter(|_| last) {
            Some(range) => Ok(Some(device.read_f32(&range).await?)),
            None => Ok(None),
        }
    }
}

fn wrong_size(name: &str, got: usize, want: usize) -> Error {
    Error::Shape { op: "decode", message: format!("{got} {name}, the program takes {want}") }
}
