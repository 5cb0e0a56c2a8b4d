//! What a step sees.

/// The target of a position that has none: its loss is 0 and so is its gradient.
pub const IGNORE: u32 = 0xffff_ffff;

/// For each of B sequences T tokens, and for each of them the token that follows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// (B, T), row-major.
    pub inputs: Vec<u32>,
    /// (B, T), row-major; [`IGNORE`] where nothing is to be learnt. Empty where nobody asks for a loss.
    pub targets: Vec<u32>,
}

impl Batch {
    /// From B sequences of T + 1 tokens, each of which follows the one before it.
    pub fn shifted(tokens: &[u32], sequence: usize) -> Batch {
        let rows = tokens.chunks_exact(sequence + 1);
        Batch {
            inputs: rows.clone().flat_map(|row| &row[..sequence]).copied().collect(),
            targets: rows.flat_map(|row| &row[1..]).copied().collect(),
        }
    }

    /// Targets that count.
    pub fn counted(&self) -> usize {
        self.targets.iter().filter(|&&target| target != IGNORE).count()
    }
}
