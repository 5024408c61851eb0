//! The policy `qps`: follows requests per second and node. Two windows with a panic mode as in Knative; tolerance and
//! stabilization window as in the Kubernetes HPA (autoscaling/v2).

use std::collections::VecDeque;

use super::need::CapacityNeed;
use super::observation::PoolObservation;

/// Relative deviation from the target below which the number of nodes is not changed (HPA's default).
const TOLERANCE: f64 = 0.1;
/// Panic begins when the short window needs this multiple of the ready nodes (Knative's default).
const PANIC_THRESHOLD: f64 = 2.0;
/// Duration of panic after its last cause, in seconds.
const PANIC_DURATION_S: f64 = 60.0;
/// Stabilization window in seconds: scale-down uses the largest recommendation within it (HPA's default).
const STABILIZATION_WINDOW_S: f64 = 300.0;

/// State of the policy for one pool.
#[derive(Debug, Default)]
pub(super) struct QpsMemory {
    recommended: VecDeque<(f64, usize)>,
    panic: Option<(f64, usize)>,
}

/// Returns the need of one pool.
pub(super) fn need(t: f64, pool: &PoolObservation, open: usize, memory: &mut QpsMemory) -> CapacityNeed {
    let (have, target) = (pool.nodes(), pool.settings.target_qps.max(1e-9));
    let stable = pool.arrivals.s60 as f64 / t.clamp(5.0, 60.0);
    let short = pool.arrivals.s10 as f64 / t.clamp(5.0, 10.0);
    let inside = (stable / (target * have.max(1) as f64) - 1.0).abs() <= TOLERANCE;
    let mut nodes = if inside && have > 0 { have } else { (stable / target).ceil() as usize };
    if open > 0 {
        nodes = nodes.max(1);
    }
    let mut reason = format!("{stable:.2} requests/s at {target} a node");
    let urgent = (short / target).ceil() as usize;
    let recent = memory.panic.filter(|(since, _)| t - since < PANIC_DURATION_S);
    if urgent as f64 >= PANIC_THRESHOLD * pool.ready.max(1) as f64 {
        memory.panic = Some((t, urgent.max(recent.map_or(0, |(_, nodes)| nodes))));
    } else {
        memory.panic = recent;
    }
    if let Some((_, least)) = memory.panic {
        nodes = nodes.max(least).max(have);
        reason += &format!("; panic: {short:.2} requests/s over 10 s");
    }
    memory.recommended.push_back((t, nodes));
    while memory.recommended.front().is_some_and(|(at, _)| *at < t - STABILIZATION_WINDOW_S)
        || memory.recommended.len() > 4096
    {
        memory.recommended.pop_front();
    }
    let greatest = memory.recommended.iter().map(|(_, nodes)| *nodes).max().unwrap_or(nodes);
    if nodes < have && greatest > nodes {
        nodes = greatest.min(have);
        reason += &format!("; {nodes} were needed within {STABILIZATION_WINDOW_S:.0} s");
    }
    CapacityNeed { online: nodes, reason, ..CapacityNeed::default() }
}
