//! Rules of the strict profile, the default. Answers are different only if proven so; undecided pairs are
//! unverifiable (`None`).
//!
//! Units must agree if both sides have one. A percentage equals its value and also its digits. Decimals agree
//! within a relative error of one millionth.
//!
//! Deliberately absent: extraction of the answer from a completion (see [`crate::extract`]).

mod comparison;
mod relations;

use std::collections::BTreeSet;

use num_rational::BigRational;
use num_traits::{Signed, Zero};

pub use self::comparison::Comparison;
use self::comparison::{comparison, is_container};
use self::relations::{Comparers, compare_relations};
use crate::effort::{WORK_BUDGET_UNITS, spend, with_work_budget};
use crate::exact::{AtomTable, substitute};
use crate::expr::{Constant, Expr, IntervalBound};
use crate::numeric::{SamplePoint, evaluate};
use crate::parser::{LetterMode, parse};
use crate::scalar::{Domain, ValueComparison, compare_values};
use crate::units;

/// Compares two final answers without surrounding text, within the work budget.
///
/// The result does not depend on the order of the two, except for a letter with following text.
pub fn compare_answers(gold: &str, answer: &str) -> Comparison {
    let (gold, answer) = (gold.trim(), answer.trim());
    if gold.is_empty() || answer.is_empty() {
        return comparison(None, "one side is empty");
    }
    if gold == answer {
        return comparison(true, "the same text");
    }
    if let Some(found) = compare_words(gold, answer) {
        return found;
    }
    with_work_budget(WORK_BUDGET_UNITS, || compare_formulas(gold, answer))
        .unwrap_or_else(|| comparison(None, "to compare them takes more work than is done for one answer"))
}

/// Parses and compares two answers that are not words.
fn compare_formulas(gold: &str, answer: &str) -> Comparison {
    let read = |side: &str| parse(&join_digit_groups(side), LetterMode::Words).map(normalize_answer);
    match (read(gold), read(answer)) {
        (Ok(gold), Ok(answer)) => {
            let found = compare_exprs(&gold, &answer);
            if found.equal == Some(false)
                && compare_exprs(&lowercase_variables(&gold), &lowercase_variables(&answer)).equal
                    == Some(true)
            {
                return comparison(None, "the letters differ in case only");
            }
            found
        }
        (Err(problem), _) => comparison(None, format!("the known answer is not understood: {problem}")),
        (_, Err(problem)) => comparison(None, format!("the answer is not understood: {problem}")),
    }
}

/// Removes the spaces between groups of three digits, as in `1 234 567`.
fn join_digit_groups(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let digits =
        |from: usize| chars[from.min(chars.len())..].iter().take_while(|c| c.is_ascii_digit()).count();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while at < chars.len() {
        let run = digits(at);
        if run == 0 {
            out.push(chars[at]);
            at += 1;
            continue;
        }
        out.extend(&chars[at..at + run]);
        at += run;
        if run <= 3 {
            while chars.get(at) == Some(&' ') && digits(at + 1) == 3 {
                out.extend(&chars[at + 1..at + 4]);
                at += 4;
            }
        }
    }
    out
}

/// Returns the expression with all variables in lower case.
fn lowercase_variables(expr: &Expr) -> Expr {
    let mut names = BTreeSet::new();
    expr.collect_free_variables(&mut names);
    if spend(names.len() as u64 * expr.node_count() * 20).is_none() {
        return expr.clone();
    }
    names.iter().fold(expr.clone(), |expr, name| {
        map_values(expr, &|part| substitute(&part, name, &Expr::Symbol(name.to_lowercase())))
    })
}

