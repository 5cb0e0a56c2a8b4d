//! What people choose on the page, what there is to choose from, and the config that it stands for.

use serde::{Deserialize, Serialize};

use super::task::{Rates, Task};
use crate::error::{Error, Result};
use crate::layers::Layers;
use crate::schedule::NAMES;
use crate::train::config::Config;

/// Devices of a run at most.
const MOST_DEVICES: usize = 4;
/// How many times as long a device may take at most.
const SLOWEST: f64 = 5.0;
/// Microbatches that a step may be divided into.
pub(super) const MICROBATCHES: [usize; 5] = [1, 2, 4, 8, 16];

/// Everything that a run depends on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// What is learnt.
    pub task: Task,
    /// Text for [`Task::Text`]; empty for the project's own.
    pub text: String,
    /// How large the model is.
    pub size: Size,
    /// How many devices train it.
    pub devices: usize,
    /// Pipelines beside each other.
    pub replicas: usize,
    /// The schedule, by its name.
    pub schedule: String,
    /// Parts that a batch is divided into.
    pub microbatches: usize,
    /// First layers of the stages after the first; empty for those that the planner finds.
    pub cuts: Vec<Layers>,
    /// How many times as long each device takes; 1 where the list ends.
    pub slow: Vec<f64>,
    /// Whether the same model is trained on one device too.
    pub reference: bool,
    /// Seed of weights and data.
    pub seed: u32,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            task: Task::Addition,
            text: String::new(),
            size: Size::Small,
            devices: 2,
            replicas: 1,
            schedule: "1f1b".into(),
            microbatches: 4,
            cuts: Vec::new(),
            slow: Vec::new(),
            reference: false,
            seed: 1,
        }
    }
}

/// How large a model is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Size {
    /// Two blocks of width 64.
    Small,
    /// Four blocks of width 64.
    Medium,
    /// Six blocks of width 128.
    Large,
}

impl Size {
    const ALL: [Size; 3] = [Size::Small, Size::Medium, Size::Large];

    /// Blocks, width and heads: many small heads, because what sums and sorting need is many places looked at at once.
    fn extents(self) -> [usize; 3] {
        match self {
            Size::Small => [2, 64, 8],
            Size::Medium => [4, 64, 8],
            Size::Large => [6, 128, 8],
        }
    }

    fn choice(self) -> Choice {
        let [blocks, width, heads] = self.extents();
        let name = match self {
            Size::Small => "small",
            Size::Medium => "medium",
            Size::Large => "large",
        };
        let about = format!("{blocks} blocks of width {width} with {heads} attention heads each.");
        Choice { name: name.into(), title: format!("{blocks} blocks, width {width}"), about }
    }
}

/// Something that can be chosen.
#[derive(Clone, Debug, Serialize)]
pub struct Choice {
    /// What settings call it.
    pub name: String,
    /// What people call it.
    pub title: String,
    /// A sentence about it.
    pub about: String,
}

/// What there is to choose from.
#[derive(Clone, Debug, Serialize)]
pub struct Catalog {
    version: &'static str,
    tasks: Vec<Choice>,
    sizes: Vec<Choice>,
    schedules: Vec<Choice>,
    microbatches: Vec<usize>,
    defaults: Settings,
}

/// What there is to choose from.
pub fn catalog() -> Catalog {
    Catalog {
        version: env!("CARGO_PKG_VERSION"),
        tasks: Task::ALL.map(Task::choice).to_vec(),
        sizes: Size::ALL.map(Size::choice).to_vec(),
        schedules: NAMES.iter().map(|name| schedule(name)).collect(),
        microbatches: MICROBATCHES.to_vec(),
        defaults: Settings::default(),
    }
}

