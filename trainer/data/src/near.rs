//! Removes problems that say nearly the same as one before: MinHash signatures of their five-word runs, grouped by
//! locality-sensitive hashing (Broder 1997; Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", section 3.4), then compared
//! exactly. Problems whose numbers differ are different problems, however alike their words are: a template filled in twice is two
//! exercises.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use crate::dedup::words;
use crate::records::Problem;

/// Words of a run.
const RUN: usize = 5;
/// Bands of a signature, and values of each. Two texts that share a part `s` of their runs meet in some band with probability
/// `1 - (1 - s^8)^20`: 0.98 at `s` = 0.8, 0.08 at 0.5.
const BANDS: usize = 20;
const ROWS: usize = 8;
/// Texts of a group that a new one is compared with.
const COMPARED: usize = 64;

/// A problem that was dropped.
#[derive(Debug, Clone, PartialEq)]
pub struct NearCopy {
    /// What was dropped.
    pub problem: Problem,
    /// What it says nearly the same as.
    pub like: String,
    /// Shared runs among all runs of both, 0 to 1.
    pub similarity: f64,
}

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
    fn bands(&self) -> [u64; BANDS] {
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
            hash((0..ROWS).map(least).collect::<Vec<_>>())
        })
    }
}

/// Keeps the first of problems that share at least `threshold` of their runs; returns the others as dropped.
pub fn near(problems: Vec<Problem>, threshold: f64) -> (Vec<Problem>, Vec<NearCopy>) {
    let mut groups: HashMap<(usize, u64), Vec<u32>> = HashMap::new();
    let (mut kept, mut dropped): (Vec<Problem>, Vec<NearCopy>) = (Vec::new(), Vec::new());
    for problem in problems {
        let shape = Shape::of(&problem.problem);
        let bands = shape.bands();
        let mut candidates: Vec<u32> = Vec::new();
        for (band, hash) in bands.iter().enumerate() {
            candidates.extend(groups.get(&(band, *hash)).into_iter().flatten());
        }
        candidates.sort_unstable();
        candidates.dedup();
        let like = candidates.iter().find_map(|at| {
            let other: &Problem = &kept[*at as usize];
            let similarity = shape.similarity(&Shape::of(&other.problem));
            (similarity >= threshold).then(|| (other.problem.clone(), similarity))
        });
        match like {
            Some((like, similarity)) => dropped.push(NearCopy { problem, like, similarity }),
            None => {
                for (band, hash) in bands.into_iter().enumerate() {
                    let group = groups.entry((band, hash)).or_default();
                    // A boilerplate that thousands share would make every comparison with all of them.
                    if group.len() < COMPARED {
                        group.push(kept.len() as u32);
                    }
                }
                kept.push(problem);
            }
        }
    }
    (kept, dropped)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn problems(texts: &[&str]) -> Vec<Problem> {
        texts.iter().map(|text| Problem::new(*text, None, "s")).collect()
    }

    const TRAIN: &str = "A train leaves the station of Hamburg at noon and drives to Munich with a speed of 90 kilometres an hour, \
                         while a second train leaves Munich an hour later and drives to Hamburg; where do they meet?";

    #[test]
    fn small_changes_of_words_are_the_same_problem_and_other_numbers_are_not() {
        let longer = format!("{TRAIN} Explain your answer.");
        let other = TRAIN.replace("90", "80");
        let (kept, dropped) =
            near(problems(&[TRAIN, "What is 2 + 2?", &longer, &other, "What is 3 + 2?"]), 0.8);
        assert_eq!(
            kept.iter().map(|kept| kept.problem.as_str()).collect::<Vec<_>>(),
            [TRAIN, "What is 2 + 2?", &other, "What is 3 + 2?"]
        );
        assert_eq!(
            (dropped.len(), dropped[0].like.as_str(), dropped[0].problem.problem.as_str()),
            (1, TRAIN, longer.as_str())
        );
        assert!(dropped[0].similarity > 0.8 && dropped[0].similarity < 1.0);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Nothing is lost, what is dropped is like something kept, and what is kept twice is found again.
        #[test]
        fn every_problem_is_kept_or_dropped_with_its_reason(texts in prop::collection::vec("[a-d]( [a-d1-3]){3,14}", 1..40)) {
            let given: Vec<Problem> = texts.iter().map(|text| Problem::new(text.clone(), None, "s")).collect();
            let (kept, dropped) = near(given.clone(), 0.8);
            prop_assert_eq!(kept.len() + dropped.len(), given.len());
            for copy in &dropped {
                prop_assert!(kept.iter().any(|kept| kept.problem == copy.like));
                prop_assert!(Shape::of(&copy.problem.problem).similarity(&Shape::of(&copy.like)) >= 0.8);
            }
            let again: Vec<Problem> = kept.iter().chain(&kept).cloned().collect();
            prop_assert_eq!(near(again, 0.8).0.len(), kept.len());
        }
    }
}
