//! Named tensors in safetensors files, read lazily: a file is mapped, its header checked, and only the elements that are
//! asked for are converted.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};
use safetensors::SafeTensors;
use serde::Deserializer as _;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use sha2::{Digest, Sha256};

use super::files::{Fingerprint, Mapped, broken, hex, sample};
use crate::error::{Error, Result, one_line};

/// Most bytes of a header. Those of models have some hundred for each tensor; as data they take ten times as much.
const HEADER: u64 = 32 << 20;

/// How a file stores the elements of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    BF16,
}

impl Dtype {
    /// Bytes of an element.
    pub fn size(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::BF16 => 2,
        }
    }

    /// The name by which people give it.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "f32",
            Dtype::F16 => "f16",
            Dtype::BF16 => "bf16",
        }
    }

    /// The name that Hugging Face configurations use.
    pub fn torch_name(self) -> &'static str {
        match self {
            Dtype::F32 => "float32",
            Dtype::F16 => "float16",
            Dtype::BF16 => "bfloat16",
        }
    }
}

/// What a header says about a tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    /// Unique in its folder.
    pub name: String,
    /// How it is stored.
    pub dtype: Dtype,
    /// Row-major; empty for a scalar.
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether an extent is 0.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

struct Entry {
    info: TensorInfo,
    file: usize,
    /// Where the tensor begins in its file.
    start: usize,
}

/// The tensors of one file, or of all the files of a model.
pub struct Tensors {
    /// What errors name.
    path: PathBuf,
    files: Vec<(PathBuf, Mapped)>,
    entries: BTreeMap<String, Entry>,
}

impl fmt::Debug for Tensors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tensors").field("path", &self.path).field("tensors", &self.entries.len()).finish()
    }
}

impl Tensors {
    /// Maps one file.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a header that does not describe exactly this file (cut short, too long, tensors that
    /// overlap, leave gaps, or bear the same name), or a tensor that is not F32, F16 or BF16.
    pub fn open(path: &Path) -> Result<Tensors> {
        let mut tensors = Tensors::empty(path);
        tensors.add(path)?;
        Ok(tensors)
    }

    pub(super) fn empty(path: &Path) -> Tensors {
        Tensors { path: path.to_path_buf(), files: Vec::new(), entries: BTreeMap::new() }
    }

    /// Adds the tensors of another file, and returns their names.
    pub(super) fn add(&mut self, path: &Path) -> Result<Vec<String>> {
        let file = Mapped::open(path)?;
        let invalid = |e: &dyn fmt::Display| {
            broken(path, format!("invalid safetensors ({e}); copy or download it again"))
        };
        let (length, metadata) = file.look(0..file.len(), |bytes| {
            if bytes.first_chunk().is_some_and(|&length| u64::from_le_bytes(length) > HEADER) {
                return Err(invalid(&format_args!("its header has more than {HEADER} bytes")));
            }
            let (length, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| invalid(&e))?;
            check_keys(&bytes[8..8 + length]).map_err(|e| invalid(&e))?;
            Ok((length, metadata))
        })??;
        let mut names = Vec::new();
        for (name, info) in metadata.tensors() {
            if is_harmless(&name) {
                continue;
            }
            use safetensors::Dtype as Stored;
            let dtype = match info.dtype {
                Stored::F32 => Dtype::F32,
                Stored::F16 => Dtype::F16,
                Stored::BF16 => Dtype::BF16,
                other => {
                    let message = format!("tensor {name:?} is {other}; convert it to F32, F16 or BF16");
                    return Err(broken(path, message));
                }
            };
            let info_of = TensorInfo { name: name.clone(), dtype, shape: info.shape.clone() };
            let entry =
                Entry { info: info_of, file: self.files.len(), start: 8 + length + info.data_offsets.0 };
            if let Some(other) = self.entries.insert(name.clone(), entry) {
                let other = self.files[other.file].0.display();
                return Err(broken(path, format!("holds tensor {name:?}, which {other} holds too")));
            }
            names.push(name);
        }
        self.files.push((path.to_path_buf(), file));
        Ok(names)
    }

