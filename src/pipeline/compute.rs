//! One action on a device: what it needs arrives, its launches are recorded and handed over in parts, what it makes leaves.

use std::borrow::Cow;
use std::cell::LazyCell;
use std::collections::HashSet;

use super::batch::Batch;
use super::link::{Combine, Incoming, Recorded};
use super::log::State;
use super::pace::Work;
use super::rank::{Rank, Stage};
use crate::error::{Error, Result};
use crate::gpu::{Device, Range, Recorder, now};
use crate::graph::{Fed, Phase, ValueId};
use crate::ops::program::{Collective, Slots};
use crate::ops::sort_rows;
use crate::schedule::{Action, Kind, SlotPlan};
use crate::timeline::What;

/// Submissions a rank hands to its device before the first has finished: a GPU starts the next without waiting for the
/// host. Lavapipe runs one at a time and makes the host wait inside the second call, deaf to its neighbours.
const DEPTH: usize = 2;
const SOFTWARE_DEPTH: usize = 1;
/// Seconds of device time a submission should stay under: desktops stutter and drivers reset when it is long.
const SUBMISSION_SECONDS: f64 = 0.1;

/// Submissions in which the backward pass goes that completes gradients which others wait for.
const PARTS: f64 = 16.0;

/// A submission in the making.
pub(super) struct Recording<'d> {
    device: &'d Device,
    pub(super) recorder: Recorder<'d>,
    /// Copies in it that something follows.
    pub(super) copies: Vec<Recorded>,
    pub(super) what: What,
    /// What its kernels have to do, and the seconds that they are expected to take.
    work: Work,
    used: f64,
    /// Since when it has been recorded.
    started: f64,
}

impl<'d> Recording<'d> {
    pub(super) fn new(device: &'d Device, what: What) -> Recording<'d> {
        Recording {
            device,
            recorder: device.record(),
            copies: Vec::new(),
            what,
            work: Work::default(),
            used: 0.0,
            started: now(),
        }
    }

    /// Whether anything is in it.
    pub(super) fn is_open(&self) -> bool {
        self.work != Work::default()
    }

    /// As what the host's copies for it are logged: of weights that come, and of gradients that leave.
    pub(super) fn received(&self) -> What {
        self.part(Kind::G)
    }

    pub(super) fn sent(&self) -> What {
        self.part(Kind::R)
    }

    fn part(&self, kind: Kind) -> What {
        match self.what {
            What::Action(of) if !of.kind.is_whole() => What::Action(Action::of_stage(of.stage, kind)),
            what => what,
        }
    }
}

/// Where a program's launches stop for what comes from the host or goes there.
#[derive(Default)]
pub(super) struct Stops {
    at: HashSet<usize>,
    /// What the gang does together.
    collectives: Vec<Collective>,
    /// The weights that come, each with the launch that is the first to read it.
    pub(super) weights: Vec<(ValueId, usize)>,
    /// The gradients that leave: by parameter, and from which launch to before which each is made.
    pub(super) gradients: Vec<(ValueId, std::ops::Range<usize>)>,
}

impl Rank {
    /// Hands over a submission that the host has been recording since `started`, once the device has room for it.
    pub(super) async fn submit(&self, recorder: Recorder<'_>, what: What, work: Work, started: f64) {
        self.log.host(what, started);
        let depth = if self.device.capabilities().software { SOFTWARE_DEPTH } else { DEPTH };
        self.device.below(depth).await;
        let handed = now();
        self.log.submitted(what, work);
        let log = self.log.clone();
        recorder.submit(move || log.finished());
        self.log.host(what, handed);
    }

    /// Floating-point operations of a step's actions, as the log counts them.
    pub(super) fn step_flops(&self) -> f64 {
        let launches = self.actions.iter().flat_map(|&action| self.launches_of(action));
        launches.map(|(_, flops)| flops).sum()
    }

    fn launches_of(&self, action: Action) -> Vec<(&'static str, f64)> {
        let stage = self.stages.get(&action.stage);
        let launches = |stage: &Stage| {
            phases(action.kind).iter().flat_map(|&phase| stage.program.launches(phase)).collect()
        };
        stage.map_or(Vec::new(), launches)
    }