/// Compares letters of choices, yes and no, and plain words. Returns `None` if a side is none of these.
fn compare_words(gold: &str, answer: &str) -> Option<Comparison> {
    let (gold, answer) = (strip_text_markup(gold), strip_text_markup(answer));
    let letter = |text: &str| {
        let inner: String = text.chars().filter(|c| !"()[]{}.:* ".contains(*c)).collect();
        (inner.len() == 1).then(|| inner.chars().next()).flatten().filter(|c| ('A'..='J').contains(c))
    };
    if let (Some(a), Some(b)) = (letter(&gold), letter(&answer)) {
        let why = if a == b { "the same choice" } else { "another choice" };
        return Some(comparison(a == b, why));
    }
    // `B: 12` and `(B) twelve` begin with the letter of their choice.
    if letter(&gold).is_some() && answer.len() > 1 {
        let head: String = answer.chars().take_while(|c| !c.is_whitespace() && *c != ':').collect();
        let marked =
            head.starts_with('(') || head.ends_with(['.', ')', ':']) || answer[head.len()..].starts_with(':');
        if let Some(found) = letter(&head).filter(|_| marked) {
            return Some(comparison(letter(&gold) == Some(found), "the choice that the answer begins with"));
        }
    }
    let is_word = |text: &str| {
        let letters = text.chars().filter(|c| c.is_alphabetic()).count();
        (letters > 2 || ["no", "No", "NO"].contains(&text))
            && text.chars().all(|c| c.is_alphabetic() || c.is_whitespace() || "-'.,".contains(c))
    };
    if !(is_word(&gold) && is_word(&answer)) {
        return None;
    }
    let plain = |text: &str| {
        let lower = text.to_lowercase();
        lower
            .split(|c: char| !c.is_alphanumeric())
            .filter(|word| !word.is_empty())
            .collect::<Vec<_>>()
            .join(" ")
    };
    let (gold, answer) = (plain(&gold), plain(&answer));
    if gold == answer {
        return Some(comparison(true, "the same words"));
    }
    let decides = |text: &str| match text {
        "yes" | "true" => Some(true),
        "no" | "false" => Some(false),
        _ => None,
    };
    if let (Some(a), Some(b)) = (decides(&gold), decides(&answer)) {
        return Some(comparison(a == b, "yes or no"));
    }
    let infinite = ["infinity", "pi"];
    if infinite.contains(&gold.as_str()) || infinite.contains(&answer.as_str()) {
        return None;
    }
    // Different words can have the same meaning.
    Some(comparison(None, "other words"))
}

/// Removes LaTeX text commands, dollar signs, asterisks and a final period around words.
fn strip_text_markup(text: &str) -> String {
    let mut text = text.trim().trim_matches('$').trim();
    for open in ["\\text{", "\\textbf{", "\\mathrm{", "\\mathbf{", "\\textit{", "\\mbox{", "\\textrm{"] {
        if let Some(inside) = text.strip_prefix(open).and_then(|rest| rest.strip_suffix('}'))
            && !inside.contains(['{', '}'])
        {
            text = inside.trim();
        }
    }
    text.trim_matches('*').trim().trim_end_matches('.').to_owned()
}

/// Prepares a parsed answer: finite unions are merged, and an unbound `i` becomes the imaginary unit.
fn normalize_answer(expr: Expr) -> Expr {
    let bound = expr.any_part(&|part| matches!(part, Expr::BigOperator(_, index, _) if index == "i"));
    let expr = merge_finite_union(expr);
    if bound { expr } else { map_values(expr, &|part| substitute(&part, "i", &Expr::Constant(Constant::I))) }
}

/// Merges a union of finite sets into one set.
fn merge_finite_union(expr: Expr) -> Expr {
    match expr {
        Expr::Union(parts) if parts.iter().all(|part| matches!(part, Expr::Set(_))) => {
            let elements = parts.into_iter().flat_map(|part| match part {
                Expr::Set(elements) => elements,
                other => vec![other],
            });
            Expr::Set(elements.collect())
        }
        other => other,
    }
}

