//! Parser from text to [`Expr`], by recursive descent with bounded depth.
//!
//! Precedence, from loose to tight: list (comma, `and`, `or`), relation, union, ratio, sum, product, implicit
//! product, power, postfix.
//!
//! Deliberately absent: derivatives, limits, piecewise functions and `\mod`, which are errors.

mod commands;
mod factors;
mod words;

use self::words::{classify_letter_runs, join_scientific_notation};
use crate::effort::spend;
use crate::expr::{Constant, Expr, Function, IntervalBound, Number, Relation, is_integer};
use crate::lexer::{SpacedToken, Token, tokenize};

/// Largest nesting depth of brackets and commands.
const MAX_DEPTH: usize = 64;
/// Largest number of elements in a list.
const MAX_ELEMENTS: usize = 2_000;

/// Reason for which a text is not an expression.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// The text exceeds [`crate::lexer::LONGEST`] bytes.
    #[error("longer than {} characters", crate::lexer::MAX_ANSWER_BYTES)]
    TooLong,
    /// The nesting depth exceeds its limit.
    #[error("nested deeper than {MAX_DEPTH} levels")]
    TooDeep,
    /// The text has no tokens.
    #[error("nothing there")]
    Empty,
    /// The work budget of the comparison is exhausted.
    #[error("takes more work than is done for one answer")]
    OutOfBudget,
    /// Syntax error at the token with this index.
    #[error("not understood from token {0} on")]
    Syntax(usize),
}

/// Meaning of letters without a backslash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LetterMode {
    /// Each letter is a variable, as in LaTeX.
    Single,
    /// Several letters can be a word, such as `pi`, `sqrt`, `and` or `apples`.
    Words,
}

/// Parses an answer.
pub fn parse(text: &str, letters: LetterMode) -> Result<Expr, ParseError> {
    let all = tokenize(text).ok_or(ParseError::TooLong)?;
    let all = match letters {
        LetterMode::Single => all,
        LetterMode::Words => classify_letter_runs(join_scientific_notation(all)),
    };
    if all.is_empty() {
        return Err(ParseError::Empty);
    }
    let mut parser = Parser { tokens: all, position: 0, depth: 0, is_speculative: false, letters };
    let expr = parser.list()?;
    // A final period ends the sentence.
    while parser.next_is('.') {
        parser.position += 1;
    }
    if parser.position < parser.tokens.len() { Err(ParseError::Syntax(parser.position)) } else { Ok(expr) }
}

/// State of the parser.
struct Parser {
    tokens: Vec<SpacedToken>,
    /// Index of the next token.
    position: usize,
    /// Current nesting depth.
    depth: usize,
    /// True while the parser tries to read the fraction of a mixed number, before possible backtracking.
    is_speculative: bool,
    letters: LetterMode,
}

type ParseResult = Result<Expr, ParseError>;

impl Parser {
    fn token(&self) -> Option<&Token> {
        self.tokens.get(self.position).map(|spaced| &spaced.token)
    }

    fn peek(&self, by: usize) -> Option<&Token> {
        self.tokens.get(self.position + by).map(|spaced| &spaced.token)
    }

    fn next_is(&self, sign: char) -> bool {
        matches!(self.token(), Some(Token::Char(found)) if *found == sign)
    }

    fn next_is_command(&self, name: &str) -> bool {
        matches!(self.token(), Some(Token::Command(found)) if found == name)
    }

    fn next_is_text(&self, words: &[&str]) -> bool {
        matches!(self.token(), Some(Token::Text(found)) if words.contains(&found.trim_matches([',', ' ']).to_lowercase().as_str()))
    }

    fn eat(&mut self, sign: char) -> bool {
        let found = self.next_is(sign);
        self.position += usize::from(found);
        found
    }

    fn eat_command(&mut self, name: &str) -> bool {
        let found = self.next_is_command(name);
        self.position += usize::from(found);
        found
    }

    fn require(&mut self, sign: char) -> Result<(), ParseError> {
        if self.eat(sign) { Ok(()) } else { Err(ParseError::Syntax(self.position)) }
    }

