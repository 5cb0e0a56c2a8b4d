//! `polystage export`.

use std::path::PathBuf;

use super::progress::Counter;
use super::{in_the_way, note, say, show_bytes, show_count};
use crate::error::{Error, Result};
use crate::folder::Dtype;
use crate::size;
use crate::train::export::{self, Output, Written};

/// Writes a trained model as a Hugging Face folder, its tokenizer beside it.
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  polystage export runs/tiny-1 --out tiny --dtype bf16\n\nThe folder appears when it is complete; on an error there is none."
)]
pub(super) struct Arguments {
    /// A run's folder, one of its checkpoints, or a Hugging Face folder.
    model: PathBuf,
    #[command(flatten)]
    output: OutputArguments,
}

/// What every verb that writes a model folder is told.
#[derive(clap::Args)]
pub(super) struct OutputArguments {
    /// The folder to write; it must not exist.
    #[arg(long)]
    out: PathBuf,
    /// The type of the weights (default: that of the source).
    #[arg(long, value_parser = ["f32", "bf16", "f16"])]
    dtype: Option<String>,
    /// Most bytes of weights in one file, such as 500MB.
    #[arg(long, value_name = "SIZE", default_value = "5GB")]
    max_shard_size: String,
}

pub(super) fn run(arguments: &Arguments) -> Result<u8> {
    arguments.output.write(|output, each| export::export(&arguments.model, output, each))
}

impl OutputArguments {
    /// Writes under a progress bar, and says what was written.
    pub(super) fn write(
        &self,
        work: impl FnOnce(&Output, &mut dyn FnMut(u64, u64)) -> Result<Written>,
    ) -> Result<u8> {
        let shard_bytes = size::parse(&self.max_shard_size)
            .map_err(|message| Error::config("--max-shard-size", message))?;
        let dtypes = [Dtype::F32, Dtype::BF16, Dtype::F16];
        let dtype = self.dtype.as_deref();
        let dtype = dtype.and_then(|name| dtypes.into_iter().find(|dtype| dtype.name() == name));
        let bar = Counter::new(0, |done, all| format!("{} %", 100 * done / all.max(1)));
        let output = Output { path: &self.out, dtype, shard_bytes };
        let written = work(&output, &mut |done, all| bar.done_of(done, all));
        drop(bar);
        let written = written.map_err(in_the_way)?;
        let oversized = &written.oversized;
        if let Some((name, bytes)) = oversized.iter().max_by_key(|(_, bytes)| bytes) {
            let others = match oversized.len() {
                1 => "it has".to_string(),
                count => format!("it and {} more have each", count - 1),
            };
            note(format!(
                "warning: {name} takes {}, more than --max-shard-size {}; {others} a file of its own",
                show_bytes(*bytes),
                self.max_shard_size
            ));
        }
        say(format!(
            "wrote {}: {} tensors, {} parameters as {}, {}",
            self.out.display(),
            written.tensors,
            show_count(written.elements),
            written.dtype.torch_name(),
            show_bytes(written.elements * written.dtype.size() as u64)
        ))?;
        Ok(0)
    }
}
