//! `polystage generate`.

use std::io::Write;
use std::path::{Path, PathBuf};

use super::{adapters, open, parse_devices};
use crate::error::{Error, Result};
use crate::generate::{Extent, Generator, Sampling};
use crate::gpu::Device;
use crate::train::checkpoint;
use crate::train::config::Devices;
use crate::train::source::Pretrained;

/// Continues a text with a trained model.
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  polystage generate runs/tiny-1 --prompt \"fn main\" --max-tokens 200 --temperature 0.8"
)]
pub(super) struct Arguments {
    /// A run's folder, one of its checkpoints, or a Hugging Face folder.
    model: PathBuf,
    /// The text to continue.
    #[arg(long)]
    prompt: String,
    /// How many tokens to add.
    #[arg(long, default_value_t = 200)]
    max_tokens: usize,
    /// Divides the logits; 0 takes the most likely token.
    #[arg(long, default_value_t = 0.8)]
    temperature: f64,
    /// Only the k most likely tokens; 0 for all.
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Only the most likely tokens that together have this probability.
    #[arg(long, default_value_t = 1.0)]
    top_p: f64,
    /// Seed of the choice.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Adapters, one stage each, such as 0,1 (default: the first).
    #[arg(long)]
    devices: Option<String>,
}

pub(super) fn run(arguments: &Arguments) -> Result<u8> {
    let sampling = Sampling {
        temperature: arguments.temperature,
        top_k: arguments.top_k,
        top_p: arguments.top_p,
        seed: arguments.seed,
    };
    sampling.check()?;
    if arguments.prompt.is_empty() {
        return Err(Error::config("--prompt", "is empty; give at least one character"));
    }
    let path = checkpoint::resolve(&arguments.model)?;
    let adapters = adapters()?;
    let devices = arguments.devices.as_deref().map(parse_devices).transpose()?.unwrap_or(Devices::Count(1));
    let devices = open(&devices, &adapters)?;
    let mut out = std::io::stdout().lock();
    continue_text(&path, arguments.prompt.as_bytes(), arguments.max_tokens, sampling, &devices, |bytes| {
        // A closed pipe ends the text; there is nobody left to tell.
        out.write_all(bytes).and_then(|()| out.flush()).is_ok()
    })?;
    let _ = writeln!(out);
    Ok(0)
}

/// Hands prompt and continuation to `each` as they come, until it says no.
pub(super) fn continue_text(
    path: &Path,
    prompt: &[u8],
    count: usize,
    sampling: Sampling,
    devices: &[Device],
    mut each: impl FnMut(&[u8]) -> bool,
) -> Result<()> {
    let Pretrained { folder, model, .. } = Pretrained::open(path)?;
    let config = model.config();
    // A run's own folder says which tokenizer it used; another's must have the bytes' 256 symbols.
    let state = std::fs::read_to_string(path.join("state.json")).unwrap_or_default();
    let state: serde_json::Value = serde_json::from_str(&state).unwrap_or_default();
    let bytes = state["tokenizer"] == "bytes" || config.vocabulary == 256;
    if !bytes || config.vocabulary < 256 || path.join("tokenizer.json").exists() {
        let message = format!(
            "a vocabulary of {} needs its own tokenizer; this version generates with byte-level models only",
            config.vocabulary
        );
        return Err(Error::checkpoint(path, message));
    }
    let tokens: Vec<u32> = prompt.iter().map(|&b| b as u32).collect();
    let extent = Extent { texts: 1, prompt: tokens.len(), tokens: tokens.len() + count };
    let budgets = devices.iter().map(|d| d.info().memory).collect();
    let mut generator = Generator::launch(config, None, extent, devices, budgets)?;
    let watch = generator.watch();
    watch.block_on(generator.load(folder.tensors()))?;
    if !each(prompt) {
        return Ok(());
    }
    let prompts = [tokens];
    let run = generator.run(&prompts, count, sampling, 256, |_, token| each(&[token as u8]));
    watch.block_on(run).map(drop)
}
