//! Body of a response to a client.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Response, header};
use http_body::{Body, Frame, SizeHint};

use super::keep_alive::KeepAliveBody;
use super::relay::RelayBody;
use crate::api::chunked_bytes::ChunkedBytes;
use crate::api::responses::stream::ResponsesStream;

/// Body of a response.
pub enum ResponseBody {
    /// Known bytes.
    Bytes(ChunkedBytes),
    /// A relayed stream.
    Relay(Box<RelayBody>),
    /// A relayed stream, translated to events of the Responses API.
    Responses(Box<ResponsesStream<RelayBody>>),
    /// Comments until one of the streams above begins.
    KeepAlive(Box<KeepAliveBody<ResponseBody>>),
    /// A response of the gateway itself.
    Builtin(axum::body::Body),
}

/// A response to a client.
pub type GatewayResponse = Response<ResponseBody>;

impl From<Bytes> for ResponseBody {
    fn from(bytes: Bytes) -> Self {
        Self::Bytes(ChunkedBytes(bytes))
    }
}

impl ResponseBody {
    /// Returns whether events of a node follow.
    pub fn is_stream(&self) -> bool {
        matches!(self, Self::Relay(_) | Self::Responses(_))
    }
}

/// Returns the response that streams `body` as server-sent events.
pub fn event_stream(body: ResponseBody) -> GatewayResponse {
    let mut response = GatewayResponse::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    response
}

/// Converts a response of axum.
pub fn builtin(response: axum::response::Response) -> GatewayResponse {
    response.map(ResponseBody::Builtin)
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        match self.get_mut() {
            Self::Bytes(bytes) => Poll::Ready(bytes.next_chunk().map(|chunk| Ok(Frame::data(chunk)))),
            Self::Relay(relay) => Pin::new(&mut **relay).poll_frame(context),
            Self::Responses(stream) => Pin::new(&mut **stream).poll_frame(context),
            Self::KeepAlive(body) => Pin::new(&mut **body).poll_frame(context),
            Self::Builtin(body) => Pin::new(body)
                .poll_frame(context)
                .map(|frame| frame.map(|frame| frame.map_err(std::io::Error::other))),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Bytes(bytes) => bytes.size_hint(),
            Self::Relay(_) | Self::Responses(_) | Self::KeepAlive(_) => SizeHint::default(),
            Self::Builtin(body) => body.size_hint(),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Bytes(bytes) => bytes.is_end_stream(),
            Self::Relay(_) | Self::Responses(_) | Self::KeepAlive(_) => false,
            Self::Builtin(body) => body.is_end_stream(),
        }
    }
}
