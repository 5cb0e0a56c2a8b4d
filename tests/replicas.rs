//! The data axis: replicas of stages, each for some of the microbatches, with one gradient and one set of weights.

use polystage::pipeline::Setup;
use polystage::schedule::{Schedule, generate, replicate};
use polystage::train::config::Config;
use polystage::train::trainer::Trainer;

use crate::common::adapters;
use crate::pipeline::{assert_same, config, measure, train};

type Run = (Vec<f64>, Vec<(String, Vec<f32>)>);

/// Replicas of the recipe called `name` over so many ranks each, with these shares of the microbatches.
fn mesh(name: &str, ranks: usize, shares: &[usize]) -> Schedule {
    let replicas = shares.iter().map(|&share| generate(name, ranks, share).unwrap());
    replicate(&replicas.collect::<Vec<_>>()).unwrap()
}

fn run(config: &Config, schedule: Schedule, cuts: Option<Vec<usize>>, indices: &[usize]) -> Run {
    let setup = Trainer::setup_in(config, schedule, vec![None; indices.len()]).unwrap();
    measure(train(config, Setup { cuts, ..setup }, indices), 3)
}

fn of_shares(shares: &[usize], more: &[&str]) -> Config {
    let microbatches: usize = shares.iter().sum();
    let batch = format!("train.batch={}", 2 * microbatches);
    config(&[&[batch.as_str(), &format!("pipeline.microbatches={microbatches}")], more].concat())
}

const SHARES: [&[usize]; 4] = [&[2, 2], &[5, 3], &[3, 1], &[2, 1, 3]];

#[test]
fn a_mesh_gives_the_same_bits_in_any_placement_and_one_devices_losses_nearly() {
    for adapter in adapters() {
        let i = adapter.index;
        for shares in SHARES {
            let config = of_shares(shares, &[]);
            let ranks = |stages: usize| vec![i; stages * shares.len()];
            let flat = run(&config, mesh("1f1b", 1, shares), None, &ranks(1));
            for (name, cuts) in [("gpipe", vec![2]), ("1f1b", vec![4]), ("zb-h1", vec![1])] {
                let what = format!("{shares:?} {name} on {}", adapter.name);
                assert_same(&what, &flat, &run(&config, mesh(name, 2, shares), Some(cuts), &ranks(2)));
            }
            let alone = crate::pipeline::run(&config, &[i], 3);
            for (one, replicated) in alone.0.iter().zip(&flat.0) {
                // The same sums in another order.
                approx::assert_relative_eq!(one, replicated, max_relative = 1e-6);
            }
        }
    }
}
