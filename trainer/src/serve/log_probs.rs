//! Logprobs in OpenAI's two forms: for chat and for text completions. The engine computes the values.

use potstill_engine::scheduler::TokenLogprobs;
use potstill_engine::tokenizer::Tokenizer;
use serde_json::{Map, Value, json};

/// Returns one entry of `logprobs.content` of a chat choice.
pub(super) fn chat_entry(tokenizer: &Tokenizer, sampled: &TokenLogprobs) -> Value {
    let one = |token: u32, log_prob: f32| {
        let bytes = tokenizer.token_bytes(token);
        json!({"token": String::from_utf8_lossy(&bytes), "logprob": log_prob, "bytes": bytes})
    };
    let mut entry = one(sampled.token, sampled.log_prob);
    entry["top_logprobs"] = sampled.top.iter().map(|(token, log_prob)| one(*token, *log_prob)).collect();
    entry
}

/// Returns `logprobs` of a chat choice.
pub(super) fn chat_logprobs(entries: Vec<Value>) -> Value {
    json!({"content": entries, "refusal": null})
}

/// Logprobs of a text completion under construction.
#[derive(Debug, Default)]
pub(super) struct TextLogprobs {
    tokens: Vec<Value>,
    log_probs: Vec<Value>,
    top: Vec<Value>,
    offsets: Vec<usize>,
    /// Offset of the next token in characters.
    offset: usize,
    /// Whether tokens are named by id.
    by_id: bool,
}

impl TextLogprobs {
    /// Creates an empty list.
    pub(super) fn new(by_id: bool) -> Self {
        Self { by_id, ..Self::default() }
    }

    /// Returns the name of a token: its text, with replacement characters for incomplete characters, or its id.
    fn token_name(&self, tokenizer: &Tokenizer, token: u32) -> String {
        match self.by_id {
            true => format!("token_id:{token}"),
            false => String::from_utf8_lossy(&tokenizer.token_bytes(token)).into_owned(),
        }
    }

    /// Adds the first token of an echoed prompt. It has no predecessor and so no log probability.
    pub(super) fn push_first(&mut self, tokenizer: &Tokenizer, token: u32) {
        self.push_token(tokenizer, token);
        self.log_probs.push(Value::Null);
        self.top.push(Value::Null);
    }

    /// Adds a token with its log probability and alternatives.
    pub(super) fn push(&mut self, tokenizer: &Tokenizer, sampled: &TokenLogprobs) {
        self.push_token(tokenizer, sampled.token);
        self.log_probs.push(json!(sampled.log_prob));
        let mut top: Map<String, Value> = Map::new();
        for (token, log_prob) in sampled.top.iter().chain([&(sampled.token, sampled.log_prob)]) {
            // Among tokens with equal names, the most likely one is kept.
            top.entry(self.token_name(tokenizer, *token)).or_insert_with(|| json!(log_prob));
        }
        self.top.push(Value::Object(top));
    }

    fn push_token(&mut self, tokenizer: &Tokenizer, token: u32) {
        self.offsets.push(self.offset);
        self.offset += String::from_utf8_lossy(&tokenizer.token_bytes(token)).chars().count();
        self.tokens.push(Value::String(self.token_name(tokenizer, token)));
    }

    /// Returns the entries since the last call, or `None` if there are none.
    pub(super) fn drain(&mut self) -> Option<Value> {
        if self.tokens.is_empty() {
            return None;
        }
        let take = std::mem::take::<Vec<Value>>;
        Some(json!({
            "tokens": take(&mut self.tokens),
            "token_logprobs": take(&mut self.log_probs),
            "top_logprobs": take(&mut self.top),
            "text_offset": std::mem::take(&mut self.offsets),
        }))
    }
}
