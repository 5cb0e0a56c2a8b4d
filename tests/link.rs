//! Links by themselves: who copies, and what is held.

use std::sync::mpsc;
use std::time::Duration;

use polystage::gpu::{AdapterInfo, Device};
use polystage::mesh::Wire;
use polystage::pipeline::link::{Combine, Incoming, Outgoing, connect};

use crate::common::{adapters, open};

/// Enough for a thread of the link's own.
const BYTES: u64 = 4 << 20;
const SLOTS: usize = 2;
const SUM: Combine = Combine::Sum { first: 0 };

/// A device beside itself, and beside each other one.
fn pairs() -> Vec<Vec<Device>> {
    let all: Vec<AdapterInfo> = adapters();
    all.iter().map(|other| open(&[all[0].index, other.index])).collect()
}

fn tensor(tag: usize) -> Vec<f32> {
    (0..BYTES as usize / 4).map(|at| (at * 7 + tag * 13) as f32).collect()
}

/// Sends so many tensors.
fn send(device: &Device, out: &mut Outgoing, count: usize) -> polystage::Result<()> {
    let source = device.buffer("source", BYTES)?;
    device.block_on(async {
        for tag in 0..count {
            device.upload(&source, 0, bytemuck::cast_slice(&tensor(tag)));
            let mut recorder = device.record();
            let recorded = out.record(&mut recorder, &[(source.whole(), 0)], tag).await?;
            recorder.submit(|| ());
            recorded.submitted();
        }
        device.below(1).await;
        Ok(())
    })
}

fn take(device: &Device, inward: &mut Incoming, tag: usize) -> Vec<f32> {
    let target = device.buffer("target", BYTES).unwrap();
    device.block_on(async {
        let mut recorder = device.record();
        let (recorded, copy) = inward.record(&mut recorder, &[(target.whole(), 0)], tag).await.unwrap();
        assert_eq!(copy.unwrap().bytes, BYTES);
        recorder.submit(|| ());
        recorded.submitted();
        device.read_f32(&target.whole()).await.unwrap()
    })
}

#[test]
fn large_tensors_that_were_ordered_are_copied_while_their_receiver_does_nothing() {
    for devices in pairs() {
        let [from, to] = &devices[..] else { unreachable!() };
        let (mut out, inward) = connect(from, to, BYTES, SLOTS, Wire::F32).unwrap();
        let mut inward = inward.ahead().unwrap();
        let count = 2 * SLOTS;
        (0..count).for_each(|tag| inward.order(tag, BYTES, SUM, false));
        let (sent, all_sent) = mpsc::channel();
        std::thread::scope(|scope| {
            // More than the sender has buffers for.
            scope.spawn(move || {
                send(from, &mut out, count).unwrap();
                sent.send(()).unwrap();
            });
            all_sent.recv_timeout(Duration::from_secs(60)).expect("nobody copies");
            for tag in 0..count {
                assert_eq!(take(to, &mut inward, tag), tensor(tag), "{tag}");
            }
        });
    }
}

#[test]
fn an_end_that_is_dropped_with_orders_open_gives_its_memory_back_and_its_sender_hears_of_it() {
    for devices in pairs() {
        let [from, to] = &devices[..] else { unreachable!() };
        let before = to.allocated();
        let (mut out, inward) = connect(from, to, BYTES, SLOTS, Wire::F32).unwrap();
        let mut inward = inward.ahead().unwrap();
        // One that is copied and not taken, and one that never comes.
        (0..2).for_each(|tag| inward.order(tag, BYTES, SUM, false));
        send(from, &mut out, 1).unwrap();
        // For the one to be copied.
        std::thread::sleep(Duration::from_millis(200));
        drop(inward);
        assert!(send(from, &mut out, SLOTS + 1).unwrap_err().to_string().contains("has stopped"));
        drop(out);
        assert_eq!(to.allocated() - before, 0, "{}", to.info().name);
    }
}

#[test]
fn a_tensor_that_is_not_taken_in_the_order_of_the_orders_is_refused() {
    let devices = &pairs()[0];
    let (_out, mut inward) = connect(&devices[0], &devices[1], BYTES, SLOTS, Wire::F32).unwrap();
    (0..2).for_each(|tag| inward.order(tag, BYTES, SUM, false));
    let target = devices[1].buffer("target", BYTES).unwrap();
    let mut recorder = devices[1].record();
    let wrong = devices[1].block_on(inward.record(&mut recorder, &[(target.whole(), 0)], 1));
    let message = wrong.err().unwrap().to_string();
    assert!(message.contains("tensor 1 is to be taken before 0"), "{message}");
}
