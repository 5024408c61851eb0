//! Rules of the strict profile, the default. Answers are different only if proven so; undecided pairs are
//! unverifiable (`None`).
//!
//! Units must agree if both sides have one. A percentage equals its value and also its digits. Decimals agree
//! within a relative error of one millionth.
//!
//! Deliberately absent: extraction of the answer from a completion (see [`crate::extract`]).

mod relations;

use std::collections::BTreeSet;

use num_rational::BigRational;
use num_traits::{Signed, Zero};

use self::relations::relations;
use crate::effort::{ALLOWED, bounded, spend};
use crate::exact::{Atoms, replaced};
use crate::expr::{Constant, End, Expr};
use crate::numeric::{Place, value};
use crate::parser::{Letters, parse};
use crate::scalar::{Domain, Found, compare};
use crate::units;

/// Result of comparing two answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// True for equal, false for different, `None` for unverifiable.
    pub equal: Option<bool>,
    /// Rule behind the result.
    pub why: String,
}

/// Returns a verdict.
fn verdict(equal: impl Into<Option<bool>>, why: impl Into<String>) -> Verdict {
    Verdict { equal: equal.into(), why: why.into() }
}

/// Compares two final answers without surrounding text, within the work budget.
///
/// The result does not depend on the order of the two, except for a letter with following text.
pub fn compare_answers(gold: &str, answer: &str) -> Verdict {
    let (gold, answer) = (gold.trim(), answer.trim());
    if gold.is_empty() || answer.is_empty() {
        return verdict(None, "one side is empty");
    }
    if gold == answer {
        return verdict(true, "the same text");
    }
    if let Some(found) = words(gold, answer) {
        return found;
    }
    bounded(ALLOWED, || formulas(gold, answer))
        .unwrap_or_else(|| verdict(None, "to compare them takes more work than is done for one answer"))
}

/// Parses and compares two answers that are not words.
fn formulas(gold: &str, answer: &str) -> Verdict {
    let read = |side: &str| parse(&without_gaps(side), Letters::Words).map(prepared);
    match (read(gold), read(answer)) {
        (Ok(gold), Ok(answer)) => {
            let found = exprs(&gold, &answer);
            if found.equal == Some(false) && exprs(&lowered(&gold), &lowered(&answer)).equal == Some(true) {
                return verdict(None, "the letters differ in case only");
            }
            found
        }
        (Err(problem), _) => verdict(None, format!("the known answer is not understood: {problem}")),
        (_, Err(problem)) => verdict(None, format!("the answer is not understood: {problem}")),
    }
}

