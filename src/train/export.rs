//! Model folders for other programs: what training left, and what an adapter makes of its base model. Tensors pass
//! through host memory a piece at a time, so that no model need fit it.

use std::path::Path;

use super::checkpoint::{open_adapter, resolve};
use super::source::Pretrained;
use crate::error::{Error, Result};
use crate::folder::adapter::{self, Adapter};
use crate::folder::{Dtype, FolderWriter, Kind, Layout, companions};
use crate::model::{Linear, Model, lora};

/// Elements that pass through host memory at a time.
const PIECE: usize = 1 << 20;

/// Where a folder goes, and how its weights are stored.
#[derive(Clone, Debug)]
pub struct Output<'a> {
    /// The folder; nothing may have that name yet.
    pub path: &'a Path,
    /// The type of the weights; that of the source, if none.
    pub dtype: Option<Dtype>,
    /// Most bytes of tensors in one file, but for a larger tensor by itself.
    pub shard_bytes: u64,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Tensors; of tied ones only the owner is stored.
    pub tensors: usize,
    /// Their elements.
    pub elements: u64,
    /// How they are stored.
    pub dtype: Dtype,
    /// Tensors larger than a file was to be, and their bytes: each has a file of its own.
    pub oversized: Vec<(String, u64)>,
}

/// Writes the model of a run, a checkpoint or a folder as a folder that transformers reads (an adapter as one that PEFT
/// reads), the tokenizer's files beside it. `each` hears how many elements of how many are done.
///
/// # Errors
/// [`Error::Checkpoint`] for a source that cannot be read or does not hold exactly the model's tensors, and
/// for a folder that is there already. Nothing is left behind.
pub fn export(source: &Path, output: &Output, each: &mut dyn FnMut(u64, u64)) -> Result<Written> {
    let folder = resolve(source)?;
    if !folder.join(Kind::Adapter.config_name()).is_file() {
        return write(&Pretrained::open(&folder)?, output, each);
    }
    if let Some(dtype) = output.dtype.filter(|&dtype| dtype != Dtype::F32) {
        let message = format!(
            "{name} is for models, and {source} is an adapter, which is written as f32; `polystage merge {source} --dtype {name}` makes a model of it",
            name = dtype.name(),
            source = source.display()
        );
        return Err(Error::config("--dtype", message));
    }
    export_adapter(&folder, output, each)
}

/// Writes an adapter as a folder that PEFT reads: always one file of f32.
fn export_adapter(source: &Path, output: &Output, each: &mut dyn FnMut(u64, u64)) -> Result<Written> {
    let adapter = open_adapter(source)?;
    let total = adapter.tensors.iter().map(|info| info.len() as u64).sum();
    let mut writer = adapter::create(output.path, &adapter.config, &adapter.modules, &companions(source))?;
    let names = adapter.modules.iter().flat_map(|module| [module.a(), module.b()]);
    let mut elements = 0;
    for ((stored, _), name) in adapter::tensors(&adapter.modules, adapter.config.r).iter().zip(names) {
        let values = adapter.tensors.read_all(&name)?;
        writer.write(stored, &values)?;
        elements += values.len() as u64;
        each(elements, total);
    }
    writer.finish()?;
    Ok(Written { tensors: adapter.tensors.len(), elements, dtype: Dtype::F32, oversized: Vec::new() })
}

/// Writes the model that an adapter and its base model are together: every adapted weight is W + scale·B·A, and nothing
/// else changes. `base` takes the place of the folder that the adapter names.
///
/// # Errors
/// As [`export`]; [`Error::Config`] where the base model is not found or lacks an adapted layer, or where the head is
/// adapted and tied to the token table.
pub fn merge(
    adapter: &Path,
    base: Option<&Path>,
    output: &Output,
    each: &mut dyn FnMut(u64, u64),
) -> Result<Written> {
    let pretrained = Pretrained::on_base(adapter, base)?;
    let Some((adapter, path)) = &pretrained.adapter else {
        return Err(Error::checkpoint(adapter, "is a model, not an adapter; there is nothing to merge"));
    };
    let adapted = pretrained.model.parameters();
    let matrices: Vec<_> =
        adapted.iter().filter(|p| p.is_lora()).map(|p| (p.name.clone(), p.shape.clone())).collect();
    adapter.tensors.check(&matrices, &[])?;
    let shared = |p: &&crate::model::Parameter| {
        p.tied_to.is_some() && matrices.iter().any(|(a, _)| Some(module(&p.name)) == a.strip_suffix(lora::A))
    };
    if let Some(head) = adapted.iter().find(shared) {
        let message = format!(
            "adapts {}, which shares its weight with the token table; only an untied model can be merged with it",
            module(&head.name)
        );
        return Err(Error::checkpoint(path, message));
    }
    write(&pretrained, output, each)
}

