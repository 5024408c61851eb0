//! The gateway as a whole: built from a configuration, served until it is told to stop, reloaded while it runs.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use axum::Router;
use http::Request;
use hyper::body::Incoming;
use potstill_shared::openai::unix_time_s;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt;

use super::builtin_endpoints;
use super::state::{AppState, load};
use crate::admission::InFlightBytes;
use crate::autoscale::Autoscaler;
use crate::autoscale::context::AutoscaleContext;
use crate::autoscale::plans::RunPlan;
use crate::config::{
    Config, KubernetesConfig, Limits, PoolConfig, ProcessConfig, ScaleConfig, WebhookConfig,
};
use crate::pool::{ModelPool, PoolLoad, PoolRegistry, health};
use crate::proxy::context::ProxyContext;
use crate::proxy::handler;
use crate::proxy::response_body::{GatewayResponse, ResponseBody};
use crate::scaling_policy::Forecast;
use crate::server::stop::ShutdownFlag;
use crate::server::{Handler, tls};
use crate::telemetry::access_log::AccessLog;
use crate::telemetry::load_recording::LoadRecording;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::sinks::Sinks;
use crate::telemetry::traces::Traces;
use crate::upstream::connect::Connector;

/// The settings of a pool's actuator. A pool whose settings change starts anew.
type ScalerSettings<'a> =
    (&'a Option<ProcessConfig>, &'a Option<WebhookConfig>, &'a Option<KubernetesConfig>);

fn scaler_settings(scale: Option<&ScaleConfig>) -> Option<ScalerSettings<'_>> {
    scale.map(|scale| (&scale.process, &scale.webhook, &scale.kubernetes))
}

/// Why a gateway cannot be built, or a configuration cannot be applied.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// Two metrics have one name.
    #[error(transparent)]
    Metrics(#[from] prometheus::Error),
    /// Something that the configuration names does not work.
    #[error("{0}")]
    Config(String),
}

/// A gateway. Clones share one gateway.
#[derive(Clone)]
pub struct Gateway {
    state: Arc<AppState>,
    /// Endpoints that the gateway itself answers.
    builtin: Router,
}

impl Gateway {
    /// Builds the gateway and starts to watch its pools. Needs a tokio runtime.
    pub fn build(config: Config) -> Result<Self, BuildError> {
        Self::build_with(config, Connector::default())
    }

    /// As [`Self::build`], with a connector for upstream connections.
    pub fn build_with(config: Config, connector: Connector) -> Result<Self, BuildError> {
        let (live, proxy_config) = load(config, None).map_err(BuildError::Config)?;
        let config = &live.config;
        let shutdown_complete = CancellationToken::new();
        let tasks = TaskTracker::new();
        let pools = Arc::new(PoolRegistry::default());
        let draining = ShutdownFlag::default();
        let metrics = Metrics::new()?;
        let sinks = sinks(config, &metrics, &tasks, &shutdown_complete).map_err(BuildError::Config)?;
        let autoscale = AutoscaleContext::new(
            config.autoscale.clone(),
            Arc::clone(&pools),
            metrics,
            connector.clone(),
            tasks.clone(),
            draining.clone(),
            shutdown_complete.clone(),
        );
        let state = Arc::new(AppState {
            proxy: Arc::new(ProxyContext {
                config: ArcSwap::from_pointee(proxy_config),
                pools,
                connector,
                in_flight: InFlightBytes::default(),
                sinks,
                draining,
            }),
            autoscaler: Autoscaler::new(autoscale),
            tasks,
            shutdown_complete,
            started: unix_time_s(),
            live: ArcSwap::from_pointee(live),
        });
        let gateway = Self { builtin: builtin_endpoints::router(&state), state };
        for pool in gateway.state.live().config.pools.clone() {
            gateway.add_pool(pool);
        }
        gateway.state.tasks.spawn(Arc::clone(&gateway.state.autoscaler).run());
        Ok(gateway)
    }

    pub(crate) fn state(&self) -> &Arc<AppState> {
        &self.state
    }

    /// Applies a new configuration: keys, limits, TLS, pools and nodes change at once, requests in flight continue.
    /// Listeners, access log and traces stay as they are. On an error nothing changes.
    pub fn reload(&self, config: Config) -> Result<(), BuildError> {
        let state = &self.state;
        let before = state.live.load_full();
        let mut problems = config.problems();
        if config.pools.is_empty() && !before.config.pools.is_empty() {
            // An editor that truncates the file first shows an empty file for a moment.
            problems.push("it names no pools, where there were some; is the file half written?".to_owned());
        }
        let loaded = if problems.is_empty() {
            load(config, Some(&state.proxy.config().keys))
        } else {
            Err(problems.join("; "))
        };
        let outcome = loaded.map(|(live, proxy)| {
            let pools = live.config.pools.clone();
            state.autoscaler.context().set_config(live.config.autoscale.clone());
            state.proxy.config.store(Arc::new(proxy));
            state.live.store(Arc::new(live));
            self.replace_pools(&before.config.pools, pools);
        });
        let label = if outcome.is_ok() { "applied" } else { "rejected" };
        state.proxy.sinks.metrics.config_reloads.with_label_values(&[label]).inc();
        outcome.map_err(BuildError::Config)
    }

