//! Coordination of the gateways of a cluster through one Lease. Its holder is the leader: it alone decides and changes
//! workloads. Every gateway reports in an annotation of the Lease the demand on its pools, its requests on draining pods, and
//! the plans that were registered with it. So the leader decides on the demand of all gateways, and deletes no pod on which
//! another gateway has a request. The scale that the leader publishes for KEDA is an annotation of its own, which outlives it.
//!
//! ```text
//! gateway.potstill.dev/NAME      report of that gateway             Report
//! potstill.dev/published-scale   scale that KEDA applies, by model  {model: PublishedScale}
//! ```
//!
//! Clocks of other machines are not trusted. As in client-go, a holder is gone when the Lease has not changed for its duration,
//! measured by the local clock.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client, Config};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::{Notify, OnceCell};

use super::api_server::{CALL_TIMEOUT, call, describe, has_status};
use crate::autoscale::context::AutoscaleContext;
use crate::autoscale::coordination::{Coordinator, PeerDemand};
use crate::autoscale::plans::SharedPlan;
use crate::config::{Actuator, PoolConfig};

/// Attempts to write the Lease when other gateways change it at the same time.
const WRITE_ATTEMPTS: usize = 4;
/// Annotation with the published scale.
const PUBLISHED_SCALE: &str = "potstill.dev/published-scale";
/// The same in Potstill 0.1, read while a rolling update replaces the leader.
const PUBLISHED_SCALE_0_1: &str = "potstill.dev/said";
/// Prefix of the annotation with a gateway's report.
const REPORT_PREFIX: &str = "gateway.potstill.dev/";
/// Longest name of an annotation after its prefix.
const MAX_NAME_BYTES: usize = 63;

/// Report of one gateway about one pool.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct PoolReport {
    /// Demand on this gateway alone.
    #[serde(flatten)]
    pub(super) demand: PeerDemand,
    /// Its requests on each draining pod, by the id of the drain.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) held: BTreeMap<String, usize>,
}

impl PoolReport {
    /// Sum of the reports of two actuators of one gateway about one model. After a reload the old actuator may still have
    /// requests.
    fn plus(&self, other: &Self) -> Self {
        let both = |(drain, held): (&String, &usize)| Some((drain.clone(), held + other.held.get(drain)?));
        Self { demand: self.demand + other.demand, held: self.held.iter().filter_map(both).collect() }
    }
}

/// Scale of one model that KEDA applies.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct PublishedScale {
    /// Workload of the model.
    pub(crate) workload: String,
    /// Number of pods.
    pub(crate) replicas: usize,
    /// Lowest count that KEDA may still apply. No more pods than this may receive requests.
    #[serde(rename = "floor")]
    pub(crate) min_pending_replicas: usize,
}

/// Report of one gateway.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Report {
    /// Counter, so that every report of a live gateway differs from the one before.
    n: u64,
    pools: BTreeMap<String, PoolReport>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    plans: Vec<SharedPlan>,
}

/// Reads the published scales from the Lease.
fn read_published(lease: &Lease) -> BTreeMap<String, PublishedScale> {
    let annotations = lease.metadata.annotations.as_ref();
    let text = annotations.and_then(|all| all.get(PUBLISHED_SCALE).or_else(|| all.get(PUBLISHED_SCALE_0_1)));
    text.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default()
}

/// What this gateway knows about the Lease.
#[derive(Default)]
struct LeaseState {
    holder: String,
    /// Holder, time of renewal and number of transitions when they last changed, and when that was.
    renewal: Option<(String, Instant)>,
    /// Reports of the other gateways, and since when each is unchanged.
    peers: BTreeMap<String, (Report, Instant)>,
    own: Report,
    /// Reports of the actuators of this gateway, by model and actuator; `own` holds the sums.
    actuators: BTreeMap<String, BTreeMap<u64, PoolReport>>,
    /// Actuators whose reports are being written.
    writing: BTreeSet<u64>,
    /// Actuators whose reports are in the Lease.
    published: BTreeSet<u64>,
    /// Scales to publish as the leader.
    to_publish: BTreeMap<String, PublishedScale>,
    /// Scales in the Lease.
    scales: BTreeMap<String, PublishedScale>,
    /// When the last successful read of the Lease began.
    read_at: Option<Instant>,
    /// Until when this gateway is the leader, unless it renews the Lease.
    leads_until: Option<Instant>,
}

