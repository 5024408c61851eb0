//! Sends a request to a node and waits for its response head: headers by rule, the first-byte clock, one more try on a fresh
//! connection when a kept one turns out to be stale.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, header};
use http_body::{Body, Frame};
use http_body_util::Full;
use hyper::body::Incoming;
use tokio::time::Instant;

use super::connect::Connector;
use super::connection::Connection;
use crate::config::ms;
use crate::pool::node::Node;

/// Headers of the client that no node gets to see: its keys, what concerns one connection only (RFC 9110, section 7.6.1),
/// and what the gateway sets itself.
const KEPT_BACK: [&str; 19] = [
    "authorization",
    "api-key",
    "x-api-key",
    "cookie",
    "proxy-authorization",
    "proxy-authenticate",
    "proxy-connection",
    "connection",
    "keep-alive",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "expect",
    "host",
    "content-length",
    "content-encoding",
    // The gateway reads along, so answers come as they are.
    "accept-encoding",
    "forwarded",
];

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
    /// Headers, filtered.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
}

impl Outgoing {
    /// What passes on of a client's request.
    pub fn new(method: Method, path: PathAndQuery, client: &HeaderMap, body: Bytes) -> Self {
        let listed: Vec<&str> = client
            .get_all(header::CONNECTION)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(',').map(str::trim))
            .collect();
        let mut headers = HeaderMap::with_capacity(client.len() + 2);
        for (name, value) in client {
            let text = name.as_str();
            let back = KEPT_BACK.contains(&text)
                || text.starts_with("x-potstill-")
                || listed.iter().any(|listed| listed.eq_ignore_ascii_case(text));
            if !back {
                headers.append(name, value.clone());
            }
        }
        Self { method, path, headers, body }
    }

    fn request(&self, node: &Node) -> Result<Request<Full<Bytes>>, SendError> {
        let failed = |error: &dyn std::error::Error| SendError::Failed(error.to_string());
        let mut request = Request::new(Full::new(self.body.clone()));
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = if node.url.prefix.is_empty() {
            self.path.clone().into()
        } else {
            format!("{}{}", node.url.prefix, self.path).parse().map_err(|error| failed(&error))?
        };
        let headers = request.headers_mut();
        headers.clone_from(&self.headers);
        let host = HeaderValue::from_str(node.url.authority.as_str()).map_err(|error| failed(&error))?;
        headers.insert(header::HOST, host);
        if let Some(key) = &node.key
            && let Ok(mut value) = HeaderValue::from_str(&format!("Bearer {}", key.expose()))
        {
            value.set_sensitive(true);
            headers.insert(header::AUTHORIZATION, value);
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
    connection: Option<Connection>,
    node: Arc<Node>,
}

impl Answer {
    /// The next frame. At the end the connection is kept for the next request.
    pub fn poll_frame(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let mut polled = std::pin::Pin::new(&mut self.body).poll_frame(context);
        if polled.is_pending()
            && let Some(connection) = &mut self.connection
        {
            connection.drive(context);
            polled = std::pin::Pin::new(&mut self.body).poll_frame(context);
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

/// Sends `outgoing` to `node`.
pub async fn send(
    connector: &Connector,
    node: &Arc<Node>,
    outgoing: &Outgoing,
    connect: Duration,
    first_byte: Duration,
) -> Result<Exchange, SendError> {
    let deadline = Instant::now() + first_byte;
    let kept = std::future::poll_fn(|context| Poll::Ready(node.idle.take(context))).await;
    let mut connection = match kept {
        Some(connection) => connection,
        None => fresh(connector, node, connect).await?,
    };
    loop {
        let request = outgoing.request(node)?;
        match tokio::time::timeout_at(deadline, connection.send(request)).await {
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

async fn fresh(connector: &Connector, node: &Node, connect: Duration) -> Result<Connection, SendError> {
    Connection::open(connector, node, connect).await.map_err(SendError::Unreachable)
}

/// Whether `GET path` succeeds; the body is not looked at. An empty path asks for a connection only.
pub async fn get_ok(connector: &Connector, node: &Node, path: &str) -> bool {
    let Ok(mut connection) = Connection::open(connector, node, ms(10_000)).await else { return false };
    if path.is_empty() {
        return true;
    }
    let Ok(path) = path.parse::<PathAndQuery>() else { return false };
    let mut headers = HeaderMap::new();
    headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    headers.insert(header::USER_AGENT, HeaderValue::from_static("potstill-health"));
    let mut outgoing = Outgoing::new(Method::GET, path, &headers, Bytes::new());
    outgoing.headers.insert(HeaderName::from_static("connection"), HeaderValue::from_static("close"));
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
            client.insert(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        let path = PathAndQuery::from_static("/v1/chat/completions?a=b");
        let outgoing = Outgoing::new(Method::POST, path, &client, Bytes::new());
        let mut names: Vec<_> = outgoing.headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["content-type", "traceparent", "x-stainless-retry-count"]);
    }
}
