//! Responses as server-sent events while their choices are generated. Collected responses are in `generate.rs`.

use std::collections::VecDeque;

use axum::body::{Body, Bytes};
use axum::response::Response;
use futures_util::StreamExt;
use futures_util::stream::{self, Stream};
use http::{HeaderValue, header};
use potstill_engine::scheduler::RequestUpdate;
use potstill_shared::openai::{
    ChatChoice, ChatResponse, CompletionChoice, CompletionResponse, Delta, ErrorBody, Usage,
};
use potstill_shared::sse;

use super::active_request::ActiveRequest;
use super::choice::ResponseKind;

/// Returns the response of `job` as an event stream.
pub(super) fn stream_response(job: ActiveRequest) -> Response {
    let mut response = Response::new(Body::from_stream(response_events(job)));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

/// A response that is being streamed.
struct EventStream {
    job: ActiveRequest,
    ready: VecDeque<Bytes>,
    ended: bool,
}

/// Returns the events of a response.
fn response_events(job: ActiveRequest) -> impl Stream<Item = Result<Bytes, std::convert::Infallible>> {
    let mut streaming = EventStream { ready: VecDeque::new(), ended: false, job };
    streaming.queue_first_chunks();
    stream::unfold(streaming, |mut streaming| async move {
        loop {
            if let Some(event) = streaming.ready.pop_front() {
                return Some((Ok(event), streaming));
            }
            if streaming.ended {
                return None;
            }
            match streaming.job.updates.next().await {
                Some((index, update)) => streaming.handle_update(index, update),
                None => streaming.finish(),
            }
        }
    })
}

impl EventStream {
    /// Queues the first chunk of each choice: the role for chat, the echoed prompt for text.
    fn queue_first_chunks(&mut self) {
        for (index, prefix) in (0..).zip(self.job.prefixes.clone()) {
            if !matches!(self.job.shape, ResponseKind::Text { .. }) {
                let role = Some("assistant".to_owned());
                self.queue_chunk(
                    index,
                    Delta { role, content: Some(String::new()), ..Delta::default() },
                    None,
                );
            } else if !prefix.is_empty() {
                self.queue_chunk(index, Delta { content: Some(prefix), ..Delta::default() }, None);
            }
        }
    }

    /// Queues the chunks of an update from the engine.
    fn handle_update(&mut self, index: u32, update: RequestUpdate) {
        let choice = &mut self.job.choices[index as usize];
        match update {
            // Logprobs are sent with the next text.
            RequestUpdate::Sampled(sampled) | RequestUpdate::Prompt(sampled) => {
                choice.push_token(&self.job.node.tokenizer, &sampled);
            }
            RequestUpdate::Text(text) => {
                for delta in choice.push(&text) {
                    self.queue_chunk(index, delta, None);
                }
            }
            RequestUpdate::Embedding(_) => {}
            RequestUpdate::Finished { reason, completion_tokens, cached_tokens } => {
                self.job.counts.add_finished(completion_tokens, cached_tokens);
                let (deltas, reason) = choice.finish(reason);
                for delta in deltas {
                    self.queue_chunk(index, delta, None);
                }
                let node = &self.job.node;
                node.metrics.record_finished(&node.name, reason, self.job.started.elapsed());
                self.queue_chunk(index, Delta::default(), Some(reason.to_owned()));
            }
            RequestUpdate::Failed(reason) => {
                let node = &self.job.node;
                node.metrics.record_finished(&node.name, "failed", self.job.started.elapsed());
                let body = ErrorBody::new(reason, "server_error", None, Some("engine_stopped"));
                self.ready.push_back(sse::data_frame(&body.to_json()));
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
                ResponseKind::Chat { .. } => self.push_chat(Vec::new(), usage),
                ResponseKind::Text { .. } => self.push_text(Vec::new(), usage),
            }
        }
        self.ready.push_back(Bytes::from_static(sse::DONE_FRAME));
        self.ended = true;
    }

    /// Queues a chunk of one choice, with the logprobs so far.
    fn queue_chunk(&mut self, index: u32, delta: Delta, finish_reason: Option<String>) {
        let log_probs = self.job.choices[index as usize].take_logprobs();
        if matches!(self.job.shape, ResponseKind::Text { .. }) {
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
        self.ready.push_back(sse::data_frame(&serde_json::to_string(chunk).unwrap_or_default()));
    }
}
