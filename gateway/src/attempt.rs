//! Tries of a request within one pool: a slot, a node, and another one when the first fails before anything has reached the
//! client. A request never holds two slots, but for hedging: it would wait for one while others wait for the one it holds.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, StatusCode};
use potstill_shared::openai::{ErrorBody, Usage};
use tokio::time::Instant;

use crate::config::{PoolConfig, Priority, ms};
use crate::error::GatewayError;
use crate::pool::{Ask, ModelPool, Permit};
use crate::record::{Phase, Record};
use crate::upstream::connect::Connector;
use crate::upstream::head::Head;
use crate::upstream::mend::{Kind, failure, whole as mend};
use crate::upstream::send::{Exchange, Outgoing, SendError, send};
use crate::upstream::whole;

/// What is to be done.
pub(crate) struct Job<'a> {
    pub(crate) connector: &'a Connector,
    pub(crate) kind: Kind,
    pub(crate) stream: bool,
    pub(crate) token_limit: Option<u64>,
    /// Name that the client sees.
    pub(crate) model: &'a str,
    pub(crate) outgoing: &'a Outgoing,
    pub(crate) config: &'a PoolConfig,
}

/// A node's answer.
pub(crate) enum Answered {
    /// A stream has begun.
    Stream {
        /// Its head and body.
        exchange: Box<Exchange>,
        /// The slot that it holds.
        permit: Permit,
    },
    /// The whole answer is here.
    Whole {
        /// Its status.
        status: StatusCode,
        /// What it is.
        content_type: HeaderValue,
        /// Mended.
        body: Bytes,
    },
}

/// A try that went well.
enum Good {
    Stream(Box<Exchange>),
    Whole { status: StatusCode, content_type: HeaderValue, body: Bytes, usage: Option<Usage> },
}

/// Why a try failed.
enum Bad {
    /// The node has no room.
    Busy { error: GatewayError, pause_ms: Option<u64> },
    /// The node failed; another one may do better.
    Failed(GatewayError),
    /// No connection to the node.
    Unreachable(GatewayError),
    /// It may be working still: another node would do the same work again.
    Timeout,
    /// The request is refused for what it is.
    Refused(GatewayError),
}

/// Where the next try gets its slot.
enum Next {
    /// It has one.
    Have(Permit),
    /// It waits for one, on any node but that.
    Wait(Option<u64>),
    /// There is no next try.
    Never,
}

/// Gets an answer from the pool.
pub(crate) async fn attempt(
    pool: &Arc<ModelPool>,
    job: &Job<'_>,
    ask: &Ask,
    record: &mut Record,
) -> Result<Answered, GatewayError> {
    let mut next = Next::Wait(None);
    let mut last: Option<GatewayError> = None;
    loop {
        let permit = match next {
            Next::Have(permit) => Ok((permit, Instant::now())),
            Next::Wait(exclude) => slot(pool, ask, exclude, record).await,
            Next::Never => Err(GatewayError::NoNode { model: job.model.to_owned(), retry_after: 5 }),
        };
        let permit = match (permit, last.take()) {
            (Ok((permit, now)), None) => {
                let before = now.saturating_duration_since(record.started).saturating_sub(record.waited);
                pool.metrics.overhead.observe(before.as_secs_f64());
                permit
            }
            (Ok((permit, _)), Some(error)) => {
                pool.metrics.retries.inc();
                tracing::info!(request = %record.request_id, model = job.model, %error, "tried again");
                permit
            }
            // What the first node said tells more than that there is no second one.
            (Err(error), last) => return Err(last.unwrap_or(error)),
        };
        record.attempts += 1;
        record.phase = Phase::Head;
        let (permit, outcome) = match hedge(job) {
            None => {
                let outcome = once(job, &permit).await;
                (permit, outcome)
            }
            // Rare, so kept out of the state that every request carries.
            Some(after) => Box::pin(hedged(pool, job, ask, permit, after)).await,
        };
        record.node = Some(Arc::clone(permit.node()));
        let bad = match outcome {
            Ok(Good::Stream(exchange)) => return Ok(Answered::Stream { exchange, permit }),
            Ok(Good::Whole { status, content_type, body, usage }) => {
                record.complete(usage, 0, Some(permit));
                return Ok(Answered::Whole { status, content_type, body });
            }
            Err(bad) => bad,
        };
        let more = record.attempts < job.config.retry.attempts;
        let (error, then) = judge(pool, ask, permit, bad, more);
        (last, next) = (Some(error), then);
    }
}

/// What a failed try means for its node, and whether there is another one.
fn judge(pool: &Arc<ModelPool>, ask: &Ask, permit: Permit, bad: Bad, more: bool) -> (GatewayError, Next) {
    let failed = permit.node().id;
    match bad {
        Bad::Refused(error) => {
            permit.answered();
            (error, Next::Never)
        }
        Bad::Timeout => {
            permit.failure("no answer in time");
            (GatewayError::NodeTimeout, Next::Never)
        }
        Bad::Busy { error, pause_ms } => {
            permit.busy(pause_ms);
            if !more {
                return (error, Next::Never);
            }
            let next = match pool.try_acquire(ask, failed) {
                Some(other) if pool.may_retry() => Next::Have(other),
                // Nobody waits for a bulk request: it may wait until the node has room again.
                None if pause_ms.is_some() && ask.class == Priority::Bulk && pool.may_retry() => {
                    Next::Wait(None)
                }
                _ => Next::Never,
            };
            (error, next)
        }
        Bad::Failed(error) => {
            permit.failure(&error.to_string());
            let next = if more && pool.may_retry() { Next::Wait(Some(failed)) } else { Next::Never };
            (error, next)
        }
        Bad::Unreachable(error) => {
            permit.unreachable();
            // Nothing was asked of anyone: this costs no node any work, so no budget.
            (error, if more { Next::Wait(Some(failed)) } else { Next::Never })
        }
    }
}

