//! Input of the scaling policy.

use std::collections::BTreeMap;

use super::plans::PlanRegistry;
use super::scaled_pool::ScaledPool;
use crate::scaling_policy::{Observation, PoolObservation};

/// Observes the pools that this gateway decides on. Demand on the other gateways of a cluster counts as well.
pub(crate) fn observe(
    now: f64,
    budget: Option<f64>,
    scaled: &BTreeMap<String, ScaledPool>,
    plans: &mut PlanRegistry,
) -> Observation {
    plans.expire(now);
    let mut pools = Vec::with_capacity(scaled.len());
    for (model, scaled) in scaled {
        let pool = &scaled.pool;
        let config = pool.config();
        let Some(scale) = &config.scale else { continue };
        let coordinator = scaled.actuator.coordinator();
        let (Some(mut supply), true) = (scaled.actuator.supply(), coordinator.is_leader()) else { continue };
        let mut demand = pool.demand();
        for peer in coordinator.peer_demand(model) {
            demand.active += peer.active;
            demand.queued += peer.queued;
            demand.departed_60 += peer.departed_60;
            demand.arrivals = demand.arrivals + peer.arrivals;
        }
        // Nodes that were requested and that the actuator has not seen yet count as starting. Else they would be requested
        // twice.
        let known = supply.ready + supply.starting_age_s.len();
        let unseen = scaled.last_target.min(scale.max).saturating_sub(known);
        supply.starting_age_s.extend(std::iter::repeat_n(0.0, unseen));
        let cold_start = supply.cold_start_p90();
        if let Some(seconds) = cold_start {
            pool.set_cold_start(seconds);
        }
        let plan = plans.stages_for(model, now, |stage| pool.completion_lengths(Some(stage)).1);
        let running = plan.iter().find(|stage| stage.order == 0).map(|stage| stage.stage.as_str());
        pools.push(PoolObservation {
            model: model.clone(),
            min: scale.min,
            max: scale.max,
            slots: scale.max_concurrency,
            cost_per_node_s: scale.cost_per_hour,
            itl_ms: demand.itl_ms.unwrap_or(scale.itl_ms),
            ready: supply.ready,
            draining: supply.draining,
            starting_age_s: supply.starting_age_s,
            cold_start_s_p90: cold_start,
            active: Some(demand.active),
            queued: Some(demand.queued),
            arrivals: demand.arrivals,
            finished_60: demand.departed_60,
            out_tokens_ewma: pool.completion_lengths(running).0.or(pool.completion_lengths(None).0),
            plan,
            stale: false,
            settings: scale.settings(),
        });
    }
    Observation { t: now, budget, pools }
}
