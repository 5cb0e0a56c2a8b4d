//! Models that exist, trained on: `finetune`, `eval`, `merge` and `export` as a user runs them, and what does not count.

use polystage::gpu::Device;
use polystage::ops::parameters::Part;
use polystage::pipeline::{Batch, IGNORE, Setup};
use polystage::text::Tokenizer;
use polystage::train::data::{Reader, RecordFormat};
use polystage::train::trainer::Trainer;

use crate::cli::{Place, one_line};
use crate::common::{adapters, launch, launch_on, nmse, open, shifted};
use crate::pipeline::config;

const LLAMA: &str = "
[model]
kind = 'llama'
layers = 2
width = 24
heads = 3
kv_heads = 1
context = 40
vocabulary = 256
tied_head = true
[data]
train = ['text.txt']
[train]
steps = 6
batch = 4
sequence = 32
learning_rate = 1e-2
warmup = 2
[pipeline]
devices = [0]
microbatches = 2
";

/// A place with a small Llama in the run `base`, records and a text to evaluate on.
fn place() -> Place {
    let place = Place::new();
    std::fs::write(place.path("llama.toml"), LLAMA).unwrap();
    place.succeed(&["train", "llama.toml", "--no-plan", "--out", "base"]);
    let record =
        |i: usize| format!("{{\"prompt\": \"say {i}: \", \"completion\": \"pipelines are full\"}}\n");
    std::fs::write(place.path("records.jsonl"), (0..40).map(record).collect::<String>()).unwrap();
    std::fs::write(place.path("held.jsonl"), (40..60).map(record).collect::<String>()).unwrap();
    std::fs::write(place.path("valid.txt"), "say 7: pipelines are full. ".repeat(9)).unwrap();
    place
}

fn eval(place: &Place, model: &str, data: &str) -> (f64, u64) {
    // A text in windows; records whole, of 27 to 29 bytes.
    let sequence = if data.ends_with(".jsonl") { "32" } else { "20" };
    let all = ["eval", model, "--data", data, "--sequence", sequence, "--devices", "0,0", "--json"];
    let text = place.succeed(&all);
    let found: serde_json::Value = serde_json::from_str(&text).unwrap();
    let loss = found["loss"].as_f64().unwrap();
    assert!((found["perplexity"].as_f64().unwrap() - loss.exp()).abs() < 1e-9 * loss.exp());
    (loss, found["tokens"].as_u64().unwrap())
}

