//! Sampling of traces for training: selects correct traces that fit a student of a given size.
//!
//! The paper selects by RV and CD but publishes no formula. [`Selection::Window`] uses the weight `exp(-β |RV - CD|)
//! · exp(-β · d)` with β = 0.5; `d` is the distance of CD to the student's window. Traces are drawn without
//! replacement by weight (Efraimidis and Spirakis 2006); unscored traces get the mean weight. [`Selection::Range`]
//! and [`Selection::Bins`] are EasyDistill's rules. All rules keep at most k traces per problem. Deliberately absent:
//! files; callers pass ids and scores.

use std::collections::HashMap;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::records::{Scores, Trace};

/// Rule that ranks the traces.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SelectionRule {
    /// Weighted sampling around the student's CD window.
    #[default]
    Window,
    /// Uniform sampling of traces with RV and CD within limits (EasyDistill 1.x).
    Range,
    /// A number of traces per CD bin, nearest to the bin's RV target first (EasyDistill 2.0).
    Bins,
}

/// Target RV of the CD bins.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RvTarget {
    /// RV 2 in every bin.
    Low,
    /// RV 5 in every bin.
    Medium,
    /// RV 8 in every bin.
    High,
    /// RV 2 in the first bin, 8 in the last, evenly spaced between.
    #[default]
    Matched,
}

impl RvTarget {
    /// Returns the target RV, 0 to 9, of bin `bin` (from 0) among `bins` bins.
    pub fn target_for_bin(self, bin: usize, bins: usize) -> f64 {
        match self {
            Self::Low => 2.0,
            Self::Medium => 5.0,
            Self::High => 8.0,
            Self::Matched if bins < 2 => 5.0,
            Self::Matched => 2.0 + 6.0 * bin as f64 / (bins - 1) as f64,
        }
    }
}

/// Sampling configuration: section `sample` of a recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SamplingConfig {
    /// Rule that ranks the traces.
    pub selection: SelectionRule,
    /// Parameters of the student, in billions. Determines the default CD window.
    pub size_b: f64,
    /// Lower end of the CD window, 0 to 9; overrides `size_b`.
    pub cd_min: Option<u8>,
    /// Upper end of the CD window, 0 to 9; overrides `size_b`.
    pub cd_max: Option<u8>,
    /// Smallest RV, for `range`.
    pub rv_min: u8,
    /// Largest RV, for `range`.
    pub rv_max: u8,
    /// First CD of the second and each further bin, for `bins`.
    pub bins: Vec<u8>,
    /// Largest number of traces per bin, for `bins`; 0 for all.
    pub per_bin: usize,
    /// Target RV of each bin, for `bins`.
    pub rv_target: RvTarget,
    /// Largest number of traces per problem.
    pub per_problem: usize,
    /// Smallest number of traces of a problem; problems with fewer are excluded. OmniThought requires two correct
    /// traces.
    pub at_least: usize,
    /// Largest number of traces in total; 0 for no limit.
    pub limit: usize,
    /// Random seed.
    pub seed: u64,
}

impl Default for SamplingConfig {
    /// Returns the configuration for a student of up to 3 billion parameters.
    fn default() -> Self {
        Self {
            selection: SelectionRule::Window,
            size_b: 3.0,
            cd_min: None,
            cd_max: None,
            rv_min: 3,
            rv_max: 5,
            bins: vec![3, 6],
            per_bin: 0,
            rv_target: RvTarget::Matched,
            per_problem: 2,
            at_least: 1,
            limit: 0,
            seed: 0,
        }
    }
}

impl SamplingConfig {
    /// Returns the lower and upper end of the student's CD window, inclusive.
    pub fn cd_window(&self) -> (u8, u8) {
        let (least, most) = match self.size_b {
            size if size <= 3.5 => (2, 5),
            size if size <= 10.0 => (3, 6),
            size if size <= 24.0 => (4, 7),
            _ => (5, 9),
        };
        (self.cd_min.unwrap_or(least), self.cd_max.unwrap_or(most))
    }
}

