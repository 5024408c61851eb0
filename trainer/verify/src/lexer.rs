//! Lexer for LaTeX and plain text. Input without effect on the value is dropped: spacing, sizes, `\left`,
//! fonts and currency signs.
//!
//! Deliberately absent: errors. The lexer accepts every text up to its size limit; the parser rejects.

use num_bigint::BigInt;
use num_rational::BigRational;
use num_traits::One;

use crate::expr::Number;

/// Largest size of an answer in bytes.
pub const MAX_ANSWER_BYTES: usize = 20_000;

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
    Char(char),
}

/// Token with a flag for preceding whitespace.
#[derive(Debug, Clone, PartialEq)]
pub struct SpacedToken {
    /// Token.
    pub token: Token,
    /// True if whitespace precedes the token.
    pub spaced: bool,
}

/// Commands whose argument is text.
const TEXT_COMMANDS: [&str; 12] = [
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
const APPEARANCE_COMMANDS: [&str; 37] = [
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
pub fn tokenize(text: &str) -> Option<Vec<SpacedToken>> {
    if text.len() > MAX_ANSWER_BYTES {
        return None;
    }
    let mut lexer =
        Lexer { chars: text.chars().collect(), position: 0, tokens: Vec::new(), is_spaced: false };
    while lexer.position < lexer.chars.len() {
        lexer.read_token();
    }
    Some(lexer.tokens)
}

/// State of the lexer.
struct Lexer {
    chars: Vec<char>,
    /// Index of the next character.
    position: usize,
    tokens: Vec<SpacedToken>,
    /// True if whitespace precedes the next token.
    is_spaced: bool,
}

impl Lexer {
    fn peek(&self, ahead: usize) -> Option<char> {
        self.chars.get(self.position + ahead).copied()
    }

    fn push(&mut self, token: Token) {
        self.tokens.push(SpacedToken { token, spaced: std::mem::take(&mut self.is_spaced) });
    }

    /// Reads one token or skips input without effect on the value.
    fn read_token(&mut self) {
        let Some(c) = self.peek(0) else { return };
        let digit_follows = self.peek(1).is_some_and(|next| next.is_ascii_digit());
        match c {
            '\\' => self.read_command(),
            c if c.is_ascii_digit() || (c == '.' && digit_follows) => self.read_number(),
            c if c.is_whitespace() || c == '~' => {
                self.position += 1;
                self.is_spaced = true;
            }
            '$' => self.position += 1,
            '€' | '£' | '¥' | '₹' | '₽' | '₩' => self.position += 1,
            '−' | '–' | '—' => self.push_char('-'),
            '×' | '·' | '⋅' | '∗' => self.push_char('*'),
            '÷' => self.push_char('/'),
            '≤' => self.push_command("le"),
            '≥' => self.push_command("ge"),
            '≠' => self.push_command("ne"),
            'π' => self.push_command("pi"),
            '∞' => self.push_command("infty"),
            '∪' => self.push_command("cup"),
            '∩' => self.push_command("cap"),
            '∅' => self.push_command("emptyset"),
            '√' => self.push_command("sqrt"),
            '±' => self.push_command("pm"),
            '°' => self.push_command("degree"),
            '∈' => self.push_command("in"),
            'θ' => self.push_command("theta"),
            'α' => self.push_command("alpha"),
            'β' => self.push_command("beta"),
            'λ' => self.push_command("lambda"),
            '²' => self.push_superscript('2'),
            '³' => self.push_superscript('3'),
            '½' => self.push_fraction(1, 2),
            '¼' => self.push_fraction(1, 4),
            '¾' => self.push_fraction(3, 4),
            '{' if self.peek(1) == Some(',') && self.peek(2) == Some('}') => {
                // `number` reads the comma of `1{,}250`; elsewhere `{,}` is a plain comma.
                self.position += 3;
                self.push(Token::Char(','));
            }
            c if c.is_alphabetic() => {
                self.position += 1;
                self.push(Token::Letter(c));
            }
            c => self.push_char(c),
        }
    }

    fn push_char(&mut self, c: char) {
        self.position += 1;
        self.push(Token::Char(c));
    }

    fn push_command(&mut self, name: &str) {
        self.position += 1;
        self.push(Token::Command(name.to_owned()));
    }

    fn push_superscript(&mut self, digit: char) {
        self.push_char('^');
        self.push(Token::Number(Number::integer(i64::from(digit.to_digit(10).unwrap_or(1)))));
    }

    fn push_fraction(&mut self, top: i64, bottom: i64) {
        self.position += 1;
        self.push(Token::Number(Number::exact(BigRational::new(top.into(), bottom.into()))));
    }

    /// Reads a backslash command and maps synonyms to one name.
    fn read_command(&mut self) {
        let Some(next) = self.peek(1) else {
            self.position += 1;
            return;
        };
        if !next.is_ascii_alphabetic() {
            self.position += 2;
            match next {
                ',' | ';' | ':' | '!' | ' ' | '/' | '>' => self.is_spaced = true,
                '$' => {}
                '{' | '}' => self.push(Token::Command(if next == '{' { "{" } else { "}" }.to_owned())),
                '\\' => self.push(Token::Command("\\".to_owned())),
                '|' => self.push(Token::Char('|')),
                other => self.push(Token::Char(other)),
            }
            return;
        }
        self.position += 1;
        let begin = self.position;
        while self.peek(0).is_some_and(|c| c.is_ascii_alphabetic()) {
            self.position += 1;
        }
        let name: String = self.chars[begin..self.position].iter().collect();
        if TEXT_COMMANDS.contains(&name.as_str()) {
            match self.read_group() {
                Some(content) => self.push_text(&content),
                None => self.is_spaced = true,
            }
        } else if !APPEARANCE_COMMANDS.contains(&name.as_str()) {
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
                "|" | "[" | "]" => self.push(Token::Char(name.chars().next().unwrap_or('|'))),
                name => self.push(Token::Command(name.to_owned())),
            }
        }
    }

    /// Reads a group in braces and returns its content; without a closing brace, the group ends with the
    /// text.
    fn read_group(&mut self) -> Option<String> {
        while self.peek(0).is_some_and(char::is_whitespace) {
            self.position += 1;
        }
        if self.peek(0) != Some('{') {
            return None;
        }
        let (mut depth, begin) = (0usize, self.position + 1);
        while let Some(c) = self.peek(0) {
            self.position += 1;
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                return Some(self.chars[begin..self.position - 1].iter().collect());
            }
        }
        Some(self.chars[begin..].iter().collect())
    }

    /// Emits the content of a text command: numbers and operators as tokens, anything else as words.
    fn push_text(&mut self, content: &str) {
        let trimmed = content.trim().trim_matches('$');
        self.is_spaced |= content.starts_with(' ');
        if !trimmed.is_empty() && trimmed.chars().all(|c| c.is_ascii_digit() || "+-.,/()^* ".contains(c)) {
            if let Some(inner) = tokenize(trimmed) {
                self.tokens.extend(inner);
            }
        } else if trimmed.is_empty() {
            self.is_spaced = true;
        } else {
            self.push(Token::Text(trimmed.to_owned()));
        }
    }

    /// Reads a number: groups of three digits (`1,250`, `1{,}250`), decimals, and repeating decimals.
    fn read_number(&mut self) {
        let mut whole = self.read_digits();
        if (1..=3).contains(&whole.len()) && !whole.starts_with('0') {
            while let Some(group) = self.read_digit_group() {
                whole.push_str(&group);
            }
        }
        let mut decimals = String::new();
        let mut is_decimal = false;
        if self.peek(0) == Some('.')
            && (self.peek(1).is_some_and(|c| c.is_ascii_digit()) || self.has_repeating_digits(1))
        {
            self.position += 1;
            is_decimal = true;
            decimals = self.read_digits();
        }
        let mut value = decimal_value(&whole, &decimals);
        if is_decimal
            && self.has_repeating_digits(0)
            && let Some(period) = self.read_repeating_digits()
        {
            let shift = BigInt::from(10).pow(decimals.len() as u32);
            let nines = BigInt::from(10).pow(period.len() as u32) - BigInt::one();
            let digits: BigInt = period.parse().unwrap_or_default();
            value += BigRational::new(digits, shift * nines);
            is_decimal = false;
        }
        // `17.0` has a decimal point but is not rounded.
        let is_decimal = is_decimal && !crate::expr::is_integer(&value);
        self.push(Token::Number(Number { value, is_decimal }));
    }

    fn read_digits(&mut self) -> String {
        let begin = self.position;
        while self.peek(0).is_some_and(|c| c.is_ascii_digit()) {
            self.position += 1;
        }
        self.chars[begin..self.position].iter().collect()
    }

    /// Reads a separator and exactly three digits; returns the digits.
    fn read_digit_group(&mut self) -> Option<String> {
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
        self.position += skip;
        Some(self.read_digits())
    }

    /// Returns whether `\overline{…}`, `\dot{…}` or `\bar{…}` follows after `ahead` characters.
    fn has_repeating_digits(&self, ahead: usize) -> bool {
        let rest: String =
            self.chars[(self.position + ahead).min(self.chars.len())..].iter().take(10).collect();
        ["\\overline{", "\\dot{", "\\bar{"].iter().any(|name| rest.starts_with(name))
    }

    /// Reads the repeating digits in `\overline{…}`, `\dot{…}` or `\bar{…}`.
    fn read_repeating_digits(&mut self) -> Option<String> {
        let before = self.position;
        while self.peek(0).is_some_and(|c| c != '{') {
            self.position += 1;
        }
        match self.read_group() {
            Some(period) if !period.is_empty() && period.bytes().all(|byte| byte.is_ascii_digit()) => {
                Some(period)
            }
            _ => {
                self.position = before;
                None
            }
        }
    }
}

/// Returns the exact value of the decimal number `whole.decimals`.
pub fn decimal_value(whole: &str, decimals: &str) -> BigRational {
    let digits: BigInt = format!("{whole}{decimals}").parse().unwrap_or_default();
    if decimals.is_empty() {
        return BigRational::from_integer(digits);
    }
    BigRational::new(digits, BigInt::from(10).pow(decimals.len() as u32))
}
