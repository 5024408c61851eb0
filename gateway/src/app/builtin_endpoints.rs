//! Endpoints that the gateway itself answers: models, health, metrics.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, Query, State};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use http::{HeaderMap, StatusCode, Uri, header};
use potstill_shared::openai::{ModelCard, ModelList};
use serde::Deserialize;

use super::state::AppState;
use crate::auth::keys::ClientCertificate;
use crate::error::GatewayError;
use crate::proxy::fetch::fetch;

type ClientCertificateExtension = Option<axum::Extension<ClientCertificate>>;

/// The routes.
pub(crate) fn router(state: &Arc<AppState>) -> Router {
    Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{*model}", get(model))
        .route("/tokenizer_info", get(tokenizer_info))
        .route("/health", get(health))
        .route("/healthz", get(health))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .method_not_allowed_fallback(async || GatewayError::MethodNotAllowed)
        .fallback(async |uri: Uri| GatewayError::NotFound { path: uri.path().to_owned() })
        .with_state(Arc::clone(state))
}

async fn models(
    State(state): State<Arc<AppState>>,
    certificate: ClientCertificateExtension,
    headers: HeaderMap,
) -> Result<Response, GatewayError> {
    let key = state.proxy.config().keys.authenticate(&headers, certificate.map(|c| c.0))?;
    let pools = state.proxy.pools.pools();
    let names = pools.keys().filter(|model| key.allows(model));
    let cards = names.map(|model| ModelCard::new(model, state.started, "potstill")).collect();
    Ok(axum::Json(ModelList::new(cards)).into_response())
}

async fn model(
    State(state): State<Arc<AppState>>,
    certificate: ClientCertificateExtension,
    Path(model): Path<String>,
    headers: HeaderMap,
) -> Result<Response, GatewayError> {
    let key = state.proxy.config().keys.authenticate(&headers, certificate.map(|c| c.0))?;
    if !key.allows(&model) || state.proxy.pools.get(&model).is_none() {
        return Err(GatewayError::ModelNotFound { model });
    }
    Ok(axum::Json(ModelCard::new(&model, state.started, "potstill")).into_response())
}

#[derive(Deserialize)]
struct ModelQuery {
    model: Option<String>,
}

/// Evaluation clients send no model. With one pool there is no ambiguity.
async fn tokenizer_info(
    State(state): State<Arc<AppState>>,
    certificate: ClientCertificateExtension,
    Query(which): Query<ModelQuery>,
    headers: HeaderMap,
) -> Result<Response, GatewayError> {
    let key = state.proxy.config().keys.authenticate(&headers, certificate.map(|c| c.0))?;
    let pools = state.proxy.pools.pools();
    let model = match which.model {
        Some(model) => model,
        None if pools.len() == 1 => pools.keys().next().cloned().unwrap_or_default(),
        None => {
            return Err(GatewayError::InvalidRequest {
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
    fetch(&state.proxy, &key, &pool, "/tokenizer_info").await
}

async fn health() -> &'static str {
    "ok"
}

async fn ready(State(state): State<Arc<AppState>>) -> Response {
    if state.proxy.draining.is_set() {
        (StatusCode::SERVICE_UNAVAILABLE, "draining").into_response()
    } else {
        "ok".into_response()
    }
}

async fn metrics(State(state): State<Arc<AppState>>) -> Response {
    let gauges: Vec<_> = state.proxy.pools.pools().values().map(|pool| pool.gauges()).collect();
    let text = state.proxy.sinks.metrics.render(&gauges, state.proxy.in_flight.get());
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}
