//! The request path: every step of a request in order, on one screen. Each step may end the request with a [`GatewayError`].
//!
//! ```text
//! request id -> header rules -> key -> request rate of the key -> read body (bounded) -> scan fields once -> model
//!   -> load shedding -> token rate of the key -> pool -> slot (bounded queue, classes, fairness) -> send
//!   -> [another node, if the client has received nothing] -> [fallback pool] -> normalize and relay -> record
//! ```

use std::sync::Arc;

use http::uri::PathAndQuery;
use http::{HeaderName, Method, Request};
use hyper::body::Incoming;
use tokio::time::Instant;

use super::context::ProxyContext;
use super::fallback::try_with_fallback;
use super::keep_alive::{FirstResponse, KeepAliveHooks, respond_or_wait};
use super::request_headers::RequestHeaders;
use super::request_record::RequestRecord;
use super::respond::build_response;
use super::response_body::{GatewayResponse, ResponseBody, builtin, event_stream};
use crate::api::request_fields::scan;
use crate::api::request_id::RequestId;
use crate::api::responses::error_event;
use crate::api::route::{Route, route};
use crate::api::{read_body, responses};
use crate::auth::keys::{ClientCertificate, Key};
use crate::error::GatewayError;
use crate::normalize::EndpointKind;
use crate::pool::AcquireRequest;
use crate::time::ms;
use crate::upstream::request::UpstreamRequest;

/// Header of the request id, in both directions.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// What is known of a request from its headers and its key.
struct RequestContext {
    request_id: RequestId,
    started: Instant,
    key: Option<Arc<Key>>,
    headers: RequestHeaders,
}

/// Handles a request. `builtin_endpoints` answers the paths that no node answers.
pub(crate) async fn handle<F, B>(
    context: &Arc<ProxyContext>,
    mut request: Request<Incoming>,
    builtin_endpoints: F,
) -> GatewayResponse
where
    F: FnOnce(Request<Incoming>) -> B,
    B: Future<Output = axum::response::Response>,
{
    let started = Instant::now();
    let mut headers = RequestHeaders::parse(request.headers());
    let request_id = headers.request_id.take().unwrap_or_else(|| {
        let id = RequestId::generate();
        request.headers_mut().insert(REQUEST_ID, id.header());
        id
    });
    let mut known = RequestContext { request_id, started, key: None, headers };
    let outcome = match (known.headers.check(request.version()), route(request.uri().path())) {
        (Err(error), _) => Err(error),
        (Ok(()), Route::Builtin) => Ok(builtin(Box::pin(builtin_endpoints(request)).await)),
        (Ok(()), _) if request.method() != Method::POST => Err(GatewayError::MethodNotAllowed),
        (Ok(()), route) => proxy(context, request, route, &mut known).await,
    };
    let mut response = outcome.unwrap_or_else(|error| {
        context.sinks.request_rejected(known.request_id.as_str(), error.code(), error.status().as_u16());
        builtin(axum::response::IntoResponse::into_response(error))
    });
    let headers = response.headers_mut();
    if let Some(key) = &known.key {
        key.write_rate_limit_headers(known.headers.stage.as_deref(), headers);
    }
    headers.insert(REQUEST_ID, known.request_id.header());
    response
}

async fn proxy(
    context: &Arc<ProxyContext>,
    request: Request<Incoming>,
    route: Route,
    known: &mut RequestContext,
) -> Result<GatewayResponse, GatewayError> {
    if context.draining.is_set() {
        return Err(GatewayError::Draining);
    }
    let config = context.config();
    let (parts, incoming) = request.into_parts();
    let certificate = parts.extensions.get::<ClientCertificate>().copied();
    let key = config.keys.authenticate(&parts.headers, certificate)?;
    known.key = Some(Arc::clone(&key));
    let headers = &mut known.headers;
    let stage = headers.stage.clone();
    key.admit(stage.as_deref())?;
    let body = read_body::read_body(incoming, &parts.headers, &config.limits).await?;
    let (kind, body, responses_request) = match route {
        Route::Upstream(kind) => (kind, body, None),
        Route::Responses => {
            let (chat, responses_request) = responses::request::to_chat(&body)?;
            (EndpointKind::Chat, chat, Some(responses_request))
        }
        Route::Builtin => return Err(GatewayError::NotFound { path: parts.uri.path().to_owned() }),
    };
    let fields = scan(&body, kind)?;
    if !key.allows(&fields.model) {
        return Err(GatewayError::ModelNotAllowed { key: key.name.to_string(), model: fields.model });
    }
    let Some(pool) = context.pools.get(&fields.model) else {
        return Err(GatewayError::ModelNotFound { model: fields.model });
    };
    let class = key.request_class(headers.priority);
    if !context.in_flight.admits(body.len(), class, config.limits.in_flight_bytes) {
        return Err(GatewayError::Overloaded);
    }
    let tokens = body.len() as u64 / 4
        + fields.choices * pool.expected_completion(stage.as_deref(), fields.token_limit);
    let reservation = key.reserve(stage.as_deref(), tokens)?;
    let mut record = RequestRecord::new(
        context,
        known.request_id.clone(),
        Arc::clone(&key),
        Arc::clone(&pool),
        known.started,
        body.len(),
    );
    record.stage = stage;
    record.set_reservation(reservation);
    record.traceparent = headers.traceparent.take();
    let acquire = AcquireRequest {
        class,
        key: Arc::clone(&key.name),
        max_wait: headers.max_wait,
        tokens,
        bytes: body.len(),
        affinity: Some(headers.session.unwrap_or(fields.prefix_hash)),
    };
    let path = match &responses_request {
        Some(_) => PathAndQuery::from_static("/v1/chat/completions"),
        None => parts.uri.path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/")),
    };
    let upstream = UpstreamRequest { method: parts.method, path, client_headers: parts.headers, body };
    if let Some(interval) = pool.config().heartbeat_ms.or(key.heartbeat_ms()).filter(|_| fields.stream) {
        let hooks = keep_alive_hooks(context, known.request_id.clone(), responses_request.is_some());
        let context = Arc::clone(context);
        let pending = Box::pin(async move {
            let (pool, response) =
                try_with_fallback(&context, pool, &fields, kind, &acquire, upstream, &mut record).await?;
            Ok(build_response(response, &fields, kind, responses_request, &pool, Some(interval), record))
        });
        return match respond_or_wait(pending, ms(interval.max(100)), hooks).await {
            FirstResponse::InTime(outcome) => outcome,
            FirstResponse::Waiting(body) => Ok(event_stream(ResponseBody::KeepAlive(Box::new(body)))),
        };
    }
    let (pool, response) =
        try_with_fallback(context, pool, &fields, kind, &acquire, upstream, &mut record).await?;
    let heartbeat_ms = pool.config().heartbeat_ms.or(key.heartbeat_ms());
    Ok(build_response(response, &fields, kind, responses_request, &pool, heartbeat_ms, record))
}

fn keep_alive_hooks(
    context: &Arc<ProxyContext>,
    request_id: RequestId,
    is_responses: bool,
) -> KeepAliveHooks<ResponseBody> {
    let context = Arc::clone(context);
    KeepAliveHooks {
        is_stream: ResponseBody::is_stream,
        error_event: if is_responses {
            error_event
        } else {
            |body, _, _| potstill_shared::sse::data_frame(&body.to_json())
        },
        on_error: Box::new(move |error| {
            context.sinks.request_rejected(request_id.as_str(), error.code(), error.status().as_u16());
        }),
    }
}
