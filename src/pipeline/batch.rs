//! What a step sees.

/// The target of a position that has none: its loss is 0 and so is its gradient.
pub const IGNORE: u32 = 0xffff_ffff;

/// For each of B sequences T tokens, and for each of them the token that follows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// (B, T), row-major.
    pub inputs: Vec<u32>,
    /// (B, T), row-major; [`IGNORE`] where nothing is to be learnt. Empty where nobody asks for a loss.
    pub targets: Vec<u32>,
    /// (B, T), row-major: where in its sequence the text begins that a token belongs to, if that may hold several
    /// ([`Setup::shared`](super::Setup)). Empty where each sequence is one text.
    pub starts: Vec<u32>,
}

impl Batch {
    /// Appends more sequences of the same kind.
    pub fn extend(&mut self, more: Batch) {
        self.inputs.extend(more.inputs);
        self.targets.extend(more.targets);
        self.starts.extend(more.starts);
    }

    /// Appends tokens without targets, up to `rows` of them.
    pub fn fill(&mut self, rows: usize) {
        self.inputs.resize(rows, 0);
        self.targets.resize(rows, IGNORE);
        if !self.starts.is_empty() {
            self.starts.resize(rows, 0);
        }
    }

    /// Targets that count.
    pub fn counted(&self) -> usize {
        self.targets.iter().filter(|&&target| target != IGNORE).count()
    }
}
