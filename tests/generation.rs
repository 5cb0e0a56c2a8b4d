//! Texts with and without caches, one and many, over one and two devices.

use std::path::PathBuf;

use polystage::Error;
use polystage::folder::ModelFolder;
use polystage::generate::{Extent, Generator, Sampling};
use polystage::gpu::Device;
use polystage::graph::LOGIT_BYTES;
use polystage::mesh::{Division, Wire};
use polystage::model::{Model, Weights};
use polystage::pipeline::{Setup, Use};
use polystage::plan::Sharding;
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
        weights: Weights::F32,
        logits: LOGIT_BYTES,
        batch: 1,
        sequence,
        schedule: generate("gpipe", 1, 1).unwrap(),
        cuts: None,
        shared: false,
        recompute: Vec::new(),
        sharding: Sharding::default(),
        tensor: Division::none(),
        wire: Wire::F32,
        host: None,
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
            let count = 8;
            // The longest ends where the model's context does.
            let most = longest - count - 1;
            let lengths = [1, most, 3, longest / 3 + 1, 2];
            let prompt = |(p, &n): (usize, &usize)| -> Vec<u32> {
                (0..n as u32).map(|t| (t * 17 + p as u32 * 5 + 1) % v).collect()
            };
            let prompts: Vec<Vec<u32>> = lengths.iter().enumerate().map(prompt).collect();
            let want = without_caches(&folder, &prompts, count, i);
            let over =
                [(vec![i], vec![1]), (vec![i; 2], vec![1]), (vec![i; 3], vec![1]), (vec![i; 2], vec![1, 1])];
            for (devices, tensor) in over {
                let extent = Extent { texts: prompts.len(), prompt: most, tokens: most + count };
                let budgets = vec![None; devices.len()];
                let mut generator = Generator::launch_divided(
                    &model,
                    extent,
                    &open(&devices),
                    budgets,
                    &Division::of(&tensor),
                )
                .unwrap();
                let watch = generator.watch();
                watch.block_on(generator.executor().load(folder.tensors())).unwrap();
                for _ in 0..2 {
                    let mut heard = 0;
                    let run = generator.run(&prompts, count, GREEDY, v as usize, |_, _| {
                        heard += 1;
                        true
                    });
                    let got = watch.block_on(run).unwrap();
                    assert_eq!(got, want, "{name} over {tensor:?} {} x {}", devices.len(), adapter.name);
                    assert_eq!(heard, count * prompts.len());
                }
            }
        }
    }
}

fn launch(folder: &ModelFolder, extent: Extent, devices: &[Device], budgets: &[Option<u64>]) -> Generator {
    let model = Model::from_hugging_face(folder.config()).unwrap();
    let mut generator = Generator::launch(&model, extent, devices, budgets.to_vec()).unwrap();
    let watch = generator.watch();
    watch.block_on(generator.executor().load(folder.tensors())).unwrap();
    generator
}

fn greedy(generator: &mut Generator, prompts: &[Vec<u32>], count: usize) -> Vec<Vec<u32>> {
    let watch = generator.watch();
    watch.block_on(generator.run(prompts, count, GREEDY, usize::MAX, |_, _| true)).unwrap()
}

#[test]
fn texts_that_go_on_in_their_caches_are_those_that_pass_anew() {
    for adapter in adapters() {
        for name in ["gpt2", "llama", "qwen3"] {
            let folder = folder(name);
            let model = Model::from_hugging_face(folder.config()).unwrap();
            let (v, longest) = (model.config().vocabulary as u32, model.config().longest_sequence());
            let extent = Extent { texts: 3, prompt: longest - 6, tokens: longest };
            let text = |seed: u32, n: usize| (0..n as u32).map(|t| (t * 13 + seed) % v).collect::<Vec<u32>>();
            for count in [1, 2] {
                let devices = open(&vec![adapter.index; count]);
                let mut kept = launch(&folder, extent, &devices, &vec![None; count]);
                let mut fresh = launch(&folder, extent, &devices, &vec![None; count]);
                let mut prompts = vec![text(1, 3), text(2, longest / 2), text(3, 5)];
                for turn in 0..3 {
                    let got = greedy(&mut kept, &prompts, 4);
                    // No prompt begins with 0, so nothing of what this leaves is taken up.
                    greedy(&mut fresh, &[vec![0], vec![0], vec![0]], 1);
                    let anew = greedy(&mut fresh, &prompts, 4);
                    assert_eq!(got, anew, "{name}, turn {turn} over {count} x {}", adapter.name);
                    prompts = got;
                    // The first goes on to the end of the caches; the second is another after a while and becomes
                    // shorter; the third, and in the end all, pass nothing but a last token.
                    let room = (longest - 6).saturating_sub(prompts[0].len());
                    prompts[0].extend(text(7, if turn == 0 { 9.min(room) } else { room }));
                    let half = prompts[1].len() / 2;
                    prompts[1][half] = (prompts[1][half] + 1) % v;
                    prompts[1].truncate(half + 2);
                }
            }
        }
    }
}

#[test]
fn a_device_with_little_memory_gets_fewer_layers_and_the_texts_stay() {
    for adapter in adapters() {
        let folder = folder("llama_untied");
        let model = Model::from_hugging_face(folder.config()).unwrap();
        let extent = Extent { texts: 2, prompt: 8, tokens: 24 };
        let devices = open(&[adapter.index, adapter.index]);
        let prompts = vec![vec![1, 2, 3], vec![4, 5, 6, 7, 8, 9, 10, 11]];
        let want = greedy(&mut launch(&folder, extent, &devices, &[None, None]), &prompts, 16);
        let refused = |budgets| match Generator::launch(&model, extent, &devices, budgets).err() {
            Some(Error::Memory { device, need, .. }) => (device, need),
            other => panic!("refused, not {other:?}"),
        };
        let mut moved = 0;
        for device in [0, 1] {
            let budget = |bytes: u64| (0..2).map(|d| (d == device).then_some(bytes)).collect::<Vec<_>>();
            let (which, need) = refused(budget(1));
            assert_eq!(which, device);
            let launched = Generator::launch(&model, extent, &devices, budget(need - 1));
            if launched.is_ok() {
                moved += 1;
                let mut limited = launch(&folder, extent, &devices, &budget(need - 1));
                assert_eq!(greedy(&mut limited, &prompts, 16), want, "{}", adapter.name);
            }
        }
        assert!(moved > 0, "neither device could hold fewer layers");
    }
}
