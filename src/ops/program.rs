//! A stage compiled for one device: buffers, pipelines and bind groups behind its three programs.

use std::collections::HashMap;
use std::sync::Arc;

use super::Operand;
use super::parameters::Parameters;
use super::plan::{ALIGNMENT, MemoryPlan, Place, program};
use crate::error::{Error, Result};
use crate::gpu::{Buffer, Device, Kernel, Range, Recorder};
use crate::graph::{Op, Phase, StageGraph, ValueId};

/// Which copy of the stash and of the gradient slot a program works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Slots {
    /// Stash slot.
    pub stash: usize,
    /// Gradient slot.
    pub gradient: usize,
}

struct Step {
    node: usize,
    launch: usize,
    kernel: Arc<Kernel>,
    uniform: u64,
}

/// What the members of a gang do together, between the launches of a program: one is over before the next begins.
pub struct Collective {
    /// Which of those ops ([`Op::is_collective`]).
    pub op: Op,
    /// The last extent of what a member gets, and gives.
    pub columns: usize,
    /// What a member gives.
    pub from: ValueId,
    /// What it gets.
    pub to: ValueId,
    /// After how many launches what it gives is there.
    pub begun: usize,
    /// After how many launches what it gets is needed.
    pub ready: usize,
}

/// The three programs of a stage on one device.
pub struct StageProgram {
    device: Device,
    stage: StageGraph,
    plan: MemoryPlan,
    steps: [Vec<Step>; 3],
    uniforms: Buffer,
    stash: Vec<Vec<Buffer>>,
    slots: Vec<Vec<Buffer>>,
    scratch: Vec<Buffer>,
    constants: Vec<Buffer>,
    caches: Vec<Vec<Buffer>>,
    unread: Buffer,
    unwritten: Buffer,
    groups: HashMap<(Phase, Slots), Vec<crate::gpu::BindGroup>>,
}

/// Bytes of the two dummy buffers that stand for unused bindings.
pub const DUMMY_BYTES: u64 = 32;

impl StageProgram {
    /// Allocates and compiles. `stash` and `gradient` are the numbers of slots that the schedule needs.
    pub fn new(
        device: &Device,
        stage: StageGraph,
        plan: MemoryPlan,
        stash: usize,
        gradient: usize,
    ) -> Result<StageProgram> {
        let slot = || plan.caches.iter().map(|&bytes| device.buffer("cache", bytes)).collect();
        let caches = (0..stash).map(|_| slot()).collect::<Result<_>>()?;
        StageProgram::with_caches(device, stage, plan, gradient, caches)
    }

    /// As [`StageProgram::new`] on caches that are there already, one list a stash slot: those of another program of the
    /// same layers, such as one for more tokens at a time.
    pub fn with_caches(
        device: &Device,
        stage: StageGraph,
        plan: MemoryPlan,
        gradient: usize,
        caches: Vec<Vec<Buffer>>,
    ) -> Result<StageProgram> {
        let stash = caches.len();
        let mut uniform = Vec::new();
        let mut steps = [const { Vec::new() }; 3];
        for (node, n) in stage.graph.nodes.iter().enumerate() {
            for (launch, l) in plan.lowered[node].launches.iter().enumerate() {
                let offset = uniform.len() as u64;
                uniform.extend_from_slice(bytemuck::cast_slice(&l.parameters));
                uniform.resize((offset + ALIGNMENT) as usize, 0);
                let kernel = device.kernel(&l.key)?;
                steps[program(n.phase)].push(Step { node, launch, kernel, uniform: offset });
            }
        }
        let buffers = |label: &str, sizes: &[u64]| {
            sizes.iter().map(|&bytes| device.buffer(label, bytes)).collect::<Result<Vec<_>>>()
        };
        let constants = buffers("constant", &plan.constants)?;
        for (value, place) in stage.graph.values.iter().zip(&plan.place) {
            if let (Some(elements), Some(Place::Constant(i))) = (&value.constant, place) {
                device.upload(&constants[*i], 0, bytemuck::cast_slice(elements));
            }
        }
        Ok(StageProgram {
            constants,
            caches,
            uniforms: device.uniform("kernel parameters", &uniform)?,
            stash: (0..stash).map(|_| buffers("stash", &plan.stash)).collect::<Result<_>>()?,
            slots: (0..gradient).map(|_| buffers("gradient slot", &plan.slot)).collect::<Result<_>>()?,
            scratch: buffers("scratch", &plan.scratch)?,
            unread: device.buffer("unread", 16)?,
            unwritten: device.buffer("unwritten", 16)?,
            groups: HashMap::new(),
            device: device.clone(),
            stage,
            plan,
            steps,
        })
    }

