//! Metrics of one benchmark, and the paired comparison of two runs. Pure functions over samples.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::sample::EvalSample;
use crate::evaluate::metrics::{bootstrap_interval, pass_at_k};

/// Statistics of completion lengths in tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct LengthStats {
    /// Number of samples.
    pub count: usize,
    /// Mean length.
    pub mean: f64,
    /// Median length.
    pub p50: f64,
    /// 95th percentile.
    pub p95: f64,
}

impl LengthStats {
    /// Computes the statistics; all values are 0 without samples.
    fn from_tokens(tokens: impl Iterator<Item = u64>) -> Self {
        let mut sorted: Vec<u64> = tokens.collect();
        sorted.sort_unstable();
        let at = |share: f64| {
            sorted.get(((sorted.len() as f64 * share) as usize).min(sorted.len().saturating_sub(1)))
        };
        Self {
            count: sorted.len(),
            mean: sorted.iter().sum::<u64>() as f64 / sorted.len().max(1) as f64,
            p50: at(0.5).map_or(0.0, |tokens| *tokens as f64),
            p95: at(0.95).map_or(0.0, |tokens| *tokens as f64),
        }
    }
}

/// Metrics of one benchmark; fractions are in percent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalMetrics {
    /// Name of the benchmark.
    pub bench: String,
    /// Number of problems.
    pub problems: usize,
    /// Smallest number of samples of any problem.
    pub samples: u32,
    /// Mean over problems of the fraction of correct samples (pass@1).
    pub accuracy: f64,
    /// Lower bound of the 95 % interval, by bootstrap over problems. Exact binomial bound if all or no samples are
    /// correct.
    pub ci_low: f64,
    /// Upper bound of the interval.
    pub ci_high: f64,
    /// Unbiased pass@k by k (Chen et al. 2021).
    pub pass_at_k: BTreeMap<u32, f64>,
    /// Fraction of problems whose most frequent answer is correct (cons@k). `None` for programs and single samples.
    pub cons: Option<f64>,
    /// Lengths of all samples.
    pub tokens: LengthStats,
    /// Lengths of correct samples.
    pub tokens_right: LengthStats,
    /// Lengths of all other samples.
    pub tokens_wrong: LengthStats,
    /// Metrics by level of the problem.
    pub levels: BTreeMap<String, LevelMetrics>,
    /// Fraction of truncated samples.
    pub truncated: f64,
    /// Fraction of unverifiable samples; they count as incorrect.
    pub undecided: f64,
    /// Fraction of samples without a completion from the endpoint; they count as incorrect.
    pub failed: f64,
}

/// Metrics of the problems of one level.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LevelMetrics {
    /// Number of problems.
    pub problems: usize,
    /// Mean fraction of correct samples, in percent.
    pub accuracy: f64,
    /// Lengths of all samples.
    pub tokens: LengthStats,
    /// Lengths of correct samples.
    pub tokens_right: LengthStats,
    /// Lengths of all other samples.
    pub tokens_wrong: LengthStats,
}

/// Groups samples by problem.
fn by_problem(samples: &[EvalSample]) -> BTreeMap<&str, Vec<&EvalSample>> {
    let mut all: BTreeMap<&str, Vec<&EvalSample>> = BTreeMap::new();
    for sample in samples {
        all.entry(sample.problem.as_str()).or_default().push(sample);
    }
    all
}

/// Returns the fraction of correct samples, 0 to 1.
fn correct_fraction(samples: &[&EvalSample]) -> f64 {
    samples.iter().filter(|sample| sample.correct == Some(true)).count() as f64 / samples.len().max(1) as f64
}

/// Returns the mean; 0 without values.
fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len().max(1);
    values.sum::<f64>() / count as f64
}

