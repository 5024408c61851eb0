//! A slot on a node, held for as long as the request is.

use std::sync::Arc;

use tokio::time::Instant;

use super::node::{Node, NodeState};
use crate::config::OutlierConfig;

/// What a permit needs of the pool that issued it.
pub(super) trait PermitIssuer: Send + Sync {
    /// Name of the model, for logs.
    fn model(&self) -> &str;
    /// Milliseconds on the pool's clock at `now`.
    fn ms_at(&self, now: Instant) -> u64;
    /// Settings of outlier detection.
    fn outlier_config(&self) -> OutlierConfig;
    /// Returns whether another node may be ejected: at least half of the ready ones stay.
    fn may_eject(&self) -> bool;
    /// Counts an ejection.
    fn count_ejection(&self);
    /// Changes the state of a ready node.
    fn set_state_if_ready(self: Arc<Self>, node: &Node, state: NodeState);
    /// A permit was dropped: its slot is free.
    fn released(self: Arc<Self>);
}

/// A slot on a node. Dropping it frees the slot and serves the next waiting request.
pub struct Permit {
    issuer: Arc<dyn PermitIssuer>,
    node: Arc<Node>,
    tokens: u64,
    granted_at: Instant,
}

/// Weight of a completion token relative to a prompt token when a node's speed is measured.
const PROMPT_TOKENS_PER_COMPLETION_TOKEN: u64 = 40;

impl Permit {
    pub(super) fn new(issuer: Arc<dyn PermitIssuer>, node: Arc<Node>, tokens: u64, since: Instant) -> Self {
        node.begin_request(tokens);
        Self { issuer, node, tokens, granted_at: since }
    }

    /// The node that the slot is on.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Records a complete response. `completion_tokens` is `None` if the node reported no usage.
    pub fn record_success(&self, prompt_tokens: u64, completion_tokens: Option<u64>) {
        let now = Instant::now();
        let now_ms = self.issuer.ms_at(now);
        let work = completion_tokens.unwrap_or(0) + prompt_tokens / PROMPT_TOKENS_PER_COMPLETION_TOKEN;
        let mut stats = self.node.stats();
        if stats.outlier.record_success(&self.issuer.outlier_config(), now_ms) {
            tracing::info!(model = self.issuer.model(), node = self.node.name, "node is back");
        }
        stats.concurrency.record_success(self.node.requests());
        let work = if work == 0 { self.tokens } else { work };
        let took = now.saturating_duration_since(self.granted_at).as_secs_f64();
        stats.speed.push(took, work, now_ms);
        stats.token_time.push(self.node.requests(), took * 1e3 / work.max(1) as f64);
    }

    /// Records that the node responded, if only to reject the request.
    pub fn record_response(&self) {
        let now_ms = self.issuer.ms_at(Instant::now());
        self.node.stats().outlier.record_success(&self.issuer.outlier_config(), now_ms);
    }

    /// Records that the node failed to respond, or broke off. Ejects the node after enough failures in a row, unless too few
    /// nodes would be left.
    pub fn record_failure(&self, reason: &str) {
        let now_ms = self.issuer.ms_at(Instant::now());
        let may_eject = self.issuer.may_eject();
        let mut stats = self.node.stats();
        let before = stats.outlier.clone();
        if stats.outlier.record_failure(&self.issuer.outlier_config(), now_ms) {
            if may_eject || before.is_ejected() {
                self.issuer.count_ejection();
                tracing::warn!(model = self.issuer.model(), node = self.node.name, reason, "node ejected");
            } else {
                stats.outlier = before;
            }
        }
    }

    /// Records that no connection to the node can be opened. It receives no requests until a health check succeeds.
    pub fn record_unreachable(&self) {
        Arc::clone(&self.issuer).set_state_if_ready(&self.node, NodeState::Unhealthy);
    }

    /// Records that the node reported to be busy, for `pause_ms` milliseconds if it said so.
    pub fn record_busy(&self, pause_ms: Option<u64>) {
        let mut stats = self.node.stats();
        stats.concurrency.record_busy(self.node.requests());
        if let Some(pause) = pause_ms {
            stats.outlier.pause_until(self.issuer.ms_at(Instant::now()) + pause.min(60_000));
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.node.end_request(self.tokens);
        Arc::clone(&self.issuer).released();
    }
}