    /// Every tensor, sorted by name.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &TensorInfo> {
        self.entries.values().map(|entry| &entry.info)
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// What the header says about one tensor.
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.entries.get(name).map(|entry| &entry.info)
    }

    /// Gives tensors other names, such as those with a prefix that the files leave out.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] when two tensors would have the same name.
    pub fn rename(&mut self, name: impl Fn(&str) -> String) -> Result<()> {
        for (old, mut entry) in std::mem::take(&mut self.entries) {
            let new = name(&old);
            entry.info.name.clone_from(&new);
            if self.entries.insert(new.clone(), entry).is_some() {
                return Err(broken(&self.path, format!("two tensors are both meant by {new:?}")));
            }
        }
        Ok(())
    }

    /// Converts a range of a tensor's elements, in row-major order, to f32. Every F16 and BF16 value is exact. Only
    /// `out` takes memory: the pages of the file are let go of on the way.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a tensor that is not there, or a range that it does not have or `out` does not fit;
    /// [`Error::Changed`] if the file is no longer the one that was opened.
    pub fn read(&self, name: &str, elements: Range<usize>, out: &mut [f32]) -> Result<()> {
        self.convert(name, elements, out, |dtype, piece, out| match dtype {
            Dtype::F32 => copy(piece, out, f32::from_le_bytes),
            Dtype::BF16 => copy(piece, out, |[low, high]| f32::from_le_bytes([0, 0, low, high])),
            Dtype::F16 => widen(piece, out),
        })
    }

    /// The bytes of a range of a tensor's elements as the file has them, little-endian, piece by piece.
    ///
    /// # Errors
    /// As [`Tensors::read`].
    pub fn raw(&self, name: &str, elements: Range<usize>, each: impl FnMut(&[u8])) -> Result<()> {
        let (_, file, bytes) = self.locate(name, elements.clone(), elements.len())?;
        file.pieces(bytes, each)
    }

    /// Has the system read a tensor from its file while something else is done. A hint.
    pub fn expect(&self, name: &str) {
        if let Some(entry) = self.entries.get(name) {
            let bytes = entry.info.len() * entry.info.dtype.size();
            self.files[entry.file].1.expect(entry.start..entry.start + bytes);
        }
    }

    /// Converts a range of a tensor's elements to bfloat16: the file's own bits where it stores BF16, else rounded to
    /// the nearest, ties to even. Two neighbours are one little-endian u32 of packed weights.
    ///
    /// # Errors
    /// As [`Tensors::read`].
    pub fn read_bf16(&self, name: &str, elements: Range<usize>, out: &mut [u16]) -> Result<()> {
        self.convert(name, elements, out, |dtype, piece, out| match dtype {
            Dtype::BF16 => copy(piece, out, u16::from_le_bytes),
            Dtype::F32 => copy(piece, out, |bytes| bf16::from_f32(f32::from_le_bytes(bytes)).to_bits()),
            Dtype::F16 => copy(piece, out, |bytes| {
                bf16::from_f32(f16::from_bits(u16::from_le_bytes(bytes)).to_f32()).to_bits()
            }),
        })
    }

    /// Fills `out` from a range of elements, a piece of the file and the elements it holds at a time.
    fn convert<T>(
        &self,
        name: &str,
        elements: Range<usize>,
        out: &mut [T],
        fill: impl Fn(Dtype, &[u8], &mut [T]),
    ) -> Result<()> {
        let (dtype, file, bytes) = self.locate(name, elements, out.len())?;
        let mut at = 0;
        file.pieces(bytes, |piece| {
            let out = &mut out[at..][..piece.len() / dtype.size()];
            at += out.len();
            fill(dtype, piece, out);
        })
    }

    /// A whole tensor as f32.
    ///
    /// # Errors
    /// As [`Tensors::read`].
    pub fn read_all(&self, name: &str) -> Result<Vec<f32>> {
        let len = self.get(name).map_or(0, TensorInfo::len);
        let mut out = vec![0.0; len];
        self.read(name, 0..len, &mut out)?;
        Ok(out)
    }

    /// The file with the elements, and where in it they are.
    fn locate(
        &self,
        name: &str,
        elements: Range<usize>,
        out: usize,
    ) -> Result<(Dtype, &Mapped, Range<usize>)> {
        let Some(entry) = self.entries.get(name) else {
            return Err(broken(&self.path, format!("tensor {name:?} is missing")));
        };
        let (path, file) = &self.files[entry.file];
        let (len, size) = (entry.info.len(), entry.info.dtype.size());
        if elements.start > elements.end || elements.end > len || elements.end - elements.start != out {
            let message =
                format!("elements {elements:?} of tensor {name:?}, which has {len}, do not fill {out}");
            return Err(broken(path, message));
        }
        Ok((entry.info.dtype, file, entry.start + elements.start * size..entry.start + elements.end * size))
    }

    /// Compares the tensors with those that a model needs. `may_be_absent` names those that another one stands for,
    /// such as a tied head.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] that lists every tensor that is missing, left over, or of another shape.
    pub fn check(&self, expected: &[(String, Vec<usize>)], may_be_absent: &[String]) -> Result<()> {
        let known: HashSet<&str> = expected.iter().map(|(name, _)| name.as_str()).collect();
        let missing =
            expected.iter().filter(|(name, _)| self.get(name).is_none() && !may_be_absent.contains(name));
        let missing = list("missing", missing.map(|(name, shape)| format!("{name} {shape:?}")));
        let wrong = expected.iter().filter_map(|(name, shape)| {
            let found = &self.get(name)?.shape;
            (found != shape).then(|| format!("{name} is {found:?}, the model needs {shape:?}"))
        });
        let wrong = list("of another shape", wrong);
        let extra = self.iter().filter(|info| !known.contains(info.name.as_str()));
        let extra = list("left over", extra.map(|info| format!("{} {:?}", info.name, info.shape)));
        let lists: Vec<String> = [missing, wrong, extra].into_iter().flatten().collect();
        if lists.is_empty() {
            return Ok(());
        }
        let message = format!("does not hold the tensors of the model in config.json: {}", lists.join("; "));
        Err(Error::checkpoint(&self.path, message))
    }
}

