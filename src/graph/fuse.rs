//! Fusion: chains of nodes become one node with an epilogue. A rewrite changes where work is done, never its result
//! beyond rounding; it stays inside one phase, so F, I and W keep their stash.

use std::collections::HashMap;

use super::{Epilogue, Graph, Layout, Node, Op, Source, StageGraph, ValueId};

/// Applies every rewrite until none applies.
pub fn fuse(stage: &mut StageGraph) {
    dissolve(&mut stage.graph);
    let mut uses: HashMap<ValueId, usize> = HashMap::new();
    for id in stage.graph.nodes.iter().flat_map(|n| n.inputs.clone()).chain(stage.results()) {
        *uses.entry(id).or_default() += 1;
    }
    // Nodes are in order, so one pass is enough if a fused node is looked at again. Its producer is only marked, so
    // that indices hold until the end.
    let mut dead = vec![false; stage.graph.nodes.len()];
    for consumer in 0..dead.len() {
        while let Some((producer, node)) = rewrite(&stage.graph, &uses, consumer) {
            for (output, id) in node.outputs.iter().enumerate() {
                stage.graph.values[id.0].source = Source::Node { node: consumer, output };
            }
            stage.graph.nodes[consumer] = node;
            dead[producer] = true;
        }
    }
    let mut index = 0;
    stage.graph.nodes.retain(|_| {
        index += 1;
        !dead[index - 1]
    });
    stage.graph.renumber();
}

/// Lets those that read what is spread read it as it is: only differentiation tells the two apart.
fn dissolve(graph: &mut Graph) {
    let mut spread: HashMap<ValueId, ValueId> = HashMap::new();
    graph.nodes.retain_mut(|node| {
        for input in &mut node.inputs {
            *input = spread.get(input).copied().unwrap_or(*input);
        }
        if node.op == Op::Spread {
            spread.insert(node.outputs[0], node.inputs[0]);
        }
        node.op != Op::Spread
    });
    if !spread.is_empty() {
        graph.renumber();
    }
}

/// The next rewrite of a node: (index of the producer it swallows, the node that replaces both).
fn rewrite(graph: &Graph, uses: &HashMap<ValueId, usize>, consumer: usize) -> Option<(usize, Node)> {
    let consumer = &graph.nodes[consumer];
    for (position, &id) in consumer.inputs.iter().enumerate() {
        let Source::Node { node: at, output: 0 } = graph.value(id).source else { continue };
        let producer = &graph.nodes[at];
        if producer.phase != consumer.phase {
            continue;
        }
        // u of a fused GELU stays a result, so later readers (the backward pass) do not matter there.
        let sole = uses[&id] == 1;
        let other = |n: usize| consumer.inputs[n];
        let fused = match (&producer.op, &consumer.op, position) {
            (Op::Matmul { layout, epilogue: Epilogue::None }, Op::AddBias, 0) if sole => {
                Some((matmul(*layout, Epilogue::Bias), vec![other(1)], vec![]))
            }
            (Op::Matmul { layout, epilogue: Epilogue::Bias }, Op::Activate(_), 0) => {
                Some((matmul(*layout, Epilogue::BiasGelu), vec![], vec![id]))
            }
            (Op::Matmul { layout, epilogue: Epilogue::Bias }, Op::Add, _) if sole => {
                Some((matmul(*layout, Epilogue::BiasResidual), vec![other(1 - position)], vec![]))
            }
            (Op::Matmul { layout, epilogue: Epilogue::None }, Op::Add, _) if sole => {
                Some((matmul(*layout, Epilogue::Residual), vec![other(1 - position)], vec![]))
            }
            (
                Op::Matmul { layout: layout @ Layout::NT, epilogue: Epilogue::None },
                Op::ActivateBackward(_),
                0,
            ) if sole => Some((matmul(*layout, Epilogue::GeluBackward), vec![other(1)], vec![])),
            (Op::LayerNormBackward { residual: false }, Op::Add, _) if sole => {
                Some((Op::LayerNormBackward { residual: true }, vec![other(1 - position)], vec![]))
            }
            (Op::RmsNormBackward { residual: false }, Op::Add, _) if sole => {
                Some((Op::RmsNormBackward { residual: true }, vec![other(1 - position)], vec![]))
            }
            _ => None,
        };
        if let Some((op, more_inputs, more_outputs)) = fused {
            let inputs = [producer.inputs.clone(), more_inputs].concat();
            let outputs = [consumer.outputs.clone(), more_outputs].concat();
            return Some((at, Node { op, inputs, outputs, phase: consumer.phase }));
        }
    }
    None
}

fn matmul(layout: Layout, epilogue: Epilogue) -> Op {
    Op::Matmul { layout, epilogue }
}
