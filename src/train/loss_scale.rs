//! What gradients are taken times while they are in f16, whose smallest number is 2^-24: as large as they bear. (Micikevicius et al.
//! 2018, arXiv 1710.03740; rise and fall as in PyTorch's GradScaler.)

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The first scale.
const FIRST: f64 = 65_536.0;
/// Good steps in a row after which it is doubled.
const PATIENCE: u64 = 2000;
/// The highest one.
const MOST: f64 = 4_294_967_296.0;

/// A power of 2 that halves when a step's gradient is not finite, and doubles when many in a row are.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossScale {
    scale: f64,
    /// Good steps since it last changed.
    good: u64,
    /// Steps that were skipped.
    skipped: u64,
}

impl Default for LossScale {
    fn default() -> Self {
        LossScale { scale: FIRST, good: 0, skipped: 0 }
    }
}

impl LossScale {
    /// As it was written; none for what cannot be one.
    pub fn read(value: &serde_json::Value) -> Option<LossScale> {
        let read = LossScale::deserialize(value).ok()?;
        let is_power = read.scale.log2().fract() == 0.0;
        (is_power && (1.0..=MOST).contains(&read.scale)).then_some(read)
    }

    /// The scale.
    pub fn get(&self) -> f64 {
        self.scale
    }

    /// Steps that were skipped because of their gradients.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Hears of a step whose gradient was finite.
    pub fn good(&mut self) {
        self.good += 1;
        if self.good >= PATIENCE {
            (self.scale, self.good) = ((2.0 * self.scale).min(MOST), 0);
        }
    }

    /// Hears of one, with this number, whose gradient was not.
    ///
    /// # Errors
    /// [`Error::Diverged`] where the scale was 1, so that it is not to blame.
    pub fn bad(&mut self, step: u64) -> Result<()> {
        if self.scale <= 1.0 {
            let message = "the loss or its gradient is not finite in f16, whatever the loss scale; lower train.learning_rate, or \
                           compute in f32 (train.compute)";
            return Err(Error::Diverged { step, message: message.into() });
        }
        (self.scale, self.good, self.skipped) = (self.scale / 2.0, 0, self.skipped + 1);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_halves_at_once_doubles_after_many_good_steps_and_gives_up_at_1() {
        let mut scale = LossScale::default();
        scale.bad(1).unwrap();
        assert_eq!((scale.get(), scale.skipped()), (FIRST / 2.0, 1));
        (0..PATIENCE - 1).for_each(|_| scale.good());
        assert_eq!(scale.get(), FIRST / 2.0);
        scale.good();
        assert_eq!(scale.get(), FIRST);
        // One that is not good begins the count anew.
        (0..PATIENCE - 1).for_each(|_| scale.good());
        scale.bad(2).unwrap();
        scale.good();
        assert_eq!(scale.get(), FIRST / 2.0);
        while scale.get() > 1.0 {
            scale.bad(3).unwrap();
        }
        let error = scale.bad(4).unwrap_err();
        assert!(matches!(error, Error::Diverged { step: 4, .. }), "{error:?}");
    }

    #[test]
    fn what_is_read_back_is_a_scale_or_nothing() {
        let mut scale = LossScale::default();
        scale.bad(1).unwrap();
        let written = serde_json::to_value(scale).unwrap();
        assert_eq!(LossScale::read(&written), Some(scale));
        for bad in [0.0, 3.0, -2.0, 1e300, 0.5] {
            let mut written = written.clone();
            written["scale"] = bad.into();
            assert_eq!(LossScale::read(&written), None, "{bad}");
        }
        assert_eq!(LossScale::read(&serde_json::Value::Null), None);
    }
}
