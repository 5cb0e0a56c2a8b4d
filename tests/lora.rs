//! LoRA in training and inference against PEFT (`golden/make_adapters.py`); merged and exported models.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use polystage::folder::ModelFolder;
use polystage::folder::adapter::{self, Adapter, AdapterConfig, Module, Targets};
use polystage::generate::{Extent, Generator, Sampling};
use polystage::gpu::Device;
use polystage::graph::{Fed, LOGIT_BYTES, Phase};
use polystage::layers::Layers;
use polystage::mesh::{Division, Wire};
use polystage::model::{Model, Parameter, Purpose, init};
use polystage::ops::parameters::Part;
use polystage::pipeline::workload::{shape_key, workload};
use polystage::pipeline::{Executor, Plan, Setup, Use};
use polystage::plan::Sharding;
use polystage::plan::{Options, RecomputeChoice, ScheduleChoice, plan};
use polystage::profile::Profiler;
use polystage::schedule::{NAMES, default_chunks, generate};
use safetensors::SafeTensors;
use serde_json::json;

use crate::common::{adam, adapters, cut_at, launch_on, nmse, open, shifted};
use crate::models::distance;
use crate::oracle;

/// Folders in `golden/adapters`, each of the model of the same name in `golden/models`.
const ADAPTERS: [&str; 3] = ["gpt2", "llama", "llama_untied"];

fn golden_folder(kind: &str, name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(kind).join(name)
}

struct Golden {
    name: &'static str,
    base: ModelFolder,
    adapter: Adapter,
    /// With the adapter.
    model: Model,
    /// (B,T+1).
    tokens: Vec<u32>,
    batch: usize,
    sequence: usize,
    losses: Vec<f64>,
    gradients: HashMap<String, Vec<f64>>,
    steps: Vec<f64>,
}