/// Returns the weight of a trace with the rule [`Selection::Window`], above 0 and at most 1. `None` unless both
/// scores exist.
pub fn window_weight(scores: Scores, policy: &SamplingConfig) -> Option<f64> {
    const BETA: f64 = 0.5;
    let (rv, cd) = (f64::from(scores.rv?), f64::from(scores.cd?));
    let (least, most) = policy.cd_window();
    let distance = (f64::from(least) - cd).max(cd - f64::from(most)).max(0.0);
    Some((-BETA * (rv - cd).abs()).exp() * (-BETA * distance).exp())
}

/// Properties of a trace that determine its selection.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingCandidate {
    /// First 64 bits of the trace's id.
    pub id: u64,
    /// First 64 bits of the problem's id.
    pub problem: u64,
    /// RV and CD of the trace.
    pub scores: Scores,
}

impl SamplingCandidate {
    /// Creates the candidate for a trace.
    pub fn from_trace(trace: &Trace) -> Self {
        Self {
            id: trace.id.seed(),
            problem: trace.problem.id.seed(),
            scores: trace.scores.unwrap_or_default(),
        }
    }

    /// Returns a pseudo-random number in (0, 1] from id and seed. The selection therefore does not depend on the
    /// input order.
    fn pseudo_random(&self, seed: u64) -> f64 {
        1.0 - ChaCha8Rng::seed_from_u64(self.id ^ seed).random::<f64>()
    }
}

/// Selects traces and returns their indices, in input order.
pub fn select_traces(traces: &[SamplingCandidate], policy: &SamplingConfig) -> Vec<usize> {
    let mut have: HashMap<u64, usize> = HashMap::new();
    for trace in traces {
        *have.entry(trace.problem).or_default() += 1;
    }
    let mut order = match policy.selection {
        SelectionRule::Window => rank_by_weight(traces, policy),
        SelectionRule::Range => rank_within_range(traces, policy),
        SelectionRule::Bins => rank_by_bin(traces, policy),
    };
    order.retain(|ranked| {
        have.get(&traces[ranked.index].problem).is_some_and(|count| *count >= policy.at_least)
    });
    // Higher ranks come first.
    order.sort_by(|a, b| b.rank.total_cmp(&a.rank).then(a.index.cmp(&b.index)));
    let mut of_problem: HashMap<u64, usize> = HashMap::new();
    let mut of_bin: HashMap<usize, usize> = HashMap::new();
    let mut chosen = Vec::new();
    for RankedTrace { index, bin, .. } in order {
        if policy.limit > 0 && chosen.len() >= policy.limit {
            break;
        }
        let in_bin = of_bin.entry(bin).or_default();
        let in_problem = of_problem.entry(traces[index].problem).or_default();
        let bin_is_full =
            policy.selection == SelectionRule::Bins && policy.per_bin > 0 && *in_bin >= policy.per_bin;
        if *in_problem < policy.per_problem && !bin_is_full {
            *in_problem += 1;
            *in_bin += 1;
            chosen.push(index);
        }
    }
    chosen.sort_unstable();
    chosen
}

/// Trace with its rank; traces with higher ranks are selected first.
struct RankedTrace {
    rank: f64,
    index: usize,
    bin: usize,
}

fn rank_by_weight(traces: &[SamplingCandidate], policy: &SamplingConfig) -> Vec<RankedTrace> {
    let weights: Vec<Option<f64>> = traces.iter().map(|trace| window_weight(trace.scores, policy)).collect();
    let known: Vec<f64> = weights.iter().flatten().copied().collect();
    let mean = if known.is_empty() { 1.0 } else { known.iter().sum::<f64>() / known.len() as f64 };
    let ranked = traces.iter().zip(&weights).enumerate();
    ranked
        .map(|(index, (trace, weight))| {
            let rank = trace.pseudo_random(policy.seed).ln() / weight.unwrap_or(mean);
            RankedTrace { rank, index, bin: 0 }
        })
        .collect()
}

