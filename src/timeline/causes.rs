//! The colours of idle time.

use super::colour::Colour;
use crate::schedule::Cause;

impl Cause {
    /// The colour of a gap in a picture: pale, since cells are what a reader looks for, and warm where something can be
    /// gained; and that of a dot in a terminal, to be seen on black and on white.
    pub(super) fn colours(self) -> (Colour, Colour) {
        let (pale, strong) = match self {
            Cause::WarmUp => (0xdbe2ec, 0x8494a8),
            Cause::Drain => (0xc9d3e0, 0x6c7f98),
            Cause::Imbalance => (0xf7cfc8, 0xe0796a),
            Cause::Link => (0xfbdfb5, 0xd9922e),
            Cause::Host => (0xf4eda3, 0xb5a41c),
        };
        (Colour(pale), Colour(strong))
    }
}
