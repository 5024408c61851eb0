//! The gateway as a whole: built from a configuration, served until told to stop, configured anew and given pools while it
//! runs.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use axum::Router;
use axum::response::{IntoResponse, Response as LocalResponse};
use http::Request;
use hyper::body::Incoming;
use potstill_shared::openai::now_seconds;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt;

use crate::api::reply::Answer;
use crate::autoscale::kubernetes::Cluster;
use crate::autoscale::plans::RunPlan;
use crate::autoscale::policy::Forecast;
use crate::autoscale::{self, Autoscaler};
use crate::config::{
    Config, KubernetesConfig, Limits, PoolConfig, ProcessConfig, ScaleConfig, WebhookConfig, keys,
};
use crate::keys::Keys;
use crate::pool::{Load, ModelPool, health};
use crate::record::InFlight;
use crate::server::stop::Stop;
use crate::server::{Handler, tls};
use crate::telemetry::Metrics;
use crate::telemetry::access::AccessLog;
use crate::telemetry::recording::Recording;
use crate::telemetry::traces::Traces;
use crate::upstream::connect::Connector;

/// What a reload replaces, as a whole.
pub(crate) struct Live {
    pub(crate) config: Config,
    pub(crate) limits: Arc<Limits>,
    pub(crate) keys: Keys,
    tls: Option<tls::Tls>,
}

/// What every request can reach.
pub(crate) struct Shared {
    live: ArcSwap<Live>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) connector: Connector,
    pub(crate) in_flight: InFlight,
    pub(crate) access_log: Option<AccessLog>,
    pub(crate) traces: Option<Traces>,
    pub(crate) recording: Option<Recording>,
    /// Cancelled: no new requests.
    pub(crate) stop: Stop,
    /// Cancelled after the last stream: watchers and scalers end, node processes are stopped.
    end: CancellationToken,
    pub(crate) pools: ArcSwap<BTreeMap<String, Arc<ModelPool>>>,
    pub(crate) autoscaler: Autoscaler,
    /// The gateways that share workloads of Kubernetes with this one.
    pub(crate) cluster: Arc<Cluster>,
    local: std::sync::OnceLock<Router>,
    pub(crate) tasks: TaskTracker,
    pub(crate) started: u64,
}

impl Shared {
    pub(crate) fn live(&self) -> arc_swap::Guard<Arc<Live>> {
        self.live.load()
    }

    /// Whether the last stream is over and everything ends.
    pub(crate) fn ended(&self) -> bool {
        self.end.is_cancelled()
    }

    /// Ends then.
    pub(crate) async fn until_end(&self) {
        self.end.cancelled().await;
    }

    /// Whether new requests are refused.
    pub(crate) fn stopping(&self) -> bool {
        self.stop.is_set()
    }

    pub(crate) fn pool(&self, model: &str) -> Option<Arc<ModelPool>> {
        self.pools.load().get(model).cloned()
    }

    /// How many completions of a stage a model has seen so far.
    pub(crate) fn finished(&self, model: &str, stage: &str) -> u64 {
        self.pool(model).map_or(0, |pool| pool.lengths(Some(stage)).1)
    }

    /// What the gateway itself answers.
    pub(crate) async fn local(self: &Arc<Self>, request: Request<Incoming>) -> LocalResponse {
        let router = self.local.get_or_init(|| crate::api::local::router(self)).clone();
        match router.oneshot(request).await {
            Ok(answer) => answer.into_response(),
            Err(never) => match never {},
        }
    }
}

/// What starts and stops a pool's nodes; a pool whose hand changes starts anew.
type Hand<'a> = (&'a Option<ProcessConfig>, &'a Option<WebhookConfig>, &'a Option<KubernetesConfig>);

fn hand(scale: Option<&ScaleConfig>) -> Option<Hand<'_>> {
    scale.map(|scale| (&scale.process, &scale.webhook, &scale.kubernetes))
}

/// Why a gateway could not be built, or a new configuration not be taken.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The metrics clash.
    #[error(transparent)]
    Metrics(#[from] prometheus::Error),
    /// Something that the configuration names does not work.
    #[error("{0}")]
    Config(String),
}

/// A gateway; cheap to clone, all clones are the same one.
#[derive(Clone)]
pub struct Gateway {
    pub(crate) shared: Arc<Shared>,
}

impl Gateway {
    /// Builds the gateway and starts watching its pools. Needs a tokio runtime.
    pub fn build(config: Config) -> Result<Self, BuildError> {
        Self::build_with(config, Connector::default())
    }

