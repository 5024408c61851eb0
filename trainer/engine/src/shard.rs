//! A safetensors file, read tensor by tensor. Loading needs memory for two copies of the largest tensor
//! beyond the model itself.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use safetensors::tensor::Metadata;

use crate::error::EngineError;

/// Size in bytes of the header length, a little-endian `u64` at the start of the file.
const HEADER_LENGTH_BYTES: u64 = 8;
/// Largest header in bytes that the safetensors format permits.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// An open safetensors file with a validated header.
pub(crate) struct SafetensorsFile {
    path: PathBuf,
    file: File,
    metadata: Metadata,
    /// Byte offset of the tensor data.
    start: u64,
}

impl SafetensorsFile {
    /// Opens the file and parses its header. Fails unless header and tensor data fill the file exactly.
    pub(crate) fn open(path: &Path) -> Result<Self, EngineError> {
        let read = |source| EngineError::ReadFile { path: path.to_owned(), source };
        let unreadable = |problem: String| {
            EngineError::malformed(path, format!("not a readable safetensors file: {problem}"))
        };
        let mut file = File::open(path).map_err(read)?;
        let size = file.metadata().map_err(read)?.len();
        let mut length = [0; HEADER_LENGTH_BYTES as usize];
        if size < HEADER_LENGTH_BYTES {
            return Err(unreadable("it is too short for a header".to_owned()));
        }
        file.read_exact(&mut length).map_err(read)?;
        let length = u64::from_le_bytes(length);
        if length > MAX_HEADER_BYTES.min(size - HEADER_LENGTH_BYTES) {
            return Err(unreadable(format!("a header of {length} bytes in a file of {size}")));
        }
        let mut header = vec![0; length as usize];
        file.read_exact(&mut header).map_err(read)?;
        let metadata: Metadata =
            serde_json::from_slice(&header).map_err(|error| unreadable(error.to_string()))?;
        let start = HEADER_LENGTH_BYTES + length;
        if start.checked_add(metadata.data_len() as u64) != Some(size) {
            let values = metadata.data_len();
            return Err(unreadable(format!(
                "a header of {length} bytes and {values} of values in a file of {size}"
            )));
        }
        Ok(Self { path: path.to_owned(), file, metadata, start })
    }

    /// Returns the names of all tensors in file order.
    pub(crate) fn tensor_names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    /// Reads one tensor to the CPU in the file's data type.
    pub(crate) fn read_tensor(&mut self, name: &str) -> Result<Tensor, EngineError> {
        let read = |source| EngineError::ReadFile { path: self.path.clone(), source };
        let info = self
            .metadata
            .info(name)
            .ok_or_else(|| EngineError::MissingTensor { name: name.to_owned(), expected: Vec::new() })?;
        let (begin, end) = info.data_offsets;
        let mut bytes = vec![0; end - begin];
        self.file.seek(SeekFrom::Start(self.start + begin as u64)).map_err(read)?;
        self.file.read_exact(&mut bytes).map_err(read)?;
        let tensor = DType::try_from(info.dtype)
            .and_then(|dtype| Tensor::from_raw_buffer(&bytes, dtype, &info.shape, &Device::Cpu));
        tensor.map_err(|error| EngineError::malformed(&self.path, format!("tensor `{name}`: {error}")))
    }
}
