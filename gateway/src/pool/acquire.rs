//! How a request gets a slot on a node: at once, or from the queue when one becomes free.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::balance::{NodeView, RequestView, choose_node};
use super::model_pool::{ModelPool, PoolState};
use super::node::{Node, NodeState};
use super::permit::{Permit, PermitIssuer};
use super::queue::{QueueEntry, Ticket};
use super::waiter::Waiter;
use crate::config::{OutlierConfig, Priority};
use crate::error::GatewayError;
use crate::hash::mix;

/// A request for a slot.
#[derive(Debug, Clone)]
pub struct AcquireRequest {
    /// Priority class.
    pub class: Priority,
    /// Name of the client key, for fairness between keys.
    pub key: Arc<str>,
    /// Longest wait that the client accepts.
    pub max_wait: Option<Duration>,
    /// Estimated tokens of prompt and completion.
    pub tokens: u64,
    /// Bytes of the request body.
    pub bytes: usize,
    /// Hash of the session or of the prompt's beginning.
    pub affinity: Option<u64>,
}

/// Seconds per token before any was measured; only ratios matter.
const DEFAULT_SECONDS_PER_TOKEN: f64 = 0.02;

/// Waiters that may be skipped because the one free node is excluded for them.
const MAX_SKIPPED_WAITERS: usize = 16;

impl ModelPool {
    /// Gets a slot on a node other than `exclude`, at once or after waiting in the queue. Dropping the future leaves the
    /// queue; dropping the permit frees the slot.
    pub async fn acquire(
        self: &Arc<Self>,
        request: &AcquireRequest,
        exclude: Option<u64>,
    ) -> Result<Permit, GatewayError> {
        let config = self.config.load_full();
        let longest = Duration::from_millis(config.queue.wait_ms);
        let wait = request.max_wait.map_or(longest, |max| max.min(longest));
        let (granted, entry) = {
            let mut pool = self.state();
            let now = Instant::now();
            if exclude.is_none() {
                pool.retry_budget.deposit(config.retry.budget_percent);
            }
            if pool.queue.is_empty()
                && let Some(permit) =
                    self.try_grant(&mut pool, now, request.tokens, request.affinity, exclude)
            {
                pool.traffic.arrivals.count(self.clock_ms(now) / 1000);
                return Ok(permit);
            }
            if config.scale.is_none() && !pool.has_other_ready_node(exclude) {
                return Err(self.no_upstream());
            }
            let queue = &config.queue;
            while pool.queue.len() >= queue.requests || pool.queue.bytes() + request.bytes > queue.bytes {
                // A request of a higher class displaces one of a lower class.
                let displaced = pool
                    .queue
                    .displacement_candidate(request.class)
                    .and_then(|entry| pool.queue.remove(&entry, false));
                let error = if pool.has_other_ready_node(None) {
                    let retry_after = self.estimated_wait_seconds(&pool);
                    GatewayError::QueueFull { model: self.model.to_string(), retry_after }
                } else {
                    self.no_upstream()
                };
                match displaced {
                    Some(waiter) => {
                        pool.traffic.departures.count(self.clock_ms(now) / 1000);
                        drop(waiter.grant.send(Err(error)));
                    }
                    None => return Err(error),
                }
            }
            let now_ms = self.clock_ms(now);
            let ticket = Ticket {
                class: request.class,
                key: Arc::clone(&request.key),
                deadline_ms: now_ms + wait.as_millis() as u64,
                arrived_ms: now_ms,
                tokens: request.tokens,
                bytes: request.bytes,
            };
            pool.traffic.arrivals.count(now_ms / 1000);
            if !pool.has_other_ready_node(None) {
                self.capacity_needed.notify_one();
            }
            let (grant, granted) = oneshot::channel();
            let entry = pool.queue.push(ticket, Waiter { affinity: request.affinity, exclude, grant });
            (granted, QueueGuard { pool: self, entry })
        };
        self.dispatch();
        let outcome = tokio::time::timeout(wait, granted).await;
        drop(entry);
        match outcome {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err(self.no_upstream()),
            Err(_) => {
                let pool = self.state();
                let retry_after = self.estimated_wait_seconds(&pool);
                Err(if pool.has_other_ready_node(None) {
                    GatewayError::QueueTimeout { model: self.model.to_string(), retry_after }
                } else {
                    self.no_upstream()
                })
            }
        }
    }

    /// Gets a slot on a node other than `exclude` if one is free now and no request waits.
    pub fn try_acquire(self: &Arc<Self>, request: &AcquireRequest, exclude: u64) -> Option<Permit> {
        let mut pool = self.state();
        if pool.queue.is_empty() {
            self.try_grant(&mut pool, Instant::now(), request.tokens, request.affinity, Some(exclude))
        } else {
            None
        }
    }

    /// Estimated seconds until a request that waits now gets a slot, from 1 to 60.
    fn estimated_wait_seconds(&self, pool: &PoolState) -> u64 {
        let (views, usual) = self.views(pool, self.now_ms());
        let slots: usize = views.iter().map(|view| view.slots).sum();
        let tokens = self.expected_completion(None, None);
        let seconds = usual * tokens as f64 * (pool.queue.len() + 1) as f64 / slots.max(1) as f64;
        (seconds.ceil() as u64).clamp(1, 60)
    }

