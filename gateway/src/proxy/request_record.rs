//! The record of one request, from authentication to its end. Dropping it settles the reservation and reports the request,
//! however the request ended.

use std::sync::Arc;
use std::time::Duration;

use potstill_shared::openai::Usage;
use tokio::time::Instant;

use super::context::ProxyContext;
use crate::api::request_id::RequestId;
use crate::auth::keys::Key;
use crate::auth::rate_limit::Reservation;
use crate::pool::node::Node;
use crate::pool::{ModelPool, Permit};
use crate::telemetry::request_summary::{Outcome, Phase, RequestSummary};

/// A request in progress.
pub struct RequestRecord {
    context: Arc<ProxyContext>,
    /// Id of the request.
    pub request_id: RequestId,
    /// Key of the client.
    pub key: Arc<Key>,
    /// Stage of a distillation run, if the client named one.
    pub stage: Option<String>,
    /// Pool of the model that the client asked for.
    pub requested_pool: Arc<ModelPool>,
    /// Pool that serves the request.
    pub pool: Arc<ModelPool>,
    /// Node of the last attempt.
    pub node: Option<Arc<Node>>,
    /// Arrival.
    pub started: Instant,
    /// The client's `traceparent` header (W3C Trace Context).
    pub traceparent: Option<String>,
    /// Attempts on nodes.
    pub attempts: u32,
    /// Time spent waiting for slots.
    pub queue_time: Duration,
    /// What the request waits for.
    pub phase: Phase,
    /// HTTP status of the response; 499 until there is one.
    pub status: u16,
    /// How the request ended. A record that is dropped without an outcome belongs to a client that disconnected.
    pub outcome: Outcome,
    time_to_first_token: Option<Duration>,
    duration: Option<Duration>,
    usage: Usage,
    reservation: Option<Reservation>,
    body_bytes: usize,
}

impl RequestRecord {
    /// Begins a record and counts the bytes of the request body as in flight.
    pub(crate) fn new(
        context: &Arc<ProxyContext>,
        request_id: RequestId,
        key: Arc<Key>,
        pool: Arc<ModelPool>,
        started: Instant,
        body_bytes: usize,
    ) -> Self {
        context.in_flight.add(body_bytes);
        Self {
            context: Arc::clone(context),
            request_id,
            key,
            stage: None,
            requested_pool: Arc::clone(&pool),
            pool,
            node: None,
            started,
            traceparent: None,
            attempts: 0,
            queue_time: Duration::ZERO,
            phase: Phase::Queue,
            status: 499,
            outcome: Outcome::ClientDisconnected,
            time_to_first_token: None,
            duration: None,
            usage: Usage::default(),
            reservation: None,
            body_bytes,
        }
    }

    /// Keeps what the request holds of its key's limits until it is over.
    pub fn set_reservation(&mut self, reservation: Reservation) {
        self.reservation = Some(reservation);
    }

    /// Records that the request ends with `status` and without a response of a node.
    pub fn reject(&mut self, status: u16) {
        self.status = status;
        self.outcome = Outcome::Rejected;
    }

    /// Records the first piece of the response.
    pub fn first_token(&mut self) {
        if self.time_to_first_token.is_none() {
            let elapsed = self.started.elapsed();
            self.pool.metrics.time_to_first_token.observe(elapsed.as_secs_f64());
            self.time_to_first_token = Some(elapsed);
        }
    }

    /// Time from arrival to now, or to the end of the response.
    pub fn duration(&self) -> Duration {
        self.duration.unwrap_or_else(|| self.started.elapsed())
    }

    /// Records tokens. Where the node reported none, each piece of the stream counts as one.
    pub fn set_usage(&mut self, usage: Option<Usage>, pieces: u64) {
        self.usage = usage.unwrap_or(Usage::new(0, pieces));
    }

    /// Records a complete response and frees its slot.
    pub fn complete(&mut self, usage: Option<Usage>, pieces: u64, permit: Option<Permit>) {
        self.set_usage(usage, pieces);
        self.first_token();
        self.outcome = Outcome::Complete;
        if self.usage.completion_tokens > 0 {
            self.pool.record_completion(self.stage.as_deref(), self.usage.completion_tokens);
        }
        // A response that is not streamed arrives all at once.
        self.duration = self.time_to_first_token.filter(|_| self.phase != Phase::Stream);
        if let Some(permit) = permit {
            let completion = (self.usage.completion_tokens > 0).then_some(self.usage.completion_tokens);
            permit.record_success(self.usage.prompt_tokens, completion);
        }
    }
}

impl Drop for RequestRecord {
    fn drop(&mut self) {
        let usage = self.usage;
        self.context.in_flight.remove(self.body_bytes);
        if let Some(reservation) = &mut self.reservation {
            reservation.settle(usage.prompt_tokens + usage.completion_tokens);
        }
        let summary = RequestSummary {
            request_id: self.request_id.as_str(),
            key: &self.key.name,
            stage: self.stage.as_deref(),
            requested_model: &self.requested_pool.model,
            served_model: &self.pool.model,
            node: self.node.as_ref().map(|node| node.name.as_str()),
            traceparent: self.traceparent.as_deref(),
            status: self.status,
            outcome: self.outcome,
            phase: self.phase,
            attempts: self.attempts,
            started: self.started,
            duration: self.duration(),
            time_to_first_token: self.time_to_first_token,
            queue_time: self.queue_time,
            usage,
            cost: self.pool.config().price.cost(usage.prompt_tokens, usage.completion_tokens),
        };
        self.context.sinks.request_ended(&summary, &self.pool.metrics);
    }
}
