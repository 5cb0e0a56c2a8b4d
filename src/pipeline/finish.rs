//! The end of a step on one device: tied gradients, sums of squares, losses, and the optimizer.

use super::link::Outgoing;
use super::log::State;
use super::rank::{Rank, StepPart};
use crate::error::Result;
use crate::gpu::now;
use crate::ops::parameters::AdamStep;
use crate::timeline::What;

impl Rank {
    /// After the last action: exchanges tied gradients, sums squares, reads losses back.
    pub(super) async fn finish_step(&mut self) -> Result<StepPart> {
        let device = self.device.clone();
        self.exchange_gradients().await?;
        self.log.state(State::Working(What::Norm));
        let started = now();
        let mut recorder = device.record();
        self.parameters.record_fold(&mut recorder);
        let sums = self.parameters.record_norm(&mut recorder)?;
        if sums.bytes > 0 {
            recorder.copy(&sums.buffer, 0, &self.sums, 0, sums.bytes);
        }
        if let Some((losses, staging)) = &self.losses {
            recorder.copy(losses, 0, staging, 0, losses.bytes());
        }
        self.submit(recorder, What::Norm, 0.0, started).await;
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
        self.submit(recorder, What::Update, 0.0, started).await;
        self.exchange_weights().await?;
        device.check("updating weights")
    }
}
