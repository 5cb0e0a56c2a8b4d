//! A parameter that two devices use: at the end of a step the user's gradient travels to the owner, which adds it to its
//! own, and after the update the new weight travels back, packed if it is stored so. Both travel in pieces, so that neither device needs room for a
//! second copy of what may be the largest parameter of the model.

use std::ops::Range;
use std::sync::Arc;

use super::link::{self, Incoming, Outgoing, Recorded, connect};
use super::log::State;
use super::plan::Exchanged;
use super::rank::Rank;
use crate::error::Result;
use crate::gpu::{self, BindGroup, Buffer, Kernel, KernelKey, Specialisation, now};
use crate::graph::DType;
use crate::model::Parameter;
use crate::schedule::{Action, Kind};
use crate::timeline::What;

/// Bytes that travel at a time.
const PIECE: u64 = 8 << 20;

/// The end of a tied pair that a rank holds.
pub(super) enum Tied {
    /// Uses the parameter of the stage: sends its gradient, receives the new weight.
    User { name: String, stage: usize, gradient: Outgoing, weight: Incoming },
    /// Owns it: adds the user's gradient, sends the new weight.
    Owner { name: String, gradient: Incoming, weight: Outgoing, add: Add },
}

impl Tied {
    /// Bytes sent so far.
    pub(super) fn sent(&self) -> u64 {
        match self {
            Tied::User { gradient, .. } => gradient.bytes,
            Tied::Owner { weight, .. } => weight.bytes,
        }
    }
}

/// Adds what has arrived to the gradient, piece by piece.
pub(super) struct Add {
    arrived: Buffer,
    kernel: Arc<Kernel>,
    pieces: Vec<(BindGroup, [u32; 3])>,
}

fn pieces(bytes: u64) -> impl Iterator<Item = Range<u64>> {
    (0..bytes).step_by(PIECE as usize).map(move |start| start..bytes.min(start + PIECE))
}

/// Buffers of a link: while one piece travels the next is on its way.
fn slots(bytes: u64) -> usize {
    pieces(bytes).take(2).count()
}

/// Bytes that a tie of a parameter takes on the user's and on the owner's device.
pub(super) fn memory(parameter: &Parameter) -> [u64; 2] {
    let bytes = DType::F32.bytes(parameter.len());
    let link = |bytes: u64| link::memory(bytes.min(PIECE), slots(bytes));
    let links = link(bytes) + link(parameter.weight_bytes());
    [links, links + bytes.min(PIECE) + 16 * pieces(bytes).count() as u64]
}

/// Connects a parameter's user with its owner on another device.
pub(super) fn tie(ranks: &mut [Rank], parameter: Exchanged) -> Result<()> {
    let Exchanged { name, owner, user, home, stage } = parameter;
    let bytes = ranks[user].parameters.gradient(&name)?.bytes;
    let weight = ranks[user].parameters.weight(&name)?.bytes;
    let (user_device, device) = (ranks[user].device.clone(), ranks[home].device.clone());
    let (gradient_out, gradient_in) = connect(&user_device, &device, bytes.min(PIECE), slots(bytes))?;
    let (weight_out, weight_in) = connect(&device, &user_device, weight.min(PIECE), slots(weight))?;
    ranks[user].tied.push(Tied::User { name, stage, gradient: gradient_out, weight: weight_in });
    let arrived = device.buffer("tied gradient", bytes.min(PIECE))?;
    let kernel =
        device.kernel(&KernelKey { name: "accumulate", specialisation: Specialisation::default() })?;
    let gradient = ranks[home].parameters.gradient(&owner)?;
    let pieces = pieces(bytes).map(|piece| {
        let (at, bytes) = (gradient.offset + piece.start, piece.end - piece.start);
        let elements = (bytes / 4) as usize;
        let uniform = device.uniform("tied gradient", bytemuck::cast_slice(&[1, elements as u32]))?;
        let ranges = [uniform.whole(), arrived.range(0, bytes), gradient.buffer.range(at, bytes)];
        let groups = crate::ops::spread(elements.div_ceil(64), device.capabilities());
        Ok((device.bind(&kernel, &ranges), groups))
    });
    let add = Add { pieces: pieces.collect::<Result<_>>()?, arrived, kernel };
    ranks[home].tied.push(Tied::Owner { name: owner, gradient: gradient_in, weight: weight_out, add });
    Ok(())
}