fn schedule(name: &str) -> Choice {
    let (title, about) = match name {
        "gpipe" => (
            "GPipe",
            "All forward passes, then all backward passes: simple, and it keeps the activations of every microbatch.",
        ),
        "1f1b" => (
            "1F1B",
            "One forward, one backward: as soon as a backward pass can run it does, so few activations are kept.",
        ),
        "eager-1f1b" => (
            "Eager 1F1B",
            "1F1B that lets twice as many microbatches in, so that transfers hide behind work.",
        ),
        "interleaved-1f1b" => (
            "Interleaved 1F1B",
            "Each device has two pieces of the model: the bubble halves, twice as much is sent.",
        ),
        "zb-h1" => (
            "Zero bubble H1",
            "The gradients of weights wait for no one, so they fill the empty places at the end.",
        ),
        "zb-h2" => (
            "Zero bubble H2",
            "As H1, with more microbatches let in at the start: less idle time, more memory.",
        ),
        "zb-v" => (
            "Zero bubble V",
            "The pieces go down the devices and up again, so the first device also has the last piece.",
        ),
        other => (other, "A schedule."),
    };
    Choice { name: name.into(), title: title.into(), about: about.into() }
}

impl Settings {
    /// Reads them.
    ///
    /// # Errors
    /// [`Error::Config`] in one line for what is none or out of range.
    pub fn parse(json: &str) -> Result<Settings> {
        let settings: Settings =
            serde_json::from_str(json).map_err(|error| Error::config("settings", error.to_string()))?;
        settings.check()?;
        Ok(settings)
    }

    pub(super) fn check(&self) -> Result<()> {
        let refuse = |what: &str, message: String| Err(Error::config(what, message));
        if !(1..=MOST_DEVICES).contains(&self.devices) {
            return refuse("devices", format!("{} of them; there may be 1 to {MOST_DEVICES}", self.devices));
        }
        if self.replicas == 0 || !self.devices.is_multiple_of(self.replicas) {
            let (replicas, devices) = (self.replicas, self.devices);
            return refuse("replicas", format!("{devices} devices make no {replicas} pipelines alike"));
        }
        if !NAMES.contains(&self.schedule.as_str()) {
            return refuse("schedule", format!("there is no schedule called {}", self.schedule));
        }
        if !MICROBATCHES.contains(&self.microbatches) {
            return refuse("microbatches", format!("{} is none of {MICROBATCHES:?}", self.microbatches));
        }
        if let Some(times) = self.slow.iter().find(|times| !(1.0..=SLOWEST).contains(*times)) {
            return refuse("slow", format!("{times} times as long; there may be 1 to {SLOWEST}"));
        }
        Ok(())
    }

    /// How many times as long a device takes.
    pub fn slow(&self, device: usize) -> f64 {
        self.slow.get(device).copied().unwrap_or(1.0)
    }

    /// The experiment that they stand for.
    ///
    /// # Errors
    /// Those of [`Config::parse`].
    pub fn config(&self) -> Result<Config> {
        let [blocks, width, heads] = self.size.extents();
        let [batch, sequence] = self.task.extents();
        let Rates { steps, highest, spread } = self.task.rates();
        let devices: Vec<usize> = (0..self.devices).collect();
        let text = format!(
            "[model]\nkind = \"gpt2\"\nlayers = {blocks}\nwidth = {width}\nheads = {heads}\n\
             context = {sequence}\nvocabulary = 256\ninitializer_range = {spread}\n\
             [data]\ntrain = [\"the task\"]\n\
             [train]\nsteps = {steps}\nbatch = {batch}\nsequence = {sequence}\nlearning_rate = {highest}\n\
             warmup = 20\nseed = {seed}\n\
             [pipeline]\ndevices = {devices:?}\nschedule = \"{schedule}\"\nmicrobatches = {microbatches}\n\
             [mesh]\ndata = {replicas}\n",
            seed = self.seed,
            schedule = self.schedule,
            microbatches = self.microbatches,
            replicas = self.replicas,
        );
        let mut config = Config::parse(&text, &[], "settings")?;
        config.pipeline.cuts = (!self.cuts.is_empty()).then(|| self.cuts.clone());
        Ok(config)
    }
}
