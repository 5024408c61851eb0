//! Starts and stops the nodes of one pool. Each pool has an actuator in a task of its own, so a slow one delays no other pool.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use super::coordination::Coordinator;
use crate::pool::ModelPool;

/// Interval between two steps.
const STEP_INTERVAL: Duration = Duration::from_millis(100);
/// Number of cold starts that are remembered.
const MAX_COLD_STARTS: usize = 20;

/// The nodes of a pool, as its actuator knows them.
#[derive(Debug, Clone, Default)]
pub struct NodeSupply {
    /// Nodes that may receive requests.
    pub ready: usize,
    /// Nodes that finish their requests and receive no new ones.
    pub draining: usize,
    /// For each node that is requested and not ready: seconds since it was requested.
    pub starting_age_s: Vec<f64>,
    /// The last cold starts, in seconds.
    pub cold_starts_s: VecDeque<f64>,
}

impl NodeSupply {
    /// Records a cold start.
    pub fn push_cold_start(&mut self, seconds: f64) {
        self.cold_starts_s.push_back(seconds);
        if self.cold_starts_s.len() > MAX_COLD_STARTS {
            self.cold_starts_s.pop_front();
        }
    }

    /// 90th percentile of the recorded cold starts, in seconds.
    pub fn cold_start_p90(&self) -> Option<f64> {
        let mut sorted: Vec<f64> = self.cold_starts_s.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() * 9 / 10).copied()
    }
}

/// A way to start and stop nodes.
pub trait NodeActuator: Send + 'static {
    /// Brings the number of nodes closer to `target`: revives draining nodes before it starts new ones, drains the emptiest
    /// nodes, removes those that have drained, replaces those that have died. Without a target (before the first decision,
    /// and after the pool was retired) it only updates what is known.
    fn step(&mut self, target: Option<usize>) -> impl Future<Output = ()> + Send;

    /// The nodes; `None` before they are known.
    fn supply(&mut self) -> Option<NodeSupply>;

    /// Removes all nodes. Called when nothing is in flight any more.
    fn stop(&mut self) -> impl Future<Output = ()> + Send;
}

/// The autoscaler's side of an actuator.
pub struct ActuatorHandle {
    target: watch::Sender<Option<usize>>,
    supply: Arc<Mutex<Option<NodeSupply>>>,
    coordinator: Arc<dyn Coordinator>,
    /// Whether the actuator itself knows how to do a dry run.
    runs_dry: bool,
}

/// The actuator's side of its handle.
pub(super) struct ActuatorLink {
    target: watch::Receiver<Option<usize>>,
    supply: Arc<Mutex<Option<NodeSupply>>>,
}

impl ActuatorHandle {
    /// Both sides. `supply` is what is known of the nodes at the beginning.
    pub(super) fn new(
        coordinator: Arc<dyn Coordinator>,
        supply: Option<NodeSupply>,
        runs_dry: bool,
    ) -> (Self, ActuatorLink) {
        let (sender, target) = watch::channel(None);
        let supply = Arc::new(Mutex::new(supply));
        let link = ActuatorLink { target, supply: Arc::clone(&supply) };
        (Self { target: sender, supply, coordinator, runs_dry }, link)
    }

    /// Sets the number of nodes; `None` where another gateway decides, or nothing is known yet.
    pub fn set_target(&self, nodes: Option<usize>) {
        self.target.send_if_modified(|target| std::mem::replace(target, nodes) != nodes);
    }

    /// The nodes as they were last seen; `None` before they were.
    pub fn supply(&self) -> Option<NodeSupply> {
        self.supply.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The gateways that share the pool's nodes.
    pub(crate) fn coordinator(&self) -> &dyn Coordinator {
        &*self.coordinator
    }

    /// Whether the actuator itself knows how to do a dry run: it gets the real target then.
    pub(crate) fn supports_dry_run(&self) -> bool {
        self.runs_dry
    }
}

/// Keeps the nodes at the target until the pool is retired. Then waits until nothing is in flight, and removes them.
pub(super) async fn run_actuator(
    mut actuator: impl NodeActuator,
    pool: Arc<ModelPool>,
    mut link: ActuatorLink,
) {
    let retired = pool.retirement_token();
    let mut ticks = tokio::time::interval(STEP_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = retired.cancelled() => break,
            _ = ticks.tick() => {}
            changed = link.target.changed() => {
                if changed.is_err() {
                    // The handle was dropped; the last target stays.
                    ticks.tick().await;
                }
            }
        }
        let target = *link.target.borrow_and_update();
        actuator.step(target).await;
        *link.supply.lock().unwrap_or_else(PoisonError::into_inner) = actuator.supply();
    }
    // The pool is retired: running requests finish, but nothing is scaled. Another actuator may own these nodes by now.
    while pool.load().active > 0 {
        ticks.tick().await;
        actuator.step(None).await;
    }
    actuator.stop().await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remembers_the_last_cold_starts() {
        let mut supply = NodeSupply::default();
        assert_eq!(supply.cold_start_p90(), None);
        (0..100).for_each(|seconds| supply.push_cold_start(f64::from(seconds)));
        assert_eq!((supply.cold_starts_s.len(), supply.cold_start_p90()), (20, Some(98.0)));
    }
}
