//! Drops training problems that share a run of words with an evaluation problem: any common 10-gram of normalised words,
//! or the whole text where the evaluation problem is shorter. What is dropped is listed, never silent.

use std::collections::HashMap;

use crate::dedup::words;
use crate::records::Problem;

/// Words in a run.
pub const NGRAM: usize = 10;

/// A training problem that was dropped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contaminated {
    /// The training problem.
    pub problem: String,
    /// The evaluation problem it overlaps with.
    pub evaluation: String,
}

/// Splits `problems` into those that are clean against `evaluation` and those that are not.
pub fn decontaminate<'a>(
    problems: Vec<Problem>,
    evaluation: impl IntoIterator<Item = &'a Problem>,
) -> (Vec<Problem>, Vec<Contaminated>) {
    let mut grams: HashMap<String, &str> = HashMap::new();
    let mut whole: HashMap<String, &str> = HashMap::new();
    for problem in evaluation {
        let words = words(&problem.problem);
        for gram in words.windows(NGRAM) {
            grams.entry(gram.join(" ")).or_insert(&problem.problem);
        }
        if words.len() < NGRAM {
            whole.entry(words.join(" ")).or_insert(&problem.problem);
        }
    }
    let mut dropped = Vec::new();
    let kept = problems
        .into_iter()
        .filter(|problem| {
            let words = words(&problem.problem);
            let hit = whole
                .get(&words.join(" "))
                .or_else(|| words.windows(NGRAM).find_map(|gram| grams.get(&gram.join(" "))));
            if let Some(evaluation) = hit {
                dropped.push(Contaminated {
                    problem: problem.problem.clone(),
                    evaluation: (*evaluation).to_owned(),
                });
            }
            hit.is_none()
        })
        .collect();
    (kept, dropped)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_run_of_words_is_found() {
        let held_out =
            [Problem::new("If a train leaves at noon and drives for three hours, how far?", None, "e")];
        let problems =
            ["Tom says: if a TRAIN leaves at noon, and drives for three hours what then", "A bus leaves."]
                .map(|p| Problem::new(p, None, "s"))
                .to_vec();
        let (kept, dropped) = decontaminate(problems, &held_out);
        assert_eq!((kept.len(), dropped.len()), (1, 1));
        assert!(dropped[0].problem.starts_with("Tom"));
    }
}
