//! Packing: groups examples into steps and micro batches by a token budget.
//!
//! Examples are packed without padding, and each attends only to itself. A step is therefore just as many examples as
//! fit the budget.
//!
//! Pure functions: the order of an epoch depends only on its indices, lengths, budget and seed. A checkpoint can
//! therefore store the data position as one number.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// Returns the steps of one epoch, each a list of indices into `lengths`. With `shuffled`, `seed` determines the order.
/// A step holds at most `budget` tokens; an example longer than the budget is a step of its own.
pub fn pack_epoch(
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
    pack_chunks(&order, lengths, budget)
}

/// Splits `order` into consecutive chunks of at most `budget` tokens. An example longer than the budget is a chunk of
/// its own.
pub fn pack_chunks(order: &[usize], lengths: &[usize], budget: usize) -> Vec<Vec<usize>> {
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
        fn epoch_holds_every_example_once_within_the_token_budget(lengths in prop::collection::vec(1usize..50, 1..200), budget in 1usize..120, seed: u64) {
            let indices: Vec<usize> = (0..lengths.len()).collect();
            let steps = pack_epoch(&indices, &lengths, budget, seed, true);
            let mut seen: Vec<usize> = steps.iter().flatten().copied().collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, indices.clone());
            for step in &steps {
                let total: usize = step.iter().map(|&i| lengths[i]).sum();
                prop_assert!(total <= budget || step.len() == 1);
            }
            prop_assert_eq!(steps, pack_epoch(&indices, &lengths, budget, seed, true));
        }
    }
}
