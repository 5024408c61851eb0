//! Actuator for nodes that an external program starts and stops. The program receives the target and returns the nodes
//! that exist:
//!
//! ```text
//! POST URL  {"v": 1, "model": "m", "wanted": 3, "remove": ["http://10.0.0.7:8000"]}
//! 200       {"nodes": [{"url": "http://10.0.0.5:8000", "max_concurrency": 64}, ...]}
//! ```
//!
//! `remove` lists drained nodes; the program may stop only these. A returned node receives requests after its first
//! successful health check. If the program fails to respond, all nodes stay as they are.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method, header};
use potstill_shared::redact::Secret;
use serde::{Deserialize, Serialize};

use crate::autoscale::actuator::{NodeActuator, NodeSupply};
use crate::config::{ScaleConfig, WebhookConfig};
use crate::pool::ModelPool;
use crate::pool::health::is_healthy;
use crate::pool::node::{Node, NodeOrigin, NodeSpec, NodeState};
use crate::telemetry::metrics::Metrics;
use crate::upstream::address::AddressPolicy;
use crate::upstream::connect::Connector;
use crate::upstream::endpoint::Endpoint;
use crate::upstream::exchange::{SendError, send};
use crate::upstream::read_body::read_full_body;
use crate::upstream::request::UpstreamRequest;

/// Interval of requests to the program when nothing changes.
const REQUEST_INTERVAL: Duration = Duration::from_secs(5);
/// Timeout of a request to the program.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Timeout of the health check of a starting node.
const CHECK_TIMEOUT: Duration = Duration::from_millis(500);

#[derive(Serialize)]
struct ScaleRequest<'a> {
    v: u32,
    model: &'a str,
    wanted: usize,
    remove: Vec<&'a str>,
}

#[derive(Deserialize)]
struct ScaleResponse {
    nodes: Vec<ReportedNode>,
}

#[derive(Deserialize)]
struct ReportedNode {
    url: String,
    #[serde(alias = "slots")]
    max_concurrency: Option<usize>,
}

struct WebhookNode {
    node: Arc<Node>,
    added: Instant,
    was_ready: bool,
    draining: Option<Instant>,
}

/// Actuator that sends the target to an external program.
pub struct WebhookActuator {
    pool: Arc<ModelPool>,
    connector: Connector,
    metrics: Arc<Metrics>,
    /// Endpoint of the program.
    program: Arc<Endpoint>,
    path: PathAndQuery,
    nodes: Vec<WebhookNode>,
    /// Times at which nodes were requested that have not appeared yet.
    requested_at: Vec<Instant>,
    supply: NodeSupply,
    last_request: Option<(Instant, usize, usize)>,
}

impl WebhookActuator {
    /// Creates an actuator without nodes. An error describes an invalid URL or key.
    pub fn new(
        pool: Arc<ModelPool>,
        connector: Connector,
        metrics: Arc<Metrics>,
        config: &WebhookConfig,
    ) -> Result<Self, String> {
        let url: http::Uri = config.url.parse().map_err(|error| format!("webhook: {error}"))?;
        let base = format!(
            "{}://{}",
            url.scheme_str().unwrap_or("http"),
            url.authority().ok_or("webhook: the URL names no host")?
        );
        let key = config.api_key_env.as_ref().and_then(|variable| std::env::var(variable).ok());
        let key = key.map(Secret::new);
        let program = Endpoint::new(&base, key.as_ref(), AddressPolicy::Trusted)
            .map_err(|problem| format!("webhook: {problem}"))?;
        Ok(Self {
            pool,
            connector,
            metrics,
            program: Arc::new(program),
            path: url.path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/")),
            nodes: Vec::new(),
            requested_at: Vec::new(),
            supply: NodeSupply::default(),
            last_request: None,
        })
    }

    fn settings(&self) -> ScaleConfig {
        self.pool.config().scale.clone().unwrap_or_default()
    }

    fn count_event(&self, event: &str) {
        self.metrics.scale_events.with_label_values(&[&*self.pool.model, event]).inc();
    }

    /// Number of nodes that are not draining.
    fn not_draining(&self) -> usize {
        self.nodes.iter().filter(|remote| remote.draining.is_none()).count()
    }

    fn readmit_or_drain(&mut self, wanted: usize) {
        while self.not_draining() < wanted {
            let Some(remote) = self.nodes.iter_mut().find(|remote| remote.draining.is_some()) else { break };
            remote.draining = None;
            let state = if remote.was_ready { NodeState::Ready } else { NodeState::Unhealthy };
            self.pool.set_node_state(&remote.node, state);
            self.count_event("revived");
        }
        while self.not_draining() > wanted {
            let staying = self.nodes.iter_mut().filter(|remote| remote.draining.is_none());
            let Some(remote) =
                staying.min_by_key(|remote| (remote.was_ready, remote.node.outstanding_tokens()))
            else {
                break;
            };
            remote.draining = Some(Instant::now());
            self.pool.set_node_state(&remote.node, NodeState::Draining);
        }
    }

