//! The numbers of each AdamW step: learning rate, clipping, bias corrections.

use super::config::TrainConfig;
use crate::ops::parameters::AdamStep;

/// Learning rate of step `step`, counted from 0: linear warm-up, then a cosine to the minimum at the last step.
pub fn learning_rate(config: &TrainConfig, step: u64) -> f64 {
    let warmup = config.warmup();
    if step < warmup {
        return config.learning_rate * (step + 1) as f64 / warmup as f64;
    }
    let low = config.minimum_learning_rate.unwrap_or(config.learning_rate / 10.0).min(config.learning_rate);
    let span = config.steps.saturating_sub(warmup).max(1) as f64;
    let part = ((step - warmup) as f64 / span).min(1.0);
    low + 0.5 * (config.learning_rate - low) * (1.0 + (std::f64::consts::PI * part).cos())
}

/// What the kernel needs for step `step`, counted from 0, before which so many were skipped, given the norm of the whole gradient.
pub fn adam_step(config: &TrainConfig, step: u64, skipped: u64, gradient_norm: f64) -> AdamStep {
    let rate = learning_rate(config, step);
    let t = (step + 1 - skipped.min(step)) as f64;
    // PyTorch's clip_grad_norm_ adds 1e-6 to the norm; so do we, to take the same steps.
    let clip =
        if config.clip_norm > 0.0 { (config.clip_norm / (gradient_norm + 1e-6)).min(1.0) } else { 1.0 };
    AdamStep {
        clip: clip as f32,
        rate: rate as f32,
        beta1: config.beta1 as f32,
        beta2: config.beta2 as f32,
        epsilon: config.epsilon as f32,
        decay: (rate * config.weight_decay) as f32,
        correction1: (1.0 / (1.0 - config.beta1.powf(t))) as f32,
        correction2: (1.0 / (1.0 - config.beta2.powf(t))) as f32,
    }
}

#[cfg(test)]
mod tests {
    use super::learning_rate;
    use crate::train::config::Config;

    #[test]
    fn the_learning_rate_rises_over_the_warm_up_and_falls_to_its_minimum() {
        let text = "[model]\nkind='gpt2'\nlayers=1\nwidth=8\nheads=1\ncontext=8\nvocabulary=256\n[data]\ntrain=['x']\n\
            [train]\nsteps=110\nbatch=1\nsequence=8\nlearning_rate=0.01\nwarmup=10";
        let config = Config::parse(text, &[], "test").unwrap().train;
        assert!((learning_rate(&config, 0) - 0.001).abs() < 1e-12);
        assert!((learning_rate(&config, 9) - 0.01).abs() < 1e-12);
        assert!((learning_rate(&config, 60) - 0.0055).abs() < 1e-12);
        assert!((learning_rate(&config, 110) - 0.001).abs() < 1e-12);
        for step in 10..110 {
            assert!(learning_rate(&config, step + 1) < learning_rate(&config, step));
        }
    }

    #[test]
    fn a_short_run_warms_up_for_a_tenth_of_its_steps_unless_it_says_otherwise() {
        let warmup = |steps: u64, more: &str| {
            let text = format!(
                "[model]\nkind='gpt2'\nlayers=1\nwidth=8\nheads=1\ncontext=8\nvocabulary=256\n[data]\ntrain=['x']\n\
                 [train]\nsteps={steps}\nbatch=1\nsequence=8\n{more}"
            );
            Config::parse(&text, &[], "test").unwrap().train.warmup()
        };
        assert_eq!([1, 4, 20, 100, 5000].map(|steps| warmup(steps, "")), [1, 1, 2, 10, 10]);
        assert_eq!(warmup(4, "warmup=7"), 7);
    }
}
