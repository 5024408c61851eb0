//! The nodes of one model, their configuration, and what is counted about them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use potstill_shared::redact::Secret;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::node::{Node, NodeOrigin, NodeSpec, NodeState};
use super::queue::WaitQueue;
use super::retry_budget::RetryBudget;
use super::statistics::{CompletionLengths, TokenTime};
use super::traffic::Traffic;
use super::waiter::Waiter;
use crate::config::PoolConfig;
use crate::scaling_policy::RequestCounts;
use crate::telemetry::metrics::{Metrics, PoolGauges, PoolMetrics};

/// What changes with every request, behind one lock.
pub(super) struct PoolState {
    pub(super) nodes: Vec<Arc<Node>>,
    pub(super) queue: WaitQueue<Waiter>,
    pub(super) retry_budget: RetryBudget,
    pub(super) traffic: Traffic,
    /// Number of balancing decisions so far.
    pub(super) turn: u64,
}

impl PoolState {
    /// Returns whether a node other than `exclude` is ready.
    pub(super) fn has_other_ready_node(&self, exclude: Option<u64>) -> bool {
        self.nodes.iter().any(|node| Some(node.id) != exclude && node.state() == NodeState::Ready)
    }
}

/// The pool of one model.
pub struct ModelPool {
    /// Name of the model.
    pub model: Arc<str>,
    /// Counters.
    pub metrics: PoolMetrics,
    pub(super) config: ArcSwap<PoolConfig>,
    state: Mutex<PoolState>,
    lengths: Mutex<CompletionLengths>,
    next_node: AtomicU64,
    pub(super) epoch: Instant,
    retired: CancellationToken,
    /// Notified when a request finds no node.
    pub(super) capacity_needed: Notify,
    /// Last measured seconds that a node takes to start; 0 before the first.
    pub(super) cold_start_s: AtomicU64,
}

/// Levels of a pool.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PoolLoad {
    /// Requests on nodes.
    pub active: usize,
    /// Estimated tokens that nodes still have to process for them.
    pub tokens: u64,
    /// Requests waiting for a slot.
    pub queued: usize,
    /// Bytes of their bodies.
    pub queued_bytes: usize,
    /// Milliseconds that the oldest of them has waited.
    pub oldest_ms: u64,
    /// Nodes that may receive requests.
    pub ready: usize,
    /// Nodes that start or fail their health checks.
    pub unhealthy: usize,
    /// Nodes that finish their requests and receive no new ones.
    pub draining: usize,
    /// Ready nodes that are ejected as outliers.
    pub ejected: usize,
}

/// Input of the scaling policy from one pool.
#[derive(Debug, Clone)]
pub(crate) struct PoolDemand {
    pub(crate) arrivals: RequestCounts,
    /// Requests that left in the last 60 seconds, served or not.
    pub(crate) departed_60: u64,
    pub(crate) queued: usize,
    pub(crate) active: usize,
    /// Measured milliseconds per token: alone, and for each other request on the node.
    pub(crate) itl_ms: Option<[f64; 2]>,
}

impl ModelPool {
    /// Creates a pool with the nodes of its configuration. They count as ready until a health check fails.
    pub fn new(config: PoolConfig, metrics: &Metrics, retired: CancellationToken) -> Arc<Self> {
        let pool = Arc::new(Self {
            model: config.model.as_str().into(),
            metrics: metrics.pool(&config.model),
            state: Mutex::new(PoolState {
                nodes: Vec::new(),
                queue: WaitQueue::new(config.queue.starvation_ms),
                retry_budget: RetryBudget::default(),
                traffic: Traffic::default(),
                turn: 0,
            }),
            lengths: Mutex::default(),
            next_node: AtomicU64::new(0),
            epoch: Instant::now(),
            retired,
            capacity_needed: Notify::new(),
            cold_start_s: AtomicU64::new(0),
            config: ArcSwap::from_pointee(config),
        });
        pool.add_configured_nodes();
        pool
    }

    /// Takes the pool out of service: its health checks and its actuator end once nothing is in flight.
    pub fn retire(&self) {
        self.retired.cancel();
    }

    /// Cancelled when the pool is taken out of service.
    pub fn retirement_token(&self) -> CancellationToken {
        self.retired.clone()
    }

    /// The current configuration.
    pub fn config(&self) -> arc_swap::Guard<Arc<PoolConfig>> {
        self.config.load()
    }

    /// Milliseconds on the pool's own clock.
    pub fn now_ms(&self) -> u64 {
        self.clock_ms(Instant::now())
    }

