//! Elementwise ops and column sums.

const C: f64 = 0.797_884_560_802_865_4; // √(2/π)

/// x/2 · (1 + tanh(√(2/π)(x + 0.044715x³))).
pub fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + (C * (x + 0.044715 * x * x * x)).tanh())
}

/// The derivative of [`gelu`].
pub fn gelu_derivative(x: f64) -> f64 {
    let t = (C * (x + 0.044715 * x * x * x)).tanh();
    0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * C * (1.0 + 3.0 * 0.044715 * x * x)
}

pub(super) fn add(inputs: &[&[f64]]) -> Vec<Vec<f64>> {
    vec![inputs[0].iter().zip(inputs[1]).map(|(a, b)| a + b).collect()]
}

pub(super) fn add_bias(inputs: &[&[f64]]) -> Vec<Vec<f64>> {
    let n = inputs[1].len();
    vec![inputs[0].iter().enumerate().map(|(i, x)| x + inputs[1][i % n]).collect()]
}

pub(super) fn activate(inputs: &[&[f64]]) -> Vec<Vec<f64>> {
    vec![inputs[0].iter().map(|&x| gelu(x)).collect()]
}

pub(super) fn activate_backward(inputs: &[&[f64]]) -> Vec<Vec<f64>> {
    vec![inputs[0].iter().zip(inputs[1]).map(|(dy, &x)| dy * gelu_derivative(x)).collect()]
}

pub(super) fn column_sum(shapes: &[&[usize]], inputs: &[&[f64]]) -> Vec<Vec<f64>> {
    let n = shapes[0][shapes[0].len() - 1];
    let mut sum = vec![0.0; n];
    for (i, x) in inputs[0].iter().enumerate() {
        sum[i % n] += x;
    }
    vec![sum]
}
