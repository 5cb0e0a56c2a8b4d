//! Who has what of the state: levels of ZeRO, sums by microbatch, the host's memory.

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
    measure(train(config, Setup { cuts, ..setup }, indices), 2)
}

fn of_shares(shares: &[usize], more: &[&str]) -> Config {
    let microbatches: usize = shares.iter().sum();
    let batch = format!("train.batch={}", 2 * microbatches);
    config(&[&[batch.as_str(), &format!("pipeline.microbatches={microbatches}")], more].concat())
}

const SHARES: [&[usize]; 4] = [&[2, 2], &[5, 3], &[3, 1], &[2, 1, 3]];
const LEVELS: [&str; 3] = ["mesh.sum=\"microbatch\"", "mesh.zero=2", "mesh.zero=3"];

#[test]
fn added_by_microbatch_every_level_has_the_bits_of_one_device() {
    for adapter in adapters() {
        let i = adapter.index;
        for shares in SHARES {
            let alone = crate::pipeline::run(&of_shares(shares, &[]), &[i], 2);
            for (at, level) in LEVELS.into_iter().enumerate() {
                let config = of_shares(shares, &[level]);
                let what = format!("{level} {shares:?} on {}", adapter.name);
                let flat = run(&config, mesh("1f1b", 1, shares), None, &vec![i; shares.len()]);
                assert_same(&what, &alone, &flat);
                let (name, cut) = [("gpipe", 2), ("1f1b", 4), ("zb-h1", 1)][(at + shares[0]) % 3];
                let ranks = vec![i; 2 * shares.len()];
                assert_same(
                    &format!("{what}, {name}"),
                    &alone,
                    &run(&config, mesh(name, 2, shares), Some(vec![cut]), &ranks),
                );
            }
        }
    }
}
