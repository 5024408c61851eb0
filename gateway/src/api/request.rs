//! What the gateway itself reads of a request body. One pass, without building a document; the node gets the bytes as they
//! came. Two parsers must not read two meanings out of one body, so a field that is read here may stand there only once.

use std::borrow::Cow;
use std::ops::Range;

use bytes::{Bytes, BytesMut};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::error::GatewayError;
use crate::upstream::mend::Kind;

/// JSON may nest so deep, as serde_json holds for itself.
const DEPTH: usize = 128;
/// Messages of one request.
const MESSAGES: usize = 10_000;
/// Choices of one request.
const CHOICES: u64 = 64;
/// Stop strings of one request.
const STOPS: usize = 16;
/// So much of a prompt decides which node has it in its prefix cache.
const PREFIX: usize = 2048;

/// What was read.
#[derive(Debug, Clone)]
pub struct Head {
    /// The model asked for.
    pub model: String,
    /// Where its name stands in the body, quotes included.
    model_at: Range<usize>,
    /// The answer is to be streamed.
    pub stream: bool,
    /// Limit on new tokens.
    pub token_limit: Option<u64>,
    /// Choices wanted.
    pub choices: u64,
    /// Usage is wanted at the end of the stream, and only there.
    pub own_usage: bool,
    /// Hash of the prompt's beginning.
    pub prefix: u64,
}

#[derive(Deserialize)]
struct Fields<'a> {
    #[serde(borrow)]
    model: Option<&'a RawValue>,
    stream: Option<bool>,
    max_tokens: Option<u64>,
    max_completion_tokens: Option<u64>,
    n: Option<u64>,
    #[serde(borrow)]
    stop: Option<&'a RawValue>,
    #[serde(borrow)]
    messages: Option<&'a RawValue>,
    #[serde(borrow)]
    prompt: Option<&'a RawValue>,
    stream_options: Option<StreamOptions>,
}

#[derive(Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
    continuous_usage_stats: Option<bool>,
}

fn invalid(message: impl Into<String>, param: Option<&'static str>, code: &'static str) -> GatewayError {
    GatewayError::Invalid { message: message.into(), param, code }
}

/// Reads a body.
pub fn parse(body: &[u8], kind: Kind) -> Result<Head, GatewayError> {
    let openers = openers(body);
    if openers > DEPTH && depth_exceeds(body, DEPTH) {
        return Err(invalid(format!("the request body nests deeper than {DEPTH}"), None, "invalid_json"));
    }
    // Told to be UTF-8 once, its strings are not looked at again.
    let text = std::str::from_utf8(body)
        .map_err(|error| invalid(format!("the request body is not valid: {error}"), None, "invalid_json"))?;
    let fields: Fields<'_> = serde_json::from_str(text).map_err(|error| {
        let code = if error.is_data() { "invalid_request" } else { "invalid_json" };
        invalid(format!("the request body is not valid: {error}"), None, code)
    })?;
    let missing = |param| invalid(format!("`{param}` is missing"), Some(param), "missing_required_parameter");
    let raw = fields.model.ok_or_else(|| missing("model"))?.get();
    let model: Cow<'_, str> = serde_json::from_str(raw)
        .map_err(|_| invalid("`model` must be a string", Some("model"), "invalid_value"))?;
    if model.is_empty() {
        return Err(missing("model"));
    }
    if kind == Kind::Chat {
        let messages = fields.messages.ok_or_else(|| missing("messages"))?.get();
        if !messages.starts_with('[') || messages[1..].trim_start().starts_with(']') {
            let text = "`messages` must be a list of at least one message";
            return Err(invalid(text, Some("messages"), "invalid_value"));
        }
        // Counted only where there could be too many.
        if openers > MESSAGES
            && serde_json::from_str::<Vec<&RawValue>>(messages).is_ok_and(|list| list.len() > MESSAGES)
        {
            let text = format!("`messages` must not hold more than {MESSAGES}");
            return Err(invalid(text, Some("messages"), "invalid_value"));
        }
    }
    let choices = fields.n.unwrap_or(1);
    if choices == 0 || choices > CHOICES {
        return Err(invalid(format!("`n` must be between 1 and {CHOICES}"), Some("n"), "invalid_value"));
    }
    if let Some(stop) = fields.stop
        && serde_json::from_str::<Vec<&RawValue>>(stop.get()).is_ok_and(|list| list.len() > STOPS)
    {
        return Err(invalid(
            format!("`stop` must not hold more than {STOPS}"),
            Some("stop"),
            "invalid_value",
        ));
    }
    let start = raw.as_ptr() as usize - body.as_ptr() as usize;
    let options = fields.stream_options.as_ref();
    let asked = |pick: fn(&StreamOptions) -> Option<bool>| options.and_then(pick).unwrap_or(false);
    let prompt = fields.messages.or(fields.prompt).map_or("", RawValue::get).as_bytes();
    Ok(Head {
        model: model.into_owned(),
        model_at: start..start + raw.len(),
        stream: fields.stream.unwrap_or(false),
        token_limit: fields.max_completion_tokens.or(fields.max_tokens),
        choices,
        own_usage: asked(|o| o.include_usage) && !asked(|o| o.continuous_usage_stats),
        prefix: crc_of(&prompt[..prompt.len().min(PREFIX)]),
    })
}

/// The body with another model's name in it; nothing else changes.
pub fn with_model(body: &Bytes, head: &Head, model: &str) -> Bytes {
    if head.model == model {
        return body.clone();
    }
    let name = serde_json::to_string(model).unwrap_or_default();
    let mut changed = BytesMut::with_capacity(body.len() + name.len());
    changed.extend_from_slice(&body[..head.model_at.start]);
    changed.extend_from_slice(name.as_bytes());
    changed.extend_from_slice(&body[head.model_at.end..]);
    changed.freeze()
}

