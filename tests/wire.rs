//! What travels between devices at half of its bytes, rounded to bf16.

use futures_channel::oneshot;
use polystage::gpu::{Buffer, Device};
use polystage::mesh::{Division, Wire};
use polystage::ops::packed::{round, widen};
use polystage::pipeline::Setup;
use polystage::pipeline::link::{Combine, connect_all};
use polystage::schedule::generate;
use polystage::train::trainer::Trainer;

use crate::common::{adapters, cut_at, launch, open};
use crate::pipeline::train;
use crate::replicas::{mesh, of_shares, steps};

/// Numbers of all sizes, with those that are hard to round among them.
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let hard = [f32::INFINITY, -0.0, f32::MIN_POSITIVE / 3.0, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, f32::MAX];
    let number = |i: u32| match i.wrapping_mul(2_654_435_761).wrapping_add(seed.wrapping_mul(40503)) {
        word if word % 7 == 0 => hard[word as usize / 7 % hard.len()],
        word => f32::from_bits(word & 0xbfff_ffff),
    };
    (0..count as u32).map(number).collect()
}

/// Sends what each of `senders` has to the receiver, in two pieces that arrive as two others, and reads what is there then.
fn travel(senders: &[(Device, Vec<f32>)], to: &Device, combine: &Combine, count: usize) -> Vec<f32> {
    let sent = senders[0].1.len();
    let devices: Vec<&Device> = senders.iter().map(|(device, _)| device).collect();
    let bytes = 4 * sent.max(count) as u64;
    let (outgoing, mut incoming) = connect_all(&[devices], &[to], bytes, 1, Wire::BF16).unwrap();
    let target = to.buffer("target", 4 * count as u64).unwrap();
    let halves = |buffer: &Buffer, count: usize| {
        let first = 4 * (count as u64 / 3);
        let all = [(buffer.range(0, first), 0), (buffer.range(first, 4 * count as u64 - first), first)];
        all.into_iter().filter(|(range, _)| range.bytes > 0).collect::<Vec<_>>()
    };
    std::thread::scope(|scope| {
        let mut done = Vec::new();
        for ((device, values), mut out) in senders.iter().zip(outgoing) {
            let (arrived, has_arrived) = oneshot::channel::<()>();
            done.push(arrived);
            scope.spawn(move || {
                let source = device.buffer("source", 4 * sent as u64).unwrap();
                device.upload(&source, 0, bytemuck::cast_slice(values));
                device.block_on(async {
                    let mut recorder = device.record();
                    let recorded = out.record(&mut recorder, &halves(&source, sent), 5).await.unwrap();
                    recorder.submit(|| ());
                    recorded.submitted();
                    let _ = has_arrived.await;
                });
            });
        }
        to.block_on(async {
            let mut recorder = to.record();
            let pieces = halves(&target, count);
            let (recorded, copy) = incoming[0].take(&mut recorder, &pieces, 5, combine, false).await.unwrap();
            assert_eq!(copy.unwrap().bytes, 4 * count.div_ceil(2) as u64);
            recorder.submit(|| ());
            recorded.submitted();
            let bytes = to.read(&target.range(0, 4 * count as u64)).await.unwrap();
            drop(done);
            bytemuck::pod_collect_to_vec(&bytes)
        })
    })
}

fn assert_bits(what: &str, want: &[f32], got: &[f32]) {
    for (at, (want, got)) in want.iter().zip(got).enumerate() {
        let same = want.to_bits() == got.to_bits() || want.is_nan() && got.is_nan();
        assert!(same, "{what}: {got} at {at}, not {want}");
    }
}

#[test]
fn a_tensor_of_any_size_arrives_as_the_bf16_next_to_it_and_sums_are_rounded_once_on_every_adapter() {
    for adapter in adapters() {
        let [a, b, to] = &open(&[adapter.index; 3])[..] else { unreachable!() };
        for count in [1, 2, 3, 63, 130, 1001] {
            let [x, y] = [1, 2].map(|seed| numbers(count, seed));
            let near = |values: &[f32]| values.iter().map(|&v| widen(round(v))).collect::<Vec<f32>>();
            let what = format!("{count} on {}", adapter.name);
            let got = travel(&[(a.clone(), x.clone())], to, &Combine::Sum { first: 0 }, count);
            assert_bits(&what, &near(&x), &got);
            let sum: Vec<f32> = near(&x).iter().zip(near(&y)).map(|(x, y)| widen(round(x + y))).collect();
            let both = [(a.clone(), x.clone()), (b.clone(), y.clone())];
            let first = count / 2;
            let got = travel(&both, to, &Combine::Sum { first }, count - first);
            assert_bits(&format!("sum of {what}"), &sum[first..], &got);
            let beside: Vec<f32> = near(&x).into_iter().chain(near(&y[..first])).collect();
            let got = travel(&both, to, &Combine::Beside(vec![count, first]), count + first);
            assert_bits(&format!("both of {what}"), &beside, &got);
        }
    }
}

#[test]
fn pipelines_replicas_and_gangs_learn_over_a_wire_of_bf16_and_send_half_of_the_bytes() {
    let i = adapters()[0].index;
    let plain = of_shares(&[2, 2], &[]);
    let flat = |count| generate("1f1b", count, 4).unwrap();
    let by_token = Division { shares: vec![2, 1], sequence: true };
    let none = Division::none();
    for (what, schedule, tensor, parts) in [
        ("pipeline", flat(2), &none, 0.5..0.52),
        ("replicas", mesh("1f1b", 1, &[2, 2]), &none, 0.5..0.52),
        // The statistics of logits are sent as they are.
        ("gang", flat(1), &Division::of(&[1, 1]), 0.5..0.55),
        ("gang by token", flat(1), &by_token, 0.5..0.6),
        ("cube", mesh("zb-h1", 2, &[2, 2]), &by_token, 0.5..0.7),
    ] {
        let run = |wire: Wire| {
            let devices = schedule.ranks.len() * tensor.members();
            let setup =
                Trainer::setup_in(&plain, schedule.clone(), vec![None; schedule.ranks.len()]).unwrap();
            let setup = Setup { tensor: tensor.clone(), wire, budgets: vec![None; devices], ..setup };
            let setup =
                if setup.schedule.stages > 1 { Setup { cuts: Some(cut_at(&[2.5])), ..setup } } else { setup };
            // What is allocated is what was planned, to the byte.
            drop(launch(&setup, &vec![i; devices]));
            let mut trainer = train(&plain, setup, &vec![i; devices]);
            let watch = trainer.watch();
            // Weights, which are sent as they are, are told with the next step.
            let row = watch.block_on(trainer.step()).unwrap();
            let bytes: u64 = row.devices.iter().map(|device| device.bytes_moved).sum();
            (bytes, steps(&mut trainer, 6))
        };
        let ((as_is, exact), (rounded, near)) = (run(Wire::F32), run(Wire::BF16));
        let part = rounded as f64 / as_is as f64;
        assert!(parts.contains(&part), "{what}: {part} of the bytes");
        assert!(exact != near, "{what}: nothing was rounded");
        for (exact, near) in exact.iter().zip(&near) {
            // A bf16 has eight bits: half a unit in the last place is 2^-9 of what is sent, and steps add up.
            approx::assert_relative_eq!(exact, near, max_relative = 2e-3);
        }
    }
}