    /// The same, with a connector of one's own.
    pub fn build_with(config: Config, connector: Connector) -> Result<Self, BuildError> {
        let live = Live::new(config, None).map_err(BuildError::Config)?;
        let access_log = live.config.access_log.then(AccessLog::start).transpose();
        let trace_file = live.config.autoscale.trace_file.as_ref();
        let recording = trace_file
            .map(|path| Recording::start(path).map_err(|problem| format!("autoscale.trace_file: {problem}")));
        let end = CancellationToken::new();
        let tasks = TaskTracker::new();
        let traces =
            live.config.otlp_endpoint.as_ref().map(|endpoint| Traces::start(endpoint, &tasks, end.clone()));
        let shared = Arc::new(Shared {
            metrics: Metrics::new()?,
            connector,
            in_flight: InFlight::default(),
            access_log: access_log.map_err(|error| BuildError::Config(format!("access_log: {error}")))?,
            traces: traces.transpose().map_err(BuildError::Config)?,
            recording: recording.transpose().map_err(BuildError::Config)?,
            stop: Stop::default(),
            end,
            pools: ArcSwap::default(),
            autoscaler: Autoscaler::default(),
            cluster: Arc::default(),
            local: std::sync::OnceLock::new(),
            tasks,
            started: now_seconds(),
            live: ArcSwap::from_pointee(live),
        });
        let gateway = Self { shared };
        for pool in gateway.shared.live().config.pools.clone() {
            gateway.add_pool(pool);
        }
        gateway.shared.tasks.spawn(autoscale::run(Arc::clone(&gateway.shared)));
        Ok(gateway)
    }

    /// Takes a new configuration: keys, limits, TLS, pools and nodes change at once, requests in flight go on. Listeners, the
    /// access log and traces stay as they are. On an error everything stays as it was.
    pub fn reload(&self, config: Config) -> Result<(), BuildError> {
        let shared = &self.shared;
        let before = shared.live.load_full();
        let mut problems = config.problems();
        if config.pools.is_empty() && !before.config.pools.is_empty() {
            // An editor that truncates first shows an empty file for a moment.
            problems.push("it names no pools, where there were some; is the file half written?".to_owned());
        }
        let live =
            if problems.is_empty() { Live::new(config, Some(&before)) } else { Err(problems.join("; ")) };
        let outcome = live.map(|live| {
            let pools = live.config.pools.clone();
            shared.live.store(Arc::new(live));
            self.replace_pools(&before.config.pools, pools);
        });
        let label = if outcome.is_ok() { "taken" } else { "refused" };
        shared.metrics.reloads.with_label_values(&[label]).inc();
        outcome.map_err(BuildError::Config)
    }

    /// Declares the plan of a run; see [`RunPlan`](crate::autoscale::plans::RunPlan). Answers what is to be
    /// expected of its stages.
    pub fn declare(&self, plan: RunPlan) -> Result<Vec<Forecast>, String> {
        let (shared, autoscaler) = (&self.shared, &self.shared.autoscaler);
        let models: Vec<_> =
            plan.stages.iter().map(|stage| (stage.model.clone(), stage.plan.stage.clone())).collect();
        if let Some((model, _)) = models.iter().find(|(model, _)| shared.pool(model).is_none()) {
            return Err(format!("no pool serves `{model}`"));
        }
        let finished = |model: &str, stage: &str| shared.finished(model, stage);
        autoscaler.plans().declare(plan, autoscaler.now(), finished)?;
        autoscaler.wake();
        let seen = autoscaler.observation(shared.live().config.autoscale.budget);
        let mut forecasts = Forecast::of(&seen);
        forecasts.retain(|forecast| models.contains(&(forecast.model.clone(), forecast.stage.clone())));
        Ok(forecasts)
    }

    /// Forgets the plan of a run. False when it has none.
    pub fn withdraw(&self, run: &str) -> bool {
        let withdrawn = self.shared.autoscaler.plans().withdraw(run);
        self.shared.autoscaler.wake();
        withdrawn
    }

