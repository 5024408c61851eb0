//! Is this answer right? The same verdict serves the CoT verifier, the rewards and the evaluation, so a rule that cannot
//! decide says `unknown`, never `wrong`.
//!
//! Decides today: exact numbers (integers, decimals, fractions, percentages, thousands separators, LaTeX spelling of
//! these), multiple-choice letters, and equal words. Deliberately absent: HTTP, tensors, and any judge model.
#![forbid(unsafe_code)]

pub mod extract;
pub mod number;

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
    let correct = equal(&gold, &answer);
    let evidence = match correct {
        Some(true) => format!("`{answer}` equals `{gold}`"),
        Some(false) => format!("`{answer}` is not `{gold}`"),
        None => format!("cannot compare `{answer}` with `{gold}` by rule"),
    };
    Finding { correct, evidence }
}

/// Whether two answers are equal; `None` when the rules cannot tell.
pub fn equal(gold: &str, answer: &str) -> Option<bool> {
    let (gold, answer) = (extract::plain(gold), extract::plain(answer));
    if gold == answer && !gold.is_empty() {
        return Some(true);
    }
    if let (Some(gold), Some(answer)) = (number::parse(&gold), number::parse(without_unit(&answer, &gold))) {
        return Some(gold.equals(&answer));
    }
    if let (Some(gold), Some(answer)) = (choice(&gold), choice(&answer)) {
        return Some(gold == answer);
    }
    let (gold, answer) = (gold.to_lowercase(), answer.to_lowercase());
    if gold == answer && !gold.is_empty() {
        return Some(true);
    }
    // Different words may mean the same, except where only two words are possible.
    let is_decision = |text: &str| ["yes", "no", "true", "false"].contains(&text);
    (is_decision(&gold) && is_decision(&answer)).then_some(false)
}

/// `72 clips` where the known answer is a bare number: a unit that only one side names does not count.
fn without_unit<'a>(answer: &'a str, gold: &str) -> &'a str {
    const COUNTS: [&str; 8] =
        ["dozen", "hundred", "thousand", "million", "billion", "trillion", "half", "percent"];
    match answer.split_once(' ') {
        Some((number, unit)) if !gold.contains(char::is_alphabetic) => {
            let is_unit = |word: &str| {
                let letters = word.len() > 1 && word.bytes().all(|byte| byte.is_ascii_alphabetic());
                letters && !COUNTS.iter().any(|count| word.to_ascii_lowercase().starts_with(count))
            };
            if unit.split(' ').all(is_unit) { number } else { answer }
        }
        _ => answer,
    }
}

/// The letter of a multiple-choice answer: `B`, `(B)`, `B.`.
fn choice(text: &str) -> Option<char> {
    let mut letters = text.chars().filter(|c| !matches!(c, '(' | ')' | '.' | ' '));
    let letter = letters.next()?;
    (letters.next().is_none() && ('A'..='J').contains(&letter)).then_some(letter)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts() {
        for (gold, answer, expected) in [
            ("17", "17.0", Some(true)),
            ("1234", "1,234", Some(true)),
            ("1000", "10^3", None),
            ("0.5", "\\frac{1}{2}", Some(true)),
            ("1/3", "0.333333", Some(true)),
            ("1/3", "0.33", Some(false)),
            ("50%", "0.5", Some(true)),
            ("50%", "50\\%", Some(true)),
            ("18", "\\$18", Some(true)),
            ("-3", "3", Some(false)),
            ("B", "(B)", Some(true)),
            ("A", "C", Some(false)),
            ("yes", "Yes", Some(true)),
            ("x+1", "1+x", None),
            ("72", "", None),
            ("72", "72 clips", Some(true)),
            ("5 cm", "5 m", None),
            ("3", "3x", None),
            ("2", "2 dozen", None),
            ("5", "5 million", None),
            ("Monday", "on Monday", None),
            ("yes", "no", Some(false)),
            ("4", "8/4/2", None),
            (
                "340282366920938463463374607431768211457",
                "340282366920938463463374607431768211456",
                Some(false),
            ),
        ] {
            assert_eq!(equal(gold, answer), expected, "{gold} | {answer}");
        }
    }

    #[test]
    fn thinking_does_not_count_and_the_last_box_wins() {
        assert_eq!(check("7", "<think>\\boxed{7}</think> \\boxed{8}").correct, Some(false));
        assert_eq!(check("7", "<think>x</think>\\boxed{4}, wait: \\boxed{7}").correct, Some(true));
        assert_eq!(check("7", "<think>\\boxed{7}").correct, None, "thinking that never ended has no answer");
        assert_eq!(check("#### 7", "The answer is 7.").correct, Some(true));
    }
}
