//! Causal self-attention with grouped heads on a packed (B,T,(H+2K)D) query-key-value tensor.

/// Where an element of q, k or v (`part` 0, 1, 2) of a query head stands in the packed tensor.
struct Packed {
    t: usize,
    size: usize,
    heads: usize,
    kv_heads: usize,
}

impl Packed {
    fn new([heads, kv_heads]: [usize; 2], qkv: &[usize]) -> Self {
        Packed { t: qkv[1], size: qkv[2] / (heads + 2 * kv_heads), heads, kv_heads }
    }

    /// The key-value head of a query head.
    fn shared(&self, h: usize) -> usize {
        h / (self.heads / self.kv_heads)
    }

    fn at(&self, part: usize, b: usize, t: usize, h: usize, d: usize) -> usize {
        let slot = match part {
            0 => h,
            part => self.heads + (part - 1) * self.kv_heads + self.shared(h),
        };
        ((b * self.t + t) * (self.heads + 2 * self.kv_heads) + slot) * self.size + d
    }

    fn output(&self, b: usize, t: usize, h: usize, d: usize) -> usize {
        ((b * self.t + t) * self.heads + h) * self.size + d
    }

    fn row(&self, b: usize, h: usize, t: usize) -> usize {
        (b * self.heads + h) * self.t + t
    }

    /// Scaled scores of query t with keys first..=t.
    fn scores(&self, qkv: &[f64], b: usize, t: usize, h: usize, first: usize) -> Vec<f64> {
        let scale = 1.0 / (self.size as f64).sqrt();
        (first..=t)
            .map(|s| {
                let dot = |d| qkv[self.at(0, b, t, h, d)] * qkv[self.at(1, b, s, h, d)];
                scale * (0..self.size).map(dot).sum::<f64>()
            })
            .collect()
    }
}

/// The first key that token number `at` sees.
fn first_key(starts: Option<&&[f64]>, at: usize) -> usize {
    starts.map_or(0, |starts| starts[at] as usize)
}

/// exp(score − log Σ exp(scores)) of each score, and that logarithm.
fn softmax(scores: &[f64]) -> (Vec<f64>, f64) {
    let max = scores.iter().cloned().fold(f64::MIN, f64::max);
    let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
    (scores.iter().map(|s| (s - max).exp() / sum).collect(), max + sum.ln())
}

pub(super) fn forward(heads: [usize; 2], shapes: &[&[usize]], inputs: &[&[f64]]) -> Vec<Vec<f64>> {
    let (p, qkv, batch) = (Packed::new(heads, shapes[0]), inputs[0], shapes[0][0]);
    let (mut o, mut lse) = (vec![0.0; batch * p.t * p.heads * p.size], vec![0.0; batch * p.heads * p.t]);
    for b in 0..batch {
        for h in 0..p.heads {
            for t in 0..p.t {
                let first = first_key(inputs.get(1), b * p.t + t);
                let (weights, sum) = softmax(&p.scores(qkv, b, t, h, first));
                lse[p.row(b, h, t)] = sum;
                for (s, weight) in (first..).zip(weights) {
                    for d in 0..p.size {
                        o[p.output(b, t, h, d)] += weight * qkv[p.at(2, b, s, h, d)];
                    }
                }
            }
        }
    }
    vec![o, lse]
}

pub(super) fn backward(heads: [usize; 2], shapes: &[&[usize]], inputs: &[&[f64]]) -> Vec<Vec<f64>> {
    let (d_o, qkv, o, lse) = (inputs[0], inputs[1], inputs[2], inputs[3]);
    let (p, batch) = (Packed::new(heads, shapes[1]), shapes[1][0]);
    let scale = 1.0 / (p.size as f64).sqrt();
    let (mut dqkv, mut delta) = (vec![0.0; qkv.len()], vec![0.0; lse.len()]);
    for b in 0..batch {
        for h in 0..p.heads {
            for t in 0..p.t {
                let row = p.row(b, h, t);
                let outputs = (0..p.size).map(|d| p.output(b, t, h, d));
                delta[row] = outputs.map(|i| d_o[i] * o[i]).sum();
                let first = first_key(inputs.get(4), b * p.t + t);
                for (s, score) in (first..).zip(p.scores(qkv, b, t, h, first)) {
                    let weight = (score - lse[row]).exp();
                    let dot = |d| d_o[p.output(b, t, h, d)] * qkv[p.at(2, b, s, h, d)];
                    let d_score = weight * ((0..p.size).map(dot).sum::<f64>() - delta[row]) * scale;
                    for d in 0..p.size {
                        dqkv[p.at(0, b, t, h, d)] += d_score * qkv[p.at(1, b, s, h, d)];
                        dqkv[p.at(1, b, s, h, d)] += d_score * qkv[p.at(0, b, t, h, d)];
                        dqkv[p.at(2, b, s, h, d)] += weight * d_o[p.output(b, t, h, d)];
                    }
                }
            }
        }
    }
    vec![dqkv, delta]
}

pub(super) fn cached(heads: [usize; 2], shapes: &[&[usize]], inputs: &[&[f64]]) -> Vec<Vec<f64>> {
    let (p, qkv, positions) = (Packed::new(heads, shapes[0]), inputs[0], inputs[1]);
    let (batch, capacity, width) = (shapes[2][0], shapes[2][1], p.kv_heads * p.size);
    let scale = 1.0 / (p.size as f64).sqrt();
    let mut cache = inputs[2].to_vec();
    for (row, &position) in positions.iter().enumerate() {
        let from = row * (p.heads + 2 * p.kv_heads) * p.size + p.heads * p.size;
        let to = (row / p.t * capacity + position as usize) * 2 * width;
        cache[to..to + 2 * width].copy_from_slice(&qkv[from..from + 2 * width]);
    }
    let mut o = vec![0.0; batch * p.t * p.heads * p.size];
    for b in 0..batch {
        let at = |part: usize, s: usize, h: usize| {
            (b * capacity + s) * 2 * width + part * width + p.shared(h) * p.size
        };
        for h in 0..p.heads {
            for t in 0..p.t {
                let score = |s: usize| {
                    let dot = |d| qkv[p.at(0, b, t, h, d)] * cache[at(0, s, h) + d];
                    scale * (0..p.size).map(dot).sum::<f64>()
                };
                let scores: Vec<f64> = (0..=positions[b * p.t + t] as usize).map(score).collect();
                for (s, weight) in softmax(&scores).0.iter().enumerate() {
                    for d in 0..p.size {
                        o[p.output(b, t, h, d)] += weight * cache[at(1, s, h) + d];
                    }
                }
            }
        }
    }
    vec![o, cache]
}