#[test]
fn a_run_goes_on_from_a_model_full_or_with_an_adapter_and_everything_it_writes_can_be_used() {
    let place = place();
    // 243 bytes in windows of 20: 12 whole ones with 19 targets each, and 3 bytes with 2.
    let (before, tokens) = eval(&place, "base", "valid.txt");
    assert_eq!(tokens, 12 * 19 + 2);

    let tune = ["finetune", "base", "--data", "records.jsonl", "--valid", "held.jsonl", "--sequence", "32"];
    let common = ["--devices", "0,0", "--no-plan", "--set", "pipeline.microbatches=2"];
    let with = |more: &[&'static str]| [&tune[..], &common[..], more].concat();

    // Without a learning rate nothing may change.
    place.succeed(&with(&["--full", "--learning-rate", "0", "--steps", "2", "--out", "same"]));
    assert_eq!(eval(&place, "same", "valid.txt"), (before, tokens));
    place.succeed(&with(&["--full", "--learning-rate", "1e-2", "--steps", "6", "--out", "full"]));
    let held = eval(&place, "base", "held.jsonl").0;
    assert!(eval(&place, "full", "held.jsonl").0 < held - 0.1);

    let lora = with(&["--learning-rate", "2e-2", "--targets", "all-linear", "--rank", "3"]);
    let lora = [
        &lora[..],
        &["--steps", "8", "--evaluate-every", "2", "--set", "output.keep=9", "--set", "train.warmup=1"],
    ]
    .concat();
    let run = |out: &'static str, more: &[&'static str]| {
        place.succeed(&[&lora[..], &["--save-every", "2", "--out", out], more].concat())
    };
    let shown = run("lora", &[]);
    assert!(shown.contains("best     step"), "{shown}");
    let after = eval(&place, "lora", "held.jsonl").0;
    // Few steps of few matrices, on a model that knows little.
    assert!(after < held - 0.03, "{after} after {held}");

    // The rows say the same as the verb.
    let rows = std::fs::read_to_string(place.path("lora/metrics.jsonl")).unwrap();
    let last: serde_json::Value = serde_json::from_str(rows.lines().last().unwrap()).unwrap();
    let evaluate = ["eval", "lora", "--data", "held.jsonl", "--sequence", "32", "--devices", "0", "--json"];
    let found: serde_json::Value = serde_json::from_str(&place.succeed(&evaluate)).unwrap();
    let (row, verb) = (last["valid_loss"].as_f64().unwrap(), found["loss"].as_f64().unwrap());
    // Sums of microbatches of other sizes.
    assert!((row - verb).abs() < 1e-6, "{row} {verb}");

    // A resumed adapter is bit for bit the uninterrupted one, from whatever checkpoint.
    let losses = place.losses("lora");
    run("lora", &["--resume", "--from", "lora/checkpoints/000004"]);
    assert_eq!(place.losses("lora"), losses);

    // The run is enough to go on from; what is given again and differs is said.
    let refused = |arguments: &[&str], words: &str| {
        let output = place.run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(one_line(&output).contains(words), "{arguments:?}: {}", one_line(&output));
    };
    refused(&["finetune", "--resume"], "--out RUN");
    refused(&["finetune", "--resume", "--out", "lora", "--full"], "trains an adapter");
    refused(&["finetune", "--resume", "--out", "nowhere"], "nothing to resume");
    refused(&["finetune", "--out", "lora"], "MODEL");
    // Before anything is measured or said of what will be.
    let other = place.run(&["finetune", "--resume", "--out", "lora", "--no-plan", "--set", "adapter.rank=2"]);
    let line = one_line(&other);
    assert_eq!((other.status.code(), other.stdout.len()), (Some(2), 0), "{line}");
    assert!(line.contains("an adapter of rank 3, and the config trains one of rank 2"), "{line}");
    let further = ["finetune", "--resume", "--out", "lora", "--no-plan", "--steps", "10", "--batch", "8"];
    for dry in [&["--dry-run"][..], &[]] {
        let output = place.run(&[&further[..], dry].concat());
        let notes = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{notes}");
        let warnings: Vec<&str> = notes.lines().filter(|line| line.starts_with("warning: ")).collect();
        assert_eq!(warnings, ["warning: resuming with train.steps = 10, which was 8"]);
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(
            said.contains("2 steps after 8") && said.contains("(10 steps of 8 sequences; there are 40)"),
            "{said}"
        );
        assert!(said.contains("each by itself, every 2 steps"), "{said}");
    }
    assert_eq!(place.losses("lora").len(), 10);
    assert_eq!(place.losses("lora")[..8], losses[..]);
    let after = eval(&place, "lora", "held.jsonl").0;

    // Merged, it is the same model; another tool could read it.
    place.succeed(&["merge", "lora", "--out", "merged"]);
    let merged = eval(&place, "merged", "held.jsonl").0;
    assert!((merged - after).abs() < 1e-4, "{merged} {after}: W + BA is rounded once more");
    place.succeed(&["export", "full", "--out", "exported", "--max-shard-size", "20KB"]);
    assert!(place.path("exported/model.safetensors.index.json").is_file());
    assert_eq!(eval(&place, "exported", "valid.txt"), eval(&place, "full", "valid.txt"));
    // And an adapter is something to begin with.
    place.succeed(&[
        "finetune",
        "lora",
        "--data",
        "valid.txt",
        "--steps",
        "1",
        "--sequence",
        "16",
        "--out",
        "more",
    ]);
}

#[test]
fn what_does_not_belong_together_gets_one_line_and_writes_nothing() {
    let place = place();
    std::fs::write(place.path("bad.jsonl"), "{\"text\": \"fine\"}\n[1, 2]\n").unwrap();
    std::fs::create_dir(place.path("hollow")).unwrap();
    std::fs::copy(place.path("base/checkpoints/000006/config.json"), place.path("hollow/config.json"))
        .unwrap();
    let finetune = |more: &[&str]| {
        let all =
            [&["finetune", "base", "--out", "new", "--data", "text.txt", "--devices", "0"], more].concat();
        let output = place.run(&all);
        assert_eq!(output.status.code(), Some(2), "{all:?}");
        assert!(!place.path("new").exists(), "{all:?}");
        one_line(&output)
    };
    let line = finetune(&["--data", "bad.jsonl"]);
    assert!(line.contains("bad.jsonl line 2"), "{line}");
    let line = finetune(&["--targets", "q_prj"]);
    assert!(line.contains("q_prj") && line.contains("q_proj"), "{line}");
    let line = finetune(&["--set", "model.layers=3"]);
    assert!(line.contains("model.layers = 3") && line.contains("it is 2"), "{line}");
    let line = finetune(&["--sequence", "41"]);
    assert!(line.contains("41") && line.contains("40"), "{line}");
    let line = finetune(&["--set", "data.tokenizer=nowhere"]);
    assert!(line.contains("nowhere does not exist"), "{line}");
    let one = |arguments: &[&str]| {
        let output = place.run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        one_line(&output)
    };
    assert!(one(&["eval", "hollow", "--data", "text.txt"]).contains("model.safetensors"));
    assert!(one(&["eval", "base", "--data", "text.txt", "--sequence", "41"]).contains("context of 40"));
    assert!(one(&["eval", "base", "--data", "none.txt"]).contains("none.txt"));
    assert!(one(&["merge", "base", "--out", "x"]).contains("is a model, not an adapter"));
}

