//! Growing texts: new tokens pass the stages one group of texts after another, and every stage keeps its own caches. What
//! decoding adds to the plan of a device, to a device at work and to the executor.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use futures_channel::mpsc;
use futures_util::StreamExt;

use super::compute::Recording;
use super::executor::Executor;
use super::link;
use super::log::State;
use super::plan::Plan;
use super::rank::{Command, Rank, Replies, Reply, Stage};
use crate::error::{Error, Result};
use crate::gpu::{Buffer, Capabilities, Device, Mapping, Range, Recorder};
use crate::graph::{Fed, Phase, StageGraph};
use crate::mesh::Wire;
use crate::model::Purpose;
use crate::ops::parameters::Parameters;
use crate::ops::plan::MemoryPlan;
use crate::ops::program::{DUMMY_BYTES, Slots, StageProgram};
use crate::schedule::{Action, Kind};
use crate::timeline::What;

/// New tokens of a group of B texts.
#[derive(Clone, Debug)]
pub struct Grow {
    /// The group, which says whose caches they go to.
    pub group: usize,
    /// Counts the calls, from 0, over all groups.
    pub number: usize,
    /// (B,T), T being the plan's `sequence` or 1. Whatever stands after the end of a text is ignored as long as later
    /// tokens take its positions.
    pub tokens: Vec<u32>,
    /// (B,T): the place of each token in its text; consecutive in a row, and below the capacity.
    pub positions: Vec<u32>,
    /// For each text the row among the B·T whose logits are wanted.
    pub last: Vec<u32>,
}

/// What decoding adds to the plan of a device.
pub(super) struct DecodePlan {
    /// Its stages for one token at a time, on the caches of those for more; none where there never are more.
    singles: Vec<(usize, StageGraph, MemoryPlan)>,
    /// Groups of texts, each with caches in every stage.
    groups: usize,
    /// Bytes of a group's logits, on the device of the last stage.
    logits: Option<u64>,
}

impl DecodePlan {
    /// For these stages of a plan, on one device.
    pub(super) fn new(
        plan: &Plan,
        rank: usize,
        stages: &[usize],
        capacity: usize,
        capabilities: &Capabilities,
    ) -> Result<DecodePlan> {
        let setup = &plan.setup;
        let single = |&stage: &usize| {
            let (layers, purpose) = (plan.stages[stage].clone(), Purpose::Decode { capacity });
            let graph = plan.model.part_of_stage(layers, setup.batch, 1, purpose, plan.member(rank))?;
            let memory = MemoryPlan::new(&graph, capabilities);
            Ok((stage, graph, memory))
        };
        let singles = stages.iter().filter(|_| setup.sequence > 1).map(single).collect::<Result<_>>()?;
        let is_last = stages.contains(&(plan.stages.len() - 1));
        let logits = is_last.then(|| 4 * (setup.batch * plan.vocabulary(rank).len()) as u64);
        Ok(DecodePlan { singles, groups: plan.schedule.microbatches, logits })
    }

    /// Bytes that it takes on the device.
    pub(super) fn bytes(&self) -> u64 {
        let shared = |memory: &MemoryPlan| self.groups as u64 * memory.cache_bytes();
        let own = |memory: &MemoryPlan| memory.bytes(self.groups, 0) - shared(memory) + DUMMY_BYTES;
        let singles: u64 = self.singles.iter().map(|(_, _, memory)| own(memory)).sum();
        singles + self.logits.map_or(0, |bytes| link::memory(bytes, self.groups, Wire::F32))
    }
}

/// What decoding adds to a device at work.
pub(super) struct Decoder {
    singles: HashMap<usize, StageProgram>,
    logits: Option<Readback>,
}

impl Decoder {
    /// Allocates and compiles what the plan says, beside the stages that are there.
    pub(super) fn new(device: &Device, plan: DecodePlan, stages: &HashMap<usize, Stage>) -> Result<Decoder> {
        let mut singles = HashMap::new();
        for (at, graph, memory) in plan.singles {
            let caches = stages.get(&at).map_or(Vec::new(), |stage| stage.program.caches().to_vec());
            singles.insert(at, StageProgram::with_caches(device, graph, memory, 0, caches)?);
        }
        let logits = plan.logits.map(|bytes| Readback::new(device, plan.groups, bytes)).transpose()?;
        Ok(Decoder { singles, logits })
    }
}

