//! Matrix products whose operands are in f16: the scale that keeps gradients within its range, steps that are skipped, devices
//! that have none of it beside those that have.

use polystage::gpu::{Capabilities, Device};
use polystage::ops::parameters::Part;
use polystage::train::checkpoint;
use polystage::train::compute::Compute;
use polystage::train::config::Config;
use polystage::train::trainer::{Row, Trainer};

use crate::cli::{Place, one_line};
use crate::common::{adapters, open};
use crate::pipeline::{assert_same, config, measure, origin, run, train_on};

/// The devices, computing in f16 whatever they say of it: rounding needs no more than any adapter has.
fn in_f16(indices: &[usize]) -> Vec<Device> {
    let computing = |device: Device| {
        let capabilities = Capabilities { f16: true, ..*device.capabilities() };
        device.with(capabilities)
    };
    open(indices).into_iter().map(computing).collect()
}

fn trainer(config: &Config, devices: &[Device]) -> Trainer {
    train_on(config, Trainer::setup(config, vec![None; devices.len()]).unwrap(), devices)
}

fn step(trainer: &mut Trainer) -> Row {
    let watch = trainer.watch();
    watch.block_on(trainer.step()).unwrap()
}

fn weights(trainer: &mut Trainer) -> Vec<Vec<u32>> {
    let watch = trainer.watch();
    let own = trainer.executor().parameters().iter().filter(|p| p.tied_to.is_none());
    let names: Vec<String> = own.map(|p| p.name.clone()).collect();
    let mut read = |name: &String| watch.block_on(trainer.executor().read(name, Part::Weight)).unwrap();
    names.iter().map(|name| read(name).iter().map(|x| x.to_bits()).collect()).collect()
}

/// Makes gradients too large for f16 at the scale with which runs begin, and for no much smaller one.
fn enlarge(trainer: &mut Trainer) {
    let watch = trainer.watch();
    let name = "transformer.ln_f.weight";
    let mut values = watch.block_on(trainer.executor().read(name, Part::Weight)).unwrap();
    values.iter_mut().for_each(|x| *x *= 3000.0);
    watch.block_on(trainer.executor().write(name, Part::Weight, &values)).unwrap();
}

#[test]
fn in_f16_losses_stay_within_a_percent_of_f32_and_no_cut_changes_a_bit() {
    let config = config(&[]);
    for adapter in adapters() {
        let i = adapter.index;
        let (full, _) = run(&config, &[i], 8);
        let alone = measure(trainer(&config, &in_f16(&[i])), 8);
        for (step, (f16, f32)) in alone.0.iter().zip(&full).enumerate() {
            assert!((f16 - f32).abs() < 0.01 * f32, "{}: step {step}: {f16} against {f32}", adapter.name);
        }
        assert_ne!(alone.0, full, "{}: nothing was rounded", adapter.name);
        assert_same(&adapter.name, &alone, &measure(trainer(&config, &in_f16(&[i, i])), 8));
    }
}

#[test]
fn a_gradient_that_f16_cannot_hold_skips_the_step_halves_the_scale_and_leaves_every_weight_as_it_was() {
    let i = adapters()[0].index;
    for mesh in ["mesh.zero=1", "mesh.zero=3", "mesh.optimizer=host"] {
        let config = config(&["mesh.data=2", "pipeline.microbatches=2", mesh]);
        let mut trainer = trainer(&config, &in_f16(&[i, i]));
        enlarge(&mut trainer);
        let mut before = weights(&mut trainer);
        let mut scale = 65536.0;
        let mut skipped = 0;
        for number in 1..=30 {
            let row = step(&mut trainer);
            assert_eq!((row.step, row.loss_scale), (number, Some(scale)), "{mesh}");
            let after = weights(&mut trainer);
            assert_eq!(row.skipped, before == after, "{mesh}: step {number}");
            assert_eq!(row.skipped, !row.grad_norm.is_finite(), "{mesh}: step {number}");
            if row.skipped {
                (scale, skipped) = (scale / 2.0, skipped + 1);
            }
            before = after;
        }
        assert!((1..17).contains(&skipped), "{mesh}: {skipped} were skipped");
    }
}

