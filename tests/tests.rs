//! Every integration test in one binary: wgpu is linked once.
#![allow(missing_docs, reason = "tests document themselves by name")]

// What tests share: adapters, tolerances, golden data.
mod common;
// Ten steps in headless Chromium against the same steps here.
mod browser;
// Checkpoints: complete or absent, damage named.
mod checkpoint;
// The program as a user runs it.
mod cli;
// Text, batches, order.
mod data;
// Records, tokenised text, token files.
mod records;
// Model folders.
mod folder;
// LoRA adapters.
mod adapter;
// Ten steps of a GPT-2 against PyTorch in float64.
mod golden;
// Gradients against finite differences, no GPU.
mod gradients;
// Shapes, the split into I and W, memory plans: properties, no GPU.
mod graph;
// Every kernel variant against the reference, on every adapter.
mod kernels;
// Schedules as properties, no GPU.
mod schedules;
// Shader texts and their variants by naga, no GPU.
mod shaders;
// Tokenizers and chat templates.
mod text;
// Pictures and traces.
mod timeline;
// p stages against one, unlike adapters, resuming.
mod pipeline;
