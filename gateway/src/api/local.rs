//! What the gateway itself answers: models, health, metrics.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, Query, State};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use http::{HeaderMap, StatusCode, Uri, header};
use potstill_shared::openai::{ModelCard, ModelList};
use serde::Deserialize;

use crate::error::GatewayError;
use crate::gateway::Shared;
use crate::keys::ClientCertificate;

type Certificate = Option<axum::Extension<ClientCertificate>>;

/// The routes.
pub(crate) fn router(shared: &Arc<Shared>) -> Router {
    Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{*model}", get(model))
        .route("/tokenizer_info", get(tokenizer_info))
        .route("/health", get(live))
        .route("/healthz", get(live))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .method_not_allowed_fallback(async || GatewayError::MethodNotAllowed)
        .fallback(async |uri: Uri| GatewayError::NotFound { path: uri.path().to_owned() })
        .with_state(Arc::clone(shared))
}

async fn models(
    State(shared): State<Arc<Shared>>,
    certificate: Certificate,
    headers: HeaderMap,
) -> Result<Response, GatewayError> {
    let key = shared.live().keys.authenticate(&headers, certificate.map(|c| c.0))?;
    let pools = shared.pools.load();
    let names = pools.keys().filter(|model| key.allows(model));
    let cards = names.map(|model| ModelCard::new(model, shared.started, "potstill")).collect();
    Ok(axum::Json(ModelList::new(cards)).into_response())
}

async fn model(
    State(shared): State<Arc<Shared>>,
    certificate: Certificate,
    Path(model): Path<String>,
    headers: HeaderMap,
) -> Result<Response, GatewayError> {
    let key = shared.live().keys.authenticate(&headers, certificate.map(|c| c.0))?;
    if !key.allows(&model) || shared.pool(&model).is_none() {
        return Err(GatewayError::ModelNotFound { model });
    }
    Ok(axum::Json(ModelCard::new(&model, shared.started, "potstill")).into_response())
}

#[derive(Deserialize)]
struct WhichModel {
    model: Option<String>,
}

/// Evaluation clients ask for it without a model; with one pool there is no doubt whose is meant.
async fn tokenizer_info(
    State(shared): State<Arc<Shared>>,
    certificate: Certificate,
    Query(which): Query<WhichModel>,
    headers: HeaderMap,
) -> Result<Response, GatewayError> {
    let key = shared.live().keys.authenticate(&headers, certificate.map(|c| c.0))?;
    let pools = shared.pools.load();
    let model = match which.model {
        Some(model) => model,
        None if pools.len() == 1 => pools.keys().next().cloned().unwrap_or_default(),
        None => {
            return Err(GatewayError::Invalid {
                message: "several models are served here; say which one: `/tokenizer_info?model=…`"
                    .to_owned(),
                param: Some("model"),
                code: "missing_required_parameter",
            });
        }
    };
    if !key.allows(&model) {
        return Err(GatewayError::ModelNotFound { model });
    }
    let pool = pools.get(&model).cloned().ok_or(GatewayError::ModelNotFound { model })?;
    crate::stack::fetch(&shared, &key, &pool, "/tokenizer_info").await
}

async fn live() -> &'static str {
    "ok"
}

async fn ready(State(shared): State<Arc<Shared>>) -> Response {
    if shared.stopping() {
        (StatusCode::SERVICE_UNAVAILABLE, "draining").into_response()
    } else {
        "ok".into_response()
    }
}

async fn metrics(State(shared): State<Arc<Shared>>) -> Response {
    let pools: Vec<_> = shared.pools.load().values().cloned().collect();
    shared.metrics.in_flight_bytes.set(shared.in_flight.bytes() as i64);
    let text = shared.metrics.render(&pools);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}
