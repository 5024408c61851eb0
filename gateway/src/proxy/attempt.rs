//! Attempts of a request within one pool: a slot, a node, and another node when the first one fails before the client has
//! received anything. Except while hedging, a request holds at most one slot: holding one while waiting for another could
//! deadlock.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, StatusCode};
use potstill_shared::openai::{ErrorBody, Usage};
use tokio::time::Instant;

use super::request_record::RequestRecord;
use super::retry::{FailureKind, RetryDecision, decide};
use crate::config::PoolConfig;
use crate::error::GatewayError;
use crate::normalize::completion::{Normalized, normalize};
use crate::normalize::{EndpointKind, error_body};
use crate::pool::{AcquireRequest, ModelPool, Permit};
use crate::telemetry::request_summary::Phase;
use crate::time::ms;
use crate::upstream::connect::Connector;
use crate::upstream::exchange::{Exchange, SendError, send};
use crate::upstream::read_body::read_full_body;
use crate::upstream::request::UpstreamRequest;
use crate::upstream::response_head::ResponseHead;

/// What is attempted.
pub(super) struct Attempt<'a> {
    pub(super) connector: &'a Connector,
    pub(super) kind: EndpointKind,
    pub(super) stream: bool,
    pub(super) token_limit: Option<u64>,
    /// Name of the model that the client sees.
    pub(super) model: &'a str,
    pub(super) request: &'a UpstreamRequest,
    pub(super) config: &'a PoolConfig,
}

/// Response of a node.
pub(super) enum UpstreamResponse {
    /// A stream has begun.
    Stream {
        /// Head and body.
        exchange: Box<Exchange>,
        /// Slot that the stream holds.
        permit: Permit,
    },
    /// The whole response is here.
    Whole {
        /// HTTP status.
        status: StatusCode,
        /// `content-type`.
        content_type: HeaderValue,
        /// Normalized body.
        body: Bytes,
    },
}

/// A successful attempt.
enum AttemptSuccess {
    Stream(Box<Exchange>),
    Whole { status: StatusCode, content_type: HeaderValue, body: Bytes, usage: Option<Usage> },
}

/// A failed attempt.
struct AttemptError {
    kind: FailureKind,
    error: GatewayError,
    /// Milliseconds for which the node asked to receive no requests (`Retry-After`).
    pause_ms: Option<u64>,
}

impl AttemptError {
    fn new(kind: FailureKind, error: GatewayError) -> Self {
        Self { kind, error, pause_ms: None }
    }
}

/// How the next attempt gets its slot.
enum NextSlot {
    /// It has one.
    Acquired(Permit),
    /// It waits for one, on a node other than this.
    Wait(Option<u64>),
    /// There is no next attempt.
    None,
}

/// Returns a response of a node of `pool`.
pub(super) async fn try_pool(
    pool: &Arc<ModelPool>,
    attempt: &Attempt<'_>,
    acquire: &AcquireRequest,
    record: &mut RequestRecord,
) -> Result<UpstreamResponse, GatewayError> {
    let mut next = NextSlot::Wait(None);
    let mut last_error: Option<GatewayError> = None;
    loop {
        let permit = match next {
            NextSlot::Acquired(permit) => Ok((permit, Instant::now())),
            NextSlot::Wait(exclude) => acquire_slot(pool, acquire, exclude, record).await,
            NextSlot::None => {
                Err(GatewayError::NoUpstream { model: attempt.model.to_owned(), retry_after: 5 })
            }
        };
        let permit = match (permit, last_error.take()) {
            (Ok((permit, now)), None) => {
                let overhead =
                    now.saturating_duration_since(record.started).saturating_sub(record.queue_time);
                pool.metrics.overhead.observe(overhead.as_secs_f64());
                permit
            }
            (Ok((permit, _)), Some(error)) => {
                pool.metrics.retries.inc();
                tracing::info!(request = %record.request_id, model = attempt.model, %error, "retrying");
                permit
            }
            // The error of the first node says more than that there is no second one.
            (Err(error), last_error) => return Err(last_error.unwrap_or(error)),
        };
        record.attempts += 1;
        record.phase = Phase::Head;
        let (permit, outcome) = match hedge_delay(attempt) {
            None => {
                let outcome = try_once(attempt, &permit).await;
                (permit, outcome)
            }
            // Boxed because it is rare, and every request would carry its state.
            Some(delay) => Box::pin(try_hedged(pool, attempt, acquire, permit, delay)).await,
        };
        record.node = Some(Arc::clone(permit.node()));
        let failure = match outcome {
            Ok(AttemptSuccess::Stream(exchange)) => return Ok(UpstreamResponse::Stream { exchange, permit }),
            Ok(AttemptSuccess::Whole { status, content_type, body, usage }) => {
                record.complete(usage, 0, Some(permit));
                return Ok(UpstreamResponse::Whole { status, content_type, body });
            }
            Err(failure) => failure,
        };
        let decision = decide(failure.kind, record.attempts < attempt.config.retry.attempts, acquire.class);
        let failed_node = permit.node().id;
        report_failure(&permit, &failure);
        next = next_slot(pool, acquire, decision, failed_node);
        drop(permit);
        last_error = Some(failure.error);
    }
}

