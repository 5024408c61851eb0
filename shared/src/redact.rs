//! Wrapper for values that must never reach a log: API keys, prompts and completions.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A secret whose `Debug` and `Display` output is `[redacted]`.
///
/// [`Redacted::expose`] is the only access to the value, so that a text search finds every use. Serialization
/// writes the value itself.
#[derive(Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret<T>(T);

impl<T> Secret<T> {
    /// Wraps `value`.
    pub fn new(value: T) -> Self {
        Self(value)
    }

    /// Returns the value. Callers keep the value out of logs and error messages.
    pub fn expose_secret(&self) -> &T {
        &self.0
    }
}

impl<T> fmt::Debug for Secret<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

impl<T> fmt::Display for Secret<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_and_display_hide_the_value() {
        let key = Secret::new("sk-canary".to_owned());
        assert!(!format!("{key} {key:?}").contains("canary"));
        assert_eq!(key.expose_secret(), "sk-canary");
    }
}
