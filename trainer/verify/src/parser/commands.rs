//! Parser of LaTeX commands: functions, roots, matrices, sums and integrals.
//!
//! Deliberately absent: limits and derivatives.

use super::factors::product_of_factors;
use super::{MAX_ELEMENTS, ParseError, ParseResult, Parser};
use crate::expr::{BigOperator, Constant, Expr, Function, IntervalBound, Relation};
use crate::lexer::Token;

impl Parser {
    /// Parses the command `name` with its arguments.
    pub(super) fn command(&mut self, name: &str) -> ParseResult {
        let begin = self.position;
        self.position += 1;
        let function = match name {
            "sin" => Some(Function::Sin),
            "cos" => Some(Function::Cos),
            "tan" | "tg" => Some(Function::Tan),
            "cot" | "ctg" => Some(Function::Cot),
            "sec" => Some(Function::Sec),
            "csc" => Some(Function::Csc),
            "arcsin" => Some(Function::Arcsin),
            "arccos" => Some(Function::Arccos),
            "arctan" => Some(Function::Arctan),
            "sinh" => Some(Function::Sinh),
            "cosh" => Some(Function::Cosh),
            "tanh" => Some(Function::Tanh),
            "abs" => Some(Function::Abs),
            "gcd" => Some(Function::Gcd),
            "lcm" => Some(Function::Lcm),
            "max" => Some(Function::Max),
            "min" => Some(Function::Min),
            _ => None,
        };
        if let Some(function) = function {
            return self.function_call(function);
        }
        match name {
            "frac" => {
                let top = self.argument()?;
                // Derivatives are not supported.
                if matches!(&top, Expr::Symbol(d) if d == "d") {
                    return Err(ParseError::Syntax(begin));
                }
                Ok(top.divided_by(self.argument()?))
            }
            "binom" => {
                let top = self.argument()?;
                Ok(Expr::Call(Function::Binomial, vec![top, self.argument()?]))
            }
            "sqrt" => {
                let degree = if self.eat('[') {
                    let degree = self.sum()?;
                    self.require(']')?;
                    degree
                } else {
                    Expr::integer(2)
                };
                let inner = self.argument()?;
                Ok(Expr::Power(Box::new(inner), Box::new(Expr::integer(1).divided_by(degree))))
            }
            "pi" => Ok(Expr::Constant(Constant::Pi)),
            "infty" => Ok(Expr::Constant(Constant::Infinity)),
            "imath" => Ok(Expr::Constant(Constant::I)),
            "ln" => {
                let argument = self.function_argument()?;
                Ok(Expr::Call(Function::Ln, vec![argument]))
            }
            "exp" => {
                let argument = self.function_argument()?;
                Ok(Expr::Power(Box::new(Expr::Constant(Constant::E)), Box::new(argument)))
            }
            "log" | "lg" => {
                let base = if self.eat('_') { self.argument()? } else { Expr::integer(10) };
                let argument = self.function_argument()?;
                let ln = |of: Expr| Expr::Call(Function::Ln, vec![of]);
                Ok(ln(argument).divided_by(ln(base)))
            }
            "lfloor" | "lceil" => {
                let inner = self.sum()?;
                let (end, function) =
                    if name == "lfloor" { ("rfloor", Function::Floor) } else { ("rceil", Function::Ceil) };
                if !self.eat_command(end) {
                    return Err(ParseError::Syntax(self.position));
                }
                Ok(Expr::Call(function, vec![inner]))
            }
            "{" => {
                if self.eat_command("}") {
                    return Ok(Expr::Set(Vec::new()));
                }
                let inner = self.list()?;
                if !self.eat_command("}") {
                    return Err(ParseError::Syntax(self.position));
                }
                Ok(match inner {
                    Expr::Set(items) => Expr::Set(items),
                    one => Expr::Set(vec![one]),
                })
            }
            "langle" => {
                let mut items = vec![self.relation()?];
                while self.eat(',') {
                    items.push(self.relation()?);
                }
                if !self.eat_command("rangle") {
                    return Err(ParseError::Syntax(self.position));
                }
                Ok(Expr::Tuple(items))
            }
            "emptyset" => Ok(Expr::Set(Vec::new())),
            "mathbb" | "Bbb" => match self.argument()? {
                Expr::Symbol(set) if set == "R" => {
                    let end = |at: Expr| IntervalBound { at: Box::new(at), closed: false };
                    let infinity = Expr::Constant(Constant::Infinity);
                    Ok(Expr::Interval(end(infinity.clone().negate()), end(infinity)))
                }
                Expr::Symbol(set) => Ok(Expr::Symbol(format!("mathbb {set}"))),
                _ => Err(ParseError::Syntax(begin)),
            },
            "begin" => self.matrix(),
            "int" => self.integral(),
            "sum" => self.big_operator(BigOperator::Sum),
            "prod" => self.big_operator(BigOperator::Product),
            "boxed" | "fbox" => self.argument(),
            "overline" | "vec" | "hat" | "bar" | "tilde" | "overrightarrow" | "widehat" | "mathring" => {
                let inner = self.argument()?;
                match inner {
                    Expr::Symbol(inner) => Ok(Expr::Symbol(format!("{name} {inner}"))),
                    Expr::Product(_) => Ok(Expr::Symbol(format!("{name} {inner:?}"))),
                    _ => Err(ParseError::Syntax(begin)),
                }
            }
            "alpha" | "beta" | "gamma" | "delta" | "epsilon" | "varepsilon" | "zeta" | "eta" | "theta"
            | "vartheta" | "iota" | "kappa" | "lambda" | "mu" | "nu" | "xi" | "rho" | "sigma" | "tau"
            | "upsilon" | "phi" | "varphi" | "chi" | "psi" | "omega" | "Gamma" | "Delta" | "Theta"
            | "Lambda" | "Xi" | "Pi" | "Sigma" | "Upsilon" | "Phi" | "Psi" | "Omega" | "ell" | "hbar"
            | "angle" | "triangle" => self.symbol_with_subscript(name.to_owned()),
            _ => Err(ParseError::Syntax(begin)),
        }
    }