fn rank_within_range(traces: &[SamplingCandidate], policy: &SamplingConfig) -> Vec<RankedTrace> {
    let (least, most) = policy.cd_window();
    let fits = |scores: &Scores| {
        scores.rv.is_some_and(|rv| (policy.rv_min..=policy.rv_max).contains(&rv))
            && scores.cd.is_some_and(|cd| (least..=most).contains(&cd))
    };
    let fitting = traces.iter().enumerate().filter(|(_, trace)| fits(&trace.scores));
    fitting
        .map(|(index, trace)| RankedTrace { rank: trace.pseudo_random(policy.seed), index, bin: 0 })
        .collect()
}

fn rank_by_bin(traces: &[SamplingCandidate], policy: &SamplingConfig) -> Vec<RankedTrace> {
    let mut ranked = Vec::new();
    for (index, trace) in traces.iter().enumerate() {
        let (Some(rv), Some(cd)) = (trace.scores.rv, trace.scores.cd) else { continue };
        let bin = policy.bins.iter().filter(|edge| cd >= **edge).count();
        let target = policy.rv_target.target_for_bin(bin, policy.bins.len() + 1);
        // A small random term breaks ties between equal distances.
        let rank = -(f64::from(rv) - target).abs() + 1e-6 * trace.pseudo_random(policy.seed);
        ranked.push(RankedTrace { rank, index, bin });
    }
    ranked
}

/// Number of traces for each pair of RV and CD.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScoreHistogram {
    /// Counts, indexed by RV, then by CD.
    pub counts: [[u32; 10]; 10],
    /// Number of traces without both scores.
    pub unscored: u32,
}

impl ScoreHistogram {
    /// Counts the given scores.
    pub fn from_scores(scores: impl IntoIterator<Item = Scores>) -> Self {
        let mut histogram = Self::default();
        for scores in scores {
            match (scores.rv, scores.cd) {
                (Some(rv @ 0..=9), Some(cd @ 0..=9)) => {
                    histogram.counts[usize::from(rv)][usize::from(cd)] += 1;
                }
                _ => histogram.unscored += 1,
            }
        }
        histogram
    }

    /// Returns the number of traces with both scores.
    pub fn scored_count(&self) -> u32 {
        self.counts.iter().flatten().sum()
    }