/// Returns whether the most frequent answer of a problem is correct. Equal answers in different notation count
/// together. Returns `None` if no sample has an answer.
fn is_majority_correct(samples: &[&EvalSample]) -> Option<bool> {
    let mut votes: Vec<(&str, usize, bool)> = Vec::new();
    for sample in samples {
        let Some(answer) = sample.answer.as_deref() else { continue };
        let same = |known: &str| {
            known == answer || potstill_verify::strict::compare_answers(known, answer).equal == Some(true)
        };
        match votes.iter_mut().find(|(known, ..)| same(known)) {
            Some((_, count, _)) => *count += 1,
            None => votes.push((answer, 1, sample.correct == Some(true))),
        }
    }
    // Among equally frequent answers, the first wins.
    votes.iter().rev().max_by_key(|(_, count, _)| *count).map(|(.., right)| *right)
}

/// Computes the metrics of one benchmark. `code` says that answers are programs, for which there is no cons@k.
pub fn compute_metrics(bench: &str, samples: &[EvalSample], code: bool) -> EvalMetrics {
    let problems = by_problem(samples);
    let shares: Vec<f64> = problems.values().map(|samples| correct_fraction(samples)).collect();
    let (low, high) = bootstrap_interval(&shares, 0);
    let fewest = problems.values().map(Vec::len).min().unwrap_or(0) as u32;
    let counts: Vec<(u32, u32)> = problems
        .values()
        .map(|samples| {
            let right = samples.iter().filter(|sample| sample.correct == Some(true)).count();
            (samples.len() as u32, right as u32)
        })
        .collect();
    let votes: Vec<bool> =
        problems.values().map(|samples| is_majority_correct(samples).unwrap_or(false)).collect();
    let mut levels: BTreeMap<String, Vec<&Vec<&EvalSample>>> = BTreeMap::new();
    for samples in problems.values() {
        if let Some(level) = &samples[0].level {
            levels.entry(level.clone()).or_default().push(samples);
        }
    }
    let of = |is: &dyn Fn(&EvalSample) -> bool| {
        100.0 * samples.iter().filter(|sample| is(sample)).count() as f64 / samples.len().max(1) as f64
    };
    let lengths = |is: &dyn Fn(&EvalSample) -> bool| {
        LengthStats::from_tokens(
            samples.iter().filter(|sample| !sample.failed && is(sample)).map(|sample| sample.tokens),
        )
    };
    EvalMetrics {
        bench: bench.to_owned(),
        problems: problems.len(),
        samples: fewest,
        accuracy: 100.0 * mean(shares.iter().copied()),
        ci_low: 100.0 * low,
        ci_high: 100.0 * high,
        pass_at_k: (1..=fewest)
            .filter(|k| k.is_power_of_two() || *k == fewest)
            .map(|k| (k, 100.0 * mean(counts.iter().map(|(n, c)| pass_at_k(*n, *c, k)))))
            .collect(),
        cons: (!code && fewest > 1)
            .then(|| 100.0 * mean(votes.iter().map(|right| f64::from(u8::from(*right))))),
        tokens: lengths(&|_| true),
        tokens_right: lengths(&|sample| sample.correct == Some(true)),
        tokens_wrong: lengths(&|sample| sample.correct != Some(true)),
        levels: levels
            .into_iter()
            .map(|(level, problems)| {
                let lengths = |is: &dyn Fn(&EvalSample) -> bool| {
                    let samples = problems.iter().flat_map(|samples| samples.iter());
                    LengthStats::from_tokens(
                        samples.filter(|sample| !sample.failed && is(sample)).map(|sample| sample.tokens),
                    )
                };
                let figures = LevelMetrics {
                    problems: problems.len(),
                    accuracy: 100.0 * mean(problems.iter().map(|samples| correct_fraction(samples))),
                    tokens: lengths(&|_| true),
                    tokens_right: lengths(&|sample| sample.correct == Some(true)),
                    tokens_wrong: lengths(&|sample| sample.correct != Some(true)),
                };
                (level, figures)
            })
            .collect(),
        truncated: of(&|sample| sample.truncated),
        undecided: of(&|sample| sample.correct.is_none() && !sample.failed),
        failed: of(&|sample| sample.failed),
    }
}

