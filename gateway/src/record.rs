//! What is written down about a request, once, when it is over, however it ends: counters, learnt lengths, the settled
//! reservation, the access log, the trace.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use potstill_shared::openai::Usage;
use tokio::time::Instant;

use crate::api::request_id::RequestId;
use crate::gateway::Shared;
use crate::keys::Key;
use crate::keys::limiter::Reservation;
use crate::pool::node::Node;
use crate::pool::{ModelPool, Permit};
use crate::telemetry::access::Line;

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The client got all of it.
    Complete,
    /// The node broke off.
    Truncated,
    /// The gateway or the node refused it.
    Refused,
    /// The client left.
    ClientLeft,
}

impl End {
    /// As a label.
    pub fn name(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::Truncated => "truncated",
            Self::Refused => "refused",
            Self::ClientLeft => "client_left",
        }
    }
}

/// Where a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Waiting for a slot.
    Queue,
    /// Waiting for the head of the answer, or for a whole answer.
    Head,
    /// In the stream.
    Stream,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Self::Queue => "queue",
            Self::Head => "head",
            Self::Stream => "stream",
        }
    }
}

/// Bytes of bodies that are held now.
#[derive(Default)]
pub struct InFlight(AtomicUsize);

impl InFlight {
    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// A request from when its key is known until it is over.
pub struct Record {
    shared: Arc<Shared>,
    /// Id of the request.
    pub request_id: RequestId,
    /// Whose it is.
    pub key: Arc<Key>,
    /// What it is part of.
    pub stage: Option<String>,
    /// The pool of the model that was asked for.
    pub asked: Arc<ModelPool>,
    /// The pool that serves it.
    pub pool: Arc<ModelPool>,
    /// The node that was asked last.
    pub node: Option<Arc<Node>>,
    /// When it came.
    pub started: Instant,
    /// Trace context of the client (W3C Trace Context).
    pub traceparent: Option<String>,
    /// Nodes tried.
    pub attempts: u32,
    /// Time spent waiting for slots.
    pub waited: Duration,
    /// Where it is.
    pub phase: Phase,
    /// Status of the answer.
    pub status: u16,
    /// How it ended; a record that is dropped before anyone has said so belongs to a client that left.
    pub end: End,
    first: Option<Duration>,
    took: Option<Duration>,
    usage: Usage,
    reservation: Option<Reservation>,
    bytes: usize,
}

impl Record {
    /// Begins a record and counts the bytes of the request.
    pub(crate) fn new(
        shared: &Arc<Shared>,
        request_id: RequestId,
        key: Arc<Key>,
        pool: Arc<ModelPool>,
        started: Instant,
        bytes: usize,
    ) -> Self {
        shared.in_flight.0.fetch_add(bytes, Ordering::Relaxed);
        Self {
            shared: Arc::clone(shared),
            request_id,
            key,
            stage: None,
            asked: Arc::clone(&pool),
            pool,
            node: None,
            started,
            traceparent: None,
            attempts: 0,
            waited: Duration::ZERO,
            phase: Phase::Queue,
            status: 499,
            end: End::ClientLeft,
            first: None,
            took: None,
            usage: Usage::default(),
            reservation: None,
            bytes,
        }
    }

    /// What the request holds of its key's limits.
    pub fn hold(&mut self, reservation: Reservation) {
        self.reservation = Some(reservation);
    }

    /// The first piece of the answer came.
    pub fn first_token(&mut self) {
        if self.first.is_none() {
            let first = self.started.elapsed();
            self.pool.metrics.first_token.observe(first.as_secs_f64());
            self.first = Some(first);
        }
    }

    /// How long it has taken, or took.
    pub fn took(&self) -> Duration {
        self.took.unwrap_or_else(|| self.started.elapsed())
    }

    /// What was seen of the answer; where the node gave no counts, pieces stand for tokens.
    pub fn seen(&mut self, usage: Option<Usage>, pieces: u64) {
        self.usage = usage.unwrap_or(Usage::new(0, pieces));
    }

    /// The answer is whole: its slot is free, its length is learnt.
    pub fn complete(&mut self, usage: Option<Usage>, pieces: u64, permit: Option<Permit>) {
        self.seen(usage, pieces);
        self.first_token();
        self.end = End::Complete;
        if self.usage.completion_tokens > 0 {
            self.pool.learn_length(self.stage.as_deref(), self.usage.completion_tokens);
        }
        // A whole answer has come at once.
        self.took = self.first.filter(|_| self.phase != Phase::Stream);
        if let Some(permit) = permit {
            let completion = (self.usage.completion_tokens > 0).then_some(self.usage.completion_tokens);
            permit.success(self.usage.prompt_tokens, completion);
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let (shared, usage, pool) = (&self.shared, self.usage, &self.pool.metrics);
        shared.in_flight.0.fetch_sub(self.bytes, Ordering::Relaxed);
        if let Some(reservation) = &mut self.reservation {
            reservation.settle(usage.prompt_tokens + usage.completion_tokens);
        }
        let took = self.took();
        let cost = self.pool.config().price.of(usage.prompt_tokens, usage.completion_tokens);
        shared.metrics.ended(pool, &self.pool.model, self.status, self.end.name(), took, usage);
        shared.metrics.usage.add(&self.key.name, self.stage.as_deref(), &self.pool.model, usage, cost);
        match self.end {
            End::ClientLeft => {
                shared.metrics.left.with_label_values(&[&*self.pool.model, self.phase.name()]).inc();
            }
            End::Truncated => pool.cut_streams.inc(),
            End::Complete | End::Refused => {}
        }
        if let Some(first) = self.first.filter(|_| usage.completion_tokens > 1) {
            let rest = took.saturating_sub(first).as_secs_f64();
            pool.per_token.observe(rest / (usage.completion_tokens - 1) as f64);
        }
        if let Some(log) = &shared.access_log {
            log.push(&Line {
                time: std::time::SystemTime::now()
                    .duration_since(std::time::UNIX_EPOCH)
                    .map_or(0.0, |since| since.as_secs_f64()),
                request: self.request_id.as_str(),
                key: &self.key.name,
                model: &self.asked.model,
                stage: self.stage.as_deref(),
                node: self.node.as_ref().map(|node| node.name.as_str()),
                status: self.status,
                end: self.end.name(),
                attempts: self.attempts,
                queue_ms: self.waited.as_secs_f64() * 1e3,
                first_ms: self.first.map(|first| first.as_secs_f64() * 1e3),
                total_ms: took.as_secs_f64() * 1e3,
                prompt_tokens: usage.prompt_tokens,
                completion_tokens: usage.completion_tokens,
                cost,
            });
        }
        if let (Some(recording), End::Complete) = (&shared.recording, self.end) {
            recording.answered(self, took, usage);
        }
        if let Some(traces) = &shared.traces {
            traces.push(self, took, usage);
        }
    }
}
