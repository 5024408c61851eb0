//! How many nodes each pool should have: [`decide`], a pure function of what is seen and what is remembered. No clock, no
//! input or output; time comes in as a number of seconds, so the same function runs in the gateway, in simulators (through
//! `potstill-gateway autoscale --stdio`) and in tests.
//!
//! Slots are what is scarce: a reasoning answer holds one for minutes, and by Little's law the open requests are arrivals
//! times stay, which a rate of requests does not show. The default law ([`adaptive`]) therefore counts open requests and
//! what the stages of a run have announced; [`qps`] is the law that HPA and Knative users know; a fixed number is the third.

mod adaptive;
mod budget;
mod history;
mod need;
mod observation;
mod qps;

use std::collections::{BTreeMap, HashMap};

use serde::Serialize;

pub use self::adaptive::Forecast;
use self::history::History;
use self::need::CapacityNeed;
pub use self::observation::{Mode, Observation, PoolObservation, RequestCounts, Settings, StagePlan};

/// What is remembered from one decision to the next. Bounded: pools that are no longer seen are forgotten, histories are
/// thinned.
#[derive(Debug, Default)]
pub struct PolicyState {
    pools: HashMap<String, PoolMemory>,
    /// When it was last decided.
    at: Option<f64>,
}

/// Nothing was seen for so long, or the clock went back: what is remembered is of no use, as after a restart.
const GAP_S: f64 = 120.0;

#[derive(Debug)]
struct PoolMemory {
    /// When the pool was first seen, and with how many nodes: after a restart these stay for a whole memory window.
    first: (f64, usize),
    /// Demand that no stage announced: time and slots.
    demand: History,
    /// Since when there are more nodes than needed.
    surplus_since: Option<f64>,
    /// When something was last open.
    busy_at: f64,
    qps: qps::QpsMemory,
}

/// What should be.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Decision {
    /// Nodes by model; a model that is not named keeps what it has.
    pub desired: BTreeMap<String, usize>,
    /// One line a model: why.
    pub reason: BTreeMap<String, String>,
}

/// The nodes that each pool should have now. Holds for every decision: within min and max, all pools together within the
/// budget, never down on missing metrics, never down in the first memory window.
pub fn decide(seen: &Observation, memory: &mut PolicyState) -> Decision {
    if memory.at.is_some_and(|at| !(0.0..=GAP_S).contains(&(seen.t - at))) {
        memory.pools.clear();
    }
    memory.at = Some(seen.t);
    let starts = adaptive::stage_starts(seen);
    memory.pools.retain(|model, _| seen.pools.iter().any(|pool| pool.model == *model));
    let mut wanted = Vec::with_capacity(seen.pools.len());
    for pool in &seen.pools {
        let remembered = memory.pools.entry(pool.model.clone()).or_insert_with(|| PoolMemory {
            first: (seen.t, pool.have()),
            demand: History::default(),
            surplus_since: None,
            busy_at: seen.t,
            qps: qps::QpsMemory::default(),
        });
        wanted.push(target_nodes(seen.t, pool, &starts, remembered));
    }
    budget::apply(seen, &mut wanted);
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

/// What one pool should have, the budget aside.
fn target_nodes(
    t: f64,
    pool: &PoolObservation,
    starts: &BTreeMap<u32, f64>,
    memory: &mut PoolMemory,
) -> (usize, CapacityNeed) {
    let have = pool.have();
    let bounded = |nodes: usize| nodes.clamp(pool.min.min(pool.max), pool.max);
    let (Some(open), false) = (pool.open(), pool.stale) else {
        // Without figures nothing is taken away; what was asked for stays asked for.
        let kept = bounded(have);
        let reason = format!("metrics are missing: {have} kept");
        return (kept, CapacityNeed { online: kept, reason, ..CapacityNeed::default() });
    };
    if open > 0 {
        memory.busy_at = t;
    }
    let mut need = match pool.settings.mode {
        Mode::Fixed => {
            let nodes = pool.settings.nodes.unwrap_or(pool.min);
            CapacityNeed { online: nodes, reason: format!("fixed at {nodes}"), ..CapacityNeed::default() }
        }
        Mode::Qps => qps::need(t, pool, open, &mut memory.qps),
        Mode::Adaptive => adaptive::need(t, pool, open, starts, &mut memory.demand),
    };
    // The last node stays while the pool was busy not long ago.
    if pool.settings.mode != Mode::Fixed
        && need.nodes() == 0
        && have > 0
        && t - memory.busy_at < pool.settings.idle_timeout_s
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

/// Scaling down waits: a node that is given back and needed again costs a cold start, so it is kept for as long as that
/// would take (rent or buy); where all work is announced, the plan knows better and a short while is enough.
fn scale_down_delay(
    t: f64,
    pool: &PoolObservation,
    nodes: usize,
    need: &mut CapacityNeed,
    memory: &mut PoolMemory,
) -> usize {
    let have = pool.have().min(pool.max);
    if nodes >= have {
        memory.surplus_since = None;
        return nodes;
    }
    let (began, at_first) = memory.first;
    let learning = began + pool.settings.demand_window_s;
    let kept = have.min(at_first);
    let since = *memory.surplus_since.get_or_insert(t);
    let announced = !pool.plan.is_empty() || memory.demand.peak() == 0;
    let wait = match pool.settings.mode {
        Mode::Adaptive if announced => pool.settings.scale_down_delay_s,
        Mode::Adaptive => pool.cold_s(),
        // This law has its own window.
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
