//! How fast is it? Kernels alone, the link between two devices, and whole training steps, on adapter 0.
//!
//! Throughput is what to read: a kernel's elements are floating-point operations (`Gelem/s` is GFLOP/s), a training
//! step's are tokens. `cargo bench -- matmul` runs the benchmarks with that word in their name. A software adapter uses
//! every core by itself; with `LP_NUM_THREADS=1` each lavapipe device is one core, so that one and two devices compare
//! as they would on one and two GPUs. `cargo bench -- prediction` and `cargo bench -- advice` ask other questions: how far
//! predictions are off, and whether to follow what `polystage trace` advises.

mod advice;
mod prediction;

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput};
use futures_channel::oneshot;
use polystage::gpu::{Device, OpenOptions};
use polystage::graph::{Epilogue, Layout as MatmulLayout, Op, Phase};
use polystage::model::{Init, Parameter, init};
use polystage::ops::parameters::{Layout, Parameters};
use polystage::ops::plan::MemoryPlan;
use polystage::ops::program::{Slots, StageProgram};
use polystage::ops::verify::{Case, single_node};
use polystage::pipeline::Plan;
use polystage::pipeline::link::{Combine, connect};
use polystage::train::config::Config;
use polystage::train::data::{Batches, Corpus};
use polystage::train::trainer::Trainer;

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    if std::env::args().any(|word| word == "prediction") {
        return prediction::table();
    }
    if std::env::args().any(|word| word == "advice") {
        return advice::table();
    }
    let devices = [open(), open()];
    matmul(&mut criterion, &devices[0]);
    attention(&mut criterion, &devices[0]);
    link(&mut criterion, &devices);
    training(&mut criterion, &devices);
    criterion.final_summary();
}

fn open() -> Device {
    pollster::block_on(Device::open(0, OpenOptions::default())).expect("adapter 0 opens")
}

/// Normally distributed numbers, the same in every run. Zeros would take less power, hence run at a higher clock.
fn random(len: usize, name: &str) -> Vec<f32> {
    init::initial(&Parameter::new(name, &[len], Init::Normal(1.0)), 1)
}

fn matmul(criterion: &mut Criterion, device: &Device) {
    let mut group = criterion.benchmark_group("matmul");
    for n in [256, 1024] {
        for layout in [MatmulLayout::NN, MatmulLayout::NT, MatmulLayout::TN] {
            let node =
                Node::new(device, Op::Matmul { layout, epilogue: Epilogue::None }, &[&[n, n], &[n, n]]);
            group.throughput(Throughput::Elements(node.flops as u64));
            node.bench(&mut group, BenchmarkId::new(format!("{layout:?}"), n));
        }
    }
}

fn attention(criterion: &mut Criterion, device: &Device) {
    let heads = 4;
    let width = 64 * heads;
    let mut group = criterion.benchmark_group("attention");
    for tokens in [128, 512] {
        let (qkv, o, lse) = ([1, tokens, 3 * width], [1, tokens, width], [1, heads, tokens]);
        let forward = Node::new(device, Op::Attention { heads, kv_heads: heads, starts: false }, &[&qkv]);
        group.throughput(Throughput::Elements(forward.flops as u64));
        forward.bench(&mut group, BenchmarkId::new("forward", tokens));
        let backward = Node::new(
            device,
            Op::AttentionBackward { heads, kv_heads: heads, starts: false },
            &[&o, &qkv, &o, &lse],
        );
        group.throughput(Throughput::Elements(backward.flops as u64));
        backward.bench(&mut group, BenchmarkId::new("backward", tokens));
    }
}

/// One op as a stage of its own, on random arguments.
struct Node {
    device: Device,
    program: StageProgram,
    parameters: Parameters,
    launches: usize,
    flops: f64,
}

const SLOTS: Slots = Slots { stash: 0, gradient: 0 };

impl Node {
    fn new(device: &Device, op: Op, shapes: &[&[usize]]) -> Node {
        let flops = op.flops(shapes);
        let (stage, inputs, _) = single_node(&Case::new(op, shapes)).expect("shapes fit the op");
        let plan = MemoryPlan::new(&stage, device.capabilities());
        let parameters = Parameters::new(device, Layout::new(Vec::new()), false).expect("allocates");
        let program = StageProgram::new(device, stage, plan, 1, 1).expect("compiles");
        for (index, input) in inputs.into_iter().enumerate() {
            let range = program.range(&parameters, input, SLOTS).expect("has a home");
            let values = random(range.bytes as usize / 4, &format!("argument {index}"));
            device.upload(&range.buffer, range.offset, bytemuck::cast_slice(&values));
        }
        let launches = program.launches(Phase::Forward).len();
        Node { device: device.clone(), program, parameters, launches, flops }
    }

