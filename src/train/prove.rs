//! The proof that cutting a model changes nothing: the same training steps with one stage and with several.

use serde::Serialize;

use super::config::Config;
use super::data::{Batches, Corpus};
use super::trainer::Trainer;
use crate::error::Result;
use crate::gpu::{Capabilities, Device, OpenOptions};
use crate::ops::parameters::Part;
use crate::pipeline::Plan;
use crate::schedule::NAMES;

/// What was compared, and what came out.
#[derive(Clone, Debug, Serialize)]
pub struct Proof {
    /// Devices and schedule.
    pub what: String,
    /// Largest relative difference of a loss.
    pub loss_difference: f64,
    /// Whether all losses and all gradients of the first step agree bit for bit.
    pub identical: bool,
    /// Words for people.
    pub found: String,
    /// On one adapter: identical; where replicas or gangs add up in another order, losses within 1e-5. Over unlike adapters: within
    /// 1e-4. In f16: within 1e-2 of f32.
    pub passed: bool,
}

/// Largest relative difference of losses over unlike adapters: they round differently, and steps amplify it.
const UNLIKE: f64 = 1e-4;

/// Largest relative difference of losses where the same gradients are added in another order: a few units in the last place
/// a step, which steps amplify.
const REORDERED: f64 = 1e-5;

/// Largest relative difference of losses of f16 and f32.
const IN_F16: f64 = 0.01;

const CONFIG: &str = "
[model]
kind = 'gpt2'
layers = 5
width = 48
heads = 3
context = 24
vocabulary = 256
[data]
train = ['generated']
[train]
steps = 5
batch = 8
sequence = 24
learning_rate = 3e-3
warmup = 2
";

/// Heads of the model.
const HEADS: usize = 3;

/// Losses of five steps and the gradients of the first.
type Trace = (Vec<f64>, Vec<Vec<f32>>);

/// How a run is divided.
#[derive(Clone, Copy)]
struct Way {
    schedule: &'static str,
    replicas: usize,
    /// ZeRO's.
    level: usize,
    /// Devices that divide every layer.
    members: usize,
    /// Whether by token too.
    by_token: bool,
    /// Whether operands are rounded to f16.
    f16: bool,
}

impl Way {
    fn of(schedule: &'static str) -> Way {
        Way { schedule, replicas: 1, level: 1, members: 1, by_token: false, f16: false }
    }

    fn words(&self) -> String {
        if self.members > 1 {
            let by_token = if self.by_token { ", by token" } else { "" };
            return format!("every layer on {}{by_token}", self.members);
        }
        match (self.replicas, self.level) {
            _ if self.f16 => format!("{} in f16", self.schedule),
            (1, _) => self.schedule.to_string(),
            (many, 1) => format!("{many} replicas"),
            (many, level) => format!("{many} replicas, ZeRO {level}"),
        }
    }

    /// Whether gradients are added in the order of one device.
    fn keeps_order(&self) -> bool {
        self.members == 1 && (self.replicas == 1 || self.level > 1)
    }
}