/// Removes the spaces between groups of three digits, as in `1 234 567`.
fn without_gaps(text: &str) -> String {
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
fn lowered(expr: &Expr) -> Expr {
    let mut names = BTreeSet::new();
    expr.symbols(&mut names);
    if spend(names.len() as u64 * expr.size() * 20).is_none() {
        return expr.clone();
    }
    names.iter().fold(expr.clone(), |expr, name| {
        mapped(expr, &|part| replaced(&part, name, &Expr::Symbol(name.to_lowercase())))
    })
}

/// Compares letters of choices, yes and no, and plain words. Returns `None` if a side is none of these.
fn words(gold: &str, answer: &str) -> Option<Verdict> {
    let (gold, answer) = (bare_word(gold), bare_word(answer));
    let letter = |text: &str| {
        let inner: String = text.chars().filter(|c| !"()[]{}.:* ".contains(*c)).collect();
        (inner.len() == 1).then(|| inner.chars().next()).flatten().filter(|c| ('A'..='J').contains(c))
    };
    if let (Some(a), Some(b)) = (letter(&gold), letter(&answer)) {
        let why = if a == b { "the same choice" } else { "another choice" };
        return Some(verdict(a == b, why));
    }
    // `B: 12` and `(B) twelve` begin with the letter of their choice.
    if letter(&gold).is_some() && answer.len() > 1 {
        let head: String = answer.chars().take_while(|c| !c.is_whitespace() && *c != ':').collect();
        let marked =
            head.starts_with('(') || head.ends_with(['.', ')', ':']) || answer[head.len()..].starts_with(':');
        if let Some(found) = letter(&head).filter(|_| marked) {
            return Some(verdict(letter(&gold) == Some(found), "the choice that the answer begins with"));
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
        return Some(verdict(true, "the same words"));
    }
    let decides = |text: &str| match text {
        "yes" | "true" => Some(true),
        "no" | "false" => Some(false),
        _ => None,
    };
    if let (Some(a), Some(b)) = (decides(&gold), decides(&answer)) {
        return Some(verdict(a == b, "yes or no"));
    }
    let infinite = ["infinity", "pi"];
    if infinite.contains(&gold.as_str()) || infinite.contains(&answer.as_str()) {
        return None;
    }
    // Different words can have the same meaning.
    Some(verdict(None, "other words"))
}

/// Removes LaTeX text commands, dollar signs, asterisks and a final period around words.
fn bare_word(text: &str) -> String {
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
fn prepared(expr: Expr) -> Expr {
    let bound = expr.any(&|part| matches!(part, Expr::Over(_, index, _) if index == "i"));
    let expr = flat(expr);
    if bound { expr } else { mapped(expr, &|part| replaced(&part, "i", &Expr::Constant(Constant::I))) }
}

/// Merges a union of finite sets into one set.
fn flat(expr: Expr) -> Expr {
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
fn mapped(expr: Expr, change: &dyn Fn(Expr) -> Expr) -> Expr {
    let all = |parts: Vec<Expr>| parts.into_iter().map(|part| mapped(part, change)).collect::<Vec<_>>();
    match expr {
        Expr::Tuple(parts) => Expr::Tuple(all(parts)),
        Expr::Set(parts) => Expr::Set(all(parts)),
        Expr::Union(parts) => Expr::Union(all(parts)),
        Expr::Relation(sides, signs) => Expr::Relation(all(sides), signs),
        Expr::Matrix(rows) => Expr::Matrix(rows.into_iter().map(all).collect()),
        Expr::Interval(low, high) => {
            let end = |end: End| End { at: Box::new(mapped(*end.at, change)), closed: end.closed };
            Expr::Interval(end(low), end(high))
        }
        Expr::Quantity(inner, unit) => Expr::Quantity(Box::new(mapped(*inner, change)), unit),
        other => change(other),
    }
}

/// Returns whether an expression has words inside a formula, which means a sentence and not an answer.
fn is_sentence(expr: &Expr) -> bool {
    match expr {
        Expr::Text(_) => false,
        Expr::Set(parts) | Expr::Tuple(parts) | Expr::Relation(parts, _) => parts.iter().any(is_sentence),
        // `I do not know` parses as letters with a unit.
        Expr::Quantity(inner, unit) => {
            let letters = inner.any(&|part| matches!(part, Expr::Symbol(_)));
            is_sentence(inner) || (letters && units::known(unit).is_none())
        }
        other => other.any(&|part| matches!(part, Expr::Text(_) | Expr::Quantity(..))),
    }
}

/// Compares two expressions by the rules of their kinds.
fn exprs(gold: &Expr, answer: &Expr) -> Verdict {
    if spend(200).is_none() {
        return verdict(None, "");
    }
    if is_sentence(gold) || is_sentence(answer) {
        return verdict(None, "words within a formula");
    }
    match (gold, answer) {
        (Expr::Quantity(..), _) | (_, Expr::Quantity(..)) => quantities(gold, answer),
        (Expr::Text(_), _) | (_, Expr::Text(_)) => verdict(None, "words against a value"),
        (Expr::Relation(..), _) | (_, Expr::Relation(..)) => relations(gold, answer),
        (Expr::Matrix(_), _) | (_, Expr::Matrix(_)) => matrices(gold, answer),
        _ if is_container(gold) || is_container(answer) => containers(gold, answer),
        (Expr::Ratio(_), _) | (_, Expr::Ratio(_)) => ratios(gold, answer),
        _ => scalars(gold, answer),
    }
}

/// Compares two values of which at least one has a unit.
fn quantities(gold: &Expr, answer: &Expr) -> Verdict {
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
        if units::multiplies(named) {
            return verdict(None, format!("`{named}` on one side only"));
        }
        let found = exprs(&a, &b);
        return Verdict { why: format!("{}; only one side names a unit", found.why), ..found };
    };
    if units::same_name(&unit, &other) {
        return exprs(&a, &b);
    }
    match (units::known(&unit), units::known(&other)) {
        (Some(x), Some(y)) if x.kind != y.kind => {
            verdict(false, format!("`{unit}` and `{other}` measure different things"))
        }
        (Some(x), Some(y)) => {
            let times = |value: Expr, scale: &BigRational| {
                Expr::Product(vec![value, Expr::Number(crate::expr::Number::exact(scale.clone()))])
            };
            let found = exprs(&times(a, &x.scale), &times(b, &y.scale));
            Verdict { why: format!("{} in the same unit", found.why), ..found }
        }
        _ => {
            let found = exprs(&a, &b);
            match found.equal {
                Some(false) => found,
                _ => verdict(None, format!("whether `{unit}` is `{other}` is not known")),
            }
        }
    }
}

/// Compares numbers and formulas.
fn scalars(gold: &Expr, answer: &Expr) -> Verdict {
    if let (Expr::Percent(inner), other) | (other, Expr::Percent(inner)) = (gold, answer)
        && !matches!(other, Expr::Percent(_))
    {
        let found = scalars(inner, other);
        if found.equal == Some(true) {
            return verdict(true, "the digits of the percentage");
        }
    }
    if let (Expr::Degrees(inner), other) | (other, Expr::Degrees(inner)) = (gold, answer)
        && matches!(other, Expr::Number(_))
    {
        return scalars(inner, other);
    }
    if gold.has_decimal() || answer.has_decimal() {
        return decimals(gold, answer);
    }
    match compare(gold, answer, Domain::Real) {
        Found::Equal => verdict(true, "exactly equal"),
        Found::EqualAtSamples => verdict(true, "equal wherever both were evaluated"),
        Found::Different => verdict(false, "different values"),
        Found::Open => verdict(None, "neither proven equal nor different"),
    }
}

/// Returns the exact value of an expression, if its normal form is a rational number.
fn exact(expr: &Expr) -> Option<BigRational> {
    Atoms::default().form(expr)?.value()
}

/// Compares values of which at least one contains a decimal, with a relative tolerance of one millionth for
/// rounding.
fn decimals(gold: &Expr, answer: &Expr) -> Verdict {
    let mut names = BTreeSet::new();
    gold.symbols(&mut names);
    answer.symbols(&mut names);
    let within =
        |apart: BigRational, size: BigRational| apart * BigRational::from_integer(1_000_000.into()) <= size;
    if let (Some(a), Some(b)) = (exact(gold), exact(answer)) {
        let size = a.abs().max(b.abs());
        if a == b {
            return verdict(true, "exactly equal");
        }
        // Only the explanation depends on whether both sides are decimals.
        let both =
            gold.number().is_some_and(|n| n.is_decimal) && answer.number().is_some_and(|n| n.is_decimal);
        let close = !size.is_zero() && within((a - b).abs(), size * BigRational::new(101.into(), 100.into()));
        return verdict(
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
        return match (value(gold, &Place::new()), value(answer, &Place::new())) {
            (Some(a), Some(b)) => {
                let (apart, size) =
                    ((a.re - b.re).hypot(a.im - b.im), a.re.hypot(a.im).max(b.re.hypot(b.im)));
                let close = apart <= size * 1.01e-6 + a.error + b.error;
                verdict(close, if close { "equal to a millionth" } else { "different values" })
            }
            _ => verdict(None, "one side has no value"),
        };
    }
    match compare(gold, answer, Domain::Real) {
        Found::Equal | Found::EqualAtSamples => verdict(true, "equal as formulas"),
        Found::Different => verdict(false, "different formulas"),
        Found::Open => verdict(None, "neither proven equal nor different"),
    }
}

/// Compares two values of which at least one is a ratio.
fn ratios(gold: &Expr, answer: &Expr) -> Verdict {
    match (gold, answer) {
        // Ratios with a zero are times of day.
        (Expr::Ratio(a), Expr::Ratio(b)) if a.iter().chain(b).any(|part| *part == Expr::whole(0)) => {
            let same = a.len() == b.len() && a.iter().zip(b).all(|(x, y)| scalars(x, y).equal == Some(true));
            verdict(same, if same { "the same parts" } else { "other parts" })
        }
        (Expr::Ratio(a), Expr::Ratio(b)) if a.len() == b.len() => {
            // Two ratios are equal if all quotients by their first parts are equal.
            let share = |parts: &[Expr]| -> Vec<Expr> {
                parts.iter().skip(1).map(|part| part.clone().over(parts[0].clone())).collect()
            };
            all_of(share(a).iter().zip(&share(b)).map(|(x, y)| scalars(x, y)))
        }
        (Expr::Ratio(a), Expr::Ratio(b)) => verdict(false, format!("{} parts against {}", a.len(), b.len())),
        (Expr::Ratio(parts), other) | (other, Expr::Ratio(parts)) => match parts.as_slice() {
            [a, b] => {
                let found = scalars(&a.clone().over(b.clone()), other);
                // `12:30` can be a time of day, so a different value proves nothing.
                if found.equal == Some(true) { found } else { verdict(None, "a ratio against a number") }
            }
            _ => verdict(None, "a ratio against a number"),
        },
        _ => scalars(gold, answer),
    }
}

/// Returns whether an expression is a set, tuple, interval or union.
fn is_container(expr: &Expr) -> bool {
    matches!(expr, Expr::Set(_) | Expr::Tuple(_) | Expr::Interval(..) | Expr::Union(_))
}

/// Combines verdicts: the first difference, or else the last unverifiable verdict, or else equality.
fn all_of(found: impl Iterator<Item = Verdict>) -> Verdict {
    let mut open = None;
    for verdict in found {
        match verdict.equal {
            Some(false) => return verdict,
            None => open = Some(verdict),
            Some(true) => {}
        }
    }
    open.unwrap_or_else(|| verdict(true, "equal part by part"))
}

/// Returns the elements of a container, and whether their order counts.
fn elements(expr: &Expr) -> Option<(Vec<Expr>, bool)> {
    match expr {
        Expr::Set(parts) => Some((distinct(parts), false)),
        Expr::Tuple(parts) => Some((parts.clone(), true)),
        Expr::Interval(low, high) if low.closed == high.closed => {
            Some((vec![(*low.at).clone(), (*high.at).clone()], true))
        }
        _ => None,
    }
}

/// Removes repeated elements, up to 64 distinct ones.
fn distinct(parts: &[Expr]) -> Vec<Expr> {
    let mut all: Vec<Expr> = Vec::new();
    for part in parts {
        if all.len() < 64 && all.iter().any(|known| exprs(known, part).equal == Some(true)) {
            continue;
        }
        all.push(part.clone());
    }
    all
}

/// Compares two collections without order: each element needs its own equal element on the other side.
fn matched(a: &[Expr], b: &[Expr]) -> Verdict {
    if a.len() != b.len() {
        return verdict(false, format!("{} elements against {}", a.len(), b.len()));
    }
    let mut free: Vec<&Expr> = b.iter().collect();
    let mut open = false;
    for element in a {
        let found: Vec<Option<bool>> = free.iter().map(|other| exprs(element, other).equal).collect();
        if let Some(at) = found.iter().position(|equal| *equal == Some(true)) {
            free.swap_remove(at);
        } else if found.contains(&None) {
            open = true;
        } else {
            return verdict(false, "an element is missing");
        }
    }
    if open { verdict(None, "an element cannot be compared") } else { verdict(true, "the same elements") }
}

/// Compares two values of which at least one is a container.
fn containers(gold: &Expr, answer: &Expr) -> Verdict {
    match (gold, answer) {
        (Expr::Interval(a, b), Expr::Interval(c, d)) => {
            let ends = all_of([exprs(&a.at, &c.at), exprs(&b.at, &d.at)].into_iter());
            if (a.closed, b.closed) == (c.closed, d.closed) || ends.equal != Some(true) {
                ends
            } else {
                verdict(false, "the same ends, but not the same ones belong to it")
            }
        }
        (Expr::Union(a), Expr::Union(b)) => matched(a, b),
        (Expr::Set(a), Expr::Set(b)) => matched(&distinct(a), &distinct(b)),
        _ => match (elements(gold), elements(answer)) {
            (Some((a, in_order)), Some((b, other_order)))
                if in_order == other_order && a.len() == b.len() =>
            {
                all_of(a.iter().zip(&b).map(|(x, y)| exprs(x, y)))
            }
            // One side is ordered and the other is not, such as `(1,2)` and `1,2`.
            (Some((a, _)), Some((b, _))) if a.len() == b.len() => {
                let found = all_of(a.iter().zip(&b).map(|(x, y)| exprs(x, y)));
                match found.equal {
                    Some(true) => found,
                    _ if matched(&a, &b).equal == Some(false) => verdict(false, "other elements"),
                    _ => verdict(None, "whether the order counts is not said"),
                }
            }
            (Some((a, _)), Some((b, _))) => {
                verdict(false, format!("{} elements against {}", a.len(), b.len()))
            }
            // A set of one element equals its element.
            (Some((one, _)), None) if one.len() == 1 && !is_container(answer) => exprs(&one[0], answer),
            (None, Some((one, _))) if one.len() == 1 && !is_container(gold) => exprs(gold, &one[0]),
            (Some((many, _)), None) | (None, Some((many, _)))
                if many.iter().any(|one| matches!(one, Expr::Quantity(..) | Expr::Text(_))) =>
            {
                verdict(None, "several things against one value")
            }
            (Some((many, _)), None) | (None, Some((many, _)))
                if !is_container(gold) || !is_container(answer) =>
            {
                verdict(false, format!("{} elements against one value", many.len()))
            }
            _ if gold.is_scalar() || answer.is_scalar() => verdict(false, "a whole range against one value"),
            _ => verdict(None, "containers of different kinds"),
        },
    }
}

/// Compares two values of which at least one is a matrix; tuples count as vectors.
fn matrices(gold: &Expr, answer: &Expr) -> Verdict {
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
        let is_value = |side: &Expr| side.is_scalar() && !side.any(&|part| matches!(part, Expr::Symbol(_)));
        if is_value(gold) || is_value(answer) {
            return verdict(false, "a matrix against one value");
        }
        return verdict(None, "a matrix against something else");
    };
    // A row vector equals the column vector of its elements.
    for side in [&mut a, &mut b] {
        if side.len() == 1 {
            *side = side[0].iter().map(|cell| vec![cell.clone()]).collect();
        }
    }
    if a.len() != b.len() || a[0].len() != b[0].len() {
        return verdict(false, "matrices of different shape");
    }
    all_of(a.iter().flatten().zip(b.iter().flatten()).map(|(x, y)| exprs(x, y)))
}
