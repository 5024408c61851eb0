//! The right number of nodes for every pool: what is asked of them ([`observe`]), what runs announce ([`plans`]), how many
//! nodes that makes ([`policy`], pure), and the hands that start and stop them ([`scaler`]).
//!
//! ```text
//! every interval, or when a request finds no node:
//!   pools + plans -> Observation -> decide -> wanted nodes, within the budget -> one scaler per pool
//! ```

#[cfg(feature = "kubernetes")]
pub mod keda;
#[cfg_attr(not(feature = "kubernetes"), path = "autoscale/without_kubernetes.rs")]
pub(crate) mod kubernetes;
pub mod observe;
pub mod plans;
pub mod policy;
pub mod process;
pub mod scaler;
pub mod stdio;
pub mod webhook;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;
use tokio::sync::Notify;
use tokio::time::Instant;

use self::observe::observe;
use self::plans::Plans;
use self::policy::{Decision, Forecast, Memory, Observation, decide};
use self::scaler::ScalerHandle;
use crate::config::ms;
use crate::gateway::Shared;
use crate::pool::ModelPool;

/// A request that finds no node, or a new plan, is looked at no sooner after the last decision.
const SOONEST: Duration = Duration::from_millis(50);

/// A pool that is scaled.
pub(crate) struct Scaled {
    pub(crate) pool: Arc<ModelPool>,
    pub(crate) handle: ScalerHandle,
    /// Nodes that it was last told to have.
    pub(crate) told: usize,
    /// Node-hours times cost so far.
    cost: f64,
}

/// What the admin API shows of a pool's scaling.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct PoolStatus {
    pub(crate) model: String,
    pub(crate) desired: usize,
    pub(crate) ready: usize,
    pub(crate) starting: usize,
    pub(crate) draining: usize,
    pub(crate) reason: String,
    pub(crate) cold_start_s: Option<f64>,
    pub(crate) cost_so_far: f64,
}

/// What the last decision was.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Status {
    pub(crate) budget: Option<f64>,
    /// Cost per hour of the nodes that are held now.
    pub(crate) cost_now: f64,
    pub(crate) dry_run: bool,
    pub(crate) pools: Vec<PoolStatus>,
    pub(crate) forecasts: Vec<Forecast>,
}

/// The autoscaler of a gateway.
pub(crate) struct Autoscaler {
    epoch: Instant,
    plans: Mutex<Plans>,
    scaled: Mutex<BTreeMap<String, Scaled>>,
    status: Mutex<Status>,
    wake: Notify,
}

impl Default for Autoscaler {
    fn default() -> Self {
        Self {
            epoch: Instant::now(),
            plans: Mutex::default(),
            scaled: Mutex::default(),
            status: Mutex::default(),
            wake: Notify::new(),
        }
    }
}

impl Autoscaler {
    /// Seconds on the autoscaler's clock.
    pub(crate) fn now(&self) -> f64 {
        self.epoch.elapsed().as_secs_f64()
    }

    /// What runs have announced.
    pub(crate) fn plans(&self) -> MutexGuard<'_, Plans> {
        self.plans.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn scaled(&self) -> MutexGuard<'_, BTreeMap<String, Scaled>> {
        self.scaled.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for a decision soon.
    pub(crate) fn wake(&self) {
        self.wake.notify_one();
    }

