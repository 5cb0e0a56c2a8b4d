//! `polystage generate`.

use std::path::PathBuf;

use serde_json::json;

use super::speaking::{Pace, Said, Speaker, speak};
use super::{Environment, note, print, write};
use crate::error::{Error, Result};
use crate::folder::files::read_text;
use crate::generate::{Extent, Loading};

/// Continues texts with a trained model.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  polystage generate SmolLM2-135M --prompt \"The capital of France is\" --max-tokens 20 --temperature 0\n  polystage generate runs/tiny-1 --prompt \"fn main\" --prompt \"struct\" --devices 0,1"
)]
pub(super) struct Arguments {
    #[command(flatten)]
    speaker: Speaker,
    /// The text to continue; may be given several times, and all are continued together.
    #[arg(long)]
    prompt: Vec<String>,
    /// A file with one more text, without the newline at its end.
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// How many tokens to add at most.
    #[arg(long, default_value_t = 200)]
    max_tokens: usize,
    /// Print one JSON object when all is done.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &Arguments, environment: &Environment) -> Result<u8> {
    let sampling = arguments.speaker.sampling()?;
    let texts = prompts(arguments)?;
    let language = arguments.speaker.language(environment)?;
    let encode = |text: &String| language.tokenizer().encode(text, true);
    let prompts = texts.iter().map(encode).collect::<Result<Vec<_>>>()?;
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let extent = Extent {
        texts: prompts.len(),
        prompt: longest,
        tokens: longest.saturating_add(arguments.max_tokens),
    };
    extent.check(language.config())?;
    let (mut generator, loading) = arguments.speaker.launch(&language, extent)?;

    let streams = prompts.len() == 1 && !arguments.json;
    // A closed pipe ends the text; there is nobody left to tell.
    if streams && !write(&texts[0])? {
        return Ok(0);
    }
    let (said, pace) =
        speak(&language, &mut generator, &prompts, arguments.max_tokens, sampling, |_, piece| {
            if streams { write(piece) } else { Ok(true) }
        })?;
    if streams {
        print("")?;
    }
    let tokens = prompts.iter().map(Vec::len).sum();
    if arguments.json {
        print(report(&texts, &prompts, &said, &pace, &loading))?;
    } else if !streams {
        for (at, (text, said)) in texts.iter().zip(&said).enumerate() {
            print(format!("=== text {} of {} ===\n{text}{}", at + 1, texts.len(), said.text))?;
        }
    }
    note(pace_line(tokens, &pace, &loading));
    Ok(0)
}

fn prompts(arguments: &Arguments) -> Result<Vec<String>> {
    let mut texts = arguments.prompt.clone();
    if let Some(path) = &arguments.prompt_file {
        let mut text = read_text(path).map_err(|e| e.config(path))?;
        if text.ends_with('\n') {
            text.pop();
        }
        texts.push(text);
    }
    if texts.is_empty() {
        return Err(Error::config("--prompt", "is missing; give a text to continue, or --prompt-file"));
    }
    if texts.iter().any(String::is_empty) {
        return Err(Error::config("--prompt", "is empty; give at least one character"));
    }
    Ok(texts)
}

fn pace_line(prompt_tokens: usize, pace: &Pace, loading: &Loading) -> String {
    let (decoded, seconds) = pace.decoded;
    let decoding = match decoded {
        0 => String::new(),
        _ => format!("; {decoded} more in {seconds:.2} s ({:.1} tokens/s)", decoded as f64 / seconds),
    };
    format!(
        "kernels in {:.2} s, weights in {:.2} s; {prompt_tokens} tokens to the first new ones in {:.2} s ({:.1} tokens/s){decoding}",
        loading.kernels,
        loading.weights,
        pace.prompt,
        prompt_tokens as f64 / pace.prompt
    )
}

fn report(
    texts: &[String],
    prompts: &[Vec<u32>],
    said: &[Said],
    pace: &Pace,
    loading: &Loading,
) -> serde_json::Value {
    let one = |((text, prompt), said): ((&String, &Vec<u32>), &Said)| {
        json!({
            "prompt": text,
            "prompt_tokens": prompt.len(),
            "text": said.text,
            "tokens": said.tokens,
            "finish": if said.ended { "end" } else { "length" },
        })
    };
    let (decoded, seconds) = pace.decoded;
    json!({
        "texts": texts.iter().zip(prompts).zip(said).map(one).collect::<Vec<_>>(),
        "kernel_seconds": loading.kernels,
        "weight_seconds": loading.weights,
        "prompt_seconds": pace.prompt,
        "decoded_tokens": decoded,
        "decoding_seconds": seconds,
    })
}
