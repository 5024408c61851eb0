//! The gateway as a whole: built from a configuration, served until told to stop, pools added while it runs.

use std::collections::BTreeMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use axum::Router;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use http::{StatusCode, Uri, header};
use potstill_shared::openai::{ModelCard, ModelList, now_seconds};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::autoscale::process;
use crate::config::{Config, PoolConfig};
use crate::error::GatewayError;
use crate::keys::Keys;
use crate::pool::{Load, ModelPool, health};
use crate::stack;
use crate::telemetry::Metrics;
use crate::upstream::client::Upstream;

/// What every request can reach.
pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) keys: Keys,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) upstream: Upstream,
    /// Cancelled: no new requests.
    pub(crate) stop: CancellationToken,
    /// Cancelled after the last stream: watchers and scalers end, node processes are stopped.
    end: CancellationToken,
    pools: ArcSwap<BTreeMap<String, Arc<ModelPool>>>,
    tasks: TaskTracker,
    started: u64,
}

impl Shared {
    pub(crate) fn pool(&self, model: &str) -> Option<Arc<ModelPool>> {
        self.pools.load().get(model).cloned()
    }
}

/// A gateway; cheap to clone, all clones are the same one.
#[derive(Clone)]
pub struct Gateway {
    shared: Arc<Shared>,
}

impl Gateway {
    /// Builds the gateway and starts watching its pools. Needs a tokio runtime.
    pub fn build(config: Config) -> Result<Self, prometheus::Error> {
        let connect = config.pools.iter().map(|pool| pool.deadlines.connect_ms).max().unwrap_or(2_000);
        let shared = Arc::new(Shared {
            keys: Keys::new(&config.keys),
            metrics: Metrics::new()?,
            upstream: Upstream::new(crate::config::ms(connect)),
            stop: CancellationToken::new(),
            end: CancellationToken::new(),
            pools: ArcSwap::default(),
            tasks: TaskTracker::new(),
            started: now_seconds(),
            config,
        });
        let gateway = Self { shared };
        for pool in gateway.shared.config.pools.clone() {
            gateway.add_pool(pool);
        }
        Ok(gateway)
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
        let pool = ModelPool::new(config);
        let before = shared.pools.rcu(|pools| {
            let mut pools = BTreeMap::clone(pools);
            pools.entry(model.clone()).or_insert_with(|| Arc::clone(&pool));
            pools
        });
        if before.contains_key(&model) {
            return false;
        }
        shared.tasks.spawn(health::watch(Arc::clone(&pool), shared.upstream.clone(), shared.end.clone()));
        if pool.config.process.is_some() {
            shared.tasks.spawn(process::scale(
                pool,
                shared.upstream.clone(),
                Arc::clone(&shared.metrics),
                shared.end.clone(),
            ));
        }
        true
    }

    /// What is in flight and waiting in the pool of `model`.
    pub fn load(&self, model: &str) -> Option<Load> {
        self.shared.pool(model).map(|pool| pool.load())
    }

    /// Serves on `listener` until `stop`; then drains, stops the node processes it started, and returns.
    pub async fn serve(&self, listener: TcpListener, stop: impl Future<Output = ()>) {
        let shared = &self.shared;
        crate::server::serve(listener, self.router(), &shared.config, &shared.stop, stop).await;
        shared.end.cancel();
        shared.tasks.close();
        shared.tasks.wait().await;
    }

    fn router(&self) -> Router {
        Router::new()
            .route("/v1/chat/completions", post(stack::generate))
            .route("/v1/completions", post(stack::generate))
            .route("/v1/embeddings", post(stack::generate))
            .route("/v1/models", get(models))
            .route("/v1/models/{*model}", get(model))
            .route("/health", get(live))
            .route("/healthz", get(live))
            .route("/readyz", get(ready))
            .route("/metrics", get(metrics))
            .method_not_allowed_fallback(async || GatewayError::MethodNotAllowed)
            .fallback(async |uri: Uri| GatewayError::NotFound { path: uri.path().to_owned() })
            .with_state(Arc::clone(&self.shared))
    }
}

async fn models(
    State(shared): State<Arc<Shared>>,
    headers: http::HeaderMap,
) -> Result<Response, GatewayError> {
    let key = shared.keys.authenticate(&headers)?;
    let cards = shared
        .pools
        .load()
        .keys()
        .filter(|model| key.allows(model))
        .map(|model| ModelCard::new(model, shared.started, "potstill"))
        .collect();
    Ok(axum::Json(ModelList::new(cards)).into_response())
}

async fn model(
    State(shared): State<Arc<Shared>>,
    Path(model): Path<String>,
    headers: http::HeaderMap,
) -> Result<Response, GatewayError> {
    let key = shared.keys.authenticate(&headers)?;
    if !key.allows(&model) || shared.pool(&model).is_none() {
        return Err(GatewayError::ModelNotFound { model });
    }
    Ok(axum::Json(ModelCard::new(&model, shared.started, "potstill")).into_response())
}

async fn live() -> &'static str {
    "ok"
}

async fn ready(State(shared): State<Arc<Shared>>) -> Response {
    if shared.stop.is_cancelled() {
        (StatusCode::SERVICE_UNAVAILABLE, "draining").into_response()
    } else {
        "ok".into_response()
    }
}

async fn metrics(State(shared): State<Arc<Shared>>) -> Response {
    let pools: Vec<_> = shared.pools.load().values().cloned().collect();
    let text = shared.metrics.render(&pools);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}
