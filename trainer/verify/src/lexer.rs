//! Lexer for LaTeX and plain text. Input without effect on the value is dropped: spacing, sizes, `\left`,
//! fonts and currency signs.
//!
//! Deliberately absent: errors. The lexer accepts every text up to its size limit; the parser rejects.

use num_bigint::BigInt;
use num_rational::BigRational;
use num_traits::One;

use crate::expr::Number;

/// Largest size of an answer in bytes.
pub const LONGEST: usize = 20_000;

/// Token.
#[derive(Debug, Clone, PartialEq)]
pub enum Token {
    /// Number.
    Number(Number),
    /// One letter.
    Letter(char),
    /// LaTeX command without its backslash.
    Command(String),
    /// Words: the trimmed content of `\text{…}` and similar commands.
    Text(String),
    /// Any other character.
    Sign(char),
}

/// Token with a flag for preceding whitespace.
#[derive(Debug, Clone, PartialEq)]
pub struct Spaced {
    /// Token.
    pub token: Token,
    /// True if whitespace precedes the token.
    pub spaced: bool,
}

/// Commands whose argument is text.
const WORDS: [&str; 12] = [
    "text",
    "textbf",
    "textit",
    "textrm",
    "textsf",
    "texttt",
    "mathrm",
    "mathbf",
    "mathsf",
    "mbox",
    "operatorname",
    "hbox",
];
/// Commands that change the appearance only. The lexer drops the command but keeps the braces of its
/// argument.
const LOOK: [&str; 37] = [
    "left",
    "right",
    "big",
    "Big",
    "bigg",
    "Bigg",
    "bigl",
    "bigr",
    "Bigl",
    "Bigr",
    "biggl",
    "biggr",
    "displaystyle",
    "textstyle",
    "scriptstyle",
    "limits",
    "nolimits",
    "quad",
    "qquad",
    "thinspace",
    "enspace",
    "hspace",
    "vphantom",
    "phantom",
    "boldsymbol",
    "bm",
    "mathit",
    "mathcal",
    "mathnormal",
    "rm",
    "bf",
    "it",
    "bold",
    "middle",
    "allowbreak",
    "nobreak",
    "strut",
];

/// Splits `text` into tokens. Returns `None` beyond [`LONGEST`] bytes.
pub fn tokens(text: &str) -> Option<Vec<Spaced>> {
    if text.len() > LONGEST {
        return None;
    }
    let mut lexer = Lexer { chars: text.chars().collect(), at: 0, tokens: Vec::new(), spaced: false };
    while lexer.at < lexer.chars.len() {
        lexer.step();
    }
    Some(lexer.tokens)
}

/// State of the lexer.
struct Lexer {
    chars: Vec<char>,
    /// Index of the next character.
    at: usize,
    tokens: Vec<Spaced>,
    /// True if whitespace precedes the next token.
    spaced: bool,
}

impl Lexer {
    fn peek(&self, ahead: usize) -> Option<char> {
        self.chars.get(self.at + ahead).copied()
    }

    fn push(&mut self, token: Token) {
        self.tokens.push(Spaced { token, spaced: std::mem::take(&mut self.spaced) });
    }

    /// Reads one token or skips input without effect on the value.
    fn step(&mut self) {
        let Some(c) = self.peek(0) else { return };
        let digit_follows = self.peek(1).is_some_and(|next| next.is_ascii_digit());
        match c {
            '\\' => self.command(),
            c if c.is_ascii_digit() || (c == '.' && digit_follows) => self.number(),
            c if c.is_whitespace() || c == '~' => {
                self.at += 1;
                self.spaced = true;
            }
            '$' => self.at += 1,
            '€' | '£' | '¥' | '₹' | '₽' | '₩' => self.at += 1,
            '−' | '–' | '—' => self.sign('-'),
            '×' | '·' | '⋅' | '∗' => self.sign('*'),
            '÷' => self.sign('/'),
            '≤' => self.name("le"),
            '≥' => self.name("ge"),
            '≠' => self.name("ne"),
            'π' => self.name("pi"),
            '∞' => self.name("infty"),
            '∪' => self.name("cup"),
            '∩' => self.name("cap"),
            '∅' => self.name("emptyset"),
            '√' => self.name("sqrt"),
            '±' => self.name("pm"),
            '°' => self.name("degree"),
            '∈' => self.name("in"),
            'θ' => self.name("theta"),
            'α' => self.name("alpha"),
            'β' => self.name("beta"),
            'λ' => self.name("lambda"),
            '²' => self.power('2'),
            '³' => self.power('3'),
            '½' => self.fraction(1, 2),
            '¼' => self.fraction(1, 4),
            '¾' => self.fraction(3, 4),
            '{' if self.peek(1) == Some(',') && self.peek(2) == Some('}') => {
                // `number` reads the comma of `1{,}250`; elsewhere `{,}` is a plain comma.
                self.at += 3;
                self.push(Token::Sign(','));
            }
            c if c.is_alphabetic() => {
                self.at += 1;
                self.push(Token::Letter(c));
            }
            c => self.sign(c),
        }
    }

