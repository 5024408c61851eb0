//! Decontamination: finds training problems that contain a problem of a benchmark. Three criteria apply:
//! - a common run of ten words;
//! - for benchmark problems of fewer than ten words, the same words;
//! - a normalized Indel similarity of at least 0.95.
//!
//! Callers drop, count and list each finding by its rule. Deliberately absent: comparison of training problems with
//! each other (`dedup`, `near`).

use std::collections::HashMap;

use rapidfuzz::distance::indel;

use crate::dedup::{normalize_text, normalized_words};
use crate::records::Problem;

/// Words in a compared run.
pub const NGRAM_WORDS: usize = 10;
/// Smallest normalized Indel similarity, 0 to 1, of a contaminated text. The value is that of OpenThoughts; the paper
/// gives none.
pub const MIN_INDEL_SIMILARITY: f64 = 0.95;

/// Criterion that found a contaminated problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContaminationRule {
    /// A common run of [`NGRAM`] words, or the same words in shorter problems.
    Ngram,
    /// A normalized Indel similarity of at least [`INDEL`].
    Indel,
}

impl ContaminationRule {
    /// Returns the drop reason.
    pub fn drop_reason(self) -> &'static str {
        match self {
            Self::Ngram => "contaminated_ngram",
            Self::Indel => "contaminated_indel",
        }
    }
}

/// Index of the benchmark problems.
#[derive(Default)]
pub struct BenchmarkIndex {
    texts: Vec<BenchmarkText>,
    grams: HashMap<String, usize>,
    whole: HashMap<String, usize>,
    /// Indices into `texts`, ordered by length in characters.
    by_length: Vec<usize>,
}

/// Benchmark problem in the forms that comparisons need.
struct BenchmarkText {
    original: String,
    letters: Vec<char>,
    counts: LetterHistogram,
}

/// Frequencies of characters, folded into 32 classes. The class-wise minimum of two texts bounds their common
/// subsequence from above.
type LetterHistogram = [u16; 32];

fn letter_histogram(letters: &[char]) -> LetterHistogram {
    let mut counts = [0u16; 32];
    for letter in letters {
        let class = (*letter as usize) % 32;
        counts[class] = counts[class].saturating_add(1);
    }
    counts
}