    async fn request_scale(&self, wanted: usize, remove: &[String]) -> Result<ScaleResponse, String> {
        let ask = ScaleRequest {
            v: 1,
            model: &self.pool.model,
            wanted,
            remove: remove.iter().map(String::as_str).collect(),
        };
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let body = serde_json::to_vec(&ask).map_err(|error| error.to_string())?.into();
        let request =
            UpstreamRequest { method: Method::POST, path: self.path.clone(), client_headers: headers, body };
        let failed = |error: SendError| error.to_string();
        let mut answer = send(
            &self.connector,
            &self.program,
            &request,
            tokio::time::Instant::now(),
            REQUEST_TIMEOUT,
            REQUEST_TIMEOUT,
        )
        .await
        .map_err(failed)?;
        if !answer.head.status.is_success() {
            return Err(format!("it answered {}", answer.head.status));
        }
        let until = tokio::time::Instant::now() + REQUEST_TIMEOUT;
        let body = read_full_body(&mut answer.body, REQUEST_TIMEOUT, until).await.map_err(failed)?;
        serde_json::from_slice(&body).map_err(|error| format!("its answer is not understood: {error}"))
    }

    /// Adds and removes nodes to match the program's response.
    fn apply_response(&mut self, answer: ScaleResponse) {
        let gone = |remote: &WebhookNode| !answer.nodes.iter().any(|node| node.url == remote.node.spec.url);
        for remote in self.nodes.extract_if(.., |remote| gone(remote)) {
            self.pool.remove_node(remote.node.id);
            let event = if remote.draining.is_some() { "stopped" } else { "lost" };
            self.metrics.scale_events.with_label_values(&[&*self.pool.model, event]).inc();
        }
        let max_concurrency = self.settings().max_concurrency;
        for new in answer.nodes {
            if self.nodes.iter().any(|remote| remote.node.spec.url == new.url) {
                continue;
            }
            let spec = NodeSpec {
                state: NodeState::Unhealthy,
                origin: NodeOrigin::Scaler,
                ..NodeSpec::new(new.url, Some(new.max_concurrency.unwrap_or(max_concurrency)))
            };
            match self.pool.add_node(spec) {
                Ok(node) => {
                    tracing::info!(model = &*self.pool.model, node = node.name, "node started");
                    self.count_event("started");
                    let added = if self.requested_at.is_empty() {
                        Instant::now()
                    } else {
                        self.requested_at.remove(0)
                    };
                    self.nodes.push(WebhookNode { node, added, was_ready: false, draining: None });
                }
                Err(problem) => tracing::error!(model = &*self.pool.model, problem, "node left out"),
            }
        }
    }

    async fn check_starting(&mut self) {
        let path = self.pool.config().health.path.clone();
        for remote in self.nodes.iter_mut().filter(|remote| !remote.was_ready && remote.draining.is_none()) {
            if remote.node.state() == NodeState::Ready
                || is_healthy(&self.connector, &remote.node, &path, CHECK_TIMEOUT).await
            {
                let seconds = remote.added.elapsed().as_secs_f64();
                remote.was_ready = true;
                self.supply.push_cold_start(seconds);
                self.metrics.cold_start.with_label_values(&[&*self.pool.model]).observe(seconds);
                self.pool.set_node_state(&remote.node, NodeState::Ready);
            }
        }
    }
}

impl NodeActuator for WebhookActuator {
    async fn step(&mut self, target: Option<usize>) {
        self.check_starting().await;
        let Some(wanted) = target else { return };
        self.readmit_or_drain(wanted);
        let longest = Duration::from_secs(self.settings().drain_timeout_s);
        let empty = |remote: &&WebhookNode| {
            remote.draining.is_some_and(|since| remote.node.requests() == 0 || since.elapsed() > longest)
        };
        let remove: Vec<String> =
            self.nodes.iter().filter(empty).map(|remote| remote.node.spec.url.clone()).collect();
        let due = self.last_request.is_none_or(|(at, asked, left)| {
            asked != wanted || left != remove.len() || at.elapsed() > REQUEST_INTERVAL
        });
        if !due {
            return;
        }
        // Draining nodes with requests must not be stopped, so the requested number includes them.
        let stay = self.nodes.len() - remove.len();
        let coming = wanted.saturating_sub(self.not_draining());
        self.requested_at.truncate(coming);
        self.requested_at.resize_with(coming, Instant::now);
        match self.request_scale(stay.max(wanted), &remove).await {
            Ok(answer) => self.apply_response(answer),
            Err(problem) => {
                tracing::warn!(
                    model = &*self.pool.model,
                    program = self.program.name(),
                    problem,
                    "the scaling webhook fails; nodes stay as they are"
                );
                self.count_event("webhook_failed");
            }
        }
        self.last_request = Some((Instant::now(), wanted, remove.len()));
    }

    fn supply(&mut self) -> Option<NodeSupply> {
        let mut supply =
            NodeSupply { cold_starts_s: self.supply.cold_starts_s.clone(), ..NodeSupply::default() };
        supply.starting_age_s.extend(self.requested_at.iter().map(|asked| asked.elapsed().as_secs_f64()));
        for remote in &self.nodes {
            match (remote.draining, remote.was_ready) {
                (Some(_), _) => supply.draining += 1,
                (None, true) => supply.ready += 1,
                (None, false) => supply.starting_age_s.push(remote.added.elapsed().as_secs_f64()),
            }
        }
        Some(supply)
    }

    async fn stop(&mut self) {
        let all: Vec<String> = self.nodes.iter().map(|remote| remote.node.spec.url.clone()).collect();
        for remote in &self.nodes {
            self.pool.remove_node(remote.node.id);
        }
        if let Err(problem) = self.request_scale(0, &all).await {
            tracing::warn!(
                model = &*self.pool.model,
                problem,
                "the scaling webhook did not take back the nodes"
            );
        }
    }
}
