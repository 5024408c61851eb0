//! Input of the scaling policy. Also the wire format of `potstill-gateway autoscale --stdio`: unknown fields are
//! ignored, missing fields have defaults.

use serde::{Deserialize, Serialize};

/// State of all pools at one time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Observation {
    /// Time in seconds on a monotonic clock. Rates of the first minute assume a clock that starts at 0.
    pub t: f64,
    /// Largest cost of all nodes together, in the unit of `cost_per_node_s`; `None` for no limit.
    #[serde(default)]
    pub budget: Option<f64>,
    /// The pools.
    pub pools: Vec<PoolObservation>,
}

/// State of one pool.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PoolObservation {
    /// Name of the model.
    pub model: String,
    /// Smallest number of nodes.
    #[serde(default)]
    pub min: usize,
    /// Largest number of nodes.
    pub max: usize,
    /// Largest number of concurrent requests on a node.
    pub slots: usize,
    /// Cost of a node per unit of time; default 1.
    #[serde(default = "one")]
    pub cost_per_node_s: f64,
    /// Milliseconds per token of one request with `b` requests on the node: `itl_ms[0] + itl_ms[1] * b`.
    pub itl_ms: [f64; 2],
    /// Number of ready nodes.
    pub ready: usize,
    /// Number of draining nodes.
    #[serde(default)]
    pub draining: usize,
    /// Seconds since each node that is not ready yet was requested.
    #[serde(default)]
    pub starting_age_s: Vec<f64>,
    /// 90th percentile of measured cold starts in seconds; `None` without measurements.
    #[serde(default)]
    pub cold_start_s_p90: Option<f64>,
    /// Number of requests on nodes; `None` if unknown.
    #[serde(default)]
    pub active: Option<usize>,
    /// Number of waiting requests; `None` if unknown.
    #[serde(default)]
    pub queued: Option<usize>,
    /// Arrivals in the last seconds.
    #[serde(default)]
    pub arrivals: RequestCounts,
    /// Number of requests that ended in the last 60 seconds.
    #[serde(default)]
    pub finished_60: u64,
    /// Mean length of recent completions in tokens.
    #[serde(default)]
    pub out_tokens_ewma: Option<f64>,
    /// Stages that runs have planned for this model.
    #[serde(default)]
    pub plan: Vec<StagePlan>,
    /// Whether the metrics are outdated. The pool is then not scaled down.
    #[serde(default)]
    pub stale: bool,
    /// Settings of the policy.
    #[serde(default)]
    pub settings: Settings,
}

/// Number of arrivals by length of the window.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct RequestCounts {
    /// In the last 10 seconds.
    #[serde(rename = "10", default)]
    pub s10: u64,
    /// In the last 60 seconds.
    #[serde(rename = "60", default)]
    pub s60: u64,
    /// In the last 300 seconds.
    #[serde(rename = "300", default)]
    pub s300: u64,
}

impl std::ops::Add for RequestCounts {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { s10: self.s10 + other.s10, s60: self.s60 + other.s60, s300: self.s300 + other.s300 }
    }
}

/// A planned stage of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StagePlan {
    /// Name of the stage.
    pub stage: String,
    /// Position in the plan: 0 is running, 1 is next, and so on.
    pub order: u32,
    /// Number of requests that are not complete.
    pub remaining: u64,
    /// Mean completion length in tokens, as estimated by the run.
    pub est_out_tokens: f64,
    /// Number of requests that the client keeps open.
    pub concurrency: u64,
    /// Seconds until the stage begins, if known. Otherwise computed from the stages before it.
    #[serde(default)]
    pub starts_in_s: Option<f64>,
    /// Seconds until the stage should be complete.
    #[serde(default)]
    pub deadline_s: Option<f64>,
    /// Largest cost of the nodes for this stage, in the unit of `cost_per_node_s`.
    #[serde(default)]
    pub cost_ceiling: Option<f64>,
}

/// The scaling policy of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Follows open requests, their trend, and planned stages.
    #[default]
    Adaptive,
    /// Follows the request rate.
    Qps,
    /// Always the same number of nodes.
    Fixed,
}

/// Settings of the scaling policy for one pool. The configuration reference is `ScaleConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Settings {
    /// The policy.
    pub mode: Mode,
    /// Number of nodes in mode `fixed`.
    pub nodes: Option<usize>,
    /// Requests per second that a node can serve, for mode `qps`.
    pub target_qps: f64,
    /// Seconds of a cold start, until one has been measured.
    pub cold_start_s: f64,
    /// Seconds without requests after which a pool may scale to zero.
    #[serde(alias = "idle_s")]
    pub idle_timeout_s: f64,
    /// Seconds of past demand that the policy takes into account.
    #[serde(alias = "memory_s")]
    pub demand_window_s: f64,
    /// Scale-down delay in seconds for nodes that planned stages no longer need.
    #[serde(alias = "hold_s")]
    pub scale_down_delay_s: f64,
    /// Value of finishing a stage one hour earlier, in the unit of cost.
    #[serde(alias = "hour_worth")]
    pub delay_cost_per_hour: f64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            mode: Mode::Adaptive,
            nodes: None,
            target_qps: 1.0,
            cold_start_s: 240.0,
            idle_timeout_s: 0.0,
            demand_window_s: 780.0,
            scale_down_delay_s: 30.0,
            delay_cost_per_hour: 8.0,
        }
    }
}

fn one() -> f64 {
    1.0
}

impl PoolObservation {
    /// Number of ready and starting nodes.
    pub fn nodes(&self) -> usize {
        self.ready + self.starting_age_s.len()
    }

    /// Number of requests on nodes and waiting, if known.
    pub fn open_requests(&self) -> Option<usize> {
        Some(self.active? + self.queued?)
    }

    /// Cold start in seconds: measured or configured, at least 0.1.
    pub fn cold_start_s(&self) -> f64 {
        self.cold_start_s_p90.unwrap_or(self.settings.cold_start_s).max(0.1)
    }

    /// Tokens per second of one request with `running` requests on its node.
    pub fn tokens_per_s(&self, running: f64) -> f64 {
        1000.0 / (self.itl_ms[0] + self.itl_ms[1] * running).max(1e-3)
    }

    /// Tokens per second of a full node.
    pub fn node_tokens_per_s(&self) -> f64 {
        let slots = self.slots.max(1) as f64;
        slots * self.tokens_per_s(slots)
    }
}