    /// Returns the mean of `of(RV, CD)` over the scored traces; 0 if there are none.
    pub fn mean(&self, of: impl Fn(f64, f64) -> f64) -> f64 {
        let mut sum = 0.0;
        for (rv, row) in self.counts.iter().enumerate() {
            for (cd, count) in row.iter().enumerate() {
                sum += f64::from(*count) * of(rv as f64, cd as f64);
            }
        }
        sum / f64::from(self.scored_count().max(1))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn trace(problem: u64, text: u64, rv: u8, cd: u8) -> SamplingCandidate {
        let id = potstill_shared::id::ContentId::from_parts(&[&text.to_string()]).seed();
        SamplingCandidate { id, problem, scores: Scores { rv: Some(rv), cd: Some(cd) } }
    }

    const ALL: [SelectionRule; 3] = [SelectionRule::Window, SelectionRule::Range, SelectionRule::Bins];

    proptest! {
        #[test]
        fn respects_all_limits_and_ignores_the_input_order(
            seed: u64, rows in prop::collection::vec((0u64..6, 0u8..10, 0u8..10), 1..40), limit in 0usize..20, per_bin in 0usize..4, rule in 0usize..3
        ) {
            let traces: Vec<SamplingCandidate> = rows.iter().enumerate().map(|(i, &(p, rv, cd))| trace(p, i as u64, rv, cd)).collect();
            let policy = SamplingConfig { selection: ALL[rule], limit, per_bin, seed, ..SamplingConfig::default() };
            let chosen = select_traces(&traces, &policy);
            prop_assert!(limit == 0 || chosen.len() <= limit);
            let (mut counts, mut bins) = (HashMap::new(), HashMap::new());
            for &index in &chosen {
                *counts.entry(traces[index].problem).or_insert(0) += 1;
                *bins.entry(traces[index].scores.cd.unwrap() / 3).or_insert(0) += 1;
                if policy.selection == SelectionRule::Range {
                    prop_assert!((3..=5).contains(&traces[index].scores.rv.unwrap()) && (2..=5).contains(&traces[index].scores.cd.unwrap()));
                }
            }
            prop_assert!(counts.values().all(|&count| count <= policy.per_problem));
            let mut reversed = traces.clone();
            reversed.reverse();
            let again: Vec<_> = select_traces(&reversed, &policy).iter().map(|&i| reversed[i].id).collect();
            let mut first: Vec<_> = chosen.iter().map(|&i| traces[i].id).collect();
            first.reverse();
            prop_assert_eq!(again, first);
        }
    }

    #[test]
    fn prefers_traces_within_the_window() {
        let policy = SamplingConfig { limit: 50, per_problem: 1, ..SamplingConfig::default() };
        let traces: Vec<SamplingCandidate> =
            (0..200).map(|i| if i % 2 == 0 { trace(i, i, 4, 4) } else { trace(i, i, 9, 2) }).collect();
        let fitting = select_traces(&traces, &policy).iter().filter(|&&i| i % 2 == 0).count();
        assert!(fitting > 40, "{fitting} of 50");
    }

    /// EasyDistill 2.0 spaces the targets up to 10 and puts a CD of 9 into a bin of its own. Here, the scale ends at
    /// 9.
    #[test]
    fn matched_targets_stay_within_the_scale() {
        let targets: Vec<f64> = (0..3).map(|bin| RvTarget::Matched.target_for_bin(bin, 3)).collect();
        assert_eq!(targets, [2.0, 5.0, 8.0]);
        let policy =
            SamplingConfig { selection: SelectionRule::Bins, per_bin: 1, ..SamplingConfig::default() };
        let traces = [trace(1, 1, 8, 9), trace(2, 2, 2, 9), trace(3, 3, 2, 6), trace(4, 4, 3, 0)];
        assert_eq!(select_traces(&traces, &policy), [0, 3], "6 and 9 share the last bin");
    }

    #[test]
    fn excludes_problems_with_too_few_traces() {
        let traces = [trace(1, 1, 4, 4), trace(2, 2, 4, 4), trace(2, 3, 4, 4)];
        for selection in ALL {
            let policy = SamplingConfig { at_least: 2, selection, ..SamplingConfig::default() };
            assert_eq!(select_traces(&traces, &policy), [1, 2]);
        }
    }

    #[test]
    fn window_depends_on_the_student_size() {
        let window = |size_b| SamplingConfig { size_b, ..SamplingConfig::default() }.cd_window();
        assert_eq!([0.5, 3.0, 7.0, 14.0, 32.0].map(window), [(2, 5), (2, 5), (3, 6), (4, 7), (5, 9)]);
        assert_eq!(SamplingConfig { cd_max: Some(9), ..SamplingConfig::default() }.cd_window(), (2, 9));
    }

    #[test]
    fn histogram_counts_scored_and_unscored_traces() {
        let scores = [(Some(4), Some(6)), (Some(4), Some(6)), (Some(1), None)];
        let histogram = ScoreHistogram::from_scores(scores.map(|(rv, cd)| Scores { rv, cd }));
        assert_eq!((histogram.counts[4][6], histogram.scored_count(), histogram.unscored), (2, 2, 1));
        assert!((histogram.mean(|rv, cd| cd - rv) - 2.0).abs() < 1e-12);
    }
}
