//! The control loop: observes all scaled pools, lets the policy decide, and hands each actuator its target.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;

use super::context::AutoscaleContext;
use super::observe::observe;
use super::plans::RunPlan;
use super::scaled_pool::ScaledPool;
use super::start::ActuatorStarter;
use crate::scaling_policy::{Decision, Forecast, Observation, PolicyState, decide};
use crate::time::ms;

/// Shortest time between two decisions.
const MIN_INTERVAL: Duration = Duration::from_millis(50);

/// Scaling of one pool, as the admin API shows it.
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

/// The last decision, as the admin API shows it.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct ScalingStatus {
    pub(crate) budget: Option<f64>,
    /// Cost per hour of the nodes that are held now.
    pub(crate) cost_now: f64,
    pub(crate) dry_run: bool,
    pub(crate) pools: Vec<PoolStatus>,
    pub(crate) forecasts: Vec<Forecast>,
}

/// The autoscaler of a gateway.
pub(crate) struct Autoscaler {
    context: Arc<AutoscaleContext>,
    starter: ActuatorStarter,
    scaled: Mutex<BTreeMap<String, ScaledPool>>,
    status: Mutex<ScalingStatus>,
}

impl Autoscaler {
    pub(crate) fn new(context: Arc<AutoscaleContext>) -> Arc<Self> {
        Arc::new(Self {
            starter: ActuatorStarter::new(Arc::clone(&context)),
            context,
            scaled: Mutex::default(),
            status: Mutex::default(),
        })
    }

    pub(crate) fn context(&self) -> &AutoscaleContext {
        &self.context
    }

