//! The proof that cutting a model changes nothing: the same training steps with one stage and with several.

use serde::Serialize;

use super::config::Config;
use super::data::{Batches, Corpus};
use super::trainer::Trainer;
use crate::error::Result;
use crate::gpu::{Device, OpenOptions};
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
    /// On one adapter: identical; where replicas add up in another order, losses within 1e-5. Over unlike adapters: within
    /// 1e-4.
    pub passed: bool,
}

/// Largest relative difference of losses over unlike adapters: they round differently, and steps amplify it.
const UNLIKE: f64 = 1e-4;

/// Largest relative difference of losses where the same gradients are added in another order: a few units in the last place
/// a step, which steps amplify.
const REORDERED: f64 = 1e-5;

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

/// Losses of five steps and the gradients of the first.
type Trace = (Vec<f64>, Vec<Vec<f32>>);

/// `ranks`: for how many devices the sizes must do, which are those of every run that is compared.
fn trace(indices: &[usize], schedule: &str, replicas: usize, ranks: usize) -> Result<Trace> {
    // Interleaving wants two stages a device and whole rounds of microbatches.
    let (layers, microbatches) = (5.max(2 * ranks), 4usize.next_multiple_of(ranks));
    let sizes = [
        format!("pipeline.schedule={schedule}"),
        format!("mesh.data={replicas}"),
        format!("model.layers={layers}"),
        format!("pipeline.microbatches={microbatches}"),
        format!("train.batch={}", 2 * microbatches),
    ];
    let config = Config::parse(CONFIG, &sizes, "proof")?;
    let text: Vec<u8> =
        (0u32..4000).map(|i| b"pipelines keep every device busy; "[(i * i / 7 % 34) as usize]).collect();
    let t = &config.train;
    let batches = Batches::new(Corpus::from_bytes(text), t.batch, t.sequence, config.data.order, t.seed)?;
    let options = OpenOptions::default();
    let devices =
        indices.iter().map(|&i| pollster::block_on(Device::open(i, options))).collect::<Result<Vec<_>>>()?;
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

/// Compares these adapters in every named schedule, and as replicas of the whole model, with the first of them alone.
/// `each` hears of every comparison.
pub fn prove(indices: &[usize], mut each: impl FnMut(Proof)) -> Result<()> {
    let ranks = indices.len();
    let alone = trace(&indices[..1], "1f1b", 1, ranks)?;
    for schedule in NAMES {
        each(compare(indices, schedule, 1, &alone)?);
    }
    if ranks > 1 {
        each(compare(indices, "1f1b", ranks, &alone)?);
    }
    Ok(())
}

fn compare(indices: &[usize], schedule: &str, replicas: usize, alone: &Trace) -> Result<Proof> {
    let split = trace(indices, schedule, replicas, indices.len())?;
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
    let kind = match replicas {
        1 => schedule.to_string(),
        many => format!("{many} replicas"),
    };
    let passed = match (alike, replicas) {
        (true, 1) => identical,
        (true, _) => loss_difference <= REORDERED,
        (false, _) => loss_difference <= UNLIKE,
    };
    let names: Vec<String> = indices.iter().map(usize::to_string).collect();
    Ok(Proof {
        what: format!("adapter {} against {}, {kind}", names[0], names.join("+")),
        loss_difference,
        identical,
        found,
        passed,
    })
}
