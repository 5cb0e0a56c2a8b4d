//! One adapter at work on the layers of a model: their times, and rates with them.

use std::collections::BTreeMap;

use super::agenda::{Agenda, Task};
use super::noise::{beside, is_as_good};
use super::probe::{Beat, Place, Probe, Stages, Times};
use super::{GIGA, MICRO, Profiler, Progress, SECONDS, begin, is_too_long, short, unix_seconds};
use crate::error::Result;
use crate::gpu::now;
use crate::graph::Phase;
use crate::model::{KINDS, Purpose};
use crate::plan::{DeviceProfile, Evidence, LayerProfile, Rates, ShapeProfile};
use crate::schedule::{Jitter, Kind};

impl Profiler<'_> {
    /// Measures the layers for microbatches of `size` sequences, and rates with them, on a device or on a gang, which has this
    /// number on the agenda. None where the layers do not fit.
    pub(super) fn measure(
        &self,
        (index, place): (usize, Place),
        size: usize,
        agenda: &mut Agenda,
        say: &mut dyn FnMut(Progress),
    ) -> Result<Option<Sample>> {
        let names: Vec<&str> = place.devices.iter().map(short).collect();
        let what = format!("{}: {size} x {} tokens", names.join(" with "), self.sequence);
        let mut by_split: Vec<Times> = Vec::new();
        let mut weights = 0;
        // About the part of a step that one block is.
        let stages = Stages::of(self.model);
        let flops = self.model.with_blocks(stages.blocks())?.layer_flops(size, self.sequence)?;
        let block = flops[1..][..stages.parts].iter().sum::<f64>() / flops.iter().sum::<f64>().max(1.0);
        for split in [true, false] {
            // What is beside the same kernels is nothing in so long a time: B takes I and W together.
            if by_split.iter().any(|apart| is_too_long(apart.step())) {
                break;
            }
            let started = now();
            let number = begin(Task::Layers { device: index, size, split }, &what, agenda, say);
            let Some(mut probe) = self.probe(place, size, split)? else { return Ok(None) };
            let mut is_ready = false;
            let go_on = |beat: Beat| {
                if !std::mem::replace(&mut is_ready, true) {
                    agenda.ready(now() - started);
                }
                match beat {
                    Beat::After { .. } => say(Progress::Step),
                    Beat::Within { step } => {
                        agenda.hear(index, step / size as f64, block * step / size as f64);
                        let (count, remaining) = (agenda.count(), agenda.remaining());
                        say(Progress::Measuring { what: &what, number, count, remaining });
                    }
                }
                !beat.is_enough()
            };
            let times = probe.measure(SECONDS, self.patience, go_on)?;
            weights = probe.weights;
            probe.stop()?;
            agenda.hear(index, times.step() / size as f64, times.stage(Stages::BLOCK) / size as f64);
            agenda.end(now() - started);
            by_split.push(times);
        }
        let (apart, joined) = (&by_split[0], by_split.get(1));
        let last = joined.unwrap_or(apart);
        let mean = |of: &dyn Fn(&Times) -> f64| by_split.iter().map(of).sum::<f64>() / by_split.len() as f64;
        let (wandering, submit) = (mean(&|times| times.jitter.part), mean(&|times| times.submit));
        let adapted = self.model.adapter().is_some();
        let own = |times: &Times, stage: usize, action: Kind| (times.of(stage, action) - submit).max(0.0);
        // With an adapter nobody wants the gradient of the first block's input.
        let block = |times: &Times, action: Kind| {
            let is_whole = !adapted || action == Kind::F;
            let first = if is_whole { own(times, Stages::BLOCK, action) } else { 0.0 };
            let apart: f64 = stages.apart().map(|stage| own(times, stage, action)).sum();
            let all = first + apart + own(times, stages.together(), action);
            all / (f64::from(u8::from(is_whole)) + 1.0 + stages.together as f64)
        };
        let part = |times: &Times, stage: usize, action: Kind| {
            let apart: f64 = stages.apart().map(|stage| own(times, stage, action)).sum();
            block(times, action) * own(times, stage, action) / apart.max(f64::MIN_POSITIVE)
        };
        let mut layers = BTreeMap::new();
        let stage_of = |kind: usize| {
            let is_own = |&stage: &usize| self.model.layer_kind(1 + stage - stages.apart().start) == kind;
            stages.apart().find(is_own)
        };
        for (kind, name) in KINDS.iter().enumerate() {
            let stage = match kind {
                0 => Stages::EMBEDDING,
                kind if kind == KINDS.len() - 1 => stages.head(),
                kind => match stage_of(kind) {
                    Some(stage) => stage,
                    None => continue,
                },
            };
            let seconds = |times: &Times, action: Kind| match stages.apart().contains(&stage) {
                true => part(times, stage, action),
                false => own(times, stage, action),
            };
            let profile = LayerProfile {
                forward: mean(&|times| seconds(times, Kind::F)),
                input: seconds(apart, Kind::I),
                weight: seconds(apart, Kind::W),
                backward: joined.map(|joined| seconds(joined, Kind::B)),
            };
            layers.insert(name.to_string(), profile);
        }
        let whole: f64 =
            ["attention", "mlp"].iter().filter_map(|kind| layers.get(*kind)).map(LayerProfile::sum).sum();
        let software = place.devices.iter().any(|device| device.capabilities().software);
        let rate = |bytes: u64, seconds: f64| (bytes as f64 / GIGA / (seconds - submit).max(1e-7)).min(1e6);
        let rates = Rates {
            matmul_gflops: self.block_flops(size)? / GIGA / whole.max(1e-9),
            memory_gb_s: rate(7 * weights, last.update),
            launch_us: 0.0,
            submit_us: submit / MICRO,
            optimizer_gb_s: Some(rate(weights, last.update)),
            norm_gb_s: Some(rate(weights, last.norm)),
            clear_gb_s: Some(rate(weights, last.clear)),
            barrier_us: last.barrier / MICRO,
        };
        let evidence = Evidence {
            unix_seconds: unix_seconds(),
            steps: by_split.iter().map(|times| times.steps as u64).sum(),
            spread: wandering,
            ..Evidence::default()
        };
        Ok(Some(Sample {
            shape: ShapeProfile {
                submit_us: Some(submit / MICRO),
                measured: Some(evidence),
                layers,
                ..ShapeProfile::default()
            },
            // A software adapter's demand is its number of threads; what goes beyond is this program's own.
            cores: if software { last.cores.round().max(1.0) } else { last.cores.min(1.0) },
            jitter: Jitter { part: wandering, ..last.jitter },
            rates,
            adapted,
        }))
    }

    fn block_flops(&self, size: usize) -> Result<f64> {
        let purpose = Purpose::Training { tokens: size * self.sequence };
        let model = self.model.with_blocks(2)?;
        let parts = model.layers_of_block();
        let graph = model.stage_graph(1 + parts..1 + 2 * parts, size, self.sequence, purpose)?.graph;
        Ok([Phase::Forward, Phase::Input, Phase::Weight].iter().map(|&p| graph.phase_flops(p)).sum())
    }

    /// A probe of some blocks between embedding and head; none if it does not fit.
    fn probe(&self, place: Place, size: usize, split: bool) -> Result<Option<Probe>> {
        let stages = Stages::of(self.model);
        let (schedule, cuts) = stages.schedule(split);
        let model = self.model.with_blocks(stages.blocks())?;
        Probe::new_if_it_fits(&model, schedule, cuts, (size, self.sequence), place)
    }
}

