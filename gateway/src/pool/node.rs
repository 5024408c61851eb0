//! One upstream endpoint: where it is, how it is, what it holds, what was learnt of it.

use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use http::HeaderValue;
use potstill_shared::redact::Redacted;

use super::learnt::{Slots, Speed, TokenTime};
use super::outlier::Outlier;
use crate::balance::{NodeView, hash_text};
use crate::config::OutlierConfig;
use crate::upstream::address::{AddressPolicy, NodeUrl, parse_url};
use crate::upstream::idle::Idle;

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

/// How a node is made.
#[derive(Debug, Clone)]
pub struct NodeSpec {
    /// Base URL.
    pub url: String,
    /// Requests at once; none to learn them.
    pub slots: Option<usize>,
    /// The node's own key.
    pub key: Option<Redacted<String>>,
    /// Which addresses it may have.
    pub policy: AddressPolicy,
    /// How it begins.
    pub state: NodeState,
}

impl NodeSpec {
    /// A trusted node that is ready.
    pub fn new(url: impl Into<String>, slots: Option<usize>) -> Self {
        Self { url: url.into(), slots, key: None, policy: AddressPolicy::Trusted, state: NodeState::Ready }
    }
}

/// What was learnt of a node.
#[derive(Debug, Clone)]
pub struct Learnt {
    /// Failures and ejections.
    pub outlier: Outlier,
    /// Time per token.
    pub speed: Speed,
    /// Time per token by requests at once.
    pub token_time: TokenTime,
    /// Requests at once.
    pub slots: Slots,
}

/// An upstream endpoint.
pub struct Node {
    /// Number within the pool.
    pub id: u64,
    /// `host:port`, for logs and metrics.
    pub name: String,
    /// Where it is.
    pub url: NodeUrl,
    /// As configured.
    pub spec: NodeSpec,
    /// Its `host` header.
    pub host: HeaderValue,
    /// Its `authorization` header, with the node's own key.
    pub authorization: Option<HeaderValue>,
    /// Connections that wait for their next request.
    pub(crate) idle: Idle,
    hash: u64,
    state: AtomicU8,
    requests: AtomicUsize,
    tokens: AtomicU64,
    learnt: Mutex<Learnt>,
}

impl Node {
    /// A node.
    pub fn new(id: u64, spec: NodeSpec) -> Result<Self, String> {
        let url = parse_url(&spec.url)?;
        let value =
            |text: &str| HeaderValue::from_str(text).map_err(|_| "the node's key or host is no header value");
        let authorization =
            spec.key.as_ref().map(|key| value(&format!("Bearer {}", key.expose()))).transpose()?;
        Ok(Self {
            id,
            host: value(url.authority.as_str())?,
            authorization: authorization.map(|mut value| {
                value.set_sensitive(true);
                value
            }),
            name: url.authority.to_string(),
            hash: hash_text(&spec.url),
            url,
            idle: Idle::default(),
            state: AtomicU8::new(spec.state as u8),
            requests: AtomicUsize::new(0),
            tokens: AtomicU64::new(0),
            learnt: Mutex::new(Learnt {
                outlier: Outlier::default(),
                speed: Speed::default(),
                token_time: TokenTime::default(),
                slots: Slots::new(spec.slots),
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

    /// What was learnt.
    pub fn learnt(&self) -> MutexGuard<'_, Learnt> {
        self.learnt.lock().unwrap_or_else(PoisonError::into_inner)
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
        let learnt = self.learnt();
        let slots = match self.state() {
            NodeState::Ready => learnt.outlier.usable(learnt.slots.get(), config, now_ms),
            _ => 0,
        };
        NodeView {
            requests: self.requests(),
            slots,
            tokens: self.tokens(),
            seconds_per_token: learnt.speed.get(usual, now_ms),
            hash: self.hash,
        }
    }

    pub(super) fn begin(&self, tokens: u64) {
        self.requests.fetch_add(1, Ordering::AcqRel);
        self.tokens.fetch_add(tokens, Ordering::AcqRel);
        self.learnt().outlier.begin();
    }

    pub(super) fn end(&self, tokens: u64) {
        self.requests.fetch_sub(1, Ordering::AcqRel);
        self.tokens.fetch_sub(tokens, Ordering::AcqRel);
    }
}
