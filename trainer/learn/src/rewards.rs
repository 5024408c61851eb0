//! Rewards of a completion (equations 1 to 3 of "Thinking with DistilQwen"), as pure functions.
//!
//! `R_RV = -|f - clip(f, low, high)|`, the same for `R_CD`, and `R = R_format + R_accuracy + λ_RV R_RV + λ_CD R_CD`.
//! `f` is the prediction of a reward model, 0 to 1. Both penalties lie in `[-1, 0]` and are zero inside the interval.
//!
//! Running the verifier and the reward models is left to [`crate::grpo`].

use serde::{Deserialize, Serialize};

/// Interval in which a score costs nothing, with the weight of the penalty outside.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScoreInterval {
    /// Lower bound, 0 to 1.
    pub low: f64,
    /// Upper bound, `low` to 1.
    pub high: f64,
    /// Weight λ of the penalty, at least 0.
    pub lambda: f64,
}

impl Default for ScoreInterval {
    fn default() -> Self {
        Self { low: 3.0 / 9.0, high: 6.0 / 9.0, lambda: 0.5 }
    }
}

impl ScoreInterval {
    /// Returns the penalty of score `f`: minus its distance to the interval (equations 1 and 2).
    pub fn penalty(&self, f: f64) -> f64 {
        -(f - f.clamp(self.low, self.high)).abs()
    }

    /// Returns whether `0 <= low <= high <= 1` and `lambda` is finite and not negative.
    pub fn is_valid(&self) -> bool {
        0.0 <= self.low
            && self.low <= self.high
            && self.high <= 1.0
            && self.lambda >= 0.0
            && self.lambda.is_finite()
    }
}

/// Reward of one completion, split into its terms.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct RewardTerms {
    /// 1 if the completion is one block of reasoning followed by an answer, else 0.
    pub format: f64,
    /// 1 if the answer is correct, else 0.
    pub accuracy: f64,
    /// RV penalty (equation 1), -1 to 0; 0 without an RV reward model.
    pub rv: f64,
    /// CD penalty (equation 2), -1 to 0; 0 without a CD reward model.
    pub cd: f64,
    /// Weighted sum of all terms (equation 3).
    pub total: f64,
}

/// Computes the reward of a completion (equation 3). `rv` and `cd` are predictions of reward models with their
/// intervals.
///
/// With `only_correct`, an incorrect answer gets no RV and CD penalty. Otherwise a group of only incorrect answers
/// would be trained on style alone.
pub fn combine_rewards(
    format: bool,
    correct: bool,
    rv: Option<(f64, ScoreInterval)>,
    cd: Option<(f64, ScoreInterval)>,
    only_correct: bool,
) -> RewardTerms {
    let one = |yes: bool| if yes { 1.0 } else { 0.0 };
    let styled = correct || !only_correct;
    let part = |scored: Option<(f64, ScoreInterval)>| match scored {
        Some((f, interval)) if styled => (interval.penalty(f), interval.lambda),
        _ => (0.0, 0.0),
    };
    let ((rv, lambda_rv), (cd, lambda_cd)) = (part(rv), part(cd));
    let (format, accuracy) = (one(format), one(correct));
    RewardTerms { format, accuracy, rv, cd, total: format + accuracy + lambda_rv * rv + lambda_cd * cd }
}

/// Returns whether a completion is one non-empty `<think>` block followed by a non-empty answer. `opened` says that the
/// prompt already contains the opening tag.
pub fn is_well_formed(completion: &str, opened: bool) -> bool {
    let text = completion.trim_start();
    let inside = match text.strip_prefix("<think>") {
        Some(rest) => rest,
        None if opened => text,
        None => return false,
    };
    match inside.split_once("</think>") {
        Some((thinking, answer)) => {
            let nested = |part: &str| part.contains("<think>") || part.contains("</think>");
            !nested(thinking) && !nested(answer) && !thinking.trim().is_empty() && !answer.trim().is_empty()
        }
        None => false,
    }
}

/// Computes the advantages within a group (DeepSeekMath, equation 3): rewards minus their mean. With `by_deviation`
/// they are divided by the standard deviation of the group (TRL: `scale_rewards`).
///
/// Returns `None` if all rewards are equal, because such a group has no gradient.
pub fn advantages(rewards: &[f64], by_deviation: bool) -> Option<Vec<f64>> {
    let n = rewards.len().max(1) as f64;
    let mean = rewards.iter().sum::<f64>() / n;
    let centred: Vec<f64> = rewards.iter().map(|reward| reward - mean).collect();
    // Sample deviation with n - 1, like `torch.std`.
    let deviation = (centred.iter().map(|value| value * value).sum::<f64>() / (n - 1.0).max(1.0)).sqrt();
    if deviation < 1e-8 {
        return None;
    }
    let scale = if by_deviation { 1.0 / (deviation + 1e-4) } else { 1.0 };
    Some(centred.into_iter().map(|value| value * scale).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn total_matches_the_worked_example() {
        let interval = ScoreInterval::default();
        let reward = combine_rewards(true, true, Some((0.20, interval)), Some((0.80, interval)), false);
        assert!((reward.rv + 0.133_333_333).abs() < 1e-8);
        assert!((reward.cd + 0.133_333_333).abs() < 1e-8);
        assert!((reward.total - 1.866_666_667).abs() < 1e-8);
    }

    #[test]
    fn well_formed_requires_one_think_block_and_an_answer() {
        for (text, opened, fine) in [
            ("<think>a</think>b", false, true),
            ("a</think>b", true, true),
            ("<think>a</think>b", true, true),
            ("a</think>b", false, false),
            ("<think>a</think>", false, false),
            ("<think> </think>b", false, false),
            ("<think>a", false, false),
            ("<think>a<think>b</think>c", false, false),
            ("<think>a</think>b</think>c", false, false),
            ("b", false, false),
        ] {
            assert_eq!(is_well_formed(text, opened), fine, "{text}");
        }
    }

    proptest! {
        /// A score inside the interval costs nothing. With λ up to 0.5, a correct answer never scores below an
        /// incorrect one of the same format.
        #[test]
        fn penalties_are_bounded_and_correct_answers_outrank_incorrect_ones(f in 0.0f64..=1.0, g in 0.0f64..=1.0, low in 0.0f64..=1.0, width in 0.0f64..=1.0) {
            let interval = ScoreInterval { low, high: (low + width).min(1.0), lambda: 0.5 };
            prop_assert!(interval.is_valid());
            prop_assert!((-1.0..=0.0).contains(&interval.penalty(f)));
            prop_assert_eq!(interval.penalty(f) == 0.0, f >= interval.low && f <= interval.high);
            let right = combine_rewards(true, true, Some((f, interval)), Some((g, interval)), false).total;
            let wrong = combine_rewards(true, false, Some((g, interval)), Some((f, interval)), false).total;
            prop_assert!(right >= wrong);
        }

        #[test]
        fn advantages_have_zero_mean_and_bounded_variance(rewards in prop::collection::vec(-1.0f64..2.0, 2..20)) {
            let n = rewards.len() as f64;
            if let Some(advantages) = advantages(&rewards, true) {
                prop_assert!(advantages.iter().sum::<f64>().abs() < 1e-6);
                let variance = advantages.iter().map(|a| a * a).sum::<f64>() / (n - 1.0);
                prop_assert!(variance <= 1.0 + 1e-9);
            }
            prop_assert_eq!(super::advantages(&vec![0.7; rewards.len()], true), None);
        }
    }
}