    fn scaled_pools(&self) -> MutexGuard<'_, BTreeMap<String, ScaledPool>> {
        self.scaled.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The last decision.
    pub(crate) fn status(&self) -> ScalingStatus {
        self.status.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn observe(&self) -> Observation {
        let budget = self.context.config().budget;
        observe(self.context.now(), budget, &self.scaled_pools(), &mut self.context.plans())
    }

    /// Registers the plan of a run. Returns the forecasts of its stages.
    pub(crate) fn register_plan(&self, plan: RunPlan) -> Result<Vec<Forecast>, String> {
        let context = &self.context;
        let stages: Vec<_> =
            plan.stages.iter().map(|stage| (stage.model.clone(), stage.plan.stage.clone())).collect();
        if let Some((model, _)) = stages.iter().find(|(model, _)| context.pools.get(model).is_none()) {
            return Err(format!("no pool serves `{model}`"));
        }
        let finished = |model: &str, stage: &str| context.pools.finished_completions(model, stage);
        context.plans().register(plan, context.now(), finished)?;
        context.wake();
        let mut forecasts = Forecast::all_stages(&self.observe());
        forecasts.retain(|forecast| stages.contains(&(forecast.model.clone(), forecast.stage.clone())));
        Ok(forecasts)
    }

    /// Removes the plan of a run. Returns false if it has none.
    pub(crate) fn remove_plan(&self, run: &str) -> bool {
        let removed = self.context.plans().remove(run);
        self.context.wake();
        removed
    }

    /// Serves KEDA's external scaler on `listener` until the gateway stops.
    #[cfg(feature = "kubernetes")]
    pub(crate) async fn serve_keda(
        &self,
        listener: tokio::net::TcpListener,
        limits: impl Fn() -> Arc<crate::config::Limits> + Clone + Send + Sync + 'static,
    ) {
        let cluster = Arc::clone(&self.starter.cluster);
        super::kubernetes::keda::serve(Arc::clone(&self.context), cluster, limits, listener).await;
    }

    /// Decides until the gateway has shut down.
    pub(crate) async fn run(self: Arc<Self>) {
        let mut state = PolicyState::default();
        let mut last = self.context.now();
        loop {
            let interval = ms(self.context.config().interval_ms.max(10));
            self.sync_pools();
            let observation = self.observe();
            let decision = decide(&observation, &mut state);
            let elapsed_s = observation.t - last;
            last = observation.t;
            self.apply(&observation, &decision, elapsed_s);
            if self.context.is_shut_down() {
                return;
            }
            tokio::select! {
                () = self.context.shutdown_complete() => return,
                () = tokio::time::sleep(interval) => {}
                () = self.context.wait_for_wake() => tokio::time::sleep(MIN_INTERVAL).await,
                () = self.capacity_needed() => tokio::time::sleep(MIN_INTERVAL).await,
            }
        }
    }

    /// Completes when a request finds no node in one of the scaled pools.
    async fn capacity_needed(&self) {
        let pools: Vec<_> = self.scaled_pools().values().map(|scaled| Arc::clone(&scaled.pool)).collect();
        if pools.is_empty() {
            return std::future::pending().await;
        }
        let waits = pools.iter().map(|pool| Box::pin(pool.capacity_needed()));
        futures_util::future::select_all(waits).await;
    }

    /// Starts an actuator for every pool that is scaled and has none. Actuators of removed pools end by themselves.
    fn sync_pools(&self) {
        let pools = self.context.pools.pools();
        let mut scaled = self.scaled_pools();
        scaled.retain(|model, known| {
            pools
                .get(model)
                .is_some_and(|pool| Arc::ptr_eq(pool, &known.pool) && pool.config().scale.is_some())
        });
        for (model, pool) in pools.iter() {
            if !scaled.contains_key(model)
                && let Some(actuator) = self.starter.start(pool)
            {
                let pool = Arc::clone(pool);
                scaled.insert(model.clone(), ScaledPool { pool, actuator, last_target: 0, cost: 0.0 });
            }
        }
    }

    /// Hands the actuators their targets and publishes the decision. `elapsed_s` is the time since the last decision.
    fn apply(&self, observation: &Observation, decision: &Decision, elapsed_s: f64) {
        let config = self.context.config();
        let mut scaled = self.scaled_pools();
        let mut status =
            ScalingStatus { budget: config.budget, dry_run: config.dry_run, ..ScalingStatus::default() };
        for pool in &observation.pools {
            let Some(entry) = scaled.get_mut(&pool.model) else { continue };
            let desired = decision.desired.get(&pool.model).copied().unwrap_or_else(|| pool.nodes());
            let reason = decision.reason.get(&pool.model).cloned().unwrap_or_default();
            entry.last_target = if config.dry_run { pool.min } else { desired };
            let target = if entry.actuator.supports_dry_run() { desired } else { entry.last_target };
            entry.actuator.set_target(Some(target));
            if desired != pool.nodes() {
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
            let cost_per_hour = (pool.nodes() + pool.draining) as f64 * pool.cost_per_node_s;
            let cost = cost_per_hour * elapsed_s / 3600.0;
            entry.cost += cost;
            self.context.metrics.node_cost.with_label_values(&[&pool.model]).inc_by(cost.max(0.0));
            status.cost_now += cost_per_hour;
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
        for (model, entry) in scaled.iter_mut() {
            if !observation.pools.iter().any(|pool| pool.model == *model) {
                status.pools.extend(undecided(model, entry));
            }
        }
        status.forecasts = Forecast::all_stages(observation);
        self.export(&status);
        *self.status.lock().unwrap_or_else(PoisonError::into_inner) = status;
    }

    /// Sets the metrics of a decision.
    fn export(&self, status: &ScalingStatus) {
        let metrics = &self.context.metrics;
        metrics.desired_nodes.reset();
        metrics.starting_nodes.reset();
        metrics.stage_eta.reset();
        for pool in &status.pools {
            let model = [pool.model.as_str()];
            metrics.desired_nodes.with_label_values(&model).set(pool.desired as i64);
            metrics.starting_nodes.with_label_values(&model).set(pool.starting as i64);
        }
        for forecast in &status.forecasts {
            let labels = [forecast.stage.as_str(), forecast.model.as_str()];
            metrics.stage_eta.with_label_values(&labels).set(forecast.done_in_s);
        }
        metrics.node_cost_per_hour.set(status.cost_now);
    }
}

/// A pool that another gateway of the cluster decides on, or whose nodes are not known yet.
fn undecided(model: &str, entry: &mut ScaledPool) -> Option<PoolStatus> {
    // A target from an earlier term as the leader is no longer valid.
    entry.last_target = 0;
    entry.actuator.set_target(None);
    let coordinator = entry.actuator.coordinator();
    let supply = entry.actuator.supply();
    let reason = match (coordinator.is_leader(), coordinator.leader_name()) {
        (false, leader) if leader.is_empty() => "no gateway leads yet".to_owned(),
        (false, leader) => format!("`{leader}` decides"),
        (true, _) if supply.is_none() => "its nodes are not known yet".to_owned(),
        (true, _) => return None,
    };
    let supply = supply.unwrap_or_default();
    Some(PoolStatus {
        model: model.to_owned(),
        desired: supply.ready + supply.starting_age_s.len(),
        ready: supply.ready,
        starting: supply.starting_age_s.len(),
        draining: supply.draining,
        reason,
        cold_start_s: supply.cold_start_p90(),
        cost_so_far: entry.cost,
    })
}