impl Executor {
    /// Sends new tokens of a group of texts on their way through the pipeline, for a plan that decodes. The logits come
    /// in the order of the calls, from [`Executor::logits`]; other groups may follow at once.
    pub fn grow(&mut self, grow: Grow) -> Result<()> {
        let grow = Arc::new(grow);
        (0..self.devices.len()).try_for_each(|rank| self.tell(rank, Command::Decode(grow.clone())))
    }

    /// The next group's logits, (B,V), and its number.
    pub async fn logits(&mut self) -> Result<(usize, Vec<f32>)> {
        loop {
            let (rank, Reply::Logits(logits)) = self.answer().await? else { continue };
            let (group, values) = logits.take()?;
            let parts = self.parts_of_logits.entry(group).or_default();
            parts.insert(rank, values);
            if parts.len() == self.members {
                let parts = self.parts_of_logits.remove(&group).unwrap_or_default();
                return Ok((group, self.side_by_side(parts)));
            }
        }
    }

    /// Rows of logits, of which each member of a gang has those of its tokens.
    pub(super) fn side_by_side(&self, parts: BTreeMap<usize, Vec<f32>>) -> Vec<f32> {
        let rows = parts.values().map(Vec::len).sum::<usize>() / self.vocabulary;
        if parts.len() == 1 {
            return parts.into_values().flatten().collect();
        }
        let of_row = |row: usize| {
            parts
                .values()
                .flat_map(move |part| part[row * part.len() / rows..(row + 1) * part.len() / rows].iter())
        };
        (0..rows).flat_map(of_row).copied().collect()
    }
}

impl Rank {
    /// Runs every stage of this rank on the new tokens. The logits of the last stage are answered when they are on the
    /// host; until then the rank goes on with the next group.
    pub(super) async fn decode(&mut self, grow: &Grow, replies: &Replies) -> Result<()> {
        let mut order: Vec<usize> = self.stages.keys().copied().collect();
        order.sort_unstable();
        for at in order {
            self.decode_stage(at, grow, replies).await?;
        }
        self.log.take_events();
        Ok(())
    }

    async fn decode_stage(&mut self, at: usize, grow: &Grow, replies: &Replies) -> Result<()> {
        let device = self.device.clone();
        let slots = Slots { stash: grow.group, gradient: 0 };
        let one = grow.tokens.len() == self.batch;
        let [before, after] = self.hops(Action::new(at, Kind::F, grow.group));
        let what = What::Action(Action::new(at, Kind::F, grow.group));
        let mut recording = Recording::new(&device, what);
        let tokens = self.own_tokens(&grow.tokens);
        let (program, parameters) = self.growing(at, one)?;
        for (fed, id) in program.stage().graph.fed() {
            let values = match fed {
                Fed::Tokens => &tokens[..],
                Fed::Positions => &grow.positions,
                Fed::Last => &grow.last,
                // The one comes over a link, the other stays.
                Fed::Input | Fed::Cache(..) => continue,
                Fed::TokenSegments
                | Fed::TokenOrder
                | Fed::Targets
                | Fed::Starts
                | Fed::Places
                | Fed::PlaceSegments
                | Fed::PlaceOrder
                | Fed::OutputGradient
                | Fed::Argument(_) => return Err(unknown(fed)),
            };
            let range = program.range(parameters, id, slots)?;
            if range.bytes != 4 * values.len() as u64 {
                return Err(wrong_size(&fed.to_string(), values.len(), range.bytes as usize / 4));
            }
            device.upload(&range.buffer, range.offset, bytemuck::cast_slice(values));
        }
        let (input, output) = (program.stage().input, program.stage().output);
        let (sums, launches) = (program.collectives(Phase::Forward), program.launches(Phase::Forward).len());
        let range = |id| program.range(parameters, id, slots);
        let (input, output) = (input.map(range).transpose()?, output.map(range).transpose()?);
        let ends = self.stages.get_mut(&at).map(|stage| &mut stage.ends);
        if let (Some(incoming), Some(to)) = (ends.and_then(|ends| ends.forward_in.get_mut(&before)), input) {
            self.log.state(State::Waiting(What::Action(Action::new(at, Kind::RecvF, grow.group))));
            let (recorded, _) = incoming.record(&mut recording.recorder, &[(to, 0)], grow.number).await?;
            recording.copies.push(recorded);
        }
        self.log.state(State::Working(what));
        let mut from = 0;
        // Nothing of one token is there to run meanwhile.
        for (of, to) in sums.iter().map(|of| (Some(of), of.begun)).chain([(None, launches)]) {
            let (program, parameters) = self.growing(at, one)?;
            program.record(&mut recording.recorder, parameters, Phase::Forward, from..to, slots)?;
            if let Some(of) = of {
                let range = |id| program.range(parameters, id, slots);
                let (gives, gets) = (range(of.from)?, range(of.to)?);
                self.begin_collective(&mut recording, of, gives, &gets).await?;
                self.end_collective(&mut recording, of, gets).await?;
            }
            from = to;
        }
        let Some(stage) = self.stages.get_mut(&at) else { return Err(not_growing()) };
        if let (Some(outgoing), Some(from)) = (stage.ends.forward_out.get_mut(&after), &output) {
            let pieces = [(from.clone(), 0)];
            recording.copies.push(outgoing.record(&mut recording.recorder, &pieces, grow.number).await?);
        }
        let mut logits = None;
        let readback = self.decoder.as_mut().and_then(|decoder| decoder.logits.as_mut());
        if let (true, Some(readback), Some(from)) = (stage.ends.forward_out.is_empty(), readback, &output) {
            logits = Some(readback.record(&mut recording.recorder, from, grow.group).await?);
        }
        self.submit_last(recording).await;
        if let Some(logits) = logits {
            logits.submitted(self.index, replies.clone());
        }
        device.check("decoding")
    }