    /// Sets the loss scale, a power of 2: what gradients are taken times while they are in f16.
    pub fn scale(&self, scale: f32) {
        for step in self.steps.iter().flatten() {
            let launch = &self.plan.lowered[step.node].launches[step.launch];
            if launch.scaled {
                let at = step.uniform + 4 * (launch.parameters.len() as u64 - 2);
                self.device.upload(&self.uniforms, at, bytemuck::cast_slice(&[scale, scale.recip()]));
            }
        }
    }

    /// The caches, slot by slot and block by block.
    pub fn caches(&self) -> &[Vec<Buffer>] {
        &self.caches
    }

    /// The graph it was compiled from.
    pub fn stage(&self) -> &StageGraph {
        &self.stage
    }

    /// Kernel and floating-point operations of each launch of a program, for splitting it into submissions.
    pub fn launches(&self, phase: Phase) -> Vec<(&'static str, f64)> {
        let launch = |s: &Step| &self.plan.lowered[s.node].launches[s.launch];
        self.steps[program(phase)].iter().map(launch).map(|launch| (launch.key.name, launch.flops)).collect()
    }

    /// What the members of a gang do together in a program, in order.
    pub fn collectives(&self, phase: Phase) -> Vec<Collective> {
        let (mut all, mut launches) = (Vec::<Collective>::new(), 0);
        for (node, lowered) in self.stage.graph.nodes.iter().zip(&self.plan.lowered) {
            if node.phase != phase {
                continue;
            }
            // Those before the last are over.
            if let Some(of) = all.last_mut().filter(|of| of.ready == usize::MAX)
                && (node.op.is_collective() || node.inputs.contains(&of.to))
            {
                of.ready = launches;
            }
            if node.op.is_collective() {
                let (op, from, to) = (node.op.clone(), node.inputs[0], node.outputs[0]);
                let columns = self.stage.graph.value(to).columns();
                all.push(Collective { op, columns, from, to, begun: launches, ready: usize::MAX });
            }
            launches += lowered.launches.len();
        }
        all.last_mut().into_iter().for_each(|of| of.ready = of.ready.min(launches));
        all
    }

    /// The gradients of parameters that a program makes: each parameter, and from which of the program's launches to before
    /// which it is added to.
    pub fn gradients(&self, phase: Phase) -> Vec<(ValueId, std::ops::Range<usize>)> {
        let mut made: Vec<(ValueId, std::ops::Range<usize>)> = Vec::new();
        for (at, step) in self.steps[program(phase)].iter().enumerate() {
            let node = &self.stage.graph.nodes[step.node];
            let makes = |of: &&(ValueId, ValueId)| {
                let whole = |id: ValueId| self.plan.whole[id.0].0;
                node.outputs.iter().any(|&output| whole(output) == whole(of.1))
            };
            for &(parameter, _) in self.stage.gradients.iter().filter(makes) {
                match made.iter_mut().find(|of| of.0 == parameter) {
                    Some((_, launches)) => launches.end = at + 1,
                    None => made.push((parameter, at..at + 1)),
                }
            }
        }
        made
    }

    /// For each parameter, after how many launches of programs that run one after another nothing adds to its gradient any
    /// more.
    pub fn completed(&self, phases: &[Phase]) -> HashMap<&str, usize> {
        let (mut after, mut before) = (HashMap::new(), 0);
        for &phase in phases {
            let made = self.gradients(phase).into_iter();
            after.extend(
                made.map(|(of, launches)| (self.stage.graph.value(of).name.as_str(), before + launches.end)),
            );
            before += self.steps[program(phase)].len();
        }
        after
    }

    /// Where the gradient of a parameter is made; none where nothing makes it.
    pub fn gradient_range(&self, parameters: &Parameters, parameter: ValueId) -> Result<Option<Range>> {
        let made = self.stage.gradients.iter().find(|of| of.0 == parameter);
        let none = Slots { stash: 0, gradient: 0 };
        made.map(|&(_, gradient)| self.range(parameters, gradient, none)).transpose()
    }

