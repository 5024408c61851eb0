//! Nodes as pods of a Deployment, a StatefulSet or a LeaderWorkerSet.
//!
//! ```text
//! watch pods -> a node each, with requests once it is ready and well
//! wanted     -> steps (pure): revive, drain, mark, then patch /scale
//! ```
//!
//! No pod is taken away that holds a request: the pods that Kubernetes would take first are drained, on every gateway, and
//! only then is `replicas` lowered. Where KEDA changes `replicas`, the same number is told to it instead ([`super::keda`]).

mod cluster;
mod pods;
mod said;
mod steps;
mod workload;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use potstill_shared::redact::Redacted;

pub(crate) use self::cluster::{Cluster, PoolReport};
use self::pods::{PodSeen, Pods};
use self::said::Said;
use self::steps::{Order, PodView, Terms, least, steps};
use self::workload::{Scale, Workload};
use super::scaler::{Scaler, Supply};
use crate::config::{Actuator, KubernetesConfig, ScaleConfig};
use crate::gateway::Shared;
use crate::pool::ModelPool;
use crate::pool::health::check;
use crate::pool::node::{Node, NodeSpec, NodeState};

/// A starting node has so long to answer a check.
const CHECK: Duration = Duration::from_millis(500);
/// `/scale` is read again so often: somebody else may change it.
const RESYNC: Duration = Duration::from_secs(5);
/// As long as a number that KEDA was told is on its way, `/scale` is read so often.
const FOLLOW: Duration = Duration::from_secs(1);
/// KEDA and the autoscaler behind it act on no number after another was said for so long: they look every 15 s or so.
const KEDA_ACTS: Duration = Duration::from_secs(60);
/// The controller of a workload acts on no number after another was set for so long.
const CONTROLLER_ACTS: Duration = Duration::from_secs(5);
/// The other gateways hear so often what is asked of this one.
const REPORT: Duration = Duration::from_secs(1);
/// Longest pause after failures in a row.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// A pod as a node.
struct Member {
    pod: PodSeen,
    node: Option<Arc<Node>>,
    /// When it was asked for, or first seen.
    since: Instant,
    /// It was not ready when first seen, so its start can be timed.
    seen_starting: bool,
    was_ready: bool,
    draining: Option<Instant>,
}

/// Within reach of the API server.
struct Reach {
    workload: Workload,
    pods: Pods,
    scale: Scale,
    read_at: Instant,
}

/// Nodes as pods.
pub(crate) struct KubernetesScaler {
    pool: Arc<ModelPool>,
    shared: Arc<Shared>,
    config: KubernetesConfig,
    reach: Option<Reach>,
    members: BTreeMap<String, Member>,
    /// When the pods were asked for that do not exist yet.
    asked: Vec<Instant>,
    /// What was said as the leader; none before the first time.
    said: Option<Said>,
    cold: Supply,
    led: bool,
    reported: Option<(Instant, PoolReport)>,
    failures: u32,
    pause_until: Instant,
    problem: String,
    watch_problem: String,
}

impl KubernetesScaler {
    /// A scaler that has not looked yet.
    pub(crate) fn new(pool: Arc<ModelPool>, shared: Arc<Shared>, config: KubernetesConfig) -> Self {
        Self {
            pool,
            shared,
            config,
            reach: None,
            members: BTreeMap::new(),
            asked: Vec::new(),
            said: None,
            cold: Supply::default(),
            led: false,
            reported: None,
            failures: 0,
            pause_until: Instant::now(),
            problem: String::new(),
            watch_problem: String::new(),
        }
    }

    fn settings(&self) -> ScaleConfig {
        self.pool.config().scale.clone().unwrap_or_default()
    }

    fn event(&self, event: &str) {
        self.shared.metrics.scale_events.with_label_values(&[&*self.pool.model, event]).inc();
    }

    fn workload(&self) -> String {
        format!("{} {}", self.config.kind.name(), self.config.name)
    }

