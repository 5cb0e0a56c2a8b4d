//! Workloads and machines for the planner's tests.

use polystage::layers::Layers;
use polystage::mesh::Wire;
use polystage::plan::{
    Batching, DeviceProfile, EndMemory, Footprint, FormMemory, KindWork, Layer, LayerMemory, Link,
    LinkProfile, Machine, Rates, TiedLayers, Work, Workload,
};

/// Extents of a GPT-2.
pub struct Gpt {
    pub blocks: usize,
    pub width: u64,
    pub vocabulary: u64,
    pub sequence: u64,
    pub batch: u64,
}

impl Gpt {
    /// The GPT-2 in f32, with operations and bytes counted roughly as the model's graph has them.
    pub fn workload(&self) -> Workload {
        let Gpt { width: c, vocabulary: v, sequence: t, batch, .. } = *self;
        let layer = |name: String, kind, weights: u64| Layer {
            name,
            size: Layers::ONE,
            kind,
            weights,
            sent: weights,
            read: weights,
            state: 4 * weights,
            moments: 2 * weights,
        };
        let mut layers = vec![layer("embedding".into(), 0, 4 * (v + t) * c)];
        layers.extend((0..self.blocks).map(|i| layer(format!("block {i}"), 1, 4 * (12 * c * c + 13 * c))));
        layers.push(layer("head".into(), 2, 8 * c));
        let table = 4 * v * c;
        let divisors = (1..=batch).filter(|m| batch % m == 0 && m.is_power_of_two());
        Workload {
            kinds: ["embedding", "block", "head"].map(String::from).to_vec(),
            tie: Some(TiedLayers {
                user: layers.len() - 1,
                owner: 0,
                bytes: table,
                together: table,
                user_apart: 4 * table,
                owner_apart: 3 * table,
            }),
            layers,
            tokens: batch * t,
            bucket: 8 << 20,
            sharding: Default::default(),
            host_rings: 0,
            wire: Wire::F32,
            batchings: divisors.map(|m| self.batching(batch / m, m)).collect(),
        }
    }

    fn batching(&self, sequences: u64, microbatches: u64) -> Batching {
        let Gpt { width: c, vocabulary: v, sequence: t, .. } = *self;
        let bt = sequences * t;
        let work =
            |flops: u64, bytes: u64, launches| Work { flops: flops as f64, bytes: bytes as f64, launches };
        let weights = 48 * c * c;
        let (matrices, attention) = (24 * c * c * bt, 2 * bt * t * c);
        let block = KindWork {
            forward: work(matrices + attention, weights + 160 * bt * c, 12),
            input: work(matrices + 5 * attention / 2, weights + 240 * bt * c, 14),
            weight: work(matrices, 2 * weights + 72 * bt * c, 10),
        };
        let logits = 2 * c * v * bt;
        let head = KindWork {
            forward: work(logits, 4 * (v * c + 3 * bt * v), 4),
            input: work(logits, 4 * (v * c + bt * v), 3),
            weight: work(logits, 4 * (2 * v * c + bt * v), 3),
        };
        let embedding = KindWork {
            forward: work(0, 12 * bt * c, 1),
            input: Work::default(),
            weight: work(0, 12 * bt * c, 2),
        };
        let memory = |fixed, scratch, stash, gradient| {
            let plain = LayerMemory { fixed, scratch, stash, gradient };
            let again = LayerMemory { fixed: fixed + stash, scratch, stash: 0, gradient };
            FormMemory([plain, plain, again, again])
        };
        let activation = 4 * bt * c;
        Batching {
            sequences: sequences as usize,
            microbatches: microbatches as usize,
            shape: format!("gpt2 c{c} b{sequences} t{t}"),
            footprints: vec![Footprint {
                work: vec![embedding, block, head],
                memory: vec![
                    memory(1024, activation, 4 * bt, 0),
                    memory(9216, 8 * activation, 17 * activation, 9 * activation),
                    memory(2560, 0, 4 * bt * v + 2 * activation, activation),
                ],
                ends: EndMemory {
                    first: memory(0, 0, 4 * bt, 0),
                    after_first: memory(0, activation, activation, 0),
                    last: memory(8 * bt * microbatches, 0, 4 * bt, 0),
                    before_last: memory(0, activation, 0, activation),
                },
            }],
            activation,
            link_buffer: activation,
            largest_tensor: vec![4 * v * c, 16 * bt * c, (4 * bt * v).max(4 * v * c)],
            sums: Vec::new(),
        }
    }
}