    /// Runs `read` one level deeper; fails at the largest nesting depth.
    fn nested<T>(&mut self, read: impl FnOnce(&mut Self) -> Result<T, ParseError>) -> Result<T, ParseError> {
        if self.depth >= MAX_DEPTH {
            return Err(ParseError::TooDeep);
        }
        self.depth += 1;
        let read = read(self);
        self.depth -= 1;
        read
    }

    /// Parses a list such as `a, b and c` to a set, or a single item to itself.
    fn list(&mut self) -> ParseResult {
        let mut items = vec![self.relation()?];
        loop {
            let comma = self.eat(',') || self.eat(';');
            let word = self.next_is_text(&["and", "or"])
                || self.next_is_command("and")
                || self.next_is_command("or");
            if word {
                self.position += 1;
            }
            if !comma && !word {
                break;
            }
            // A trailing comma ends the answer.
            if self.token().is_none() || self.next_is('.') {
                break;
            }
            items.push(self.relation()?);
            if items.len() > MAX_ELEMENTS {
                return Err(ParseError::Syntax(self.position));
            }
        }
        Ok(list_to_set(items))
    }

    /// Returns the relation at the next token and its number of tokens.
    fn relation_sign(&self) -> Option<(Relation, usize)> {
        Some(match self.token()? {
            Token::Char('=') if matches!(self.peek(1), Some(Token::Char('='))) => (Relation::Equal, 2),
            Token::Char('=') => (Relation::Equal, 1),
            Token::Char('<') if matches!(self.peek(1), Some(Token::Char('='))) => (Relation::LessEqual, 2),
            Token::Char('>') if matches!(self.peek(1), Some(Token::Char('='))) => (Relation::GreaterEqual, 2),
            Token::Char('!') if matches!(self.peek(1), Some(Token::Char('='))) => (Relation::NotEqual, 2),
            Token::Char('<') => (Relation::Less, 1),
            Token::Char('>') => (Relation::Greater, 1),
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

    fn relation(&mut self) -> ParseResult {
        let mut sides = vec![self.union()?];
        let mut signs = Vec::new();
        while let Some((sign, length)) = self.relation_sign() {
            self.position += length;
            signs.push(sign);
            sides.push(self.union()?);
        }
        Ok(if signs.is_empty() { sides.swap_remove(0) } else { Expr::Relation(sides, signs) })
    }

    fn union(&mut self) -> ParseResult {
        let mut parts = vec![self.ratio()?];
        while self.eat_command("cup") {
            parts.push(self.ratio()?);
        }
        Ok(if parts.len() == 1 { parts.swap_remove(0) } else { Expr::Union(parts) })
    }

    fn ratio(&mut self) -> ParseResult {
        let mut parts = vec![self.sum()?];
        while self.eat(':') {
            parts.push(self.sum()?);
        }
        Ok(if parts.len() == 1 { parts.swap_remove(0) } else { Expr::Ratio(parts) })
    }

    /// Parses a sum. A plus-minus sign gives a set of two sums.
    fn sum(&mut self) -> ParseResult {
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
            let term = if negative { term.negate() } else { term };
            if std::mem::take(&mut both) {
                plus_minus = Some(terms.len());
            }
            terms.push(term);
            let more = self.next_is('+')
                || self.next_is('-')
                || self.next_is_command("pm")
                || self.next_is_command("mp");
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
                let size: u64 = terms.iter().map(Expr::node_count).sum();
                spend(size * 2_000).ok_or(ParseError::OutOfBudget)?;
                let mut minus = terms.clone();
                minus[at] = minus[at].clone().negate();
                Expr::Set(vec![whole(terms), whole(minus)])
            }
        })
    }

