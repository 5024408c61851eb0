//! Parser from text to [`Expr`], by recursive descent with bounded depth.
//!
//! Precedence, from loose to tight: list (comma, `and`, `or`), relation, union, ratio, sum, product, implicit
//! product, power, postfix.
//!
//! Deliberately absent: derivatives, limits, piecewise functions and `\mod`, which are errors.

mod commands;
mod factors;
mod words;

use self::words::{scientific, words};
use crate::effort::spend;
use crate::expr::{Constant, End, Expr, Function, Number, Relation, is_whole};
use crate::lexer::{Spaced, Token, tokens};

/// Largest nesting depth of brackets and commands.
const DEEPEST: usize = 64;
/// Largest number of elements in a list.
const WIDEST: usize = 2_000;

/// Reason for which a text is not an expression.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// The text exceeds [`crate::lexer::LONGEST`] bytes.
    #[error("longer than {} characters", crate::lexer::LONGEST)]
    TooLong,
    /// The nesting depth exceeds its limit.
    #[error("nested deeper than {DEEPEST} levels")]
    TooDeep,
    /// The text has no tokens.
    #[error("nothing there")]
    Empty,
    /// The work budget of the comparison is exhausted.
    #[error("takes more work than is done for one answer")]
    TooMuch,
    /// Syntax error at the token with this index.
    #[error("not understood from token {0} on")]
    At(usize),
}

/// Meaning of letters without a backslash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Letters {
    /// Each letter is a variable, as in LaTeX.
    Single,
    /// Several letters can be a word, such as `pi`, `sqrt`, `and` or `apples`.
    Words,
}

/// Parses an answer.
pub fn parse(text: &str, letters: Letters) -> Result<Expr, ParseError> {
    let all = tokens(text).ok_or(ParseError::TooLong)?;
    let all = match letters {
        Letters::Single => all,
        Letters::Words => words(scientific(all)),
    };
    if all.is_empty() {
        return Err(ParseError::Empty);
    }
    let mut parser = Parser { tokens: all, at: 0, depth: 0, guessing: false, letters };
    let expr = parser.list()?;
    // A final period ends the sentence.
    while parser.is('.') {
        parser.at += 1;
    }
    if parser.at < parser.tokens.len() { Err(ParseError::At(parser.at)) } else { Ok(expr) }
}

/// State of the parser.
struct Parser {
    tokens: Vec<Spaced>,
    /// Index of the next token.
    at: usize,
    /// Current nesting depth.
    depth: usize,
    /// True while the parser tries to read the fraction of a mixed number, before possible backtracking.
    guessing: bool,
    letters: Letters,
}

type Parsed = Result<Expr, ParseError>;

impl Parser {
    fn token(&self) -> Option<&Token> {
        self.tokens.get(self.at).map(|spaced| &spaced.token)
    }

    fn ahead(&self, by: usize) -> Option<&Token> {
        self.tokens.get(self.at + by).map(|spaced| &spaced.token)
    }

    fn is(&self, sign: char) -> bool {
        matches!(self.token(), Some(Token::Sign(found)) if *found == sign)
    }

    fn is_command(&self, name: &str) -> bool {
        matches!(self.token(), Some(Token::Command(found)) if found == name)
    }

    fn is_text(&self, words: &[&str]) -> bool {
        matches!(self.token(), Some(Token::Text(found)) if words.contains(&found.trim_matches([',', ' ']).to_lowercase().as_str()))
    }

    fn eat(&mut self, sign: char) -> bool {
        let found = self.is(sign);
        self.at += usize::from(found);
        found
    }

    fn eat_command(&mut self, name: &str) -> bool {
        let found = self.is_command(name);
        self.at += usize::from(found);
        found
    }

    fn need(&mut self, sign: char) -> Result<(), ParseError> {
        if self.eat(sign) { Ok(()) } else { Err(ParseError::At(self.at)) }
    }

    /// Runs `read` one level deeper; fails at the largest nesting depth.
    fn deeper<T>(&mut self, read: impl FnOnce(&mut Self) -> Result<T, ParseError>) -> Result<T, ParseError> {
        if self.depth >= DEEPEST {
            return Err(ParseError::TooDeep);
        }
        self.depth += 1;
        let read = read(self);
        self.depth -= 1;
        read
    }

    /// Parses a list such as `a, b and c` to a set, or a single item to itself.
    fn list(&mut self) -> Parsed {
        let mut items = vec![self.relation()?];
        loop {
            let comma = self.eat(',') || self.eat(';');
            let word = self.is_text(&["and", "or"]) || self.is_command("and") || self.is_command("or");
            if word {
                self.at += 1;
            }
            if !comma && !word {
                break;
            }
            // A trailing comma ends the answer.
            if self.token().is_none() || self.is('.') {
                break;
            }
            items.push(self.relation()?);
            if items.len() > WIDEST {
                return Err(ParseError::At(self.at));
            }
        }
        Ok(gather(items))
    }