/// How far this gateway is on its way out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ShutdownPhase {
    No,
    /// It drains: it does not lead, and still reports its requests.
    Draining,
    /// It ends: it removes its report.
    Ending,
}

/// The gateways of this cluster.
pub(crate) struct LeaseCoordinator {
    /// Name of this gateway.
    name: String,
    client: OnceCell<(Client, String)>,
    state: Mutex<LeaseState>,
    running: AtomicBool,
    next_actuator: AtomicU64,
    /// Notified when there is something to report before the next round.
    soon: Notify,
}

impl Default for LeaseCoordinator {
    fn default() -> Self {
        // In a cluster the name of the pod, from the downward API.
        let name =
            std::env::var("POD_NAME").unwrap_or_else(|_| potstill_shared::id::unique_id("potstill-gateway"));
        let name = &name[name.len().saturating_sub(MAX_NAME_BYTES)..];
        Self {
            name: name.trim_matches(['-', '.']).to_owned(),
            client: OnceCell::new(),
            state: Mutex::default(),
            running: AtomicBool::new(false),
            next_actuator: AtomicU64::new(0),
            soon: Notify::new(),
        }
    }
}

impl Coordinator for LeaseCoordinator {
    fn is_leader(&self) -> bool {
        self.state().leads_until.is_some_and(|until| Instant::now() < until)
    }

    fn leader_name(&self) -> String {
        self.state().holder.clone()
    }

    fn peer_demand(&self, model: &str) -> Vec<PeerDemand> {
        let state = self.state();
        state.peers.values().filter_map(|(report, _)| Some(report.pools.get(model)?.demand)).collect()
    }
}

impl LeaseCoordinator {
    /// The innermost lock of the autoscaler: [`observe`](crate::autoscale::observe::observe) takes it while it holds those of
    /// pools and plans, so none of them may be taken under this one.
    fn state(&self) -> MutexGuard<'_, LeaseState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A client of the API server, and its namespace: from `KUBECONFIG` or `~/.kube/config`, else from the service account of
    /// the pod.
    pub(super) async fn client(&self) -> Result<(Client, String), String> {
        let connect = async || {
            let mut config = Config::infer().await.map_err(|error| {
                format!("there is neither a kubeconfig nor the service account of a pod: {error}")
            })?;
            config.connect_timeout = Some(CALL_TIMEOUT);
            let namespace = config.default_namespace.clone();
            let client = Client::try_from(config).map_err(|error| error.to_string())?;
            Ok::<_, String>((client, namespace))
        };
        self.client.get_or_try_init(connect).await.cloned()
    }

    /// Registers an actuator. Returns its id.
    pub(super) fn register_actuator(&self) -> u64 {
        self.next_actuator.fetch_add(1, Ordering::Relaxed)
    }

    /// Returns whether the report of an actuator is in the Lease. From then on a leader waits for this gateway before it
    /// deletes a pod.
    pub(super) fn is_published(&self, actuator: u64) -> bool {
        self.state().published.contains(&actuator)
    }

    /// Returns whether all other gateways and actuators know of the drain, which was on the pod at `since`, and have no
    /// requests on the pod.
    pub(super) fn is_drained_everywhere(
        &self,
        model: &str,
        actuator: u64,
        drain: &str,
        since: Instant,
    ) -> bool {
        let state = self.state();
        let drained = |pool: &PoolReport| pool.held.get(drain) == Some(&0);
        // A gateway whose report is not in the Lease yet looks at the pods only afterwards, and finds the drain then.
        state.read_at.is_some_and(|read| read > since)
            && state.peers.values().all(|(report, _)| report.pools.get(model).is_none_or(drained))
            && state
                .actuators
                .get(model)
                .is_none_or(|all| all.iter().all(|(id, pool)| *id == actuator || drained(pool)))
    }

