//! The default policy `adaptive`. Unplanned demand is followed by its open requests; planned stages are sized in
//! advance.
//!
//! Let `D` be open requests, `a` and `c` arrivals and completions per second over a minute, and `L` the cold start in
//! seconds. The mean stay is `tau = D / c` (Little). A node that starts now meets `D + g tau (1 - exp(-L / tau))` open
//! requests, where `g` is the part of `a - c` beyond Poisson noise. The 98th percentile of `D` over the window is a
//! lower bound, because bursts recur.
//!
//! A stage of `W` node-seconds on `n` nodes costs `n L` node-seconds of cold starts and lasts `W / n`. The sum, with a
//! price on waiting, is least at `n = sqrt(worth W / (cost L))`, bounded by the nodes that its open requests fill.

use std::collections::BTreeMap;

use serde::Serialize;

use super::history::DemandHistory;
use super::need::CapacityNeed;
use super::observation::{Observation, PoolObservation, StagePlan};

/// Quantile of the remembered demand for which nodes are provided.
const DEMAND_QUANTILE: f64 = 0.98;
/// Nodes of the next stage are started this multiple of a cold start in advance.
const WARM_UP_FACTOR: f64 = 1.15;
/// Number of completions in the last minute from which their measured mean length replaces the estimate of the plan.
const MIN_COMPLETIONS: u64 = 20;

/// Returns the need of one pool.
pub(super) fn need(
    t: f64,
    pool: &PoolObservation,
    open: usize,
    starts: &BTreeMap<u32, f64>,
    demand: &mut DemandHistory,
) -> CapacityNeed {
    let running: Vec<&StagePlan> = pool.plan.iter().filter(|stage| stage.order == 0).collect();
    let announced: u64 = running.iter().map(|stage| stage.remaining.min(stage.concurrency)).sum();
    let unannounced = open.saturating_sub(usize::try_from(announced).unwrap_or(usize::MAX));
    demand.push(t, unannounced, pool.settings.demand_window_s.max(4.0 * pool.cold_start_s()));
    let (online, mut reason) = unplanned_nodes(t, pool, unannounced, open, demand);
    let mut need = CapacityNeed { online, ..CapacityNeed::default() };
    if !running.is_empty() {
        need.stage = stage_nodes(pool, &running, pool.nodes());
        need.work =
            running.iter().map(|stage| remaining_work_s(pool, stage)).sum::<f64>() * pool.cost_per_node_s;
        reason = format!(
            "{} of `{}` left, {:.1} node-min{}",
            running.iter().map(|stage| stage.remaining).sum::<u64>(),
            running.iter().map(|stage| stage.stage.as_str()).collect::<Vec<_>>().join("`, `"),
            need.work / pool.cost_per_node_s.max(1e-9) / 60.0,
            if online > 0 { format!("; besides {reason}") } else { String::new() }
        );
    }
    for stage in pool.plan.iter().filter(|stage| stage.order > 0) {
        let begins = stage.starts_in_s.unwrap_or_else(|| starts.get(&stage.order).copied().unwrap_or(0.0));
        if begins <= WARM_UP_FACTOR * pool.cold_start_s() {
            let nodes = stage_nodes(pool, &[stage], 0);
            if nodes > need.warm {
                need.warm = nodes;
                reason += &format!("; {nodes} warm for `{}` in {begins:.0} s", stage.stage);
            }
        }
    }
    need.reason = reason;
    need
}

fn unplanned_nodes(
    t: f64,
    pool: &PoolObservation,
    demand: usize,
    open: usize,
    seen: &DemandHistory,
) -> (usize, String) {
    let span = t.clamp(5.0, 60.0);
    let (arrived, finished) = (pool.arrivals.s60 as f64, pool.finished_60 as f64);
    let noise = (arrived + finished).sqrt() / span;
    let trend = (arrived - finished) / span;
    let trend = trend.signum() * (trend.abs() - noise).max(0.0);
    let cold = pool.cold_start_s();
    let out = finished / span;
    // The trend is measured over the whole pool. Only the share of unplanned requests counts here.
    let share = demand as f64 / open.max(1) as f64;
    let reach = if out > 0.0 && open > 0 {
        let stay = open as f64 / out;
        stay * (1.0 - (-cold / stay).exp())
    } else {
        cold
    };
    let ahead = (demand as f64 + share * trend * reach).max(0.0);
    let remembered = seen.quantile(DEMAND_QUANTILE);
    let nodes = (ahead.max(remembered as f64) / pool.slots.max(1) as f64).ceil() as usize;
    let reason = format!(
        "{demand} open, {ahead:.0} expected in {cold:.0} s, {remembered} remembered, {} slots a node",
        pool.slots
    );
    (nodes, reason)
}

/// Mean completion length of a stage in tokens: measured, or estimated by the plan.
fn mean_tokens(pool: &PoolObservation, stage: &StagePlan) -> f64 {
    let measured = pool.out_tokens_ewma.filter(|_| stage.order == 0 && pool.finished_60 >= MIN_COMPLETIONS);
    measured.unwrap_or(stage.est_out_tokens).max(1.0)
}

