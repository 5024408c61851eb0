//! Parser of products, powers, postfix operators and units.
//!
//! Deliberately absent: remainders (`\bmod`), which are errors.

use num_traits::ToPrimitive;

use super::{Letters, ParseError, Parsed, Parser};
use crate::effort::spend;
use crate::expr::{Expr, Function, Number, is_whole};
use crate::lexer::{Spaced, Token};

impl Parser {
    /// Parses a product with explicit multiplication and division signs.
    pub(super) fn product(&mut self) -> Parsed {
        let mut factors = vec![self.factor()?];
        loop {
            if self.eat('*') {
                // `**` is a power in plain text.
                if self.eat('*') {
                    let exponent = self.signed_power()?;
                    let base = factors.pop().unwrap_or_else(|| Expr::whole(1));
                    factors.push(Expr::Power(Box::new(base), Box::new(exponent)));
                    continue;
                }
                factors.push(self.factor()?);
            } else if self.eat_command("cdot") || self.eat_command("times") {
                factors.push(self.factor()?);
            } else if self.eat('/') || self.eat_command("div") {
                let bottom = self.factor()?;
                factors.push(Expr::Power(Box::new(bottom), Box::new(Expr::whole(-1))));
            } else if self.eat_command("bmod") || self.eat_command("mod") {
                return Err(ParseError::At(self.at));
            } else if self.times_sign() && matches!(factors.last(), Some(Expr::Number(_))) {
                self.at += 1;
                factors.push(self.factor()?);
            } else {
                break;
            }
        }
        Ok(multiplied(factors))
    }

    /// Returns whether the next token is the letter `x` as a multiplication sign, as in `1.5 x 10^3`.
    fn times_sign(&self) -> bool {
        self.letters == Letters::Words
            && matches!(self.token(), Some(Token::Letter('x' | 'X')))
            && self.tokens[self.at].spaced
            && matches!(self.tokens.get(self.at + 1), Some(Spaced { token: Token::Number(_), spaced: true }))
    }

    /// Parses a signed implicit product, such as `2x`, with an optional unit.
    pub(super) fn factor(&mut self) -> Parsed {
        if self.eat('-') {
            return self.deeper(|parser| Ok(parser.factor()?.negated()));
        }
        if self.eat('+') {
            return self.deeper(Self::factor);
        }
        let first = self.power()?;
        // `1 1/2` and `1\frac12` are mixed numbers.
        let first = match self.mixed(&first) {
            Some(mixed) => self.after(mixed)?,
            None => first,
        };
        let mut factors = vec![first];
        while self.begins_factor() && !(self.times_sign() && matches!(factors.last(), Some(Expr::Number(_))))
        {
            // Two numbers side by side are not a product.
            if matches!(self.token(), Some(Token::Number(_)))
                && matches!(factors.last(), Some(Expr::Number(_)))
            {
                return Err(ParseError::At(self.at));
            }
            factors.push(self.power()?);
        }
        let unit = self.unit();
        let value = multiplied(factors);
        Ok(match unit {
            Some(unit) => Expr::Quantity(Box::new(value), unit),
            None => value,
        })
    }

