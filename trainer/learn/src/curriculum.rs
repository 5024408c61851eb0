//! The curriculum of DistilQwen2.5-R1: medium traces first, then hard ones with a share of the medium ones replayed at a
//! lower rate. Optimiser and schedule start afresh in each phase.

use potstill_data::records::Difficulty;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// One phase of a training run.
#[derive(Debug, Clone, PartialEq)]
pub struct Phase {
    /// For logs and checkpoints.
    pub name: String,
    /// Indices of its examples.
    pub examples: Vec<usize>,
    /// Times that each example is seen; fractions are allowed.
    pub epochs: f64,
    /// Peak learning rate.
    pub learning_rate: f64,
}

/// How the phases are made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Curriculum {
    /// Epochs over the medium traces.
    pub medium_epochs: f64,
    /// Epochs over the hard traces and the replayed ones.
    pub hard_epochs: f64,
    /// Share of the medium traces that the hard phase replays, 0 to 1.
    pub replay: f64,
    /// Rate of the hard phase as a share of the first one.
    pub hard_rate: f64,
}

/// Phases for examples of the given difficulties. Easy and unscored traces count as medium: what is left of them after
/// the rewrite stage has been verified. A side without examples gives no phase.
pub fn phases(
    difficulties: &[Difficulty],
    curriculum: Curriculum,
    learning_rate: f64,
    seed: u64,
) -> Vec<Phase> {
    let (mut hard, mut medium) = (Vec::new(), Vec::new());
    for (index, difficulty) in difficulties.iter().enumerate() {
        if *difficulty == Difficulty::Hard { hard.push(index) } else { medium.push(index) }
    }
    let mut phases = Vec::new();
    if !medium.is_empty() {
        phases.push(Phase {
            name: "medium".to_owned(),
            examples: medium.clone(),
            epochs: curriculum.medium_epochs,
            learning_rate,
        });
    }
    if !hard.is_empty() {
        medium.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
        medium.truncate((medium.len() as f64 * curriculum.replay).round() as usize);
        hard.extend(medium);
        phases.push(Phase {
            name: "hard".to_owned(),
            examples: hard,
            epochs: curriculum.hard_epochs,
            learning_rate: learning_rate * curriculum.hard_rate,
        });
    }
    phases
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medium_first_then_hard_with_replay() {
        use Difficulty::{Easy, Hard, Medium};
        let curriculum = Curriculum { medium_epochs: 3.0, hard_epochs: 1.0, replay: 0.5, hard_rate: 0.5 };
        let phases = phases(&[Medium, Hard, Easy, Hard, Medium, Medium], curriculum, 1.0, 7);
        assert_eq!(phases[0].examples, [0, 2, 4, 5]);
        assert_eq!(phases[1].examples[..2], [1, 3]);
        assert_eq!(phases[1].examples.len(), 4, "half of the four medium ones are replayed");
        assert!((phases[1].learning_rate - 0.5).abs() < 1e-12);
    }
}
