//! Writing tensors as a stream: headers come first and say where everything will lie, then one tensor after the other,
//! or pieces of one, so that the host never holds the model. A folder appears under its name when it is complete.

use std::collections::HashSet;
use std::io::Write;
use std::path::{Path, PathBuf};

use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::{Map, Value, json};

use super::Kind;
use super::files::{Fingerprint, Hashed, Unfinished, broken, copy_into, file_name, here, write_json};
use crate::error::{Error, Result};
use crate::folder::Dtype;

/// Elements converted at a time.
const CHUNK: usize = 1 << 16;

/// One safetensors file that is being written.
pub(crate) struct TensorWriter {
    path: PathBuf,
    file: Hashed,
    dtype: Dtype,
    /// Names and elements, in the order of the file.
    tensors: Vec<(String, usize)>,
    /// The tensor that is being written, and how many of its elements there are.
    at: (usize, usize),
}

impl TensorWriter {
    /// Creates the file and writes its header: tensors of these names and shapes, back to back in this order, after a
    /// header padded to 8 bytes so that the data is aligned.
    pub(crate) fn create(
        path: &Path,
        tensors: &[(String, Vec<usize>)],
        dtype: Dtype,
    ) -> Result<TensorWriter> {
        let mut names = HashSet::new();
        let (mut end, mut sizes, mut infos) = (0usize, Vec::new(), Vec::new());
        for (name, shape) in tensors {
            if !names.insert(name) || name == "__metadata__" {
                return Err(broken(path, format!("two tensors are named {name:?}")));
            }
            let len = shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size));
            let next = len.and_then(|len| len.checked_mul(dtype.size())?.checked_add(end));
            let (Some(len), Some(next)) = (len, next) else {
                return Err(broken(path, format!("tensor {name:?} of shape {shape:?} is too large")));
            };
            let stored = match dtype {
                Dtype::F32 => safetensors::Dtype::F32,
                Dtype::F16 => safetensors::Dtype::F16,
                Dtype::BF16 => safetensors::Dtype::BF16,
            };
            let info = TensorInfo { dtype: stored, shape: shape.clone(), data_offsets: (end, next) };
            infos.push((name.clone(), info));
            sizes.push((name.clone(), len));
            end = next;
        }
        // transformers refuses a file that does not say so.
        let format = std::collections::HashMap::from([("format".into(), "pt".into())]);
        let metadata = Metadata::new(Some(format), infos).map_err(|e| broken(path, e))?;
        let mut header = serde_json::to_vec(&metadata).map_err(|e| broken(path, e))?;
        header.resize(header.len().next_multiple_of(8), b' ');
        let write = || {
            let mut file = Hashed::create(path)?;
            file.write_all(&(header.len() as u64).to_le_bytes())?;
            file.write_all(&header)?;
            Ok(file)
        };
        let file = write().map_err(Error::io(path))?;
        Ok(TensorWriter { path: path.to_path_buf(), file, dtype, tensors: sizes, at: (0, 0) })
    }

    /// Appends values to a tensor. Tensors come in the order in which they were announced, each in one piece or several.
    pub(crate) fn write(&mut self, name: &str, values: &[f32]) -> Result<()> {
        if values.is_empty() {
            return Ok(());
        }
        self.skip_complete();
        let (index, done) = self.at;
        let Some((_, len)) = self.tensors.get(index).filter(|(expected, _)| expected == name) else {
            return Err(self.out_of_order(name));
        };
        if values.len() > len - done {
            let message = format!("tensor {name:?} has {len} elements and was given {}", done + values.len());
            return Err(broken(&self.path, message));
        }
        self.at.1 += values.len();
        let mut bytes = Vec::with_capacity(CHUNK.min(values.len()) * self.dtype.size());
        let mut halves = Vec::new();
        for chunk in values.chunks(CHUNK) {
            bytes.clear();
            halves.resize(if self.dtype == Dtype::F32 { 0 } else { chunk.len() }, 0u16);
            match self.dtype {
                Dtype::F32 => bytes.extend(chunk.iter().flat_map(|x| x.to_le_bytes())),
                Dtype::BF16 => halves.reinterpret_cast_mut::<bf16>().convert_from_f32_slice(chunk),
                Dtype::F16 => {
                    halves.reinterpret_cast_mut::<f16>().convert_from_f32_slice(chunk);
                    let overflow = |(x, half): (&f32, &u16)| x.is_finite() && half & 0x7fff == 0x7c00;
                    if let Some((x, _)) = chunk.iter().zip(&halves).find(|&pair| overflow(pair)) {
                        let message =
                            format!("tensor {name:?} has the value {x}, too large for F16; use BF16 or F32");
                        return Err(broken(&self.path, message));
                    }
                }
            }
            bytes.extend(halves.iter().flat_map(|half| half.to_le_bytes()));
            self.file.write_all(&bytes).map_err(Error::io(&self.path))?;
        }
        Ok(())
    }

    /// Goes on to the first tensor that still lacks elements.
    fn skip_complete(&mut self) {
        while self.tensors.get(self.at.0).is_some_and(|(_, len)| self.at.1 == *len) {
            self.at = (self.at.0 + 1, 0);
        }
    }

    fn out_of_order(&self, name: &str) -> Error {
        let expected = self.tensors.get(self.at.0).map_or("nothing".into(), |(name, _)| format!("{name:?}"));
        broken(&self.path, format!("tensor {name:?} was given where {expected} was due"))
    }

    /// Syncs the file.
    pub(crate) fn finish(mut self) -> Result<Fingerprint> {
        self.skip_complete();
        if let Some((name, len)) = self.tensors.get(self.at.0) {
            let message = format!("tensor {name:?} has {len} elements and was given {}", self.at.1);
            return Err(broken(&self.path, message));
        }
        self.file.finish().map_err(Error::io(&self.path))
    }
}

