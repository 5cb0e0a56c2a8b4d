//! Devices that divide every layer among them: a gang. The schedule knows it as one rank; all members run the same list.
//!
//! What the members compute of a sum goes down to the host, each once, and each member gets the sum, added in the order of
//! the members, so that on one kind of adapter it is the same bits for all. A program stops there: what it has recorded is
//! handed over, and it goes on when the sum has come.

use super::compute::Recording;
use super::link::{self, Incoming, Outgoing, connect_all};
use super::log::State;
use super::plan::Plan;
use super::rank::Rank;
use crate::error::Result;
use crate::gpu::{Device, Range};
use crate::graph::{Op, StageGraph};

/// Sums that can be on their way: a member is one ahead of another at most.
const SLOTS: usize = 2;

/// A member's ends.
pub(super) struct Gang {
    out: Outgoing,
    inward: Incoming,
    /// How many sums there were.
    sums: usize,
}

/// Bytes of the largest sum in the programs of a rank; none where there are none.
fn largest(plan: &Plan, rank: usize) -> Option<u64> {
    let of = |graph: &StageGraph| {
        let sums = graph.graph.nodes.iter().filter(|node| node.op == Op::Sum);
        sums.map(|node| graph.graph.value(node.outputs[0]).bytes()).max()
    };
    plan.ranks[rank].stages.iter().filter_map(|stage| of(&stage.graph)).max()
}

/// Bytes of a rank's ends.
pub(super) fn memory(plan: &Plan, rank: usize) -> u64 {
    largest(plan, rank).map_or(0, rings)
}

/// The same where the largest sum has so many bytes.
pub(super) fn rings(bytes: u64) -> u64 {
    2 * link::memory(bytes, SLOTS)
}

/// The ends of all ranks that have some.
pub(super) fn connect(plan: &Plan, devices: &[Device]) -> Result<Vec<Option<Gang>>> {
    let mut all: Vec<Option<Gang>> = Vec::with_capacity(devices.len());
    for (number, members) in devices.chunks(plan.members.len()).enumerate() {
        let Some(bytes) = largest(plan, number * plan.members.len()) else {
            all.extend(members.iter().map(|_| None));
            continue;
        };
        let members: Vec<&Device> = members.iter().collect();
        let (out, inward) = connect_all(std::slice::from_ref(&members), &members, bytes, SLOTS)?;
        all.extend(out.into_iter().zip(inward).map(|(out, inward)| Some(Gang { out, inward, sums: 0 })));
    }
    Ok(all)
}

impl Gang {
    /// Bytes sent so far.
    pub(super) fn sent(&self) -> u64 {
        self.out.bytes
    }
}

impl Rank {
    /// Replaces what lies there by its sum over the gang.
    pub(super) async fn sum_over_gang(&mut self, recording: &mut Recording<'_>, range: Range) -> Result<()> {
        let Some(mut gang) = self.gang.take() else { return Ok(()) };
        let (tag, what) = (gang.sums, recording.what);
        let pieces = [(range, 0)];
        let sent = gang.out.record(&mut recording.recorder, &pieces, tag).await?;
        recording.copies.push(sent);
        self.submit_part(recording).await;
        self.log.state(State::Waiting(what));
        let (received, copy) = gang.inward.record(&mut recording.recorder, &pieces, tag).await?;
        self.log.copied(what, copy);
        self.log.state(State::Working(what));
        recording.copies.push(received);
        gang.sums += 1;
        self.gang = Some(gang);
        Ok(())
    }
}
