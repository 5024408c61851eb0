//! The way of a request, every step in order, on one screen. Each step may end it with a [`GatewayError`].
//!
//! ```text
//! request id -> key -> read body (bounded) -> parse once -> rate of the key -> pool of the model
//!   -> slot (bounded queue) -> send -> [another node, if nothing was answered yet] -> relay -> record
//! ```

use std::sync::Arc;
use std::time::Instant;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::uri::PathAndQuery;
use http::{HeaderName, HeaderValue, Request, StatusCode, header};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use potstill_shared::id::unique;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::config::ms;
use crate::error::GatewayError;
use crate::gateway::Shared;
use crate::pool::node::NodeState;
use crate::pool::{ModelPool, Need, Permit};
use crate::upstream::client::SendError;
use crate::upstream::relay::{Record, Relay};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Handles `POST` on the generation endpoints.
pub(crate) async fn generate(State(shared): State<Arc<Shared>>, request: Request<Body>) -> Response {
    let started = Instant::now();
    // An id of the client is kept, so that its own logs and ours meet.
    let request_id = match request.headers().get(&REQUEST_ID).and_then(|id| id.to_str().ok()) {
        Some(id) if !id.is_empty() && id.len() <= 128 => id.to_owned(),
        _ => unique("req"),
    };
    let mut response = match serve(&shared, request, started, &request_id).await {
        Ok(response) => response,
        Err(error) => {
            shared.metrics.refused.with_label_values(&[error.code()]).inc();
            tracing::info!(
                request = request_id,
                status = error.status().as_u16(),
                reason = error.code(),
                "refused"
            );
            error.into_response()
        }
    };
    if let Ok(value) = HeaderValue::from_str(&request_id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}

async fn serve(
    shared: &Arc<Shared>,
    request: Request<Body>,
    started: Instant,
    request_id: &str,
) -> Result<Response, GatewayError> {
    if shared.stop.is_cancelled() {
        return Err(GatewayError::Draining);
    }
    let (mut parts, body) = request.into_parts();
    let key = shared.keys.authenticate(&parts.headers)?;
    let body =
        read_body(body, shared.config.limits.body_bytes, ms(shared.config.limits.body_idle_ms)).await?;
    let head = parse(&body)?;
    shared.keys.admit(&key)?;
    if !key.allows(&head.model) {
        return Err(GatewayError::ModelNotAllowed { key: key.name.clone(), model: head.model });
    }
    let Some(pool) = shared.pool(&head.model) else {
        return Err(GatewayError::ModelNotFound { model: head.model });
    };
    let path = parts.uri.path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/"));
    if let Ok(id) = HeaderValue::from_str(request_id) {
        parts.headers.insert(REQUEST_ID, id);
    }
    let need = Need { tokens: pool.expected_tokens(body.len(), head.token_limit), bytes: body.len() };
    let (permit, answer) = send(shared, &pool, need, &parts, &path, body).await?;
    shared.metrics.first_byte.with_label_values(&[&head.model]).observe(started.elapsed().as_secs_f64());
    let record = Record {
        key: key.name.clone(),
        request_id: request_id.to_owned(),
        model: head.model,
        started,
        status: answer.status().as_u16(),
        metrics: Arc::clone(&shared.metrics),
        pool: Arc::clone(&pool),
    };
    Ok(relay(answer, head.stream, &pool, record, permit))
}

/// Gets a slot and a response head. A node that is busy, or fails before it answered, is left for another one, once. A
/// request never holds two slots: it would wait for one while others wait for the one it holds.
async fn send(
    shared: &Arc<Shared>,
    pool: &Arc<ModelPool>,
    need: Need,
    parts: &http::request::Parts,
    path: &PathAndQuery,
    body: Bytes,
) -> Result<(Permit, Response<Incoming>), GatewayError> {
    let model = &pool.config.model;
    let first_byte = ms(pool.config.deadlines.first_byte_ms);
    let attempt = async |permit: &Permit| {
        let (node, method) = (permit.node(), parts.method.clone());
        shared.upstream.send(node, method, path, &parts.headers, body.clone(), first_byte).await
    };
    let waiting = Instant::now();
    let permit = pool.acquire(need, None).await?;
    shared.metrics.queue_wait.with_label_values(&[model]).observe(waiting.elapsed().as_secs_f64());
    let first = permit.node().id;
    let second = match attempt(&permit).await {
        Ok(answer) if !retryable(answer.status()) => return Ok((permit, answer)),
        Ok(answer) => {
            tracing::info!(
                model,
                node = permit.node().name,
                status = answer.status().as_u16(),
                "a node is busy"
            );
            match pool.try_acquire(need, first) {
                Some(second) => second,
                // No other node has room now: the busy one's own answer, with its `Retry-After`, is the best there is.
                None => return Ok((permit, answer)),
            }
        }
        // It may be working still: another node would do the same work again.
        Err(SendError::Timeout) => return Err(GatewayError::NodeTimeout),
        Err(SendError::Failed(reason)) => {
            tracing::warn!(model, node = permit.node().name, reason, "a node failed before it answered");
            // Out until a health check finds it well again.
            pool.set_state_if_ready(permit.node(), NodeState::Unhealthy);
            drop(permit);
            let nobody = |_| GatewayError::NodeFailed { reason };
            pool.acquire(need, Some(first)).await.map_err(nobody)?
        }
    };
    shared.metrics.retries.with_label_values(&[model]).inc();
    match attempt(&second).await {
        Ok(answer) => Ok((second, answer)),
        Err(SendError::Timeout) => Err(GatewayError::NodeTimeout),
        Err(SendError::Failed(reason)) => {
            pool.set_state_if_ready(second.node(), NodeState::Unhealthy);
            Err(GatewayError::NodeFailed { reason })
        }
    }
}

/// Statuses that another node may do better at.
fn retryable(status: StatusCode) -> bool {
    matches!(status.as_u16(), 429 | 502 | 503 | 504)
}

fn relay(
    answer: Response<Incoming>,
    asked_stream: bool,
    pool: &ModelPool,
    record: Record,
    permit: Permit,
) -> Response {
    let (head, body) = answer.into_parts();
    let content_type = head.headers.get(header::CONTENT_TYPE).cloned();
    let is_events =
        content_type.as_ref().is_some_and(|value| value.as_bytes().starts_with(b"text/event-stream"));
    let checked = asked_stream && is_events && head.status.is_success();
    let deadlines = &pool.config.deadlines;
    let relay = Relay::new(body, checked, ms(deadlines.idle_ms), ms(deadlines.total_ms), record, permit);
    let mut response = Response::new(Body::new(relay));
    *response.status_mut() = head.status;
    let headers = response.headers_mut();
    // Nothing else of the node's headers passes: no cookies, no server names, no framing.
    if let Some(value) = content_type {
        headers.insert(header::CONTENT_TYPE, value);
    }
    if let Some(value) = head.headers.get(header::RETRY_AFTER) {
        headers.insert(header::RETRY_AFTER, value.clone());
    }
    if is_events {
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        headers.insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    }
    response
}

async fn read_body(mut body: Body, limit: usize, idle: std::time::Duration) -> Result<Bytes, GatewayError> {
    let mut buffer: Vec<u8> = Vec::new();
    loop {
        let frame = tokio::time::timeout(idle, body.frame()).await.map_err(|_| GatewayError::SlowBody)?;
        let Some(frame) = frame else { return Ok(buffer.into()) };
        let frame = frame.map_err(|error| GatewayError::Invalid {
            message: format!("the request body broke off: {error}"),
            param: None,
            code: "invalid_body",
        })?;
        if let Ok(data) = frame.into_data() {
            if buffer.len() + data.len() > limit {
                return Err(GatewayError::TooLarge { limit });
            }
            buffer.extend_from_slice(&data);
        }
    }
}

/// What the gateway itself reads of a request; the node gets the bytes as they came.
#[derive(Debug)]
struct Head {
    model: String,
    stream: bool,
    token_limit: Option<u64>,
}

#[derive(Deserialize)]
struct Fields<'a> {
    model: Option<String>,
    #[serde(default)]
    stream: Option<bool>,
    #[serde(default)]
    max_tokens: Option<u64>,
    #[serde(default)]
    max_completion_tokens: Option<u64>,
    #[serde(borrow, default)]
    messages: Option<&'a RawValue>,
}

