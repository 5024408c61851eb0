//! Body of a relayed stream. Pull-based: data is read from the node only when the client's connection can take it. A
//! slow client thus slows its node and does not fill memory; a stream needs no task and no channel.
//!
//! The body owns the permit. If the client disconnects, hyper drops the body, which closes the connection to the node
//! and frees the slot. A stream that breaks or ends early gets one error event and no `[DONE]`.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame};
use potstill_shared::openai::ErrorBody;
use potstill_shared::sse;
use tokio::time::{Instant, Sleep, sleep_until};

use super::request_record::RequestRecord;
use crate::config::Deadlines;
use crate::normalize::sse_stream::{SseNormalizer, StreamStep};
use crate::pool::Permit;
use crate::telemetry::request_summary::Outcome;
use crate::time::ms;
use crate::upstream::exchange::UpstreamBody;

/// Time after the last event in which the node must end its body. Otherwise its connection is not reused.
const END_OF_BODY_TIMEOUT: Duration = Duration::from_millis(20);

/// Idle and total deadline in one timer, which is reset only when it fires.
struct StreamDeadlines {
    timer: Pin<Box<Sleep>>,
    idle: Duration,
    last: Instant,
    end: Instant,
}

impl StreamDeadlines {
    fn new(deadlines: &Deadlines) -> Self {
        let now = Instant::now();
        let (idle, end) = (ms(deadlines.idle_ms), now + ms(deadlines.total_ms));
        Self { timer: Box::pin(sleep_until(end.min(now + idle))), idle, last: now, end }
    }

    /// Returns the reason if a deadline has passed.
    fn poll_expired(&mut self, context: &mut Context<'_>) -> Option<&'static str> {
        while self.timer.as_mut().poll(context).is_ready() {
            let now = Instant::now();
            if now >= self.end {
                return Some("the answer took too long in all");
            }
            if now >= self.last + self.idle {
                return Some("the node was silent for too long");
            }
            self.timer.as_mut().reset(self.end.min(self.last + self.idle));
        }
        None
    }
}

/// SSE comments during silence, if configured. They do not reset the idle deadline.
struct Heartbeat {
    timer: Pin<Box<Sleep>>,
    interval: Duration,
}

/// Body of a relayed stream.
pub struct RelayBody {
    body: Option<UpstreamBody>,
    events: SseNormalizer,
    clocks: StreamDeadlines,
    heartbeat: Option<Heartbeat>,
    is_over: bool,
    permit: Option<Permit>,
    record: RequestRecord,
}

impl RelayBody {
    /// Creates a body that relays `body`. `permit` and `record` are released when the stream ends.
    pub fn new(
        body: UpstreamBody,
        events: SseNormalizer,
        deadlines: &Deadlines,
        heartbeat_ms: Option<u64>,
        permit: Permit,
        record: RequestRecord,
    ) -> Self {
        let heartbeat = heartbeat_ms.map(|every| {
            let every = ms(every.max(100));
            Heartbeat { timer: Box::pin(sleep_until(Instant::now() + every)), interval: every }
        });
        let clocks = StreamDeadlines::new(deadlines);
        Self { body: Some(body), events, clocks, heartbeat, is_over: false, permit: Some(permit), record }
    }

    /// Records a complete stream and frees the slot.
    fn complete(&mut self) {
        self.is_over = true;
        self.clocks.end = Instant::now() + END_OF_BODY_TIMEOUT;
        self.clocks.timer.as_mut().reset(self.clocks.end);
        let seen = self.events.normalizer();
        self.record.complete(seen.usage, seen.text_events, self.permit.take());
    }

    /// Ends a broken stream: returns `before` and one error event.
    fn end_truncated(&mut self, before: Bytes, reason: &str) -> Bytes {
        tracing::warn!(
            request = %self.record.request_id,
            model = &*self.record.requested_pool.model,
            node = self.permit.as_ref().map(|permit| permit.node().name.as_str()),
            reason,
            "an answer broke off"
        );
        let body = ErrorBody::new(
            format!("the node's answer broke off: {reason}; it is not complete"),
            "server_error",
            None,
            Some("stream_truncated"),
        );
        let event = sse::data_frame(&body.to_json());
        self.record_failure(reason);
        if before.is_empty() { event } else { [&before[..], &event[..]].concat().into() }
    }

    fn record_failure(&mut self, reason: &str) {
        self.is_over = true;
        self.body = None;
        self.record.outcome = Outcome::Truncated;
        self.record_usage();
        if let Some(permit) = self.permit.take() {
            permit.record_failure(reason);
        }
    }

    fn record_usage(&mut self) {
        let seen = self.events.normalizer();
        self.record.set_usage(seen.usage, seen.text_events);
    }

    fn normalize(&mut self, bytes: Bytes) -> Bytes {
        match self.events.push(bytes) {
            StreamStep::Forward(bytes) => bytes,
            StreamStep::Done(bytes) => {
                self.complete();
                bytes
            }
            StreamStep::Error(bytes) => {
                self.record_failure("the node sent an error");
                bytes
            }
            StreamStep::Invalid(bytes, reason) => self.end_truncated(bytes, reason),
        }
    }

    /// Reads to the end of the node's body, so that its connection can be reused.
    fn poll_end(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let Some(body) = &mut self.body else { return Poll::Ready(()) };
        loop {
            match body.poll_data(context) {
                // Data after `[DONE]` is discarded.
                Poll::Ready(Some(Ok(_))) => {}
                Poll::Ready(_) => return Poll::Ready(()),
                Poll::Pending => {
                    return if self.clocks.poll_expired(context).is_some() {
                        Poll::Ready(())
                    } else {
                        Poll::Pending
                    };
                }
            }
        }
    }
}

impl Body for RelayBody {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        if self.is_over {
            return self.poll_end(context).map(|()| None);
        }
        loop {
            let Some(body) = &mut self.body else { return Poll::Ready(None) };
            let polled = body.poll_data(context);
            let bytes = match polled {
                Poll::Ready(Some(Ok(data))) => {
                    self.clocks.last = Instant::now();
                    self.record.first_token();
                    self.normalize(data)
                }
                Poll::Ready(Some(Err(error))) => self.end_truncated(Bytes::new(), &error.to_string()),
                Poll::Ready(None) => {
                    self.end_truncated(Bytes::new(), "the node closed the stream before its end")
                }
                Poll::Pending => match self.clocks.poll_expired(context) {
                    Some(reason) => self.end_truncated(Bytes::new(), reason),
                    None => return self.poll_heartbeat(context),
                },
            };
            if !bytes.is_empty() {
                if let Some(heartbeat) = &mut self.heartbeat {
                    heartbeat.timer.as_mut().reset(Instant::now() + heartbeat.interval);
                }
                return Poll::Ready(Some(Ok(Frame::data(bytes))));
            }
        }
    }
}

impl RelayBody {
    fn poll_heartbeat(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        let Some(heartbeat) = &mut self.heartbeat else { return Poll::Pending };
        if heartbeat.timer.as_mut().poll(context).is_pending() {
            return Poll::Pending;
        }
        heartbeat.timer.as_mut().reset(Instant::now() + heartbeat.interval);
        Poll::Ready(Some(Ok(Frame::data(sse::KEEP_ALIVE))))
    }
}

impl Drop for RelayBody {
    fn drop(&mut self) {
        if !self.is_over {
            self.record_usage();
        }
    }
}
