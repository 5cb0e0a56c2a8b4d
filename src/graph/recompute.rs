//! Rewrites of a stage's backward pass: one program instead of two, and activations computed again instead of kept.

use std::collections::{HashMap, HashSet};

use super::{Graph, Node, Phase, StageGraph, ValueId};

impl StageGraph {
    /// Makes of it what is to run: with the activations of its layers computed again or kept, I and W apart or one, and
    /// collectives as early as can be.
    pub fn arrange(&mut self, recompute: bool, split: bool) {
        if recompute {
            self.recompute();
        }
        if !split {
            self.join_backward();
        }
        self.advance_collectives();
    }

    /// Makes I and W one program, B, in the order in which differentiation appended their nodes: what one layer leaves
    /// for its weight gradients dies before the next layer's turn, so nothing is held between I and W.
    pub fn join_backward(&mut self) {
        for node in self.graph.nodes.iter_mut().filter(|n| n.phase == Phase::Weight) {
            node.phase = Phase::Input;
        }
    }

    /// Activation checkpointing (Chen et al. 2016, arXiv 1604.06174), a layer at a time: of each layer only the input is
    /// kept for the backward pass, which computes the rest again. Costs up to one more forward pass in I (or B). The
    /// last layer before a loss is left alone: its backward pass follows its forward pass at once.
    pub fn recompute(&mut self) {
        let kept: HashSet<ValueId> = self.boundaries.iter().copied().chain(self.input).collect();
        let mut rewrite = Rewrite { graph: Graph::default(), copies: HashMap::new(), kept };
        let nodes = std::mem::take(&mut self.graph.nodes);
        rewrite.graph.values = std::mem::take(&mut self.graph.values);
        // The head's logits become their own gradient in place, so they exist only once.
        let head = if self.loss.is_some() { self.boundaries.iter().rev().nth(1) } else { None };
        let forward: Vec<Node> = nodes.iter().filter(|n| n.phase == Phase::Forward).cloned().collect();
        let first_of_head = head.and_then(|last| forward.iter().position(|n| n.outputs.contains(last)));
        let repeatable =
            first_of_head.map_or(if self.loss.is_some() { 0 } else { forward.len() }, |at| at + 1);
        let makers: HashMap<ValueId, usize> = forward[..repeatable]
            .iter()
            .enumerate()
            .flat_map(|(index, node)| node.outputs.iter().map(move |&output| (output, index)))
            .collect();
        let mut placed = Vec::with_capacity(nodes.len());
        for mut node in nodes {
            if node.phase != Phase::Forward {
                for input in &mut node.inputs {
                    *input = rewrite.again(*input, &forward, &makers, &mut placed);
                }
            }
            placed.push(node);
        }
        rewrite.graph.nodes = placed;
        self.graph = rewrite.graph;
        self.graph.renumber();
    }
}

struct Rewrite {
    graph: Graph,
    /// What was computed again: the value of F, and its twin in the backward pass.
    copies: HashMap<ValueId, ValueId>,
    kept: HashSet<ValueId>,
}

impl Rewrite {
    /// The value to use for `id` in the backward pass: itself where it is kept, else a twin, whose node (and those it
    /// needs) is appended to `placed`.
    fn again(
        &mut self,
        id: ValueId,
        forward: &[Node],
        makers: &HashMap<ValueId, usize>,
        placed: &mut Vec<Node>,
    ) -> ValueId {
        if let Some(&copy) = self.copies.get(&id) {
            return copy;
        }
        let Some(&maker) = makers.get(&id).filter(|_| !self.kept.contains(&id)) else { return id };
        let mut node = forward[maker].clone();
        for input in &mut node.inputs {
            *input = self.again(*input, forward, makers, placed);
        }
        node.phase = Phase::Input;
        for output in &mut node.outputs {
            let twin = ValueId(self.graph.values.len());
            self.graph.values.push(self.graph.values[output.0].clone());
            self.copies.insert(*output, twin);
            *output = twin;
        }
        placed.push(node);
        self.copies[&id]
    }
}
