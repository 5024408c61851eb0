//! The actuator of a pool whose nodes are pods: follows the pods, and as the leader changes their number.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use potstill_shared::redact::Secret;

use super::lease::{LeaseCoordinator, PoolReport, PublishedScale};
use super::pod_node::{Drain, PodNode};
use super::pods::{PodState, PodWatch};
use super::reconcile::{PodView, ReconcileInput, ReconcileSteps, VictimOrder, least_published, reconcile};
use super::replica_history::ReplicaHistory;
use super::workload::{Workload, WorkloadScale};
use crate::autoscale::actuator::{NodeActuator, NodeSupply};
use crate::autoscale::context::AutoscaleContext;
use crate::autoscale::coordination::{Coordinator, PeerDemand};
use crate::config::{Actuator, KubernetesConfig, ScaleConfig};
use crate::pool::ModelPool;
use crate::pool::health::is_healthy;
use crate::pool::node::{NodeOrigin, NodeSpec, NodeState};

/// Timeout of the health check of a starting node.
const CHECK_TIMEOUT: Duration = Duration::from_millis(500);
/// Interval at which `/scale` is read, since somebody else may change it.
const RESYNC_INTERVAL: Duration = Duration::from_secs(5);
/// The same while KEDA has yet to apply a published count.
const FOLLOW_INTERVAL: Duration = Duration::from_secs(1);
/// Longest time after a new count was published in which KEDA still applies an older one. KEDA and the horizontal pod
/// autoscaler poll about every 15 s.
const KEDA_APPLY_TIME: Duration = Duration::from_secs(60);
/// The same for the controller of the workload.
const CONTROLLER_APPLY_TIME: Duration = Duration::from_secs(5);
/// A gateway that cannot write the Lease uses the pods after this time all the same. A leader that can write may then delete a
/// pod under it, but serving requests is worth more.
const LEASE_PATIENCE: Duration = Duration::from_secs(30);
/// Interval of reports to the other gateways.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);
/// Longest pause after failures in a row.
const MAX_PAUSE: Duration = Duration::from_secs(30);

/// What is there once the API server is reachable.
struct Connection {
    workload: Workload,
    pods: PodWatch,
    scale: WorkloadScale,
    scale_read_at: Instant,
}

/// Calls that failed in a row.
struct Backoff {
    failures: u32,
    pause_until: Instant,
    /// The last problem, so that each is logged once.
    problem: String,
}

/// Nodes as pods.
pub(crate) struct KubernetesActuator {
    pool: Arc<ModelPool>,
    context: Arc<AutoscaleContext>,
    cluster: Arc<LeaseCoordinator>,
    config: KubernetesConfig,
    /// Number of this actuator within the gateway.
    id: u64,
    begun: Instant,
    connection: Option<Connection>,
    pods: BTreeMap<String, PodNode>,
    /// When the pods were requested that do not exist yet.
    requested: Vec<Instant>,
    /// Counts published as the leader; `None` before the first.
    history: Option<ReplicaHistory>,
    cold_starts: NodeSupply,
    leads: bool,
    reported: Option<(Instant, BTreeMap<String, usize>)>,
    backoff: Backoff,
    watch_problem: String,
}

impl KubernetesActuator {
    /// An actuator that has not read anything yet.
    pub(crate) fn new(
        pool: Arc<ModelPool>,
        context: Arc<AutoscaleContext>,
        cluster: Arc<LeaseCoordinator>,
        config: KubernetesConfig,
    ) -> Self {
        Self {
            id: cluster.register_actuator(),
            begun: Instant::now(),
            pool,
            context,
            cluster,
            config,
            connection: None,
            pods: BTreeMap::new(),
            requested: Vec::new(),
            history: None,
            cold_starts: NodeSupply::default(),
            leads: false,
            reported: None,
            backoff: Backoff { failures: 0, pause_until: Instant::now(), problem: String::new() },
            watch_problem: String::new(),
        }
    }

    fn settings(&self) -> ScaleConfig {
        self.pool.config().scale.clone().unwrap_or_default()
    }

    fn is_scaled_by_keda(&self) -> bool {
        self.config.actuator == Actuator::Keda
    }

