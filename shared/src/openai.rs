//! Wire types of the OpenAI API, as the gateway and the trainer use them.
//!
//! Unknown fields are kept in `extra`, so that a chain of gateways loses nothing. Deliberately absent:
//! validation, which the servers do.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Fields that this version does not know, by name.
pub type Extra = Map<String, Value>;

/// Body of `POST /v1/chat/completions`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ChatRequest {
    /// Name of the model, which selects a pool of the gateway.
    pub model: String,
    /// Messages of the conversation, oldest first.
    pub messages: Vec<ChatMessage>,
    /// Sampling parameters and limits, the same as for the completions endpoint.
    #[serde(flatten)]
    pub params: GenerationParams,
    /// Unknown fields.
    #[serde(flatten)]
    pub extra: Extra,
}

/// Body of `POST /v1/completions`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct CompletionRequest {
    /// Name of the model, which selects a pool of the gateway.
    pub model: String,
    /// One prompt or several, as text or token ids.
    pub prompt: Prompt,
    /// Whether the response repeats the prompt before the completion.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub echo: Option<bool>,
    /// Sampling parameters and limits.
    #[serde(flatten)]
    pub params: GenerationParams,
    /// Unknown fields.
    #[serde(flatten)]
    pub extra: Extra,
}

/// Prompt of the completions endpoint in one of its four JSON forms.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Prompt {
    /// One text.
    Text(String),
    /// Several texts, with one choice each.
    Texts(Vec<String>),
    /// One prompt as token ids.
    Tokens(Vec<u32>),
    /// Several prompts as token ids, with one choice each.
    TokenLists(Vec<Vec<u32>>),
}

impl Default for Prompt {
    fn default() -> Self {
        Self::Text(String::new())
    }
}

/// Sampling parameters and limits of both generation endpoints. Every field is optional on the wire.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct GenerationParams {
    /// Whether the response is a stream of chunks; false if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream: Option<bool>,
    /// Options of a streamed response.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream_options: Option<StreamOptions>,
    /// Largest number of generated tokens (older name).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u32>,
    /// Largest number of generated tokens (newer name); takes precedence over `max_tokens`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_completion_tokens: Option<u32>,
    /// Sampling temperature; 0 selects the most likely token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// Nucleus sampling: smallest set of tokens whose probabilities sum to at least this value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f64>,
    /// Number of most likely tokens that can be sampled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_k: Option<i64>,
    /// Smallest probability of a token that can be sampled, as a fraction of the most likely token's
    /// probability.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f64>,
    /// Factor for the logits of tokens in the prompt or completion: positive logits are divided, negative
    /// ones multiplied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repetition_penalty: Option<f64>,
    /// Value subtracted once from the logit of each token in the completion.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub presence_penalty: Option<f64>,
    /// Value subtracted from the logit of a token for each of its occurrences in the completion.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frequency_penalty: Option<f64>,
    /// Seed of the random numbers for sampling.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<i64>,
    /// Strings that end the completion.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop: Option<Stop>,
    /// Number of choices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub n: Option<u32>,
}

impl GenerationParams {
    /// Returns the limit on generated tokens under either name, or `None` if the request has none.
    pub fn max_new_tokens(&self) -> Option<u32> {
        self.max_completion_tokens.or(self.max_tokens)
    }

    /// Returns whether the response is a stream.
    pub fn is_streamed(&self) -> bool {
        self.stream.unwrap_or(false)
    }
}

/// Stop strings in one of their two JSON forms.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Stop {
    /// One string.
    Single(String),
    /// List of strings.
    List(Vec<String>),
}

impl Stop {
    /// Returns the stop strings as a list.
    pub fn into_vec(self) -> Vec<String> {
        match self {
            Self::Single(text) => vec![text],
            Self::List(texts) => texts,
        }
    }
}

/// Options of a streamed response.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct StreamOptions {
    /// Whether the stream ends with a chunk that has `usage` and no choices.
    #[serde(default)]
    pub include_usage: bool,
    /// Unknown fields.
    #[serde(flatten)]
    pub extra: Extra,
}