/// What a folder will hold.
#[derive(Clone, Copy, Debug)]
pub struct Layout<'a> {
    /// A model or an adapter.
    pub kind: Kind,
    /// Its configuration. Where it names the type of the weights, the name is made to match.
    pub config: &'a Value,
    /// Names and shapes of the tensors, in the order in which they will be given.
    pub tensors: &'a [(String, Vec<usize>)],
    /// How they are stored.
    pub dtype: Dtype,
    /// Most bytes of tensors in one file of a model, but for a larger tensor by itself; an adapter is always one file.
    pub shard_bytes: u64,
    /// Files to copy beside them under their own names, such as [`super::ModelFolder::companions`].
    pub copy: &'a [PathBuf],
}

/// A model or adapter folder that is being written. Dropped before [`FolderWriter::finish`], it leaves nothing behind.
pub struct FolderWriter {
    target: PathBuf,
    unfinished: Unfinished,
    dtype: Dtype,
    /// The files to write, the first of them last, each with its tensors.
    shards: Shards,
    current: Option<TensorWriter>,
    config_name: &'static str,
    config: Value,
    index: Option<Value>,
    copy: Vec<PathBuf>,
}

impl FolderWriter {
    /// Begins a folder that must not exist yet; its parents are created.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if something has that name, or two tensors have one, or a file to copy would replace one
    /// that is written; [`Error::Io`].
    pub fn create(path: &Path, layout: &Layout) -> Result<FolderWriter> {
        if path.symlink_metadata().is_ok() {
            return Err(broken(path, "exists already; give another name or remove it"));
        }
        let limit = if layout.kind == Kind::Adapter { u64::MAX } else { layout.shard_bytes };
        let (shards, index) = shard(layout, limit);
        let mut names: HashSet<String> = shards.iter().map(|(name, _)| name.clone()).collect();
        names.extend([layout.kind.config_name().to_string(), layout.kind.index_name()]);
        if let Some(path) = layout.copy.iter().find(|path| !names.insert(file_name(path))) {
            return Err(broken(path, "cannot be copied: the new folder has a file of that name"));
        }
        let parent = here(path.parent().unwrap_or(path));
        std::fs::create_dir_all(parent).map_err(Error::io(parent))?;
        let mut config = layout.config.clone();
        for key in ["torch_dtype", "dtype"] {
            if let Some(value) = config.get_mut(key) {
                *value = layout.dtype.torch_name().into();
            }
        }
        Ok(FolderWriter {
            target: path.to_path_buf(),
            unfinished: Unfinished::create(parent, file_name(path))?,
            dtype: layout.dtype,
            shards: shards.into_iter().rev().collect(),
            current: None,
            config_name: layout.kind.config_name(),
            config,
            index,
            copy: layout.copy.to_vec(),
        })
    }