impl Tensors {
    /// Tells these tensors from others, by their names, types and shapes and by their elements as they are stored, in
    /// whatever files. Of more than 256 MiB of elements, 64 pieces of 4 MiB spread evenly stand for the whole.
    ///
    /// # Errors
    /// [`Error::Changed`] for a file that is no longer as it was opened.
    pub fn fingerprint(&self) -> Result<Fingerprint> {
        const PIECE: usize = 4 << 20;
        const PIECES: usize = 64;
        let bytes = |entry: &Entry| entry.info.len() * entry.info.dtype.size();
        let total = self.entries.values().map(bytes).sum();
        let pieces: Vec<Range<usize>> = sample(total, PIECE, PIECES).collect();
        let (mut sha256, mut first) = (Sha256::new(), 0);
        for entry in self.entries.values() {
            let TensorInfo { name, dtype, shape } = &entry.info;
            sha256.update(format!("{name:?} {dtype:?} {shape:?}\n"));
            let last = first + bytes(entry);
            for piece in &pieces {
                let (start, end) = (piece.start.max(first), piece.end.min(last));
                if start < end {
                    let inside = entry.start + start - first..entry.start + end - first;
                    self.files[entry.file].1.pieces(inside, |bytes| sha256.update(bytes))?;
                }
            }
            first = last;
        }
        Ok(Fingerprint { bytes: total as u64, sha256: hex(&sha256.finalize()) })
    }
}

/// "2 tensors missing: a, b", or nothing for none.
fn list(what: &str, items: impl Iterator<Item = String>) -> Option<String> {
    // A damaged file may have names of any length and number.
    const MOST: usize = 10_000;
    let items: Vec<String> = items.map(|item| one_line(&item, 300)).collect();
    let rest = items.len().saturating_sub(MOST);
    let more = if rest > 0 { format!(" and {rest} more") } else { String::new() };
    let plural = if items.len() == 1 { "" } else { "s" };
    (!items.is_empty()).then(|| {
        format!("{} tensor{plural} {what}: {}{more}", items.len(), items[..items.len() - rest].join(", "))
    })
}

/// What some tools store beside the parameters although it follows from the configuration: attention masks (as BOOL in
/// some files) and the frequencies of rotary embeddings.
pub(super) fn is_harmless(name: &str) -> bool {
    [".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq"].iter().any(|end| name.ends_with(end))
}

/// What the safetensors crate lets pass: a header that does not begin with its brace, and names that occur twice.
fn check_keys(header: &[u8]) -> std::result::Result<(), String> {
    struct Keys;
    impl<'de> Visitor<'de> for Keys {
        type Value = ();

        fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
            f.write_str("a header")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<(), A::Error> {
            let mut seen = HashSet::new();
            while let Some((key, IgnoredAny)) = map.next_entry::<String, IgnoredAny>()? {
                if let Some(key) = seen.replace(key) {
                    return Err(serde::de::Error::custom(format_args!("two tensors are named {key:?}")));
                }
            }
            Ok(())
        }
    }
    if header.first() != Some(&b'{') {
        return Err("the header does not begin with a brace".into());
    }
    serde_json::Deserializer::from_slice(header).deserialize_map(Keys).map_err(|e| e.to_string())
}

fn copy<const N: usize, T>(bytes: &[u8], out: &mut [T], element: impl Fn([u8; N]) -> T) {
    for (out, &bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
        *out = element(bytes);
    }
}

/// f16 to f32, many at a time because processors have instructions for that. The file may not be aligned.
fn widen(bytes: &[u8], out: &mut [f32]) {
    let mut halves = [0u16; 1024];
    for (bytes, out) in bytes.chunks(2 * halves.len()).zip(out.chunks_mut(halves.len())) {
        let halves = &mut halves[..out.len()];
        copy(bytes, halves, u16::from_le_bytes);
        halves.reinterpret_cast::<f16>().convert_to_f32_slice(out);
    }
}
