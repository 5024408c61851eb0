//! Sends a request to a node and waits for its response head: headers by rule, the first-byte clock, one more try on a fresh
//! connection when a kept one turns out to be stale.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method, header};
use tokio::time::Instant;

use super::connect::Connector;
use super::connection::Connection;
use super::fault::Fault;
use super::head::Head;
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

    /// Writes the head of the request to `node`.
    pub(super) fn write_head(&self, node: &Node, output: &mut Vec<u8>) {
        // `keep-alive` and `close` are the usual words, and name no header.
        let usual = |value: &HeaderValue| {
            value.as_bytes().eq_ignore_ascii_case(b"keep-alive") || value.as_bytes() == b"close"
        };
        let listing = !self.client.get_all(header::CONNECTION).iter().all(usual);
        let (method, path) = (self.method.as_str(), self.path.as_str());
        for part in [method, " ", &node.url.prefix, path, " HTTP/1.1\r\n"] {
            output.extend_from_slice(part.as_bytes());
        }
        let mut field = |name: &str, value: &[u8]| {
            for part in [name.as_bytes(), b": ", value, b"\r\n"] {
                output.extend_from_slice(part);
            }
        };
        field("host", node.host.as_bytes());
        for (name, value) in &self.client {
            if passes(name.as_str()) && !(listing && self.is_listed(name.as_str())) {
                field(name.as_str(), value.as_bytes());
            }
        }
        if let Some(key) = &node.authorization {
            field("authorization", key.as_bytes());
        }
        if !self.body.is_empty() || self.method != Method::GET {
            field("content-length", self.body.len().to_string().as_bytes());
        }
        output.extend_from_slice(b"\r\n");
    }
}

/// An answer on its way: its head, and its body with the connection that it comes over.
pub struct Exchange {
    /// Its status, and what it is.
    pub head: Head,
    /// The body.
    pub body: Answer,
}

/// The body of an answer; drives its own connection.
pub struct Answer {
    connection: Option<Box<Connection>>,
    node: Arc<Node>,
}

impl Answer {
    /// The next piece; nothing after the end, where the connection is kept for the next request.
    pub fn poll_data(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Bytes, Fault>>> {
        let Some(connection) = &mut self.connection else { return Poll::Ready(None) };
        let polled = connection.poll_data(context);
        if connection.ended() || matches!(polled, Poll::Ready(Some(Err(_)))) {
            self.connection.take().into_iter().for_each(|connection| self.node.idle.put(connection));
        }
        polled
    }

    /// Whether nothing follows.
    pub fn ended(&self) -> bool {
        self.connection.is_none()
    }

    /// Bytes that follow at least.
    pub fn lower_bound(&self) -> u64 {
        self.connection.as_ref().map_or(0, |connection| connection.lower_bound())
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
        match tokio::time::timeout_at(now + first_byte, connection.send(outgoing, node)).await {
            Err(_) => return Err(SendError::Timeout),
            Ok(Ok(head)) => {
                let body = Answer { connection: Some(connection), node: Arc::clone(node) };
                return Ok(Exchange { head, body });
            }
            // The node had closed it: not its fault, and nothing was answered.
            Ok(Err(Fault::Closed | Fault::Io(_))) if connection.may_be_stale() => {
                connection = fresh(connector, node, connect).await?;
            }
            Ok(Err(fault)) => return Err(SendError::Failed(fault.to_string())),
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
    connection.send(&outgoing, node).await.is_ok_and(|head| head.status.is_success())
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
        let mut head = Vec::new();
        outgoing.write_head(&node, &mut head);
        let head = String::from_utf8(head).unwrap();
        let mut lines: Vec<_> = head.split_terminator("\r\n").collect();
        lines[1..].sort_unstable();
        let wanted = [
            "POST /v1/chat/completions?a=b HTTP/1.1",
            "",
            "content-length: 0",
            "content-type: application/json",
            "host: h:1",
            "traceparent: 00-1-2-3",
            "x-stainless-retry-count: 1",
        ];
        assert_eq!(lines, wanted);
    }
}
