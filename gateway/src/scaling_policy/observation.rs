//! What the policy is told of the pools: the wire form of `potstill-gateway autoscale --stdio`. Unknown fields are ignored,
//! missing ones have defaults.

use serde::{Deserialize, Serialize};

/// All pools at one moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Observation {
    /// Seconds on any clock that does not go back.
    pub t: f64,
    /// Most cost at once over all pools, in units of `cost_per_node_s`; none for no limit.
    #[serde(default)]
    pub budget: Option<f64>,
    /// The pools.
    pub pools: Vec<PoolObservation>,
}

/// One pool.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PoolObservation {
    /// Its model.
    pub model: String,
    /// Fewest nodes.
    #[serde(default)]
    pub min: usize,
    /// Most nodes.
    pub max: usize,
    /// Requests that a node works on at once.
    pub slots: usize,
    /// What a node costs while it is held.
    #[serde(default = "one")]
    pub cost_per_node_s: f64,
    /// Milliseconds per token of one request when `b` are on the node: `itl_ms[0] + itl_ms[1] * b`.
    pub itl_ms: [f64; 2],
    /// Nodes that take requests.
    pub ready: usize,
    /// Nodes that finish what they hold.
    #[serde(default)]
    pub draining: usize,
    /// Nodes that were asked for and are not ready yet: seconds since then.
    #[serde(default)]
    pub starting_age_s: Vec<f64>,
    /// 90th percentile of the cold starts seen; none before the first.
    #[serde(default)]
    pub cold_start_s_p90: Option<f64>,
    /// Requests on nodes; none when it could not be found out.
    #[serde(default)]
    pub active: Option<usize>,
    /// Requests waiting; none when it could not be found out.
    #[serde(default)]
    pub queued: Option<usize>,
    /// Arrivals in the last seconds.
    #[serde(default)]
    pub arrivals: RequestCounts,
    /// Completions in the last 60 seconds.
    #[serde(default)]
    pub finished_60: u64,
    /// Mean tokens of the last completions.
    #[serde(default)]
    pub out_tokens_ewma: Option<f64>,
    /// What runs have announced for this model.
    #[serde(default)]
    pub plan: Vec<StagePlan>,
    /// The figures are old: nothing may be taken away on their account.
    #[serde(default)]
    pub stale: bool,
    /// How this pool is scaled.
    #[serde(default)]
    pub settings: Settings,
}

/// Arrivals by window length in seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct RequestCounts {
    /// 10 s.
    #[serde(rename = "10", default)]
    pub s10: u64,
    /// 60 s.
    #[serde(rename = "60", default)]
    pub s60: u64,
    /// 300 s.
    #[serde(rename = "300", default)]
    pub s300: u64,
}

impl std::ops::Add for RequestCounts {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { s10: self.s10 + other.s10, s60: self.s60 + other.s60, s300: self.s300 + other.s300 }
    }
}

/// One announced stage of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StagePlan {
    /// Its name.
    pub stage: String,
    /// 0 runs now, 1 is next, and so on.
    pub order: u32,
    /// Requests still to be finished.
    pub remaining: u64,
    /// Mean tokens of an answer, as its owner thinks.
    pub est_out_tokens: f64,
    /// Requests that its client keeps open at once.
    pub concurrency: u64,
    /// Seconds until it begins, where its owner knows; else worked out from the stages before it.
    #[serde(default)]
    pub starts_in_s: Option<f64>,
    /// Seconds in which it should be done.
    #[serde(default)]
    pub deadline_s: Option<f64>,
    /// Most cost at once that nodes for this stage may reach.
    #[serde(default)]
    pub cost_ceiling: Option<f64>,
}

/// Which law decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Open requests, their trend, and what stages announce.
    #[default]
    Adaptive,
    /// Requests per second and node.
    Qps,
    /// Always the same number.
    Fixed,
}

/// How a pool is scaled.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Settings {
    /// The law.
    pub mode: Mode,
    /// Nodes of a fixed pool.
    pub nodes: Option<usize>,
    /// Requests per second that a node of a `qps` pool should get.
    pub target_qps: f64,
    /// Cold start before one was seen, in seconds.
    pub cold_start_s: f64,
    /// A pool that may go to zero does so after so many seconds without requests.
    #[serde(alias = "idle_s")]
    pub idle_timeout_s: f64,
    /// Demand of so many seconds is remembered.
    #[serde(alias = "memory_s")]
    pub demand_window_s: f64,
    /// Nodes that announced work no longer needs go after so many seconds.
    #[serde(alias = "hold_s")]
    pub scale_down_delay_s: f64,
    /// What an hour of waiting for a stage is worth, in cost of nodes per hour.
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
    /// Nodes that are there or coming.
    pub fn have(&self) -> usize {
        self.ready + self.starting_age_s.len()
    }

    /// Requests on nodes and waiting, if known.
    pub fn open(&self) -> Option<usize> {
        Some(self.active? + self.queued?)
    }

    /// Seconds from the request for a node until it takes requests.
    pub fn cold_s(&self) -> f64 {
        self.cold_start_s_p90.unwrap_or(self.settings.cold_start_s).max(0.1)
    }

    /// Tokens per second of one request when `running` are on its node.
    pub fn tokens_per_s(&self, running: f64) -> f64 {
        1000.0 / (self.itl_ms[0] + self.itl_ms[1] * running).max(1e-3)
    }

    /// Tokens per second of a full node.
    pub fn node_tokens_per_s(&self) -> f64 {
        let slots = self.slots.max(1) as f64;
        slots * self.tokens_per_s(slots)
    }
}