/// Applies `change` to every value in containers, relations and quantities.
fn map_values(expr: Expr, change: &dyn Fn(Expr) -> Expr) -> Expr {
    let all = |parts: Vec<Expr>| parts.into_iter().map(|part| map_values(part, change)).collect::<Vec<_>>();
    match expr {
        Expr::Tuple(parts) => Expr::Tuple(all(parts)),
        Expr::Set(parts) => Expr::Set(all(parts)),
        Expr::Union(parts) => Expr::Union(all(parts)),
        Expr::Relation(sides, signs) => Expr::Relation(all(sides), signs),
        Expr::Matrix(rows) => Expr::Matrix(rows.into_iter().map(all).collect()),
        Expr::Interval(low, high) => {
            let end = |end: IntervalBound| IntervalBound {
                at: Box::new(map_values(*end.at, change)),
                closed: end.closed,
            };
            Expr::Interval(end(low), end(high))
        }
        Expr::Quantity(inner, unit) => Expr::Quantity(Box::new(map_values(*inner, change)), unit),
        other => change(other),
    }
}

/// Returns whether an expression has words inside a formula, which means a sentence and not an answer.
fn has_words_in_formula(expr: &Expr) -> bool {
    match expr {
        Expr::Text(_) => false,
        Expr::Set(parts) | Expr::Tuple(parts) | Expr::Relation(parts, _) => {
            parts.iter().any(has_words_in_formula)
        }
        // `I do not know` parses as letters with a unit.
        Expr::Quantity(inner, unit) => {
            let letters = inner.any_part(&|part| matches!(part, Expr::Symbol(_)));
            has_words_in_formula(inner) || (letters && units::find_unit(unit).is_none())
        }
        other => other.any_part(&|part| matches!(part, Expr::Text(_) | Expr::Quantity(..))),
    }
}

/// Compares two expressions by the rules of their kinds.
fn compare_exprs(gold: &Expr, answer: &Expr) -> Comparison {
    if spend(200).is_none() {
        return comparison(None, "");
    }
    if has_words_in_formula(gold) || has_words_in_formula(answer) {
        return comparison(None, "words within a formula");
    }
    match (gold, answer) {
        (Expr::Quantity(..), _) | (_, Expr::Quantity(..)) => compare_quantities(gold, answer),
        (Expr::Text(_), _) | (_, Expr::Text(_)) => comparison(None, "words against a value"),
        (Expr::Relation(..), _) | (_, Expr::Relation(..)) => {
            compare_relations(gold, answer, Comparers { exprs: compare_exprs, scalars: compare_scalars })
        }
        (Expr::Matrix(_), _) | (_, Expr::Matrix(_)) => compare_matrices(gold, answer),
        _ if is_container(gold) || is_container(answer) => compare_containers(gold, answer),
        (Expr::Ratio(_), _) | (_, Expr::Ratio(_)) => compare_ratios(gold, answer),
        _ => compare_scalars(gold, answer),
    }
}

/// Compares two values of which at least one has a unit.
fn compare_quantities(gold: &Expr, answer: &Expr) -> Comparison {
    let split = |side: &Expr| match side {
        Expr::Quantity(inner, unit) => ((**inner).clone(), Some(unit.clone())),
        other => (other.clone(), None),
    };
    let ((a, unit), (b, other)) = (split(gold), split(answer));
    let (Some(unit), Some(other)) = (unit, other) else {
        // A multiplier such as `million` is not a unit: 5 million is not 5.
        let named = match (gold, answer) {
            (Expr::Quantity(_, unit), _) | (_, Expr::Quantity(_, unit)) => unit.as_str(),
            _ => "",
        };
        if units::has_multiplier(named) {
            return comparison(None, format!("`{named}` on one side only"));
        }
        let found = compare_exprs(&a, &b);
        return Comparison { why: format!("{}; only one side names a unit", found.why), ..found };
    };
    if units::is_same_name(&unit, &other) {
        return compare_exprs(&a, &b);
    }
    match (units::find_unit(&unit), units::find_unit(&other)) {
        (Some(x), Some(y)) if x.dimension != y.dimension => {
            comparison(false, format!("`{unit}` and `{other}` measure different things"))
        }
        (Some(x), Some(y)) => {
            let times = |value: Expr, scale: &BigRational| {
                Expr::Product(vec![value, Expr::Number(crate::expr::Number::exact(scale.clone()))])
            };
            let found = compare_exprs(&times(a, &x.scale), &times(b, &y.scale));
            Comparison { why: format!("{} in the same unit", found.why), ..found }
        }
        _ => {
            let found = compare_exprs(&a, &b);
            match found.equal {
                Some(false) => found,
                _ => comparison(None, format!("whether `{unit}` is `{other}` is not known")),
            }
        }
    }
}

