//! Parser of products, powers, postfix operators and units.
//!
//! Deliberately absent: remainders (`\bmod`), which are errors.

use num_traits::ToPrimitive;

use super::{LetterMode, ParseError, ParseResult, Parser};
use crate::effort::spend;
use crate::expr::{Expr, Function, Number, is_integer};
use crate::lexer::{SpacedToken, Token};

impl Parser {
    /// Parses a product with explicit multiplication and division signs.
    pub(super) fn product(&mut self) -> ParseResult {
        let mut factors = vec![self.factor()?];
        loop {
            if self.eat('*') {
                // `**` is a power in plain text.
                if self.eat('*') {
                    let exponent = self.signed_power()?;
                    let base = factors.pop().unwrap_or_else(|| Expr::integer(1));
                    factors.push(Expr::Power(Box::new(base), Box::new(exponent)));
                    continue;
                }
                factors.push(self.factor()?);
            } else if self.eat_command("cdot") || self.eat_command("times") {
                factors.push(self.factor()?);
            } else if self.eat('/') || self.eat_command("div") {
                let bottom = self.factor()?;
                factors.push(Expr::Power(Box::new(bottom), Box::new(Expr::integer(-1))));
            } else if self.eat_command("bmod") || self.eat_command("mod") {
                return Err(ParseError::Syntax(self.position));
            } else if self.is_times_letter() && matches!(factors.last(), Some(Expr::Number(_))) {
                self.position += 1;
                factors.push(self.factor()?);
            } else {
                break;
            }
        }
        Ok(product_of_factors(factors))
    }

    /// Returns whether the next token is the letter `x` as a multiplication sign, as in `1.5 x 10^3`.
    fn is_times_letter(&self) -> bool {
        self.letters == LetterMode::Words
            && matches!(self.token(), Some(Token::Letter('x' | 'X')))
            && self.tokens[self.position].spaced
            && matches!(
                self.tokens.get(self.position + 1),
                Some(SpacedToken { token: Token::Number(_), spaced: true })
            )
    }

    /// Parses a signed implicit product, such as `2x`, with an optional unit.
    pub(super) fn factor(&mut self) -> ParseResult {
        if self.eat('-') {
            return self.nested(|parser| Ok(parser.factor()?.negate()));
        }
        if self.eat('+') {
            return self.nested(Self::factor);
        }
        let first = self.power()?;
        // `1 1/2` and `1\frac12` are mixed numbers.
        let first = match self.mixed_number(&first) {
            Some(mixed) => self.postfix_operators(mixed)?,
            None => first,
        };
        let mut factors = vec![first];
        while self.begins_factor()
            && !(self.is_times_letter() && matches!(factors.last(), Some(Expr::Number(_))))
        {
            // Two numbers side by side are not a product.
            if matches!(self.token(), Some(Token::Number(_)))
                && matches!(factors.last(), Some(Expr::Number(_)))
            {
                return Err(ParseError::Syntax(self.position));
            }
            factors.push(self.power()?);
        }
        let unit = self.unit();
        let value = product_of_factors(factors);
        Ok(match unit {
            Some(unit) => Expr::Quantity(Box::new(value), unit),
            None => value,
        })
    }