/// Losses of a step and all gradients, as of the mean over the tokens that count.
fn step(setup: &Setup, batch: &Batch, devices: &[Device]) -> (f64, usize, Vec<(String, Vec<f64>)>) {
    let mut executor = launch_on(setup, devices);
    let watch = executor.watch();
    let parameters = executor.parameters().to_vec();
    for p in parameters.iter().filter(|p| p.tied_to.is_none()) {
        // Learnt positions must matter, and so must attention.
        let values: Vec<f32> = polystage::model::init::initial(p, 3).iter().map(|x| 4.0 * x).collect();
        watch.block_on(executor.write(&p.name, Part::Weight, &values)).unwrap();
    }
    let report = watch.block_on(executor.step(batch.clone())).unwrap();
    let evaluated = watch.block_on(executor.evaluate(batch.clone())).unwrap();
    assert_eq!(evaluated.0 / evaluated.1 as f64, report.loss, "training and evaluation see the same");
    let mut gradients = Vec::new();
    for p in parameters.iter().filter(|p| p.tied_to.is_none()) {
        let values = watch.block_on(executor.read(&p.name, Part::Gradient)).unwrap();
        let values = values.iter().map(|&g| g as f64 * report.gradient_scale).collect();
        gradients.push((p.name.clone(), values));
    }
    pollster::block_on(executor.stop());
    (report.loss, evaluated.1, gradients)
}

#[test]
fn records_that_share_a_sequence_are_to_the_model_what_they_are_alone() {
    let record = |prompt: &str, completion: &str| {
        format!("{{\"prompt\": {prompt:?}, \"completion\": {completion:?}}}\n")
    };
    let lines: Vec<String> =
        (0..5).map(|i| record(&"what? ".repeat(i % 4), &"so. and ".repeat(1 + i % 3))).collect();
    let folder = tempfile::tempdir().unwrap();
    let read = |lines: &[String]| {
        std::fs::write(folder.path().join("a.jsonl"), lines.concat()).unwrap();
        let (tokenizer, format) = (Tokenizer::bytes(), RecordFormat::default());
        let reader = Reader { tokenizer: &tokenizer, template: None, format: &format, ends: true };
        reader.open(&["a.jsonl".into()], &[folder.path().to_path_buf()]).unwrap()
    };
    // Two blocks of keys or more, and records that begin in the middle of one.
    let sequence = 75;
    let corpus = read(&lines);
    let rows = corpus.windows(sequence).len();
    assert!(rows < lines.len(), "they are packed");
    let mut packed = Batch::default();
    corpus.windows(sequence).for_each(|row| packed.extend(row.unwrap()));
    let kinds: [&[&str]; 2] = [
        &["model.context=75", "train.sequence=75"],
        &["model.kind=llama", "model.kv_heads=1", "model.context=75", "train.sequence=75"],
    ];
    for (kind, adapter) in kinds.iter().flat_map(|kind| adapters().into_iter().map(move |a| (kind, a.index)))
    {
        let devices = open(&[adapter, adapter]);
        let base = Trainer::setup(&config(kind), vec![None; 2]).unwrap();
        let setup = |rows: usize, shared: bool| {
            let schedule = polystage::schedule::generate("zb-h1", 2, rows).unwrap();
            Setup { batch: 1, sequence, schedule, shared, recompute: vec![0], ..base.clone() }
        };
        let (loss, counted, gradients) = step(&setup(rows, true), &packed, &devices);
        let (mut losses, mut sums, mut all) = (0.0, Vec::<Vec<f64>>::new(), 0);
        for line in &lines {
            let mut alone = read(std::slice::from_ref(line)).windows(sequence).next().unwrap().unwrap();
            alone.starts.clear();
            let (loss, counted, gradients) = step(&setup(1, false), &alone, &devices);
            losses += loss * counted as f64;
            all += counted;
            for (i, (_, values)) in gradients.into_iter().enumerate() {
                match sums.get_mut(i) {
                    None => sums.push(values.iter().map(|g| g * counted as f64).collect()),
                    Some(sum) => sum.iter_mut().zip(values).for_each(|(s, g)| *s += g * counted as f64),
                }
            }
        }
        assert_eq!(counted, all);
        // Other sums of the same numbers in f32.
        assert!((loss - losses / all as f64).abs() < 2e-6 * loss, "{kind:?}: {loss} {}", losses / all as f64);
        for ((name, got), want) in gradients.iter().zip(&sums) {
            let got: Vec<f32> = got.iter().map(|&g| g as f32).collect();
            let want: Vec<f64> = want.iter().map(|g| g / all as f64).collect();
            let error = nmse(&got, &want);
            assert!(error < 1e-9, "{kind:?}, adapter {adapter}: {name} is off by {error}");
        }
    }
}

