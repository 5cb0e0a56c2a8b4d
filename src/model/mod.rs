//! Architectures as lists of layers. A layer is the unit that is never cut (a block with attention is two): it knows its
//! parameters (named as in Hugging Face's folders) and appends its forward nodes to a graph.

mod config;
mod gpt2;
mod hugging_face;
pub mod init;
mod llama;
pub mod lora;
mod parameter;
pub mod rope;
pub mod tensor;
mod weights;

pub use config::{Kind, ModelConfig};
pub use lora::{Linear, Lora};
pub use parameter::{Init, Parameter};
pub use rope::RopeScaling;
pub use weights::Weights;

use std::ops::Range;

use crate::error::{Error, Result};
use crate::graph::{Fed, Graph, LOGIT_BYTES, Op, StageGraph, ValueId, differentiate, fuse};
use crate::layers::Layers;
use tensor::Member;

/// Most angles of rotary positions: a table that every stage has, of 64 MiB.
const MOST_ANGLES: usize = 1 << 24;

/// What the last layer is followed by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Purpose {
    /// Cross-entropy and the backward pass; gradients are divided by this many tokens, those of the whole batch.
    Training {
        /// Tokens in a step.
        tokens: usize,
    },
    /// Cross-entropy, no backward pass.
    Evaluation,
    /// Logits, no backward pass.
    Inference,
    /// Logits of one new token a sequence, no backward pass: the tokens before are in caches.
    Decode {
        /// Tokens that a cache holds; at most [`ModelConfig::longest_sequence`].
        capacity: usize,
    },
}

/// What all layers of a stage share.
struct Run<'a> {
    batch: usize,
    sequence: usize,
    /// Fed positions (B,T) of the tokens, when decoding.
    positions: Option<ValueId>,
    /// Rows of the caches, when decoding.
    capacity: Option<usize>,
    /// Whether a sequence may hold several texts.
    shared: bool,
    /// Fed places (B,T) in the sequence where the text of each token begins, if it may and there is attention.
    starts: Option<ValueId>,
    lora: Option<&'a Lora>,
    /// Which part of each layer, where a gang divides them.
    member: Option<&'a Member>,
    /// Its tokens of what lies between the divided halves; none where it has all of them.
    rows: Option<Range<usize>>,
}

impl Run<'_> {
    /// H and K of each section of what is computed.
    fn sections(&self, c: &ModelConfig) -> Vec<[usize; 2]> {
        match self.member {
            Some(member) => member.sections.iter().map(|of| [of.heads.len(), of.kv_heads.len()]).collect(),
            None => vec![[c.heads, c.kv_heads()]],
        }
    }

    /// What all members of a gang compute something of: all tokens.
    fn spread(&self, g: &mut Graph, x: ValueId) -> Result<ValueId> {
        match (&self.rows, self.member) {
            (Some(rows), _) => {
                let op = Op::AllGather { first: rows.start, batch: self.batch, sequence: self.sequence };
                g.forward(op, &[x])
            }
            (None, Some(_)) => g.forward(Op::Spread, &[x]),
            (None, None) => Ok(x),
        }
    }

    /// The sum of what they compute: of this one's tokens.
    fn sum(&self, g: &mut Graph, x: ValueId) -> Result<ValueId> {
        match (&self.rows, self.member) {
            (Some(rows), _) => g.forward(Op::ReduceScatter { first: rows.start, count: rows.len() }, &[x]),
            (None, Some(_)) => g.forward(Op::Sum { exact: false }, &[x]),
            (None, None) => Ok(x),
        }
    }
}

/// The parts of a model that may not be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layer {
    Embedding,
    /// The first half of a block, and the second.
    Attention(usize),
    Mlp(usize),
    Head,
}

/// The kinds of layers: all of a kind are alike, but for what an adapter leaves out.
pub const KINDS: [&str; 4] = ["embedding", "attention", "mlp", "head"];

/// Those of [`KINDS`] that blocks are made of.
pub const OF_BLOCK: std::ops::Range<usize> = 1..3;

/// A model: its layers in order, each with parameters and a way to append itself to a graph.
#[derive(Clone, Debug)]
pub struct Model {
    config: ModelConfig,
    layers: Vec<Layer>,
    adapter: Option<Lora>,
    weights: Weights,
    shared: bool,
    logits: u64,
}

