//! A stream whose head goes out before anyone has answered: while the request waits for a node, or the node reads a long
//! prompt, comments tell the client (and whatever stands between) that somebody is there. Only for pools and keys that ask
//! for a heartbeat: after its first comment a request that fails can no longer say so by its status, only by an event.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use http_body::{Body, Frame};
use potstill_shared::openai::ErrorBody;
use potstill_shared::sse;
use serde_json::json;
use tokio::time::{Instant, Sleep, sleep_until};

use super::reply::{Answer, Reply, as_stream};
use super::request_id::RequestId;
use crate::error::GatewayError;
use crate::gateway::Shared;
use crate::stack::refused;

/// A comment of a stream; events are whole when they are passed on, so it always stands between two of them.
pub const COMMENT: Bytes = Bytes::from_static(b": keep-alive\n\n");

/// What is waited for.
pub(crate) type Work = Pin<Box<dyn Future<Output = Result<Answer, GatewayError>> + Send>>;

/// The body of an answer that is still waited for.
pub struct Waiting {
    work: Work,
    /// The answer's own body, once it is there.
    body: Option<Reply>,
    timer: Pin<Box<Sleep>>,
    every: Duration,
    shared: Arc<Shared>,
    request_id: RequestId,
    /// Its words are those of the Responses API.
    responses: bool,
    over: bool,
}

/// The answer itself when it comes before the first comment is due; else a stream that waits for it.
pub(crate) async fn answer_or_wait(
    mut work: Work,
    every: Duration,
    shared: &Arc<Shared>,
    request_id: RequestId,
    responses: bool,
) -> Result<Answer, GatewayError> {
    if let Ok(outcome) = tokio::time::timeout(every, &mut work).await {
        return outcome;
    }
    Ok(as_stream(Reply::Waiting(Box::new(Waiting {
        work,
        body: None,
        // The first comment goes out with the head.
        timer: Box::pin(sleep_until(Instant::now())),
        every,
        shared: Arc::clone(shared),
        request_id,
        responses,
        over: false,
    }))))
}

impl Waiting {
    fn failure(&self, body: &ErrorBody, code: &str, message: &str) -> Bytes {
        if self.responses {
            let event = json!({"type": "error", "code": code, "message": message, "param": null, "sequence_number": 0});
            format!("event: error\ndata: {event}\n\n").into()
        } else {
            sse::data(&body.to_json())
        }
    }

    fn poll_work(&mut self, context: &mut Context<'_>) -> Poll<Option<Bytes>> {
        match self.work.as_mut().poll(context) {
            Poll::Pending => {
                if self.timer.as_mut().poll(context).is_pending() {
                    return Poll::Pending;
                }
                self.timer.as_mut().reset(Instant::now() + self.every);
                // Registers the timer anew.
                let _pending = self.timer.as_mut().poll(context);
                Poll::Ready(Some(COMMENT))
            }
            Poll::Ready(Ok(answer)) => {
                let streams = answer.status() == StatusCode::OK
                    && matches!(answer.body(), Reply::Relay(_) | Reply::Responses(_));
                if streams {
                    self.body = Some(answer.into_body());
                    return Poll::Ready(None);
                }
                self.over = true;
                let (message, code) = ("the node did not stream its answer", "no_stream");
                let body = ErrorBody::new(message.to_owned(), "server_error", None, Some(code));
                Poll::Ready(Some(self.failure(&body, code, message)))
            }
            Poll::Ready(Err(error)) => {
                self.over = true;
                refused(&self.shared, &self.request_id, &error);
                Poll::Ready(Some(self.failure(&error.body(), error.code(), &error.to_string())))
            }
        }
    }
}

impl Body for Waiting {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        if self.over {
            return Poll::Ready(None);
        }
        if self.body.is_none() {
            match self.poll_work(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Some(bytes)) => return Poll::Ready(Some(Ok(Frame::data(bytes)))),
                Poll::Ready(None) => {}
            }
        }
        match &mut self.body {
            Some(body) => Pin::new(body).poll_frame(context),
            None => Poll::Ready(None),
        }
    }
}
