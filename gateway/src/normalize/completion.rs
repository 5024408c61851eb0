//! Normalizes responses that are not streamed.

use potstill_shared::openai::{Usage, unix_time_s};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;
use serde_json::value::RawValue;

use super::{
    EndpointKind, FINISH_REASONS, Presence, RawUsage, TextEdits, deserialize_presence, normalize_content,
    normalize_finish_reason, normalize_tool_calls, normalize_usage,
};
use crate::config::Reasoning;

/// Result of normalizing a response.
#[derive(Debug)]
pub enum Normalized {
    /// The response is correct; with its usage, if any.
    Unchanged(Option<Usage>),
    /// Corrected response, with its usage, if any.
    Changed(Vec<u8>, Option<Usage>),
    /// The node returned an error body with a success status.
    Error,
    /// The body is not a JSON object of the endpoint's form.
    Invalid,
}

/// A correct response. A body that does not deserialize to this type is rebuilt.
#[derive(Deserialize)]
struct Completion<'a> {
    id: Option<&'a str>,
    object: Option<&'a str>,
    created: Option<u64>,
    model: Option<&'a str>,
    #[serde(borrow)]
    choices: Option<Vec<Choice<'a>>>,
    usage: Option<RawUsage>,
    error: Option<IgnoredAny>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    index: Option<u64>,
    #[serde(borrow)]
    message: Option<Message<'a>>,
    #[serde(borrow)]
    text: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "deserialize_presence")]
    finish_reason: Presence<'a>,
}

#[derive(Deserialize)]
struct Message<'a> {
    role: Option<&'a str>,
    #[serde(borrow)]
    content: Option<&'a RawValue>,
    #[serde(borrow)]
    tool_calls: Option<&'a RawValue>,
}

/// Normalizes the body of a response with a success status.
pub fn normalize(body: &[u8], kind: EndpointKind, model: &str, reasoning: Reasoning) -> Normalized {
    if kind == EndpointKind::Other {
        return Normalized::Unchanged(None);
    }
    // serde_json does not check strings of a `&str` for valid UTF-8 again.
    let whole = match std::str::from_utf8(body) {
        Ok(text) => serde_json::from_str::<Completion<'_>>(text),
        Err(_) => serde_json::from_slice(body),
    };
    match whole {
        Ok(whole) if whole.error.is_some() => Normalized::Error,
        Ok(whole) => match find_edits(body, &whole, kind, model, reasoning) {
            Some((edits, usage)) if edits.0.is_empty() => Normalized::Unchanged(usage),
            Some((edits, usage)) => Normalized::Changed(edits.apply(body), usage),
            None => rebuild(body, kind, model, reasoning),
        },
        Err(error) if error.is_data() => rebuild(body, kind, model, reasoning),
        Err(_) => Normalized::Invalid,
    }
}

fn object_name(kind: EndpointKind) -> &'static str {
    match kind {
        EndpointKind::Chat => "chat.completion",
        EndpointKind::Text => "text_completion",
        EndpointKind::Embeddings | EndpointKind::Other => "list",
    }
}

fn find_edits(
    body: &[u8],
    whole: &Completion<'_>,
    kind: EndpointKind,
    model: &str,
    reasoning: Reasoning,
) -> Option<(TextEdits, Option<Usage>)> {
    let named = whole.object == Some(object_name(kind));
    let head = kind == EndpointKind::Embeddings
        || (whole.id.is_some_and(|id| !id.is_empty()) && whole.created.is_some());
    let choices = kind == EndpointKind::Embeddings
        || (reasoning == Reasoning::Pass
            && whole.choices.as_ref()?.iter().all(|choice| is_correct_choice(choice, kind)));
    if !named || !head || !choices {
        return None;
    }
    let usage = match whole.usage.as_ref().map(|counts| counts.usage(kind)) {
        Some((usage, true)) => Some(usage),
        Some(_) => return None,
        None => None,
    };
    let mut edits = TextEdits::default();
    let found = whole.model?;
    if found != model {
        let quoted = serde_json::to_string(model).ok()?;
        edits.replace(body, found, &quoted[1..quoted.len() - 1]);
    }
    Some((edits, usage))
}

