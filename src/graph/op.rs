//! The vocabulary: every op with its arguments, results, shape rule and cost. Its gradient is in `autodiff`, its
//! definition in `reference`, its kernels in `ops`.

use crate::error::{Error, Result};

/// How a matmul reads its operands; the names are BLAS's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layout {
    /// A(M,K) · B(K,N): a forward pass with weights stored (in, out), as GPT-2's are.
    NN,
    /// A(M,K) · B(N,K)ᵀ: the gradient of the input, or a head tied to the embedding.
    NT,
    /// A(K,M)ᵀ · B(K,N): the gradient of a weight, summed over rows.
    TN,
}

/// What a matmul applies to each element before it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Epilogue {
    /// Nothing.
    None,
    /// + bias(N).
    Bias,
    /// u = x + bias(N); results gelu(u), u.
    BiasGelu,
    /// + bias(N) + residual(M,N).
    BiasResidual,
    /// + residual(M,N).
    Residual,
    /// · gelu'(u(M,N)).
    GeluBackward,
}

/// Elementwise functions of one variable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// x/2 · (1 + tanh(√(2/π)(x + 0.044715x³))): Hugging Face's `gelu_new`.
    GeluTanh,
}

/// An operation; arguments and results are listed as `(arguments) → (results)`.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// (tokens u32(B,T), table(V,C), positions(P,C)\[, places u32(B,T)\]) → (x(B,T,C)): x = table\[token\] +
    /// positions\[place\], without the first for a token beyond the table.
    Embedding {
        /// Whether the fourth argument is there; without it a token's place is that in the sequence, t.
        places: bool,
    },
    /// (dx(B,T,C), segments u32(G,3), order u32(M)) → (dtable(V,C)). Segment (id, start, end) lists the rows
    /// `order[start..end]` of dx that belong to token id; an empty segment is skipped.
    EmbeddingBackward {
        /// Rows of the table.
        vocabulary: usize,
    },
    /// (rows u32(..), table(..,C)) → (x(..,C)): row number `rows` of the table, whose leading axes count as one; zeros for a
    /// row beyond it.
    Gather,
    /// (dx(B,T,C)) → (dpositions(P,C)): the sum over sequences.
    PositionBackward {
        /// Rows of the position table; those past T get nothing.
        context: usize,
    },
    /// (x(..,C), gain(C), bias(C)) → (y(..,C), statistics(M,2) = mean and 1/σ).
    LayerNorm {
        /// Added to the variance.
        epsilon: f32,
    },
    /// (dy, x, gain(C), statistics\[, residual\]) → (dx): with `residual`, another gradient of x is added.
    LayerNormBackward {
        /// Whether the fifth argument is there.
        residual: bool,
    },
    /// (dy, x, statistics) → (dgain(C), dbias(C)).
    LayerNormWeightBackward,
    /// (x(..,nC), gain(C)) → (y(..,nC), statistics(M) = 1/√(mean x² + ε)): each run of C neighbours is a row of its own,
    /// so that heads are normalised one by one (Zhang and Sennrich 2019, arXiv 1910.07467).
    RmsNorm {
        /// Added to the mean of squares.
        epsilon: f32,
    },
    /// (dy, x, gain(C), statistics(M)\[, residual\]) → (dx): with `residual`, another gradient of x is added.
    RmsNormBackward {
        /// Whether the fifth argument is there.
        residual: bool,
    },
    /// (dy, x, statistics(M)) → (dgain(C)).
    RmsNormWeightBackward,
    /// (a, b \[, bias(N)\]\[, residual or u (M,N)\]) → (c \[, u\]); rows of c take a's leading axes for NN and NT.
    Matmul {
        /// Which operand is read transposed.
        layout: Layout,
        /// Fused tail.
        epilogue: Epilogue,
    },
    /// (x(..,N), bias(N)) → (x + bias).
    AddBias,
    /// (a, b) → (a + b), same shape.
    Add,
    /// (x) → (factor · x).
    Scale {
        /// What every element is multiplied by.
        factor: f32,
    },
    /// (x) → (f(x)).
    Activate(Activation),
    /// (dy, x) → (dy · f'(x)).
    ActivateBackward(Activation),
    /// (gate, up) → (silu(gate) · up) with silu(x) = x / (1 + exp(−x)) (Shazeer 2020, arXiv 2002.05202).
    SwiGlu,
    /// (dy, gate, up) → (dgate, dup).
    SwiGluBackward,
    /// (x(..,N)) → (sum over rows (N)).
    ColumnSum,
    /// (q(B,T,HD), k(B,T,KD), v(B,T,KD), table(P,D)\[, positions u32(B,T)\]) → (qkv(B,T,(H+2K)D)): turns each pair
    /// (i, i + D/2) of every head of q and k by the angle of its position (Su et al. 2021, arXiv 2104.09864) and packs
    /// the three for [`Op::Attention`]. Row t of the table holds D/2 cosines, then D/2 sines.
    Rope {
        /// H.
        heads: usize,
        /// K.
        kv_heads: usize,
        /// Whether the fifth argument is there; without it a token's position is its place in the sequence.
        positions: bool,
    },
    /// (dqkv(B,T,(H+2K)D), table(P,D)\[, positions u32(B,T)\]) → (dq, dk, dv): the turns the other way.
    RopeBackward {
        /// H.
        heads: usize,
        /// K.
        kv_heads: usize,
        /// Whether the third argument is there.
        positions: bool,
    },
    /// (qkv(B,T,(H+2K)D)\[, starts u32(B,T)\]) → (o(B,T,HD), lse(B,H,T)): causal, scaled by 1/√D; the last axis holds H
    /// heads of q, K of k, K of v, and H/K neighbouring query heads share a key-value head (Ainslie et al. 2023, arXiv
    /// 2305.13245). A token at t sees those from `starts` to t; starts do not fall within a sequence, so several texts can
    /// share one and not see each other.
    Attention {
        /// H.
        heads: usize,
        /// K; divides H.
        kv_heads: usize,
        /// Whether the second argument is there; without it a token sees all before it.
        starts: bool,
    },
    /// (do(B,T,HD), qkv(B,T,(H+2K)D), o(B,T,HD), lse(B,H,T)\[, starts u32(B,T)\]) → (dqkv(B,T,(H+2K)D), delta(B,H,T) =
    /// Σ do∘o).
    AttentionBackward {
        /// H.
        heads: usize,
        /// K; divides H.
        kv_heads: usize,
        /// Whether the fifth argument is there.
        starts: bool,
    },
    /// (qkv(B,T,(H+2K)D), positions u32(B,T), cache(B,P,2KD)) → (o(B,T,HD), cache(B,P,2KD)): attention of T new tokens
    /// at consecutive `positions` to everything at or before them. The new keys and values are written, in place, into
    /// the rows of the cache that `positions` names (K heads of k, then K of v); a row past a token's position is not
    /// read.
    AttentionCached {
        /// H.
        heads: usize,
        /// K; divides H.
        kv_heads: usize,
    },
    /// (logits(B,T,V), targets u32(B,T)) → (loss(M), dlogits(B,T,V) = scale · (softmax − onehot)); dlogits takes
    /// the place of the logits in memory.
    CrossEntropy {
        /// 1 / (tokens of the whole batch), so that gradients are those of the batch's mean loss.
        scale: f32,
    },
    /// (x) → (the sum of x over the members of a gang), in the place of x in memory. No kernel: it passes the host, which
    /// adds in the order of the members. Its gradient is what comes (Shoeybi et al. 2019, arXiv 1909.08053: g).
    Sum {
        /// Whether the terms travel as they are, whatever else does.
        exact: bool,
    },
    /// (x(R,..)) → (rows `first` to `first + count` of its first axis), in the same memory. No kernel.
    Slice {
        /// The first row.
        first: usize,
        /// How many.
        count: usize,
    },
    /// (parts(R,..)) → (their rows, one part's after another's), in the same memory. No kernel.
    Stack {
        /// How many.
        parts: usize,
    },
    /// (x) → (x), which every member of a gang goes on with: the gradient is the sum of theirs (f, ibid.). Nothing but this
    /// is left of it after differentiation.
    Spread,
    /// (x) → (rows `first` to `first + count` of the sum of x over the members of a gang): of all axes but the last, one row after
    /// another. No kernel, as [`Op::Sum`]. Its gradient is that of all rows, gathered (Korthikanti et al. 2022, arXiv 2205.05198:
    /// ḡ).
    ReduceScatter {
        /// The first row that the member has.
        first: usize,
        /// How many it has.
        count: usize,
    },
    /// (x(R,C)) → (y(B,T,C)): the rows of all members of a gang, of which this one's are R from `first` on. No kernel. Its gradient
    /// is the sum of theirs, scattered (g, ibid.).
    AllGather {
        /// The first row that the member has.
        first: usize,
        /// B.
        batch: usize,
        /// T.
        sequence: usize,
    },
    /// (logits(B,T,V), targets u32(B,T)) → (statistics(G,M,3)): of a member's part V of a vocabulary, for each row in the
    /// member's own place m of G the maximum, Σ exp(logit − maximum) and the target's logit, 0 where that is another's; 0 in
    /// the places of others, so that a [`Op::Sum`] gives all of them.
    LogitStatistics {
        /// m.
        member: usize,
        /// G.
        members: usize,
        /// The token that the first column is about.
        first: usize,
    },
    /// (logits(B,T,V), targets u32(B,T), statistics(G,M,3)) → (loss(M), dlogits(B,T,V) = scale · (softmax − onehot)) of the
    /// whole vocabulary, for the part of it that a member has; dlogits takes the place of the logits in memory.
    CrossEntropyPart {
        /// As that of [`Op::CrossEntropy`].
        scale: f32,
        /// The token that the first column is about.
        first: usize,
        /// Tokens of the whole vocabulary: a target beyond them does not count.
        vocabulary: usize,
    },
}

