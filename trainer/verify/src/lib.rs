//! Is this answer right? One verifier serves the CoT verifier, the rewards and the evaluation, so a rule that cannot decide says
//! `unknown`, never `wrong`.
//!
//! Reads numbers (with units, percentages, bases, repeating decimals), fractions, roots, powers, formulas, sets, tuples,
//! intervals, relations, matrices, choices and words, in LaTeX or plain text. Values are compared by an exact normal form
//! ([`exact`]), else at random places with bounds on rounding ([`scalar`]). Two profiles on one parser: [`strict`] and
//! [`compat`]. Deliberately absent: HTTP, tensors, and any judge model. Time and memory are bounded; nothing panics.
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

pub use strict::Verdict;

/// Whose verdicts are given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Profile {
    /// Our own.
    #[default]
    Strict,
    /// Those of the Math-Verify package.
    Compat,
}

/// What a rule found out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Right, wrong, or not decided by rules.
    pub correct: Option<bool>,
    /// What the decision rests on.
    pub evidence: String,
}

/// Compares a completion (thinking and answer) with the known answer. Only what stands after the thinking counts; of
/// several boxes the last one.
pub fn check(gold: &str, completion: &str) -> Finding {
    let Some(answer) = extract::final_answer(completion) else {
        return Finding { correct: None, evidence: "no final answer found".to_owned() };
    };
    let gold = extract::final_answer(gold).unwrap_or_else(|| gold.trim().to_owned());
    let verdict = strict::compare_answers(&gold, &answer);
    let evidence = match verdict.equal {
        Some(true) => format!("`{answer}` equals `{gold}`: {}", verdict.why),
        Some(false) => format!("`{answer}` is not `{gold}`: {}", verdict.why),
        None => format!("cannot compare `{answer}` with `{gold}` by rule: {}", verdict.why),
    };
    Finding { correct: verdict.equal, evidence }
}

/// The verdict of a profile on a known answer and an answer, each with or without text around it.
pub fn verify(gold: &str, answer: &str, profile: Profile) -> Verdict {
    match profile {
        Profile::Compat => {
            let equal = compat::equal(gold, answer);
            Verdict { equal: Some(equal), why: if equal { "equal" } else { "not equal" }.to_owned() }
        }
        Profile::Strict => {
            let read = |text: &str| extract::final_answer(text);
            match (read(gold), read(answer)) {
                (Some(gold), Some(answer)) => strict::compare_answers(&gold, &answer),
                (None, _) => Verdict { equal: None, why: "the known answer is empty".to_owned() },
                (_, None) => Verdict { equal: None, why: "no final answer found".to_owned() },
            }
        }
    }
}

#[cfg(test)]
mod tests;
