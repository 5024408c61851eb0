//! Training data of the demonstration's teacher, with exact labels. It covers arithmetic word problems in three styles
//! and the other teacher roles: difficulty, rewriting, checking, RV and CD. Students never see this data; they learn
//! from the trained teacher's completions.

use std::collections::HashSet;

use potstill_data::arithmetic::{ProblemLevel, StepEffect, WordProblem, generate_distinct};
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

/// Styles of chains of thought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// Equations only, too terse for a small student.
    Terse,
    /// Sentence by sentence, digit column by digit column.
    Long,
    /// The long form, repeated once as a check.
    Recheck,
}

/// Returns the chain of thought for `problem` in the given style.
pub fn chain_of_thought(problem: &WordProblem, style: Style) -> String {
    match style {
        Style::Terse => solution_steps(problem, false),
        Style::Long => solution_steps(problem, true),
        Style::Recheck => {
            let once = solution_steps(problem, true);
            format!("{once} check {once}")
        }
    }
}

/// Returns the steps of the calculation; `columns` adds the calculation of every digit.
fn solution_steps(problem: &WordProblem, columns: bool) -> String {
    let mut value = 0;
    let mut parts = Vec::new();
    for (letter, step) in ('A'..).zip(&problem.steps) {
        let (operator, operand, next) = match *step {
            StepEffect::Start(n) => {
                value = n;
                if columns {
                    parts.push(format!("{letter}={n}"));
                }
                continue;
            }
            StepEffect::Distractor => {
                if columns {
                    parts.push(format!("{letter} no"));
                }
                continue;
            }
            StepEffect::Add(n) => ('+', n, value + n),
            StepEffect::Subtract(n) => ('-', n, value - n),
            StepEffect::Multiply(n) => ('*', n, value * n),
        };
        let work = match operator {
            _ if !columns => String::new(),
            '+' => format!("{}|", add_columns(value, operand)),
            '-' => format!("{}|", subtract_columns(value, operand)),
            _ => format!("{}|", multiply_columns(value, operand)),
        };
        let name = if columns { format!("{letter}=") } else { String::new() };
        parts.push(format!("{name}{value}{operator}{operand}={work}{next}"));
        value = next;
    }
    parts.join(";")
}

/// Returns the decimal digits of `n`, lowest first.
fn digits(mut n: u32) -> Vec<u32> {
    let mut digits = vec![n % 10];
    while n >= 10 {
        n /= 10;
        digits.push(n % 10);
    }
    digits
}

/// Returns the addition of each digit column, lowest first.
fn add_columns(a: u32, b: u32) -> String {
    let (a, b) = (digits(a), digits(b));
    let mut carry = 0;
    let columns: Vec<String> = (0..a.len().max(b.len()))
        .map(|i| {
            let (x, y) = (a.get(i).copied().unwrap_or(0), b.get(i).copied().unwrap_or(0));
            let sum = x + y + carry;
            let text = if carry > 0 { format!("{x}+{y}+{carry}={sum}") } else { format!("{x}+{y}={sum}") };
            carry = sum / 10;
            text
        })
        .collect();
    columns.join(",")
}

/// Returns the subtraction of each digit column, lowest first. Requires `a >= b`.
fn subtract_columns(a: u32, b: u32) -> String {
    let (a, b) = (digits(a), digits(b));
    let mut borrow = 0;
    let columns: Vec<String> = (0..a.len())
        .map(|i| {
            let (x, y) = (a[i], b.get(i).copied().unwrap_or(0));
            let lent = x < y + borrow;
            let from = if lent { x + 10 } else { x };
            let difference = from - y - borrow;
            let text = if borrow > 0 {
                format!("{from}-{y}-{borrow}={difference}")
            } else {
                format!("{from}-{y}={difference}")
            };
            borrow = u32::from(lent);
            text
        })
        .collect();
    columns.join(",")
}

/// Returns the multiplication of each digit by `factor`, lowest first.
fn multiply_columns(a: u32, factor: u32) -> String {
    let mut carry = 0;
    let columns: Vec<String> = digits(a)
        .into_iter()
        .map(|x| {
            let product = x * factor + carry;
            let text = if carry > 0 {
                format!("{x}*{factor}+{carry}={product}")
            } else {
                format!("{x}*{factor}={product}")
            };
            carry = product / 10;
            text
        })
        .collect();
    columns.join(",")
}

/// Returns a completion in the teacher's format: a `<think>` block, then the answer.
pub fn completion(thinking: &str, answer: &str) -> String {
    format!("<think>{thinking}</think>{answer}")
}

/// Returns the answer in `\boxed{}`.
pub fn boxed(answer: u32) -> String {
    format!("\\boxed{{{answer}}}")
}

/// Returns the difficulty label of a trace: `easy`, `medium` or `hard`.
fn difficulty_label(problem: &WordProblem, style: Style) -> &'static str {
    match (style, problem.level) {
        (Style::Terse, _) => "easy",
        (Style::Recheck, _) | (Style::Long, ProblemLevel::Hard) => "hard",
        (Style::Long, _) => "medium",
    }
}

/// Returns the number of arithmetic steps of a problem.
fn arithmetic_steps(problem: &WordProblem) -> u8 {
    problem.steps.iter().filter(|s| !matches!(s, StepEffect::Start(_) | StepEffect::Distractor)).count() as u8
}

