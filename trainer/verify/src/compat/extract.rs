//! Extraction of answers by the rules of Math-Verify 0.9.0.
//!
//! Two readers find candidates: one for LaTeX environments and boxes, one for plain numbers and expressions.
//! Anchors such as `final answer is` rank the candidates. Within a rank, the candidate with the last end
//! comes first; the first one that parses is the answer.
//!
//! Deliberately absent: the rules of the strict profile (see [`crate::extract`]).

use num_rational::BigRational;

use crate::expr::{Expr, Number, is_integer};
use crate::lexer::decimal_value;
use crate::parser::{LetterMode, parse};

/// Extracted answer: its text, and its value if the text parses.
pub(super) struct ExtractedAnswer {
    /// Value, if the answer parses.
    pub(super) value: Option<Expr>,
    /// Text of the first candidate.
    pub(super) text: String,
}

/// Content of a candidate.
#[derive(Clone)]
enum CandidateContent {
    /// LaTeX snippets joined by `and`, each with a flag for a following percent sign.
    Latex(Vec<(String, bool)>),
    /// Text from the first box to the last brace.
    Boxed(String),
    /// Arithmetic in plain text, such as `3*4`.
    Expression(String),
    /// Plain number: integer digits with sign, decimals, and a flag for a percent sign.
    Number(String, String, bool),
}

/// Candidate with its bytes in the text.
#[derive(Clone)]
struct Candidate {
    start: usize,
    end: usize,
    content: CandidateContent,
}

/// Largest size of a text in bytes; longer texts lose their beginning.
const MAX_TEXT_BYTES: usize = 60_000;
/// Largest number of candidates parsed per rank.
const MAX_CANDIDATES_PER_RANK: usize = 64;

/// Largest size of a LaTeX environment in bytes.
const MAX_FORMULA_BYTES: usize = 8_000;

