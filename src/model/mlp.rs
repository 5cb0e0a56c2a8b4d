//! A model without attention: GPT-2's feed-forward halves on each position alone.

use super::{ModelConfig, Parameter, Run, gpt2};
use crate::error::Result;
use crate::graph::{Graph, ValueId};

pub(super) fn block_parameters(c: &ModelConfig, i: usize) -> Vec<Parameter> {
    gpt2::feed_forward_parameters(c, i)
}

pub(super) fn block(g: &mut Graph, c: &ModelConfig, x: ValueId, w: &[ValueId], run: &Run) -> Result<ValueId> {
    gpt2::feed_forward(g, c, x, w, run)
}
