//! Rotary position embedding of queries and keys, packed with the values.

/// Row of the table for token number `row` of (B,T).
fn position(row: usize, tokens: usize, positions: Option<&&[f64]>) -> usize {
    positions.map_or(row % tokens, |p| p[row] as usize)
}

pub(super) fn forward(heads: [usize; 2], shapes: &[&[usize]], inputs: &[&[f64]]) -> Vec<Vec<f64>> {
    let (rows, tokens, size) = (shapes[0][0] * shapes[0][1], shapes[0][1], shapes[3][1]);
    let half = size / 2;
    let mut packed = Vec::new();
    for row in 0..rows {
        let turn = &inputs[3][position(row, tokens, inputs.get(4)) * size..][..size];
        for (part, heads) in [heads[0], heads[1], heads[1]].into_iter().enumerate() {
            for head in 0..heads {
                let x = &inputs[part][(row * heads + head) * size..][..size];
                packed.extend((0..size).map(|i| match (part, i < half) {
                    (2, _) => x[i],
                    (_, true) => x[i] * turn[i] - x[i + half] * turn[i + half],
                    (_, false) => x[i] * turn[i - half] + x[i - half] * turn[i],
                }));
            }
        }
    }
    vec![packed]
}

pub(super) fn backward(heads: [usize; 2], shapes: &[&[usize]], inputs: &[&[f64]]) -> Vec<Vec<f64>> {
    let (rows, tokens, size) = (shapes[0][0] * shapes[0][1], shapes[0][1], shapes[1][1]);
    let half = size / 2;
    let mut parts = vec![Vec::new(); 3];
    let mut packed = inputs[0].chunks(size);
    for row in 0..rows {
        let turn = &inputs[1][position(row, tokens, inputs.get(2)) * size..][..size];
        for (part, heads) in [heads[0], heads[1], heads[1]].into_iter().enumerate() {
            for d in packed.by_ref().take(heads) {
                parts[part].extend((0..size).map(|i| match (part, i < half) {
                    (2, _) => d[i],
                    (_, true) => d[i] * turn[i] + d[i + half] * turn[i + half],
                    (_, false) => d[i] * turn[i - half] - d[i - half] * turn[i],
                }));
            }
        }
    }
    parts
}
