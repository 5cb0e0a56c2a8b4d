//! What each kind of event looks like, the same in pictures and terminals.

use std::fmt;

use super::EventKind::{self, *};

/// Red, green and blue in the lowest 24 bits. Prints as SVG and CSS write it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Colour(pub u32);

impl Colour {
    /// Red, green, blue.
    pub fn channels(self) -> [u8; 3] {
        let [_, red, green, blue] = self.0.to_be_bytes();
        [red, green, blue]
    }

    /// For lines on a surface of this colour.
    pub fn darker(self) -> Colour {
        let [red, green, blue] = self.channels().map(|channel| channel / 2);
        Colour(u32::from_be_bytes([0, red, green, blue]))
    }
}

impl fmt::Display for Colour {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "#{:06x}", self.0)
    }
}

impl EventKind {
    /// Its name in the legend and in a trace.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Forward => "forward",
            Backward => "backward",
            BackwardInput => "backward, input",
            BackwardWeight => "backward, weights",
            Optimizer => "optimizer",
            Copy => "copy",
            Host => "host",
        }
    }

    /// The colour of its cell (as in the zero-bubble papers: F blue, B and I teal, W green) and of the text on it.
    pub(super) fn colours(self) -> (Colour, Colour) {
        let (fill, ink) = match self {
            Forward => (0x3f7fe0, 0xffffff),
            Backward => (0x5cc8c0, 0x0b3b38),
            BackwardInput => (0x8fdcd5, 0x0b3b38),
            BackwardWeight => (0x3fa45b, 0xffffff),
            Optimizer => (0x8b62cf, 0xffffff),
            Copy => (0x98a2b0, 0x1f2933),
            Host => (0xecc765, 0x4a3500),
        };
        (Colour(fill), Colour(ink))
    }

    /// What stands for it where there are no colours.
    pub(super) fn letter(self) -> char {
        match self {
            Forward => 'F',
            Backward => 'B',
            BackwardInput => 'I',
            BackwardWeight => 'W',
            Optimizer => 'O',
            Copy => 'c',
            Host => 'h',
        }
    }
}