impl Model {
    /// Checks the extents.
    pub fn new(config: &ModelConfig) -> Result<Model> {
        config.check()?;
        let block = |i: usize| match config.kind {
            Kind::Mlp => vec![Layer::Mlp(i)],
            _ => vec![Layer::Attention(i), Layer::Mlp(i)],
        };
        let blocks = (0..config.layers).flat_map(block);
        let layers = [Layer::Embedding].into_iter().chain(blocks).chain([Layer::Head]).collect();
        Ok(Model {
            config: config.canonical(),
            layers,
            adapter: None,
            weights: Weights::F32,
            shared: false,
            logits: LOGIT_BYTES,
        })
    }

    /// As [`Model::new`] with an adapter, if there is one: then its matrices alone are trained.
    pub fn with_adapter(config: &ModelConfig, adapter: Option<&Lora>) -> Result<Model> {
        let mut model = Model::new(config)?;
        if let Some(adapter) = adapter {
            adapter.check(&model)?;
            model.adapter = Some(adapter.clone());
        }
        Ok(model)
    }

    /// The same model with its matrices stored so.
    pub fn with_weights(self, weights: Weights) -> Model {
        Model { weights, ..self }
    }

    /// The same model for sequences that may each hold several texts, which do not see one another: each token then comes
    /// with the place where its text begins, and places in the sequence count from there.
    pub fn with_shared_sequences(self, shared: bool) -> Model {
        Model { shared, ..self }
    }

    /// The same model, of whose logits at most so many bytes exist at once ([`StageGraph::divide_logits`]).
    pub fn with_logits(self, bytes: u64) -> Model {
        Model { logits: bytes, ..self }
    }

    /// Bytes of logits that exist at once, at most.
    pub fn logits(&self) -> u64 {
        self.logits
    }

    /// How its matrices are stored.
    pub fn weights(&self) -> Weights {
        self.weights
    }

    /// The adapter that it was made with.
    pub fn adapter(&self) -> Option<&Lora> {
        self.adapter.as_ref()
    }

    /// Ends of the names of the modules that the adapter has, those of blocks without the block's number, sorted.
    pub fn adapted_parts(&self) -> Vec<String> {
        let modules = self.adapter.iter().flat_map(|adapter| &adapter.modules);
        let mut parts: Vec<String> = modules.map(|name| lora::part(name).to_string()).collect();
        parts.sort();
        parts.dedup();
        parts
    }

    /// The same model with so many blocks, each with every part that the adapter has in some block.
    pub fn with_blocks(&self, layers: usize) -> Result<Model> {
        let kept = |model: Model| {
            model.with_weights(self.weights).with_shared_sequences(self.shared).with_logits(self.logits)
        };
        let model = kept(Model::new(&ModelConfig { layers, ..self.config.clone() })?);
        let Some(adapter) = &self.adapter else { return Ok(model) };
        let parts = self.adapted_parts();
        let names = model.linear_layers().into_iter().map(|layer| layer.name);
        let modules = names.filter(|name| parts.iter().any(|part| part == lora::part(name))).collect();
        let adapted = Model::with_adapter(model.config(), Some(&Lora { modules, ..adapter.clone() }))?;
        Ok(kept(adapted))
    }

    /// The linear layers, in model order.
    pub fn linear_layers(&self) -> Vec<Linear> {
        self.parameters().iter().filter(|p| !p.is_lora()).filter_map(Linear::of).collect()
    }

    /// The extents it was made with, in [`ModelConfig::canonical`] form.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Number of layers, embedding and head included.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// How many layers a block is.
    pub fn layers_of_block(&self) -> usize {
        if self.config.kind == Kind::Mlp { 1 } else { 2 }
    }

    /// How many layers a layer counts for among people: half a block is one half.
    pub fn layer_size(&self, layer: usize) -> Layers {
        match (self.layers[layer], self.config.kind) {
            (Layer::Embedding | Layer::Head, _) | (_, Kind::Mlp) => Layers::ONE,
            (Layer::Attention(_) | Layer::Mlp(_), _) => Layers::HALF,
        }
    }

    /// Where each layer begins, and where the last one ends.
    pub fn layer_starts(&self) -> Vec<Layers> {
        Layers::starts((0..self.layers()).map(|layer| self.layer_size(layer)))
    }

