//! The fields of a request body that the gateway itself reads: model, stream, limits and the hash of the prompt's
//! prefix. One pass reads them without building a document; the node receives the original bytes. A duplicate of such a
//! field is rejected. Otherwise the gateway and the node could read different values from one body.

use std::ops::Range;

use bytes::{Bytes, BytesMut};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::json_scan::{MAX_DEPTH, RawMember, scan_object};
use crate::error::GatewayError;
use crate::normalize::EndpointKind;

/// Largest number of messages in a request.
const MAX_MESSAGES: usize = 10_000;
/// Largest value of `n`.
const MAX_CHOICES: u64 = 64;
/// Largest number of stop strings in a request.
const MAX_STOPS: usize = 16;
/// Length of the prompt's prefix, in bytes, that prefix-hash load balancing takes into account.
const PREFIX_BYTES: usize = 2048;

/// The fields that the gateway uses.
#[derive(Debug, Clone)]
pub struct RequestFields {
    /// Value of `model`. Never empty.
    pub model: String,
    /// Range of the value of `model` in the body, with its quotes.
    model_range: Range<usize>,
    /// Whether the client requested a stream.
    pub stream: bool,
    /// Limit on completion tokens: `max_completion_tokens`, or `max_tokens` without it.
    pub token_limit: Option<u64>,
    /// Value of `n`, 1 to 64; 1 if absent.
    pub choices: u64,
    /// Whether the client requested the usage in a last chunk of the stream only: `include_usage` without
    /// `continuous_usage_stats`.
    pub usage_chunk_requested: bool,
    /// Hash of the first 2048 bytes of `messages` or `prompt`, as written.
    pub prefix_hash: u64,
}

/// Undecoded values of the members that the gateway reads.
#[derive(Default)]
struct RawFields<'a> {
    model: Option<RawMember<'a>>,
    stream: Option<RawMember<'a>>,
    max_tokens: Option<RawMember<'a>>,
    max_completion_tokens: Option<RawMember<'a>>,
    n: Option<RawMember<'a>>,
    stop: Option<RawMember<'a>>,
    messages: Option<RawMember<'a>>,
    prompt: Option<RawMember<'a>>,
    stream_options: Option<RawMember<'a>>,
}

#[derive(Deserialize, Default)]
struct StreamOptions {
    include_usage: Option<bool>,
    continuous_usage_stats: Option<bool>,
}

fn invalid(message: impl Into<String>, param: Option<&'static str>, code: &'static str) -> GatewayError {
    GatewayError::InvalidRequest { message: message.into(), param, code }
}

fn invalid_value(param: &'static str, must: &str) -> GatewayError {
    invalid(format!("`{param}` must {must}"), Some(param), "invalid_value")
}

impl<'a> RawFields<'a> {
    fn read_request_fields(text: &'a str) -> Result<Self, GatewayError> {
        let mut fields = Self::default();
        let taken = scan_object(text, |name, value| fields.set(name, value));
        taken.unwrap_or_else(|| Err(scan_error(text))).map(|()| fields)
    }

    fn set(&mut self, name: &str, value: RawMember<'a>) -> Result<(), GatewayError> {
        let field = match name {
            "model" => &mut self.model,
            "stream" => &mut self.stream,
            "max_tokens" => &mut self.max_tokens,
            "max_completion_tokens" => &mut self.max_completion_tokens,
            "n" => &mut self.n,
            "stop" => &mut self.stop,
            "messages" => &mut self.messages,
            "prompt" => &mut self.prompt,
            "stream_options" => &mut self.stream_options,
            _ => return Ok(()),
        };
        match field.replace(value) {
            None => Ok(()),
            Some(_) => {
                Err(invalid(format!("the request body has two fields `{name}`"), None, "invalid_request"))
            }
        }
    }
}

/// Returns the reason why `text` could not be scanned.
fn scan_error(text: &str) -> GatewayError {
    match serde_json::from_str::<&RawValue>(text) {
        Err(error) => invalid(format!("the request body is not valid JSON: {error}"), None, "invalid_json"),
        Ok(_) if text.trim_start().starts_with('{') => {
            invalid(format!("the request body nests deeper than {MAX_DEPTH}"), None, "invalid_json")
        }
        Ok(_) => invalid("the request body must be a JSON object", None, "invalid_request"),
    }
}

/// Returns the text of a value. `null` counts as absent.
fn non_null(field: Option<RawMember<'_>>) -> Option<&str> {
    field.map(|value| value.text).filter(|text| *text != "null")
}

fn parse_count(field: Option<RawMember<'_>>, param: &'static str) -> Result<Option<u64>, GatewayError> {
    non_null(field)
        .map(|text| text.parse().map_err(|_| invalid_value(param, "be a whole number of at least 0")))
        .transpose()
}

