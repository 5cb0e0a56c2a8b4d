//! Causal multi-head self-attention on a packed (B,T,3C) query-key-value tensor.

/// Where an element of q, k or v (`part` 0, 1, 2) stands in the packed tensor.
struct Packed {
    t: usize,
    c: usize,
    size: usize,
    heads: usize,
}

impl Packed {
    fn new(heads: usize, qkv: &[usize]) -> Self {
        let c = qkv[2] / 3;
        Packed { t: qkv[1], c, size: c / heads, heads }
    }

    fn at(&self, part: usize, b: usize, t: usize, h: usize, d: usize) -> usize {
        (b * self.t + t) * 3 * self.c + part * self.c + h * self.size + d
    }

    fn output(&self, b: usize, t: usize, h: usize, d: usize) -> usize {
        (b * self.t + t) * self.c + h * self.size + d
    }

    fn row(&self, b: usize, h: usize, t: usize) -> usize {
        (b * self.heads + h) * self.t + t
    }

    /// Scaled scores of query t with keys 0..=t.
    fn scores(&self, qkv: &[f64], b: usize, t: usize, h: usize) -> Vec<f64> {
        let scale = 1.0 / (self.size as f64).sqrt();
        (0..=t)
            .map(|s| {
                let dot = |d| qkv[self.at(0, b, t, h, d)] * qkv[self.at(1, b, s, h, d)];
                scale * (0..self.size).map(dot).sum::<f64>()
            })
            .collect()
    }
}

pub(super) fn forward(heads: usize, shapes: &[&[usize]], inputs: &[&[f64]]) -> Vec<Vec<f64>> {
    let (p, qkv, batch) = (Packed::new(heads, shapes[0]), inputs[0], shapes[0][0]);
    let (mut o, mut lse) = (vec![0.0; batch * p.t * p.c], vec![0.0; batch * heads * p.t]);
    for b in 0..batch {
        for h in 0..heads {
            for t in 0..p.t {
                let scores = p.scores(qkv, b, t, h);
                let max = scores.iter().cloned().fold(f64::MIN, f64::max);
                let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                lse[p.row(b, h, t)] = max + sum.ln();
                for (s, score) in scores.iter().enumerate() {
                    let weight = (score - max).exp() / sum;
                    for d in 0..p.size {
                        o[p.output(b, t, h, d)] += weight * qkv[p.at(2, b, s, h, d)];
                    }
                }
            }
        }
    }
    vec![o, lse]
}

pub(super) fn backward(heads: usize, shapes: &[&[usize]], inputs: &[&[f64]]) -> Vec<Vec<f64>> {
    let (d_o, qkv, o, lse) = (inputs[0], inputs[1], inputs[2], inputs[3]);
    let (p, batch) = (Packed::new(heads, shapes[1]), shapes[1][0]);
    let scale = 1.0 / (p.size as f64).sqrt();
    let (mut dqkv, mut delta) = (vec![0.0; qkv.len()], vec![0.0; lse.len()]);
    for b in 0..batch {
        for h in 0..heads {
            for t in 0..p.t {
                let row = p.row(b, h, t);
                let outputs = (0..p.size).map(|d| p.output(b, t, h, d));
                delta[row] = outputs.map(|i| d_o[i] * o[i]).sum();
                for (s, score) in p.scores(qkv, b, t, h).into_iter().enumerate() {
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
