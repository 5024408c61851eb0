//! Normalizes responses of nodes to OpenAI's form, so that every client library can read them. Corrected are the model
//! name, `id`, `created`, indices, roles, finish reasons, token sums and error bodies. Correct responses are forwarded
//! byte by byte, and unknown fields are always kept. Missing text is never invented.

pub mod completion;
pub mod error_body;
pub mod reasoning;
mod repeated_chunk;
pub mod sse_stream;
pub mod stream_chunk;
pub mod verdict;

use std::borrow::Cow;
use std::ops::Range;

use potstill_shared::openai::Usage;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

/// Endpoint whose responses are normalized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndpointKind {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Text,
    /// `/v1/embeddings`.
    Embeddings,
    /// Any other endpoint: only errors are normalized.
    Other,
}

/// OpenAI's finish reasons. Typed clients reject others.
const FINISH_REASONS: [&str; 5] = ["stop", "length", "tool_calls", "content_filter", "function_call"];

/// Returns the finish reason of OpenAI for that of an engine. An unknown word becomes `length`, because nothing proves
/// that the completion is whole.
pub fn normalize_finish_reason(word: &str) -> &'static str {
    match word {
        "eos" | "eos_token" | "end_turn" | "stop_sequence" | "stop_token" | "end" => "stop",
        "max_tokens" | "max_length" | "abort" | "aborted" | "cancelled" => "length",
        "tool_use" | "tool_call" => "tool_calls",
        known => FINISH_REASONS.iter().find(|reason| **reason == known).unwrap_or(&"length"),
    }
}

/// The `usage` object of a response.
#[derive(Deserialize)]
struct RawUsage {
    prompt_tokens: Option<u64>,
    completion_tokens: Option<u64>,
    total_tokens: Option<u64>,
}

impl RawUsage {
    /// Returns the usage, and whether all counts are present and the sum is correct.
    fn usage(&self, kind: EndpointKind) -> (Usage, bool) {
        let usage = Usage::new(self.prompt_tokens.unwrap_or(0), self.completion_tokens.unwrap_or(0));
        let whole = self.prompt_tokens.is_some()
            && (self.completion_tokens.is_some() || kind == EndpointKind::Embeddings)
            && self.total_tokens == Some(usage.total_tokens);
        (usage, whole)
    }
}

/// Sets missing counts to 0 and corrects `total_tokens`. Other members of the object are kept.
fn normalize_usage(usage: &mut Map<String, Value>, kind: EndpointKind) {
    let count = |usage: &Map<String, Value>, name: &str| usage.get(name).and_then(Value::as_u64).unwrap_or(0);
    let (prompt, completion) = (count(usage, "prompt_tokens"), count(usage, "completion_tokens"));
    usage.insert("prompt_tokens".into(), prompt.into());
    if kind != EndpointKind::Embeddings {
        usage.insert("completion_tokens".into(), completion.into());
    }
    usage.insert("total_tokens".into(), (prompt + completion).into());
}

/// Replacements of parts of a text.
#[derive(Default)]
struct TextEdits(Vec<(Range<usize>, String)>);

impl TextEdits {
    /// Replaces `part`, which must be a slice of `text`.
    fn replace(&mut self, text: &[u8], part: &str, by: impl Into<String>) {
        let start = part.as_ptr() as usize - text.as_ptr() as usize;
        self.0.push((start..start + part.len(), by.into()));
    }

    fn apply(mut self, text: &[u8]) -> Vec<u8> {
        self.0.sort_by_key(|(range, _)| range.start);
        let mut out = Vec::with_capacity(text.len() + 64);
        let mut at = 0;
        for (range, by) in &self.0 {
            out.extend_from_slice(&text[at..range.start]);
            out.extend_from_slice(by.as_bytes());
            at = range.end;
        }
        out.extend_from_slice(&text[at..]);
        out
    }
}

/// Returns whether a raw value is a string that is not empty.
fn is_non_empty_string(value: Option<&RawValue>) -> bool {
    value.is_some_and(|value| value.get().starts_with('"') && value.get().len() > 2)
}

/// Returns whether a raw value is a non-negative integer.
fn is_count(value: Option<&RawValue>) -> bool {
    value.is_some_and(|value| value.get().bytes().all(|byte| byte.is_ascii_digit()))
}

/// A field that may be absent (`None`), null (`Some(None)`) or a string.
type Presence<'a> = Option<Option<Cow<'a, str>>>;

fn deserialize_presence<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<Presence<'de>, D::Error> {
    #[derive(Deserialize)]
    struct Text<'a>(#[serde(borrow)] Option<Cow<'a, str>>);
    Text::deserialize(deserializer).map(|text| Some(text.0))
}

/// Adds what typed clients require of tool calls: `index`, `id`, `type`, and `arguments` as a string. In a stream, only
/// the first delta of a call gets `id` and `type`.
fn normalize_tool_calls(calls: &mut Value, streamed: bool) {
    let Some(calls) = calls.as_array_mut() else { return };
    for (index, call) in calls.iter_mut().enumerate() {
        let Some(call) = call.as_object_mut() else { continue };
        if streamed {
            call.entry("index").or_insert_with(|| index.into());
        }
        let begins =
            call.get("function").and_then(|function| function.get("name")).is_some_and(Value::is_string);
        if !streamed || begins {
            call.entry("type").or_insert_with(|| "function".into());
            if !call.get("id").is_some_and(Value::is_string) {
                call.insert("id".into(), potstill_shared::id::unique_id("call").into());
            }
        }
        if let Some(arguments) = call.get_mut("function").and_then(|function| function.get_mut("arguments"))
            && !arguments.is_string()
        {
            *arguments = if arguments.is_null() { "".into() } else { arguments.to_string().into() };
        }
    }
}

/// Replaces a list of content parts by its concatenated text.
fn normalize_content(message: &mut Map<String, Value>) {
    if let Some(content) = message.get_mut("content")
        && let Some(parts) = content.as_array()
    {
        let text: String = parts.iter().filter_map(|part| part.get("text").and_then(Value::as_str)).collect();
        *content = text.into();
    }
}

/// Sets `id`, `object`, `created` and `model` of a response.
fn normalize_common_fields(
    answer: &mut Map<String, Value>,
    object: &str,
    id: &str,
    created: u64,
    model: &str,
) {
    if answer.get("id").and_then(Value::as_str).is_none_or(str::is_empty) {
        answer.insert("id".into(), id.into());
    }
    if answer.get("object").and_then(Value::as_str) != Some(object) {
        answer.insert("object".into(), object.into());
    }
    let seconds = answer.get("created").and_then(|at| at.as_u64().or(at.as_f64().map(|at| at as u64)));
    answer.insert("created".into(), seconds.unwrap_or(created).into());
    answer.insert("model".into(), model.into());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_every_finish_reason_to_openais_list() {
        for word in ["stop", "eos", "abort", "length", "gone fishing", "", "tool_use"] {
            assert!(FINISH_REASONS.contains(&normalize_finish_reason(word)), "{word}");
        }
        assert_eq!(
            (normalize_finish_reason("abort"), normalize_finish_reason("eos_token")),
            ("length", "stop")
        );
        assert_eq!(normalize_finish_reason("gone fishing"), "length", "unknown is not taken for whole");
    }
}
