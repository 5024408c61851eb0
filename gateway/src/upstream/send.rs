//! Sends a request to a node and waits for its response head: headers by rule, the first-byte clock, one more try on a fresh
//! connection when a kept one turns out to be stale.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method, Request, header};
use http_body::{Body, Frame};
use hyper::body::Incoming;
use tokio::time::Instant;

use super::connect::Connector;
use super::connection::Connection;
use super::pieces::Pieces;
use crate::config::ms;
use crate::pool::node::Node;

/// Whether a header of the client may reach a node: not its keys, not what concerns one connection only (RFC 9110, section
/// 7.6.1), not what the gateway sets itself.
fn passes(name: &str) -> bool {
    !matches!(
        name,
        "authorization"
            | "api-key"
            | "x-api-key"
            | "cookie"
            | "proxy-authorization"
            | "proxy-authenticate"
            | "proxy-connection"
            | "connection"
            | "keep-alive"
            | "te"
            | "trailer"
            | "transfer-encoding"
            | "upgrade"
            | "expect"
            | "host"
            | "content-length"
            | "content-encoding"
            // The gateway reads along, so answers come as they are.
            | "accept-encoding"
            | "forwarded"
    ) && !name.starts_with("x-potstill-")
}

/// Why a node gave no response head.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// No head in time.
    #[error("no answer in time")]
    Timeout,
    /// No connection.
    #[error("{0}")]
    Unreachable(String),
    /// The connection broke, or the node broke the protocol.
    #[error("{0}")]
    Failed(String),
}

/// What is sent, the same for every node that is tried.
pub struct Outgoing {
    /// `POST`, mostly.
    pub method: Method,
    /// Path and query, below the node's prefix.
    pub path: PathAndQuery,
    /// Headers of the client; those that pass on are picked for each try.
    pub client: HeaderMap,
    /// The body.
    pub body: Bytes,
}

impl Outgoing {
    /// Whether the client said that a header is for this connection only.
    fn is_listed(&self, name: &str) -> bool {
        let lists = self.client.get_all(header::CONNECTION).iter().filter_map(|value| value.to_str().ok());
        lists.flat_map(|list| list.split(',')).any(|listed| listed.trim().eq_ignore_ascii_case(name))
    }

    fn request(&self, node: &Node) -> Result<Request<Pieces>, SendError> {
        let failed = |error: &dyn std::error::Error| SendError::Failed(error.to_string());
        let mut request = Request::new(Pieces(self.body.clone()));
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = if node.url.prefix.is_empty() {
            self.path.clone().into()
        } else {
            format!("{}{}", node.url.prefix, self.path).parse().map_err(|error| failed(&error))?
        };
        let headers = request.headers_mut();
        headers.reserve(self.client.len() + 2);
        headers.insert(header::HOST, node.host.clone());
        // `keep-alive` and `close` are the usual words, and name no header.
        let usual = |value: &HeaderValue| {
            value.as_bytes().eq_ignore_ascii_case(b"keep-alive") || value.as_bytes() == b"close"
        };
        let listing = !self.client.get_all(header::CONNECTION).iter().all(usual);
        for (name, value) in &self.client {
            if passes(name.as_str()) && !(listing && self.is_listed(name.as_str())) {
                headers.append(name, value.clone());
            }
        }
        if let Some(key) = &node.authorization {
            headers.insert(header::AUTHORIZATION, key.clone());
        }
        Ok(request)
    }
}

/// An answer on its way: its head, and its body with the connection that it comes over.
pub struct Exchange {
    /// Status and headers.
    pub head: http::response::Parts,
    /// The body.
    pub body: Answer,
}

/// The body of an answer; drives its own connection.
pub struct Answer {
    body: Incoming,
    connection: Option<Box<Connection>>,
    node: Arc<Node>,
}