/// Records on the node what failed.
fn report_failure(permit: &Permit, failure: &AttemptError) {
    match failure.kind {
        FailureKind::Rejected => permit.record_response(),
        FailureKind::Timeout => permit.record_failure("no answer in time"),
        FailureKind::Busy { .. } => permit.record_busy(failure.pause_ms),
        FailureKind::Failed => permit.record_failure(&failure.error.to_string()),
        FailureKind::Unreachable => permit.record_unreachable(),
    }
}

/// Carries out `decision`; `failed` is the id of the node of the last attempt.
fn next_slot(
    pool: &Arc<ModelPool>,
    acquire: &AcquireRequest,
    decision: RetryDecision,
    failed: u64,
) -> NextSlot {
    match decision {
        RetryDecision::Fail => NextSlot::None,
        RetryDecision::OtherNodeNow { else_wait } => match pool.try_acquire(acquire, failed) {
            Some(permit) if pool.take_retry() => NextSlot::Acquired(permit),
            None if else_wait && pool.take_retry() => NextSlot::Wait(None),
            _ => NextSlot::None,
        },
        RetryDecision::OtherNode { takes_budget } => {
            if takes_budget && !pool.take_retry() {
                NextSlot::None
            } else {
                NextSlot::Wait(Some(failed))
            }
        }
    }
}

/// Waits for a slot. Returns it with the time at which it was granted.
async fn acquire_slot(
    pool: &Arc<ModelPool>,
    acquire: &AcquireRequest,
    exclude: Option<u64>,
    record: &mut RequestRecord,
) -> Result<(Permit, Instant), GatewayError> {
    record.phase = Phase::Queue;
    let since = Instant::now();
    let permit = pool.acquire(acquire, exclude).await;
    let now = Instant::now();
    let waited = now - since;
    record.queue_time += waited;
    pool.metrics.queue_wait.observe(waited.as_secs_f64());
    permit.map(|permit| (permit, now)).inspect_err(|error| {
        record.status = error.status().as_u16();
    })
}

/// Delay after which a second attempt starts beside the first one. Only short responses that are not streamed are hedged.
fn hedge_delay(attempt: &Attempt<'_>) -> Option<Duration> {
    let hedge = attempt.config.hedge.as_ref()?;
    (!attempt.stream && attempt.token_limit? <= hedge.max_tokens).then(|| ms(hedge.delay_ms))
}

/// Attempts on two nodes when the first one is slow. The first success wins.
async fn try_hedged(
    pool: &Arc<ModelPool>,
    attempt: &Attempt<'_>,
    acquire: &AcquireRequest,
    permit: Permit,
    delay: Duration,
) -> (Permit, Result<AttemptSuccess, AttemptError>) {
    // Which attempt decides, and its outcome. The borrows of the permits end with the block.
    let (second, by_second, outcome) = {
        let mut first = std::pin::pin!(try_once(attempt, &permit));
        let early = tokio::select! {
            outcome = &mut first => Some(outcome),
            () = tokio::time::sleep(delay) => None,
        };
        let second = if early.is_none() { pool.try_acquire(acquire, permit.node().id) } else { None };
        match (early, second) {
            (Some(outcome), _) => (None, false, outcome),
            (None, None) => (None, false, first.await),
            (None, Some(second)) => {
                pool.metrics.hedges.inc();
                let (by_second, outcome) = {
                    let mut other = std::pin::pin!(try_once(attempt, &second));
                    let (by_second, outcome) = tokio::select! {
                        outcome = &mut first => (false, outcome),
                        outcome = &mut other => (true, outcome),
                    };
                    match outcome {
                        Ok(success) => (by_second, Ok(success)),
                        // The attempt that failed first does not decide.
                        Err(_) if by_second => (false, first.await),
                        Err(_) => (true, other.await),
                    }
                };
                (Some(second), by_second, outcome)
            }
        }
    };
    match second {
        Some(second) if by_second => (second, outcome),
        _ => (permit, outcome),
    }
}

