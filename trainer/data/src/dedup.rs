//! Exact deduplication of problems: two texts are equal if they differ only in white space and case.
//!
//! Memory holds a 16-byte hash per text. Deliberately absent: similar texts (`near`) and benchmarks
//! (`decontaminate`).

use std::collections::HashSet;

use potstill_shared::id::ContentId;

/// Returns the text in lower case, with single spaces between words.
pub fn normalize_text(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for word in text.split_whitespace() {
        if !out.is_empty() {
            out.push(' ');
        }
        out.extend(word.chars().flat_map(char::to_lowercase));
    }
    out
}

/// Returns the words of a text in lower case. Characters that are not alphanumeric separate words.
pub(crate) fn normalized_words(text: &str) -> Vec<String> {
    let kept: String =
        normalize_text(text).chars().map(|c| if c.is_alphanumeric() { c } else { ' ' }).collect();
    kept.split_whitespace().map(str::to_owned).collect()
}

/// Set of normalized texts, as 16-byte hashes.
#[derive(Default)]
pub struct ExactDedup(HashSet<u128>);

impl ExactDedup {
    /// Adds a text and returns whether the set did not contain an equal one.
    pub fn insert(&mut self, text: &str) -> bool {
        let id = ContentId::from_parts(&[&normalize_text(text)]);
        self.0.insert(u128::from_str_radix(id.as_str(), 16).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_only_the_first_copy() {
        let mut seen = ExactDedup::default();
        let first = ["One  and one?", "one and ONE?", "two?"].map(|text| seen.insert(text));
        assert_eq!(first, [true, false, true]);
    }
}
