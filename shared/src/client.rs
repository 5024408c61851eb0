//! HTTP client of the trainer for one OpenAI-compatible endpoint.
//!
//! A streamed response is complete only after a finish reason and `[DONE]`; any other end of the stream is an
//! error. The client never retries. [`CallError`] tells the caller whether a retry makes sense and after
//! which delay; the caller owns the retry budget.

pub mod prompt_logprobs;

use std::time::Duration;

use futures_util::StreamExt;

use crate::openai::{ChatRequest, ChatResponse, ErrorBody, ModelList, StreamOptions, Usage};
use crate::redact::Secret;
use crate::repetition::repeated_passage_bytes;
use crate::sse::SseDecoder;

/// Address, credential and timeouts of an endpoint.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// Base URL, which ends in `/v1`.
    pub url: String,
    /// API key, sent as a bearer token.
    pub api_key: Option<Secret<String>>,
    /// Timeout for establishing a connection.
    pub connect_timeout: Duration,
    /// Longest silence of the endpoint, before the first byte and between two reads.
    pub idle_timeout: Duration,
    /// Timeout for a whole call, from the request to the last byte of the response.
    pub total_timeout: Duration,
}

impl Endpoint {
    /// Returns an endpoint without a key and with the default timeouts: 10 s to connect, 10 min idle, 1 h in
    /// total.
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: url.into().trim_end_matches('/').to_owned(),
            api_key: None,
            connect_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(600),
            total_timeout: Duration::from_secs(3600),
        }
    }
}

/// Finish reason of a completion that repeats one passage without end (see [`loops`]).
///
/// The client stops reading such a stream, so the endpoint never reports its usage. The client then counts
/// one completion token per chunk and one prompt token per four bytes.
pub const REPETITION_LOOP: &str = "loop";
/// Bytes of completion between two searches for a repetition loop.
const LOOP_CHECK_INTERVAL_BYTES: usize = 2048;

/// A complete response to a chat request.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Completion {
    /// Text of the answer.
    pub content: String,
    /// Reasoning, if the endpoint returns a separate field.
    pub reasoning: Option<String>,
    /// Finish reason: `stop`, `length`, another value of the endpoint, or [`LOOP`].
    pub finish_reason: String,
    /// Token counts.
    pub usage: Usage,
}

/// Reason for which a call failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The failure is temporary; a retry can succeed.
    #[error("{message}")]
    Temporary {
        /// Description of the failure.
        message: String,
        /// Delay from the `Retry-After` header (RFC 9110, section 10.2.3), read as seconds; a date is
        /// ignored.
        retry_after: Option<Duration>,
        /// True if the endpoint is overloaded (status 429, 503 or 529).
        is_overloaded: bool,
    },
    /// The failure is permanent; a retry gives the same result.
    #[error("{message}")]
    Permanent {
        /// Description of the failure.
        message: String,
        /// HTTP status of the response, or 0 if the failure has none.
        status: u16,
        /// `error.code` of the response body.
        code: Option<String>,
    },
}

/// Returns a temporary error without a delay.
fn temporary_error(message: String) -> CallError {
    CallError::Temporary { message, retry_after: None, is_overloaded: false }
}

/// Client of one endpoint. A clone shares the connection pool.
#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    endpoint: Endpoint,
}

impl Client {
    /// Builds a client with the timeouts of `endpoint`.
    ///
    /// Redirects and proxies are off, because an endpoint has exactly one address.
    pub fn new(endpoint: Endpoint) -> Result<Self, CallError> {
        let http = reqwest::Client::builder()
            .connect_timeout(endpoint.connect_timeout)
            .read_timeout(endpoint.idle_timeout)
            .timeout(endpoint.total_timeout)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .pool_idle_timeout(Duration::from_secs(30))
            .build()
            .map_err(|error| CallError::Permanent {
                message: format!("cannot build the HTTP client: {error}"),
                status: 0,
                code: None,
            })?;
        Ok(Self { http, endpoint })
    }

