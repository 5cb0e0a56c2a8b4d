//! `polystage generate`.

use std::io::Write;
use std::path::{Path, PathBuf};

use super::{adapters, open, parse_devices};
use crate::error::{Error, Result};
use crate::generate::{Generator, Sampling};
use crate::gpu::Device;
use crate::model::Model;
use crate::train::checkpoint;
use crate::train::config::Devices;

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
    let (config, mut tensors) = checkpoint::load_model(path)?;
    let model = Model::from_hugging_face(&config)?;
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
    // Published GPT-2 files leave the prefix out.
    for tensor in &mut tensors {
        if ["wte.", "wpe.", "h.", "ln_f."].iter().any(|start| tensor.name.starts_with(start)) {
            tensor.name = format!("transformer.{}", tensor.name);
        }
    }
    let known: Vec<String> = model.parameters().into_iter().map(|p| p.name).collect();
    let mask = |name: &str| name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias");
    if let Some(extra) = tensors.iter().find(|t| !known.contains(&t.name) && !mask(&t.name)) {
        let message = format!("tensor {} has no place in the model of config.json", extra.name);
        return Err(Error::checkpoint(path, message));
    }
    let mut tokens: Vec<u32> = prompt.iter().map(|&b| b as u32).collect();
    let sequence = config.context.min(tokens.len() + count).max(1);
    let mut generator = pollster::block_on(Generator::load(config, &tensors, path, sequence, devices))?;
    drop(tensors);
    if !each(prompt) {
        return Ok(());
    }
    let watch = generator.watch();
    for position in 0..count {
        let mut logits = watch.block_on(generator.logits(&tokens))?;
        logits.truncate(256);
        let token = sampling.pick(&logits, position as u64);
        tokens.push(token);
        if !each(&[token as u8]) {
            break;
        }
    }
    Ok(())
}
