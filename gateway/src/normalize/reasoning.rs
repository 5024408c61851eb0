//! Moves reasoning that a model writes into its completion (`<think> … </think>`) to `reasoning_content`. Applies to
//! streams and whole responses of pools with `reasoning = "split"` or `"split_open"`.

use std::collections::BTreeMap;

use potstill_shared::reasoning::{Piece, ReasoningSplitter, split_reasoning};
use serde_json::{Map, Value};

/// Splits one stream, with one splitter per choice.
#[derive(Debug)]
pub struct StreamReasoningSplitter {
    open: bool,
    choices: BTreeMap<u64, ReasoningSplitter>,
}

impl StreamReasoningSplitter {
    /// Creates a splitter. `open`: the prompt has already opened the tag, so the completion begins inside the
    /// reasoning.
    pub fn new(open: bool) -> Self {
        Self { open, choices: BTreeMap::new() }
    }

    /// Splits the choices of a chunk. Returns the choices of each chunk that replaces it.
    pub fn split_choices(&mut self, choices: Vec<Value>) -> Vec<Vec<Value>> {
        if choices.is_empty() {
            return vec![choices];
        }
        choices.into_iter().flat_map(|choice| self.split_choice(choice)).map(|choice| vec![choice]).collect()
    }

    fn split_choice(&mut self, mut choice: Value) -> Vec<Value> {
        let index = choice.get("index").and_then(Value::as_u64).unwrap_or(0);
        let ends = choice.get("finish_reason").is_some_and(Value::is_string);
        let text = match choice.get_mut("delta").and_then(Value::as_object_mut) {
            // A node that separates the reasoning itself is left alone.
            Some(delta) if !delta.contains_key("reasoning_content") && !delta.contains_key("reasoning") => {
                match delta.get("content") {
                    Some(Value::String(text)) => text.clone(),
                    _ if ends => String::new(),
                    _ => return vec![choice],
                }
            }
            _ => return vec![choice],
        };
        let open = self.open;
        let splitter = self.choices.entry(index).or_insert_with(|| ReasoningSplitter::new(open));
        let mut pieces = splitter.push(&text);
        if ends {
            pieces.extend(splitter.finish());
        }
        let count = pieces.len();
        let mut out = Vec::with_capacity(count.max(1));
        let place = |choice: &mut Value, piece: Option<Piece>| {
            let Some(delta) = choice.get_mut("delta").and_then(Value::as_object_mut) else { return };
            delta.remove("content");
            match piece {
                Some(Piece::Reasoning(text)) => delta.insert("reasoning_content".into(), text.into()),
                Some(Piece::Answer(text)) => delta.insert("content".into(), text.into()),
                None => None,
            };
        };
        for (at, piece) in pieces.into_iter().enumerate() {
            let mut part = choice.clone();
            if let Some(part) = part.as_object_mut() {
                if at + 1 < count {
                    part.insert("finish_reason".into(), Value::Null);
                }
                if at > 0
                    && let Some(delta) = part.get_mut("delta").and_then(Value::as_object_mut)
                {
                    delta.remove("role");
                }
            }
            place(&mut part, Some(piece));
            out.push(part);
        }
        if out.is_empty() {
            // The text is empty or held back; role and finish reason are forwarded.
            place(&mut choice, None);
            out.push(choice);
        }
        out
    }
}

/// Splits the message of a whole response. If the tag is never closed, all text is reasoning and the content is empty.
pub fn split_message(message: &mut Map<String, Value>, open: bool) {
    if message.contains_key("reasoning_content") || message.contains_key("reasoning") {
        return;
    }
    let Some(Value::String(text)) = message.get("content") else { return };
    let begins = open || text.trim_start().starts_with(potstill_shared::reasoning::OPEN_TAG);
    let (thinking, answer) = match split_reasoning(text, open) {
        (Some(thinking), answer) => (thinking, answer),
        (None, _) if begins => {
            let text = text.trim_start().trim_start_matches(potstill_shared::reasoning::OPEN_TAG);
            (text.trim().to_owned(), String::new())
        }
        (None, _) => return,
    };
    message.insert("reasoning_content".into(), thinking.into());
    message.insert("content".into(), answer.into());
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn splits_a_stream_at_a_tag_across_chunks() {
        let mut split = StreamReasoningSplitter::new(true);
        let mut thinking = String::new();
        let mut answer = String::new();
        let pieces = ["so ", "it is 4</th", "ink>It", " is 4"];
        for (at, text) in pieces.iter().enumerate() {
            let reason = if at == 3 { json!("stop") } else { Value::Null };
            let chunk = json!({"index": 0, "delta": {"content": text}, "finish_reason": reason});
            for choices in split.split_choices(vec![chunk]) {
                let delta = &choices[0]["delta"];
                thinking += delta["reasoning_content"].as_str().unwrap_or("");
                answer += delta["content"].as_str().unwrap_or("");
            }
        }
        assert_eq!((thinking.as_str(), answer.as_str()), ("so it is 4", "It is 4"));
    }

    #[test]
    fn splits_whole_messages() {
        let split = |text: &str, open| {
            let mut message_ = Map::from_iter([("content".to_owned(), Value::from(text))]);
            split_message(&mut message_, open);
            (message_.get("reasoning_content").cloned(), message_["content"].clone())
        };
        assert_eq!(split("<think>a</think>b", false), (Some("a".into()), "b".into()));
        assert_eq!(split("a</think>b", true), (Some("a".into()), "b".into()));
        assert_eq!(split("just b", false), (None, "just b".into()));
        assert_eq!(split("cut off", true), (Some("cut off".into()), "".into()));
    }
}
