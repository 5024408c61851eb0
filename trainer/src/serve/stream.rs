//! Responses as server-sent events while their choices are generated. Collected responses are in `generate.rs`.

use std::collections::VecDeque;

use axum::body::{Body, Bytes};
use axum::response::Response;
use futures_util::StreamExt;
use futures_util::stream::{self, Stream};
use http::{HeaderValue, header};
use potstill_engine::scheduler::Update;
use potstill_shared::openai::{
    ChatChoice, ChatResponse, CompletionChoice, CompletionResponse, Delta, ErrorBody, Usage,
};
use potstill_shared::sse;

use super::choice::Shape;
use super::generate::Job;

/// Returns the response of `job` as an event stream.
pub(super) fn streamed(job: Job) -> Response {
    let mut response = Response::new(Body::from_stream(events(job)));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

/// A response that is being streamed.
struct Streaming {
    job: Job,
    ready: VecDeque<Bytes>,
    ended: bool,
}

/// Returns the events of a response.
fn events(job: Job) -> impl Stream<Item = Result<Bytes, std::convert::Infallible>> {
    let mut streaming = Streaming { ready: VecDeque::new(), ended: false, job };
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
    /// Queues the first chunk of each choice: the role for chat, the echoed prompt for text.
    fn begin(&mut self) {
        for (index, prefix) in (0..).zip(self.job.prefixes.clone()) {
            if !matches!(self.job.shape, Shape::Text { .. }) {
                let role = Some("assistant".to_owned());
                self.chunk(index, Delta { role, content: Some(String::new()), ..Delta::default() }, None);
            } else if !prefix.is_empty() {
                self.chunk(index, Delta { content: Some(prefix), ..Delta::default() }, None);
            }
        }
    }

    /// Queues the chunks of an update from the engine.
    fn update(&mut self, index: u32, update: Update) {
        let choice = &mut self.job.choices[index as usize];
        match update {
            // Logprobs are sent with the next text.
            Update::Sampled(sampled) | Update::Prompt(sampled) => {
                choice.sampled(&self.job.node.tokenizer, &sampled);
            }
            Update::Text(text) => {
                for delta in choice.push(&text) {
                    self.chunk(index, delta, None);
                }
            }
            Update::Embedding(_) => {}
            Update::Finished { reason, completion_tokens, cached_tokens } => {
                self.job.counts.finished(completion_tokens, cached_tokens);
                let (deltas, reason) = choice.finish(reason);
                for delta in deltas {
                    self.chunk(index, delta, None);
                }
                let node = &self.job.node;
                node.metrics.finished(&node.name, reason, self.job.started.elapsed());
                self.chunk(index, Delta::default(), Some(reason.to_owned()));
            }
            Update::Failed(reason) => {
                let node = &self.job.node;
                node.metrics.finished(&node.name, "failed", self.job.started.elapsed());
                let body = ErrorBody::new(reason, "server_error", None, Some("engine_stopped"));
                self.ready.push_back(sse::data(&body.to_json()));
                // An error ends the stream without `[DONE]`.
                self.ended = true;
            }
        }
    }

    /// Queues the usage chunk, if requested, and `[DONE]`.
    fn finish(&mut self) {
        if self.job.include_usage {
            let usage = Some(self.job.counts.usage());
            match self.job.shape {
                Shape::Chat { .. } => self.push_chat(Vec::new(), usage),
                Shape::Text { .. } => self.push_text(Vec::new(), usage),
            }
        }
        self.ready.push_back(Bytes::from_static(sse::DONE));
        self.ended = true;
    }

    /// Queues a chunk of one choice, with the logprobs so far.
    fn chunk(&mut self, index: u32, delta: Delta, finish_reason: Option<String>) {
        let log_probs = self.job.choices[index as usize].log_probs();
        if matches!(self.job.shape, Shape::Text { .. }) {
            let text = delta.content.unwrap_or_default();
            let choice = CompletionChoice { index, text, logprobs: log_probs, finish_reason };
            return self.push_text(vec![choice], None);
        }
        let mut choice = ChatChoice { index, delta: Some(delta), finish_reason, ..ChatChoice::default() };
        if let Some(log_probs) = log_probs {
            choice.extra.insert("logprobs".to_owned(), log_probs);
        }
        self.push_chat(vec![choice], None);
    }

    /// Queues a chat chunk.
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

    /// Queues a text chunk.
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

    /// Queues an event.
    fn push(&mut self, chunk: &impl serde::Serialize) {
        self.ready.push_back(sse::data(&serde_json::to_string(chunk).unwrap_or_default()));
    }
}
