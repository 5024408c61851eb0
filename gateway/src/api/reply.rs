//! The body of an answer to a client.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Response, header};
use http_body::{Body, Frame, SizeHint};

use super::pieces::Pieces;
use super::responses::stream::ResponsesStream;
use super::waiting::Waiting;
use crate::upstream::relay::Relay;

/// A body.
pub enum Reply {
    /// Known bytes.
    Whole(Pieces),
    /// A relayed stream.
    Relay(Box<Relay>),
    /// A relayed stream in the words of the Responses API.
    Responses(Box<ResponsesStream>),
    /// A stream that nobody has answered yet.
    Waiting(Box<Waiting>),
    /// What the gateway itself answers.
    Local(axum::body::Body),
}

/// An answer.
pub type Answer = Response<Reply>;

impl From<Bytes> for Reply {
    fn from(bytes: Bytes) -> Self {
        Self::Whole(Pieces(bytes))
    }
}

/// The answer that streams `reply`.
pub fn as_stream(reply: Reply) -> Answer {
    let mut answer = Answer::new(reply);
    let headers = answer.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    answer
}

/// The same answer with its body as one of ours.
pub fn local(response: axum::response::Response) -> Answer {
    response.map(Reply::Local)
}

/// hyper's error type for services that cannot fail.
pub type Never = Infallible;

impl Body for Reply {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        match self.get_mut() {
            Self::Whole(pieces) => Poll::Ready(pieces.take().map(|piece| Ok(Frame::data(piece)))),
            Self::Relay(relay) => Pin::new(&mut **relay).poll_frame(context),
            Self::Responses(stream) => Pin::new(&mut **stream).poll_frame(context),
            Self::Waiting(waiting) => Pin::new(&mut **waiting).poll_frame(context),
            Self::Local(body) => Pin::new(body)
                .poll_frame(context)
                .map(|frame| frame.map(|frame| frame.map_err(std::io::Error::other))),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(pieces) => pieces.size_hint(),
            Self::Relay(_) | Self::Responses(_) | Self::Waiting(_) => SizeHint::default(),
            Self::Local(body) => body.size_hint(),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(pieces) => pieces.is_end_stream(),
            Self::Relay(_) | Self::Responses(_) | Self::Waiting(_) => false,
            Self::Local(body) => body.is_end_stream(),
        }
    }
}
