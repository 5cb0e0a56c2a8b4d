//! A trainer's state in the host's memory, to go on with on other devices.

use super::loss_scale::LossScale;
use super::trainer::Trainer;
use crate::error::Result;
use crate::ops::parameters::Part;

/// What the state consists of.
const PARTS: [Part; 3] = [Part::Weight, Part::First, Part::Second];

/// The state after a step: weights and what the optimizer keeps, whatever devices they are on.
#[derive(Clone, Debug)]
pub struct Snapshot {
    step: u64,
    scale: LossScale,
    /// By parameter, weight and both moments.
    tensors: Vec<(String, [Vec<f32>; 3])>,
}

impl Trainer {
    /// Copies the state.
    ///
    /// # Errors
    /// Those of a device.
    pub async fn snapshot(&mut self) -> Result<Snapshot> {
        let mut tensors = Vec::new();
        for name in self.trained().into_iter().map(|p| p.name) {
            let mut parts: [Vec<f32>; 3] = Default::default();
            for (of, part) in parts.iter_mut().zip(PARTS) {
                *of = self.executor.read(&name, part).await?;
            }
            tensors.push((name, parts));
        }
        Ok(Snapshot { step: self.step, scale: self.scale, tensors })
    }

    /// Goes on from such a state of the same model.
    ///
    /// # Errors
    /// Those of a device, and of a parameter that the model does not have.
    pub async fn take_up(&mut self, snapshot: &Snapshot) -> Result<()> {
        for (name, parts) in &snapshot.tensors {
            for (values, part) in parts.iter().zip(PARTS) {
                self.executor.write(name, part, values).await?;
            }
        }
        (self.step, self.since, self.scale) = (snapshot.step, snapshot.step, snapshot.scale);
        Ok(())
    }
}