    /// What the balancer knows of each node, and the mean seconds per token.
    fn views(&self, pool: &PoolState, now_ms: u64) -> (Vec<NodeView>, f64) {
        let speeds = pool.nodes.iter().filter_map(|node| node.stats().speed.measured_seconds_per_token());
        let (sum, count) = speeds.fold((0.0, 0u32), |(sum, count), speed| (sum + speed, count + 1));
        let usual = if count == 0 { DEFAULT_SECONDS_PER_TOKEN } else { sum / f64::from(count) };
        let config = self.config.load();
        (pool.nodes.iter().map(|node| node.balance_view(&config.outlier, usual, now_ms)).collect(), usual)
    }

    /// Takes a slot of the node that the balancer picks.
    fn try_grant(
        self: &Arc<Self>,
        pool: &mut PoolState,
        now: Instant,
        tokens: u64,
        affinity: Option<u64>,
        exclude: Option<u64>,
    ) -> Option<Permit> {
        let (views, _) = self.views(pool, self.clock_ms(now));
        pool.turn += 1;
        let request = RequestView {
            tokens,
            affinity,
            queued: pool.queue.len().saturating_sub(1),
            exclude: exclude.and_then(|id| pool.nodes.iter().position(|node| node.id == id)),
            random: mix(pool.turn ^ now.saturating_duration_since(self.epoch).as_nanos() as u64),
        };
        let at = choose_node(self.config.load().load_balancing, &views, &request, pool.turn)?;
        let issuer: Arc<dyn PermitIssuer> = Arc::<Self>::clone(self);
        Some(Permit::new(issuer, Arc::clone(&pool.nodes[at]), tokens, now))
    }

    /// No node is ready. Where nodes can be started, `Retry-After` is the time of a cold start.
    fn no_upstream(&self) -> GatewayError {
        let retry_after = match (self.cold_start_s.load(Ordering::Relaxed), &self.config.load().scale) {
            (0, Some(scale)) => scale.cold_start_s as u64,
            (measured, Some(_)) => measured,
            (_, None) => 5,
        };
        GatewayError::NoUpstream { model: self.model.to_string(), retry_after }
    }

    /// Gives free slots to waiting requests, in the queue's order.
    pub(crate) fn dispatch(self: &Arc<Self>) {
        // Permits of clients that have disconnected. They are dropped after the lock is released, which frees their slots.
        let mut unclaimed = Vec::new();
        let mut pool = self.state();
        if pool.queue.is_empty() {
            return;
        }
        let now = Instant::now();
        let mut skipped = Vec::new();
        while let Some(entry) = pool.queue.next_entry(self.clock_ms(now), &skipped) {
            let Some((ticket, waiter)) = pool.queue.get(&entry) else { break };
            let (tokens, affinity) = (ticket.tokens, waiter.affinity);
            // Without another ready node, the node that failed is better than none.
            let exclude = waiter.exclude.filter(|id| pool.has_other_ready_node(Some(*id)));
            match self.try_grant(&mut pool, now, tokens, affinity, exclude) {
                Some(permit) => {
                    if let Some(waiter) = pool.queue.remove(&entry, true)
                        && let Err(back) = waiter.grant.send(Ok(permit))
                    {
                        unclaimed.push(back);
                    }
                }
                // Only a waiter whose excluded node is the free one may be overtaken.
                None if exclude.is_some() && skipped.len() < MAX_SKIPPED_WAITERS => {
                    skipped.push(entry.number())
                }
                None => break,
            }
        }
        drop(pool);
    }
}

impl PermitIssuer for ModelPool {
    fn model(&self) -> &str {
        &self.model
    }

    fn ms_at(&self, now: Instant) -> u64 {
        self.clock_ms(now)
    }

    fn outlier_config(&self) -> OutlierConfig {
        self.config.load().outlier.clone()
    }

    fn may_eject(&self) -> bool {
        let state = self.state();
        let ready = state.nodes.iter().filter(|node| node.state() == NodeState::Ready);
        let (ready, ejected) = ready.fold((0, 0), |(ready, ejected), node| {
            (ready + 1, ejected + usize::from(node.stats().outlier.is_ejected()))
        });
        2 * (ejected + 1) <= ready
    }

    fn count_ejection(&self) {
        self.metrics.ejections.inc();
    }

    fn set_state_if_ready(self: Arc<Self>, node: &Node, state: NodeState) {
        if node.state() == NodeState::Ready {
            self.set_node_state(node, state);
        }
    }

    fn released(self: Arc<Self>) {
        let waiting = {
            let mut pool = self.state();
            pool.traffic.departures.count(self.now_ms() / 1000);
            !pool.queue.is_empty()
        };
        if waiting {
            self.dispatch();
        }
    }
}

/// Leaves the queue when the waiting request is dropped.
struct QueueGuard<'a> {
    pool: &'a ModelPool,
    entry: QueueEntry,
}

impl Drop for QueueGuard<'_> {
    fn drop(&mut self) {
        let mut pool = self.pool.state();
        let waiter = pool.queue.remove(&self.entry, false);
        if waiter.is_some() {
            pool.traffic.departures.count(self.pool.now_ms() / 1000);
        }
        drop(pool);
        drop(waiter);
    }
}
