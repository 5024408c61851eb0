//! Sends a request to an endpoint and waits for the response head, within the first-byte timeout. A request that failed on a
//! reused connection which the server had already closed is sent once more on a new connection.

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
use super::endpoint::Endpoint;
use super::error::TransportError;
use super::request::UpstreamRequest;
use super::response_head::ResponseHead;
use super::target::Target;
use crate::time::ms;

/// Why there is no response.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// No response head, or no end of the body, in time.
    #[error("no answer in time")]
    Timeout,
    /// No connection.
    #[error("{0}")]
    Unreachable(String),
    /// The connection broke, or the node broke the protocol.
    #[error("{0}")]
    Failed(String),
}

/// A response whose body is still to be read.
pub struct Exchange {
    /// Status and headers.
    pub head: ResponseHead,
    /// Body.
    pub body: UpstreamBody,
}

/// Body of a response. It drives its own connection and gives it back at its end.
pub struct UpstreamBody {
    connection: Option<Box<Connection>>,
    endpoint: Arc<Endpoint>,
}

impl UpstreamBody {
    /// Polls the next piece. `None` after the end, when the connection has become idle again.
    pub fn poll_data(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Bytes, TransportError>>> {
        let Some(connection) = &mut self.connection else { return Poll::Ready(None) };
        let polled = connection.poll_data(context);
        if connection.has_ended() || matches!(polled, Poll::Ready(Some(Err(_)))) {
            self.connection.take().into_iter().for_each(|connection| self.endpoint.idle.put(connection));
        }
        polled
    }

    /// Returns whether the body was read to its end.
    pub fn has_ended(&self) -> bool {
        self.connection.is_none()
    }

    /// Lower bound of the remaining length in bytes.
    pub fn lower_bound(&self) -> u64 {
        self.connection.as_ref().map_or(0, |connection| connection.lower_bound())
    }
}

/// Sends `request` to `endpoint`. `connect_timeout` limits opening a connection, `first_byte_timeout` limits the time from
/// `now` to the response head.
pub async fn send(
    connector: &Connector,
    endpoint: &Arc<Endpoint>,
    request: &UpstreamRequest,
    now: Instant,
    connect_timeout: Duration,
    first_byte_timeout: Duration,
) -> Result<Exchange, SendError> {
    let idle = std::future::poll_fn(|context| Poll::Ready(endpoint.idle.take(context, now))).await;
    let mut connection = match idle {
        Some(connection) => connection,
        None => open_connection(connector, &endpoint.target, connect_timeout).await?,
    };
    loop {
        let sent = connection.send(request, &endpoint.target);
        match tokio::time::timeout_at(now + first_byte_timeout, sent).await {
            Err(_) => return Err(SendError::Timeout),
            Ok(Ok(head)) => {
                let body = UpstreamBody { connection: Some(connection), endpoint: Arc::clone(endpoint) };
                return Ok(Exchange { head, body });
            }
            // The server had closed the idle connection: not a failure of the node, and nothing was processed.
            Ok(Err(TransportError::Closed | TransportError::Io(_))) if connection.may_be_stale() => {
                connection = open_connection(connector, &endpoint.target, connect_timeout).await?;
            }
            Ok(Err(error)) => return Err(SendError::Failed(error.to_string())),
        }
    }
}

/// Boxed because it is rare, and its state is three times as large as everything else that a request carries.
fn open_connection<'a>(
    connector: &'a Connector,
    target: &'a Target,
    timeout: Duration,
) -> Pin<Box<dyn Future<Output = Result<Box<Connection>, SendError>> + Send + 'a>> {
    Box::pin(
        async move { Connection::open(connector, target, timeout).await.map_err(SendError::Unreachable) },
    )
}

/// Returns whether `GET path` answers with a success status. The body is ignored. With an empty path, only opens a
/// connection.
pub async fn get_ok(connector: &Connector, target: &Target, path: &str) -> bool {
    let Ok(mut connection) = Connection::open(connector, target, ms(10_000)).await else { return false };
    if path.is_empty() {
        return true;
    }
    let Ok(path) = path.parse::<PathAndQuery>() else { return false };
    let mut headers = HeaderMap::new();
    headers.insert(header::USER_AGENT, HeaderValue::from_static("potstill-health"));
    let request = UpstreamRequest { method: Method::GET, path, client_headers: headers, body: Bytes::new() };
    connection.send(&request, target).await.is_ok_and(|head| head.status.is_success())
}
