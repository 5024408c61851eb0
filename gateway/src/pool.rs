//! A pool: the nodes of one model, the queue in front of them, and the permits that keep count.
//!
//! Invariant: one [`Permit`] per request, taken before the send, owned by the response body. When nothing is in flight
//! every counter is exactly zero.

pub mod health;
pub mod node;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use crate::balance::least_tokens;
use crate::config::{PoolConfig, ms};
use crate::error::GatewayError;
use crate::pool::node::{Node, NodeState};

/// What a request needs from a pool.
#[derive(Debug, Clone, Copy)]
pub struct Need {
    /// Tokens to read and write, estimated.
    pub tokens: u64,
    /// Bytes of its body.
    pub bytes: usize,
}

struct Waiter {
    need: Need,
    exclude: Option<u64>,
    grant: oneshot::Sender<Permit>,
}

#[derive(Default)]
struct State {
    nodes: Vec<Arc<Node>>,
    waiting: VecDeque<Waiter>,
}

/// The nodes of one model.
pub struct ModelPool {
    /// Its configuration.
    pub config: PoolConfig,
    state: Mutex<State>,
    /// Mean length of completions, in thousandths of a token: what a request without a limit is expected to write.
    mean_completion: AtomicU64,
    next_node: AtomicU64,
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
    /// Nodes that may get requests.
    pub ready: usize,
    /// Nodes that are starting or were found ill.
    pub unhealthy: usize,
    /// Nodes that finish what they hold.
    pub draining: usize,
}

