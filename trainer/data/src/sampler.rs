//! Target-aware selection: which correct traces a student of a given size should learn.
//!
//! The paper selects by RV and CD but publishes no formula. Ours: weight `exp(-β |RV - CD|) · exp(-β · distance of CD to
//! the student's window)` with β = 0.5, sampling without replacement by weight (Efraimidis and Spirakis 2006), at most k
//! traces per problem. Traces without scores get the mean weight of the scored ones.

use std::collections::HashMap;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::records::{Cot, Scores};

/// What the student can take.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SamplePolicy {
    /// Lowest cognitive difficulty that fits the student.
    pub cd_min: u8,
    /// Highest.
    pub cd_max: u8,
    /// At most so many traces per problem.
    pub per_problem: usize,
    /// At most so many traces in all; 0 for all that fit.
    pub limit: usize,
    /// Seed of the draw.
    pub seed: u64,
}

impl Default for SamplePolicy {
    /// For a student of up to 3B weights.
    fn default() -> Self {
        Self { cd_min: 2, cd_max: 5, per_problem: 2, limit: 0, seed: 0 }
    }
}

/// Weight of a trace with these scores; `None` without both.
pub fn weight(scores: Scores, policy: &SamplePolicy) -> Option<f64> {
    const BETA: f64 = 0.5;
    let (rv, cd) = (f64::from(scores.rv?), f64::from(scores.cd?));
    let distance = (f64::from(policy.cd_min) - cd).max(cd - f64::from(policy.cd_max)).max(0.0);
    Some((-BETA * (rv - cd).abs()).exp() * (-BETA * distance).exp())
}

/// Indices of the chosen traces, in input order.
pub fn choose(traces: &[Cot], policy: &SamplePolicy) -> Vec<usize> {
    let weights: Vec<Option<f64>> =
        traces.iter().map(|trace| weight(trace.scores.unwrap_or_default(), policy)).collect();
    let known: Vec<f64> = weights.iter().flatten().copied().collect();
    let mean = if known.is_empty() { 1.0 } else { known.iter().sum::<f64>() / known.len() as f64 };
    // The larger ln(u) / w, the earlier the draw; a stream per trace keeps the draw independent of the order.
    let mut keys: Vec<(f64, usize)> = traces
        .iter()
        .zip(&weights)
        .enumerate()
        .map(|(index, (trace, weight))| {
            let mut rng = ChaCha8Rng::seed_from_u64(trace.id.seed() ^ policy.seed);
            ((1.0 - rng.random::<f64>()).ln() / weight.unwrap_or(mean), index)
        })
        .collect();
    keys.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let mut taken: HashMap<&str, usize> = HashMap::new();
    let mut chosen = Vec::new();
    for (_, index) in keys {
        let count = taken.entry(traces[index].problem.id.as_str()).or_default();
        if *count < policy.per_problem && (policy.limit == 0 || chosen.len() < policy.limit) {
            *count += 1;
            chosen.push(index);
        }
    }
    chosen.sort_unstable();
    chosen
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::records::{Origin, Problem};

    fn trace(problem: u32, text: u32, rv: u8, cd: u8) -> Cot {
        let problem = Problem::new(format!("p{problem}"), None, "s");
        let thinking = format!("t{text}");
        Cot {
            id: Cot::content_id(&problem, &thinking, "1"),
            problem,
            thinking,
            answer: "1".into(),
            origin: Origin {
                teacher: "t".into(),
                prompt_hash: potstill_shared::id::ContentId::of(&["p"]),
                temperature: 1.0,
                sample: 0,
                seed: 0,
            },
            finish_reason: "stop".into(),
            completion_tokens: 1,
            parent: None,
            difficulty: None,
            verdict: None,
            scores: Some(Scores { rv: Some(rv), cd: Some(cd) }),
        }
    }

    proptest! {
        #[test]
        fn bounds_hold_and_order_does_not_matter(seed: u64, rows in prop::collection::vec((0u32..6, 0u8..10, 0u8..10), 1..40), limit in 0usize..20) {
            let traces: Vec<Cot> = rows.iter().enumerate().map(|(i, &(p, rv, cd))| trace(p, i as u32, rv, cd)).collect();
            let policy = SamplePolicy { limit, seed, ..SamplePolicy::default() };
            let chosen = choose(&traces, &policy);
            prop_assert!(limit == 0 || chosen.len() <= limit);
            let mut counts = HashMap::new();
            for &index in &chosen {
                *counts.entry(traces[index].problem.id.clone()).or_insert(0) += 1;
            }
            prop_assert!(counts.values().all(|&count| count <= policy.per_problem));
            let mut reversed = traces.clone();
            reversed.reverse();
            let again: Vec<_> = choose(&reversed, &policy).iter().map(|&i| reversed[i].id.clone()).collect();
            let mut first: Vec<_> = chosen.iter().map(|&i| traces[i].id.clone()).collect();
            first.reverse();
            prop_assert_eq!(again, first);
        }
    }

    #[test]
    fn traces_that_fit_are_drawn_more_often() {
        let policy = SamplePolicy { limit: 50, per_problem: 1, ..SamplePolicy::default() };
        let traces: Vec<Cot> =
            (0..200).map(|i| if i % 2 == 0 { trace(i, i, 4, 4) } else { trace(i, i, 9, 2) }).collect();
        let fitting = choose(&traces, &policy).iter().filter(|&&i| i % 2 == 0).count();
        assert!(fitting > 40, "{fitting} of 50");
    }
}
