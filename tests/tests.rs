//! Every integration test in one binary: wgpu is linked once.
#![allow(missing_docs, reason = "tests document themselves by name")]

// What tests share: adapters, tolerances, golden data.
mod common;
// Ten steps in headless Chromium against the same steps here.
mod browser;
// Checkpoints: complete or absent, damage named.
mod checkpoint;
// Text, batches, order.
mod data;
// Ten steps of a GPT-2 against PyTorch in float64.
mod golden;
// Every kernel variant against the reference, on every adapter.
mod kernels;
// Schedules as properties, no GPU.
mod schedules;
// Pictures and traces.
mod timeline;
