//! A cache for stream events that differ from the previous one in a token's text only. The bytes before and after the
//! text of one parsed event are kept. An event with the same bytes around its text needs no parser.

use std::ops::Range;

use super::TextEdits;
use super::verdict::NormalizedEvent;

/// The last parsed event with a single token.
#[derive(Debug, Default)]
pub(super) struct ChunkTemplateCache {
    /// Bytes before and after the text.
    surrounding: [Vec<u8>; 2],
    /// Replacements of these bytes, if the event was changed.
    replacement: Option<[Vec<u8>; 2]>,
}

impl ChunkTemplateCache {
    /// Stores an event with one token, whose text is at `text`, without quotes.
    pub(super) fn store(&mut self, data: &[u8], text: &Range<usize>, edits: &TextEdits) {
        let [before, behind] = &mut self.surrounding;
        for (part, now) in [(before, &data[..text.start]), (behind, &data[text.end..])] {
            part.clear();
            part.extend_from_slice(now);
        }
        self.replacement = (!edits.0.is_empty()).then(|| {
            let [mut before, mut behind] = [TextEdits::default(), TextEdits::default()];
            for (range, by) in &edits.0 {
                match range.end <= text.start {
                    true => before.0.push((range.clone(), by.clone())),
                    false => behind.0.push((range.start - text.end..range.end - text.end, by.clone())),
                }
            }
            [before.apply(&data[..text.start]), behind.apply(&data[text.end..])]
        });
    }

    /// Returns the result for an event that differs from the stored one in its text only.
    pub(super) fn lookup(&self, data: &[u8]) -> Option<NormalizedEvent> {
        let [before, behind] = &self.surrounding;
        let text = data.strip_prefix(&before[..])?.strip_suffix(&behind[..])?;
        // An empty text may not be a token.
        if before.is_empty() || text.is_empty() || !is_json_string_content(text) {
            return None;
        }
        Some(match &self.replacement {
            None => NormalizedEvent::Unchanged,
            Some([before, behind]) => NormalizedEvent::Changed(vec![[before, text, behind].concat()]),
        })
    }
}

/// Returns the raw text of a delta that has no other member.
pub(super) fn text_only_delta(delta: &str) -> Option<&str> {
    let inside = delta.strip_prefix('{')?.strip_suffix('}')?;
    let (name, value) = inside.split_once(':')?;
    if !["\"content\"", "\"reasoning_content\"", "\"reasoning\""].contains(&name.trim_ascii()) {
        return None;
    }
    unquote(value.trim_ascii())
}

/// Returns the raw text between the quotes of a JSON string.
pub(super) fn unquote(value: &str) -> Option<&str> {
    value.strip_prefix('"')?.strip_suffix('"').filter(|text| is_json_string_content(text.as_bytes()))
}

/// Returns whether `bytes` may stand between the quotes of a JSON string (RFC 8259, section 7).
fn is_json_string_content(bytes: &[u8]) -> bool {
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        at += match byte {
            b'\\' => match bytes.get(at + 1) {
                Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => 2,
                Some(b'u')
                    if bytes.get(at + 2..at + 6).is_some_and(|hex| hex.iter().all(u8::is_ascii_hexdigit)) =>
                {
                    6
                }
                _ => return false,
            },
            b'"' | ..b' ' => return false,
            _ => 1,
        };
    }
    std::str::from_utf8(bytes).is_ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn matches_events_that_differ_in_text_only() {
        let mut repeat = ChunkTemplateCache::default();
        assert_eq!(repeat.lookup(b""), None, "nothing was seen");
        let event = br#"{"model":"x","delta":{"content": "a"},"n":1}"#;
        assert_eq!(text_only_delta(r#"{"content": "a"}"#), Some("a"));
        assert_eq!(text_only_delta(r#"{"content": "a","b":"c"}"#), None);
        let text = 34..35;
        repeat.store(event, &text, &TextEdits::default());
        assert_eq!(
            repeat.lookup(br#"{"model":"x","delta":{"content": "\n \u00fc"},"n":1}"#),
            Some(NormalizedEvent::Unchanged)
        );
        for other in [
            r#"{"model":"x","delta":{"content": "a"},"n":2}"#,
            r#"{"model":"y","delta":{"content": "a"},"n":1}"#,
            r#"{"model":"x","delta":{"content": "a","b":"c"},"n":1}"#,
            r#"{"model":"x","delta":{"content": "\"},"n":1}"#,
            r#"{"model":"x","delta":{"content": "\q"},"n":1}"#,
            r#"{"model":"x","delta":{"content": "},"n":1}"#,
        ] {
            assert_eq!(repeat.lookup(other.as_bytes()), None, "{other}");
        }
        let edits = TextEdits(vec![(42..43, "22".to_owned()), (9..12, "\"public\"".to_owned())]);
        repeat.store(event, &text, &edits);
        let changed = br#"{"model":"public","delta":{"content": "zz"},"n":22}"#.to_vec();
        let found = repeat.lookup(br#"{"model":"x","delta":{"content": "zz"},"n":1}"#);
        assert_eq!(found, Some(NormalizedEvent::Changed(vec![changed])));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn is_text_agrees_with_serde_json(text in "([ -~\"]|\\\\[\"\\\\nu]|\\\\u[0-9a-g]{3,4}|ü|\n){0,8}") {
            let quoted = format!("\"{text}\"");
            let parsed = serde_json::from_str::<&serde_json::value::RawValue>(&quoted);
            prop_assert_eq!(is_json_string_content(text.as_bytes()), parsed.is_ok());
        }
    }
}
