//! Every integration test in one binary: wgpu is linked once.
#![allow(missing_docs, reason = "tests document themselves by name")]

// What tests share: adapters, tolerances, golden data.
mod common;
// Graphs in f64, by the definitions of their ops.
mod oracle;
// Matrix products whose operands are in f16, and the scale of the loss.
mod f16;
// Ten steps in headless Chromium against the same steps here.
mod browser;
// What the page does with the engine, without a browser.
mod demo;
// Checkpoints: complete or absent, damage named.
mod checkpoint;
// Files that change while they are in use.
mod changed;
// What must stay absent from the code.
mod invariants;
// Replicas of stages on several devices.
mod replicas;
// Devices that divide every layer.
mod gang;
// Levels of ZeRO, sums by microbatch, the host.s memory.
mod sharding;
// Whole checkpoints in memory.
mod contents;
// The program as a user runs it.
mod cli;
// Predicted and measured steps side by side, no GPU.
mod comparison;
// What `trace` advises, no GPU.
mod advice;
// Text, batches, order.
mod data;
// Records, tokenised text, token files.
mod records;
// Model folders.
mod folder;
// LoRA adapters on disk.
mod adapter;
// LoRA in training and inference against PEFT, merged and exported models.
mod lora;
// Ten steps of a GPT-2 against PyTorch in float64.
mod golden;
// Models that exist, trained on.
mod finetune;
// Gradients against finite differences, no GPU.
mod gradients;
// Models divided among the members of a gang, no GPU.
mod tensor;
// Links by themselves, and over a wire of bf16.
mod link;
mod wire;
// Shapes, the split into I and W, memory plans: properties, no GPU.
mod graph;
// Plans of runs that go on, no GPU.
mod keep;
// What the shader compilers of four vendors say, no GPU.
mod isa;
// Every kernel variant against the reference, on every adapter.
mod kernels;
// Plans for machines that are not there, as a user asks for them, no GPU.
mod planning;
// Machine files, the search for plans, what is said about them, no GPU.
mod plan;
// Schedules as properties, no GPU.
mod schedules;
// Shader texts and their variants by naga, no GPU.
mod shaders;
// The verbs generate and chat on a model with a tokenizer.
mod speaking;
// Tokenizers and chat templates that do harm, in a process of their own.
mod containment;
// Tokenizers and chat templates.
mod text;
// The script that installs what `make` needs.
mod setup;
// The pages in docs/ against the code.
mod docs;
// Pictures and traces.
mod timeline;
// The picture of a run's losses.
mod curve;
// The verb trace, on a run and on damaged folders.
mod trace;
// p stages against one, unlike adapters, resuming.
mod pipeline;
// Hugging Face's config.json, in and out.
mod configs;
// Weights packed as bf16, in training and in generation.
mod packed;
// Every architecture against transformers; decoding with caches.
mod models;
// Texts with and without caches, one and many, over one and two devices.
mod generation;
// Going on with runs that were damaged, or that no longer have what they began with.
mod resume;
// Steps against their prediction, and moving in mid-run.
mod replan;
// Profiles in the cache, and what runs make of them.
mod profiles;
