//! `polystage merge`.

use std::path::PathBuf;

use super::export::OutputArguments;
use crate::error::Result;
use crate::train::export;

/// Adds a LoRA adapter to its base model and writes the sum as a Hugging Face folder.
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  polystage merge runs/lora-1 --base SmolLM2-135M --out merged\n\nThe folder appears when it is complete; on an error there is none."
)]
pub(super) struct Arguments {
    /// The adapter's folder, or the run that trained it.
    adapter: PathBuf,
    /// The folder of the base model (default: the one that the adapter names).
    #[arg(long)]
    base: Option<PathBuf>,
    #[command(flatten)]
    output: OutputArguments,
}

pub(super) fn run(arguments: &Arguments) -> Result<u8> {
    let base = arguments.base.as_deref();
    arguments.output.write(|output, each| export::merge(&arguments.adapter, base, output, each))
}
