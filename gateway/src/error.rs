//! What a client is told. The only place that turns a cause into a status, an OpenAI error body and `Retry-After`.

use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use potstill_shared::openai::ErrorBody;

/// Why a request was not served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
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
    /// The key asked too often.
    #[error("the key has used up its requests per minute")]
    RateLimited {
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
    WaitTooLong {
        /// The model.
        model: String,
    },
    /// The pool has no node that works.
    #[error("no node for `{model}` is available")]
    NoNode {
        /// The model.
        model: String,
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
}

impl GatewayError {
    /// HTTP status.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::ModelNotAllowed { .. } => StatusCode::FORBIDDEN,
            Self::Invalid { .. } => StatusCode::BAD_REQUEST,
            Self::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::SlowBody => StatusCode::REQUEST_TIMEOUT,
            Self::ModelNotFound { .. } | Self::NotFound { .. } => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::RateLimited { .. } | Self::QueueFull { .. } => StatusCode::TOO_MANY_REQUESTS,
            Self::WaitTooLong { .. } | Self::NoNode { .. } | Self::Draining => {
                StatusCode::SERVICE_UNAVAILABLE
            }
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
            Self::WaitTooLong { .. } => "wait_too_long",
            Self::NoNode { .. } => "no_node",
            Self::Draining => "draining",
            Self::NodeFailed { .. } => "node_failed",
            Self::NodeTimeout => "node_timeout",
        }
    }

    fn retry_after(&self) -> Option<u64> {
        match self {
            Self::RateLimited { retry_after } | Self::QueueFull { retry_after, .. } => {
                Some((*retry_after).clamp(1, 60))
            }
            Self::WaitTooLong { .. } | Self::NoNode { .. } => Some(5),
            Self::Draining => Some(1),
            _ => None,
        }
    }

    /// OpenAI's error body.
    pub fn body(&self) -> ErrorBody {
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
        if let Some(seconds) = self.retry_after() {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}
