//! `POST /v1/chat/completions` and `/v1/completions`. One request becomes one engine request per choice; the answer is
//! collected, or streamed as the choices grow. Dropping the answer drops the receivers, which cancels the choices.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, SelectAll};
use futures_util::{Stream, StreamExt};
use http::{HeaderValue, header};
use potstill_engine::EngineError;
use potstill_engine::sampler::Sampling;
use potstill_engine::scheduler::{Request, Update};
use potstill_shared::id::unique;
use potstill_shared::openai::{
    ChatChoice, ChatMessage, ChatRequest, ChatResponse, CompletionChoice, CompletionRequest,
    CompletionResponse, Content, Delta, ErrorBody, GenerationOptions, Prompt, Stop, Usage, now_seconds,
};
use potstill_shared::reasoning::{OPEN, Piece, Splitter};
use potstill_shared::sse;
use rand::Rng;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::Node;
use super::error::NodeError;

/// Most choices of one request.
const MAX_CHOICES: u32 = 64;
/// Most stop strings.
const MAX_STOPS: usize = 16;

pub(super) fn read<T: for<'de> serde::Deserialize<'de>>(body: &[u8]) -> Result<T, NodeError> {
    serde_json::from_slice(body).map_err(|error| NodeError::InvalidJson(error.to_string()))
}

/// The two shapes of an answer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    /// Thinking apart from the answer; `inside`: the template has opened the thinking already.
    Chat {
        inside: bool,
    },
    Text,
}

/// The choices of one request while they grow.
struct Job {
    node: Arc<Node>,
    id: String,
    created: u64,
    started: Instant,
    shape: Shape,
    prompt_tokens: u64,
    include_usage: bool,
    /// What each choice begins with (`echo`).
    prefixes: Vec<String>,
    updates: SelectAll<futures_util::stream::BoxStream<'static, (u32, Update)>>,
}

/// `POST /v1/chat/completions`.
pub(super) async fn chat(State(node): State<Arc<Node>>, body: Bytes) -> Result<Response, NodeError> {
    let request: ChatRequest = read(&body)?;
    check_model(&node, &request.model)?;
    if request.messages.is_empty() {
        return Err(invalid("messages", "must hold at least one message"));
    }
    let messages: Vec<Value> = request.messages.iter().map(template_message).collect();
    let mut extra = request.extra.get("chat_template_kwargs").cloned().unwrap_or_else(|| json!({}));
    if let (Some(tools), Some(object)) = (request.extra.get("tools"), extra.as_object_mut()) {
        object.insert("tools".to_owned(), tools.clone());
    }
    let text = node.template.render(&Value::Array(messages), true, &extra)?;
    let inside = text.trim_end().ends_with(OPEN);
    let prompt = node.tokenizer.encode(&text)?;
    let job = submit(&node, vec![(prompt, String::new())], &request.options, Shape::Chat { inside })?;
    answer(job, &request.options).await
}

/// `POST /v1/completions`.
pub(super) async fn completions(State(node): State<Arc<Node>>, body: Bytes) -> Result<Response, NodeError> {
    let request: CompletionRequest = read(&body)?;
    check_model(&node, &request.model)?;
    if request.extra.get("logprobs").is_some_and(|value| !value.is_null()) {
        return Err(invalid("logprobs", "is not supported by this node"));
    }
    let echo = request.echo.unwrap_or(false);
    let from_text =
        |text: String| Ok((node.tokenizer.encode(&text)?, if echo { text } else { String::new() }));
    let from_ids = |ids: Vec<u32>| {
        if let Some(id) = ids.iter().find(|&&id| node.tokenizer.token(id).is_none()) {
            return Err(invalid("prompt", format!("holds token {id}, which the vocabulary does not")));
        }
        let text = if echo { node.tokenizer.decode(&ids)? } else { String::new() };
        Ok((ids, text))
    };
    let prompts: Vec<(Vec<u32>, String)> = match request.prompt {
        Prompt::Text(text) => vec![from_text(text)?],
        Prompt::Texts(texts) => texts.into_iter().map(from_text).collect::<Result<_, NodeError>>()?,
        Prompt::Tokens(ids) => vec![from_ids(ids)?],
        Prompt::TokenLists(lists) => lists.into_iter().map(from_ids).collect::<Result<_, NodeError>>()?,
    };
    if prompts.is_empty() || prompts.len() > MAX_CHOICES as usize {
        return Err(invalid("prompt", format!("must hold 1 to {MAX_CHOICES} prompts")));
    }
    let mut options = request.options;
    // OpenAI's default for this endpoint.
    options.max_tokens = options.token_limit().or(Some(16));
    let job = submit(&node, prompts, &options, Shape::Text)?;
    answer(job, &options).await
}