    /// Parses the fraction behind the integer `first` and returns the mixed number; backtracks if there is
    /// none.
    fn mixed(&mut self, first: &Expr) -> Option<Expr> {
        let whole =
            first.number().filter(|number| !number.is_decimal && is_whole(&number.value))?.value.clone();
        let before = self.at;
        let mut unread = None;
        let fraction = if self.guessing {
            // Mixed numbers do not nest; nested backtracking would double the work with each level.
            None
        } else if self.is_command("frac") {
            // Parsing splits a token such as `12` in `\frac12`, so backtracking restores the tokens.
            spend(self.tokens.len() as u64 * 20)?;
            unread = Some(self.tokens.clone());
            self.guessing = true;
            let fraction = self.primary();
            self.guessing = false;
            fraction.ok().and_then(|fraction| plain_fraction(&fraction))
        } else if self.letters == Letters::Words {
            match (self.token(), self.ahead(1), self.ahead(2)) {
                (Some(Token::Number(top)), Some(Token::Sign('/')), Some(Token::Number(bottom)))
                    if is_whole(&top.value) && is_whole(&bottom.value) && bottom.value > top.value =>
                {
                    let value = &top.value / &bottom.value;
                    self.at += 3;
                    Some(value)
                }
                (Some(Token::Number(part)), ..) if !is_whole(&part.value) && !part.is_decimal => {
                    let value = part.value.clone();
                    self.at += 1;
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
                self.at = before;
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
        self.at += 1;
        // Examples: `m^2`, `m/s`, `square feet`.
        loop {
            if self.is('^') {
                self.at += 1;
                let braced = self.eat('{');
                let minus = self.eat('-');
                let Some(Token::Number(power)) = self.token() else { break };
                unit.push_str(&format!("^{}{}", if minus { "-" } else { "" }, power.value));
                self.at += 1;
                if braced && !self.eat('}') {
                    break;
                }
            } else if let Some(Token::Text(more)) = self.token() {
                if ["and", "or"].contains(&more.trim_matches([',', ' ']).to_lowercase().as_str()) {
                    break;
                }
                unit.push(' ');
                unit.push_str(more);
                self.at += 1;
            } else if self.is('/') && matches!(self.ahead(1), Some(Token::Text(_))) {
                unit.push('/');
                self.at += 1;
                if let Some(Token::Text(more)) = self.token() {
                    unit.push_str(more);
                    self.at += 1;
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
            Some(Token::Sign(sign)) => matches!(sign, '(' | '{' | '['),
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
    fn signed_power(&mut self) -> Parsed {
        if self.eat('-') { Ok(self.signed_power()?.negated()) } else { self.power() }
    }

    /// Parses a power, or a base in degrees such as `30^\circ`.
    pub(super) fn power(&mut self) -> Parsed {
        let base = self.postfix()?;
        if !self.is('^') {
            return Ok(base);
        }
        self.at += 1;
        if self.eat_command("degree") {
            return Ok(Expr::Degrees(Box::new(base)));
        }
        let exponent = self.deeper(Self::exponent)?;
        if matches!(&exponent, Expr::Degrees(inner) if **inner == Expr::whole(1)) {
            return Ok(Expr::Degrees(Box::new(base)));
        }
        let power = Expr::Power(Box::new(base), Box::new(exponent));
        self.after(power)
    }

    /// Parses an exponent.
    pub(super) fn exponent(&mut self) -> Parsed {
        if self.eat('-') {
            return Ok(self.deeper(Self::exponent)?.negated());
        }
        if self.is('{') {
            self.at += 1;
            if self.eat_command("degree") {
                self.need('}')?;
                return Ok(Expr::Degrees(Box::new(Expr::whole(1))));
            }
            if self.eat_command("prime") || self.eat('\'') {
                self.need('}')?;
                return Ok(Expr::whole(1));
            }
            let inner = self.sum()?;
            self.need('}')?;
            return Ok(inner);
        }
        // LaTeX typesets `x^23` with only the 2 raised, but authors mean the 23rd power.
        let base = self.primary()?;
        let base = self.after(base)?;
        if self.eat('^') {
            Ok(Expr::Power(Box::new(base), Box::new(self.deeper(Self::exponent)?)))
        } else {
            Ok(base)
        }
    }

    /// Parses a primary expression with its postfix operators.
    fn postfix(&mut self) -> Parsed {
        let base = self.primary()?;
        self.after(base)
    }

    /// Parses postfix operators behind `base`: factorial, percent, degrees, number base and prime.
    pub(super) fn after(&mut self, mut base: Expr) -> Parsed {
        loop {
            if self.is('!') && !matches!(self.ahead(1), Some(Token::Sign('='))) {
                self.at += 1;
                base = Expr::Call(Function::Factorial, vec![base]);
            } else if self.eat('%') {
                base = Expr::Percent(Box::new(base));
            } else if self.is_text(&["percent", "%", "percentage"]) {
                self.at += 1;
                base = Expr::Percent(Box::new(base));
            } else if self.is_command("degree") {
                self.at += 1;
                base = Expr::Degrees(Box::new(base));
            } else if self.is('_') && matches!(base, Expr::Number(_)) {
                self.at += 1;
                let braced = self.eat('{');
                let Some(Token::Number(number)) = self.token() else { return Err(ParseError::At(self.at)) };
                let to_base =
                    number.value.to_u32().filter(|base| *base >= 2).ok_or(ParseError::At(self.at))?;
                self.at += 1;
                if braced {
                    self.need('}')?;
                }
                base = Expr::Based(Box::new(base), to_base);
            } else if self.is('\'') {
                self.at += 1;
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
pub(super) fn multiplied(mut factors: Vec<Expr>) -> Expr {
    if factors.len() == 1 {
        return factors.swap_remove(0);
    }
    Expr::Product(factors)
}

/// Returns the value of a quotient of an integer and a positive integer.
fn plain_fraction(fraction: &Expr) -> Option<num_rational::BigRational> {
    let Expr::Product(parts) = fraction else { return None };
    let [Expr::Number(top), Expr::Power(bottom, exponent)] = parts.as_slice() else { return None };
    let bottom = bottom.number()?;
    let is_inverse = **exponent == Expr::whole(-1);
    let fine = is_inverse
        && is_whole(&top.value)
        && is_whole(&bottom.value)
        && bottom.value > num_traits::Zero::zero();
    fine.then(|| &top.value / &bottom.value)
}
