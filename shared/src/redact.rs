//! Values that must never reach a log: prompts, completions, keys.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Wraps a secret so that `Debug` and `Display` print a mark in its place. The value is reached by [`Redacted::expose`]
/// alone, which makes every use easy to search for.
#[derive(Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Redacted<T>(T);

impl<T> Redacted<T> {
    /// Wraps `value`.
    pub fn new(value: T) -> Self {
        Self(value)
    }

    /// The value itself. Never pass it on to a log or an error message.
    pub fn expose(&self) -> &T {
        &self.0
    }
}

impl<T> fmt::Debug for Redacted<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

impl<T> fmt::Display for Redacted<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neither_debug_nor_display_shows_the_value() {
        let key = Redacted::new("sk-canary".to_owned());
        assert!(!format!("{key} {key:?}").contains("canary"));
        assert_eq!(key.expose(), "sk-canary");
    }
}