/// A GPU of this speed and memory.
pub fn gpu(name: &str, gflops: f64, memory: Option<u64>) -> DeviceProfile {
    DeviceProfile {
        name: name.into(),
        memory,
        rates: Rates {
            matmul_gflops: gflops,
            memory_gb_s: gflops / 5.0,
            launch_us: 2.5,
            submit_us: 60.0,
            barrier_us: 200.0,
            ..Rates::default()
        },
        ..DeviceProfile::default()
    }
}

/// A machine of these devices with links of 150 us and 4 GB/s.
pub fn machine(devices: Vec<DeviceProfile>) -> Machine {
    Machine {
        name: "test".into(),
        link: Link { latency_us: 150.0, gb_s: 4.0, out_gb_s: Some(12.0), into_gb_s: Some(12.0) },
        devices,
        ..Machine::default()
    }
}

/// SplitMix64: the same cases on every run.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }

    /// Between two numbers.
    pub fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.below(1 << 20) as f64 / (1 << 20) as f64
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// A workload of a few layers of three kinds whose times and bytes are anything.
pub fn any_workload(random: &mut Random, layers: usize) -> Workload {
    let mut layer = |i: usize| {
        let weights = 1000 * random.below(100);
        let kind = if i == 0 {
            0
        } else if i + 1 == layers {
            2
        } else {
            1
        };
        Layer {
            name: format!("layer {i}"),
            size: Layers::ONE,
            kind,
            weights,
            sent: weights,
            read: weights,
            state: 4 * weights,
            moments: 2 * weights,
        }
    };
    let layers: Vec<Layer> = (0..layers).map(&mut layer).collect();
    let tie = (layers.len() > 1 && random.chance(50)).then(|| TiedLayers {
        user: layers.len() - 1,
        owner: 0,
        bytes: 40_000,
        together: 40_000,
        user_apart: 120_000,
        owner_apart: 80_000,
    });
    let batch = 4;
    let batchings = [1, 2, 4].map(|microbatches| {
        let size = batch / microbatches;
        let mut work = || Work {
            flops: random.between(1e8, 2e9) * size as f64,
            bytes: random.between(1e4, 1e6) * size as f64,
            launches: random.below(10) as usize,
        };
        let mut kind_work = || KindWork { forward: work(), input: work(), weight: work() };
        let work = (0..3).map(|_| kind_work()).collect();
        let mut memory = |most: u64| {
            let mut part = || 1000 * size * random.below(most);
            let plain = LayerMemory { fixed: part(), scratch: part(), stash: 3 * part(), gradient: part() };
            let again = LayerMemory { fixed: plain.fixed + plain.stash, stash: 0, ..plain };
            FormMemory([plain, plain, again, again])
        };
        let input = LayerMemory { stash: 5000 * size, ..LayerMemory::default() };
        let input = FormMemory([input; 4]);
        Batching {
            sequences: size as usize,
            microbatches: microbatches as usize,
            shape: format!("b{size}"),
            footprints: vec![Footprint {
                work,
                memory: (0..3).map(|_| memory(60)).collect(),
                ends: EndMemory {
                    first: memory(3),
                    after_first: input,
                    last: memory(3),
                    before_last: memory(3),
                },
            }],
            activation: 5000 * size,
            link_buffer: 5000 * size,
            largest_tensor: vec![5000 * size; 3],
            sums: Vec::new(),
        }
    });
    Workload {
        layers,
        kinds: ["first", "middle", "last"].map(String::from).to_vec(),
        tie,
        tokens: 4096,
        bucket: 8 << 20,
        sharding: Default::default(),
        host_rings: 0,
        wire: Wire::F32,
        batchings: batchings.to_vec(),
    }
}

/// A machine of unequal devices and links.
pub fn any_machine(random: &mut Random, devices: usize, memory: bool) -> Machine {
    let mut link = || Link {
        latency_us: random.between(0.0, 2000.0),
        gb_s: random.between(0.01, 1.0),
        out_gb_s: random.chance(50).then(|| random.between(0.01, 1.0)),
        into_gb_s: random.chance(50).then(|| random.between(0.01, 1.0)),
    };
    let usual = link();
    let mut links = Vec::new();
    for (from, to) in (0..devices).flat_map(|from| (0..devices).map(move |to| (from, to))) {
        if from != to && (from + 2 * to) % 3 == 0 {
            links.push(LinkProfile { from, to, link: link() });
        }
    }
    let mut device = |i: usize| {
        let mut device = gpu(&format!("device {i}"), random.between(100.0, 1000.0), None);
        device.memory = memory.then(|| 100_000 + 1000 * random.below(3000));
        device.copy_engine = random.chance(50);
        device
    };
    let devices = (0..devices).map(&mut device).collect();
    Machine { name: "any".into(), link: usual, links, devices, ..Machine::default() }
}