/// Sends the request to the node of `permit`. A response that is not streamed is read to its end and normalized.
async fn try_once(attempt: &Attempt<'_>, permit: &Permit) -> Result<AttemptSuccess, AttemptError> {
    let deadlines = &attempt.config.deadlines;
    let now = tokio::time::Instant::now();
    let until = now + ms(deadlines.total_ms);
    let (connect, first_byte) = (ms(deadlines.connect_ms), ms(deadlines.first_byte_ms));
    let endpoint = &permit.node().endpoint;
    let sent = send(attempt.connector, endpoint, attempt.request, now, connect, first_byte).await;
    let mut exchange = sent.map_err(transport_failure)?;
    let status = exchange.head.status;
    if attempt.stream && status.is_success() && is_event_stream(&exchange.head) {
        return Ok(AttemptSuccess::Stream(Box::new(exchange)));
    }
    let read = read_full_body(&mut exchange.body, ms(deadlines.idle_ms), until).await;
    let body = read.map_err(transport_failure)?;
    if !status.is_success() {
        return Err(status_failure(&exchange.head, &body));
    }
    let content_type = exchange.head.content_type;
    let json = || HeaderValue::from_static("application/json");
    match normalize(&body, attempt.kind, attempt.model, attempt.config.reasoning) {
        Normalized::Unchanged(usage) => {
            let content_type =
                if attempt.kind == EndpointKind::Other { content_type.unwrap_or_else(json) } else { json() };
            Ok(AttemptSuccess::Whole { status, content_type, body, usage })
        }
        Normalized::Changed(body, usage) => {
            Ok(AttemptSuccess::Whole { status, content_type: json(), body: body.into(), usage })
        }
        Normalized::Error => {
            let (_, error) = error_body::normalize(StatusCode::INTERNAL_SERVER_ERROR, &body);
            Err(AttemptError::new(FailureKind::Failed, node_error(StatusCode::BAD_GATEWAY, error, None)))
        }
        Normalized::Invalid => Err(node_failed("its answer is not what the endpoint answers".to_owned())),
    }
}

fn node_failed(reason: String) -> AttemptError {
    AttemptError::new(FailureKind::Failed, GatewayError::NodeFailed { reason })
}

fn transport_failure(error: SendError) -> AttemptError {
    match error {
        SendError::Timeout => AttemptError::new(FailureKind::Timeout, GatewayError::NodeTimeout),
        SendError::Unreachable(reason) => {
            AttemptError::new(FailureKind::Unreachable, GatewayError::NodeFailed { reason })
        }
        SendError::Failed(reason) => node_failed(reason),
    }
}

fn node_error(status: StatusCode, body: ErrorBody, retry_after: Option<u64>) -> GatewayError {
    GatewayError::NodeError { status, body: Box::new(body), retry_after }
}

/// A node's own error, by its status.
fn status_failure(head: &ResponseHead, body: &Bytes) -> AttemptError {
    let (status, retry_after) = (head.status, head.retry_after_s);
    let (shown_status, body) = error_body::normalize(status, body);
    let error = node_error(shown_status, body, retry_after);
    let pause_ms = retry_after.map(|seconds| seconds * 1000);
    let kind = match status.as_u16() {
        429 | 503 | 529 => FailureKind::Busy { asked_for_pause: pause_ms.is_some() },
        408 | 425 | 500..=599 => FailureKind::Failed,
        _ => FailureKind::Rejected,
    };
    AttemptError { kind, error, pause_ms }
}

fn is_event_stream(head: &ResponseHead) -> bool {
    head.content_type.as_ref().is_some_and(|value| value.as_bytes().starts_with(b"text/event-stream"))
}
