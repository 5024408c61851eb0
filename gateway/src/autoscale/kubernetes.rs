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
mod member;
mod pods;
mod said;
mod steps;
mod workload;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use potstill_shared::redact::Redacted;

pub(crate) use self::cluster::{Cluster, PoolReport, Word};
use self::member::{Drain, Member};
use self::pods::{PodSeen, Pods};
use self::said::Said;
use self::steps::{Order, PodView, Steps, Terms, least, steps};
use self::workload::{Scale, Workload};
use super::scaler::{Scaler, Supply};
use crate::config::{Actuator, KubernetesConfig, ScaleConfig};
use crate::gateway::Shared;
use crate::pool::ModelPool;
use crate::pool::health::check;
use crate::pool::node::{NodeSpec, NodeState};

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
/// A gateway that cannot write into the Lease looks at the pods after so long all the same: to be of use counts for more than that
/// a leader that can may take a pod from it.
const PATIENCE: Duration = Duration::from_secs(30);
/// The other gateways hear so often what is asked of this one.
const REPORT: Duration = Duration::from_secs(1);
/// Longest pause after failures in a row.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

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
    /// Among the scalers of this gateway.
    part: u64,
    begun: Instant,
    reach: Option<Reach>,
    members: BTreeMap<String, Member>,
    /// When the pods were asked for that do not exist yet.
    asked: Vec<Instant>,
    /// What was said as the leader; none before the first time.
    said: Option<Said>,
    cold: Supply,
    leads: bool,
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
            part: shared.cluster.part(),
            begun: Instant::now(),
            pool,
            shared,
            config,
            reach: None,
            members: BTreeMap::new(),
            asked: Vec::new(),
            said: None,
            cold: Supply::default(),
            leads: false,
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

    /// Waits longer after each failure: 0.5 s, 1 s, … up to half a minute. Nodes stay as they are.
    fn failed(&mut self, problem: String) {
        self.event("kubernetes_failed");
        if self.problem != problem {
            tracing::warn!(
                model = &*self.pool.model,
                workload = self.config.workload(),
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
        let gone =
            |name: &String, member: &Member| seen.get(name).is_none_or(|pod| pod.uid != member.pod.uid);
        let gone: Vec<String> = self
            .members
            .iter()
            .filter(|(name, member)| gone(name, member))
            .map(|(name, _)| name.clone())
            .collect();
        let gone: Vec<_> = gone.into_iter().filter_map(|name| self.members.remove_entry(&name)).collect();
        let slots = self.pool.config().scale.as_ref().map(|scale| scale.slots);
        let mut fresh = 0;
        for (name, pod) in seen {
            let member = self.members.entry(name.clone()).or_insert_with(|| {
                fresh += 1;
                let now = Instant::now();
                let asked = (!self.asked.is_empty()).then(|| self.asked.remove(0));
                Member::new(pod, asked.unwrap_or(now))
            });
            member.pod = pod.clone();
            // The leader's own word counts; the others do what the pod says.
            if !self.leads {
                member.obey();
            }
            // A pod whose network was made anew is another node.
            if let Some(node) = member.node.take_if(|_| pod.ip.is_some() && pod.ip != member.ip) {
                self.pool.remove_node(node.id);
                member.was_ready = false;
            }
            if member.node.is_none()
                && let Some(ip) = &pod.ip
                && !pod.leaving
            {
                let host = if ip.contains(':') { format!("[{ip}]") } else { ip.clone() };
                let key = self.config.api_key_env.as_ref().and_then(|name| std::env::var(name).ok());
                let spec = NodeSpec {
                    state: NodeState::Starting,
                    key: key.map(Redacted::new),
                    ..NodeSpec::new(format!("http://{host}:{}", self.config.port), slots)
                };
                match self.pool.add_node(spec) {
                    Ok(node) => {
                        tracing::info!(model = &*self.pool.model, pod = name, node = node.name, "pod found");
                        (member.node, member.ip) = (Some(node), Some(ip.clone()));
                    }
                    Err(problem) => tracing::error!(pod = name, problem, "pod left out"),
                }
            }
            settle(&self.pool, member);
        }
        (0..fresh).for_each(|_| self.event("started"));
        for (name, member) in gone {
            let drained = member.drain.is_some();
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
        let Some(floor) = own.or_else(|| self.word().map(|word| word.floor)) else { return false };
        match reach.workload.order {
            Order::Marked => !self.settled() || self.kept() <= floor,
            Order::HighestIndex => pod.index < floor,
        }
    }

    /// What was said last of this workload to KEDA.
    fn word(&self) -> Option<Word> {
        self.shared.cluster.word(&self.pool.model).filter(|word| word.workload == self.config.workload())
    }

    /// Lets pods in that are ready, by Kubernetes and by their own answer.
    async fn look_after_starting(&mut self) {
        let path = self.pool.config().health.path.clone();
        let checks = self.members.iter().filter_map(|(name, member)| {
            let node = member.node.as_ref()?;
            let fit = match &member.drain {
                Some(_) => !member.was_ready,
                None => node.state() == NodeState::Starting && self.admits(&member.pod),
            };
            (fit && member.pod.ready && !member.pod.leaving).then(|| (name.clone(), Arc::clone(node)))
        });
        let well = join_all(checks.map(async |(name, node)| {
            check(&self.shared.connector, &node, &path, CHECK).await.then_some(name)
        }));
        let well: Vec<String> = well.await.into_iter().flatten().collect();
        for name in well {
            let Some(member) = self.members.get_mut(&name) else { continue };
            if !member.was_ready {
                let seconds = member.since.elapsed().as_secs_f64();
                tracing::info!(model = &*self.pool.model, pod = name, seconds, "node is ready");
                member.was_ready = true;
                if std::mem::take(&mut member.seen_starting) {
                    self.cold.started(seconds);
                    self.shared.metrics.cold_start.with_label_values(&[&*self.pool.model]).observe(seconds);
                }
            }
            if let (Some(node), None) = (&member.node, &member.drain) {
                self.pool.set_state(node, NodeState::Ready);
            }
        }
    }

    /// Tells the other gateways what is asked of this one and what it holds on pods that drain, and KEDA what the leader says.
    fn report(&mut self) {
        let held = |member: &Member| {
            let mark = &member.drain.as_ref()?.mark;
            // What the pod says every gateway can know.
            let known = member.pod.mark.as_ref().is_some_and(|there| there.id == mark.id);
            known.then(|| (mark.id.clone(), member.requests()))
        };
        let news =
            PoolReport { held: self.members.values().filter_map(held).collect(), ..PoolReport::default() };
        let due = |(at, before): &(Instant, PoolReport)| at.elapsed() > REPORT || *before != news;
        let model = &self.pool.model;
        if self.reported.as_ref().is_none_or(due) {
            let demand = self.pool.demand();
            let report = PoolReport {
                active: demand.active,
                queued: demand.queued,
                arrivals: demand.arrivals,
                departed_60: demand.departed_60,
                ..news.clone()
            };
            self.shared.cluster.report(model, self.part, report);
            self.reported = Some((Instant::now(), news));
        }
        if let (Actuator::Keda, Some(said)) = (self.config.actuator, &self.said)
            && let Some((replicas, floor)) = said.last().zip(said.floor(Instant::now()))
        {
            let word = Word { workload: self.config.workload(), replicas, floor };
            self.shared.cluster.say(model, word);
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
            .map(|(_, member)| {
                let drain = member.drain.as_ref();
                let marked = !member.unmarked();
                let given_up = marked && drain.is_some_and(|drain| drain.mark.given_up);
                let over = drain.is_some_and(|drain| drain.since.elapsed() > longest);
                let left = |drain: &Drain| {
                    let written = drain.written.filter(|_| marked && member.requests() == 0);
                    let cluster = &self.shared.cluster;
                    written.is_some_and(|at| cluster.left(&self.pool.model, self.part, &drain.mark.id, at))
                };
                PodView {
                    index: member.pod.index,
                    ready: member.was_ready && member.pod.ready,
                    down: member.was_ready && !member.pod.ready,
                    draining: drain.is_some(),
                    empty: given_up || over || drain.is_some_and(left),
                    victim: given_up && member.pod.lowest_cost,
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
        let given_up = |member: &Member| member.pod.mark.as_ref().is_some_and(|mark| mark.given_up);
        self.staying().iter().filter(|(_, member)| !given_up(member)).count()
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
                    workload = self.config.workload(),
                    was,
                    is = scale.replicas,
                    "somebody else changed `replicas`; only one should"
                );
            }
            (reach.scale, reach.read_at) = (scale, Instant::now());
        }
        let (now, replicas, pods) = (Instant::now(), reach.scale.replicas, self.staying().len());
        if self.said.is_none() {
            // What KEDA was told before it may yet act on; pods that work were let in because it may not.
            let word = self.word().filter(|_| keda);
            let working = least(reach.workload.order, &self.views());
            let earlier = word.as_ref().map(|word| (word.floor.max(working), acts));
            let standing = word.map_or(replicas, |word| word.replicas);
            self.said = Some(Said::begin(standing, replicas, earlier, now));
        }
        let Some(said) = &mut self.said else { return Ok(()) };
        if !keda {
            said.say(replicas, now, acts);
        }
        said.see(replicas, pods, now, CONTROLLER_ACTS);
        Ok(())
    }

    /// One step towards `wanted`.
    async fn act(&mut self, reach: &mut Reach, wanted: usize) -> Result<(), String> {
        let keda = self.config.actuator == Actuator::Keda;
        // A number may stand in the Lease for a round after the next was said.
        let round = Duration::from_secs(self.shared.live().config.autoscale.lease_s);
        let acts = if keda { KEDA_ACTS + round } else { CONTROLLER_ACTS };
        self.look(reach, acts).await?;
        let (now, replicas) = (Instant::now(), reach.scale.replicas);
        let dry_run = self.shared.live().config.autoscale.dry_run;
        if let Some(said) = self.said.as_mut().filter(|_| dry_run) {
            said.say(replicas, now, acts);
        }
        let Some((said, floor)) = self.said.as_ref().and_then(|said| said.last().zip(said.floor(now))) else {
            return Ok(());
        };
        let terms = Terms { order: reach.workload.order, settled: self.settled(), said, floor };
        let mut steps = steps(terms, &self.views(), wanted);
        let turned = if dry_run { Ok(()) } else { self.turn(&reach.workload, &steps).await };
        if turned.is_err() {
            // A pod on which nothing can be written is no reason not to have more.
            steps.replicas = steps.replicas.max(said);
        }
        if !self.shared.cluster.leads() {
            return turned;
        }
        if keda {
            if let Some(said) = self.said.as_mut().filter(|_| !dry_run) {
                said.say(steps.replicas, Instant::now(), acts);
            }
            return turned;
        }
        if steps.replicas == replicas {
            return turned;
        }
        // What was planned for must still hold; a change in between is found by its version.
        let now = reach.workload.scale().await?;
        let same = now.replicas == replicas;
        (reach.scale, reach.read_at) = (now, Instant::now());
        if same && self.shared.cluster.leads() {
            let set = reach.workload.set(&reach.scale, steps.replicas, dry_run).await?;
            tracing::info!(
                model = &*self.pool.model,
                workload = self.config.workload(),
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
        turned
    }

    /// Gives pods no more requests, or some again, and writes on them what was decided. A pod works again only once it is no
    /// longer marked.
    async fn turn(&mut self, workload: &Workload, steps: &Steps) -> Result<(), String> {
        let names: Vec<String> = self.staying().iter().map(|(name, _)| (*name).clone()).collect();
        for &at in &steps.drain {
            let Some(member) = self.members.get_mut(&names[at]) else { continue };
            member.drain();
            settle(&self.pool, member);
        }
        for (at, name) in names.iter().enumerate() {
            if !self.shared.cluster.leads() {
                return Ok(());
            }
            let Some(member) = self.members.get_mut(name) else { continue };
            let unmarked = member.unmarked();
            if unmarked {
                member.drain();
            }
            let mut mark = member.drain.as_ref().map(|drain| drain.mark.clone());
            if steps.revive.contains(&at) {
                mark = None;
            } else if let Some(mark) = mark.as_mut().filter(|_| !unmarked && steps.victims.contains(&at)) {
                mark.given_up = true;
            }
            if !member.carries(mark.as_ref()) {
                workload.write(name, mark.as_ref()).await?;
                member.wrote(mark.clone());
            }
            match (&mut member.drain, mark) {
                (Some(drain), Some(mark)) => drain.mark = mark,
                (Some(_), None) => {
                    member.drain = None;
                    settle(&self.pool, member);
                    self.event("revived");
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Makes the node's state what the pod says of it.
fn settle(pool: &Arc<ModelPool>, member: &Member) {
    let Some(node) = &member.node else { return };
    let wanted = match (member.out(), node.state()) {
        (true, state) if state != NodeState::Draining => NodeState::Draining,
        (false, NodeState::Draining) if member.was_ready && member.pod.ready => NodeState::Ready,
        (false, NodeState::Draining) => NodeState::Starting,
        // Kubernetes gives it no requests either; once it is ready again it is looked at anew.
        (false, NodeState::Ready | NodeState::Unhealthy) if !member.pod.ready => NodeState::Starting,
        _ => return,
    };
    pool.set_state(node, wanted);
}

impl Scaler for KubernetesScaler {
    async fn step(&mut self, wanted: Option<usize>) {
        if self.reach.is_none() {
            // The others know of this scaler before it looks at the pods: else one of them might take a pod that it gives requests.
            self.report();
            let known = self.shared.cluster.stands(self.part) || self.begun.elapsed() > PATIENCE;
            if !known || Instant::now() < self.pause_until {
                return;
            }
            match self.connect().await {
                Ok(reach) => self.reach = Some(reach),
                Err(problem) => return self.failed(problem),
            }
        }
        // Whoever decides nothing does what the pods say.
        let leads = wanted.is_some() && self.shared.cluster.leads();
        self.follow_pods();
        if !leads {
            self.said = None;
        }
        self.leads = leads;
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
            match (member.out(), member.was_ready) {
                (true, _) => supply.draining += 1,
                (false, true) => supply.ready += 1,
                (false, false) => supply.starting_age_s.push(member.since.elapsed().as_secs_f64()),
            }
        }
        // Pods that were given up are not coming while KEDA has yet to see it.
        let said = self.said.as_ref().and_then(Said::last).or_else(|| self.word().map(|word| word.replicas));
        let number = said.map_or(reach.scale.replicas, |said| said.min(reach.scale.replicas));
        let coming = number.saturating_sub(self.staying().len());
        self.asked.resize_with(coming, Instant::now);
        supply.starting_age_s.extend(self.asked.iter().map(|asked| asked.elapsed().as_secs_f64()));
        Some(supply)
    }

    /// The pods stay: they are the cluster's, and another gateway may lead them on.
    async fn stop(&mut self) {
        self.shared.cluster.forget(&self.pool.model, self.part);
        for member in self.members.values() {
            if let Some(node) = &member.node {
                self.pool.remove_node(node.id);
            }
        }
    }
}
