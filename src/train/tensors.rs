//! Tensors in safetensors files: F32 out; F32, F16 and BF16 in.

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::ops::Deref;
use std::path::Path;

use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorInfo, TensorView};

use crate::error::{Error, Result};

/// A named array of f32.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Unique within its file.
    pub name: String,
    /// Row-major; empty for a scalar.
    pub shape: Vec<usize>,
    /// As many elements as the shape says.
    pub data: Vec<f32>,
}

/// The safetensors header of tensors that lie back to back, padded to 8 bytes so that the data is aligned.
pub(super) fn header(path: &Path, tensors: &[&Tensor]) -> Result<Vec<u8>> {
    if let Some(pair) = tensors.windows(2).find(|pair| pair[0].name == pair[1].name) {
        return Err(broken(path, format!("two tensors are named {:?}", pair[0].name)));
    }
    let mut end = 0;
    let infos = tensors.iter().map(|tensor| {
        let data_offsets = (end, end + 4 * tensor.data.len());
        end = data_offsets.1;
        let elements = tensor.shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size));
        if elements != Some(tensor.data.len()) {
            let Tensor { name, shape, data } = tensor;
            return Err(broken(
                path,
                format!("tensor {name:?} has shape {shape:?} and {} elements", data.len()),
            ));
        }
        Ok((tensor.name.clone(), TensorInfo { dtype: Dtype::F32, shape: tensor.shape.clone(), data_offsets }))
    });
    // transformers refuses a file that does not say so.
    let format = HashMap::from([("format".into(), "pt".into())]);
    let metadata = Metadata::new(Some(format), infos.collect::<Result<_>>()?).map_err(|e| broken(path, e))?;
    let mut header = serde_json::to_vec(&metadata).map_err(|e| broken(path, e))?;
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok(header)
}

/// Writes the header and the tensors that it describes.
pub(super) fn write_tensors(
    file: &mut impl Write,
    header: &[u8],
    tensors: &[&Tensor],
) -> std::io::Result<()> {
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header)?;
    let mut bytes = Vec::new();
    for chunk in tensors.iter().flat_map(|tensor| tensor.data.chunks(1 << 16)) {
        bytes.clear();
        bytes.extend(chunk.iter().flat_map(|x| x.to_le_bytes()));
        file.write_all(&bytes)?;
    }
    Ok(())
}

/// Every tensor of a file, as f32, sorted by name.
pub(super) fn read_tensors(path: &Path) -> Result<Vec<Tensor>> {
    let bytes = read_file(path)?;
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|e| broken(path, format!("invalid safetensors ({e}); copy or download it again")))?;
    let mut views = file.tensors();
    views.sort_by(|a, b| a.0.cmp(&b.0));
    let tensor = |(name, view): (String, TensorView)| {
        let data = match view.dtype() {
            Dtype::F32 => floats(view.data(), f32::from_le_bytes),
            Dtype::F16 => floats(view.data(), |half| f16_to_f32(u16::from_le_bytes(half))),
            Dtype::BF16 => floats(view.data(), |[low, high]| f32::from_le_bytes([0, 0, low, high])),
            other => {
                let message = format!("tensor {name:?} is {other}; convert it to F32, F16 or BF16");
                return Err(broken(path, message));
            }
        };
        Ok(Tensor { name, shape: view.shape().to_vec(), data })
    };
    views.into_iter().map(tensor).collect()
}

fn floats<const N: usize>(bytes: &[u8], float: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|&bytes| float(bytes)).collect()
}

/// The value of an IEEE half; a NaN keeps its payload.
fn f16_to_f32(bits: u16) -> f32 {
    let sign = u32::from(bits >> 15) << 31;
    let (exponent, fraction) = (u32::from(bits >> 10) & 31, u32::from(bits) & 0x3ff);
    match exponent {
        // Subnormal: fraction * 2^-24, which f32 represents exactly.
        0 => f32::from_bits(sign | (fraction as f32 / 16_777_216.0).to_bits()),
        31 => f32::from_bits(sign | 0x7f80_0000 | fraction << 13),
        _ => f32::from_bits(sign | (exponent + 112) << 23 | fraction << 13),
    }
}

/// The bytes of a regular file (opening a pipe would wait for a writer).
pub(super) fn read_file(path: &Path) -> Result<impl Deref<Target = [u8]> + use<>> {
    let unreadable = |e: std::io::Error| match e.kind() {
        std::io::ErrorKind::NotFound => broken(path, "is missing, so the folder is not complete"),
        _ => broken(path, format!("cannot be read: {e}")),
    };
    if !fs::metadata(path).map_err(unreadable)?.is_file() {
        return Err(broken(path, "is not a regular file"));
    }
    // Mapped, because a second copy of the optimizer state may be more than the memory holds.
    // SAFETY: the map is read-only and bytes have no invalid values; checkpoints are replaced by rename, never in place.
    #[cfg(not(target_arch = "wasm32"))]
    let bytes = fs::File::open(path).and_then(|file| unsafe { memmap2::Mmap::map(&file) });
    #[cfg(target_arch = "wasm32")]
    let bytes = fs::read(path);
    bytes.map_err(unreadable)
}

/// An [`Error::Checkpoint`] on one line of bearable length, whatever strings of a damaged file the message quotes.
pub(super) fn broken(path: impl AsRef<Path>, message: impl ToString) -> Error {
    let message = message.to_string();
    let line = message.chars().map(|c| if c.is_control() { ' ' } else { c }).take(400);
    Error::checkpoint(path, line.collect::<String>())
}