/// A slot, and when it was got.
async fn slot(
    pool: &Arc<ModelPool>,
    ask: &Ask,
    exclude: Option<u64>,
    record: &mut Record,
) -> Result<(Permit, Instant), GatewayError> {
    record.phase = Phase::Queue;
    let since = Instant::now();
    let permit = pool.acquire(ask, exclude).await;
    let now = Instant::now();
    let waited = now - since;
    record.waited += waited;
    pool.metrics.queue_wait.observe(waited.as_secs_f64());
    permit.map(|permit| (permit, now)).inspect_err(|error| {
        record.status = error.status().as_u16();
    })
}

/// After how long a second try is made beside the first; only for short whole answers.
fn hedge(job: &Job<'_>) -> Option<Duration> {
    let hedge = job.config.hedge.as_ref()?;
    (!job.stream && job.token_limit? <= hedge.max_tokens).then(|| ms(hedge.after_ms))
}

/// Two tries on two nodes when the first is slow; the first to answer wins.
async fn hedged(
    pool: &Arc<ModelPool>,
    job: &Job<'_>,
    ask: &Ask,
    permit: Permit,
    after: Duration,
) -> (Permit, Result<Good, Bad>) {
    // Which of the two tries decides, and what it says; the borrows of the permits end with the block.
    let (second, by_second, outcome) = {
        let mut first = std::pin::pin!(once(job, &permit));
        let early = tokio::select! {
            outcome = &mut first => Some(outcome),
            () = tokio::time::sleep(after) => None,
        };
        let second = if early.is_none() { pool.try_acquire(ask, permit.node().id) } else { None };
        match (early, second) {
            (Some(outcome), _) => (None, false, outcome),
            (None, None) => (None, false, first.await),
            (None, Some(second)) => {
                pool.metrics.hedges.inc();
                let (by_second, outcome) = {
                    let mut other = std::pin::pin!(once(job, &second));
                    let (by_second, outcome) = tokio::select! {
                        outcome = &mut first => (false, outcome),
                        outcome = &mut other => (true, outcome),
                    };
                    match outcome {
                        Ok(good) => (by_second, Ok(good)),
                        // The one that failed first does not decide.
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

async fn once(job: &Job<'_>, permit: &Permit) -> Result<Good, Bad> {
    let node_failed = |reason: String| GatewayError::NodeFailed { reason };
    let deadlines = &job.config.deadlines;
    let now = tokio::time::Instant::now();
    let until = now + ms(deadlines.total_ms);
    let (connect, first_byte) = (ms(deadlines.connect_ms), ms(deadlines.first_byte_ms));
    let sent = send(job.connector, permit.node(), job.outgoing, now, connect, first_byte).await;
    let mut exchange = sent.map_err(|error| match error {
        SendError::Timeout => Bad::Timeout,
        SendError::Unreachable(reason) => Bad::Unreachable(node_failed(reason)),
        SendError::Failed(reason) => Bad::Failed(node_failed(reason)),
    })?;
    let status = exchange.head.status;
    if job.stream && status.is_success() && is_event_stream(&exchange.head) {
        return Ok(Good::Stream(Box::new(exchange)));
    }
    let read = whole::read(&mut exchange.body, ms(deadlines.idle_ms), until).await;
    let body = read.map_err(|error| match error {
        SendError::Timeout => Bad::Timeout,
        other => Bad::Failed(node_failed(other.to_string())),
    })?;
    if !status.is_success() {
        return Err(refusal(&exchange.head, &body));
    }
    let content_type = exchange.head.content_type;
    let usual = || HeaderValue::from_static("application/json");
    match mend::mend(&body, job.kind, job.model, job.config.reasoning) {
        mend::Mended::Same(usage) => {
            let content_type =
                if job.kind == Kind::Other { content_type.unwrap_or_else(usual) } else { usual() };
            Ok(Good::Whole { status, content_type, body, usage })
        }
        mend::Mended::Changed(body, usage) => {
            Ok(Good::Whole { status, content_type: usual(), body: body.into(), usage })
        }
        mend::Mended::Failed => {
            let (_, words) = failure::body(StatusCode::INTERNAL_SERVER_ERROR, &body);
            Err(Bad::Failed(node_error(StatusCode::BAD_GATEWAY, words, None)))
        }
        mend::Mended::Broken => {
            Err(Bad::Failed(node_failed("its answer is not what the endpoint answers".to_owned())))
        }
    }
}

fn node_error(status: StatusCode, body: ErrorBody, retry_after: Option<u64>) -> GatewayError {
    GatewayError::Node { status, body: Box::new(body), retry_after }
}

/// A node's own error, and whether another node may do better.
fn refusal(head: &Head, body: &Bytes) -> Bad {
    let (status, retry_after) = (head.status, head.retry_after);
    let (shown, words) = failure::body(status, body);
    let error = node_error(shown, words, retry_after);
    match status.as_u16() {
        429 | 503 | 529 => Bad::Busy { error, pause_ms: retry_after.map(|seconds| seconds * 1000) },
        408 | 425 | 500..=599 => Bad::Failed(error),
        _ => Bad::Refused(error),
    }
}

fn is_event_stream(head: &Head) -> bool {
    head.content_type.as_ref().is_some_and(|value| value.as_bytes().starts_with(b"text/event-stream"))
}
