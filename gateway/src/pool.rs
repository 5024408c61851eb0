//! A pool: the nodes of one model, the queue in front of them, and the permits that keep count.
//!
//! Invariant: one [`Permit`] per request, taken before the send, owned by the response body. When nothing is in flight
//! every counter is exactly zero.

pub mod budget;
pub mod health;
pub mod learnt;
pub mod node;
pub mod outlier;
pub mod permit;
pub mod queue;
pub mod traffic;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use potstill_shared::redact::Redacted;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::budget::RetryBudget;
use self::learnt::{Lengths, TokenTime};
use self::node::{Node, NodeSpec, NodeState};
pub use self::permit::Permit;
use self::queue::{Place, Ticket, WaitQueue};
use self::traffic::Traffic;
use crate::autoscale::policy::Windows;
use crate::balance::{NodeView, RequestView, mix, pick};
use crate::config::{PoolConfig, Priority};
use crate::error::GatewayError;
use crate::telemetry::{Metrics, PoolMetrics};
use crate::upstream::address::AddressPolicy;

/// What a request asks of a pool.
#[derive(Debug, Clone)]
pub struct Ask {
    /// Its class.
    pub class: Priority,
    /// Whose it is, for fairness.
    pub key: Arc<str>,
    /// When it wants to be on a node, at the latest.
    pub within: Option<Duration>,
    /// Tokens to read and write, estimated.
    pub tokens: u64,
    /// Bytes of its body.
    pub bytes: usize,
    /// Hash of its prompt's beginning, or of its session.
    pub affinity: Option<u64>,
}

struct Waiter {
    affinity: Option<u64>,
    exclude: Option<u64>,
    grant: oneshot::Sender<Result<Permit, GatewayError>>,
}

struct State {
    nodes: Vec<Arc<Node>>,
    queue: WaitQueue<Waiter>,
    budget: RetryBudget,
    traffic: Traffic,
    turn: u64,
}

/// The nodes of one model.
pub struct ModelPool {
    /// The model.
    pub model: Arc<str>,
    /// Its counters.
    pub metrics: PoolMetrics,
    config: ArcSwap<PoolConfig>,
    state: Mutex<State>,
    lengths: Mutex<Lengths>,
    next_node: AtomicU64,
    epoch: Instant,
    stop: CancellationToken,
    /// Told when a request finds no node.
    wanted: Notify,
    /// Seconds that a node takes to start, as last measured; 0 before.
    cold_start_s: AtomicU64,
}

/// What is in flight and waiting.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    /// Requests on nodes.
    pub active: usize,
    /// Their outstanding tokens.
    pub tokens: u64,
    /// Requests waiting.
    pub queued: usize,
    /// Bytes that they hold.
    pub queued_bytes: usize,
    /// How long the first of them has waited.
    pub oldest_ms: u64,
    /// Nodes that may get requests.
    pub ready: usize,
    /// Nodes that are starting or were found ill.
    pub unhealthy: usize,
    /// Nodes that finish what they hold.
    pub draining: usize,
    /// Ready nodes that were ejected for their answers.
    pub ejected: usize,
}

/// What is asked of a pool, for the scaling policy.
#[derive(Debug, Clone)]
pub(crate) struct Demand {
    pub(crate) arrivals: Windows,
    pub(crate) departed_60: u64,
    pub(crate) queued: usize,
    pub(crate) active: usize,
    pub(crate) itl_ms: Option<[f64; 2]>,
}

/// Seconds per token before anything was measured; only ratios count.
const USUAL_SPEED: f64 = 0.02;

/// Waiters that may be passed over because the one free node is not for them.
const PASSED_OVER: usize = 16;