impl Rank {
    /// R: sends the gradients of what this rank uses of a stage.
    pub(super) async fn send_gradients(&mut self, of: usize) -> Result<()> {
        let mut ties = std::mem::take(&mut self.tied);
        for tied in &mut ties {
            if let Tied::User { name, stage, gradient, .. } = tied
                && *stage == of
            {
                let from = self.parameters.gradient(name)?;
                self.send_pieces(gradient, &from, What::Action(Action::of_stage(of, Kind::R))).await?;
            }
        }
        self.tied = ties;
        Ok(())
    }

    /// Adds the gradients that others have of what this rank owns.
    pub(super) async fn receive_gradients(&mut self) -> Result<()> {
        let mut ties = std::mem::take(&mut self.tied);
        for tied in &mut ties {
            if let Tied::Owner { name, gradient, add, .. } = tied {
                let bytes = self.parameters.gradient(name)?.bytes;
                for (tag, (piece, (group, groups))) in pieces(bytes).zip(&add.pieces).enumerate() {
                    let to = add.arrived.range(0, piece.end - piece.start);
                    let after = Some((&*add.kernel, group, *groups));
                    self.receive_piece(gradient, &to, tag, What::NORM, after).await?;
                }
            }
        }
        self.tied = ties;
        Ok(())
    }

    /// Sends the weights that this rank owns to who uses them.
    pub(super) async fn send_weights(&mut self) -> Result<()> {
        let mut ties = std::mem::take(&mut self.tied);
        for tied in &mut ties {
            if let Tied::Owner { name, weight, .. } = tied {
                let from = self.parameters.weight(name)?;
                self.send_pieces(weight, &from, What::UPDATE).await?;
            }
        }
        self.tied = ties;
        Ok(())
    }

    /// G: receives the weights that this rank uses of a stage.
    pub(super) async fn receive_weights(&mut self, of: usize) -> Result<()> {
        let mut ties = std::mem::take(&mut self.tied);
        for tied in &mut ties {
            if let Tied::User { name, stage, weight, .. } = tied
                && *stage == of
            {
                let to = self.parameters.weight(name)?;
                for (tag, piece) in pieces(to.bytes).enumerate() {
                    let to = to.buffer.range(to.offset + piece.start, piece.end - piece.start);
                    self.receive_piece(weight, &to, tag, What::Action(Action::of_stage(of, Kind::G)), None)
                        .await?;
                }
            }
        }
        self.tied = ties;
        Ok(())
    }

    async fn send_pieces(&self, link: &mut Outgoing, from: &gpu::Range, what: What) -> Result<()> {
        for (tag, piece) in pieces(from.bytes).enumerate() {
            let from = from.buffer.range(from.offset + piece.start, piece.end - piece.start);
            let mut recorder = self.device.record();
            let recorded = link.record(&mut recorder, &from, self.tag(tag)).await?;
            self.submit(recorder, what, 0.0, now()).await;
            recorded.submitted();
        }
        Ok(())
    }

    async fn receive_piece(
        &self,
        link: &mut Incoming,
        to: &gpu::Range,
        tag: usize,
        what: What,
        after: Option<(&Kernel, &BindGroup, [u32; 3])>,
    ) -> Result<()> {
        self.log.state(State::Waiting(what));
        let mut recorder = self.device.record();
        let (recorded, copy): (Recorded, _) = link.record(&mut recorder, to, self.tag(tag)).await?;
        self.log.state(State::Working(what));
        self.log.copied(what, copy);
        if let Some((kernel, group, groups)) = after {
            recorder.dispatch(kernel, group, groups);
        }
        self.submit(recorder, what, 0.0, now()).await;
        recorded.submitted();
        Ok(())
    }

    /// No two pieces that can be on their way together have the same number.
    fn tag(&self, piece: usize) -> usize {
        self.steps.wrapping_mul(1 << 12).wrapping_add(piece)
    }
}