    /// Hands over what has been recorded of something, and goes on recording it.
    pub(super) async fn submit_part(&self, recording: &mut Recording<'_>) {
        let recorder = std::mem::replace(&mut recording.recorder, recording.device.record());
        let work = std::mem::take(&mut recording.work);
        self.submit(recorder, recording.what, work, recording.started).await;
        recording.copies.drain(..).for_each(Recorded::submitted);
        (recording.used, recording.started) = (0.0, now());
        self.log.state(State::Working(recording.what));
    }

    /// Hands over the last of it.
    pub(super) async fn submit_last(&self, recording: Recording<'_>) {
        let Recording { recorder, copies, what, work, started, .. } = recording;
        self.submit(recorder, what, work, started).await;
        copies.into_iter().for_each(Recorded::submitted);
    }

    /// Runs one action: receive, record, submit in parts, send. A send belongs to the action that makes the data, a
    /// receive to the one that needs it; the schedule's own transfers are there so that its proof can see them.
    pub(super) async fn compute(&mut self, action: Action, batch: &Batch) -> Result<()> {
        let device = self.device.clone();
        let mut recording = Recording::new(&device, What::Action(action));
        let received = self.receive(action, &mut recording.recorder).await?;
        recording.copies.extend(received);
        let begun = now();
        recording.started = begun;
        self.log.state(State::Working(recording.what));
        if action.kind == Kind::F {
            self.feed(action, batch)?;
        }
        let slots = self.slots(action);
        let completes = self.exchange.completes(action);
        // What others wait for leaves part by part.
        let budget = match completes {
            true => {
                let all: f64 = self.log.expect(&self.launches_of(action)).iter().sum();
                SUBMISSION_SECONDS.min(all / PARTS)
            }
            false => SUBMISSION_SECONDS,
        };
        let missing = || no_stage(action);
        // Launches of the phases before.
        let mut before = 0;
        for &phase in phases(action.kind) {
            let stops = self.stops(action, phase, completes)?;
            let launches = self.stages.get(&action.stage).ok_or_else(missing)?.program.launches(phase);
            let seconds = self.log.expect(&launches);
            let mut from = 0;
            while from < launches.len() {
                self.together(&mut recording, action, slots, &stops, from).await?;
                if recording.is_open() && recording.used + seconds[from] > budget {
                    self.host.iter_mut().for_each(|host| host.flush(&mut recording));
                    self.submit_part(&mut recording).await;
                    self.progress(completes.then_some((action.stage, before + from))).await?;
                    self.log.state(State::Working(recording.what));
                    recording.started = now();
                }
                if stops.at.contains(&from) {
                    self.before_launch(&mut recording, (action.stage, phase), &stops, from).await?;
                }
                let mut to = from;
                while to < launches.len()
                    && (to == from || !stops.at.contains(&to) && recording.used + seconds[to] <= budget)
                {
                    let (kernel, flops) = launches[to];
                    recording.work.add(kernel, flops);
                    recording.used += seconds[to];
                    to += 1;
                }
                let stage = self.stages.get_mut(&action.stage).ok_or_else(missing)?;
                stage.program.record(&mut recording.recorder, &self.parameters, phase, from..to, slots)?;
                if stops.at.contains(&to) {
                    self.after_launch(&mut recording, action, &stops, to).await?;
                }
                from = to;
            }
            self.together(&mut recording, action, slots, &stops, launches.len()).await?;
            before += launches.len();
        }
        if self.slow > 1.0 {
            self.linger(&mut recording, begun).await;
        }
        let sent = self.send(action, &mut recording.recorder, slots).await?;
        recording.copies.extend(sent);
        self.host.iter_mut().for_each(|host| host.flush(&mut recording));
        self.submit_last(recording).await;
        device.check(&format!("rank {} ran {action}", self.index))
    }

    /// Waits until what has begun then has taken as many times as long as it is to, before anything of it leaves.
    async fn linger(&self, recording: &mut Recording<'_>, begun: f64) {
        let device = recording.device;
        self.submit_part(recording).await;
        device.below(1).await;
        device.pause((self.slow - 1.0) * (now() - begun)).await;
        self.log.lingered(recording.what);
        recording.started = now();
    }