fn golden(name: &'static str) -> Golden {
    let bytes = std::fs::read(golden_folder("adapters", name).join("golden.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let words = |name: &str| -> Vec<[u8; 4]> {
        file.tensor(name).unwrap().data().chunks(4).map(|b| b.try_into().unwrap()).collect()
    };
    let floats = |name: &str| words(name).into_iter().map(|b| f32::from_le_bytes(b) as f64).collect();
    let base = ModelFolder::open(&golden_folder("models", name)).unwrap();
    let adapter = adapter::open(&golden_folder("adapters", name)).unwrap();
    let plain = Model::from_hugging_face(base.config()).unwrap();
    let shape = file.tensor("tokens").unwrap().shape().to_vec();
    let gradients = file.names().into_iter().filter_map(|n| Some((n.strip_prefix("grad.")?, floats(n))));
    Golden {
        name,
        model: Model::with_adapter(plain.config(), Some(&adapter.lora())).unwrap(),
        tokens: words("tokens").into_iter().map(u32::from_le_bytes).collect(),
        batch: shape[0],
        sequence: shape[1] - 1,
        losses: floats("losses"),
        gradients: gradients.map(|(n, values)| (n.to_string(), values)).collect(),
        steps: floats("steps"),
        base,
        adapter,
    }
}

impl Golden {
    /// Results of a whole model's graph in f64, with the weights that `weight` finds: losses, and gradients by name.
    fn reference(
        &self,
        model: &Model,
        weight: impl Fn(&Parameter) -> Vec<f32>,
    ) -> (Vec<f64>, HashMap<String, Vec<f64>>) {
        let purpose = Purpose::Training { tokens: self.batch * self.sequence };
        let stage = model.stage_graph(0..model.layers(), self.batch, self.sequence, purpose).unwrap();
        let rows = || self.tokens.chunks(self.sequence + 1);
        let inputs: Vec<u32> = rows().flat_map(|row| row[..self.sequence].to_vec()).collect();
        let (segments, order) = polystage::ops::sort_rows(&inputs, model.config().vocabulary);
        let whole = |list: Vec<u32>| list.into_iter().map(f64::from).collect::<Vec<f64>>();
        let fed = [
            (Fed::Tokens, whole(inputs)),
            (Fed::Targets, whole(rows().flat_map(|row| row[1..].to_vec()).collect())),
            (Fed::TokenSegments, whole(segments)),
            (Fed::TokenOrder, whole(order)),
        ];
        let parameters = model.parameters();
        let mut values = oracle::feed(&stage.graph, &fed, |name| {
            let parameter = parameters.iter().find(|p| p.name == name).unwrap();
            weight(parameter).into_iter().map(f64::from).collect()
        });
        oracle::run(&stage.graph, &[Phase::Forward, Phase::Input, Phase::Weight], &mut values);
        let mut take = |id: polystage::graph::ValueId| values[id.0].take().unwrap();
        let losses = take(stage.loss.unwrap());
        let name = |id| stage.graph.value(id).name.clone();
        (losses, stage.gradients.iter().map(|&(p, g)| (name(p), take(g))).collect())
    }

    fn setup(&self, name: &str, devices: usize, cuts: Option<Vec<Layers>>, purpose: Use) -> Setup {
        Setup {
            model: self.model.config().clone(),
            adapter: Some(self.adapter.lora()),
            weights: self.model.weights(),
            logits: LOGIT_BYTES,
            batch: 1,
            sequence: self.sequence,
            schedule: generate(name, devices, if purpose.trains() { self.batch } else { 1 }).unwrap(),
            cuts,
            shared: false,
            recompute: if purpose.trains() && devices > 1 { vec![0] } else { Vec::new() },
            sharding: Sharding::default(),
            tensor: Division::none(),
            wire: Wire::F32,
            host: None,
            purpose,
            budgets: vec![None; devices],
        }
    }

    fn launch(&self, setup: &Setup, devices: &[Device]) -> Executor {
        let mut executor = launch_on(setup, devices);
        let watch = executor.watch();
        watch.block_on(executor.load(self.base.tensors())).unwrap();
        watch.block_on(executor.load_adapter(&self.adapter.tensors)).unwrap();
        executor
    }

    /// Losses of every token of the first step, its gradients in model order, and the mean losses of all steps.
    fn train(&self, setup: &Setup, devices: &[Device]) -> (Vec<f32>, Vec<Vec<f32>>, Vec<f64>) {
        let mut executor = self.launch(setup, devices);
        let watch = executor.watch();
        let trained = self.model.parameters().into_iter().filter(|p| !p.frozen);
        let names: Vec<String> = trained.map(|p| p.name).collect();
        assert_eq!(names.len(), self.gradients.len());
        let (mut losses, mut gradients, mut steps) = (Vec::new(), Vec::new(), Vec::new());
        for step in 0..self.steps.len() {
            let report = watch.block_on(executor.step(shifted(&self.tokens, self.sequence))).unwrap();
            steps.push(report.loss);
            if step == 0 {
                losses = report.losses;
                let mut read = |name| watch.block_on(executor.read(name, Part::Gradient)).unwrap();
                gradients = names.iter().map(|name| read(name)).collect();
                let sum: f64 = gradients.iter().flatten().map(|&g: &f32| (g as f64).powi(2)).sum();
                assert!((report.gradient_norm / sum.sqrt() - 1.0).abs() < 1e-6, "{}: norm", self.name);
            }
            watch.block_on(executor.update(adam(step, report.gradient_norm, 1e-2))).unwrap();
        }
        pollster::block_on(executor.stop());
        (losses, gradients, steps)
    }
}

/// transformers takes norms, softmax and angles through f32 even in float64, and the files hold f32: about 1e-14.
const REFERENCE: f64 = 1e-12;

/// The adapted modules among a model's parameters, in model order.
fn modules_of(parameters: &[Parameter]) -> Vec<Module> {
    let pairs = parameters.iter().filter_map(|a| {
        let name = a.name.strip_suffix(".lora_A.weight")?;
        let b = parameters.iter().find(|b| b.name.strip_suffix(".lora_B.weight") == Some(name))?;
        Some(Module { name: name.into(), inputs: a.shape[1], outputs: b.shape[0] })
    });
    pairs.collect()
}

/// Writes the adapter that an executor holds as PEFT would.
fn save(executor: &mut Executor, path: &Path, config: &AdapterConfig) {
    let (watch, modules) = (executor.watch(), modules_of(executor.parameters()));
    let mut writer = adapter::create(path, config, &modules, &[]).unwrap();
    let names = modules.iter().flat_map(|module| [module.a(), module.b()]);
    for ((stored, _), name) in adapter::tensors(&modules, config.r).iter().zip(names) {
        writer.write(stored, &watch.block_on(executor.read(&name, Part::Weight)).unwrap()).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn the_reference_agrees_with_peft_in_losses_and_gradients() {
    for golden in ADAPTERS.map(golden) {
        let (losses, gradients) = golden.reference(&golden.model, |parameter| {
            let tensors = if parameter.is_lora() { &golden.adapter.tensors } else { golden.base.tensors() };
            tensors.read_all(parameter.tied_to.as_ref().unwrap_or(&parameter.name)).unwrap()
        });
        let error = distance(&losses, &golden.losses);
        assert!(error < REFERENCE, "{}: losses are off by {error:.2e}", golden.name);
        assert_eq!(gradients.len(), golden.gradients.len(), "{}", golden.name);
        for (name, want) in &golden.gradients {
            let error = distance(&gradients[name], want);
            assert!(error < REFERENCE, "{}: gradient of {name} is off by {error:.2e}", golden.name);
        }
    }
}

#[test]
fn training_matches_peft_on_every_adapter_and_every_cut_and_schedule_gives_the_same_bits() {
    for adapter in adapters() {
        let devices = open(&[adapter.index; 4]);
        for golden in ADAPTERS.map(golden) {
            let at = format!("{} on {}", golden.name, adapter.name);
            let one = golden.train(&golden.setup("1f1b", 1, None, Use::Training), &devices[..1]);
            // f32 throughout: a few hundred roundings of 6e-8 each, squared.
            let error = nmse(&one.0, &golden.losses);
            assert!(error < 1e-10, "{at}: losses are off by {error:.2e}");
            let trained = golden.model.parameters().into_iter().filter(|p| !p.frozen);
            for (parameter, got) in trained.zip(&one.1) {
                let error = nmse(got, &golden.gradients[&parameter.name]);
                assert!(error < 1e-10, "{at}: gradient of {} is off by {error:.2e}", parameter.name);
            }
            for (step, (got, want)) in one.2.iter().zip(&golden.steps).enumerate() {
                // AdamW divides by the root of a gradient's square: a gradient near zero moves its weight by its sign.
                let off = (got - want).abs() / want;
                assert!(off < 1e-5, "{at}: loss before step {step} is {got}, not {want}");
            }
            // The layers are embedding, two blocks, head. Some stages have nothing to train, or nothing before them.
            let cuts: [&[f64]; 8] =
                [&[1.0], &[2.0], &[2.5], &[3.0], &[1.0, 2.0], &[1.5, 3.0], &[1.5, 2.5], &[1.0, 2.0, 2.5]];
            for (cuts, name) in cuts.into_iter().zip(NAMES.iter().cycle()) {
                let count = cuts.len() + 1;
                let name = if default_chunks(name).unwrap() == 1 { name } else { "zb-h1" };
                let what = format!("{at}, {name}, cuts {cuts:?}");
                let setup = golden.setup(name, count, Some(cut_at(cuts)), Use::Training);
                assert!(golden.train(&setup, &devices[..count]) == one, "{what}: some bit differs");
            }
            let folded = golden.setup("interleaved-1f1b", 2, None, Use::Training);
            assert!(golden.train(&folded, &devices[..2]) == one, "{at}: two stages a device");
        }
    }
}

#[test]
fn frozen_weights_take_no_memory_for_gradients_or_moments_and_a_tied_one_on_another_device_only_a_copy() {
    let devices = open(&[adapters()[0].index; 2]);
    let golden = golden("llama");
    let described: Vec<_> = devices.iter().map(|d| (d.info().clone(), *d.capabilities())).collect();
    let bytes = |adapted: bool| {
        let setup = golden.setup("1f1b", 2, Some(cut_at(&[1])), Use::Training);
        let setup = Setup { recompute: Vec::new(), adapter: setup.adapter.filter(|_| adapted), ..setup };
        let plan = Plan::new(setup, &described).unwrap();
        plan.ranks.iter().map(|rank| rank.bytes).collect::<Vec<u64>>()
    };
    let (plain, adapted) = (bytes(false), bytes(true));
    let table = 4 * (1003 * 18) as u64;
    // Gradient, two moments, the user's gradient and a place to add it from, and the ends of its links (a buffer each for
    // gradient and weight).
    assert!(plain[0] > adapted[0] + 6 * table, "{plain:?} {adapted:?}");
    assert!(adapted[0] < 2 * table, "{adapted:?}");
    assert!(plain[1] > adapted[1] + 3 * table, "{plain:?} {adapted:?}");
}

#[test]
fn the_planner_measures_a_model_with_its_adapter_and_counts_its_bytes() {
    let devices = open(&[adapters()[0].index; 2]);
    let described: Vec<_> = devices.iter().map(|d| (d.info().clone(), *d.capabilities())).collect();
    let model = golden("llama").model.with_blocks(6).unwrap();
    assert_eq!(model.adapter().unwrap().modules.len(), 30);
    let plain = Model::new(model.config()).unwrap();
    assert_ne!(shape_key(&model, 2, 13), shape_key(&plain, 2, 13));
    let budgets = [None, None];
    let profiler = Profiler {
        model: &model,
        sequence: 13,
        devices: &devices,
        budgets: &budgets,
        cache: None,
        fresh: true,
        patience: 0.0,
    };
    let machine = profiler.machine(&[2], &mut |_| ()).unwrap();
    let block = machine.devices[0].shape(&shape_key(&model, 2, 13)).unwrap().layers["attention"];
    // The gradients of small matrices may be lost in noise.
    assert!(block.forward > 0.0 && block.input > 0.0 && block.weight >= 0.0, "{block:?}");
    let work = workload(&model, 8, 13, &[4], &[described[0].1]).unwrap();
    assert_eq!(work.layers[0].weights, 0, "the token table is not trained");
    for cuts in [cut_at(&[1]), cut_at(&[3]), vec![Layers::whole(3) + Layers::HALF], cut_at(&[7])] {
        let options = Options {
            devices: Some(vec![0, 1]),
            schedule: ScheduleChoice::Named("1f1b".into()),
            cuts: Some(cuts.clone()),
            recompute: RecomputeChoice::Never,
            ..Options::default()
        };
        let best = plan(&work, &machine, &options).unwrap().best;
        let setup = Setup {
            model: model.config().clone(),
            adapter: model.adapter().cloned(),
            weights: model.weights(),
            logits: LOGIT_BYTES,
            batch: 2,
            sequence: 13,
            schedule: best.schedule.clone(),
            cuts: Some(cuts.clone()),
            shared: false,
            recompute: Vec::new(),
            sharding: Sharding::default(),
            tensor: Division::none(),
            wire: Wire::F32,
            host: None,
            purpose: Use::Training,
            budgets: vec![None; 2],
        };
        let exact = Plan::new(setup, &described).unwrap();
        for (rank, &counted) in exact.ranks.iter().zip(&best.simulation.slot_bytes) {
            let off = counted as f64 / rank.bytes as f64 - 1.0;
            // Too much: a pool a layer, the gradient of the first block's input, links that carry no gradient. Too little:
            // the table of angles, half a kilobyte.
            assert!((-0.003..0.1).contains(&off), "cuts {cuts:?}: {counted} counted, {} needed", rank.bytes);
        }
    }
}

#[test]
fn a_new_adapter_starts_at_the_base_model_the_same_for_every_cut_and_comes_back_from_its_folder() {
    let root = tempfile::tempdir().unwrap();
    let device = adapters()[0].index;
    let golden = golden("gpt2");
    let config = AdapterConfig {
        r: 3,
        alpha: 6.0,
        use_rslora: false,
        targets: Targets::Pattern("all-linear".into()),
        dropout: 0.0,
        fan_in_fan_out: false,
        base_model: Some(golden.base.path().to_string_lossy().into_owned()),
        task_type: Some("CAUSAL_LM".into()),
    };
    let plain = Model::from_hugging_face(golden.base.config()).unwrap();
    let config = config.for_model(&plain);
    assert!(config.fan_in_fan_out);
    let lora = config.adapt(&plain).unwrap();
    assert_eq!(lora.modules.len(), 8, "{lora:?}");
    let model = Model::with_adapter(plain.config(), Some(&lora)).unwrap();
    for parameter in model.parameters().iter().filter(|p| p.is_lora()) {
        let values = init::initial(parameter, 5);
        let largest = values.iter().fold(0f32, |m, v| m.max(v.abs()));
        let bound = (parameter.shape[1] as f32).powf(-0.5);
        match parameter.name.ends_with("lora_A.weight") {
            true => assert!(largest <= bound && largest > 0.9 * bound, "{}: {largest}", parameter.name),
            false => assert_eq!(largest, 0.0, "{}", parameter.name),
        }
    }
    let mut losses = Vec::new();
    for (adapter, devices) in [(None, 1), (Some(&lora), 1), (Some(&lora), 2)] {
        let devices = open(&vec![device; devices]);
        let setup = golden.setup("1f1b", devices.len(), None, Use::Training);
        let setup = Setup { adapter: adapter.cloned(), ..setup };
        let mut executor = launch_on(&setup, &devices);
        let watch = executor.watch();
        watch.block_on(executor.load(golden.base.tensors())).unwrap();
        watch.block_on(executor.initialise_adapter(5)).unwrap();
        let first = watch.block_on(executor.step(shifted(&golden.tokens, golden.sequence))).unwrap();
        if adapter.is_some() {
            watch.block_on(executor.update(adam(0, first.gradient_norm, 1e-2))).unwrap();
            let path = root.path().join(devices.len().to_string());
            save(&mut executor, &path, &config);
            let read = adapter::open(&path).unwrap();
            assert_eq!(read.config, config);
            assert_eq!(read.modules.len(), 8);
            watch.block_on(executor.load_adapter(&read.tensors)).unwrap();
        }
        losses.push((
            first.losses,
            watch.block_on(executor.step(shifted(&golden.tokens, golden.sequence))).unwrap().losses,
        ));
    }
    assert_eq!(losses[0].0, losses[1].0, "B is zero");
    assert_ne!(losses[1].0, losses[1].1, "a step changes it");
    assert_eq!(losses[1], losses[2]);
    let file = |n: &str| std::fs::read(root.path().join(n).join("adapter_model.safetensors")).unwrap();
    assert_eq!(file("1"), file("2"));
}

#[test]
fn targets_and_adapters_that_do_not_fit_the_model_are_refused_by_name() {
    let (llama, gpt2) = (golden("llama"), golden("gpt2"));
    let error =
        Model::with_adapter(llama.model.config(), Some(&gpt2.adapter.lora())).unwrap_err().to_string();
    assert!(error.contains("transformer.h.0.attn.c_attn is not a linear layer of this model"), "{error}");
    let targets = Targets::Names(vec!["embed_tokens".into()]);
    let error = targets.select(&llama.model.linear_layers()).unwrap_err().to_string();
    assert!(error.contains("\"embed_tokens\" is no linear layer of this model; known: down_proj"), "{error}");
}

fn polystage(arguments: &[&str], place: &Path) -> (bool, String) {
    let mut command = crate::common::program();
    let output = command.args(arguments).current_dir(place).output().unwrap();
    let said = if output.status.success() { output.stdout } else { output.stderr };
    (output.status.success(), String::from_utf8(said).unwrap())
}

#[test]
fn a_merged_model_computes_what_base_and_adapter_do() {
    let place = tempfile::tempdir().unwrap();
    for golden in ADAPTERS.map(golden) {
        let source = golden_folder("adapters", golden.name).to_string_lossy().into_owned();
        let (ok, said) = polystage(&["merge", &source, "--out", golden.name], place.path());
        assert!(ok && said.contains("as float32"), "{said}");
        let merged = ModelFolder::open(&place.path().join(golden.name)).unwrap();
        let model = Model::from_hugging_face(merged.config()).unwrap();
        assert_eq!(model.config(), golden.model.config());
        let (losses, _) = golden.reference(&model, |parameter| {
            let name = parameter.tied_to.as_ref().unwrap_or(&parameter.name);
            merged.tensors().read_all(name).unwrap()
        });
        let error = distance(&losses, &golden.losses);
        // Sums rounded to f32.
        assert!(error < 1e-12, "{}: losses are off by {error:.2e}", golden.name);
    }
    let source = golden_folder("adapters", "gpt2").to_string_lossy().into_owned();
    let refused = |arguments: &[&str]| {
        let (ok, said) = polystage(arguments, place.path());
        assert!(!ok && said.lines().count() == 1 && !place.path().join("no").exists(), "{said}");
        said
    };
    assert!(refused(&["merge", &source, "--base", "llama", "--out", "no"]).contains("is not a linear layer"));
    assert!(refused(&["merge", &source, "--base", "nowhere", "--out", "no"]).contains("nowhere"));
    assert!(refused(&["merge", "gpt2", "--out", "no"]).contains("is a model, not an adapter"));
    assert!(
        refused(&["export", &source, "--out", "no", "--dtype", "bf16"])
            .contains(&format!("`polystage merge {source} --dtype bf16`"))
    );
    let (ok, said) = polystage(&["export", &source, "--out", "copy"], place.path());
    assert!(ok, "{said}");
    let (one, other) =
        (adapter::open(Path::new(&source)).unwrap(), adapter::open(&place.path().join("copy")).unwrap());
    assert_eq!(one.config, other.config);
    for info in one.tensors.iter() {
        assert_eq!(one.tensors.read_all(&info.name).unwrap(), other.tensors.read_all(&info.name).unwrap());
    }
    assert!(refused(&["merge", &source, "--out", "gpt2"]).contains("exists already"));
}

#[test]
fn an_adapter_of_a_tied_head_cannot_be_merged_and_says_why() {
    let place = tempfile::tempdir().unwrap();
    let golden = golden("llama");
    let config = json!({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["lm_head"]});
    let config = AdapterConfig::from_json(&config).unwrap();
    let plain = Model::from_hugging_face(golden.base.config()).unwrap();
    let model = Model::with_adapter(plain.config(), Some(&config.adapt(&plain).unwrap())).unwrap();
    let modules = modules_of(&model.parameters());
    let mut writer = adapter::create(&place.path().join("head"), &config, &modules, &[]).unwrap();
    for (name, shape) in adapter::tensors(&modules, 1) {
        writer.write(&name, &vec![0.5; shape.iter().product()]).unwrap();
    }
    writer.finish().unwrap();
    let base = golden.base.path().to_string_lossy().into_owned();
    let lost = polystage(&["merge", "head", "--out", "no"], place.path()).1;
    assert!(lost.contains("--base") && lost.contains("does not name its base model"), "{lost}");
    let (ok, said) = polystage(&["merge", "head", "--base", &base, "--out", "no"], place.path());
    assert!(!ok && said.contains("adapts lm_head, which shares its weight"), "{said}");
    assert!(!place.path().join("no").exists());
}

#[test]
fn an_exported_model_is_the_same_in_files_of_a_size_with_its_tokenizer_and_damage_is_named() {
    let place = tempfile::tempdir().unwrap();
    let golden = golden("llama_untied");
    let source = place.path().join("source");
    std::fs::create_dir(&source).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(golden.base.path().join(name), source.join(name)).unwrap();
    }
    std::fs::write(source.join("tokenizer.json"), "{}").unwrap();
    let export = ["export", "source", "--out", "out", "--dtype", "bf16", "--max-shard-size", "20KB"];
    let (ok, said) = polystage(&export, place.path());
    assert!(ok && said.contains("21 tensors") && said.contains("as bfloat16"), "{said}");
    let out = place.path().join("out");
    assert!(out.join("model.safetensors.index.json").is_file() && out.join("tokenizer.json").is_file());
    let exported = ModelFolder::open(&out).unwrap();
    assert_eq!(exported.config()["dtype"], "bfloat16");
    for info in golden.base.tensors().iter() {
        let read = |folder: &ModelFolder| folder.tensors().read_all(&info.name).unwrap();
        for (wide, narrow) in read(&golden.base).iter().zip(read(&exported)) {
            assert!((wide - narrow).abs() <= wide.abs() / 256.0, "{}: {wide} {narrow}", info.name);
        }
    }
    let (ok, said) = polystage(&["export", "out", "--out", "again"], place.path());
    assert!(ok && said.contains("as bfloat16"), "the type of the source: {said}");
    assert!(place.path().join("again/model.safetensors").is_file());
    let config = std::fs::read_to_string(source.join("config.json")).unwrap();
    let deeper = config.replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3");
    std::fs::write(source.join("config.json"), deeper).unwrap();
    let (ok, said) = polystage(&["export", "source", "--out", "no"], place.path());
    assert!(!ok && said.contains("9 tensors missing: model.layers.2.input_layernorm.weight [21]"), "{said}");
    let (ok, said) = polystage(&["export", "out", "--out", "no", "--max-shard-size", "big"], place.path());
    assert!(!ok && said.contains("--max-shard-size: \"big\" is not a size such as 5GB"), "{said}");
    assert!(!place.path().join("no").exists());
}

#[test]
fn a_generator_with_an_adapter_continues_texts_as_the_merged_model_does() {
    let place = tempfile::tempdir().unwrap();
    let golden = golden("llama");
    let source = golden_folder("adapters", "llama").to_string_lossy().into_owned();
    let (ok, said) = polystage(&["merge", &source, "--out", "merged"], place.path());
    assert!(ok, "{said}");
    let merged = ModelFolder::open(&place.path().join("merged")).unwrap();
    let greedy = Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 1 };
    let prompts = [golden.tokens[..5].to_vec(), golden.tokens[7..10].to_vec()];
    let extent = Extent { texts: 2, prompt: 5, tokens: 14 };
    let device = adapters()[0].index;
    let text = |folder: &ModelFolder, adapted: bool, devices: usize| {
        let lora = adapted.then(|| golden.adapter.lora());
        let model = Model::with_adapter(golden.model.config(), lora.as_ref()).unwrap();
        let devices = open(&vec![device; devices]);
        let budgets = vec![None; devices.len()];
        let mut generator = Generator::launch(&model, extent, &devices, budgets).unwrap();
        let watch = generator.watch();
        watch.block_on(generator.executor().load(folder.tensors())).unwrap();
        if adapted {
            watch.block_on(generator.executor().load_adapter(&golden.adapter.tensors)).unwrap();
        }
        watch.block_on(generator.run(&prompts, 9, greedy, usize::MAX, |_, _| true)).unwrap()
    };
    let want = text(&merged, false, 1);
    assert_ne!(want, text(&golden.base, false, 1), "the adapter changes the text");
    assert_eq!(want, text(&golden.base, true, 1));
    assert_eq!(want, text(&golden.base, true, 2));
}
