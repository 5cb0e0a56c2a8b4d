//! From a plan to ranks at work: everything allocated, compiled and connected.

use std::collections::HashMap;
use std::sync::Arc;
#[cfg(not(target_arch = "wasm32"))]
use std::thread::JoinHandle;

use futures_channel::mpsc;

use super::decode::Decoder;
use super::exchange::{Exchange, connect_shard};
use super::gang;
use super::host::HostLink;
use super::link::{Incoming, Outgoing, connect, connect_local};
use super::log::Log;
use super::plan::Plan;
use super::rank::{Command, Ends, Rank, Replies, Stage};
use super::store::{Inbox, Store};
use crate::error::{Error, Result};
use crate::gpu::{Device, Mapping};
use crate::ops::parameters::Parameters;
use crate::ops::program::StageProgram;
use crate::schedule::{Kind, Replica};

/// The links of the hops, and in which direction they go.
struct Hop {
    number: usize,
    kind: Kind,
    /// The stage and device that send, and those that receive.
    from: Replica,
    to: Replica,
    out: Outgoing,
    inward: Incoming,
}

fn links(plan: &Plan, devices: &[Device]) -> Result<Vec<Hop>> {
    let mut links = Vec::new();
    for (number, &(before, after)) in plan.placement.hops().iter().enumerate() {
        let slots = plan.link_slots(number);
        let [before, after] = [before, after].map(|replica| plan.placement.replicas()[replica]);
        let directions = [(Kind::F, before, after), (Kind::B, after, before)];
        for (kind, from, to) in directions.into_iter().take(plan.directions(before.stage) as usize) {
            // Each member of a gang has what it needs from its like.
            for (sender, receiver) in plan.devices(from.rank).zip(plan.devices(to.rank)) {
                let bytes = plan.activation_bytes(sender);
                let (out, inward) = match plan.placement.is_link(number) {
                    true => connect(&devices[sender], &devices[receiver], bytes, slots, plan.wire(number))?,
                    false => connect_local(&devices[sender], bytes, slots)?,
                };
                // A text's next token is ordered when it is wanted.
                let inward = if plan.setup.purpose.trains() { inward.ahead()? } else { inward };
                let [from, to] = [(from, sender), (to, receiver)].map(|(of, rank)| Replica { rank, ..of });
                links.push(Hop { number, kind, from, to, out, inward });
            }
        }
    }
    Ok(links)
}