    /// Returns the endpoint of this client.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    fn with_authorization(&self, request: reqwest::RequestBuilder) -> reqwest::RequestBuilder {
        match &self.endpoint.api_key {
            Some(key) => request.bearer_auth(key.expose_secret()),
            None => request,
        }
    }

    /// Returns the ids of the models that the endpoint lists (`GET /models`).
    pub async fn list_models(&self) -> Result<Vec<String>, CallError> {
        let url = format!("{}/models", self.endpoint.url);
        let response = self
            .with_authorization(self.http.get(&url))
            .send()
            .await
            .map_err(|e| transport_error(&url, &e))?;
        let response = check_status(response).await?;
        let list: ModelList = response.json().await.map_err(|e| transport_error(&url, &e))?;
        Ok(list.data.into_iter().map(|model| model.id).collect())
    }

    /// Registers the stages of a run with a gateway (`POST /stages` of its admin API) and returns the
    /// gateway's forecast.
    pub async fn register_plan(&self, plan: &serde_json::Value) -> Result<serde_json::Value, CallError> {
        let url = format!("{}/stages", self.endpoint.url);
        let response = self
            .with_authorization(self.http.post(&url))
            .json(plan)
            .send()
            .await
            .map_err(|e| transport_error(&url, &e))?;
        check_status(response).await?.json().await.map_err(|e| transport_error(&url, &e))
    }

    /// Sends a chat request (`POST /chat/completions`) and reads the whole response.
    ///
    /// The response is streamed if `request.options.stream` is true; usage is then requested too. `headers`
    /// are added to the request unchanged.
    pub async fn chat(
        &self,
        request: &ChatRequest,
        headers: &[(&str, &str)],
    ) -> Result<Completion, CallError> {
        let url = format!("{}/chat/completions", self.endpoint.url);
        let mut builder = self.with_authorization(self.http.post(&url));
        for (name, value) in headers {
            builder = builder.header(*name, *value);
        }
        let streamed = request.params.is_streamed();
        builder = if streamed && request.params.stream_options.is_none() {
            let mut asked = request.clone();
            asked.params.stream_options = Some(StreamOptions { include_usage: true, ..Default::default() });
            builder.json(&asked)
        } else {
            builder.json(request)
        };
        let response = builder.send().await.map_err(|error| transport_error(&url, &error))?;
        let response = check_status(response).await?;
        let mut completion =
            if streamed { read_stream(&url, response).await? } else { read_response(&url, response).await? };
        if completion.finish_reason == REPETITION_LOOP && completion.usage.prompt_tokens == 0 {
            let bytes: usize = request.messages.iter().map(|message| message.plain_text().len()).sum();
            completion.usage.prompt_tokens = bytes as u64 / 4;
        }
        Ok(completion)
    }
}

/// Returns a temporary error with the innermost cause of a transport failure.
fn transport_error(url: &str, error: &reqwest::Error) -> CallError {
    let what = if error.is_timeout() { "timed out" } else { "failed" };
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    temporary_error(format!("the call to `{url}` {what}: {cause}"))
}

/// Returns a successful response unchanged and converts any other status to an error.
///
/// The statuses 408, 409, 429, 500, 502, 503, 504 and 529 are temporary; all others are permanent.
async fn check_status(response: reqwest::Response) -> Result<reqwest::Response, CallError> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let after = response
        .headers()
        .get("retry-after")
        .and_then(|value| value.to_str().ok()?.parse().ok())
        .map(Duration::from_secs);
    let text = response.text().await.unwrap_or_default();
    let (detail, code) = match serde_json::from_str::<ErrorBody>(&text) {
        Ok(body) => (body.error.message, body.error.code.and_then(|code| code.as_str().map(str::to_owned))),
        Err(_) => (text.chars().take(200).collect(), None),
    };
    let message = format!("the endpoint answered {status}: {detail}");
    match status.as_u16() {
        status @ (408 | 409 | 429 | 500 | 502 | 503 | 504 | 529) => Err(CallError::Temporary {
            message,
            retry_after: after,
            is_overloaded: matches!(status, 429 | 503 | 529),
        }),
        status => Err(CallError::Permanent { message, status, code }),
    }
}