/// Compares numbers and formulas.
fn compare_scalars(gold: &Expr, answer: &Expr) -> Comparison {
    if let (Expr::Percent(inner), other) | (other, Expr::Percent(inner)) = (gold, answer)
        && !matches!(other, Expr::Percent(_))
    {
        let found = compare_scalars(inner, other);
        if found.equal == Some(true) {
            return comparison(true, "the digits of the percentage");
        }
    }
    if let (Expr::Degrees(inner), other) | (other, Expr::Degrees(inner)) = (gold, answer)
        && matches!(other, Expr::Number(_))
    {
        return compare_scalars(inner, other);
    }
    if gold.has_decimal() || answer.has_decimal() {
        return compare_decimals(gold, answer);
    }
    match compare_values(gold, answer, Domain::Real) {
        ValueComparison::Equal => comparison(true, "exactly equal"),
        ValueComparison::EqualAtSamples => comparison(true, "equal wherever both were evaluated"),
        ValueComparison::Different => comparison(false, "different values"),
        ValueComparison::Open => comparison(None, "neither proven equal nor different"),
    }
}

/// Returns the exact value of an expression, if its normal form is a rational number.
fn exact_value(expr: &Expr) -> Option<BigRational> {
    AtomTable::default().normal_form(expr)?.as_rational()
}

/// Compares values of which at least one contains a decimal, with a relative tolerance of one millionth for
/// rounding.
fn compare_decimals(gold: &Expr, answer: &Expr) -> Comparison {
    let mut names = BTreeSet::new();
    gold.collect_free_variables(&mut names);
    answer.collect_free_variables(&mut names);
    let within =
        |apart: BigRational, size: BigRational| apart * BigRational::from_integer(1_000_000.into()) <= size;
    if let (Some(a), Some(b)) = (exact_value(gold), exact_value(answer)) {
        let size = a.abs().max(b.abs());
        if a == b {
            return comparison(true, "exactly equal");
        }
        // Only the explanation depends on whether both sides are decimals.
        let both = gold.as_number().is_some_and(|n| n.is_decimal)
            && answer.as_number().is_some_and(|n| n.is_decimal);
        let close = !size.is_zero() && within((a - b).abs(), size * BigRational::new(101.into(), 100.into()));
        return comparison(
            close,
            if close && !both {
                "equal to a millionth"
            } else if close {
                "decimals equal to a millionth"
            } else {
                "different values"
            },
        );
    }
    if names.is_empty() {
        return match (evaluate(gold, &SamplePoint::new()), evaluate(answer, &SamplePoint::new())) {
            (Some(a), Some(b)) => {
                let (apart, size) =
                    ((a.re - b.re).hypot(a.im - b.im), a.re.hypot(a.im).max(b.re.hypot(b.im)));
                let close = apart <= size * 1.01e-6 + a.error + b.error;
                comparison(close, if close { "equal to a millionth" } else { "different values" })
            }
            _ => comparison(None, "one side has no value"),
        };
    }
    match compare_values(gold, answer, Domain::Real) {
        ValueComparison::Equal | ValueComparison::EqualAtSamples => comparison(true, "equal as formulas"),
        ValueComparison::Different => comparison(false, "different formulas"),
        ValueComparison::Open => comparison(None, "neither proven equal nor different"),
    }
}

