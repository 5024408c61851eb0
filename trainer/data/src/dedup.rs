//! Removes problems whose text was seen before, spelling of white space and case aside.

use std::collections::HashSet;

use crate::records::Problem;

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

/// Keeps the first of each group of copies; returns the rest as dropped.
pub fn exact(problems: Vec<Problem>) -> (Vec<Problem>, Vec<Problem>) {
    let mut seen = HashSet::new();
    problems.into_iter().partition(|problem| seen.insert(normalised(&problem.problem)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_copy_stays() {
        let problems = ["One  and one?", "one and ONE?", "two?"].map(|p| Problem::new(p, None, "s")).to_vec();
        let (kept, dropped) = exact(problems);
        assert_eq!(kept.len(), 2);
        assert_eq!(dropped[0].problem, "one and ONE?");
    }
}