    /// Returns the relation at the next token and its number of tokens.
    fn relation_sign(&self) -> Option<(Relation, usize)> {
        Some(match self.token()? {
            Token::Sign('=') if matches!(self.ahead(1), Some(Token::Sign('='))) => (Relation::Equal, 2),
            Token::Sign('=') => (Relation::Equal, 1),
            Token::Sign('<') if matches!(self.ahead(1), Some(Token::Sign('='))) => (Relation::LessEqual, 2),
            Token::Sign('>') if matches!(self.ahead(1), Some(Token::Sign('='))) => {
                (Relation::GreaterEqual, 2)
            }
            Token::Sign('!') if matches!(self.ahead(1), Some(Token::Sign('='))) => (Relation::NotEqual, 2),
            Token::Sign('<') => (Relation::Less, 1),
            Token::Sign('>') => (Relation::Greater, 1),
            Token::Command(name) => match name.as_str() {
                "lt" => (Relation::Less, 1),
                "gt" => (Relation::Greater, 1),
                "le" => (Relation::LessEqual, 1),
                "ge" => (Relation::GreaterEqual, 1),
                "ne" => (Relation::NotEqual, 1),
                "equiv" => (Relation::Equal, 1),
                "in" => (Relation::In, 1),
                _ => return None,
            },
            _ => return None,
        })
    }

    fn relation(&mut self) -> Parsed {
        let mut sides = vec![self.union()?];
        let mut signs = Vec::new();
        while let Some((sign, length)) = self.relation_sign() {
            self.at += length;
            signs.push(sign);
            sides.push(self.union()?);
        }
        Ok(if signs.is_empty() { sides.swap_remove(0) } else { Expr::Relation(sides, signs) })
    }

    fn union(&mut self) -> Parsed {
        let mut parts = vec![self.ratio()?];
        while self.eat_command("cup") {
            parts.push(self.ratio()?);
        }
        Ok(if parts.len() == 1 { parts.swap_remove(0) } else { Expr::Union(parts) })
    }

    fn ratio(&mut self) -> Parsed {
        let mut parts = vec![self.sum()?];
        while self.eat(':') {
            parts.push(self.sum()?);
        }
        Ok(if parts.len() == 1 { parts.swap_remove(0) } else { Expr::Ratio(parts) })
    }

    /// Parses a sum. A plus-minus sign gives a set of two sums.
    fn sum(&mut self) -> Parsed {
        let mut both = false;
        let mut terms = Vec::new();
        let mut plus_minus = None;
        loop {
            let mut negative = false;
            let mut signed = false;
            loop {
                if self.eat('-') {
                    negative = !negative;
                } else if self.eat_command("pm") || self.eat_command("mp") {
                    both = true;
                } else if !self.eat('+') {
                    break;
                }
                signed = true;
            }
            if !signed && !terms.is_empty() {
                break;
            }
            let term = self.product()?;
            let term = if negative { term.negated() } else { term };
            if std::mem::take(&mut both) {
                plus_minus = Some(terms.len());
            }
            terms.push(term);
            let more = self.is('+') || self.is('-') || self.is_command("pm") || self.is_command("mp");
            if !more {
                break;
            }
        }
        let whole = |terms: Vec<Expr>| match <[Expr; 1]>::try_from(terms) {
            Ok([one]) => one,
            Err(terms) => Expr::Sum(terms),
        };
        Ok(match plus_minus {
            None => whole(terms),
            Some(at) => {
                // The set contains the terms twice, and a nested plus-minus sign doubles them again.
                let size: u64 = terms.iter().map(Expr::size).sum();
                spend(size * 2_000).ok_or(ParseError::TooMuch)?;
                let mut minus = terms.clone();
                minus[at] = minus[at].clone().negated();
                Expr::Set(vec![whole(terms), whole(minus)])
            }
        })
    }

