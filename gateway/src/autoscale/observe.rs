//! What the policy is told: counted by the pools themselves, so it is never old.

use std::collections::BTreeMap;

use super::Scaled;
use super::kubernetes::Cluster;
use super::plans::Plans;
use super::policy::{Observation, PoolObservation};

/// The pools that this gateway decides on, as they are now. What is asked of the other gateways of a cluster counts as well.
pub(crate) fn observe(
    now: f64,
    budget: Option<f64>,
    scaled: &BTreeMap<String, Scaled>,
    plans: &mut Plans,
) -> Observation {
    plans.expire(now);
    let mut pools = Vec::with_capacity(scaled.len());
    for (model, scaled) in scaled {
        let pool = &scaled.pool;
        let config = pool.config();
        let Some(scale) = &config.scale else { continue };
        let cluster = scaled.handle.cluster();
        let (Some(mut supply), true) = (scaled.handle.supply(), cluster.is_none_or(Cluster::leads)) else {
            continue;
        };
        let mut demand = pool.demand();
        for other in cluster.iter().flat_map(|cluster| cluster.others(model)) {
            demand.active += other.active;
            demand.queued += other.queued;
            demand.departed_60 += other.departed_60;
            demand.arrivals = demand.arrivals + other.arrivals;
        }
        // What was asked for and is not there yet counts: else it would be asked for twice.
        let known = supply.ready + supply.starting_age_s.len();
        supply
            .starting_age_s
            .extend(std::iter::repeat_n(0.0, scaled.told.min(scale.max).saturating_sub(known)));
        let cold = supply.cold_start_p90();
        if let Some(seconds) = cold {
            pool.set_cold_start(seconds);
        }
        let plan = plans.of(model, now, |stage| pool.lengths(Some(stage)).1);
        let running = plan.iter().find(|stage| stage.order == 0).map(|stage| stage.stage.as_str());
        pools.push(PoolObservation {
            model: model.clone(),
            min: scale.min,
            max: scale.max,
            slots: scale.slots,
            cost_per_node_s: scale.cost,
            itl_ms: demand.itl_ms.unwrap_or(scale.itl_ms),
            ready: supply.ready,
            draining: supply.draining,
            starting_age_s: supply.starting_age_s,
            cold_start_s_p90: cold,
            active: Some(demand.active),
            queued: Some(demand.queued),
            arrivals: demand.arrivals,
            finished_60: demand.departed_60,
            out_tokens_ewma: pool.lengths(running).0.or(pool.lengths(None).0),
            plan,
            stale: false,
            settings: scale.settings(),
        });
    }
    Observation { t: now, budget, pools }
}
