//! How a pool grows and shrinks: the law, its bounds, and the actuator that starts and stops nodes.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::scaling_policy::{Mode, Settings};

/// What holds for all pools together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AutoscaleConfig {
    /// Most cost per hour of all nodes that are held at once, those that start and drain included; none for no limit.
    pub budget: Option<f64>,
    /// How often the number of nodes is decided; a request that finds no node asks for a decision at once.
    pub interval_ms: u64,
    /// Decide and log, but leave every pool at its `min`.
    pub dry_run: bool,
    /// A CSV file that gets one row per finished request, for simulators: `t_s,in_tokens,out_tokens,wait_s,stay_s,model`.
    pub load_trace_file: Option<PathBuf>,
    /// Name of the Lease by which the gateways of a cluster agree on who leads, where pools are workloads of Kubernetes.
    pub lease_name: String,
    /// A leader that was not heard of for so many seconds is replaced.
    pub lease_duration_s: u64,
    /// Where KEDA finds the external scaler (gRPC); none for no external scaler.
    pub keda_listen: Option<SocketAddr>,
}

impl Default for AutoscaleConfig {
    fn default() -> Self {
        Self {
            budget: None,
            interval_ms: 5_000,
            dry_run: false,
            load_trace_file: None,
            lease_name: "potstill-gateway".to_owned(),
            lease_duration_s: 15,
            keda_listen: None,
        }
    }
}

/// How one pool is scaled.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScaleConfig {
    /// The law: `adaptive`, `qps` or `fixed`.
    pub mode: Mode,
    /// Fewest nodes.
    pub min: usize,
    /// Most nodes.
    pub max: usize,
    /// Requests that a node works on at once.
    pub max_concurrency: usize,
    /// What a node costs per hour, in the unit of the budget.
    pub cost_per_hour: f64,
    /// Nodes of a `fixed` pool; `min` if not given.
    pub nodes: Option<usize>,
    /// Requests per second that a node of a `qps` pool should get.
    pub target_qps: f64,
    /// Cold start before one was seen, in seconds.
    pub cold_start_s: f64,
    /// A pool that may go to zero does so after so many seconds without requests, at the earliest.
    pub idle_timeout_s: f64,
    /// Demand of so many seconds is remembered.
    pub demand_window_s: f64,
    /// Nodes that announced work no longer needs go after so many seconds.
    pub scale_down_delay_s: f64,
    /// What an hour of waiting for a stage is worth, in cost of nodes per hour.
    pub delay_cost_per_hour: f64,
    /// Milliseconds per token of one request, alone and for each further one on the node, before any were measured.
    pub itl_ms: [f64; 2],
    /// A node that drains is stopped after so many seconds even if it still writes.
    pub drain_timeout_s: u64,
    /// A process that is not ready after so many seconds is stopped.
    pub startup_timeout_s: u64,
    /// Nodes as processes of this machine.
    pub process: Option<ProcessConfig>,
    /// Nodes that a program of yours starts and stops.
    pub webhook: Option<WebhookConfig>,
    /// Nodes as pods of a workload of Kubernetes.
    pub kubernetes: Option<KubernetesConfig>,
}

impl Default for ScaleConfig {
    fn default() -> Self {
        let usual = Settings::default();
        Self {
            mode: usual.mode,
            min: 0,
            max: 1,
            max_concurrency: 8,
            cost_per_hour: 1.0,
            nodes: None,
            target_qps: usual.target_qps,
            cold_start_s: usual.cold_start_s,
            idle_timeout_s: usual.idle_timeout_s,
            demand_window_s: usual.demand_window_s,
            scale_down_delay_s: usual.scale_down_delay_s,
            delay_cost_per_hour: usual.delay_cost_per_hour,
            itl_ms: [30.0, 0.5],
            drain_timeout_s: 3_600,
            startup_timeout_s: 3_600,
            process: None,
            webhook: None,
            kubernetes: None,
        }
    }
}

/// Local node processes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProcessConfig {
    /// Program and arguments; `{port}` stands for the port it must listen on (127.0.0.1), `{gpus}` for its share of `gpus`.
    pub command: Vec<String>,
    /// Folder for one log file per node; none discards what nodes print.
    pub log_folder: Option<PathBuf>,
    /// GPU ids of one node each, such as `["0,1", "2,3"]`; a node gets the first free entry as `CUDA_VISIBLE_DEVICES`. No more
    /// nodes are started than there are entries.
    #[serde(default)]
    pub gpus: Vec<String>,
}

/// A program that is told how many nodes there should be.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WebhookConfig {
    /// Where it listens: `http://host:port/path` or `https://…`.
    pub url: String,
    /// Environment variable with the key that it wants as bearer token.
    pub api_key_env: Option<String>,
}

/// A workload of Kubernetes whose pods are the nodes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KubernetesConfig {
    /// What it is.
    pub kind: WorkloadKind,
    /// Its name.
    pub name: String,
    /// Its namespace; the gateway's own if not given.
    pub namespace: Option<String>,
    /// Port on which its pods speak HTTP.
    pub port: u16,
    /// Who changes its `replicas`.
    #[serde(default)]
    pub actuator: Actuator,
    /// Environment variable with the key that its pods want as bearer token.
    pub api_key_env: Option<String>,
}