/// What one measurement of a device shows.
pub(super) struct Sample {
    pub(super) shape: ShapeProfile,
    cores: f64,
    jitter: Jitter,
    rates: Rates,
    /// Whether an adapter is trained: its few weights say little about how fast many are updated.
    adapted: bool,
}

impl Sample {
    /// Notes for which shape, and what others took meanwhile.
    pub(super) fn beside(mut self, others: Option<f64>, shape: String) -> Sample {
        self.shape.shape = shape;
        self.shape.measured = self.shape.measured.map(|evidence| Evidence { others, ..evidence });
        self
    }

    /// Puts it into a profile, except where that rests on less noise.
    pub(super) fn put(&self, profile: &mut DeviceProfile, limit: f64) {
        let others = beside(self.shape.measured);
        let is_better = |before: Option<Evidence>| is_as_good(others, beside(before), limit);
        if profile.shape(&self.shape.shape).is_none_or(|before| is_better(before.measured)) {
            profile.put(self.shape.clone());
        }
        if is_better(profile.measured) {
            (profile.cores, profile.jitter) = (self.cores, Some(self.jitter));
            let is_loud = beside(profile.measured).is_some_and(|others| others > limit);
            if !self.adapted || is_loud || profile.rates.matmul_gflops == 0.0 {
                profile.rates = self.rates;
            }
            profile.measured = self.shape.measured;
        }
    }
}
