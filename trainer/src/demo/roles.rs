//! What the demonstration's teacher is taught: solving the arithmetic word problems in three styles, and the other
//! teacher roles (difficulty, rewrite, check, verbosity, complexity) with exact labels. Students never see any of this:
//! they learn from what the trained teacher writes through the gateway.

use std::collections::HashSet;

use potstill_data::arithmetic::{Level, Step, WordProblem, distinct};
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

/// How a chain of thought is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// Only the equations: too terse for a small student.
    Terse,
    /// Sentence by sentence, column by column.
    Long,
    /// Long, and then everything once more.
    Recheck,
}

/// The chain of thought for `problem`.
pub fn thinking(problem: &WordProblem, style: Style) -> String {
    match style {
        Style::Terse => walk(problem, false),
        Style::Long => walk(problem, true),
        Style::Recheck => {
            let once = walk(problem, true);
            format!("{once} check {once}")
        }
    }
}

fn walk(problem: &WordProblem, columns: bool) -> String {
    let mut value = 0;
    let mut parts = Vec::new();
    for (letter, step) in ('A'..).zip(&problem.steps) {
        let (operator, operand, next) = match *step {
            Step::Start(n) => {
                value = n;
                if columns {
                    parts.push(format!("{letter}={n}"));
                }
                continue;
            }
            Step::Distractor => {
                if columns {
                    parts.push(format!("{letter} no"));
                }
                continue;
            }
            Step::Add(n) => ('+', n, value + n),
            Step::Subtract(n) => ('-', n, value - n),
            Step::Multiply(n) => ('*', n, value * n),
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

fn digits(mut n: u32) -> Vec<u32> {
    let mut digits = vec![n % 10];
    while n >= 10 {
        n /= 10;
        digits.push(n % 10);
    }
    digits
}

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

/// A completion in the teacher's format.
pub fn completion(thinking: &str, answer: &str) -> String {
    format!("<think>{thinking}</think>{answer}")
}

/// The boxed answer.
pub fn boxed(answer: u32) -> String {
    format!("\\boxed{{{answer}}}")
}

fn difficulty_label(problem: &WordProblem, style: Style) -> &'static str {
    match (style, problem.level) {
        (Style::Terse, _) => "easy",
        (Style::Recheck, _) | (Style::Long, Level::Hard) => "hard",
        (Style::Long, _) => "medium",
    }
}

fn arithmetic_steps(problem: &WordProblem) -> u8 {
    problem.steps.iter().filter(|s| !matches!(s, Step::Start(_) | Step::Distractor)).count() as u8
}

/// Reasoning Verbosity: how much is written.
fn verbosity(problem: &WordProblem, style: Style) -> u8 {
    let base = match style {
        Style::Terse => 0,
        Style::Long => 3,
        Style::Recheck => 6,
    };
    base + (arithmetic_steps(problem) - 1).min(2)
}

/// Cognitive Difficulty: what it takes to follow.
fn complexity(problem: &WordProblem) -> u8 {
    let level = match problem.level {
        Level::Easy => 1,
        Level::Medium => 2,
        Level::Hard => 3,
    };
    level + arithmetic_steps(problem) - 1
}

/// The short prompts of the demonstration, filled in as its template files are.
fn prompt(word: &str, problem: &str, completion: &str) -> String {
    format!("{word}: {problem}\n{completion}")
}

/// `count` conversations over all roles, about two thirds of them solving.
pub fn conversations(count: usize, seed: u64, held_out: &HashSet<String>) -> Vec<Vec<Value>> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let problems = distinct(count, seed, held_out);
    problems.iter().map(|problem| conversation(problem, &mut rng)).collect()
}

fn conversation(problem: &WordProblem, rng: &mut impl Rng) -> Vec<Value> {
    let style = match rng.random_range(0..10) {
        0..2 => Style::Terse,
        2..8 => Style::Long,
        _ => Style::Recheck,
    };
    let text = &problem.text;
    let answer = boxed(problem.answer);
    let written = |style| completion(&thinking(problem, style), &answer);
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
            let shown = if right { written(style) } else { damaged(&written(style), rng) };
            (prompt("check", text, &shown), u8::from(right).to_string())
        }
        90..95 => (prompt("verbosity", text, &written(style)), score(verbosity(problem, style))),
        _ => (prompt("complexity", text, &written(style)), score(complexity(problem))),
    };
    vec![json!({"role": "user", "content": question}), json!({"role": "assistant", "content": reply})]
}

fn score(value: u8) -> String {
    format!("<score>{value}</score>")
}

/// Changes one digit: mostly of the final answer, so that it no longer follows, else anywhere.
fn damaged(completion: &str, rng: &mut impl Rng) -> String {
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
    fn columns_are_right() {
        assert_eq!(add_columns(58, 67), "8+7=15,5+6+1=12");
        assert_eq!(subtract_columns(125, 67), "15-7=8,12-6-1=5,1-0-1=0");
        assert_eq!(multiply_columns(25, 3), "5*3=15,2*3+1=7");
    }

    #[test]
    fn every_equation_in_every_solution_holds() {
        for problem in distinct(300, 9, &HashSet::new()) {
            for style in [Style::Terse, Style::Long, Style::Recheck] {
                for part in thinking(&problem, style).split(['|', ',', ';', ' ']) {
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

    /// Sums, differences and one product, left to right.
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
