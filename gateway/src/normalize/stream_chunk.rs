//! Normalizes single events of a stream. In the common case only the model name is wrong, which costs one scan of the
//! event and one copy.

use std::sync::Arc;

use potstill_shared::openai::{Usage, unix_time_s};
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::reasoning::StreamReasoningSplitter;
use super::repeated_chunk::{ChunkTemplateCache, text_only_delta, unquote};
use super::verdict::NormalizedEvent;
use super::{
    EndpointKind, Presence, RawUsage, TextEdits, deserialize_presence, is_count, is_non_empty_string,
    normalize_content, normalize_finish_reason, normalize_tool_calls, normalize_usage,
};
use crate::config::Reasoning;

/// State of one stream.
#[derive(Debug)]
pub struct ChunkNormalizer {
    kind: EndpointKind,
    model: Arc<str>,
    /// Name of the model as a JSON string.
    model_json: String,
    id: Option<String>,
    created: Option<String>,
    /// Bit set of the choices that have begun.
    begun_choices: u64,
    /// Whether the client requested the usage in a last chunk only.
    usage_chunk_requested: bool,
    reasoning_splitter: Option<StreamReasoningSplitter>,
    template_cache: ChunkTemplateCache,
    /// Whether a finish reason has been forwarded.
    pub has_finish_reason: bool,
    /// Last usage of the stream.
    pub usage: Option<Usage>,
    /// Number of events with text, an approximation of the number of tokens.
    pub text_events: u64,
}

#[derive(Deserialize)]
struct Chunk<'a> {
    #[serde(borrow)]
    id: Option<&'a RawValue>,
    #[serde(borrow)]
    object: Option<&'a RawValue>,
    #[serde(borrow)]
    created: Option<&'a RawValue>,
    #[serde(borrow)]
    model: Option<&'a RawValue>,
    #[serde(borrow)]
    choices: Option<Vec<Choice<'a>>>,
    #[serde(borrow)]
    usage: Option<&'a RawValue>,
    #[serde(borrow)]
    error: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    index: Option<u64>,
    #[serde(borrow)]
    delta: Option<&'a RawValue>,
    #[serde(borrow)]
    text: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "deserialize_presence")]
    finish_reason: Presence<'a>,
}

impl ChunkNormalizer {
    /// Creates a normalizer. `usage_chunk_requested`: the client requested the usage in a last chunk only.
    pub fn new(
        kind: EndpointKind,
        model: Arc<str>,
        usage_chunk_requested: bool,
        reasoning: Reasoning,
    ) -> Self {
        Self {
            kind,
            model_json: serde_json::to_string(&*model).unwrap_or_default(),
            model,
            id: None,
            created: None,
            begun_choices: 0,
            usage_chunk_requested,
            reasoning_splitter: (kind == EndpointKind::Chat && reasoning != Reasoning::Pass)
                .then(|| StreamReasoningSplitter::new(reasoning == Reasoning::SplitOpen)),
            template_cache: ChunkTemplateCache::default(),
            has_finish_reason: false,
            usage: None,
            text_events: 0,
        }
    }

