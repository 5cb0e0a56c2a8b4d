//! Numbers of layers as people write them: the embedding and the head count as one each, and so does a block, which has two
//! halves where it has attention. So `3` is a place to cut a model, before its block 2, and `3.5` one in the middle of that
//! block, after its attention.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, Range, Sub};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A number of layers in steps of one half. As a place in a model: how many there are before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Layers(usize);

impl Layers {
    /// Half a layer.
    pub const HALF: Layers = Layers(1);
    /// One layer.
    pub const ONE: Layers = Layers(2);

    /// So many whole layers.
    pub const fn whole(layers: usize) -> Layers {
        Layers(2 * layers)
    }

    /// Where layers of these sizes begin, one after another, and where the last one ends.
    pub fn starts(sizes: impl IntoIterator<Item = Layers>) -> Vec<Layers> {
        let mut starts = vec![Layers::default()];
        for size in sizes {
            starts.push(starts[starts.len() - 1] + size);
        }
        starts
    }

    /// Whether no half is left over.
    pub fn is_whole(self) -> bool {
        self.0.is_multiple_of(2)
    }

    /// Places that follow one another, as the first and the last of the layers between them: `0-4`, `7`; of a layer of
    /// which only one half lies between, `a` stands for its attention and `m` for its MLP: `0-4a`, `4m-9`.
    pub fn between(range: &Range<Layers>) -> String {
        let (start, end) = (range.start.0, range.end.0.max(range.start.0 + 1));
        let (first, last) = (start / 2, (end - 1) / 2);
        let begins = if start % 2 == 1 { "m" } else { "" };
        let ends = if end % 2 == 1 { "a" } else { "" };
        match first == last {
            true => format!("{first}{begins}{ends}"),
            false => format!("{first}{begins}-{last}{ends}"),
        }
    }

    /// The items at which these cuts are, where item `i` begins at `starts[i]` and the last entry is the end of all. The
    /// error says what is wrong, and follows the name of what was read.
    pub(crate) fn cut(cuts: &[Layers], starts: &[Layers]) -> Result<Vec<usize>, String> {
        let items = starts.len().saturating_sub(1);
        let at = |cut: &Layers| starts.binary_search(cut).ok().filter(|at| (1..items).contains(at));
        let found: Option<Vec<usize>> = cuts.iter().map(at).collect();
        found.filter(|found| found.windows(2).all(|pair| pair[0] < pair[1])).ok_or_else(|| {
            format!(
                "{} does not cut {}; give rising numbers between {} and {}",
                Layers::list(cuts),
                Layers::of_model(starts),
                starts.get(1).copied().unwrap_or_default(),
                starts[items.saturating_sub(1)]
            )
        })
    }

    /// A model whose parts begin at these places, the last of which is its end: how many layers it has.
    pub(crate) fn of_model(starts: &[Layers]) -> String {
        let halves =
            if starts.iter().all(|start| start.is_whole()) { "" } else { ", a block may be cut at 0.5" };
        let all = starts.last().copied().unwrap_or_default();
        format!("{} (embedding and head count as one each{halves})", all.counted())
    }

    /// `[3, 5.5]`.
    pub fn list(all: &[Layers]) -> String {
        format!("[{}]", all.iter().map(Layers::to_string).collect::<Vec<_>>().join(", "))
    }

    /// So many layers: `1 layer`, `4.5 layers`.
    pub fn counted(self) -> String {
        format!("{self} layer{}", if self == Layers::ONE { "" } else { "s" })
    }
}

impl fmt::Display for Layers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.0 / 2, if self.0 % 2 == 1 { ".5" } else { "" })
    }
}

impl Add for Layers {
    type Output = Layers;

    fn add(self, other: Layers) -> Layers {
        Layers(self.0 + other.0)
    }
}

/// At least none are left.
impl Sub for Layers {
    type Output = Layers;

    fn sub(self, other: Layers) -> Layers {
        Layers(self.0.saturating_sub(other.0))
    }
}

impl Sum for Layers {
    fn sum<I: Iterator<Item = Layers>>(all: I) -> Layers {
        all.fold(Layers::default(), Add::add)
    }
}

impl Serialize for Layers {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 % 2 {
            0 => serializer.serialize_u64(self.0 as u64 / 2),
            _ => serializer.serialize_f64(self.0 as f64 / 2.0),
        }
    }
}

impl<'de> Deserialize<'de> for Layers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Layers, D::Error> {
        let refuse = |what: &str| {
            let help = "write a whole one such as 3, or 3.5 for the middle of block 2";
            serde::de::Error::custom(format!("{what} is no number of layers; {help}"))
        };
        let number = f64::deserialize(deserializer).map_err(|_| refuse("what stands here"))?;
        let halves = 2.0 * number;
        match halves.fract() == 0.0 && (0.0..=f64::from(u32::MAX)).contains(&halves) {
            true => Ok(Layers(halves as usize)),
            false => Err(refuse(&number.to_string())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_written_as_they_are_read_and_halves_have_names() {
        let read = |text: &str| serde_json::from_str::<Layers>(text);
        for text in ["0", "3", "3.5", "12"] {
            let layers = read(text).unwrap();
            assert_eq!(
                (layers.to_string(), serde_json::to_string(&layers).unwrap()),
                (text.into(), text.into())
            );
        }
        assert_eq!(read("3.0").unwrap(), Layers::whole(3));
        for text in ["-1", "3.25", "1e300", "\"3\""] {
            assert!(read(text).is_err(), "{text}");
        }
        let between = |start: &str, end: &str| Layers::between(&(read(start).unwrap()..read(end).unwrap()));
        let all =
            [("0", "5"), ("0", "4.5"), ("4.5", "9"), ("4", "4.5"), ("4.5", "5"), ("4", "5"), ("3.5", "4.5")];
        let shown = all.map(|(start, end)| between(start, end));
        assert_eq!(shown, ["0-4", "0-4a", "4m-8", "4a", "4m", "4", "3m-4a"]);
    }
}
