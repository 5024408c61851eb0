//! The OpenAI wire format as both halves speak it. Every type keeps the fields it does not know in `extra`, so that a
//! gateway in front of a gateway loses nothing.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Fields that this version does not name.
pub type Extra = Map<String, Value>;

/// `POST /v1/chat/completions`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ChatRequest {
    /// Name of the model, routed to a pool.
    pub model: String,
    /// The conversation, oldest first.
    pub messages: Vec<ChatMessage>,
    /// Sampling and limits, shared with the completions endpoint.
    #[serde(flatten)]
    pub options: GenerationOptions,
    /// Everything else.
    #[serde(flatten)]
    pub extra: Extra,
}

/// `POST /v1/completions`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct CompletionRequest {
    /// Name of the model.
    pub model: String,
    /// Text, list of texts, token ids, or list of token-id lists.
    pub prompt: Prompt,
    /// Repeat the prompt in the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub echo: Option<bool>,
    /// Sampling and limits.
    #[serde(flatten)]
    pub options: GenerationOptions,
    /// Everything else.
    #[serde(flatten)]
    pub extra: Extra,
}

/// The four shapes of a completion prompt.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Prompt {
    /// One text.
    Text(String),
    /// Several texts, one choice each.
    Texts(Vec<String>),
    /// One prompt as token ids.
    Tokens(Vec<u32>),
    /// Several prompts as token ids.
    TokenLists(Vec<Vec<u32>>),
}

impl Default for Prompt {
    fn default() -> Self {
        Self::Text(String::new())
    }
}

/// Sampling parameters and limits that both generation endpoints take. All are optional on the wire.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct GenerationOptions {
    /// Relay tokens as they come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream: Option<bool>,
    /// What a stream should carry besides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream_options: Option<StreamOptions>,
    /// At most so many new tokens (older name).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u32>,
    /// At most so many new tokens (newer name, wins over `max_tokens`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_completion_tokens: Option<u32>,
    /// Sampling temperature; 0 is greedy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// Nucleus sampling.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f64>,
    /// Keep the k most likely tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_k: Option<i64>,
    /// Keep tokens at least this fraction as likely as the best.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f64>,
    /// Divides (or multiplies) the logits of tokens seen before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repetition_penalty: Option<f64>,
    /// Subtracted once from the logits of tokens generated before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub presence_penalty: Option<f64>,
    /// Subtracted per occurrence from the logits of tokens generated before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frequency_penalty: Option<f64>,
    /// Seed of the sampler.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<i64>,
    /// Strings that end the completion.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop: Option<Stop>,
    /// How many choices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub n: Option<u32>,
}

impl GenerationOptions {
    /// The limit on new tokens that the client asked for, under either name.
    pub fn token_limit(&self) -> Option<u32> {
        self.max_completion_tokens.or(self.max_tokens)
    }

    /// Whether the answer is to be streamed.
    pub fn streamed(&self) -> bool {
        self.stream.unwrap_or(false)
    }
}

/// One stop string or several.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Stop {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

impl Stop {
    /// As a list.
    pub fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(text) => vec![text],
            Self::Many(texts) => texts,
        }
    }
}

/// What a stream should carry besides the text.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct StreamOptions {
    /// A last chunk with `usage` and no choices.
    #[serde(default)]
    pub include_usage: bool,
    /// Everything else.
    #[serde(flatten)]
    pub extra: Extra,
}

/// One message of a conversation.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// Text, a list of parts, or null.
    #[serde(default)]
    pub content: Option<Content>,
    /// The thinking, apart from the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    /// The same under the name that newer engines use; some send both.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<String>,
    /// Everything else (tool calls, name, …).
    #[serde(flatten)]
    pub extra: Extra,
}

impl ChatMessage {
    /// A message of plain text.
    pub fn text(role: &str, content: impl Into<String>) -> Self {
        Self { role: role.to_owned(), content: Some(Content::Text(content.into())), ..Self::default() }
    }

    /// The thinking, under whichever name it came.
    pub fn thinking(&self) -> Option<&str> {
        self.reasoning_content.as_deref().or(self.reasoning.as_deref())
    }

    /// All text of the message, parts joined.
    pub fn plain(&self) -> String {
        match &self.content {
            None => String::new(),
            Some(Content::Text(text)) => text.clone(),
            Some(Content::Parts(parts)) => {
                parts.iter().filter_map(|part| part.get("text").and_then(Value::as_str)).collect()
            }
        }
    }
}

/// Message content: text or typed parts.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Content {
    /// Plain text.
    Text(String),
    /// Parts such as `{"type": "text", "text": …}`.
    Parts(Vec<Value>),
}

/// Answer of the chat endpoint, whole or one chunk of a stream.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ChatResponse {
    /// Id of the completion.
    #[serde(default)]
    pub id: String,
    /// `chat.completion` or `chat.completion.chunk`.
    #[serde(default)]
    pub object: String,
    /// Seconds since 1970.
    #[serde(default)]
    pub created: u64,
    /// The model that answered.
    #[serde(default)]
    pub model: String,
    /// The choices; empty in the usage chunk of a stream.
    #[serde(default)]
    pub choices: Vec<ChatChoice>,
    /// Token counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    /// Everything else.
    #[serde(flatten)]
    pub extra: Extra,
}

