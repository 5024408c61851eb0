//! Pools and requests of a scenario.

use potstill_gateway::scaling_policy::StagePlan;

/// A pool of a scenario.
#[derive(Clone)]
pub(crate) struct PoolSpec {
    pub(crate) model: &'static str,
    pub(crate) slots: usize,
    pub(crate) itl_ms: [f64; 2],
    pub(crate) cold_s: (f64, f64),
    pub(crate) min: usize,
    pub(crate) max: usize,
    pub(crate) begin: usize,
    pub(crate) cost: f64,
}

impl PoolSpec {
    /// Tokens per second of one of `running` requests.
    pub(crate) fn rate(&self, running: usize) -> f64 {
        1000.0 / (self.itl_ms[0] + self.itl_ms[1] * running as f64)
    }

    /// Tokens per second of a full node.
    pub(crate) fn node_rate(&self) -> f64 {
        self.slots as f64 * self.rate(self.slots)
    }
}

/// A request.
#[derive(Clone)]
pub(crate) struct Request {
    pub(crate) pool: usize,
    pub(crate) arrived: f64,
    pub(crate) prompt: f64,
    pub(crate) tokens: f64,
    pub(crate) wait: Option<f64>,
}

/// Returns the plan of a stage.
pub(crate) fn announced(stage: &str, order: usize, remaining: usize, tokens: f64, open: usize) -> StagePlan {
    StagePlan {
        stage: stage.to_owned(),
        order: order as u32,
        remaining: remaining as u64,
        est_out_tokens: tokens,
        concurrency: open as u64,
        starts_in_s: None,
        deadline_s: None,
        cost_ceiling: None,
    }
}
