//! Metrics of samples: accuracy with a bootstrap interval over problems, unbiased pass@k, and mean lengths. Pure
//! functions.

use std::collections::BTreeMap;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::StudentSample;

/// Number of bootstrap resamples.
const RESAMPLES: usize = 2000;

/// Metrics of one student; fractions are in percent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StudentMetrics {
    /// Number of problems.
    pub problems: usize,
    /// Smallest number of samples of any problem.
    pub samples: u32,
    /// Mean over problems of the fraction of correct samples.
    pub accuracy: f64,
    /// Lower bound of the 95 % interval of the accuracy.
    pub ci_low: f64,
    /// Upper bound of the interval.
    pub ci_high: f64,
    /// Unbiased pass@k by k.
    pub pass_at_k: BTreeMap<u32, f64>,
    /// Accuracy by level of the problem.
    pub accuracy_by_level: BTreeMap<String, f64>,
    /// Mean tokens of a completion, by level.
    pub mean_tokens_by_level: BTreeMap<String, f64>,
    /// Mean tokens of a completion.
    pub mean_tokens: f64,
    /// Fraction of truncated samples.
    pub truncated: f64,
}

/// Returns the probability that at least one of `k` samples is correct. The samples are drawn without replacement from
/// `n`, of which `c` are correct: `1 - C(n-c, k) / C(n, k)` (Chen et al. 2021). Computed as a product that cannot
/// overflow.
pub fn pass_at_k(n: u32, c: u32, k: u32) -> f64 {
    if n - c < k {
        return 1.0;
    }
    1.0 - (n - c + 1..=n).map(|i| 1.0 - f64::from(k) / f64::from(i)).product::<f64>()
}

/// Returns the mean; 0 without values.
fn mean(values: impl IntoIterator<Item = f64>) -> f64 {
    let (sum, count) = values.into_iter().fold((0.0, 0usize), |(sum, count), value| (sum + value, count + 1));
    if count == 0 { 0.0 } else { sum / count as f64 }
}

/// Returns the 95 % percentile interval of the mean, by resampling whole problems.
///
/// If all values are 0 or all are 1, resampling gives no interval. The exact binomial bound is used instead (Clopper
/// and Pearson 1934).
pub fn bootstrap_interval(values: &[f64], seed: u64) -> (f64, f64) {
    if values.is_empty() {
        return (0.0, 0.0);
    }
    let edge = 1.0 - 0.025f64.powf(1.0 / values.len() as f64);
    if values.iter().all(|value| *value == 0.0) {
        return (0.0, edge);
    }
    if values.iter().all(|value| *value == 1.0) {
        return (1.0 - edge, 1.0);
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut means: Vec<f64> = (0..RESAMPLES)
        .map(|_| mean((0..values.len()).map(|_| values[rng.random_range(0..values.len())])))
        .collect();
    means.sort_by(f64::total_cmp);
    (means[RESAMPLES * 25 / 1000], means[RESAMPLES * 975 / 1000 - 1])
}

/// Computes all metrics of a set of samples.
pub fn compute_metrics(samples: &[StudentSample]) -> StudentMetrics {
    let mut by_problem: BTreeMap<&str, (u32, u32, Option<&str>)> = BTreeMap::new();
    let mut tokens: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for sample in samples {
        let entry = by_problem.entry(sample.problem.as_str()).or_insert((0, 0, sample.level.as_deref()));
        entry.0 += 1;
        entry.1 += u32::from(sample.correct);
        if let Some(level) = &sample.level {
            tokens.entry(level.clone()).or_default().push(sample.tokens as f64);
        }
    }
    let shares: Vec<f64> = by_problem.values().map(|(n, c, _)| f64::from(*c) / f64::from(*n)).collect();
    let (low, high) = bootstrap_interval(&shares, 0);
    let fewest = by_problem.values().map(|(n, _, _)| *n).min().unwrap_or(0);
    let mut levels: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for (n, c, level) in by_problem.values() {
        if let Some(level) = level {
            levels.entry((*level).to_owned()).or_default().push(f64::from(*c) / f64::from(*n));
        }
    }
    StudentMetrics {
        problems: by_problem.len(),
        samples: fewest,
        accuracy: 100.0 * mean(shares.iter().copied()),
        ci_low: 100.0 * low,
        ci_high: 100.0 * high,
        pass_at_k: (1..=fewest)
            .map(|k| (k, 100.0 * mean(by_problem.values().map(|(n, c, _)| pass_at_k(*n, *c, k)))))
            .collect(),
        accuracy_by_level: levels.into_iter().map(|(level, shares)| (level, 100.0 * mean(shares))).collect(),
        mean_tokens_by_level: tokens.into_iter().map(|(level, tokens)| (level, mean(tokens))).collect(),
        mean_tokens: mean(samples.iter().map(|sample| sample.tokens as f64)),
        truncated: 100.0 * mean(samples.iter().map(|sample| f64::from(u8::from(sample.truncated)))),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Computes pass@k by counting all subsets of size `k`.
    fn brute_force(n: u32, c: u32, k: u32) -> f64 {
        let subsets: Vec<u32> = (0u32..1 << n).filter(|set| set.count_ones() == k).collect();
        let right = subsets.iter().filter(|set| **set & ((1 << c) - 1) != 0).count();
        right as f64 / subsets.len() as f64
    }

    #[test]
    fn pass_at_k_matches_counting_all_subsets() {
        for n in 1..=8 {
            for c in 0..=n {
                for k in 1..=n {
                    assert!((pass_at_k(n, c, k) - brute_force(n, c, k)).abs() < 1e-9, "{n} {c} {k}");
                }
            }
        }
    }

    #[test]
    fn interval_of_constant_results_is_the_exact_binomial_bound() {
        let (low, high) = bootstrap_interval(&[0.0; 20], 0);
        assert!(low == 0.0 && (high - 0.1684).abs() < 1e-3, "{high}");
        assert_eq!(bootstrap_interval(&[1.0; 20], 0), (1.0 - high, 1.0));
    }

    proptest! {
        #[test]
        fn interval_contains_the_mean(values in prop::collection::vec(0.0f64..1.0, 2..60)) {
            let (low, high) = bootstrap_interval(&values, 1);
            let mean = values.iter().sum::<f64>() / values.len() as f64;
            prop_assert!(low <= mean + 1e-9 && mean - 1e-9 <= high);
        }
    }
}
