//! The way of a request, every step in order, on one screen. Each step may end it with a [`GatewayError`].
//!
//! ```text
//! request id -> head rules -> key -> rate of the key -> read body (bounded) -> parse once -> model -> bytes held
//!   -> tokens of the key -> pool -> slot (bounded queue, classes, fairness) -> send -> [another node, if nothing was
//!   answered yet] -> [another pool] -> mend and relay -> record
//! ```

use std::sync::Arc;
use std::time::Duration;

use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Version, header};
use hyper::body::Incoming;
use tokio::time::Instant;

use crate::api::reply::{Answer, Reply, as_stream, local};
use crate::api::request::{Head, parse, with_model};
use crate::api::request_id::RequestId;
use crate::api::waiting::answer_or_wait;
use crate::api::{Endpoint, body, endpoint, responses};
use crate::attempt::{Answered, Job, attempt};
use crate::config::pools::is_name;
use crate::config::{Priority, ms};
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

/// Headers of a usual answer.
const HEADERS: usize = 9;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// What the gateway itself reads of a request's head, found in one pass.
#[derive(Default)]
struct Told {
    request_id: Option<RequestId>,
    stage: Option<String>,
    priority: Option<Priority>,
    deadline: Option<Duration>,
    session: Option<u64>,
    traceparent: Option<String>,
    hosts: usize,
    codings: usize,
    chunked: bool,
    length: bool,
}

impl Told {
    fn read(headers: &HeaderMap) -> Self {
        let mut told = Self::default();
        for (name, value) in headers {
            let text = || value.to_str().ok();
            match name.as_str() {
                "host" => told.hosts += if value.is_empty() { 2 } else { 1 },
                "transfer-encoding" => {
                    told.codings += 1;
                    told.chunked = value.as_bytes().eq_ignore_ascii_case(b"chunked");
                }
                "content-length" => told.length = true,
                // An id of the client is kept, so that its own logs and ours meet.
                "x-request-id" => told.request_id = RequestId::of(value),
                "x-potstill-stage" => told.stage = text().filter(|stage| is_name(stage)).map(str::to_owned),
                "x-potstill-priority" => told.priority = text().and_then(Priority::parse),
                "x-potstill-deadline-ms" => told.deadline = text().and_then(|ms| ms.parse().ok()).map(ms),
                "x-session-id" => told.session = text().map(crate::balance::hash_text),
                "traceparent" => told.traceparent = text().map(str::to_owned),
                _ => {}
            }
        }
        told
    }

    /// Rules that keep two readers of one connection from reading two things (RFC 9112, sections 3.2 and 6.1).
    fn check(&self, version: Version) -> Result<(), GatewayError> {
        let bad = |message| Err(GatewayError::BadHead { message });
        // In HTTP/2 the authority takes its place.
        let wanted = usize::from(version == Version::HTTP_11);
        if version <= Version::HTTP_11 && !(wanted..=1).contains(&self.hosts) {
            return bad("the request must have one `host` header, and only one");
        }
        if self.codings > 1 || (self.codings == 1 && !self.chunked) {
            return bad("`transfer-encoding` must be `chunked` and nothing else");
        }
        if self.codings == 1 && self.length {
            return bad("the request has both `content-length` and `transfer-encoding`");
        }
        Ok(())
    }
}

/// Handles a request of a client.
pub(crate) async fn handle(shared: &Arc<Shared>, mut request: Request<Incoming>) -> Answer {
    let started = Instant::now();
    let mut told = Told::read(request.headers());
    let request_id = told.request_id.take().unwrap_or_else(|| {
        let id = RequestId::fresh();
        request.headers_mut().insert(REQUEST_ID, id.header());
        id
    });
    let mut caller = Caller { request_id, started, key: None, told };
    let outcome = match (caller.told.check(request.version()), endpoint(request.uri().path())) {
        (Err(error), _) => Err(error),
        (Ok(()), Endpoint::Local) => Ok(local(Box::pin(shared.local(request)).await)),
        (Ok(()), _) if request.method() != Method::POST => Err(GatewayError::MethodNotAllowed),
        (Ok(()), endpoint) => serve(shared, request, endpoint, &mut caller).await,
    };
    let mut answer = outcome.unwrap_or_else(|error| {
        refused(shared, &caller.request_id, &error);
        local(error.into_response())
    });
    let headers = answer.headers_mut();
    if let Some(key) = &caller.key {
        key.write_limits(caller.told.stage.as_deref(), headers);
    }
    headers.insert(REQUEST_ID, caller.request_id.header());
    answer
}

