//! Scans a JSON object: the names of its members and the text of their values. The scanner builds no document. A string
//! is skipped to its closing quote at memory speed, so that a long prompt costs next to nothing. Escapes inside string
//! values are not checked; the consumer of the value decodes them. All other syntax is checked against RFC 8259.

use std::borrow::Cow;
use std::ops::Range;

use serde_json::value::RawValue;

/// Nesting depth at which a document is rejected. The root object counts as one level.
pub(super) const MAX_DEPTH: usize = 128;

/// Value of a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RawMember<'a> {
    /// Text of the value, as it stands in the document.
    pub(super) text: &'a str,
    /// Number of items of an array or of members of an object; 0 for other values.
    pub(super) items: usize,
}

/// Calls `member` with each member of the object `text`, in document order. Stops at the first error of `member` and
/// returns `Some(Err)`. Returns `None` if `text` is not an object, is not valid JSON, or is nested [`DEPTH`] levels
/// deep or more.
pub(super) fn scan_object<'a, E>(
    text: &'a str,
    member: impl FnMut(&str, RawMember<'a>) -> Result<(), E>,
) -> Option<Result<(), E>> {
    Scanner { text: text.as_bytes(), position: 0 }.scan_members(text, member)
}

struct Scanner<'a> {
    text: &'a [u8],
    position: usize,
}

impl Scanner<'_> {
    fn scan_members<'a, E>(
        &mut self,
        text: &'a str,
        mut member: impl FnMut(&str, RawMember<'a>) -> Result<(), E>,
    ) -> Option<Result<(), E>> {
        self.consume(b'{')?;
        let mut more = self.consume(b'}').is_none();
        while more {
            let name = &text[self.read_name()?];
            self.peek_token()?;
            let start = self.position;
            let items = self.skip_value()?;
            if let Err(error) =
                member(&decode_name(name)?, RawMember { text: &text[start..self.position], items })
            {
                return Some(Err(error));
            }
            more = self.consume(b',').is_some();
            if !more {
                self.consume(b'}')?;
            }
        }
        self.peek_token().is_none().then_some(Ok(()))
    }

    /// Skips a value and returns the number of items on its first level.
    fn skip_value(&mut self) -> Option<usize> {
        // One bit per open level, the innermost lowest: 1 for an object, 0 for an array.
        let (mut objects, mut depth, mut items) = (0u128, 0, 0);
        loop {
            items += usize::from(depth == 1);
            match self.peek_token()? {
                open @ (b'{' | b'[') => {
                    self.position += 1;
                    let object = open == b'{';
                    if self.consume(open + 2).is_none() {
                        objects = objects << 1 | u128::from(object);
                        depth += 1;
                        if depth >= MAX_DEPTH {
                            return None;
                        }
                        if object {
                            self.read_name()?;
                        }
                        continue;
                    }
                    if depth + 1 >= MAX_DEPTH {
                        return None;
                    }
                }
                b'"' => self.skip_string()?,
                b't' => self.skip_literal("true")?,
                b'f' => self.skip_literal("false")?,
                b'n' => self.skip_literal("null")?,
                _ => self.skip_number()?,
            }
            // A value is complete. It may be the last of its array or object, which is then complete as well.
            loop {
                if depth == 0 {
                    return Some(items);
                }
                let object = objects & 1 == 1;
                match self.peek_token()? {
                    b',' => {
                        self.position += 1;
                        if object {
                            self.read_name()?;
                        }
                        break;
                    }
                    b'}' if object => {}
                    b']' if !object => {}
                    _ => return None,
                }
                self.position += 1;
                objects >>= 1;
                depth -= 1;
            }
        }
    }

    /// Reads the name of a member and the colon. Returns the range of the name, with its quotes.
    fn read_name(&mut self) -> Option<Range<usize>> {
        self.peek_token().filter(|byte| *byte == b'"')?;
        let start = self.position;
        self.skip_string()?;
        let name = start..self.position;
        self.consume(b':')?;
        Some(name)
    }

    /// Skips a string. A quote after an odd number of backslashes is escaped.
    fn skip_string(&mut self) -> Option<()> {
        let start = self.position + 1;
        let mut at = start;
        loop {
            let end = at + memchr::memchr(b'"', &self.text[at..])?;
            let escapes = self.text[start..end].iter().rev().take_while(|byte| **byte == b'\\').count();
            at = end + 1;
            if escapes % 2 == 0 {
                self.position = at;
                return (!has_control_character(&self.text[start..end])).then_some(());
            }
        }
    }

    fn skip_literal(&mut self, literal: &str) -> Option<()> {
        let found = self.text[self.position..].starts_with(literal.as_bytes());
        self.position += literal.len();
        found.then_some(())
    }

    fn skip_number(&mut self) -> Option<()> {
        let next = |walk: &Self| walk.text.get(walk.position).copied();
        let digits = |walk: &mut Self| {
            let count = walk.text[walk.position..].iter().take_while(|byte| byte.is_ascii_digit()).count();
            walk.position += count;
            (count > 0).then_some(count)
        };
        self.position += usize::from(next(self) == Some(b'-'));
        let zero = next(self) == Some(b'0');
        if digits(self)? > 1 && zero {
            return None;
        }
        if next(self) == Some(b'.') {
            self.position += 1;
            digits(self)?;
        }
        if matches!(next(self), Some(b'e' | b'E')) {
            self.position += 1;
            self.position += usize::from(matches!(next(self), Some(b'+' | b'-')));
            digits(self)?;
        }
        Some(())
    }

    /// Skips whitespace and returns the next byte without consuming it.
    fn peek_token(&mut self) -> Option<u8> {
        while matches!(self.text.get(self.position), Some(b' ' | b'\n' | b'\r' | b'\t')) {
            self.position += 1;
        }
        self.text.get(self.position).copied()
    }

    fn consume(&mut self, byte: u8) -> Option<()> {
        (self.peek_token()? == byte).then(|| self.position += 1)
    }
}