impl Answer {
    /// The next frame. At the end the connection is kept for the next request.
    pub fn poll_frame(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let mut polled = Pin::new(&mut self.body).poll_frame(context);
        if polled.is_pending()
            && let Some(connection) = &mut self.connection
        {
            connection.drive(context);
            polled = Pin::new(&mut self.body).poll_frame(context);
        }
        let ended = matches!(polled, Poll::Ready(None)) || (polled.is_ready() && self.body.is_end_stream());
        if ended && let Some(connection) = self.connection.take() {
            self.node.idle.put(connection, context);
        }
        polled
    }

    /// Whether nothing follows.
    pub fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    /// Bytes that follow at least.
    pub fn lower_bound(&self) -> u64 {
        self.body.size_hint().lower()
    }
}

/// Sends `outgoing` to `node`, `now`: `connect` bounds the time for a connection, `first_byte` that for the head.
pub async fn send(
    connector: &Connector,
    node: &Arc<Node>,
    outgoing: &Outgoing,
    now: Instant,
    connect: Duration,
    first_byte: Duration,
) -> Result<Exchange, SendError> {
    let kept = std::future::poll_fn(|context| Poll::Ready(node.idle.take(context, now))).await;
    let mut connection = match kept {
        Some(connection) => connection,
        None => fresh(connector, node, connect).await?,
    };
    loop {
        let request = outgoing.request(node)?;
        match tokio::time::timeout_at(now + first_byte, connection.send(request)).await {
            Err(_) => return Err(SendError::Timeout),
            Ok(Ok(response)) => {
                let (head, body) = response.into_parts();
                let body = Answer { body, connection: Some(connection), node: Arc::clone(node) };
                return Ok(Exchange { head, body });
            }
            // The node had closed it: not its fault, and nothing was answered.
            Ok(Err(_)) if connection.used => connection = fresh(connector, node, connect).await?,
            Ok(Err(error)) => return Err(SendError::Failed(innermost(&error))),
        }
    }
}

/// Boxed: rare, and three times as large as all else that a request carries while it is sent.
fn fresh<'a>(
    connector: &'a Connector,
    node: &'a Node,
    connect: Duration,
) -> Pin<Box<dyn Future<Output = Result<Box<Connection>, SendError>> + Send + 'a>> {
    Box::pin(async move { Connection::open(connector, node, connect).await.map_err(SendError::Unreachable) })
}

/// Whether `GET path` succeeds; the body is not looked at. An empty path asks for a connection only.
pub async fn get_ok(connector: &Connector, node: &Node, path: &str) -> bool {
    let Ok(mut connection) = Connection::open(connector, node, ms(10_000)).await else { return false };
    if path.is_empty() {
        return true;
    }
    let Ok(path) = path.parse::<PathAndQuery>() else { return false };
    let mut headers = HeaderMap::new();
    headers.insert(header::USER_AGENT, HeaderValue::from_static("potstill-health"));
    let outgoing = Outgoing { method: Method::GET, path, client: headers, body: Bytes::new() };
    let Ok(request) = outgoing.request(node) else { return false };
    connection.send(request).await.is_ok_and(|response| response.status().is_success())
}

/// The last cause of an error: what hyper's own message only hints at.
pub fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_hops_stay_here_and_the_rest_passes() {
        let mut client = HeaderMap::new();
        for (name, value) in [
            ("authorization", "Bearer secret"),
            ("x-api-key", "secret"),
            ("cookie", "secret"),
            ("connection", "close, X-Mine"),
            ("x-mine", "secret"),
            ("te", "trailers"),
            ("x-potstill-stage", "generate"),
            ("x-stainless-retry-count", "1"),
            ("traceparent", "00-1-2-3"),
            ("content-type", "application/json"),
        ] {
            client.insert(http::HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        let path = PathAndQuery::from_static("/v1/chat/completions?a=b");
        let outgoing = Outgoing { method: Method::POST, path, client, body: Bytes::new() };
        let node = Node::new(0, crate::pool::node::NodeSpec::new("http://h:1", None)).unwrap();
        let request = outgoing.request(&node).unwrap();
        let mut names: Vec<_> = request.headers().keys().map(http::HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["content-type", "host", "traceparent", "x-stainless-retry-count"]);
    }
}
