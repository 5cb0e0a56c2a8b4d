//! Softmax cross-entropy with its own gradient; both are 0 for a target beyond the vocabulary.

pub(super) fn forward(shapes: &[&[usize]], inputs: &[&[f64]], scale: f64) -> Vec<Vec<f64>> {
    let v = shapes[0][shapes[0].len() - 1];
    let (mut loss, mut gradient) = (Vec::new(), Vec::new());
    for (logits, &target) in inputs[0].chunks(v).zip(inputs[1]) {
        let max = logits.iter().cloned().fold(f64::MIN, f64::max);
        let sum: f64 = logits.iter().map(|l| (l - max).exp()).sum();
        let Some(goal) = logits.get(target as usize) else {
            loss.push(0.0);
            gradient.extend(std::iter::repeat_n(0.0, v));
            continue;
        };
        loss.push(max + sum.ln() - goal);
        gradient.extend((0..v).map(|i| {
            let onehot = if i == target as usize { 1.0 } else { 0.0 };
            scale * ((logits[i] - max).exp() / sum - onehot)
        }));
    }
    vec![loss, gradient]
}
