//! Devices that divide every layer, measured as one: what each layer takes with its sums, while all of them work.

use std::collections::BTreeMap;

use super::agenda::Agenda;
use super::noise::{Quiet, beside, limit};
use super::probe::Place;
use super::{Profiler, Progress, bare, chosen, interpolated, is_too_long};
use crate::error::Result;
use crate::gpu::Device;
use crate::mesh::{Division, Wire};
use crate::plan::{GangProfile, Machine, ShapeProfile};

impl Profiler<'_> {
    /// Adds to the machine what gangs take that divide layers like this, with tensors that travel as this, neighbours among its
    /// devices, for microbatches of each of `sizes` sequences; one of the same adapters stands for others. Nothing for a single
    /// share.
    ///
    /// # Errors
    ///
    /// Those of a device that fails.
    pub fn gangs(
        &self,
        machine: &mut Machine,
        (division, wire): (&Division, Wire),
        sizes: &[usize],
        say: &mut dyn FnMut(Progress),
    ) -> Result<()> {
        let all: Vec<usize> = (0..self.devices.len()).filter(|_| division.divides()).collect();
        for (number, gang) in all.chunks_exact(division.members()).enumerate() {
            if machine.gang(gang, (division, wire)).is_none() {
                let place = (self.devices.len() + number, gang);
                let profile = self.gang(place, (division, wire), sizes, say)?;
                machine.gangs.push(profile);
            }
        }
        Ok(())
    }

    fn gang(
        &self,
        (number, gang): (usize, &[usize]),
        (division, wire): (&Division, Wire),
        sizes: &[usize],
        say: &mut dyn FnMut(Progress),
    ) -> Result<GangProfile> {
        let devices: Vec<Device> = gang.iter().map(|&device| self.devices[device].clone()).collect();
        let place = Place { devices: &devices, tensor: Some(division), wire };
        let limit = devices.iter().map(limit).fold(1.0, f64::min);
        let cache = self.cache.as_ref();
        let key = cache.map(|cache| {
            let (devices, by_token) = (cache.key(&devices.iter().collect::<Vec<_>>()), division.sequence);
            let by_token = if by_token { " by token" } else { "" };
            let wire = if wire == Wire::BF16 { " bf16" } else { "" };
            format!("{devices} gang {}{by_token}{wire}", division.proportion())
        });
        let known = |key: &String| cache.filter(|_| !self.fresh)?.read(key)?.devices.into_iter().next();
        let mut profile = key.as_ref().and_then(known).unwrap_or_else(|| bare(&devices[0]));
        let mut sorted = sizes.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        let (quiet, agenda) = (&mut Quiet::new(say), &mut Agenda::new(Vec::new()));
        let mut samples: BTreeMap<usize, ShapeProfile> = BTreeMap::new();
        let mut seconds_per_sequence = 0.0;
        for size in chosen(&sorted) {
            let shape = self.shape(size);
            let good = profile.shape(&shape).filter(|known| !quiet.is_worth(beside(known.measured), limit));
            if good.is_none() && !is_too_long(seconds_per_sequence * size as f64) {
                let (sample, others) =
                    quiet.measure(limit, |say| self.measure((number, place), size, agenda, say))?;
                let Some(sample) = sample else { break };
                sample.beside(others, shape.clone()).put(&mut profile, limit);
            }
            let Some(known) = profile.shape(&shape) else { continue };
            seconds_per_sequence = self.step_seconds(known) / size as f64;
            samples.insert(size, known.clone());
        }
        if let (Some(cache), Some(key), false) = (cache, &key, samples.is_empty()) {
            cache.write_profile(key, profile.clone());
        }
        for size in sorted.into_iter().filter(|size| !samples.contains_key(size)) {
            if let Some(between) = interpolated(&samples, size) {
                profile.put(ShapeProfile { shape: self.shape(size), ..between });
            }
        }
        Ok(GangProfile { devices: gang.to_vec(), division: division.clone(), wire, profile })
    }
}