/// One message of a conversation.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ChatMessage {
    /// Author of the message: `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// Text, a list of typed parts, or null.
    #[serde(default)]
    pub content: Option<Content>,
    /// Reasoning, separate from the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    /// Reasoning under the name of newer engines; some engines send both names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<String>,
    /// Unknown fields, such as `name` and `tool_calls`.
    #[serde(flatten)]
    pub extra: Extra,
}

impl ChatMessage {
    /// Returns a message of plain text.
    pub fn from_text(role: &str, content: impl Into<String>) -> Self {
        Self { role: role.to_owned(), content: Some(Content::Text(content.into())), ..Self::default() }
    }

    /// Returns the reasoning, from `reasoning_content` or else `reasoning`.
    pub fn reasoning_text(&self) -> Option<&str> {
        self.reasoning_content.as_deref().or(self.reasoning.as_deref())
    }

    /// Returns the text of the message, with the text parts concatenated.
    pub fn plain_text(&self) -> String {
        match &self.content {
            None => String::new(),
            Some(Content::Text(text)) => text.clone(),
            Some(Content::Parts(parts)) => {
                parts.iter().filter_map(|part| part.get("text").and_then(Value::as_str)).collect()
            }
        }
    }
}

/// Content of a message in one of its two JSON forms.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Content {
    /// Plain text.
    Text(String),
    /// Typed parts, such as `{"type": "text", "text": …}`.
    Parts(Vec<Value>),
}

/// Response of the chat endpoint, or one chunk of its stream.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ChatResponse {
    /// Id of the response.
    #[serde(default)]
    pub id: String,
    /// `chat.completion` or `chat.completion.chunk`.
    #[serde(default)]
    pub object: String,
    /// Creation time in seconds since the Unix epoch.
    #[serde(default)]
    pub created: u64,
    /// Name of the model that generated the response.
    #[serde(default)]
    pub model: String,
    /// Choices; empty in the usage chunk of a stream.
    #[serde(default)]
    pub choices: Vec<ChatChoice>,
    /// Token counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    /// Unknown fields.
    #[serde(flatten)]
    pub extra: Extra,
}

/// One choice of a chat response: with `message` in a whole response, with `delta` in a chunk.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ChatChoice {
    /// Index of the choice, from 0.
    #[serde(default)]
    pub index: u32,
    /// Message of a whole response.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<ChatMessage>,
    /// Addition of a chunk to the choice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delta: Option<Delta>,
    /// Reason for the end of the choice, such as `stop` or `length`; null before the end.
    #[serde(default)]
    pub finish_reason: Option<String>,
    /// Unknown fields.
    #[serde(flatten)]
    pub extra: Extra,
}

/// Addition of a chunk to its choice.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Delta {
    /// Author, present only in the first chunk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<String>,
    /// Next piece of the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// Next piece of the reasoning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    /// Next piece of the reasoning under the name of newer engines; some engines send both names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<String>,
    /// Unknown fields.
    #[serde(flatten)]
    pub extra: Extra,
}

impl Delta {
    /// Returns the piece of reasoning, from `reasoning_content` or else `reasoning`.
    pub fn reasoning_text(&self) -> Option<&str> {
        self.reasoning_content.as_deref().or(self.reasoning.as_deref())
    }
}

/// Token counts of a request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of the prompt.
    #[serde(default)]
    pub prompt_tokens: u64,
    /// Generated tokens.
    #[serde(default)]
    pub completion_tokens: u64,
    /// Sum of prompt and generated tokens.
    #[serde(default)]
    pub total_tokens: u64,
    /// Details about the tokens of the prompt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_tokens_details: Option<PromptTokensDetails>,
}

/// Details about the tokens of a prompt.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptTokensDetails {
    /// Tokens taken from the prefix cache.
    #[serde(default)]
    pub cached_tokens: u64,
}

impl Usage {
    /// Returns the counts with their sum.
    pub fn new(prompt_tokens: u64, completion_tokens: u64) -> Self {
        let total_tokens = prompt_tokens + completion_tokens;
        Self { prompt_tokens, completion_tokens, total_tokens, prompt_tokens_details: None }
    }

    /// Returns the counts with the number of prompt tokens from the prefix cache.
    pub fn with_cached(self, cached_tokens: u64) -> Self {
        Self { prompt_tokens_details: Some(PromptTokensDetails { cached_tokens }), ..self }
    }
}

