//! Every kernel variant against the reference in f64, on every adapter of the machine, and the measurements of speed.

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};

use polystage::gpu::{Capabilities, Device, KernelKey, OpenOptions, Tiles};
use polystage::ops::bench;
use polystage::ops::tune::tune;
use polystage::ops::verify::{Case, Outcome, cases, choices, results, verify};
use polystage::profile::Cache;

use crate::common::{adapters, open};

#[test]
fn every_op_with_every_kernel_variant_matches_the_reference_on_every_adapter() {
    for adapter in adapters() {
        let device = &open(&[adapter.index])[0];
        let outcomes =
            device.block_on(verify(device, &cases(), |_, _| ControlFlow::Continue(()))).expect("runs");
        let failed: Vec<&Outcome> = outcomes.iter().filter(|o| !o.passed).collect();
        let counts = format!("{}: {} of {} failed", adapter.name, failed.len(), outcomes.len());
        assert!(failed.is_empty(), "{counts}\n{failed:#?}");
        let ran = |kernel: &str| outcomes.iter().any(|o| o.variant.contains(kernel));
        for kernel in ["matmul,", "elementwise", "attention_backward,", "layernorm,"] {
            assert!(ran(kernel), "{}: {kernel} did not run", adapter.name);
        }
        assert_eq!(ran("matmul_subgroup"), device.capabilities().subgroup.is_some(), "{}", adapter.name);
    }
}

#[test]
fn packed_weights_give_bit_for_bit_what_the_same_numbers_in_f32_give_with_every_kernel_variant() {
    for adapter in adapters() {
        let device = &open(&[adapter.index])[0];
        let mut seen = std::collections::BTreeSet::new();
        for packed in cases().into_iter().filter(|case| case.packed) {
            let full = Case { packed: false, ..packed.clone() };
            for (choice, capabilities) in choices(device.capabilities(), &packed).expect("a case") {
                let run = |case| device.block_on(results(device, case, &capabilities)).expect("runs");
                let ((variant, got), (_, want)) = (run(&packed), run(&full));
                let bits = |lists: Vec<Vec<f32>>| -> Vec<Vec<u32>> {
                    lists.iter().map(|list| list.iter().map(|x| x.to_bits()).collect()).collect()
                };
                assert_eq!(bits(got), bits(want), "{}: {}, {choice}", adapter.name, packed.label);
                seen.insert(variant);
            }
        }
        // Any shape and multiples of 4, tiles and few rows, on workgroup memory at least; and the tables.
        for (kernel, header) in [
            ("matmul, tiles of 128x128", "any shape, packed"),
            ("matmul, tiles of 64x64", "multiples of 4, packed"),
            ("matmul_rows", "any shape, packed"),
            ("embedding", ""),
        ] {
            let ran = |variant: &String| variant.starts_with(kernel) && variant.contains(header);
            assert!(seen.iter().any(ran), "{kernel}, {header} is not in {seen:?}");
        }
    }
}

#[test]
fn the_tile_of_a_matmul_changes_no_bit_of_its_result_on_any_adapter() {
    for adapter in adapters() {
        let device = &open(&[adapter.index])[0];
        let card = Capabilities { software: false, fill: 1, ..*device.capabilities() };
        let large = |case: &Case| case.op.name() == "matmul" && case.label.contains("129");
        let mut tiles = std::collections::BTreeSet::new();
        for case in cases().into_iter().filter(large) {
            let run = |sums, dispatch, tile| {
                let capabilities = Capabilities { sums, dispatch, tiles: Tiles([[tile; 3]; 3]), ..card };
                device.block_on(results(device, &case, &capabilities)).expect("runs")
            };
            let (_, want) = run(16, u64::MAX, 0);
            let by_number = [1, 2, 3, 4, 5].map(|tile| (64, u64::MAX, tile));
            for (sums, dispatch, tile) in
                [(32, u64::MAX, 0), (64, u64::MAX, 0), (64, 1, 0)].into_iter().chain(by_number)
            {
                let (tile, got) = run(sums, dispatch, tile);
                let bits =
                    |lists: &[Vec<f32>]| -> Vec<u32> { lists.concat().iter().map(|x| x.to_bits()).collect() };
                assert_eq!(bits(&got), bits(&want), "{}: {}, {tile}", adapter.name, case.label);
                tiles.insert(tile);
            }
        }
        for tile in ["128x128", "128x64", "64x128", "64x64", "64x32"] {
            assert!(
                tiles.iter().any(|known| known.contains(&format!("tiles of {tile},"))),
                "{tile}: {tiles:?}"
            );
        }
    }
}