fn invalid(param: &'static str, problem: impl Into<String>) -> NodeError {
    NodeError::InvalidField { param, problem: problem.into() }
}

fn check_model(node: &Node, model: &str) -> Result<(), NodeError> {
    if model == node.name { Ok(()) } else { Err(NodeError::ModelNotFound(model.to_owned())) }
}

/// A message as templates expect it: content as text, other fields as they came.
fn template_message(message: &ChatMessage) -> Value {
    let mut value = Value::Object(message.extra.clone());
    value["role"] = json!(message.role);
    value["content"] = json!(message.plain());
    if let Some(thinking) = message.thinking() {
        value["reasoning_content"] = json!(thinking);
    }
    value
}

fn sampling(options: &GenerationOptions, choice: u64) -> Sampling {
    let number = |value: Option<f64>, default: f32| value.map_or(default, |value| value as f32);
    let base = options.seed.map_or_else(|| rand::rng().random(), |seed| seed as u64);
    Sampling {
        temperature: number(options.temperature, 1.0),
        top_p: number(options.top_p, 1.0),
        top_k: options.top_k.filter(|k| *k > 0).map_or(0, |k| k as usize),
        min_p: number(options.min_p, 0.0),
        repetition_penalty: number(options.repetition_penalty, 1.0),
        presence_penalty: number(options.presence_penalty, 0.0),
        frequency_penalty: number(options.frequency_penalty, 0.0),
        seed: base.wrapping_add(choice),
    }
}

fn submit(
    node: &Arc<Node>,
    prompts: Vec<(Vec<u32>, String)>,
    options: &GenerationOptions,
    shape: Shape,
) -> Result<Job, NodeError> {
    let n = options.n.unwrap_or(1);
    if n == 0 || n as usize * prompts.len() > MAX_CHOICES as usize {
        return Err(invalid("n", format!("must give 1 to {MAX_CHOICES} choices")));
    }
    let stop = options.stop.clone().map(Stop::into_vec).unwrap_or_default();
    if stop.len() > MAX_STOPS {
        return Err(invalid("stop", format!("must hold at most {MAX_STOPS} strings")));
    }
    let (mut prompt_tokens, mut prefixes, mut updates) = (0, Vec::new(), SelectAll::new());
    for (prompt, prefix) in prompts {
        prompt_tokens += prompt.len() as u64;
        let room = node.engine.context().saturating_sub(prompt.len());
        // A prompt without room for one token is refused below, with its numbers.
        let max_tokens = options.token_limit().map_or(room.max(1), |limit| limit as usize);
        for _ in 0..n {
            let index = prefixes.len() as u32;
            let request = Request {
                prompt: prompt.clone(),
                max_tokens,
                sampling: sampling(options, u64::from(index)),
                stop: stop.clone(),
                log_probs: None,
            };
            let receiver = node.engine.submit(request)?;
            updates.push(numbered(index, receiver).boxed());
            prefixes.push(prefix.clone());
        }
    }
    Ok(Job {
        node: Arc::clone(node),
        id: unique(if shape == Shape::Text { "cmpl" } else { "chatcmpl" }),
        created: now_seconds(),
        started: Instant::now(),
        shape,
        prompt_tokens,
        include_usage: options.stream_options.as_ref().is_some_and(|options| options.include_usage),
        prefixes,
        updates,
    })
}

/// The updates of one choice. A channel that closes without a last update means that the engine is gone.
fn numbered(index: u32, receiver: mpsc::Receiver<Update>) -> impl Stream<Item = (u32, Update)> {
    stream::unfold(Some(receiver), move |receiver| async move {
        let mut receiver = receiver?;
        match receiver.recv().await {
            Some(update @ (Update::Text(_) | Update::Sampled(_))) => Some(((index, update), Some(receiver))),
            Some(last) => Some(((index, last), None)),
            None => Some(((index, Update::Failed("the engine has stopped".to_owned())), None)),
        }
    })
}

