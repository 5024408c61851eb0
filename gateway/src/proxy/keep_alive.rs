//! A stream whose response head is sent before a node has responded. While the request waits for a node, or the node processes
//! a long prompt, comments tell the client and every proxy in between that the connection is alive. Only for pools and keys
//! that configure a heartbeat: after the first comment a failure can no longer be an HTTP status, only an event.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Response, StatusCode};
use http_body::{Body, Frame};
use potstill_shared::openai::ErrorBody;
use potstill_shared::sse;
use tokio::time::{Instant, Sleep, sleep_until};

use crate::error::GatewayError;

/// A response that is not there yet.
pub(crate) type PendingResponse<B> = Pin<Box<dyn Future<Output = Result<Response<B>, GatewayError>> + Send>>;

/// How a keep-alive stream treats its response.
pub(crate) struct KeepAliveHooks<B> {
    /// Returns whether a body is a stream of events.
    pub(crate) is_stream: fn(&B) -> bool,
    /// Renders an error as an event, given body, code and message.
    pub(crate) error_event: fn(&ErrorBody, &str, &str) -> Bytes,
    /// Called when the request fails.
    pub(crate) on_error: Box<dyn Fn(&GatewayError) + Send>,
}

/// Body that sends comments until the response is there, then the body of the response.
pub struct KeepAliveBody<B> {
    response: PendingResponse<B>,
    /// Body of the response, once it is there.
    body: Option<B>,
    timer: Pin<Box<Sleep>>,
    interval: Duration,
    hooks: KeepAliveHooks<B>,
    ended: bool,
}

/// What a client gets when the first comment is due.
pub(crate) enum FirstResponse<B> {
    /// The response, or the error, that was there in time.
    InTime(Result<Response<B>, GatewayError>),
    /// A body that waits for the response.
    Waiting(KeepAliveBody<B>),
}

/// Waits for `response` until the first comment is due, `interval` from now.
pub(crate) async fn respond_or_wait<B>(
    mut response: PendingResponse<B>,
    interval: Duration,
    hooks: KeepAliveHooks<B>,
) -> FirstResponse<B> {
    match tokio::time::timeout(interval, &mut response).await {
        Ok(outcome) => FirstResponse::InTime(outcome),
        Err(_) => FirstResponse::Waiting(KeepAliveBody {
            response,
            body: None,
            // The first comment is sent together with the head.
            timer: Box::pin(sleep_until(Instant::now())),
            interval,
            hooks,
            ended: false,
        }),
    }
}

impl<B> KeepAliveBody<B> {
    /// Polls for the next comment or an error event. `None` when the body of the response is there.
    fn poll_response(&mut self, context: &mut Context<'_>) -> Poll<Option<Bytes>> {
        match self.response.as_mut().poll(context) {
            Poll::Pending => {
                if self.timer.as_mut().poll(context).is_pending() {
                    return Poll::Pending;
                }
                self.timer.as_mut().reset(Instant::now() + self.interval);
                // A timer that was reset has to be polled to be registered.
                let _pending = self.timer.as_mut().poll(context);
                Poll::Ready(Some(sse::KEEP_ALIVE))
            }
            Poll::Ready(Ok(response)) => {
                if response.status() == StatusCode::OK && (self.hooks.is_stream)(response.body()) {
                    self.body = Some(response.into_body());
                    return Poll::Ready(None);
                }
                self.ended = true;
                let (message, code) = ("the node did not stream its answer", "no_stream");
                let body = ErrorBody::new(message.to_owned(), "server_error", None, Some(code));
                Poll::Ready(Some((self.hooks.error_event)(&body, code, message)))
            }
            Poll::Ready(Err(error)) => {
                self.ended = true;
                (self.hooks.on_error)(&error);
                Poll::Ready(Some((self.hooks.error_event)(&error.body(), error.code(), &error.to_string())))
            }
        }
    }
}

impl<B: Body<Data = Bytes, Error = std::io::Error> + Unpin> Body for KeepAliveBody<B> {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        if self.body.is_none() {
            match self.poll_response(context) {
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