    /// Parses the fraction behind the integer `first` and returns the mixed number; backtracks if there is
    /// none.
    fn mixed_number(&mut self, first: &Expr) -> Option<Expr> {
        let whole =
            first.as_number().filter(|number| !number.is_decimal && is_integer(&number.value))?.value.clone();
        let before = self.position;
        let mut unread = None;
        let fraction = if self.is_speculative {
            // Mixed numbers do not nest; nested backtracking would double the work with each level.
            None
        } else if self.next_is_command("frac") {
            // Parsing splits a token such as `12` in `\frac12`, so backtracking restores the tokens.
            spend(self.tokens.len() as u64 * 20)?;
            unread = Some(self.tokens.clone());
            self.is_speculative = true;
            let fraction = self.primary();
            self.is_speculative = false;
            fraction.ok().and_then(|fraction| fraction_value(&fraction))
        } else if self.letters == LetterMode::Words {
            match (self.token(), self.peek(1), self.peek(2)) {
                (Some(Token::Number(top)), Some(Token::Char('/')), Some(Token::Number(bottom)))
                    if is_integer(&top.value) && is_integer(&bottom.value) && bottom.value > top.value =>
                {
                    let value = &top.value / &bottom.value;
                    self.position += 3;
                    Some(value)
                }
                (Some(Token::Number(part)), ..) if !is_integer(&part.value) && !part.is_decimal => {
                    let value = part.value.clone();
                    self.position += 1;
                    Some(value)
                }
                _ => None,
            }
        } else {
            None
        };
        match fraction {
            Some(fraction) => Some(Expr::Number(Number::exact(whole + fraction))),
            None => {
                self.position = before;
                if let Some(unread) = unread {
                    self.tokens = unread;
                }
                None
            }
        }
    }

    /// Parses the words of a unit behind a value.
    fn unit(&mut self) -> Option<String> {
        let Some(Token::Text(words)) = self.token() else { return None };
        if ["and", "or"].contains(&words.trim_matches([',', ' ']).to_lowercase().as_str()) {
            return None;
        }
        let mut unit = words.clone();
        self.position += 1;
        // Examples: `m^2`, `m/s`, `square feet`.
        loop {
            if self.next_is('^') {
                self.position += 1;
                let braced = self.eat('{');
                let minus = self.eat('-');
                let Some(Token::Number(power)) = self.token() else { break };
                unit.push_str(&format!("^{}{}", if minus { "-" } else { "" }, power.value));
                self.position += 1;
                if braced && !self.eat('}') {
                    break;
                }
            } else if let Some(Token::Text(more)) = self.token() {
                if ["and", "or"].contains(&more.trim_matches([',', ' ']).to_lowercase().as_str()) {
                    break;
                }
                unit.push(' ');
                unit.push_str(more);
                self.position += 1;
            } else if self.next_is('/') && matches!(self.peek(1), Some(Token::Text(_))) {
                unit.push('/');
                self.position += 1;
                if let Some(Token::Text(more)) = self.token() {
                    unit.push_str(more);
                    self.position += 1;
                }
            } else {
                break;
            }
        }
        Some(unit)
    }

    /// Returns whether the next token can begin a factor of an implicit product.
    pub(super) fn begins_factor(&self) -> bool {
        match self.token() {
            None | Some(Token::Text(_)) => false,
            Some(Token::Number(_) | Token::Letter(_)) => true,
            Some(Token::Char(sign)) => matches!(sign, '(' | '{' | '['),
            Some(Token::Command(name)) => !matches!(
                name.as_str(),
                "}" | "cup"
                    | "cap"
                    | "setminus"
                    | "cdot"
                    | "times"
                    | "div"
                    | "pm"
                    | "mp"
                    | "le"
                    | "ge"
                    | "ne"
                    | "lt"
                    | "gt"
                    | "in"
                    | "equiv"
                    | "\\"
                    | "and"
                    | "or"
                    | "end"
                    | "rfloor"
                    | "rceil"
                    | "rangle"
                    | "rbrace"
                    | "over"
                    | "bmod"
                    | "mod"
                    | "pmod"
                    | "to"
                    | "degree"
                    | "{"
                    | "approx"
                    | "sim"
                    | "cong"
                    | "dots"
                    | "ldots"
                    | "cdots"
            ),
        }
    }

    /// Parses a power with optional minus signs.
    fn signed_power(&mut self) -> ParseResult {
        if self.eat('-') { Ok(self.signed_power()?.negate()) } else { self.power() }
    }

