//! The admin API: pools, nodes, keys, usage, drain, reload. Its own listener and its own key; no secret is ever shown, but a
//! new key once.

use std::path::PathBuf;
use std::sync::Arc;

use axum::extract::{Path, Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use http::StatusCode;
use hyper::body::Incoming;
use potstill_shared::openai::ErrorBody;
use potstill_shared::redact::Secret;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use subtle::ConstantTimeEq;
use tokio::net::TcpListener;
use tower::ServiceExt;

use super::gateway::Gateway;
use crate::auth::keys::{bearer_token, configured_hash, generate_key};
use crate::autoscale::plans::RunPlan;
use crate::config::{Config, KeyConfig, Limits, keys};
use crate::pool::ModelPool;
use crate::pool::node::{Node, NodeOrigin, NodeSpec, NodeState};
use crate::proxy::response_body::{GatewayResponse, ResponseBody, builtin};
use crate::server::{Handler, tls};

#[derive(Clone)]
struct Admin {
    gateway: Gateway,
    file: Option<PathBuf>,
    router: Option<Router>,
}

/// Serves the admin API on `listener` until the gateway stops. `file` is the configuration that a reload reads.
pub async fn serve(gateway: Gateway, listener: TcpListener, file: Option<PathBuf>) {
    let stop = gateway.state().proxy.draining.clone();
    let mut admin = Admin { gateway, file, router: None };
    admin.router = Some(router(admin.clone()));
    let draining = stop.clone();
    let grace = std::time::Duration::from_secs(5);
    crate::server::serve(listener, admin, grace, &draining, stop.wait()).await;
}

impl Handler for Admin {
    type Body = ResponseBody;

    async fn handle(&self, request: http::Request<Incoming>) -> GatewayResponse {
        let Some(router) = self.router.clone() else {
            return GatewayResponse::new(ResponseBody::from(bytes::Bytes::new()));
        };
        match router.oneshot(request).await {
            Ok(response) => builtin(response.into_response()),
            Err(never) => match never {},
        }
    }

    fn limits(&self) -> Arc<Limits> {
        self.gateway.state().limits()
    }

    fn tls(&self) -> Option<tls::Tls> {
        None
    }

    fn count_connection(&self, _change: i64) {}
}

fn router(admin: Admin) -> Router {
    Router::new()
        .route("/admin/pools", get(pools))
        .route("/admin/pools/{*model}", get(pool))
        .route("/admin/nodes", post(add_node))
        .route("/admin/nodes/drain", post(drain_node))
        .route("/admin/keys", get(list_keys).post(new_key))
        .route("/admin/keys/{name}", delete(revoke_key))
        .route("/admin/stages", get(stages).post(register_plan))
        .route("/admin/stages/{run}", delete(remove_plan))
        .route("/admin/autoscale", get(autoscale))
        .route("/admin/usage", get(usage))
        .route("/admin/reload", post(reload))
        .route("/admin/drain", post(drain))
        .fallback(async || {
            unauthorized_response(StatusCode::NOT_FOUND, "not_found", "no such path in the admin API")
        })
        .layer(middleware::from_fn_with_state(admin.clone(), require_admin_key))
        .layer(axum::extract::DefaultBodyLimit::max(1 << 20))
        .with_state(admin)
}

fn unauthorized_response(status: StatusCode, code: &str, message: impl Into<String>) -> Response {
    let kind = if status.is_server_error() { "server_error" } else { "invalid_request_error" };
    (status, Json(ErrorBody::new(message, kind, None, Some(code)))).into_response()
}

async fn require_admin_key(State(admin): State<Admin>, request: Request, next: Next) -> Response {
    let wanted = {
        let live = admin.gateway.state().live();
        live.config.admin.as_ref().and_then(|admin| configured_hash(&admin.hash, &admin.env))
    };
    let given = bearer_token(request.headers()).map(|key| *blake3::hash(key.as_bytes()).as_bytes());
    match (wanted, given) {
        (Some(wanted), Some(given)) if bool::from(wanted.ct_eq(&given)) => next.run(request).await,
        _ => unauthorized_response(
            StatusCode::UNAUTHORIZED,
            "invalid_api_key",
            "the admin key is missing or wrong",
        ),
    }
}

fn node_json(node: &Node, pool: &ModelPool) -> Value {
    let stats = node.stats().clone();
    json!({
        "url": node.spec.url, "name": node.name, "state": node.state().name(), "ejected": stats.outlier.is_ejected(),
        "requests": node.requests(), "tokens": node.outstanding_tokens(), "max_concurrency": stats.concurrency.get(),
        "max_concurrency_known": stats.concurrency.is_configured(), "seconds_per_token": stats.speed.measured_seconds_per_token(),
        "usable_slots": node.balance_view(&pool.config().outlier, 0.0, pool.now_ms()).slots,
        "idle_connections": node.endpoint.idle.len(), "added_by_api": matches!(node.spec.origin, NodeOrigin::Admin { .. }),
    })
}

fn pool_json(pool: &ModelPool) -> Value {
    let load = pool.load();
    let nodes: Vec<_> = pool.nodes().iter().map(|node| node_json(node, pool)).collect();
    json!({
        "model": &*pool.model, "active": load.active, "active_tokens": load.tokens, "queued": load.queued,
        "queued_bytes": load.queued_bytes, "oldest_wait_ms": load.oldest_ms, "ready": load.ready,
        "unhealthy": load.unhealthy, "draining": load.draining, "ejected": load.ejected,
        "expected_completion_tokens": pool.expected_completion(None, None), "nodes": nodes,
    })
}

async fn pools(State(admin): State<Admin>) -> Json<Value> {
    let pools = admin.gateway.state().proxy.pools.pools();
    Json(json!({ "pools": pools.values().map(|pool| pool_json(pool)).collect::<Vec<_>>() }))
}

fn pool_not_found(model: &str) -> Response {
    unauthorized_response(StatusCode::NOT_FOUND, "model_not_found", format!("no pool serves `{model}`"))
}

async fn pool(State(admin): State<Admin>, Path(model): Path<String>) -> Response {
    match admin.gateway.state().proxy.pools.get(&model) {
        Some(pool) => Json(pool_json(&pool)).into_response(),
        None => pool_not_found(&model),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NodeRequest {
    model: String,
    url: String,
    #[serde(alias = "slots")]
    max_concurrency: Option<usize>,
    api_key_env: Option<String>,
}

async fn add_node(State(admin): State<Admin>, Json(asked): Json<NodeRequest>) -> Response {
    let Some(pool) = admin.gateway.state().proxy.pools.get(&asked.model) else {
        return pool_not_found(&asked.model);
    };
    let allow_private =
        admin.gateway.state().live().config.admin.as_ref().is_some_and(|admin| admin.allow_private);
    let there = |node: &Arc<Node>| node.spec.url == asked.url && node.state() != NodeState::Draining;
    if pool.nodes().iter().any(there) {
        return unauthorized_response(
            StatusCode::CONFLICT,
            "node_exists",
            format!("`{}` is a node of this pool already", asked.url),
        );
    }
    let spec = NodeSpec {
        key: asked.api_key_env.as_ref().and_then(|variable| std::env::var(variable).ok()).map(Secret::new),
        origin: NodeOrigin::Admin { allow_private },
        // It gets requests after its first good health check.
        state: NodeState::Unhealthy,
        ..NodeSpec::new(asked.url, asked.max_concurrency.filter(|limit| *limit > 0))
    };
    match pool.add_node(spec) {
        Ok(node) => (StatusCode::CREATED, Json(node_json(&node, &pool))).into_response(),
        Err(problem) => unauthorized_response(StatusCode::BAD_REQUEST, "invalid_node", problem),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DrainRequest {
    model: String,
    url: String,
    /// Take it back instead.
    #[serde(default)]
    undo: bool,
}

async fn drain_node(State(admin): State<Admin>, Json(asked): Json<DrainRequest>) -> Response {
    let Some(pool) = admin.gateway.state().proxy.pools.get(&asked.model) else {
        return pool_not_found(&asked.model);
    };
    let Some(node) = pool.nodes().into_iter().find(|node| node.spec.url == asked.url) else {
        return unauthorized_response(
            StatusCode::NOT_FOUND,
            "node_not_found",
            format!("`{}` is no node of this pool", asked.url),
        );
    };
    match (asked.undo, node.state()) {
        (false, _) => pool.set_node_state(&node, NodeState::Draining),
        (true, NodeState::Draining) => pool.set_node_state(&node, NodeState::Unhealthy),
        (true, _) => {}
    }
    Json(node_json(&node, &pool)).into_response()
}

async fn list_keys(State(admin): State<Admin>) -> Json<Value> {
    Json(json!({ "keys": admin.gateway.state().proxy.config().keys.configs() }))
}

#[derive(Serialize)]
struct NewKey {
    name: String,
    /// Shown here and nowhere else.
    key: String,
}

async fn new_key(State(admin): State<Admin>, Json(mut asked): Json<KeyConfig>) -> Response {
    let (key, hash) = generate_key();
    asked.hash = Some(hash);
    asked.env = None;
    let name = asked.name.clone();
    let added = update_keys_file(&admin, |list| {
        list.push(asked);
        let problems = keys::problems(list, "keys");
        if problems.is_empty() { Ok(()) } else { Err(problems.join("; ")) }
    });
    match added {
        Ok(()) => (StatusCode::CREATED, Json(NewKey { name, key })).into_response(),
        Err(problem) => unauthorized_response(StatusCode::BAD_REQUEST, "invalid_key", problem),
    }
}

async fn revoke_key(State(admin): State<Admin>, Path(name): Path<String>) -> Response {
    let removed = update_keys_file(&admin, |list| {
        let before = list.len();
        list.retain(|key| key.name != name);
        if list.len() < before { Ok(()) } else { Err(format!("the keys file has no key `{name}`")) }
    });
    match removed {
        Ok(()) => StatusCode::NO_CONTENT.into_response(),
        Err(problem) => unauthorized_response(StatusCode::NOT_FOUND, "key_not_found", problem),
    }
}

/// Changes the keys file and takes it at once.
fn update_keys_file(
    admin: &Admin,
    change: impl FnOnce(&mut Vec<KeyConfig>) -> Result<(), String>,
) -> Result<(), String> {
    let config = admin.gateway.state().live().config.clone();
    let Some(path) = &config.keys_file else {
        return Err("no `keys_file` is configured, so keys cannot be changed while running".to_owned());
    };
    let mut list = keys::read_keys_file(path).map_err(|error| error.to_string())?;
    change(&mut list)?;
    keys::write_keys_file(path, &list).map_err(|error| format!("`{}`: {error}", path.display()))?;
    admin.gateway.reload(config).map_err(|error| error.to_string())
}

async fn stages(State(admin): State<Admin>) -> Json<Value> {
    let rows = admin.gateway.state().proxy.sinks.metrics.usage.rows();
    let pools = admin.gateway.state().proxy.pools.pools();
    let stages: Vec<_> = rows
        .iter()
        .filter(|row| !row.stage.is_empty())
        .map(|row| {
            let expected = pools.get(&row.model).map(|pool| pool.expected_completion(Some(&row.stage), None));
            json!({ "stage": row.stage, "key": row.key, "model": row.model, "requests": row.requests,
                "completion_tokens": row.completion_tokens, "cost": row.cost, "expected_completion_tokens": expected })
        })
        .collect();
    let status = admin.gateway.state().autoscaler.status();
    let autoscaler = &admin.gateway.state().autoscaler;
    let runs: Vec<_> = autoscaler
        .context()
        .plans()
        .expiring_runs(autoscaler.context().now())
        .into_iter()
        .map(|(run, seconds)| json!({ "run": run, "expires_in_s": seconds }))
        .collect();
    Json(json!({ "stages": stages, "runs": runs, "forecasts": status.forecasts }))
}

/// Takes the plan of a run; the answer forecasts its stages and advises how many requests to keep open.
async fn register_plan(State(admin): State<Admin>, body: bytes::Bytes) -> Response {
    let plan: Result<RunPlan, _> =
        serde_path_to_error::deserialize(&mut serde_json::Deserializer::from_slice(&body));
    let taken = plan
        .map_err(|error| format!("`{}`: {}", error.path(), error.inner()))
        .and_then(|plan| admin.gateway.register_plan(plan));
    match taken {
        Ok(forecasts) => Json(json!({ "forecasts": forecasts })).into_response(),
        Err(problem) => unauthorized_response(StatusCode::BAD_REQUEST, "invalid_plan", problem),
    }
}

async fn remove_plan(State(admin): State<Admin>, Path(run): Path<String>) -> Response {
    if admin.gateway.remove_plan(&run) {
        StatusCode::NO_CONTENT.into_response()
    } else {
        unauthorized_response(StatusCode::NOT_FOUND, "plan_not_found", format!("the run `{run}` has no plan"))
    }
}

async fn autoscale(State(admin): State<Admin>) -> Json<Value> {
    Json(json!(admin.gateway.state().autoscaler.status()))
}

async fn usage(State(admin): State<Admin>) -> Json<Value> {
    Json(json!({ "usage": admin.gateway.state().proxy.sinks.metrics.usage.rows() }))
}

async fn reload(State(admin): State<Admin>) -> Response {
    let Some(file) = &admin.file else {
        return unauthorized_response(
            StatusCode::CONFLICT,
            "no_file",
            "this gateway was not started from a file",
        );
    };
    let taken = Config::read(file).map_err(|error| error.to_string());
    match taken.and_then(|config| admin.gateway.reload(config).map_err(|error| error.to_string())) {
        Ok(()) => Json(json!({ "reloaded": true })).into_response(),
        Err(problem) => unauthorized_response(StatusCode::BAD_REQUEST, "invalid_config", problem),
    }
}

/// Begins to drain the whole gateway, as SIGTERM does.
async fn drain(State(admin): State<Admin>) -> Response {
    admin.gateway.begin_drain();
    (StatusCode::ACCEPTED, Json(json!({ "draining": true }))).into_response()
}
