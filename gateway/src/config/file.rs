//! Reads TOML files; an error names the file, the key and what was expected there.

use std::path::{Path, PathBuf};

use super::renamed_keys::rename_keys;

/// Why a configuration was refused: every problem found, one a line.
#[derive(Debug, thiserror::Error)]
#[error("`{path}`:\n  {}", problems.join("\n  "))]
pub struct ConfigError {
    /// The file.
    pub path: PathBuf,
    /// The problems.
    pub problems: Vec<String>,
}

/// Reads a TOML document. An error names the key and what was expected there. Keys under names of an earlier release are
/// logged as warnings.
pub(super) fn read_toml<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    let refused = |problem: String| ConfigError { path: path.to_owned(), problems: vec![problem] };
    let text = std::fs::read_to_string(path).map_err(|error| refused(error.to_string()))?;
    let mut document: toml::Table =
        text.parse().map_err(|error: toml::de::Error| refused(error.to_string()))?;
    for warning in rename_keys(&mut document).map_err(refused)? {
        tracing::warn!(file = %path.display(), "{warning}");
    }
    serde_path_to_error::deserialize(document)
        .map_err(|error| refused(format!("key `{}`: {}", error.path(), error.inner().message())))
}
