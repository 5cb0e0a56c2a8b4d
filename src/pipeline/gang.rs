//! Devices that divide every layer among them: a gang. The schedule knows it as one rank; all members run the same list.
//!
//! What members have of a sum goes down to the host, each once, and each member gets what it needs of it, added in the order of
//! the members, so that on one kind of adapter it has the same bits for all. What they gather passes the host likewise, one's
//! rows after another's. A program stops there: what it has recorded is handed over; launches that do not need the result follow at
//! once, and the others when it has come.

use super::compute::Recording;
use super::link::{self, Combine, Incoming, Outgoing, connect_all};
use super::log::State;
use super::plan::Plan;
use super::rank::Rank;
use crate::error::Result;
use crate::gpu::{Device, Range};
use crate::graph::{Op, StageGraph};
use crate::mesh::{Division, Wire};
use crate::ops::program::Collective;

/// Collectives that can be on their way: a member is one ahead of another at most.
const SLOTS: usize = 2;

/// A member's ends.
pub(super) struct Gang {
    out: Outgoing,
    inward: Incoming,
    division: Division,
    /// How many collectives have begun.
    begun: usize,
}

/// Bytes of the largest tensor that a collective of these stages gives or gets; none where there are none. What is exact needs
/// as much room as it has bytes, which is twice of what a rounded tensor needs.
pub(super) fn largest<'a>(stages: impl IntoIterator<Item = &'a StageGraph>, wire: Wire) -> Option<u64> {
    let of = |stage: &StageGraph| {
        let nodes = stage.graph.nodes.iter().filter(|node| node.op.is_collective());
        let ends = nodes.flat_map(|node| [node.inputs[0], node.outputs[0]].map(|end| (&node.op, end)));
        let twice = |op: &Op| if is_exact(op) && wire == Wire::BF16 { 2 } else { 1 };
        ends.map(|(op, end)| twice(op) * stage.graph.value(end).bytes()).max()
    };
    stages.into_iter().filter_map(of).max()
}

/// Whether it travels as it is, whatever the wire.
fn is_exact(op: &Op) -> bool {
    matches!(op, Op::Sum { exact: true })
}

fn of_rank(plan: &Plan, rank: usize) -> Option<u64> {
    largest(plan.ranks[rank].stages.iter().map(|stage| &stage.graph), plan.setup.wire)
}

/// Bytes of a rank's ends.
pub(super) fn memory(plan: &Plan, rank: usize) -> u64 {
    of_rank(plan, rank).map_or(0, |bytes| rings(bytes, plan.setup.wire))
}

/// The same where the largest tensor has so many bytes.
pub(super) fn rings(bytes: u64, wire: Wire) -> u64 {
    2 * link::memory(bytes, SLOTS, wire)
}

/// The ends of all ranks that have some.
pub(super) fn connect(plan: &Plan, devices: &[Device]) -> Result<Vec<Option<Gang>>> {
    let mut all: Vec<Option<Gang>> = Vec::with_capacity(devices.len());
    for (number, members) in devices.chunks(plan.members.len()).enumerate() {
        let Some(bytes) = of_rank(plan, number * plan.members.len()) else {
            all.extend(members.iter().map(|_| None));
            continue;
        };
        let members: Vec<&Device> = members.iter().collect();
        let (out, inward) =
            connect_all(std::slice::from_ref(&members), &members, bytes, SLOTS, plan.setup.wire)?;
        let gang = |(out, inward)| Some(Gang { out, inward, division: plan.setup.tensor.clone(), begun: 0 });
        all.extend(out.into_iter().zip(inward).map(gang));
    }
    Ok(all)
}

impl Gang {
    /// Bytes sent so far.
    pub(super) fn sent(&self) -> u64 {
        self.out.bytes
    }

    /// What a member makes of what all have given.
    fn combine(&self, of: &Collective) -> Combine {
        match of.op {
            Op::ReduceScatter { first, .. } => Combine::Sum { first: first * of.columns },
            Op::AllGather { batch, sequence, .. } => {
                let rows = |member| self.division.rows(member, batch * sequence).len();
                Combine::Beside(
                    (0..self.division.members()).map(|member| rows(member) * of.columns).collect(),
                )
            }
            _ => Combine::Sum { first: 0 },
        }
    }
}

impl Rank {
    /// Hands over what this member gives of a collective, and orders what it gets.
    pub(super) async fn begin_collective(
        &mut self,
        recording: &mut Recording<'_>,
        of: &Collective,
        from: Range,
        to: &Range,
    ) -> Result<()> {
        let Some(mut gang) = self.gang.take() else { return Ok(()) };
        let (tag, exact) = (gang.begun, is_exact(&of.op));
        let sent = gang.out.give(&mut recording.recorder, &[(from, 0)], tag, exact).await?;
        recording.copies.push(sent);
        gang.inward.order(tag, to.bytes, gang.combine(of), exact);
        gang.begun += 1;
        self.gang = Some(gang);
        self.submit_part(recording).await;
        Ok(())
    }

    /// Waits for what this member gets of the collective, which is the one that has begun last.
    pub(super) async fn end_collective(
        &mut self,
        recording: &mut Recording<'_>,
        of: &Collective,
        to: Range,
    ) -> Result<()> {
        let Some(mut gang) = self.gang.take() else { return Ok(()) };
        let (tag, what) = (gang.begun - 1, recording.what);
        if !gang.inward.has(tag) {
            // The device goes on with what is not waiting for it.
            if recording.is_open() {
                self.host.iter_mut().for_each(|host| host.flush(recording));
                self.submit_part(recording).await;
            }
            self.log.state(State::Waiting(what));
        }
        let (combine, exact) = (gang.combine(of), is_exact(&of.op));
        let (received, copy) =
            gang.inward.take(&mut recording.recorder, &[(to, 0)], tag, &combine, exact).await?;
        self.log.copied(what, copy);
        self.log.state(State::Working(what));
        recording.copies.push(received);
        self.gang = Some(gang);
        Ok(())
    }
}