    fn sign(&mut self, c: char) {
        self.at += 1;
        self.push(Token::Sign(c));
    }

    fn name(&mut self, name: &str) {
        self.at += 1;
        self.push(Token::Command(name.to_owned()));
    }

    fn power(&mut self, digit: char) {
        self.sign('^');
        self.push(Token::Number(Number::whole(i64::from(digit.to_digit(10).unwrap_or(1)))));
    }

    fn fraction(&mut self, top: i64, bottom: i64) {
        self.at += 1;
        self.push(Token::Number(Number::exact(BigRational::new(top.into(), bottom.into()))));
    }

    /// Reads a backslash command and maps synonyms to one name.
    fn command(&mut self) {
        let Some(next) = self.peek(1) else {
            self.at += 1;
            return;
        };
        if !next.is_ascii_alphabetic() {
            self.at += 2;
            match next {
                ',' | ';' | ':' | '!' | ' ' | '/' | '>' => self.spaced = true,
                '$' => {}
                '{' | '}' => self.push(Token::Command(if next == '{' { "{" } else { "}" }.to_owned())),
                '\\' => self.push(Token::Command("\\".to_owned())),
                '|' => self.push(Token::Sign('|')),
                other => self.push(Token::Sign(other)),
            }
            return;
        }
        self.at += 1;
        let begin = self.at;
        while self.peek(0).is_some_and(|c| c.is_ascii_alphabetic()) {
            self.at += 1;
        }
        let name: String = self.chars[begin..self.at].iter().collect();
        if WORDS.contains(&name.as_str()) {
            match self.braced() {
                Some(content) => self.words(&content),
                None => self.spaced = true,
            }
        } else if !LOOK.contains(&name.as_str()) {
            let name = match name.as_str() {
                "dfrac" | "tfrac" | "cfrac" => "frac",
                "dbinom" | "tbinom" => "binom",
                "leq" | "leqslant" => "le",
                "geq" | "geqslant" => "ge",
                "neq" => "ne",
                "lbrace" => "{",
                "rbrace" => "}",
                "lvert" | "rvert" | "vert" | "mid" => "|",
                "circ" | "degree" | "degrees" => "degree",
                "varnothing" => "emptyset",
                "to" | "rightarrow" | "longrightarrow" => "to",
                "land" | "wedge" => "and",
                "lor" | "vee" => "or",
                "lbrack" => "[",
                "rbrack" => "]",
                "cdotp" | "bullet" | "ast" => "cdot",
                other => other,
            };
            match name {
                "|" | "[" | "]" => self.push(Token::Sign(name.chars().next().unwrap_or('|'))),
                name => self.push(Token::Command(name.to_owned())),
            }
        }
    }