    /// A layer's name for people: `embedding`, `attention of block 3`, `mlp of block 3`, `head`; `block 3` where it is whole.
    pub fn layer_name(&self, layer: usize) -> String {
        match (self.layers[layer], self.config.kind) {
            (Layer::Embedding, _) => "embedding".into(),
            (Layer::Mlp(i), Kind::Mlp) => format!("block {i}"),
            (Layer::Attention(i), _) => format!("attention of block {i}"),
            (Layer::Mlp(i), _) => format!("mlp of block {i}"),
            (Layer::Head, _) => "head".into(),
        }
    }

    /// Whether a layer has attention.
    pub fn attends(&self, layer: usize) -> bool {
        matches!(self.layers[layer], Layer::Attention(_))
    }

    /// The kind of a layer, of [`KINDS`].
    pub fn layer_kind(&self, layer: usize) -> usize {
        match self.layers[layer] {
            Layer::Embedding => 0,
            Layer::Attention(_) => 1,
            Layer::Mlp(_) => 2,
            Layer::Head => 3,
        }
    }

    /// Parameters of one layer, in the order in which its graph uses them; those of an adapter come last.
    pub fn layer_parameters(&self, layer: usize) -> Vec<Parameter> {
        let c = &self.config;
        let mut parameters = match self.layers[layer] {
            Layer::Embedding if c.kind.is_llama() => llama::embedding_parameters(c),
            Layer::Embedding => gpt2::embedding_parameters(c),
            Layer::Attention(i) if c.kind.is_llama() => llama::attention_parameters(c, i),
            Layer::Attention(i) => gpt2::attention_parameters(c, i),
            Layer::Mlp(i) if c.kind.is_llama() => llama::mlp_parameters(c, i),
            Layer::Mlp(i) => gpt2::mlp_parameters(c, i),
            Layer::Head if c.kind.is_llama() => llama::head_parameters(c),
            Layer::Head => gpt2::head_parameters(c),
        };
        // Read as B of a matmul or as tables, and by nothing else.
        for matrix in parameters.iter_mut().filter(|p| p.shape.len() == 2) {
            matrix.weights = self.weights;
        }
        if let Some(adapter) = &self.adapter {
            adapter.extend(&mut parameters);
        }
        parameters
    }

    /// What a member of a gang has of the parameters of one layer, in the same order.
    pub fn parts(&self, layer: usize, member: Option<&Member>) -> Vec<Parameter> {
        let all = self.layer_parameters(layer);
        match member {
            Some(member) => all.into_iter().flat_map(|p| member.parts(&self.config, p)).collect(),
            None => all,
        }
    }

    /// Whether a layer before this one has something to train.
    pub fn trains_before(&self, layer: usize) -> bool {
        (0..layer).any(|layer| self.layer_parameters(layer).iter().any(|p| !p.frozen))
    }

    /// All parameters in model order: the order of every sum over parameters.
    pub fn parameters(&self) -> Vec<Parameter> {
        (0..self.layers()).flat_map(|layer| self.layer_parameters(layer)).collect()
    }

    /// Elements of all parameters, tied ones counted once.
    pub fn parameter_count(&self) -> usize {
        self.parameters().iter().filter(|p| p.tied_to.is_none()).map(Parameter::len).sum()
    }

    /// Elements of those that are trained.
    pub fn trained_count(&self) -> usize {
        let parameters = self.parameters().into_iter().filter(|p| p.tied_to.is_none() && !p.frozen);
        parameters.map(|p| p.len()).sum()
    }

    /// The graph of layers `range` for microbatches of `batch` sequences of `sequence` tokens: forward, and for
    /// training the backward pass, differentiated and fused.
    ///
    /// Where sequences are [shared](Model::with_shared_sequences), `starts` u32(B,T) is fed to stages with attention: the
    /// place in its sequence where the text of each token begins; and `places` u32(B,T), the places from there, where the
    /// model has learnt positions.
    ///
    /// For [`Purpose::Decode`] the `sequence` tokens are new ones that follow those in the caches, and more is fed:
    /// `positions` u32(B,T), the place of each new token in its sequence, consecutive; for each block `i` of the stage
    /// `cache i` (B, capacity, 2KD), which every run adds to and nobody uploads; and, where the head is in the stage and
    /// `sequence` > 1, `last` u32(B,1), the rows among the B·T whose logits (B,1,V) are wanted.
    pub fn stage_graph(
        &self,
        range: std::ops::Range<usize>,
        batch: usize,
        sequence: usize,
        purpose: Purpose,
    ) -> Result<StageGraph> {
        self.part_of_stage(range, batch, sequence, purpose, None)
    }