async fn answer(job: Job, options: &GenerationOptions) -> Result<Response, NodeError> {
    if !options.streamed() {
        return collect(job).await;
    }
    let mut response = Response::new(Body::from_stream(events(job)));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    Ok(response)
}

/// One choice of a whole answer.
struct Collected {
    splitter: Option<Splitter>,
    text: String,
    thinking: Option<String>,
    finish_reason: Option<String>,
}

impl Collected {
    fn push(&mut self, text: &str) {
        match &mut self.splitter {
            None => self.text.push_str(text),
            Some(splitter) => {
                let pieces = splitter.push(text);
                self.take(pieces);
            }
        }
    }

    fn take(&mut self, pieces: impl IntoIterator<Item = Piece>) {
        for piece in pieces {
            match piece {
                Piece::Answer(text) => self.text.push_str(&text),
                Piece::Thinking(text) => self.thinking.get_or_insert_default().push_str(&text),
            }
        }
    }
}

async fn collect(mut job: Job) -> Result<Response, NodeError> {
    let mut choices: Vec<Collected> = job
        .prefixes
        .iter()
        .map(|prefix| Collected {
            splitter: splitter(job.shape),
            text: prefix.clone(),
            thinking: None,
            finish_reason: None,
        })
        .collect();
    let mut written = 0;
    while let Some((index, update)) = job.updates.next().await {
        let choice = &mut choices[index as usize];
        match update {
            Update::Sampled(_) => {}
            Update::Text(text) => choice.push(&text),
            Update::Finished { reason, completion_tokens } => {
                written += completion_tokens as u64;
                let last = choice.splitter.as_mut().and_then(Splitter::finish);
                choice.take(last);
                choice.finish_reason = Some(reason.name().to_owned());
                job.node.metrics.finished(&job.node.name, reason.name(), job.started.elapsed());
            }
            Update::Failed(reason) => {
                job.node.metrics.finished(&job.node.name, "failed", job.started.elapsed());
                return Err(NodeError::Engine(EngineError::Stopped(reason)));
            }
        }
    }
    let usage = Some(Usage::new(job.prompt_tokens, written));
    let choices = choices.into_iter().zip(0u32..);
    Ok(match job.shape {
        Shape::Text => axum::Json(CompletionResponse {
            id: job.id,
            object: "text_completion".to_owned(),
            created: job.created,
            model: job.node.name.clone(),
            choices: choices
                .map(|(choice, index)| CompletionChoice {
                    index,
                    text: choice.text,
                    logprobs: None,
                    finish_reason: choice.finish_reason,
                })
                .collect(),
            usage,
        })
        .into_response(),
        Shape::Chat { .. } => axum::Json(ChatResponse {
            id: job.id,
            object: "chat.completion".to_owned(),
            created: job.created,
            model: job.node.name.clone(),
            choices: choices
                .map(|(choice, index)| ChatChoice {
                    index,
                    message: Some(ChatMessage {
                        role: "assistant".to_owned(),
                        content: Some(Content::Text(choice.text)),
                        reasoning_content: choice.thinking,
                        ..ChatMessage::default()
                    }),
                    finish_reason: choice.finish_reason,
                    ..ChatChoice::default()
                })
                .collect(),
            usage,
            ..ChatResponse::default()
        })
        .into_response(),
    })
}

fn splitter(shape: Shape) -> Option<Splitter> {
    match shape {
        Shape::Chat { inside } => Some(Splitter::new(inside)),
        Shape::Text => None,
    }
}

/// A stream on its way out.
struct Streaming {
    job: Job,
    splitters: Vec<Option<Splitter>>,
    written: u64,
    ready: VecDeque<Bytes>,
    ended: bool,
}

fn events(job: Job) -> impl Stream<Item = Result<Bytes, std::convert::Infallible>> {
    let splitters = job.prefixes.iter().map(|_| splitter(job.shape)).collect();
    let mut streaming = Streaming { splitters, written: 0, ready: VecDeque::new(), ended: false, job };
    streaming.begin();
    stream::unfold(streaming, |mut streaming| async move {
        loop {
            if let Some(event) = streaming.ready.pop_front() {
                return Some((Ok(event), streaming));
            }
            if streaming.ended {
                return None;
            }
            match streaming.job.updates.next().await {
                Some((index, update)) => streaming.update(index, update),
                None => streaming.finish(),
            }
        }
    })
}

