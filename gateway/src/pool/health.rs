//! Active health: asks every node of a pool at an interval. A ready node is taken out after some failures in a row; an
//! ill one comes back with its first success.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio_util::sync::CancellationToken;

use super::ModelPool;
use super::node::{Node, NodeState};
use crate::config::ms;
use crate::upstream::client::Upstream;

/// Watches `pool` until `stop`.
pub async fn watch(pool: Arc<ModelPool>, upstream: Upstream, stop: CancellationToken) {
    let health = pool.config.health.clone();
    let mut failures: HashMap<u64, u32> = HashMap::new();
    let mut ticks = tokio::time::interval(ms(health.interval_ms.max(10)));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let nodes: Vec<_> = pool.nodes().into_iter().filter(|n| n.state() != NodeState::Draining).collect();
        failures.retain(|id, _| nodes.iter().any(|node| node.id == *id));
        let checks: Vec<_> =
            nodes.iter().map(|node| check(&upstream, node, &health.path, ms(health.timeout_ms))).collect();
        let results = join_all(checks).await;
        for (node, healthy) in nodes.iter().zip(results) {
            let count = failures.entry(node.id).or_default();
            *count = if healthy { 0 } else { *count + 1 };
            match node.state() {
                NodeState::Unhealthy if healthy => {
                    tracing::info!(model = pool.config.model, node = node.name, "node is ready");
                    pool.set_state(node, NodeState::Ready);
                }
                NodeState::Ready if *count >= health.failures => {
                    tracing::warn!(
                        model = pool.config.model,
                        node = node.name,
                        "node fails its health check"
                    );
                    pool.set_state(node, NodeState::Unhealthy);
                }
                _ => {}
            }
        }
    }
}

/// Whether the node answers `path` with success in time.
pub async fn check(upstream: &Upstream, node: &Node, path: &str, timeout: Duration) -> bool {
    tokio::time::timeout(timeout, upstream.get_ok(node, path)).await.unwrap_or(false)
}
