//! Layer normalisation over the last axis.

pub(super) fn forward(shapes: &[&[usize]], inputs: &[&[f64]], epsilon: f64) -> Vec<Vec<f64>> {
    let c = shapes[0][shapes[0].len() - 1];
    let (mut y, mut statistics) = (Vec::new(), Vec::new());
    for x in inputs[0].chunks(c) {
        let mean = x.iter().sum::<f64>() / c as f64;
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / c as f64;
        let inverse = 1.0 / (variance + epsilon).sqrt();
        statistics.extend([mean, inverse]);
        y.extend((0..c).map(|i| (x[i] - mean) * inverse * inputs[1][i] + inputs[2][i]));
    }
    vec![y, statistics]
}

/// dx = (g − mean(g) − x̂ · mean(g · x̂)) / σ with g = dy · gain, plus the residual's gradient if there is one.
pub(super) fn backward(shapes: &[&[usize]], inputs: &[&[f64]]) -> Vec<Vec<f64>> {
    let c = shapes[1][shapes[1].len() - 1];
    let mut dx = Vec::with_capacity(inputs[1].len());
    for (row, (dy, x)) in inputs[0].chunks(c).zip(inputs[1].chunks(c)).enumerate() {
        let (mean, inverse) = (inputs[3][2 * row], inputs[3][2 * row + 1]);
        let hat = |i: usize| (x[i] - mean) * inverse;
        let g = |i: usize| dy[i] * inputs[2][i];
        let mean_g = (0..c).map(g).sum::<f64>() / c as f64;
        let mean_gx = (0..c).map(|i| g(i) * hat(i)).sum::<f64>() / c as f64;
        for i in 0..c {
            let residual = inputs.get(4).map_or(0.0, |r| r[row * c + i]);
            dx.push((g(i) - mean_g - hat(i) * mean_gx) * inverse + residual);
        }
    }
    vec![dx]
}

pub(super) fn weight_backward(shapes: &[&[usize]], inputs: &[&[f64]]) -> Vec<Vec<f64>> {
    let c = shapes[1][shapes[1].len() - 1];
    let (mut gain, mut bias) = (vec![0.0; c], vec![0.0; c]);
    for (row, (dy, x)) in inputs[0].chunks(c).zip(inputs[1].chunks(c)).enumerate() {
        let (mean, inverse) = (inputs[2][2 * row], inputs[2][2 * row + 1]);
        for i in 0..c {
            gain[i] += dy[i] * (x[i] - mean) * inverse;
            bias[i] += dy[i];
        }
    }
    vec![gain, bias]
}