impl BenchmarkIndex {
    /// Builds the index over benchmark problems.
    pub fn new<'a>(evaluation: impl IntoIterator<Item = &'a Problem>) -> Self {
        let mut held_out = Self::default();
        for problem in evaluation {
            let index = held_out.texts.len();
            let words = normalized_words(&problem.problem);
            for gram in words.windows(NGRAM_WORDS) {
                held_out.grams.entry(gram.join(" ")).or_insert(index);
            }
            if words.len() < NGRAM_WORDS {
                held_out.whole.entry(words.join(" ")).or_insert(index);
            }
            let letters: Vec<char> = normalize_text(&problem.problem).chars().collect();
            let counts = letter_histogram(&letters);
            held_out.texts.push(BenchmarkText { original: problem.problem.clone(), letters, counts });
        }
        held_out.by_length = (0..held_out.texts.len()).collect();
        held_out.by_length.sort_by_key(|index| held_out.texts[*index].letters.len());
        held_out
    }

    /// Returns the benchmark problem that `text` contains, with the criterion. `None` if `text` is not contaminated.
    pub fn find_contamination(&self, text: &str) -> Option<(ContaminationRule, &str)> {
        if self.texts.is_empty() {
            return None;
        }
        let words = normalized_words(text);
        let gram = |gram: &[String]| self.grams.get(&gram.join(" "));
        let shared = self.whole.get(&words.join(" ")).or_else(|| words.windows(NGRAM_WORDS).find_map(gram));
        if let Some(index) = shared {
            return Some((ContaminationRule::Ngram, &self.texts[*index].original));
        }
        self.find_similar(&normalize_text(text).chars().collect::<Vec<char>>())
            .map(|like| (ContaminationRule::Indel, like))
    }

    /// Returns a benchmark problem with an Indel similarity of at least [`INDEL`], which is twice the common letters
    /// divided by the sum of both lengths. Lengths and character frequencies exclude most texts before the exact
    /// comparison.
    fn find_similar(&self, letters: &[char]) -> Option<&str> {
        let length = letters.len() as f64;
        let (least, most) = (
            length * MIN_INDEL_SIMILARITY / (2.0 - MIN_INDEL_SIMILARITY),
            length * (2.0 - MIN_INDEL_SIMILARITY) / MIN_INDEL_SIMILARITY,
        );
        let first = self.by_length.partition_point(|at| (self.texts[*at].letters.len() as f64) < least);
        let mine = letter_histogram(letters);
        for text in self.by_length[first..].iter().map(|at| &self.texts[*at]) {
            if text.letters.len() as f64 > most {
                break;
            }
            let both = (letters.len() + text.letters.len()) as f64;
            let common: u32 = mine.iter().zip(&text.counts).map(|(a, b)| u32::from(*a.min(b))).sum();
            if 2.0 * f64::from(common) < MIN_INDEL_SIMILARITY * both {
                continue;
            }
            let arguments = indel::Args::default().score_cutoff(MIN_INDEL_SIMILARITY);
            let similar = indel::normalized_similarity_with_args(
                letters.iter().copied(),
                text.letters.iter().copied(),
                &arguments,
            );
            if similar.is_some() {
                return Some(&text.original);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn held_out(texts: &[&str]) -> BenchmarkIndex {
        let problems: Vec<Problem> = texts.iter().map(|text| Problem::new(*text, None, "e")).collect();
        BenchmarkIndex::new(&problems)
    }

    #[test]
    fn finds_a_common_run_of_words() {
        let held_out = held_out(&["If a train leaves at noon and drives for three hours, how far?"]);
        let train = "Tom says: if a TRAIN leaves at noon, and drives for three hours what then";
        assert_eq!(held_out.find_contamination(train).map(|(rule, _)| rule), Some(ContaminationRule::Ngram));
        assert_eq!(held_out.find_contamination("A bus leaves."), None);
        assert_eq!(BenchmarkIndex::default().find_contamination("A bus leaves."), None);
    }

    #[test]
    fn finds_a_text_with_a_few_changed_letters() {
        let text = "Jane's ducks lay 16 eggs. She eats 3, bakes with 4. How many remain?";
        let held_out = held_out(&["What is 7 + 7?", text]);
        let changed = text.replace("Jane's", "Janet’s").replace("eats", "eat");
        assert_eq!(held_out.find_contamination(&changed), Some((ContaminationRule::Indel, text)));
        assert_eq!(held_out.find_contamination(&changed.replace("How many remain", "What is left")), None);
    }

    /// Reference implementation: longest common subsequence with every text, without shortcuts.
    fn plainly(texts: &[String], text: &str) -> bool {
        let letters = |text: &str| normalize_text(text).chars().collect::<Vec<char>>();
        texts.iter().any(|other| {
            let (a, b) = (letters(text), letters(other));
            let mut row = vec![0usize; b.len() + 1];
            for x in &a {
                let mut diagonal = 0;
                for (at, y) in b.iter().enumerate() {
                    let above = row[at + 1];
                    row[at + 1] = if x == y { diagonal + 1 } else { above.max(row[at]) };
                    diagonal = above;
                }
            }
            let both = a.len() + b.len();
            both > 0 && 2.0 * row[b.len()] as f64 >= MIN_INDEL_SIMILARITY * both as f64
        })
    }

    proptest! {
        #[test]
        fn shortcuts_agree_with_the_exact_similarity(texts in prop::collection::vec("[ab]{15,24}", 1..8), extra in "[abc]{0,2}", at in 0usize..15) {
            let problems: Vec<Problem> = texts.iter().map(|text| Problem::new(text.as_str(), None, "e")).collect();
            let held_out = BenchmarkIndex::new(&problems);
            let mut changed = texts[0].clone();
            changed.insert_str(at, &extra);
            for text in texts.iter().chain([&changed]) {
                let letters: Vec<char> = text.chars().collect();
                prop_assert_eq!(held_out.find_similar(&letters).is_some(), plainly(&texts, text));
            }
        }
    }
}