fn module(weight: &str) -> &str {
    weight.strip_suffix(".weight").unwrap_or(weight)
}

fn write(pretrained: &Pretrained, output: &Output, each: &mut dyn FnMut(u64, u64)) -> Result<Written> {
    let (folder, copy) = (&pretrained.folder, pretrained.companions());
    let model = Model::new(pretrained.model.config())?;
    let parameters = model.parameters();
    let source = folder.tensors();
    let expected: Vec<_> = parameters.iter().map(|p| (p.name.clone(), p.shape.clone())).collect();
    let tied: Vec<_> = parameters.iter().filter(|p| p.tied_to.is_some()).map(|p| p.name.clone()).collect();
    source.check(&expected, &tied)?;
    let tensors: Vec<_> = expected.into_iter().filter(|(name, _)| !tied.contains(name)).collect();
    let mut stored = tensors.iter().filter_map(|(name, _)| source.get(name)).map(|info| info.dtype);
    let first = stored.next().unwrap_or(Dtype::F32);
    let same = if stored.all(|dtype| dtype == first) { first } else { Dtype::F32 };
    let dtype = output.dtype.unwrap_or(same);
    let total = model.parameter_count() as u64;
    let layout = Layout {
        kind: Kind::Model,
        config: folder.config(),
        tensors: &tensors,
        dtype,
        shard_bytes: output.shard_bytes,
        copy: &copy,
    };
    let mut writer = FolderWriter::create(output.path, &layout)?;
    let layers = model.linear_layers();
    let mut done = 0;
    for (name, shape) in &tensors {
        let layer = layers.iter().find(|layer| layer.name == module(name));
        let update = match (&pretrained.adapter, layer) {
            (Some((adapter, _)), Some(layer)) => Update::read(adapter, layer)?,
            _ => None,
        };
        let columns = shape[shape.len() - 1];
        let (len, piece) = (shape.iter().product::<usize>(), (PIECE / columns).max(1) * columns);
        let mut values = vec![0.0; piece.min(len)];
        for start in (0..len).step_by(piece) {
            let values = &mut values[..piece.min(len - start)];
            source.read(name, start..start + values.len(), values)?;
            if let Some(update) = &update {
                update.add(start / columns, columns, values);
            }
            writer.write(name, values)?;
            done += values.len() as u64;
            each(done, total);
        }
    }
    writer.finish()?;
    let bytes = |shape: &[usize]| (shape.iter().product::<usize>() * dtype.size()) as u64;
    let sizes = tensors.iter().map(|(name, shape)| (name.clone(), bytes(shape)));
    let oversized = sizes.filter(|&(_, bytes)| bytes > output.shard_bytes).collect();
    Ok(Written { tensors: tensors.len(), elements: total, dtype, oversized })
}

/// What an adapter adds to a weight (rows, columns): scale · left (rows, r) · right (r, columns).
struct Update {
    scale: f32,
    rank: usize,
    left: Vec<f32>,
    right: Vec<f32>,
}

impl Update {
    /// None for a layer that is not adapted.
    fn read(adapter: &Adapter, layer: &Linear) -> Result<Option<Update>> {
        let Some(module) = adapter.modules.iter().find(|module| module.name == layer.name) else {
            return Ok(None);
        };
        let (rank, scale) = (adapter.config.r, adapter.config.scale() as f32);
        let a = adapter.tensors.read_all(&module.a())?;
        let b = adapter.tensors.read_all(&module.b())?;
        let (left, right) = match layer.inputs_first {
            false => (b, a),
            true => (transposed(&a, layer.inputs), transposed(&b, rank)),
        };
        Ok(Some(Update { scale, rank, left, right }))
    }

    /// Adds it to whole rows, from number `first` on.
    fn add(&self, first: usize, columns: usize, rows: &mut [f32]) {
        let mut sum = vec![0.0; columns];
        let factors = self.left[first * self.rank..].chunks(self.rank);
        for (row, factors) in rows.chunks_mut(columns).zip(factors) {
            sum.fill(0.0);
            for (factor, right) in factors.iter().zip(self.right.chunks(columns)) {
                sum.iter_mut().zip(right).for_each(|(sum, x)| *sum += factor * x);
            }
            row.iter_mut().zip(&sum).for_each(|(w, sum)| *w += self.scale * sum);
        }
    }
}

/// A row-major matrix with this many columns, transposed.
fn transposed(matrix: &[f32], columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|column| matrix.iter().skip(column).step_by(columns).copied()).collect()
}