    fn object_name(&self) -> &'static str {
        if self.kind == EndpointKind::Chat { "chat.completion.chunk" } else { "text_completion" }
    }

    /// Normalizes the data of one event.
    pub fn normalize_event(&mut self, data: &[u8]) -> NormalizedEvent {
        if data.trim_ascii() == b"[DONE]" {
            return NormalizedEvent::Done;
        }
        if let Some(known) = self.template_cache.lookup(data) {
            self.text_events += 1;
            return known;
        }
        match serde_json::from_slice::<Chunk<'_>>(data) {
            Ok(chunk) if chunk.error.is_some() => {
                NormalizedEvent::Error(super::error_body::normalize_event(data))
            }
            Ok(chunk) => match self.find_edits(data, &chunk) {
                Some(edits) if edits.0.is_empty() => NormalizedEvent::Unchanged,
                Some(edits) => NormalizedEvent::Changed(vec![edits.apply(data)]),
                None => self.rebuild(data),
            },
            // Valid JSON with a field of another type than OpenAI's.
            Err(error) if error.is_data() => self.rebuild(data),
            Err(_) => NormalizedEvent::Invalid("an event is not JSON"),
        }
    }

    /// Returns the replacements that correct the chunk, or `None` if it must be rebuilt.
    fn find_edits(&mut self, data: &[u8], chunk: &Chunk<'_>) -> Option<TextEdits> {
        let object = chunk.object.is_some_and(|object| object.get().trim_matches('"') == self.object_name());
        let choices = chunk.choices.as_ref()?;
        if !object
            || !is_non_empty_string(chunk.id)
            || !is_count(chunk.created)
            || self.reasoning_splitter.is_some()
        {
            return None;
        }
        let mut edits = TextEdits::default();
        let (model, id, created) = (chunk.model?.get(), chunk.id?.get(), chunk.created?.get());
        if model != self.model_json {
            edits.replace(data, model, &*self.model_json);
        }
        keep_first_value(&mut self.id, id, data, &mut edits);
        keep_first_value(&mut self.created, created, data, &mut edits);
        if !choices.iter().all(|choice| self.is_correct_choice(choice)) {
            return None;
        }
        if let Some(usage) = chunk.usage {
            let (usage, whole) = serde_json::from_str::<RawUsage>(usage.get()).ok()?.usage(self.kind);
            if !whole || (self.usage_chunk_requested && !choices.is_empty()) {
                return None;
            }
            self.usage = Some(usage);
        }
        for choice in choices {
            self.begun_choices |= 1 << choice.index?.min(63);
            self.has_finish_reason |= matches!(choice.finish_reason, Some(Some(_)));
            // An empty delta or text ends a choice and is not a token.
            let written = choice.delta.or(choice.text).is_some_and(|part| part.get().len() > 2);
            self.text_events += u64::from(written);
        }
        if let [choice] = choices.as_slice()
            && choice.finish_reason == Some(None)
            && chunk.usage.is_none()
            && let Some(text) = token_text(choice)
        {
            let start = text.as_ptr() as usize - data.as_ptr() as usize;
            self.template_cache.store(data, &(start..start + text.len()), &edits);
        }
        Some(edits)
    }

    fn is_correct_choice(&self, choice: &Choice<'_>) -> bool {
        let reason = match &choice.finish_reason {
            Some(None) => true,
            Some(Some(reason)) => super::FINISH_REASONS.contains(&&**reason),
            None => false,
        };
        let Some(index) = choice.index else { return false };
        let body = match self.kind {
            EndpointKind::Chat => choice.delta.is_some_and(|delta| {
                let delta = delta.get();
                let begins = self.begun_choices & (1 << index.min(63)) == 0;
                if text_only_delta(delta).is_some() {
                    return !begins;
                }
                let has = |text: &str| memchr::memmem::find(delta.as_bytes(), text.as_bytes()).is_some();
                delta.starts_with('{')
                    && (!begins || has("\"role\":\"assistant\"") || has("\"role\": \"assistant\""))
                    && !has("\"role\":\"\"")
                    && !has("\"tool_calls\"")
                    && !has("\"content\":[")
            }),
            _ => choice.text.is_some_and(|text| text.get().starts_with('"')),
        };
        reason && body
    }

    /// Rebuilds a chunk that has more errors than the model name.
    fn rebuild(&mut self, data: &[u8]) -> NormalizedEvent {
        // The event has unpaired surrogates or similar. Lenient clients can read it, `Value` cannot hold it.
        let Ok(Value::Object(mut chunk)) = serde_json::from_slice::<Value>(data) else {
            return NormalizedEvent::Unchanged;
        };
        let unquote =
            |text: &Option<String>| text.as_ref().and_then(|text| serde_json::from_str::<Value>(text).ok());
        let id = unquote(&self.id).and_then(|id| id.as_str().map(str::to_owned));
        let id = id.unwrap_or_else(|| potstill_shared::id::unique_id("chatcmpl"));
        let created = unquote(&self.created).and_then(|at| at.as_u64()).unwrap_or_else(unix_time_s);
        super::normalize_common_fields(&mut chunk, self.object_name(), &id, created, &self.model);
        if self.id.is_some() {
            chunk.insert("id".into(), id.into());
            chunk.insert("created".into(), created.into());
        } else {
            self.id = chunk.get("id").map(Value::to_string);
            self.created = chunk.get("created").map(Value::to_string);
        }
        let mut choices = match chunk.remove("choices") {
            Some(Value::Array(choices)) => choices,
            _ => Vec::new(),
        };
        for (at, choice) in choices.iter_mut().enumerate() {
            self.normalize_choice(at, choice);
        }
        let mut usage = None;
        if let Some(counts) = chunk.get_mut("usage").and_then(Value::as_object_mut) {
            normalize_usage(counts, self.kind);
            let count = |name: &str| counts.get(name).and_then(Value::as_u64).unwrap_or(0);
            self.usage = Some(Usage::new(count("prompt_tokens"), count("completion_tokens")));
            if self.usage_chunk_requested && !choices.is_empty() {
                usage = chunk.insert("usage".into(), Value::Null);
            }
        }
        let mut lines = Vec::new();
        for part in self.split_reasoning(choices) {
            chunk.insert("choices".into(), Value::Array(part));
            lines.push(serde_json::to_vec(&chunk).unwrap_or_default());
        }
        // Clients expect the usage in a separate chunk after the last text.
        if let Some(usage) = usage.filter(|_| self.has_finish_reason) {
            chunk.insert("choices".into(), json!([]));
            chunk.insert("usage".into(), usage);
            lines.push(serde_json::to_vec(&chunk).unwrap_or_default());
        }
        NormalizedEvent::Changed(lines)
    }

    fn normalize_choice(&mut self, at: usize, choice: &mut Value) {
        let Some(choice) = choice.as_object_mut() else { return };
        let index = choice.get("index").and_then(Value::as_u64).unwrap_or(at as u64);
        choice.insert("index".into(), index.into());
        let reason = match choice.get("finish_reason") {
            Some(Value::String(word)) if !word.is_empty() => normalize_finish_reason(word).into(),
            Some(Value::Object(word)) => {
                normalize_finish_reason(word.get("type").and_then(Value::as_str).unwrap_or("")).into()
            }
            _ => Value::Null,
        };
        self.has_finish_reason |= reason.is_string();
        choice.insert("finish_reason".into(), reason);
        let written = match (choice.get("delta"), choice.get("text")) {
            (Some(Value::Object(delta)), _) => !delta.is_empty(),
            (_, Some(Value::String(text))) => !text.is_empty(),
            _ => false,
        };
        self.text_events += u64::from(written);
        if self.kind != EndpointKind::Chat {
            choice.entry("text").or_insert_with(|| "".into());
            return;
        }
        if !choice.get("delta").is_some_and(Value::is_object) {
            choice.insert("delta".into(), json!({}));
        }
        let Some(delta) = choice.get_mut("delta").and_then(Value::as_object_mut) else { return };
        let begins = self.begun_choices & (1 << index.min(63)) == 0;
        self.begun_choices |= 1 << index.min(63);
        if begins {
            delta.insert("role".into(), "assistant".into());
        } else if delta.get("role").and_then(Value::as_str) == Some("") {
            delta.remove("role");
        }
        normalize_content(delta);
        if let Some(calls) = delta.get_mut("tool_calls") {
            normalize_tool_calls(calls, true);
        }
    }

    /// Splits reasoning from content. Text that ends the reasoning and begins the content becomes two chunks.
    fn split_reasoning(&mut self, choices: Vec<Value>) -> Vec<Vec<Value>> {
        match &mut self.reasoning_splitter {
            None => vec![choices],
            Some(split) => split.split_choices(choices),
        }
    }
}

