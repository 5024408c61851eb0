//! Verifier of answers, shared by the pipeline, the rewards of GRPO and the evaluation. An answer that the
//! rules cannot decide is unverifiable (`None`), never incorrect.
//!
//! Parses numbers, units, percentages, formulas, sets, tuples, intervals, relations, matrices, choices and
//! words, in LaTeX or plain text. Compares values by an exact normal form ([`exact`]), or else at sample
//! points with error bounds ([`scalar`]). The profiles [`strict`] and [`compat`] share one parser.
//!
//! Deliberately absent: HTTP, tensors and judge models. Time and memory are bounded, and no input causes a
//! panic.
#![forbid(unsafe_code)]

pub mod compat;
mod effort;
pub mod exact;
pub mod expr;
pub mod extract;
pub mod lexer;
pub mod numeric;
pub mod parser;
pub mod scalar;
pub mod strict;
pub mod units;
pub mod verifier;

pub use strict::Comparison;

/// Rules of equality.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Profile {
    /// Rules of this crate ([`strict`]).
    #[default]
    Strict,
    /// Rules of Math-Verify 0.9.0 ([`compat`]).
    Compat,
}

/// Result of comparing a completion with a reference answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleVerdict {
    /// Verdict: correct, incorrect, or `None` for unverifiable.
    pub correct: Option<bool>,
    /// Explanation of the verdict: both answers and the rule.
    pub evidence: String,
}

/// Compares the final answer of a completion with the reference answer `gold`, by the rules of [`strict`].
///
/// The reasoning does not count; of several boxes the last one counts (see [`extract::final_answer`]).
pub fn check_completion(gold: &str, completion: &str) -> RuleVerdict {
    let Some(answer) = extract::final_answer(completion) else {
        return RuleVerdict { correct: None, evidence: "no final answer found".to_owned() };
    };
    let gold = extract::final_answer(gold).unwrap_or_else(|| gold.trim().to_owned());
    let verdict = strict::compare_answers(&gold, &answer);
    let evidence = match verdict.equal {
        Some(true) => format!("`{answer}` equals `{gold}`: {}", verdict.why),
        Some(false) => format!("`{answer}` is not `{gold}`: {}", verdict.why),
        None => format!("cannot compare `{answer}` with `{gold}` by rule: {}", verdict.why),
    };
    RuleVerdict { correct: verdict.equal, evidence }
}

/// Compares `answer` with the reference answer `gold` by the rules of a profile. Both can be completions with
/// text around the answer.
///
/// The compat profile always decides; the strict profile returns `None` for unverifiable.
pub fn compare_with_profile(gold: &str, answer: &str, profile: Profile) -> Comparison {
    match profile {
        Profile::Compat => {
            let equal = compat::is_equal(gold, answer);
            Comparison { equal: Some(equal), why: if equal { "equal" } else { "not equal" }.to_owned() }
        }
        Profile::Strict => {
            let read = |text: &str| extract::final_answer(text);
            match (read(gold), read(answer)) {
                (Some(gold), Some(answer)) => strict::compare_answers(&gold, &answer),
                (None, _) => Comparison { equal: None, why: "the known answer is empty".to_owned() },
                (_, None) => Comparison { equal: None, why: "no final answer found".to_owned() },
            }
        }
    }
}

#[cfg(test)]
mod tests;
