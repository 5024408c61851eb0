//! Errors that a client receives. The only place of the gateway that maps a cause to an HTTP status, an OpenAI error
//! body and `Retry-After`.

use axum::response::{IntoResponse, Response};
use http::{HeaderName, HeaderValue, StatusCode, header};
use potstill_shared::openai::ErrorBody;

/// The reason why a request was not served.
#[derive(Debug, Clone, thiserror::Error)]
pub enum GatewayError {
    /// The key is missing or unknown. Status 401.
    #[error("the API key is missing or not known; send it as `Authorization: Bearer KEY`")]
    Unauthorized,
    /// The key may not use this model. Status 403.
    #[error("the key `{key}` may not use the model `{model}`")]
    ModelNotAllowed {
        /// Name of the key.
        key: String,
        /// Name of the model.
        model: String,
    },
    /// The request is invalid. Status 400.
    #[error("{message}")]
    InvalidRequest {
        /// Description for people.
        message: String,
        /// Name of the field at fault.
        param: Option<&'static str>,
        /// Error code for programs.
        code: &'static str,
    },
    /// The body is larger than `limits.body_bytes`. Status 413.
    #[error("the request body is larger than {limit} bytes")]
    RequestTooLarge {
        /// The limit, in bytes.
        limit: usize,
    },
    /// The client sent its body too slowly. Status 408.
    #[error("the request body did not arrive in time")]
    RequestTimeout,
    /// No pool serves the model. Status 404.
    #[error("the model `{model}` does not exist; `GET /v1/models` lists those that do")]
    ModelNotFound {
        /// The requested model.
        model: String,
    },
    /// The path is unknown. Status 404.
    #[error("unknown path `{path}`")]
    NotFound {
        /// The requested path.
        path: String,
    },
    /// The path does not support the method. Status 405.
    #[error("the method is not allowed for this path")]
    MethodNotAllowed,
    /// The request head violates a rule of HTTP that protects against request smuggling. Status 400.
    #[error("{message}")]
    InvalidHttpRequest {
        /// Description for people.
        message: &'static str,
    },
    /// The request body has a `content-encoding`. Status 415.
    #[error("the request body must not be encoded; send it without `content-encoding`")]
    UnsupportedContentEncoding,
    /// Load shedding: too many bytes of request bodies are in flight. Status 429.
    #[error("the gateway holds as many bytes of requests as it may")]
    Overloaded,
    /// The key has reached one of its limits. Status 429.
    #[error("the key has used up its {what}")]
    RateLimited {
        /// Name of the limit, such as `requests per minute`.
        what: &'static str,
        /// Seconds until the next request is admitted.
        retry_after: u64,
    },
    /// The queue of the pool is full. Status 429.
    #[error("too many requests are waiting for `{model}`")]
    QueueFull {
        /// Name of the model.
        model: String,
        /// Seconds after which a retry is likely to succeed.
        retry_after: u64,
    },
    /// No slot became free within `queue.wait_ms`. Status 429.
    #[error("no slot for `{model}` came free within the longest wait")]
    QueueTimeout {
        /// Name of the model.
        model: String,
        /// Seconds after which a retry is likely to succeed.
        retry_after: u64,
    },
    /// The pool has no ready node. Status 503.
    #[error("no node for `{model}` is available")]
    NoUpstream {
        /// Name of the model.
        model: String,
        /// Seconds after which a retry is likely to succeed.
        retry_after: u64,
    },
    /// The gateway is shutting down. Status 503.
    #[error("the gateway is shutting down")]
    Draining,
    /// The node failed before the first byte of its response. Status 502.
    #[error("the node failed before it answered: {reason}")]
    NodeFailed {
        /// Description of the failure.
        reason: String,
    },
    /// The node did not respond before a deadline. Status 504.
    #[error("the node did not answer in time")]
    NodeTimeout,
    /// The node rejected the request. Its error body is passed on.
    #[error("{}", body.error.message)]
    NodeError {
        /// Status for the client.
        status: StatusCode,
        /// Normalized error body of the node.
        body: Box<ErrorBody>,
        /// `Retry-After` of the node, in seconds.
        retry_after: Option<u64>,
    },
}

impl GatewayError {
    /// Returns the HTTP status.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::ModelNotAllowed { .. } => StatusCode::FORBIDDEN,
            Self::InvalidRequest { .. } | Self::InvalidHttpRequest { .. } => StatusCode::BAD_REQUEST,
            Self::UnsupportedContentEncoding => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::RequestTooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::RequestTimeout => StatusCode::REQUEST_TIMEOUT,
            Self::ModelNotFound { .. } | Self::NotFound { .. } => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::RateLimited { .. }
            | Self::QueueFull { .. }
            | Self::QueueTimeout { .. }
            | Self::Overloaded => StatusCode::TOO_MANY_REQUESTS,
            Self::NoUpstream { .. } | Self::Draining => StatusCode::SERVICE_UNAVAILABLE,
            Self::NodeError { status, .. } => *status,
            Self::NodeFailed { .. } => StatusCode::BAD_GATEWAY,
            Self::NodeTimeout => StatusCode::GATEWAY_TIMEOUT,
        }
    }

    /// Returns the error code for programs, which is also the `reason` label of metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Unauthorized => "invalid_api_key",
            Self::ModelNotAllowed { .. } => "model_not_allowed",
            Self::InvalidRequest { code, .. } => code,
            Self::RequestTooLarge { .. } => "request_too_large",
            Self::RequestTimeout => "request_timeout",
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
            Self::NodeError { .. } => "node_error",
        }
    }

    fn retry_after_s(&self) -> Option<u64> {
        match self {
            Self::RateLimited { retry_after, .. }
            | Self::QueueFull { retry_after, .. }
            | Self::QueueTimeout { retry_after, .. }
            | Self::NodeError { retry_after: Some(retry_after), .. } => Some((*retry_after).clamp(1, 60)),
            Self::NoUpstream { retry_after, .. } => Some((*retry_after).clamp(1, 600)),
            Self::Draining | Self::Overloaded => Some(1),
            // Every 429 and 503 has a `Retry-After`.
            _ => matches!(self.status().as_u16(), 429 | 503).then_some(5),
        }
    }

    /// Returns whether a fallback pool may serve the request: the pool is full, has no ready node, or its nodes fail.
    pub fn is_retryable_on_fallback(&self) -> bool {
        match self {
            Self::QueueFull { .. }
            | Self::QueueTimeout { .. }
            | Self::NoUpstream { .. }
            | Self::NodeFailed { .. }
            | Self::NodeTimeout => true,
            Self::NodeError { status, .. } => {
                *status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error()
            }
            _ => false,
        }
    }

    /// Returns OpenAI's error body.
    pub fn body(&self) -> ErrorBody {
        if let Self::NodeError { body, .. } = self {
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
            Self::InvalidRequest { param, .. } => *param,
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
        if let Some(seconds) = self.retry_after_s() {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        // Closing the connection prevents the rest of the body from being parsed as another request.
        if matches!(
            self,
            Self::InvalidHttpRequest { .. }
                | Self::RequestTooLarge { .. }
                | Self::RequestTimeout
                | Self::UnsupportedContentEncoding
        ) {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}
