//! One submission: dispatches and copies in order.

use super::{BindGroup, Buffer, Device, Kernel, Range};

/// Collects work and submits it. Consecutive dispatches share a compute pass.
pub struct Recorder<'d> {
    device: &'d Device,
    encoder: wgpu::CommandEncoder,
    pass: Option<wgpu::ComputePass<'static>>,
}

impl<'d> Recorder<'d> {
    pub(super) fn new(device: &'d Device) -> Self {
        let encoder = device.raw().create_command_encoder(&Default::default());
        Recorder { device, encoder, pass: None }
    }

    /// Runs a kernel on workgroups `groups`.
    pub fn dispatch(&mut self, kernel: &Kernel, group: &BindGroup, groups: [u32; 3]) {
        if self.pass.is_none() {
            let pass = self.encoder.begin_compute_pass(&Default::default());
            self.pass = Some(pass.forget_lifetime());
        }
        if let Some(pass) = &mut self.pass {
            pass.set_pipeline(&kernel.pipeline);
            pass.set_bind_group(0, &group.raw, &[]);
            pass.dispatch_workgroups(groups[0], groups[1], groups[2]);
        }
    }

    /// Copies `bytes` bytes.
    pub fn copy(&mut self, from: &Buffer, from_offset: u64, to: &Buffer, to_offset: u64, bytes: u64) {
        self.pass = None;
        self.encoder.copy_buffer_to_buffer(&from.raw, from_offset, &to.raw, to_offset, bytes);
    }

    /// Fills a range with zeros.
    pub fn clear(&mut self, range: &Range) {
        self.pass = None;
        self.encoder.clear_buffer(&range.buffer.raw, range.offset, Some(range.bytes));
    }

    /// Hands the work to the device; `done` runs when it has finished, while the device is polled.
    pub fn submit(mut self, done: impl FnOnce() + Send + 'static) {
        self.pass = None;
        self.device.submit(self.encoder.finish(), done);
    }
}
