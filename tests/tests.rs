//! Every integration test in one binary: wgpu is linked once.
#![allow(missing_docs, reason = "tests document themselves by name")]

// What tests share: adapters, tolerances, golden data.
mod common;
// Checkpoints: complete or absent, damage named.
mod checkpoint;
// Text, batches, order.
mod data;
// Ten steps of a GPT-2 against PyTorch in float64.
mod golden;
// Schedules as properties, no GPU.
mod schedules;
// Pictures and traces.
mod timeline;
