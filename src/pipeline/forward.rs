//! Forward passes alone: losses and logits of whole sequences.

use super::batch::Batch;
use super::pace::Work;
use super::rank::Rank;
use crate::error::Result;
use crate::gpu::now;
use crate::ops::program::Slots;
use crate::schedule::Kind;
use crate::timeline::What;

impl Rank {
    /// The forward actions alone. Where the schedule has backward actions between them a send may have to wait for the
    /// receiver; it does not wait for ever, because the schedule itself is an order in which no ring overflows.
    async fn run_forward(&mut self, batch: &Batch) -> Result<()> {
        let mut actions = self.actions.clone();
        actions.retain(|action| action.kind == Kind::F);
        self.order(actions.iter().copied())?;
        for action in actions {
            self.compute(action, batch).await?;
        }
        Ok(())
    }

    /// Forward only; the last stage answers the loss of every row.
    pub(super) async fn evaluate(&mut self, batch: &Batch) -> Result<Vec<f32>> {
        self.run_forward(batch).await?;
        let losses = match &self.losses {
            None => Vec::new(),
            Some((losses, staging)) => {
                let started = now();
                let mut recorder = self.device.record();
                recorder.copy(losses, 0, staging, 0, losses.bytes());
                self.submit(recorder, What::Losses, Work::default(), started).await;
                self.read_losses().await?
            }
        };
        self.device.below(1).await;
        self.log.take_events();
        self.device.check("evaluating")?;
        Ok(losses)
    }

    /// The loss of every row of the rank's microbatches, one after another, that a finished submission has copied; on the last
    /// stage.
    pub(super) async fn read_losses(&self) -> Result<Vec<f32>> {
        let Some((losses, staging)) = &self.losses else { return Ok(Vec::new()) };
        let all: Vec<f32> =
            bytemuck::pod_collect_to_vec(&self.device.read_staging(staging, losses.bytes()).await?);
        let (rows, last) = (self.batch * self.sequence, self.placement.stages() - 1);
        let own = all.chunks(rows).enumerate().filter(|(m, _)| self.placement.rank(last, *m) == self.list);
        Ok(own.flat_map(|(_, losses)| losses).copied().collect())
    }

    /// Forward only; the last stage answers the logits of the given rows.
    pub(super) async fn infer(&mut self, batch: &Batch, rows: &[usize]) -> Result<Vec<f32>> {
        self.run_forward(batch).await?;
        self.log.take_events();
        let mut logits = Vec::new();
        for stage in self.stages.values() {
            if stage.ends.forward_out.is_empty()
                && let Some(output) = stage.program.stage().output
            {
                let range = stage.program.range(&self.parameters, output, Slots { stash: 0, gradient: 0 })?;
                let width = 4 * self.vocabulary.len() as u64;
                for &row in rows {
                    let part = range.buffer.range(range.offset + row as u64 * width, width);
                    logits.extend(self.device.read_f32(&part).await?);
                }
            }
        }
        Ok(logits)
    }
}