#[test]
fn a_checkpoint_keeps_the_scale_and_the_run_goes_on_with_the_same_bits() {
    let i = adapters()[0].index;
    let config = config(&[]);
    let folder = tempfile::tempdir().unwrap();
    let mut first = trainer(&config, &in_f16(&[i]));
    enlarge(&mut first);
    let scale = loop {
        let row = step(&mut first);
        if !row.skipped {
            break row.loss_scale;
        }
    };
    let watch = first.watch();
    let path = watch.block_on(first.save(folder.path(), &origin(), 1)).unwrap();
    let rows = [step(&mut first), step(&mut first)];
    drop(first);
    let mut second = trainer(&config, &in_f16(&[i, i]));
    let watch = second.watch();
    watch.block_on(second.restore(&checkpoint::open(&path).unwrap(), &path)).unwrap();
    for want in rows {
        let got = step(&mut second);
        assert!(got.loss_scale == scale && scale < Some(65536.0), "{got:?}");
        assert_eq!((got.loss, got.grad_norm), (want.loss, want.grad_norm));
    }
}

#[test]
fn the_config_says_what_each_device_computes_in_and_one_without_f16_is_refused_in_one_line() {
    let all = adapters();
    let devices: Vec<(usize, Device)> =
        open(&all.iter().map(|a| a.index).collect::<Vec<_>>()).into_iter().enumerate().collect();
    let each = |names: &[&str]| Compute::Each(names.iter().map(|name| name.to_string()).collect());
    let names: Vec<&str> = all.iter().map(|a| if a.f16 { "f16" } else { "f32" }).collect();
    let computing = each(&names).apply(devices.clone()).unwrap();
    for (device, adapter) in computing.iter().zip(&all) {
        assert_eq!(device.capabilities().f16, adapter.f16, "{}", adapter.name);
    }
    let alike = names.iter().all(|name| *name == names[0]);
    assert_eq!(Compute::of(&computing), if alike { Compute::All(names[0].into()) } else { each(&names) });
    let refused = |compute: Compute| compute.apply(devices.clone()).unwrap_err().to_string();
    let error = refused(each(&[]));
    assert!(error.contains("nothing of device 0"), "{error}");
    if let Some(at) = all.iter().position(|a| !a.f16) {
        let error = refused(Compute::All("f16".into()));
        assert!(error.contains(&format!("device {at} ({}) has no f16", all[at].name)), "{error}");
    }
    for bad in ["train.compute=f8", "train.compute=[]", "train.compute=[\"f16\",\"bf16\"]"] {
        let error = Config::parse(crate::pipeline::ODD, &[bad.into()], "test").unwrap_err().to_string();
        assert!(error.contains("train.compute") && !error.contains('\n'), "{error}");
    }
}

#[test]
fn a_run_in_f16_writes_the_scale_of_every_step_and_goes_on_in_f16() {
    // The program sees lavapipe where there is one.
    if !adapters()[0].f16 {
        return;
    }
    let place = Place::new();
    let train = ["train", "tiny.toml", "--no-plan", "--set", "train.compute=f16", "--out", "run"];
    place.succeed(&train);
    place.succeed(&[&train[..], &["--resume", "--set", "train.steps=14"]].concat());
    let text = std::fs::read_to_string(place.path("run/metrics.jsonl")).unwrap();
    assert_eq!(text.lines().count(), 14);
    for line in text.lines() {
        let row: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(row["loss_scale"], 65536.0, "{line}");
        assert!(row.get("skipped").is_none(), "{line}");
    }
    let config = std::fs::read_to_string(place.path("run/config.toml")).unwrap();
    assert!(config.contains("compute = \"f16\""), "{config}");
    let output = place.run(&["train", "tiny.toml", "--set", "train.compute=f8"]);
    assert!(one_line(&output).contains("f8"));
}