impl ModelPool {
    /// A pool with the nodes of its configuration. They count as ready until a check says otherwise.
    pub fn new(config: PoolConfig, metrics: &Metrics, stop: CancellationToken) -> Arc<Self> {
        let pool = Arc::new(Self {
            model: config.model.as_str().into(),
            metrics: metrics.pool(&config.model),
            state: Mutex::new(State {
                nodes: Vec::new(),
                queue: WaitQueue::new(config.queue.starvation_ms),
                budget: RetryBudget::default(),
                traffic: Traffic::default(),
                turn: 0,
            }),
            lengths: Mutex::default(),
            next_node: AtomicU64::new(0),
            epoch: Instant::now(),
            stop,
            wanted: Notify::new(),
            cold_start_s: AtomicU64::new(0),
            config: ArcSwap::from_pointee(config),
        });
        pool.add_configured();
        pool
    }

    /// Takes the pool out of service: its watchers and its scaler end once nothing is in flight.
    pub fn retire(&self) {
        self.stop.cancel();
    }

    /// Cancelled when the pool is taken out of service.
    pub fn retired(&self) -> CancellationToken {
        self.stop.clone()
    }

    /// The configuration as it is now.
    pub fn config(&self) -> arc_swap::Guard<Arc<PoolConfig>> {
        self.config.load()
    }

    /// Milliseconds on the pool's own clock.
    pub fn now_ms(&self) -> u64 {
        self.ms_at(Instant::now())
    }

    fn ms_at(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.epoch).as_millis() as u64
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a new configuration: nodes that are no longer named drain, new ones are added, the rest goes on.
    pub fn reconfigure(self: &Arc<Self>, config: PoolConfig) {
        self.locked().queue.set_starvation_ms(config.queue.starvation_ms);
        self.config.store(Arc::new(config));
        self.add_configured();
        self.dispatch();
    }

    fn add_configured(self: &Arc<Self>) {
        let config = self.config();
        let before = self.nodes();
        for wanted in &config.nodes {
            // The same node under new settings stays the same node: what it holds still counts against its slots, and one that
            // was draining comes back.
            if let Some(node) = before.iter().find(|node| node.spec.url == wanted.url) {
                node.learnt().slots.configure(wanted.slots);
                if node.state() == NodeState::Draining {
                    node.set_state(NodeState::Ready);
                }
                continue;
            }
            let key = wanted.api_key_env.as_ref().and_then(|variable| std::env::var(variable).ok());
            let spec = NodeSpec { key: key.map(Redacted::new), ..NodeSpec::new(&wanted.url, wanted.slots) };
            if let Err(problem) = self.add_node(spec) {
                tracing::error!(url = wanted.url, problem, "node left out");
            }
        }
        // Afterwards, so that there is never a moment without a node.
        let stays = |node: &Node| {
            node.spec.policy != AddressPolicy::Trusted
                || config.scale.is_some()
                || config.nodes.iter().any(|wanted| wanted.url == node.spec.url)
        };
        for node in before.iter().filter(|node| !stays(node)) {
            node.set_state(NodeState::Draining);
        }
        self.remove_drained();
    }

    /// Adds a node.
    pub fn add_node(self: &Arc<Self>, spec: NodeSpec) -> Result<Arc<Node>, String> {
        let id = self.next_node.fetch_add(1, Ordering::Relaxed);
        let node = Arc::new(Node::new(id, spec)?);
        self.locked().nodes.push(Arc::clone(&node));
        self.dispatch();
        Ok(node)
    }

    /// Takes a node out; requests that it holds go on.
    pub fn remove_node(&self, id: u64) {
        self.locked().nodes.retain(|node| node.id != id);
    }

    /// Takes out the nodes that have drained, besides those that a scaler looks after.
    pub fn remove_drained(&self) {
        if self.config().scale.is_none() {
            self.locked().nodes.retain(|node| node.state() != NodeState::Draining || node.requests() > 0);
        }
    }

    /// The nodes as they are now.
    pub fn nodes(&self) -> Vec<Arc<Node>> {
        self.locked().nodes.clone()
    }