    /// The published scale of `model`, as far as this gateway knows: up to one round of the Lease old.
    pub(crate) fn published_scale(&self, model: &str) -> Option<PublishedScale> {
        self.state().scales.get(model).cloned()
    }

    /// Reads the published scale of `model` from the Lease. A client that asks one gateway after the other so never sees a
    /// scale older than the last.
    pub(crate) async fn read_published_scale(
        &self,
        lease: &str,
        model: &str,
    ) -> Result<Option<PublishedScale>, String> {
        let (client, namespace) = self.client().await?;
        let leases: Api<Lease> = Api::namespaced(client, &namespace);
        let found = call(leases.get_opt(lease)).await.map_err(|error| describe(&error))?;
        Ok(found.and_then(|found| read_published(&found).remove(model)))
    }

    /// Publishes a scale as the leader, before the next round if it has changed.
    pub(super) fn publish(&self, model: &str, scale: PublishedScale) {
        let before = self.state().to_publish.insert(model.to_owned(), scale.clone());
        if before != Some(scale) {
            self.soon.notify_one();
        }
    }

    /// Takes the report of an actuator. A change in which drains have requests is written before the next round.
    pub(super) fn report(&self, model: &str, actuator: u64, report: PoolReport) {
        let mut state = self.state();
        let reports = state.actuators.entry(model.to_owned()).or_default();
        let first = reports.insert(actuator, report).is_none();
        let sum = reports.values().cloned().reduce(|sum, other| sum.plus(&other)).unwrap_or_default();
        let drained = |report: &PoolReport| -> Vec<_> {
            report.held.iter().map(|(drain, held)| (drain.clone(), *held == 0)).collect()
        };
        let now = drained(&sum);
        let before = state.own.pools.insert(model.to_owned(), sum);
        if first || before.is_none_or(|before| drained(&before) != now) {
            self.soon.notify_one();
        }
    }

    /// Removes the report of an actuator that has ended.
    pub(super) fn remove_actuator(&self, model: &str, actuator: u64) {
        let mut state = self.state();
        let Some(reports) = state.actuators.get_mut(model) else { return };
        reports.remove(&actuator);
        match reports.values().cloned().reduce(|sum, other| sum.plus(&other)) {
            Some(sum) => drop(state.own.pools.insert(model.to_owned(), sum)),
            None => {
                state.actuators.remove(model);
                state.own.pools.remove(model);
            }
        }
    }

    /// Joins the cluster, if this gateway has not joined yet, until the gateway ends; then releases the Lease.
    pub(crate) fn join(self: &Arc<Self>, context: &Arc<AutoscaleContext>) {
        if !self.running.swap(true, Ordering::Relaxed) {
            context.tasks.spawn(Arc::clone(self).run(Arc::clone(context)));
        }
    }

