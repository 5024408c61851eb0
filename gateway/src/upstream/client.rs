//! The HTTP client of the data path: hyper's own, so nothing has to be switched off (no redirects, no cookies, no
//! decompression, no proxies) and bodies pass through as they are.

use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};

use crate::pool::node::Node;

/// Headers of the client that a node gets to see. Everything else stays here, the client's key above all.
const FORWARDED: [&str; 8] = [
    "content-type",
    "accept",
    "user-agent",
    "x-request-id",
    "idempotency-key",
    "traceparent",
    "tracestate",
    "x-session-id",
];

/// Why a node gave no response head.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// No head in time.
    #[error("no answer in time")]
    Timeout,
    /// The connection failed, or the node broke the protocol.
    #[error("{0}")]
    Failed(String),
}

/// Connections to all nodes.
#[derive(Clone)]
pub struct Upstream {
    client: Client<HttpConnector, Full<Bytes>>,
}

impl Upstream {
    /// A client with the given time to connect.
    pub fn new(connect: Duration) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(connect));
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(Duration::from_secs(30))
            .pool_max_idle_per_host(256)
            .retry_canceled_requests(true)
            .http1_max_buf_size(64 << 10)
            .build(connector);
        Self { client }
    }

    /// Sends a request and waits for the response head.
    pub async fn send(
        &self,
        node: &Node,
        method: Method,
        path: &PathAndQuery,
        client_headers: &HeaderMap,
        body: Bytes,
        first_byte: Duration,
    ) -> Result<Response<Incoming>, SendError> {
        let failed = |error: &dyn std::error::Error| SendError::Failed(innermost(error));
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.uri_mut() = node.uri(path).map_err(|error| failed(&error))?;
        let headers = request.headers_mut();
        for name in FORWARDED {
            for value in client_headers.get_all(name) {
                headers.append(HeaderName::from_static(name), value.clone());
            }
        }
        if let Some(key) = &node.key
            && let Ok(value) = HeaderValue::from_str(&format!("Bearer {}", key.expose()))
        {
            headers.insert(header::AUTHORIZATION, value);
        }
        match tokio::time::timeout(first_byte, self.client.request(request)).await {
            Err(_) => Err(SendError::Timeout),
            Ok(Err(error)) => Err(failed(&error)),
            Ok(Ok(response)) => Ok(response),
        }
    }

    /// Whether `GET path` succeeds; the body is not looked at.
    pub async fn get_ok(&self, node: &Node, path: &str) -> bool {
        let Ok(path) = path.parse::<PathAndQuery>() else { return false };
        let second = Duration::from_secs(60);
        self.send(node, Method::GET, &path, &HeaderMap::new(), Bytes::new(), second)
            .await
            .is_ok_and(|response| response.status().is_success())
    }
}

/// The last cause of an error: what hyper's own message only hints at.
pub fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

/// An answer of the gateway's own body type.
pub type Answer = Response<Body>;
