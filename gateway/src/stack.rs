//! The way of a request, every step in order, on one screen. Each step may end it with a [`GatewayError`].
//!
//! ```text
//! request id -> head rules -> key -> rate of the key -> read body (bounded) -> parse once -> model -> bytes held
//!   -> tokens of the key -> pool -> slot (bounded queue, classes, fairness) -> send -> [another node, if nothing was
//!   answered yet] -> [another pool] -> mend and relay -> record
//! ```

use std::sync::Arc;
use std::time::Instant;

use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Version, header};
use hyper::body::Incoming;
use potstill_shared::id::unique;

use crate::api::reply::{Answer, Reply, local};
use crate::api::request::{Head, parse, with_model};
use crate::api::{Endpoint, body, endpoint, responses};
use crate::attempt::{Answered, Job, attempt};
use crate::config::Priority;
use crate::error::GatewayError;
use crate::gateway::{Live, Shared};
use crate::keys::{ClientCertificate, Key};
use crate::pool::{Ask, ModelPool};
use crate::record::{End, Phase, Record};
use crate::upstream::events::Events;
use crate::upstream::mend::Kind;
use crate::upstream::mend::chunk::ChunkMend;
use crate::upstream::relay::Relay;
use crate::upstream::send::Outgoing;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const STAGE: HeaderName = HeaderName::from_static("x-potstill-stage");
const PRIORITY: HeaderName = HeaderName::from_static("x-potstill-priority");
const DEADLINE: HeaderName = HeaderName::from_static("x-potstill-deadline-ms");
const SESSION: HeaderName = HeaderName::from_static("x-session-id");

/// Handles a request of a client.
pub(crate) async fn handle(shared: &Arc<Shared>, mut request: Request<Incoming>) -> Answer {
    let started = Instant::now();
    // An id of the client is kept, so that its own logs and ours meet.
    let request_id = match text(request.headers(), &REQUEST_ID) {
        Some(id) if !id.is_empty() && id.len() <= 128 => id.to_owned(),
        _ => unique("req"),
    };
    if let Ok(id) = HeaderValue::from_str(&request_id) {
        request.headers_mut().insert(REQUEST_ID, id);
    }
    let mut caller = Caller { request_id, started, key: None, stage: None };
    let outcome = match (head_rules(&request), endpoint(request.uri().path())) {
        (Err(error), _) => Err(error),
        (Ok(()), Endpoint::Local) => Ok(local(shared.local(request).await)),
        (Ok(()), _) if request.method() != Method::POST => Err(GatewayError::MethodNotAllowed),
        (Ok(()), endpoint) => serve(shared, request, endpoint, &mut caller).await,
    };
    let mut answer = outcome.unwrap_or_else(|error| {
        shared.metrics.refused.with_label_values(&[error.code()]).inc();
        tracing::info!(
            request = caller.request_id,
            status = error.status().as_u16(),
            reason = error.code(),
            "refused"
        );
        local(error.into_response())
    });
    let headers = answer.headers_mut();
    if let Some(key) = &caller.key {
        key.write_limits(caller.stage.as_deref(), headers);
    }
    if let Ok(value) = HeaderValue::from_str(&caller.request_id) {
        headers.insert(REQUEST_ID, value);
    }
    answer
}

/// Who asks, as far as is known.
struct Caller {
    request_id: String,
    started: Instant,
    key: Option<Arc<Key>>,
    stage: Option<String>,
}

