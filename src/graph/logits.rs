//! Logits in parts of the vocabulary, so that they never exist whole.

use super::{DType, Epilogue, Graph, Layout, Op, Phase, Source, StageGraph, ValueId};
use crate::error::Result;

/// Bytes of logits that exist at once unless somebody wants fewer: as much as adapters bind.
pub const LOGIT_BYTES: u64 = 2 << 30;

/// Where memory is short: enough for the columns of a part to be worth a matmul.
pub const FEW_LOGIT_BYTES: u64 = 128 << 20;

/// Columns of a part are a multiple of this: rows of weights begin where they may be bound, packed ones too.
const COLUMNS: usize = 128;

/// The head and its loss, as [`super::differentiate`] and [`super::fuse`] leave them.
struct Head {
    /// Numbers of the nodes: logits and loss, and where they are wanted the gradients of x and of the weight.
    logits: usize,
    loss: usize,
    dx: Option<usize>,
    dw: Option<usize>,
    scale: f32,
    x: ValueId,
    w: ValueId,
    targets: ValueId,
}

impl StageGraph {
    /// Divides logits of more than `most` bytes into parts of no more, or of 128 columns where that is too few. F goes through the
    /// vocabulary part by part for what the loss takes of each row, its maximum and its sum of exponentials (Milakov and
    /// Gimelshein 2018, arXiv 1805.02867); the backward pass computes each part again and turns it into gradients at once, those
    /// of the weight too, which are then in I. Costs one more of the head's forward pass. Logits that the members of a gang
    /// divide already, or that are more than a matmul with a weight, stay as they are.
    ///
    /// # Errors
    /// None for graphs that [`super::Graph::verify`] accepts.
    pub fn divide_logits(&mut self, most: u64) -> Result<()> {
        let Some(head) = self.head() else { return Ok(()) };
        let logits = self.graph.value(self.graph.nodes[head.logits].outputs[0]);
        let vocabulary = logits.columns();
        let columns = (most / DType::F32.bytes(logits.rows())) as usize;
        if columns >= vocabulary || vocabulary <= COLUMNS {
            return Ok(());
        }
        let columns = (columns / COLUMNS).max(1) * COLUMNS;
        let divided = Divided { vocabulary, columns, head };
        let nodes = std::mem::take(&mut self.graph.nodes);
        let graph = &mut self.graph;
        let mut scored = None;
        for (number, node) in nodes.iter().enumerate() {
            let head = &divided.head;
            if number == head.loss {
                scored = Some(divided.score(graph, node.outputs[0])?);
            } else if Some(number) == head.dx.or(head.dw)
                && let Some(scored) = &scored
            {
                let result = |at: Option<usize>| at.map(|at| nodes[at].outputs[0]);
                divided.gradients(graph, scored, [result(head.dx), result(head.dw)])?;
            } else if number != head.logits && Some(number) != head.dw {
                graph.nodes.push(node.clone());
            }
        }
        self.graph.renumber();
        Ok(())
    }

    /// None where there is no loss, or one that is not of this form.
    fn head(&self) -> Option<Head> {
        let graph = &self.graph;
        let loss = graph.nodes.iter().position(|node| matches!(node.op, Op::CrossEntropy { .. }))?;
        let Op::CrossEntropy { scale } = graph.nodes[loss].op else { return None };
        let (logits, targets) = (graph.nodes[loss].inputs[0], graph.nodes[loss].inputs[1]);
        let Source::Node { node: maker, .. } = graph.value(logits).source else { return None };
        let plain = |layout| Op::Matmul { layout, epilogue: Epilogue::None };
        let &[x, w] = graph.nodes[maker].inputs.as_slice() else { return None };
        let is_weight = matches!(graph.value(w).source, Source::Parameter | Source::Frozen);
        let readers =
            |id: ValueId| graph.nodes.iter().enumerate().filter(move |(_, node)| node.inputs.contains(&id));
        if graph.nodes[maker].op != plain(Layout::NT) || !is_weight || readers(logits).count() != 1 {
            return None;
        }
        let gradient = graph.nodes[loss].outputs[1];
        let (mut dx, mut dw) = (None, None);
        for (number, node) in readers(gradient) {
            let (made, op) =
                if node.inputs == [gradient, w] { (&mut dx, Layout::NN) } else { (&mut dw, Layout::TN) };
            let is_known = node.inputs == [gradient, w] || node.inputs == [gradient, x];
            if !is_known || node.op != plain(op) || made.replace(number).is_some() {
                return None;
            }
        }
        Some(Head { logits: maker, loss, dx, dw, scale, x, w, targets })
    }
}