    fn count_event(&self, event: &str) {
        self.context.metrics.scale_events.with_label_values(&[&*self.pool.model, event]).inc();
    }

    /// Pauses after a failure: 0.5 s, 1 s, … up to 30 s. Nodes stay as they are.
    fn back_off(&mut self, problem: String) {
        self.count_event("kubernetes_failed");
        if self.backoff.problem != problem {
            tracing::warn!(
                model = &*self.pool.model,
                workload = self.config.workload(),
                problem,
                "the API server cannot be followed; nodes stay as they are"
            );
            self.backoff.problem = problem;
        }
        let pause = Duration::from_millis(500) * 2u32.saturating_pow(self.backoff.failures.min(6));
        self.backoff.failures += 1;
        self.backoff.pause_until = Instant::now() + pause.min(MAX_PAUSE);
    }

    async fn connect(&mut self) -> Result<Connection, String> {
        let (client, namespace) = self.cluster.client().await?;
        let namespace = self.config.namespace.clone().unwrap_or(namespace);
        let (workload, pods, scale) = Workload::connect(client, &namespace, &self.config).await?;
        Ok(Connection { workload, pods, scale, scale_read_at: Instant::now() })
    }

    /// Adds, updates and removes nodes as the watch reports pods.
    fn sync_pods(&mut self) {
        let Some(connection) = &mut self.connection else { return };
        match connection.pods.poll() {
            // The watch starts again by itself.
            Err(problem) if problem != self.watch_problem => {
                tracing::warn!(model = &*self.pool.model, problem, "the watch of pods is interrupted");
                self.watch_problem = problem;
            }
            Ok(true) => self.watch_problem.clear(),
            _ => {}
        }
        let Some(seen) = connection.pods.pods() else { return };
        let is_gone =
            |name: &String, pod_node: &PodNode| seen.get(name).is_none_or(|pod| pod.uid != pod_node.pod.uid);
        let gone: Vec<String> = self
            .pods
            .iter()
            .filter(|(name, pod_node)| is_gone(name, pod_node))
            .map(|(name, _)| name.clone())
            .collect();
        let gone: Vec<_> = gone.into_iter().filter_map(|name| self.pods.remove_entry(&name)).collect();
        let max_concurrency = self.pool.config().scale.as_ref().map(|scale| scale.max_concurrency);
        let mut added = 0;
        for (name, pod) in seen {
            let pod_node = self.pods.entry(name.clone()).or_insert_with(|| {
                added += 1;
                let now = Instant::now();
                let requested = (!self.requested.is_empty()).then(|| self.requested.remove(0));
                PodNode::new(pod, requested.unwrap_or(now))
            });
            pod_node.pod = pod.clone();
            // The leader decides about drains; all other gateways follow the annotations.
            if !self.leads {
                pod_node.apply_annotation();
            }
            // A pod with a new address is another node.
            if let Some(node) = pod_node.node.take_if(|_| pod.ip.is_some() && pod.ip != pod_node.ip) {
                self.pool.remove_node(node.id);
                pod_node.was_ready = false;
            }
            if pod_node.node.is_none()
                && let Some(ip) = &pod.ip
                && !pod.deleting
            {
                let host = if ip.contains(':') { format!("[{ip}]") } else { ip.clone() };
                let key = self.config.api_key_env.as_ref().and_then(|name| std::env::var(name).ok());
                let spec = NodeSpec {
                    state: NodeState::Starting,
                    origin: NodeOrigin::Scaler,
                    key: key.map(Secret::new),
                    ..NodeSpec::new(format!("http://{host}:{}", self.config.port), max_concurrency)
                };
                match self.pool.add_node(spec) {
                    Ok(node) => {
                        tracing::info!(model = &*self.pool.model, pod = name, node = node.name, "pod found");
                        (pod_node.node, pod_node.ip) = (Some(node), Some(ip.clone()));
                    }
                    Err(problem) => tracing::error!(pod = name, problem, "the pod cannot be a node"),
                }
            }
            apply_pod_state(&self.pool, pod_node);
        }
        (0..added).for_each(|_| self.count_event("started"));
        for (name, pod_node) in gone {
            let drained = pod_node.drain.is_some();
            self.count_event(if drained { "stopped" } else { "lost" });
            if !drained {
                tracing::warn!(model = &*self.pool.model, pod = name, "a pod was deleted without a drain");
            }
            if let Some(node) = pod_node.node {
                self.pool.remove_node(node.id);
            }
        }
    }

