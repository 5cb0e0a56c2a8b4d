//! Training: the experiment file, data, optimiser, checkpoints and the loop's body.

#[cfg(not(target_arch = "wasm32"))]
pub mod advice;
pub mod checkpoint;
pub mod compute;
pub mod config;
#[cfg(not(target_arch = "wasm32"))]
pub mod curve;
pub mod data;
pub mod evaluate;
#[cfg(not(target_arch = "wasm32"))]
pub mod export;
#[cfg(not(target_arch = "wasm32"))]
pub mod keep;
#[cfg(not(target_arch = "wasm32"))]
pub mod lessons;
pub mod loss_scale;
#[cfg(not(target_arch = "wasm32"))]
pub mod metrics;
pub mod optimizer;
pub mod planning;
#[cfg(not(target_arch = "wasm32"))]
pub mod prove;
#[cfg(not(target_arch = "wasm32"))]
pub mod replan;
#[cfg(not(target_arch = "wasm32"))]
pub mod resume;
#[cfg(not(target_arch = "wasm32"))]
pub mod run;
pub mod snapshot;
#[cfg(not(target_arch = "wasm32"))]
pub mod source;
#[cfg(not(target_arch = "wasm32"))]
mod state;
pub mod trainer;