    fn primary(&mut self) -> ParseResult {
        let Some(token) = self.token().cloned() else { return Err(ParseError::Syntax(self.position)) };
        match token {
            Token::Number(number) => {
                self.position += 1;
                Ok(Expr::Number(number))
            }
            Token::Letter(letter) => {
                self.position += 1;
                if letter == 'e' && !self.next_is('_') {
                    return Ok(Expr::Constant(Constant::E));
                }
                self.symbol_with_subscript(letter.to_string())
            }
            Token::Text(text) => {
                self.position += 1;
                let mut all = text;
                while let Some(Token::Text(more)) = self.token() {
                    all.push(' ');
                    all.push_str(more);
                    self.position += 1;
                }
                Ok(Expr::Text(all))
            }
            Token::Char('(' | '[') => self.nested(Self::brackets),
            Token::Char('{') => self.nested(|parser| {
                parser.position += 1;
                if parser.eat('}') {
                    return Err(ParseError::Syntax(parser.position));
                }
                let inner = parser.group_content()?;
                parser.require('}')?;
                Ok(inner)
            }),
            Token::Char('|') => self.nested(|parser| {
                parser.position += 1;
                let inner = parser.sum()?;
                parser.require('|')?;
                Ok(Expr::Call(Function::Abs, vec![inner]))
            }),
            Token::Command(name) => self.nested(|parser| parser.command(&name)),
            Token::Char(_) => Err(ParseError::Syntax(self.position)),
        }
    }

    /// Parses a list or a quotient `{a \over b}`.
    fn group_content(&mut self) -> ParseResult {
        let top = self.list()?;
        if self.eat_command("over") { Ok(top.divided_by(self.list()?)) } else { Ok(top) }
    }

    /// Parses the optional subscript of a variable.
    fn symbol_with_subscript(&mut self, mut name: String) -> ParseResult {
        if self.eat('_') {
            name.push('_');
            let mut depth = usize::from(self.eat('{'));
            loop {
                match self.token() {
                    Some(Token::Char('{')) => depth += 1,
                    Some(Token::Char('}')) => {
                        depth = depth.saturating_sub(1);
                        if depth == 0 {
                            self.position += 1;
                            break;
                        }
                    }
                    Some(Token::Number(number)) => name.push_str(&number.value.to_string()),
                    Some(Token::Letter(letter)) => name.push(*letter),
                    Some(Token::Command(command)) => name.push_str(command),
                    Some(Token::Text(text)) => name.push_str(text),
                    Some(Token::Char(sign)) => name.push(*sign),
                    None => return Err(ParseError::Syntax(self.position)),
                }
                self.position += 1;
                if depth == 0 {
                    break;
                }
            }
        }
        Ok(Expr::Symbol(name))
    }

    /// Parses brackets: a group of one item, an interval or pair of two items, or a tuple.
    fn brackets(&mut self) -> ParseResult {
        let opens_closed = self.next_is('[');
        self.position += 1;
        let mut items = vec![self.relation()?];
        while self.eat(',') || self.eat(';') {
            items.push(self.relation()?);
            if items.len() > MAX_ELEMENTS {
                return Err(ParseError::Syntax(self.position));
            }
        }
        let ends_closed = self.next_is(']');
        if !ends_closed && !self.next_is(')') {
            return Err(ParseError::Syntax(self.position));
        }
        self.position += 1;
        if items.len() == 2 {
            let high = items.pop().ok_or(ParseError::Empty)?;
            let low = items.pop().ok_or(ParseError::Empty)?;
            let end = |at: Expr, closed| IntervalBound { at: Box::new(at), closed };
            return Ok(Expr::Interval(end(low, opens_closed), end(high, ends_closed)));
        }
        if opens_closed != ends_closed {
            return Err(ParseError::Syntax(self.position));
        }
        Ok(if items.len() == 1 { items.swap_remove(0) } else { Expr::Tuple(items) })
    }

    /// Parses an argument of a command: a group in braces, the first digit of a number, or one primary
    /// expression.
    fn argument(&mut self) -> ParseResult {
        if self.eat('{') {
            let inner = self.group_content()?;
            self.require('}')?;
            return Ok(inner);
        }
        // `\frac12` has the arguments 1 and 2.
        if let Some(Token::Number(number)) = self.token()
            && is_integer(&number.value)
            && !number.is_decimal
        {
            let digits = number.value.numer().to_string();
            if digits.len() > 1 {
                let (first, rest) = digits.split_at(1);
                let read = |digits: &str| Number::exact(crate::lexer::decimal_value(digits, ""));
                let (first, rest) = (read(first), read(rest));
                self.tokens[self.position].token = Token::Number(rest);
                return Ok(Expr::Number(first));
            }
        }
        self.primary()
    }
}

/// Returns the items as a set, or a single item unchanged.
fn list_to_set(mut items: Vec<Expr>) -> Expr {
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