/// Reads and checks the fields of a request body.
///
/// Returns [`GatewayError::Invalid`] with the parameter at fault for a body that is not a JSON object, a missing
/// `model`, a duplicate field, or a value out of range. Messages are required for [`Kind::Chat`] only.
pub fn scan(body: &[u8], kind: EndpointKind) -> Result<RequestFields, GatewayError> {
    let text = std::str::from_utf8(body)
        .map_err(|error| invalid(format!("the request body is not UTF-8: {error}"), None, "invalid_json"))?;
    let fields = RawFields::read_request_fields(text)?;
    let missing = |param| invalid(format!("`{param}` is missing"), Some(param), "missing_required_parameter");
    let raw = non_null(fields.model).ok_or_else(|| missing("model"))?;
    let model: String = serde_json::from_str(raw).map_err(|_| invalid_value("model", "be a string"))?;
    if model.is_empty() {
        return Err(missing("model"));
    }
    if kind == EndpointKind::Chat {
        let messages =
            fields.messages.filter(|value| value.text != "null").ok_or_else(|| missing("messages"))?;
        if !messages.text.starts_with('[') || messages.items == 0 {
            return Err(invalid_value("messages", "be a list of at least one message"));
        }
        if messages.items > MAX_MESSAGES {
            return Err(invalid_value("messages", &format!("not hold more than {MAX_MESSAGES}")));
        }
    }
    let choices = parse_count(fields.n, "n")?.unwrap_or(1);
    if choices == 0 || choices > MAX_CHOICES {
        return Err(invalid_value("n", &format!("be between 1 and {MAX_CHOICES}")));
    }
    if fields.stop.is_some_and(|stop| stop.text.starts_with('[') && stop.items > MAX_STOPS) {
        return Err(invalid_value("stop", &format!("not hold more than {MAX_STOPS}")));
    }
    let stream = non_null(fields.stream).map(serde_json::from_str).transpose();
    let options = non_null(fields.stream_options).map(serde_json::from_str::<StreamOptions>).transpose();
    let options = options
        .map_err(|error| invalid_value("stream_options", &format!("be valid: {error}")))?
        .unwrap_or_default();
    let start = raw.as_ptr() as usize - body.as_ptr() as usize;
    let most = parse_count(fields.max_completion_tokens, "max_completion_tokens")?;
    let limit = parse_count(fields.max_tokens, "max_tokens")?;
    let prompt = non_null(fields.messages).or(non_null(fields.prompt)).unwrap_or_default().as_bytes();
    Ok(RequestFields {
        model,
        model_range: start..start + raw.len(),
        stream: stream.map_err(|_| invalid_value("stream", "be true or false"))?.unwrap_or(false),
        token_limit: most.or(limit),
        choices,
        usage_chunk_requested: options.include_usage == Some(true)
            && options.continuous_usage_stats != Some(true),
        prefix_hash: prefix_hash(&prompt[..prompt.len().min(PREFIX_BYTES)]),
    })
}

/// Returns the body with `model` in place of the client's model name. All other bytes stay the same.
pub fn replace_model(body: &Bytes, head: &RequestFields, model: &str) -> Bytes {
    if head.model == model {
        return body.clone();
    }
    let name = serde_json::to_string(model).unwrap_or_default();
    let mut changed = BytesMut::with_capacity(body.len() + name.len());
    changed.extend_from_slice(&body[..head.model_range.start]);
    changed.extend_from_slice(name.as_bytes());
    changed.extend_from_slice(&body[head.model_range.end..]);
    changed.freeze()
}

/// Returns a 64-bit hash of `bytes`. Not cryptographic: the hash selects a node and nothing else.
fn prefix_hash(bytes: &[u8]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for chunk in bytes.chunks(8) {
        let mut word = [0u8; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        hash = crate::hash::mix(hash ^ u64::from_le_bytes(word));
    }
    hash
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_model_stream_and_token_limit() {
        let body = br#"{"model" : "m","stream":true,"messages":[{"x":1}],"max_tokens":5,"other":{"a":[1]},"stream_options":{"include_usage":true}}"#;
        let head = scan(body, EndpointKind::Chat).unwrap();
        assert_eq!((head.model.as_str(), head.stream, head.token_limit), ("m", true, Some(5)));
        assert!(head.usage_chunk_requested);
        let changed = replace_model(&Bytes::from_static(body), &head, "org/x");
        assert_eq!(changed, String::from_utf8_lossy(body).replace("\"m\"", "\"org/x\"").as_bytes());
    }

    #[test]
    fn reports_an_error_code_per_invalid_body() {
        let code = |body: &str| scan(body.as_bytes(), EndpointKind::Chat).unwrap_err().code();
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
            (r#"{"model":"a","messages":[{}],"stream":"yes"}"#, "invalid_value"),
            (r#"{"model":"a","messages":[{}],"max_tokens":1.5}"#, "invalid_value"),
            (r#"{"model":"a","messages":[{}],"stream_options":3}"#, "invalid_value"),
            (r#"{"model":"a"} x"#, "invalid_json"),
            ("{\"model\":\"\u{0}\"}", "invalid_json"),
        ] {
            assert_eq!(code(body), expected, "{body}");
        }
        let deep = |depth: usize| {
            format!(r#"{{"model":"a","messages":[{{}}],"x":{}{}}}"#, "[".repeat(depth), "]".repeat(depth))
        };
        assert!(scan(deep(127).as_bytes(), EndpointKind::Chat).is_ok());
        assert_eq!(code(&deep(128)), "invalid_json");
        assert_eq!(code(&deep(100_000)), "invalid_json");
        let many = |count: usize| format!(r#"{{"model":"a","messages":[{}]}}"#, vec!["{}"; count].join(","));
        assert!(scan(many(10_000).as_bytes(), EndpointKind::Chat).is_ok());
        assert_eq!(code(&many(10_001)), "invalid_value");
        assert!(
            scan(b"{\"model\":\"a\",\"messages\":[\"\\ud83d\"]}", EndpointKind::Chat).is_ok(),
            "lone surrogates are the node's affair"
        );
        assert!(scan(b"{\"model\":\"a\",\"messages\":[\"\xff\"]}", EndpointKind::Chat).is_err(), "no UTF-8");
    }

    proptest! {
        #[test]
        fn does_not_panic_on_arbitrary_bytes(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _read = scan(&bytes, EndpointKind::Chat);
        }
    }
}
