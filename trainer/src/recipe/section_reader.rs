//! Reads the sections of a recipe one by one.

use serde::Deserialize;

/// Sections of a recipe, deserialized one by one, so that an error in one does not hide errors in others.
pub(super) struct SectionReader {
    pub(super) table: toml::Table,
    pub(super) problems: Vec<String>,
}

impl SectionReader {
    /// Removes and deserializes a section. Records an error with its path.
    pub(super) fn optional<T: for<'de> Deserialize<'de>>(&mut self, key: &str) -> Option<T> {
        let value = self.table.remove(key)?;
        match serde_path_to_error::deserialize(value) {
            Ok(section) => Some(section),
            Err(error) => {
                let inner = match error.path().to_string().as_str() {
                    "." => String::new(),
                    path => format!(".{path}"),
                };
                self.problems.push(format!("`{key}{inner}`: {}", error.inner().message()));
                None
            }
        }
    }

    /// Does the same as `take`, and records an error if the key is missing.
    pub(super) fn required<T: for<'de> Deserialize<'de>>(&mut self, key: &str) -> Option<T> {
        if !self.table.contains_key(key) {
            self.problems.push(format!("`{key}` is missing"));
        }
        self.optional(key)
    }
}