    async fn run(self: Arc<Self>, context: Arc<AutoscaleContext>) {
        let mut last_problem = None;
        loop {
            let config = context.config();
            let duration = Duration::from_secs(config.lease_duration_s.max(1));
            let ending = context.is_shut_down();
            let leaving = match (ending, context.draining.is_set()) {
                (true, _) => ShutdownPhase::Ending,
                (false, true) => ShutdownPhase::Draining,
                (false, false) => ShutdownPhase::No,
            };
            let problem = self.round(&context, &config.lease_name, duration, leaving).await.err();
            if ending {
                return;
            }
            // The same problem is logged once.
            if problem != last_problem
                && let Some(problem) = &problem
            {
                tracing::warn!(
                    lease = config.lease_name,
                    problem,
                    "the gateways of this cluster cannot agree"
                );
            }
            last_problem = problem;
            let pause = duration / 5;
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.soon.notified() => tokio::time::sleep(pause.min(Duration::from_millis(200))).await,
                () = context.shutdown_complete() => {}
            }
        }
    }

    /// Reads the Lease and writes this gateway's part of it.
    async fn round(
        &self,
        context: &AutoscaleContext,
        lease: &str,
        duration: Duration,
        leaving: ShutdownPhase,
    ) -> Result<(), String> {
        let (client, namespace) = self.client().await?;
        let leases: Api<Lease> = Api::namespaced(client, &namespace);
        let mut last = String::new();
        for _ in 0..WRITE_ATTEMPTS {
            let begun = Instant::now();
            let found = match call(leases.get_opt(lease)).await {
                Ok(Some(found)) => found,
                Ok(None) if leaving == ShutdownPhase::Ending => return Ok(()),
                Ok(None) => {
                    let new = json!({"metadata": {"name": lease}, "spec": {}});
                    let new: Lease = serde_json::from_value(new).map_err(|error| error.to_string())?;
                    match call(leases.create(&PostParams::default(), &new)).await {
                        Ok(created) => created,
                        // Another gateway has created it.
                        Err(error) if has_status(&error, 409) => continue,
                        Err(error) => return Err(describe(&error)),
                    }
                }
                Err(error) => return Err(describe(&error)),
            };
            let plans = context.plans().export(context.now());
            // A scale is published as long as KEDA scales the pool.
            let by_keda =
                |model: &str| context.pools.get(model).is_some_and(|pool| is_scaled_by_keda(&pool.config()));
            let patch = self.build_patch(&found, plans, duration, leaving, by_keda);
            match call(leases.patch(lease, &PatchParams::default(), &Patch::Merge(&patch))).await {
                Ok(written) => {
                    self.take_over(context, &written, begun, duration);
                    return Ok(());
                }
                Err(error) if has_status(&error, 409) => last = describe(&error),
                Err(error) => return Err(describe(&error)),
            }
        }
        Err(format!("others kept changing the Lease: {last}"))
    }

    /// Builds the patch of the Lease that was `found`: this gateway's report, and as the leader the published scales.
    fn build_patch(
        &self,
        found: &Lease,
        plans: Vec<SharedPlan>,
        duration: Duration,
        leaving: ShutdownPhase,
        by_keda: impl Fn(&str) -> bool,
    ) -> Value {
        let spec = found.spec.clone().unwrap_or_default();
        let mut state = self.state();
        let holder = spec.holder_identity.clone().unwrap_or_default();
        let stamp = format!("{holder} {:?} {:?}", spec.renew_time, spec.lease_transitions);
        if state.renewal.as_ref().is_none_or(|(known, _)| *known != stamp) {
            state.renewal = Some((stamp, Instant::now()));
        }
        let unchanged = state.renewal.as_ref().map_or(Duration::ZERO, |(_, since)| since.elapsed());
        let holder_duration = Duration::from_secs(spec.lease_duration_seconds.unwrap_or(0).max(1) as u64);
        let leads = holder == self.name;
        let takes =
            leaving == ShutdownPhase::No && (holder.is_empty() || (!leads && unchanged > holder_duration));
        let gone = state.read_peers(found, &self.name, duration);
        state.own.n += 1;
        state.own.plans = plans;
        state.writing = state.actuators.values().flat_map(BTreeMap::keys).copied().collect();
        let mut annotations = serde_json::Map::new();
        let own =
            if leaving == ShutdownPhase::Ending { Value::Null } else { json!(json!(state.own).to_string()) };
        annotations.insert(format!("{REPORT_PREFIX}{}", self.name), own);
        let mut scales = read_published(found);
        state.to_publish.retain(|model, _| by_keda(model));
        if leads {
            scales.extend(state.to_publish.clone());
            scales.retain(|model, _| by_keda(model));
        } else {
            // Scales from an earlier term as the leader are not published again.
            state.to_publish.clear();
        }
        if leads && scales != read_published(found) {
            annotations.insert(PUBLISHED_SCALE.to_owned(), json!(json!(scales).to_string()));
        }
        if leads || takes {
            annotations.extend(gone.iter().map(|name| (format!("{REPORT_PREFIX}{name}"), Value::Null)));
        }
        if leaving != ShutdownPhase::No {
            state.leads_until = None;
        }
        json!({
            "metadata": {"resourceVersion": found.metadata.resource_version, "annotations": annotations},
            "spec": self.spec_patch(&spec, duration, leaving, leads, takes),
        })
    }

    /// Releases the Lease, renews it, takes it over, or leaves it.
    fn spec_patch(
        &self,
        spec: &LeaseSpec,
        duration: Duration,
        leaving: ShutdownPhase,
        leads: bool,
        takes: bool,
    ) -> Value {
        let now = MicroTime(Timestamp::now());
        match (leaving != ShutdownPhase::No, leads, takes) {
            (true, true, _) => json!({"holderIdentity": ""}),
            (false, true, _) => json!({"renewTime": now, "leaseDurationSeconds": duration.as_secs()}),
            (_, _, true) => json!({
                "holderIdentity": self.name, "acquireTime": now, "renewTime": now,
                "leaseDurationSeconds": duration.as_secs(),
                "leaseTransitions": spec.lease_transitions.unwrap_or(0) + 1,
            }),
            _ => json!({}),
        }
    }

    /// Takes over the Lease as it was written. `begun` is when it was read.
    fn take_over(&self, context: &AutoscaleContext, written: &Lease, begun: Instant, duration: Duration) {
        let holder = written.spec.as_ref().and_then(|spec| spec.holder_identity.clone()).unwrap_or_default();
        let (plans, changed) = {
            let mut state = self.state();
            state.published = std::mem::take(&mut state.writing);
            state.scales = read_published(written);
            state.read_at = Some(begun);
            // Ends before the Lease does, so that no two gateways lead at once.
            state.leads_until = (holder == self.name).then(|| begun + duration * 2 / 3);
            let plans: Vec<_> = state
                .peers
                .iter()
                .map(|(name, (report, since))| {
                    (name.clone(), report.plans.clone(), since.elapsed().as_secs_f64())
                })
                .collect();
            (plans, std::mem::replace(&mut state.holder, holder.clone()) != holder)
        };
        if changed {
            tracing::info!(leader = holder, gateway = self.name, "the leader of the gateways changed");
        }
        context.metrics.leader.set(i64::from(holder == self.name));
        let finished = |model: &str, stage: &str| context.pools.finished_completions(model, stage);
        context.plans().import(context.now(), &plans, finished);
        if changed {
            context.wake();
        }
    }
}

