//! What comes to a stage's graph from outside, microbatch by microbatch.

use std::fmt;

use super::DType;

/// A value that is fed from outside. Whoever feeds a stage goes over [`Graph::fed`](super::Graph::fed) and matches, so that
/// a new one is forgotten nowhere. Prints as the value's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fed {
    /// Token ids (B,T).
    Tokens,
    /// Rows of the token table that occur, each with the range of its tokens in [`Fed::TokenOrder`]: (rows,3).
    TokenSegments,
    /// The numbers of the tokens, sorted by their rows in the table: (M).
    TokenOrder,
    /// The token that follows each (B,T).
    Targets,
    /// Where in its sequence the text of each token begins (B,T).
    Starts,
    /// The place of each token in its text (B,T).
    Places,
    /// As [`Fed::TokenSegments`], of the table of places.
    PlaceSegments,
    /// As [`Fed::TokenOrder`], of the table of places.
    PlaceOrder,
    /// The activation from the previous stage (B,T,C).
    Input,
    /// The gradient of the stage's output, from the next stage (B,T,C).
    OutputGradient,
    /// The place of each new token in its text, when decoding (B,T).
    Positions,
    /// The rows among M whose logits are wanted, when decoding (B,1).
    Last,
    /// Keys and values of a block, by its number and that of a section of its heads, when decoding: they stay where they are.
    Cache(usize, usize),
    /// An argument of an op that stands alone, to be checked.
    Argument(DType),
}

impl Fed {
    /// What its elements are.
    pub fn dtype(self) -> DType {
        match self {
            Fed::Input | Fed::OutputGradient | Fed::Cache(..) => DType::F32,
            Fed::Argument(dtype) => dtype,
            Fed::Tokens | Fed::TokenSegments | Fed::TokenOrder | Fed::Targets | Fed::Starts => DType::U32,
            Fed::Places | Fed::PlaceSegments | Fed::PlaceOrder | Fed::Positions | Fed::Last => DType::U32,
        }
    }
}

impl fmt::Display for Fed {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Fed::Tokens => "tokens",
            Fed::TokenSegments => "segments",
            Fed::TokenOrder => "order",
            Fed::Targets => "targets",
            Fed::Starts => "starts",
            Fed::Places => "places",
            Fed::PlaceSegments => "place segments",
            Fed::PlaceOrder => "place order",
            Fed::Input => "input",
            Fed::OutputGradient => "d_output",
            Fed::Positions => "positions",
            Fed::Last => "last",
            Fed::Cache(block, 0) => return write!(f, "cache {block}"),
            Fed::Cache(block, section) => return write!(f, "cache {block}.{section}"),
            Fed::Argument(_) => "argument",
        })
    }
}
