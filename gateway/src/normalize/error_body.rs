//! Normalizes error bodies of nodes to OpenAI's form: `{"error": {message, type, param, code}}`, with a status that
//! clients handle correctly.

use http::StatusCode;
use potstill_shared::openai::ErrorBody;
use serde_json::Value;

/// Longest message that is forwarded, in bytes.
const MAX_MESSAGE_BYTES: usize = 8 << 10;

/// Returns the status and the error body that the client receives.
pub fn normalize(status: StatusCode, body: &[u8]) -> (StatusCode, ErrorBody) {
    let document: Value = serde_json::from_slice(body).unwrap_or(Value::Null);
    let detail = match &document {
        Value::Object(fields) if fields.contains_key("error") => &document["error"],
        Value::Object(fields) if fields.contains_key("detail") => &document["detail"],
        other => other,
    };
    let text = |name: &str| detail.get(name).and_then(Value::as_str).filter(|text| !text.is_empty());
    let message = match detail {
        Value::String(text) => text.clone(),
        // FastAPI reports validation errors as a list.
        Value::Array(problems) => problems.iter().map(format_validation_error).collect::<Vec<_>>().join("; "),
        _ => {
            text("message").or(text("msg")).map(str::to_owned).unwrap_or_else(|| plain_message(status, body))
        }
    };
    let message = truncate_message(message);
    if let Some(message) = context_overflow_message(&message, detail) {
        let body = ErrorBody::new(
            message,
            "invalid_request_error",
            Some("messages"),
            Some("context_length_exceeded"),
        );
        return (StatusCode::BAD_REQUEST, body);
    }
    let status = match status.as_u16() {
        // Clients do not retry these, though a retry can succeed.
        425 | 408 => StatusCode::SERVICE_UNAVAILABLE,
        // The gateway's own key for the node is wrong, which the client cannot fix.
        401 | 403 | 407 => StatusCode::BAD_GATEWAY,
        // FastAPI's status for invalid requests; OpenAI returns 400.
        422 => StatusCode::BAD_REQUEST,
        300..=399 => StatusCode::BAD_GATEWAY,
        _ => status,
    };
    let usual = match status.as_u16() {
        429 => "rate_limit_error",
        404 => "not_found_error",
        500.. => "server_error",
        _ => "invalid_request_error",
    };
    let kind = text("type").unwrap_or(usual);
    let code = match detail.get("code") {
        Some(Value::String(code)) => Some(code.as_str()),
        // Typed clients reject numeric codes, and the number only repeats the status.
        _ if status == StatusCode::NOT_FOUND => Some("model_not_found"),
        _ => None,
    };
    (status, ErrorBody::new(message, kind, text("param"), code))
}

/// Normalizes an error event of a stream to one line of JSON.
pub fn normalize_event(data: &[u8]) -> Vec<u8> {
    let (_, body) = normalize(StatusCode::INTERNAL_SERVER_ERROR, data);
    body.to_json().into_bytes()
}

fn format_validation_error(problem: &Value) -> String {
    let place: Vec<String> = problem
        .get("loc")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .map(|part| part.as_str().map_or_else(|| part.to_string(), str::to_owned))
        .collect();
    format!("{}: {}", place.join("."), problem.get("msg").and_then(Value::as_str).unwrap_or("invalid"))
}

fn plain_message(status: StatusCode, body: &[u8]) -> String {
    let text = String::from_utf8_lossy(&body[..body.len().min(MAX_MESSAGE_BYTES)]);
    let text = text.trim();
    if text.is_empty() || text.starts_with(['<', '{', '[']) {
        format!("the node answered {}", status.as_u16())
    } else {
        text.to_owned()
    }
}

fn truncate_message(mut message: String) -> String {
    if message.len() > MAX_MESSAGE_BYTES {
        let mut end = MAX_MESSAGE_BYTES;
        while !message.is_char_boundary(end) {
            end -= 1;
        }
        message.truncate(end);
        message.push('…');
    }
    message
}