impl LeaseState {
    /// Reads the reports of the other gateways. Returns the names of those that are gone: their report has not changed for two
    /// durations.
    fn read_peers(&mut self, found: &Lease, own_name: &str, duration: Duration) -> Vec<String> {
        // After a gap of its own, this gateway cannot tell how long a report has been unchanged.
        let blind = self.read_at.is_none_or(|at| at.elapsed() > duration);
        let mut peers = BTreeMap::new();
        for (key, text) in found.metadata.annotations.iter().flatten() {
            let Some(name) = key.strip_prefix(REPORT_PREFIX).filter(|name| *name != own_name) else {
                continue;
            };
            let report: Report = serde_json::from_str(text).unwrap_or_default();
            let since = match self.peers.get(name) {
                Some((before, since)) if *before == report && !blind => *since,
                _ => Instant::now(),
            };
            peers.insert(name.to_owned(), (report, since));
        }
        let is_gone = |since: &Instant| since.elapsed() > duration * 2;
        let gone =
            peers.iter().filter(|(_, (_, since))| is_gone(since)).map(|(name, _)| name.clone()).collect();
        peers.retain(|_, (_, since)| !is_gone(since));
        self.peers = peers;
        gone
    }
}

/// Returns whether KEDA sets the number of this pool's pods.
fn is_scaled_by_keda(config: &PoolConfig) -> bool {
    let kubernetes = config.scale.as_ref().and_then(|scale| scale.kubernetes.as_ref());
    kubernetes.is_some_and(|kubernetes| kubernetes.actuator == Actuator::Keda)
}
