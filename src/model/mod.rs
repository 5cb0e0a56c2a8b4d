//! Architectures as lists of layers. A layer is the unit that is never cut: it knows its parameters (named as in
//! Hugging Face's folders) and appends its forward nodes to a graph.

mod gpt2;
pub mod init;
mod mlp;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::graph::{DType, Graph, Op, Phase, StageGraph, ValueId, differentiate, fuse};

/// Architecture families.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// GPT-2: learned positions, LayerNorm before each half, GELU, causal attention, head tied to the embedding.
    Gpt2,
    /// The same without attention: each position sees only its own token. A baseline and a small test model.
    Mlp,
}

/// Extents of a model: the `[model]` table of a config file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Family.
    pub kind: Kind,
    /// Transformer blocks.
    pub layers: usize,
    /// C.
    pub width: usize,
    /// H; divides the width.
    pub heads: usize,
    /// Longest sequence, P.
    pub context: usize,
    /// V.
    pub vocabulary: usize,
}

/// How a parameter starts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Normal with this standard deviation.
    Normal(f64),
    /// All zero.
    Zeros,
    /// All one.
    Ones,
}

/// One trainable tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    /// Hugging Face's name.
    pub name: String,
    /// Extents.
    pub shape: Vec<usize>,
    /// Start.
    pub init: Init,
    /// The parameter that owns this one's value, gradient sum and optimizer state: a second use of it elsewhere.
    pub tied_to: Option<String>,
}

impl Parameter {
    fn new(name: impl Into<String>, shape: &[usize], init: Init) -> Self {
        Parameter { name: name.into(), shape: shape.to_vec(), init, tied_to: None }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Never: extents are positive.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Weight decay applies to tensors of two or more dimensions.
    pub fn decays(&self) -> bool {
        self.shape.len() >= 2
    }
}

/// What the last layer is followed by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Purpose {
    /// Cross-entropy and the backward pass; gradients are divided by this many tokens, those of the whole batch.
    Training {
        /// Tokens in a step.
        tokens: usize,
    },
    /// Logits, no backward pass.
    Inference,
}

/// The parts of a model that may not be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layer {
    Embedding,
    Block(usize),
    Head,
}

/// A model: its layers in order, each with parameters and a way to append itself to a graph.
#[derive(Clone, Debug)]
pub struct Model {
    config: ModelConfig,
    layers: Vec<Layer>,
}

impl Model {
    /// Checks the extents.
    pub fn new(config: &ModelConfig) -> Result<Model> {
        let refuse = |key: &str, message: String| Err(Error::config(format!("model.{key}"), message));
        // Far above any model that is known, far below what overflows a size in bytes.
        for (key, value, most) in [
            ("layers", config.layers, 4096),
            ("width", config.width, 1 << 17),
            ("heads", config.heads, 1 << 17),
            ("context", config.context, 1 << 22),
            ("vocabulary", config.vocabulary, 1 << 24),
        ] {
            if value == 0 || value > most {
                return refuse(key, format!("{value} is out of range; it must be between 1 and {most}"));
            }
        }
        if !config.width.is_multiple_of(config.heads) {
            let message = format!("{} heads do not divide the width {}", config.heads, config.width);
            return refuse("heads", message);
        }
        let blocks = (0..config.layers).map(Layer::Block);
        let layers = [Layer::Embedding].into_iter().chain(blocks).chain([Layer::Head]).collect();
        Ok(Model { config: config.clone(), layers })
    }

    /// The extents it was made with.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Number of layers, embedding and head included.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// A layer's name for people: `embedding`, `block 3`, `head`.
    pub fn layer_name(&self, layer: usize) -> String {
        match self.layers[layer] {
            Layer::Embedding => "embedding".into(),
            Layer::Block(i) => format!("block {i}"),
            Layer::Head => "head".into(),
        }
    }

    /// Parameters of one layer, in the order in which its graph uses them.
    pub fn layer_parameters(&self, layer: usize) -> Vec<Parameter> {
        match self.layers[layer] {
            Layer::Embedding => gpt2::embedding_parameters(&self.config),
            Layer::Block(i) => match self.config.kind {
                Kind::Gpt2 => gpt2::block_parameters(&self.config, i),
                Kind::Mlp => mlp::block_parameters(&self.config, i),
            },
            Layer::Head => gpt2::head_parameters(&self.config),
        }
    }