fn product(shape: &[usize]) -> usize {
    shape.iter().product()
}

fn rows(shape: &[usize]) -> usize {
    product(&shape[..shape.len() - 1])
}

fn last(shape: &[usize]) -> usize {
    shape[shape.len() - 1]
}

/// D of a packed (B,T,(H+2K)D) tensor, if it is one.
fn head_size(qkv: &[usize], heads: usize, kv_heads: usize) -> Option<usize> {
    let slots = heads + 2 * kv_heads;
    let ok = qkv.len() == 3
        && kv_heads > 0
        && heads > 0
        && heads.is_multiple_of(kv_heads)
        && qkv[2].is_multiple_of(slots);
    ok.then(|| qkv[2] / slots)
}

/// H / (H + 2K): how much of a packed tensor are queries.
fn query_share(heads: usize, kv_heads: usize) -> f64 {
    heads as f64 / (heads + 2 * kv_heads) as f64
}

/// Whether a table (P,D) of cosines and sines serves the tokens of `x` (B,T,..), placed by `positions` if given.
fn rotates(table: &[usize], x: &[usize], positions: Option<&&[usize]>) -> bool {
    table.len() == 2
        && table[1].is_multiple_of(2)
        && positions.map_or(table[0] >= x[1], |positions| **positions == x[..2])
}

