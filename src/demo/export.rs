//! The model as a Hugging Face folder in a zip file.

use std::io::{Cursor, Write};

use safetensors::tensor::{Dtype, TensorView, serialize};
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

use super::Session;
use crate::error::{Error, Result};
use crate::ops::parameters::Part;

/// What the folder is called.
const FOLDER: &str = "polystage-model";

impl Session {
    /// `config.json` and `model.safetensors`, which transformers reads.
    ///
    /// # Errors
    /// Those of a device.
    pub async fn export(&mut self) -> Result<Vec<u8>> {
        let config = serde_json::to_string_pretty(&self.model.hugging_face_config()).unwrap_or_default();
        let parameters: Vec<_> =
            self.model.parameters().into_iter().filter(|p| p.tied_to.is_none()).collect();
        let mut values = Vec::new();
        for p in &parameters {
            values.push(self.trainer.executor().read(&p.name, Part::Weight).await?);
        }
        let failed = |error: &dyn std::fmt::Display| Error::failed("model.safetensors", error.to_string());
        let mut views = Vec::new();
        for (p, values) in parameters.iter().zip(&values) {
            let bytes = bytemuck::cast_slice(values);
            let view = TensorView::new(Dtype::F32, p.shape.clone(), bytes).map_err(|error| failed(&error))?;
            views.push((p.name.clone(), view));
        }
        let metadata = [("format".to_string(), "pt".to_string())].into();
        let tensors = serialize(views, Some(metadata)).map_err(|error| failed(&error))?;
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        for (name, bytes) in [("config.json", config.as_bytes()), ("model.safetensors", &tensors)] {
            // Weights do not become smaller.
            let options = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
            zip.start_file(format!("{FOLDER}/{name}"), options).map_err(|error| failed(&error))?;
            zip.write_all(bytes).map_err(|error| failed(&error))?;
        }
        Ok(zip.finish().map_err(|error| failed(&error))?.into_inner())
    }
}