/// Allocates and compiles what the plan says, one device after another.
pub(super) fn build(
    mut plan: Plan,
    devices: &[Device],
    logs: &[Arc<Log>],
    store: Option<(Arc<Store>, Vec<Inbox>)>,
) -> Result<Vec<Rank>> {
    let training = plan.setup.purpose.trains();
    let through_host = store.is_some();
    let mut hosts: Vec<Option<HostLink>> = devices.iter().map(|_| None).collect();
    if let Some((store, inboxes)) = store {
        for (rank, inbox) in inboxes.into_iter().enumerate() {
            let log = logs[rank].clone();
            hosts[rank] = Some(HostLink::new(&devices[rank], &plan, rank, store.clone(), inbox, log)?);
        }
    }
    let links = links(&plan, devices)?;
    let mut gangs = gang::connect(&plan, devices)?;
    let scores = plan.setup.purpose.scores();
    let loss_bytes = plan.loss_bytes();
    let placement = Arc::new(plan.placement.clone());
    let mut ranks = Vec::new();
    for part in std::mem::take(&mut plan.ranks) {
        let (index, device) = (part.rank, &devices[part.rank]);
        let owned = part.layout.owned_chunks() as u64;
        let has = |name: &str| part.layout.parameters().iter().any(|p| p.tied_to.as_deref() == Some(name));
        let completed = |stage: &usize| plan.parts(*stage, index).iter().any(|p| has(&p.name));
        let folds = part.stages.iter().map(|stage| stage.stage).filter(completed).collect();
        let parameters = Parameters::new(device, part.layout, training)?;
        let mut stages = HashMap::new();
        for stage in part.stages {
            let at = stage.stage;
            let (stash, gradient) = (stage.stash, stage.gradient);
            let program = StageProgram::new(device, stage.graph, stage.memory, stash.count, gradient.count)?;
            stages.insert(at, Stage { program, stash, gradient, ends: Ends::default() });
        }
        let losses = (scores && plan.reports(index))
            .then(|| {
                let buffer = device.buffer("losses", loss_bytes)?;
                Ok::<_, Error>((buffer, device.staging("losses", loss_bytes, Mapping::Read)?))
            })
            .transpose()?;
        let decoder = part.decoding.map(|plan| Decoder::new(device, plan, &stages)).transpose()?;
        let mut actions = plan.schedule.ranks[plan.gang(index)].clone();
        actions.retain(|action| !action.kind.is_transfer() && (training || action.kind == Kind::F));
        let exchange = Exchange::new(folds, &actions, through_host);
        let sums = device.staging("sums", if training { 4 * owned } else { 0 }, Mapping::Read)?;
        ranks.push(Rank {
            index,
            device: device.clone(),
            parameters,
            stages,
            actions,
            placement: placement.clone(),
            exchange,
            host: hosts[index].take(),
            folded: false,
            batch: plan.setup.batch,
            sequence: plan.setup.sequence,
            vocabulary: plan.vocabulary(index),
            list: plan.gang(index),
            gang: gangs[index].take(),
            context: plan.setup.model.context,
            losses,
            decoder,
            sums,
            log: logs[index].clone(),
            steps: 0,
            slow: 1.0,
            scale: 1.0,
        });
    }
    for Hop { number, kind, from, to, out, inward } in links {
        let forward = kind == Kind::F;
        if let Some(Stage { ends, .. }) = ranks[from.rank].stages.get_mut(&from.stage) {
            if forward { &mut ends.forward_out } else { &mut ends.backward_out }.insert(number, out);
        }
        if let Some(Stage { ends, .. }) = ranks[to.rank].stages.get_mut(&to.stage) {
            if forward { &mut ends.forward_in } else { &mut ends.backward_in }.insert(number, inward);
        }
    }
    for shard in &plan.shards {
        connect_shard(&mut ranks, shard)?;
    }
    Ok(ranks)
}

#[cfg(not(target_arch = "wasm32"))]
fn thread(name: &str, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    let thread = std::thread::Builder::new().name(name.into()).spawn(run);
    thread.map_err(|e| Error::failed(name, format!("there is no thread for it: {e}")))
}

/// Gives what waits for no device a thread.
#[cfg(not(target_arch = "wasm32"))]
pub(super) fn alone(name: &str, future: impl Future<Output = ()> + Send + 'static) -> Result<JoinHandle<()>> {
    thread(name, move || pollster::block_on(future))
}

/// The threads of the ranks; in a browser, where there is one thread, there are none.
#[derive(Default)]
pub(super) struct Threads {
    #[cfg(not(target_arch = "wasm32"))]
    started: Vec<JoinHandle<()>>,
}

impl Threads {
    /// For how many seconds ranks may do nothing until they have noticed that nobody wants anything of them.
    #[cfg(not(target_arch = "wasm32"))]
    const PATIENCE: f64 = 3.0;

    /// Gives a rank a thread; in a browser, a task of the page's one thread.
    pub(super) fn start(
        &mut self,
        rank: Rank,
        inbox: mpsc::UnboundedReceiver<Command>,
        reply: Replies,
    ) -> Result<()> {
        #[cfg(target_arch = "wasm32")]
        wasm_bindgen_futures::spawn_local(rank.serve(inbox, reply));
        #[cfg(not(target_arch = "wasm32"))]
        {
            let device = rank.device.clone();
            let name = format!("rank {}", rank.index);
            self.started.push(thread(&name, move || device.block_on(rank.serve(inbox, reply)))?);
        }
        Ok(())
    }

    /// Waits for those that come to their end in time, given for how many seconds each has done nothing.
    #[cfg(not(target_arch = "wasm32"))]
    pub(super) fn join(&mut self, idle: impl Fn(usize) -> f64) {
        for (rank, thread) in self.started.drain(..).enumerate() {
            while !thread.is_finished() && idle(rank) < Self::PATIENCE {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            // Why a thread died has been told by the rank itself.
            let _ = thread.is_finished().then(|| thread.join());
        }
    }

    #[cfg(target_arch = "wasm32")]
    pub(super) fn join(&mut self, _: impl Fn(usize) -> f64) {}
}