    /// Waits longer after each failure: 0.5 s, 1 s, … up to half a minute. Nodes stay as they are.
    fn failed(&mut self, problem: String) {
        self.event("kubernetes_failed");
        if self.problem != problem {
            tracing::warn!(
                model = &*self.pool.model,
                workload = self.workload(),
                problem,
                "the API server cannot be followed; nodes stay as they are"
            );
            self.problem = problem;
        }
        let pause = Duration::from_millis(500) * 2u32.saturating_pow(self.failures.min(6));
        self.failures += 1;
        self.pause_until = Instant::now() + pause.min(LONGEST_PAUSE);
    }

    async fn connect(&mut self) -> Result<Reach, String> {
        let (client, namespace) = self.shared.cluster.client().await?;
        let namespace = self.config.namespace.clone().unwrap_or(namespace);
        let (workload, pods, scale) = Workload::reach(client, &namespace, &self.config).await?;
        Ok(Reach { workload, pods, scale, read_at: Instant::now() })
    }

    /// Makes the nodes what the pods are.
    fn follow_pods(&mut self) {
        let Some(reach) = &mut self.reach else { return };
        match reach.pods.read() {
            // The watch comes back by itself.
            Err(problem) if problem != self.watch_problem => {
                tracing::warn!(model = &*self.pool.model, problem, "news of pods are missing");
                self.watch_problem = problem;
            }
            Ok(true) => self.watch_problem.clear(),
            _ => {}
        }
        let Some(seen) = reach.pods.seen() else { return };
        let gone: Vec<String> = self
            .members
            .iter()
            .filter(|(name, member)| seen.get(*name).is_none_or(|pod| pod.uid != member.pod.uid))
            .map(|(name, _)| name.clone())
            .collect();
        let gone: Vec<_> = gone.into_iter().filter_map(|name| self.members.remove_entry(&name)).collect();
        let leads = self.led;
        let slots = self.pool.config().scale.as_ref().map(|scale| scale.slots);
        let mut fresh = 0;
        for (name, pod) in seen {
            let member = self.members.entry(name.clone()).or_insert_with(|| {
                fresh += 1;
                Member {
                    pod: pod.clone(),
                    node: None,
                    since: if self.asked.is_empty() { Instant::now() } else { self.asked.remove(0) },
                    seen_starting: !pod.ready,
                    was_ready: false,
                    draining: pod.drains.then(Instant::now),
                }
            });
            member.pod = pod.clone();
            // The leader's own word counts; the others do what the pod says.
            if !leads && pod.drains != member.draining.is_some() {
                member.draining = pod.drains.then(Instant::now);
            }
            if member.node.is_none()
                && let Some(ip) = &pod.ip
                && !pod.leaving
            {
                let host = if ip.contains(':') { format!("[{ip}]") } else { ip.clone() };
                let key = self.config.api_key_env.as_ref().and_then(|name| std::env::var(name).ok());
                let spec = NodeSpec {
                    state: NodeState::Unhealthy,
                    key: key.map(Redacted::new),
                    ..NodeSpec::new(format!("http://{host}:{}", self.config.port), slots)
                };
                match self.pool.add_node(spec) {
                    Ok(node) => {
                        tracing::info!(model = &*self.pool.model, pod = name, node = node.name, "pod found");
                        member.node = Some(node);
                    }
                    Err(problem) => tracing::error!(pod = name, problem, "pod left out"),
                }
            }
            let Some(node) = &member.node else { continue };
            let wanted = match (pod.leaving || member.draining.is_some(), node.state()) {
                (true, state) if state != NodeState::Draining => NodeState::Draining,
                (false, NodeState::Draining) if member.was_ready => NodeState::Ready,
                (false, NodeState::Draining) => NodeState::Unhealthy,
                _ => continue,
            };
            self.pool.set_state(node, wanted);
        }
        (0..fresh).for_each(|_| self.event("started"));
        for (name, member) in gone {
            let drained = member.draining.is_some();
            self.event(if drained { "stopped" } else { "lost" });
            if !drained {
                tracing::warn!(model = &*self.pool.model, pod = name, "pod is gone, and nobody drained it");
            }
            if let Some(node) = member.node {
                self.pool.remove_node(node.id);
            }
        }
    }

