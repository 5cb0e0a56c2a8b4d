//! Devices that divide every layer among them, as the devices of another machine: the search, the simulator and everything else
//! that knows devices then knows gangs.
//!
//! What was measured of a gang counts. Where nothing was, a member takes of each layer's measured time the part that its share
//! of the work would have by rates; a gang takes as long as its slowest member, and longer by the sums in which layers come
//! together. All members are busy together.

use super::costs::{MICRO, estimated, kind_seconds};
use super::machine::{DeviceProfile, LayerProfile, Link, LinkProfile, Machine, Rates, ShapeProfile};
use super::traffic::hop;
use super::workload::{Batching, Layer, Sums, Workload};
use crate::mesh::Division;

/// A workload that gangs divide.
#[derive(Debug, Clone)]
pub struct Divided {
    /// What a single device would do.
    pub whole: Workload,
    /// What each member does.
    pub parts: Vec<Workload>,
    /// How the members divide layers.
    pub division: Division,
}

impl Divided {
    /// The member whose part stands for all: the one with the largest share.
    fn largest(&self) -> usize {
        (0..self.division.members()).rev().max_by_key(|&member| self.division.shares[member]).unwrap_or(0)
    }

    /// What that member does.
    pub fn part(&self) -> &Workload {
        &self.parts[self.largest()]
    }

    /// How many times a member's bytes that member's are.
    fn ratio(&self, member: usize, bytes: fn(&Layer) -> u64) -> f64 {
        let sum = |of: &Workload| of.layers.iter().map(bytes).sum::<u64>().max(1) as f64;
        sum(self.part()) / sum(&self.parts[member])
    }

    /// Of these bytes for each member so many as the largest part may take.
    pub fn memory(&self, members: impl Iterator<Item = Option<u64>>) -> Option<u64> {
        let ratio = |member| self.ratio(member, |layer| layer.state);
        let scaled = |(member, bytes): (usize, Option<u64>)| Some((bytes? as f64 * ratio(member)) as u64);
        members.enumerate().filter_map(scaled).min()
    }

    /// The machine whose devices are these gangs of those of `machine`.
    ///
    /// # Panics
    ///
    /// On devices that do not exist, and gangs of another number of members than there are parts.
    pub fn machine(&self, machine: &Machine, gangs: &[Vec<usize>]) -> Machine {
        let pairs = || (0..gangs.len()).flat_map(|a| (0..gangs.len()).map(move |b| (a, b)));
        let slowdown = |a: usize, b: usize| {
            let of = |&i: &usize| gangs[b].iter().map(|&j| machine.slowdown(i, j)).product::<f64>();
            gangs[a].iter().map(of).fold(1.0, f64::max)
        };
        let row = |a: usize| (0..gangs.len()).map(|b| if a == b { 1.0 } else { slowdown(a, b) }).collect();
        Machine {
            devices: gangs.iter().map(|gang| self.device(machine, gang)).collect(),
            slowdown: if machine.slowdown.is_empty() {
                Vec::new()
            } else {
                (0..gangs.len()).map(row).collect()
            },
            links: pairs()
                .filter(|(a, b)| a != b)
                .map(|(from, to)| LinkProfile { from, to, link: between(machine, &gangs[from], &gangs[to]) })
                .collect(),
            ..machine.clone()
        }
    }

    fn device(&self, machine: &Machine, gang: &[usize]) -> DeviceProfile {
        let members = || gang.iter().map(|&device| &machine.devices[device]);
        let first = &machine.devices[gang[self.largest()]];
        let least = |of: fn(&DeviceProfile) -> f64| {
            let scaled = |(member, device)| self.ratio(member, |layer| layer.weights) * of(device);
            members().enumerate().map(scaled).fold(f64::INFINITY, f64::min)
        };
        let most = |of: fn(&Rates) -> f64| members().map(|device| of(&device.rates)).fold(0.0, f64::max);
        let rates = Rates {
            matmul_gflops: least(|device| device.rates.matmul_gflops),
            memory_gb_s: least(|device| device.rates.memory_gb_s),
            launch_us: most(|rates| rates.launch_us),
            submit_us: most(|rates| rates.submit_us),
            optimizer_gb_s: Some(least(|device| {
                device.rates.optimizer_gb_s.unwrap_or(device.rates.memory_gb_s / 7.0)
            })),
            norm_gb_s: Some(least(|device| device.rates.norm_gb_s.unwrap_or(device.rates.memory_gb_s))),
            clear_gb_s: Some(least(|device| device.rates.clear_gb_s.unwrap_or(device.rates.memory_gb_s))),
            barrier_us: most(|rates| rates.barrier_us),
        };
        let measured = machine.gang(gang, (&self.division, self.whole.wire));
        let names: Vec<&str> = members().map(|device| device.name.as_str()).collect();
        DeviceProfile {
            name: names.join(" + "),
            driver: first.driver.clone(),
            adapter: None,
            memory: self.memory(members().map(|device| device.memory)),
            max_binding: members().filter_map(|device| device.max_binding).min(),
            cores: measured.map_or_else(|| members().map(|device| device.cores).sum(), |gang| gang.cores),
            copy_engine: members().all(|device| device.copy_engine),
            jitter: measured.map_or(first.jitter, |gang| gang.jitter),
            measured: measured.map_or(first.measured, |gang| gang.measured),
            rates,
            shapes: (0..self.whole.batchings.len()).map(|at| self.shape(machine, gang, at)).collect(),
            kernels: first.kernels,
        }
    }

