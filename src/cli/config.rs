//! `polystage config`.

use std::path::PathBuf;

use super::planning::read_config;
use super::print;
use crate::error::Result;
use crate::train::config::{Config, smallest};
use crate::train::source::describe;

/// Prints every key of a config with its default, its unit and what it means: a config to save and edit.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  polystage config > mine.toml\n  polystage config configs/tiny.toml --set train.steps=50\n  polystage config runs/tiny-1/config.toml\n\nThe same as a page: docs/config.md."
)]
pub(super) struct Arguments {
    /// Show the values of this file, and mark what differs from its default.
    config: Option<PathBuf>,
    /// Override a key; may be given several times.
    #[arg(long, value_name = "a.b=c")]
    set: Vec<String>,
}

pub(super) fn run(arguments: &Arguments) -> Result<u8> {
    let config = match &arguments.config {
        Some(path) => read_config(path, &arguments.set, describe)?,
        None => Config::parse(&smallest(), &arguments.set, "the smallest config")?,
    };
    print(config.listing()?.trim_end())?;
    Ok(0)
}