    /// Whether `pod` may begin to work: not while a number without it may be acted on, by the word of the leader.
    fn admits(&self, pod: &PodSeen) -> bool {
        let (Actuator::Keda, Some(reach)) = (self.config.actuator, &self.reach) else { return true };
        let own = self.said.as_ref().and_then(|said| said.floor(Instant::now()));
        let Some(floor) = own.or_else(|| self.shared.cluster.floor(&self.pool.model)) else { return true };
        match reach.workload.order {
            Order::Marked => !self.settled() || self.kept() <= floor,
            Order::HighestIndex => pod.index < floor,
        }
    }

    async fn look_after_starting(&mut self) {
        let path = self.pool.config().health.path.clone();
        let starting = |member: &&Member| !member.was_ready && member.pod.ready && !member.pod.leaving;
        let up = self.members.iter().filter(|(_, member)| starting(member));
        let up: Vec<String> = up
            .filter(|(_, member)| member.draining.is_some() || self.admits(&member.pod))
            .map(|(name, _)| name.clone())
            .collect();
        for name in up {
            let Some(member) = self.members.get_mut(&name) else { continue };
            let Some(node) = &member.node else { continue };
            if node.state() == NodeState::Ready || check(&self.shared.connector, node, &path, CHECK).await {
                let seconds = member.since.elapsed().as_secs_f64();
                tracing::info!(model = &*self.pool.model, pod = name, seconds, "node is ready");
                member.was_ready = true;
                if member.seen_starting {
                    self.cold.started(seconds);
                    self.shared.metrics.cold_start.with_label_values(&[&*self.pool.model]).observe(seconds);
                }
                if member.draining.is_none() {
                    self.pool.set_state(node, NodeState::Ready);
                }
            }
        }
    }

    /// Tells the other gateways what is asked of this one and what it holds on pods that drain; as the leader also what it says.
    fn report(&mut self) {
        let held: BTreeMap<String, usize> = self
            .members
            .iter()
            .filter(|(_, member)| member.draining.is_some() && member.pod.drains)
            .map(|(name, member)| (name.clone(), requests(member)))
            .collect();
        let said = self.said.as_ref().filter(|_| self.config.actuator == Actuator::Keda);
        let news = PoolReport {
            held,
            replicas: said.and_then(Said::last),
            floor: said.and_then(|said| said.floor(Instant::now())),
            ..PoolReport::default()
        };
        let due = |(at, before): &(Instant, PoolReport)| at.elapsed() > REPORT || *before != news;
        if self.reported.as_ref().is_none_or(due) {
            let demand = self.pool.demand();
            self.shared.cluster.report(
                &self.pool.model,
                PoolReport {
                    active: demand.active,
                    queued: demand.queued,
                    arrivals: demand.arrivals,
                    departed_60: demand.departed_60,
                    ..news.clone()
                },
            );
            self.reported = Some((Instant::now(), news));
        }
    }

    /// Pods that are not on their way out, in order.
    fn staying(&self) -> Vec<(&String, &Member)> {
        self.members.iter().filter(|(_, member)| !member.pod.leaving).collect()
    }

    fn views(&self) -> Vec<PodView> {
        let longest = Duration::from_secs(self.settings().drain_s);
        self.staying()
            .iter()
            .map(|(name, member)| {
                let over = member.draining.is_some_and(|since| since.elapsed() > longest);
                let free = requests(member) == 0
                    && member.pod.drains
                    && self.shared.cluster.others_left(&self.pool.model, name);
                PodView {
                    index: member.pod.index,
                    ready: member.was_ready && member.pod.ready,
                    draining: member.draining.is_some(),
                    empty: member.draining.is_some() && (over || free),
                    victim: member.pod.victim,
                    tokens: member.node.as_ref().map_or(0, |node| node.tokens()),
                }
            })
            .collect()
    }

