//! What a client is told. The only place that turns a cause into a status, an OpenAI error body and `Retry-After`.

use axum::response::{IntoResponse, Response};
use http::{HeaderName, HeaderValue, StatusCode, header};
use potstill_shared::openai::ErrorBody;

/// Why a request was not served.
#[derive(Debug, Clone, thiserror::Error)]
pub enum GatewayError {
    /// No key, or one that is not known.
    #[error("the API key is missing or not known; send it as `Authorization: Bearer KEY`")]
    Unauthorized,
    /// The key may not use this model.
    #[error("the key `{key}` may not use the model `{model}`")]
    ModelNotAllowed {
        /// Name of the key.
        key: String,
        /// The model.
        model: String,
    },
    /// The request itself is wrong.
    #[error("{message}")]
    Invalid {
        /// What is wrong.
        message: String,
        /// The field at fault.
        param: Option<&'static str>,
        /// For programs.
        code: &'static str,
    },
    /// The body is larger than allowed.
    #[error("the request body is larger than {limit} bytes")]
    TooLarge {
        /// The limit.
        limit: usize,
    },
    /// The client sent its body too slowly.
    #[error("the request body did not arrive in time")]
    SlowBody,
    /// No pool serves the model.
    #[error("the model `{model}` does not exist; `GET /v1/models` lists those that do")]
    ModelNotFound {
        /// What was asked for.
        model: String,
    },
    /// No such path.
    #[error("unknown path `{path}`")]
    NotFound {
        /// What was asked for.
        path: String,
    },
    /// The path does not take this method.
    #[error("the method is not allowed for this path")]
    MethodNotAllowed,
    /// The request head breaks a rule of HTTP that guards the way to the nodes.
    #[error("{message}")]
    InvalidHttpRequest {
        /// What is wrong.
        message: &'static str,
    },
    /// The request body is encoded.
    #[error("the request body must not be encoded; send it without `content-encoding`")]
    UnsupportedContentEncoding,
    /// The gateway holds as many bytes as it may.
    #[error("the gateway holds as many bytes of requests as it may")]
    Overloaded,
    /// The key asked too much.
    #[error("the key has used up its {what}")]
    RateLimited {
        /// Which limit.
        what: &'static str,
        /// Seconds until the next request is let in.
        retry_after: u64,
    },
    /// The pool's queue is full.
    #[error("too many requests are waiting for `{model}`")]
    QueueFull {
        /// The model.
        model: String,
        /// Seconds until a retry makes sense.
        retry_after: u64,
    },
    /// No slot came free in time.
    #[error("no slot for `{model}` came free within the longest wait")]
    QueueTimeout {
        /// The model.
        model: String,
        /// Seconds until a retry makes sense.
        retry_after: u64,
    },
    /// The pool has no node that works.
    #[error("no node for `{model}` is available")]
    NoUpstream {
        /// The model.
        model: String,
        /// Seconds until a retry makes sense.
        retry_after: u64,
    },
    /// The gateway is shutting down.
    #[error("the gateway is shutting down")]
    Draining,
    /// The node failed before its first byte.
    #[error("the node failed before it answered: {reason}")]
    NodeFailed {
        /// What happened.
        reason: String,
    },
    /// The node did not answer in time.
    #[error("the node did not answer in time")]
    NodeTimeout,
    /// The node itself refused, in its own words.
    #[error("{}", body.error.message)]
    Node {
        /// Its status, as clients should see it.
        status: StatusCode,
        /// Its words.
        body: Box<ErrorBody>,
        /// Its `Retry-After`.
        retry_after: Option<u64>,
    },
}

