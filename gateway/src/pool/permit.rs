//! A slot on a node, held for as long as the request is.

use std::sync::Arc;

use tokio::time::Instant;

use super::ModelPool;
use super::node::{Node, NodeState};

/// A slot on a node. Dropping it frees the slot and serves the next waiting request.
pub struct Permit {
    pool: Arc<ModelPool>,
    node: Arc<Node>,
    tokens: u64,
    since: Instant,
}

/// How much cheaper a prompt token is than one that is written, when a node's speed is measured.
const PROMPT_SHARE: u64 = 40;

impl Permit {
    pub(super) fn new(pool: Arc<ModelPool>, node: Arc<Node>, tokens: u64, since: Instant) -> Self {
        node.begin(tokens);
        Self { pool, node, tokens, since }
    }

    /// The node that the slot is on.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// The pool of the node.
    pub fn pool(&self) -> &Arc<ModelPool> {
        &self.pool
    }

    /// The node answered to the end, with so many tokens (none if it did not say).
    pub fn success(&self, prompt_tokens: u64, completion_tokens: Option<u64>) {
        let now = Instant::now();
        let now_ms = self.pool.ms_at(now);
        let config = self.pool.config();
        let work = completion_tokens.unwrap_or(0) + prompt_tokens / PROMPT_SHARE;
        let mut learnt = self.node.learnt();
        if learnt.outlier.success(&config.outlier, now_ms) {
            tracing::info!(model = &*self.pool.model, node = self.node.name, "node is back");
        }
        learnt.slots.success(self.node.requests());
        let work = if work == 0 { self.tokens } else { work };
        let took = now.saturating_duration_since(self.since).as_secs_f64();
        learnt.speed.push(took, work, now_ms);
        learnt.token_time.push(self.node.requests(), took * 1e3 / work.max(1) as f64);
    }

    /// The node answered, if only to refuse the request for what it is.
    pub fn answered(&self) {
        let (now_ms, config) = (self.pool.now_ms(), self.pool.config());
        self.node.learnt().outlier.success(&config.outlier, now_ms);
    }

    /// The node failed to answer, or broke off.
    pub fn failure(&self, reason: &str) {
        let now_ms = self.pool.now_ms();
        let may_eject = {
            let state = self.pool.locked();
            self.pool.may_eject(&state)
        };
        let config = self.pool.config();
        let mut learnt = self.node.learnt();
        // The last nodes that work are kept, however badly they do.
        let before = learnt.outlier.clone();
        if learnt.outlier.failure(&config.outlier, now_ms) {
            if may_eject || before.ejected() {
                self.pool.metrics.ejections.inc();
                tracing::warn!(model = &*self.pool.model, node = self.node.name, reason, "node ejected");
            } else {
                learnt.outlier = before;
            }
        }
    }

    /// No connection to the node can be made: it is out until a health check finds it well again.
    pub fn unreachable(&self) {
        self.pool.set_state_if_ready(&self.node, NodeState::Unhealthy);
    }

    /// The node said that it is busy, and perhaps for how long.
    pub fn busy(&self, pause_ms: Option<u64>) {
        let mut learnt = self.node.learnt();
        learnt.slots.busy(self.node.requests());
        if let Some(pause) = pause_ms {
            learnt.outlier.pause_until(self.pool.now_ms() + pause.min(60_000));
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.node.end(self.tokens);
        self.pool.departed();
    }
}