/// `ranks`: for how many devices the sizes must do, which are those of every run that is compared.
fn trace((indices, options): (&[usize], OpenOptions), of: Way, ranks: usize) -> Result<Trace> {
    // Interleaving wants two stages a device and whole rounds of microbatches.
    let (layers, microbatches) = (5.max(2 * ranks), 4usize.next_multiple_of(ranks));
    let sizes = [
        format!("pipeline.schedule={}", of.schedule),
        format!("mesh.data={}", of.replicas),
        format!("mesh.zero={}", of.level),
        format!("mesh.tensor={}", of.members),
        format!("mesh.sequence_parallel={}", of.by_token),
        format!("model.layers={layers}"),
        format!("pipeline.microbatches={microbatches}"),
        format!("train.batch={}", 2 * microbatches),
    ];
    let config = Config::parse(CONFIG, &sizes, "proof")?;
    let text: Vec<u8> =
        (0u32..4000).map(|i| b"pipelines keep every device busy; "[(i * i / 7 % 34) as usize]).collect();
    let t = &config.train;
    let batches = Batches::new(Corpus::from_bytes(text), t.batch, t.sequence, config.data.order, t.seed)?;
    let open = |&index: &usize| {
        let device = pollster::block_on(Device::open(index, options))?;
        Ok(device.with(Capabilities { f16: of.f16, ..*device.capabilities() }))
    };
    let devices = indices.iter().map(open).collect::<Result<Vec<_>>>()?;
    let plan = Plan::for_devices(Trainer::setup(&config, vec![None; devices.len()])?, &devices)?;
    let mut trainer = Trainer::launch(&config, plan, &devices, batches)?;
    let watch = trainer.watch();
    watch.block_on(trainer.initialise())?;
    let (mut losses, mut gradients) = (Vec::new(), Vec::new());
    for step in 0..config.train.steps {
        losses.push(watch.block_on(trainer.step())?.loss);
        if step == 0 {
            let names: Vec<String> = trainer.executor().parameters().iter().map(|p| p.name.clone()).collect();
            for name in names.iter().filter(|n| *n != "lm_head.weight") {
                gradients.push(watch.block_on(trainer.executor().read(name, Part::Gradient))?);
            }
        }
    }
    Ok((losses, gradients))
}

/// How many comparisons [`prove`] makes of so many adapters, which all have f16 or do not.
pub fn comparisons(ranks: usize, f16: bool) -> usize {
    divisions(ranks, f16).len()
}

fn divisions(ranks: usize, f16: bool) -> Vec<Way> {
    let mut all: Vec<Way> = NAMES.iter().map(|name| Way::of(name)).collect();
    if ranks > 1 {
        all.extend([1, 3].map(|level| Way { replicas: ranks, level, ..Way::of("1f1b") }));
    }
    // As many as there are heads.
    if (2..=HEADS).contains(&ranks) {
        all.extend([false, true].map(|by_token| Way { members: ranks, by_token, ..Way::of("1f1b") }));
    }
    all.extend(f16.then(|| Way { f16, ..Way::of("1f1b") }));
    all
}

/// Compares these adapters in every named schedule, as replicas of the whole model and as a gang that divides every layer, with the first of them alone.
/// If all of them have f16, in that too. `each` hears of every comparison.
pub fn prove(indices: &[usize], options: OpenOptions, f16: bool, mut each: impl FnMut(Proof)) -> Result<()> {
    let alone = trace((&indices[..1], options), Way::of("1f1b"), indices.len())?;
    for division in divisions(indices.len(), f16) {
        each(compare((indices, options), division, &alone)?);
    }
    Ok(())
}

fn compare((indices, options): (&[usize], OpenOptions), of: Way, alone: &Trace) -> Result<Proof> {
    let split = trace((indices, options), of, indices.len())?;
    let pairs = alone.0.iter().zip(&split.0);
    let loss_difference = pairs.map(|(a, b)| (a - b).abs() / a.abs()).fold(0.0, f64::max);
    let bits = |t: &Trace| t.1.iter().flatten().map(|x| x.to_bits()).collect::<Vec<_>>();
    let identical = alone.0 == split.0 && bits(alone) == bits(&split);
    let alike = indices.windows(2).all(|pair| pair[0] == pair[1]);
    let found = if identical {
        "losses and gradients identical bit for bit".into()
    } else {
        format!("losses differ by up to {loss_difference:.1e}")
    };
    let passed = match (alike, of.keeps_order()) {
        _ if of.f16 => loss_difference <= IN_F16,
        (true, true) => identical,
        (true, false) => loss_difference <= REORDERED,
        (false, _) => loss_difference <= UNLIKE,
    };
    let names: Vec<String> = indices.iter().map(usize::to_string).collect();
    Ok(Proof {
        what: format!("adapter {} against {}, {}", names[0], names.join("+"), of.words()),
        loss_difference,
        identical,
        found,
        passed,
    })
}
