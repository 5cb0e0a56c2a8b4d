//! Polystage trains one neural network across every GPU in a machine, whatever its vendor.
//!
//! The way through the house, in the order of the modules below: a model is a list of [`model`] layers; a contiguous
//! run of layers becomes a [`graph`] for one stage, and its autodiff splits the backward pass into I and W; [`ops`]
//! compiles each graph into a program, a list of dispatches over planned buffers on one [`gpu`] device; a
//! [`schedule`] says for every device which action comes when, and [`plan`] which one a machine should have;
//! [`pipeline`] runs the schedule over stages and the links between them, and what every device did becomes a
//! [`timeline`]; `profile` measures a machine by such runs; [`train`] and [`generate`] drive them. [`mod@reference`]
//! defines every op in f64.
//!
//! A module uses only what stands above it. The library never prints, and blocks only in wrappers that say so: its core
//! is async, and the same code drives native threads and a browser's event loop.

pub mod error;
pub mod layers;
pub mod mesh;
mod picture;
mod size;

pub mod gpu;
pub mod graph;
pub mod schedule;

pub mod model;
pub mod reference;

pub mod folder;

pub mod text;

pub mod ops;

pub mod plan;

pub mod timeline;

pub mod pipeline;

#[cfg(not(target_arch = "wasm32"))]
pub mod profile;

pub mod train;

pub mod generate;

pub mod demo;

#[cfg(feature = "cli")]
pub mod cli;
#[cfg(target_arch = "wasm32")]
pub mod web;

pub use error::{Error, Result};