async fn serve(
    shared: &Arc<Shared>,
    request: Request<Incoming>,
    endpoint: Endpoint,
    caller: &mut Caller,
) -> Result<Answer, GatewayError> {
    if shared.stop.is_cancelled() {
        return Err(GatewayError::Draining);
    }
    let live = shared.live();
    let (parts, incoming) = request.into_parts();
    let key = live.keys.authenticate(&parts.headers, parts.extensions.get::<ClientCertificate>().copied())?;
    caller.stage =
        text(&parts.headers, &STAGE).filter(|stage| crate::config::pools::is_name(stage)).map(str::to_owned);
    caller.key = Some(Arc::clone(&key));
    let stage = caller.stage.clone();
    key.admit(stage.as_deref())?;
    let body = body::read(incoming, &parts.headers, &live.config.limits).await?;
    let (kind, body, translated) = match endpoint {
        Endpoint::Node(kind) => (kind, body, None),
        Endpoint::Responses => {
            let (chat, wanted) = responses::request::to_chat(&body)?;
            (Kind::Chat, chat, Some(wanted))
        }
        Endpoint::Local => return Err(GatewayError::NotFound { path: parts.uri.path().to_owned() }),
    };
    let head = parse(&body, kind)?;
    if !key.allows(&head.model) {
        return Err(GatewayError::ModelNotAllowed { key: key.name.to_string(), model: head.model });
    }
    let Some(pool) = shared.pool(&head.model) else {
        return Err(GatewayError::ModelNotFound { model: head.model });
    };
    let class = key.class(text(&parts.headers, &PRIORITY).and_then(Priority::parse));
    shed(shared, &live, body.len(), class)?;
    let tokens =
        body.len() as u64 / 4 + head.choices * pool.expected_completion(stage.as_deref(), head.token_limit);
    let reservation = key.reserve(stage.as_deref(), tokens)?;
    let mut record = Record::new(
        shared,
        caller.request_id.clone(),
        Arc::clone(&key),
        head.model.clone(),
        Arc::clone(&pool),
        caller.started,
        body.len(),
    );
    record.stage = stage;
    record.hold(reservation);
    record.traceparent = text(&parts.headers, &HeaderName::from_static("traceparent")).map(str::to_owned);
    let ask = Ask {
        class,
        key: Arc::clone(&key.name),
        within: text(&parts.headers, &DEADLINE).and_then(|ms| ms.parse().ok()).map(crate::config::ms),
        tokens,
        bytes: body.len(),
        affinity: Some(match text(&parts.headers, &SESSION) {
            Some(session) => crate::balance::hash_text(session),
            None => head.prefix,
        }),
    };
    let path = match &translated {
        Some(_) => PathAndQuery::from_static("/v1/chat/completions"),
        None => parts.uri.path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/")),
    };
    let outgoing = Outgoing::new(parts.method, path, &parts.headers, body);
    let (pool, answered) = somewhere(shared, pool, &head, kind, &ask, outgoing, &mut record).await?;
    let heartbeat = pool.config().heartbeat_ms.or(key.heartbeat_ms());
    Ok(answer(answered, &head, kind, translated, &pool, heartbeat, record))
}

/// Tries the model's pool, then those that may stand in for it.
#[expect(clippy::too_many_arguments, reason = "one step of the path above, with all that it needs")]
async fn somewhere(
    shared: &Arc<Shared>,
    first: Arc<ModelPool>,
    head: &Head,
    kind: Kind,
    ask: &Ask,
    mut outgoing: Outgoing,
    record: &mut Record,
) -> Result<(Arc<ModelPool>, Answered), GatewayError> {
    let body = outgoing.body.clone();
    let mut others = standing_in(shared, &first, &record.key).into_iter();
    let mut next = Some(Arc::clone(&first));
    while let Some(pool) = next.take() {
        let config = pool.config().clone();
        outgoing.body = with_model(&body, head, config.upstream_model.as_deref().unwrap_or(&config.model));
        record.pool = Arc::clone(&pool);
        let job = Job {
            connector: &shared.connector,
            kind,
            stream: head.stream,
            token_limit: head.token_limit,
            model: &config.model,
            outgoing: &outgoing,
            config: &config,
        };
        match attempt(&pool, &job, ask, record).await {
            Ok(answered) => {
                if !Arc::ptr_eq(&pool, &first) {
                    first.metrics.fallbacks.inc();
                }
                return Ok((pool, answered));
            }
            Err(error) => {
                next = if error.elsewhere() { others.next() } else { None };
                if next.is_none() {
                    record.status = error.status().as_u16();
                    record.end = End::Refused;
                    return Err(error);
                }
                tracing::info!(model = head.model, reason = error.code(), "another pool stands in");
            }
        }
    }
    Err(GatewayError::NoNode { model: head.model.clone() })
}

/// The pools that may serve when `first` cannot, as far as the key may use them.
fn standing_in(shared: &Shared, first: &ModelPool, key: &Key) -> Vec<Arc<ModelPool>> {
    let config = first.config();
    config.fallback.iter().filter(|model| key.allows(model)).filter_map(|model| shared.pool(model)).collect()
}