    /// The last decision.
    pub(crate) fn status(&self) -> Status {
        self.status.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What the policy would be told now.
    pub(crate) fn observation(&self, budget: Option<f64>) -> Observation {
        let now = self.now();
        observe(now, budget, &self.scaled(), &mut self.plans())
    }
}

/// Decides until the gateway ends.
pub(crate) async fn run(shared: Arc<Shared>) {
    let autoscaler = &shared.autoscaler;
    let mut memory = Memory::default();
    let mut last = autoscaler.now();
    loop {
        let config = shared.live().config.autoscale.clone();
        follow_pools(&shared);
        let seen = autoscaler.observation(config.budget);
        let decision = decide(&seen, &mut memory);
        let held = seen.t - last;
        last = seen.t;
        apply(&shared, &seen, &decision, held);
        if shared.ended() {
            return;
        }
        tokio::select! {
            () = shared.until_end() => return,
            () = tokio::time::sleep(ms(config.interval_ms.max(10))) => {}
            () = autoscaler.wake.notified() => tokio::time::sleep(SOONEST).await,
            () = some_node_wanted(&shared) => tokio::time::sleep(SOONEST).await,
        }
    }
}

/// Ends when a request finds no node in one of the scaled pools.
async fn some_node_wanted(shared: &Shared) {
    let pools: Vec<_> = shared.autoscaler.scaled().values().map(|scaled| Arc::clone(&scaled.pool)).collect();
    if pools.is_empty() {
        return std::future::pending().await;
    }
    let waits = pools.iter().map(|pool| Box::pin(pool.node_wanted()));
    futures_util::future::select_all(waits).await;
}

/// Gives every pool that is to be scaled its scaler; those of pools that are gone end by themselves.
fn follow_pools(shared: &Arc<Shared>) {
    let pools = shared.pools.load();
    let mut scaled = shared.autoscaler.scaled();
    scaled.retain(|model, known| {
        pools.get(model).is_some_and(|pool| Arc::ptr_eq(pool, &known.pool) && pool.config().scale.is_some())
    });
    for (model, pool) in pools.iter() {
        if !scaled.contains_key(model)
            && let Some(handle) = scaler::start(pool, shared)
        {
            let pool = Arc::clone(pool);
            scaled.insert(model.clone(), Scaled { pool, handle, told: 0, cost: 0.0 });
        }
    }
}

/// Tells the scalers what is wanted.
fn apply(shared: &Shared, seen: &Observation, decision: &Decision, held_s: f64) {
    let config = shared.live().config.autoscale.clone();
    let mut scaled = shared.autoscaler.scaled();
    let mut status = Status { budget: config.budget, dry_run: config.dry_run, ..Status::default() };
    for pool in &seen.pools {
        let Some(entry) = scaled.get_mut(&pool.model) else { continue };
        let desired = decision.desired.get(&pool.model).copied().unwrap_or_else(|| pool.have());
        let reason = decision.reason.get(&pool.model).cloned().unwrap_or_default();
        entry.told = if config.dry_run { pool.min } else { desired };
        // A scaler of a cluster tries what it would do; the others stay at the least.
        let tries = entry.handle.cluster().is_some();
        entry.handle.want(Some(if tries { desired } else { entry.told }));
        if desired != pool.have() {
            tracing::info!(
                model = pool.model,
                ready = pool.ready,
                starting = pool.starting_age_s.len(),
                draining = pool.draining,
                desired,
                reason,
                dry_run = config.dry_run,
                "scaling"
            );
        }
        let cost = (pool.have() + pool.draining) as f64 * pool.cost_per_node_s;
        entry.cost += cost * held_s / 3600.0;
        status.cost_now += cost;
        status.pools.push(PoolStatus {
            model: pool.model.clone(),
            desired,
            ready: pool.ready,
            starting: pool.starting_age_s.len(),
            draining: pool.draining,
            reason,
            cold_start_s: pool.cold_start_s_p90,
            cost_so_far: entry.cost,
        });
    }
    // Pools that another gateway of the cluster decides on, or of which nothing is known yet.
    for (model, entry) in scaled.iter_mut() {
        if seen.pools.iter().any(|pool| pool.model == *model) {
            continue;
        }
        // What was wanted when it was decided here last is no longer true.
        entry.told = 0;
        entry.handle.want(None);
        let supply = entry.handle.supply();
        let known = supply.is_some();
        let supply = supply.unwrap_or_default();
        let reason = match entry.handle.cluster() {
            Some(cluster) if !cluster.leads() && cluster.leader().is_empty() => {
                "no gateway leads yet".to_owned()
            }
            Some(cluster) if !cluster.leads() => format!("`{}` decides", cluster.leader()),
            _ if !known => "its nodes are not known yet".to_owned(),
            _ => continue,
        };
        status.pools.push(PoolStatus {
            model: model.clone(),
            desired: supply.ready + supply.starting_age_s.len(),
            ready: supply.ready,
            starting: supply.starting_age_s.len(),
            draining: supply.draining,
            reason,
            cold_start_s: supply.cold_start_p90(),
            cost_so_far: entry.cost,
        });
    }
    status.forecasts = Forecast::of(seen);
    shared.metrics.scaling(&status);
    *shared.autoscaler.status.lock().unwrap_or_else(PoisonError::into_inner) = status;
}
