//! Buffers and parts of them.

use std::sync::Arc;

use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

use super::state::{Failure, Lease};
use crate::error::{Error, Result};

/// What a mapped buffer is mapped for; a buffer has one direction for life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// The host reads what the device copied in.
    Read,
    /// The host writes what the device copies out.
    Write,
}

/// Elements that the host adds at a time.
const SUMMED: usize = 4096;

/// A device buffer. Cloning clones the handle; its bytes leave the device's ledger with the last one.
#[derive(Clone, Debug)]
pub struct Buffer {
    pub(super) raw: wgpu::Buffer,
    bytes: u64,
    lease: Arc<Lease>,
}

impl Buffer {
    pub(super) fn new(raw: wgpu::Buffer, lease: Lease) -> Self {
        let bytes = raw.size();
        Buffer { raw, bytes, lease: Arc::new(lease) }
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether both are handles of one buffer.
    pub fn is(&self, other: &Buffer) -> bool {
        Arc::ptr_eq(&self.lease, &other.lease)
    }

    /// All of it.
    pub fn whole(&self) -> Range {
        Range { buffer: self.clone(), offset: 0, bytes: self.bytes }
    }

    /// `bytes` bytes from `offset`; to be bound, the offset must be a multiple of 256.
    pub fn range(&self, offset: u64, bytes: u64) -> Range {
        Range { buffer: self.clone(), offset, bytes }
    }

    /// Asks for the whole buffer to be mapped; `done` runs while the device is polled, in a browser from the event loop.
    /// What cannot be mapped is a failure of the device; `done` is dropped then.
    pub fn map(&self, mapping: Mapping, done: impl FnOnce() + wgpu::WasmNotSend + 'static) {
        let state = self.lease.state.clone();
        self.raw.slice(..).map_async(mode(mapping), move |result| match result {
            Ok(()) => done(),
            Err(_) => state.fail(Failure::Silent("a buffer could not be mapped")),
        });
    }

    /// Makes the buffer usable by the device again.
    pub fn unmap(&self) {
        self.raw.unmap();
    }

    /// Writes into a buffer that is mapped for writing, from byte `offset` on.
    pub fn write_mapped(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let slice = self.raw.slice(offset..offset + bytes.len() as u64);
        slice.get_mapped_range_mut().map_err(|e| self.unmapped(e))?.copy_from_slice(bytes);
        Ok(())
    }

    /// Gives `see` the first `bytes` of this buffer, mapped for reading.
    pub fn view<T>(&self, bytes: u64, see: impl FnOnce(&[u8]) -> T) -> Result<T> {
        Ok(see(&self.mapped(bytes)?))
    }

    /// Copies the first `bytes` of this buffer, mapped for reading, into `target`, mapped for writing.
    pub fn copy_mapped(&self, target: &Buffer, bytes: u64) -> Result<()> {
        target.mapped_mut(bytes)?.copy_from_slice(&self.mapped(bytes)?);
        Ok(())
    }

    /// Fills this buffer, mapped for writing, with the first bytes of others, mapped for reading: so many of each, one after
    /// another, and `bytes` in all.
    pub fn join_mapped<'a>(
        &self,
        parts: impl Iterator<Item = (&'a Buffer, usize)>,
        bytes: usize,
    ) -> Result<()> {
        let (mut to, mut at) = (self.mapped_mut(whole_words(bytes))?, 0);
        for (from, bytes) in parts {
            to.slice(at..at + bytes).copy_from_slice(&from.mapped(whole_words(bytes))?[..bytes]);
            at += bytes;
        }
        Ok(())
    }

    /// Fills this buffer, mapped for writing, with sums of these elements of others, mapped for reading: the sum over groups, in
    /// order, of the sum over each group's members, in order. All are f32, or bf16, the sums of which are taken in f32 and
    /// rounded to the nearest.
    pub fn sum_mapped(
        &self,
        groups: &[Vec<Buffer>],
        elements: std::ops::Range<usize>,
        bf16: bool,
    ) -> Result<()> {
        let size = if bf16 { 2 } else { 4 };
        let views = |group: &Vec<Buffer>| {
            group.iter().map(|of| of.mapped(whole_words(size * elements.end))).collect::<Result<Vec<_>>>()
        };
        let groups = groups.iter().map(views).collect::<Result<Vec<_>>>()?;
        let mut to = self.mapped_mut(whole_words(size * elements.len()))?;
        // In pieces that stay in a processor's cache: what is mapped for writing may be slow to read.
        let [mut total, mut sum, mut term] = [const { [0.0f32; SUMMED] }; 3];
        let mut rounded = [half::bf16::ZERO; SUMMED];
        for start in elements.clone().step_by(SUMMED) {
            let end = (start + SUMMED).min(elements.end);
            let count = end - start;
            for (g, group) in groups.iter().enumerate() {
                for (m, member) in group.iter().enumerate() {
                    let bytes = &member[size * start..size * end];
                    let values = match bf16 {
                        false => bytemuck::cast_slice(bytes),
                        true => {
                            let halves =
                                bytemuck::cast_slice::<u8, u16>(bytes).reinterpret_cast::<half::bf16>();
                            halves.convert_to_f32_slice(&mut term[..count]);
                            &term[..count]
                        }
                    };
                    match m {
                        0 => sum[..count].copy_from_slice(values),
                        _ => sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value),
                    }
                }
                match g {
                    0 => total[..count].copy_from_slice(&sum[..count]),
                    _ => total.iter_mut().zip(&sum[..count]).for_each(|(total, value)| *total += value),
                }
            }
            let at = size * (start - elements.start);
            let made = match bf16 {
                false => bytemuck::cast_slice::<f32, u8>(&total[..count]),
                true => {
                    rounded[..count].convert_from_f32_slice(&total[..count]);
                    bytemuck::cast_slice(rounded[..count].reinterpret_cast())
                }
            };
            to.slice(at..at + made.len()).copy_from_slice(made);
        }
        Ok(())
    }