fn is_correct_choice(choice: &Choice<'_>, kind: EndpointKind) -> bool {
    let reason = matches!(&choice.finish_reason, Some(Some(reason)) if FINISH_REASONS.contains(&&**reason));
    let body = match (kind, &choice.message) {
        (EndpointKind::Chat, Some(message)) => {
            message.role.is_some_and(|role| role == "assistant")
                && message.content.is_none_or(|content| content.get().starts_with('"'))
                && message.tool_calls.is_none()
        }
        (EndpointKind::Text, _) => choice.text.is_some_and(|text| text.get().starts_with('"')),
        _ => false,
    };
    choice.index.is_some() && reason && body
}

fn rebuild(body: &[u8], kind: EndpointKind, model: &str, reasoning: Reasoning) -> Normalized {
    let mut answer = match serde_json::from_slice::<Value>(body) {
        Ok(Value::Object(answer)) => answer,
        Ok(_) => return Normalized::Invalid,
        // The body has unpaired surrogates or similar, which `Value` cannot hold.
        Err(_) => return Normalized::Unchanged(None),
    };
    if answer.get("error").is_some_and(|error| !error.is_null()) {
        return Normalized::Error;
    }
    if kind == EndpointKind::Embeddings {
        answer.insert("object".into(), "list".into());
        answer.insert("model".into(), model.into());
        for (at, row) in
            answer.get_mut("data").and_then(Value::as_array_mut).into_iter().flatten().enumerate()
        {
            if let Some(row) = row.as_object_mut() {
                row.entry("object").or_insert_with(|| "embedding".into());
                row.entry("index").or_insert_with(|| at.into());
            }
        }
        answer.entry("usage").or_insert_with(|| serde_json::json!({}));
    } else {
        let id = potstill_shared::id::unique_id(if kind == EndpointKind::Chat { "chatcmpl" } else { "cmpl" });
        super::normalize_common_fields(&mut answer, object_name(kind), &id, unix_time_s(), model);
        let Some(choices) = answer.get_mut("choices").and_then(Value::as_array_mut) else {
            return Normalized::Invalid;
        };
        for (at, choice) in choices.iter_mut().enumerate() {
            normalize_choice(at, choice, kind, reasoning);
        }
    }
    let mut usage = None;
    if let Some(counts) = answer.get_mut("usage").and_then(Value::as_object_mut) {
        normalize_usage(counts, kind);
        let count = |name: &str| counts.get(name).and_then(Value::as_u64).unwrap_or(0);
        usage = Some(Usage::new(count("prompt_tokens"), count("completion_tokens")));
    }
    Normalized::Changed(serde_json::to_vec(&answer).unwrap_or_default(), usage)
}