    pub(super) fn clock_ms(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.epoch).as_millis() as u64
    }

    pub(super) fn state(&self) -> MutexGuard<'_, PoolState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lengths(&self) -> MutexGuard<'_, CompletionLengths> {
        self.lengths.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the configuration: nodes that it no longer names drain, new ones are added, all others stay.
    pub fn reconfigure(self: &Arc<Self>, config: PoolConfig) {
        self.state().queue.set_starvation_ms(config.queue.starvation_ms);
        self.config.store(Arc::new(config));
        self.add_configured_nodes();
        self.dispatch();
    }

    fn add_configured_nodes(self: &Arc<Self>) {
        let config = self.config();
        let before = self.nodes();
        for wanted in &config.nodes {
            // A node whose settings change stays the same node: its requests still count against its slots. One that was
            // draining comes back.
            if let Some(node) = before.iter().find(|node| node.spec.url == wanted.url) {
                node.stats().concurrency.configure(wanted.max_concurrency);
                if node.state() == NodeState::Draining {
                    node.set_state(NodeState::Ready);
                }
                continue;
            }
            let key = wanted.api_key_env.as_ref().and_then(|variable| std::env::var(variable).ok());
            let spec =
                NodeSpec { key: key.map(Secret::new), ..NodeSpec::new(&wanted.url, wanted.max_concurrency) };
            if let Err(problem) = self.add_node(spec) {
                tracing::error!(url = wanted.url, problem, "the node cannot be used");
            }
        }
        // Draining comes last, so that the pool is never without nodes in between.
        let is_configured = |node: &Node| config.nodes.iter().any(|wanted| wanted.url == node.spec.url);
        for node in
            before.iter().filter(|node| node.spec.origin == NodeOrigin::Config && !is_configured(node))
        {
            node.set_state(NodeState::Draining);
        }
        self.remove_drained();
    }

    /// Adds a node. An error says what is wrong with its URL or key.
    pub fn add_node(self: &Arc<Self>, spec: NodeSpec) -> Result<Arc<Node>, String> {
        let id = self.next_node.fetch_add(1, Ordering::Relaxed);
        let node = Arc::new(Node::new(id, spec)?);
        self.state().nodes.push(Arc::clone(&node));
        self.dispatch();
        Ok(node)
    }

    /// Removes a node. Its running requests continue.
    pub fn remove_node(&self, id: u64) {
        self.state().nodes.retain(|node| node.id != id);
    }

    /// Removes the nodes that have drained. An actuator removes its own.
    pub fn remove_drained(&self) {
        let has_drained = |node: &Node| {
            node.spec.origin != NodeOrigin::Scaler
                && node.state() == NodeState::Draining
                && node.requests() == 0
        };
        self.state().nodes.retain(|node| !has_drained(node));
    }

    /// The nodes.
    pub fn nodes(&self) -> Vec<Arc<Node>> {
        self.state().nodes.clone()
    }

    /// Changes the state of a node, and serves waiting requests if it became ready.
    pub fn set_node_state(self: &Arc<Self>, node: &Node, state: NodeState) {
        if state == NodeState::Ready && matches!(node.state(), NodeState::Unhealthy | NodeState::Starting) {
            node.stats().outlier.reset(self.now_ms());
        }
        node.set_state(state);
        self.dispatch();
    }

    /// Levels of the pool.
    pub fn load(&self) -> PoolLoad {
        let state = self.state();
        let mut load = PoolLoad {
            queued: state.queue.len(),
            queued_bytes: state.queue.bytes(),
            oldest_ms: state.queue.oldest_arrival_ms().map_or(0, |at| self.now_ms().saturating_sub(at)),
            ..PoolLoad::default()
        };
        for node in &state.nodes {
            load.active += node.requests();
            load.tokens += node.outstanding_tokens();
            match node.state() {
                NodeState::Ready => load.ready += 1,
                NodeState::Unhealthy | NodeState::Starting => load.unhealthy += 1,
                NodeState::Draining => load.draining += 1,
            }
            load.ejected += usize::from(node.stats().outlier.is_ejected());
        }
        load
    }

    /// The same for the metrics.
    pub fn gauges(&self) -> PoolGauges {
        let load = self.load();
        PoolGauges {
            model: self.model.to_string(),
            ready: load.ready,
            unhealthy: load.unhealthy,
            draining: load.draining,
            ejected: load.ejected,
            in_flight_requests: load.active,
            in_flight_tokens: load.tokens,
            queued_requests: load.queued,
            queued_bytes: load.queued_bytes,
            oldest_queued_request_age_s: load.oldest_ms as f64 / 1e3,
        }
    }

    /// Expected tokens of a completion: the mean of its stage, or of all stages, but no more than `limit`.
    pub fn expected_completion(&self, stage: Option<&str>, limit: Option<u64>) -> u64 {
        self.lengths().expected_tokens(stage).min(limit.unwrap_or(u64::MAX)).max(1)
    }

    /// Mean tokens of completions and their number, of one stage or of all.
    pub(crate) fn completion_lengths(&self, stage: Option<&str>) -> (Option<f64>, u64) {
        self.lengths().mean_and_count(stage)
    }

    /// Records the length of a complete completion, in tokens.
    pub fn record_completion(&self, stage: Option<&str>, tokens: u64) {
        self.lengths().push(stage, tokens);
    }

    /// Takes a retry from the budget. Returns false if the budget is used up.
    pub fn take_retry(&self) -> bool {
        let allowed = self.state().retry_budget.take_retry();
        if !allowed {
            tracing::warn!(model = &*self.model, "the retry budget is used up");
        }
        allowed
    }

    /// Completes when a request finds no node.
    pub(crate) async fn capacity_needed(&self) {
        self.capacity_needed.notified().await;
    }

    /// Records how many seconds nodes take to start.
    pub(crate) fn set_cold_start(&self, seconds: f64) {
        self.cold_start_s.store(seconds.ceil().max(1.0) as u64, Ordering::Relaxed);
    }

    /// Input of the scaling policy, besides the nodes and the plan.
    pub(crate) fn demand(&self) -> PoolDemand {
        let second = self.now_ms() / 1000;
        let mut state = self.state();
        let traffic = &mut state.traffic;
        let arrivals = RequestCounts {
            s10: traffic.arrivals.count_last(second, 10),
            s60: traffic.arrivals.count_last(second, 60),
            s300: traffic.arrivals.count_last(second, 300),
        };
        let departed_60 = traffic.departures.count_last(second, 60);
        PoolDemand {
            arrivals,
            departed_60,
            queued: state.queue.len(),
            active: state.nodes.iter().map(|node| node.requests()).sum(),
            itl_ms: TokenTime::fit_line(state.nodes.iter().map(|node| node.stats().token_time)),
        }
    }
}
