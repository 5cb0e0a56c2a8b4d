//! Parameters between host and device, whatever they are stored as.

use super::{Home, Parameters, Part};
use crate::error::{Error, Result};
use crate::gpu::{Device, Range};
use crate::graph::DType;
use crate::ops::packed::{halves, round, widen, words};

/// The part of a range of 32-bit words.
fn part_of(range: &Range, words: std::ops::Range<usize>) -> Range {
    range.buffer.range(range.offset + 4 * words.start as u64, 4 * words.len() as u64)
}

impl Home {
    /// Where it lies in this type, and which elements of it.
    ///
    /// # Errors
    /// Where none does.
    pub fn held_as(self, dtype: DType) -> Result<(Range, std::ops::Range<usize>)> {
        let held = if dtype == DType::BF16 { self.packed } else { self.full };
        let message = || format!("is not held as {dtype:?} on this device");
        held.ok_or_else(|| Error::Shape { op: "parameter", message: message() })
    }
}

impl Parameters {
    /// Overwrites elements of part of a parameter, from number `first` on, as far as they are on this device; a weight both in
    /// f32 and packed where it is stored so. The device has them before its next submission.
    ///
    /// # Errors
    /// A parameter that is not on this device; those of the device.
    pub async fn write(
        &self,
        device: &Device,
        name: &str,
        part: Part,
        first: usize,
        values: &[f32],
    ) -> Result<()> {
        let home = self.part(name, part)?;
        if let Some((range, held)) = home.full {
            let (start, end) = (first.max(held.start), (first + values.len()).min(held.end));
            if start < end {
                let offset = range.offset + 4 * (start - held.start) as u64;
                let values = &values[start - first..end - first];
                device.upload(&range.buffer, offset, bytemuck::cast_slice(values));
            }
        }
        if let Some((range, held)) = home.packed {
            let (start, end) = (first.max(held.start), (first + values.len()).min(held.end));
            if start < end {
                let values = &values[start - first..end - first];
                let halves: Vec<u16> = values.iter().map(|&value| round(value)).collect();
                write_packed(device, &range, start - held.start, &halves).await?;
            }
        }
        Ok(())
    }

    /// Elements of part of a parameter, from number `first` on; of a weight with a master here, the master's.
    ///
    /// # Errors
    /// As [`Parameters::write`].
    pub async fn read(
        &self,
        device: &Device,
        name: &str,
        part: Part,
        first: usize,
        count: usize,
    ) -> Result<Vec<f32>> {
        let home = self.part(name, part)?;
        let within = |held: &std::ops::Range<usize>| held.start <= first && first + count <= held.end;
        if let Some((range, held)) = home.full.as_ref().filter(|full| within(&full.1)) {
            let first = first - held.start;
            return device.read_f32(&part_of(range, first..first + count)).await;
        }
        let (range, held) = home.held_as(DType::BF16)?;
        let first = first - held.start;
        let halves = read_packed(device, &range, first / 2..(first + count).div_ceil(2)).await?;
        Ok(halves[first % 2..][..count].iter().map(|&half| widen(half)).collect())
    }
}

async fn read_packed(device: &Device, range: &Range, which: std::ops::Range<usize>) -> Result<Vec<u16>> {
    let words: Vec<u32> = bytemuck::pod_collect_to_vec(&device.read(&part_of(range, which)).await?);
    Ok(halves(&words))
}

/// Uploads whole words; of one that is shared with a neighbour, the neighbour's half is what it was.
async fn write_packed(device: &Device, range: &Range, first: usize, new: &[u16]) -> Result<()> {
    let end = first + new.len();
    let mut all = Vec::with_capacity(new.len() + 2);
    if first % 2 == 1 {
        all.push(read_packed(device, range, first / 2..first / 2 + 1).await?[0]);
    }
    all.extend_from_slice(new);
    if end % 2 == 1 {
        all.push(read_packed(device, range, end / 2..end / 2 + 1).await?[1]);
    }
    let to = part_of(range, first / 2..end.div_ceil(2));
    device.upload(&to.buffer, to.offset, bytemuck::cast_slice(&words(&all)));
    Ok(())
}