impl Op {
    /// The op's name in messages, tables and file names.
    pub fn name(&self) -> &'static str {
        match self {
            Op::Embedding { .. } => "embedding",
            Op::EmbeddingBackward { .. } => "embedding_backward",
            Op::Gather => "gather",
            Op::PositionBackward { .. } => "position_backward",
            Op::LayerNorm { .. } => "layernorm",
            Op::LayerNormBackward { .. } => "layernorm_backward",
            Op::LayerNormWeightBackward => "layernorm_weight_backward",
            Op::RmsNorm { .. } => "rmsnorm",
            Op::RmsNormBackward { .. } => "rmsnorm_backward",
            Op::RmsNormWeightBackward => "rmsnorm_weight_backward",
            Op::Matmul { .. } => "matmul",
            Op::AddBias => "add_bias",
            Op::Add => "add",
            Op::Scale { .. } => "scale",
            Op::Activate(Activation::GeluTanh) => "gelu",
            Op::ActivateBackward(Activation::GeluTanh) => "gelu_backward",
            Op::SwiGlu => "swiglu",
            Op::SwiGluBackward => "swiglu_backward",
            Op::ColumnSum => "column_sum",
            Op::Rope { .. } => "rope",
            Op::RopeBackward { .. } => "rope_backward",
            Op::Attention { .. } => "attention",
            Op::AttentionBackward { .. } => "attention_backward",
            Op::AttentionCached { .. } => "attention_cached",
            Op::CrossEntropy { .. } => "cross_entropy",
            Op::Sum { .. } => "sum",
            Op::Slice { .. } => "slice",
            Op::Stack { .. } => "stack",
            Op::Spread => "spread",
            Op::ReduceScatter { .. } => "reduce_scatter",
            Op::AllGather { .. } => "all_gather",
            Op::LogitStatistics { .. } => "logit_statistics",
            Op::CrossEntropyPart { .. } => "cross_entropy_part",
        }
    }

    fn refuse<T>(&self, message: String) -> Result<T> {
        Err(Error::Shape { op: self.name(), message })
    }

    fn expect(&self, ok: bool, shapes: &[&[usize]]) -> Result<()> {
        if ok { Ok(()) } else { self.refuse(format!("does not accept shapes {shapes:?}")) }
    }

    /// Whether the members of a gang do it together: no kernel does.
    pub fn is_collective(&self) -> bool {
        matches!(self, Op::Sum { .. } | Op::ReduceScatter { .. } | Op::AllGather { .. })
    }

    /// Number of arguments.
    pub fn arity(&self) -> usize {
        match self {
            Op::PositionBackward { .. }
            | Op::Scale { .. }
            | Op::Activate(_)
            | Op::ColumnSum
            | Op::Sum { .. }
            | Op::Slice { .. }
            | Op::Spread
            | Op::ReduceScatter { .. }
            | Op::AllGather { .. } => 1,
            Op::Stack { parts } => *parts,
            Op::Attention { starts, .. } => 1 + usize::from(*starts),
            Op::AddBias
            | Op::Add
            | Op::ActivateBackward(_)
            | Op::CrossEntropy { .. }
            | Op::LogitStatistics { .. }
            | Op::Gather
            | Op::RmsNorm { .. }
            | Op::SwiGlu => 2,
            Op::RopeBackward { positions, .. } => 2 + usize::from(*positions),
            Op::RmsNormWeightBackward
            | Op::SwiGluBackward
            | Op::AttentionCached { .. }
            | Op::CrossEntropyPart { .. } => 3,
            Op::Rope { positions, .. } => 4 + usize::from(*positions),
            Op::Embedding { places } => 3 + usize::from(*places),
            Op::EmbeddingBackward { .. } | Op::LayerNorm { .. } | Op::LayerNormWeightBackward => 3,
            Op::LayerNormBackward { residual } | Op::RmsNormBackward { residual } => {
                4 + usize::from(*residual)
            }
            Op::Matmul { epilogue, .. } => match epilogue {
                Epilogue::None => 2,
                Epilogue::Bias | Epilogue::BiasGelu | Epilogue::GeluBackward | Epilogue::Residual => 3,
                Epilogue::BiasResidual => 4,
            },
            Op::AttentionBackward { starts, .. } => 4 + usize::from(*starts),
        }
    }

    /// Whether an argument may be packed as bf16: B of a matmul, and tables.
    pub fn reads_packed(&self, argument: usize) -> bool {
        match self {
            Op::Matmul { .. } | Op::Gather => argument == 1,
            Op::Slice { .. } => true,
            Op::Embedding { .. } => argument == 1 || argument == 2,
            _ => false,
        }
    }

    /// M, N, K of a matmul, from the shapes of its first two arguments.
    pub fn matmul_extents(layout: Layout, a: &[usize], b: &[usize]) -> (usize, usize, usize) {
        match layout {
            Layout::NN => (rows(a), last(b), last(a)),
            Layout::NT => (rows(a), rows(b), last(a)),
            Layout::TN => (last(a), last(b), rows(a)),
        }
    }

    /// Shapes of the results, or an error that names op and shapes.
    pub fn infer(&self, shapes: &[&[usize]]) -> Result<Vec<Vec<usize>>> {
        if shapes.len() != self.arity() {
            return self.refuse(format!("takes {} arguments, not {}", self.arity(), shapes.len()));
        }
        if shapes.iter().any(|s| s.is_empty() || s.contains(&0)) {
            return self.refuse(format!("does not accept empty shapes {shapes:?}"));
        }
        match *self {
            Op::Embedding { .. } => {
                let [tokens, table, positions] = [shapes[0], shapes[1], shapes[2]];
                let ok = tokens.len() == 2
                    && table.len() == 2
                    && positions.len() == 2
                    && last(table) == last(positions)
                    && match shapes.get(3) {
                        Some(places) => *places == tokens,
                        None => tokens[1] <= positions[0],
                    };
                self.expect(ok, shapes)?;
                Ok(vec![vec![tokens[0], tokens[1], table[1]]])
            }
            Op::EmbeddingBackward { vocabulary } => {
                let ok = last(shapes[1]) == 3 && product(shapes[2]) == rows(shapes[0]);
                self.expect(ok, shapes)?;
                Ok(vec![vec![vocabulary, last(shapes[0])]])
            }
            Op::Gather => {
                self.expect(shapes[1].len() >= 2, shapes)?;
                Ok(vec![[shapes[0], &[last(shapes[1])]].concat()])
            }
            Op::PositionBackward { context } => {
                self.expect(shapes[0].len() == 3 && shapes[0][1] <= context, shapes)?;
                Ok(vec![vec![context, shapes[0][2]]])
            }
            Op::LayerNorm { .. } => {
                let c = last(shapes[0]);
                self.expect(shapes[1] == [c] && shapes[2] == [c], shapes)?;
                Ok(vec![shapes[0].to_vec(), vec![rows(shapes[0]), 2]])
            }
            Op::LayerNormBackward { .. } => {
                let x = shapes[1];
                let ok = shapes[0] == x
                    && shapes[2] == [last(x)]
                    && shapes[3] == [rows(x), 2]
                    && shapes.get(4).is_none_or(|r| *r == x);
                self.expect(ok, shapes)?;
                Ok(vec![x.to_vec()])
            }
            Op::LayerNormWeightBackward => {
                let x = shapes[1];
                self.expect(shapes[0] == x && shapes[2] == [rows(x), 2], shapes)?;
                Ok(vec![vec![last(x)], vec![last(x)]])
            }
            Op::RmsNorm { .. } => {
                let (x, gain) = (shapes[0], shapes[1]);
                self.expect(gain.len() == 1 && last(x).is_multiple_of(gain[0]), shapes)?;
                Ok(vec![x.to_vec(), vec![product(x) / gain[0]]])
            }
            Op::RmsNormBackward { .. } => {
                let (x, gain) = (shapes[1], shapes[2]);
                let ok = shapes[0] == x
                    && gain.len() == 1
                    && last(x).is_multiple_of(gain[0])
                    && shapes[3] == [product(x) / gain[0]]
                    && shapes.get(4).is_none_or(|r| *r == x);
                self.expect(ok, shapes)?;
                Ok(vec![x.to_vec()])
            }
            Op::RmsNormWeightBackward => {
                let (x, statistics) = (shapes[1], shapes[2]);
                let columns = product(x) / statistics[0];
                let ok = shapes[0] == x
                    && statistics.len() == 1
                    && columns > 0
                    && last(x).is_multiple_of(columns)
                    && columns * statistics[0] == product(x);
                self.expect(ok, shapes)?;
                Ok(vec![vec![columns]])
            }
            Op::Matmul { layout, epilogue } => {
                let (a, b) = (shapes[0], shapes[1]);
                let (m, n, k) = Op::matmul_extents(layout, a, b);
                let inner = match layout {
                    Layout::NN => rows(b),
                    Layout::NT => last(b),
                    Layout::TN => rows(b),
                };
                let c = match layout {
                    Layout::TN => vec![m, n],
                    Layout::NN | Layout::NT => [&a[..a.len() - 1], &[n]].concat(),
                };
                let extra_ok = match epilogue {
                    Epilogue::None => true,
                    Epilogue::Bias | Epilogue::BiasGelu => shapes[2] == [n],
                    Epilogue::BiasResidual => shapes[2] == [n] && shapes[3] == c,
                    Epilogue::GeluBackward | Epilogue::Residual => shapes[2] == c,
                };
                self.expect(inner == k && extra_ok, shapes)?;
                Ok(if epilogue == Epilogue::BiasGelu { vec![c.clone(), c] } else { vec![c] })
            }
            Op::AddBias => {
                self.expect(shapes[1] == [last(shapes[0])], shapes)?;
                Ok(vec![shapes[0].to_vec()])
            }
            Op::Add | Op::ActivateBackward(_) | Op::SwiGlu => {
                self.expect(shapes[0] == shapes[1], shapes)?;
                Ok(vec![shapes[0].to_vec()])
            }
            Op::Activate(_) | Op::Scale { .. } | Op::Sum { .. } | Op::Spread => Ok(vec![shapes[0].to_vec()]),
            Op::ReduceScatter { first, count } => {
                self.expect(count > 0 && first + count <= rows(shapes[0]), shapes)?;
                Ok(vec![vec![count, last(shapes[0])]])
            }
            Op::AllGather { first, batch, sequence } => {
                let ok = shapes[0].len() == 2 && first + shapes[0][0] <= batch * sequence;
                self.expect(ok, shapes)?;
                Ok(vec![vec![batch, sequence, last(shapes[0])]])
            }
            Op::SwiGluBackward => {
                self.expect(shapes[0] == shapes[1] && shapes[0] == shapes[2], shapes)?;
                Ok(vec![shapes[0].to_vec(); 2])
            }
            Op::ColumnSum => Ok(vec![vec![last(shapes[0])]]),
            Op::Rope { heads, kv_heads, .. } => {
                let (q, k) = (shapes[0], shapes[1]);
                let size = last(shapes[3]);
                let ok = q.len() == 3
                    && q[2] == heads * size
                    && k == [q[0], q[1], kv_heads * size]
                    && k == shapes[2]
                    && rotates(shapes[3], q, shapes.get(4));
                self.expect(ok, shapes)?;
                Ok(vec![vec![q[0], q[1], (heads + 2 * kv_heads) * size]])
            }
            Op::RopeBackward { heads, kv_heads, .. } => {
                let qkv = shapes[0];
                let size = last(shapes[1]);
                let ok = qkv.len() == 3
                    && heads > 0
                    && kv_heads > 0
                    && qkv[2] == (heads + 2 * kv_heads) * size
                    && rotates(shapes[1], qkv, shapes.get(2));
                self.expect(ok, shapes)?;
                let part = |heads: usize| vec![qkv[0], qkv[1], heads * size];
                Ok(vec![part(heads), part(kv_heads), part(kv_heads)])
            }
            Op::Attention { heads, kv_heads, .. } => {
                let qkv = shapes[0];
                let Some(size) = head_size(qkv, heads, kv_heads) else {
                    return self.expect(false, shapes).map(|()| Vec::new());
                };
                self.expect(shapes.get(1).is_none_or(|starts| **starts == qkv[..2]), shapes)?;
                Ok(vec![vec![qkv[0], qkv[1], heads * size], vec![qkv[0], heads, qkv[1]]])
            }
            Op::AttentionBackward { heads, kv_heads, .. } => {
                let (d, qkv, o, lse) = (shapes[0], shapes[1], shapes[2], shapes[3]);
                let ok = head_size(qkv, heads, kv_heads).is_some_and(|size| {
                    d == o && o == [qkv[0], qkv[1], heads * size] && lse == [qkv[0], heads, qkv[1]]
                }) && shapes.get(4).is_none_or(|starts| **starts == qkv[..2]);
                self.expect(ok, shapes)?;
                Ok(vec![qkv.to_vec(), lse.to_vec()])
            }
            Op::AttentionCached { heads, kv_heads } => {
                let (qkv, positions, cache) = (shapes[0], shapes[1], shapes[2]);
                let Some(size) = head_size(qkv, heads, kv_heads) else {
                    return self.expect(false, shapes).map(|()| Vec::new());
                };
                let ok = positions == &qkv[..2]
                    && cache.len() == 3
                    && cache[0] == qkv[0]
                    && cache[1] >= qkv[1]
                    && cache[2] == 2 * kv_heads * size;
                self.expect(ok, shapes)?;
                Ok(vec![vec![qkv[0], qkv[1], heads * size], cache.to_vec()])
            }
            Op::Slice { first, count } => {
                self.expect(count > 0 && first.saturating_add(count) <= shapes[0][0], shapes)?;
                Ok(vec![[&[count], &shapes[0][1..]].concat()])
            }
            Op::Stack { .. } => {
                let alike = |part: &&[usize]| part[1..] == shapes[0][1..];
                self.expect(shapes.first().is_some_and(|_| shapes.iter().all(alike)), shapes)?;
                let rows = shapes.iter().map(|part| part[0]).sum();
                Ok(vec![[&[rows], &shapes[0][1..]].concat()])
            }
            Op::CrossEntropy { .. } => {
                self.expect(product(shapes[1]) == rows(shapes[0]), shapes)?;
                Ok(vec![vec![rows(shapes[0])], shapes[0].to_vec()])
            }
            Op::LogitStatistics { member, members, .. } => {
                self.expect(product(shapes[1]) == rows(shapes[0]) && member < members, shapes)?;
                Ok(vec![vec![members, rows(shapes[0]), 3]])
            }
            Op::CrossEntropyPart { first, vocabulary, .. } => {
                let (logits, statistics) = (shapes[0], shapes[2]);
                let ok = product(shapes[1]) == rows(logits)
                    && first + last(logits) <= vocabulary
                    && statistics.len() == 3
                    && statistics[1..] == [rows(logits), 3];
                self.expect(ok, shapes)?;
                Ok(vec![vec![rows(logits)], logits.to_vec()])
            }
        }
    }

    /// Floating-point operations for the given argument shapes; transcendental functions count a few.
    pub fn flops(&self, shapes: &[&[usize]]) -> f64 {
        let size = product(shapes[0]) as f64;
        match *self {
            Op::Matmul { layout, .. } => {
                let (m, n, k) = Op::matmul_extents(layout, shapes[0], shapes[1]);
                2.0 * m as f64 * n as f64 * k as f64
            }
            // Causal: half of two (forward) or five (backward, which recomputes the scores) T×T×HD products.
            Op::Attention { heads, kv_heads, .. } => {
                2.0 * size * query_share(heads, kv_heads) * shapes[0][1] as f64
            }
            Op::AttentionBackward { .. } => 5.0 * size * shapes[0][1] as f64,
            // As if the cache were half full.
            Op::AttentionCached { heads, kv_heads } => {
                2.0 * size * query_share(heads, kv_heads) * shapes[2][1] as f64
            }
            Op::Embedding { .. } => product(shapes[0]) as f64 * last(shapes[1]) as f64,
            Op::EmbeddingBackward { .. } | Op::PositionBackward { .. } | Op::ColumnSum => size,
            Op::AddBias | Op::Add | Op::Scale { .. } => size,
            Op::Gather => product(shapes[0]) as f64 * last(shapes[1]) as f64,
            Op::RmsNorm { .. } | Op::RmsNormWeightBackward => 4.0 * size,
            Op::RmsNormBackward { .. } => 8.0 * size,
            Op::SwiGlu => 12.0 * size,
            Op::SwiGluBackward => 16.0 * size,
            Op::Rope { .. } | Op::RopeBackward { .. } => 3.0 * size,
            Op::LayerNorm { .. } | Op::LayerNormWeightBackward => 6.0 * size,
            Op::LayerNormBackward { .. } => 10.0 * size,
            Op::Activate(_) => 12.0 * size,
            Op::ActivateBackward(_) => 20.0 * size,
            Op::Slice { .. } | Op::Stack { .. } => 0.0,
            Op::CrossEntropy { .. } => 12.0 * size,
            Op::Sum { .. } | Op::Spread | Op::ReduceScatter { .. } | Op::AllGather { .. } => size,
            Op::LogitStatistics { .. } | Op::CrossEntropyPart { .. } => 6.0 * size,
        }
    }
}