    /// Sets a node's state and lets waiting requests have it when it can work now.
    pub fn set_state(self: &Arc<Self>, node: &Node, state: NodeState) {
        if state == NodeState::Ready && matches!(node.state(), NodeState::Unhealthy | NodeState::Starting) {
            node.learnt().outlier.reset(self.now_ms());
        }
        node.set_state(state);
        self.dispatch();
    }

    /// Marks a ready node; a draining one stays so.
    pub fn set_state_if_ready(self: &Arc<Self>, node: &Node, state: NodeState) {
        if node.state() == NodeState::Ready {
            self.set_state(node, state);
        }
    }

    /// What is in flight and waiting.
    pub fn load(&self) -> Load {
        let pool = self.locked();
        let mut load = Load {
            queued: pool.queue.len(),
            queued_bytes: pool.queue.bytes(),
            oldest_ms: pool.queue.oldest_ms().map_or(0, |at| self.now_ms().saturating_sub(at)),
            ..Load::default()
        };
        for node in &pool.nodes {
            load.active += node.requests();
            load.tokens += node.tokens();
            match node.state() {
                NodeState::Ready => load.ready += 1,
                NodeState::Unhealthy | NodeState::Starting => load.unhealthy += 1,
                NodeState::Draining => load.draining += 1,
            }
            load.ejected += usize::from(node.learnt().outlier.ejected());
        }
        load
    }

    /// Tokens that a completion of that stage will have: its limit or the usual length, whichever is smaller.
    pub fn expected_completion(&self, stage: Option<&str>, limit: Option<u64>) -> u64 {
        let usual = self.lengths.lock().unwrap_or_else(PoisonError::into_inner).expected(stage);
        usual.min(limit.unwrap_or(u64::MAX)).max(1)
    }

    /// Mean tokens of completions, and how many were seen; of one stage or of all.
    pub(crate) fn lengths(&self, stage: Option<&str>) -> (Option<f64>, u64) {
        self.lengths.lock().unwrap_or_else(PoisonError::into_inner).seen(stage)
    }

    /// Learns from a finished completion.
    pub fn learn_length(&self, stage: Option<&str>, tokens: u64) {
        self.lengths.lock().unwrap_or_else(PoisonError::into_inner).push(stage, tokens);
    }

    /// Whether a retry may be made; counts it.
    pub fn may_retry(&self) -> bool {
        let may = self.locked().budget.withdraw();
        if !may {
            tracing::warn!(model = &*self.model, "the retry budget is used up");
        }
        may
    }

    /// Gets a slot on a node, at once or after waiting in the queue. Dropping the future leaves the queue; dropping the
    /// permit frees the slot.
    pub async fn acquire(self: &Arc<Self>, ask: &Ask, exclude: Option<u64>) -> Result<Permit, GatewayError> {
        let config = self.config.load_full();
        let longest = Duration::from_millis(config.queue.wait_ms);
        let wait = ask.within.map_or(longest, |within| within.min(longest));
        let (granted, place) = {
            let mut pool = self.locked();
            let now = Instant::now();
            if exclude.is_none() {
                pool.budget.deposit(config.retry.budget_percent);
            }
            if pool.queue.is_empty()
                && let Some(permit) = self.try_grant(&mut pool, now, ask.tokens, ask.affinity, exclude)
            {
                pool.traffic.arrived.count(self.ms_at(now) / 1000);
                return Ok(permit);
            }
            if config.scale.is_none() && !works_besides(&pool, exclude) {
                return Err(self.no_node());
            }
            let queue = &config.queue;
            while pool.queue.len() >= queue.requests || pool.queue.bytes() + ask.bytes > queue.bytes {
                // A higher class takes the place of a lower one.
                let refused =
                    pool.queue.displaceable(ask.class).and_then(|place| pool.queue.take(&place, false));
                let error = if works_besides(&pool, None) {
                    let retry_after = self.seconds_of_work(&pool);
                    GatewayError::QueueFull { model: self.model.to_string(), retry_after }
                } else {
                    self.no_node()
                };
                match refused {
                    Some(waiter) => {
                        pool.traffic.departed.count(self.ms_at(now) / 1000);
                        drop(waiter.grant.send(Err(error)));
                    }
                    None => return Err(error),
                }
            }
            let now_ms = self.ms_at(now);
            let ticket = Ticket {
                class: ask.class,
                key: Arc::clone(&ask.key),
                deadline_ms: now_ms + wait.as_millis() as u64,
                arrived_ms: now_ms,
                tokens: ask.tokens,
                bytes: ask.bytes,
            };
            pool.traffic.arrived.count(now_ms / 1000);
            if !works_besides(&pool, None) {
                self.wanted.notify_one();
            }
            let (grant, granted) = oneshot::channel();
            let place = pool.queue.push(ticket, Waiter { affinity: ask.affinity, exclude, grant });
            (granted, Waiting { pool: self, place })
        };
        self.dispatch();
        let outcome = tokio::time::timeout(wait, granted).await;
        drop(place);
        match outcome {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err(self.no_node()),
            Err(_) => {
                let pool = self.locked();
                let retry_after = self.seconds_of_work(&pool);
                Err(if works_besides(&pool, None) {
                    GatewayError::WaitTooLong { model: self.model.to_string(), retry_after }
                } else {
                    self.no_node()
                })
            }
        }
    }