    /// Returns whether `pod` may receive requests: not while a count that excludes it may still be applied.
    fn admits(&self, pod: &PodState) -> bool {
        let (true, Some(connection)) = (self.is_scaled_by_keda(), &self.connection) else { return true };
        let own = self.history.as_ref().and_then(|history| history.min_pending_replicas(Instant::now()));
        let published = || self.published_scale().map(|scale| scale.min_pending_replicas);
        let Some(min_pending) = own.or_else(published) else { return false };
        match connection.workload.order {
            VictimOrder::DeletionCost => !self.is_settled() || self.kept() <= min_pending,
            VictimOrder::HighestIndex => pod.index < min_pending,
        }
    }

    /// The published scale of this workload.
    fn published_scale(&self) -> Option<PublishedScale> {
        let scale = self.cluster.published_scale(&self.pool.model);
        scale.filter(|scale| scale.workload == self.config.workload())
    }

    /// Checks pods that are ready in Kubernetes, and lets healthy ones receive requests.
    async fn check_starting(&mut self) {
        let path = self.pool.config().health.path.clone();
        let checks = self.pods.iter().filter_map(|(name, pod_node)| {
            let node = pod_node.node.as_ref()?;
            let is_due = match &pod_node.drain {
                Some(_) => !pod_node.was_ready,
                None => node.state() == NodeState::Starting && self.admits(&pod_node.pod),
            };
            (is_due && pod_node.pod.ready && !pod_node.pod.deleting).then(|| (name.clone(), Arc::clone(node)))
        });
        let healthy = join_all(checks.map(async |(name, node)| {
            is_healthy(&self.context.connector, &node, &path, CHECK_TIMEOUT).await.then_some(name)
        }));
        let healthy: Vec<String> = healthy.await.into_iter().flatten().collect();
        for name in healthy {
            let Some(pod_node) = self.pods.get_mut(&name) else { continue };
            if !pod_node.was_ready {
                let seconds = pod_node.since.elapsed().as_secs_f64();
                tracing::info!(model = &*self.pool.model, pod = name, seconds, "node is ready");
                pod_node.was_ready = true;
                if std::mem::take(&mut pod_node.seen_starting) {
                    self.cold_starts.push_cold_start(seconds);
                    self.context.metrics.cold_start.with_label_values(&[&*self.pool.model]).observe(seconds);
                }
            }
            if let (Some(node), None) = (&pod_node.node, &pod_node.drain) {
                self.pool.set_node_state(node, NodeState::Ready);
            }
        }
    }

    /// Reports demand and requests on draining pods to the other gateways, and as the leader publishes the scale for KEDA.
    fn report(&mut self) {
        let held = |pod_node: &PodNode| {
            let mark = &pod_node.drain.as_ref()?.mark;
            // Only a mark that is on the pod is known to every gateway.
            let known = pod_node.pod.mark.as_ref().is_some_and(|there| there.id == mark.id);
            known.then(|| (mark.id.clone(), pod_node.requests()))
        };
        let held: BTreeMap<_, _> = self.pods.values().filter_map(held).collect();
        let is_due = |(at, before): &(Instant, _)| at.elapsed() > REPORT_INTERVAL || *before != held;
        let model = &self.pool.model;
        if self.reported.as_ref().is_none_or(is_due) {
            let demand = self.pool.demand();
            let demand = PeerDemand {
                active: demand.active,
                queued: demand.queued,
                arrivals: demand.arrivals,
                departed_60: demand.departed_60,
            };
            self.cluster.report(model, self.id, PoolReport { demand, held: held.clone() });
            self.reported = Some((Instant::now(), held));
        }
        if let (true, Some(history)) = (self.is_scaled_by_keda(), &self.history)
            && let Some((replicas, min_pending_replicas)) =
                history.current().zip(history.min_pending_replicas(Instant::now()))
        {
            let workload = self.config.workload();
            self.cluster.publish(model, PublishedScale { workload, replicas, min_pending_replicas });
        }
    }

