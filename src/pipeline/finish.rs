//! What a rank does once a step: the actions that begin and end it, and what it answers.

use super::gang::Gang;
use super::host::HostLink;
use super::log::State;
use super::pace::Work;
use super::rank::{Rank, StepPart};
use crate::error::Result;
use crate::gpu::now;
use crate::ops::parameters::AdamStep;
use crate::timeline::What;

impl Rank {
    /// C: sets all gradients to zero.
    pub(super) async fn clear(&mut self) -> Result<()> {
        self.folded = false;
        let device = self.device.clone();
        let started = now();
        let mut recorder = device.record();
        if !self.host.as_ref().is_some_and(HostLink::streams_gradients) {
            self.parameters.record_clear(&mut recorder);
        }
        self.submit(recorder, What::CLEAR, Work::default(), started).await;
        Ok(())
    }

    /// Adds the gradients of aliases to their owners'.
    pub(super) async fn fold(&mut self) -> Result<()> {
        let device = self.device.clone();
        let started = now();
        let mut recorder = device.record();
        self.parameters.record_fold(&mut recorder);
        self.folded = true;
        self.submit(recorder, What::NORM, Work::default(), started).await;
        Ok(())
    }

    /// N: sums the squares of the gradients that the rank owns, once those of others are added. Losses are read back with
    /// the sums.
    pub(super) async fn norm(&mut self) -> Result<()> {
        let device = self.device.clone();
        match self.host.is_some() {
            true => self.exchange_through_host().await?,
            false => self.exchange_gradients().await?,
        }
        self.log.state(State::Working(What::NORM));
        let started = now();
        let mut recorder = device.record();
        if !self.folded {
            self.parameters.record_fold(&mut recorder);
        }
        let sums = self.parameters.record_norm(&mut recorder)?;
        if sums.bytes > 0 {
            recorder.copy(&sums.buffer, 0, &self.sums, 0, sums.bytes);
        }
        if let Some((losses, staging)) = &self.losses {
            recorder.copy(losses, 0, staging, 0, losses.bytes());
        }
        self.submit(recorder, What::NORM, Work::default(), started).await;
        Ok(())
    }

    /// What a step gave, once all that it needs has been read back.
    pub(super) async fn report(&mut self) -> Result<StepPart> {
        let device = self.device.clone();
        let bytes = 4 * self.parameters.owned_chunks() as u64;
        let squares = if bytes > 0 {
            let sums = device.read_staging(&self.sums, bytes).await?;
            self.parameters.squares(&bytemuck::pod_collect_to_vec(&sums))
        } else {
            Vec::new()
        };
        let losses = self.read_losses().await?;
        // Ranks without a read-back report once their work is done, so that their events are complete.
        device.below(1).await;
        device.check("running the step")?;
        let host = self.host.as_ref().map_or(0, |host| host.bytes) + self.gang.as_ref().map_or(0, Gang::sent);
        let bytes =
            self.stages.values().map(|stage| stage.ends.sent()).sum::<u64>() + self.exchange.sent() + host;
        Ok(StepPart { losses, squares, events: self.log.take_events(), bytes })
    }

    /// U: AdamW on what the rank owns, which then goes to whoever has it too; what others own arrives.
    pub(super) async fn adam(&mut self, step: AdamStep) -> Result<()> {
        let device = self.device.clone();
        let started = now();
        let mut recorder = device.record();
        self.parameters.record_adam(&device, &mut recorder, step)?;
        self.submit(recorder, What::UPDATE, Work::default(), started).await;
        match self.host.is_some() {
            true => self.renew_weights().await,
            false => self.exchange_weights().await,
        }
    }

    /// Sends what has not left yet, and receives the sums of what the rank owns.
    async fn exchange_through_host(&mut self) -> Result<()> {
        if !self.folded && !self.host.as_ref().is_some_and(HostLink::streams_gradients) {
            self.fold().await?;
        }
        self.send_whole(None).await?;
        self.receive_sums().await
    }
}
