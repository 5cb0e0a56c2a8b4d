//! Training: the experiment file, data, optimiser, checkpoints and the loop's body.

pub mod checkpoint;
pub mod config;
pub mod data;
pub mod optimizer;
pub mod trainer;