impl KubernetesConfig {
    /// The workload by kind, namespace where one is given, and name.
    pub fn workload(&self) -> String {
        let namespace = self.namespace.as_ref().map(|namespace| format!("{namespace}/")).unwrap_or_default();
        format!("{} {namespace}{}", self.kind.name(), self.name)
    }
}

/// Kinds of workloads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum WorkloadKind {
    /// The pods are alike, and any of them can go.
    Deployment,
    /// The pod with the highest index goes first.
    StatefulSet,
    /// A node is a group of pods; the group with the highest index goes first.
    LeaderWorkerSet,
}

impl WorkloadKind {
    /// As Kubernetes writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Deployment => "Deployment",
            Self::StatefulSet => "StatefulSet",
            Self::LeaderWorkerSet => "LeaderWorkerSet",
        }
    }
}

/// Who changes `replicas`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Actuator {
    /// The gateway, through `/scale`.
    #[default]
    Gateway,
    /// KEDA, which asks the gateway for the number (`autoscale.keda_listen`).
    Keda,
}

impl ScaleConfig {
    /// For the policy.
    pub fn settings(&self) -> Settings {
        Settings {
            mode: self.mode,
            nodes: self.nodes,
            target_qps: self.target_qps,
            cold_start_s: self.cold_start_s,
            idle_timeout_s: self.idle_timeout_s,
            demand_window_s: self.demand_window_s,
            scale_down_delay_s: self.scale_down_delay_s,
            delay_cost_per_hour: self.delay_cost_per_hour,
        }
    }

    /// What is wrong beyond types.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.min > self.max || self.max == 0 || self.max_concurrency == 0 {
            problems.push(format!(
                "`scale` needs min <= max, max >= 1 and max_concurrency >= 1, not min {}, max {}, max_concurrency {}",
                self.min, self.max, self.max_concurrency
            ));
        }
        if self.nodes.is_some_and(|nodes| nodes < self.min || nodes > self.max) {
            problems.push("`scale.nodes` must be between `min` and `max`".to_owned());
        }
        let positive = [
            ("cost_per_hour", self.cost_per_hour),
            ("target_qps", self.target_qps),
            ("demand_window_s", self.demand_window_s),
            ("itl_ms[0]", self.itl_ms[0]),
        ];
        let others = [
            ("cold_start_s", self.cold_start_s),
            ("idle_timeout_s", self.idle_timeout_s),
            ("scale_down_delay_s", self.scale_down_delay_s),
            ("delay_cost_per_hour", self.delay_cost_per_hour),
            ("itl_ms[1]", self.itl_ms[1]),
        ];
        for (name, value) in positive.iter().filter(|(_, value)| !(value.is_finite() && *value > 0.0)) {
            problems.push(format!("`scale.{name}` must be more than 0, not {value}"));
        }
        for (name, value) in others.iter().filter(|(_, value)| !(value.is_finite() && *value >= 0.0)) {
            problems.push(format!("`scale.{name}` must not be negative, not {value}"));
        }
        let actuators = [self.process.is_some(), self.webhook.is_some(), self.kubernetes.is_some()];
        if actuators.iter().filter(|given| **given).count() != 1 {
            problems.push("`scale` needs one of `process`, `webhook` and `kubernetes`".to_owned());
        }
        if let Some(process) = &self.process {
            if !process.command.iter().any(|part| part.contains("{port}")) {
                problems.push("`scale.process.command` must name a program and contain `{port}`".to_owned());
            }
            if !process.gpus.is_empty() && process.gpus.len() < self.max {
                problems.push(format!(
                    "`scale.process.gpus` has {} entries for up to {} nodes",
                    process.gpus.len(),
                    self.max
                ));
            }
        }
        if let Some(webhook) = &self.webhook {
            if let Err(problem) = webhook.url.parse::<http::Uri>() {
                problems.push(format!("`scale.webhook.url`: {problem}"));
            }
            problems.extend(unset("scale.webhook", &webhook.api_key_env));
        }
        if let Some(kubernetes) = &self.kubernetes {
            if !cfg!(feature = "kubernetes") {
                problems.push(
                    "this program was built without the feature `kubernetes`; use `potstill-gateway`"
                        .to_owned(),
                );
            }
            let name = &kubernetes.name;
            let part = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-.".contains(&byte);
            if name.is_empty() || name.len() > 253 || !name.bytes().all(part) {
                problems.push(format!("`scale.kubernetes.name`: `{name}` is no name of an object"));
            }
            problems.extend(unset("scale.kubernetes", &kubernetes.api_key_env));
        }
        problems
    }
}

/// A variable that should hold a key and does not exist.
fn unset(place: &str, variable: &Option<String>) -> Option<String> {
    let variable = variable.as_ref().filter(|variable| std::env::var(variable).is_err())?;
    Some(format!("`{place}`: environment variable `{variable}` is not set"))
}