/// Opening brackets in the body: no document has more levels, or more messages. Sums of bytes over short pieces, which the
/// compiler turns into vector code: a long prompt is read at memory speed.
fn openers(bytes: &[u8]) -> usize {
    let piece =
        |piece: &[u8]| piece.iter().map(|byte| u8::from(*byte == b'[') + u8::from(*byte == b'{')).sum::<u8>();
    bytes.chunks(128).map(|part| usize::from(piece(part))).sum()
}

/// A number for a text: enough to tell prompts apart, cheap for each request.
fn crc_of(bytes: &[u8]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for chunk in bytes.chunks(8) {
        let mut word = [0u8; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        hash = crate::balance::mix(hash ^ u64::from_le_bytes(word));
    }
    hash
}

/// Whether brackets nest deeper than `limit`. Parsers that skip what they do not need do not look, and the node's might fall
/// over it.
fn depth_exceeds(body: &[u8], limit: usize) -> bool {
    let (mut depth, mut at) = (0usize, 0);
    while at < body.len() {
        match body[at] {
            b'[' | b'{' => {
                depth += 1;
                if depth > limit {
                    return true;
                }
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            b'"' => {
                at += 1;
                while let Some(next) = memchr::memchr2(b'"', b'\\', &body[at.min(body.len())..]) {
                    at += next;
                    if body[at] == b'"' {
                        break;
                    }
                    at += 2;
                }
            }
            _ => {}
        }
        at += 1;
    }
    false
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_what_is_needed_is_read() {
        let body = br#"{"model" : "m","stream":true,"messages":[{"x":1}],"max_tokens":5,"other":{"a":[1]},"stream_options":{"include_usage":true}}"#;
        let head = parse(body, Kind::Chat).unwrap();
        assert_eq!((head.model.as_str(), head.stream, head.token_limit), ("m", true, Some(5)));
        assert!(head.own_usage);
        let changed = with_model(&Bytes::from_static(body), &head, "org/x");
        assert_eq!(changed, String::from_utf8_lossy(body).replace("\"m\"", "\"org/x\"").as_bytes());
    }

    #[test]
    fn wrong_bodies_are_told_apart() {
        let code = |body: &str| parse(body.as_bytes(), Kind::Chat).unwrap_err().code();
        for (body, expected) in [
            ("{", "invalid_json"),
            ("", "invalid_json"),
            ("[]", "invalid_request"),
            ("{}", "missing_required_parameter"),
            (r#"{"model":"a"}"#, "missing_required_parameter"),
            (r#"{"model":"a","model":"b"}"#, "invalid_request"),
            (r#"{"model":"a","messages":[{}],"messages":[{}]}"#, "invalid_request"),
            (r#"{"model":"a","stream":true,"stream":false}"#, "invalid_request"),
            (r#"{"model":5,"messages":[{}]}"#, "invalid_value"),
            (r#"{"model":"a","messages":[ ]}"#, "invalid_value"),
            (r#"{"model":"a","messages":"x"}"#, "invalid_value"),
            (r#"{"model":"a","messages":[{}],"n":65}"#, "invalid_value"),
            (
                r#"{"model":"a","messages":[{}],"stop":[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17]}"#,
                "invalid_value",
            ),
            (r#"{"model":"a","stream":"yes"}"#, "invalid_request"),
            (r#"{"model":"a"} x"#, "invalid_json"),
            ("{\"model\":\"\u{0}\"}", "invalid_json"),
        ] {
            assert_eq!(code(body), expected, "{body}");
        }
        let deep = |depth: usize| {
            format!(r#"{{"model":"a","messages":[{{}}],"x":{}{}}}"#, "[".repeat(depth), "]".repeat(depth))
        };
        assert!(parse(deep(127).as_bytes(), Kind::Chat).is_ok());
        assert_eq!(code(&deep(128)), "invalid_json");
        assert_eq!(code(&deep(100_000)), "invalid_json");
        let many = |count: usize| format!(r#"{{"model":"a","messages":[{}]}}"#, vec!["{}"; count].join(","));
        assert!(parse(many(10_000).as_bytes(), Kind::Chat).is_ok());
        assert_eq!(code(&many(10_001)), "invalid_value");
        assert!(
            parse(b"{\"model\":\"a\",\"messages\":[\"\\ud83d\"]}", Kind::Chat).is_ok(),
            "lone surrogates are the node's affair"
        );
        assert!(parse(b"{\"model\":\"a\",\"messages\":[\"\xff\"]}", Kind::Chat).is_err(), "no UTF-8");
    }

    proptest! {
        #[test]
        fn depth_is_what_a_parser_finds(text in "([\\[\\]{}\"\\\\a,:]|\"[a\\[]*\"){0,60}") {
            // Whatever the text, no panic; and what a strict parser accepts has the depth that is found here.
            let found = depth_exceeds(text.as_bytes(), 3);
            if let Ok(value) = serde_json::from_str::<serde_json::Value>(&text) {
                fn depth(value: &serde_json::Value) -> usize {
                    match value {
                        serde_json::Value::Array(list) => 1 + list.iter().map(depth).max().unwrap_or(0),
                        serde_json::Value::Object(map) => 1 + map.values().map(depth).max().unwrap_or(0),
                        _ => 0,
                    }
                }
                // Duplicate keys hide what a document does not show.
                prop_assert!(found == (depth(&value) > 3) || (found && text.contains(':')));
            }
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _read = parse(&bytes, Kind::Chat);
        }
    }
}