/// Returns the beginning of a text, at most `most` bytes.
fn truncate_to_bytes(text: &str, most: usize) -> &str {
    let end = (0..=most.min(text.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    &text[..end]
}

/// Extracts the answer of a text, or returns `None` if there is no candidate.
pub(super) fn extract_answer(text: &str) -> Option<ExtractedAnswer> {
    let mut begin = text.len().saturating_sub(MAX_TEXT_BYTES);
    while !text.is_char_boundary(begin) {
        begin += 1;
    }
    let scan = Scanner { text: &text[begin..] };
    let (latex, plain) = (scan.latex_candidates(), scan.plain_candidates());
    let mut spelling: Option<String> = None;
    for group in scan.rank_candidates(&latex, &plain) {
        let mut hits = group;
        hits.sort_by(|a, b| b.end.cmp(&a.end).then(a.start.cmp(&b.start)));
        for hit in hits.into_iter().take(MAX_CANDIDATES_PER_RANK) {
            let (value, text) = parse_candidate(&hit.content);
            if spelling.is_none() && !text.is_empty() {
                spelling = Some(text.clone());
            }
            if let Some(value) = value {
                return Some(ExtractedAnswer::new(Some(value), spelling.unwrap_or(text)));
            }
        }
    }
    spelling.map(|text| ExtractedAnswer::new(None, text))
}

/// Parses LaTeX; returns `None` for commands that Math-Verify cannot parse.
fn parse_latex(snippet: &str) -> Option<Expr> {
    const UNKNOWN: [&str; 6] = ["\\varnothing", "\\overline{", "\\bmod", "\\pmod", "\\dot{", "\\arctan"];
    if UNKNOWN.iter().any(|name| snippet.contains(name)) || has_spaced_digits(snippet) {
        return None;
    }
    let snippet = snippet.trim().trim_end_matches(['.', ',']);
    parse(snippet, LetterMode::Single).ok().or_else(|| {
        // A chain of equations that does not parse counts as its last side.
        let sides: Vec<&str> = snippet.split('=').collect();
        let fine = sides.len() > 2 && !snippet.contains([',', ';']);
        fine.then(|| parse(sides[sides.len() - 1], LetterMode::Single).ok()).flatten()
    })
}

/// Returns whether a thin space separates two digits, as in `1\,000`.
fn has_spaced_digits(snippet: &str) -> bool {
    snippet.match_indices("\\,").any(|(at, _)| {
        snippet[..at].ends_with(|c: char| c.is_ascii_digit())
            && snippet[at + 2..].starts_with(|c: char| c.is_ascii_digit())
    })
}

/// Normalizes LaTeX for comparison as text.
fn normalize_latex(snippet: &str) -> String {
    let mut text = snippet.to_owned();
    for (from, to) in [
        ("\\left", ""),
        ("\\right", ""),
        ("\\dfrac", "\\frac"),
        ("\\tfrac", "\\frac"),
        ("\\,", ""),
        ("\\!", ""),
        ("\\ ", ""),
    ] {
        text = text.replace(from, to);
    }
    for open in ["\\text{", "\\textbf{", "\\mathrm{", "\\mathbf{", "\\mbox{"] {
        if let Some(inside) = text.trim().strip_prefix(open).and_then(|rest| rest.strip_suffix('}')) {
            text = inside.to_owned();
        }
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Returns the text of a candidate, and its value if the text parses.
fn parse_candidate(content: &CandidateContent) -> (Option<Expr>, String) {
    match content {
        CandidateContent::Latex(snippets) => {
            let read: Vec<Option<Expr>> = snippets
                .iter()
                .map(|(snippet, percent)| {
                    let inner = box_content(snippet, false);
                    let value = parse_latex(&inner)?;
                    Some(if *percent { Expr::Percent(Box::new(value)) } else { value })
                })
                .collect();
            let texts: Vec<String> =
                snippets.iter().map(|(snippet, _)| normalize_latex(&box_content(snippet, false))).collect();
            if read.len() > 1 && read.iter().all(Option::is_some) {
                let mut all = Vec::new();
                for value in read.into_iter().flatten() {
                    match value {
                        Expr::Set(more) => all.extend(more),
                        one => all.push(one),
                    }
                }
                return (Some(Expr::Set(all)), texts.join(" and "));
            }
            let first = read.into_iter().next().flatten();
            (first, texts.into_iter().next().unwrap_or_default())
        }
        CandidateContent::Boxed(text) => {
            let inner = box_content(text, true);
            (parse_latex(&inner), normalize_latex(&inner))
        }
        CandidateContent::Expression(text) => (parse_arithmetic(text), text.clone()),
        CandidateContent::Number(whole, decimals, percent) => {
            let digits = whole.trim_start_matches('-').trim_start_matches('0');
            let negative = whole.starts_with('-');
            let digits = if digits.is_empty() { "0" } else { digits };
            let value = decimal_value(digits, decimals);
            let value: BigRational = if negative { -value } else { value };
            let is_decimal = !decimals.is_empty() && !is_integer(&value);
            let sign = if negative { "-" } else { "" };
            let text = if decimals.is_empty() {
                format!("{sign}{digits}")
            } else {
                format!("{sign}{digits}.{decimals}")
            };
            let number = Expr::Number(Number { value, is_decimal });
            (Some(if *percent { Expr::Percent(Box::new(number)) } else { number }), text)
        }
    }
}

/// Parses arithmetic with the syntax of Python.
fn parse_arithmetic(text: &str) -> Option<Expr> {
    if text.contains(['×', '÷']) {
        return None;
    }
    let text = text.replace('\n', " ");
    // `1 1/2` and `2(3)` are errors in Python.
    let bytes: Vec<char> = text.trim().chars().collect();
    let mut last = ' ';
    let mut gap = false;
    for c in bytes {
        if c == ' ' {
            gap = true;
            continue;
        }
        if (gap && last.is_ascii_digit() && c.is_ascii_digit())
            || (c == '(' && (last.is_ascii_digit() || last == ')'))
        {
            return None;
        }
        if last == ')' && c.is_ascii_digit() {
            return None;
        }
        (last, gap) = (c, false);
    }
    if !(last.is_ascii_digit() || last == ')' || last == '.') {
        return None;
    }
    parse(&text, LetterMode::Single).ok()
}

/// Returns the content of the last box, joined with the boxes close before.
fn box_content(text: &str, from_text: bool) -> String {
    const OPEN: &str = "\\boxed{";
    let mut boxes: Vec<(usize, usize, &str)> = Vec::new();
    let mut at = 0;
    while let Some(found) = text[at..].find(OPEN) {
        let begin = at + found;
        let inside = &text[begin + OPEN.len()..];
        let mut depth = 1usize;
        let mut end = None;
        for (offset, c) in inside.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                end = Some(offset);
                break;
            }
        }
        let Some(end) = end else { break };
        boxes.push((begin, begin + OPEN.len() + end + 1, &inside[..end]));
        at = begin + OPEN.len() + end + 1;
    }
    let Some(&(mut start, _, last)) = boxes.last() else { return text.to_owned() };
    if !from_text && boxes.len() == 1 {
        // A single box in a formula keeps the surrounding formula.
        let (begin, end, inside) = boxes[0];
        return format!("{}{inside}{}", &text[..begin], &text[end..]);
    }
    let mut joined = vec![last];
    for (begin, end, inside) in boxes.iter().rev().skip(1) {
        let between = &text[*end..start];
        let words = between.contains(',') || between.contains("and") || between.contains("or");
        let near = between.chars().count() < 10 || (between.chars().count() < 70 && words);
        if !near || joined.contains(inside) {
            break;
        }
        joined.insert(0, inside);
        start = *begin;
    }
    joined.join(",")
}

/// Text with the readers.
struct Scanner<'a> {
    text: &'a str,
}

/// Currency signs that can precede a number.
const CURRENCY: &str = "$€£¥₹₽₪₩₫฿₡₢₣₤₥₦₧₨₭₮₯₰₱₲₳₴₵₶₷₸₺₻₼₾₿";
/// Operators of plain expressions.
const OPERATORS: &str = "+-*×/^()÷";

impl Scanner<'_> {
    fn rest(&self, at: usize) -> &str {
        &self.text[at..]
    }

    fn char_before(&self, at: usize) -> Option<char> {
        self.text[..at].chars().next_back()
    }

    /// Returns the content and the end of the math environment that begins at byte `at`, such as `$…$` or
    /// `\(…\)`.
    fn math_environment(&self, at: usize) -> Option<(String, usize)> {
        let rest = truncate_to_bytes(self.rest(at), MAX_FORMULA_BYTES);
        let escaped = self.char_before(at) == Some('\\');
        let close = |open: usize, end: &str, one_line: bool| -> Option<(String, usize)> {
            let mut from = open + 1;
            loop {
                let found = from + rest.get(from..)?.find(end)?;
                let inside = &rest[open..found];
                if one_line && inside.contains('\n') {
                    return None;
                }
                if !inside.ends_with('\\') || end.starts_with('\\') {
                    return Some((inside.to_owned(), at + found + end.len()));
                }
                from = found + 1;
            }
        };
        if !escaped
            && rest.starts_with("$$")
            && let Some(found) = close(2, "$$", false)
        {
            return Some(found);
        }
        if !escaped && rest.starts_with("\\[") {
            return close(2, "\\]", false);
        }
        if !escaped && rest.starts_with("\\(") {
            return close(2, "\\)", true);
        }
        if rest.starts_with('$') && !escaped && !self.char_before(at).is_some_and(|c| c.is_ascii_digit()) {
            return close(1, "$", true);
        }
        if rest.starts_with(|c: char| c.is_whitespace()) {
            let space = rest.chars().next().map_or(1, char::len_utf8);
            let inside = rest[space..].strip_prefix('[')?;
            let end = inside.find(['\n', '[', ']'])?;
            let closes = inside[end..].starts_with(']') && inside[end + 1..].starts_with(char::is_whitespace);
            return (closes && end > 0).then(|| (inside[..end].to_owned(), at + space + 1 + end + 2));
        }
        // A fraction of numbers without delimiters.
        let unsigned = rest.strip_prefix('-').unwrap_or(rest);
        let inside = unsigned.strip_prefix("\\frac{")?;
        let number = |text: &str| {
            let text = text.strip_prefix('-').unwrap_or(text);
            !text.is_empty()
                && text.chars().all(|c| c.is_ascii_digit() || ".,".contains(c))
                && text.starts_with(|c: char| c.is_ascii_digit())
        };
        let (top, after) = inside.split_once('}')?;
        let (bottom, _) = after.strip_prefix('{')?.split_once('}')?;
        if !number(top) || !number(bottom) {
            return None;
        }
        let length = (rest.len() - unsigned.len()) + "\\frac{".len() + top.len() + 2 + bottom.len() + 1;
        Some((rest[..length].to_owned(), at + length))
    }

    /// Returns the end of a percent sign or word behind byte `at`, if there is one.
    fn percent_end(&self, at: usize) -> Option<usize> {
        let rest = self.rest(at);
        let trimmed = rest.trim_start();
        let space = rest.len() - trimmed.len();
        let words = ["\\%", "%", "percentage", "Percentage", "percent", "Percent", "pct", "Pct"];
        words.iter().find(|word| trimmed.starts_with(**word)).map(|word| at + space + word.len())
    }

    /// Returns the rows of math environments.
    fn latex_candidates(&self) -> Vec<Candidate> {
        let mut hits = Vec::new();
        let mut at = 0;
        while at < self.text.len() {
            if !self.text.is_char_boundary(at) {
                at += 1;
                continue;
            }
            match self.environment_row(at) {
                Some((snippets, end)) => {
                    hits.push(Candidate { start: at, end, content: CandidateContent::Latex(snippets) });
                    at = end.max(at + 1);
                }
                None => at += 1,
            }
        }
        hits
    }

    /// Returns up to six environments in a row, joined by commas, `and` or `or`, and their end.
    fn environment_row(&self, at: usize) -> Option<(Vec<(String, bool)>, usize)> {
        let (first, mut end) = self.math_environment(at)?;
        let percent = self.percent_end(end);
        end = percent.unwrap_or(end);
        let mut snippets = vec![(first, percent.is_some())];
        while snippets.len() < 6 {
            let rest = self.rest(end);
            let trimmed = rest.trim_start();
            let joined = [",and", ",or", "and", "or", ","].iter().find_map(|word| trimmed.strip_prefix(word));
            let next = joined.and_then(|after| {
                let after = after.trim_start();
                let begin = self.text.len() - after.len();
                self.math_environment(begin)
            });
            let Some((snippet, stop)) = next else { break };
            let percent = self.percent_end(stop);
            end = percent.unwrap_or(stop);
            snippets.push((snippet, percent.is_some()));
        }
        Some((snippets, end))
    }

    /// Returns the text from the first box to the last brace, if there is a box.
    fn box_candidate(&self) -> Option<Candidate> {
        let start = self.text.find("\\boxed{")?;
        let end = self.text.rfind('}')? + 1;
        let content = CandidateContent::Boxed(self.text.get(start..end)?.to_owned());
        (end > start + "\\boxed{}".len()).then_some(Candidate { start, end, content })
    }

    /// Returns the start of a plain candidate at `at`: at the beginning, or behind whitespace or an equals
    /// sign.
    fn plain_start(&self, at: usize) -> Option<usize> {
        let fine = at == 0 || self.char_before(at).is_some_and(|c| c.is_whitespace() || c == '=');
        let after = if self.rest(at).starts_with("**") { at + 2 } else { at };
        fine.then_some(after)
    }

    /// Returns the longest arithmetic expression at byte `at` and its end.
    fn read_expression(&self, at: usize) -> Option<(String, usize)> {
        let rest = truncate_to_bytes(self.rest(at), 400);
        let body = rest.strip_prefix('-').unwrap_or(rest);
        let body = body.strip_prefix('(').unwrap_or(body);
        let body = body.strip_prefix('-').unwrap_or(body);
        if !body.starts_with(|c: char| c.is_ascii_digit()) {
            return None;
        }
        let allowed = |c: char| c.is_ascii_digit() || c == '.' || c.is_whitespace() || OPERATORS.contains(c);
        let mut length = rest.find(|c: char| !allowed(c)).unwrap_or(rest.len());
        let head = rest.len() - body.len();
        while length > head + 1 {
            let run = &rest[..length];
            // The run needs an operator behind its first digit and a character behind the operator.
            let inside = &run[head + 1..];
            let operator = inside
                .char_indices()
                .any(|(place, c)| OPERATORS.contains(c) && place + c.len_utf8() < inside.len());
            let closes_alone =
                inside.ends_with(')') && inside.chars().filter(|c| OPERATORS.contains(*c)).count() == 1;
            let after = rest[length..].strip_prefix("**").unwrap_or(&rest[length..]);
            let suffix =
                after.is_empty() || after.starts_with(|c: char| ".,:)$".contains(c) || c.is_whitespace());
            if operator && suffix && !closes_alone {
                return Some((run.to_owned(), at + length));
            }
            length = run.char_indices().next_back().map_or(0, |(place, _)| place);
        }
        None
    }

    /// Returns the number at byte `at` and its end.
    fn read_number(&self, at: usize) -> Option<(CandidateContent, usize)> {
        let mut begin = at;
        if let Some(c) = self.rest(at).chars().next().filter(|c| CURRENCY.contains(*c)) {
            begin += c.len_utf8();
        }
        if self.char_before(begin).is_some_and(|c| c.is_ascii_digit()) {
            return None;
        }
        let rest = self.rest(begin);
        let sign = usize::from(rest.starts_with('-'));
        let digits = |from: usize| rest[from..].bytes().take_while(u8::is_ascii_digit).count();
        let mut whole: String;
        let mut decimals = String::new();
        let mut at = sign + digits(sign);
        if at == sign {
            // Decimals without integer digits.
            let count = if sign == 0 && rest.starts_with('.') { digits(1) } else { 0 };
            if count == 0 {
                return None;
            }
            whole = String::new();
            decimals = rest[1..=count].to_owned();
            at = 1 + count;
        } else {
            whole = rest[..at].to_owned();
            // Groups of three digits.
            let mut grouped = false;
            if at - sign <= 3 && !rest[sign..].starts_with('0') {
                let mut end = at;
                while rest[end..].starts_with([' ', ',']) && digits(end + 1) == 3 {
                    end += 4;
                    grouped = true;
                }
                if grouped {
                    whole = rest[..end].replace([' ', ','], "");
                    at = end;
                }
            }
            let point = rest[at..].starts_with('.') || (!grouped && rest[at..].starts_with(','));
            let count = if point { digits(at + 1) } else { 0 };
            if count > 0 {
                decimals = rest[at + 1..=at + count].to_owned();
                at += 1 + count;
            }
        }
        let percent = {
            let tail = rest[at..].trim_start();
            ["%", "percent", "Percent", "pct", "Pct"].iter().find(|word| tail.starts_with(**word)).map(
                |word| {
                    at = rest.len() - tail.len() + word.len();
                },
            )
        };
        Some((CandidateContent::Number(whole, decimals, percent.is_some()), begin + at))
    }

    /// Returns the plain expressions and then the plain numbers; hits of one kind do not overlap.
    fn plain_candidates(&self) -> Vec<Candidate> {
        let mut hits = Vec::new();
        let mut at = 0;
        while at < self.text.len() {
            let found = self.text.is_char_boundary(at).then(|| {
                let begin = self.plain_start(at)?;
                let (text, end) = self.read_expression(begin)?;
                Some(Candidate { start: at, end, content: CandidateContent::Expression(text) })
            });
            match found.flatten() {
                Some(hit) => {
                    at = hit.end.max(at + 1);
                    hits.push(hit);
                }
                None => at += 1,
            }
        }
        let mut at = 0;
        while at < self.text.len() {
            let found = self.text.is_char_boundary(at).then(|| {
                let begin = self.plain_start(at)?;
                let (content, end) = self.read_number(begin)?;
                Some(Candidate { start: at, end, content })
            });
            match found.flatten() {
                Some(hit) => {
                    at = hit.end.max(at + 1);
                    hits.push(hit);
                }
                None => at += 1,
            }
        }
        hits
    }

    /// Returns the hits by rank, best rank first.
    fn rank_candidates(&self, latex: &[Candidate], plain: &[Candidate]) -> Vec<Vec<Candidate>> {
        let lower = self.text.to_ascii_lowercase();
        let all = || latex.iter().chain(plain);
        let places =
            |word: &str| -> Vec<usize> { lower.match_indices(word).map(|(at, _)| at + word.len()).collect() };
        // Rank 1: `final answer is X. I hope`.
        let exact = places("final answer is");
        let hoped = all().filter(|hit| {
            let tail = lower[hit.end..].trim_start_matches('.').trim_start();
            tail.starts_with("i hope")
                && exact.iter().any(|at| {
                    *at <= hit.start && self.text[*at..hit.start].trim_matches([':', ' ', '\n']).is_empty()
                })
        });
        let mut first: Vec<Candidate> = hoped.cloned().collect();
        first.dedup_by(|a, b| a.start == b.start && a.end == b.end);
        // Rank 2: `final answer … is X`, and boxes.
        let said = |hit: &&Candidate| {
            places("final answer").iter().any(|at| {
                let Some(between) = lower.get(*at..hit.start.max(*at)) else { return false };
                let between = between.trim_end_matches([':', ' ', '\n']);
                hit.start >= *at && between.len() <= 104 && between.ends_with(" is")
            })
        };
        let mut second: Vec<Candidate> = all().filter(said).cloned().collect();
        second.extend(self.box_candidate());
        second.extend(latex.iter().filter(|hit| self.text[hit.start..hit.end].contains("\\boxed{")).cloned());
        let colons = places("answer:");
        let words = places("answer");
        let after = |places: &[usize], hits: &[Candidate], hop: bool| -> Vec<Candidate> {
            let mut found: Vec<Candidate> = Vec::new();
            for at in places {
                let within = |limit: usize| {
                    hits.iter()
                        .filter(move |hit| hit.start >= *at && hit.start <= at + limit + 1)
                        .min_by_key(|hit| hit.start)
                };
                // The hit behind the last equals sign within 100 bytes comes first, then the first hit within
                // 50 bytes.
                let equals = if hop {
                    let reach = self.text.len().min(at + 101);
                    let reach = (0..=reach).rev().find(|end| self.text.is_char_boundary(*end)).unwrap_or(*at);
                    let sign = self.text.get(*at..reach).and_then(|part| part.rfind('='));
                    sign.and_then(|sign| {
                        let from = at + sign;
                        let gap = |hit: &&Candidate| {
                            hit.start >= from
                                && self
                                    .text
                                    .get(from + 1..hit.start.max(from + 1))
                                    .is_some_and(|gap| gap.trim().is_empty())
                        };
                        hits.iter().filter(gap).min_by_key(|hit| hit.start)
                    })
                } else {
                    None
                };
                found.extend(equals.or_else(|| within(50)).cloned());
            }
            found
        };
        let anchored = |places: &[usize]| {
            let mut hits = after(places, latex, false);
            // An expression precedes the number at its beginning.
            let (expressions, numbers): (Vec<Candidate>, Vec<Candidate>) =
                plain.iter().cloned().partition(|hit| matches!(hit.content, CandidateContent::Expression(_)));
            hits.extend(after(places, &expressions, true));
            hits.extend(after(places, &numbers, true));
            hits
        };
        vec![first, second, anchored(&colons), anchored(&words), all().cloned().collect()]
    }
}
