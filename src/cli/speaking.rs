//! What `generate`, `chat` and the sample of `train` share: a model with its tokenizer, devices, and text as it comes.

use std::path::PathBuf;
use std::time::Instant;

use super::Environment;
use super::placement::Placement;
use crate::error::Result;
use crate::generate::{Extent, Generator, Language, Loading, Sampling};
use crate::gpu::Device;
use crate::mesh::Division;
use crate::text::Stream;
use crate::train::source::Pretrained;

/// A model, where it runs, and how it chooses its words.
#[derive(clap::Args)]
pub(super) struct Speaker {
    /// A Hugging Face folder, a run's folder, or one of its checkpoints; of a model or an adapter.
    model: PathBuf,
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
    #[command(flatten)]
    placement: Placement,
}

impl Speaker {
    pub(super) fn sampling(&self) -> Result<Sampling> {
        let sampling =
            Sampling { temperature: self.temperature, top_k: self.top_k, top_p: self.top_p, seed: self.seed };
        sampling.check()?;
        Ok(sampling)
    }

    /// Opens the model with its tokenizer.
    pub(super) fn language(&self, environment: &Environment) -> Result<Language> {
        let mut pretrained = Pretrained::open(&self.model)?;
        pretrained.model = self.placement.store(pretrained.model);
        Language::new(pretrained, &environment.isolation)
    }

    /// Puts the model on the devices that were asked for.
    pub(super) fn launch(&self, language: &Language, extent: Extent) -> Result<(Generator, Loading)> {
        let tensor = self.placement.tensor()?;
        let (devices, budgets) = self.placement.devices(tensor.members() * language.layers())?;
        language.launch(extent, &devices, budgets, &tensor)
    }
}

/// A text that was continued.
pub(super) struct Said {
    /// What was added, without the mark that ends it.
    pub(super) text: String,
    /// The tokens that were added, with that mark.
    pub(super) tokens: Vec<u32>,
    /// Whether the model said that the text ends there.
    pub(super) ended: bool,
}

/// How long it took.
pub(super) struct Pace {
    /// Seconds until every text had its first new token.
    pub(super) prompt: f64,
    /// Tokens that came after that, and the seconds they took.
    pub(super) decoded: (usize, f64),
}

/// Continues token texts by up to `count` tokens each or to the model's end mark; `each` hears (text, piece) as the
/// pieces become whole characters and says whether the text goes on.
pub(super) fn speak(
    language: &Language,
    generator: &mut Generator,
    prompts: &[Vec<u32>],
    count: usize,
    sampling: Sampling,
    mut each: impl FnMut(usize, &str) -> Result<bool>,
) -> Result<(Vec<Said>, Pace)> {
    let tokenizer = language.tokenizer();
    let mut said: Vec<Said> =
        prompts.iter().map(|_| Said { text: String::new(), tokens: Vec::new(), ended: false }).collect();
    let mut streams: Vec<Stream> = prompts.iter().map(|_| tokenizer.stream()).collect();
    let mut failure = None;
    let mut hear = |at: usize, piece: Result<String>, said: &mut Said| {
        let goes_on = piece.and_then(|piece| {
            said.text.push_str(&piece);
            if piece.is_empty() { Ok(true) } else { each(at, &piece) }
        });
        goes_on.unwrap_or_else(|error| {
            failure.get_or_insert(error);
            false
        })
    };
    let started = Instant::now();
    let mut first = None;
    let (mut begun, mut decoded) = (0, 0);
    let watch = generator.watch();
    watch.block_on(generator.run(prompts, count, sampling, language.vocabulary(), |at, token| {
        let text = &mut said[at];
        begun += usize::from(text.tokens.is_empty());
        decoded += usize::from(first.is_some());
        if begun == prompts.len() && first.is_none() {
            first = Some(Instant::now());
        }
        text.tokens.push(token);
        text.ended = tokenizer.ends(token);
        !text.ended && hear(at, streams[at].push(token), text)
    }))?;
    for (at, (stream, said)) in streams.into_iter().zip(&mut said).enumerate() {
        hear(at, stream.finish(), said);
    }
    let end = Instant::now();
    let first = first.unwrap_or(end);
    let pace =
        Pace { prompt: (first - started).as_secs_f64(), decoded: (decoded, (end - first).as_secs_f64()) };
    failure.map_or(Ok((said, pace)), Err)
}

/// What a model adds to a prompt: as [`speak`] once, with a generator of its own.
pub(super) fn sample(
    language: &Language,
    prompt: &[u32],
    count: usize,
    sampling: Sampling,
    devices: &[Device],
    budgets: Vec<Option<u64>>,
) -> Result<String> {
    let extent = Extent { texts: 1, prompt: prompt.len(), tokens: prompt.len() + count };
    let (mut generator, _) = language.launch(extent, devices, budgets, &Division::none())?;
    let (said, _) = speak(language, &mut generator, &[prompt.to_vec()], count, sampling, |_, _| Ok(true))?;
    Ok(said.into_iter().next().map_or(String::new(), |said| said.text))
}