/// Reads a response that is not streamed.
async fn read_response(url: &str, response: reqwest::Response) -> Result<Completion, CallError> {
    let body: ChatResponse = response.json().await.map_err(|error| transport_error(url, &error))?;
    let choice = body
        .choices
        .into_iter()
        .next()
        .ok_or_else(|| temporary_error("the answer holds no choice".into()))?;
    let message = choice.message.ok_or_else(|| temporary_error("the choice holds no message".into()))?;
    let finish_reason =
        choice.finish_reason.ok_or_else(|| temporary_error("the answer has no finish reason".into()))?;
    let (content, reasoning) = (message.plain_text(), message.reasoning_text().map(str::to_owned));
    let usage = body.usage.unwrap_or_default();
    Ok(mark_repetition_loop(Completion { content, reasoning, finish_reason, usage }))
}

/// Sets the finish reason to [`LOOP`] if a completion reached its token limit in a repetition loop.
fn mark_repetition_loop(mut completion: Completion) -> Completion {
    let thought = completion.reasoning.as_deref().unwrap_or_default();
    if completion.finish_reason == "length"
        && [thought, &completion.content].iter().any(|text| repeated_passage_bytes(text).is_some())
    {
        completion.finish_reason = REPETITION_LOOP.to_owned();
    }
    completion
}

/// Reads a streamed response up to `[DONE]`, an error event, or a repetition loop.
async fn read_stream(url: &str, response: reqwest::Response) -> Result<Completion, CallError> {
    let mut decoder = SseDecoder::default();
    let mut stream = response.bytes_stream();
    let mut completion = Completion::default();
    let (mut reasoning, mut finish) = (None::<String>, None);
    let (mut looked_at, mut pieces) = (0, 0);
    while let Some(bytes) = stream.next().await {
        let bytes = bytes.map_err(|error| transport_error(url, &error))?;
        for event in decoder.push(&bytes).map_err(|error| temporary_error(error.to_string()))? {
            if event.data == "[DONE]" {
                completion.finish_reason = finish
                    .ok_or_else(|| temporary_error("the stream ended without a finish reason".into()))?;
                completion.reasoning = reasoning;
                return Ok(mark_repetition_loop(completion));
            }
            if let Ok(body) = serde_json::from_str::<ErrorBody>(&event.data) {
                return Err(temporary_error(format!("the stream broke off: {}", body.error.message)));
            }
            let chunk: ChatResponse = serde_json::from_str(&event.data)
                .map_err(|error| temporary_error(format!("the stream holds an unreadable event: {error}")))?;
            completion.usage = chunk.usage.unwrap_or(completion.usage);
            for choice in chunk.choices.into_iter().filter(|choice| choice.index == 0) {
                finish = choice.finish_reason.or(finish);
                let delta = choice.delta.unwrap_or_default();
                completion.content.push_str(delta.content.as_deref().unwrap_or_default());
                if let Some(text) = delta.reasoning_text() {
                    reasoning.get_or_insert_default().push_str(text);
                }
                pieces += 1;
            }
        }
        let thought = reasoning.as_deref().unwrap_or_default();
        let written = completion.content.len() + thought.len();
        if finish.is_none() && written >= looked_at + LOOP_CHECK_INTERVAL_BYTES {
            looked_at = written;
            // Only the text that still grows can loop: the answer if it is not empty, else the reasoning.
            if repeated_passage_bytes(if completion.content.is_empty() {
                thought
            } else {
                &completion.content
            })
            .is_some()
            {
                completion.finish_reason = REPETITION_LOOP.to_owned();
                completion.usage.completion_tokens = pieces;
                completion.reasoning = reasoning;
                return Ok(completion);
            }
        }
    }
    Err(temporary_error("the stream ended without `[DONE]`".into()))
}