/// Compares two values of which at least one is a ratio.
fn compare_ratios(gold: &Expr, answer: &Expr) -> Comparison {
    match (gold, answer) {
        // Ratios with a zero are times of day.
        (Expr::Ratio(a), Expr::Ratio(b)) if a.iter().chain(b).any(|part| *part == Expr::integer(0)) => {
            let same =
                a.len() == b.len() && a.iter().zip(b).all(|(x, y)| compare_scalars(x, y).equal == Some(true));
            comparison(same, if same { "the same parts" } else { "other parts" })
        }
        (Expr::Ratio(a), Expr::Ratio(b)) if a.len() == b.len() => {
            // Two ratios are equal if all quotients by their first parts are equal.
            let share = |parts: &[Expr]| -> Vec<Expr> {
                parts.iter().skip(1).map(|part| part.clone().divided_by(parts[0].clone())).collect()
            };
            combine_comparisons(share(a).iter().zip(&share(b)).map(|(x, y)| compare_scalars(x, y)))
        }
        (Expr::Ratio(a), Expr::Ratio(b)) => {
            comparison(false, format!("{} parts against {}", a.len(), b.len()))
        }
        (Expr::Ratio(parts), other) | (other, Expr::Ratio(parts)) => match parts.as_slice() {
            [a, b] => {
                let found = compare_scalars(&a.clone().divided_by(b.clone()), other);
                // `12:30` can be a time of day, so a different value proves nothing.
                if found.equal == Some(true) { found } else { comparison(None, "a ratio against a number") }
            }
            _ => comparison(None, "a ratio against a number"),
        },
        _ => compare_scalars(gold, answer),
    }
}

/// Combines verdicts: the first difference, or else the last unverifiable verdict, or else equality.
fn combine_comparisons(found: impl Iterator<Item = Comparison>) -> Comparison {
    let mut open = None;
    for verdict in found {
        match verdict.equal {
            Some(false) => return verdict,
            None => open = Some(verdict),
            Some(true) => {}
        }
    }
    open.unwrap_or_else(|| comparison(true, "equal part by part"))
}

/// Returns the elements of a container, and whether their order counts.
fn elements(expr: &Expr) -> Option<(Vec<Expr>, bool)> {
    match expr {
        Expr::Set(parts) => Some((deduplicate(parts), false)),
        Expr::Tuple(parts) => Some((parts.clone(), true)),
        Expr::Interval(low, high) if low.closed == high.closed => {
            Some((vec![(*low.at).clone(), (*high.at).clone()], true))
        }
        _ => None,
    }
}

/// Removes repeated elements, up to 64 distinct ones.
fn deduplicate(parts: &[Expr]) -> Vec<Expr> {
    let mut all: Vec<Expr> = Vec::new();
    for part in parts {
        if all.len() < 64 && all.iter().any(|known| compare_exprs(known, part).equal == Some(true)) {
            continue;
        }
        all.push(part.clone());
    }
    all
}

/// Compares two collections without order: each element needs its own equal element on the other side.
fn compare_unordered(a: &[Expr], b: &[Expr]) -> Comparison {
    if a.len() != b.len() {
        return comparison(false, format!("{} elements against {}", a.len(), b.len()));
    }
    let mut free: Vec<&Expr> = b.iter().collect();
    let mut open = false;
    for element in a {
        let found: Vec<Option<bool>> = free.iter().map(|other| compare_exprs(element, other).equal).collect();
        if let Some(at) = found.iter().position(|equal| *equal == Some(true)) {
            free.swap_remove(at);
        } else if found.contains(&None) {
            open = true;
        } else {
            return comparison(false, "an element is missing");
        }
    }
    if open {
        comparison(None, "an element cannot be compared")
    } else {
        comparison(true, "the same elements")
    }
}