    /// Parses a function call: `\sin x`, `\sin^2 x`, `\sin(2x)` or `\gcd(a, b)`. The exponent -1 means the
    /// inverse function.
    fn function_call(&mut self, function: Function) -> ParseResult {
        let exponent = if self.eat('^') { Some(self.exponent()?) } else { None };
        let many = matches!(function, Function::Gcd | Function::Lcm | Function::Max | Function::Min);
        let arguments = if many {
            if !(self.eat('(') || self.eat_command("{") || self.eat('{')) {
                return Err(ParseError::Syntax(self.position));
            }
            let mut arguments = vec![self.sum()?];
            while self.eat(',') {
                arguments.push(self.sum()?);
            }
            if !(self.eat(')') || self.eat_command("}") || self.eat('}')) {
                return Err(ParseError::Syntax(self.position));
            }
            arguments
        } else {
            vec![self.function_argument()?]
        };
        let inverse = exponent.as_ref() == Some(&Expr::integer(-1));
        let (function, exponent) = match (function, inverse) {
            (Function::Sin, true) => (Function::Arcsin, None),
            (Function::Cos, true) => (Function::Arccos, None),
            (Function::Tan, true) => (Function::Arctan, None),
            (function, _) => (function, exponent),
        };
        let call = Expr::Call(function, arguments);
        Ok(match exponent {
            Some(exponent) => Expr::Power(Box::new(call), Box::new(exponent)),
            None => call,
        })
    }

    /// Parses the argument of a function: a group, or the factors up to the next function, number or
    /// parenthesis.
    fn function_argument(&mut self) -> ParseResult {
        if self.next_is('(') || self.next_is('{') || self.next_is('[') {
            let group = self.primary()?;
            return self.postfix_operators(group);
        }
        let mut factors = vec![self.power()?];
        while self.begins_factor() && !self.begins_function() && !self.next_is('(') {
            if matches!(self.token(), Some(Token::Number(_))) {
                break;
            }
            factors.push(self.power()?);
        }
        Ok(product_of_factors(factors))
    }

    fn begins_function(&self) -> bool {
        const FUNCTIONS: [&str; 20] = [
            "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh",
            "ln", "log", "exp", "int", "sum", "prod", "gcd", "lim",
        ];
        matches!(self.token(), Some(Token::Command(name)) if FUNCTIONS.contains(&name.as_str()))
    }

    /// Reads a run of letters.
    fn letter_run(&mut self) -> Result<String, ParseError> {
        let mut name = String::new();
        while let Some(Token::Letter(letter)) = self.token() {
            name.push(*letter);
            self.position += 1;
        }
        Ok(name)
    }