impl ModelPool {
    /// A pool with the nodes of its configuration. They count as ready until a check says otherwise.
    pub fn new(config: PoolConfig) -> Arc<Self> {
        let pool = Arc::new(Self {
            state: Mutex::default(),
            mean_completion: AtomicU64::new(500_000),
            next_node: AtomicU64::new(0),
            config,
        });
        for node in &pool.config.nodes {
            let key = node.api_key_env.as_ref().and_then(|variable| std::env::var(variable).ok());
            if let Err(problem) = pool.add_node(&node.url, node.slots, key, NodeState::Ready) {
                tracing::error!(url = node.url, problem, "node left out");
            }
        }
        pool
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a node.
    pub fn add_node(
        self: &Arc<Self>,
        url: &str,
        slots: usize,
        key: Option<String>,
        state: NodeState,
    ) -> Result<Arc<Node>, String> {
        let id = self.next_node.fetch_add(1, Ordering::Relaxed);
        let node = Arc::new(Node::new(id, url, slots, key, state)?);
        self.locked().nodes.push(Arc::clone(&node));
        self.dispatch();
        Ok(node)
    }

    /// Takes a node out; requests that it holds go on.
    pub fn remove_node(&self, id: u64) {
        self.locked().nodes.retain(|node| node.id != id);
    }

    /// The nodes as they are now.
    pub fn nodes(&self) -> Vec<Arc<Node>> {
        self.locked().nodes.clone()
    }

    /// Sets a node's state and lets waiting requests have it when it can work now.
    pub fn set_state(self: &Arc<Self>, node: &Node, state: NodeState) {
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
        let mut pool = self.locked();
        pool.waiting.retain(|waiter| !waiter.grant.is_closed());
        let mut load = Load { queued: pool.waiting.len(), ..Load::default() };
        for node in &pool.nodes {
            let view = node.view();
            load.active += view.requests;
            load.tokens += view.tokens;
            match node.state() {
                NodeState::Ready => load.ready += 1,
                NodeState::Unhealthy => load.unhealthy += 1,
                NodeState::Draining => load.draining += 1,
            }
        }
        load
    }

    /// Tokens that a request will take: its prompt, and its limit or the usual length, whichever is smaller.
    pub fn expected_tokens(&self, prompt_bytes: usize, limit: Option<u64>) -> u64 {
        let usual = self.mean_completion.load(Ordering::Relaxed) / 1000;
        prompt_bytes as u64 / 4 + usual.min(limit.unwrap_or(u64::MAX)).max(1)
    }

    /// Learns from a finished request.
    pub fn completed(&self, completion_tokens: u64) {
        let learn = |mean: u64| Some(mean - mean / 32 + completion_tokens.saturating_mul(1000) / 32);
        let _always = self.mean_completion.fetch_update(Ordering::Relaxed, Ordering::Relaxed, learn);
    }

    /// Gets a slot on a node, at once or after waiting in the queue. Dropping the future leaves the queue; dropping the
    /// permit frees the slot.
    pub async fn acquire(self: &Arc<Self>, need: Need, exclude: Option<u64>) -> Result<Permit, GatewayError> {
        let model = || self.config.model.clone();
        let granted = {
            let mut pool = self.locked();
            if let Some(permit) = self.try_grant(&pool, need, exclude) {
                return Ok(permit);
            }
            if !self.worth_waiting(&pool, exclude) {
                return Err(GatewayError::NoNode { model: model() });
            }
            pool.waiting.retain(|waiter| !waiter.grant.is_closed());
            let bytes: usize = pool.waiting.iter().map(|waiter| waiter.need.bytes).sum();
            let queue = &self.config.queue;
            if pool.waiting.len() >= queue.requests || bytes + need.bytes > queue.bytes {
                return Err(GatewayError::QueueFull { model: model(), retry_after: 2 });
            }
            let (grant, granted) = oneshot::channel();
            pool.waiting.push_back(Waiter { need, exclude, grant });
            granted
        };
        match tokio::time::timeout(ms(self.config.queue.wait_ms), granted).await {
            Ok(Ok(permit)) => Ok(permit),
            Ok(Err(_)) => Err(GatewayError::NoNode { model: model() }),
            Err(_) => Err(GatewayError::WaitTooLong { model: model() }),
        }
    }

    /// A slot on any node but `exclude`, if there is one now.
    pub fn try_acquire(self: &Arc<Self>, need: Need, exclude: u64) -> Option<Permit> {
        let pool = self.locked();
        self.try_grant(&pool, need, Some(exclude))
    }

    /// Whether a slot can come: a node works that is not excluded, or the scaler will start one.
    fn worth_waiting(&self, pool: &State, exclude: Option<u64>) -> bool {
        self.config.process.is_some() || works_besides(pool, exclude)
    }

    fn try_grant(self: &Arc<Self>, pool: &State, need: Need, exclude: Option<u64>) -> Option<Permit> {
        let views: Vec<_> = pool.nodes.iter().map(|node| node.view()).collect();
        let exclude = exclude.and_then(|id| pool.nodes.iter().position(|node| node.id == id));
        let node = Arc::clone(&pool.nodes[least_tokens(&views, exclude)?]);
        node.begin(need.tokens);
        Some(Permit { pool: Arc::clone(self), node, tokens: need.tokens })
    }

    /// Hands free slots to those who wait, oldest first.
    fn dispatch(self: &Arc<Self>) {
        // Permits of clients that left meanwhile; dropped after the lock is released, which frees their slots again.
        let mut refused = Vec::new();
        let mut pool = self.locked();
        pool.waiting.retain(|waiter| !waiter.grant.is_closed());
        let mut index = 0;
        while index < pool.waiting.len() {
            let need = pool.waiting[index].need;
            // A node that failed and is well again beats waiting for one that may never come.
            let exclude =
                pool.waiting[index].exclude.filter(|_| works_besides(&pool, pool.waiting[index].exclude));
            match self.try_grant(&pool, need, exclude) {
                Some(permit) => {
                    if let Some(waiter) = pool.waiting.remove(index)
                        && let Err(permit) = waiter.grant.send(permit)
                    {
                        refused.push(permit);
                    }
                }
                // Only a waiter that refuses the one free node may be overtaken.
                None if exclude.is_some() => index += 1,
                None => break,
            }
        }
        drop(pool);
    }
}

/// Whether any node but `exclude` may get requests.
fn works_besides(pool: &State, exclude: Option<u64>) -> bool {
    pool.nodes.iter().any(|node| Some(node.id) != exclude && node.state() == NodeState::Ready)
}

/// A slot on a node. Dropping it frees the slot and serves the next waiting request.
pub struct Permit {
    pool: Arc<ModelPool>,
    node: Arc<Node>,
    tokens: u64,
}

impl Permit {
    /// The node that the slot is on.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.node.end(self.tokens);
        self.pool.dispatch();
    }
}
