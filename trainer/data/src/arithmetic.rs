//! Generator of arithmetic word problems for the demonstration and for tests. A problem states how many things one
//! person has and how the number changes. Each sentence begins with a letter, to which a chain of thought can refer.
//!
//! Three levels:
//! - easy: 1 or 2 steps, one-digit numbers;
//! - medium: 1 or 2 steps, numbers up to 99, sometimes a sentence about another person;
//! - hard: 3 or 4 steps, numbers up to 99, factors up to 6, always a sentence about another person.
//!
//! Results never exceed 999. Deliberately absent: the traces, which the demonstration's teacher writes.

use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use crate::records::Problem;

/// Names of persons that occur in the problems.
pub const NAMES: [&str; 8] = ["Ann", "Ben", "Dan", "Eve", "Kim", "Max", "Sue", "Tom"];
/// Things that occur in the problems.
pub const ITEMS: [&str; 8] = ["apples", "books", "cards", "coins", "cups", "pens", "shells", "stamps"];
const GAINS: [&str; 3] = ["buys", "finds", "gets"];
const LOSSES: [&str; 3] = ["gives", "loses", "sells"];

/// Difficulty of a generated problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ProblemLevel {
    /// 1 or 2 steps, one-digit numbers, no distractor.
    Easy,
    /// 1 or 2 steps, numbers up to 99, a distractor in 30 % of the problems.
    Medium,
    /// 3 or 4 steps, numbers up to 99, one multiplication by 2 to 6, one distractor.
    Hard,
}

impl ProblemLevel {
    /// All levels, from easy to hard.
    pub const ALL: [Self; 3] = [Self::Easy, Self::Medium, Self::Hard];

    /// Returns the lower-case name that reports and metadata show.
    pub fn name(self) -> &'static str {
        match self {
            Self::Easy => "easy",
            Self::Medium => "medium",
            Self::Hard => "hard",
        }
    }
}

/// Effect of one sentence on the count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepEffect {
    /// Sets the initial count.
    Start(u32),
    /// Increases the count.
    Add(u32),
    /// Decreases the count.
    Subtract(u32),
    /// Multiplies the count.
    Multiply(u32),
    /// Describes another person and leaves the count unchanged.
    Distractor,
}

/// Generated problem with the meaning of its sentences.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WordProblem {
    /// Difficulty of the problem.
    pub level: ProblemLevel,
    /// Effect of each sentence, in order, without the final question.
    pub steps: Vec<StepEffect>,
    /// Problem text, with the final question.
    pub text: String,
    /// Final count, 1 to 999.
    pub answer: u32,
}

impl WordProblem {
    /// Converts the problem to a [`Problem`] from `source`, with the level in its metadata.
    pub fn to_problem(&self, source: &str) -> Problem {
        let mut problem = Problem::new(self.text.clone(), Some(self.answer.to_string()), source);
        problem.metadata.insert("level".to_owned(), json!(self.level.name()));
        problem
    }
}

/// Generates one problem of the given level.
pub fn generate_problem(level: ProblemLevel, rng: &mut impl Rng) -> WordProblem {
    loop {
        if let Some(problem) = try_generate(level, rng) {
            return problem;
        }
    }
}

/// Generates `count` distinct problems with the levels in turn, without the texts in `taken`. Equal arguments give
/// equal problems. Does not return if fewer than `count` distinct problems exist.
pub fn generate_distinct(
    count: usize,
    seed: u64,
    taken: &std::collections::HashSet<String>,
) -> Vec<WordProblem> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut seen = taken.clone();
    let mut problems = Vec::with_capacity(count);
    while problems.len() < count {
        let problem = generate_problem(ProblemLevel::ALL[problems.len() % 3], &mut rng);
        if seen.insert(problem.text.clone()) {
            problems.push(problem);
        }
    }
    problems
}

fn try_generate(level: ProblemLevel, rng: &mut impl Rng) -> Option<WordProblem> {
    let (count, largest, distractor) = match level {
        ProblemLevel::Easy => (rng.random_range(1..=2), 9, false),
        ProblemLevel::Medium => (rng.random_range(1..=2), 99, rng.random_bool(0.3)),
        ProblemLevel::Hard => (rng.random_range(3..=4), 99, true),
    };
    let mut value = rng.random_range(1..=largest);
    let mut steps = vec![StepEffect::Start(value)];
    let factor_at = (level == ProblemLevel::Hard).then(|| rng.random_range(1..=count));
    for step in 1..=count {
        let operand = rng.random_range(1..=largest);
        let next = if factor_at == Some(step) {
            StepEffect::Multiply(rng.random_range(2..=6))
        } else if rng.random_bool(0.5) {
            StepEffect::Add(operand)
        } else {
            StepEffect::Subtract(operand)
        };
        value = match next {
            StepEffect::Add(n) => value + n,
            StepEffect::Subtract(n) => value.checked_sub(n)?,
            StepEffect::Multiply(n) => value * n,
            StepEffect::Start(_) | StepEffect::Distractor => value,
        };
        if value == 0 || value > 999 {
            return None;
        }
        steps.push(next);
    }
    if distractor {
        steps.insert(rng.random_range(1..=steps.len()), StepEffect::Distractor);
    }
    let pick = |list: &[&'static str], rng: &mut _| list.choose(rng).copied();
    let (name, item) = (pick(&NAMES, rng)?, pick(&ITEMS, rng)?);
    let other = NAMES.iter().filter(|n| **n != name).collect::<Vec<_>>().choose(rng).copied()?;
    let mut text = String::new();
    for (letter, step) in ('A'..).zip(&steps) {
        let sentence = match step {
            StepEffect::Start(n) => format!("{name} has {n} {item}."),
            StepEffect::Add(n) => format!("{name} {} {n} more.", pick(&GAINS, rng)?),
            StepEffect::Subtract(n) => format!("{name} {} {n} away.", pick(&LOSSES, rng)?),
            StepEffect::Multiply(n) => format!("{name} has {n} times as many now."),
            StepEffect::Distractor => format!("{other} has {} {item}.", rng.random_range(1..=largest)),
        };
        text.push_str(&format!("{letter} {sentence} "));
    }
    text.push_str(&format!("How many {item} has {name}?"));
    Some(WordProblem { level, steps, text, answer: value })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answer_equals_the_result_of_the_steps() {
        for problem in generate_distinct(300, 5, &std::collections::HashSet::new()) {
            let value = problem.steps.iter().fold(0u32, |value, step| match step {
                StepEffect::Start(n) => *n,
                StepEffect::Add(n) => value + n,
                StepEffect::Subtract(n) => value - n,
                StepEffect::Multiply(n) => value * n,
                StepEffect::Distractor => value,
            });
            assert_eq!(value, problem.answer, "{}", problem.text);
            assert!((1..=999).contains(&value));
            let letters = problem.text.matches(". ").count();
            assert_eq!(letters, problem.steps.len(), "{}", problem.text);
        }
    }

    #[test]
    fn equal_seeds_generate_equal_problems() {
        let none = std::collections::HashSet::new();
        assert_eq!(generate_distinct(50, 1, &none), generate_distinct(50, 1, &none));
        assert_ne!(generate_distinct(50, 1, &none), generate_distinct(50, 2, &none));
    }
}
