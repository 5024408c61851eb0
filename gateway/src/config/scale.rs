//! Configuration of autoscaling: the scaling policy, its bounds, and the actuator that starts and stops nodes.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::scaling_policy::{Mode, Settings};

/// Settings that apply to all scaled pools.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AutoscaleConfig {
    /// Largest cost per hour of all nodes together, including starting and draining ones, in the unit of
    /// `cost_per_hour`. Without this key there is no limit.
    pub budget: Option<f64>,
    /// Milliseconds between two scaling decisions; default 5,000. A request that finds no node triggers a decision at
    /// once.
    pub interval_ms: u64,
    /// Whether to log decisions without applying them; default `false`. Pools of processes and webhooks stay at `min`.
    /// Kubernetes workloads stay unchanged, and every change is sent as a server-side dry run.
    pub dry_run: bool,
    /// CSV file that gets one row per finished request, for simulators: `t_s,in_tokens,out_tokens,wait_s,stay_s,model`.
    /// Without this key nothing is recorded.
    pub load_trace_file: Option<PathBuf>,
    /// Name of the Kubernetes Lease by which the gateways of a cluster elect a leader; default `potstill-gateway`.
    pub lease_name: String,
    /// Seconds without a renewal of the Lease after which another gateway takes the lead; default 15.
    pub lease_duration_s: u64,
    /// Address of the external scaler (gRPC) for KEDA. Without this key there is none.
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

/// Autoscaling of one pool. Exactly one of `process`, `webhook` and `kubernetes` is required.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScaleConfig {
    /// The scaling policy: `adaptive` (default), `qps` or `fixed`.
    pub mode: Mode,
    /// Smallest number of nodes; default 0.
    pub min: usize,
    /// Largest number of nodes; default 1.
    pub max: usize,
    /// Largest number of concurrent requests on a node; default 8.
    pub max_concurrency: usize,
    /// Cost of a node per hour, in the unit of `autoscale.budget`; default 1.
    pub cost_per_hour: f64,
    /// Number of nodes in mode `fixed`; default `min`.
    pub nodes: Option<usize>,
    /// Requests per second that a node can serve, for mode `qps`; default 1.
    pub target_qps: f64,
    /// Seconds of a cold start, until one has been measured; default 240.
    pub cold_start_s: f64,
    /// Seconds without requests after which a pool may scale to zero; default 0.
    pub idle_timeout_s: f64,
    /// Seconds of past demand that the policy `adaptive` takes into account; default 780. After a start of the gateway,
    /// existing nodes are kept for this time.
    pub demand_window_s: f64,
    /// Scale-down delay in seconds for nodes that planned stages no longer need; default 30.
    pub scale_down_delay_s: f64,
    /// Value of finishing a stage one hour earlier, in the unit of `cost_per_hour`; default 8. A higher value starts
    /// more nodes.
    pub delay_cost_per_hour: f64,
    /// Milliseconds per token of one request: `itl_ms[0] + itl_ms[1] * b` with `b` requests on the node. Used until the
    /// values have been measured; default `[30.0, 0.5]`.
    pub itl_ms: [f64; 2],
    /// Seconds after which a draining node is stopped even if requests are still running; default 3,600.
    pub drain_timeout_s: u64,
    /// Seconds after which a process that has not become ready is stopped; default 3,600.
    pub startup_timeout_s: u64,
    /// Nodes as local processes.
    pub process: Option<ProcessConfig>,
    /// Nodes that an external program starts and stops.
    pub webhook: Option<WebhookConfig>,
    /// Nodes as pods of a Kubernetes workload.
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

/// Nodes as local processes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProcessConfig {
    /// Program and arguments. `{port}` is replaced by the port to listen on (on 127.0.0.1), `{gpus}` by the node's
    /// entry of `gpus`.
    pub command: Vec<String>,
    /// Folder for one log file per node. Without this key the output of nodes is discarded.
    pub log_folder: Option<PathBuf>,
    /// GPU ids, one entry per node, such as `["0,1", "2,3"]`. A node gets the first free entry as
    /// `CUDA_VISIBLE_DEVICES`. The number of entries bounds the number of nodes.
    #[serde(default)]
    pub gpus: Vec<String>,
}

/// An external program that receives the target number of nodes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WebhookConfig {
    /// URL of the program: `http://host:port/path` or `https://…`.
    pub url: String,
    /// Environment variable with the key that is sent to the program as bearer token. Without this key none is sent.
    pub api_key_env: Option<String>,
}

/// A Kubernetes workload whose pods are the nodes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KubernetesConfig {
    /// Kind of the workload: `Deployment`, `StatefulSet` or `LeaderWorkerSet`.
    pub kind: WorkloadKind,
    /// Name of the workload.
    pub name: String,
    /// Namespace of the workload; default: the namespace of the gateway.
    pub namespace: Option<String>,
    /// Port on which the pods serve HTTP.
    pub port: u16,
    /// Component that changes `replicas`: `gateway` (default) or `keda`.
    #[serde(default)]
    pub actuator: Actuator,
    /// Environment variable with the key that is sent to the pods as bearer token. Without this key none is sent.
    pub api_key_env: Option<String>,
}

impl KubernetesConfig {
    /// Returns kind, namespace (if set) and name, for messages.
    pub fn workload(&self) -> String {
        let namespace = self.namespace.as_ref().map(|namespace| format!("{namespace}/")).unwrap_or_default();
        format!("{} {namespace}{}", self.kind.name(), self.name)
    }
}

/// Kind of a workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum WorkloadKind {
    /// All pods are alike; any of them can be removed first.
    Deployment,
    /// The pod with the highest index is removed first.
    StatefulSet,
    /// A node is a group of pods; the group with the highest index is removed first.
    LeaderWorkerSet,
}

impl WorkloadKind {
    /// Returns the kind as Kubernetes spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Deployment => "Deployment",
            Self::StatefulSet => "StatefulSet",
            Self::LeaderWorkerSet => "LeaderWorkerSet",
        }
    }
}

/// Component that changes `replicas` of a workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Actuator {
    /// The gateway, through the `/scale` subresource.
    #[default]
    Gateway,
    /// KEDA, which reads the number from the gateway (`autoscale.keda_listen`).
    Keda,
}

impl ScaleConfig {
    /// Returns the settings of the scaling policy.
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

    /// Returns everything that is wrong beyond types, one message per problem.
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
            problems.extend(unset_variable_problem("scale.webhook", &webhook.api_key_env));
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
            problems.extend(unset_variable_problem("scale.kubernetes", &kubernetes.api_key_env));
        }
        problems
    }
}

/// Returns a problem if `variable` is configured but not set in the environment.
fn unset_variable_problem(place: &str, variable: &Option<String>) -> Option<String> {
    let variable = variable.as_ref().filter(|variable| std::env::var(variable).is_err())?;
    Some(format!("`{place}`: environment variable `{variable}` is not set"))
}