    fn mapped(&self, bytes: u64) -> Result<wgpu::BufferView> {
        self.raw.slice(..bytes).get_mapped_range().map_err(|e| self.unmapped(e))
    }

    fn mapped_mut(&self, bytes: u64) -> Result<wgpu::BufferViewMut> {
        self.raw.slice(..bytes).get_mapped_range_mut().map_err(|e| self.unmapped(e))
    }

    /// Why there is nothing mapped: usually the device has failed.
    fn unmapped(&self, error: wgpu::MapRangeError) -> Error {
        self.lease.state.error_or("using a mapped buffer", Failure::Other(error.to_string()))
    }
}

/// What is mapped is whole words.
fn whole_words(bytes: usize) -> u64 {
    bytes.next_multiple_of(4) as u64
}

fn mode(mapping: Mapping) -> wgpu::MapMode {
    match mapping {
        Mapping::Read => wgpu::MapMode::Read,
        Mapping::Write => wgpu::MapMode::Write,
    }
}

/// Part of a buffer.
#[derive(Clone, Debug)]
pub struct Range {
    /// The buffer.
    pub buffer: Buffer,
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// Ranges bound for a kernel. The driver keeps their buffers as long as this lives, and so does the ledger.
#[derive(Clone, Debug)]
pub struct BindGroup {
    pub(super) raw: wgpu::BindGroup,
    pub(super) _buffers: Vec<Buffer>,
}

impl Range {
    /// Copies it out of a buffer that is mapped for reading.
    pub fn read_mapped(&self) -> Result<Vec<u8>> {
        let view = self.buffer.raw.slice(self.offset..self.offset + self.bytes).get_mapped_range();
        Ok(view.map_err(|e| self.buffer.unmapped(e))?.to_vec())
    }

    pub(super) fn binding(&self) -> wgpu::BindingResource<'_> {
        wgpu::BindingResource::Buffer(wgpu::BufferBinding {
            buffer: &self.buffer.raw,
            offset: self.offset,
            size: wgpu::BufferSize::new(self.bytes.next_multiple_of(4)),
        })
    }
}
