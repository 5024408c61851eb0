//! Curriculum: divides the training set into phases of rising difficulty.
//!
//! By default as in DistilQwen2.5-R1: medium traces first, then hard ones at a lower learning rate, with a fraction of
//! the medium ones replayed. Alternatives: windows of cognitive difficulty (for the adaptive series), or one shuffled
//! phase as baseline.
//!
//! Optimizer and learning rate schedule restart in each phase. The order within a phase is shuffled elsewhere.

use potstill_data::records::Difficulty;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// One phase of a training run.
#[derive(Debug, Clone, PartialEq)]
pub struct Phase {
    /// Name, for logs and checkpoints.
    pub name: String,
    /// Indices of the phase's examples.
    pub examples: Vec<usize>,
    /// Number of passes over the examples; fractions are allowed.
    pub epochs: f64,
    /// Peak learning rate.
    pub learning_rate: f64,
}

/// Criterion that orders the examples.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CurriculumOrder {
    /// Difficulty of the trace for the student: medium, then hard.
    #[default]
    Difficulty,
    /// Cognitive difficulty in three windows: 0 to 2, 3 to 5, 6 to 9.
    Cd,
    /// No order: one phase over all examples, with as many example visits as the order by difficulty.
    Shuffled,
}

/// Settings of the curriculum.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Curriculum {
    /// Criterion that orders the examples.
    pub order: CurriculumOrder,
    /// Epochs over the medium traces, or over each window of cognitive difficulty.
    pub medium_epochs: f64,
    /// Epochs over the hard traces and the replayed ones.
    pub hard_epochs: f64,
    /// Fraction of the examples of earlier phases that a later phase replays, 0 to 1.
    pub replay: f64,
    /// Learning rate of later phases as a fraction of the first phase's rate.
    pub hard_rate: f64,
}

impl Default for Curriculum {
    fn default() -> Self {
        Self {
            order: CurriculumOrder::Difficulty,
            medium_epochs: 3.0,
            hard_epochs: 1.0,
            replay: 0.2,
            hard_rate: 0.5,
        }
    }
}

/// Difficulty of one example, for the curriculum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExampleMeta {
    /// Difficulty of the trace for the student.
    pub difficulty: Difficulty,
    /// Cognitive difficulty, 0 to 9; `None` if unscored.
    pub cd: Option<u8>,
}

/// Returns the phases for `lessons` (one entry per example). `learning_rate` is the peak of the first phase.
///
/// Easy and unscored traces count as medium, because the rewrite stage has already verified the remaining easy ones.
/// Examples without a cognitive difficulty count as 4, in the middle window. A phase without examples is left out.
pub fn phases(lessons: &[ExampleMeta], curriculum: Curriculum, learning_rate: f64, seed: u64) -> Vec<Phase> {
    let by_difficulty = || {
        let (mut hard, mut medium) = (Vec::new(), Vec::new());
        for (index, lesson) in lessons.iter().enumerate() {
            if lesson.difficulty == Difficulty::Hard { hard.push(index) } else { medium.push(index) }
        }
        let epochs = [curriculum.medium_epochs, curriculum.hard_epochs];
        phases_with_replay(
            [("medium", medium), ("hard", hard)].into_iter().zip(epochs),
            curriculum,
            learning_rate,
            seed,
        )
    };
    match curriculum.order {
        CurriculumOrder::Difficulty => by_difficulty(),
        CurriculumOrder::Cd => {
            let window = |low: u8, high: u8| {
                let inside = |index: &usize| (low..=high).contains(&lessons[*index].cd.unwrap_or(4));
                (0..lessons.len()).filter(inside).collect::<Vec<usize>>()
            };
            let windows = [("cd 0-2", window(0, 2)), ("cd 3-5", window(3, 5)), ("cd 6-9", window(6, 9))];
            phases_with_replay(
                windows.map(|part| (part, curriculum.medium_epochs)),
                curriculum,
                learning_rate,
                seed,
            )
        }
        CurriculumOrder::Shuffled => {
            let visits: f64 =
                by_difficulty().iter().map(|phase| phase.epochs * phase.examples.len() as f64).sum();
            let epochs = visits / lessons.len().max(1) as f64;
            let examples = (0..lessons.len()).collect();
            vec![Phase { name: "shuffled".to_owned(), examples, epochs, learning_rate }]
        }
    }
}

/// Returns one phase per part. Each later phase replays a random fraction of all earlier examples.
fn phases_with_replay<'a>(
    parts: impl IntoIterator<Item = ((&'a str, Vec<usize>), f64)>,
    curriculum: Curriculum,
    learning_rate: f64,
    seed: u64,
) -> Vec<Phase> {
    let (mut phases, mut before) = (Vec::new(), Vec::new());
    for ((name, own), epochs) in parts {
        if own.is_empty() {
            continue;
        }
        let mut replayed = before.clone();
        replayed.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
        replayed.truncate((before.len() as f64 * curriculum.replay).round() as usize);
        let rate = if phases.is_empty() { 1.0 } else { curriculum.hard_rate };
        let examples = [own.as_slice(), &replayed].concat();
        before.extend(own);
        phases.push(Phase { name: name.to_owned(), examples, epochs, learning_rate: learning_rate * rate });
    }
    phases
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example_meta(difficulty: Difficulty, cd: u8) -> ExampleMeta {
        ExampleMeta { difficulty, cd: Some(cd) }
    }

    #[test]
    fn orders_by_difficulty_or_cd_or_shuffles_with_equal_visits() {
        use Difficulty::{Easy, Hard, Medium};
        let curriculum = Curriculum { replay: 0.5, ..Curriculum::default() };
        let lessons: Vec<ExampleMeta> =
            [(Medium, 1), (Hard, 7), (Easy, 4), (Hard, 5), (Medium, 2), (Medium, 3)]
                .map(|(d, cd)| example_meta(d, cd))
                .into();
        let found = phases(&lessons, curriculum, 1.0, 7);
        assert_eq!(found[0].examples, [0, 2, 4, 5]);
        assert_eq!(found[1].examples[..2], [1, 3]);
        assert_eq!(found[1].examples.len(), 4, "half of the four medium ones are replayed");
        assert!((found[1].learning_rate - 0.5).abs() < 1e-12);

        let by_cd =
            phases(&lessons, Curriculum { order: CurriculumOrder::Cd, replay: 0.0, ..curriculum }, 1.0, 7);
        let examples: Vec<&[usize]> = by_cd.iter().map(|phase| phase.examples.as_slice()).collect();
        assert_eq!(examples, [&[0, 4][..], &[2, 3, 5], &[1]]);

        let shuffled =
            phases(&lessons, Curriculum { order: CurriculumOrder::Shuffled, ..curriculum }, 1.0, 7);
        let visits =
            |phases: &[Phase]| phases.iter().map(|p| p.epochs * p.examples.len() as f64).sum::<f64>();
        assert_eq!(shuffled.len(), 1);
        assert!((visits(&shuffled) - visits(&found)).abs() < 1e-9, "both are as long");
    }
}
