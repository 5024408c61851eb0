//! The hand that makes the number of nodes what is wanted. Each pool has one, in a task of its own: a slow one holds up
//! nobody else.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use super::kubernetes::{Cluster, KubernetesScaler};
use super::process::ProcessScaler;
use super::webhook::WebhookScaler;
use crate::gateway::Shared;
use crate::pool::ModelPool;

/// How often nodes are looked after.
const TICK: Duration = Duration::from_millis(100);
/// Cold starts that are remembered.
const COLD_STARTS: usize = 20;

/// The nodes of a pool, as its scaler knows them.
#[derive(Debug, Clone, Default)]
pub struct Supply {
    /// They take requests.
    pub ready: usize,
    /// They finish what they hold.
    pub draining: usize,
    /// Seconds since nodes were asked for that are not ready yet.
    pub starting_age_s: Vec<f64>,
    /// The last cold starts, in seconds.
    pub cold_starts_s: VecDeque<f64>,
}

impl Supply {
    /// Remembers a cold start.
    pub fn started(&mut self, seconds: f64) {
        self.cold_starts_s.push_back(seconds);
        if self.cold_starts_s.len() > COLD_STARTS {
            self.cold_starts_s.pop_front();
        }
    }

    /// 90th percentile of the cold starts.
    pub fn cold_start_p90(&self) -> Option<f64> {
        let mut sorted: Vec<f64> = self.cold_starts_s.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() * 9 / 10).copied()
    }
}

/// A way to start and stop nodes.
pub trait Scaler: Send + 'static {
    /// Brings the number of nodes nearer to `wanted`: takes back what drains before it starts anew, drains the emptiest,
    /// removes what has drained, replaces what has died. Before anything was decided, and after the pool was retired, there is
    /// nothing `wanted`, and only what is there is found out.
    fn step(&mut self, wanted: Option<usize>) -> impl Future<Output = ()> + Send;

    /// The nodes as they are; none before that is known.
    fn supply(&mut self) -> Option<Supply>;

    /// Takes all nodes away; nothing is in flight any more.
    fn stop(&mut self) -> impl Future<Output = ()> + Send;
}

/// What the autoscaler holds of a scaler.
pub struct ScalerHandle {
    wanted: watch::Sender<Option<usize>>,
    supply: Arc<Mutex<Option<Supply>>>,
    /// Where several gateways share the pool's nodes.
    cluster: Option<Arc<Cluster>>,
}

impl ScalerHandle {
    /// Says how many nodes there should be; none where another gateway decides, or nothing is known yet.
    pub fn want(&self, nodes: Option<usize>) {
        self.wanted.send_if_modified(|wanted| std::mem::replace(wanted, nodes) != nodes);
    }

    /// The nodes as they were last seen; none before they were.
    pub fn supply(&self) -> Option<Supply> {
        self.supply.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The gateways that share the pool's nodes, if they are shared.
    pub(crate) fn cluster(&self) -> Option<&Cluster> {
        self.cluster.as_deref()
    }
}

/// Starts the scaler that the pool's configuration names, if it names one.
pub(crate) fn start(pool: &Arc<ModelPool>, shared: &Arc<Shared>) -> Option<ScalerHandle> {
    let scale = pool.config().scale.clone()?;
    let (wanted, asked) = watch::channel(None);
    // Pods may be there already; processes and a webhook's nodes are not.
    let supply = Arc::new(Mutex::new(scale.kubernetes.is_none().then(Supply::default)));
    let cluster = scale.kubernetes.is_some().then(|| Arc::clone(&shared.cluster));
    let handle = ScalerHandle { wanted, supply: Arc::clone(&supply), cluster };
    let (pool, connector) = (Arc::clone(pool), shared.connector.clone());
    if let Some(process) = scale.process {
        let scaler = ProcessScaler::new(Arc::clone(&pool), connector, Arc::clone(&shared.metrics), process);
        shared.tasks.spawn(drive(scaler, pool, asked, supply));
    } else if let Some(webhook) = scale.webhook {
        match WebhookScaler::new(Arc::clone(&pool), connector, Arc::clone(&shared.metrics), &webhook) {
            Ok(scaler) => drop(shared.tasks.spawn(drive(scaler, pool, asked, supply))),
            Err(problem) => tracing::error!(model = &*pool.model, problem, "the pool is not scaled"),
        }
    } else if let Some(kubernetes) = scale.kubernetes {
        shared.cluster.take_part(shared);
        let scaler = KubernetesScaler::new(Arc::clone(&pool), Arc::clone(shared), kubernetes);
        shared.tasks.spawn(drive(scaler, pool, asked, supply));
    }
    Some(handle)
}

/// Keeps the nodes at what is wanted until the pool is retired; then, once they hold nothing any more, takes them away.
async fn drive(
    mut scaler: impl Scaler,
    pool: Arc<ModelPool>,
    mut wanted: watch::Receiver<Option<usize>>,
    supply: Arc<Mutex<Option<Supply>>>,
) {
    let end = pool.retired();
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = end.cancelled() => break,
            _ = ticks.tick() => {}
            changed = wanted.changed() => {
                if changed.is_err() {
                    // The autoscaler has let go; the last word stays.
                    ticks.tick().await;
                }
            }
        }
        let wanted = *wanted.borrow_and_update();
        scaler.step(wanted).await;
        *supply.lock().unwrap_or_else(PoisonError::into_inner) = scaler.supply();
    }
    // Nobody new comes, but what was begun is finished. The nodes may be another scaler's by now: nothing is wanted of them.
    while pool.load().active > 0 {
        ticks.tick().await;
        scaler.step(None).await;
    }
    scaler.stop().await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_cold_starts_count() {
        let mut supply = Supply::default();
        assert_eq!(supply.cold_start_p90(), None);
        (0..100).for_each(|seconds| supply.started(f64::from(seconds)));
        assert_eq!((supply.cold_starts_s.len(), supply.cold_start_p90()), (20, Some(98.0)));
    }
}