/// Response of the completions endpoint, or one chunk of its stream.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct CompletionResponse {
    /// Id of the response.
    pub id: String,
    /// Always `text_completion`.
    pub object: String,
    /// Creation time in seconds since the Unix epoch.
    pub created: u64,
    /// Name of the model that generated the response.
    pub model: String,
    /// Choices.
    pub choices: Vec<CompletionChoice>,
    /// Token counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
}

/// One choice of a text completion.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct CompletionChoice {
    /// Index of the choice, from 0.
    pub index: u32,
    /// Text of the choice, or the next piece in a chunk.
    pub text: String,
    /// Log probabilities of the tokens, if requested.
    pub logprobs: Option<Value>,
    /// Reason for the end of the choice, such as `stop` or `length`; null before the end.
    pub finish_reason: Option<String>,
}

/// Response of `GET /v1/models`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ModelList {
    /// Always `list`.
    pub object: String,
    /// Available models.
    pub data: Vec<ModelCard>,
}

impl ModelList {
    /// Returns a list of `data`.
    pub fn new(data: Vec<ModelCard>) -> Self {
        Self { object: "list".to_owned(), data }
    }
}

/// One model of a list.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ModelCard {
    /// Name of the model.
    pub id: String,
    /// Always `model`.
    pub object: String,
    /// Creation time in seconds since the Unix epoch.
    pub created: u64,
    /// Owner of the model.
    pub owned_by: String,
    /// Unknown fields.
    #[serde(flatten)]
    pub extra: Extra,
}

impl ModelCard {
    /// Returns a model without additional fields.
    pub fn new(id: &str, created: u64, owned_by: &str) -> Self {
        Self {
            id: id.to_owned(),
            object: "model".to_owned(),
            created,
            owned_by: owned_by.to_owned(),
            extra: Extra::new(),
        }
    }
}

/// Body of every error response of our servers.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The error.
    pub error: ErrorDetail,
}

/// Description of an error.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ErrorDetail {
    /// Description for people.
    pub message: String,
    /// Error type of OpenAI, such as `invalid_request_error`.
    #[serde(rename = "type", default)]
    pub kind: String,
    /// Request field that caused the error.
    #[serde(default)]
    pub param: Option<String>,
    /// Code for programs, such as `model_not_found`. Our servers send a string or null, because typed clients
    /// reject numbers.
    #[serde(default)]
    pub code: Option<Value>,
}

impl ErrorBody {
    /// Returns an error body.
    pub fn new(message: impl Into<String>, kind: &str, param: Option<&str>, code: Option<&str>) -> Self {
        Self {
            error: ErrorDetail {
                message: message.into(),
                kind: kind.to_owned(),
                param: param.map(str::to_owned),
                code: code.map(|code| Value::String(code.to_owned())),
            },
        }
    }

    /// Returns the body as JSON text.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }
}

/// Returns the current time in seconds since the Unix epoch, for the `created` fields.
pub fn unix_time_s() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_unknown_fields() {
        let text = r#"{"model":"m","messages":[{"role":"user","content":"hi","name":"bob"}],"top_k":3,"chat_template_kwargs":{"enable_thinking":true},"guided_json":{}}"#;
        let request: ChatRequest = serde_json::from_str(text).unwrap();
        let again: Value = serde_json::to_value(&request).unwrap();
        assert_eq!(again["chat_template_kwargs"]["enable_thinking"], true);
        assert_eq!(again["messages"][0]["name"], "bob");
        assert_eq!(again["top_k"], 3);
        assert!(again.get("temperature").is_none(), "nothing is added");
    }

    #[test]
    fn accepts_reasoning_under_both_names_at_once() {
        let delta: Delta = serde_json::from_str(r#"{"reasoning":"a","reasoning_content":null}"#).unwrap();
        assert_eq!(delta.reasoning_text(), Some("a"));
        let delta: Delta = serde_json::from_str(r#"{"reasoning":"a","reasoning_content":"a"}"#).unwrap();
        assert_eq!(delta.reasoning_text(), Some("a"));
    }

    #[test]
    fn joins_text_parts_of_content() {
        let message: ChatMessage = serde_json::from_str(
            r#"{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]}"#,
        )
        .unwrap();
        assert_eq!(message.plain_text(), "ab");
    }
}