/// The client's answer out of the node's.
fn answer(
    answered: Answered,
    head: &Head,
    kind: Kind,
    translated: Option<responses::request::Wanted>,
    pool: &Arc<ModelPool>,
    heartbeat_ms: Option<u64>,
    mut record: Record,
) -> Answer {
    let model = Arc::clone(&pool.model);
    let mut answer = match answered {
        Answered::Stream { exchange, permit } => {
            record.phase = Phase::Stream;
            record.status = exchange.head.status.as_u16();
            let config = pool.config();
            let own_usage = head.own_usage || translated.is_some();
            let mend = ChunkMend::new(kind, Arc::clone(&model), own_usage, config.reasoning);
            let events = Events::new(mend, true);
            let relay = Relay::new(exchange.body, events, &config.deadlines, heartbeat_ms, permit, record);
            let reply = match translated {
                None => Reply::Relay(Box::new(relay)),
                Some(wanted) => {
                    Reply::Responses(Box::new(responses::stream::ResponsesStream::new(relay, wanted)))
                }
            };
            let mut answer = Answer::new(reply);
            let headers = answer.headers_mut();
            headers
                .insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
            headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
            headers.insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
            answer
        }
        Answered::Whole { status, content_type, body } => {
            let body = match translated {
                None => body,
                Some(wanted) => responses::whole::from_chat(&body, &wanted),
            };
            record.status = status.as_u16();
            let mut answer = Answer::new(Reply::from(body));
            *answer.status_mut() = status;
            answer.headers_mut().insert(header::CONTENT_TYPE, content_type);
            let took = record.started.elapsed().as_millis() as u64;
            answer
                .headers_mut()
                .insert(HeaderName::from_static("openai-processing-ms"), HeaderValue::from(took));
            answer
        }
    };
    if *model != *head.model
        && let Ok(value) = HeaderValue::from_str(&model)
    {
        answer.headers_mut().insert(HeaderName::from_static("x-potstill-served-model"), value);
    }
    answer
}

/// Rules on request heads that keep two readers of one connection from reading two things (RFC 9112, sections 3.2 and 6.1).
fn head_rules(request: &Request<Incoming>) -> Result<(), GatewayError> {
    let headers = request.headers();
    let bad = |message| Err(GatewayError::BadHead { message });
    if request.version() <= Version::HTTP_11 {
        let mut hosts = headers.get_all(header::HOST).iter();
        let named = hosts.next().is_some_and(|host| !host.is_empty());
        if !(named || (request.version() < Version::HTTP_11 && headers.get(header::HOST).is_none())) {
            return bad("the request has no `host` header");
        }
        if hosts.next().is_some() {
            return bad("the request has more than one `host` header");
        }
    }
    let mut codings = headers.get_all(header::TRANSFER_ENCODING).iter();
    if let Some(coding) = codings.next() {
        if codings.next().is_some() || !coding.as_bytes().eq_ignore_ascii_case(b"chunked") {
            return bad("`transfer-encoding` must be `chunked` and nothing else");
        }
        if headers.contains_key(header::CONTENT_LENGTH) {
            return bad("the request has both `content-length` and `transfer-encoding`");
        }
    }
    Ok(())
}

/// Refuses when too many bytes are held: bulk first, then everyone.
fn shed(shared: &Shared, live: &Live, bytes: usize, class: Priority) -> Result<(), GatewayError> {
    let limit = live.config.limits.in_flight_bytes;
    let held = shared.in_flight.bytes() + bytes;
    let share = if class == Priority::Bulk { 80 } else { 95 };
    if held / 100 * 100 > limit / 100 * share { Err(GatewayError::Overloaded) } else { Ok(()) }
}

/// Asks any node of a pool for a document of its own.
pub(crate) async fn fetch(
    shared: &Arc<Shared>,
    key: &Arc<Key>,
    pool: &Arc<ModelPool>,
    path: &'static str,
) -> Result<Response, GatewayError> {
    let config = pool.config().clone();
    let model = pool.model.to_string();
    let mut record =
        Record::new(shared, unique("req"), Arc::clone(key), model, Arc::clone(pool), Instant::now(), 0);
    let outgoing =
        Outgoing::new(Method::GET, PathAndQuery::from_static(path), &HeaderMap::new(), Bytes::new());
    let job = Job {
        connector: &shared.connector,
        kind: Kind::Other,
        stream: false,
        token_limit: Some(1),
        model: &config.model,
        outgoing: &outgoing,
        config: &config,
    };
    let ask = Ask {
        class: key.class(None),
        key: Arc::clone(&key.name),
        within: None,
        tokens: 1,
        bytes: 0,
        affinity: None,
    };
    match attempt(pool, &job, &ask, &mut record).await {
        Ok(Answered::Whole { status, content_type, body }) => {
            record.status = status.as_u16();
            Ok((status, [(header::CONTENT_TYPE, content_type)], body).into_response())
        }
        Ok(Answered::Stream { .. }) => {
            Err(GatewayError::NodeFailed { reason: "a stream where none was asked for".into() })
        }
        Err(error) => {
            record.status = error.status().as_u16();
            record.end = End::Refused;
            Err(error)
        }
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}
