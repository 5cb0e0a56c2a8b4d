//! Workloads and machines for the planner's tests.

use polystage::plan::{
    Batching, DeviceProfile, EndMemory, KindMemory, KindWork, Layer, LayerMemory, Link, Machine, Rates,
    TiedLayers, Work, Workload,
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
        let layer = |name: String, kind, weights: u64| Layer { name, kind, weights, state: 4 * weights };
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
            batchings: divisors.map(|m| self.batching(batch / m, m)).collect(),
        }
    }

    fn batching(&self, sequences: u64, microbatches: u64) -> Batching {
        let Gpt { width: c, vocabulary: v, sequence: t, .. } = *self;
        let bt = sequences * t;
        let work = |flops: u64, bytes: u64, launches| Work { flops: flops as f64, bytes: bytes as f64, launches };
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
            KindMemory { whole: plain, split: plain, whole_recompute: again, split_recompute: again }
        };
        let activation = 4 * bt * c;
        Batching {
            sequences: sequences as usize,
            microbatches: microbatches as usize,
            shape: format!("gpt2 c{c} b{sequences} t{t}"),
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
            activation,
            link_buffer: activation,
            largest_tensor: vec![4 * v * c, 16 * bt * c, (4 * bt * v).max(4 * v * c)],
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
