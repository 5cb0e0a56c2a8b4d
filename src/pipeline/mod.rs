//! The only place where models, schedules and devices meet.
//!
//! A [`Setup`] says which layers run where and in which schedule. [`Plan::new`] turns it into graphs and memory plans
//! and refuses what does not fit, before anything is allocated. [`Executor::launch`] allocates, starts one rank a
//! device and drives them through messages; each rank runs its list of actions over its stages and links.

mod advice;
mod batch;
mod compute;
mod courier;
mod decode;
mod exchange;
mod executor;
mod finish;
mod fit;
mod forward;
mod gang;
mod host;
mod launch;
pub mod link;
mod load;
mod log;
pub mod owners;
mod pace;
mod partition;
mod plan;
mod rank;
mod store;
pub(crate) mod update;
mod watch;
mod wire;
pub mod workload;

pub use batch::{Batch, IGNORE};
pub use decode::Grow;
pub use executor::{Executor, StepReport};
pub use plan::{Plan, RankPlan, Setup, Use};
pub use watch::Watch;