    /// A slot on any node but `exclude`, if there is one now and nobody waits for it.
    pub fn try_acquire(self: &Arc<Self>, ask: &Ask, exclude: u64) -> Option<Permit> {
        let mut pool = self.locked();
        if pool.queue.is_empty() {
            self.try_grant(&mut pool, Instant::now(), ask.tokens, ask.affinity, Some(exclude))
        } else {
            None
        }
    }

    /// Seconds until what waits now is on a node, as far as can be told.
    fn seconds_of_work(&self, pool: &State) -> u64 {
        let (views, usual) = self.views(pool, self.now_ms());
        let slots: usize = views.iter().map(|view| view.slots).sum();
        let tokens = self.lengths.lock().unwrap_or_else(PoisonError::into_inner).expected(None);
        let seconds = usual * tokens as f64 * (pool.queue.len() + 1) as f64 / slots.max(1) as f64;
        (seconds.ceil() as u64).clamp(1, 60)
    }

    fn views(&self, pool: &State, now_ms: u64) -> (Vec<NodeView>, f64) {
        let speeds = pool.nodes.iter().filter_map(|node| node.learnt().speed.measured());
        let (sum, count) = speeds.fold((0.0, 0u32), |(sum, count), speed| (sum + speed, count + 1));
        let usual = if count == 0 { USUAL_SPEED } else { sum / f64::from(count) };
        let config = self.config.load();
        (pool.nodes.iter().map(|node| node.view(&config.outlier, usual, now_ms)).collect(), usual)
    }

    fn try_grant(
        self: &Arc<Self>,
        pool: &mut State,
        now: Instant,
        tokens: u64,
        affinity: Option<u64>,
        exclude: Option<u64>,
    ) -> Option<Permit> {
        let (views, _) = self.views(pool, self.ms_at(now));
        pool.turn += 1;
        let request = RequestView {
            tokens,
            affinity,
            waiting: pool.queue.len().saturating_sub(1),
            exclude: exclude.and_then(|id| pool.nodes.iter().position(|node| node.id == id)),
            random: mix(pool.turn ^ now.saturating_duration_since(self.epoch).as_nanos() as u64),
        };
        let at = pick(self.config.load().balance, &views, &request, pool.turn)?;
        Some(Permit::new(Arc::clone(self), Arc::clone(&pool.nodes[at]), tokens, now))
    }

    /// There is no node; where one can be started, the client may come back when that would be done.
    fn no_node(&self) -> GatewayError {
        let retry_after = match (self.cold_start_s.load(Ordering::Relaxed), &self.config.load().scale) {
            (0, Some(scale)) => scale.cold_start_s as u64,
            (measured, Some(_)) => measured,
            (_, None) => 5,
        };
        GatewayError::NoNode { model: self.model.to_string(), retry_after }
    }