    /// Times of a gang for a batching.
    fn shape(&self, machine: &Machine, gang: &[usize], batching: usize) -> ShapeProfile {
        let of = &self.whole.batchings[batching];
        if let Some(shape) =
            machine.gang(gang, (&self.division, self.whole.wire)).and_then(|gang| gang.shape(&of.shape))
        {
            return shape.clone();
        }
        let submit = |device: usize| {
            let profile = &machine.devices[device];
            profile.shape(&of.shape).and_then(|shape| shape.submit_us).unwrap_or(profile.rates.submit_us)
        };
        let submit_us = gang.iter().map(|&device| submit(device)).fold(0.0, f64::max);
        let kind = |kind: usize| {
            let times = gang.iter().enumerate().map(|(member, &device)| {
                let others = gang.iter().filter(|&&other| other != device);
                let slower: f64 = others.map(|&other| machine.slowdown(device, other)).product();
                let part = &self.parts[member].batchings[batching];
                self.part_of(&machine.devices[device], of, part, kind).map(|seconds| slower * seconds)
            });
            let most = |a: [f64; 4], b: [f64; 4]| std::array::from_fn(|at| f64::max(a[at], b[at]));
            let [forward, input, weight, backward] = times.fold([0.0; 4], most);
            let sums = self.part().batchings[batching].sums.get(kind).copied();
            let [before, after] = sums.unwrap_or_default().map(|sums| summed(machine, gang, sums, submit_us));
            LayerProfile {
                forward: forward + before,
                input: input + after,
                weight,
                backward: Some(backward + after),
            }
        };
        let measured =
            machine.devices[gang[self.largest()]].shape(&of.shape).and_then(|shape| shape.measured);
        let kinds = self.whole.kinds.iter().enumerate();
        let layers = kinds.map(|(number, name)| (name.clone(), kind(number))).collect();
        ShapeProfile { shape: of.shape.clone(), submit_us: Some(submit_us), measured, layers }
    }

    /// F, I, W and B of a member's part of a layer.
    fn part_of(&self, device: &DeviceProfile, whole: &Batching, part: &Batching, kind: usize) -> [f64; 4] {
        let all = kind_seconds(&self.whole, whole, device, device.shape(&whole.shape), kind);
        let [of_whole, of_part] = [whole, part].map(|batching| estimated(batching, device, kind));
        let ratio = |at: usize| if of_whole[at] > 0.0 { of_part[at] / of_whole[at] } else { 1.0 };
        std::array::from_fn(|at| all[at] * ratio(at))
    }
}

/// The slowest of the ways between the members of two gangs: all are taken at once, each by its like.
fn between(machine: &Machine, from: &[usize], to: &[usize]) -> Link {
    let ways = from.iter().zip(to).map(|(&from, &to)| machine.link(from, to));
    let slowness = |link: &Link| 1.0 / link.gb_s.max(f64::MIN_POSITIVE);
    ways.max_by(|a, b| slowness(a).total_cmp(&slowness(b))).unwrap_or(machine.link)
}

/// Seconds of sums over a gang. Each member hands over what it has, which goes down; the host reads one term of each member and
/// writes the sum, for each member that gets it.
fn summed(machine: &Machine, gang: &[usize], sums: Sums, submit_us: f64) -> f64 {
    let ways = gang.iter().zip(gang.iter().cycle().skip(1));
    let hops: Vec<_> = ways.map(|(&from, &to)| hop(machine, from, to, sums.bytes)).collect();
    let most = |of: fn(&crate::schedule::Hop) -> f64| hops.iter().map(of).fold(0.0, f64::max);
    let copies = (gang.len() + 1) as f64 / 2.0;
    sums.count as f64 * (most(|hop| hop.latency) + submit_us * MICRO)
        + most(|hop| hop.out)
        + copies * most(|hop| hop.copy)
        + most(|hop| hop.into)
}
