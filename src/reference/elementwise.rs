//! Elementwise ops and column sums.

const C: f64 = 0.797_884_560_802_865_4; // √(2/π)

/// 1 / (1 + exp(−2z)), z = √(2/π)(x + 0.044715x³): (1 + tanh z) / 2 without its cancellation far below zero.
fn gate(x: f64) -> f64 {
    1.0 / (1.0 + (-2.0 * C * (x + 0.044715 * x * x * x)).exp())
}

/// x/2 · (1 + tanh(√(2/π)(x + 0.044715x³))).
pub fn gelu(x: f64) -> f64 {
    x * gate(x)
}

/// The derivative of [`gelu`].
pub fn gelu_derivative(x: f64) -> f64 {
    let s = gate(x);
    s + x * s * (1.0 - s) * 2.0 * C * (1.0 + 3.0 * 0.044715 * x * x)
}

pub(super) fn add(inputs: &[&[f64]]) -> Vec<Vec<f64>> {
    vec![inputs[0].iter().zip(inputs[1]).map(|(a, b)| a + b).collect()]
}

pub(super) fn add_bias(inputs: &[&[f64]]) -> Vec<Vec<f64>> {
    let n = inputs[1].len();
    vec![inputs[0].iter().enumerate().map(|(i, x)| x + inputs[1][i % n]).collect()]
}

pub(super) fn scale(inputs: &[&[f64]], factor: f64) -> Vec<Vec<f64>> {
    vec![inputs[0].iter().map(|x| factor * x).collect()]
}

pub(super) fn activate(inputs: &[&[f64]]) -> Vec<Vec<f64>> {
    vec![inputs[0].iter().map(|&x| gelu(x)).collect()]
}

pub(super) fn activate_backward(inputs: &[&[f64]]) -> Vec<Vec<f64>> {
    vec![inputs[0].iter().zip(inputs[1]).map(|(dy, &x)| dy * gelu_derivative(x)).collect()]
}

/// x / (1 + exp(−x)).
pub fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

pub(super) fn swiglu(inputs: &[&[f64]]) -> Vec<Vec<f64>> {
    vec![inputs[0].iter().zip(inputs[1]).map(|(&gate, up)| silu(gate) * up).collect()]
}

pub(super) fn swiglu_backward(inputs: &[&[f64]]) -> Vec<Vec<f64>> {
    let (mut d_gate, mut d_up) = (Vec::new(), Vec::new());
    for ((dy, &gate), up) in inputs[0].iter().zip(inputs[1]).zip(inputs[2]) {
        let s = 1.0 / (1.0 + (-gate).exp());
        d_gate.push(dy * up * s * (1.0 + gate * (1.0 - s)));
        d_up.push(dy * silu(gate));
    }
    vec![d_gate, d_up]
}

pub(super) fn column_sum(shapes: &[&[usize]], inputs: &[&[f64]]) -> Vec<Vec<f64>> {
    let n = shapes[0][shapes[0].len() - 1];
    let mut sum = vec![0.0; n];
    for (i, x) in inputs[0].iter().enumerate() {
        sum[i % n] += x;
    }
    vec![sum]
}