/// Detects a prompt that exceeds the context length, in the wording of several engines. Returns a message with OpenAI's
/// wording, which clients search for.
fn context_overflow_message(message: &str, detail: &Value) -> Option<String> {
    const WORDS: &str = "maximum context length is ";
    let lower = message.to_ascii_lowercase();
    let coded = ["code", "type"].iter().any(|name| {
        let word = detail.get(name).and_then(Value::as_str).unwrap_or("");
        word == "context_length_exceeded" || word == "exceed_context_size_error"
    });
    let said = lower.contains("context length")
        || lower.contains("context size")
        || lower.contains("context window");
    let meant = ["exceed", "longer than", "too long", "maximum", "larger than", "greater than", "at most"];
    let too_long = coded || (said && meant.iter().any(|word| lower.contains(word)));
    if !too_long {
        return None;
    }
    if lower.contains(WORDS) {
        return Some(message.to_owned());
    }
    let field = |name: &str| detail.get(name).and_then(Value::as_u64);
    let numbers: Vec<u64> = message
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|digits| digits.parse().ok())
        .filter(|number| *number > 1)
        .collect();
    let limit = field("n_ctx").or_else(|| numbers.iter().min().copied().filter(|_| numbers.len() > 1));
    let asked =
        field("n_prompt_tokens").or_else(|| numbers.iter().max().copied().filter(|_| numbers.len() > 1));
    Some(match (limit, asked) {
        (Some(limit), Some(asked)) => {
            format!("This model's {WORDS}{limit} tokens. However, you requested {asked} tokens. ({message})")
        }
        (Some(limit), None) => format!("This model's {WORDS}{limit} tokens. ({message})"),
        _ => format!("This model's {WORDS}smaller than the request. ({message})"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normalized(status: u16, text: &str) -> (u16, Value) {
        let (status, body) = normalize(StatusCode::from_u16(status).unwrap(), text.as_bytes());
        (status.as_u16(), serde_json::to_value(body).unwrap()["error"].clone())
    }

    #[test]
    fn converts_known_error_shapes() {
        for (status, text, expected, message) in [
            (400, r#"{"error":{"message":"a","type":"t","param":"p","code":"c"}}"#, 400, "a"),
            (
                400,
                r#"{"object":"error","message":"a","type":"BadRequestError","param":null,"code":400}"#,
                400,
                "a",
            ),
            (404, r#"{"error":{"code":404,"message":"a","type":"not_found"}}"#, 404, "a"),
            (500, r#"{"detail":"a"}"#, 500, "a"),
            (422, r#"{"detail":[{"loc":["body","n"],"msg":"a"}]}"#, 400, "body.n: a"),
            (503, r#"{"error":"a"}"#, 503, "a"),
            (502, "<html>x", 502, "the node answered 502"),
            (500, "", 500, "the node answered 500"),
            (500, "plain words", 500, "plain words"),
            (425, "", 503, "the node answered 425"),
            (401, r#"{"error":{"message":"a"}}"#, 502, "a"),
        ] {
            let (found, error) = normalized(status, text);
            assert_eq!((found, error["message"].as_str()), (expected, Some(message)), "{text}");
            assert!(
                error["type"].is_string() && (error["code"].is_null() || error["code"].is_string()),
                "{error}"
            );
            assert!(error.get("param").is_some());
        }
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_bytes_become_an_openai_error(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300), status in 300u16..600) {
            let (status, error) = normalize(StatusCode::from_u16(status).unwrap(), &bytes);
            proptest::prop_assert!(status.as_u16() >= 400);
            let error = serde_json::to_value(error).unwrap();
            proptest::prop_assert!(error["error"]["message"].as_str().is_some_and(|text| !text.is_empty()));
            proptest::prop_assert!(error["error"]["code"].is_null() || error["error"]["code"].is_string());
        }
    }

    #[test]
    fn reports_context_overflow_in_openais_wording() {
        for text in [
            r#"{"error":{"message":"This model's maximum context length is 4096 tokens. However, you requested 5000 tokens","code":400}}"#,
            r#"{"error":{"code":400,"message":"the request exceeds the available context size, try increasing it","type":"exceed_context_size_error","n_prompt_tokens":5000,"n_ctx":4096}}"#,
            r#"{"object":"error","message":"The input (5000 tokens) is longer than the model's context length (4096 tokens).","code":400}"#,
        ] {
            let (status, error) = normalized(400, text);
            let message = error["message"].as_str().unwrap();
            assert!(message.contains("maximum context length is 4096 tokens"), "{message}");
            assert!(message.contains("requested 5000 tokens"), "{message}");
            assert_eq!((status, error["code"].as_str()), (400, Some("context_length_exceeded")));
        }
    }
}
