//! Compiled kernels that outlast the program, where wgpu keeps them: with Vulkan.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::Device;

/// Takes what was compiled away.
type Keep = Box<dyn Fn(&[u8]) + Send + Sync>;

/// What wgpu has compiled on a device, and who takes it away.
pub(super) struct Pipelines {
    cache: wgpu::PipelineCache,
    keep: Keep,
    /// Whether something was compiled since.
    is_more: AtomicBool,
    /// Bytes of what is kept: pipelines are only ever added.
    bytes: AtomicUsize,
}

impl Device {
    /// From now on compiles no kernel that is in `kept`, and hands all of them to `keep` in [`Device::compiled`], if there are more.
    /// Does nothing where kernels cannot be kept.
    ///
    /// # Safety
    /// What is `kept` came from `keep` on this adapter: drivers may trust it. Of another driver it may be; it then counts as nothing.
    pub unsafe fn keep_kernels(&self, kept: Option<&[u8]>, keep: impl Fn(&[u8]) + Send + Sync + 'static) {
        if !self.raw().features().contains(wgpu::Features::PIPELINE_CACHE) {
            return;
        }
        let descriptor = wgpu::PipelineCacheDescriptor { label: None, data: kept, fallback: true };
        // SAFETY: the caller's promise.
        let cache = unsafe { self.raw().create_pipeline_cache(&descriptor) };
        self.pipelines().get_or_init(|| Pipelines {
            cache,
            keep: Box::new(keep),
            is_more: AtomicBool::new(false),
            bytes: AtomicUsize::new(kept.map_or(0, <[u8]>::len)),
        });
    }
}

impl Pipelines {
    /// For a pipeline that is about to be made.
    pub(super) fn cache(&self) -> &wgpu::PipelineCache {
        self.is_more.store(true, Ordering::Relaxed);
        &self.cache
    }

    /// Hands over what there is, if it is more than before.
    pub(super) fn hand_over(&self) {
        if self.is_more.swap(false, Ordering::Relaxed)
            && let Some(data) = self.cache.get_data()
            && self.bytes.swap(data.len(), Ordering::Relaxed) != data.len()
        {
            (self.keep)(&data);
        }
    }
}
