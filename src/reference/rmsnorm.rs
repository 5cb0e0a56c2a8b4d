//! Root-mean-square normalisation of rows, which are as long as the gain.

pub(super) fn forward(inputs: &[&[f64]], epsilon: f64) -> Vec<Vec<f64>> {
    let c = inputs[1].len();
    let (mut y, mut statistics) = (Vec::new(), Vec::new());
    for x in inputs[0].chunks(c) {
        let inverse = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / c as f64 + epsilon).sqrt();
        statistics.push(inverse);
        y.extend(x.iter().zip(inputs[1]).map(|(x, gain)| x * inverse * gain));
    }
    vec![y, statistics]
}

/// dx = (g − x̂ · mean(g · x̂)) · inverse with g = dy · gain and x̂ = x · inverse, plus the residual's gradient.
pub(super) fn backward(inputs: &[&[f64]]) -> Vec<Vec<f64>> {
    let c = inputs[2].len();
    let mut dx = Vec::with_capacity(inputs[1].len());
    for (row, (dy, x)) in inputs[0].chunks(c).zip(inputs[1].chunks(c)).enumerate() {
        let inverse = inputs[3][row];
        let g = |i: usize| dy[i] * inputs[2][i];
        let mean = (0..c).map(|i| g(i) * x[i] * inverse).sum::<f64>() / c as f64;
        for (i, x) in x.iter().enumerate() {
            let residual = inputs.get(4).map_or(0.0, |r| r[row * c + i]);
            dx.push((g(i) - x * inverse * mean) * inverse + residual);
        }
    }
    vec![dx]
}

pub(super) fn weight_backward(inputs: &[&[f64]]) -> Vec<Vec<f64>> {
    let c = inputs[1].len() / inputs[2].len();
    let mut gain = vec![0.0; c];
    for (i, (dy, x)) in inputs[0].iter().zip(inputs[1]).enumerate() {
        gain[i % c] += dy * x * inputs[2][i / c];
    }
    vec![gain]
}