#[test]
fn tiles_are_measured_in_the_time_there_is_and_are_none_where_there_is_no_time() {
    let adapter = &adapters()[0];
    let device = &open(&[adapter.index])[0];
    let card = device.with(Capabilities { software: false, fill: 1, ..*device.capabilities() });
    let none = device.block_on(tune(&card, [32; 3], 0.0)).expect("measures");
    assert_eq!(none, Tiles::default());
    let start = std::time::Instant::now();
    let tiles = device.block_on(tune(&card, [32, 48, 64], 5.0)).expect("measures");
    assert!(tiles.0.concat().iter().all(|&number| number <= 5), "{tiles:?}");
    // One measurement may go beyond the end.
    assert!(start.elapsed().as_secs() < 60, "{:?}", start.elapsed());
}

#[test]
fn compiled_kernels_are_handed_over_once_and_what_is_damaged_or_of_another_driver_counts_as_none() {
    for adapter in adapters() {
        let compile = |kept: Option<Vec<u8>>| {
            let opened = pollster::block_on(Device::open(adapter.index, OpenOptions::default()));
            let device = opened.expect("opens");
            let taken: Arc<Mutex<Vec<Vec<u8>>>> = Arc::default();
            let keep = taken.clone();
            // SAFETY: what is no cache of this driver is refused by its header, which is what is tested.
            unsafe {
                device.keep_kernels(kept.as_deref(), move |data| keep.lock().unwrap().push(data.to_vec()))
            };
            for name in ["accumulate", "unpack"] {
                let key = KernelKey { name, specialisation: Default::default() };
                device.kernel(&key).expect("compiles");
                device.block_on(device.compiled()).expect("keeps");
                device.block_on(device.compiled()).expect("keeps");
            }
            device.check("compiling").expect("no failure");
            drop(device);
            taken.lock().unwrap().clone()
        };
        let first = compile(None);
        assert!((1..=2).contains(&first.len()), "{}: handed over {} times", adapter.name, first.len());
        let kept = first.last().unwrap().clone();
        compile(Some(kept.clone()));
        compile(Some(kept[..kept.len() / 2].to_vec()));
        compile(Some(vec![7; 100]));
        compile(Some(Vec::new()));
    }
}

#[test]
fn drivers_that_put_no_kernels_into_a_cache_leave_no_file_behind() {
    let folder = tempfile::tempdir().expect("a folder");
    let cache = Cache { folder: folder.path().into(), environment: String::new() };
    for adapter in adapters().iter().filter(|adapter| adapter.software) {
        let opened = pollster::block_on(Device::open(adapter.index, OpenOptions::default()));
        let device = opened.expect("opens");
        cache.keep_kernels(&device);
        let key = KernelKey { name: "accumulate", specialisation: Default::default() };
        device.kernel(&key).expect("compiles");
        device.block_on(device.compiled()).expect("keeps");
    }
    assert_eq!(std::fs::read_dir(folder.path()).expect("read").count(), 0);
}

#[test]
fn speeds_are_finite_and_positive_on_every_adapter() {
    for adapter in adapters() {
        let device = &open(&[adapter.index])[0];
        let speed = device.block_on(bench::measure(device, || ())).expect("measures");
        eprintln!("{}: {speed:?}", adapter.name);
        for number in [
            speed.matmul_gflops,
            speed.memory_gb_s,
            speed.upload_gb_s,
            speed.readback_gb_s,
            speed.readback_latency_ms,
        ] {
            assert!(number.is_finite() && number > 0.0, "{}: {speed:?}", adapter.name);
        }
    }
}
