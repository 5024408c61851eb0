//! The HTTP client of the trainer half: one chat call with its deadlines, read to its proven end.
//!
//! A streamed answer counts as complete only when a finish reason and `[DONE]` have both come. Nothing is retried here;
//! the error says whether and when a retry makes sense, and the caller owns the budget.

mod likeliest;

use std::time::Duration;

use futures_util::StreamExt;

pub use self::likeliest::{Given, Likeliest};
use crate::openai::{ChatRequest, ChatResponse, ErrorBody, ModelList, StreamOptions, Usage};
use crate::redact::Redacted;
use crate::repetition::loops;
use crate::sse::Decoder;

/// Where the endpoint is and how long to wait for it.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// Base URL that ends in `/v1`.
    pub url: String,
    /// Bearer key.
    pub api_key: Option<Redacted<String>>,
    /// Until the connection stands.
    pub connect: Duration,
    /// Between two pieces of an answer (and before the first).
    pub idle: Duration,
    /// For the whole answer.
    pub total: Duration,
}

impl Endpoint {
    /// An endpoint with the default deadlines: 10 s to connect, 10 min of silence, 1 h in all.
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: url.into().trim_end_matches('/').to_owned(),
            api_key: None,
            connect: Duration::from_secs(10),
            idle: Duration::from_secs(600),
            total: Duration::from_secs(3600),
        }
    }
}

/// The finish reason of an answer that repeats one passage without end. A stream is left there; its tokens are counted by its
/// pieces, and its prompt at a token for four bytes, as the endpoint does not come to say.
pub const LOOP: &str = "loop";
/// Bytes of an answer between two looks for a loop.
const LOOK_EVERY: usize = 2048;

/// A whole answer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Completion {
    /// The answer's text.
    pub content: String,
    /// The thinking, when the endpoint gives it apart.
    pub reasoning: Option<String>,
    /// `stop`, `length`, …, or [`LOOP`].
    pub finish_reason: String,
    /// Token counts.
    pub usage: Usage,
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Worth asking again, after the given time when the endpoint named one.
    #[error("{message}")]
    Retry {
        /// What happened.
        message: String,
        /// `Retry-After` of the endpoint.
        after: Option<Duration>,
        /// The endpoint has too much to do (429, 503, 529).
        busy: bool,
    },
    /// Asking again would give the same.
    #[error("{message}")]
    Refused {
        /// What happened.
        message: String,
        /// HTTP status.
        status: u16,
        /// `error.code` of the body.
        code: Option<String>,
    },
}

fn retry(message: String) -> CallError {
    CallError::Retry { message, after: None, busy: false }
}

/// A client of one endpoint; cheap to clone.
#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    endpoint: Endpoint,
}

impl Client {
    /// Builds the client. Redirects, proxies and decompression stay off: a teacher has one address.
    pub fn new(endpoint: Endpoint) -> Result<Self, CallError> {
        let http = reqwest::Client::builder()
            .connect_timeout(endpoint.connect)
            .read_timeout(endpoint.idle)
            .timeout(endpoint.total)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .pool_idle_timeout(Duration::from_secs(30))
            .build()
            .map_err(|error| CallError::Refused {
                message: format!("cannot build the HTTP client: {error}"),
                status: 0,
                code: None,
            })?;
        Ok(Self { http, endpoint })
    }

    /// The endpoint it talks to.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    fn authorised(&self, request: reqwest::RequestBuilder) -> reqwest::RequestBuilder {
        match &self.endpoint.api_key {
            Some(key) => request.bearer_auth(key.expose()),
            None => request,
        }
    }

    /// `GET /models`.
    pub async fn models(&self) -> Result<Vec<String>, CallError> {
        let url = format!("{}/models", self.endpoint.url);
        let response = self.authorised(self.http.get(&url)).send().await.map_err(|e| transport(&url, &e))?;
        let response = checked(response).await?;
        let list: ModelList = response.json().await.map_err(|e| transport(&url, &e))?;
        Ok(list.data.into_iter().map(|model| model.id).collect())
    }

    /// `POST /stages` of a gateway's admin API: announces the stages of a run; the answer forecasts them.
    pub async fn declare_stages(&self, plan: &serde_json::Value) -> Result<serde_json::Value, CallError> {
        let url = format!("{}/stages", self.endpoint.url);
        let response =
            self.authorised(self.http.post(&url)).json(plan).send().await.map_err(|e| transport(&url, &e))?;
        checked(response).await?.json().await.map_err(|e| transport(&url, &e))
    }

    /// One chat call, streamed or whole as `request.options.stream` says. `headers` go out as they are.
    pub async fn chat(
        &self,
        request: &ChatRequest,
        headers: &[(&str, &str)],
    ) -> Result<Completion, CallError> {
        let url = format!("{}/chat/completions", self.endpoint.url);
        let mut builder = self.authorised(self.http.post(&url));
        for (name, value) in headers {
            builder = builder.header(*name, *value);
        }
        let streamed = request.options.streamed();
        builder = if streamed && request.options.stream_options.is_none() {
            let mut asked = request.clone();
            asked.options.stream_options = Some(StreamOptions { include_usage: true, ..Default::default() });
            builder.json(&asked)
        } else {
            builder.json(request)
        };
        let response = builder.send().await.map_err(|error| transport(&url, &error))?;
        let response = checked(response).await?;
        let mut completion =
            if streamed { collect_stream(&url, response).await? } else { whole(&url, response).await? };
        if completion.finish_reason == LOOP && completion.usage.prompt_tokens == 0 {
            let bytes: usize = request.messages.iter().map(|message| message.plain().len()).sum();
            completion.usage.prompt_tokens = bytes as u64 / 4;
        }
        Ok(completion)
    }
}

