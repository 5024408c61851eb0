//! The body of a relayed answer. Pull-based: a frame is taken from the node only when the client's connection asks for
//! one, so a slow client holds back its node and not our memory; no task and no channel per stream.
//!
//! It owns the permit: when the client leaves, hyper drops the body, which closes the connection to the node and frees
//! the slot. A stream that breaks off, or ends without `[DONE]`, ends in one error event.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use potstill_shared::openai::ErrorBody;
use potstill_shared::sse;
use tokio::time::Sleep;

use super::watch::Watch;
use crate::pool::{ModelPool, Permit};
use crate::telemetry::Metrics;

/// What is written down when a relayed answer ends.
pub struct Record {
    /// Name of the client's key.
    pub key: String,
    /// Id of the request.
    pub request_id: String,
    /// The model.
    pub model: String,
    /// When the request came.
    pub started: Instant,
    /// Status of the answer.
    pub status: u16,
    /// Where the counters are.
    pub metrics: Arc<Metrics>,
    /// Whose lengths are learnt.
    pub pool: Arc<ModelPool>,
}

/// How a relayed answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Complete,
    Truncated,
    ClientLeft,
}

/// The body of a relayed answer.
pub struct Relay {
    inner: Incoming,
    streamed: bool,
    idle: Pin<Box<Sleep>>,
    idle_for: Duration,
    total: Pin<Box<Sleep>>,
    watch: Watch,
    end: Option<End>,
    record: Record,
    permit: Permit,
}

impl Relay {
    /// Relays `inner`. `streamed`: it is an event stream whose end is to be checked.
    pub fn new(
        inner: Incoming,
        streamed: bool,
        idle: Duration,
        total: Duration,
        record: Record,
        permit: Permit,
    ) -> Self {
        Self {
            inner,
            streamed,
            idle: Box::pin(tokio::time::sleep(idle)),
            idle_for: idle,
            total: Box::pin(tokio::time::sleep(total)),
            watch: Watch::new(streamed),
            end: None,
            record,
            permit,
        }
    }

    /// Ends a broken answer: an event stream gets one error event, any other body breaks off so that the client sees it.
    fn broken(&mut self, reason: &str) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        self.end = Some(End::Truncated);
        self.record.metrics.cut_streams.with_label_values(&[&self.record.model]).inc();
        tracing::warn!(
            request = self.record.request_id,
            model = self.record.model,
            node = self.permit.node().name,
            reason,
            "an answer broke off"
        );
        if !self.streamed {
            return Poll::Ready(Some(Err(std::io::Error::other(reason.to_owned()))));
        }
        let body = ErrorBody::new(
            format!("the node's answer broke off: {reason}; it is not complete"),
            "server_error",
            None,
            Some("stream_truncated"),
        );
        // A line break first: the node may have stopped in the middle of a line.
        let event = [b"\n\n".as_slice(), &sse::data(&body.to_json())].concat();
        Poll::Ready(Some(Ok(Frame::data(event.into()))))
    }
}

impl Body for Relay {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        if self.end.is_some() {
            return Poll::Ready(None);
        }
        match Pin::new(&mut self.inner).poll_frame(context) {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(data) = frame.data_ref() {
                    self.watch.push(data);
                }
                let next = tokio::time::Instant::now() + self.idle_for;
                self.idle.as_mut().reset(next);
                Poll::Ready(Some(Ok(frame)))
            }
            // Everything has passed: what happens to the connection now does not matter.
            Poll::Ready(_) if self.streamed && self.watch.done => {
                self.end = Some(End::Complete);
                Poll::Ready(None)
            }
            Poll::Ready(Some(Err(error))) => {
                let reason = super::client::innermost(&error);
                self.broken(&reason)
            }
            Poll::Ready(None) if self.streamed && !self.watch.done => {
                self.broken("the node closed the stream before its end")
            }
            Poll::Ready(None) => {
                self.end = Some(End::Complete);
                Poll::Ready(None)
            }
            Poll::Pending => {
                if self.idle.as_mut().poll(context).is_ready() {
                    return self.broken("the node was silent for too long");
                }
                if self.total.as_mut().poll(context).is_ready() {
                    return self.broken("the answer took too long in all");
                }
                Poll::Pending
            }
        }
    }

    fn size_hint(&self) -> SizeHint {
        if self.streamed { SizeHint::default() } else { self.inner.size_hint() }
    }

    fn is_end_stream(&self) -> bool {
        // A document with a known length ends without another poll; a stream's end must be looked at.
        !self.streamed && self.inner.is_end_stream()
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let finished = self.watch.done || (!self.streamed && self.inner.is_end_stream());
        let end = self.end.unwrap_or(if finished { End::Complete } else { End::ClientLeft });
        self.watch.finish();
        let usage = self.watch.usage.unwrap_or_default();
        let record = &self.record;
        if end == End::Complete && usage.completion_tokens > 0 {
            record.pool.completed(usage.completion_tokens);
        }
        let name = match end {
            End::Complete => "complete",
            End::Truncated => "truncated",
            End::ClientLeft => "client_left",
        };
        record.metrics.finished(&record.model, record.status, name, record.started.elapsed(), usage);
        tracing::info!(
            request = record.request_id,
            key = record.key,
            model = record.model,
            node = self.permit.node().name,
            status = record.status,
            end = name,
            milliseconds = record.started.elapsed().as_millis() as u64,
            prompt_tokens = usage.prompt_tokens,
            completion_tokens = usage.completion_tokens,
            "request"
        );
    }
}
