//! Token and position embeddings.

pub(super) fn forward(shapes: &[&[usize]], inputs: &[&[f64]]) -> Vec<Vec<f64>> {
    let (t, c) = (shapes[0][1], shapes[1][1]);
    let mut x = Vec::with_capacity(inputs[0].len() * c);
    for (row, &token) in inputs[0].iter().enumerate() {
        let place = inputs.get(3).map_or(row % t, |places| places[row] as usize);
        for column in 0..c {
            let of_token = inputs[1].get(token as usize * c + column).copied().unwrap_or(0.0);
            x.push(of_token + inputs[2][place * c + column]);
        }
    }
    vec![x]
}

pub(super) fn gather(shapes: &[&[usize]], inputs: &[&[f64]]) -> Vec<Vec<f64>> {
    let c = shapes[1][shapes[1].len() - 1];
    let beyond = vec![0.0; c];
    let row = |&row: &f64| inputs[1].chunks(c).nth(row as usize).unwrap_or(&beyond);
    vec![inputs[0].iter().flat_map(row).copied().collect()]
}

pub(super) fn table_backward(shapes: &[&[usize]], inputs: &[&[f64]], vocabulary: usize) -> Vec<Vec<f64>> {
    let c = shapes[0][shapes[0].len() - 1];
    let mut table = vec![0.0; vocabulary * c];
    for segment in inputs[1].chunks(3) {
        let (id, start, end) = (segment[0] as usize, segment[1] as usize, segment[2] as usize);
        for &row in &inputs[2][start..end] {
            for column in 0..c {
                table[id * c + column] += inputs[0][row as usize * c + column];
            }
        }
    }
    vec![table]
}

pub(super) fn position_backward(shapes: &[&[usize]], inputs: &[&[f64]], context: usize) -> Vec<Vec<f64>> {
    let (t, c) = (shapes[0][1], shapes[0][2]);
    let mut positions = vec![0.0; context * c];
    for (i, dx) in inputs[0].iter().enumerate() {
        positions[i / c % t * c + i % c] += dx;
    }
    vec![positions]
}