    /// Appends values to a tensor. Tensors come in the order of [`Layout::tensors`], each in one piece or several.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a tensor that is not due, too many values, or a value that F16 cannot hold;
    /// [`Error::Io`].
    pub fn write(&mut self, name: &str, values: &[f32]) -> Result<()> {
        while self.shards.iter().any(|(_, tensors)| tensors.iter().any(|(tensor, _)| tensor == name)) {
            self.next_shard()?;
        }
        match &mut self.current {
            Some(writer) => writer.write(name, values),
            None => Err(broken(&self.target, format!("tensor {name:?} was not announced"))),
        }
    }

    /// Finishes the file that is being written and begins the next.
    fn next_shard(&mut self) -> Result<()> {
        if let Some(writer) = self.current.take() {
            writer.finish()?;
        }
        if let Some((name, tensors)) = self.shards.pop() {
            let path = self.unfinished.path().join(name);
            self.current = Some(TensorWriter::create(&path, &tensors, self.dtype)?);
        }
        Ok(())
    }

    /// Writes what is left, syncs everything and gives the folder its name.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if a tensor lacks values; [`Error::Io`].
    pub fn finish(mut self) -> Result<()> {
        while self.current.is_some() || !self.shards.is_empty() {
            self.next_shard()?;
        }
        let folder = self.unfinished.path();
        write_json(&folder.join(self.config_name), &self.config)?;
        if let Some(index) = &self.index {
            write_json(&folder.join(Kind::Model.index_name()), index)?;
        }
        for path in &self.copy {
            copy_into(folder, path)?;
        }
        if self.target.symlink_metadata().is_ok() {
            return Err(broken(&self.target, "came to exist in the meantime; give another name"));
        }
        self.unfinished.rename(&self.target)
    }
}

/// Names of files, each with its tensors.
type Shards = Vec<(String, Vec<(String, Vec<usize>)>)>;

/// Deals the tensors out to files of at most `limit` bytes, and the index where there are several.
fn shard(layout: &Layout, limit: u64) -> (Shards, Option<Value>) {
    let bytes = |shape: &[usize]| {
        let len = shape.iter().fold(1u64, |n, &size| n.saturating_mul(size as u64));
        len.saturating_mul(layout.dtype.size() as u64)
    };
    let mut shards: Vec<Vec<(String, Vec<usize>)>> = vec![Vec::new()];
    let (mut total, mut filled) = (0u64, 0u64);
    for (name, shape) in layout.tensors {
        let size = bytes(shape);
        if filled > 0 && filled.saturating_add(size) > limit {
            shards.push(Vec::new());
            filled = 0;
        }
        filled = filled.saturating_add(size);
        total = total.saturating_add(size);
        if let Some(last) = shards.last_mut() {
            last.push((name.clone(), shape.clone()));
        }
    }
    let count = shards.len();
    if count == 1 {
        return (
            shards.into_iter().map(|tensors| (layout.kind.weights_name().into(), tensors)).collect(),
            None,
        );
    }
    let name = |i: usize| format!("model-{:05}-of-{count:05}.safetensors", i + 1);
    let mut map = Map::new();
    for (i, tensors) in shards.iter().enumerate() {
        map.extend(tensors.iter().map(|(tensor, _)| (tensor.clone(), Value::from(name(i)))));
    }
    let index = json!({ "metadata": { "total_size": total }, "weight_map": map });
    (shards.into_iter().enumerate().map(|(i, tensors)| (name(i), tensors)).collect(), Some(index))
}