    /// The weights that pass the device for a program, each with the first of its launches that reads it.
    pub fn passing(&self, phase: Phase) -> Vec<(ValueId, usize)> {
        let mut all: Vec<(ValueId, usize)> = Vec::new();
        for (at, step) in self.steps[program(phase)].iter().enumerate() {
            for &input in &self.stage.graph.nodes[step.node].inputs {
                let input = self.plan.whole[input.0].0;
                let passes = self.plan.passing[program(phase)].contains_key(&input);
                if passes && !all.iter().any(|of| of.0 == input) {
                    all.push((input, at));
                }
            }
        }
        all
    }

    /// Where a weight that passes lies for a program.
    pub fn passing_range(&self, phase: Phase, weight: ValueId) -> Option<Range> {
        let buffer = self.plan.passing[program(phase)].get(&weight)?;
        Some(self.scratch[*buffer].range(0, self.stage.graph.value(weight).bytes()))
    }

    /// Where a value lies for these slots.
    pub fn range(&self, parameters: &Parameters, id: ValueId, slots: Slots) -> Result<Range> {
        let value = self.stage.graph.value(id);
        let (whole, offset) = self.plan.whole[id.0];
        let part = |of: Range| Range { offset: of.offset + offset, bytes: value.bytes(), buffer: of.buffer };
        let buffer = match self.plan.place[id.0] {
            Some(Place::Weight) => {
                return parameters.weight(&self.stage.graph.value(whole).name).map(part);
            }
            Some(Place::Gradient(of)) => {
                return parameters.gradient(&self.stage.graph.value(of).name).map(part);
            }
            Some(Place::Stash(i)) => &self.stash[slots.stash][i],
            Some(Place::Slot(i)) => &self.slots[slots.gradient][i],
            Some(Place::Constant(i)) => &self.constants[i],
            Some(Place::Cache(i)) => &self.caches[slots.stash][i],
            Some(Place::Scratch(i)) => &self.scratch[i],
            None => {
                let message = format!("{} has no home in memory", value.name);
                return Err(Error::Shape { op: "program", message });
            }
        };
        Ok(buffer.range(offset, value.bytes()))
    }

    /// Records launches `which` of a program.
    pub fn record(
        &mut self,
        recorder: &mut Recorder,
        parameters: &Parameters,
        phase: Phase,
        which: std::ops::Range<usize>,
        slots: Slots,
    ) -> Result<()> {
        if !self.groups.contains_key(&(phase, slots)) {
            let steps = &self.steps[program(phase)];
            let groups =
                steps.iter().map(|s| self.bind(parameters, phase, s, slots)).collect::<Result<_>>()?;
            self.groups.insert((phase, slots), groups);
        }
        let groups = &self.groups[&(phase, slots)];
        let steps = &self.steps[program(phase)];
        for (step, group) in steps[which.clone()].iter().zip(&groups[which]) {
            let launch = &self.plan.lowered[step.node].launches[step.launch];
            recorder.dispatch(&step.kernel, group, launch.groups);
        }
        Ok(())
    }

    fn bind(
        &self,
        parameters: &Parameters,
        phase: Phase,
        step: &Step,
        slots: Slots,
    ) -> Result<crate::gpu::BindGroup> {
        let launch = &self.plan.lowered[step.node].launches[step.launch];
        let mut ranges = vec![self.uniforms.range(step.uniform, 4 * launch.parameters.len() as u64)];
        for &operand in &launch.operands {
            ranges.push(match operand {
                Operand::Value(id) => {
                    let (whole, offset) = self.plan.whole[id.0];
                    match self.passing_range(phase, whole) {
                        Some(of) => of.buffer.range(of.offset + offset, self.stage.graph.value(id).bytes()),
                        None => self.range(parameters, id, slots)?,
                    }
                }
                Operand::Scratch(i) => self.scratch[self.plan.node_scratch[step.node][i]]
                    .range(0, self.plan.lowered[step.node].scratch[i]),
                Operand::Unread => self.unread.whole(),
                Operand::Unwritten => self.unwritten.whole(),
            });
        }
        Ok(self.device.bind(&step.kernel, &ranges))
    }
}
