//! All handles of a running gateway.

use std::sync::Arc;

use arc_swap::{ArcSwap, Guard};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::auth::keys::Keys;
use crate::autoscale::Autoscaler;
use crate::config::{Config, Limits, keys};
use crate::proxy::context::{ProxyConfig, ProxyContext};
use crate::server::tls;

/// The configuration and what is loaded with it. A reload replaces it.
pub(crate) struct LiveConfig {
    pub(crate) config: Config,
    pub(crate) tls: Option<tls::Tls>,
}

/// All handles. Modules other than `app` receive only the parts that they use.
pub(crate) struct AppState {
    pub(crate) live: ArcSwap<LiveConfig>,
    pub(crate) proxy: Arc<ProxyContext>,
    pub(crate) autoscaler: Arc<Autoscaler>,
    pub(crate) tasks: TaskTracker,
    /// Cancelled after the last connection has closed: background tasks end, and node processes are stopped.
    pub(crate) shutdown_complete: CancellationToken,
    /// Unix time of the start, in seconds.
    pub(crate) started: u64,
}

impl AppState {
    /// The current configuration.
    pub(crate) fn live(&self) -> Guard<Arc<LiveConfig>> {
        self.live.load()
    }

    /// The current bounds on clients.
    pub(crate) fn limits(&self) -> Arc<Limits> {
        Arc::clone(&self.proxy.config().limits)
    }
}

/// Loads everything that a configuration names. The keys take over the counters of `before`.
pub(crate) fn load(config: Config, before: Option<&Keys>) -> Result<(LiveConfig, ProxyConfig), String> {
    let keys_in_file = match &config.keys_file {
        Some(path) => keys::read_keys_file(path).map_err(|error| error.to_string())?,
        None => Vec::new(),
    };
    let proxy = ProxyConfig {
        limits: Arc::new(config.limits.clone()),
        keys: Keys::new(&config, &keys_in_file, before)?,
    };
    let tls = config.tls.as_ref().map(tls::load_tls).transpose()?;
    Ok((LiveConfig { config, tls }, proxy))
}
