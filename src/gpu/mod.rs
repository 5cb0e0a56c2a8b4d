//! Devices and how to use them: the only folder that names wgpu.
//!
//! An [`AdapterInfo`] describes what the machine has; a [`Device`] is an opened adapter with its own instance, so
//! that two devices share no lock and no driver thread pool. A [`Recorder`] collects dispatches and copies into one
//! submission. Nothing here knows ops or schedules.

mod adapter;
#[cfg(target_arch = "wasm32")]
mod browser;
mod buffer;
mod device;
mod kernel;
#[cfg(not(target_arch = "wasm32"))]
mod pipelines;
mod recorder;
mod state;

pub(crate) use adapter::imagined;
pub use adapter::{AdapterInfo, list, none_found};
pub use buffer::{BindGroup, Buffer, Mapping, Range};
#[cfg(not(target_arch = "wasm32"))]
pub use device::is_caught;
pub use device::{Capabilities, Device, OpenOptions, Tiles, Without};
pub use kernel::{KERNELS, Kernel, KernelKey, Specialisation, source};
pub use recorder::Recorder;

/// Seconds since the first call: one clock for the events of all devices.
pub fn now() -> f64 {
    #[cfg(not(target_arch = "wasm32"))]
    {
        // The one process-wide value: a clock's origin, so that times of different threads compare.
        static START: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
        START.get_or_init(std::time::Instant::now).elapsed().as_secs_f64()
    }
    #[cfg(target_arch = "wasm32")]
    {
        use wasm_bindgen::prelude::wasm_bindgen;

        // A global of pages and workers alike.
        #[wasm_bindgen]
        extern "C" {
            #[wasm_bindgen(js_namespace = performance, js_name = now)]
            fn milliseconds() -> f64;
        }
        milliseconds() / 1000.0
    }
}
