//! Near-duplicate detection. MinHash signatures over runs of five words are grouped by locality-sensitive hashing
//! (Broder 1997; Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", section 3.4). Candidates are then
//! compared exactly.
//!
//! Problems with different numbers are different, however similar their words: two instances of a template are two
//! exercises. Deliberately absent: exact copies (`dedup`).

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;

use potstill_shared::durable::{DurableError, ScratchFile};
use serde_json::Value;

use crate::dedup::normalized_words;

/// Words per run.
const SHINGLE_WORDS: usize = 5;
/// Bands of a signature. Two texts share a band with probability `1 - (1 - s^8)^20`, where `s` is the Jaccard
/// similarity of their runs. The probability is 0.98 at `s = 0.8` and 0.08 at `s = 0.5`.
const BANDS: usize = 20;
/// Minimum hashes per band.
const ROWS_PER_BAND: usize = 8;
/// Largest number of candidates from one band.
const MAX_CANDIDATES_PER_BAND: usize = 64;

/// Features of a text: hashes of its word runs, and its words with digits in order.
struct TextFeatures {
    runs: HashSet<u64>,
    numbers: Vec<String>,
}

fn hash(value: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

impl TextFeatures {
    fn from_text(text: &str) -> Self {
        let words = normalized_words(text);
        let runs = if words.len() < SHINGLE_WORDS {
            HashSet::from([hash(&words)])
        } else {
            words.windows(SHINGLE_WORDS).map(hash).collect()
        };
        let numbers =
            words.iter().filter(|word| word.contains(|c: char| c.is_ascii_digit())).cloned().collect();
        Self { runs, numbers }
    }

    fn similarity(&self, other: &Self) -> f64 {
        if self.numbers != other.numbers {
            return 0.0;
        }
        let shared = self.runs.intersection(&other.runs).count();
        shared as f64 / (self.runs.len() + other.runs.len() - shared).max(1) as f64
    }

    /// Returns one hash per band, over [`ROWS`] minimum hashes of the runs.
    fn bands(&self) -> [u32; BANDS] {
        std::array::from_fn(|band| {
            let least = |row: usize| {
                let salt = (band * ROWS_PER_BAND + row + 1) as u64;
                // An odd multiplier and a shift permute 64-bit hashes well enough; no second hash function is needed.
                let mixed = self.runs.iter().map(|run| {
                    let mixed =
                        (run ^ salt.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xff51_afd7_ed55_8ccd);
                    mixed ^ (mixed >> 32)
                });
                mixed.min().unwrap_or(0)
            };
            hash((0..ROWS_PER_BAND).map(least).collect::<Vec<_>>()) as u32
        })
    }
}

/// Index of the kept texts. Memory holds band hashes and a hash of the numbers, about 400 bytes per text. The texts
/// lie in a temporary file.
pub struct NearDedup {
    threshold: f64,
    /// Per band: index of the last kept text with a given hash.
    last: Vec<HashMap<u32, u32>>,
    /// Per kept text and band: index of the previous text with the same hash, or [`NONE`].
    before: Vec<[u32; BANDS]>,
    numbers: Vec<u64>,
    places: Vec<u64>,
    texts: ScratchFile,
}

/// Marks the end of a chain of texts with the same band hash.
const NO_TEXT: u32 = u32::MAX;

impl NearDedup {
    /// Creates an empty index. Texts with a Jaccard similarity of at least `threshold` are near-duplicates. The
    /// temporary file is created in `folder`.
    pub fn new(threshold: f64, folder: &Path) -> Result<Self, DurableError> {
        Ok(Self {
            threshold,
            last: vec![HashMap::new(); BANDS],
            before: Vec::new(),
            numbers: Vec::new(),
            places: Vec::new(),
            texts: ScratchFile::new(folder)?,
        })
    }

    /// Returns a kept text that is a near-duplicate of `text`. If there is none, keeps `text` and returns `None`.
    pub fn find_or_insert(&mut self, text: &str) -> Result<Option<String>, DurableError> {
        let shape = TextFeatures::from_text(text);
        let (bands, numbers) = (shape.bands(), hash(&shape.numbers));
        for at in self.candidates(&bands) {
            if self.numbers[at as usize] != numbers {
                continue;
            }
            let other = self.texts.read_line_at(self.places[at as usize])?;
            let other: String = serde_json::from_str(&other).unwrap_or_default();
            if shape.similarity(&TextFeatures::from_text(&other)) >= self.threshold {
                return Ok(Some(other));
            }
        }
        let kept = self.places.len() as u32;
        let before = std::array::from_fn(|band| self.last[band].insert(bands[band], kept).unwrap_or(NO_TEXT));
        self.before.push(before);
        self.numbers.push(numbers);
        self.places.push(self.texts.append(Value::from(text).to_string().as_bytes())?);
        Ok(None)
    }

    /// Returns the kept texts that share a band hash, oldest first. Only the last [`COMPARED`] of each band are
    /// returned: thousands of texts may share a boilerplate.
    fn candidates(&self, bands: &[u32; BANDS]) -> Vec<u32> {
        let mut found = Vec::new();
        for (band, hash) in bands.iter().enumerate() {
            let mut at = self.last[band].get(hash).copied().unwrap_or(NO_TEXT);
            for _ in 0..MAX_CANDIDATES_PER_BAND {
                if at == NO_TEXT {
                    break;
                }
                found.push(at);
                at = self.before[at as usize][band];
            }
        }
        found.sort_unstable();
        found.dedup();
        found
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Returns the kept texts, and each dropped text with its near-duplicate.
    fn near(texts: impl IntoIterator<Item = String>, threshold: f64) -> (Vec<String>, Vec<(String, String)>) {
        let folder = tempfile::tempdir().unwrap();
        let mut near = NearDedup::new(threshold, folder.path()).unwrap();
        let (mut kept, mut dropped) = (Vec::new(), Vec::new());
        for text in texts {
            match near.find_or_insert(&text).unwrap() {
                Some(like) => dropped.push((text, like)),
                None => kept.push(text),
            }
        }
        (kept, dropped)
    }

    const TRAIN: &str = "A train leaves the station of Hamburg at noon and drives to Munich with a speed of 90 kilometres an hour, \
                         while a second train leaves Munich an hour later and drives to Hamburg; where do they meet?";

    #[test]
    fn small_rewordings_are_duplicates_but_other_numbers_are_not() {
        let longer = format!("{TRAIN} Explain your answer.");
        let other = TRAIN.replace("90", "80");
        let texts = [TRAIN, "What is 2 + 2?", &longer, &other, "What is 3 + 2?"].map(str::to_owned);
        let (kept, dropped) = near(texts, 0.8);
        assert_eq!(kept, [TRAIN, "What is 2 + 2?", &other, "What is 3 + 2?"]);
        assert_eq!(dropped, [(longer, TRAIN.to_owned())]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Checks that no text is lost and that each dropped text is similar to a kept one. A second copy of a kept
        /// text is always dropped.
        #[test]
        fn keeps_each_problem_or_drops_it_with_a_similar_one(texts in prop::collection::vec("[a-d]( [a-d1-3]){3,14}", 1..40)) {
            let (kept, dropped) = near(texts.clone(), 0.8);
            prop_assert_eq!(kept.len() + dropped.len(), texts.len());
            for (text, like) in &dropped {
                prop_assert!(kept.contains(like));
                prop_assert!(TextFeatures::from_text(text).similarity(&TextFeatures::from_text(like)) >= 0.8);
            }
            let again: Vec<String> = kept.iter().chain(&kept).cloned().collect();
            prop_assert_eq!(near(again, 0.8).0.len(), kept.len());
        }
    }
}