    /// False in the middle of a rollout.
    fn settled(&self) -> bool {
        let staying = self.staying();
        let mut templates = staying.iter().map(|(_, member)| &member.pod.template);
        let first = templates.next();
        templates.all(|template| Some(template) == first)
    }

    /// Pods that were not given up.
    fn kept(&self) -> usize {
        self.staying().iter().filter(|(_, member)| !(member.pod.drains && member.pod.victim)).count()
    }

    /// Reads `/scale` when it is due, and takes in what it says.
    async fn look(&mut self, reach: &mut Reach, acts: Duration) -> Result<(), String> {
        let keda = self.config.actuator == Actuator::Keda;
        let was = reach.scale.replicas;
        let last = self.said.as_ref().and_then(Said::last);
        // What KEDA sets has to be known as it is, as long as it is on its way.
        let on_its_way = keda && (last != Some(was) || self.staying().len() != was);
        if last.is_none() || reach.read_at.elapsed() > if on_its_way { FOLLOW } else { RESYNC } {
            let scale = reach.workload.scale().await?;
            if scale.replicas != was && last.is_some() && !keda {
                tracing::warn!(
                    model = &*self.pool.model,
                    workload = self.workload(),
                    was,
                    is = scale.replicas,
                    "somebody else changed `replicas`; only one should"
                );
            }
            (reach.scale, reach.read_at) = (scale, Instant::now());
        }
        let (now, replicas, pods) = (Instant::now(), reach.scale.replicas, self.staying().len());
        // A leader does not know what the one before it has said to KEDA.
        let earlier = keda.then(|| (least(reach.workload.order, &self.views()), acts));
        let said = self.said.get_or_insert_with(|| Said::begin(replicas, earlier, now));
        if !keda {
            said.say(replicas, now, acts);
        }
        said.see(replicas, pods, now, CONTROLLER_ACTS);
        Ok(())
    }

    /// One step towards `wanted`.
    async fn act(&mut self, reach: &mut Reach, wanted: usize) -> Result<(), String> {
        let keda = self.config.actuator == Actuator::Keda;
        let acts = if keda { KEDA_ACTS } else { CONTROLLER_ACTS };
        self.look(reach, acts).await?;
        let (now, replicas) = (Instant::now(), reach.scale.replicas);
        let dry_run = self.shared.live().config.autoscale.dry_run;
        if dry_run {
            self.said = Some(Said::begin(replicas, None, now));
        }
        let Some((said, floor)) = self.said.as_ref().and_then(|said| said.last().zip(said.floor(now))) else {
            return Ok(());
        };
        let terms = Terms { order: reach.workload.order, settled: self.settled(), said, floor };
        let steps = steps(terms, &self.views(), wanted);
        if !dry_run {
            let names: Vec<String> = self.staying().iter().map(|(name, _)| (*name).clone()).collect();
            self.turn(names_of(&names, &steps.drain), true);
            let revived: Vec<_> = names_of(&names, &steps.revive).collect();
            self.mark(&reach.workload, &revived).await?;
            self.turn(revived.into_iter(), false);
            if reach.workload.order == Order::Marked {
                for pod in names_of(&names, &steps.victims) {
                    if self.members.get(pod).is_some_and(|member| !member.pod.victim) {
                        reach.workload.offer(pod).await?;
                    }
                }
            }
        }
        if keda {
            if let Some(said) = self.said.as_mut().filter(|_| !dry_run) {
                said.say(steps.replicas, Instant::now(), acts);
            }
            return Ok(());
        }
        if steps.replicas == replicas {
            return Ok(());
        }
        // What was planned for must still hold; a change in between is found by its version.
        let now = reach.workload.scale().await?;
        let same = now.replicas == replicas;
        (reach.scale, reach.read_at) = (now, Instant::now());
        if same && self.shared.cluster.leads() {
            let set = reach.workload.set(&reach.scale, steps.replicas, dry_run).await?;
            tracing::info!(
                model = &*self.pool.model,
                workload = self.workload(),
                from = replicas,
                to = steps.replicas,
                dry_run,
                "replicas set"
            );
            if dry_run {
                // Said once for each number.
                self.pause_until = Instant::now() + RESYNC;
            } else {
                reach.scale = set;
            }
        }
        Ok(())
    }

