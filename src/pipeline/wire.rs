//! Rounding on a device of what travels at half of its bytes: a tensor's pieces come together in one buffer, which becomes words of
//! two bf16 each; where it arrives the same the other way round.

use std::sync::Arc;

use crate::error::Result;
use crate::gpu::{BindGroup, Buffer, Device, Kernel, KernelKey, Recorder, Specialisation};
use crate::mesh::Wire;

/// The buffers of one end of a link.
pub(super) struct Narrow {
    /// The tensor in f32, and as words.
    pub(super) wide: Buffer,
    pub(super) words: Buffer,
    kernel: Arc<Kernel>,
    group: BindGroup,
    device: Device,
}

impl Narrow {
    /// An end that sends tensors of up to `bytes`, or one that receives them; none where they travel as they are.
    pub(super) fn new(device: &Device, wire: Wire, bytes: u64, sends: bool) -> Result<Option<Narrow>> {
        if wire == Wire::F32 {
            return Ok(None);
        }
        let travelling = wire.travelling(bytes).max(16);
        let (wide, words) = (device.buffer("wide", 2 * travelling)?, device.buffer("words", travelling)?);
        let name = if sends { "pack" } else { "unpack" };
        let kernel = device.kernel(&KernelKey { name, specialisation: Specialisation::default() })?;
        let both = if sends { [wide.whole(), words.whole()] } else { [words.whole(), wide.whole()] };
        let group = device.bind(&kernel, &both);
        Ok(Some(Narrow { wide, words, kernel, group, device: device.clone() }))
    }

    /// Packs, or unpacks, a tensor of so many bytes.
    pub(super) fn record(&self, recorder: &mut Recorder<'_>, bytes: u64) {
        let words = Wire::BF16.travelling(bytes) / 4;
        let groups = crate::ops::spread(words.div_ceil(64) as usize, self.device.capabilities());
        recorder.dispatch(&self.kernel, &self.group, groups);
    }
}