fn transport(url: &str, error: &reqwest::Error) -> CallError {
    let what = if error.is_timeout() { "timed out" } else { "failed" };
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    retry(format!("the call to `{url}` {what}: {cause}"))
}

async fn checked(response: reqwest::Response) -> Result<reqwest::Response, CallError> {
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
        status @ (408 | 409 | 429 | 500 | 502 | 503 | 504 | 529) => {
            Err(CallError::Retry { message, after, busy: matches!(status, 429 | 503 | 529) })
        }
        status => Err(CallError::Refused { message, status, code }),
    }
}

async fn whole(url: &str, response: reqwest::Response) -> Result<Completion, CallError> {
    let body: ChatResponse = response.json().await.map_err(|error| transport(url, &error))?;
    let choice = body.choices.into_iter().next().ok_or_else(|| retry("the answer holds no choice".into()))?;
    let message = choice.message.ok_or_else(|| retry("the choice holds no message".into()))?;
    let finish_reason =
        choice.finish_reason.ok_or_else(|| retry("the answer has no finish reason".into()))?;
    let (content, reasoning) = (message.plain(), message.thinking().map(str::to_owned));
    let usage = body.usage.unwrap_or_default();
    Ok(ended(Completion { content, reasoning, finish_reason, usage }))
}

/// An answer that came to its limit in a loop is named for that.
fn ended(mut completion: Completion) -> Completion {
    let thought = completion.reasoning.as_deref().unwrap_or_default();
    if completion.finish_reason == "length"
        && [thought, &completion.content].iter().any(|text| loops(text).is_some())
    {
        completion.finish_reason = LOOP.to_owned();
    }
    completion
}

async fn collect_stream(url: &str, response: reqwest::Response) -> Result<Completion, CallError> {
    let mut decoder = Decoder::default();
    let mut stream = response.bytes_stream();
    let mut completion = Completion::default();
    let (mut reasoning, mut finish) = (None::<String>, None);
    let (mut looked_at, mut pieces) = (0, 0);
    while let Some(bytes) = stream.next().await {
        let bytes = bytes.map_err(|error| transport(url, &error))?;
        for event in decoder.push(&bytes).map_err(|error| retry(error.to_string()))? {
            if event.data == "[DONE]" {
                completion.finish_reason =
                    finish.ok_or_else(|| retry("the stream ended without a finish reason".into()))?;
                completion.reasoning = reasoning;
                return Ok(ended(completion));
            }
            if let Ok(body) = serde_json::from_str::<ErrorBody>(&event.data) {
                return Err(retry(format!("the stream broke off: {}", body.error.message)));
            }
            let chunk: ChatResponse = serde_json::from_str(&event.data)
                .map_err(|error| retry(format!("the stream holds an unreadable event: {error}")))?;
            completion.usage = chunk.usage.unwrap_or(completion.usage);
            for choice in chunk.choices.into_iter().filter(|choice| choice.index == 0) {
                finish = choice.finish_reason.or(finish);
                let delta = choice.delta.unwrap_or_default();
                completion.content.push_str(delta.content.as_deref().unwrap_or_default());
                if let Some(text) = delta.thinking() {
                    reasoning.get_or_insert_default().push_str(text);
                }
                pieces += 1;
            }
        }
        let thought = reasoning.as_deref().unwrap_or_default();
        let written = completion.content.len() + thought.len();
        if finish.is_none() && written >= looked_at + LOOK_EVERY {
            looked_at = written;
            // Where it writes now: the answer, once it has begun.
            if loops(if completion.content.is_empty() { thought } else { &completion.content }).is_some() {
                completion.finish_reason = LOOP.to_owned();
                completion.usage.completion_tokens = pieces;
                completion.reasoning = reasoning;
                return Ok(completion);
            }
        }
    }
    Err(retry("the stream ended without `[DONE]`".into()))
}
