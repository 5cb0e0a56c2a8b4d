//! Texts with and without caches, one and many, over one and two devices.

use std::path::PathBuf;

use polystage::folder::ModelFolder;
use polystage::generate::{Extent, Generator, Sampling};
use polystage::model::Model;
use polystage::pipeline::{Setup, Use};
use polystage::schedule::generate;

use crate::common::{adapters, launch_on, open};

const GREEDY: Sampling = Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 1 };

fn folder(name: &str) -> ModelFolder {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models").join(name);
    ModelFolder::open(&path).unwrap()
}

/// Greedy continuations by the logits of whole sequences, each token computed anew.
fn without_caches(folder: &ModelFolder, prompts: &[Vec<u32>], count: usize, device: usize) -> Vec<Vec<u32>> {
    let model = Model::from_hugging_face(folder.config()).unwrap();
    let sequence = prompts.iter().map(Vec::len).max().unwrap() + count;
    let setup = Setup {
        model: model.config().clone(),
        adapter: None,
        batch: 1,
        sequence,
        schedule: generate("gpipe", 1, 1).unwrap(),
        cuts: None,
        recompute: Vec::new(),
        purpose: Use::Logits,
        budgets: vec![None],
    };
    let mut executor = launch_on(&setup, &open(&[device]));
    let watch = executor.watch();
    watch.block_on(executor.load(folder.tensors())).unwrap();
    let mut next = |text: &[u32]| {
        let mut padded = text.to_vec();
        padded.resize(sequence, 0);
        let logits = watch.block_on(executor.infer(padded, vec![text.len() - 1])).unwrap();
        GREEDY.pick(&logits, 0, 0)
    };
    let continued = prompts.iter().map(|prompt| {
        let mut text = prompt.clone();
        for _ in 0..count {
            let token = next(&text);
            text.push(token);
        }
        text
    });
    continued.collect()
}

#[test]
fn many_prompts_of_unlike_lengths_continue_with_caches_as_each_alone_without() {
    for adapter in adapters() {
        let i = adapter.index;
        for name in ["gpt2", "llama", "qwen3"] {
            let folder = folder(name);
            let model = Model::from_hugging_face(folder.config()).unwrap();
            let v = model.config().vocabulary as u32;
            let longest = model.config().longest_sequence();
            let lengths = [1, longest / 2, 3, longest / 3 + 1, 2];
            let prompt = |(p, &n): (usize, &usize)| -> Vec<u32> {
                (0..n as u32).map(|t| (t * 17 + p as u32 * 5 + 1) % v).collect()
            };
            let prompts: Vec<Vec<u32>> = lengths.iter().enumerate().map(prompt).collect();
            let count = longest - longest / 2 - 1;
            let want = without_caches(&folder, &prompts, count, i);
            for devices in [vec![i], vec![i, i], vec![i, i, i]] {
                let extent =
                    Extent { texts: prompts.len(), prompt: longest / 2, tokens: longest / 2 + count };
                let budgets = vec![None; devices.len()];
                let mut generator =
                    Generator::launch(model.config(), None, extent, &open(&devices), budgets).unwrap();
                let watch = generator.watch();
                watch.block_on(generator.load(folder.tensors())).unwrap();
                for _ in 0..2 {
                    let mut heard = 0;
                    let run = generator.run(&prompts, count, GREEDY, v as usize, |_, _| {
                        heard += 1;
                        true
                    });
                    let got = watch.block_on(run).unwrap();
                    assert_eq!(got, want, "{name} over {} x {}", devices.len(), adapter.name);
                    assert_eq!(heard, count * prompts.len());
                }
            }
        }
    }
}