#[test]
fn targets_that_do_not_count_change_neither_the_loss_nor_a_gradient() {
    let i = adapters()[0].index;
    let config = config(&[]);
    let (t, text) = (&config.train, (0..6 * 20).map(|i| (i * i + 7) % 259).collect::<Vec<u32>>());
    let whole = shifted(&text, t.sequence);
    let half = t.batch / 2 * t.sequence;
    // The last sequences do not count, nor every third token of the others.
    let mut masked = whole.clone();
    let counts = |row: usize| row < half && !row.is_multiple_of(3);
    masked.targets.iter_mut().enumerate().filter(|(row, _)| !counts(*row)).for_each(|(_, t)| *t = IGNORE);
    let short = Batch {
        inputs: masked.inputs[..half].to_vec(),
        targets: masked.targets[..half].to_vec(),
        ..Batch::default()
    };
    let step = |batch: &Batch, microbatches: usize, devices: usize| {
        let setup = Trainer::setup(&config, vec![None; devices]).unwrap();
        let schedule = polystage::schedule::generate("1f1b", devices, microbatches).unwrap();
        let setup = Setup { batch: batch.inputs.len() / t.sequence / microbatches, schedule, ..setup };
        let mut executor = launch(&setup, &vec![i; devices]);
        let watch = executor.watch();
        for p in executor.parameters().to_vec().iter().filter(|p| p.tied_to.is_none()) {
            let values = polystage::model::init::initial(p, 3);
            watch.block_on(executor.write(&p.name, Part::Weight, &values)).unwrap();
        }
        let report = watch.block_on(executor.step(batch.clone())).unwrap();
        let gradient = watch.block_on(executor.read("transformer.wte.weight", Part::Gradient)).unwrap();
        let gradient: Vec<f32> = gradient.iter().map(|g| g * report.gradient_scale as f32).collect();
        let evaluated = watch.block_on(executor.evaluate(batch.clone())).unwrap();
        assert_eq!(evaluated.1, batch.counted());
        // The same kernels on the same weights.
        assert_eq!(evaluated.0 / evaluated.1 as f64, report.loss);
        (report, gradient)
    };
    let (alone, gradient) = step(&masked, 3, 1);
    assert_eq!(alone.losses.iter().filter(|&&loss| loss != 0.0).count(), masked.counted());
    let (split, other) = step(&masked, 3, 2);
    assert_eq!((alone.loss, alone.gradient_norm, &gradient), (split.loss, split.gradient_norm, &other));
    // Without them the same, but for rounding: sums of other lengths.
    let (less, other) = step(&short, 3, 1);
    assert!((less.loss - alone.loss).abs() < 1e-6 * less.loss, "{} {}", less.loss, alone.loss);
    assert!((less.gradient_norm - alone.gradient_norm).abs() < 1e-5 * less.gradient_norm);
    let wide: Vec<f64> = other.iter().map(|&x| x.into()).collect();
    assert!(nmse(&gradient, &wide) < 1e-10);
    assert_ne!(step(&whole, 3, 1).0.loss, alone.loss);
}

#[test]
#[cfg(target_os = "linux")]
fn a_model_in_a_folder_that_a_config_cannot_name_is_refused() {
    let place = Place::new();
    let odd = std::os::unix::ffi::OsStrExt::from_bytes(b"model\xff");
    std::fs::create_dir(place.path("").join::<&std::ffi::OsStr>(odd)).unwrap();
    let output = place.command(&["finetune", "--data", "text.txt"]).arg(odd).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(one_line(&output).contains("not UTF-8"), "{}", one_line(&output));
}
