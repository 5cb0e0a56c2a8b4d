//! The end of a step on one device: tied gradients, sums of squares, losses, and the optimizer.

use std::sync::Arc;

use super::link::{Incoming, Outgoing, Recorded};
use super::log::State;
use super::rank::{Rank, StepPart};
use super::timeline::EventKind;
use crate::error::Result;
use crate::gpu::{BindGroup, Buffer, Kernel, now};
use crate::ops::parameters::AdamStep;

/// The end of a tied pair that this rank holds.
pub(super) enum Tied {
    /// Uses the parameter: sends its gradient, receives the new weight.
    User { name: String, gradient: Outgoing, weight: Incoming },
    /// Owns it: adds the user's gradient, sends the new weight.
    Owner {
        name: String,
        gradient: Incoming,
        weight: Outgoing,
        sum: Buffer,
        add: (Arc<Kernel>, BindGroup, [u32; 3]),
    },
}

impl Rank {
    /// After the last action: exchanges tied gradients, sums squares, reads losses back.
    pub(super) async fn finish_step(&mut self) -> Result<StepPart> {
        let device = self.device.clone();
        let mut recorder = device.record();
        let mut copies = Vec::new();
        for tied in &mut self.tied {
            match tied {
                Tied::User { name, gradient, .. } => {
                    let from = self.parameters.gradient(name)?;
                    copies.push(gradient.record(&mut recorder, &from, self.steps).await?);
                }
                Tied::Owner { name, gradient, sum, add, .. } => {
                    self.log.state(State::Waiting, format!("gradient of {name}"));
                    let (recorded, copy) = gradient.record(&mut recorder, &sum.whole(), self.steps).await?;
                    if let Some(c) = copy {
                        self.log.host("tied gradient", EventKind::Copy, c.start, c.end, c.bytes);
                    }
                    recorder.dispatch(&add.0, &add.1, add.2);
                    copies.push(recorded);
                }
            }
        }
        self.log.state(State::Working, "norm");
        let started = now();
        self.parameters.record_fold(&mut recorder);
        let sums = self.parameters.record_norm(&mut recorder)?;
        if sums.bytes > 0 {
            recorder.copy(&sums.buffer, 0, &self.sums, 0, sums.bytes);
        }
        if let Some((losses, staging)) = &self.losses {
            recorder.copy(losses, 0, staging, 0, losses.bytes());
        }
        self.submit(recorder, "norm", EventKind::Optimizer, None, 0.0, started).await;
        copies.into_iter().for_each(Recorded::submitted);
        let squares = if sums.bytes > 0 {
            let bytes = device.read_staging(&self.sums, sums.bytes).await?;
            self.parameters.squares(&bytemuck::pod_collect_to_vec(&bytes))
        } else {
            Vec::new()
        };
        let losses = self.read_losses().await?;
        // Ranks without a read-back report once their work is done, so that their events are complete.
        device.below(1).await;
        device.check("running the step")?;
        let sent = |o: &Option<Outgoing>| o.as_ref().map_or(0, |o| o.bytes);
        let bytes = self.stages.values().map(|s| sent(&s.forward_out) + sent(&s.backward_out)).sum();
        Ok(StepPart { losses, squares, events: self.log.take_events(), bytes })
    }

    /// AdamW on what it owns; tied users receive the new weight.
    pub(super) async fn update(&mut self, step: AdamStep) -> Result<()> {
        let device = self.device.clone();
        let started = now();
        let mut recorder = device.record();
        self.parameters.record_adam(&device, &mut recorder, step)?;
        let mut sent = Vec::new();
        for tied in &mut self.tied {
            if let Tied::Owner { name, weight, .. } = tied {
                let from = self.parameters.weight(name)?;
                sent.push(weight.record(&mut recorder, &from, self.steps).await?);
            }
        }
        self.submit(recorder, "step", EventKind::Optimizer, None, 0.0, started).await;
        sent.into_iter().for_each(Recorded::submitted);
        for tied in &mut self.tied {
            if let Tied::User { name, weight, .. } = tied {
                let to = self.parameters.weight(name)?;
                let mut recorder = device.record();
                self.log.state(State::Waiting, format!("weight of {name}"));
                let (recorded, copy) = weight.record(&mut recorder, &to, self.steps).await?;
                if let Some(c) = copy {
                    self.log.host("tied weight", EventKind::Copy, c.start, c.end, c.bytes);
                }
                self.log.submitted("tied weight", EventKind::Optimizer, None, 0.0);
                let log = self.log.clone();
                recorder.submit(move || log.finished());
                recorded.submitted();
            }
        }
        device.check("updating weights")
    }
}