    /// Registers the plan of a run; see [`RunPlan`]. Returns the forecasts of its stages.
    pub fn register_plan(&self, plan: RunPlan) -> Result<Vec<Forecast>, String> {
        self.state.autoscaler.register_plan(plan)
    }

    /// Removes the plan of a run. Returns false if it has none.
    pub fn remove_plan(&self, run: &str) -> bool {
        self.state.autoscaler.remove_plan(run)
    }

    fn replace_pools(&self, before: &[PoolConfig], now: Vec<PoolConfig>) {
        let gone = before.iter().filter(|old| !now.iter().any(|new| new.model == old.model));
        for pool in gone {
            self.remove_pool(&pool.model);
        }
        for pool in now {
            match self.state.proxy.pools.get(&pool.model) {
                Some(known) if *known.config().as_ref() == pool => {}
                Some(known)
                    if scaler_settings(known.config().scale.as_ref())
                        == scaler_settings(pool.scale.as_ref()) =>
                {
                    known.reconfigure(pool);
                }
                // Its actuator starts anew together with the pool.
                Some(_) => {
                    self.remove_pool(&pool.model);
                    self.add_pool(pool);
                }
                None => {
                    self.add_pool(pool);
                }
            }
        }
    }

    /// Removes a pool: new requests for its model get 404, its running requests continue.
    pub fn remove_pool(&self, model: &str) {
        self.state.proxy.pools.remove(model);
    }

    /// Adds a pool. Returns false if its model has a pool (which stays as it is), or if the configuration is invalid.
    pub fn add_pool(&self, config: PoolConfig) -> bool {
        let state = &self.state;
        let problems = config.problems();
        if !problems.is_empty() {
            tracing::error!(model = config.model, ?problems, "the pool cannot be added");
            return false;
        }
        let retired = state.shutdown_complete.child_token();
        let pool = ModelPool::new(config, &state.proxy.sinks.metrics, retired);
        if !state.proxy.pools.insert(&pool) {
            return false;
        }
        state.tasks.spawn(health::run_health_checks(pool, state.proxy.connector.clone()));
        state.autoscaler.context().wake();
        true
    }

    /// Levels of the pool of `model`.
    pub fn load(&self, model: &str) -> Option<PoolLoad> {
        self.state.proxy.pools.get(model).map(|pool| pool.load())
    }

    /// Bytes of request bodies in flight.
    pub fn in_flight_bytes(&self) -> usize {
        self.state.proxy.in_flight.get()
    }

    /// All metrics as they are documented.
    pub fn metric_specs(&self) -> Vec<crate::telemetry::metrics::MetricSpec> {
        self.state.proxy.sinks.metrics.specs().to_vec()
    }

    /// Serves on `listener` until `stop` completes. Then drains, stops the node processes that it started, and returns.
    pub async fn serve(&self, listener: TcpListener, stop: impl Future<Output = ()>) {
        let state = &self.state;
        let grace = Duration::from_secs(state.live().config.drain_seconds);
        let draining = &state.proxy.draining;
        let stop = async {
            tokio::select! {
                () = stop => {}
                () = draining.wait() => {}
            }
        };
        crate::server::serve(listener, self.clone(), grace, draining, stop).await;
        state.shutdown_complete.cancel();
        state.tasks.close();
        state.tasks.wait().await;
    }

    /// Serves one connection that was accepted elsewhere, HTTP/1.1 without TLS, until it ends.
    pub async fn serve_connection(&self, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        let draining = self.state.proxy.draining.clone();
        crate::server::serve_connection(stream, false, None, self.clone(), self.limits(), draining).await;
    }

    /// Serves KEDA's external scaler on `listener` until the gateway stops.
    #[cfg(feature = "kubernetes")]
    pub async fn serve_keda(&self, listener: TcpListener) {
        let state = Arc::clone(&self.state);
        self.state.autoscaler.serve_keda(listener, move || state.limits()).await;
    }

    /// Begins to drain: new connections and requests are rejected, running requests continue.
    pub fn begin_drain(&self) {
        self.state.proxy.draining.set();
    }
}

fn sinks(
    config: &Config,
    metrics: &Arc<Metrics>,
    tasks: &TaskTracker,
    shutdown: &CancellationToken,
) -> Result<Sinks, String> {
    let access_log = config.access_log.then(AccessLog::start).transpose();
    let recording = config.autoscale.load_trace_file.as_ref().map(|path| {
        LoadRecording::start(path).map_err(|problem| format!("autoscale.load_trace_file: {problem}"))
    });
    let traces =
        config.otlp_endpoint.as_ref().map(|endpoint| Traces::start(endpoint, tasks, shutdown.clone()));
    Ok(Sinks {
        metrics: Arc::clone(metrics),
        access_log: access_log.map_err(|error| format!("access_log: {error}"))?,
        traces: traces.transpose()?,
        load_recording: recording.transpose()?,
    })
}

impl Handler for Gateway {
    type Body = ResponseBody;

    async fn handle(&self, request: Request<Incoming>) -> GatewayResponse {
        let builtin = async |request| match self.builtin.clone().oneshot(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        };
        handler::handle(&self.state.proxy, request, builtin).await
    }

    fn limits(&self) -> Arc<Limits> {
        self.state.limits()
    }

    fn tls(&self) -> Option<tls::Tls> {
        self.state.live().tls.clone()
    }

    fn count_connection(&self, change: i64) {
        self.state.proxy.sinks.metrics.connections.add(change);
    }
}
