//! Active health checks of all nodes of a pool, at an interval. A ready node becomes unhealthy after several
//! consecutive failures. An unhealthy node becomes ready with its first success. Draining and starting nodes are not
//! checked here; their autoscaler decides.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;

use super::model_pool::ModelPool;
use super::node::{Node, NodeState};
use crate::time::ms;
use crate::upstream::connect::Connector;
use crate::upstream::exchange::get_ok;

/// Checks the nodes of `pool` until the pool is retired.
pub async fn run_health_checks(pool: Arc<ModelPool>, connector: Connector) {
    let stop = pool.retirement_token();
    let mut failures: HashMap<u64, u32> = HashMap::new();
    loop {
        let health = pool.config().health.clone();
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(ms(health.interval_ms.max(10))) => {}
        }
        pool.remove_drained();
        let watched = |node: &Arc<Node>| matches!(node.state(), NodeState::Ready | NodeState::Unhealthy);
        let nodes: Vec<_> = pool.nodes().into_iter().filter(watched).collect();
        failures.retain(|id, _| nodes.iter().any(|node| node.id == *id));
        let checks: Vec<_> = nodes
            .iter()
            .map(|node| is_healthy(&connector, node, &health.path, ms(health.timeout_ms)))
            .collect();
        let results = join_all(checks).await;
        for (node, healthy) in nodes.iter().zip(results) {
            node.endpoint.idle.close_expired();
            let count = failures.entry(node.id).or_default();
            *count = if healthy { 0 } else { *count + 1 };
            match node.state() {
                NodeState::Unhealthy if healthy => {
                    tracing::info!(model = &*pool.model, node = node.name, "node is ready");
                    pool.set_node_state(node, NodeState::Ready);
                }
                NodeState::Ready if *count >= health.failures => {
                    tracing::warn!(model = &*pool.model, node = node.name, "node fails its health check");
                    pool.set_node_state(node, NodeState::Unhealthy);
                }
                _ => {}
            }
        }
        // Pauses and ejections end by time, without another event that would dispatch waiting requests.
        pool.dispatch();
    }
}

/// Returns whether the node responds to `path` with success before the timeout.
pub async fn is_healthy(connector: &Connector, node: &Node, path: &str, timeout: Duration) -> bool {
    tokio::time::timeout(timeout, get_ok(connector, &node.endpoint.target, path)).await.unwrap_or(false)
}