    /// Reads a group in braces and returns its content; without a closing brace, the group ends with the
    /// text.
    fn braced(&mut self) -> Option<String> {
        while self.peek(0).is_some_and(char::is_whitespace) {
            self.at += 1;
        }
        if self.peek(0) != Some('{') {
            return None;
        }
        let (mut depth, begin) = (0usize, self.at + 1);
        while let Some(c) = self.peek(0) {
            self.at += 1;
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                return Some(self.chars[begin..self.at - 1].iter().collect());
            }
        }
        Some(self.chars[begin..].iter().collect())
    }

    /// Emits the content of a text command: numbers and operators as tokens, anything else as words.
    fn words(&mut self, content: &str) {
        let trimmed = content.trim().trim_matches('$');
        self.spaced |= content.starts_with(' ');
        if !trimmed.is_empty() && trimmed.chars().all(|c| c.is_ascii_digit() || "+-.,/()^* ".contains(c)) {
            if let Some(inner) = tokens(trimmed) {
                self.tokens.extend(inner);
            }
        } else if trimmed.is_empty() {
            self.spaced = true;
        } else {
            self.push(Token::Text(trimmed.to_owned()));
        }
    }

    /// Reads a number: groups of three digits (`1,250`, `1{,}250`), decimals, and repeating decimals.
    fn number(&mut self) {
        let mut whole = self.digits();
        if (1..=3).contains(&whole.len()) && !whole.starts_with('0') {
            while let Some(group) = self.group() {
                whole.push_str(&group);
            }
        }
        let mut decimals = String::new();
        let mut is_decimal = false;
        if self.peek(0) == Some('.') && (self.peek(1).is_some_and(|c| c.is_ascii_digit()) || self.repeats(1))
        {
            self.at += 1;
            is_decimal = true;
            decimals = self.digits();
        }
        let mut value = value_of(&whole, &decimals);
        if is_decimal
            && self.repeats(0)
            && let Some(period) = self.period()
        {
            let shift = BigInt::from(10).pow(decimals.len() as u32);
            let nines = BigInt::from(10).pow(period.len() as u32) - BigInt::one();
            let digits: BigInt = period.parse().unwrap_or_default();
            value += BigRational::new(digits, shift * nines);
            is_decimal = false;
        }
        // `17.0` has a decimal point but is not rounded.
        let is_decimal = is_decimal && !crate::expr::is_whole(&value);
        self.push(Token::Number(Number { value, is_decimal }));
    }

    fn digits(&mut self) -> String {
        let begin = self.at;
        while self.peek(0).is_some_and(|c| c.is_ascii_digit()) {
            self.at += 1;
        }
        self.chars[begin..self.at].iter().collect()
    }

    /// Reads a separator and exactly three digits; returns the digits.
    fn group(&mut self) -> Option<String> {
        let skip = match (self.peek(0), self.peek(1), self.peek(2)) {
            (Some(','), Some('\\'), Some('!')) => 3,
            (Some(','), _, _) => 1,
            (Some('{'), Some(','), Some('}')) => 3,
            (Some('\\'), Some(',' | '!'), Some(c)) if c.is_ascii_digit() => 2,
            _ => return None,
        };
        let digit = |at: usize| self.peek(at).is_some_and(|c| c.is_ascii_digit());
        if !(digit(skip) && digit(skip + 1) && digit(skip + 2)) || digit(skip + 3) {
            return None;
        }
        self.at += skip;
        Some(self.digits())
    }

    /// Returns whether `\overline{…}`, `\dot{…}` or `\bar{…}` follows after `ahead` characters.
    fn repeats(&self, ahead: usize) -> bool {
        let rest: String = self.chars[(self.at + ahead).min(self.chars.len())..].iter().take(10).collect();
        ["\\overline{", "\\dot{", "\\bar{"].iter().any(|name| rest.starts_with(name))
    }

    /// Reads the repeating digits in `\overline{…}`, `\dot{…}` or `\bar{…}`.
    fn period(&mut self) -> Option<String> {
        let before = self.at;
        while self.peek(0).is_some_and(|c| c != '{') {
            self.at += 1;
        }
        match self.braced() {
            Some(period) if !period.is_empty() && period.bytes().all(|byte| byte.is_ascii_digit()) => {
                Some(period)
            }
            _ => {
                self.at = before;
                None
            }
        }
    }
}

/// Returns the exact value of the decimal number `whole.decimals`.
pub fn value_of(whole: &str, decimals: &str) -> BigRational {
    let digits: BigInt = format!("{whole}{decimals}").parse().unwrap_or_default();
    if decimals.is_empty() {
        return BigRational::from_integer(digits);
    }
    BigRational::new(digits, BigInt::from(10).pow(decimals.len() as u32))
}