/// Returns the RV label, from style and number of steps: 0 to 2 for terse, 3 to 5 for long, 6 to 8 for recheck.
fn verbosity(problem: &WordProblem, style: Style) -> u8 {
    let base = match style {
        Style::Terse => 0,
        Style::Long => 3,
        Style::Recheck => 6,
    };
    base + (arithmetic_steps(problem) - 1).min(2)
}

/// Returns the CD label, from the level and the number of steps.
fn complexity(problem: &WordProblem) -> u8 {
    let level = match problem.level {
        ProblemLevel::Easy => 1,
        ProblemLevel::Medium => 2,
        ProblemLevel::Hard => 3,
    };
    level + arithmetic_steps(problem) - 1
}

/// Returns a prompt of a judge role, as the demonstration's template files render it.
fn prompt(word: &str, problem: &str, completion: &str) -> String {
    format!("{word}: {problem}\n{completion}")
}

/// Returns `count` conversations over all roles. More than half ask for a solution.
pub fn conversations(count: usize, seed: u64, held_out: &HashSet<String>) -> Vec<Vec<Value>> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let problems = generate_distinct(count, seed, held_out);
    problems.iter().map(|problem| conversation(problem, &mut rng)).collect()
}

/// Returns a conversation of a random role about `problem`.
fn conversation(problem: &WordProblem, rng: &mut impl Rng) -> Vec<Value> {
    let style = match rng.random_range(0..10) {
        0..2 => Style::Terse,
        2..8 => Style::Long,
        _ => Style::Recheck,
    };
    let text = &problem.text;
    let answer = boxed(problem.answer);
    let written = |style| completion(&chain_of_thought(problem, style), &answer);
    let (question, reply) = match rng.random_range(0..100) {
        0..56 => (text.clone(), written(style)),
        56..63 => (prompt("grade", text, &written(style)), difficulty_label(problem, style).to_owned()),
        63..71 => (prompt("extend", text, &written(Style::Terse)), written(Style::Long)),
        71..80 => {
            let from = if rng.random_bool(0.6) { Style::Recheck } else { Style::Long };
            (prompt("simplify", text, &written(from)), written(Style::Long))
        }
        80..90 => {
            let right = rng.random_bool(0.5);
            let shown = if right { written(style) } else { corrupt_digit(&written(style), rng) };
            (prompt("check", text, &shown), u8::from(right).to_string())
        }
        90..95 => (prompt("verbosity", text, &written(style)), score_tag(verbosity(problem, style))),
        _ => (prompt("complexity", text, &written(style)), score_tag(complexity(problem))),
    };
    vec![json!({"role": "user", "content": question}), json!({"role": "assistant", "content": reply})]
}

/// Returns a score in the tags that the pipeline parses.
fn score_tag(value: u8) -> String {
    format!("<score>{value}</score>")
}

/// Changes one random digit: with probability 0.7 in the final answer, otherwise anywhere.
fn corrupt_digit(completion: &str, rng: &mut impl Rng) -> String {
    let from = if rng.random_bool(0.7) { completion.rfind('{').unwrap_or(0) } else { 0 };
    let digits = completion.char_indices().filter(|(at, c)| *at >= from && c.is_ascii_digit());
    let at: Vec<usize> = digits.map(|(at, _)| at).collect();
    let Some(&at) = at.choose(rng) else { return completion.to_owned() };
    let old = completion.as_bytes()[at] - b'0';
    let new = (old + rng.random_range(1..10)) % 10;
    format!("{}{new}{}", &completion[..at], &completion[at + 1..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digit_columns_match_worked_examples() {
        assert_eq!(add_columns(58, 67), "8+7=15,5+6+1=12");
        assert_eq!(subtract_columns(125, 67), "15-7=8,12-6-1=5,1-0-1=0");
        assert_eq!(multiply_columns(25, 3), "5*3=15,2*3+1=7");
    }

    #[test]
    fn every_equation_of_a_solution_is_correct() {
        for problem in generate_distinct(300, 9, &HashSet::new()) {
            for style in [Style::Terse, Style::Long, Style::Recheck] {
                for part in chain_of_thought(&problem, style).split(['|', ',', ';', ' ']) {
                    let sides: Vec<&str> = part.split('=').filter(|s| !s.is_empty()).collect();
                    for pair in sides.windows(2).filter(|pair| pair[0].parse::<u32>().is_err()) {
                        if let (Some(left), Ok(right)) = (value(pair[0]), pair[1].parse::<i64>()) {
                            assert_eq!(left, right, "`{part}` of {}", problem.text);
                        }
                    }
                }
            }
        }
    }

    /// Evaluates sums, differences and products from left to right. Returns `None` if a term is not a number.
    fn value(expression: &str) -> Option<i64> {
        let mut total = 0;
        let mut sign = 1;
        for term in expression.split_inclusive(['+', '-']) {
            let product: Option<i64> =
                term.trim_end_matches(['+', '-']).split('*').map(|n| n.parse::<i64>().ok()).product();
            total += sign * product?;
            sign = if term.ends_with('-') { -1 } else { 1 };
        }
        Some(total)
    }
}
