//! Preparation of plain text for the parser: scientific notation, words and units.
//!
//! Deliberately absent: text with LaTeX commands, whose letters are variables.

use num_traits::ToPrimitive;

use crate::expr::{Number, is_integer};
use crate::lexer::{SpacedToken, Token};

/// Joins scientific notation such as `1.5e3` into one number.
pub(super) fn join_scientific_notation(all: Vec<SpacedToken>) -> Vec<SpacedToken> {
    let mut out: Vec<SpacedToken> = Vec::with_capacity(all.len());
    let mut at = 0;
    while at < all.len() {
        let near = |ahead: usize| all.get(at + ahead).filter(|next| !next.spaced).map(|next| &next.token);
        if let (Token::Number(mantissa), Some(Token::Letter('e' | 'E'))) = (&all[at].token, near(1)) {
            let (negative, signed) = match near(2) {
                Some(Token::Char('-')) => (true, 1),
                Some(Token::Char('+')) => (false, 1),
                _ => (false, 0),
            };
            if let Some(Token::Number(exponent)) = near(2 + signed)
                && let Some(exponent) = exponent
                    .value
                    .to_i32()
                    .filter(|e| is_integer(&Number::integer(i64::from(*e)).value) && *e <= 400)
            {
                let ten = num_rational::BigRational::from_integer(10.into());
                let scale = ten.pow(if negative { -exponent } else { exponent });
                let value = &mantissa.value * scale;
                let is_decimal = mantissa.is_decimal && !is_integer(&value);
                out.push(SpacedToken {
                    token: Token::Number(Number { value, is_decimal }),
                    spaced: all[at].spaced,
                });
                at += 3 + signed;
                continue;
            }
        }
        out.push(all[at].clone());
        at += 1;
    }
    out
}

/// Replaces runs of letters: names of functions and constants by commands, other words by texts.
///
/// Other runs stay single letters. Text with LaTeX commands other than `\pi` and degrees is returned
/// unchanged.
pub(super) fn classify_letter_runs(all: Vec<SpacedToken>) -> Vec<SpacedToken> {
    if all
        .iter()
        .any(|spaced| matches!(&spaced.token, Token::Command(name) if name != "degree" && name != "pi"))
    {
        return all;
    }
    /// Names of functions and constants.
    const COMMAND_WORDS: [&str; 33] = [
        "pi", "sqrt", "sin", "cos", "tan", "cot", "sec", "csc", "ln", "log", "exp", "gcd", "lcm", "max",
        "min", "abs", "infty", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "theta", "alpha",
        "beta", "lambda", "cup", "union", "inf", "infinity", "degrees", "degree",
    ];
    /// Words of two letters.
    const TWO_LETTER_WORDS: [&str; 16] =
        ["am", "pm", "to", "of", "is", "no", "if", "in", "on", "at", "by", "we", "he", "it", "so", "as"];
    let mut out: Vec<SpacedToken> = Vec::with_capacity(all.len());
    let mut at = 0;
    while at < all.len() {
        let Token::Letter(first) = all[at].token else {
            out.push(all[at].clone());
            at += 1;
            continue;
        };
        let mut word = String::from(first);
        let mut end = at + 1;
        while let Some(SpacedToken { token: Token::Letter(next), spaced: false }) = all.get(end) {
            word.push(*next);
            end += 1;
        }
        let lower = word.to_lowercase();
        let name = match lower.as_str() {
            "inf" | "infinity" => "infty",
            "union" => "cup",
            "degrees" => "degree",
            other => other,
        };
        let behind_number = matches!(out.last(), Some(SpacedToken { token: Token::Number(_), .. }));
        let is_unit = behind_number && word.len() > 1 && crate::units::find_unit(&word).is_some();
        let length = word.chars().count();
        // Longer runs are words; two letters are a product of variables, except in these words.
        let is_word = length > 2 || TWO_LETTER_WORDS.contains(&lower.as_str());
        let stands_alone = (all[at].spaced || at == 0) && !is_formula_at(&all, end);
        let joins = lower == "and" || lower == "or" || length > 3;
        if COMMAND_WORDS.contains(&lower.as_str()) && !is_unit {
            out.push(SpacedToken { token: Token::Command(name.to_owned()), spaced: all[at].spaced });
        } else if joins || (is_word && stands_alone) || (is_unit && !is_formula_at(&all, end)) {
            out.push(SpacedToken { token: Token::Text(word), spaced: all[at].spaced });
        } else {
            out.extend_from_slice(&all[at..end]);
        }
        at = end;
    }
    out
}

/// Returns whether an operator, power, subscript or parenthesis at token `at` makes the preceding letters a
/// formula.
fn is_formula_at(all: &[SpacedToken], at: usize) -> bool {
    matches!(
        all.get(at).map(|next| &next.token),
        Some(Token::Char('^' | '_' | '+' | '-' | '*' | '/' | '=' | '('))
    )
}