    /// Does what is to be done with the gang after so many launches: what is over then ends, what is next begins.
    async fn together(
        &mut self,
        recording: &mut Recording<'_>,
        action: Action,
        slots: Slots,
        stops: &Stops,
        launches: usize,
    ) -> Result<()> {
        for of in stops.collectives.iter().filter(|of| of.begun == launches || of.ready == launches) {
            let stage = self.stages.get(&action.stage).ok_or_else(|| no_stage(action))?;
            let range = |end| stage.program.range(&self.parameters, end, slots);
            let (from, to) = (range(of.from)?, range(of.to)?);
            if of.begun == launches {
                self.host.iter_mut().for_each(|host| host.flush(recording));
                self.begin_collective(recording, of, from, &to).await?;
            }
            if of.ready == launches {
                self.end_collective(recording, of, to).await?;
            }
        }
        Ok(())
    }

    /// Where the launches of an action's program stop.
    fn stops(&self, action: Action, phase: Phase, completes: bool) -> Result<Stops> {
        let program = &self.stages.get(&action.stage).ok_or_else(|| no_stage(action))?.program;
        let collectives = self.gang.as_ref().map(|_| program.collectives(phase)).unwrap_or_default();
        let mut stops = Stops { collectives, ..Stops::default() };
        stops.at.extend(stops.collectives.iter().flat_map(|of| [of.begun, of.ready]));
        let Some(host) = &self.host else { return Ok(stops) };
        if host.sends(completes) {
            stops.gradients = program.gradients(phase);
            stops.at.extend(stops.gradients.iter().flat_map(|(_, made)| [made.start, made.end]));
        }
        if host.streams_weights() {
            stops.weights = program.passing(phase);
            stops.at.extend(stops.weights.iter().map(|(_, first)| first));
        }
        Ok(stops)
    }

    fn slots(&self, action: Action) -> Slots {
        let pick = |plan: &SlotPlan| plan.slot.get(action.microbatch).copied().unwrap_or(0);
        let stage = self.stages.get(&action.stage);
        let stash = stage.map_or(0, |s| pick(&s.stash));
        Slots { stash, gradient: stage.map_or(0, |s| pick(&s.gradient)) }
    }

    /// The hops of an action's microbatch before and after its stage; of those that the last has not, no hop has the number.
    pub(super) fn hops(&self, action: Action) -> [usize; 2] {
        let hop = |boundary: Option<usize>| {
            let boundary = boundary.filter(|boundary| boundary + 1 < self.placement.stages());
            boundary.map_or(usize::MAX, |boundary| self.placement.hop(boundary, action.microbatch))
        };
        [hop(action.stage.checked_sub(1)), hop(Some(action.stage))]
    }

    /// What an action needs from a neighbour, if anything: the end at which it arrives, where it belongs, and as what it is known.
    fn arrival(&mut self, action: Action) -> Result<Option<(&mut Incoming, Range, What)>> {
        let (slots, [before, after]) = (self.slots(action), self.hops(action));
        let stage = self.stages.get_mut(&action.stage).ok_or_else(|| no_stage(action))?;
        let (ends, value, kind) = (&mut stage.ends, stage.program.stage(), action.kind);
        let (incoming, value, kind) = match kind {
            Kind::F => (ends.forward_in.get_mut(&before), value.input, Kind::RecvF),
            Kind::I | Kind::B => (ends.backward_in.get_mut(&after), value.d_output, Kind::RecvB),
            _ => return Ok(None),
        };
        let (Some(incoming), Some(value)) = (incoming, value) else { return Ok(None) };
        let to = stage.program.range(&self.parameters, value, slots)?;
        Ok(Some((incoming, to, What::Action(Action { kind, ..action }))))
    }

    /// Orders what these actions need from neighbours, so that it is copied as soon as it arrives.
    pub(super) fn order(&mut self, actions: impl Iterator<Item = Action>) -> Result<()> {
        for action in actions {
            if let Some((incoming, to, _)) = self.arrival(action)? {
                incoming.order(action.microbatch, to.bytes, Combine::Sum { first: 0 }, false);
            }
        }
        Ok(())
    }

    /// Waits for what the action needs from a neighbour and records its copy into place.
    async fn receive(&mut self, action: Action, recorder: &mut Recorder<'_>) -> Result<Option<Recorded>> {
        let log = self.log.clone();
        let Some((incoming, to, what)) = self.arrival(action)? else { return Ok(None) };
        log.state(State::Waiting(what));
        let (recorded, copy) = incoming.record(recorder, &[(to, 0)], action.microbatch).await?;
        log.copied(what, copy);
        Ok(Some(recorded))
    }