/// Paired comparison of two runs on their common problems.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// Name of the benchmark.
    pub bench: String,
    /// Number of common problems.
    pub problems: usize,
    /// Accuracy of the first run, in percent.
    pub a: f64,
    /// Accuracy of the second run, in percent.
    pub b: f64,
    /// Second accuracy minus first, in points.
    pub difference: f64,
    /// Lower bound of the difference's 95 % interval, by bootstrap over problems.
    pub ci_low: f64,
    /// Upper bound of the interval.
    pub ci_high: f64,
    /// Number of problems on which the second run is better.
    pub better: usize,
    /// Number of problems on which the second run is worse.
    pub worse: usize,
    /// Mean tokens of the second run divided by those of the first, over all samples.
    pub length_ratio: f64,
}

/// Compares two runs problem by problem. Paired differences give a much tighter interval than two separate intervals.
/// Returns `None` without common problems.
pub fn compare_samples(bench: &str, a: &[EvalSample], b: &[EvalSample]) -> Option<Comparison> {
    let (first, second) = (by_problem(a), by_problem(b));
    let pairs: Vec<(f64, f64)> = first
        .iter()
        .filter_map(|(problem, samples)| {
            Some((correct_fraction(samples), correct_fraction(second.get(problem)?)))
        })
        .collect();
    if pairs.is_empty() {
        return None;
    }
    let differences: Vec<f64> = pairs.iter().map(|(a, b)| b - a).collect();
    let (low, high) = bootstrap_interval(&differences, 0);
    // Equal results do not prove equality, so the interval extends to both sides.
    let low = if differences.iter().all(|difference| *difference == 0.0) { -high } else { low };
    let tokens =
        |samples: &[EvalSample]| LengthStats::from_tokens(samples.iter().map(|sample| sample.tokens)).mean;
    Some(Comparison {
        bench: bench.to_owned(),
        problems: pairs.len(),
        a: 100.0 * mean(pairs.iter().map(|(a, _)| *a)),
        b: 100.0 * mean(pairs.iter().map(|(_, b)| *b)),
        difference: 100.0 * mean(differences.iter().copied()),
        ci_low: 100.0 * low,
        ci_high: 100.0 * high,
        better: differences.iter().filter(|difference| **difference > 0.0).count(),
        worse: differences.iter().filter(|difference| **difference < 0.0).count(),
        length_ratio: tokens(b) / tokens(a).max(1.0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(problem: &str, number: u32, answer: &str, correct: Option<bool>, tokens: u64) -> EvalSample {
        EvalSample {
            problem: problem.to_owned(),
            sample: number,
            answer: Some(answer.to_owned()),
            correct,
            tokens,
            ..EvalSample::default()
        }
    }

    #[test]
    fn figures_match_hand_counted_samples() {
        let samples = [
            sample("a", 0, "1", Some(true), 10),
            sample("a", 1, "1.0", Some(true), 20),
            sample("a", 2, "2", Some(false), 30),
            sample("b", 0, "3", Some(false), 40),
            sample("b", 1, "4", None, 50),
            sample("b", 2, "4", None, 60),
        ];
        let figures = compute_metrics("x", &samples, false);
        assert_eq!((figures.problems, figures.samples, figures.cons), (2, 3, Some(50.0)));
        assert!((figures.accuracy - 100.0 / 3.0).abs() < 1e-9);
        assert_eq!(
            (figures.tokens_right.mean, figures.tokens_wrong.p50, figures.tokens.p95),
            (15.0, 50.0, 60.0)
        );
        assert!((figures.undecided - 100.0 / 3.0).abs() < 1e-9 && figures.pass_at_k[&1] == figures.accuracy);
        assert!(figures.pass_at_k[&2] > figures.pass_at_k[&1] && figures.pass_at_k[&3] == 50.0);
    }

    #[test]
    fn comparison_pairs_common_problems() {
        let run = |shift: usize| -> Vec<EvalSample> {
            (0..50)
                .map(|n| sample(&n.to_string(), 0, "", Some(n % 5 < 2 + shift), 10 + shift as u64 * 10))
                .collect()
        };
        let found = compare_samples("x", &run(0), &run(1)).unwrap();
        assert_eq!((found.problems, found.better, found.worse, found.length_ratio), (50, 10, 0, 2.0));
        assert!((found.difference - 20.0).abs() < 1e-9 && found.ci_low > 0.0 && found.ci_high < 40.0);
        assert!(compare_samples("x", &run(0), &[]).is_none());
    }
}
