//! What the clients of both hubs share: errors, located files, checks of paths and hashes.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// Error while resolving a hub address or fetching its files.
#[derive(Debug, thiserror::Error)]
#[error("`{address}`: {reason}")]
pub struct HubError {
    /// Address in the recipe.
    pub address: String,
    /// Cause, and the next step where there is one.
    pub reason: String,
}

/// Local file, with the address of its exact version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocatedFile {
    /// Path in the recipe. For hub files, the address with the commit (ModelScope: with the start of the file's
    /// SHA-256).
    pub shown: String,
    /// Path of the local file.
    pub path: PathBuf,
}

/// Returns whether a relative path stays inside its base folder.
pub(crate) fn is_contained_path(file: &str) -> bool {
    !file.starts_with('/')
        && !file.contains('\\')
        && file.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

/// Returns whether `name` matches a pattern in which `*` stands for any text, including `/`.
pub(crate) fn matches_glob(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = name.strip_prefix(first) else { return false };
    let mut parts: Vec<&str> = parts.collect();
    let Some(last) = parts.pop() else { return rest.is_empty() };
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

/// Returns the SHA-256 of a file in lower-case hexadecimal digits.
pub(crate) fn sha256_hex(path: &Path) -> std::io::Result<String> {
    let mut hasher = Sha256::new();
    std::io::copy(&mut std::fs::File::open(path)?, &mut HashWriter(&mut hasher))?;
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Adapter that hashes all bytes written.
pub(crate) struct HashWriter<'a>(&'a mut Sha256);

impl std::io::Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