    /// Gives pods no more requests, or some again.
    fn turn<'a>(&mut self, pods: impl Iterator<Item = &'a String>, drains: bool) {
        for name in pods {
            let Some(member) = self.members.get_mut(name) else { continue };
            member.draining = drains.then(Instant::now);
            let state = match (drains, member.was_ready) {
                (true, _) => NodeState::Draining,
                (false, true) => NodeState::Ready,
                (false, false) => NodeState::Unhealthy,
            };
            if let Some(node) = &member.node {
                self.pool.set_state(node, state);
            }
            if !drains {
                self.event("revived");
            }
        }
    }

    /// Writes on the pods what this leader has decided of them; those that are `revived` work only after.
    async fn mark(&mut self, workload: &Workload, revived: &[&String]) -> Result<(), String> {
        for (name, member) in self.members.iter_mut().filter(|(_, member)| !member.pod.leaving) {
            let drains = member.draining.is_some() && !revived.contains(&name);
            if member.pod.drains != drains {
                workload.mark(name, drains).await?;
            }
        }
        Ok(())
    }
}

fn names_of<'a>(names: &'a [String], positions: &'a [usize]) -> impl Iterator<Item = &'a String> {
    positions.iter().map(|at| &names[*at])
}

fn requests(member: &Member) -> usize {
    member.node.as_ref().map_or(0, |node| node.requests())
}

impl Scaler for KubernetesScaler {
    async fn step(&mut self, wanted: Option<usize>) {
        if self.reach.is_none() {
            if Instant::now() < self.pause_until {
                return;
            }
            match self.connect().await {
                Ok(reach) => self.reach = Some(reach),
                Err(problem) => return self.failed(problem),
            }
        }
        let leads = self.shared.cluster.leads();
        self.follow_pods();
        if !leads {
            self.said = None;
        }
        self.led = leads;
        self.look_after_starting().await;
        self.report();
        let synced = self.reach.as_ref().is_some_and(|reach| reach.pods.seen().is_some());
        let (Some(wanted), true) = (wanted, leads && synced) else { return };
        if Instant::now() < self.pause_until {
            return;
        }
        let Some(mut reach) = self.reach.take() else { return };
        let outcome = self.act(&mut reach, wanted).await;
        self.reach = Some(reach);
        match outcome {
            Ok(()) => {
                self.failures = 0;
                self.problem.clear();
            }
            Err(problem) => self.failed(problem),
        }
    }

    fn supply(&mut self) -> Option<Supply> {
        let reach = self.reach.as_ref()?;
        reach.pods.seen()?;
        let mut supply = Supply { cold_starts_s: self.cold.cold_starts_s.clone(), ..Supply::default() };
        for member in self.members.values() {
            match (member.pod.leaving || member.draining.is_some(), member.was_ready) {
                (true, _) => supply.draining += 1,
                (false, true) => supply.ready += 1,
                (false, false) => supply.starting_age_s.push(member.since.elapsed().as_secs_f64()),
            }
        }
        let coming = reach.scale.replicas.saturating_sub(self.staying().len());
        self.asked.resize_with(coming, Instant::now);
        supply.starting_age_s.extend(self.asked.iter().map(|asked| asked.elapsed().as_secs_f64()));
        Some(supply)
    }

    /// The pods stay: they are the cluster's, and another gateway may lead them on.
    async fn stop(&mut self) {
        self.shared.cluster.forget(&self.pool.model);
        for member in self.members.values() {
            if let Some(node) = &member.node {
                self.pool.remove_node(node.id);
            }
        }
    }
}
