//! Error responses of a node, in OpenAI's form. The only place that chooses HTTP statuses of a node.

use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use potstill_engine::EngineError;
use potstill_shared::openai::ErrorBody;

/// Reasons for an error response.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NodeError {
    /// The body is not the expected JSON. Holds the parser's message.
    #[error("the request body is not valid: {0}")]
    InvalidJson(String),
    /// A field of the request has an invalid value.
    #[error("`{param}` {problem}")]
    InvalidField { param: &'static str, problem: String },
    /// The node does not serve this model.
    #[error("the model `{0}` does not exist; `GET /v1/models` lists the one that this node serves")]
    ModelNotFound(String),
    /// The node has no such path.
    #[error("unknown path `{0}`")]
    NotFound(String),
    /// The path does not support the method.
    #[error("the method is not allowed for this path")]
    MethodNotAllowed,
    /// The engine rejected the request or failed.
    #[error("{0}")]
    Engine(#[from] EngineError),
}

impl NodeError {
    /// Returns HTTP status, parameter and error code.
    fn parts(&self) -> (StatusCode, Option<&'static str>, &'static str) {
        match self {
            Self::InvalidJson(_) => (StatusCode::BAD_REQUEST, None, "invalid_json"),
            Self::InvalidField { param, .. } => (StatusCode::BAD_REQUEST, Some(param), "invalid_value"),
            Self::ModelNotFound(_) => (StatusCode::NOT_FOUND, Some("model"), "model_not_found"),
            Self::NotFound(_) => (StatusCode::NOT_FOUND, None, "not_found"),
            Self::MethodNotAllowed => (StatusCode::METHOD_NOT_ALLOWED, None, "method_not_allowed"),
            Self::Engine(error) => match error {
                EngineError::ContextTooLong { .. } => {
                    (StatusCode::BAD_REQUEST, Some("messages"), "context_length_exceeded")
                }
                EngineError::InvalidParameter { name, .. } => {
                    (StatusCode::BAD_REQUEST, Some(name), "invalid_value")
                }
                EngineError::Grammar(_) => {
                    (StatusCode::BAD_REQUEST, Some("response_format"), "invalid_value")
                }
                EngineError::Template(_) | EngineError::Tokenizer(_) => {
                    (StatusCode::BAD_REQUEST, Some("messages"), "invalid_messages")
                }
                EngineError::QueueFull { .. } => (StatusCode::TOO_MANY_REQUESTS, None, "queue_full"),
                EngineError::Stopped(_) => (StatusCode::SERVICE_UNAVAILABLE, None, "engine_stopped"),
                _ => (StatusCode::INTERNAL_SERVER_ERROR, None, "internal_error"),
            },
        }
    }

    /// Returns the error in OpenAI's form.
    pub(crate) fn body(&self) -> ErrorBody {
        let (status, param, code) = self.parts();
        let kind = match status.as_u16() {
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        };
        ErrorBody::new(self.to_string(), kind, param, Some(code))
    }
}

impl IntoResponse for NodeError {
    fn into_response(self) -> Response {
        let (status, _, _) = self.parts();
        let mut response = (status, self.body().to_json()).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if matches!(status.as_u16(), 429 | 503) {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}