fn parse(body: &[u8]) -> Result<Head, GatewayError> {
    let invalid = |message: String, param, code| GatewayError::Invalid { message, param, code };
    let fields: Fields<'_> = serde_json::from_slice(body).map_err(|error| {
        let code = if error.is_data() { "invalid_request" } else { "invalid_json" };
        invalid(format!("the request body is not valid: {error}"), None, code)
    })?;
    let Some(model) = fields.model.filter(|model| !model.is_empty()) else {
        return Err(invalid("`model` is missing".to_owned(), Some("model"), "missing_required_parameter"));
    };
    if fields
        .messages
        .is_some_and(|messages| messages.get().trim_matches(['[', ']', ' ', '\n', '\t']).is_empty())
    {
        return Err(invalid(
            "`messages` must hold at least one message".to_owned(),
            Some("messages"),
            "invalid_value",
        ));
    }
    Ok(Head {
        model,
        stream: fields.stream.unwrap_or(false),
        token_limit: fields.max_completion_tokens.or(fields.max_tokens),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_needed_is_read() {
        let head =
            parse(br#"{"model":"m","stream":true,"messages":[{"x":1}],"max_tokens":5,"other":{"a":[1]}}"#)
                .unwrap();
        assert_eq!((head.model.as_str(), head.stream, head.token_limit), ("m", true, Some(5)));
    }

    #[test]
    fn wrong_bodies_are_told_apart() {
        let code = |body: &str| parse(body.as_bytes()).unwrap_err().code();
        assert_eq!(code("{"), "invalid_json");
        assert_eq!(code("{}"), "missing_required_parameter");
        assert_eq!(code(r#"{"model":"a","model":"b"}"#), "invalid_request");
        assert_eq!(code(r#"{"model":"a","messages":[]}"#), "invalid_value");
        assert_eq!(code(r#"{"model":"a","stream":"yes"}"#), "invalid_request");
    }
}