impl GatewayError {
    /// HTTP status.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::ModelNotAllowed { .. } => StatusCode::FORBIDDEN,
            Self::Invalid { .. } | Self::InvalidHttpRequest { .. } => StatusCode::BAD_REQUEST,
            Self::UnsupportedContentEncoding => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::SlowBody => StatusCode::REQUEST_TIMEOUT,
            Self::ModelNotFound { .. } | Self::NotFound { .. } => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::RateLimited { .. }
            | Self::QueueFull { .. }
            | Self::QueueTimeout { .. }
            | Self::Overloaded => StatusCode::TOO_MANY_REQUESTS,
            Self::NoUpstream { .. } | Self::Draining => StatusCode::SERVICE_UNAVAILABLE,
            Self::Node { status, .. } => *status,
            Self::NodeFailed { .. } => StatusCode::BAD_GATEWAY,
            Self::NodeTimeout => StatusCode::GATEWAY_TIMEOUT,
        }
    }

    /// For programs, and the `reason` label of metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Unauthorized => "invalid_api_key",
            Self::ModelNotAllowed { .. } => "model_not_allowed",
            Self::Invalid { code, .. } => code,
            Self::TooLarge { .. } => "request_too_large",
            Self::SlowBody => "request_timeout",
            Self::ModelNotFound { .. } => "model_not_found",
            Self::NotFound { .. } => "not_found",
            Self::MethodNotAllowed => "method_not_allowed",
            Self::RateLimited { .. } => "rate_limit_exceeded",
            Self::QueueFull { .. } => "queue_full",
            Self::QueueTimeout { .. } => "queue_timeout",
            Self::NoUpstream { .. } => "no_upstream",
            Self::Draining => "draining",
            Self::NodeFailed { .. } => "node_failed",
            Self::NodeTimeout => "node_timeout",
            Self::InvalidHttpRequest { .. } => "invalid_http_request",
            Self::UnsupportedContentEncoding => "unsupported_content_encoding",
            Self::Overloaded => "overloaded",
            Self::Node { .. } => "node_error",
        }
    }

    fn retry_after(&self) -> Option<u64> {
        match self {
            Self::RateLimited { retry_after, .. }
            | Self::QueueFull { retry_after, .. }
            | Self::QueueTimeout { retry_after, .. }
            | Self::Node { retry_after: Some(retry_after), .. } => Some((*retry_after).clamp(1, 60)),
            Self::NoUpstream { retry_after, .. } => Some((*retry_after).clamp(1, 600)),
            Self::Draining | Self::Overloaded => Some(1),
            // Every 429 and 503 says when to come back.
            _ => matches!(self.status().as_u16(), 429 | 503).then_some(5),
        }
    }

    /// Whether another pool may serve the request instead: this one is full, empty or failing.
    pub fn is_retryable_on_fallback(&self) -> bool {
        match self {
            Self::QueueFull { .. }
            | Self::QueueTimeout { .. }
            | Self::NoUpstream { .. }
            | Self::NodeFailed { .. }
            | Self::NodeTimeout => true,
            Self::Node { status, .. } => *status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error(),
            _ => false,
        }
    }

    /// OpenAI's error body.
    pub fn body(&self) -> ErrorBody {
        if let Self::Node { body, .. } = self {
            return ErrorBody::clone(body);
        }
        let kind = match self.status().as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        };
        let param = match self {
            Self::Invalid { param, .. } => *param,
            Self::ModelNotFound { .. } | Self::ModelNotAllowed { .. } => Some("model"),
            _ => None,
        };
        ErrorBody::new(self.to_string(), kind, param, Some(self.code()))
    }
}

impl IntoResponse for GatewayError {
    fn into_response(self) -> Response {
        let mut response = (self.status(), self.body().to_json()).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(HeaderName::from_static("x-potstill-reason"), HeaderValue::from_static(self.code()));
        if let Some(seconds) = self.retry_after() {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        // What is left of such a request on the connection is not to be taken for another one.
        if matches!(
            self,
            Self::InvalidHttpRequest { .. }
                | Self::TooLarge { .. }
                | Self::SlowBody
                | Self::UnsupportedContentEncoding
        ) {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}