/// Decodes a quoted name. A name with an unpaired surrogate cannot be a Rust string and is returned undecoded, with its
/// quotes.
fn decode_name(quoted: &str) -> Option<Cow<'_, str>> {
    if !quoted.contains('\\') {
        return Some(Cow::Borrowed(&quoted[1..quoted.len() - 1]));
    }
    let unpaired = || serde_json::from_str::<&RawValue>(quoted).is_ok().then_some(Cow::Borrowed(quoted));
    serde_json::from_str(quoted).ok().map(Cow::Owned).or_else(unpaired)
}

/// Returns whether `text` contains a control character. Computes minima over chunks of 64 bytes, which the compiler
/// vectorizes.
fn has_control_character(text: &[u8]) -> bool {
    text.chunks(64).any(|piece| piece.iter().fold(u8::MAX, |least, byte| least.min(*byte)) < b' ')
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn members(text: &str) -> Option<Vec<(String, RawMember<'_>)>> {
        let mut members = Vec::new();
        let taken = scan_object(text, |name, value| {
            members.push((name.to_owned(), value));
            Ok::<_, std::convert::Infallible>(())
        });
        taken.map(|_| members)
    }

    #[test]
    fn returns_members_with_text_and_item_count() {
        let found = members("\t{}\n");
        assert_eq!(found.map(|found| found.len()), Some(0));
        let found = members(r#" { "a" : [1, {"b": [2, 3]}] ,"c":"\\\"}","d":{},"e":{"f":1} } "#).unwrap();
        let found: Vec<_> =
            found.iter().map(|(name, value)| (name.as_str(), value.text, value.items)).collect();
        assert_eq!(
            found,
            [
                ("a", r#"[1, {"b": [2, 3]}]"#, 2),
                ("c", r#""\\\"}""#, 0),
                ("d", "{}", 0),
                ("e", r#"{"f":1}"#, 1)
            ]
        );
        let deep = |depth: usize| format!(r#"{{"a":{}{}}}"#, "[".repeat(depth), "]".repeat(depth));
        assert!(members(&deep(MAX_DEPTH - 1)).is_some());
        assert!(members(&deep(MAX_DEPTH)).is_none());
        assert_eq!(members(r#"{"\u0061":1}"#).unwrap()[0].0, "a", "a name in disguise is known");
        assert!(members(r#"{"\ud83d":1}"#).is_some() && members(r#"{"\model":1}"#).is_none());
    }

    /// Generates JSON documents and near misses.
    fn text() -> impl Strategy<Value = String> {
        let piece = prop::sample::select(vec![
            "{", "}", "[", "]", ",", ":", " ", "\"", "\"a\"", "\"b\"", "\"c\":", "{\"d\":1", "{}", "[]", "0",
            "1", "-", ".", "12.5e-3", "01", "1.", "e5", "true", "false", "null", "nul", "\\\\", "\\\"",
            "\\n", "\n", "\"\\\\\"", "ü",
        ]);
        prop::collection::vec(piece, 0..12).prop_map(|pieces| format!("{{\"x\":{}}}", pieces.concat()))
    }

    fn value() -> impl Strategy<Value = serde_json::Value> {
        let leaf = prop_oneof![
            Just(serde_json::Value::Null),
            any::<bool>().prop_map(Into::into),
            any::<i64>().prop_map(Into::into),
            any::<f64>().prop_map(Into::into),
            "[ -~\\n\"\\\\üñ]{0,12}".prop_map(Into::into),
        ];
        leaf.prop_recursive(4, 40, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Into::into),
                prop::collection::btree_map("[a-c\"]{1,3}", inner, 0..6)
                    .prop_map(|map| serde_json::Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn agrees_with_serde_json_on_valid_documents(map in prop::collection::btree_map("[a-e\"\n]{1,2}", value(), 0..6)) {
            let text = serde_json::to_string(&map).unwrap();
            let found: BTreeMap<_, _> = members(&text).unwrap().into_iter().collect();
            let expected: BTreeMap<String, &RawValue> = serde_json::from_str(&text).unwrap();
            prop_assert_eq!(found.len(), expected.len());
            for (name, raw) in expected {
                let items = match &map[&name] {
                    serde_json::Value::Array(list) => list.len(),
                    serde_json::Value::Object(map) => map.len(),
                    _ => 0,
                };
                prop_assert_eq!(found[&name], RawMember { text: raw.get(), items });
            }
        }

        #[test]
        fn rejects_what_serde_json_rejects(text in text()) {
            let parsed = serde_json::from_str::<BTreeMap<Cow<'_, str>, &RawValue>>(&text);
            let found = members(&text);
            prop_assert_eq!(found.is_some(), parsed.is_ok(), "{}", text);
            for (name, raw) in parsed.into_iter().flatten() {
                let found = found.iter().flatten().rfind(|found| found.0 == name);
                prop_assert_eq!(found.unwrap().1.text, raw.get());
            }
        }
    }
}
