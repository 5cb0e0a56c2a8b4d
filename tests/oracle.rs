//! A whole graph in f64, by the definitions of its ops.

use polystage::graph::{Fed, Graph, Node, Phase, Source, Value};
use polystage::reference;

/// Runs the nodes of the given phases in order. `values` holds one slot a value: inputs and parameters must be
/// filled; constants and results are filled in.
pub fn run(graph: &Graph, phases: &[Phase], values: &mut [Option<Vec<f64>>]) {
    for (value, slot) in graph.values.iter().zip(values.iter_mut()) {
        if let Some(elements) = &value.constant {
            *slot = Some(elements.iter().map(|&x| x as f64).collect());
        }
    }
    for node in graph.nodes.iter().filter(|n| phases.contains(&n.phase)) {
        run_node(graph, node, values);
    }
}

/// Runs one node.
pub fn run_node(graph: &Graph, node: &Node, values: &mut [Option<Vec<f64>>]) {
    let shapes: Vec<&[usize]> = node.inputs.iter().map(|&i| graph.shape(i)).collect();
    let inputs: Vec<&[f64]> = node
        .inputs
        .iter()
        .map(|i| values[i.0].as_deref().unwrap_or_else(|| panic!("{} was not fed", graph.value(*i).name)))
        .collect();
    let results = reference::apply(&node.op, &shapes, &inputs);
    for (&output, result) in node.outputs.iter().zip(results) {
        values[output.0] = Some(result);
    }
}

/// Values of a graph for [`run`]: what is fed, and weights by name; the rest is left empty.
pub fn feed(
    graph: &Graph,
    fed: &[(Fed, Vec<f64>)],
    weight: impl Fn(&str) -> Vec<f64>,
) -> Vec<Option<Vec<f64>>> {
    let of = |value: &Value| match value.source {
        Source::Fed(what) => fed.iter().find(|(listed, _)| *listed == what).map(|(_, values)| values.clone()),
        Source::Parameter | Source::Frozen => Some(weight(&value.name)),
        Source::Constant => value.constant.as_ref().map(|all| all.iter().map(|&x| x as f64).collect()),
        Source::Node { .. } | Source::Removed => None,
    };
    graph.values.iter().map(of).collect()
}
