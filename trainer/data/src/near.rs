//! Removes problems that say nearly the same as one before: MinHash signatures of their five-word runs, grouped by
//! locality-sensitive hashing (Broder 1997; Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", section 3.4), then compared
//! exactly. Problems whose numbers differ are different problems, however alike their words are: a template filled in twice is two
//! exercises.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;

use potstill_shared::durable::{DurableError, Scratch};
use serde_json::Value;

use crate::dedup::words;

/// Words of a run.
const RUN: usize = 5;
/// Bands of a signature, and values of each. Two texts that share a part `s` of their runs meet in some band with probability
/// `1 - (1 - s^8)^20`: 0.98 at `s` = 0.8, 0.08 at 0.5.
const BANDS: usize = 20;
const ROWS: usize = 8;
/// Texts of a band that a new one is compared with.
const COMPARED: usize = 64;

/// What a text is compared by.
struct Shape {
    runs: HashSet<u64>,
    numbers: Vec<String>,
}

fn hash(value: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

impl Shape {
    fn of(text: &str) -> Self {
        let words = words(text);
        let runs = if words.len() < RUN {
            HashSet::from([hash(&words)])
        } else {
            words.windows(RUN).map(hash).collect()
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

    /// The hash of each band: the least values of `BANDS * ROWS` orders of the runs.
    fn bands(&self) -> [u32; BANDS] {
        std::array::from_fn(|band| {
            let least = |row: usize| {
                let salt = (band * ROWS + row + 1) as u64;
                // A multiplication by an odd number and a fold reorder 64-bit hashes well enough.
                let mixed = self.runs.iter().map(|run| {
                    let mixed =
                        (run ^ salt.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xff51_afd7_ed55_8ccd);
                    mixed ^ (mixed >> 32)
                });
                mixed.min().unwrap_or(0)
            };
            hash((0..ROWS).map(least).collect::<Vec<_>>()) as u32
        })
    }
}

/// Problems that were kept, ready to be compared with. Of each stand in memory the hashes of its bands and of its numbers (some
/// 400 bytes, with the maps); its text lies on the disk.
pub struct Near {
    threshold: f64,
    /// By band: the last kept text whose runs gave a hash.
    last: Vec<HashMap<u32, u32>>,
    /// By kept text and band: the one before it with the same hash.
    before: Vec<[u32; BANDS]>,
    numbers: Vec<u64>,
    places: Vec<u64>,
    texts: Scratch,
}

/// No text before.
const NONE: u32 = u32::MAX;

impl Near {
    /// Texts that share at least `threshold` of their runs are one; the texts lie on the disk of `folder`.
    pub fn new(threshold: f64, folder: &Path) -> Result<Self, DurableError> {
        Ok(Self {
            threshold,
            last: vec![HashMap::new(); BANDS],
            before: Vec::new(),
            numbers: Vec::new(),
            places: Vec::new(),
            texts: Scratch::new(folder)?,
        })
    }

    /// The text kept before that says nearly the same; else keeps this one.
    pub fn find_or_keep(&mut self, text: &str) -> Result<Option<String>, DurableError> {
        let shape = Shape::of(text);
        let (bands, numbers) = (shape.bands(), hash(&shape.numbers));
        for at in self.candidates(&bands) {
            if self.numbers[at as usize] != numbers {
                continue;
            }
            let other = self.texts.read(self.places[at as usize])?;
            let other: String = serde_json::from_str(&other).unwrap_or_default();
            if shape.similarity(&Shape::of(&other)) >= self.threshold {
                return Ok(Some(other));
            }
        }
        let kept = self.places.len() as u32;
        let before = std::array::from_fn(|band| self.last[band].insert(bands[band], kept).unwrap_or(NONE));
        self.before.push(before);
        self.numbers.push(numbers);
        self.places.push(self.texts.append(Value::from(text).to_string().as_bytes())?);
        Ok(None)
    }

    /// Kept texts that share a band, oldest first. A boilerplate that thousands share would make every comparison with all of
    /// them: the last few of each band will do.
    fn candidates(&self, bands: &[u32; BANDS]) -> Vec<u32> {
        let mut found = Vec::new();
        for (band, hash) in bands.iter().enumerate() {
            let mut at = self.last[band].get(hash).copied().unwrap_or(NONE);
            for _ in 0..COMPARED {
                if at == NONE {
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

    /// Kept texts, and what was dropped with what it is like.
    fn near(texts: impl IntoIterator<Item = String>, threshold: f64) -> (Vec<String>, Vec<(String, String)>) {
        let folder = tempfile::tempdir().unwrap();
        let mut near = Near::new(threshold, folder.path()).unwrap();
        let (mut kept, mut dropped) = (Vec::new(), Vec::new());
        for text in texts {
            match near.find_or_keep(&text).unwrap() {
                Some(like) => dropped.push((text, like)),
                None => kept.push(text),
            }
        }
        (kept, dropped)
    }

    const TRAIN: &str = "A train leaves the station of Hamburg at noon and drives to Munich with a speed of 90 kilometres an hour, \
                         while a second train leaves Munich an hour later and drives to Hamburg; where do they meet?";

    #[test]
    fn small_changes_of_words_are_the_same_problem_and_other_numbers_are_not() {
        let longer = format!("{TRAIN} Explain your answer.");
        let other = TRAIN.replace("90", "80");
        let texts = [TRAIN, "What is 2 + 2?", &longer, &other, "What is 3 + 2?"].map(str::to_owned);
        let (kept, dropped) = near(texts, 0.8);
        assert_eq!(kept, [TRAIN, "What is 2 + 2?", &other, "What is 3 + 2?"]);
        assert_eq!(dropped, [(longer, TRAIN.to_owned())]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Nothing is lost, what is dropped is like something kept, and what is kept twice is found again.
        #[test]
        fn every_problem_is_kept_or_dropped_with_its_reason(texts in prop::collection::vec("[a-d]( [a-d1-3]){3,14}", 1..40)) {
            let (kept, dropped) = near(texts.clone(), 0.8);
            prop_assert_eq!(kept.len() + dropped.len(), texts.len());
            for (text, like) in &dropped {
                prop_assert!(kept.contains(like));
                prop_assert!(Shape::of(text).similarity(&Shape::of(like)) >= 0.8);
            }
            let again: Vec<String> = kept.iter().chain(&kept).cloned().collect();
            prop_assert_eq!(near(again, 0.8).0.len(), kept.len());
        }
    }
}