    fn replace_pools(&self, before: &[PoolConfig], now: Vec<PoolConfig>) {
        let gone: Vec<_> =
            before.iter().filter(|old| !now.iter().any(|new| new.model == old.model)).collect();
        for pool in gone {
            self.remove_pool(&pool.model);
        }
        for pool in now {
            match self.shared.pool(&pool.model) {
                Some(known) if *known.config().as_ref() == pool => {}
                Some(known) if hand(known.config().scale.as_ref()) == hand(pool.scale.as_ref()) => {
                    known.reconfigure(pool);
                }
                // Its scaler starts anew with it.
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

    /// Takes a pool away: new requests for its model get 404, those in flight go on.
    pub fn remove_pool(&self, model: &str) {
        self.shared.pools.rcu(|pools| {
            let mut pools = BTreeMap::clone(pools);
            if let Some(pool) = pools.remove(model) {
                pool.retire();
            }
            pools
        });
    }

    /// Adds a pool. False when the model has one already (that one stays as it is), or when the configuration is wrong.
    pub fn add_pool(&self, config: PoolConfig) -> bool {
        let shared = &self.shared;
        let problems = config.problems();
        if !problems.is_empty() {
            tracing::error!(model = config.model, ?problems, "pool left out");
            return false;
        }
        let model = config.model.clone();
        let pool = ModelPool::new(config, &shared.metrics, shared.end.child_token());
        let before = shared.pools.rcu(|pools| {
            let mut pools = BTreeMap::clone(pools);
            pools.entry(model.clone()).or_insert_with(|| Arc::clone(&pool));
            pools
        });
        if before.contains_key(&model) {
            return false;
        }
        shared.tasks.spawn(health::watch(Arc::clone(&pool), shared.connector.clone()));
        shared.autoscaler.wake();
        true
    }

    /// What is in flight and waiting in the pool of `model`.
    pub fn load(&self, model: &str) -> Option<Load> {
        self.shared.pool(model).map(|pool| pool.load())
    }

    /// Bytes of bodies that are held now.
    pub fn in_flight_bytes(&self) -> usize {
        self.shared.in_flight.bytes()
    }

    /// Serves on `listener` until `stop`; then drains, stops the node processes it started, and returns.
    pub async fn serve(&self, listener: TcpListener, stop: impl Future<Output = ()>) {
        let shared = &self.shared;
        let grace = Duration::from_secs(shared.live().config.drain_seconds);
        let stop = async {
            tokio::select! {
                () = stop => {}
                () = shared.stop.wait() => {}
            }
        };
        crate::server::serve(listener, Clients(Arc::clone(shared)), grace, &shared.stop, stop).await;
        shared.end.cancel();
        shared.tasks.close();
        shared.tasks.wait().await;
    }

    /// Serves one connection that was accepted elsewhere, HTTP/1.1 in plain text, until it ends.
    pub async fn serve_connection(&self, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        let clients = Clients(Arc::clone(&self.shared));
        let limits = clients.limits();
        crate::server::speak(stream, false, None, clients, limits, self.shared.stop.clone()).await;
    }

    /// Serves the admin API on `listener` until the gateway stops. `file` is what a reload reads.
    pub async fn serve_admin(&self, listener: TcpListener, file: Option<PathBuf>) {
        crate::admin::serve(self.clone(), listener, file).await;
    }

    #[cfg(feature = "kubernetes")]
    /// Serves KEDA's external scaler on `listener` until the gateway stops.
    pub async fn serve_keda(&self, listener: TcpListener) {
        autoscale::keda::serve(Arc::clone(&self.shared), listener).await;
    }

    /// Begins to stop, as the future given to [`Gateway::serve`] does.
    pub fn begin_stop(&self) {
        self.shared.stop.set();
    }

    pub(crate) fn stopping(&self) -> Stop {
        self.shared.stop.clone()
    }
}

impl Live {
    fn new(config: Config, before: Option<&Self>) -> Result<Self, String> {
        let more = match &config.keys_file {
            Some(path) => keys::read_file(path).map_err(|error| error.to_string())?,
            None => Vec::new(),
        };
        Ok(Self {
            limits: Arc::new(config.limits.clone()),
            keys: Keys::new(&config, &more, before.map(|before| &before.keys))?,
            tls: config.tls.as_ref().map(tls::load).transpose()?,
            config,
        })
    }
}

/// The listener for clients.
#[derive(Clone)]
struct Clients(Arc<Shared>);

impl Handler for Clients {
    type Body = crate::api::reply::Reply;

    async fn handle(&self, request: Request<Incoming>) -> Answer {
        crate::stack::handle(&self.0, request).await
    }

    fn limits(&self) -> Arc<Limits> {
        Arc::clone(&self.0.live().limits)
    }

    fn tls(&self) -> Option<tls::Tls> {
        self.0.live().tls.clone()
    }

    fn connections(&self, change: i64) {
        self.0.metrics.connections.add(change);
    }
}
