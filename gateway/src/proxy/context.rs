//! What the request path uses.

use std::sync::Arc;

use arc_swap::{ArcSwap, Guard};

use crate::admission::InFlightBytes;
use crate::auth::keys::Keys;
use crate::config::Limits;
use crate::pool::PoolRegistry;
use crate::server::stop::ShutdownFlag;
use crate::telemetry::sinks::Sinks;
use crate::upstream::connect::Connector;

/// Settings of the request path that a reload replaces together.
pub struct ProxyConfig {
    /// Bounds on clients.
    pub limits: Arc<Limits>,
    /// Client keys.
    pub keys: Keys,
}

/// Everything that handling a request uses.
pub struct ProxyContext {
    pub(crate) config: ArcSwap<ProxyConfig>,
    pub(crate) pools: Arc<PoolRegistry>,
    pub(crate) connector: Connector,
    pub(crate) in_flight: InFlightBytes,
    pub(crate) sinks: Sinks,
    /// Set when the gateway begins to stop: new requests are rejected.
    pub(crate) draining: ShutdownFlag,
}

impl ProxyContext {
    /// The current settings.
    pub(crate) fn config(&self) -> Guard<Arc<ProxyConfig>> {
        self.config.load()
    }
}