    fn primary(&mut self) -> Parsed {
        let Some(token) = self.token().cloned() else { return Err(ParseError::At(self.at)) };
        match token {
            Token::Number(number) => {
                self.at += 1;
                Ok(Expr::Number(number))
            }
            Token::Letter(letter) => {
                self.at += 1;
                if letter == 'e' && !self.is('_') {
                    return Ok(Expr::Constant(Constant::E));
                }
                self.subscripted(letter.to_string())
            }
            Token::Text(text) => {
                self.at += 1;
                let mut all = text;
                while let Some(Token::Text(more)) = self.token() {
                    all.push(' ');
                    all.push_str(more);
                    self.at += 1;
                }
                Ok(Expr::Text(all))
            }
            Token::Sign('(' | '[') => self.deeper(Self::brackets),
            Token::Sign('{') => self.deeper(|parser| {
                parser.at += 1;
                if parser.eat('}') {
                    return Err(ParseError::At(parser.at));
                }
                let inner = parser.over_or_list()?;
                parser.need('}')?;
                Ok(inner)
            }),
            Token::Sign('|') => self.deeper(|parser| {
                parser.at += 1;
                let inner = parser.sum()?;
                parser.need('|')?;
                Ok(Expr::Call(Function::Abs, vec![inner]))
            }),
            Token::Command(name) => self.deeper(|parser| parser.command(&name)),
            Token::Sign(_) => Err(ParseError::At(self.at)),
        }
    }

    /// Parses a list or a quotient `{a \over b}`.
    fn over_or_list(&mut self) -> Parsed {
        let top = self.list()?;
        if self.eat_command("over") { Ok(top.over(self.list()?)) } else { Ok(top) }
    }

    /// Parses the optional subscript of a variable.
    fn subscripted(&mut self, mut name: String) -> Parsed {
        if self.eat('_') {
            name.push('_');
            let mut depth = usize::from(self.eat('{'));
            loop {
                match self.token() {
                    Some(Token::Sign('{')) => depth += 1,
                    Some(Token::Sign('}')) => {
                        depth = depth.saturating_sub(1);
                        if depth == 0 {
                            self.at += 1;
                            break;
                        }
                    }
                    Some(Token::Number(number)) => name.push_str(&number.value.to_string()),
                    Some(Token::Letter(letter)) => name.push(*letter),
                    Some(Token::Command(command)) => name.push_str(command),
                    Some(Token::Text(text)) => name.push_str(text),
                    Some(Token::Sign(sign)) => name.push(*sign),
                    None => return Err(ParseError::At(self.at)),
                }
                self.at += 1;
                if depth == 0 {
                    break;
                }
            }
        }
        Ok(Expr::Symbol(name))
    }

    /// Parses brackets: a group of one item, an interval or pair of two items, or a tuple.
    fn brackets(&mut self) -> Parsed {
        let opens_closed = self.is('[');
        self.at += 1;
        let mut items = vec![self.relation()?];
        while self.eat(',') || self.eat(';') {
            items.push(self.relation()?);
            if items.len() > WIDEST {
                return Err(ParseError::At(self.at));
            }
        }
        let ends_closed = self.is(']');
        if !ends_closed && !self.is(')') {
            return Err(ParseError::At(self.at));
        }
        self.at += 1;
        if items.len() == 2 {
            let high = items.pop().ok_or(ParseError::Empty)?;
            let low = items.pop().ok_or(ParseError::Empty)?;
            let end = |at: Expr, closed| End { at: Box::new(at), closed };
            return Ok(Expr::Interval(end(low, opens_closed), end(high, ends_closed)));
        }
        if opens_closed != ends_closed {
            return Err(ParseError::At(self.at));
        }
        Ok(if items.len() == 1 { items.swap_remove(0) } else { Expr::Tuple(items) })
    }

    /// Parses an argument of a command: a group in braces, the first digit of a number, or one primary
    /// expression.
    fn argument(&mut self) -> Parsed {
        if self.eat('{') {
            let inner = self.over_or_list()?;
            self.need('}')?;
            return Ok(inner);
        }
        // `\frac12` has the arguments 1 and 2.
        if let Some(Token::Number(number)) = self.token()
            && is_whole(&number.value)
            && !number.is_decimal
        {
            let digits = number.value.numer().to_string();
            if digits.len() > 1 {
                let (first, rest) = digits.split_at(1);
                let read = |digits: &str| Number::exact(crate::lexer::value_of(digits, ""));
                let (first, rest) = (read(first), read(rest));
                self.tokens[self.at].token = Token::Number(rest);
                return Ok(Expr::Number(first));
            }
        }
        self.primary()
    }
}

/// Returns the items as a set, or a single item unchanged.
fn gather(mut items: Vec<Expr>) -> Expr {
    if items.len() == 1 {
        return items.swap_remove(0);
    }
    // An item that is a set, such as a plus-minus value, is merged into the list.
    let mut all: Vec<Expr> = Vec::with_capacity(items.len());
    for item in items {
        match item {
            Expr::Set(more) => all.extend(more),
            other => all.push(other),
        }
    }
    Expr::Set(all)
}