/// Counts and tells a request that gets nothing.
pub(crate) fn refused(shared: &Shared, request_id: &RequestId, error: &GatewayError) {
    shared.metrics.refused.with_label_values(&[error.code()]).inc();
    let (status, reason) = (error.status().as_u16(), error.code());
    tracing::info!(request = %request_id, status, reason, "refused");
}

/// Who asks, as far as is known.
struct Caller {
    request_id: RequestId,
    started: Instant,
    key: Option<Arc<Key>>,
    told: Told,
}

async fn serve(
    shared: &Arc<Shared>,
    request: Request<Incoming>,
    endpoint: Endpoint,
    caller: &mut Caller,
) -> Result<Answer, GatewayError> {
    if shared.stopping() {
        return Err(GatewayError::Draining);
    }
    let live = shared.live();
    let (parts, incoming) = request.into_parts();
    let key = live.keys.authenticate(&parts.headers, parts.extensions.get::<ClientCertificate>().copied())?;
    caller.key = Some(Arc::clone(&key));
    let told = &mut caller.told;
    let stage = told.stage.clone();
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
    let class = key.class(told.priority);
    shed(shared, &live, body.len(), class)?;
    let tokens =
        body.len() as u64 / 4 + head.choices * pool.expected_completion(stage.as_deref(), head.token_limit);
    let reservation = key.reserve(stage.as_deref(), tokens)?;
    let mut record = Record::new(
        shared,
        caller.request_id.clone(),
        Arc::clone(&key),
        Arc::clone(&pool),
        caller.started,
        body.len(),
    );
    record.stage = stage;
    record.hold(reservation);
    record.traceparent = told.traceparent.take();
    let ask = Ask {
        class,
        key: Arc::clone(&key.name),
        within: told.deadline,
        tokens,
        bytes: body.len(),
        affinity: Some(told.session.unwrap_or(head.prefix)),
    };
    let path = match &translated {
        Some(_) => PathAndQuery::from_static("/v1/chat/completions"),
        None => parts.uri.path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/")),
    };
    let outgoing = Outgoing { method: parts.method, path, client: parts.headers, body };
    if let Some(every) = pool.config().heartbeat_ms.or(key.heartbeat_ms()).filter(|_| head.stream) {
        let (owned, responses) = (Arc::clone(shared), translated.is_some());
        let work = Box::pin(async move {
            let (pool, answered) = somewhere(&owned, pool, &head, kind, &ask, outgoing, &mut record).await?;
            Ok(answer(answered, &head, kind, translated, &pool, Some(every), record))
        });
        return answer_or_wait(work, ms(every.max(100)), shared, caller.request_id.clone(), responses).await;
    }
    let (pool, answered) = somewhere(shared, pool, &head, kind, &ask, outgoing, &mut record).await?;
    let heartbeat = pool.config().heartbeat_ms.or(key.heartbeat_ms());
    Ok(answer(answered, &head, kind, translated, &pool, heartbeat, record))
}

/// Tries the model's pool, then those that may stand in for it.
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
    Err(GatewayError::NoNode { model: head.model.clone(), retry_after: 5 })
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
            as_stream(reply)
        }
        Answered::Whole { status, content_type, body } => {
            let body = match translated {
                None => body,
                Some(wanted) => responses::whole::from_chat(&body, &wanted),
            };
            record.status = status.as_u16();
            let mut answer = Answer::new(Reply::from(body));
            *answer.status_mut() = status;
            let headers = answer.headers_mut();
            headers.reserve(HEADERS);
            headers.insert(header::CONTENT_TYPE, content_type);
            let took = record.took().as_millis() as u64;
            headers.insert(HeaderName::from_static("openai-processing-ms"), HeaderValue::from(took));
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
    let mut record =
        Record::new(shared, RequestId::fresh(), Arc::clone(key), Arc::clone(pool), Instant::now(), 0);
    let outgoing = Outgoing {
        method: Method::GET,
        path: PathAndQuery::from_static(path),
        client: HeaderMap::new(),
        body: Bytes::new(),
    };
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