/// Node-seconds that the rest of a stage takes on full nodes.
fn remaining_work_s(pool: &PoolObservation, stage: &StagePlan) -> f64 {
    stage.remaining as f64 * mean_tokens(pool, stage) / pool.node_tokens_per_s()
}

/// Returns the number of nodes for concurrent stages, of which `have` exist already. The sum of `cost_ceiling` applies
/// if every stage has one.
fn stage_nodes(pool: &PoolObservation, stages: &[&StagePlan], have: usize) -> usize {
    let open: u64 = stages.iter().map(|stage| stage.remaining.min(stage.concurrency)).sum();
    let work: f64 = stages.iter().map(|stage| remaining_work_s(pool, stage)).sum();
    if open == 0 {
        return 0;
    }
    let cost = pool.cost_per_node_s.max(1e-9);
    let fill = open.div_ceil(pool.slots.max(1) as u64) as usize;
    let worth =
        (pool.settings.delay_cost_per_hour * work / (cost * pool.cold_start_s())).sqrt().round() as usize;
    // Nodes needed to meet the deadlines. Without a node, a cold start is subtracted from the remaining time.
    let in_time = stages.iter().filter_map(|stage| {
        let left = stage.deadline_s? - if have == 0 { pool.cold_start_s() } else { 0.0 };
        Some((remaining_work_s(pool, stage) / left.max(1.0)).ceil())
    });
    let in_time = in_time.sum::<f64>() as usize;
    let nodes = worth.max(have).max(in_time).min(fill).max(1);
    let ceilings: Option<f64> = stages.iter().map(|stage| stage.cost_ceiling).sum();
    ceilings.map_or(nodes, |ceiling| nodes.min((ceiling / cost + 1e-9) as usize))
}

/// Seconds that the rest of a stage takes on `nodes` nodes.
fn duration_s(pool: &PoolObservation, stage: &StagePlan, nodes: usize) -> f64 {
    let nodes = nodes.max(1) as f64;
    let open = stage.remaining.min(stage.concurrency) as f64;
    let batch = (open / nodes).max(1.0).min(pool.slots.max(1) as f64);
    stage.remaining as f64 * mean_tokens(pool, stage) / (nodes * batch * pool.tokens_per_s(batch))
}

fn expected_nodes(seen: &Observation, pool: &PoolObservation, stage: &StagePlan) -> usize {
    if stage.order == 0 {
        return pool.ready.max(1);
    }
    let nodes = stage_nodes(pool, &[stage], 0);
    let affordable = seen.budget.map(|budget| (budget / pool.cost_per_node_s.max(1e-9)) as usize);
    affordable.map_or(nodes, |affordable| nodes.min(affordable)).max(1)
}

/// Returns the seconds until the stages of each order begin. Stages of different order run one after another; those of
/// one order last as long as the slowest.
pub(super) fn stage_starts_in_s(seen: &Observation) -> BTreeMap<u32, f64> {
    let mut lasts: BTreeMap<u32, f64> = BTreeMap::new();
    for pool in &seen.pools {
        for stage in &pool.plan {
            let seconds = duration_s(pool, stage, expected_nodes(seen, pool, stage));
            let longest = lasts.entry(stage.order).or_default();
            *longest = longest.max(seconds);
        }
    }
    let mut begins = 0.0;
    let begin = |(order, seconds)| {
        begins += seconds;
        (order, begins - seconds)
    };
    lasts.into_iter().map(begin).collect()
}

/// Expected start, end and cost of a planned stage.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Forecast {
    /// Name of the stage.
    pub stage: String,
    /// Model of the stage.
    pub model: String,
    /// Position in the plan; 0 is running.
    pub order: u32,
    /// Seconds until the stage begins.
    pub begins_in_s: f64,
    /// Seconds until the stage is complete.
    pub done_in_s: f64,
    /// Cost of the nodes during the stage: node-hours times cost per node.
    pub cost_hours: f64,
    /// Number of requests that the client should keep open, from the slots of the expected nodes.
    pub advised_open: u64,
}

impl Forecast {
    /// Returns the forecasts of all planned stages, sorted by order.
    pub fn all_stages(seen: &Observation) -> Vec<Self> {
        let starts = stage_starts_in_s(seen);
        let mut all: Vec<_> = seen
            .pools
            .iter()
            .flat_map(|pool| pool.plan.iter().map(move |stage| (pool, stage)))
            .map(|(pool, stage)| {
                let nodes = expected_nodes(seen, pool, stage).max(stage_nodes(pool, &[stage], pool.nodes()));
                let begins =
                    stage.starts_in_s.unwrap_or_else(|| starts.get(&stage.order).copied().unwrap_or(0.0));
                let lasts = duration_s(pool, stage, nodes);
                Self {
                    stage: stage.stage.clone(),
                    model: pool.model.clone(),
                    order: stage.order,
                    begins_in_s: begins,
                    done_in_s: begins + lasts,
                    cost_hours: nodes as f64 * lasts / 3600.0 * pool.cost_per_node_s,
                    // An eighth more than the slots, so that no slot waits for the client.
                    advised_open: stage.remaining.min((nodes * pool.slots * 9 / 8).max(1) as u64),
                }
            })
            .collect();
        all.sort_by_key(|forecast| forecast.order);
        all
    }
}