    /// The program of a stage for one token at a time or for more, and the weights that it reads.
    fn growing(&mut self, at: usize, one: bool) -> Result<(&mut StageProgram, &Parameters)> {
        let (Some(stage), Some(decoder)) = (self.stages.get_mut(&at), &mut self.decoder) else {
            return Err(not_growing());
        };
        let program = match decoder.singles.get_mut(&at) {
            Some(single) if one => single,
            _ => &mut stage.program,
        };
        Ok((program, &self.parameters))
    }
}

fn not_growing() -> Error {
    Error::Shape { op: "decode", message: "the plan is not for growing texts".into() }
}

/// Buffers through which logits come to the host; each goes back here once it has been read.
struct Readback {
    free: mpsc::UnboundedReceiver<Buffer>,
    back: mpsc::UnboundedSender<Buffer>,
}

/// Logits (B,V) of a group on their way to the host, or there.
pub(super) struct Logits {
    group: usize,
    range: Range,
    back: mpsc::UnboundedSender<Buffer>,
}

impl Readback {
    /// Allocates `count` buffers.
    fn new(device: &Device, count: usize, bytes: u64) -> Result<Readback> {
        let (back, free) = mpsc::unbounded();
        for _ in 0..count {
            // The receiver is held here, so sending cannot fail.
            let _ = back.unbounded_send(device.staging("logits", bytes, Mapping::Read)?);
        }
        Ok(Readback { free, back })
    }

    async fn record(&mut self, recorder: &mut Recorder<'_>, from: &Range, group: usize) -> Result<Logits> {
        // This end holds a sender too, so the stream has no end.
        let Some(buffer) = self.free.next().await else { return Err(wrong_size("buffers", 0, 1)) };
        recorder.copy(&from.buffer, from.offset, &buffer, 0, from.bytes);
        Ok(Logits { group, range: buffer.range(0, from.bytes), back: self.back.clone() })
    }
}

impl Logits {
    /// Answers them as soon as the submission that copies them has finished.
    fn submitted(self, rank: usize, replies: Replies) {
        self.range.buffer.clone().map(Mapping::Read, move || {
            // An executor that is gone needs no logits.
            let _ = replies.unbounded_send((rank, Ok(Reply::Logits(self))));
        });
    }

    /// The group and its logits; the buffer goes back.
    fn take(self) -> Result<(usize, Vec<f32>)> {
        let values = self.range.read_mapped()?;
        self.range.buffer.unmap();
        // A rank that is gone has failed and will say so.
        let _ = self.back.unbounded_send(self.range.buffer);
        Ok((self.group, bytemuck::pod_collect_to_vec(&values)))
    }
}

fn unknown(fed: Fed) -> Error {
    Error::Shape { op: "decode", message: format!("a stage wants {fed}, which growing texts do not have") }
}

fn wrong_size(name: &str, got: usize, want: usize) -> Error {
    Error::Shape { op: "decode", message: format!("{got} {name}, the program takes {want}") }
}
