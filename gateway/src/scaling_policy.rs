//! The scaling policy: [`decide`], a pure function from an observation and earlier observations to a number of nodes
//! per pool. Time is an argument, so the gateway, simulators (`potstill-gateway autoscale --stdio`) and tests run the
//! same function.
//!
//! Slots are the scarce resource, because a reasoning completion holds one for minutes. By Little's law the open
//! requests are arrivals times stay; a request rate does not show this. The default policy ([`adaptive`]) therefore
//! counts open requests and planned stages. [`qps`] follows the request rate like HPA and Knative. The third policy is
//! a fixed number.

mod adaptive;
mod budget;
mod history;
mod need;
mod observation;
mod qps;

use std::collections::{BTreeMap, HashMap};

use serde::Serialize;

pub use self::adaptive::Forecast;
use self::history::DemandHistory;
use self::need::CapacityNeed;
pub use self::observation::{Mode, Observation, PoolObservation, RequestCounts, Settings, StagePlan};

/// State between decisions. Bounded: pools that are no longer observed are removed and histories are thinned.
#[derive(Debug, Default)]
pub struct PolicyState {
    pools: HashMap<String, PoolMemory>,
    /// Time of the last decision.
    decided_at: Option<f64>,
}

/// Largest gap between two decisions, in seconds. After a longer gap or a clock that went back, the state is cleared as
/// after a restart.
const MAX_GAP_S: f64 = 120.0;

#[derive(Debug)]
struct PoolMemory {
    /// Time of the first observation and the number of nodes then. After a restart these nodes are kept for
    /// `demand_window_s`.
    first_observation: (f64, usize),
    /// History of the open requests that no plan covers.
    unplanned_demand: DemandHistory,
    /// Time since which there are more nodes than needed.
    surplus_since: Option<f64>,
    /// Time at which a request was last open.
    last_busy: f64,
    qps: qps::QpsMemory,
}

/// The result of the policy.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Decision {
    /// Number of nodes by model.
    pub desired: BTreeMap<String, usize>,
    /// Explanation by model, one line each.
    pub reason: BTreeMap<String, String>,
}

/// Returns the number of nodes that each pool should have.
///
/// Every decision is within `min` and `max` of the pool and within the budget of all pools. Without metrics, and in the
/// first `demand_window_s` seconds, no pool is scaled down, except for the budget.
pub fn decide(seen: &Observation, memory: &mut PolicyState) -> Decision {
    if memory.decided_at.is_some_and(|at| !(0.0..=MAX_GAP_S).contains(&(seen.t - at))) {
        memory.pools.clear();
    }
    memory.decided_at = Some(seen.t);
    let starts = adaptive::stage_starts_in_s(seen);
    memory.pools.retain(|model, _| seen.pools.iter().any(|pool| pool.model == *model));
    let mut wanted = Vec::with_capacity(seen.pools.len());
    for pool in &seen.pools {
        let remembered = memory.pools.entry(pool.model.clone()).or_insert_with(|| PoolMemory {
            first_observation: (seen.t, pool.nodes()),
            unplanned_demand: DemandHistory::default(),
            surplus_since: None,
            last_busy: seen.t,
            qps: qps::QpsMemory::default(),
        });
        wanted.push(target_nodes(seen.t, pool, &starts, remembered));
    }
    budget::apply_budget(seen, &mut wanted);
    let named = |text: fn(&(usize, CapacityNeed)) -> String| {
        seen.pools.iter().zip(&wanted).map(|(pool, need)| (pool.model.clone(), text(need))).collect()
    };
    Decision {
        desired: seen
            .pools
            .iter()
            .zip(&wanted)
            .map(|(pool, (nodes, _))| (pool.model.clone(), *nodes))
            .collect(),
        reason: named(|(nodes, need)| format!("{nodes}: {}", need.reason)),
    }
}

/// Returns the number of nodes that one pool should have, before the budget applies.
fn target_nodes(
    t: f64,
    pool: &PoolObservation,
    starts: &BTreeMap<u32, f64>,
    memory: &mut PoolMemory,
) -> (usize, CapacityNeed) {
    let have = pool.nodes();
    let bounded = |nodes: usize| nodes.clamp(pool.min.min(pool.max), pool.max);
    let (Some(open), false) = (pool.open_requests(), pool.stale) else {
        // Without metrics nothing is scaled down, and nodes that are starting are kept.
        let kept = bounded(have);
        let reason = format!("metrics are missing: {have} kept");
        return (kept, CapacityNeed { online: kept, reason, ..CapacityNeed::default() });
    };
    if open > 0 {
        memory.last_busy = t;
    }
    let mut need = match pool.settings.mode {
        Mode::Fixed => {
            let nodes = pool.settings.nodes.unwrap_or(pool.min);
            CapacityNeed { online: nodes, reason: format!("fixed at {nodes}"), ..CapacityNeed::default() }
        }
        Mode::Qps => qps::need(t, pool, open, &mut memory.qps),
        Mode::Adaptive => adaptive::need(t, pool, open, starts, &mut memory.unplanned_demand),
    };
    // The last node stays until the pool has been idle for `idle_timeout_s`.
    if pool.settings.mode != Mode::Fixed
        && need.nodes() == 0
        && have > 0
        && t - memory.last_busy < pool.settings.idle_timeout_s
    {
        need.online = 1;
        need.reason += &format!("; one stays until idle for {:.0} s", pool.settings.idle_timeout_s);
    }
    let nodes = bounded(need.nodes());
    if nodes != need.nodes() {
        need.reason += &format!("; bounded to {}..{}", pool.min, pool.max);
    }
    let nodes = if pool.settings.mode == Mode::Fixed {
        nodes
    } else {
        scale_down_delay(t, pool, nodes, &mut need, memory)
    };
    (nodes, need)
}

/// Delays scale-down. A node that is removed and needed again costs a cold start, so it is kept for as long as that
/// takes (rent or buy). If plans cover all demand, the shorter `scale_down_delay_s` is enough.
fn scale_down_delay(
    t: f64,
    pool: &PoolObservation,
    nodes: usize,
    need: &mut CapacityNeed,
    memory: &mut PoolMemory,
) -> usize {
    let have = pool.nodes().min(pool.max);
    if nodes >= have {
        memory.surplus_since = None;
        return nodes;
    }
    let (began, at_first) = memory.first_observation;
    let learning = began + pool.settings.demand_window_s;
    let kept = have.min(at_first);
    let since = *memory.surplus_since.get_or_insert(t);
    let announced = !pool.plan.is_empty() || memory.unplanned_demand.peak() == 0;
    let wait = match pool.settings.mode {
        Mode::Adaptive if announced => pool.settings.scale_down_delay_s,
        Mode::Adaptive => pool.cold_start_s(),
        // The policy `qps` has its own stabilization window.
        Mode::Qps | Mode::Fixed => 0.0,
    };
    if t - since < wait {
        need.reason += &format!("; surplus of {} kept for another {:.0} s", have - nodes, wait - (t - since));
        return have;
    }
    if t < learning && nodes < kept {
        need.reason += &format!("; first {:.0} s seen: {kept} kept", t - began);
        return kept;
    }
    nodes
}

#[cfg(test)]
mod tests;