    /// Records the copy of what the action made for a neighbour, and of the losses.
    async fn send(
        &mut self,
        action: Action,
        recorder: &mut Recorder<'_>,
        slots: Slots,
    ) -> Result<Option<Recorded>> {
        let [before, after] = self.hops(action);
        let stage = self.stages.get_mut(&action.stage).ok_or_else(|| no_stage(action))?;
        if action.kind == Kind::F
            && let (Some(loss), Some((losses, _))) = (stage.program.stage().loss, &self.losses)
        {
            let from = stage.program.range(&self.parameters, loss, slots)?;
            let offset = from.bytes * action.microbatch as u64;
            recorder.copy(&from.buffer, from.offset, losses, offset, from.bytes);
        }
        let (outgoing, value) = match action.kind {
            Kind::F => (stage.ends.forward_out.get_mut(&after), stage.program.stage().output),
            Kind::I | Kind::B => (stage.ends.backward_out.get_mut(&before), stage.program.stage().d_input),
            _ => return Ok(None),
        };
        let (Some(outgoing), Some(value)) = (outgoing, value) else { return Ok(None) };
        let from = stage.program.range(&self.parameters, value, slots)?;
        outgoing.record(recorder, &[(from, 0)], action.microbatch).await.map(Some)
    }

    /// Tokens as rows of the table that the device has; those of others lie beyond it.
    pub(super) fn own_tokens<'t>(&self, tokens: &'t [u32]) -> Cow<'t, [u32]> {
        match self.vocabulary.start as u32 {
            0 => Cow::Borrowed(tokens),
            first => tokens.iter().map(|token| token.wrapping_sub(first)).collect(),
        }
    }

    /// Uploads what a stage is fed of its microbatch.
    fn feed(&self, action: Action, batch: &Batch) -> Result<()> {
        let stage = self.stages.get(&action.stage).ok_or_else(|| no_stage(action))?;
        let slots = self.slots(action);
        let rows = self.batch * self.sequence;
        let rows = action.microbatch * rows..(action.microbatch + 1) * rows;
        let begun = |at: usize| batch.starts.get(rows.start + at).copied().unwrap_or(0);
        let starts = LazyCell::new(|| (0..rows.len()).map(begun).collect::<Vec<u32>>());
        let place = |at: usize| (at % self.sequence) as u32 - begun(at);
        let places = LazyCell::new(|| (0..rows.len()).map(place).collect::<Vec<u32>>());
        let tokens = LazyCell::new(|| self.own_tokens(&batch.inputs[rows.clone()]));
        let by_token = LazyCell::new(|| sort_rows(&tokens, self.vocabulary.len()));
        let by_place = LazyCell::new(|| sort_rows(&places, self.context));
        for (fed, id) in stage.program.stage().graph.fed() {
            let values: &[u32] = match fed {
                Fed::Tokens => &tokens,
                Fed::TokenSegments => &by_token.0,
                Fed::TokenOrder => &by_token.1,
                Fed::Targets => &batch.targets[rows.clone()],
                Fed::Starts => &starts,
                Fed::Places => &places,
                Fed::PlaceSegments => &by_place.0,
                Fed::PlaceOrder => &by_place.1,
                // They come over a link.
                Fed::Input | Fed::OutputGradient => continue,
                Fed::Positions | Fed::Last | Fed::Cache(..) | Fed::Argument(_) => {
                    let message = format!("{action} wants {fed}, which no batch has");
                    return Err(Error::Shape { op: "executor", message });
                }
            };
            let range = stage.program.range(&self.parameters, id, slots)?;
            self.device.upload(&range.buffer, range.offset, bytemuck::cast_slice(values));
        }
        Ok(())
    }
}

/// The phases that an action runs.
pub(super) fn phases(kind: Kind) -> &'static [Phase] {
    match kind {
        Kind::F => &[Phase::Forward],
        Kind::B => &[Phase::Input, Phase::Weight],
        Kind::I => &[Phase::Input],
        Kind::W => &[Phase::Weight],
        _ => &[],
    }
}

fn no_stage(action: Action) -> Error {
    Error::Shape { op: "executor", message: format!("{action} is not on this device") }
}