struct Divided {
    vocabulary: usize,
    /// Columns of a part; the last one has the rest.
    columns: usize,
    head: Head,
}

/// What F leaves for the backward pass.
struct Scored {
    /// The weights of each part.
    weights: Vec<ValueId>,
    /// (parts, M, 3), as [`Op::LogitStatistics`] says.
    statistics: ValueId,
}

impl Divided {
    fn first(&self, part: usize) -> usize {
        part * self.columns
    }

    fn count(&self, part: usize) -> usize {
        self.columns.min(self.vocabulary - self.first(part))
    }

    /// A part's logits.
    fn logits(&self, graph: &mut Graph, weight: ValueId, phase: Phase) -> Result<ValueId> {
        let op = Op::Matmul { layout: Layout::NT, epilogue: Epilogue::None };
        Ok(graph.push(op, &[self.head.x, weight], phase)?[0])
    }

    /// From a part's logits the losses and the logits' gradient, in their place.
    fn cross_entropy(
        &self,
        graph: &mut Graph,
        (part, logits): (usize, ValueId),
        statistics: ValueId,
        phase: Phase,
    ) -> Result<Vec<ValueId>> {
        let (scale, first, vocabulary) = (self.head.scale, self.first(part), self.vocabulary);
        let op = Op::CrossEntropyPart { scale, first, vocabulary };
        graph.push(op, &[logits, self.head.targets, statistics], phase)
    }

    fn score(&self, graph: &mut Graph, loss: ValueId) -> Result<Scored> {
        let members = self.vocabulary.div_ceil(self.columns);
        let phase = Phase::Forward;
        let mut weights = Vec::new();
        let mut logits_of = |graph: &mut Graph, member: usize| -> Result<ValueId> {
            let op = Op::Slice { first: self.first(member), count: self.count(member) };
            let weight = graph.push(op, &[self.head.w], phase)?[0];
            weights.push(weight);
            self.logits(graph, weight, phase)
        };
        let known = |graph: &mut Graph, member: usize, logits: ValueId| -> Result<ValueId> {
            let op = Op::LogitStatistics { member, members, first: self.first(member) };
            Ok(graph.push(op, &[logits, self.head.targets], phase)?[0])
        };
        let mut logits = logits_of(graph, 0)?;
        let mut statistics = known(graph, 0, logits)?;
        let mut own = None;
        for member in 1..members {
            logits = logits_of(graph, member)?;
            // While the place of logits is taken, so that this takes another.
            if let Some(own) = own {
                statistics = graph.push(Op::Add, &[statistics, own], phase)?[0];
            }
            own = Some(known(graph, member, logits)?);
        }
        if let Some(own) = own {
            statistics = graph.push(Op::Add, &[statistics, own], phase)?[0];
        }
        // Of the losses every part would say the same; this one's logits are still there.
        self.cross_entropy(graph, (members - 1, logits), statistics, phase)?;
        graph.rename(0, loss);
        Ok(Scored { weights, statistics })
    }

    /// The gradients of x and of the weight, where they are wanted.
    fn gradients(&self, graph: &mut Graph, scored: &Scored, [dx, dw]: [Option<ValueId>; 2]) -> Result<()> {
        let phase = Phase::Input;
        let (mut sum, mut of_parts) = (None, Vec::new());
        for (part, &weight) in scored.weights.iter().enumerate() {
            let logits = self.logits(graph, weight, phase)?;
            let gradient = self.cross_entropy(graph, (part, logits), scored.statistics, phase)?[1];
            if dx.is_some() {
                let (epilogue, before) = match sum {
                    Some(before) => (Epilogue::Residual, vec![before]),
                    None => (Epilogue::None, Vec::new()),
                };
                let op = Op::Matmul { layout: Layout::NN, epilogue };
                sum = Some(graph.push(op, &[vec![gradient, weight], before].concat(), phase)?[0]);
                if let Some(dx) = dx.filter(|_| part + 1 == scored.weights.len()) {
                    graph.rename(0, dx);
                }
            }
            if dw.is_some() {
                let op = Op::Matmul { layout: Layout::TN, epilogue: Epilogue::None };
                of_parts.push(graph.push(op, &[gradient, self.head.x], phase)?[0]);
            }
        }
        if let Some(dw) = dw {
            graph.push(Op::Stack { parts: of_parts.len() }, &of_parts, phase)?;
            graph.rename(0, dw);
        }
        Ok(())
    }
}

impl Graph {
    /// Gives a result of the last node the name by which others know it.
    fn rename(&mut self, output: usize, id: ValueId) {
        if let Some(node) = self.nodes.last_mut() {
            node.outputs[output] = id;
        }
    }
}
