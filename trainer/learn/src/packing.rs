//! Lays examples into steps. Rows of a step are packed without padding and attend only to their own example, so a step
//! is simply as many examples as fit its token budget.
//!
//! Pure: the order of an epoch depends on the seed, the phase and the epoch alone, which makes the data cursor of a
//! checkpoint one number.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// Steps of one epoch: indices into `lengths`, shuffled by `seed`, each step at most `budget` tokens (an example longer
/// than the budget makes a step of its own).
pub fn epoch(
    indices: &[usize],
    lengths: &[usize],
    budget: usize,
    seed: u64,
    shuffled: bool,
) -> Vec<Vec<usize>> {
    let mut order = indices.to_vec();
    if shuffled {
        order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
    }
    chunks(&order, lengths, budget)
}

/// Cuts `order` where the next example would exceed `budget` tokens.
pub fn chunks(order: &[usize], lengths: &[usize], budget: usize) -> Vec<Vec<usize>> {
    let mut steps: Vec<Vec<usize>> = Vec::new();
    let mut room = 0;
    for &index in order {
        let length = lengths[index];
        match steps.last_mut() {
            Some(step) if length <= room => {
                step.push(index);
                room -= length;
            }
            _ => {
                steps.push(vec![index]);
                room = budget.saturating_sub(length);
            }
        }
    }
    steps
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_example_once_and_within_budget(lengths in prop::collection::vec(1usize..50, 1..200), budget in 1usize..120, seed: u64) {
            let indices: Vec<usize> = (0..lengths.len()).collect();
            let steps = epoch(&indices, &lengths, budget, seed, true);
            let mut seen: Vec<usize> = steps.iter().flatten().copied().collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, indices.clone());
            for step in &steps {
                let total: usize = step.iter().map(|&i| lengths[i]).sum();
                prop_assert!(total <= budget || step.len() == 1);
            }
            prop_assert_eq!(steps, epoch(&indices, &lengths, budget, seed, true));
        }
    }
}