    /// As [`Model::stage_graph`] what a member of a gang computes of it. Of `tokens` those of others are beyond its part of the
    /// table; targets are those of the whole vocabulary; logits are of its tokens. Where members divide tokens, what comes from
    /// the stage before and goes to the next is (R,C), its R of the B·T.
    pub fn part_of_stage(
        &self,
        range: std::ops::Range<usize>,
        batch: usize,
        sequence: usize,
        purpose: Purpose,
        member: Option<&Member>,
    ) -> Result<StageGraph> {
        let capacity = if let Purpose::Decode { capacity } = purpose { Some(capacity) } else { None };
        let (longest, most) = (capacity.unwrap_or(sequence).max(sequence), self.config.longest_sequence());
        if longest > most {
            let key = if most < self.config.context { "model.sliding_window" } else { "model.context" };
            return Err(Error::config(key, format!("a sequence of {longest} tokens is longer than {most}")));
        }
        if self.config.kind.is_llama() && longest * self.config.head_dim() > MOST_ANGLES {
            let most = MOST_ANGLES / self.config.head_dim();
            let message =
                format!("{longest} tokens are more than the {most} for which rotary positions are made");
            return Err(Error::config("sequence", message));
        }
        let mut graph = Graph::default();
        let width = self.config.width;
        let positions = capacity.map(|_| graph.input(Fed::Positions, &[batch, sequence]));
        let shared = self.shared && capacity.is_none();
        let starts = (shared && range.clone().any(|layer| self.attends(layer)))
            .then(|| graph.input(Fed::Starts, &[batch, sequence]));
        let lora = self.adapter.as_ref();
        // Of the one token of each text that grows there is nothing to divide.
        let divides = member.filter(|_| capacity.is_none());
        let rows = divides.map(|member| member.rows(batch * sequence)).transpose()?.flatten();
        let between = rows.as_ref().map_or(vec![batch, sequence, width], |rows| vec![rows.len(), width]);
        let run = Run { batch, sequence, positions, capacity, shared, starts, lora, member, rows };
        let input = (range.start > 0).then(|| graph.input(Fed::Input, &between));
        let mut x = input;
        let mut boundaries = Vec::new();
        for layer in range.clone() {
            let y = self.append(&mut graph, layer, x, &run)?;
            // A block is computed again as a whole.
            if !self.attends(layer) {
                boundaries.push(y);
            }
            x = Some(y);
        }
        let last = range.end == self.layers();
        let cross_entropy = |graph: &mut Graph, tokens: usize| {
            let logits = x.ok_or_else(empty_stage)?;
            let targets = graph.input(Fed::Targets, &[batch, sequence]);
            let scale = 1.0 / tokens as f32;
            let Some(Member { number, division, vocabulary, .. }) = member else {
                return graph.forward(Op::CrossEntropy { scale }, &[logits, targets]);
            };
            let (first, vocabulary) = (vocabulary.start, self.config.vocabulary);
            let op = Op::LogitStatistics { member: *number, members: division.members(), first };
            let statistics = graph.forward(op, &[logits, targets])?;
            let statistics = graph.forward(Op::Sum { exact: true }, &[statistics])?;
            let op = Op::CrossEntropyPart { scale, first, vocabulary };
            graph.forward(op, &[logits, targets, statistics])
        };
        let forward = |graph, output, loss| StageGraph {
            graph,
            input,
            output,
            d_output: None,
            d_input: None,
            loss,
            gradients: Vec::new(),
            boundaries: Vec::new(),
        };
        let differentiated = input.filter(|_| self.trains_before(range.start));
        let mut stage = match purpose {
            Purpose::Evaluation if last => {
                let loss = cross_entropy(&mut graph, batch * sequence)?;
                forward(graph, None, Some(loss))
            }
            Purpose::Evaluation | Purpose::Inference | Purpose::Decode { .. } => forward(graph, x, None),
            Purpose::Training { tokens } if last => {
                cross_entropy(&mut graph, tokens)?;
                differentiate(graph, differentiated, None)?
            }
            Purpose::Training { .. } => differentiate(graph, differentiated, x)?,
        };
        stage.input = input;
        stage.boundaries = boundaries;
        stage.gather_again();
        fuse::fuse(&mut stage);
        stage.divide_logits(self.logits)?;
        stage.graph.verify()?;
        Ok(stage)
    }

