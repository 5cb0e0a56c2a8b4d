//! Rewrites for the collectives of a gang ([`Op::is_collective`](super::Op::is_collective)): what is kept of what they give, and
//! what runs while they travel.

use std::collections::{HashMap, HashSet};

use super::{Graph, Node, Op, Phase, Source, StageGraph, ValueId};

impl StageGraph {
    /// Gathers again in the backward pass what was gathered for the forward pass, so that of it each member keeps its own rows alone
    /// (Korthikanti et al. 2022, arXiv 2205.05198, §4.2.2). Before fusion.
    pub(crate) fn gather_again(&mut self) {
        let nodes = std::mem::take(&mut self.graph.nodes);
        let is_gathered =
            |node: &Node| node.phase == Phase::Forward && matches!(node.op, Op::AllGather { .. });
        let gathered: HashMap<ValueId, Node> = nodes
            .iter()
            .filter(|node| is_gathered(node))
            .map(|node| (node.outputs[0], node.clone()))
            .collect();
        let mut twins: HashMap<ValueId, ValueId> = HashMap::new();
        for mut node in nodes {
            if node.phase != Phase::Forward {
                for input in &mut node.inputs {
                    let Some(first) = gathered.get(input) else { continue };
                    let twin = *twins.entry(*input).or_insert_with(|| {
                        let twin = ValueId(self.graph.values.len());
                        self.graph.values.push(self.graph.values[input.0].clone());
                        self.graph.nodes.push(Node {
                            outputs: vec![twin],
                            phase: node.phase,
                            ..first.clone()
                        });
                        twin
                    });
                    *input = twin;
                }
            }
            self.graph.nodes.push(node);
        }
        self.graph.renumber();
    }

    /// Puts each collective before what it does not need: that runs while it travels. What then comes between it and the first
    /// that needs its result is there for that alone, and never moved again, so lifetimes grow by one collective at most.
    pub fn advance_collectives(&mut self) {
        let nodes = std::mem::take(&mut self.graph.nodes);
        // What has its place, and what of it the next collective may pass.
        let (mut placed, mut open): (Vec<Node>, Vec<Node>) = (Vec::new(), Vec::new());
        for node in nodes {
            if !node.op.is_collective() {
                open.push(node);
                continue;
            }
            let mut needed: HashSet<ValueId> = node.inputs.iter().copied().collect();
            let mut before: Vec<bool> = Vec::with_capacity(open.len());
            for other in open.iter().rev() {
                let is_needed = other.outputs.iter().any(|output| needed.contains(output));
                if is_needed {
                    needed.extend(&other.inputs);
                }
                before.push(is_needed);
            }
            let mut before = before.into_iter().rev();
            let (first, after): (Vec<Node>, Vec<Node>) =
                std::mem::take(&mut open).into_iter().partition(|_| before.next() == Some(true));
            placed.extend(first);
            placed.push(node);
            placed.extend(after);
        }
        placed.extend(open);
        self.graph.nodes = placed;
        self.graph.renumber();
    }
}

impl Graph {
    /// Says again where each value comes from, after a rewrite of the nodes.
    pub(super) fn renumber(&mut self) {
        for value in &mut self.values {
            if matches!(value.source, Source::Node { .. }) {
                value.source = Source::Removed;
            }
        }
        for (node, n) in self.nodes.iter().enumerate() {
            for (output, id) in n.outputs.iter().enumerate() {
                self.values[id.0].source = Source::Node { node, output };
            }
        }
    }
}
