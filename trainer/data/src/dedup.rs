//! Finds problems whose text was seen before, spelling of white space and case aside.

use std::collections::HashSet;

use potstill_shared::id::ContentId;

/// The text that two copies of a problem share.
pub fn normalised(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for word in text.split_whitespace() {
        if !out.is_empty() {
            out.push(' ');
        }
        out.extend(word.chars().flat_map(char::to_lowercase));
    }
    out
}

/// The words of a text, without case and signs.
pub(crate) fn words(text: &str) -> Vec<String> {
    let kept: String = normalised(text).chars().map(|c| if c.is_alphanumeric() { c } else { ' ' }).collect();
    kept.split_whitespace().map(str::to_owned).collect()
}

/// Texts that were seen, 16 bytes each.
#[derive(Default)]
pub struct Seen(HashSet<u128>);

impl Seen {
    /// Whether this is the first copy of a text.
    pub fn is_first(&mut self, text: &str) -> bool {
        let id = ContentId::of(&[&normalised(text)]);
        self.0.insert(u128::from_str_radix(id.as_str(), 16).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_copy_stays() {
        let mut seen = Seen::default();
        let first = ["One  and one?", "one and ONE?", "two?"].map(|text| seen.is_first(text));
        assert_eq!(first, [true, false, true]);
    }
}