    /// Pods that are not being deleted, in order of their names.
    fn staying(&self) -> Vec<(&String, &PodNode)> {
        self.pods.iter().filter(|(_, pod_node)| !pod_node.pod.deleting).collect()
    }

    fn views(&self) -> Vec<PodView> {
        let drain_timeout = Duration::from_secs(self.settings().drain_timeout_s);
        let view = |pod_node: &PodNode| {
            let drain = pod_node.drain.as_ref();
            let marked = !pod_node.lost_mark();
            let evictable = marked && drain.is_some_and(|drain| drain.mark.evictable);
            let timed_out = drain.is_some_and(|drain| drain.since.elapsed() > drain_timeout);
            let is_drained = |drain: &Drain| {
                let written = drain.written.filter(|_| marked && pod_node.requests() == 0);
                let id = &drain.mark.id;
                written
                    .is_some_and(|at| self.cluster.is_drained_everywhere(&self.pool.model, self.id, id, at))
            };
            PodView {
                index: pod_node.pod.index,
                ready: pod_node.was_ready && pod_node.pod.ready,
                down: pod_node.was_ready && !pod_node.pod.ready,
                draining: drain.is_some(),
                empty: evictable || timed_out || drain.is_some_and(is_drained),
                is_deletion_candidate: evictable && pod_node.pod.lowest_cost,
                tokens: pod_node.node.as_ref().map_or(0, |node| node.outstanding_tokens()),
            }
        };
        self.staying().iter().map(|(_, pod_node)| view(pod_node)).collect()
    }

    /// Returns whether all pods have one template. False during a rollout.
    fn is_settled(&self) -> bool {
        let staying = self.staying();
        let mut templates = staying.iter().map(|(_, pod_node)| &pod_node.pod.template);
        let first = templates.next();
        templates.all(|template| Some(template) == first)
    }

    /// Number of pods that are not evictable.
    fn kept(&self) -> usize {
        let evictable = |pod_node: &PodNode| pod_node.pod.mark.as_ref().is_some_and(|mark| mark.evictable);
        self.staying().iter().filter(|(_, pod_node)| !evictable(pod_node)).count()
    }

    /// Reads `/scale` when that is due, and updates the history of published counts. `apply_time` is how long an older count
    /// may still be applied.
    async fn read_scale(&mut self, connection: &mut Connection, apply_time: Duration) -> Result<(), String> {
        let keda = self.is_scaled_by_keda();
        let was = connection.scale.replicas;
        let current = self.history.as_ref().and_then(ReplicaHistory::current);
        // What KEDA sets has to be known exactly as long as a count has yet to be applied.
        let pending = keda && (current != Some(was) || self.staying().len() != was);
        let interval = if pending { FOLLOW_INTERVAL } else { RESYNC_INTERVAL };
        if current.is_none() || connection.scale_read_at.elapsed() > interval {
            let scale = connection.workload.scale().await?;
            if scale.replicas != was && current.is_some() && !keda {
                tracing::warn!(
                    model = &*self.pool.model,
                    workload = self.config.workload(),
                    was,
                    is = scale.replicas,
                    "somebody else changed `replicas`; only one should"
                );
            }
            (connection.scale, connection.scale_read_at) = (scale, Instant::now());
        }
        let (now, replicas, pods) = (Instant::now(), connection.scale.replicas, self.staying().len());
        if self.history.is_none() {
            // KEDA may still apply a count that an earlier leader published. Pods that are ready were admitted because it may
            // not.
            let published = self.published_scale().filter(|_| keda);
            let ready = least_published(connection.workload.order, &self.views());
            let earlier = published.as_ref().map(|scale| (scale.min_pending_replicas.max(ready), apply_time));
            let current = published.map_or(replicas, |scale| scale.replicas);
            self.history = Some(ReplicaHistory::begin(current, replicas, earlier, now));
        }
        let Some(history) = &mut self.history else { return Ok(()) };
        if !keda {
            history.publish(replicas, now, apply_time);
        }
        history.observe(replicas, pods, now, CONTROLLER_APPLY_TIME);
        Ok(())
    }