    /// Parses a power, or a base in degrees such as `30^\circ`.
    pub(super) fn power(&mut self) -> ParseResult {
        let base = self.postfix()?;
        if !self.next_is('^') {
            return Ok(base);
        }
        self.position += 1;
        if self.eat_command("degree") {
            return Ok(Expr::Degrees(Box::new(base)));
        }
        let exponent = self.nested(Self::exponent)?;
        if matches!(&exponent, Expr::Degrees(inner) if **inner == Expr::integer(1)) {
            return Ok(Expr::Degrees(Box::new(base)));
        }
        let power = Expr::Power(Box::new(base), Box::new(exponent));
        self.postfix_operators(power)
    }

    /// Parses an exponent.
    pub(super) fn exponent(&mut self) -> ParseResult {
        if self.eat('-') {
            return Ok(self.nested(Self::exponent)?.negate());
        }
        if self.next_is('{') {
            self.position += 1;
            if self.eat_command("degree") {
                self.require('}')?;
                return Ok(Expr::Degrees(Box::new(Expr::integer(1))));
            }
            if self.eat_command("prime") || self.eat('\'') {
                self.require('}')?;
                return Ok(Expr::integer(1));
            }
            let inner = self.sum()?;
            self.require('}')?;
            return Ok(inner);
        }
        // LaTeX typesets `x^23` with only the 2 raised, but authors mean the 23rd power.
        let base = self.primary()?;
        let base = self.postfix_operators(base)?;
        if self.eat('^') {
            Ok(Expr::Power(Box::new(base), Box::new(self.nested(Self::exponent)?)))
        } else {
            Ok(base)
        }
    }

    /// Parses a primary expression with its postfix operators.
    fn postfix(&mut self) -> ParseResult {
        let base = self.primary()?;
        self.postfix_operators(base)
    }

    /// Parses postfix operators behind `base`: factorial, percent, degrees, number base and prime.
    pub(super) fn postfix_operators(&mut self, mut base: Expr) -> ParseResult {
        loop {
            if self.next_is('!') && !matches!(self.peek(1), Some(Token::Char('='))) {
                self.position += 1;
                base = Expr::Call(Function::Factorial, vec![base]);
            } else if self.eat('%') {
                base = Expr::Percent(Box::new(base));
            } else if self.next_is_text(&["percent", "%", "percentage"]) {
                self.position += 1;
                base = Expr::Percent(Box::new(base));
            } else if self.next_is_command("degree") {
                self.position += 1;
                base = Expr::Degrees(Box::new(base));
            } else if self.next_is('_') && matches!(base, Expr::Number(_)) {
                self.position += 1;
                let braced = self.eat('{');
                let Some(Token::Number(number)) = self.token() else {
                    return Err(ParseError::Syntax(self.position));
                };
                let to_base = number
                    .value
                    .to_u32()
                    .filter(|base| *base >= 2)
                    .ok_or(ParseError::Syntax(self.position))?;
                self.position += 1;
                if braced {
                    self.require('}')?;
                }
                base = Expr::InBase(Box::new(base), to_base);
            } else if self.next_is('\'') {
                self.position += 1;
                if let Expr::Symbol(name) = &mut base {
                    name.push('\'');
                }
            } else {
                return Ok(base);
            }
        }
    }
}

/// Returns the product of factors, or a single factor unchanged.
pub(super) fn product_of_factors(mut factors: Vec<Expr>) -> Expr {
    if factors.len() == 1 {
        return factors.swap_remove(0);
    }
    Expr::Product(factors)
}

/// Returns the value of a quotient of an integer and a positive integer.
fn fraction_value(fraction: &Expr) -> Option<num_rational::BigRational> {
    let Expr::Product(parts) = fraction else { return None };
    let [Expr::Number(top), Expr::Power(bottom, exponent)] = parts.as_slice() else { return None };
    let bottom = bottom.as_number()?;
    let is_inverse = **exponent == Expr::integer(-1);
    let fine = is_inverse
        && is_integer(&top.value)
        && is_integer(&bottom.value)
        && bottom.value > num_traits::Zero::zero();
    fine.then(|| &top.value / &bottom.value)
}