impl Streaming {
    /// The role of each chat choice, the echo of each text choice.
    fn begin(&mut self) {
        for (index, prefix) in self.job.prefixes.clone().into_iter().enumerate() {
            match self.job.shape {
                Shape::Chat { .. } => {
                    let delta = Delta {
                        role: Some("assistant".to_owned()),
                        content: Some(String::new()),
                        ..Delta::default()
                    };
                    self.chat_chunk(index as u32, delta, None);
                }
                Shape::Text if !prefix.is_empty() => self.text_chunk(index as u32, prefix, None),
                Shape::Text => {}
            }
        }
    }

    fn update(&mut self, index: u32, update: Update) {
        match update {
            Update::Sampled(_) => {}
            Update::Text(text) => match &mut self.splitters[index as usize] {
                None => self.text_chunk(index, text, None),
                Some(splitter) => {
                    let pieces = splitter.push(&text);
                    self.pieces(index, pieces);
                }
            },
            Update::Finished { reason, completion_tokens } => {
                self.written += completion_tokens as u64;
                let last = self.splitters[index as usize].as_mut().and_then(Splitter::finish);
                self.pieces(index, last);
                let reason = Some(reason.name().to_owned());
                self.job.node.metrics.finished(
                    &self.job.node.name,
                    reason.as_deref().unwrap_or_default(),
                    self.job.started.elapsed(),
                );
                match self.job.shape {
                    Shape::Chat { .. } => self.chat_chunk(index, Delta::default(), reason),
                    Shape::Text => self.text_chunk(index, String::new(), reason),
                }
            }
            Update::Failed(reason) => {
                self.job.node.metrics.finished(&self.job.node.name, "failed", self.job.started.elapsed());
                let body = ErrorBody::new(reason, "server_error", None, Some("engine_stopped"));
                self.ready.push_back(sse::data(&body.to_json()));
                // No `[DONE]` after an error.
                self.ended = true;
            }
        }
    }

    fn pieces(&mut self, index: u32, pieces: impl IntoIterator<Item = Piece>) {
        for piece in pieces {
            let delta = match piece {
                Piece::Answer(text) => Delta { content: Some(text), ..Delta::default() },
                Piece::Thinking(text) => Delta { reasoning_content: Some(text), ..Delta::default() },
            };
            self.chat_chunk(index, delta, None);
        }
    }

    fn finish(&mut self) {
        if self.job.include_usage {
            let usage = Some(Usage::new(self.job.prompt_tokens, self.written));
            match self.job.shape {
                Shape::Chat { .. } => self.push_chat(Vec::new(), usage),
                Shape::Text => self.push_text(Vec::new(), usage),
            }
        }
        self.ready.push_back(Bytes::from_static(sse::DONE));
        self.ended = true;
    }

    fn chat_chunk(&mut self, index: u32, delta: Delta, finish_reason: Option<String>) {
        self.push_chat(
            vec![ChatChoice { index, delta: Some(delta), finish_reason, ..ChatChoice::default() }],
            None,
        );
    }

    fn text_chunk(&mut self, index: u32, text: String, finish_reason: Option<String>) {
        self.push_text(vec![CompletionChoice { index, text, logprobs: None, finish_reason }], None);
    }

    fn push_chat(&mut self, choices: Vec<ChatChoice>, usage: Option<Usage>) {
        let chunk = ChatResponse {
            id: self.job.id.clone(),
            object: "chat.completion.chunk".to_owned(),
            created: self.job.created,
            model: self.job.node.name.clone(),
            choices,
            usage,
            ..ChatResponse::default()
        };
        self.push(&chunk);
    }

    fn push_text(&mut self, choices: Vec<CompletionChoice>, usage: Option<Usage>) {
        let chunk = CompletionResponse {
            id: self.job.id.clone(),
            object: "text_completion".to_owned(),
            created: self.job.created,
            model: self.job.node.name.clone(),
            choices,
            usage,
        };
        self.push(&chunk);
    }

    fn push(&mut self, chunk: &impl serde::Serialize) {
        self.ready.push_back(sse::data(&serde_json::to_string(chunk).unwrap_or_default()));
    }
}