    /// Parses the name and the rows of an environment behind `\begin`.
    fn matrix(&mut self) -> ParseResult {
        self.require('{')?;
        let kind = self.letter_run()?;
        self.require('}')?;
        if kind == "array" && self.eat('{') {
            while !self.eat('}') {
                if self.token().is_none() {
                    return Err(ParseError::Syntax(self.position));
                }
                self.position += 1;
            }
        }
        if kind == "cases" || kind == "aligned" || kind == "align" {
            return Err(ParseError::Syntax(self.position));
        }
        let mut rows = vec![Vec::new()];
        let mut cells = 0;
        loop {
            if self.eat_command("end") {
                self.require('{')?;
                self.letter_run()?;
                self.require('}')?;
                break;
            }
            if self.eat_command("\\") {
                rows.push(Vec::new());
                continue;
            }
            if self.eat_command("hline") {
                continue;
            }
            let cell = self.relation()?;
            cells += 1;
            if cells > MAX_ELEMENTS {
                return Err(ParseError::Syntax(self.position));
            }
            if let Some(row) = rows.last_mut() {
                row.push(cell);
            }
            let _separated = self.eat('&');
        }
        rows.retain(|row| !row.is_empty());
        let width = rows.first().map_or(0, Vec::len);
        if width == 0 || rows.iter().any(|row| row.len() != width) {
            return Err(ParseError::Syntax(self.position));
        }
        Ok(if kind.starts_with('v') && rows.len() == width { determinant(&rows) } else { Expr::Matrix(rows) })
    }

    /// Parses the optional limits `_low` and `^high`, in either order.
    fn limits(&mut self) -> Result<(Option<Expr>, Option<Expr>), ParseError> {
        let (mut low, mut high) = (None, None);
        loop {
            if self.eat('_') {
                low = Some(if self.eat('{') {
                    let inner = self.relation()?;
                    self.require('}')?;
                    inner
                } else {
                    self.argument()?
                });
            } else if self.eat('^') {
                high = Some(if self.eat('{') {
                    let inner = self.sum()?;
                    self.require('}')?;
                    inner
                } else {
                    self.argument()?
                });
            } else {
                return Ok((low, high));
            }
        }
    }

    /// Parses the limits and the integrand of `\int_a^b f dx`.
    fn integral(&mut self) -> ParseResult {
        let (Some(low), Some(high)) = self.limits()? else { return Err(ParseError::Syntax(self.position)) };
        // The integrand ends before a `d` and a letter, outside brackets.
        let mut depth = 0usize;
        let mut end = None;
        for at in self.position..self.tokens.len() {
            match &self.tokens[at].token {
                Token::Char('(' | '{' | '[') => depth += 1,
                Token::Char(')' | '}' | ']') => depth = depth.saturating_sub(1),
                Token::Letter('d') if depth == 0 => {
                    if let Some(Token::Letter(variable)) = self.tokens.get(at + 1).map(|next| &next.token) {
                        end = Some((at, variable.to_string()));
                        break;
                    }
                }
                _ => {}
            }
        }
        let (end, variable) = end.ok_or(ParseError::Syntax(self.position))?;
        let rest = self.tokens.split_off(end);
        let body = if self.position == end { Ok(Expr::integer(1)) } else { self.sum() };
        let stopped = self.position == end;
        self.tokens.extend(rest);
        let body = body?;
        if !stopped {
            return Err(ParseError::Syntax(self.position));
        }
        self.position = end + 2;
        Ok(Expr::BigOperator(BigOperator::Integral, variable, Box::new([low, high, body])))
    }

    /// Parses the limits and the body of `\sum_{k=1}^n f` or a product.
    fn big_operator(&mut self, over: BigOperator) -> ParseResult {
        let (Some(Expr::Relation(mut sides, signs)), Some(high)) = self.limits()? else {
            return Err(ParseError::Syntax(self.position));
        };
        let (Some(low), Some(Expr::Symbol(index)), [Relation::Equal]) =
            (sides.pop(), sides.pop(), signs.as_slice())
        else {
            return Err(ParseError::Syntax(self.position));
        };
        let body = self.product()?;
        Ok(Expr::BigOperator(over, index, Box::new([low, high, body])))
    }
}

/// Returns the determinant by expansion along the first row. Matrices with more than five rows stay matrices.
fn determinant(rows: &[Vec<Expr>]) -> Expr {
    if rows.len() > 5 {
        return Expr::Matrix(rows.to_vec());
    }
    if rows.len() == 1 {
        return rows[0][0].clone();
    }
    let terms = rows[0].iter().enumerate().map(|(column, cell)| {
        let minor: Vec<Vec<Expr>> = rows[1..]
            .iter()
            .map(|row| {
                row.iter().enumerate().filter(|(at, _)| *at != column).map(|(_, cell)| cell.clone()).collect()
            })
            .collect();
        let term = Expr::Product(vec![cell.clone(), determinant(&minor)]);
        if column % 2 == 0 { term } else { term.negate() }
    });
    Expr::Sum(terms.collect())
}