    /// A slot was freed.
    fn departed(self: &Arc<Self>) {
        let waiting = {
            let mut pool = self.locked();
            pool.traffic.departed.count(self.now_ms() / 1000);
            !pool.queue.is_empty()
        };
        if waiting {
            self.dispatch();
        }
    }

    /// Ends when a request finds no node.
    pub(crate) async fn node_wanted(&self) {
        self.wanted.notified().await;
    }

    /// Says how long nodes take to start.
    pub(crate) fn set_cold_start(&self, seconds: f64) {
        self.cold_start_s.store(seconds.ceil().max(1.0) as u64, Ordering::Relaxed);
    }

    /// What the scaling policy is told, besides the nodes and the plan.
    pub(crate) fn demand(&self) -> Demand {
        let second = self.now_ms() / 1000;
        let mut pool = self.locked();
        let traffic = &mut pool.traffic;
        let arrivals = Windows {
            s10: traffic.arrived.last(second, 10),
            s60: traffic.arrived.last(second, 60),
            s300: traffic.arrived.last(second, 300),
        };
        let departed_60 = traffic.departed.last(second, 60);
        Demand {
            arrivals,
            departed_60,
            queued: pool.queue.len(),
            active: pool.nodes.iter().map(|node| node.requests()).sum(),
            itl_ms: TokenTime::line(pool.nodes.iter().map(|node| node.learnt().token_time)),
        }
    }

    /// Hands free slots to those who wait, in the queue's order.
    pub(crate) fn dispatch(self: &Arc<Self>) {
        // Permits of clients that left meanwhile; dropped after the lock is released, which frees their slots again.
        let mut refused = Vec::new();
        let mut pool = self.locked();
        if pool.queue.is_empty() {
            return;
        }
        let now = Instant::now();
        let mut passed_over = Vec::new();
        while let Some(place) = pool.queue.next(self.ms_at(now), &passed_over) {
            let Some((ticket, waiter)) = pool.queue.get(&place) else { break };
            let (tokens, affinity) = (ticket.tokens, waiter.affinity);
            // A node that failed and is well again beats waiting for one that may never come.
            let exclude = waiter.exclude.filter(|id| works_besides(&pool, Some(*id)));
            match self.try_grant(&mut pool, now, tokens, affinity, exclude) {
                Some(permit) => {
                    if let Some(waiter) = pool.queue.take(&place, true)
                        && let Err(back) = waiter.grant.send(Ok(permit))
                    {
                        refused.push(back);
                    }
                }
                // Only a waiter that refuses the one free node may be overtaken.
                None if exclude.is_some() && passed_over.len() < PASSED_OVER => {
                    passed_over.push(place.number())
                }
                None => break,
            }
        }
        drop(pool);
    }

    /// Whether another node may be ejected: at least half of them stay.
    fn may_eject(&self, pool: &State) -> bool {
        let ready = pool.nodes.iter().filter(|node| node.state() == NodeState::Ready);
        let (ready, ejected) = ready.fold((0, 0), |(ready, ejected), node| {
            (ready + 1, ejected + usize::from(node.learnt().outlier.ejected()))
        });
        2 * (ejected + 1) <= ready
    }
}

/// Whether any node but `exclude` may get requests.
fn works_besides(pool: &State, exclude: Option<u64>) -> bool {
    pool.nodes.iter().any(|node| Some(node.id) != exclude && node.state() == NodeState::Ready)
}

/// A place in the queue that is given up when the one who waits leaves.
struct Waiting<'a> {
    pool: &'a ModelPool,
    place: Place,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut pool = self.pool.locked();
        let waiter = pool.queue.take(&self.place, false);
        if waiter.is_some() {
            pool.traffic.departed.count(self.pool.now_ms() / 1000);
        }
        drop(pool);
        drop(waiter);
    }
}
