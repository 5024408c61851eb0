//! Export of a model as a Hugging Face folder that this engine, transformers and vLLM load. A rename publishes the
//! finished folder. Training and evaluation are not involved.

use std::path::Path;

use candle_core::DType;
use potstill_engine::checkpoint_files::write_model;
use potstill_engine::loader::LoadedModel;
use potstill_shared::durable::{DurableError, publish_folder, write_file};
use potstill_shared::id::ContentId;

use crate::recipe::ExportDtype;

impl ExportDtype {
    /// Returns candle's data type.
    pub fn candle_dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
            Self::F16 => DType::F16,
        }
    }
}

/// Writes `model` with its card to `folder`. An existing folder is replaced.
pub fn export_model(
    folder: &Path,
    model: &LoadedModel,
    dtype: ExportDtype,
    card: &str,
) -> anyhow::Result<()> {
    publish_folder::<anyhow::Error>(folder, |folder| {
        write_model(folder, model, dtype.candle_dtype())?;
        Ok(write_file(&folder.join("README.md"), card.as_bytes())?)
    })
}

/// Replaces the model card of an exported folder.
pub fn write_card(folder: &Path, card: &str) -> Result<(), DurableError> {
    write_file(&folder.join("README.md"), card.as_bytes())
}

/// Returns a hash of the weights of an exported folder.
pub fn weights_hash(folder: &Path) -> anyhow::Result<String> {
    Ok(ContentId::from_bytes(&std::fs::read(folder.join("model.safetensors"))?).to_string())
}
