//! A node of a pool: its address, state, load and measured statistics.

use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use potstill_shared::redact::Secret;

use super::balance::NodeView;
use super::outlier::OutlierState;
use super::statistics::{ConcurrencyLimit, Speed, TokenTime};
use crate::config::OutlierConfig;
use crate::hash::hash_text;
use crate::upstream::address::AddressPolicy;
use crate::upstream::endpoint::Endpoint;

/// State of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum NodeState {
    /// The node receives requests.
    Ready = 0,
    /// The node failed a health check or a connection attempt, or has not passed its first check. A successful check
    /// makes it ready.
    Unhealthy = 1,
    /// The node finishes its requests, receives no new ones, and is then removed.
    Draining = 2,
    /// The autoscaler has not admitted the node yet.
    Starting = 3,
}

impl NodeState {
    /// Returns the name in the admin API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Unhealthy => "unhealthy",
            Self::Draining => "draining",
            Self::Starting => "starting",
        }
    }
}

/// Origin of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeOrigin {
    /// The configuration.
    Config,
    /// The admin API.
    Admin {
        /// Whether loopback and private addresses are permitted.
        allow_private: bool,
    },
    /// The actuator of a scaled pool, which also removes the node.
    Scaler,
}

impl NodeOrigin {
    fn address_policy(self) -> AddressPolicy {
        match self {
            Self::Config | Self::Scaler => AddressPolicy::Trusted,
            Self::Admin { allow_private } => AddressPolicy::Restricted { allow_private },
        }
    }
}

/// Parameters of a new node.
#[derive(Debug, Clone)]
pub struct NodeSpec {
    /// Base URL.
    pub url: String,
    /// Largest number of concurrent requests; `None` to learn it.
    pub max_concurrency: Option<usize>,
    /// API key of the node.
    pub key: Option<Secret<String>>,
    /// Origin of the node.
    pub origin: NodeOrigin,
    /// Initial state.
    pub state: NodeState,
}

impl NodeSpec {
    /// Returns the parameters of a ready node of the configuration.
    pub fn new(url: impl Into<String>, max_concurrency: Option<usize>) -> Self {
        Self {
            url: url.into(),
            max_concurrency,
            key: None,
            origin: NodeOrigin::Config,
            state: NodeState::Ready,
        }
    }
}

/// Measured statistics of a node.
#[derive(Debug, Clone)]
pub struct NodeStats {
    /// Failures and ejections.
    pub outlier: OutlierState,
    /// Seconds per token.
    pub speed: Speed,
    /// Milliseconds per token as a function of the requests on the node.
    pub token_time: TokenTime,
    /// Largest number of concurrent requests.
    pub concurrency: ConcurrencyLimit,
}

/// A node with its counters.
pub struct Node {
    /// Id of the node, unique within its pool.
    pub id: u64,
    /// `host:port`, for logs and metrics.
    pub name: String,
    /// Parameters that the node was created with.
    pub spec: NodeSpec,
    /// Address and idle connections.
    pub endpoint: Arc<Endpoint>,
    hash: u64,
    state: AtomicU8,
    requests: AtomicUsize,
    tokens: AtomicU64,
    stats: Mutex<NodeStats>,
}

impl Node {
    /// Creates a node. An error describes an invalid URL or key.
    pub fn new(id: u64, spec: NodeSpec) -> Result<Self, String> {
        let endpoint = Endpoint::new(&spec.url, spec.key.as_ref(), spec.origin.address_policy())?;
        Ok(Self {
            id,
            name: endpoint.name().to_owned(),
            hash: hash_text(&spec.url),
            endpoint: Arc::new(endpoint),
            state: AtomicU8::new(spec.state as u8),
            requests: AtomicUsize::new(0),
            tokens: AtomicU64::new(0),
            stats: Mutex::new(NodeStats {
                outlier: OutlierState::default(),
                speed: Speed::default(),
                token_time: TokenTime::default(),
                concurrency: ConcurrencyLimit::new(spec.max_concurrency),
            }),
            spec,
        })
    }

    /// Returns the state.
    pub fn state(&self) -> NodeState {
        match self.state.load(Ordering::Acquire) {
            0 => NodeState::Ready,
            1 => NodeState::Unhealthy,
            2 => NodeState::Draining,
            _ => NodeState::Starting,
        }
    }

    pub(super) fn set_state(&self, state: NodeState) {
        self.state.store(state as u8, Ordering::Release);
    }

    /// Locks and returns the measured statistics.
    pub fn stats(&self) -> MutexGuard<'_, NodeStats> {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of requests on the node.
    pub fn requests(&self) -> usize {
        self.requests.load(Ordering::Acquire)
    }

    /// Expected tokens of all requests on the node.
    pub fn outstanding_tokens(&self) -> u64 {
        self.tokens.load(Ordering::Acquire)
    }

    /// Returns the state for load balancing. `usual` is the time per token, in seconds, of a node without measurements.
    pub fn balance_view(&self, config: &OutlierConfig, usual: f64, now_ms: u64) -> NodeView {
        let stats = self.stats();
        let slots = match self.state() {
            NodeState::Ready => stats.outlier.usable_slots(stats.concurrency.get(), config, now_ms),
            _ => 0,
        };
        NodeView {
            requests: self.requests(),
            slots,
            tokens: self.outstanding_tokens(),
            seconds_per_token: stats.speed.seconds_per_token(usual, now_ms),
            hash: self.hash,
        }
    }

    pub(super) fn begin_request(&self, tokens: u64) {
        self.requests.fetch_add(1, Ordering::AcqRel);
        self.tokens.fetch_add(tokens, Ordering::AcqRel);
        self.stats().outlier.record_start();
    }

    pub(super) fn end_request(&self, tokens: u64) {
        self.requests.fetch_sub(1, Ordering::AcqRel);
        self.tokens.fetch_sub(tokens, Ordering::AcqRel);
    }
}
