//! What the control loop and the actuators use.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::plans::PlanRegistry;
use crate::config::AutoscaleConfig;
use crate::pool::PoolRegistry;
use crate::server::stop::ShutdownFlag;
use crate::telemetry::metrics::Metrics;
use crate::upstream::connect::Connector;

/// Everything that scaling uses.
pub struct AutoscaleContext {
    config: ArcSwap<AutoscaleConfig>,
    pub(crate) pools: Arc<PoolRegistry>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) connector: Connector,
    pub(crate) tasks: TaskTracker,
    /// Set when the gateway begins to stop.
    #[cfg_attr(not(feature = "kubernetes"), expect(dead_code, reason = "only a cluster has to know of it"))]
    pub(crate) draining: ShutdownFlag,
    /// Cancelled after the last connection has closed.
    shutdown_complete: CancellationToken,
    epoch: Instant,
    plans: Mutex<PlanRegistry>,
    wake: Notify,
}

impl AutoscaleContext {
    pub(crate) fn new(
        config: AutoscaleConfig,
        pools: Arc<PoolRegistry>,
        metrics: Arc<Metrics>,
        connector: Connector,
        tasks: TaskTracker,
        draining: ShutdownFlag,
        shutdown_complete: CancellationToken,
    ) -> Arc<Self> {
        Arc::new(Self {
            config: ArcSwap::from_pointee(config),
            pools,
            metrics,
            connector,
            tasks,
            draining,
            shutdown_complete,
            epoch: Instant::now(),
            plans: Mutex::default(),
            wake: Notify::new(),
        })
    }

    /// The current settings.
    pub(crate) fn config(&self) -> Arc<AutoscaleConfig> {
        self.config.load_full()
    }

    /// Replaces the settings.
    pub(crate) fn set_config(&self, config: AutoscaleConfig) {
        self.config.store(Arc::new(config));
    }

    /// Seconds on the autoscaler's clock.
    pub(crate) fn now(&self) -> f64 {
        self.epoch.elapsed().as_secs_f64()
    }

    /// What runs have announced.
    pub(crate) fn plans(&self) -> MutexGuard<'_, PlanRegistry> {
        self.plans.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Requests a decision before the next interval.
    pub(crate) fn wake(&self) {
        self.wake.notify_one();
    }

    /// Completes when a decision was requested.
    pub(crate) async fn wait_for_wake(&self) {
        self.wake.notified().await;
    }

    /// Returns whether the last connection has closed and background tasks end.
    pub(crate) fn is_shut_down(&self) -> bool {
        self.shutdown_complete.is_cancelled()
    }

    /// Completes when background tasks end.
    pub(crate) async fn shutdown_complete(&self) {
        self.shutdown_complete.cancelled().await;
    }
}