    /// Takes one step towards `target` pods.
    async fn act(&mut self, connection: &mut Connection, target: usize) -> Result<(), String> {
        let keda = self.is_scaled_by_keda();
        let config = self.context.config();
        // A count may stay in the Lease for one round after the next was published.
        let round = Duration::from_secs(config.lease_duration_s);
        let apply_time = if keda { KEDA_APPLY_TIME + round } else { CONTROLLER_APPLY_TIME };
        self.read_scale(connection, apply_time).await?;
        let (now, replicas) = (Instant::now(), connection.scale.replicas);
        let dry_run = config.dry_run;
        if let Some(history) = self.history.as_mut().filter(|_| dry_run) {
            history.publish(replicas, now, apply_time);
        }
        let counts = self
            .history
            .as_ref()
            .and_then(|history| history.current().zip(history.min_pending_replicas(now)));
        let Some((published, min_pending_replicas)) = counts else { return Ok(()) };
        let order = connection.workload.order;
        let input = ReconcileInput { order, settled: self.is_settled(), published, min_pending_replicas };
        let mut steps = reconcile(input, &self.views(), target);
        let marked = if dry_run { Ok(()) } else { self.mark_pods(&connection.workload, &steps).await };
        if marked.is_err() {
            // A pod that cannot be marked is no reason to have fewer.
            steps.replicas = steps.replicas.max(published);
        }
        if !self.cluster.is_leader() {
            return marked;
        }
        if keda {
            if let Some(history) = self.history.as_mut().filter(|_| !dry_run) {
                history.publish(steps.replicas, Instant::now(), apply_time);
            }
            return marked;
        }
        if steps.replicas == replicas {
            return marked;
        }
        self.set_replicas(connection, steps.replicas, dry_run).await?;
        marked
    }

    /// Sets `replicas` of the workload, unless somebody else has changed it meanwhile.
    async fn set_replicas(
        &mut self,
        connection: &mut Connection,
        replicas: usize,
        dry_run: bool,
    ) -> Result<(), String> {
        let from = connection.scale.replicas;
        let now = connection.workload.scale().await?;
        let unchanged = now.replicas == from;
        (connection.scale, connection.scale_read_at) = (now, Instant::now());
        if !unchanged || !self.cluster.is_leader() {
            return Ok(());
        }
        let set = connection.workload.set_replicas(&connection.scale, replicas, dry_run).await?;
        tracing::info!(
            model = &*self.pool.model,
            workload = self.config.workload(),
            from,
            to = replicas,
            dry_run,
            "replicas set"
        );
        if dry_run {
            // A dry run logs each count once.
            self.backoff.pause_until = Instant::now() + RESYNC_INTERVAL;
        } else {
            connection.scale = set;
        }
        Ok(())
    }