/// One choice of a chat answer; `message` in a whole answer, `delta` in a chunk.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ChatChoice {
    /// Index among the choices.
    #[serde(default)]
    pub index: u32,
    /// The message of a whole answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<ChatMessage>,
    /// The piece that a chunk adds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delta: Option<Delta>,
    /// Why the choice ended; null while it goes on.
    #[serde(default)]
    pub finish_reason: Option<String>,
    /// Everything else.
    #[serde(flatten)]
    pub extra: Extra,
}

/// What a chunk adds to its choice.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Delta {
    /// Only in the first chunk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<String>,
    /// More of the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// More of the thinking.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    /// The same under the name that newer engines use; some send both.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<String>,
    /// Everything else.
    #[serde(flatten)]
    pub extra: Extra,
}

impl Delta {
    /// The thinking, under whichever name it came.
    pub fn thinking(&self) -> Option<&str> {
        self.reasoning_content.as_deref().or(self.reasoning.as_deref())
    }
}

/// Token counts of one request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of the prompt.
    #[serde(default)]
    pub prompt_tokens: u64,
    /// Tokens written.
    #[serde(default)]
    pub completion_tokens: u64,
    /// Their sum.
    #[serde(default)]
    pub total_tokens: u64,
    /// More about the prompt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_tokens_details: Option<PromptTokens>,
}

/// What is known about a prompt's tokens besides their number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptTokens {
    /// Those that did not have to be computed.
    #[serde(default)]
    pub cached_tokens: u64,
}

impl Usage {
    /// Counts with their sum.
    pub fn new(prompt_tokens: u64, completion_tokens: u64) -> Self {
        let total_tokens = prompt_tokens + completion_tokens;
        Self { prompt_tokens, completion_tokens, total_tokens, prompt_tokens_details: None }
    }

    /// The same with the prompt's tokens that did not have to be computed.
    pub fn with_cached(self, cached_tokens: u64) -> Self {
        Self { prompt_tokens_details: Some(PromptTokens { cached_tokens }), ..self }
    }
}

/// Answer of the completions endpoint, whole or a chunk.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct CompletionResponse {
    /// Id of the completion.
    pub id: String,
    /// Always `text_completion`.
    pub object: String,
    /// Seconds since 1970.
    pub created: u64,
    /// The model that answered.
    pub model: String,
    /// The choices.
    pub choices: Vec<CompletionChoice>,
    /// Token counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
}

/// One choice of a text completion.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct CompletionChoice {
    /// Index among the choices.
    pub index: u32,
    /// The text, or the piece that a chunk adds.
    pub text: String,
    /// Log-probabilities of the tokens, where they were asked for.
    pub logprobs: Option<Value>,
    /// Why the choice ended.
    pub finish_reason: Option<String>,
}

/// `GET /v1/models`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ModelList {
    /// Always `list`.
    pub object: String,
    /// The models.
    pub data: Vec<ModelCard>,
}

impl ModelList {
    /// Wraps the models.
    pub fn new(data: Vec<ModelCard>) -> Self {
        Self { object: "list".to_owned(), data }
    }
}

/// One model in a list.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ModelCard {
    /// Its name.
    pub id: String,
    /// Always `model`.
    pub object: String,
    /// Seconds since 1970.
    pub created: u64,
    /// Who serves it.
    pub owned_by: String,
    /// Everything else.
    #[serde(flatten)]
    pub extra: Extra,
}

impl ModelCard {
    /// A model of that name.
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

/// The only error body that any of our servers sends.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The error.
    pub error: ErrorDetail,
}

/// What went wrong. `code` is a string or null, never a number: typed clients fail on numbers.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ErrorDetail {
    /// For people.
    pub message: String,
    /// OpenAI's class of error, such as `invalid_request_error`.
    #[serde(rename = "type", default)]
    pub kind: String,
    /// The request field at fault.
    #[serde(default)]
    pub param: Option<String>,
    /// For programs, such as `model_not_found`.
    #[serde(default)]
    pub code: Option<Value>,
}

impl ErrorBody {
    /// An error body.
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

    /// As JSON text.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }
}

/// Seconds since 1970, for `created`.
pub fn now_seconds() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_fields_survive() {
        let text = r#"{"model":"m","messages":[{"role":"user","content":"hi","name":"bob"}],"top_k":3,"chat_template_kwargs":{"enable_thinking":true},"guided_json":{}}"#;
        let request: ChatRequest = serde_json::from_str(text).unwrap();
        let again: Value = serde_json::to_value(&request).unwrap();
        assert_eq!(again["chat_template_kwargs"]["enable_thinking"], true);
        assert_eq!(again["messages"][0]["name"], "bob");
        assert_eq!(again["top_k"], 3);
        assert!(again.get("temperature").is_none(), "nothing is added");
    }

    #[test]
    fn both_names_of_the_thinking_may_come_together() {
        let delta: Delta = serde_json::from_str(r#"{"reasoning":"a","reasoning_content":null}"#).unwrap();
        assert_eq!(delta.thinking(), Some("a"));
        let delta: Delta = serde_json::from_str(r#"{"reasoning":"a","reasoning_content":"a"}"#).unwrap();
        assert_eq!(delta.thinking(), Some("a"));
    }

    #[test]
    fn content_parts_are_joined() {
        let message: ChatMessage = serde_json::from_str(
            r#"{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]}"#,
        )
        .unwrap();
        assert_eq!(message.plain(), "ab");
    }
}
