//! Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): beside the frozen weight of a linear layer, two small trained
//! matrices A (r, inputs) and B (outputs, r), so that it computes x Wᵀ + scale · (x Aᵀ) Bᵀ.

use super::tensor::{Split, whole};
use super::{Init, Model, Parameter};
use crate::error::{Error, Result};
use crate::graph::{Epilogue, Graph, Layout, Op, ValueId};

/// What follows a module's name in the name of its A.
pub const A: &str = ".lora_A.weight";
/// What follows a module's name in the name of its B.
pub const B: &str = ".lora_B.weight";

/// An adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct Lora {
    /// Rank r: rows of every A and columns of every B.
    pub rank: usize,
    /// The factor of the update.
    pub scale: f64,
    /// Names of the linear layers that it adapts, without `.weight`: [`Linear::name`].
    pub modules: Vec<String>,
}

/// A linear layer of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Linear {
    /// Hugging Face's name, without `.weight`.
    pub name: String,
    /// Extent of what it takes.
    pub inputs: usize,
    /// Extent of what it gives.
    pub outputs: usize,
    /// Whether the weight is stored (inputs, outputs), as GPT-2's are, and not (outputs, inputs).
    pub inputs_first: bool,
}

impl Linear {
    /// The layer behind a weight, if it is a linear layer's.
    pub(super) fn of(parameter: &Parameter) -> Option<Linear> {
        let name = parameter.name.strip_suffix(".weight")?.to_string();
        let &[rows, columns] = &parameter.shape[..] else { return None };
        if ["wte", "wpe", "embed_tokens"].iter().any(|table| name.ends_with(table)) {
            return None;
        }
        // Of GPT-2's layers only the head is not what transformers calls a Conv1D.
        let inputs_first = name.starts_with("transformer.h.");
        let (inputs, outputs) = if inputs_first { (rows, columns) } else { (columns, rows) };
        Some(Linear { name, inputs, outputs, inputs_first })
    }

    /// A and B. PEFT's start: A as `kaiming_uniform_` with a = √5, which is uniform within 1/√inputs, and B zero, so that
    /// the first step begins at the base model.
    fn matrices(&self, rank: usize) -> [Parameter; 2] {
        let bound = 1.0 / (self.inputs as f64).sqrt();
        [
            Parameter::new(format!("{}{A}", self.name), &[rank, self.inputs], Init::Uniform(bound)),
            Parameter::new(format!("{}{B}", self.name), &[self.outputs, rank], Init::Zeros),
        ]
    }
}

impl Lora {
    /// Refuses what the model does not have.
    pub(super) fn check(&self, model: &Model) -> Result<()> {
        let known = model.linear_layers();
        let refuse = |message: String| Err(Error::config("adapter", message));
        if self.rank == 0 || self.modules.is_empty() || !self.scale.is_finite() {
            return refuse("needs a rank, a scale and a module".into());
        }
        if let Some(name) = self.modules.iter().find(|name| !known.iter().any(|l| l.name == **name)) {
            return refuse(format!("{name} is not a linear layer of this model; is it for another model?"));
        }
        Ok(())
    }

    /// Freezes the parameters of a layer and appends the matrices of its adapted modules.
    pub(super) fn extend(&self, parameters: &mut Vec<Parameter>) {
        parameters.iter_mut().for_each(|p| p.frozen = true);
        let linear = |p: &Parameter| Linear::of(p).map(|layer| (layer, p.split));
        let layers: Vec<(Linear, Split)> = parameters.iter().filter_map(linear).collect();
        for (layer, split) in layers.iter().filter(|(layer, _)| self.modules.contains(&layer.name)) {
            let [a, b] = layer.matrices(self.rank);
            // Members of a gang have of the matrix on the divided side their part, and terms of the other's gradient.
            let (of_a, of_b) = match *split {
                Split::Along(axis, extent) if (axis == 0) == layer.inputs_first => {
                    (Split::Along(1, extent), Split::Summed)
                }
                Split::Along(_, extent) => (Split::Summed, Split::Along(0, extent)),
                Split::Same | Split::Summed | Split::ByToken | Split::First => (*split, *split),
            };
            parameters.extend([a.split(of_a), b.split(of_b)]);
        }
    }
}

/// What a module is called within its block, and the whole name of one outside the blocks.
pub(super) fn part(module: &str) -> &str {
    let number = |piece: &str| piece.bytes().all(|b| b.is_ascii_digit());
    let mut rest = module;
    while let Some((first, after)) = rest.split_once('.') {
        rest = after;
        if number(first) {
            return rest;
        }
    }
    module
}

/// `y`, which is what a linear layer gives for `x`, plus the update of its adapter, if it has one.
pub(super) fn adapt(
    g: &mut Graph,
    lora: Option<&Lora>,
    x: ValueId,
    weight: ValueId,
    y: ValueId,
) -> Result<ValueId> {
    let Some(lora) = lora else { return Ok(y) };
    let name = &g.value(weight).name;
    // Of the matrix on the divided side the part that belongs to this one of the weight.
    let (of, part) = (whole(name), &name[whole(name).len()..]);
    let module = of.strip_suffix(".weight").unwrap_or_default();
    let find = |end: &str| {
        let [all, own] = ["", part].map(|part| format!("{module}{end}{part}"));
        g.parameters().find(|&id| [&all, &own].contains(&&g.value(id).name))
    };
    let (Some(a), Some(b)) = (find(A), find(B)) else { return Ok(y) };
    let product = Op::Matmul { layout: Layout::NT, epilogue: Epilogue::None };
    let h = g.forward(product.clone(), &[x, a])?;
    let h = g.forward(Op::Scale { factor: lora.scale as f32 }, &[h])?;
    let update = g.forward(product, &[h, b])?;
    g.forward(Op::Add, &[y, update])
}