    /// Drains and revives pods, and writes their marks. A pod receives requests again only after its mark was removed.
    async fn mark_pods(&mut self, workload: &Workload, steps: &ReconcileSteps) -> Result<(), String> {
        let names: Vec<String> = self.staying().iter().map(|(name, _)| (*name).clone()).collect();
        for &at in &steps.drain {
            let Some(pod_node) = self.pods.get_mut(&names[at]) else { continue };
            pod_node.drain();
            apply_pod_state(&self.pool, pod_node);
        }
        for (at, name) in names.iter().enumerate() {
            if !self.cluster.is_leader() {
                return Ok(());
            }
            let Some(pod_node) = self.pods.get_mut(name) else { continue };
            let lost_mark = pod_node.lost_mark();
            if lost_mark {
                pod_node.drain();
            }
            let mut mark = pod_node.drain.as_ref().map(|drain| drain.mark.clone());
            if steps.revive.contains(&at) {
                mark = None;
            } else if let Some(mark) =
                mark.as_mut().filter(|_| !lost_mark && steps.deletion_candidates.contains(&at))
            {
                mark.evictable = true;
            }
            if !pod_node.has_annotation(mark.as_ref()) {
                workload.write_mark(name, mark.as_ref()).await?;
                pod_node.record_written(mark.clone());
            }
            match (&mut pod_node.drain, mark) {
                (Some(drain), Some(mark)) => drain.mark = mark,
                (Some(_), None) => {
                    pod_node.drain = None;
                    apply_pod_state(&self.pool, pod_node);
                    self.count_event("revived");
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Sets the state of a node from that of its pod.
fn apply_pod_state(pool: &Arc<ModelPool>, pod_node: &PodNode) {
    let Some(node) = &pod_node.node else { return };
    let state = match (pod_node.is_unavailable(), node.state()) {
        (true, state) if state != NodeState::Draining => NodeState::Draining,
        (false, NodeState::Draining) if pod_node.was_ready && pod_node.pod.ready => NodeState::Ready,
        (false, NodeState::Draining) => NodeState::Starting,
        // Kubernetes sends it no traffic either; it is checked anew once it is ready again.
        (false, NodeState::Ready | NodeState::Unhealthy) if !pod_node.pod.ready => NodeState::Starting,
        _ => return,
    };
    pool.set_node_state(node, state);
}

impl NodeActuator for KubernetesActuator {
    async fn step(&mut self, target: Option<usize>) {
        if self.connection.is_none() {
            // The other gateways have to know of this actuator before it uses the pods. Else one of them might delete a pod
            // that it sends requests to.
            self.report();
            let known = self.cluster.is_published(self.id) || self.begun.elapsed() > LEASE_PATIENCE;
            if !known || Instant::now() < self.backoff.pause_until {
                return;
            }
            match self.connect().await {
                Ok(connection) => self.connection = Some(connection),
                Err(problem) => return self.back_off(problem),
            }
        }
        let leads = target.is_some() && self.cluster.is_leader();
        self.sync_pods();
        if !leads {
            self.history = None;
        }
        self.leads = leads;
        self.check_starting().await;
        self.report();
        let synced = self.connection.as_ref().is_some_and(|connection| connection.pods.pods().is_some());
        let (Some(target), true) = (target, leads && synced) else { return };
        if Instant::now() < self.backoff.pause_until {
            return;
        }
        let Some(mut connection) = self.connection.take() else { return };
        let outcome = self.act(&mut connection, target).await;
        self.connection = Some(connection);
        match outcome {
            Ok(()) => {
                self.backoff.failures = 0;
                self.backoff.problem.clear();
            }
            Err(problem) => self.back_off(problem),
        }
    }

    fn supply(&mut self) -> Option<NodeSupply> {
        let connection = self.connection.as_ref()?;
        connection.pods.pods()?;
        let cold_starts_s = self.cold_starts.cold_starts_s.clone();
        let mut supply = NodeSupply { cold_starts_s, ..NodeSupply::default() };
        for pod_node in self.pods.values() {
            match (pod_node.is_unavailable(), pod_node.was_ready) {
                (true, _) => supply.draining += 1,
                (false, true) => supply.ready += 1,
                (false, false) => supply.starting_age_s.push(pod_node.since.elapsed().as_secs_f64()),
            }
        }
        // Pods beyond the published count are not coming, even if KEDA has yet to lower `replicas`.
        let current = self.history.as_ref().and_then(ReplicaHistory::current);
        let published = current.or_else(|| self.published_scale().map(|scale| scale.replicas));
        let replicas = connection.scale.replicas;
        let coming = published.map_or(replicas, |published| published.min(replicas));
        self.requested.resize_with(coming.saturating_sub(self.staying().len()), Instant::now);
        supply.starting_age_s.extend(self.requested.iter().map(|at| at.elapsed().as_secs_f64()));
        Some(supply)
    }

    /// The pods stay: they belong to the cluster, and another gateway may use them.
    async fn stop(&mut self) {
        self.cluster.remove_actuator(&self.pool.model, self.id);
        for pod_node in self.pods.values() {
            if let Some(node) = &pod_node.node {
                self.pool.remove_node(node.id);
            }
        }
    }
}