/// Compares two values of which at least one is a container.
fn compare_containers(gold: &Expr, answer: &Expr) -> Comparison {
    match (gold, answer) {
        (Expr::Interval(a, b), Expr::Interval(c, d)) => {
            let ends =
                combine_comparisons([compare_exprs(&a.at, &c.at), compare_exprs(&b.at, &d.at)].into_iter());
            if (a.closed, b.closed) == (c.closed, d.closed) || ends.equal != Some(true) {
                ends
            } else {
                comparison(false, "the same ends, but not the same ones belong to it")
            }
        }
        (Expr::Union(a), Expr::Union(b)) => compare_unordered(a, b),
        (Expr::Set(a), Expr::Set(b)) => compare_unordered(&deduplicate(a), &deduplicate(b)),
        _ => match (elements(gold), elements(answer)) {
            (Some((a, in_order)), Some((b, other_order)))
                if in_order == other_order && a.len() == b.len() =>
            {
                combine_comparisons(a.iter().zip(&b).map(|(x, y)| compare_exprs(x, y)))
            }
            // One side is ordered and the other is not, such as `(1,2)` and `1,2`.
            (Some((a, _)), Some((b, _))) if a.len() == b.len() => {
                let found = combine_comparisons(a.iter().zip(&b).map(|(x, y)| compare_exprs(x, y)));
                match found.equal {
                    Some(true) => found,
                    _ if compare_unordered(&a, &b).equal == Some(false) => {
                        comparison(false, "other elements")
                    }
                    _ => comparison(None, "whether the order counts is not said"),
                }
            }
            (Some((a, _)), Some((b, _))) => {
                comparison(false, format!("{} elements against {}", a.len(), b.len()))
            }
            // A set of one element equals its element.
            (Some((one, _)), None) if one.len() == 1 && !is_container(answer) => {
                compare_exprs(&one[0], answer)
            }
            (None, Some((one, _))) if one.len() == 1 && !is_container(gold) => compare_exprs(gold, &one[0]),
            (Some((many, _)), None) | (None, Some((many, _)))
                if many.iter().any(|one| matches!(one, Expr::Quantity(..) | Expr::Text(_))) =>
            {
                comparison(None, "several things against one value")
            }
            (Some((many, _)), None) | (None, Some((many, _)))
                if !is_container(gold) || !is_container(answer) =>
            {
                comparison(false, format!("{} elements against one value", many.len()))
            }
            _ if gold.is_scalar() || answer.is_scalar() => {
                comparison(false, "a whole range against one value")
            }
            _ => comparison(None, "containers of different kinds"),
        },
    }
}

/// Compares two values of which at least one is a matrix; tuples count as vectors.
fn compare_matrices(gold: &Expr, answer: &Expr) -> Comparison {
    let rows = |side: &Expr| -> Option<Vec<Vec<Expr>>> {
        match side {
            Expr::Matrix(rows) => Some(rows.clone()),
            Expr::Tuple(parts) => Some(parts.iter().map(|part| vec![part.clone()]).collect()),
            Expr::Interval(a, b) if a.closed == b.closed => {
                Some(vec![vec![(*a.at).clone()], vec![(*b.at).clone()]])
            }
            Expr::Product(factors) => {
                let at = factors.iter().position(|factor| matches!(factor, Expr::Matrix(_)))?;
                let Expr::Matrix(rows) = &factors[at] else { return None };
                let mut scale = factors.clone();
                scale.remove(at);
                let times =
                    |cell: &Expr| Expr::Product(scale.iter().cloned().chain([cell.clone()]).collect());
                Some(rows.iter().map(|row| row.iter().map(times).collect()).collect())
            }
            _ => None,
        }
    };
    let (Some(mut a), Some(mut b)) = (rows(gold), rows(answer)) else {
        let is_value =
            |side: &Expr| side.is_scalar() && !side.any_part(&|part| matches!(part, Expr::Symbol(_)));
        if is_value(gold) || is_value(answer) {
            return comparison(false, "a matrix against one value");
        }
        return comparison(None, "a matrix against something else");
    };
    // A row vector equals the column vector of its elements.
    for side in [&mut a, &mut b] {
        if side.len() == 1 {
            *side = side[0].iter().map(|cell| vec![cell.clone()]).collect();
        }
    }
    if a.len() != b.len() || a[0].len() != b[0].len() {
        return comparison(false, "matrices of different shape");
    }
    combine_comparisons(a.iter().flatten().zip(b.iter().flatten()).map(|(x, y)| compare_exprs(x, y)))
}