    fn append(&self, graph: &mut Graph, layer: usize, x: Option<ValueId>, run: &Run) -> Result<ValueId> {
        let c = &self.config;
        let weight = |p: &Parameter| {
            let id = match p.frozen {
                true => graph.frozen(&p.name, &p.shape),
                false => graph.parameter(&p.name, &p.shape),
            };
            if p.weights.packed() {
                graph.pack(id);
            }
            id
        };
        let w: Vec<ValueId> = self.parts(layer, run.member).iter().map(weight).collect();
        match (self.layers[layer], x) {
            (Layer::Embedding, _) => {
                let tokens = graph.input(Fed::Tokens, &[run.batch, run.sequence]);
                let x = match run.positions {
                    // Positions are the first member's alone.
                    _ if w.len() == 1 => graph.forward(Op::Gather, &[tokens, w[0]]),
                    None if run.shared => {
                        let places = graph.input(Fed::Places, &[run.batch, run.sequence]);
                        graph.forward(Op::Embedding { places: true }, &[tokens, w[0], w[1], places])
                    }
                    None => graph.forward(Op::Embedding { places: false }, &[tokens, w[0], w[1]]),
                    Some(positions) => {
                        let tokens = graph.forward(Op::Gather, &[tokens, w[0]])?;
                        let positions = graph.forward(Op::Gather, &[positions, w[1]])?;
                        graph.forward(Op::Add, &[tokens, positions])
                    }
                }?;
                run.sum(graph, x)
            }
            (Layer::Attention(i), Some(x)) if c.kind.is_llama() => llama::attention(graph, c, i, x, &w, run),
            (Layer::Attention(i), Some(x)) => gpt2::attention(graph, c, i, x, &w, run),
            (Layer::Mlp(_), Some(x)) if c.kind.is_llama() => llama::mlp(graph, c, x, &w, run),
            (Layer::Mlp(_), Some(x)) => gpt2::mlp(graph, c, x, &w, run),
            (Layer::Head, Some(mut x)) => {
                if run.capacity.is_some() && run.sequence > 1 {
                    let last = graph.input(Fed::Last, &[run.batch, 1]);
                    x = graph.forward(Op::Gather, &[last, x])?;
                }
                if c.kind.is_llama() {
                    llama::head(graph, c, x, &w, run)
                } else {
                    gpt2::head(graph, c, x, &w, run)
                }
            }
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
        if self.adapter.is_some() {
            return (0..self.layers()).map(flops).collect();
        }
        // All blocks are alike.
        let block = (1..1 + self.layers_of_block()).map(flops).collect::<Result<Vec<f64>>>()?;
        let (first, last) = (flops(0)?, flops(self.layers() - 1)?);
        let blocks = block.iter().copied().cycle().take(self.layers() - 2);
        Ok([first].into_iter().chain(blocks).chain([last]).collect())
    }

    /// The Hugging Face `config.json` of this model.
    pub fn hugging_face_config(&self) -> serde_json::Value {
        hugging_face::write(&self.config)
    }

    /// Reads a Hugging Face `config.json`; the error names the key that is missing or not supported.
    pub fn from_hugging_face(json: &serde_json::Value) -> Result<Model> {
        Model::new(&hugging_face::read(json)?)
    }
}

/// Attention of a section of block `i`, of H and K heads, on packed queries, keys and values: over the sequence, or over its cache.
fn attend(
    g: &mut Graph,
    c: &ModelConfig,
    (i, section, [heads, kv_heads]): (usize, usize, [usize; 2]),
    qkv: ValueId,
    run: &Run,
) -> Result<ValueId> {
    let (Some(positions), Some(capacity)) = (run.positions, run.capacity) else {
        let op = Op::Attention { heads, kv_heads, starts: run.starts.is_some() };
        return g.forward(op, &[&[qkv], run.starts.as_slice()].concat());
    };
    let shape = [run.batch, capacity, 2 * kv_heads * c.head_dim()];
    let cache = g.input(Fed::Cache(i, section), &shape);
    g.forward(Op::AttentionCached { heads, kv_heads }, &[qkv, positions, cache])
}

fn empty_stage() -> Error {
    Error::Shape { op: "stage", message: "a stage needs at least one layer and an input".into() }
}
