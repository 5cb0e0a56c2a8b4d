//! Softmax cross-entropy with its own gradient; both are 0 for a target beyond the vocabulary, which may be in parts.

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

/// Maximum, Σ exp(logit − maximum) and the target's logit of a part's rows, in place `member` of `members`.
pub(super) fn statistics(
    shapes: &[&[usize]],
    inputs: &[&[f64]],
    [member, members, first]: [usize; 3],
) -> Vec<Vec<f64>> {
    let (v, rows) = (shapes[0][shapes[0].len() - 1], inputs[1].len());
    let mut all = vec![0.0; members * rows * 3];
    let own = all[member * rows * 3..].chunks_mut(3);
    for ((to, logits), &target) in own.zip(inputs[0].chunks(v)).zip(inputs[1]) {
        let max = logits.iter().cloned().fold(f64::MIN, f64::max);
        let goal = (target as usize).checked_sub(first).and_then(|goal| logits.get(goal));
        let sum = logits.iter().map(|l| (l - max).exp()).sum();
        to.copy_from_slice(&[max, sum, goal.copied().unwrap_or(0.0)]);
    }
    vec![all]
}

/// Loss and gradient of the part whose first column is token `first`, from the statistics of all parts.
pub(super) fn part(
    shapes: &[&[usize]],
    inputs: &[&[f64]],
    scale: f64,
    [first, vocabulary]: [usize; 2],
) -> Vec<Vec<f64>> {
    let (v, rows) = (shapes[0][shapes[0].len() - 1], inputs[1].len());
    let (mut loss, mut gradient) = (Vec::new(), Vec::new());
    for (row, (logits, &target)) in inputs[0].chunks(v).zip(inputs[1]).enumerate() {
        let parts = || inputs[2].chunks(3).skip(row).step_by(rows);
        let max = parts().map(|part| part[0]).fold(f64::MIN, f64::max);
        let sum: f64 = parts().map(|part| part[1] * (part[0] - max).exp()).sum();
        let goal: f64 = parts().map(|part| part[2]).sum();
        let counts = (target as usize) < vocabulary;
        loss.push(if counts { max + sum.ln() - goal } else { 0.0 });
        gradient.extend((0..v).map(|i| {
            let onehot = if first + i == target as usize { 1.0 } else { 0.0 };
            if counts { scale * ((logits[i] - max).exp() / sum - onehot) } else { 0.0 }
        }));
    }
    vec![loss, gradient]
}
