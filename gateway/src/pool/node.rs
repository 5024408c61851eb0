//! One upstream endpoint: where it is, how it is, what it holds, what was learnt of it.

use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use potstill_shared::redact::Secret;

use super::balance::NodeView;
use super::outlier::Outlier;
use super::statistics::{ConcurrencyLimit, Speed, TokenTime};
use crate::config::OutlierConfig;
use crate::hash::hash_text;
use crate::upstream::address::AddressPolicy;
use crate::upstream::endpoint::Endpoint;

/// Whether a node may get requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum NodeState {
    /// It may.
    Ready = 0,
    /// It is starting, or a check or a request found it ill; it may once a check finds it well.
    Unhealthy = 1,
    /// It finishes what it holds and is then removed.
    Draining = 2,
    /// Its scaler has not let it in yet.
    Starting = 3,
}

impl NodeState {
    /// For the admin API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Unhealthy => "unhealthy",
            Self::Draining => "draining",
            Self::Starting => "starting",
        }
    }
}

/// Who added a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeOrigin {
    /// The configuration.
    Config,
    /// The admin API.
    Admin {
        /// Whether loopback and private addresses are allowed.
        allow_private: bool,
    },
    /// The actuator of a scaled pool, which also removes it.
    Scaler,
}

impl NodeOrigin {
    fn address_policy(self) -> AddressPolicy {
        match self {
            Self::Config | Self::Scaler => AddressPolicy::Trusted,
            Self::Admin { allow_private } => AddressPolicy::Added { allow_private },
        }
    }
}

/// How a node is created.
#[derive(Debug, Clone)]
pub struct NodeSpec {
    /// Base URL.
    pub url: String,
    /// Most requests at once; `None` to measure it.
    pub max_concurrency: Option<usize>,
    /// The node's own API key.
    pub key: Option<Secret<String>>,
    /// Who adds it.
    pub origin: NodeOrigin,
    /// State at the beginning.
    pub state: NodeState,
}

impl NodeSpec {
    /// A ready node of the configuration.
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

/// What was measured of a node.
#[derive(Debug, Clone)]
pub struct NodeStats {
    /// Failures and ejections.
    pub outlier: Outlier,
    /// Seconds per token.
    pub speed: Speed,
    /// Milliseconds per token by the number of requests on the node.
    pub token_time: TokenTime,
    /// Most requests at once.
    pub concurrency: ConcurrencyLimit,
}

/// An upstream endpoint.
pub struct Node {
    /// Number of the node, unique within its pool.
    pub id: u64,
    /// `host:port`, for logs and metrics.
    pub name: String,
    /// How it was created.
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
    /// A node.
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
                outlier: Outlier::default(),
                speed: Speed::default(),
                token_time: TokenTime::default(),
                concurrency: ConcurrencyLimit::new(spec.max_concurrency),
            }),
            spec,
        })
    }

    /// How it is.
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

    /// What was measured.
    pub fn stats(&self) -> MutexGuard<'_, NodeStats> {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Requests that it holds.
    pub fn requests(&self) -> usize {
        self.requests.load(Ordering::Acquire)
    }

    /// Tokens that it still has to read and write.
    pub fn tokens(&self) -> u64 {
        self.tokens.load(Ordering::Acquire)
    }

    /// What a balancer needs to know; `usual` seconds per token stand in where nothing was measured.
    pub fn view(&self, config: &OutlierConfig, usual: f64, now_ms: u64) -> NodeView {
        let stats = self.stats();
        let slots = match self.state() {
            NodeState::Ready => stats.outlier.usable(stats.concurrency.get(), config, now_ms),
            _ => 0,
        };
        NodeView {
            requests: self.requests(),
            slots,
            tokens: self.tokens(),
            seconds_per_token: stats.speed.get(usual, now_ms),
            hash: self.hash,
        }
    }

    pub(super) fn begin(&self, tokens: u64) {
        self.requests.fetch_add(1, Ordering::AcqRel);
        self.tokens.fetch_add(tokens, Ordering::AcqRel);
        self.stats().outlier.begin();
    }

    pub(super) fn end(&self, tokens: u64) {
        self.requests.fetch_sub(1, Ordering::AcqRel);
        self.tokens.fetch_sub(tokens, Ordering::AcqRel);
    }
}