fn normalize_choice(at: usize, choice: &mut Value, kind: EndpointKind, reasoning: Reasoning) {
    let Some(choice) = choice.as_object_mut() else { return };
    choice.entry("index").or_insert_with(|| at.into());
    let word = match choice.get("finish_reason") {
        Some(Value::String(word)) => word.clone(),
        Some(Value::Object(word)) => word.get("type").and_then(Value::as_str).unwrap_or("").to_owned(),
        _ => String::new(),
    };
    choice.insert("finish_reason".into(), normalize_finish_reason(&word).into());
    if kind != EndpointKind::Chat {
        choice.entry("text").or_insert_with(|| "".into());
        return;
    }
    let Some(message) = choice.get_mut("message").and_then(Value::as_object_mut) else { return };
    if message.get("role").and_then(Value::as_str).is_none_or(str::is_empty) {
        message.insert("role".into(), "assistant".into());
    }
    normalize_content(message);
    message.entry("content").or_insert(Value::Null);
    if let Some(calls) = message.get_mut("tool_calls") {
        normalize_tool_calls(calls, false);
    }
    if reasoning != Reasoning::Pass {
        super::reasoning::split_message(message, reasoning == Reasoning::SplitOpen);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(body: &str, kind: EndpointKind) -> Value {
        match normalize(body.as_bytes(), kind, "m", Reasoning::Pass) {
            Normalized::Changed(body, _) => serde_json::from_slice(&body).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn forwards_correct_responses_unchanged() {
        let body = br#"{"id":"a","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"x","reasoning":"y"},"finish_reason":"stop"}],"usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3,"d":{}}}"#;
        assert!(
            matches!(normalize(body, EndpointKind::Chat, "m", Reasoning::Pass), Normalized::Unchanged(Some(u)) if u == Usage::new(1, 2))
        );
        let body = String::from_utf8(body.to_vec()).unwrap();
        let other = changed(&body.replace("\"model\":\"m\"", "\"model\": \"x\""), EndpointKind::Chat);
        assert_eq!((other["model"].as_str(), &other["usage"]["d"]), (Some("m"), &serde_json::json!({})));
    }

    #[test]
    fn corrects_missing_and_wrong_fields() {
        let answer = changed(
            r#"{"model":"x","choices":[{"message":{"content":[{"type":"text","text":"a"},{"type":"text","text":"b"}],"tool_calls":[{"function":{"name":"f","arguments":{}}}]},"finish_reason":"abort"}],"usage":{"prompt_tokens":1,"completion_tokens":2},"own":7}"#,
            EndpointKind::Chat,
        );
        let choice = &answer["choices"][0];
        assert_eq!(choice["message"]["content"], "ab");
        assert_eq!((choice["finish_reason"].as_str(), choice["index"].as_u64()), (Some("length"), Some(0)));
        assert_eq!(choice["message"]["role"], "assistant");
        assert_eq!(choice["message"]["tool_calls"][0]["type"], "function");
        assert_eq!((answer["usage"]["total_tokens"].as_u64(), answer["own"].as_u64()), (Some(3), Some(7)));
        assert!(answer["id"].is_string() && answer["created"].is_u64());
        let list = changed(r#"{"model":"x","data":[{"embedding":[1.0]}]}"#, EndpointKind::Embeddings);
        assert_eq!((list["object"].as_str(), list["data"][0]["index"].as_u64()), (Some("list"), Some(0)));
        assert_eq!(list["usage"]["total_tokens"], 0);
    }

    proptest::proptest! {
        #[test]
        fn changed_bodies_are_valid_json(text in "[\\[\\]{}\",:a-z0-9 ]{0,80}", head: bool) {
            let text = if head { format!("{{\"choices\":[{{\"message\":{{{text}}}}}]}}") } else { text };
            for kind in [EndpointKind::Chat, EndpointKind::Text, EndpointKind::Embeddings] {
                if let Normalized::Changed(body, _) = normalize(text.as_bytes(), kind, "m", Reasoning::Split) {
                    proptest::prop_assert!(serde_json::from_slice::<Value>(&body).is_ok());
                }
            }
        }
    }

    #[test]
    fn detects_error_bodies_and_invalid_json() {
        let kind = |body: &str| normalize(body.as_bytes(), EndpointKind::Chat, "m", Reasoning::Pass);
        assert!(matches!(kind(r#"{"error":{"message":"x"}}"#), Normalized::Error));
        // An error counts even if other fields have wrong types.
        assert!(matches!(kind(r#"{"error":"x","id":5,"choices":"none"}"#), Normalized::Error));
        assert!(matches!(kind(r#"{"error":null,"id":5,"choices":"none"}"#), Normalized::Invalid));
        assert!(matches!(kind("<html>"), Normalized::Invalid));
        assert!(matches!(kind("[1]"), Normalized::Invalid));
    }
}