    /// Records, submits and waits.
    fn run(&mut self) {
        let mut recorder = self.device.record();
        let all = 0..self.launches;
        self.program.record(&mut recorder, &self.parameters, Phase::Forward, all, SLOTS).expect("records");
        recorder.submit(|| ());
        self.device.block_on(self.device.below(1));
        self.device.check("benchmark").expect("runs");
    }

    fn bench(
        mut self,
        group: &mut criterion::BenchmarkGroup<criterion::measurement::WallTime>,
        id: BenchmarkId,
    ) {
        group.bench_function(id, |bencher| bencher.iter(|| self.run()));
    }
}

/// A stream of tensors from one device to another, each device driven by its own thread as in a run.
fn link(criterion: &mut Criterion, [from, to]: &[Device; 2]) {
    let mut group = criterion.benchmark_group("link");
    for mebibytes in [1, 16] {
        let bytes = mebibytes << 20;
        let (source, target) = (from.buffer("source", bytes), to.buffer("target", bytes));
        let (source, target) = (source.expect("allocates").whole(), target.expect("allocates").whole());
        from.upload(&source.buffer, 0, bytemuck::cast_slice(&random(bytes as usize / 4, "activation")));
        let (mut out, inward) = connect(from, to, bytes, 3, polystage::mesh::Wire::F32).expect("connects");
        let mut inward = inward.ahead().expect("has a thread");
        let send = async |count: usize| {
            for tag in 0..count {
                let mut recorder = from.record();
                let recorded = out.record(&mut recorder, &[(source.clone(), 0)], tag).await.expect("records");
                from.below(1).await;
                recorder.submit(|| ());
                recorded.submitted();
            }
        };
        let receive = async |count: usize| {
            // As a rank does when a step begins.
            (0..count).for_each(|tag| inward.order(tag, bytes, Combine::Sum { first: 0 }, false));
            for tag in 0..count {
                let mut recorder = to.record();
                let (recorded, _) =
                    inward.record(&mut recorder, &[(target.clone(), 0)], tag).await.expect("records");
                to.below(1).await;
                recorder.submit(|| ());
                recorded.submitted();
            }
            to.below(1).await;
        };
        let (mut send, mut receive) = (send, receive);
        group.throughput(Throughput::Bytes(bytes));
        group.bench_function(format!("{mebibytes} MiB"), |bencher| {
            bencher.iter_custom(|count| {
                let (arrived, all_arrived) = oneshot::channel::<()>();
                std::thread::scope(|scope| {
                    scope.spawn(|| {
                        from.block_on(async {
                            send(count as usize).await;
                            // The last read-back is mapped only while its device is polled.
                            let _ = all_arrived.await;
                        });
                    });
                    let start = Instant::now();
                    to.block_on(receive(count as usize));
                    drop(arrived);
                    start.elapsed()
                })
            });
        });
    }
}

const MODEL: &str = "
[model]
kind = 'gpt2'
layers = 4
width = 256
heads = 4
context = 128
vocabulary = 256
[data]
train = ['random']
[train]
steps = 1000
batch = 16
sequence = 128
[pipeline]
schedule = '1f1b'
";

/// Forward, backward, gradient norm and update.
fn training(criterion: &mut Criterion, devices: &[Device; 2]) {
    let mut group = criterion.benchmark_group("training step");
    group.sampling_mode(SamplingMode::Flat).measurement_time(Duration::from_secs(10));
    for (name, count, batch, microbatches) in [
        ("1 device, batch 4", 1, 4, 1),
        ("1 device, batch 16 in 16 microbatches", 1, 16, 16),
        ("2 devices, batch 16 in 16 microbatches", 2, 16, 16),
    ] {
        let overrides = [format!("train.batch={batch}"), format!("pipeline.microbatches={microbatches}")];
        let config = Config::parse(MODEL, &overrides, "benchmark").expect("parses");
        let mut trainer = trainer(&config, &devices[..count]);
        let watch = trainer.watch();
        group.throughput(Throughput::Elements((batch * config.train.sequence) as u64));
        group.bench_function(name, |bencher| {
            bencher.iter(|| watch.block_on(trainer.step()).expect("steps"));
        });
    }
}

fn trainer(config: &Config, devices: &[Device]) -> Trainer {
    let described: Vec<_> = devices.iter().map(|d| (d.info().clone(), *d.capabilities())).collect();
    let plan =
        Plan::new(Trainer::setup(config, vec![None; devices.len()]).unwrap(), &described).expect("plans");
    let text = random(1 << 16, "text").iter().map(|x| (128.0 + 40.0 * x) as u8).collect();
    let t = &config.train;
    let batches = Batches::new(Corpus::from_bytes(text), t.batch, t.sequence, config.data.order, t.seed);
    let mut trainer =
        Trainer::launch(config, plan, devices, batches.expect("is long enough")).expect("launches");
    trainer.watch().block_on(trainer.initialise()).expect("initialises");
    trainer
}