    /// All parameters in model order: the order of every sum over parameters.
    pub fn parameters(&self) -> Vec<Parameter> {
        (0..self.layers()).flat_map(|layer| self.layer_parameters(layer)).collect()
    }

    /// Elements of all parameters, tied ones counted once.
    pub fn parameter_count(&self) -> usize {
        self.parameters().iter().filter(|p| p.tied_to.is_none()).map(Parameter::len).sum()
    }

    /// The graph of layers `range` for microbatches of `batch` sequences of `sequence` tokens: forward, and for
    /// training the backward pass, differentiated and fused.
    pub fn stage_graph(
        &self,
        range: std::ops::Range<usize>,
        batch: usize,
        sequence: usize,
        purpose: Purpose,
    ) -> Result<StageGraph> {
        let mut graph = Graph::default();
        let width = self.config.width;
        let input = (range.start > 0).then(|| graph.input("input", &[batch, sequence, width], DType::F32));
        let mut x = input;
        let mut boundaries = Vec::new();
        for layer in range.clone() {
            let y = self.append(&mut graph, layer, x, batch, sequence)?;
            boundaries.push(y);
            x = Some(y);
        }
        let last = range.end == self.layers();
        let mut stage = match purpose {
            Purpose::Inference => StageGraph {
                graph,
                input,
                output: x,
                d_output: None,
                d_input: None,
                loss: None,
                gradients: Vec::new(),
                boundaries: Vec::new(),
            },
            Purpose::Training { tokens } if last => {
                let logits = x.ok_or_else(empty_stage)?;
                let targets = graph.input("targets", &[batch, sequence], DType::U32);
                let op = Op::CrossEntropy { scale: 1.0 / tokens as f32 };
                graph.push(op, &[logits, targets], Phase::Forward)?;
                differentiate(graph, input, None)?
            }
            Purpose::Training { .. } => differentiate(graph, input, x)?,
        };
        stage.boundaries = boundaries;
        fuse::fuse(&mut stage);
        stage.graph.verify()?;
        Ok(stage)
    }

    fn append(
        &self,
        graph: &mut Graph,
        layer: usize,
        x: Option<ValueId>,
        batch: usize,
        sequence: usize,
    ) -> Result<ValueId> {
        let weights: Vec<ValueId> =
            self.layer_parameters(layer).iter().map(|p| graph.parameter(&p.name, &p.shape)).collect();
        match (self.layers[layer], x) {
            (Layer::Embedding, _) => {
                let tokens = graph.input("tokens", &[batch, sequence], DType::U32);
                graph.forward(Op::Embedding, &[tokens, weights[0], weights[1]])
            }
            (Layer::Block(_), Some(x)) => match self.config.kind {
                Kind::Gpt2 => gpt2::block(graph, x, &weights, self.config.heads),
                Kind::Mlp => mlp::block(graph, x, &weights),
            },
            (Layer::Head, Some(x)) => gpt2::head(graph, x, &weights),
            (_, None) => Err(empty_stage()),
        }
    }

    /// Forward and backward floating-point operations of each layer for one microbatch: the weights of a split.
    pub fn layer_flops(&self, batch: usize, sequence: usize) -> Result<Vec<f64>> {
        let purpose = Purpose::Training { tokens: batch * sequence };
        let flops = |layer: usize| -> Result<f64> {
            let stage = self.stage_graph(layer..layer + 1, batch, sequence, purpose)?;
            Ok(stage.graph.nodes.iter().map(|n| stage.graph.flops(n)).sum())
        };
        // All blocks are alike.
        let (first, block, last) = (flops(0)?, flops(1)?, flops(self.layers() - 1)?);
        let blocks = std::iter::repeat_n(block, self.layers() - 2);
        Ok([first].into_iter().chain(blocks).chain([last]).collect())
    }

    /// The Hugging Face `config.json` of this model.
    pub fn hugging_face_config(&self) -> serde_json::Value {
        gpt2::to_hugging_face(&self.config)
    }

    /// Reads a Hugging Face `config.json`; the error names the key that is missing or not supported.
    pub fn from_hugging_face(json: &serde_json::Value) -> Result<Model> {
        Model::new(&gpt2::from_hugging_face(json)?)
    }
}

fn empty_stage() -> Error {
    Error::Shape { op: "stage", message: "a stage needs at least one layer and an input".into() }
}