/// Returns the raw text of the choice, if its delta has no other member.
fn token_text<'a>(choice: &Choice<'a>) -> Option<&'a str> {
    match choice.delta {
        Some(delta) => text_only_delta(delta.get()),
        None => unquote(choice.text?.get()),
    }
}

/// Gives a field the value that it had in the first chunk.
fn keep_first_value(first: &mut Option<String>, now: &str, data: &[u8], edits: &mut TextEdits) {
    match first {
        None => *first = Some(now.to_owned()),
        Some(first) if first == now => {}
        Some(first) => edits.replace(data, now, first.as_str()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn normalize() -> ChunkNormalizer {
        ChunkNormalizer::new(EndpointKind::Chat, "m".into(), true, Reasoning::Pass)
    }

    fn changed(verdict: NormalizedEvent) -> Vec<Value> {
        let NormalizedEvent::Changed(lines) = verdict else { panic!("{verdict:?}") };
        lines.iter().map(|line| serde_json::from_slice(line).unwrap()).collect()
    }

    #[test]
    fn forwards_correct_chunks_and_replaces_names_in_place() {
        let mut normalize = normalize();
        let first = br#"{"id":"a","object":"chat.completion.chunk","created":5,"model":"m","choices":[{"index":0,"delta":{"role":"assistant","content":"x"},"finish_reason":null}],"extra":[1]}"#;
        assert_eq!(normalize.normalize_event(first), NormalizedEvent::Unchanged);
        let other = br#"{"id":"b","object":"chat.completion.chunk","created":6,"model":"/weights/x","choices":[{"index":0,"delta":{"content":"\ud83d"},"finish_reason":"stop"}],"extra":[1]}"#;
        let NormalizedEvent::Changed(lines) = normalize.normalize_event(other) else { panic!() };
        let expected = br#"{"id":"a","object":"chat.completion.chunk","created":5,"model":"m","choices":[{"index":0,"delta":{"content":"\ud83d"},"finish_reason":"stop"}],"extra":[1]}"#;
        assert_eq!(lines, [expected.to_vec()], "not a byte more, not even of a lone surrogate");
        assert!(normalize.has_finish_reason);
        let end = br#"{"id":"a","object":"chat.completion.chunk","created":5,"model":"m","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}"#;
        assert_eq!(
            (normalize.normalize_event(end), normalize.text_events),
            (NormalizedEvent::Unchanged, 2),
            "the empty end is no token"
        );
        assert_eq!(normalize.normalize_event(b"[DONE]"), NormalizedEvent::Done);
        assert_eq!(normalize.normalize_event(b"<html>"), NormalizedEvent::Invalid("an event is not JSON"));
    }

    #[test]
    fn adds_missing_fields() {
        let mut normalize = normalize();
        let lines = changed(normalize.normalize_event(
            br#"{"created":1.5,"model":"x","choices":[{"delta":{"content":"a","tool_calls":[{"function":{"name":"f","arguments":{"a":1}}}]}}],"own":1}"#,
        ));
        let chunk = &lines[0];
        assert_eq!(
            (chunk["object"].as_str(), chunk["created"].as_u64()),
            (Some("chat.completion.chunk"), Some(1))
        );
        assert_eq!((chunk["own"].as_u64(), chunk["choices"][0]["index"].as_u64()), (Some(1), Some(0)));
        assert!(
            chunk["choices"][0]["finish_reason"].is_null()
                && chunk["choices"][0].get("finish_reason").is_some()
        );
        let delta = &chunk["choices"][0]["delta"];
        assert_eq!(delta["role"], "assistant");
        assert_eq!(delta["tool_calls"][0]["function"]["arguments"], "{\"a\":1}");
        assert_eq!(delta["tool_calls"][0]["index"], 0);
        assert!(delta["tool_calls"][0]["id"].is_string());
    }

    #[test]
    fn moves_usage_to_a_last_chunk() {
        let mut normalize = normalize();
        let lines = changed(normalize.normalize_event(
            br#"{"id":"a","object":"chat.completion.chunk","created":5,"model":"m","choices":[{"index":0,"delta":{},"finish_reason":"eos"}],"usage":{"prompt_tokens":3,"completion_tokens":4,"completion_tokens_details":{"reasoning_tokens":2}}}"#,
        ));
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0]["choices"][0]["finish_reason"], "stop");
        assert!(lines[0]["usage"].is_null());
        assert_eq!((&lines[1]["choices"], lines[1]["usage"]["total_tokens"].as_u64()), (&json!([]), Some(7)));
        assert_eq!(lines[1]["usage"]["completion_tokens_details"]["reasoning_tokens"], 2);
        assert_eq!(normalize.usage, Some(Usage::new(3, 4)));
        let mut bare = ChunkNormalizer::new(EndpointKind::Chat, "m".into(), true, Reasoning::Pass);
        let lines = changed(
            bare.normalize_event(br#"{"usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}}"#),
        );
        assert_eq!(lines[0]["choices"], json!([]));
    }

    #[test]
    fn detects_an_error_event() {
        let verdict = normalize().normalize_event(br#"{"error":{"message":"CUDA","code":500}}"#);
        let NormalizedEvent::Error(line) = verdict else { panic!("{verdict:?}") };
        let body: Value = serde_json::from_slice(&line).unwrap();
        assert_eq!((body["error"]["message"].as_str(), &body["error"]["code"]), (Some("CUDA"), &Value::Null));
    }

    fn event() -> impl Strategy<Value = String> {
        let delta = prop::sample::select(vec![
            r#"{"role":"assistant","content":""}"#,
            r#"{"content":"a"}"#,
            r#"{"content":"\n\"b\u00e4"}"#,
            r#"{"content": "\ud83d"}"#,
            r#"{"content":""}"#,
            r#"{"content":"tool_calls"}"#,
            r#"{"content":"\q"}"#,
            r#"{"content":["x"]}"#,
            r#"{"reasoning_content":"t"}"#,
            r#"{"content":"a","tool_calls":[]}"#,
            r#"{"content":null}"#,
            "{}",
        ]);
        let model = prop::sample::select(vec!["m", "/weights/m"]);
        let end = prop::sample::select(vec!["null", "null", "null", r#""stop""#, r#""eos""#]);
        let usage = prop::sample::select(vec![
            "",
            r#","usage":null"#,
            r#","usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3}"#,
        ]);
        (delta, model, end, usage, 0..2, 5..7).prop_map(|(delta, model, end, usage, index, created)| {
            format!(
                r#"{{"id":"a","object":"chat.completion.chunk","created":{created},"model":"{model}","choices":[{{"index":{index},"delta":{delta},"finish_reason":{end}}}]{usage}}}"#
            )
        })
    }

    proptest! {
        #[test]
        fn cache_does_not_change_text_completions(texts in prop::collection::vec("[a-c\\\\n]{0,2}", 0..9)) {
            let new = || ChunkNormalizer::new(EndpointKind::Text, "m".into(), true, Reasoning::Pass);
            let (mut quick, mut plain) = (new(), new());
            for text in texts {
                let data = format!(
                    r#"{{"id":"a","object":"text_completion","created":5,"model":"m","choices":[{{"index":0,"text":"{text}","finish_reason":null}}]}}"#
                );
                plain.template_cache = ChunkTemplateCache::default();
                prop_assert_eq!(quick.normalize_event(data.as_bytes()), plain.normalize_event(data.as_bytes()), "{}", data);
                prop_assert_eq!(quick.text_events, plain.text_events);
            }
        }

        #[test]
        fn cache_does_not_change_chat_chunks(events in prop::collection::vec((event(), 1usize..4), 0..12)) {
            let (mut quick, mut plain) = (normalize(), normalize());
            for data in events.iter().flat_map(|(event, times)| std::iter::repeat_n(event, *times)) {
                plain.template_cache = ChunkTemplateCache::default();
                prop_assert_eq!(quick.normalize_event(data.as_bytes()), plain.normalize_event(data.as_bytes()), "{}", data);
                prop_assert_eq!((quick.text_events, quick.has_finish_reason, quick.usage), (plain.text_events, plain.has_finish_reason, plain.usage));
            }
        }
    }
}
