//! From a plan to ranks at work: everything allocated, compiled and connected.

use std::collections::HashMap;
use std::sync::Arc;

use futures_channel::mpsc;

use super::decode::Decoder;
use super::link::{Incoming, Outgoing, connect, connect_local};
use super::log::Log;
use super::plan::Plan;
use super::rank::{Command, Rank, Replies, Stage};
use super::tied::tie;
use crate::error::{Error, Result};
use crate::gpu::{Device, Mapping};
use crate::ops::parameters::Parameters;
use crate::ops::program::StageProgram;
use crate::schedule::Kind;

/// Two ends for each direction of each boundary.
type Ends = HashMap<(Kind, usize), (Option<Outgoing>, Option<Incoming>)>;

fn links(plan: &Plan, devices: &[Device]) -> Result<Ends> {
    let mut ends: Ends = HashMap::new();
    for boundary in 0..plan.stages.len() - 1 {
        let (bytes, slots) = (plan.activation_bytes(), plan.link_slots(boundary));
        let (before, after) = (&devices[plan.rank_of(boundary)], &devices[plan.rank_of(boundary + 1)]);
        let directions = [(Kind::F, before, after), (Kind::B, after, before)];
        for (kind, from, to) in directions.into_iter().take(plan.directions(boundary) as usize) {
            let (out, inward) = match plan.crosses(boundary) {
                true => connect(from, to, bytes, slots)?,
                false => connect_local(from, bytes, slots)?,
            };
            ends.insert((kind, boundary), (Some(out), Some(inward)));
        }
    }
    Ok(ends)
}

/// Allocates and compiles what the plan says, one device after another.
pub(super) fn build(plan: Plan, devices: &[Device], logs: &[Arc<Log>]) -> Result<Vec<Rank>> {
    let training = plan.setup.purpose.trains();
    let mut ends = links(&plan, devices)?;
    let scores = plan.setup.purpose.scores();
    let ties = plan.exchanged();
    let (loss_bytes, last) = (plan.loss_bytes(), plan.rank_of(plan.stages.len() - 1));
    let mut ranks = Vec::new();
    for part in plan.ranks {
        let (index, device) = (part.rank, &devices[part.rank]);
        let owned = part.layout.owned_chunks() as u64;
        let parameters = Parameters::new(device, part.layout, training)?;
        let mut stages = HashMap::new();
        for stage in part.stages {
            let at = stage.stage;
            let (stash, gradient) = (stage.stash, stage.gradient);
            let program = StageProgram::new(device, stage.graph, stage.memory, stash.count, gradient.count)?;
            let mut out = |kind, boundary| ends.get_mut(&(kind, boundary)).and_then(|e| e.0.take());
            let (forward_out, backward_out) =
                (out(Kind::F, at), at.checked_sub(1).and_then(|b| out(Kind::B, b)));
            let mut inward = |kind, boundary| ends.get_mut(&(kind, boundary)).and_then(|e| e.1.take());
            let (forward_in, backward_in) =
                (at.checked_sub(1).and_then(|b| inward(Kind::F, b)), inward(Kind::B, at));
            stages.insert(
                at,
                Stage { program, stash, gradient, forward_in, forward_out, backward_in, backward_out },
            );
        }
        let losses = (scores && index == last)
            .then(|| {
                let buffer = device.buffer("losses", loss_bytes)?;
                Ok::<_, Error>((buffer, device.staging("losses", loss_bytes, Mapping::Read)?))
            })
            .transpose()?;
        let decoder = part.decoding.map(|plan| Decoder::new(device, plan, &stages)).transpose()?;
        let mut actions = plan.schedule.ranks[index].clone();
        actions.retain(|action| !action.kind.is_transfer() && (training || action.kind == Kind::F));
        let sums = device.staging("sums", if training { 4 * owned } else { 0 }, Mapping::Read)?;
        ranks.push(Rank {
            index,
            device: device.clone(),
            parameters,
            stages,
            actions,
            tied: Vec::new(),
            batch: plan.setup.batch,
            sequence: plan.setup.sequence,
            vocabulary: plan.setup.model.vocabulary,
            context: plan.setup.model.context,
            losses,
            decoder,
            sums,
            log: logs[index].clone(),
            steps: 0,
        });
    }
    for parameter in ties {
        tie(&mut ranks, parameter)?;
    }
    Ok(ranks)
}

/// Gives a rank a thread; in a browser, a task of the page's one thread.
#[cfg(not(target_arch = "wasm32"))]
pub(super) fn start(rank: Rank, inbox: mpsc::UnboundedReceiver<Command>, reply: Replies) -> Result<()> {
    let device = rank.device.clone();
    let thread = std::thread::Builder::new().name(format!("rank {}", rank.index));
    // Not joined: a driver that never returns must not keep the process from reporting it.
    let name = format!("rank {} ({})", rank.index, device.info().name);
    let spawned = thread.spawn(move || device.block_on(rank.serve(inbox, reply)));
    spawned.map(drop).map_err(|e| Error::failed(name, format!("there is no thread for it: {e}")))
}

#[cfg(target_arch = "wasm32")]
pub(super) fn start(rank: Rank, inbox: mpsc::UnboundedReceiver<Command>, reply: Replies) -> Result<()> {
    wasm_bindgen_futures::spawn_local(rank.serve(inbox, reply));
    Ok(())
}
