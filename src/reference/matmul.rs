//! Matmul and its epilogues.

use super::elementwise::{gelu, gelu_derivative};
use crate::graph::{Epilogue, Layout, Op};

pub(super) fn matmul(
    layout: Layout,
    epilogue: Epilogue,
    shapes: &[&[usize]],
    inputs: &[&[f64]],
) -> Vec<Vec<f64>> {
    let (m, n, k) = Op::matmul_extents(layout, shapes[0], shapes[1]);
    let (a, b) = (inputs[0], inputs[1]);
    let mut c = vec![0.0; m * n];
    for row in 0..m {
        for column in 0..n {
            c[row * n + column] = (0..k)
                .map(|i| match layout {
                    Layout::NN => a[row * k + i] * b[i * n + column],
                    Layout::NT => a[row * k + i] * b[column * k + i],
                    Layout::TN => a[i * m + row] * b[i * n + column],
                })
                .sum();
        }
    }
    let each =
        |f: &dyn Fn(usize, f64) -> f64| c.iter().enumerate().map(|(i, &x)| f(i, x)).collect::<Vec<_>>();
    match epilogue {
        Epilogue::None => vec![c],
        Epilogue::Bias => vec![each(&|i, x| x + inputs[2][i % n])],
        Epilogue::BiasGelu => {
            let u = each(&|i, x| x + inputs[2][i % n]);
            vec![u.iter().map(|&u| gelu(u)).collect(), u]
        }
        Epilogue::BiasResidual => vec![each(&|i, x| x + inputs[2][i % n] + inputs[3][i])],
        Epilogue::Residual => vec![each(&|i, x| x + inputs[2][i])],
        Epilogue::GeluBackward => vec![each(&|i, x| x * gelu_derivative(inputs[2][i]))],
    }
}
