//! Log-probabilities in OpenAI's two shapes.

use potstill_engine::scheduler::Sampled;
use potstill_engine::tokenizer::Tokenizer;
use serde_json::{Map, Value, json};

/// One entry of a chat answer's `logprobs.content`.
pub(super) fn chat_entry(tokenizer: &Tokenizer, sampled: &Sampled) -> Value {
    let one = |token: u32, log_prob: f32| {
        let bytes = tokenizer.bytes(token);
        json!({"token": String::from_utf8_lossy(&bytes), "logprob": log_prob, "bytes": bytes})
    };
    let mut entry = one(sampled.token, sampled.log_prob);
    entry["top_logprobs"] = sampled.top.iter().map(|(token, log_prob)| one(*token, *log_prob)).collect();
    entry
}

/// `logprobs` of a chat choice.
pub(super) fn chat(entries: Vec<Value>) -> Value {
    json!({"content": entries, "refusal": null})
}

/// `logprobs` of a text choice as it grows.
#[derive(Debug, Default)]
pub(super) struct TextLogProbs {
    tokens: Vec<Value>,
    log_probs: Vec<Value>,
    top: Vec<Value>,
    offsets: Vec<usize>,
    /// Characters before the next token.
    offset: usize,
    /// Tokens are named by number.
    by_id: bool,
}

impl TextLogProbs {
    pub(super) fn new(by_id: bool) -> Self {
        Self { by_id, ..Self::default() }
    }

    /// Name of a token: its text, in which what is no whole character shows as replacement characters, or its number.
    fn name(&self, tokenizer: &Tokenizer, token: u32) -> String {
        match self.by_id {
            true => format!("token_id:{token}"),
            false => String::from_utf8_lossy(&tokenizer.bytes(token)).into_owned(),
        }
    }

    /// The first token of a prompt: nothing goes before it.
    pub(super) fn first(&mut self, tokenizer: &Tokenizer, token: u32) {
        self.push_token(tokenizer, token);
        self.log_probs.push(Value::Null);
        self.top.push(Value::Null);
    }

    pub(super) fn push(&mut self, tokenizer: &Tokenizer, sampled: &Sampled) {
        self.push_token(tokenizer, sampled.token);
        self.log_probs.push(json!(sampled.log_prob));
        let mut top: Map<String, Value> = Map::new();
        for (token, log_prob) in sampled.top.iter().chain([&(sampled.token, sampled.log_prob)]) {
            // Of tokens that look alike the likeliest stands.
            top.entry(self.name(tokenizer, *token)).or_insert_with(|| json!(log_prob));
        }
        self.top.push(Value::Object(top));
    }

    fn push_token(&mut self, tokenizer: &Tokenizer, token: u32) {
        self.offsets.push(self.offset);
        self.offset += String::from_utf8_lossy(&tokenizer.bytes(token)).chars().count();
        self.tokens.push(Value::String(self.name(tokenizer, token)));
    }

    /// What came since the last call; `None` if nothing did.
    pub(super) fn take(&mut self) -> Option<Value> {
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
